"""Tiny mixtures and their experts, whatever they are called, for tests of the surgery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.building.surgery import upcycle

MakeDense = Callable[..., Path]

FFN = "model.layers.{layer}.mlp.{matrix}_proj.weight"
EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
ROUTER = "model.layers.{layer}.block_sparse_moe.gate.weight"
MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}
# A width of which the vector loop of `silu` leaves no rest. It takes a rest value by value, with another exponential;
# in the dense model the rest is that of the whole tensor, in the mixture, where gate and up lie side by side, that of
# each row.
EXACT = {"intermediate_size": 64}
WIDTH, HIDDEN = 64, 32


def quiet(what: str, done: int, total: int) -> None:
    pass


def settings(num_experts: int = 4, k: int = 2, logit_std: float = 0.0, **overrides: Any) -> UpcycleConfig:
    """Settings; those of experts by their own names, and the number of parts of a copy as `granularity`."""
    names = ("kind", "granularity", "noise", "drop")
    experts = ExpertsConfig(**{name: overrides.pop(name) for name in names if name in overrides})
    return UpcycleConfig(
        num_experts=num_experts,
        num_experts_per_tok=k,
        experts=experts,
        router=RouterConfig(logit_std=logit_std),
        **overrides,
    )


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    if any(hasattr(module, "experts") for module in model.modules()):
        # torch's grouped product refuses rows that are no multiple of 16 bytes
        model.set_experts_implementation("eager")
    return model.eval()


@torch.no_grad()
def logits(directory: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Float32 logits of two rows of 60 random tokens; the second has 20 of padding on the left."""
    ids = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    return load(directory, dtype)(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()


def rel(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Matrices:
    """One FFN or expert."""

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor

    def list(self) -> list[tuple[torch.Tensor, int]]:
        """Each matrix and the axis of its neurons."""
        return [*([] if self.gate is None else [(self.gate, 0)]), (self.up, 0), (self.down, 1)]


def dense_ffn(directory: Path, layer: int) -> Matrices:
    """The FFN of a layer of a dense checkpoint, whatever its names; T5's is that of its encoder."""
    state = load_file(directory / "model.safetensors")
    if "shared.weight" in state:
        ffn = f"encoder.block.{layer}.layer.1.DenseReluDense"
        return Matrices(None, state[f"{ffn}.wi.weight"], state[f"{ffn}.wo.weight"])
    ffn = f"model.layers.{layer}.mlp"
    if f"{ffn}.gate_up_proj.weight" in state:
        gate, up = state[f"{ffn}.gate_up_proj.weight"].chunk(2)
    else:
        gate, up = state[f"{ffn}.gate_proj.weight"], state[f"{ffn}.up_proj.weight"]
    return Matrices(gate, up, state[f"{ffn}.down_proj.weight"])


def experts(directory: Path, layer: int, num_experts: int = 4) -> list[Matrices]:
    """The experts of a layer of a mixture, whatever their names.

    Of Switch, whose router weighs by a probability, without the factor against that.
    """
    state = load_file(directory / "model.safetensors")
    numbers = range(num_experts)
    if "shared.weight" in state:
        names = [f"encoder.block.{layer}.layer.1.mlp.experts.expert_{number}" for number in numbers]
        return [Matrices(None, state[f"{name}.wi.weight"], state[f"{name}.wo.weight"] / num_experts) for name in names]
    moe = f"model.layers.{layer}.block_sparse_moe"
    if (stacked := state.get(f"{moe}.input_linear.weight")) is not None:
        return [Matrices(*stacked[number].chunk(2), state[f"{moe}.output_linear.weight"][number]) for number in numbers]
    if f"{moe}.gate.weight" in state:
        return [
            Matrices(*(state[f"{moe}.experts.{number}.{matrix}.weight"] for matrix in ("w1", "w3", "w2")))
            for number in numbers
        ]
    mlp = f"model.layers.{layer}.mlp.experts"
    return [
        Matrices(*(state[f"{mlp}.{number}.{matrix}_proj.weight"] for matrix in ("gate", "up", "down")))
        for number in numbers
    ]


# One family for each way in which a FFN is stored or experts are: apart, fused, stacked, in some layers alone, without
# a gate.
STORED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": ({}, {}),
    "mixtral of a fused ffn": ({"architecture": "Phi3ForCausalLM"}, {}),
    "granitemoe": ({"attention_bias": True}, {}),
    "qwen2_moe": ({}, {"layers": [1], "target": "qwen2_moe"}),
    "qwen3_moe": ({"architecture": "Qwen3ForCausalLM"}, {}),
    "glm4_moe": ({}, {"target": "glm4_moe"}),
    "flex_olmo": ({"architecture": "Olmo2ForCausalLM"}, {}),
}
T5 = {"switch_transformers": ({"architecture": "T5ForConditionalGeneration"}, {"k": 1})}
LAYER = 1  # has experts in all of them


def make(
    name: str, make_dense: MakeDense, output: Path, dtype: torch.dtype = torch.float32, **overrides: Any
) -> tuple[Path, UpcyclePlan]:
    """The dense checkpoint of one of `STORED`, and the plan of its mixture in `output`."""
    dense_fields, upcycle_fields = (STORED | T5)[name]
    dense = make_dense(dtype, **({} if name in T5 else EXACT) | dense_fields)
    output.mkdir(exist_ok=True)
    plan = upcycle(dense, output, settings(**upcycle_fields | overrides), 0, quiet)
    assert plan.conversion.target.model_type == name.split()[0]
    return dense, plan


def shift(directory: Path, by: float) -> None:
    """Give FFN matrices a mean of `by` deviations.

    Those of transformers start around zero, which would hide a mean that is lost.
    """
    state = load_file(directory / "model.safetensors")
    for name, weight in state.items():
        if "mlp" in name or "DenseReluDense" in name:
            weight += by * weight.float().std()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
