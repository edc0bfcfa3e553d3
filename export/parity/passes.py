"""Parity of a package without a cache, on held-out text.

Tiers are those of a decoder: `weights` and `files`; `layer`, each layer and the head on the graph's own input;
`logits`, the outputs of one row, of padded rows, of each row alone; `language`, the task's figure beside the twin's and
the fine-tuned model's. How each is judged stands in `dense2moe.export.parity.single_pass`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import torch

from dense2moe.export import names
from dense2moe.export.blocks import choose_places
from dense2moe.export.parity.agreement import Sums
from dense2moe.export.parity.answers.labels import check_labels
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.forward import Forward
from dense2moe.export.parity.judgement import judge_everywhere
from dense2moe.export.parity.limits import configured_limits, score_limit
from dense2moe.export.parity.placement import Placement, count_elsewhere, find_pass_placement
from dense2moe.export.parity.records import (
    Agreement,
    Check,
    Limit,
    Parity,
    PlaceCheck,
    ProviderParity,
    TaskCheck,
    Tier,
)
from dense2moe.export.parity.single_pass import PassCheck, PassParity, check_single_pass, hear_layers
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.parity.verdicts import explain_unjudged, find_breaches, judge_tiers
from dense2moe.export.quantization.simulation import RoundedInputs
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.runtime.pass_speed import measure_passes
from dense2moe.export.runtime.single_pass import SinglePass
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import TYPES, Examples
from dense2moe.upcycle.tasks.held_out import HeldOut, judge_examples
from dense2moe.upcycle.tasks.task import Task

_COMPARED_TOKENS = 1024
_TIERS: Mapping[str, Tier] = {"layer": "layer", "outputs": "logits", "rows": "logits"}


def check_passes(subject: ParitySubject, task: Task, config: ParityConfig, progress: Progress) -> Parity:
    """Compare a package of one pass with its torch models.

    On every provider of this machine. Figures are the task's: of blocks of text taken evenly, or of all examples that
    have labels.

    Raises:
        ExportError, UpcycleError: the package or a checkpoint cannot be loaded, or they are not of one model.
    """
    examples = subject.examples or Examples.of_blocks(subject.blocks)
    if task.head is None:
        count = config.num_blocks or -(-config.language_tokens // examples.block_size)
        examples = examples.take(torch.tensor(choose_places(len(examples), count)))

    def judge(provider: str) -> tuple[ProviderParity, list[tuple[Tier, str]]]:
        progress("comparing places inside", 0, 1)
        found = check_single_pass(subject.package, subject.twin, provider)
        progress("comparing places inside", 1, 1)
        return _judge(_Passes(subject, task, examples, provider, progress), found, config)

    return judge_everywhere(judge, Twin(subject.twin).element_type)


class _Passes:
    """A package and its references on text, one after the other."""

    def __init__(
        self, subject: ParitySubject, task: Task, examples: Examples, provider: str, progress: Progress
    ) -> None:
        self.subject, self.task, self.examples, self.progress = subject, task, examples, progress
        self.provider, self.package = provider, SinglePass(subject.package, provider, Inspection(streams=True))
        alone = examples.alone()
        self.some = alone.take(slice(max(1, _COMPARED_TOKENS // alone.block_size)))

    def judge(self) -> tuple[HeldOut, Agreement, HeldOut, Agreement, HeldOut]:
        """Losses and answers of package, twin and fine-tuned model.

        After each torch model's how well the package agrees with it.
        """
        package = self._judge("the package", lambda inputs: self._read(self._run(inputs)))
        twin, agreement = self._compare(self.subject.twin, "the twin", self.subject.rounds_activations)
        tuned, other = self._compare(self.subject.finetuned, "the fine-tuned model", False)
        return package, agreement, twin, other, tuned

    def speed(self) -> float:
        """Tokens a second of the longest example."""
        longest = self._longest()
        return measure_passes(self.package, self._inputs(longest), longest.block_size).prefill

    def place(self) -> Placement:
        """The nodes that each provider runs."""
        return find_pass_placement(self.subject.package, self.provider, self._inputs(self._longest()))

    def _longest(self) -> Examples:
        return self.examples.take(self.examples.lengths.argmax()[None])

    def _inputs(self, examples: Examples) -> Mapping[str, torch.Tensor]:
        return self._complete(self.task.inputs(examples.batch()))

    def _read(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Predictions, as they are read of a model's output."""
        return self.task.predictions(SimpleNamespace(**outputs))

    def _compare(self, directory: Path, what: str, rounds: bool) -> tuple[HeldOut, Agreement]:
        model = load_model(directory, torch.float32, self.task.name)
        opened = Twin(directory) if rounds else None
        rounding: AbstractContextManager[Any] = (
            RoundedInputs(model, opened) if opened is not None and opened.scheme["tensors"] else nullcontext()
        )
        sums = Sums()

        def predict(inputs: dict[str, Any]) -> torch.Tensor:
            with rounding:
                return self.task.predictions(model(**self._complete(inputs)))

        with torch.no_grad():
            for one in self.some.split(1):
                inputs = self._inputs(one)
                made: dict[str, torch.Tensor] = {}
                with hear_layers(model, None, None, made), rounding:
                    expected = self.task.predictions(model(**inputs))
                seen = self.package.run(inputs)
                order = sorted(made, key=lambda name: (names.order_tap(name) or (0, 0))[1])
                found, wanted = (each.reshape(1, -1, each.shape[-1]) for each in (self._read(seen), expected))
                sums.add(
                    _forward(found, [seen[name].reshape(made[name].shape) for name in order]),
                    _forward(wanted, [made[name] for name in order]),
                    torch.zeros(found.shape[:2], dtype=torch.int64),  # losses are the task's, measured elsewhere
                )
        return self._judge(what, predict), sums.agreement()

    def _judge(self, what: str, predict: Any) -> HeldOut:
        self.progress(f"measuring {what}", 0, 1)
        found = judge_examples(predict, self.examples, torch.device("cpu"), self.task)
        self.progress(f"measuring {what}", 1, 1)
        return found

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.package.run(self._complete(inputs))

    def _complete(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All that the graph reads: every token real, of one type."""
        ids = inputs.get(names.INPUT_IDS)
        others = {} if ids is None else {names.ATTENTION_MASK: torch.ones_like(ids), TYPES: torch.zeros_like(ids)}
        given = {**others, **inputs}
        return {name: given[name] for name in self.package.inputs if name in given}


def _forward(logits: torch.Tensor, hiddens: list[torch.Tensor]) -> Forward:
    return Forward(logits, (), tuple(hiddens), (), None)


def _judge(passes: _Passes, found: PassParity, config: ParityConfig) -> tuple[ProviderParity, list[tuple[Tier, str]]]:
    task, variant = passes.task, passes.subject.variant
    package, agreement, twin, tuned_agreement, tuned = passes.judge()
    figures, twin_figures, tuned_figures = (each.figures(task) for each in (package, twin, tuned))
    limits = {
        name if name != "perplexity" else figures[0].name: limit
        for name, limit in configured_limits(variant, True, config).items()
        if name != "routing"
    }
    tasks: tuple[TaskCheck, ...] = ()
    if task.head is not None:  # held to its score, in points, instead of a share of perplexity
        limits.pop(figures[0].name, None)
        limits["score"] = score_limit(variant, config)
        tasks = (check_labels(task, package, twin, tuned),)
    outputs = [check for check in found.checks if _TIERS[check.tier] == "logits" and check.layer is None]
    limits["logits"] = Limit(
        max(check.limit for check in outputs), "what the twin's own outputs move by where its inputs move by rounding"
    )
    placement = passes.place()
    result = ProviderParity(
        ort.__version__,
        tuple(_as_check(check) for check in outputs),
        agreement,
        tuned_agreement,
        figures,
        twin_figures,
        tuned_figures,
        max(range(len(agreement.hidden_error)), key=agreement.hidden_error.__getitem__, default=None),
        passes.speed(),
        None,
        places=tuple(_as_places(found)),
        weights=found.weights,
        files=found.files,
        limits=limits,
        figures_error=_figures_error(package, tuned) if task.head is None else 0.0,
        num_language_tokens=int(passes.examples.lengths.sum()),
        tasks=tasks,
        placement=placement,
        num_fallback_nodes=count_elsewhere(placement, passes.provider),
    )
    broken = find_breaches(result)
    return replace(result, tiers=judge_tiers(broken, explain_unjudged(result, True, ()))), broken


def _figures_error(found: HeldOut, other: HeldOut) -> float:
    """Standard error of the difference of two mean losses."""
    differences = torch.tensor([a - b for a, b in zip(found.losses, other.losses, strict=True)], dtype=torch.float64)
    return float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0


def _as_check(check: PassCheck) -> Check:
    found = check.difference
    return Check(
        check.where,
        found.num_positions,
        found.largest,
        found.mean,
        found.relative,
        found.top1_agreement,
        0,
        padded="padded" in check.where,
    )


def _as_places(found: PassParity) -> Iterator[PlaceCheck]:
    """Every layer's worst check on the graph's own input, and the head's."""
    worst: dict[int, PassCheck] = {}
    for check in found.checks:
        if check.layer is None:
            continue
        old = worst.get(check.layer)
        if old is None or not check.error / check.limit <= old.error / old.limit:
            worst[check.layer] = check
    for layer, check in sorted(worst.items()):
        yield PlaceCheck(
            layer, "layer" if layer >= 0 else "head", check.error, check.limit, None, check.difference.num_positions
        )
