"""Surgery writes copies, noise, redrawn neurons, parts, shared experts and routers as they were asked for.

And nothing from a hostile source.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.pieces import RouterRows
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.receipt import ROUNDING_LIMIT, rounding_limit
from dense2moe.upcycle.building.surgery import check_written, upcycle
from dense2moe.upcycle.checkpoints import reader, writer
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.errors import UpcycleError

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

MakeDense = Callable[..., Path]

SOURCES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "another activation and epsilon": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2},
}
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


# The function is kept; `test_families.py` asks it of every family


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_copy_alone_has_the_weight_one_and_is_the_dense_model_bit_for_bit(
    source: str, dtype: torch.dtype, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(dtype, **EXACT, **SOURCES[source])
    upcycle(dense, tmp_path, settings(k=1), 0, quiet)
    assert torch.equal(logits(tmp_path, dtype), logits(dense, dtype))


@pytest.mark.parametrize("source", SOURCES)
def test_one_copy_of_several_in_use_is_the_dense_model_within_rounding(
    source: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Not bit for bit: with two threads torch's product of 1 to 10 rows.

    As few tokens as an expert may get, sums in another order than of many.
    """
    dense = make_dense(**EXACT, **SOURCES[source])
    upcycle(dense, tmp_path, settings(k=1, logit_std=1.0), 0, quiet)
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("source", SOURCES)
def test_a_drawn_router_over_copies_of_an_uneven_width_differs_by_rounding_alone(
    source: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(**SOURCES[source])
    upcycle(dense, tmp_path, settings(logit_std=1.0), 0, quiet)
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("intermediate_size", [40, 43, 172])
def test_an_ffn_of_any_width_differs_by_rounding_alone(
    intermediate_size: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(intermediate_size=intermediate_size)
    upcycle(dense, tmp_path, settings(), 0, quiet)
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("logit_std", [0.0, 1.0])
def test_three_copies_of_a_third_each_differ_by_rounding_alone(
    logit_std: float, dense_checkpoint: Path, tmp_path: Path
) -> None:
    plan = upcycle(dense_checkpoint, tmp_path, settings(num_experts=5, k=3, logit_std=logit_std), 0, quiet)
    assert not plan.bitwise_at_zero  # thirds do not add up to one in binary
    assert rel(logits(tmp_path), logits(dense_checkpoint)) <= ROUNDING_LIMIT


def test_shards_in_and_shards_out_hold_the_same_model(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(max_shard_size="30KB", **EXACT)
    assert len(list(dense.glob("*.safetensors"))) > 1
    upcycle(dense, tmp_path, settings(num_experts=64, shard_bytes=1_000_000), 0, quiet)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert all(file.stat().st_size < 1_000_000 + 50_000 for file in files)  # the header comes on top of the data
    assert torch.equal(logits(tmp_path), logits(dense))


def test_noise_and_a_drawn_router_change_the_function(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    assert rel(logits(mixture_checkpoint), logits(dense_checkpoint)) > 100 * ROUNDING_LIMIT


# What is written


def test_experts_without_noise_are_the_ffn_and_everything_else_is_unchanged(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(torch.bfloat16, tie_word_embeddings=False)
    upcycle(dense, tmp_path, settings(num_experts=3, logit_std=1.0), 0, quiet)
    source, found = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        del found[ROUTER.format(layer=layer)]
        for matrix, target in MATRICES.items():
            weight = source.pop(FFN.format(layer=layer, matrix=matrix))
            for expert in range(3):
                assert torch.equal(found.pop(EXPERT.format(layer=layer, expert=expert, matrix=target)), weight)
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in source.items())


@pytest.mark.parametrize("name", STORED)
def test_experts_without_noise_are_the_ffn_however_both_are_stored(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, _ = make(name, make_dense, tmp_path, torch.bfloat16)
    for expert in experts(tmp_path, LAYER):
        for (found, _), (expected, _) in zip(expert.list(), dense_ffn(dense, LAYER).list(), strict=True):
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, expected)


def test_a_fused_attention_is_parted_into_query_key_and_value(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make("mixtral of a fused ffn", make_dense, tmp_path)
    source, found = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        parts = [found[f"{attention}.{matrix}_proj.weight"] for matrix in "qkv"]
        # four heads of queries, two of keys and of values, of eight
        assert [tuple(part.shape) for part in parts] == [
            (32, 32),
            (16, 32),
            (16, 32),
        ]
        assert torch.equal(torch.cat(parts), source[f"{attention}.qkv_proj.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_norms_and_embedding_are_folded_in_float32_and_its_head_is_not(
    dtype: torch.dtype, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(dtype, architecture="GemmaForCausalLM", **EXACT)
    upcycle(dense, tmp_path, settings(), 0, quiet)
    source, found = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    embedding = source["model.embed_tokens.weight"]
    assert torch.equal(found["lm_head.weight"], embedding)
    assert torch.equal(found["model.embed_tokens.weight"], embedding.float() * torch.tensor(32.0).sqrt())
    norms = [name for name in source if "norm" in name]
    assert len(norms) == 2 * 2 + 1
    assert all(torch.equal(found[name], 1.0 + source[name].float()) for name in norms)


@pytest.mark.parametrize(
    ("gate", "up", "down"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),  # neither holds the other
    ],
)
@pytest.mark.parametrize(
    ("dense_fields", "overrides"),
    [
        ({"attention_bias": True}, {}),
        ({"attention_bias": True}, {"shared_expert": "half"}),
        ({}, {"layers": [1], "shared_expert": "half"}),
    ],
    ids=["stacked", "stacked and shared", "shared"],
)
def test_matrices_of_several_dtypes_lose_no_bit(
    dense_fields: dict[str, Any],
    overrides: dict[str, Any],
    gate: torch.dtype,
    up: torch.dtype,
    down: torch.dtype,
    make_dense: MakeDense,
    tmp_path: Path,
) -> None:
    """Where gate and up share a tensor it is of a dtype that holds both; whatever is by itself keeps its own."""
    source, output = make_dense(**EXACT, **dense_fields), tmp_path / "mixture"
    kinds = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    stored = load_file(source / "model.safetensors")
    state = {
        name: tensor.to(next((kind for part, kind in kinds.items() if part in name), tensor.dtype))
        for name, tensor in stored.items()
    }
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    output.mkdir()
    plan = upcycle(source, output, settings(logit_std=1.0, **overrides), 0, quiet)
    assert check_written(source, output, plan, 0, quiet) == len(plan.writes)
    ffn = dense_ffn(source, LAYER)
    state = load_file(output / "model.safetensors")
    found = [(expert, 0.5 if "shared_expert" in overrides else 1.0) for expert in experts(output, LAYER)]
    if (fused := state.get(f"model.layers.{LAYER}.shared_mlp.input_linear.weight")) is not None:
        found.append((Matrices(*fused.chunk(2), state[f"model.layers.{LAYER}.shared_mlp.output_linear.weight"]), 0.5))
    elif "shared_expert" in overrides:
        shared = (state[f"model.layers.{LAYER}.mlp.shared_expert.{matrix}_proj.weight"] for matrix in MATRICES)
        found.append((Matrices(*shared), 1.0))  # which a sigmoid of zero halves
    expected = (*[torch.promote_types(gate, up)] * 2, down) if dense_fields else (gate, up, down)
    for expert, scale in found:
        assert torch.equal(expert.gate.float(), ffn.gate.float())
        assert torch.equal(expert.up.float(), ffn.up.float())
        assert torch.equal(expert.down.float(), scale * ffn.down.float())
        assert (expert.gate.dtype, expert.up.dtype, expert.down.dtype) == expected
    assert rel(logits(output), logits(source)) <= ROUNDING_LIMIT


def test_both_names_of_the_number_of_experts_are_in_the_config_of_qwen3_moe(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    make("qwen3_moe", make_dense, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["num_experts"], written["num_local_experts"]) == (4, 4)


def test_the_tokenizer_and_the_generation_config_come_along(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        assert (mixture_checkpoint / name).read_bytes() == (dense_checkpoint / name).read_bytes()
    dense, mixture = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in (dense_checkpoint, mixture_checkpoint)
    )
    # the name that transformers 4 knows, of the same class
    assert mixture == dense | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_progress_counts_every_tensor_up_to_the_last(dense_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    plan = upcycle(dense_checkpoint, tmp_path, settings(), 0, lambda *report: seen.append(report))
    total = len(open_checkpoint(tmp_path).entries)
    assert seen == [("writing tensors", done, total) for done in range(1, total + 1)]
    assert len(plan.writes) == total


# Noise


@pytest.mark.parametrize("name", [*STORED, *T5])
def test_every_expert_has_noise_of_its_own_relative_to_the_weights_deviation(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, _ = make(name, make_dense, tmp_path, noise=0.5)
    noises = []
    for expert in experts(tmp_path, LAYER):
        for (found, _), (weight, _) in zip(expert.list(), dense_ffn(dense, LAYER).list(), strict=True):
            # 2048 draws: the standard error of the deviation is 1.6 %; twelve of them lie within four of it.
            assert float((found - weight).std()) == pytest.approx(0.5 * float(weight.std()), rel=0.065)
            noises.append((found - weight).flatten())
    assert len(noises) == 4 * (2 if name in T5 else 3)
    for one, other in combinations(noises, 2):
        # Correlation of 2048 independent pairs has deviation .022; equal draws would have 1.
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.12


def test_no_two_matrices_of_a_checkpoint_have_the_same_noise(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    noises = []
    for layer in range(2):
        weights = dense_ffn(dense_checkpoint, layer).list()
        for expert in experts(mixture_checkpoint, layer):
            noises += [
                (found - weight).flatten() / weight.std()
                for (found, _), (weight, _) in zip(expert.list(), weights, strict=True)
            ]
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(len(noises))
    assert len(noises) == 2 * 4 * 3
    # of 1536 independent pairs each; the deviation is .026, and there are 276 of them
    assert float(correlations.abs().max()) < 0.15


def test_the_seed_alone_decides_what_is_drawn(dense_checkpoint: Path, tmp_path: Path) -> None:
    config = settings(noise=0.1, drop=0.25, logit_std=1.0)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / name).mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ord(name))  # the global generator has no part in it
            upcycle(dense_checkpoint, tmp_path / name, config, seed, quiet)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_what_is_drawn_for_a_tensor_depends_on_no_other_tensor(make_dense: MakeDense, tmp_path: Path) -> None:
    """So the order of writing changes nothing."""
    noises = {}
    for name, num_layers, num_experts in (("small", 1, 3), ("large", 3, 6)):
        (tmp_path / name).mkdir()
        dense = make_dense(num_hidden_layers=num_layers)
        upcycle(dense, tmp_path / name, settings(num_experts=num_experts, noise=0.1), 0, quiet)
        gate = dense_ffn(dense, 0).gate
        noises[name] = torch.stack(
            [(expert.gate - gate) / gate.std(correction=0) for expert in experts(tmp_path / name, 0, 3)]
        )
    # two sums of different weights round differently
    assert torch.allclose(noises["small"], noises["large"], atol=1e-5)


# Dropped neurons


def shift(directory: Path, by: float) -> None:
    """Give FFN matrices a mean of `by` deviations.

    Those of transformers start around zero, which would hide a mean that is lost.
    """
    state = load_file(directory / "model.safetensors")
    for name, weight in state.items():
        if "mlp" in name or "DenseReluDense" in name:
            weight += by * weight.float().std()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def changed(found: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Which neurons have any other bit than the dense model's."""
    return (found != weight).any(1 - axis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*STORED, *T5])
def test_one_set_of_neurons_is_drawn_anew_in_gate_up_and_down_and_no_other_bit_changes(
    name: str, dtype: torch.dtype, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, plan = make(name, make_dense, tmp_path, dtype, drop=0.25)
    assert not plan.keeps_function
    assert not plan.keeps_function_at_zero
    sets = []
    for expert in experts(tmp_path, LAYER):
        pairs = [
            (found, weight, axis)
            for (found, axis), (weight, _) in zip(expert.list(), dense_ffn(dense, LAYER).list(), strict=True)
        ]
        masks = [changed(*pair) for pair in pairs]
        assert [int(mask.sum()) for mask in masks] == [WIDTH // 4] * len(masks)
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        sets.append(masks[0])
    for one, other in combinations(sets, 2):
        assert not torch.equal(one, other)  # of 5e14 sets


@pytest.mark.parametrize("name", [*STORED, *T5])
def test_a_weight_that_passes_in_chunks_is_changed_as_one(
    name: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "CHUNK_ELEMENTS", 5 * HIDDEN)  # five rows of gate and up, two of down
    dense, _ = make(name, make_dense, tmp_path, drop=0.25, noise=0.0)
    (tmp_path / "noisy").mkdir()
    make(name, make_dense, tmp_path / "noisy", noise=0.5)
    ffn = dense_ffn(dense, LAYER).list()
    for expert, noisy in zip(experts(tmp_path, LAYER), experts(tmp_path / "noisy", LAYER), strict=True):
        masks = [changed(found, weight, axis) for (found, axis), (weight, _) in zip(expert.list(), ffn, strict=True)]
        assert int(masks[0].sum()) == WIDTH // 4
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        for (found, _), (weight, _) in zip(noisy.list(), ffn, strict=True):
            assert float((found - weight).std()) == pytest.approx(0.5 * float(weight.std()), rel=0.065)  # as above


@pytest.mark.parametrize(
    ("dense_fields", "overrides"),
    [
        ({"architecture": "GemmaForCausalLM"}, {}),
        (
            {"architecture": "Phi3ForCausalLM"},
            {"num_experts": 8, "k": 4, "logit_std": 1.0, "kind": "granular", "granularity": 4},
        ),
        ({"attention_bias": True}, {"num_experts": 4, "k": 4, "kind": "split", "shared_expert": "half"}),
    ],
)
def test_chunks_change_no_bit_of_what_is_not_drawn_by_them(
    dense_fields: dict[str, Any],
    overrides: dict[str, Any],
    make_dense: MakeDense,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = make_dense(**EXACT, **dense_fields)
    for name in ("whole", "chunks"):
        (tmp_path / name).mkdir()
        upcycle(dense, tmp_path / name, settings(**overrides), 0, quiet)
        monkeypatch.setattr(reader, "CHUNK_ELEMENTS", 5 * HIDDEN)
    whole, chunks = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "chunks"))
    assert whole == chunks


def test_every_layer_has_sets_of_its_own(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make("mixtral", make_dense, tmp_path, drop=0.5)
    sets = [
        changed(expert.up, dense_ffn(dense, layer).up, 0) for layer in range(2) for expert in experts(tmp_path, layer)
    ]
    assert all(not torch.equal(one, other) for one, other in combinations(sets, 2))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_neurons_is_the_one_asked_for(share: float, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make("mixtral", make_dense, tmp_path, drop=share)
    for expert in experts(tmp_path, LAYER):
        assert int(changed(expert.up, dense_ffn(dense, LAYER).up, 0).sum()) == round(share * WIDTH)


@pytest.mark.parametrize("name", [*STORED, *T5])
def test_neurons_drawn_anew_have_the_mean_and_deviation_of_the_weight(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense_fields, upcycle_fields = (STORED | T5)[name]
    dense = make_dense(**({} if name in T5 else EXACT) | dense_fields)
    shift(dense, 2.0)
    upcycle(dense, tmp_path, settings(16, **upcycle_fields | {"drop": 0.5}), 0, quiet)
    weights = dense_ffn(dense, LAYER).list()
    for number, (weight, axis) in enumerate(weights):
        drawn = []
        for expert in experts(tmp_path, LAYER, 16):
            found = expert.list()[number][0]
            mask = changed(found, weight, axis)
            drawn.append((found[mask] if axis == 0 else found[:, mask]).flatten())
        values = torch.cat(drawn)
        # 16384 draws: the standard errors are .8 % of the deviation for the mean and .55 % of it for the deviation.
        assert len(values) == 16 * WIDTH // 2 * HIDDEN
        assert float(values.mean()) == pytest.approx(float(weight.mean()), abs=0.04 * float(weight.std()))
        assert float(values.std()) == pytest.approx(float(weight.std()), rel=0.03)


# Granular experts


@pytest.mark.parametrize("granularity", [2, 4])
@pytest.mark.parametrize("name", STORED)
def test_granular_experts_of_a_drawn_router_are_the_dense_model(
    name: str, granularity: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, plan = make(
        name, make_dense, tmp_path, num_experts=8, k=4, logit_std=1.0, kind="granular", granularity=granularity
    )
    assert plan.keeps_function
    # a tie of all may choose the first part of one copy and the second of another
    assert not plan.keeps_function_at_zero
    assert rounding_limit(plan, open_checkpoint(dense)) == ROUNDING_LIMIT  # powers of two round nothing
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("granularity", [2, 4])
@pytest.mark.parametrize("name", STORED)
def test_a_group_of_granular_experts_is_one_copy_cut_by_neurons(
    name: str, granularity: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, plan = make(
        name, make_dense, tmp_path, num_experts=8, k=4, logit_std=1.0, kind="granular", granularity=granularity
    )
    ffn, found = dense_ffn(dense, LAYER), experts(tmp_path, LAYER, 8)
    assert {tuple(expert.up.shape) for expert in found} == {(WIDTH // granularity, HIDDEN)}
    assert getattr(plan.target_config, plan.conversion.experts.width_field) == WIDTH // granularity
    for copy in range(0, 8, granularity):
        parts = found[copy : copy + granularity]
        assert torch.equal(torch.cat([part.gate for part in parts]), ffn.gate)
        assert torch.equal(torch.cat([part.up for part in parts]), ffn.up)
        assert torch.equal(torch.cat([part.down for part in parts], 1), ffn.down * granularity)
    router = next(
        tensor
        for key, tensor in load_file(tmp_path / "model.safetensors").items()
        if f"layers.{LAYER}." in key and is_router(key)
    )
    rows = router.reshape(8 // granularity, granularity, HIDDEN)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert len({tuple(row.tolist()) for row in router}) == 8 // granularity


def is_router(name: str) -> bool:
    return name.endswith(
        ("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.layer.weight", "router.classifier.weight")
    )


def test_all_parts_of_all_copies_with_a_zero_router_are_the_dense_model(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, plan = make("mixtral", make_dense, tmp_path, num_experts=4, k=4, kind="granular", granularity=2)
    assert plan.keeps_function_at_zero
    assert not plan.bitwise_at_zero
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


def test_a_scale_that_is_no_power_of_two_is_rounded_to_the_sources_dtype_and_judged_by_it(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(torch.bfloat16, intermediate_size=96)
    plan = upcycle(dense, tmp_path, settings(6, 3, logit_std=1.0, kind="granular", granularity=3), 0, quiet)
    down = dense_ffn(dense, LAYER).down
    for number, expert in enumerate(experts(tmp_path, LAYER, 6)):
        part = down[:, number % 3 * 32 : (number % 3 + 1) * 32]
        assert torch.equal(expert.down, (part.float() * 3).to(torch.bfloat16))
    eps = torch.finfo(torch.bfloat16).eps
    assert rounding_limit(plan, open_checkpoint(dense)) == 10 * eps
    # A weight is off by half an eps at most; two layers add such errors up, of many weights with either sign. Measured:
    # .5 eps.
    assert ROUNDING_LIMIT < rel(logits(tmp_path), logits(dense)) <= 2 * eps


# Split experts


@pytest.mark.parametrize("name", STORED)
def test_all_the_parts_of_one_ffn_with_a_zero_router_are_the_dense_model(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, plan = make(name, make_dense, tmp_path, num_experts=4, k=4, kind="split")
    assert plan.keeps_function_at_zero
    assert not plan.keeps_function
    assert not plan.bitwise_at_zero
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("name", STORED)
def test_split_experts_partition_the_neurons(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, plan = make(name, make_dense, tmp_path, num_experts=4, k=2, kind="split")
    assert not plan.keeps_function_at_zero  # with two of four there is half of the FFN
    ffn, found = dense_ffn(dense, LAYER), experts(tmp_path, LAYER)
    assert torch.equal(torch.cat([expert.gate for expert in found]), ffn.gate)
    assert torch.equal(torch.cat([expert.up for expert in found]), ffn.up)
    assert torch.equal(torch.cat([expert.down for expert in found], 1), ffn.down * 4)
    assert rel(logits(tmp_path), logits(dense)) > 1000 * ROUNDING_LIMIT


# Shared experts


@pytest.mark.parametrize("kind", ["half", "zero", "none"])
def test_the_shared_expert_of_qwen2_moe(kind: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make("qwen2_moe", make_dense, tmp_path, shared_expert=kind, layers="all")
    ffn, state = dense_ffn(dense, LAYER), load_file(tmp_path / "model.safetensors")
    mlp = f"model.layers.{LAYER}.mlp"
    gate, up, down = (state[f"{mlp}.shared_expert.{matrix}_proj.weight"] for matrix in ("gate", "up", "down"))
    assert torch.equal(state[f"{mlp}.shared_expert_gate.weight"], torch.zeros(1, HIDDEN))  # whose sigmoid is one half
    width = 0 if kind == "none" else WIDTH
    assert torch.equal(gate, ffn.gate[:width])
    assert torch.equal(up, ffn.up[:width])
    assert torch.equal(
        down, {"half": ffn.down, "zero": torch.zeros(HIDDEN, WIDTH), "none": torch.empty(HIDDEN, 0)}[kind]
    )
    assert all(
        torch.equal(expert.down, ffn.down / 2 if kind == "half" else ffn.down) for expert in experts(tmp_path, LAYER)
    )
    assert json.loads((tmp_path / "config.json").read_text())["shared_expert_intermediate_size"] == width


@pytest.mark.parametrize("kind", ["half", "zero", "none"])
def test_the_shared_expert_of_glm4_moe_is_counted_in_experts(kind: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make(
        "glm4_moe",
        make_dense,
        tmp_path,
        shared_expert=kind,
        kind="granular",
        granularity=2,
        num_experts=4,
        k=2,
        logit_std=1.0,
    )
    ffn, state = dense_ffn(dense, LAYER), load_file(tmp_path / "model.safetensors")
    mlp = f"model.layers.{LAYER}.mlp.shared_experts"
    gate, up, down = (state[f"{mlp}.{matrix}_proj.weight"] for matrix in ("gate", "up", "down"))
    width = 0 if kind == "none" else WIDTH
    assert torch.equal(gate, ffn.gate[:width])
    assert torch.equal(up, ffn.up[:width])
    assert torch.equal(
        down, {"half": ffn.down / 2, "zero": torch.zeros(HIDDEN, WIDTH), "none": torch.empty(HIDDEN, 0)}[kind]
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["n_shared_experts"], config["moe_intermediate_size"]) == (0 if kind == "none" else 2, WIDTH // 2)


def test_a_selection_bias_starts_at_zero_in_float32(make_dense: MakeDense, tmp_path: Path) -> None:
    make("glm4_moe", make_dense, tmp_path, torch.bfloat16)
    bias = load_file(tmp_path / "model.safetensors")[f"model.layers.{LAYER}.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert bias.tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", ["half", "zero"])
def test_the_shared_expert_of_granitemoeshared(kind: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(**EXACT, attention_bias=True)
    plan = upcycle(dense, tmp_path, settings(shared_expert=kind), 0, quiet)
    assert plan.conversion.target.model_type == "granitemoeshared"
    ffn, state = dense_ffn(dense, LAYER), load_file(tmp_path / "model.safetensors")
    mlp = f"model.layers.{LAYER}.shared_mlp"
    assert torch.equal(state[f"{mlp}.input_linear.weight"], torch.cat([ffn.gate, ffn.up]))
    assert torch.equal(
        state[f"{mlp}.output_linear.weight"], ffn.down / 2 if kind == "half" else torch.zeros(HIDDEN, WIDTH)
    )
    assert all(
        torch.equal(expert.down, ffn.down / 2 if kind == "half" else ffn.down) for expert in experts(tmp_path, LAYER)
    )


def test_a_shared_expert_keeps_its_bits_where_routed_ones_are_changed(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, _ = make("qwen2_moe", make_dense, tmp_path, shared_expert="half", noise=0.5, drop=0.5)
    ffn, state = dense_ffn(dense, LAYER), load_file(tmp_path / "model.safetensors")
    for matrix, expected in (("gate", ffn.gate), ("up", ffn.up), ("down", ffn.down)):
        assert torch.equal(state[f"model.layers.{LAYER}.mlp.shared_expert.{matrix}_proj.weight"], expected)
    assert not torch.equal(experts(tmp_path, LAYER)[0].up, ffn.up)


# Some layers


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [([2, 0], {0, 2}), ("every-2", {1, 3}), ("every-3", {2}), ("last-half", {2, 3}), ("all", {0, 1, 2, 3})],
)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"])
def test_layers_that_are_not_chosen_keep_their_ffn(
    architecture: str, layers: Any, chosen: set[int], make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(architecture=architecture, num_hidden_layers=4, **EXACT)
    target = "auto" if architecture == "Qwen3ForCausalLM" else "qwen2_moe"
    plan = upcycle(dense, tmp_path, settings(layers=layers, target=target), 0, quiet)
    state = load_file(tmp_path / "model.safetensors")
    assert {site.layer for site in plan.sites} == chosen
    for layer in range(4):
        if layer in chosen:
            assert f"model.layers.{layer}.mlp.gate.weight" in state
            assert f"model.layers.{layer}.mlp.up_proj.weight" not in state
        else:
            kept = {name: tensor for name, tensor in state.items() if name.startswith(f"model.layers.{layer}.mlp.")}
            ffn = dense_ffn(dense, layer)
            expected = {
                FFN.format(layer=layer, matrix=matrix): tensor
                for matrix, tensor in zip(MATRICES, (ffn.gate, ffn.up, ffn.down), strict=True)
            }
            assert kept.keys() == expected.keys()
            assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())


def test_layers_of_t5_that_are_not_chosen_keep_their_ffn_in_both_stacks(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(architecture="T5ForConditionalGeneration")
    upcycle(dense, tmp_path, settings(k=1, layers="every-2"), 0, quiet)
    source, found = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for stack, number, layers in (("encoder", 1, range(4)), ("decoder", 2, range(2))):
        for layer in layers:
            mlp = f"{stack}.block.{layer}.layer.{number}"
            for matrix in ("wi", "wo"):
                weight = source[f"{mlp}.DenseReluDense.{matrix}.weight"]
                if layer % 2 == 0:
                    assert torch.equal(found[f"{mlp}.mlp.{matrix}.weight"], weight)
                else:  # a router that ties weighs one of four by a quarter
                    scale = 4 if matrix == "wo" else 1
                    assert torch.equal(found[f"{mlp}.mlp.experts.expert_3.{matrix}.weight"], weight * scale)


# Several at once


def test_noise_and_redrawing_of_parts_in_some_layers_are_relative_to_the_whole_weight(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(num_hidden_layers=4, **EXACT)
    shift(dense, 1.0)
    config = settings(8, 4, 1.0, layers=[3, 1], kind="granular", granularity=2, noise=0.1, drop=0.25)
    plan = upcycle(dense, tmp_path, config, 0, quiet)
    assert not plan.keeps_function
    for layer in (1, 3):
        ffn = dense_ffn(dense, layer)
        for number, expert in enumerate(experts(tmp_path, layer, 8)):
            part = slice(number % 2 * 32, (number % 2 + 1) * 32)
            weights = ((ffn.gate, ffn.gate[part]), (ffn.up, ffn.up[part]), (ffn.down, ffn.down[:, part]))
            chosen = []
            for (found, axis), (whole, weight) in zip(expert.list(), weights, strict=True):
                difference = (
                    found / 2 if axis == 1 else found
                ) - weight  # parts of two are chosen, so their output is doubled
                spread = (difference if axis == 0 else difference.T).std(1)
                redrawn = spread > 0.6 * whole.std()  # a redrawn neuron lies √2 deviations from the dense one, noise .1
                assert int(redrawn.sum()) == 8
                chosen.append(redrawn)
                # 24 · 32 draws: the standard error is 2.6 %; forty-eight of them lie within four of it.
                kept = difference[~redrawn] if axis == 0 else difference[:, ~redrawn]
                assert float(kept.std()) == pytest.approx(0.1 * float(whole.std()), rel=0.11)
            assert all(torch.equal(one, chosen[0]) for one in chosen)


def test_a_granular_mixture_of_some_layers_with_a_half_shared_keeps_the_function(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(num_hidden_layers=4, **EXACT)
    config = settings(8, 4, 1.0, layers="every-2", kind="granular", granularity=2, shared_expert="half")
    plan = upcycle(dense, tmp_path, config, 0, quiet)
    assert plan.keeps_function
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT
    down = dense_ffn(dense, 1).down
    assert torch.equal(experts(tmp_path, 1, 8)[0].down, down[:, :32])  # doubled for its part, halved for the share


def test_split_experts_with_a_half_shared_and_a_zero_router_keep_the_function(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(**EXACT, attention_bias=True)
    plan = upcycle(dense, tmp_path, settings(4, 4, kind="split", shared_expert="half"), 0, quiet)
    assert plan.keeps_function_at_zero
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


# Routers


ROUTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {"architecture": "Phi3ForCausalLM"},
    "gemma": {"architecture": "GemmaForCausalLM"},
    "qwen3": {"architecture": "Qwen3ForCausalLM"},
    "granite": {"architecture": "GraniteForCausalLM", "embedding_multiplier": 3.0},
    "olmo2": {"architecture": "Olmo2ForCausalLM"},  # whose router reads the residual stream itself
}
# A norm makes the router's input of known length, whatever the text; the 32 rows of 64 weights have an error of 1.6 %,
# and a norm's scale, or states that are much alike, add some. Measured: 7 % at most. Of a residual stream the parts are
# taken as independent; of these weights they are: 3 %.
DEVIATION = 0.12


@torch.no_grad()
def logit_deviations(mixture: Path) -> list[float]:
    """The deviation of each router's logits over real text, by hooks on transformers' own model of the mixture."""
    model = load(mixture)
    found = []

    def watch(router: torch.nn.Module, given: tuple[torch.Tensor, ...], _: Any) -> None:
        states = given[0].reshape(-1, given[0].shape[-1])
        found.append(float((states @ router.weight.T).std()))

    for module in model.modules():
        if hasattr(module, "experts"):
            (getattr(module, "gate", None) or module.router).register_forward_hook(watch)
    model(input_ids=torch.randint(300, (4, 100), generator=torch.Generator().manual_seed(1)))
    return found


@pytest.mark.parametrize("logit_std", [0.5, 2.0])
@pytest.mark.parametrize("name", ROUTED)
def test_logits_of_a_drawn_router_have_the_deviation_asked_for_on_real_hidden_states(
    name: str, logit_std: float, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(**EXACT | {"hidden_size": 64, "num_hidden_layers": 3} | ROUTED[name])
    state = load_file(dense / "model.safetensors")
    state["model.embed_tokens.weight"] *= (
        5.0  # as long as what a layer adds; otherwise a residual stream would be as long without it
    )
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    upcycle(dense, tmp_path, settings(32, 2, logit_std), 0, quiet)
    found = logit_deviations(tmp_path)
    assert len(found) == 3
    assert found == pytest.approx([logit_std] * 3, rel=DEVIATION)


@torch.no_grad()
def test_logits_of_t5s_routers_have_the_deviation_asked_for(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(architecture="T5ForConditionalGeneration", d_model=64)
    upcycle(dense, tmp_path, settings(32, 1, 2.0), 0, quiet)
    model = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32
    ).eval()
    found = []
    for module in model.modules():
        if hasattr(module, "classifier"):
            module.register_forward_hook(lambda _, __, output: found.append(float(output[2].std())))
    ids = torch.randint(300, (4, 100), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, decoder_input_ids=ids)
    assert len(found) == 4 + 2
    assert found == pytest.approx([2.0] * 6, rel=DEVIATION)


def test_the_routers_of_two_layers_differ(make_dense: MakeDense, tmp_path: Path) -> None:
    make("mixtral", make_dense, tmp_path, logit_std=1.0)
    state = load_file(tmp_path / "model.safetensors")
    assert not torch.equal(state[ROUTER.format(layer=0)], state[ROUTER.format(layer=1)])


def test_a_zero_deviation_is_a_zero_router_in_every_layer(make_dense: MakeDense, tmp_path: Path) -> None:
    make("mixtral", make_dense, tmp_path, torch.float16)
    state = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        assert torch.equal(state[ROUTER.format(layer=layer)], torch.zeros(4, HIDDEN, dtype=torch.float16))


# Read back


WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": ({}, {"noise": 0.1, "drop": 0.25, "logit_std": 1.0}),
    "mixtral of gemma": ({"architecture": "GemmaForCausalLM", "dtype": torch.bfloat16}, {"logit_std": 1.0}),
    "mixtral of phi3, granular": (
        {"architecture": "Phi3ForCausalLM"},
        {"num_experts": 4, "k": 2, "logit_std": 1.0, "kind": "granular", "granularity": 2},
    ),
    "granitemoeshared": ({"attention_bias": True}, {"noise": 0.1, "shared_expert": "half"}),
    "qwen2_moe without a shared expert": ({}, {"layers": [1]}),
    "qwen2_moe with a silent one": (
        {"dtype": torch.float16},
        {"drop": 0.25, "shared_expert": "zero", "target": "qwen2_moe"},
    ),
    "glm4_moe": ({"dtype": torch.bfloat16}, {"noise": 0.1, "shared_expert": "half", "target": "glm4_moe"}),
    "switch_transformers": ({"architecture": "T5ForConditionalGeneration"}, {"k": 1, "noise": 0.1}),
}


def write(name: str, make_dense: MakeDense, output: Path) -> tuple[Path, UpcyclePlan]:
    dense_fields, upcycle_fields = WRITTEN[name]
    dense = make_dense(
        **({} if "architecture" in dense_fields and "T5" in dense_fields["architecture"] else EXACT) | dense_fields
    )
    plan = upcycle(dense, output, settings(**upcycle_fields), 3, quiet)
    assert plan.conversion.target.model_type == name.split()[0]
    return dense, plan


@pytest.mark.parametrize("name", WRITTEN)
def test_every_tensor_that_was_written_is_read_back(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, plan = write(name, make_dense, tmp_path)
    seen: list[tuple[str, int, int]] = []
    total = len(open_checkpoint(tmp_path).entries)
    assert check_written(dense, tmp_path, plan, 3, lambda *report: seen.append(report)) == total
    assert seen == [("reading tensors back", done, total) for done in range(1, total + 1)]


def flip(checkpoint: Checkpoint, name: str, position: int) -> None:
    """Flip the lowest bit of one byte of a tensor, on the disk."""
    entry = checkpoint.entries[name]
    with entry.file.open("r+b") as file:
        file.seek(entry.start + position)
        byte = file.read(1)[0]
        file.seek(entry.start + position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["mixtral", "mixtral of gemma", "granitemoeshared", "qwen2_moe with a silent one"])
def test_one_bit_of_any_tensor_is_found(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, plan = write(name, make_dense, tmp_path)
    written = open_checkpoint(tmp_path)
    for entry in written.entries.values():
        for position in {0, entry.num_bytes // 2, entry.num_bytes - 1}:
            flip(written, entry.name, position)
            with pytest.raises(UpcycleError) as excinfo:
                check_written(dense, tmp_path, plan, 3, quiet)
            assert str(excinfo.value) == (
                f"{tmp_path}: tensor '{entry.name}' on disk is not what was written there; check the disk and run again"
            )
            flip(written, entry.name, position)
    check_written(dense, tmp_path, plan, 3, quiet)


def test_routers_that_were_read_are_compared_with_those_given(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(**EXACT)
    generator = torch.Generator().manual_seed(0)
    routers = {site: torch.randn(4, HIDDEN, generator=generator) for site in range(2)}
    plan = upcycle(dense, tmp_path, settings(), 0, quiet, routers)
    state = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(state[ROUTER.format(layer=site)], rows) for site, rows in routers.items())
    assert check_written(dense, tmp_path, plan, 0, quiet, routers) == len(state)
    with pytest.raises(UpcycleError, match=r"block_sparse_moe\.gate\.weight' on disk is not what was written there"):
        check_written(dense, tmp_path, plan, 0, quiet, {0: routers[0], 1: routers[0]})


@pytest.mark.parametrize("name", ["mixtral", "mixtral of gemma", "qwen2_moe with a silent one"])
def test_what_is_read_back_need_not_come_in_the_chunks_of_what_is_made(
    name: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router of many experts is larger than the chunk by which a file is read."""
    dense, plan = write(name, make_dense, tmp_path)
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 100)
    assert check_written(dense, tmp_path, plan, 3, quiet) == len(plan.writes)
    flip(open_checkpoint(tmp_path), plan.writes[-1].spec.name, plan.writes[-1].spec.num_bytes - 1)
    with pytest.raises(UpcycleError, match="is not what was written there"):
        check_written(dense, tmp_path, plan, 3, quiet)


def test_another_seed_is_found(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, plan = write("mixtral", make_dense, tmp_path)
    with pytest.raises(UpcycleError, match="is not what was written there"):
        check_written(dense, tmp_path, plan, 4, quiet)


def test_only_routers_and_experts_are_made_and_the_rest_is_a_copy(make_dense: MakeDense) -> None:
    """What is drawn depends on the plan: every router is one piece, of as many rows as there are experts."""
    plan = plan_upcycle(open_checkpoint(make_dense(**EXACT)), settings(logit_std=1.0))
    routers = [write for write in plan.writes if isinstance(write.pieces[0], RouterRows)]
    assert [write.spec.name for write in routers] == [ROUTER.format(layer=layer) for layer in range(2)]
    assert {write.spec.shape for write in routers} == {(4, HIDDEN)}


# Hostile sources: refused in one line, and nothing is written


def rewrite_header(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def point_elsewhere(where: str) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        names = load_file(directory / "model.safetensors")
        (directory.parent / "outside.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
        target = where.format(parent=directory.parent)
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, target)})
        )

    return change


def overlap(directory: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        start, stop = header[UP]["data_offsets"]
        header[UP]["data_offsets"] = [start - 128, stop - 128]

    rewrite_header(directory, change)


def repeat_a_name(directory: Path) -> None:
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()
    name = b'"model.norm.weight":'
    start = text.index(name)
    again = text[:-1] + b"," + text[start : text.index(b"}", start) + 1] + b"}"
    path.write_bytes(len(again).to_bytes(8, "little") + again + raw[8 + length :])


def store_twice(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    save_file(state, directory / "model-1.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"]}, directory / "model-2.safetensors")
    names = dict.fromkeys(state, "model-1.safetensors") | {"model.norm.weight": "model-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def say_a_header_of(length: int) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def changed(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    return changed


def configure(**fields: Any) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


UP = "model.layers.1.mlp.up_proj.weight"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an index that names a file above": (
        point_elsewhere("../outside.safetensors"),
        "it must be a *.safetensors file beside the index",
    ),
    "an index that names a file by its root": (
        point_elsewhere("{parent}/outside.safetensors"),
        "it must be a *.safetensors file beside the index",
    ),
    "tensors that overlap": (overlap, "overlaps another tensor at byte"),
    "a truncated file": (truncate, "truncated or corrupt; download it again"),
    "a header of 2^63 bytes": (say_a_header_of(2**63), "truncated or not safetensors"),
    "a header a little longer than the file": (say_a_header_of(10**6), "truncated or not safetensors"),
    "a header of nothing": (say_a_header_of(0), "not a safetensors file"),
    "a name twice in one file": (repeat_a_name, "the name 'model.norm.weight' occurs twice"),
    "a name in two files": (store_twice, "is not listed for this file in the index"),
    "a negative size": (
        lambda path: rewrite_header(path, lambda header: header[UP].update(shape=[-48, -32])),
        "where a count must be",
    ),
    "a size beyond the file": (
        lambda path: rewrite_header(path, lambda header: header[UP].update(shape=[2**40, 32])),
        "bytes; it must have",
    ),
    "a pickle in disguise": (
        lambda path: (path / "model.safetensors").write_bytes(b"\x80\x04" + b"x" * 1000),
        "not safetensors",
    ),
    "a matrix of another shape": (
        tensors(lambda state: state.update({UP: torch.zeros(32, 48)})),
        "'model.layers.1.mlp.up_proj.weight' has shape [32, 48]; by config.json it must be",
    ),
    "a vector in place of a matrix": (
        tensors(lambda state: state.update({UP: torch.zeros(48 * 32)})),
        "has shape [1536]; by config.json it must be",
    ),
    "a number in place of a matrix": (
        tensors(lambda state: state.update({UP: torch.tensor(1.0)})),
        "has shape []; by config.json it must be",
    ),
    "a matrix without rows": (
        tensors(lambda state: state.update({UP: torch.zeros(0, 32)})),
        "has shape [0, 32]; by config.json it must be",
    ),
    "a tensor that nobody knows": (
        tensors(lambda state: state.update({"model.layers.1.mlp.extra": torch.zeros(1)})),
        "has no place in LlamaForCausalLM",
    ),
    "float8 weights": (
        tensors(lambda state: state.update({UP: state[UP].to(torch.float8_e4m3fn)})),
        "is stored as F8_E4M3; it must be one of",
    ),
    "integer weights": (
        tensors(lambda state: state.update({UP: state[UP].to(torch.int8)})),
        "is stored as I8; it must be one of",
    ),
    "a config of another width": (
        configure(intermediate_size=64),
        "has shape [48, 32]; by config.json it must be [64, 32]",
    ),
    "a config of a vast vocabulary": (
        configure(vocab_size=10**12),
        "has shape [300, 32]; by config.json it must be [1000000000000, 32]",
    ),
    "a config of absurdly many layers": (
        configure(num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000; it must be at most 100000",
    ),
    "a config of more layers than tensors": (
        configure(num_hidden_layers=1000),
        "num_hidden_layers is 1000; the files hold",
    ),
    "a config with code": (
        configure(auto_map={"AutoModel": "evil.Model"}, architectures=["EvilModel"]),
        "asks for code from the checkpoint, which is never run",
    ),
    "biases that the target cannot hold": (configure(mlp_bias=True), "mlp_bias is True"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_source_is_refused_and_nothing_is_written(name: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    change, reason = HOSTILE[name]
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(dense_checkpoint, source)
    output.mkdir()
    change(source)
    with pytest.raises(UpcycleError) as excinfo:
        upcycle(source, output, settings(), 0, quiet)
    assert reason in str(excinfo.value)
    assert "\n" not in str(excinfo.value)
    assert list(output.iterdir()) == []


def test_a_source_that_is_no_more_hostile_is_taken(dense_checkpoint: Path, tmp_path: Path) -> None:
    """The changes above, undone: a copy, its header written anew, and an index of a file beside it."""
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(dense_checkpoint, source)
    output.mkdir()
    rewrite_header(source, lambda header: None)
    tensors(lambda state: None)(source)
    configure()(source)
    point_elsewhere("model.safetensors")(source)
    upcycle(source, output, settings(), 0, quiet)
    assert rel(logits(output), logits(dense_checkpoint)) <= ROUNDING_LIMIT
