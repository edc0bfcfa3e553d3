"""Parity passes what is right, and catches and names what is not."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import each_shape
from transformers import MixtralForCausalLM

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.agreement import Sums
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.forward import Forward
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.records import TIERS, Parity, ProviderParity, WeightsCheck
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.parity.ties import same_experts
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import CPU, CUDA, Decoder
from dense2moe.export.runtime.speed import measure_speed
from dense2moe.export.variant import Variant
from dense2moe.upcycle.gates.gate import TopK
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.figure import Figure
from tests.exports import LAYER_PARTS
from tests.faults.by_name import (
    CHANGES,
    Change,
    Weights,
    change_weights,
    lose_a_head_to_nan,
    perturb_the_router,
    scale_one_expert_by_2_percent,
    swap_gate_and_up,
    swap_two_experts,
)

# those need text
VARIANTS: tuple[Variant, ...] = tuple(variant for variant in get_args(Variant) if variant not in ("int8-qdq", "mixed"))
# those that compute as their twin does, but for the order of sums
EXACT: tuple[Variant, ...] = (
    "float32",
    "bfloat16",
    "int8",
    "int4",
)
# one for each way that weights lie in a graph; bfloat16's is float32's
STORES: tuple[Variant, ...] = ("float32", "int8", "int4")
BLOCKS = torch.randint(2, 300, (6, 48), generator=torch.Generator().manual_seed(0))
# Random weights lose more to quantization than trained ones; that question is not asked here.
LIMITS = ParityConfig(max_perplexity_increase={"float32": 1e-4}, longest_row=64, free_tokens=8, decode_steps=8)
ROUNDING = 5e-6  # float32 sums in another order: 1.5e-6 measured


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class Exported(NamedTuple):
    """A fine-tuned mixture, its twin, and its package."""

    finetuned: Path
    twin: Path
    package: Path


def export(finetuned: Path, directory: Path, variant: Variant, **config: Any) -> Exported:
    twin, package = directory / "twin", directory / "package"
    for path in (twin, package):
        path.mkdir(parents=True)
    # one block a row would need onnxruntime 1.31
    quantize_checkpoint(finetuned, twin, variant, QuantizeConfig(method="search", block_size=16), silent)
    write_package(
        twin,
        package,
        OnnxConfig(**{"activation_bits": 32, "lowering": "grouped" if variant == "int8" else "fused"} | config),
        silent,
    )
    return Exported(finetuned, twin, package)


@pytest.fixture(scope="module")
def exports(mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, Exported]:
    """The mixture exported in every variant: floats by MoE, int4 by QMoE, int8 grouped. Shared: read only."""
    return {variant: export(mixture_checkpoint, tmp_path_factory.mktemp(variant), variant) for variant in VARIANTS}


Step = tuple[str, int, int]


class Judged(NamedTuple):
    """A verdict, what the CPU's says, and the progress that was told."""

    parity: Parity
    result: ProviderParity
    steps: tuple[Step, ...]


Judge = Callable[..., Judged]


@pytest.fixture(scope="module")
def judged(exports: dict[Variant, Exported], tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """The verdict on an export as it is, or with a planted fault, which is judged once for all tests that read it."""

    @cache
    def judge(variant: Variant, fault: Change | None = None) -> Judged:
        exported, steps = exports[variant], []
        if fault is not None:
            exported = plant(exported, tmp_path_factory.mktemp(fault.__name__), fault)
        parity, result = check(
            exported, variant, rounds=variant == "float16", progress=lambda *step: steps.append(step)
        )
        return Judged(parity, result, tuple(steps))

    return judge


def check(
    exported: Exported,
    variant: Variant,
    config: ParityConfig = LIMITS,
    rounds: bool = False,
    progress: Progress = silent,
) -> tuple[Parity, ProviderParity]:
    parity = check_parity(
        ParitySubject(exported.package, exported.twin, exported.finetuned, BLOCKS, variant, rounds), config, progress
    )
    result = parity.providers[CPU]
    assert isinstance(result, ProviderParity)
    return parity, result


def name_of(fault: Change) -> str:
    return fault.__name__


@torch.inference_mode()
def logits_of(directory: Path, ids: torch.Tensor = BLOCKS) -> torch.Tensor:
    return MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(ids).logits.double()


def perplexity(logits: torch.Tensor, ids: torch.Tensor = BLOCKS) -> float:
    log_p = logits.log_softmax(-1)
    return math.exp(-float(log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean()))


@pytest.mark.parametrize("variant", EXACT)
def test_a_right_export_passes(judged: Judge, variant: Variant) -> None:
    parity, result, _ = judged(variant)
    assert parity.passed
    assert parity.breaches == ()
    if not torch.cuda.is_available():
        assert parity.providers[CUDA] == "not run: no CUDA device"
    assert [(check.name, check.num_tokens) for check in result.checks[:-1]] == [
        ("prefill, batch 1, 1 token", 1),
        ("prefill, batch 1, 6 tokens", 6),
        ("prefill, batch 1, 48 tokens", 48),
        ("8 decode steps after 40 tokens, batch 1", 1 + 8),  # and the last token of the prefill
        ("8 decode steps after 40 tokens, batch 3", 3 * 9),
        # a third and two thirds of the prompt's 40 are padding
        ("prefill, batch 3, 48 tokens, left padding", 48 + 35 + 22),
        ("8 decode steps after 40 tokens, batch 3, left padding", 3 * 9),
        ("prefill, batch 1, 64 tokens, of several blocks", 64),
        ("8 decode steps after 56 tokens, batch 1, of several blocks", 9),
    ]
    assert result.checks[-1].name.startswith(
        "prefill, batch 4, rows that end nearest to a tie of experts (margin at most "
    )
    assert result.tiers == {**dict.fromkeys(TIERS, "passed"), "task": "not run: no task was given"}
    for each in result.checks:
        assert each.relative_error < ROUNDING
        assert each.top1_agreement == 1.0
        assert each.num_tie_flips == 0
        assert each.mean_error <= each.max_error
    assert result.twin.routing_agreement == (1.0, 1.0)
    assert max(result.twin.hidden_error) < ROUNDING
    assert result.twin.kl < 1e-7  # the rounding of sums of 300 probabilities
    assert min(result.prefill_tokens_per_second, result.decode_tokens_per_second) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_place_of_a_right_export_is_seen_and_right(
    exports: dict[Variant, Exported], judged: Judge, variant: Variant
) -> None:
    exported = exports[variant]
    result = judged(variant).result
    assert isinstance(result.places, tuple)
    layers = [(n, part) for n in (0, 1) for part in LAYER_PARTS]
    assert [(each.layer, each.part) for each in result.places] == [
        (-1, "embedding"),
        *layers,
        (-1, "final norm"),
        (-1, "head"),
    ]
    # at 1e-5 nothing is left but the order of float32's sums; float16 rounds a few times, by 2^-11
    float32, float16 = (
        32 * 2.0**-20,
        2.0**-8,
    )
    for each in result.places:
        assert each.error <= each.limit < (float16 if variant == "float16" else float32)
        assert each.num_flips == 0
        assert each.factor == pytest.approx(1, abs=each.limit)
        # 48, 48 and 4; a tied token is left out
        assert each.num_tokens in ((100,) if each.part != "experts" else range(94, 101))
    assert isinstance(result.weights, WeightsCheck)
    tensors = load_file(exported.twin / "model.safetensors")
    rows = sum(tensor[..., 0].numel() for tensor in tensors.values() if tensor.ndim > 1)
    assert (result.weights.num_rows, result.weights.num_wrong, result.weights.not_judged) == (rows, 0, ())
    assert result.weights.num_vectors == sum(tensor.ndim == 1 for tensor in tensors.values())


@pytest.mark.parametrize("variant", EXACT)
def test_figures_equal_those_of_transformers(exports: dict[Variant, Exported], judged: Judge, variant: Variant) -> None:
    """The package computes what its twin does, so the twin's logits in torch give every figure a second time.

    Of all text: more blocks are asked for than there are.
    """
    exported = exports[variant]
    result = judged(variant).result
    assert LIMITS.language_tokens > BLOCKS.numel() == result.num_language_tokens
    twin, finetuned = logits_of(exported.twin), logits_of(exported.finetuned)
    # Losses are means of float32 logarithms.
    for found, logits in (
        (result.figures, twin),
        (result.twin_figures, twin),
        (result.finetuned_figures, finetuned),
    ):
        assert found[0] == Figure("perplexity", pytest.approx(perplexity(logits), rel=1e-6), "", "lower")
        assert found[1] == Figure("loss", pytest.approx(math.log(perplexity(logits)), rel=1e-6), "nats", "lower")
    log_p, log_q = finetuned.log_softmax(-1), twin.log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert result.finetuned.kl == pytest.approx(kl, rel=1e-4, abs=1e-7)  # float32 logarithms that cancel
    # of logits up to 10
    assert result.finetuned.max_error == pytest.approx(float((twin - finetuned).abs().max()), abs=1e-4)
    assert result.finetuned.mean_error == pytest.approx(float((twin - finetuned).abs().mean()), abs=1e-5)
    assert result.finetuned.top1_agreement == pytest.approx(
        float((twin.argmax(-1) == finetuned.argmax(-1)).double().mean())
    )
    if variant != "float32":
        assert 0 < result.finetuned.hidden_error[0] < result.finetuned.hidden_error[1]  # errors grow by depth


def test_a_float16_export_is_held_to_what_float16_rounds(exports: dict[Variant, Exported], judged: Judge) -> None:
    """Sums of float16 products of random weights.

    1e-3 of the largest logit measured, which is what a float32 graph may differ by at most.
    """
    parity, result, _ = judged("float16")
    assert parity.passed
    assert 1e-4 < max(each.relative_error for each in result.checks) < 5e-3
    assert 0 < result.twin.kl < 1e-4
    assert 0 < abs(result.logits_factor - 1) < result.limits["factor"].value < 1e-2
    strict = LIMITS.model_copy(update={"max_relative_error": 1e-4})
    breaches = check(exports["float16"], "float16", strict, rounds=False)[0].breaches
    assert len(breaches) > 0
    assert all("relative error" in breach for breach in breaches)


@pytest.mark.parametrize("fault", [swap_two_experts, swap_gate_and_up, perturb_the_router], ids=name_of)
def test_a_planted_fault_in_float16_is_caught_at_its_place(judged: Judge, fault: Change) -> None:
    parity, result, _ = judged("float16", fault)
    other_routing = fault is perturb_the_router
    assert any(
        ("routing agreement with the twin" if other_routing else "KL from the twin") in breach
        for breach in parity.breaches
    )
    assert result.worst_layer == 1
    assert wrong_places(result) == {(1, "router" if other_routing else "experts")}
    assert "operator: layer 1, experts 0, 1 on" in parity.breaches[0] or fault is not swap_two_experts


def test_rounded_activations_are_held_to_the_noise_of_float32(mixture_checkpoint: Path, tmp_path: Path) -> None:
    """The twin rounds what the graph rounds, in the same groups.

    Nothing is left but the order of sums, place by place.
    """
    exported = export(mixture_checkpoint, tmp_path, "int8", activation_bits=8)
    parity, result = check(exported, "int8", rounds=True)
    assert parity.passed
    assert isinstance(result.places, tuple)
    assert max(each.error for each in result.places) < ROUNDING
    assert max(each.limit for each in result.places) < 32 * 2.0**-20
    assert max(each.relative_error for each in result.checks) < ROUNDING < result.limits["logits"].value
    rounded = Decoder(exported.package)
    log_q = (
        torch.from_numpy(rounded.run(rounded.new_cache(*BLOCKS.shape), BLOCKS.numpy())["logits"])
        .double()
        .log_softmax(-1)
    )
    log_p = logits_of(exported.twin).log_softmax(-1)
    unrounded = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert result.twin.kl < 1e-6 < 1e-4 < unrounded  # a twin that rounds nothing computes something else
    planted = plant(exported, tmp_path, scale_one_expert_by_2_percent)
    parity, result = check(planted, "int8", rounds=True)
    assert wrong_places(result) == {(1, "experts")}
    assert [breach.split(": ", 2)[1] for breach in parity.breaches[:2]] == ["weights", "operator"]
    assert parity.breaches[1].startswith(
        f"{CPU}: operator: layer 1, expert 2 on the graph's own input: relative error 2."
    )


def test_fewer_blocks_are_taken_evenly(exports: dict[Variant, Exported]) -> None:
    _, result = check(exports["float32"], "float32", LIMITS.model_copy(update={"num_blocks": 4}))
    kept = BLOCKS[[0, 1, 3, 4]]
    assert result.finetuned_figures[0].value == pytest.approx(
        perplexity(logits_of(exports["float32"].finetuned, kept), kept), rel=1e-6
    )


def plant(exported: Exported, directory: Path, change: Change | None = None, epsilon: float | None = None) -> Exported:
    """The package with its weights changed."""
    return exported._replace(package=change_weights(exported.package, directory, change, epsilon))


def wrong_places(result: ProviderParity) -> set[tuple[int, str]]:
    assert isinstance(result.places, tuple)
    return {(each.layer, each.part) for each in result.places if not each.is_right}


def test_a_package_written_anew_without_a_fault_passes(exports: dict[Variant, Exported], tmp_path: Path) -> None:
    """And each computes what it did, bit by bit: what parity says of faults is said of nothing else."""
    for variant, exported in exports.items():
        anew = plant(exported, tmp_path / variant)
        decoders = [Decoder(each.package, num_threads=1) for each in (exported, anew)]
        first, second = (each.run(each.new_cache(*BLOCKS.shape), BLOCKS.numpy())["logits"] for each in decoders)
        assert np.array_equal(first, second)
    assert check(anew, variant)[0].breaches == ()


# each fault in one way of storing weights, and each way with one fault at least
@pytest.mark.parametrize(
    ("variant", "fault"),
    each_shape(
        [(variant, fault) for variant in EXACT for fault in CHANGES],
        {f"{STORES[number % len(STORES)]}-{name_of(fault)}" for number, fault in enumerate(CHANGES)},
        name=lambda case: f"{case[0]}-{name_of(case[1])}",
    ),
)
def test_a_planted_fault_is_caught_and_its_layer_named(judged: Judge, variant: Variant, fault: Change) -> None:
    parity, result, _ = judged(variant, fault)
    assert not parity.passed
    assert sum(each.num_tie_flips for each in result.checks) == 0  # a fault that changes the routing is no tie
    assert result.worst_layer == 1
    assert result.twin.routing_agreement[0] == 1.0
    assert result.twin.hidden_error[0] < ROUNDING
    other_routing = fault is perturb_the_router
    assert (result.twin.routing_agreement[1] < 1) is other_routing
    assert (
        result.twin.hidden_error[1] > 1e-3
    ) is not other_routing  # as a whole the twin goes where the graph's routers send it
    worst = r"\(worst layer 1: routing agreement [01]\.\d{4}, hidden error \d\.\de-0\d\)"
    named = re.compile(rf"^{CPU}: (weights: layer 1, .*|operator: layer 1, .*|.* {worst})$")
    assert all(named.match(breach) for breach in parity.breaches), [b for b in parity.breaches if not named.match(b)]
    assert (result.tiers["operator"], result.tiers["logits"]) == ("broken", "broken")
    # each other place is right by itself
    assert wrong_places(result) == {(1, "router" if other_routing else "experts")}
    assert result.tiers["layer"] == "passed"
    changes_rows = fault in (perturb_the_router, scale_one_expert_by_2_percent)  # and not just their order
    assert result.tiers["weights"] == ("broken" if changes_rows else "passed")


@pytest.mark.parametrize("variant", each_shape(EXACT, ["float32"]))
def test_another_epsilon_is_caught(exports: dict[Variant, Exported], tmp_path: Path, variant: Variant) -> None:
    parity, result = check(plant(exports[variant], tmp_path, epsilon=1e-2), variant)
    told = "layer 1, input_layernorm: epsilon in the file is 0.01, the twin's 1e-06"
    assert parity.breaches[0] == f"{CPU}: weights: {told}"
    assert parity.breaches[1].startswith(
        f"{CPU}: layer: layer 1, the norm before attention, on the graph's own input: relative error "
    )
    assert any(": logits: " in breach and "relative error" in breach for breach in parity.breaches)
    assert wrong_places(result) == {(1, "attention norm")}
    assert result.worst_layer == 1


def test_a_perturbed_router_shows_in_the_routing_and_swapped_experts_do_not(judged: Judge) -> None:
    for fault, agrees in ((perturb_the_router, False), (swap_two_experts, True)):
        result = judged("float32", fault).result
        assert (result.twin.routing_agreement[1] == 1.0) is agrees


def test_nan_is_caught_and_stays_nan(exports: dict[Variant, Exported], tmp_path: Path) -> None:
    parity, result = check(plant(exports["float32"], tmp_path, lose_a_head_to_nan), "float32")
    limit, worst = (
        result.limits["logits"].value,
        f"(worst layer 1: routing agreement 1.0000, hidden error {result.twin.hidden_error[1]:.1e})",
    )
    # of decode steps the last token before them; a row begins with 26 of padding
    starts = [0, 0, 0, 39, 39, 0, 39 - 26, 0, 55, 0]
    assert isinstance(result.places, tuple)
    assert (
        parity.breaches[0]
        == f"{CPU}: weights: the head: 300 of 300 rows differ from the twin's; row 0: has NaN or infinite values in "
        "the file"
    )
    where, look = (
        "the head, on the graph's own input: relative error nan",
        "its weights in the file are not the twin's: look at these first",
    )
    assert parity.breaches[1] == f"{CPU}: layer: {where} > {result.places[-1].limit:.1e} ({look})"
    assert parity.breaches[2:-3] == tuple(
        f"{CPU}: logits: {each.name}: relative error nan > {limit:.1e}, from token {start} on {worst}"
        for each, start in zip(result.checks, starts, strict=True)
    )
    assert parity.breaches[-3].startswith(f"{CPU}: logits: greedy text differs after 0 of 8 tokens")
    assert parity.breaches[-2:] == (
        f"{CPU}: language: KL from the twin nan > 1e-03 {worst}",
        f"{CPU}: language: perplexity nan is +nan% ± nan% of the fine-tuned model's; at most +0.01% and two standard "
        f"errors {worst}",
    )
    assert math.isnan(result.twin.max_error)


def enlarge_the_head(weights: Weights) -> None:
    name = next(name for name in ("logits.weight", "logits.scales") if name in weights)
    weights[name] = weights[name] * np.float32(1e4)


def test_a_perplexity_beyond_all_numbers_is_a_breach(exports: dict[Variant, Exported], tmp_path: Path) -> None:
    parity, result = check(plant(exports["float32"], tmp_path, enlarge_the_head), "float32")
    assert result.figures[0].value == math.inf
    of_model = r"of the fine-tuned model's; at most \+0\.01% and two standard errors \(worst layer .*"
    assert re.fullmatch(rf"{CPU}: language: perplexity inf is \+inf% ± \d+\.\d+% {of_model}", parity.breaches[-1])


def tie(source: Path, directory: Path, layer: int, difference: float) -> Path:
    """A checkpoint whose router of `layer` has two rows that are equal, but for a noise of size `difference`."""
    shutil.copytree(source, directory)
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    router = tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
    router[2] = router[1] + difference * torch.randn(router.shape[1], generator=torch.Generator().manual_seed(0))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("layer", "lowering", "difference"),  # every two of them beside each other
    [(0, "fused", 0.0), (0, "unrolled", 1e-7), (1, "fused", 1e-7), (1, "unrolled", 0.0)],
)
def test_flips_of_ties_are_counted_apart(
    mixture_checkpoint: Path, tmp_path: Path, layer: int, lowering: str, difference: float
) -> None:
    finetuned = tie(mixture_checkpoint, tmp_path / "tied", layer, difference)
    exported = export(finetuned, tmp_path, "float32", lowering=lowering)
    parity, result = check(exported, "float32")
    assert sum(each.num_tie_flips for each in result.checks) > 0
    assert all(each.relative_error < ROUNDING for each in result.checks)
    assert not any("relative error" in breach for breach in parity.breaches)
    assert result.twin.max_error > 0.1  # the flips are real: another expert computed


def test_a_fault_is_no_tie(mixture_checkpoint: Path, tmp_path: Path) -> None:
    finetuned = tie(mixture_checkpoint, tmp_path / "tied", 1, 0.0)
    exported = plant(export(finetuned, tmp_path, "float32"), tmp_path, perturb_the_router)
    parity, _ = check(exported, "float32")
    assert any("relative error" in breach for breach in parity.breaches)


def test_ties_between_equal_experts_are_no_flips(mixture_checkpoint: Path, tmp_path: Path) -> None:
    finetuned = tie(mixture_checkpoint, tmp_path / "tied", 1, 0.0)
    tensors = {name: tensor.clone() for name, tensor in load_file(finetuned / "model.safetensors").items()}
    for name in tensors:
        if ".layers.1.block_sparse_moe.experts.2." in name:
            tensors[name] = tensors[name.replace("experts.2.", "experts.1.")].clone()
    save_file(tensors, finetuned / "model.safetensors", {"format": "pt"})
    parity, result = check(export(finetuned, tmp_path, "float32"), "float32")
    assert parity.passed
    assert sum(each.num_tie_flips for each in result.checks) == 0
    assert all(each.relative_error < ROUNDING for each in result.checks)


def test_the_same_experts_in_another_order_are_the_same() -> None:
    ours = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    theirs = torch.tensor([[2.0, 3.0, 1.0, 0.0], [3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert same_experts(ours, theirs, TopK(2)).tolist() == [True, False, False]
    assert same_experts(ours, theirs, TopK(4)).tolist() == [True, True, True]
    assert same_experts(ours, theirs, TopK(1)).tolist() == [False, True, False]


def test_speed_is_measured_within_the_context(exports: dict[Variant, Exported]) -> None:
    decoder = Decoder(exports["float32"].package, num_threads=1)
    for length in (1, 48, 256):  # the last leaves no room for decoding, unless the prompt is cut
        speed = measure_speed(decoder, [5] * length, num_new_tokens=4, num_rounds=1)
        assert speed.prefill > 0
        assert speed.decode > 0


def test_progress_tells_of_every_part(judged: Judge) -> None:
    seen = judged("float32").steps
    assert list(seen[:2]) == [("comparing weights", 0, 1), ("measuring noise", 0, 1)]
    assert all(done <= total for _, done, total in seen)
    assert ("comparing with the twin", 6, 6) in seen
    assert sum(what == "checking logits" for what, _, _ in seen) > 3
    assert seen[-1] == ("measuring speed", 1, 1)


def block_losses(directory: Path) -> list[float]:
    """The mean next-token loss of each block, as transformers' logits give it."""
    return [
        math.log(perplexity(logits[None], ids[None])) for logits, ids in zip(logits_of(directory), BLOCKS, strict=True)
    ]


@pytest.mark.parametrize(("compared_tokens", "knows_all"), [(2 * 48, True), (6 * 48, False)])
def test_perplexities_of_some_blocks_are_told_for_all_text(
    exports: dict[Variant, Exported], monkeypatch: pytest.MonkeyPatch, compared_tokens: int, knows_all: bool
) -> None:
    """However few tokens are compared one by one.

    Where all losses of the fine-tuned model are known, the rest of the text is as hard for both.
    """
    monkeypatch.setattr("dense2moe.export.parity.provider._COMPARED_TOKENS", compared_tokens)
    exported, config = exports["int8"], LIMITS.model_copy(update={"language_tokens": 4 * 48})
    # the package computes what its twin does
    package, finetuned = (
        block_losses(exported.twin),
        block_losses(exported.finetuned),
    )
    some = [0, 1, 3, 4]  # evenly
    differences = torch.tensor([package[n] - finetuned[n] for n in some], dtype=torch.float64)
    ratio, error = math.exp(float(differences.mean())), float(differences.std()) / 2
    model = math.exp(sum(finetuned) / 6 if knows_all else sum(finetuned[n] for n in some) / 4)
    known = finetuned if knows_all else None
    parity = check_parity(
        ParitySubject(
            exported.package, exported.twin, exported.finetuned, BLOCKS, "int8", False, finetuned_losses=known
        ),
        config,
        silent,
    )
    result = parity.providers[CPU]
    assert isinstance(result, ProviderParity)
    assert result.num_language_tokens == 4 * 48
    assert result.finetuned_figures[0].value == pytest.approx(model, rel=1e-6)
    assert result.figures[0].value == pytest.approx(model * ratio, rel=1e-6)
    assert result.twin_figures[0].value == pytest.approx(model * ratio, rel=1e-6)
    assert result.figures_error == pytest.approx(error, rel=1e-3)


def test_logits_compared_some_tokens_at_a_time_are_compared_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 7, 11, generator=generator) for _ in range(2))
    ids = torch.randint(0, 11, (2, 7), generator=generator)
    monkeypatch.setattr("dense2moe.export.parity.agreement.LOGIT_ROWS", 3)
    sums = Sums()
    sums.add(Forward(ours, (), (), (), TopK(2)), Forward(theirs, (), (), (), TopK(2)), ids)
    p, q = (logits.double().softmax(-1) for logits in (theirs, ours))
    assert sums.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    for losses, probabilities in zip(sums.losses, (q, p), strict=True):
        expected = [-sum(float(probabilities[b, t, ids[b, t + 1]].log()) for t in range(6)) / 6 for b in range(2)]
        assert losses == pytest.approx(expected, rel=1e-5)
    assert sums.predictions == 12
    assert sums.max_error == float((ours - theirs).abs().max())
    assert sums.top1 == sum(int(q[b, t].argmax() == p[b, t].argmax()) for b in range(2) for t in range(7))
