"""Growth: one more expert in every sparse layer of a finished mixture.

Plan, then bytes, as in surgery, and streamed as there:

1. What the mixture has stays, bit by bit: each of its tensors is copied from file to file.
2. Behind the bytes of a router comes one more row, behind a selection bias a zero, behind stacked experts one more.
3. Experts with tensors of their own get tensors under the next number.
4. The config counts one more expert, and says the same otherwise.

The new expert is the FFN of a dense model of the mixture's base, or of a LoRA adapter of it, in the dtype of the
others. Whatever else the source has learned, as in attention, the mixture does not take over.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, assert_never

import torch

from dense2moe.upcycle.building.config import RouterDomain, UpcycleConfig
from dense2moe.upcycle.building.experts import seeded_generator
from dense2moe.upcycle.building.growth_plan import Extension, GrowthPlan, plan_growth
from dense2moe.upcycle.building.growth_router import (
    DomainTexts,
    NewExpertVisits,
    count_visits,
    nexus_rows,
    read_texts,
    ridge_rows,
)
from dense2moe.upcycle.building.projection import FOLDER, copy_projection, read_projection
from dense2moe.upcycle.building.read_back import check_contents
from dense2moe.upcycle.building.vocabulary import compare_companions
from dense2moe.upcycle.checkpoints.adapter import is_adapter, open_source
from dense2moe.upcycle.checkpoints.config_files import save_config
from dense2moe.upcycle.checkpoints.reader import Checkpoint, copy_companions, open_checkpoint
from dense2moe.upcycle.checkpoints.writer import Content, Span, write_tensors
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.progress import Progress

RouterRow = Literal["mean", "normal", "ridge", "nexus"]
"""How the new expert's router row starts.

mean: the mean of the others' rows, so that its logit is the mean of theirs.
normal: drawn, its elements as large as the others' in the mean square.
ridge: read from text of the new domain beside text of the others.
nexus: projected from the new domain's text alone, for mixtures whose router began so.
"""


@dataclass(frozen=True)
class RowSettings:
    """What the new expert's router rows are made of.

    `domain` is text of the new expert's domain, and `others` of domains that the mixture knows; paths of their files
    start at `base`. `seed` is of drawn rows.
    """

    kind: RouterRow = "mean"
    seed: int = 0
    domain: RouterDomain | None = None
    others: tuple[RouterDomain, ...] = ()
    base: Path = field(default_factory=Path.cwd)


@dataclass(frozen=True)
class GrownMixture:
    """A mixture that got one more expert.

    Attributes:
        num_experts: experts of a layer, the new one included; its number is one less.
        layers: the layers that have experts.
        num_parameters: parameters of the mixture.
        num_new_parameters: how many of them are new.
        remarks: how the source differs from the mixture beside its weights, a line each.
        visits: of each layer with experts, how many tokens choose the new one; empty without text of its domain.
    """

    num_experts: int
    layers: tuple[int, ...]
    num_parameters: int
    num_new_parameters: int
    remarks: tuple[str, ...] = ()
    visits: tuple[NewExpertVisits, ...] = ()


def add_expert(
    mixture: Path,
    source: Path,
    output: Path,
    row: RowSettings,
    progress: Progress,
    base: Path | None = None,
    scale: float | None = None,
) -> GrownMixture:
    """Write a mixture with one more expert into an empty directory.

    `source` is a dense checkpoint, or a LoRA adapter of `base`. `scale` is a factor of the new expert's output, which a
    mixture with a shared expert must be given. Memory holds a layer of the mixture and the text's hidden states where
    text is read, and does not grow with the model otherwise. All that was written is read again.

    Raises:
        UpcycleError: the source's FFN cannot be an expert of the mixture, or its router row lacks text (nothing is
            written then); or one of its weights is NaN, infinite or beyond the mixture's dtype; or what is read again
            is not what was written.
        OSError: the disk is full or not writable.
    """
    whole, dense = open_checkpoint(mixture), _open_dense(source, base)
    plan = plan_growth(whole, dense, scale)
    remarks = tuple(compare_companions(whole, str(source), dense))
    _check_row(row)
    texts = None if row.domain is None else read_texts(mixture, row.domain, row.others, row.base)
    fitted, counted = (None, None) if texts is None else texts.divide()
    maker = _Maker(whole, dense, row, _fit_rows(whole, plan, row, fitted, progress), 1.0 if scale is None else scale)
    config = copy.deepcopy(whole.config)
    assert plan.target.experts is not None, "the plan is of a dense model"
    setattr(config, plan.target.experts.count_field, plan.num_experts + 1)
    save_config(config, output)
    copy_companions(mixture, output)
    copy_projection(mixture, output)
    write_tensors(
        output,
        [extension.spec for extension in plan.extensions],
        ((extension.spec.name, maker.make(extension)) for extension in plan.extensions),
        UpcycleConfig().shard_bytes,
        report=lambda done, total: progress("writing tensors", done, total),
    )
    written = open_checkpoint(output)
    for number, extension in enumerate(plan.extensions, 1):
        check_contents(written, extension.spec.name, maker.make(extension))
        progress("reading tensors back", number, len(plan.extensions))
    visits = () if counted is None else count_visits(written, plan.target, counted, progress)
    num_new = sum(extension.num_new_parameters for extension in plan.extensions)
    num_parameters = num_new + sum(
        extension.kept.num_elements
        for extension in plan.extensions
        if extension.kept is not None and extension.part != "selection_bias"
    )
    return GrownMixture(plan.num_experts + 1, plan.layers, num_parameters, num_new, remarks, visits)


def _check_row(row: RowSettings) -> None:
    """Refuse a router row without the text that it is read from."""
    if row.domain is None and (row.kind in ("ridge", "nexus") or row.others):
        found = f"router is {row.kind}" if row.kind in ("ridge", "nexus") else "text of other domains is given"
        raise UpcycleError(f"{found}, and text of the new expert's domain is not; give it (domain, or --text)")
    if row.kind == "ridge" and not row.others:
        raise UpcycleError(
            "router is ridge, and no text of other domains is given, which the new one is told apart from; give some "
            "(others, or --other-text)"
        )


def _fit_rows(
    mixture: Checkpoint, plan: GrowthPlan, row: RowSettings, texts: DomainTexts | None, progress: Progress
) -> dict[str, torch.Tensor]:
    """Router rows read from text, float32 [hidden], by the routers' names."""
    match row.kind:
        case "mean" | "normal":
            return {}
        case "ridge":
            assert texts is not None, "checked before"
            rows = ridge_rows(mixture, plan.target, texts, progress)
        case "nexus":
            assert texts is not None, "checked before"
            projection = read_projection(mixture.directory)
            if projection is None or set(projection.layers) != set(plan.layers):
                raise UpcycleError(
                    f"{mixture.directory}: router is nexus, and the mixture has no projection in {FOLDER}/; only "
                    "mixtures whose upcycle.router was of kind nexus have one; take ridge, with text of other domains"
                )
            rows = nexus_rows(mixture, plan.target, texts, projection)
        case _:
            assert_never(row.kind)
    return {str(plan.target.find("router", layer)): values for layer, values in rows.items()}


def _open_dense(source: Path, base: Path | None) -> Checkpoint:
    if not is_adapter(source):
        if base is not None:
            raise UpcycleError(f"{source}: is a whole checkpoint, and base is {base}; give a base to adapters alone")
        return open_checkpoint(source)
    if base is None:
        raise UpcycleError(
            f"{source}: is an adapter, and no base is given; give the dense model that it was trained on"
        )
    return open_source(source, open_checkpoint(base))


class _Maker:
    """Makes the contents of tensors."""

    def __init__(
        self,
        mixture: Checkpoint,
        source: Checkpoint,
        row: RowSettings,
        fitted: Mapping[str, torch.Tensor],
        scale: float,
    ) -> None:
        self.mixture, self.source = mixture, source
        self.row, self.fitted, self.scale = row, fitted, scale

    def make(self, extension: Extension) -> Iterator[Content]:
        """The contents of one tensor, in the order of its bytes."""
        kept, dtype = extension.kept, extension.spec.dtype
        if kept is not None:
            yield Span(kept.file, kept.start, kept.num_bytes)
        match extension.part:
            case None:
                return
            case "router":
                yield self._make_row(extension.spec.name).to(dtype)
            case "selection_bias":
                yield torch.zeros(1, dtype=dtype)
            case part:
                scale = self.scale if part == "expert_down" else 1.0
                for rows in extension.rows:
                    for chunk in self.source.read_chunks(rows.source, rows.start, rows.stop):
                        yield self._convert(rows.source, chunk.to(torch.float32) * scale, dtype)

    def _make_row(self, name: str) -> torch.Tensor:
        """The new expert's router row, float32 [1, hidden]."""
        if name in self.fitted:
            return self.fitted[name][None]
        rows = self.mixture.read(name).to(torch.float32)
        if self.row.kind == "mean":
            return rows.mean(0, keepdim=True)
        drawn = torch.empty(1, rows.shape[1]).normal_(generator=seeded_generator(self.row.seed, name))
        return drawn * rows.square().mean().sqrt()

    def _convert(self, name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        converted = weight.to(dtype)
        if not torch.isfinite(converted).all():
            broken = not torch.isfinite(weight).all()
            found = "NaN or infinite values" if broken else f"values beyond {dtype}, the dtype of the mixture's experts"
            raise UpcycleError(f"{self.source.directory}: tensor '{name}' holds {found}; give another source")
        return converted
