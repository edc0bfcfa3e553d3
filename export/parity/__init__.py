"""Parity: does the package compute what the torch model computes?

Two questions, two numbers. Against the *twin*, the torch model with the very weights of the package: is the export right? Against the
fine-tuned model: did quantizing cost too much? Both references are unpatched transformers in float32 with eager experts. Where activations are
rounded with scales that are part of the file, the twin rounds them too (`export.simulation`); else the first question would be the second.

Six tiers answer, each another question:

    operator   each layer's experts on the reference's own input: which layer, which expert?
    layer      the hidden states of both sides on the same text: where do they first part?
    logits     prefill, chained decoding, batches, left padding, long rows, rows that end near ties, text of its own: what is computed wrongly?
    language   perplexity, KL, top-1 and top-5: what does it cost?
    task       accuracy, F1, rank correlation on tasks of the user's: what does it cost there?
    routing    the same experts, by layer and given the reference's margin; KL with the routing forced: is it the weights or the paths?

What computes in float32 is held to a multiple of float32's own noise, which is measured here on this text against float64 torch. A router can tie to
the last bit, and then two right computations may choose different experts. Such a flip is counted and reported apart; the tokens from there on in
that row are left out of the largest error, and nothing else is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from export.config import ParityConfig, Variant
from export.parity.agreement import Comparison, compare, mean_divergence, measure_loss
from export.parity.checks import plan_cases, run_cases, run_free
from export.parity.forward import BATCH, Block, Reference, open_reference
from export.parity.judge import find_breaches, find_divergence, judge_tiers
from export.parity.limits import MeasuredNoise, configured_limits, measure_noise, noise_limit
from export.parity.operators import Blocks, check_operators
from export.parity.placement import count_elsewhere, find_placement
from export.parity.records import (
    Agreement,
    Check,
    Forced,
    LayerCheck,
    Limit,
    OperatorCheck,
    Parity,
    ProviderParity,
    TaskCheck,
    Tier,
)
from export.parity.rounding import open_rounding, rounding_limits
from export.parity.task_checks import TaskEvaluation
from export.parity.tasks import Task
from export.parity.ties import TIE_MARGIN, same_experts
from export.progress import Progress
from export.runtime import CPU, CUDA, Decoder, is_at_hand
from export.speed import measure_speed
from export.text import choose_blocks
from export.twin import SCHEME_NAME, Twin
from upcycle.memory import release_memory
from upcycle.numbers import perplexity

__all__ = ["Agreement", "Check", "Parity", "ProviderParity", "check_parity", "find_breaches", "same_experts"]

_TIMED_TOKENS = 32
_FREE_ROWS = 3
_COMPARED_TOKENS = 2048
"""Of the text on which a package is set beside a torch model token by token, which torch takes most of the time for. Means over so many tokens have a
standard error of a few hundredths of themselves (KL of int8 from SmolLM2-135M's mixture: 1.33e-3 ± 0.04e-3 over twice as many), where the limits
leave room for twice them. The perplexities that are judged are of all text."""


def check_parity(
    package: Path, twin: Path, finetuned: Path, blocks: torch.Tensor, variant: Variant, rounds_activations: bool, config: ParityConfig,
    progress: Progress, exact_twin: bool = True, tasks: Sequence[Task] = (),
    finetuned_loss: float | None = None,
) -> Parity:  # fmt: skip
    """Compare a package with its twin and with the fine-tuned model on held-out blocks [N, block_size], on every provider at hand.

    `rounds_activations`: the graph computes in 16 bits or with 8-bit activations, so its logits are held to `max_kl` and not to a multiple of
    float32's noise. `exact_twin`: the twin has the very weights of the package; without it only the perplexity, and what `tasks` score,
    are held to a limit. `finetuned_loss` is the fine-tuned model's mean next-token loss over all blocks in float32, where that is known already;
    it is not used where `config.num_blocks` takes some of them. A package that no provider here can run is a breach.

    Raises:
        ExportError: the package or a checkpoint cannot be loaded, or they are not of one model.
    """
    if config.num_blocks is not None:
        blocks, finetuned_loss = choose_blocks(blocks, config.num_blocks), None
    providers: dict[str, ProviderParity | str] = {}
    breaches: list[str] = []
    computes_in = Twin(twin).element_type if (twin / SCHEME_NAME).is_file() else "float32"
    for provider in (CPU, CUDA):
        if provider == CPU and computes_in == "bfloat16":
            providers[provider] = "not run: onnxruntime's CPU does not compute in bfloat16"
            continue
        if provider == CUDA and not is_at_hand(provider):
            providers[provider] = "not run: no CUDA device"
            continue
        result, broken = _judge(
            package, twin, finetuned, blocks, variant, rounds_activations, exact_twin, config, tasks, provider, progress, finetuned_loss
        )
        providers[provider] = result
        breaches += [f"{provider}: {tier}: {breach}" for tier, breach in broken]
    if all(isinstance(found, str) for found in providers.values()):
        breaches.append(f"compared nowhere: {'; '.join(f'{provider}: {found}' for provider, found in providers.items())}")
    return Parity(providers, tuple(breaches))


def _judge(
    package: Path, twin: Path, finetuned: Path, blocks: torch.Tensor, variant: Variant, rounds: bool, exact_twin: bool, config: ParityConfig,
    tasks: Sequence[Task], provider: str, progress: Progress, finetuned_loss: float | None,
) -> tuple[ProviderParity, list[tuple[Tier, str]]]:  # fmt: skip
    """All figures of one provider, and what they break."""
    decoder = Decoder(package, provider, taps=True, attention_taps=True)
    evaluation = TaskEvaluation(twin, tasks, decoder, config.num_examples, config.answer_tokens)
    exact, first_blocks = exact_twin and not rounds, blocks[:BATCH]
    progress("measuring noise", 0, 1)
    noise = _measure_noise(twin, first_blocks[: config.noise_blocks]) if exact and config.noise_blocks else None
    tie_margin = noise.noise.tie_margin if noise else TIE_MARGIN
    tuned: Comparison | None = None
    some = blocks[: max(BATCH, _COMPARED_TOKENS // blocks.shape[1])]
    rest = blocks[len(some) :]
    if finetuned != twin:
        with open_reference(finetuned) as reference:
            tell = _teller(progress, "comparing with the fine-tuned model", len(some))
            tuned = compare(decoder, reference, some, tell=tell, keeps="first")
            if finetuned_loss is None:
                finetuned_loss = _extend(tuned.reference_loss, some, reference, rest, progress)
            evaluation.ask_finetuned(reference)
    with open_reference(twin) as reference:
        measure = open_rounding(reference, twin, package) if exact_twin and rounds else None
        watch = measure.add if measure else _ignore
        own = compare(decoder, reference, some, tie_margin, _teller(progress, "comparing with the twin", len(some)), watch)
        if finetuned_loss is None:
            finetuned_loss = _extend(own.reference_loss, some, reference, rest, progress)
        forced = _force_routing(reference, blocks, tuned)
        window = getattr(reference.model.config, "sliding_window", None)
        cases = plan_cases(blocks, decoder.context_length, window, own.margins, config)
        errors = run_cases(decoder, reference, cases, tie_margin, _teller(progress, "checking logits", len(cases)))
        free = run_free(decoder, reference, blocks[:_FREE_ROWS], config.free_tokens)
        shared_outside = reference.adds_shared_outside
        layers = _with_noise(own.layers, noise)
        limits = rounding_limits(configured_limits(variant, exact_twin, config), measure.result() if measure else None)
        limits |= _noise_limits(layers, own.blocks, noise, config, provider) if exact else {}
        progress("doing tasks", 0, 1)
        task_checks = evaluation.check(reference, limits, tie_margin)
    tuned = tuned or own
    del decoder, evaluation, reference, measure, watch  # a package's sessions are opened one after the other: each holds all weights once more
    release_memory()
    operators = _check_operators(Blocks(package, provider, shared_outside), own.blocks, own.top_k, limits, noise)
    checks = tuple(each.judge(limits["logits"].value if "logits" in limits else math.inf) for each in errors)
    progress("measuring speed", 0, 1)
    plain = Decoder(package, provider)
    speed = measure_speed(plain, blocks[0].tolist(), _TIMED_TOKENS)
    package_loss = _extend(own.package_loss, some, plain, rest, progress)
    twin_loss = package_loss + own.reference_loss - own.package_loss  # beyond the text that is compared the two differ as they do on it
    placement = find_placement(package, provider)
    progress("measuring speed", 1, 1)
    result = ProviderParity(
        ort.__version__, checks, own.agreement, tuned.agreement, perplexity(package_loss), perplexity(twin_loss),
        perplexity(finetuned_loss), _worst_layer(own.agreement), speed.prefill, speed.decode,
        layers=layers or "not run: the package shows no hidden states",
        operators=operators,
        free_run=free,
        tasks=task_checks,
        forced=forced,
        noise=noise.noise if noise else "not measured: " + ("parity.noise_blocks is 0" if exact else _not_judged(exact_twin)),
        limits=limits,
        first_divergence=find_divergence(layers, own.by_position, limits),
        placement=placement,
        num_fallback_nodes=count_elsewhere(placement, provider),
    )  # fmt: skip
    broken = find_breaches(result)
    return _with_tiers(result, broken, exact, exact_twin), broken


def _extend(loss: float, some: torch.Tensor, model: Reference | Decoder, rest: torch.Tensor, progress: Progress) -> float:
    """The mean loss of a model over `some` blocks, which is known, and the rest [N, S]."""
    if not len(rest):
        return loss
    other = measure_loss(model, rest, _teller(progress, "measuring perplexity", len(rest)))
    return (len(some) * loss + len(rest) * other) / (len(some) + len(rest))


def _ignore(*_: object) -> None:
    """Watch nothing."""


def _teller(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    progress(what, 0, total)
    return lambda done: progress(what, done, total)


def _not_judged(exact_twin: bool) -> str:
    return "the graph rounds activations" if exact_twin else "no checkpoint with the package's own weights was given"


def _with_tiers(result: ProviderParity, broken: list[tuple[Tier, str]], exact: bool, exact_twin: bool) -> ProviderParity:
    why_not: dict[Tier, str] = {}
    if not exact:
        why_not = {tier: f"not judged: {_not_judged(exact_twin)}" for tier in ("operator", "layer", "logits")}
    if not result.twin.routing_agreement:
        why_not["routing"] = "not run: the package shows no router logits"
    elif not exact_twin:
        why_not["routing"] = f"not judged: {_not_judged(exact_twin)}"
    if isinstance(result.operators, str):
        why_not["operator"] = result.operators
    if isinstance(result.layers, str):
        why_not["layer"] = result.layers
    if not any(isinstance(check, TaskCheck) for check in result.tasks):
        why_not["task"] = next((check for check in result.tasks if isinstance(check, str)), "not run: no task was given")
    return ProviderParity(**{**result.__dict__, "tiers": judge_tiers(broken, why_not)})


def _worst_layer(agreement: Agreement) -> int | None:
    layers = range(len(agreement.hidden_error))
    return min(layers, key=lambda n: (agreement.routing_agreement[n], -agreement.hidden_error[n])) if layers else None


def _measure_noise(twin: Path, ids: torch.Tensor) -> MeasuredNoise:
    """The twin in float32 against itself in float64, one after the other in memory."""
    with open_reference(twin) as reference:
        first, blocks = reference.forward(ids, torch.ones_like(ids)), reference.blocks()
    with open_reference(twin, torch.float64) as exact:
        return measure_noise(exact, ids, first, blocks)


def _force_routing(twin: Reference, blocks: torch.Tensor, tuned: Comparison | None) -> Forced | str:
    """The twin with the fine-tuned model's routing: what remains is the error of the weights alone."""
    if tuned is None:
        return "not run: one checkpoint is both references"
    if not tuned.routers:
        return "not run: no layer has experts"
    assert tuned.first is not None
    ids = blocks[: len(tuned.first)]
    mask = torch.ones_like(ids)
    free = twin.forward(ids, mask).logits
    with twin.forced(tuned.routers):
        forced = twin.forward(ids, mask).logits
    kl, kl_free = (max(mean_divergence(tuned.first, logits), 0.0) for logits in (forced, free))
    return Forced(kl, kl_free, ids.numel())


def _with_noise(layers: tuple[LayerCheck, ...], noise: MeasuredNoise | None) -> tuple[LayerCheck, ...]:
    if noise is None:
        return layers
    return tuple(
        LayerCheck(found.layer, found.attention_error, found.hidden_error, floor.attention_error, floor.hidden_error)
        for found, floor in zip(layers, noise.layers, strict=False)
    )


def _noise_limits(
    layers: tuple[LayerCheck, ...], blocks: Mapping[int, Block], noise: MeasuredNoise | None, config: ParityConfig, provider: str
) -> dict[str, Limit]:
    """The limits of what computes in float32, from the noise of float32 in the same place."""
    floors: dict[str, float | None] = {"logits": noise.noise.logits if noise else None}
    for found in layers:
        if found.attention_error is not None:
            floors[f"attention of layer {found.layer}"] = found.attention_noise
        floors[f"hidden state of layer {found.layer}"] = found.hidden_noise
    for layer in blocks:
        floors[f"router of layer {layer}"], floors[f"experts of layer {layer}"] = noise.blocks[layer] if noise else (None, None)
    return {name: noise_limit(floor, config, f"the {name}", provider) for name, floor in floors.items()}


def _check_operators(
    package: Blocks, blocks: Mapping[int, Block], top_k: int, limits: Mapping[str, Limit], noise: MeasuredNoise | None
) -> tuple[OperatorCheck, ...] | str:
    if package.refusal is not None:
        return package.refusal
    found = check_operators(package, blocks, top_k, {n: limits[name].value for n in blocks if (name := f"experts of layer {n}") in limits})
    floors: Any = noise.blocks if noise else {}
    return tuple(
        OperatorCheck(**{**check.__dict__, "router_noise": floors[check.layer][0], "output_noise": floors[check.layer][1]})
        if check.layer in floors else check
        for check in found
    )  # fmt: skip
