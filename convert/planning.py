"""Every artifact of a pipeline, planned before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from dense2moe.convert.artifact.keys import artifact_key, code_digest
from dense2moe.convert.pipeline import PIPELINE, Stage
from dense2moe.convert.preparation import Each, Facts, Preparation


@dataclass(frozen=True)
class PlannedArtifact:
    """One artifact to be made: stage, item, inputs, settings and key.

    `inputs` has the labels that it reads, and their keys by the input's name.
    """

    stage: Stage
    item: str | None
    inputs: dict[str, str]
    input_keys: dict[str, str]
    settings: Facts
    key: str

    @property
    def label(self) -> str:
        """The artifact's label."""
        return make_label(self.stage, self.item)


def make_label(stage: Stage, item: str | None) -> str:
    """The label of a stage's artifact, or of one item of it."""
    return stage.name if item is None else f"{stage.name}-{item}"


def plan_artifacts(
    preparation: Preparation, until: str, pipeline: tuple[Stage, ...] = PIPELINE
) -> tuple[PlannedArtifact, ...]:
    """Every artifact up to stage `until`, in order, with its key.

    Keys follow from settings and the keys of inputs, so all are known before any work.
    """
    rows = {stage.name: stage for stage in pipeline}
    planned: dict[str, PlannedArtifact] = {}
    for stage, item in order_stages(pipeline, preparation.items, until):
        found = dict(_find_inputs(stage, item, rows, preparation))
        inputs = {name: label for made in planned for name, label in found.items() if label == made}
        assert inputs.keys() == found.keys(), f"{stage.name}: reads what is not made before it"
        keys = {name: planned[label].key for name, label in inputs.items()}
        settings = stage.settings(preparation, item)
        key = artifact_key(keys, settings, code_digest(*stage.code, stage.run.__module__))
        planned[make_label(stage, item)] = PlannedArtifact(stage, item, inputs, keys, settings, key)
    return tuple(planned.values())


def choose_item(planned: Sequence[PlannedArtifact], item: str) -> tuple[PlannedArtifact, ...]:
    """The artifacts of one item, and artifacts without any."""
    return tuple(each for each in planned if each.item in (None, item))


def order_stages(
    pipeline: tuple[Stage, ...], items: Mapping[Each, Sequence[str]], until: str
) -> Iterator[tuple[Stage, str | None]]:
    """Stages and items in the order of the table.

    Neighbours that are repeated over the same items go item by item.
    """
    number = [stage.name for stage in pipeline].index(until)
    for each, rows in groupby(pipeline[: number + 1], key=lambda stage: stage.each):
        stages = list(rows)
        yield from ((stage, item) for item in (items[each] if each else (None,)) for stage in stages)


def _find_inputs(
    stage: Stage, item: str | None, rows: Mapping[str, Stage], preparation: Preparation
) -> Iterator[tuple[str, str]]:
    """Each input's name, and the label of its artifact."""
    for read in stage.reads:
        name, maker = (read, rows[read]) if isinstance(read, str) else (read.name, rows[read.find_stage(preparation)])
        if maker.each is None or maker.each == stage.each:
            yield name, make_label(maker, item if maker.each else None)
        else:
            assert stage.gathers, f"{stage.name}: reads {maker.name} of each {maker.each} and does not gather"
            yield from ((make_label(maker, each), make_label(maker, each)) for each in preparation.items[maker.each])
