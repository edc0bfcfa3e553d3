"""Parity: does the package compute what the torch model computes?

Two questions, two numbers. Against the *twin*, the torch model with the very weights of the package: is the export
right? Against the fine-tuned model: did quantizing cost too much? Both references are unpatched transformers in float32
with eager experts; the twin reads the inputs of products as the graph does, rounded where the graph rounds them.

Eight tiers answer, each another question, and all of them for every variant:

    weights    every row of every matrix in the file: is it the twin's?
    operator   each router and each block of experts on the graph's own input, every expert visited: which one is wrong?
    layer      every other place of every layer, embedding and head, on the graph's own input: what differs there?
    logits     prefill, chained decoding, batches, left padding, long rows, text of its own: in what way of feeding it?
    language   perplexity, KL, top-1 and top-5: what does it cost?
    task       accuracy, F1, rank correlation on tasks of the user's: what does it cost there?
    routing    the same experts, by layer and given the reference's margin; KL with routing forced: weights or paths?
    files      tokenizer, generation and genai configs: does the package say of itself what the checkpoint says?

One place from the graph's own input is held to a multiple of float32's noise, measured there against float64, whatever
the graph rounds: the same numbers are rounded in the same way (`dense2moe.export.parity.inside.local`). Whole models
are held to it where the graph computes in float32 alone; where it rounds, to what two equally rounded computations part
by (`dense2moe.export.parity.rounding`), and each way of feeding it to one full prefill of the graph itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import onnxruntime as ort
import torch
from transformers import AutoConfig

from dense2moe.export import names
from dense2moe.export.blocks import choose_blocks
from dense2moe.export.coverage import find_decoder_family, find_refusal
from dense2moe.export.opening import open_package
from dense2moe.export.parity.agreement import Comparison, Follow, compare, mean_divergence, measure_losses
from dense2moe.export.parity.answers.evaluation import TaskEvaluation
from dense2moe.export.parity.answers.examples import Task
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.files.comparison import check_files
from dense2moe.export.parity.forward import BATCH, Forward, Reference, open_reference
from dense2moe.export.parity.inside.arithmetic import find_arithmetic, find_narrow
from dense2moe.export.parity.inside.discovery import discover_taps
from dense2moe.export.parity.inside.places import PlacesCheck
from dense2moe.export.parity.inside.products import Arithmetic
from dense2moe.export.parity.limits import configured_limits, measure_noise, noise_limit, own_limit
from dense2moe.export.parity.place import OUTSIDE
from dense2moe.export.parity.placement import count_elsewhere, find_placement
from dense2moe.export.parity.records import (
    Agreement,
    Check,
    Forced,
    Limit,
    Noise,
    Parity,
    ProviderParity,
    TaskCheck,
    Tier,
)
from dense2moe.export.parity.rounding import RoundingMeasure, rounding_limits
from dense2moe.export.parity.taps import Seen, Taps, find_taps
from dense2moe.export.parity.ties import TIE_MARGIN
from dense2moe.export.parity.verdicts import MOST_TIES, find_breaches, judge_tiers
from dense2moe.export.parity.ways.cases import plan_cases
from dense2moe.export.parity.ways.feeding import Errors, own_noise, run_cases, run_cases_alone
from dense2moe.export.parity.ways.free_text import run_free
from dense2moe.export.parity.weights.constants import read_constants
from dense2moe.export.parity.weights.rows import Found, check_weights
from dense2moe.export.progress import Progress
from dense2moe.export.quantization.twin import SCHEME_NAME, Twin
from dense2moe.export.runtime.decoder import CPU, CUDA, Decoder, is_at_hand
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.runtime.speed import measure_speed
from dense2moe.export.variant import Variant
from dense2moe.upcycle.memory import release_memory
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.numbers import language_figures, perplexity

_TIMED_TOKENS = 32
_FREE_ROWS = 3
_COMPARED_TOKENS = 512
"""Of the text on which a package is set beside a torch model token by token, which torch takes most of the time for.

Means over so many tokens have a standard error of less than a tenth of themselves (KL of int8 from SmolLM2-135M's
mixture: 1.33e-3 ± 0.04e-3 over eight times as many), where the limits leave room for twice them; perplexities are
compared on more. """
_SHARE = 0.7
"""Of a case's tokens, where a package rounds what it computes with and does not show its routers.

The others may have gone to other experts.
"""


def check_parity(
    package: Path,
    twin: Path,
    finetuned: Path,
    blocks: torch.Tensor,
    variant: Variant,
    rounds_activations: bool,
    config: ParityConfig,
    progress: Progress,
    exact_twin: bool = True,
    tasks: Sequence[Task] = (),
    finetuned_losses: Sequence[float] | None = None,
) -> Parity:
    """Compare a package with its twin and with the fine-tuned model on held-out blocks [N, block_size].

    On every provider at hand.

    `rounds_activations`: the graph computes in 16 bits or with 8-bit activations. `exact_twin`: the twin has the very
    weights of the package; without it the package is judged by its perplexity, by what `tasks` score, and by itself.
    `finetuned_losses` are the fine-tuned model's mean next-token losses of all blocks in float32, where they are known
    already. Perplexities are compared on some blocks, taken evenly, and told for all text: what the fine-tuned model
    has there, times the ratio of both on these blocks. A package that no provider here can run is a breach.

    Raises:
        ExportError: the package or a checkpoint cannot be loaded, or they are not of one model.
    """
    count = config.num_blocks or -(-config.language_tokens // blocks.shape[1])
    known = None if finetuned_losses is None else torch.tensor(finetuned_losses, dtype=torch.float64)
    whole_loss = None if known is None else float(known.mean())
    blocks, known = choose_blocks(blocks, count), None if known is None else choose_blocks(known, count)
    providers: dict[str, ProviderParity | str] = {}
    breaches: list[str] = []
    computes_in = Twin(twin).element_type if (twin / SCHEME_NAME).is_file() else "float32"
    settings = (variant, rounds_activations, exact_twin, config, tasks)
    judgement = _Judgement(
        package, twin, finetuned, blocks, *settings, progress, None if known is None else known.tolist(), whole_loss
    )
    for provider in (CPU, CUDA):
        if provider == CPU and computes_in == "bfloat16":
            providers[provider] = "not run: onnxruntime's CPU does not compute in bfloat16"
            continue
        if provider == CUDA and not is_at_hand(provider):
            providers[provider] = "not run: no CUDA device"
            continue
        result, broken = judgement.judge(provider)
        providers[provider] = result
        breaches += [f"{provider}: {tier}: {breach}" for tier, breach in broken]
    if all(isinstance(found, str) for found in providers.values()):
        breaches.append(
            f"compared nowhere: {'; '.join(f'{provider}: {found}' for provider, found in providers.items())}"
        )
    return Parity(providers, tuple(breaches))


class _Judgement:
    """One package, and all that it is compared with."""

    def __init__(
        self,
        package: Path,
        twin: Path,
        finetuned: Path,
        blocks: torch.Tensor,
        variant: Variant,
        rounds: bool,
        exact_twin: bool,
        config: ParityConfig,
        tasks: Sequence[Task],
        progress: Progress,
        finetuned_losses: list[float] | None,
        whole_loss: float | None,
    ) -> None:
        self.package, self.twin, self.finetuned, self.blocks, self.variant = package, twin, finetuned, blocks, variant
        self.config, self.tasks, self.progress, self.finetuned_losses = config, tasks, progress, finetuned_losses
        self.whole_loss = whole_loss
        self.exact_twin, self.rounds = exact_twin, rounds
        progress("comparing weights", 0, 1)
        self.weights: Found | None = check_weights(read_constants(package), twin) if exact_twin else None
        self.files = check_files(package, twin)
        self.some = blocks[: max(1, _COMPARED_TOKENS // blocks.shape[1])]

    @property
    def exact(self) -> bool:
        """Whether the graph computes in float32 alone, with the weights of the twin."""
        return self.exact_twin and not self.rounds

    def judge(self, provider: str) -> tuple[ProviderParity, list[tuple[Tier, str]]]:
        """All figures of one provider, and what they break."""
        config, blocks, progress = self.config, self.blocks, self.progress
        arithmetic = self._find_arithmetic(provider)
        taps = self._find_taps()
        inspection = Inspection(
            streams=True, attention=True, values=taps.all, routers=taps.routers, num_experts=taps.num_experts
        )
        decoder = Decoder(self.package, provider, inspection)
        evaluation = TaskEvaluation(self.twin, self.tasks, decoder, config.num_examples, config.answer_tokens)
        noise = self._measure_noise() if self.exact and config.noise_blocks else None
        tuned = self._compare_finetuned(decoder, evaluation)
        with open_reference(self.twin) as reference:
            places = PlacesCheck(reference, decoder, taps, self.family, arithmetic, config, provider, self.exact_twin)
            with places.computing():
                places.check_text(blocks, _teller(progress, "comparing places inside", 2))
                follow = self._follow(places)
                measure = RoundingMeasure(reference, places.moved, follow) if self.exact_twin and self.rounds else None
                watch = measure.add if measure else _ignore
                tell = _teller(progress, "comparing with the twin", len(self.some))
                own = compare(decoder, reference, self.some, tell, watch, follow=follow)
                if self.finetuned_losses is None:
                    self.finetuned_losses = _extend([], reference, blocks, progress)  # which goes its own ways
                forced = _force_routing(reference, blocks, tuned)
                rounding = measure.result() if measure else None
                tie_margin = rounding.tie_margin if rounding else noise.tie_margin if noise else TIE_MARGIN
                limits = configured_limits(self.variant, self.exact_twin, config)
                if rounding is not None:
                    limits = rounding_limits(limits, rounding)
                ties = 0.0 if own.margins is None else float((own.margins < TIE_MARGIN).float().mean())
                # then right packages go ways of their own, and only what they compute on their way can be judged
                if ties > MOST_TIES:
                    limits = {name: limit for name, limit in limits.items() if name not in ("kl", "routing", "factor")}
                if self.exact:
                    limits["logits"] = noise_limit(noise.logits if noise else None, config, "the logits", provider)
                    limits["last hidden state"] = limits["logits"]
                errors = self._run_cases(decoder, reference, places, own, taps, tie_margin)
                free = run_free(
                    decoder, reference, blocks[:_FREE_ROWS], config.free_tokens, follow, taps.of_layers(("router",))
                )
                progress("doing tasks", 0, 1)
                task_checks = evaluation.check(reference, limits, tie_margin)
                if not self.exact_twin:  # of the ways of feeding it alone: answers are another model's
                    limits["logits"] = own_limit(own_noise(errors), self.rounds, config)
            found_places = places.result()
            places.close()
        tuned = tuned or own
        # a package's sessions are opened one after the other: each holds all weights
        del (
            decoder,
            evaluation,
            reference,
            measure,
            watch,
            places,
        )
        release_memory()
        checks = tuple(each.judge(limits["logits"].value if "logits" in limits else math.inf) for each in errors)
        result = self._measure_alone(provider, own, tuned, checks, limits)
        result = ProviderParity(
            **{
                **result.__dict__,
                "places": found_places,
                "weights": self.weights.check if self.weights else "not judged: " + self._why_not(),
                "files": self.files,
                "free_run": free,
                "tie_share": ties,
                "tasks": task_checks,
                "forced": forced,
                "noise": noise
                or (
                    rounding.noise
                    if rounding
                    else "not measured: " + ("parity.noise_blocks is 0" if self.exact else self._why_not())
                ),
                "limits": limits,
                "logits_factor": own.factor if "factor" in limits else None,
            }
        )
        broken = find_breaches(result)
        return self._with_tiers(result, broken, arithmetic), broken

    def _find_arithmetic(self, provider: str) -> Arithmetic:
        return (
            Arithmetic({}, find_narrow(self.package))
            if self.weights is None
            else find_arithmetic(self.package, self.weights, provider)
        )

    @cached_property
    def family(self) -> Architecture | None:
        """What is known of the twin's architecture; None where the graph builder does not know it."""
        config = AutoConfig.from_pretrained(self.twin, local_files_only=True, trust_remote_code=False)
        return find_decoder_family(config) if find_refusal(config) is None else None

    def _find_taps(self) -> Taps:
        """The places of the graph that can be looked at: by our names, or else by the weights that it multiplies by."""
        model = open_package(self.package).model
        shared_outside = self.family is not None and self.family.model_type == "granitemoeshared"
        taps = find_taps(model, shared_outside)
        if taps.names or self.weights is None or self.family is None:
            return taps
        tied = bool(
            getattr(
                AutoConfig.from_pretrained(self.twin, local_files_only=True, trust_remote_code=False),
                "tie_word_embeddings",
                False,
            )
        )
        return discover_taps(model, self.weights, self.family, tied, shared_outside)

    @staticmethod
    def _follow(places: PlacesCheck) -> Follow:
        """Run the twin with what the package's routers said.

        The routing in the result is what its own would have said.
        """

        def follow(reference: Reference, seen: Seen) -> Forward:
            with places.following(seen):
                found = reference.forward(seen.ids, seen.mask)
            own = places.own_routers
            routers = tuple(
                reference.score_of(n, own[n]).reshape(*seen.ids.shape, -1) if n in own else router
                for n, router in enumerate(found.routers)
            )
            return Forward(found.logits, routers, found.hiddens, found.attended, found.top_k)

        return follow

    def _measure_noise(self) -> Noise:
        """The twin in float32 against itself in float64, one after the other in memory."""
        self.progress("measuring noise", 0, 1)
        ids = self.blocks[: min(BATCH, self.config.noise_blocks)]
        with open_reference(self.twin) as reference:
            first = reference.forward(ids, torch.ones_like(ids))
        with open_reference(self.twin, torch.float64) as exact:
            return measure_noise(exact, ids, first)

    def _compare_finetuned(self, decoder: Decoder, evaluation: TaskEvaluation) -> Comparison | None:
        """The package against the fine-tuned model; None where that is the twin."""
        if self.finetuned == self.twin:
            return None
        with open_reference(self.finetuned) as reference:
            tell = _teller(self.progress, "comparing with the fine-tuned model", len(self.some))
            tuned = compare(decoder, reference, self.some, tell, keeps_first=True)
            if self.finetuned_losses is None:
                self.finetuned_losses = _extend(tuned.reference_losses, reference, self.blocks, self.progress)
            evaluation.ask_finetuned(reference)
        return tuned

    def _run_cases(
        self,
        decoder: Decoder,
        reference: Reference,
        places: PlacesCheck,
        own: Comparison,
        taps: Taps,
        tie_margin: float,
    ) -> list[Errors]:
        """Every way of feeding the package, against the twin where it computes in float32 alone.

        Else against itself.
        """
        window = getattr(reference.model.config, "sliding_window", None)
        cases = plan_cases(
            self.blocks, decoder.context_length, window, own.margins if self.exact else None, self.config
        )
        tell = _teller(self.progress, "checking logits", len(cases))
        if self.exact:
            return run_cases(decoder, reference, cases, places.way_names, places.look_inside, tie_margin, tell)
        routers = [
            scores if (scores := names.selection_scores(names.experts(n))) in decoder.taps else name
            for n, name in taps.by_layer("router")
        ]
        share = 1.0 if routers or not own.top_k else _SHARE
        return run_cases_alone(decoder, cases, places.way_names, routers, places.look_inside, tie_margin, share, tell)

    def _measure_alone(
        self, provider: str, own: Comparison, tuned: Comparison, checks: tuple[Check, ...], limits: dict[str, Limit]
    ) -> ProviderParity:
        """What the package does with no torch model beside it.

        Its speed, its perplexity over all text, where its nodes run.
        """
        assert self.finetuned_losses is not None
        self.progress("measuring speed", 0, 1)
        plain = Decoder(self.package, provider)
        speed = measure_speed(plain, self.blocks[0].tolist(), _TIMED_TOKENS)
        losses = _extend(tuned.package_losses, plain, self.blocks, self.progress)
        mean, tuned_mean, own_mean, twin_mean = (
            fmean(each) for each in (losses, self.finetuned_losses, own.package_losses, own.reference_losses)
        )
        # what all text is harder by than these blocks
        beyond = 0.0 if self.whole_loss is None else self.whole_loss - tuned_mean
        twin_loss = mean + twin_mean - own_mean  # beyond the text that is compared the two differ as they do on it
        differences = [loss - other for loss, other in zip(losses, self.finetuned_losses, strict=True)]
        error = (
            float(torch.tensor(differences, dtype=torch.float64).std()) / math.sqrt(len(differences))
            if len(differences) > 1
            else 0.0
        )
        package_loss, twin_loss, finetuned_loss = (loss + beyond for loss in (mean, twin_loss, tuned_mean))
        placement = find_placement(self.package, provider)
        self.progress("measuring speed", 1, 1)
        return ProviderParity(
            ort.__version__,
            checks,
            own.agreement,
            tuned.agreement,
            perplexity(package_loss),
            perplexity(twin_loss),
            perplexity(finetuned_loss),
            _worst_layer(own.agreement),
            speed.prefill,
            speed.decode,
            limits=limits,
            placement=placement,
            num_fallback_nodes=count_elsewhere(placement, provider),
            perplexity_error=error,
            figures=language_figures(package_loss),
            twin_figures=language_figures(twin_loss),
            finetuned_figures=language_figures(finetuned_loss),
            figures_error=error,
            num_language_tokens=self.blocks.numel(),
        )

    def _why_not(self) -> str:
        return "no checkpoint with the package's own weights was given"

    def _with_tiers(
        self, result: ProviderParity, broken: list[tuple[Tier, str]], arithmetic: Arithmetic
    ) -> ProviderParity:
        why_not: dict[Tier, str] = {}
        if self.weights is not None and (lost := self.weights.check.not_judged):
            why_not["weights"] = (
                f"passed but for {len(lost)} tensors that were not found by their rows: {lost[0]} and others"
            )
        if not self.exact_twin:
            why_not = {tier: f"not judged: {self._why_not()}" for tier in ("weights", "operator", "layer", "routing")}
            why_not["logits"] = (
                "passed: each way of feeding it against itself; not judged against torch: " + self._why_not()
            )
        elif isinstance(result.places, str):
            why_not = {"operator": result.places, "layer": result.places}
        elif not any(check.part == "experts" for check in result.places):
            why_not["operator"] = "not run: the package shows no blocks of experts"
        elif not any(check.layer != OUTSIDE for check in result.places):
            why_not["layer"] = "not run: the package shows nothing of its layers"
        if arithmetic.unknown:
            text = (
                f"not judged: how this processor rounds the inputs of {' and of '.join(arithmetic.unknown)} is "
                "not known"
            )
            why_not |= {"operator": text, "layer": text}
        if result.tie_share > MOST_TIES:
            why_not["routing"] = f"not judged: the routers tie in {result.tie_share:.0%} of all tokens"
        if not result.twin.routing_agreement:
            why_not["routing"] = "not run: the package shows no router logits"
        if not any(isinstance(check, TaskCheck) for check in result.tasks):
            why_not["task"] = next(
                (check for check in result.tasks if isinstance(check, str)), "not run: no task was given"
            )
        return ProviderParity(**{**result.__dict__, "tiers": judge_tiers(broken, why_not)})


def _extend(losses: list[float], model: Reference | Decoder, blocks: torch.Tensor, progress: Progress) -> list[float]:
    """The mean losses of a model of all blocks [N, S], of which those of the first are known."""
    rest = blocks[len(losses) :]
    return losses + (
        measure_losses(model, rest, _teller(progress, "measuring perplexity", len(rest))) if len(rest) else []
    )


def _ignore(*_: object) -> None:
    """Watch nothing."""


def _teller(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    progress(what, 0, total)
    return lambda done: progress(what, done, total)


def _worst_layer(agreement: Agreement) -> int | None:
    layers = range(len(agreement.hidden_error))
    return min(layers, key=lambda n: (agreement.routing_agreement[n], -agreement.hidden_error[n])) if layers else None


def _force_routing(twin: Reference, blocks: torch.Tensor, tuned: Comparison | None) -> Forced | str:
    """The twin with the fine-tuned model's routing: what remains is the error of the weights alone."""
    if tuned is None:
        return "not run: one checkpoint is both references"
    if not tuned.routers:
        return "not run: no layer has experts"
    assert tuned.first is not None
    ids = blocks[:1]
    mask = torch.ones_like(ids)
    routers = {n: _first_tokens(said, ids.numel()) for n, said in tuned.routers.items()}
    free = twin.forward(ids, mask).logits
    with twin.forced(routers):
        forced = twin.forward(ids, mask).logits
    kl, kl_free = (max(mean_divergence(tuned.first[:1], logits), 0.0) for logits in (forced, free))
    return Forced(kl, kl_free, ids.numel())


def _first_tokens(said: Any, count: int) -> Any:
    """What a router said of the first tokens of a batch."""
    return tuple(part[:count] for part in said) if isinstance(said, tuple) else said[:count]
