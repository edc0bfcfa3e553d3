"""The watch over a phase: history, time, checkpoints, early ends."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from transformers import TrainerCallback

from dense2moe.upcycle.durable import begin, discard, is_kept, keep, read_facts
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training.history import HISTORY_NAME, Step, read_history, write_history
from dense2moe.upcycle.training.loss_parts import LossParts
from dense2moe.upcycle.training.phase import Phase
from dense2moe.upcycle.training.processes import join_processes
from dense2moe.upcycle.training.resumable import START_NAME, checkpoint_folder, describe_last, find_checkpoints
from dense2moe.upcycle.training.routing import Routing


class Watched(Protocol):
    """A trainer of one phase, as the watch needs it."""

    phase: Phase
    routing: Routing
    parts: LossParts

    def save_learned(self, directory: Path) -> None:
        """Write what learns into a directory."""

    def evaluate(self) -> Any:
        """Measure the loss on the validation split."""

    def end_step(self) -> None:
        """Follow up on the optimizer's step."""


class TrainingWatch(TrainerCallback):
    """Records the Trainer's logs, times its steps and seals its checkpoints.

    It ends a phase on a loss that is NaN or infinite, or that no longer falls. The start is a candidate too: it is
    evaluated before the first step, and what learns is kept as it was until an evaluation is better.
    """

    def __init__(self, trainer: Watched, scratch: Path, progress: Progress) -> None:
        self.trainer, self.phase = trainer, trainer.phase
        self.scratch, self.progress = scratch, progress
        self.history: list[Step] = []
        self.seconds = self.compute_seconds = 0.0
        self.began = self.began_computing = 0.0

    @property
    def best_step(self) -> int:
        """The step, counted over all phases, of the best evaluation.

        The first of equals, and so the start before all.
        """
        evaluations = [step for step in self.history if step.validation_loss is not None]
        return min(evaluations, key=self.rank).step

    def rank(self, step: Step) -> tuple[float, float]:
        """An evaluation's rank: the lower the better.

        By the task's figure and then the loss, or by the loss alone.
        """
        loss = cast(float, step.validation_loss)
        return (-cast(float, step.validation_figure), loss) if self.phase.task.stops_by_figure else (loss, loss)

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint; steps count over all phases."""
        return checkpoint_folder(self.scratch, step - self.phase.first_step)

    @property
    def patience_is_over(self) -> bool:
        """Whether the last evaluations all failed to beat an earlier one."""
        ranks = [self.rank(step) for step in self.history if step.validation_loss is not None]
        return bool(ranks) and len(ranks) - 1 - ranks.index(min(ranks)) >= self.phase.settings.patience

    def resume(self, checkpoint: Path) -> bool:
        """Take over a checkpoint's record, unless its best checkpoint is gone."""
        self.history = list(read_history(checkpoint / HISTORY_NAME))
        self.seconds, self.compute_seconds = read_facts(checkpoint)
        if is_kept(self.checkpoint(self.best_step)):
            return True
        self.history, self.seconds, self.compute_seconds = [], 0.0, 0.0
        return False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the start and evaluate it, unless an earlier run did."""
        if not self.history:
            start = self.scratch / START_NAME
            if state.is_world_process_zero:
                begin(start)
            self.trainer.save_learned(start)
            if state.is_world_process_zero:
                keep(start)
            self.trainer.evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clocks."""
        self.began = _now()
        self.began_computing = time.process_time()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the routing end its step."""
        self.trainer.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clocks, report progress, ask for evaluation and checkpoint.

        Evaluation and checkpoints follow their own intervals.
        """
        seconds = _now() - self.began
        self.seconds += seconds
        self.compute_seconds += seconds if torch.cuda.is_available() else time.process_time() - self.began_computing
        if state.global_step % args.eval_steps == 0 or state.global_step == state.max_steps:
            # What is logged at a checkpoint is complete there; and the last weights are a candidate too.
            control.should_log = control.should_evaluate = control.should_save = True
        losses = (step.train_loss for step in reversed(self.history) if step.model == self.phase.model)
        loss = next((f": loss {loss:.3f}" for loss in losses if loss is not None), "")
        done = self.phase.first_step + state.global_step
        self.progress(f"training {self.phase.model}{loss}", done, self.phase.total_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Add a line to the history: losses and routing, or an evaluation."""
        logs = logs or {}
        parts = self.trainer.parts.take() if "loss" in logs else {}
        validation = logs.get("eval_loss")
        if not parts and validation is None:
            return
        phase, step = self.phase, self.phase.first_step + state.global_step
        for value in (*parts.values(), validation):
            if value is not None and not math.isfinite(value):
                raise self._not_finite(value, state.global_step)
        line = Step(
            model=phase.model,
            step=step,
            num_tokens=step * phase.settings.batch_size * phase.train.block_size,
            phase=phase.number,
            **parts,
            validation_loss=validation,
            validation_figure=logs.get("eval_figure"),
            learning_rate=logs.get("learning_rate"),
            layers=self.trainer.routing.describe() if parts else (),
        )
        self.history.append(line)

    def _not_finite(self, loss: float, step: int) -> UpcycleError:
        key = self.phase.key
        if step == 0:
            return UpcycleError(
                f"{key}: the validation loss of {self.phase.model} is {loss} before the first step of a phase; it "
                f"must be finite; set {key}.precision: float32, or look for values in the checkpoint that overflow"
            )
        return UpcycleError(
            f"{key}: the loss of {self.phase.model} is {loss} at step {self.phase.first_step + step}; lower "
            f"{key}.learning_rate{describe_last(self.scratch)}"
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the phase after too many evaluations without improvement."""
        control.should_training_stop |= self.patience_is_over

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal a checkpoint with its history, then delete outdated ones.

        The last and the best stay.
        """
        join_processes().wait_for_everyone()  # each has a file of random numbers in it
        if state.is_world_process_zero:
            last = self.checkpoint(self.phase.first_step + state.global_step)
            best = self.checkpoint(self.best_step)
            write_history(last / HISTORY_NAME, self.history)
            keep(last, [self.seconds, self.compute_seconds])
            for folder in {*find_checkpoints(self.scratch), self.scratch / START_NAME} - {last, best}:
                discard(folder)


def _now() -> float:
    """Seconds on a clock, after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
