"""What has changed after a step is what was to learn.

Every tensor of the checkpoint is counted, for every target and every `train`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shapes import each_shape

from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import SELECTION_BIASES, load_model, sparse_layers
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.phase import Phase
from dense2moe.upcycle.training.phase_run import run_phase
from tests.conftest import MakeDense

RANK = 2


@dataclass(frozen=True)
class Shape:
    """A mixture, and what its tensors on the disk are called, beside `self_attn` and norms."""

    architecture: str
    settings: dict[str, Any]
    experts: str
    routers: str
    dense_ffn: str = "nothing"
    gates: str = "nothing"
    attention: str = r"self_attn\.\w_proj\.weight"
    norm: str = "model.norm.weight"
    overrides: dict[str, Any] = field(default_factory=dict)


QWEN_DENSE = r"layers\.\d\.mlp\.\w+_proj"
QWEN_ROUTERS = r"mlp\.gate\.weight"
SHAPES = {
    "mixtral": Shape("LlamaForCausalLM", {}, r"block_sparse_moe\.experts", r"block_sparse_moe\.gate"),
    "qwen2_moe": Shape("Qwen2ForCausalLM", {}, r"mlp\.experts", QWEN_ROUTERS),
    "qwen2_moe, shared": Shape(
        "Qwen2ForCausalLM",
        {"shared_expert": "half"},
        r"mlp\.(experts|shared_expert)\.",
        QWEN_ROUTERS,
        gates="shared_expert_gate",
    ),
    "qwen2_moe, some layers": Shape("LlamaForCausalLM", {"layers": [1]}, r"mlp\.experts", QWEN_ROUTERS, QWEN_DENSE),
    "qwen2_moe, some layers, shared": Shape(
        "Qwen2ForCausalLM",
        {"layers": [0], "shared_expert": "half"},
        r"mlp\.(experts|shared_expert)\.",
        QWEN_ROUTERS,
        QWEN_DENSE,
        "shared_expert_gate",
    ),
    "qwen3_moe": Shape("Qwen3ForCausalLM", {}, r"mlp\.experts", QWEN_ROUTERS),
    "qwen3_moe, some layers": Shape("Qwen3ForCausalLM", {"layers": [0]}, r"mlp\.experts", QWEN_ROUTERS, QWEN_DENSE),
    "granitemoe": Shape("GraniteForCausalLM", {}, r"block_sparse_moe\.(in|out)put_linear", r"router\.layer"),
    "granitemoeshared": Shape(
        "GraniteForCausalLM",
        {"shared_expert": "half"},
        r"(block_sparse_moe|shared_mlp)\.(in|out)put_linear",
        r"router\.layer",
    ),
    "glm4_moe": Shape("LlamaForCausalLM", {"target": "glm4_moe"}, r"mlp\.experts", QWEN_ROUTERS),
    "glm4_moe, some layers, shared": Shape(
        "LlamaForCausalLM",
        {"target": "glm4_moe", "layers": [1], "shared_expert": "half"},
        r"mlp\.(shared_)?experts\.",
        QWEN_ROUTERS,
        QWEN_DENSE,
    ),
    "flex_olmo": Shape("Olmo2ForCausalLM", {}, r"mlp\.experts", QWEN_ROUTERS),
    "granitemoe_swa": Shape(
        "GraniteSWAForCausalLM", {}, r"block_sparse_moe\.experts", r"block_sparse_moe\.router\.weight"
    ),
    "cohere2_moe, some layers, shared": Shape(
        "Cohere2ForCausalLM",
        {"layers": [1], "shared_expert": "half"},
        r"mlp\.(shared_)?experts\.",
        QWEN_ROUTERS,
        QWEN_DENSE,
    ),
    "ernie4_5_moe": Shape("Ernie4_5ForCausalLM", {}, r"mlp\.experts", QWEN_ROUTERS, overrides={"head_dim": 8}),
    "hunyuan_v1_moe, shared": Shape(
        "HunYuanDenseV1ForCausalLM",
        {"shared_expert": "half"},
        r"mlp\.(experts|shared_mlp)\.",
        r"mlp\.gate\.wg\.weight",
        overrides={"head_dim": 8},
    ),
    "lfm2_moe": Shape(
        "Lfm2ForCausalLM",
        {"layers": [1]},
        r"feed_forward\.experts",
        r"feed_forward\.gate\.weight",
        r"layers\.0\.feed_forward\.w\d",
        attention=r"self_attn\.\w+_proj\.weight|conv\.(in|out)_proj\.weight",
        norm="model.embedding_norm.weight",
        overrides={"layer_types": ["conv", "full_attention"]},
    ),
}
# of the shapes whose tensors have names as others have, what learns is tested in one way alone
OTHERS = {
    "granitemoe_swa",
    "cohere2_moe, some layers, shared",
    "ernie4_5_moe",
    "hunyuan_v1_moe, shared",
    "lfm2_moe",
}
TRAIN = ("all", "experts", "router", "lora", "last-1")
CASES = [(name, train) for name in SHAPES for train in TRAIN]


@pytest.fixture(scope="module")
def mixture(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The mixture of a shape, made once. Shared: read only."""

    @cache
    def mixture(name: str) -> Path:
        shape, directory = SHAPES[name], tmp_path_factory.mktemp("mixture")
        settings = {
            "num_experts": 4,
            "experts": ExpertsConfig(noise=0.5),
            "router": RouterConfig(logit_std=1.0),
        } | shape.settings
        dense = make_dense(architecture=shape.architecture, **shape.overrides)
        upcycle(dense, directory, UpcycleConfig.model_validate(settings), 0, lambda *_: None)
        return directory

    return mixture


def step(directory: Path, output: Path, **settings: Any) -> None:
    """Train the checkpoint for one step on 512 tokens, and save it."""
    config = FinetuneConfig(
        steps=1,
        warmup_steps=0,
        learning_rate=1e-2,
        router_learning_rate=1e-2,
        precision="float32",
        control=False,
        bias_update_rate=0.0,
        lora_rank=RANK,
        lora_alpha=4,
        **settings,
    )
    blocks, domains = (
        torch.randint(300, (8, 64), generator=torch.Generator().manual_seed(0)),
        torch.zeros(8, dtype=torch.int64),
    )
    model = load_model(directory, torch.float32)
    phase = Phase(
        "m",
        0,
        config,
        Examples.of_blocks(blocks, domains),
        Examples.of_blocks(blocks, domains),
        1,
        0,
        1,
        sparse_layers(model),
        "float32",
        0,
    )
    run_phase(model, None, phase, output / "checkpoints", lambda *_: None)
    model.save_pretrained(output)


def expect(name: str, train: str, shape: Shape) -> bool:
    """Whether a tensor is to change."""

    def is_a(pattern: str) -> bool:
        return re.search(pattern, name) is not None

    gates = is_a(shape.routers) or is_a(shape.gates)
    match train:
        case "all":
            return True
        case "experts":
            return is_a(shape.experts) or gates
        case "router":
            return gates
        case "last-1":
            return "layers.1." in name or name == shape.norm  # the head is the embedding
        case _:
            return is_a(shape.attention) or is_a(shape.experts) or is_a(shape.dense_ffn) or gates


@pytest.mark.parametrize(
    ("name", "train"),
    each_shape(
        CASES,
        {f"{name}, {train}" for name, train in CASES if name not in OTHERS or train == "lora"},
        name=", ".join,
    ),
)
def test_one_step_changes_what_is_meant_and_by_the_rank_that_is_meant(
    name: str, train: str, mixture: Callable[[str], Path], tmp_path: Path
) -> None:
    shape = SHAPES[name]
    before, after = mixture(name), tmp_path / "after"
    step(before, after, train=train)
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    tensors = {key for key in old if old[key].numel() and not key.endswith(SELECTION_BIASES)}
    if not re.search("shared", name):
        tensors = {key for key in tensors if "shared" not in key}  # Qwen2-MoE's gate of a shared expert of width 0
    changed = {key for key in tensors if not torch.equal(old[key], new[key])}
    assert changed == {key for key in tensors if expect(key, train, shape)}
    assert all(torch.equal(old[key], new[key]) for key in old.keys() - tensors)
    for key in changed:
        difference = (new[key] - old[key]).double()
        if train != "lora" or re.search(f"{shape.routers}|{shape.gates}", key):
            continue
        assert difference.ndim >= 2
        ranks = torch.linalg.matrix_rank(difference, rtol=1e-3)
        assert bool((ranks == RANK).all()), (key, ranks)
