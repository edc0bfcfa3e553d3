"""The mixture computes what the dense model does; noise and routers have the sizes that were asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from upcycle.checkpoint import open_checkpoint
from upcycle.config import ExpertsConfig, RouterConfig, UpcycleConfig
from upcycle.errors import UpcycleError
from upcycle.experts import add_noise, seeded_generator
from upcycle.receipt import ROUNDING_LIMIT
from upcycle.router import draw_router
from upcycle.surgery import upcycle

MakeDense = Callable[..., Path]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SOURCES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "wide heads": {"head_dim": 16},  # hidden / heads is 8
    "another activation and epsilon": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2},
}
FFN = "model.layers.{layer}.mlp.{matrix}_proj.weight"
EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
ROUTER = "model.layers.{layer}.block_sparse_moe.gate.weight"
MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}


def quiet(what: str, done: int, total: int) -> None:
    pass


def settings(num_experts: int = 4, k: int = 2, noise: float = 0.0, logit_std: float = 0.0, shard_bytes: int = 5_000_000_000) -> UpcycleConfig:
    return UpcycleConfig(
        num_experts=num_experts,
        num_experts_per_tok=k,
        experts=ExpertsConfig(noise=noise),
        router=RouterConfig(logit_std=logit_std),
        shard_bytes=shard_bytes,
    )


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    if model.config.intermediate_size * dtype.itemsize % 16:
        model.set_experts_implementation("eager")  # torch's grouped product refuses rows that are no multiple of 16 bytes
    return model.eval()


@torch.no_grad()
def logits(directory: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of two rows of 60 random tokens; the second has 20 of padding on the left."""
    ids = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    return load(directory, dtype)(input_ids=ids, attention_mask=mask).logits[mask.bool()]


# A width of which the vector loop of `silu` leaves no rest. It takes a rest value by value, with another exponential; in the dense model the rest is
# that of the whole tensor, in the mixture, where gate and up lie side by side, that of each row.
EXACT = {"intermediate_size": 64}


def rel(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# The function is kept


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_router_over_two_copies_is_the_dense_model_bit_for_bit(source: str, dtype: torch.dtype, make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(dtype, **EXACT, **SOURCES[source])
    upcycle(dense, tmp_path, settings(k=2), 0, quiet)
    assert torch.equal(logits(tmp_path, dtype), logits(dense, dtype))


@pytest.mark.parametrize("source", SOURCES)
def test_a_drawn_router_over_copies_differs_by_rounding_alone(source: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(**SOURCES[source])
    upcycle(dense, tmp_path, settings(logit_std=1.0), 0, quiet)
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit_std", [0.0, 1.0])
def test_one_copy_alone_has_the_weight_one_and_is_the_dense_model_bit_for_bit(
    dtype: torch.dtype, logit_std: float, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(**EXACT)
    upcycle(dense, tmp_path, settings(k=1, logit_std=logit_std), 0, quiet)
    assert torch.equal(logits(tmp_path, dtype), logits(dense, dtype))


@pytest.mark.parametrize("intermediate_size", [40, 43, 172])
def test_an_ffn_of_any_width_differs_by_rounding_alone(intermediate_size: int, make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(intermediate_size=intermediate_size)
    upcycle(dense, tmp_path, settings(), 0, quiet)
    assert rel(logits(tmp_path), logits(dense)) <= ROUNDING_LIMIT


@pytest.mark.parametrize("logit_std", [0.0, 1.0])
def test_three_copies_of_a_third_each_differ_by_rounding_alone(logit_std: float, dense_checkpoint: Path, tmp_path: Path) -> None:
    upcycle(dense_checkpoint, tmp_path, settings(num_experts=5, k=3, logit_std=logit_std), 0, quiet)
    assert rel(logits(tmp_path), logits(dense_checkpoint)) <= ROUNDING_LIMIT  # thirds do not add up to one in binary


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


def test_experts_without_noise_are_the_ffn_and_everything_else_is_unchanged(make_dense: MakeDense, tmp_path: Path) -> None:
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


def test_the_tokenizer_and_the_generation_config_come_along(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (mixture_checkpoint / name).read_bytes() == (dense_checkpoint / name).read_bytes()


def test_a_refused_source_leaves_nothing_behind(make_dense: MakeDense, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="mlp_bias is True"):
        upcycle(make_dense(mlp_bias=True), tmp_path, settings(), 0, quiet)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_tensor_up_to_the_last(dense_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    plan = upcycle(dense_checkpoint, tmp_path, settings(), 0, lambda *report: seen.append(report))
    total = len(open_checkpoint(tmp_path).entries)
    assert seen == [("writing tensors", done, total) for done in range(1, total + 1)]
    assert len(plan.writes) == total


# Noise


def experts(directory: Path, layer: int, matrix: str, num_experts: int) -> list[torch.Tensor]:
    checkpoint = open_checkpoint(directory)
    return [checkpoint.read(EXPERT.format(layer=layer, expert=expert, matrix=matrix)) for expert in range(num_experts)]


@pytest.mark.parametrize("relative_std", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("std", "mean"), [(0.02, 0.0), (3.0, 7.0)])
def test_noise_is_relative_to_the_weights_own_deviation(relative_std: float, std: float, mean: float) -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)) * std + mean
    noise = add_noise(weight, relative_std, seeded_generator(0, "a")) - weight
    # 32768 draws: the standard error of the deviation is .4 %.
    assert float(noise.std()) == pytest.approx(relative_std * std, rel=0.05)
    assert abs(float(noise.mean())) < 0.05 * relative_std * std


def test_no_noise_is_the_very_tensor() -> None:
    weight = torch.ones(2, 2)
    assert add_noise(weight, 0.0, seeded_generator(0, "a")) is weight


def test_noise_leaves_its_input_as_it_was_and_keeps_the_dtype() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = torch.linspace(-1, 1, 12, dtype=torch.float32).reshape(3, 4).to(dtype)
        before = weight.clone()
        found = add_noise(weight, 0.5, seeded_generator(0, "a"))
        assert found.dtype == dtype
        assert found.shape == weight.shape
        assert torch.equal(weight, before)
        assert not torch.equal(found, weight)


def test_every_expert_on_disk_has_noise_of_its_own(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    source = open_checkpoint(dense_checkpoint)
    noises = []
    for layer in range(2):
        for matrix, target in MATRICES.items():
            weight = source.read(FFN.format(layer=layer, matrix=matrix))
            for expert in experts(mixture_checkpoint, layer, target, 4):
                # 1536 draws: the standard error of the deviation is 1.8 %; twenty-four of them lie within three of it.
                assert float((expert - weight).std()) == pytest.approx(0.5 * float(weight.std()), rel=0.06)
                noises.append((expert - weight).flatten())
    assert len(noises) == 2 * 3 * 4
    for one, other in combinations(noises, 2):
        # Correlation of 1536 independent pairs has deviation .026; equal draws would have 1.
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.15


def test_the_seed_alone_decides_what_is_drawn(dense_checkpoint: Path, tmp_path: Path) -> None:
    config = settings(noise=0.1, logit_std=1.0)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / name).mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ord(name))  # the global generator has no part in it
            upcycle(dense_checkpoint, tmp_path / name, config, seed, quiet)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_what_is_drawn_for_a_tensor_depends_on_no_other_tensor(make_dense: MakeDense, tmp_path: Path) -> None:
    for name, num_layers, num_experts in (("small", 1, 3), ("large", 3, 6)):
        (tmp_path / name).mkdir()
        dense = make_dense(num_hidden_layers=num_layers, initializer_range=0.2)
        upcycle(dense, tmp_path / name, settings(num_experts=num_experts, noise=0.1), 0, quiet)
        source = open_checkpoint(dense).read(FFN.format(layer=0, matrix="gate"))
        noise = [(expert - source) / source.std(correction=0) for expert in experts(tmp_path / name, 0, "w1", 3)]
        torch.save(torch.stack(noise), tmp_path / f"{name}.pt")
    small, large = torch.load(tmp_path / "small.pt"), torch.load(tmp_path / "large.pt")
    assert torch.allclose(small, large, atol=1e-5)  # two sums of different weights round differently


def test_generators_differ_by_seed_and_by_name() -> None:
    keys = [(0, "a"), (0, "b"), (1, "a"), (11, "a"), (1, "1a")]
    draws = {key: tuple(torch.rand(4, generator=seeded_generator(*key)).tolist()) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert draws[0, "a"] == tuple(torch.rand(4, generator=seeded_generator(0, "a")).tolist())


# Routers


@pytest.mark.parametrize("logit_std", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", ["ones", "small", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_normed_states_have_the_deviation_asked_for(logit_std: float, scale: str, dtype: torch.dtype) -> None:
    hidden, num_experts = 256, 64
    generator = torch.Generator().manual_seed(0)
    weight = {"ones": torch.ones(hidden), "small": torch.full((hidden,), 0.05), "uneven": torch.rand(hidden, generator=generator) * 3}[scale].to(
        dtype
    )
    norm = MixtralRMSNorm(hidden)
    norm.weight.data = weight.float()
    with torch.no_grad():
        states = norm(torch.randn(2048, hidden, generator=generator) * 17)
    router = draw_router(num_experts, weight, logit_std, seeded_generator(0, "router"))
    assert router.shape == (num_experts, hidden)
    assert router.dtype == dtype
    found = states @ router.float().T
    # 64 rows of 256 draws: the standard error is below one percent; 10 % allows for an uneven scale.
    assert float(found.std()) == pytest.approx(logit_std, rel=0.1)
    assert math.isclose(float(found.mean()), 0.0, abs_tol=0.1 * logit_std)


def test_the_routers_on_disk_read_the_norm_of_their_own_layer(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(hidden_size=128, num_hidden_layers=3)
    upcycle(dense, tmp_path, settings(num_experts=32, logit_std=2.0), 0, quiet)
    source, target = open_checkpoint(dense), open_checkpoint(tmp_path)
    generator = torch.Generator().manual_seed(0)
    routers = []
    for layer in range(3):
        weight = source.read(f"model.layers.{layer}.post_attention_layernorm.weight")
        states = torch.nn.functional.rms_norm(torch.randn(2048, 128, generator=generator), (128,), weight)
        routers.append(target.read(ROUTER.format(layer=layer)))
        assert float((states @ routers[-1].T).std()) == pytest.approx(2.0, rel=0.1)  # 4096 draws: the standard error is 1.1 %
    assert not torch.equal(routers[0], routers[1])


def test_a_zero_deviation_is_a_zero_router() -> None:
    router = draw_router(3, torch.ones(5, dtype=torch.float16), 0.0, seeded_generator(0, "a"))
    assert torch.equal(router, torch.zeros(3, 5, dtype=torch.float16))
