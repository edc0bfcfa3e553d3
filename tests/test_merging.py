"""Sources of one base become the experts of a mixture, and the rest is merged as the settings say."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tunes import fine_tune
from mixtures import EXACT, MakeDense, dense_ffn, experts, logits, quiet
from safetensors.torch import load_file

from dense2moe.upcycle.building.blend import make_blend
from dense2moe.upcycle.building.config import ExpertsConfig, MergingConfig, RouterConfig, RouterDomain, UpcycleConfig
from dense2moe.upcycle.building.merger import Merger
from dense2moe.upcycle.building.pieces import ExpertPart, Slice
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.surgery import check_written, upcycle
from dense2moe.upcycle.checkpoints import tensors
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

METHODS = ("base", "mean", "task-arithmetic", "ties", "dare")
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": EXACT,
    "mixtral of a fused ffn": {**EXACT, "architecture": "Phi3ForCausalLM"},
    "granitemoe": {**EXACT, "attention_bias": True},
    "qwen3_moe": {**EXACT, "architecture": "Qwen3ForCausalLM"},
    "gemma": {**EXACT, "architecture": "GemmaForCausalLM", "hidden_act": "gelu_pytorch_tanh"},
}


def merge(base: Path, sources: Mapping[str, Path], output: Path, **settings: Any) -> UpcyclePlan:
    """A mixture whose router is zero, its tensors compared with the plan."""
    output.mkdir()
    config = UpcycleConfig(**{"router": RouterConfig(logit_std=0.0), **settings})
    plan = upcycle(base, output, config, 0, quiet, sources=sources)
    check_written(base, output, plan, 0, quiet, sources=sources)
    return plan


def two_sources(base: Path, tmp_path: Path) -> dict[str, Path]:
    return {name: fine_tune(base, tmp_path / name, seed) for seed, name in enumerate(("code", "maths"))}


def refusal(base: Path, sources: Mapping[str, Path], **settings: Any) -> str:
    """The one line in which a plan of these sources is refused."""
    with pytest.raises(UpcycleError) as excinfo:
        plan_upcycle(
            open_checkpoint(base),
            UpcycleConfig(**settings),
            {name: open_checkpoint(directory) for name, directory in sources.items()},
        )
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


def rest(directory: Path) -> dict[str, np.ndarray]:
    """All tensors outside of FFNs, experts and routers."""
    return {
        name: tensor.float().numpy()
        for name, tensor in load_file(directory / "model.safetensors").items()
        if ".mlp." not in name and "block_sparse_moe" not in name
    }


# Sources that have not changed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_two_sources_equal_to_the_base_give_the_base_bit_for_bit(
    method: Any, dtype: torch.dtype, family: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    base = make_dense(dtype, **FAMILIES[family])
    plan = merge(base, {"a": base, "b": base}, tmp_path / "out", merging=MergingConfig(method=method))
    assert plan.settings.num_experts == 2
    assert torch.equal(logits(tmp_path / "out", dtype), logits(base, dtype))


# Experts


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_the_ffn_of_its_source(family: str, make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(torch.bfloat16, **FAMILIES[family])
    sources = two_sources(base, tmp_path)
    merge(base, sources, tmp_path / "out", num_experts=4)
    found = experts(tmp_path / "out", 1, 4)
    for expert, source in zip(found, ("code", "code", "maths", "maths"), strict=True):
        for (matrix, _), (expected, _) in zip(expert.list(), dense_ffn(sources[source], 1).list(), strict=True):
            assert torch.equal(matrix, expected)


def test_the_base_is_the_first_expert_where_it_is_routed(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(**EXACT)
    plan = merge(base, two_sources(base, tmp_path), tmp_path / "out", base_expert="routed")
    assert plan.owners == (0, 1, 2)
    for (matrix, _), (expected, _) in zip(
        experts(tmp_path / "out", 0, 3)[0].list(), dense_ffn(base, 0).list(), strict=True
    ):
        assert torch.equal(matrix, expected)


def test_the_base_is_the_shared_expert_where_it_is_shared(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(**EXACT)
    plan = merge(base, two_sources(base, tmp_path), tmp_path / "out", base_expert="shared")
    assert plan.settings.shared_expert == "half"
    state = load_file(tmp_path / "out" / "model.safetensors")
    for matrix, (expected, _) in zip(("gate", "up", "down"), dense_ffn(base, 0).list(), strict=True):
        assert torch.equal(state[f"model.layers.0.mlp.shared_expert.{matrix}_proj.weight"], expected)
    assert plan.owners == (1, 2)


def test_granular_experts_are_parts_of_one_source_each(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(**EXACT)
    granular = ExpertsConfig(kind="granular", granularity=2)
    plan = plan_upcycle(
        open_checkpoint(base),
        UpcycleConfig(experts=granular),
        {name: open_checkpoint(directory) for name, directory in two_sources(base, tmp_path).items()},
    )
    parts = {write.spec.name: piece for write in plan.writes for piece in write.pieces if isinstance(piece, ExpertPart)}
    gates = [parts[f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"] for expert in range(4)]
    assert [(gate.matrix.checkpoint, gate.neurons) for gate in gates] == [
        (1, (0, 32)),
        (1, (32, 64)),
        (2, (0, 32)),
        (2, (32, 64)),
    ]


# The rest


def test_the_base_s_own_weights_are_kept_where_the_method_is_base(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(torch.bfloat16, **EXACT)
    merge(base, two_sources(base, tmp_path), tmp_path / "out", merging=MergingConfig(method="base"))
    found, expected = rest(tmp_path / "out"), rest(base)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("base_expert", ["none", "routed"])
def test_the_mean_is_of_the_sources_and_of_a_base_that_is_an_expert(
    base_expert: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    base = make_dense(**EXACT)
    sources = two_sources(base, tmp_path)
    merge(base, sources, tmp_path / "out", base_expert=base_expert)
    models = [rest(source) for source in sources.values()] + ([rest(base)] if base_expert == "routed" else [])
    for name, found in rest(tmp_path / "out").items():
        expected = np.mean([model[name].astype(np.float64) for model in models], axis=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7 * np.abs(expected).max())  # two roundings


def test_task_arithmetic_and_ties_reach_every_part(make_dense: MakeDense, tmp_path: Path) -> None:
    """By the method's own functions, whole tensor by whole tensor."""
    base = make_dense(**EXACT)
    sources = two_sources(base, tmp_path)
    own = rest(base)
    changes = [{name: value - own[name] for name, value in rest(source).items()} for source in sources.values()]
    merge(base, sources, tmp_path / "sum", merging=MergingConfig(method="task-arithmetic", weight=0.7))
    for name, found in rest(tmp_path / "sum").items():
        expected = own[name] + 0.7 * sum(change[name] for change in changes)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    merge(base, sources, tmp_path / "ties", merging=MergingConfig(method="ties", density=1.0))
    for name, found in rest(tmp_path / "ties").items():
        one, other = (change[name] for change in changes)
        agreed = np.where(one * other > 0, (one + other) / 2, np.where(abs(one) > abs(other), one, other))
        np.testing.assert_allclose(found, own[name] + agreed, rtol=0, atol=1e-6)


def test_what_dare_drops_follows_from_the_seed_and_the_names(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(**EXACT)
    sources = two_sources(base, tmp_path)
    own = rest(base)
    for name in ("first", "second"):
        merge(base, sources, tmp_path / name, merging=MergingConfig(method="dare", density=0.5, weight=1.0))
    first, second = rest(tmp_path / "first"), rest(tmp_path / "second")
    assert all(np.array_equal(first[name], second[name]) for name in first)
    # dropped of both sources: one in four
    untouched = np.mean([np.mean(first[name] == own[name]) for name in first if first[name].size > 500])
    assert 0.2 < untouched < 0.3


@pytest.mark.parametrize("method", ["mean", "task-arithmetic", "ties", "dare"])
@pytest.mark.parametrize("chunk", [1 << 22, 100], ids=["whole", "in chunks"])
def test_a_blend_has_the_mixtures_tensors_and_the_mean_of_the_experts(
    chunk: int, method: Any, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_dense(torch.bfloat16)
    sources = {"a": fine_tune(base, tmp_path / "a", 1), "b": fine_tune(base, tmp_path / "b", 2, dtype=torch.float32)}
    mixture = tmp_path / "mixture"
    plan = merge(base, sources, mixture, merging=MergingConfig(method=method), layers=(1,))
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", chunk)
    checkpoints = tuple(open_checkpoint(each) for each in (base, *sources.values()))
    written, ids = open_checkpoint(mixture), torch.tensor([7, 2, 299, 7, 120])
    blend = make_blend(checkpoints, plan, 0)
    for name in blend.entries:
        if ".1.mlp." in name:
            mean = (checkpoints[1].read(name).float() + checkpoints[2].read(name).float()) / 2
            assert torch.equal(blend.read(name), mean.to(torch.bfloat16)), name
        else:
            assert torch.equal(blend.read(name), written.read(name)), name
    name = "model.embed_tokens.weight"
    assert torch.equal(blend.pick_rows(name, ids), written.read(name)[ids])


def test_layers_without_experts_merge_their_ffns_too(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(**EXACT)
    sources = two_sources(base, tmp_path)
    merge(base, sources, tmp_path / "out", layers=(1,))
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    ups = [load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"] for source in sources.values()]
    torch.testing.assert_close(found, (ups[0] + ups[1]) / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["mean", "ties", "dare"])
def test_memory_does_not_grow_with_the_number_of_sources(
    method: Any, make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_dense(hidden_size=256, **EXACT)
    chunk_bytes = 65536
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", chunk_bytes // 4)
    checkpoint, peaks = open_checkpoint(base), []
    for count in (2, 6):
        sources = {str(number): checkpoint for number in range(count)}
        plan = plan_upcycle(checkpoint, UpcycleConfig(merging=MergingConfig(method=method)), sources)
        merger = Merger((checkpoint, *sources.values()), plan, 0)
        tracemalloc.start()
        for _ in merger.merge(Slice("model.embed_tokens.weight", 0, 300)):  # five chunks
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > chunk_bytes
    assert peaks[1] < peaks[0] + chunk_bytes  # four more sources, and not one more chunk


# Refusals


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_size": 64}, "hidden_size is 64; the base has 32"),
        ({"intermediate_size": 128}, "intermediate_size is 128; the base has 64"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; the base has 1e-06"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu; the base has silu"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3; the base has 2"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; the base has True"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, "rope_parameters is {'rope_"),
        ({"architecture": "LlamaForCausalLM"}, "model_type is llama; the base has qwen3"),
    ],
)
def test_one_of_three_sources_that_is_not_of_the_base_is_refused_in_one_line(
    fields: dict[str, Any], said: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    qwen3 = {**FAMILIES["qwen3_moe"], "head_dim": 8}
    base, other = make_dense(**qwen3), make_dense(**qwen3 | fields)
    message = refusal(base, {**two_sources(base, tmp_path), "other": other})
    assert message.startswith(f"sources.other ({other}): {said}")
    assert "sources must be fine-tuned from the base" in message


def test_a_source_with_another_window_is_refused(make_dense: MakeDense) -> None:
    """Its FFNs have learned from what its attention saw."""
    mistral = {**EXACT, "architecture": "MistralForCausalLM"}
    base, other = make_dense(**mistral, sliding_window=16), make_dense(**mistral, sliding_window=None)
    message = refusal(base, {"a": base, "other": other})
    assert message.startswith(f"sources.other ({other}): sliding_window is None; the base has 16; sources must be")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_experts": 3}, "upcycle.num_experts is 3, 3 experts; they must be divided evenly among 2 sources"),
        (
            {"num_experts": 4, "base_expert": "routed"},
            "upcycle.num_experts is 4, 4 experts; they must be divided evenly among 2 sources and the base",
        ),
        ({"experts": ExpertsConfig(kind="split")}, "upcycle.experts.kind is split; it cuts one FFN into experts"),
        ({"shared_expert": "half"}, "upcycle.shared_expert is half; where there are sources the shared expert is the"),
        ({"num_experts_per_tok": 3}, "upcycle: num_experts_per_tok is 3; it must be at most num_experts, which is 2"),
    ],
)
def test_settings_that_do_not_fit_two_sources_are_refused(
    settings: dict[str, Any], said: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    base = make_dense(**EXACT)
    assert refusal(base, two_sources(base, tmp_path), **settings).startswith(said)


def test_numbers_are_held_against_the_sources_and_not_against_a_default(make_dense: MakeDense, tmp_path: Path) -> None:
    """Three domains do not divide the default of 8 experts, nor do groups of three."""
    base = make_dense(intermediate_size=48)
    checkpoint = open_checkpoint(base)
    sources = dict.fromkeys("abc", checkpoint)
    domains = tuple(RouterDomain(prompts=(letter,)) for letter in "abc")
    settings = UpcycleConfig(router=RouterConfig(kind="ridge", domains=domains))
    assert plan_upcycle(checkpoint, settings, sources).settings.num_experts == 3
    granular = UpcycleConfig(experts=ExpertsConfig(kind="granular", granularity=3), num_experts_per_tok=3)
    assert plan_upcycle(checkpoint, granular, sources).settings.num_experts == 9
    said = refusal(base, {}, router=RouterConfig(kind="ridge", domains=domains))
    assert said == "upcycle: router.domains has 3 domains; they must divide the 8 router rows evenly"


def test_the_base_is_no_expert_beside_no_source(dense_checkpoint: Path) -> None:
    assert refusal(dense_checkpoint, {}, base_expert="routed").startswith(
        "upcycle.base_expert is routed; it needs sources"
    )
