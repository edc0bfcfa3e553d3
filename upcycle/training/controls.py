"""The mixture and its controls: trained in turn, counted, measured.

A control is the dense model continued on the same batches: for as many tokens, and for as many as take the mixture's
floating-point operations. What the mixture's branches took counts as the mixture's. Both learn at the rates that suit
the dense model best, of those that are tried.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dense2moe.upcycle.data.blocks import read_domains
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.evaluation import average_by_domain, evaluate
from dense2moe.upcycle.training.facts import NOTHING_SPENT, Evaluation, Spent
from dense2moe.upcycle.training.flops import forward_flops, training_flops
from dense2moe.upcycle.training.history import ModelName, count_costs
from dense2moe.upcycle.training.job import Job, Setup, load_shape, train_model
from dense2moe.upcycle.training.phase import Trained
from dense2moe.upcycle.training.processes import on_main

CONTROL_DIRECTORY = "control"
SAME_FLOPS_DIRECTORY = "control-same-flops"


class Trainings:
    """The models of a fine-tuning, trained in turn and measured."""

    def __init__(
        self,
        dense: Path,
        mixture: Path,
        output: Path,
        setup: Setup,
        config: FinetuneConfig,
        progress: Progress,
        spent: Spent = NOTHING_SPENT,
    ) -> None:
        self.dense, self.mixture, self.output = dense, mixture, output
        self.setup, self.config, self.progress, self.spent = setup, config, progress, spent
        self.phases = config.resolve_phases()
        blocks = sum(settings.steps * settings.batch_size for settings in self.phases)
        self.control_phases = stretch(self.phases, 1 + spent.num_tokens / (blocks * self._block_size))
        self.trained: dict[ModelName, Trained] = {}
        self.evaluations: dict[ModelName, Evaluation] = {}
        self.flops: dict[ModelName, float] = {}
        self.control_rate: float | None = None

    def run(self) -> None:
        """Train the mixture, and with `control` the dense model twice."""
        self._train(Job("fine-tuned", self.mixture, self.output, self.phases), self.spent)
        if not self.config.control:
            return
        self.control_rate = self._find_rate()
        phases = _scale_rates(self.control_phases, self.control_rate)
        self._train(self._control(self.control_rate, self.output / CONTROL_DIRECTORY))  # what was tried is done already
        planned = zip(phases, self._count_step(self.dense, phases), strict=True)
        ratio = self.flops["fine-tuned"] / sum(settings.steps * flops for settings, flops in planned)
        equal = self.output / SAME_FLOPS_DIRECTORY
        self._train(Job("dense, same FLOPs", self.dense, equal, stretch(phases, ratio)))

    def _find_rate(self) -> float:
        """The factor of the learning rates that suits the control best."""
        factors = self.config.control_rates
        if len(factors) == 1:
            return factors[0]
        reached = {}
        for factor in factors:
            place = self.setup.scratch / "rates" / f"{factor:g}"
            result = train_model(self._control(factor, place), self.setup, None, self.progress)
            reached[factor] = min(step.validation_loss for step in result.history if step.validation_loss is not None)
        return min(reached, key=lambda factor: reached[factor])

    def _control(self, factor: float, target: Path) -> Job:
        """The dense model's training, with rates times `factor`.

        On as many tokens as the mixture and its branches had.
        """
        phases = _scale_rates(self.control_phases, factor)
        return Job("dense continued", self.dense, target, phases, f"rate {factor:g}")

    @property
    def _block_size(self) -> int:
        return read_examples(self.setup.data, "test").block_size

    def _train(self, job: Job, spent: Spent = NOTHING_SPENT) -> None:
        """Train a model and measure it.

        What was spent before counts as its own.
        """
        teacher = self.dense if self.config.distillation and job.source == self.mixture else None
        result = train_model(job, self.setup, teacher, self.progress)
        step_flops = self._count_step(job.source, job.phases)
        history = count_costs(result.history, step_flops, spent.num_tokens, spent.flops)
        self.flops[job.name] = history[-1].flops or 0.0
        self.trained[job.name] = replace(
            result,
            history=history,
            seconds=result.seconds + spent.seconds,
            compute_seconds=result.compute_seconds + spent.compute_seconds,
        )
        task = self.setup.task
        self.evaluations[job.name] = on_main(
            lambda: evaluate_domains(job.target, self.setup.data, job.name, self.progress, task)
        )

    def _count_step(self, source: Path, phases: tuple[FinetuneConfig, ...]) -> list[float]:
        """Operations of a step of each phase, a teacher's included."""
        task, block_size = self.setup.task, self._block_size
        shape, layers = load_shape(source, task), self.setup.sparse_layers
        is_taught = self.config.distillation is not None and source == self.mixture
        taught = forward_flops(load_shape(self.dense, task), block_size) if is_taught else 0.0
        return [
            (training_flops(shape, each, layers, block_size) + taught) * each.batch_size * block_size for each in phases
        ]


def evaluate_domains(
    directory: Path,
    data: Path,
    name: ModelName,
    progress: Progress,
    task: Task,
    equal: tuple[ModelName, Evaluation] | None = None,
) -> Evaluation:
    """Held-out figures of a checkpoint, and its loss by domain.

    Where there is one domain, its loss alone.
    """
    test, (names, _) = read_examples(data, "test"), read_domains(data, "test")
    found = evaluate(directory, test, name, progress, task, equal)
    if len(names) == 1:
        return found
    return replace(found, domain_losses=average_by_domain(found.block_losses, test.domains, names))


def stretch(phases: tuple[FinetuneConfig, ...], ratio: float) -> tuple[FinetuneConfig, ...]:
    """Phases with `ratio` times as many steps.

    Each has a step more than its warm-up at least.
    """
    return tuple(
        settings.model_copy(update={"steps": max(settings.warmup_steps + 1, round(settings.steps * ratio))})
        for settings in phases
    )


def _scale_rates(phases: tuple[FinetuneConfig, ...], factor: float) -> tuple[FinetuneConfig, ...]:
    """Phases with every learning rate times `factor`."""

    def scale(settings: FinetuneConfig) -> FinetuneConfig:
        names = ("learning_rate", "expert_learning_rate", "router_learning_rate")
        rates = {name: rate * factor for name in names if (rate := getattr(settings, name)) is not None}
        return settings.model_copy(update=rates)

    return tuple(map(scale, phases)) if factor != 1.0 else phases
