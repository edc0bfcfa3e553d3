"""The plan as tables: what a run would make, before any work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import assert_never

from rich.filesize import decimal
from rich.table import Table

from dense2moe.convert.preparation import Preparation
from dense2moe.upcycle.building.pieces import (
    ExpertPart,
    Keep,
    Piece,
    RouterRows,
    SelectionBias,
    Write,
    Zeros,
)
from dense2moe.upcycle.building.plan import UpcyclePlan

_BOOKKEEPING = ("architectures", "transformers_version", "model_type", "dtype")


def plan_tables(preparation: Preparation, workdir: Path) -> tuple[Table, ...]:
    """Tables of models, tensors' origins and config values.

    Models come with their numbers of parameters.

    And what artifacts and stages need of the machine.
    """
    return (
        _models(preparation),
        _tensors(preparation.plan),
        _fields(preparation.plan),
        _artifacts(preparation, workdir),
        _memory(preparation),
    )


def _models(preparation: Preparation) -> Table:
    plan, dense = preparation.plan, preparation.checkpoint
    conversion, settings = plan.conversion, plan.settings
    models = Table(
        title=f"{preparation.loaded.name}: {conversion.family.architecture} to {conversion.target.architecture}",
        title_justify="left",
    )
    for heading in ("", "dense", "mixture of experts"):
        models.add_column(heading, justify="left" if not heading else "right")
    models.add_row("parameters", f"{dense.num_parameters:,}", f"{plan.num_parameters:,}")
    models.add_row("active a token", f"{dense.num_parameters:,}", f"{plan.num_active_parameters:,}")
    models.add_row("layers, with experts", f"{plan.num_layers}", f"{len(plan.sites)}")
    models.add_row("experts a layer, chosen", "—", f"{settings.num_experts}, {settings.num_experts_per_tok}")
    models.add_row("tensors", f"{len(dense.entries)}", f"{len(plan.writes)}")
    models.add_row("bytes", decimal(dense.num_bytes), decimal(plan.num_bytes))
    models.add_row("source tensors dropped", ", ".join(plan.dropped) or "none", "")
    models.add_row("computes what the dense one does", "", _function(plan))
    return models


def _function(plan: UpcyclePlan) -> str:
    if plan.keeps_function:
        return "yes"
    return "with a zero router alone" if plan.keeps_function_at_zero else "no"


def _tensors(plan: UpcyclePlan) -> Table:
    """A row for tensors that differ in numbers only."""
    table = Table(title="tensors, N for the number of a layer", title_justify="left")
    for heading in ("number", "to", "shape", "from"):
        table.add_column(heading, justify="right" if heading == "number" else "left", overflow="fold")
    alike: dict[tuple[str, str, str], int] = {}
    for write in plan.writes:
        pattern, origin = _pattern(write.spec.name, plan), _origin(write)
        shape = f"{' × '.join(map(str, write.spec.shape))} {str(write.spec.dtype).removeprefix('torch.')}"
        key = (pattern, shape, "as it is" if origin == pattern else origin)
        alike[key] = alike.get(key, 0) + 1
    for key, number in alike.items():
        table.add_row(f"{number}", *key)
    return table


def _pattern(name: str, plan: UpcyclePlan) -> str:
    """A tensor's name without its layer's and expert's number.

    Other numbers in names of T5 stay.
    """
    experts = f"{{0-{plan.settings.num_experts - 1}}}"
    name = re.sub(r"(layers|block)\.\d+\.", r"\1.N.", name, count=1)
    return re.sub(r"(experts\.(?:expert_)?)\d+\.", rf"\g<1>{experts}.", name)


def _origin(write: Write) -> str:
    """The origin of a tensor, in words."""
    words = list(dict.fromkeys(_describe(piece) for piece in write.pieces))
    return re.sub(r"(layers|block)\.\d+\.", r"\1.N.", " and ".join(words))


def _describe(piece: Piece) -> str:
    match piece:
        case Keep(rows=rows, fold=fold):
            return f"{rows.source}{f' ({type(fold).__name__})' if fold else ''}"
        case ExpertPart():
            return f"{piece.matrix.source}{''.join(f', {change}' for change in _changes(piece))}"
        case Zeros() | SelectionBias():
            return "zeros"
        case RouterRows():
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


def _fields(plan: UpcyclePlan) -> Table:
    """The config's values, carried over or set by the target."""
    conversion, made = plan.conversion, plan.target_config
    table = Table(title="config", title_justify="left")
    for heading in ("field", "value", ""):
        table.add_column(heading, overflow="fold")
    carried = [name for name in (*conversion.carried, *conversion.optional) if hasattr(made, name)]
    own = [name for name in made.to_diff_dict() if name not in carried and name not in _BOOKKEEPING]
    for name in sorted(carried):
        table.add_row(name, str(getattr(made, name)), "carried over")
    for name in sorted(own):
        table.add_row(name, str(getattr(made, name)), "set")
    return table


def _artifacts(preparation: Preparation, workdir: Path) -> Table:
    recipe = preparation.loaded.recipe
    artifacts = Table(title=f"artifacts in {workdir}", title_justify="left")
    artifacts.add_column("artifact")
    artifacts.add_column("size", justify="right")
    artifacts.add_column("")
    for label, size in preparation.artifact_bytes.items():
        variant = next((v for v in recipe.variants if label == f"onnx-{v}"), None)
        artifacts.add_row(label, decimal(size), _name_lowerings(preparation.lowerings[variant]) if variant else "")
    existing = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    artifacts.add_section()
    artifacts.add_row(
        "disk in all",
        decimal(sum(preparation.artifact_bytes.values())),
        f"{decimal(shutil.disk_usage(existing).free)} free",
    )
    if "finetune" in preparation.scratch_bytes:
        needed = decimal(preparation.scratch_bytes["finetune"])
        artifacts.add_row("disk to fine-tune", needed, "scratch, deleted when done")
    if preparation.last_stage is not None:
        last, reason = preparation.last_stage
        artifacts.add_section()
        artifacts.add_row(f"runs up to {last}", "", reason)
    return artifacts


def _memory(preparation: Preparation) -> Table:
    """Each stage's peak resident memory, and the largest of all."""
    table = Table(title="memory by stage, at its peak", title_justify="left")
    for heading in ("stage", "memory"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for label, size in preparation.memory_bytes.items():
        table.add_row(label, decimal(size))
    table.add_section()
    table.add_row("most", decimal(max(preparation.memory_bytes.values(), default=0)))
    return table


def _name_lowerings(lowerings: tuple[str, ...]) -> str:
    return f"lowering {lowerings[0]}" if len(lowerings) == 1 else f"the fastest lowering of {', '.join(lowerings)}"
