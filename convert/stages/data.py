"""Text as blocks of tokens: training, validation and test."""

from __future__ import annotations

import platform

from dense2moe.convert.locations import find_data_base
from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.upcycle.data.blocks import prepare_data
from dense2moe.upcycle.data.config import InstalledData
from dense2moe.upcycle.data.installed import find_versions
from dense2moe.upcycle.data.teaching import teach_vectors


def list_settings(preparation: Preparation, _: str | None) -> Facts:
    """The text, down to its files' digests."""
    data = preparation.recipe.data
    facts: Facts = {**data.model_dump(mode="json"), "files": dict(preparation.data_files)}
    facts["interpreter"] = platform.python_version() if data.source.kind == "python-docs" else None
    if isinstance(data.source, InstalledData):
        facts["packages"] = find_versions(data.source)
    return facts


def run_stage(run: StageRun) -> Facts:
    """Held-out and training text as blocks of tokens."""
    base = find_data_base(run.preparation.loaded)
    facts = prepare_data(run.inputs["source"], run.output, run.recipe.data, base, run.progress)
    teach_vectors(run.inputs["source"], run.output, run.progress)
    return facts
