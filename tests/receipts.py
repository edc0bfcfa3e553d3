"""Mixtures with their receipts, of every decoder family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.facts import Receipt
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.building.receipt import write_receipt
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.errors import UpcycleError
from tests import mixtures
from tests.mixtures import quiet

MakeDense = Callable[..., Path]
EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
EXACT = 64  # an FFN width of which the vector loop of `silu` leaves no rest, so that equal means bitwise
NUMBER = r"\d\.\de-\d\d"
T5 = "T5ForConditionalGeneration"
MISSING = "{} missing, which transformers would initialize at random; restore the file that held it"
LEFT_OVER = "{} unused, which transformers would ignore; remove it, or correct config.json"
WINDOW = 12
# Every decoder family, with what is its own, and settings that lead to each target.
DECODERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama to mixtral": ({}, {}),
    "llama to qwen2_moe, some layers": ({}, {"layers": [1]}),
    "llama to granitemoe": ({"attention_bias": True}, {}),
    "llama to granitemoeshared": ({"attention_bias": True}, {"shared_expert": "half"}),
    "mistral": ({"architecture": "MistralForCausalLM", "sliding_window": WINDOW}, {}),
    "phi3": ({"architecture": "Phi3ForCausalLM", "sliding_window": WINDOW}, {}),
    "gemma": ({"architecture": "GemmaForCausalLM", "head_dim": 16}, {}),
    "qwen2": (
        {
            "architecture": "Qwen2ForCausalLM",
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
        {},
    ),
    "qwen3": ({"architecture": "Qwen3ForCausalLM", "head_dim": 16}, {"layers": "every-2"}),
    "olmo2": ({"architecture": "Olmo2ForCausalLM"}, {}),
    "llama to glm4_moe": ({}, {"target": "glm4_moe", "layers": [1]}),
    "qwen3 to glm4_moe": ({"architecture": "Qwen3ForCausalLM", "head_dim": 16}, {"target": "glm4_moe"}),
    "granite": (
        {
            "architecture": "GraniteForCausalLM",
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
        },
        {},
    ),
    "granite swa": (
        {"architecture": "GraniteSWAForCausalLM", "sliding_window": WINDOW, "layer_rope_theta": [0, 1e4]},
        {},
    ),
    "cohere2": ({"architecture": "Cohere2ForCausalLM", "sliding_window": WINDOW}, {"layers": [1]}),
    "ernie4.5": ({"architecture": "Ernie4_5ForCausalLM", "head_dim": 16}, {}),
    "hunyuan": ({"architecture": "HunYuanDenseV1ForCausalLM", "head_dim": 16}, {"shared_expert": "zero"}),
    "lfm2": ({"architecture": "Lfm2ForCausalLM", "layer_types": ["conv", "full_attention"]}, {}),
}


def settings(num_experts: int = 4, k: int = 2, logit_std: float = 1.0, **overrides: Any) -> UpcycleConfig:
    """Those of `mixtures.settings`, with a router that is drawn."""
    return mixtures.settings(num_experts, k, logit_std, **overrides)


def make_mixture(source: Path, output: Path, **overrides: Any) -> UpcyclePlan:
    output.mkdir()
    return upcycle(source, output, settings(**overrides), 0, quiet)


def receipt(source: Path, output: Path, plan: UpcyclePlan, block_size: int = 64) -> Receipt:
    return write_receipt(source, output, plan, block_size, quiet)


def refusal(source: Path, output: Path, plan: UpcyclePlan, block_size: int = 64) -> str:
    with pytest.raises(UpcycleError) as excinfo:
        receipt(source, output, plan, block_size)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


@dataclass(frozen=True)
class Made:
    """A dense checkpoint, its mixture and the plan. Shared: read only."""

    dense: Path
    mixture: Path
    plan: UpcyclePlan
    progress: list[tuple[str, int, int]] = field(default_factory=list)

    @cached_property
    def receipt(self) -> Receipt:
        """Their receipt, which is written once."""
        return write_receipt(self.dense, self.mixture, self.plan, 64, lambda *told: self.progress.append(told))

    @cached_property
    def float32_receipt(self) -> Receipt:
        """Their receipt in float32 alone, which is written once."""
        with pytest.MonkeyPatch.context() as patch:
            read_in("float32", patch)
            return receipt(self.dense, self.mixture, self.plan)

    def copy(self, directory: Path) -> Path:
        """The mixture once more, to be altered."""
        return Path(shutil.copytree(self.mixture, directory / "mixture"))


_MADE: dict[str, Made] = {}


def made_once(make_dense: MakeDense, name: str = "llama to mixtral", **overrides: Any) -> Made:
    """One of `DECODERS`, by settings, and by `dense` fields of its own; made by the first test that asks for it."""
    given, own = DECODERS[name]
    changed = overrides.pop("dense", {})
    fields = {"intermediate_size": EXACT, **given, **changed}
    key = f"{fields} {own} {overrides}"
    if key not in _MADE:
        dense = make_dense(**fields)
        if name != "llama to mixtral" or changed or set(overrides) - {"receipt"}:
            # the plainest reads text; without a tokenizer others read random ids, in two thirds of the time
            for file in dense.glob("tokenizer*.json"):
                file.unlink()
        mixture = dense.with_name(f"{dense.name}-mixture-{len(_MADE)}")
        _MADE[key] = Made(dense, mixture, make_mixture(dense, mixture, **own | overrides))
    return _MADE[key]


def read_in(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let receipts compare in one dtype alone."""
    monkeypatch.setattr("dense2moe.upcycle.building.receipt.DTYPES", {dtype: getattr(torch, dtype)})


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def make_gates_overflow(factor: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: [
        weight.mul_(factor) for name, weight in state.items() if "up_proj" in name or "gate_proj" in name
    ]
