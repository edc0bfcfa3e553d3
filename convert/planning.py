"""The plan as tables: what a run would make, before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.filesize import decimal
from rich.table import Table

from convert.stages import Preparation

_ADAM_BYTES = 16  # float32 weight, gradient and two moments a parameter


def plan_tables(preparation: Preparation, workdir: Path) -> tuple[Table, ...]:
    """Two tables: the models with their parameters, and the artifacts with their bytes against the disk and the memory that a run needs."""
    plan, dense, recipe = preparation.plan, preparation.checkpoint, preparation.loaded.recipe
    models = Table(title=f"{preparation.loaded.name}: {plan.family.architecture} to {plan.family.target_architecture}", title_justify="left")
    for heading in ("", "dense", "mixture of experts"):
        models.add_column(heading, justify="left" if not heading else "right")
    models.add_row("parameters", f"{dense.num_parameters:,}", f"{plan.num_parameters:,}")
    models.add_row("active a token", f"{dense.num_parameters:,}", f"{plan.num_active_parameters:,}")
    models.add_row("experts a layer, chosen", "—", f"{plan.num_experts}, {plan.num_experts_per_tok}")
    models.add_row("tensors", f"{len(dense.entries)}", f"{len(plan.writes)}")
    models.add_row("bytes", decimal(dense.num_bytes), decimal(plan.num_bytes))
    models.add_row("source tensors dropped", ", ".join(plan.dropped) or "none", "")
    artifacts = Table(title=f"artifacts in {workdir}", title_justify="left")
    artifacts.add_column("artifact")
    artifacts.add_column("size", justify="right")
    artifacts.add_column("")
    for label, size in preparation.artifact_bytes.items():
        variant = next((v for v in recipe.variants if label == f"onnx-{v}"), None)
        artifacts.add_row(label, decimal(size), f"lowering {preparation.lowerings[variant]}" if variant else "")
    existing = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    artifacts.add_section()
    artifacts.add_row("disk in all", decimal(sum(preparation.artifact_bytes.values())), f"{decimal(shutil.disk_usage(existing).free)} free")
    artifacts.add_row("memory to fine-tune", decimal(_ADAM_BYTES * plan.num_parameters), "and activations")
    return models, artifacts
