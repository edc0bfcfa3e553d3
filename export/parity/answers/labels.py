"""A task with labels, done by package, twin and fine-tuned model."""

from __future__ import annotations

from collections.abc import Sequence

from dense2moe.export.parity.records import TaskCheck
from dense2moe.upcycle.tasks.answer import AnyAnswer
from dense2moe.upcycle.tasks.held_out import HeldOut
from dense2moe.upcycle.tasks.task import Task


def check_labels(task: Task, package: HeldOut, twin: HeldOut, finetuned: HeldOut) -> TaskCheck:
    """Figures of all three, and the package's drop.

    Whether the package computes what its twin does is asked of outputs and layers; here it is only counted how often
    their answers are the same.
    """
    own, theirs, wanted = (
        {figure.name: figure.value for figure in found.figures(task)} for found in (package, twin, finetuned)
    )
    metric = package.figures(task)[0].name
    said, same, right = (task.join(found.answers) for found in (package, twin, finetuned))
    return TaskCheck(
        name=task.name,
        kind="labels",
        num_examples=len(said),
        metric=metric,
        package=own,
        twin=theirs,
        finetuned=wanted,
        change=own[metric] - wanted[metric],
        standard_error=task.paired_error(package.answers, finetuned.answers),
        same_as_twin=_share_of_same(said, same),
        same_as_finetuned=_share_of_same(said, right),
        largest_gap=0.0,
    )


def _share_of_same(found: Sequence[AnyAnswer], other: Sequence[AnyAnswer]) -> float:
    pairs = zip(found, other, strict=True)
    return float(sum(own.said == theirs.said for own, theirs in pairs) / len(found))
