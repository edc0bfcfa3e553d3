"""The plan as tables: what a run would make, before any work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import assert_never

from rich.filesize import decimal
from rich.table import Table

from dense2moe.convert.preparation import Preparation
from dense2moe.convert.report.columns import Column, fit_table
from dense2moe.convert.report.routers import describe_router_losses
from dense2moe.upcycle.building.pieces import (
    ExpertPart,
    Keep,
    Merged,
    Piece,
    RouterKeys,
    RouterRows,
    SelectionBias,
    Write,
    Zeros,
)
from dense2moe.upcycle.building.plan import UpcyclePlan

_UNBROKEN_TIMES = "\u00a0×\u00a0"
_BOOKKEEPING = ("architectures", "transformers_version", "model_type", "dtype")


def plan_tables(preparation: Preparation, workdir: Path, width: int) -> tuple[tuple[str, Table], ...]:
    """Titles and tables for a terminal of `width` columns.

    The models with their parameters, where every tensor comes from, the config's values, and what artifacts and stages
    need of the machine.
    """
    conversion = preparation.plan.conversion
    return (
        (
            f"{preparation.loaded.name}: {conversion.family.architecture} to {conversion.target.architecture}",
            _models(preparation, width),
        ),
        (
            "tensors, N for the number of a layer; below a tensor that is not copied as it is, what it is made of",
            _tensors(preparation.plan, width),
        ),
        ("config", _fields(preparation.plan, width)),
        (f"artifacts in {workdir}", _artifacts(preparation, workdir, width)),
        ("memory by stage, at its peak", _memory(preparation, width)),
    )


def _models(preparation: Preparation, width: int) -> Table:
    plan, dense = preparation.plan, preparation.checkpoint
    settings = plan.settings
    columns = (
        Column(""),
        Column("dense", folds=True, justify="right"),  # names of what is dropped
        Column("mixture of experts", justify="right"),
    )
    rows = (
        ("parameters", f"{dense.num_parameters:,}", f"{plan.num_parameters:,}"),
        ("active a token", f"{dense.num_parameters:,}", f"{plan.num_active_parameters:,}"),
        ("layers, with experts", f"{plan.num_layers}", f"{len(plan.sites)}"),
        ("experts a layer, chosen", "—", f"{settings.num_experts}, {settings.num_experts_per_tok}"),
        ("routers at the start", "—", settings.router.kind + (", by domain" if settings.router.reads_domains else "")),
        *_router_losses(preparation),
        ("tensors", f"{len(dense.entries)}", f"{len(plan.writes)}"),
        ("bytes", decimal(dense.num_bytes), decimal(plan.num_bytes)),
        ("source tensors dropped", ", ".join(plan.dropped) or "none", ""),
        ("computes what the dense one does", "", _function(plan)),
    )
    return fit_table(columns, rows, width)


def _router_losses(preparation: Preparation) -> list[tuple[str, str, str]]:
    """The losses that routers learn from beside the text's, in a row."""
    if preparation.finetune is None:
        return []
    phases = preparation.finetune.resolve_phases()
    told = dict.fromkeys(describe_router_losses(phase.router_losses) for phase in phases)
    return [("losses of routers", "—", "; ".join(told))]


def _function(plan: UpcyclePlan) -> str:
    if plan.keeps_function:
        return "yes"
    return "with a zero router alone" if plan.keeps_function_at_zero else "no"


def _tensors(plan: UpcyclePlan, width: int) -> Table:
    """A row for tensors that differ in numbers only.

    What they are made of is in a row below it: two names of tensors side by side are wider than most terminals.
    """
    alike: dict[tuple[str, str, str], int] = {}
    for write in plan.writes:
        pattern, origin = _pattern(write.spec.name, plan), _origin(write, plan.sources)
        shape = f"{_UNBROKEN_TIMES.join(map(str, write.spec.shape))} {str(write.spec.dtype).removeprefix('torch.')}"
        key = (pattern, shape, "" if origin == pattern else f"← {origin}")
        alike[key] = alike.get(key, 0) + 1
    rows = []
    for (pattern, shape, origin), number in alike.items():
        rows.append((f"{number}", pattern, shape))
        rows += [("", origin, "")] if origin else []
    columns = (Column("number", justify="right"), Column("tensor", folds=True), Column("shape", folds=True))
    return fit_table(columns, rows, width)


def _pattern(name: str, plan: UpcyclePlan) -> str:
    """A tensor's name without its layer's and expert's number.

    Other numbers in names of T5 stay.
    """
    experts = f"{{0-{plan.settings.num_experts - 1}}}"
    name = re.sub(r"(layers|block)\.\d+\.", r"\1.N.", name, count=1)
    return re.sub(r"(experts\.(?:expert_)?)\d+\.", rf"\g<1>{experts}.", name)


def _origin(write: Write, sources: Sequence[str]) -> str:
    """The origin of a tensor, in words; of several sources, by name."""
    words = list(dict.fromkeys(_describe(piece, sources) for piece in write.pieces))
    return re.sub(r"(layers|block)\.\d+\.", r"\1.N.", " and ".join(words))


def _describe(piece: Piece, sources: Sequence[str]) -> str:
    match piece:
        case Keep(rows=rows, fold=fold):
            return f"{rows.source}{f' ({type(fold).__name__})' if fold else ''}"
        case Merged(rows=rows, fold=fold):
            return f"{rows.source}, merged{f' ({type(fold).__name__})' if fold else ''}"
        case ExpertPart(matrix=matrix):
            whose = f"{('the base', *sources)[matrix.checkpoint]}: " if sources else ""
            return f"{whose}{matrix.source}{''.join(f', {change}' for change in _changes(piece))}"
        case Zeros() | SelectionBias():
            return "zeros"
        case RouterRows() | RouterKeys():
            return "a new router"
        case _:
            assert_never(piece)


def _changes(part: ExpertPart) -> Iterator[str]:
    if part.drop:
        yield f"{part.drop:g} of the neurons drawn anew"
    if part.noise:
        yield f"noise of {part.noise:g}"
    if part.scale != 1:
        yield f"× {part.scale:g}"


def _fields(plan: UpcyclePlan, width: int) -> Table:
    """The config's values, carried over or set by the target."""
    conversion, made = plan.conversion, plan.target_config
    carried = [name for name in (*conversion.carried, *conversion.optional) if hasattr(made, name)]
    own = [name for name in made.to_diff_dict() if name not in carried and name not in _BOOKKEEPING]
    rows = [
        (name, str(getattr(made, name)), origin)
        for names, origin in ((carried, "carried over"), (own, "set"))
        for name in sorted(names)
    ]
    return fit_table((Column("field"), Column("value", folds=True), Column("")), rows, width)


def _artifacts(preparation: Preparation, workdir: Path, width: int) -> Table:
    recipe = preparation.loaded.recipe
    rows = []
    for label, size in preparation.artifact_bytes.items():
        variant = next((v for v in recipe.variants if label == f"onnx-{v}"), None)
        rows.append((label, decimal(size), _name_lowerings(preparation.lowerings[variant]) if variant else ""))
    existing = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    sections = [len(rows)]
    free = f"{decimal(shutil.disk_usage(existing).free)} free"
    rows.append(("disk in all", decimal(sum(preparation.artifact_bytes.values())), free))
    branches = [size for label, size in preparation.scratch_bytes.items() if label != "finetune"]
    if branches:
        rows.append(("disk to train a branch", decimal(max(branches)), "scratch, deleted when done"))
    if "finetune" in preparation.scratch_bytes:
        needed = decimal(preparation.scratch_bytes["finetune"])
        rows.append(("disk to fine-tune", needed, "scratch, deleted when done"))
    if preparation.last_stage is not None:
        last, reason = preparation.last_stage
        sections.append(len(rows))
        rows.append((f"runs up to {last}", "", reason))
    columns = (Column("artifact"), Column("size", justify="right"), Column("", folds=True))
    return fit_table(columns, rows, width, sections)


def _memory(preparation: Preparation, width: int) -> Table:
    """Each stage's peak resident memory, and the largest of all."""
    rows = [(label, decimal(size)) for label, size in preparation.memory_bytes.items()]
    most = decimal(max(preparation.memory_bytes.values(), default=0))
    columns = (Column("stage"), Column("memory", justify="right"))
    return fit_table(columns, [*rows, ("most", most)], width, [len(rows)])


def _name_lowerings(lowerings: tuple[str, ...]) -> str:
    return f"lowering {lowerings[0]}" if len(lowerings) == 1 else f"the fastest lowering of {', '.join(lowerings)}"
