"""All figures of a package on one provider, and broken limits.

A provider is an execution provider of onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from statistics import fmean

import onnxruntime as ort
import torch
from transformers import AutoConfig

from dense2moe.export import names
from dense2moe.export.coverage import find_decoder_family, find_refusal
from dense2moe.export.opening import open_package
from dense2moe.export.parity.agreement import Comparison, Follow, compare, measure_losses
from dense2moe.export.parity.answers.evaluation import TaskEvaluation
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.files.comparison import check_files
from dense2moe.export.parity.forced import force_routing
from dense2moe.export.parity.forward import BATCH, Forward, Reference, open_reference
from dense2moe.export.parity.inside.arithmetic import find_arithmetic, find_narrow
from dense2moe.export.parity.inside.discovery import discover_taps
from dense2moe.export.parity.inside.local import LocalCheck
from dense2moe.export.parity.inside.places import PlacesCheck
from dense2moe.export.parity.inside.products import Arithmetic
from dense2moe.export.parity.limits import configured_limits, measure_noise, noise_limit, own_limit
from dense2moe.export.parity.placement import count_elsewhere, find_placement
from dense2moe.export.parity.records import Agreement, Check, Limit, ProviderParity, Tier
from dense2moe.export.parity.rounding import RoundingMeasure, rounding_limits
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.parity.taps import Seen, Taps, find_taps
from dense2moe.export.parity.ties import TIE_MARGIN
from dense2moe.export.parity.verdicts import MOST_TIES, NO_TWIN, explain_unjudged, find_breaches, judge_tiers
from dense2moe.export.parity.ways.cases import plan_cases
from dense2moe.export.parity.ways.feeding import CaseWatch, Errors, own_noise, run_cases, run_cases_alone
from dense2moe.export.parity.ways.free_text import run_free
from dense2moe.export.parity.weights.constants import read_constants
from dense2moe.export.parity.weights.rows import FoundWeights, check_weights
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.runtime.speed import measure_speed
from dense2moe.upcycle.memory import release_memory
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.language import language_figures

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


class ProviderJudgement:
    """Judges one package on one execution provider after the other.

    With everything that the package is compared with.
    """

    def __init__(
        self, subject: ParitySubject, config: ParityConfig, progress: Progress, whole_loss: float | None
    ) -> None:
        """Prepare the judgement of `subject`.

        `whole_loss`: the fine-tuned model's mean loss of all text, of which the subject's blocks are some.
        """
        self.subject, self.config, self.progress, self.whole_loss = subject, config, progress, whole_loss
        self.finetuned_losses = None if subject.finetuned_losses is None else list(subject.finetuned_losses)
        progress("comparing weights", 0, 1)
        self.weights: FoundWeights | None = (
            check_weights(read_constants(subject.package), subject.twin) if subject.exact_twin else None
        )
        self.files = check_files(subject.package, subject.twin)
        self.some = subject.blocks[: max(1, _COMPARED_TOKENS // subject.blocks.shape[1])]
        self.counted = None if subject.counted is None else subject.counted[: len(self.some)]

    def judge(self, provider: str) -> tuple[ProviderParity, list[tuple[Tier, str]]]:
        """All figures of one provider, and the limits they break."""
        config, blocks, progress = self.config, self.subject.blocks, self.progress
        arithmetic = self._find_arithmetic(provider)
        taps = self._find_taps()
        inspection = Inspection(
            streams=True, attention=True, values=taps.all, routers=taps.routers, num_experts=taps.num_experts
        )
        decoder = Decoder(self.subject.package, provider, inspection)
        evaluation = TaskEvaluation(
            self.subject.twin, self.subject.tasks, decoder, config.num_examples, config.answer_tokens
        )
        text = blocks[: min(BATCH, config.noise_blocks)]  # on which the noise is measured
        exact = self._forward_exactly(text) if self.subject.exact and config.noise_blocks else None
        tuned = self._compare_finetuned(decoder, evaluation)
        with open_reference(self.subject.twin) as reference:
            noise = (
                None if exact is None else measure_noise(exact, text, reference.forward(text, torch.ones_like(text)))
            )
            del exact
            local = LocalCheck(reference, taps, self.family, arithmetic)
            places = PlacesCheck(local, decoder, config, provider, self.subject.exact_twin)
            with places.computing():
                places.check_text(blocks, _teller(progress, "comparing places inside", 2))
                follow = self._follow(places)
                measure = (
                    RoundingMeasure(reference, places.moved, follow)
                    if self.subject.exact_twin and self.subject.rounds_activations and not arithmetic.unknown
                    else None
                )
                watch = measure.add if measure else _ignore
                tell = _teller(progress, "comparing with the twin", len(self.some))
                own = compare(decoder, reference, self.some, tell, watch, follow=follow, counted=self.counted)
                if self.finetuned_losses is None:
                    self.finetuned_losses = _extend([], reference, self.subject, progress)  # which goes its own ways
                forced = force_routing(reference, blocks, tuned)
                rounding = measure.result() if measure else None
                tie_margin = rounding.tie_margin if rounding else noise.tie_margin if noise else TIE_MARGIN
                limits = configured_limits(self.subject.variant, self.subject.exact_twin, config)
                if rounding is not None:
                    limits = rounding_limits(limits, rounding)
                ties = 0.0 if own.margins is None else float((own.margins < TIE_MARGIN).float().mean())
                # then right packages go ways of their own, and only what they compute on their way can be judged
                if ties > MOST_TIES or arithmetic.unknown:
                    limits = {name: limit for name, limit in limits.items() if name not in ("kl", "routing", "factor")}
                if self.subject.exact:
                    limits["logits"] = noise_limit(noise.logits if noise else None, config, "the logits", provider)
                    limits["last hidden state"] = limits["logits"]
                errors = self._run_cases(decoder, reference, places, own, taps, tie_margin)
                free = run_free(
                    decoder, reference, blocks[:_FREE_ROWS], config.free_tokens, follow, taps.of_layers(("router",))
                )
                progress("doing tasks", 0, 1)
                task_checks = evaluation.check(reference, limits, tie_margin)
                # of the ways of feeding it alone: answers are another model's
                if not self.subject.exact_twin or arithmetic.unknown:
                    limits["logits"] = own_limit(own_noise(errors), self.subject.rounds_activations, config)
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
            local,
        )
        release_memory()
        checks = tuple(each.judge(limits["logits"].value if "logits" in limits else math.inf) for each in errors)
        result = self._measure_alone(provider, own, tuned, checks, limits)
        unmeasured = "not measured: " + ("parity.noise_blocks is 0" if self.subject.exact else NO_TWIN)
        result = replace(
            result,
            places=found_places,
            weights=self.weights.check if self.weights else "not judged: " + NO_TWIN,
            files=self.files,
            free_run=free,
            tie_share=ties,
            tasks=task_checks,
            forced=forced,
            noise=noise or (rounding.noise if rounding else unmeasured),
            limits=limits,
            logits_factor=own.factor if "factor" in limits else None,
        )
        broken = find_breaches(result)
        reasons = explain_unjudged(result, self.subject.exact_twin, arithmetic.unknown)
        return replace(result, tiers=judge_tiers(broken, reasons)), broken

    def _find_arithmetic(self, provider: str) -> Arithmetic:
        return (
            Arithmetic({}, find_narrow(self.subject.package))
            if self.weights is None
            else find_arithmetic(self.subject.package, self.weights, provider)
        )

    @cached_property
    def family(self) -> Architecture | None:
        """The twin's architecture; None where the graph builder does not cover it."""
        config = AutoConfig.from_pretrained(self.subject.twin, local_files_only=True, trust_remote_code=False)
        return find_decoder_family(config) if find_refusal(config) is None else None

    def _find_taps(self) -> Taps:
        """The graph's visible places, by our names or its weights."""
        model = open_package(self.subject.package).model
        shared_outside = self.family is not None and self.family.shared_is_outside
        taps = find_taps(model, shared_outside)
        if taps.names or self.weights is None or self.family is None:
            return taps
        tied = bool(
            getattr(
                AutoConfig.from_pretrained(self.subject.twin, local_files_only=True, trust_remote_code=False),
                "tie_word_embeddings",
                False,
            )
        )
        return discover_taps(model, self.weights, self.family, tied, shared_outside)

    @staticmethod
    def _follow(places: PlacesCheck) -> Follow:
        """Run the twin with the package's routing.

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
            return Forward(found.logits, routers, found.hiddens, found.attended, found.choice)

        return follow

    def _forward_exactly(self, ids: torch.Tensor) -> Forward:
        """What the twin in float64 gives for ids [B, S].

        It leaves memory before another model is loaded.
        """
        self.progress("measuring noise", 0, 1)
        with open_reference(self.subject.twin, torch.float64) as exact:
            return exact.forward(ids, torch.ones_like(ids))

    def _compare_finetuned(self, decoder: Decoder, evaluation: TaskEvaluation) -> Comparison | None:
        """Package against fine-tuned model; None where the twin is that model."""
        if self.subject.finetuned == self.subject.twin:
            return None
        with open_reference(self.subject.finetuned) as reference:
            tell = _teller(self.progress, "comparing with the fine-tuned model", len(self.some))
            tuned = compare(decoder, reference, self.some, tell, keeps_first=True, counted=self.counted)
            if self.finetuned_losses is None:
                self.finetuned_losses = _extend(tuned.reference_losses, reference, self.subject, self.progress)
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
        """Compare every way of feeding with the twin.

        The twin is the reference only where the graph computes in float32.

        Else against itself.
        """
        window = getattr(reference.model.config, "sliding_window", None)
        cases = plan_cases(
            self.subject.blocks,
            decoder.context_length,
            window,
            own.margins if self.subject.exact else None,
            self.config,
        )
        release_memory()  # what comparing left: the longest rows come now
        tell = _teller(self.progress, "checking logits", len(cases))
        watch = CaseWatch(places.way_names, places.look_inside, tie_margin, tell)
        if self.subject.exact:
            return run_cases(decoder, reference, cases, watch)
        routers = [
            scores if (scores := names.selection_scores(names.experts(n))) in decoder.taps else name
            for n, name in taps.by_layer("router")
        ]
        share = 1.0 if routers or own.choice is None else _SHARE
        return run_cases_alone(decoder, cases, routers, watch, share)

    def _measure_alone(
        self, provider: str, own: Comparison, tuned: Comparison, checks: tuple[Check, ...], limits: dict[str, Limit]
    ) -> ProviderParity:
        """Figures of the package alone.

        They are its speed, its figures over all text, and where its nodes run.
        """
        assert self.finetuned_losses is not None
        self.progress("measuring speed", 0, 1)
        plain = Decoder(self.subject.package, provider)
        speed = measure_speed(plain, self.subject.blocks[0].tolist(), _TIMED_TOKENS)
        losses = _extend(tuned.package_losses, plain, self.subject, self.progress)
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
        placement = find_placement(self.subject.package, provider)
        self.progress("measuring speed", 1, 1)
        return ProviderParity(
            ort.__version__,
            checks,
            own.agreement,
            tuned.agreement,
            language_figures(package_loss),
            language_figures(twin_loss),
            language_figures(finetuned_loss),
            _worst_layer(own.agreement),
            speed.prefill,
            speed.decode or None,
            limits=limits,
            placement=placement,
            num_fallback_nodes=count_elsewhere(placement, provider),
            figures_error=error,
            num_language_tokens=self.subject.blocks.numel(),
        )


def _extend(losses: list[float], model: Reference | Decoder, subject: ParitySubject, progress: Progress) -> list[float]:
    """Mean losses of all blocks, reusing those already known."""
    rest = subject.blocks[len(losses) :]
    if not len(rest):
        return losses
    counted = None if subject.counted is None else subject.counted[len(losses) :]
    return losses + measure_losses(model, rest, _teller(progress, "measuring perplexity", len(rest)), counted)


def _ignore(*_: object) -> None:
    """Watch nothing."""


def _teller(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    progress(what, 0, total)
    return lambda done: progress(what, done, total)


def _worst_layer(agreement: Agreement) -> int | None:
    layers = range(len(agreement.hidden_error))
    return min(layers, key=lambda n: (agreement.routing_agreement[n], -agreement.hidden_error[n])) if layers else None
