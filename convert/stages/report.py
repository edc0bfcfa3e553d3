"""The page of a run, its facts as JSON, and model cards.

Each variant has a model card.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from dense2moe.convert.artifact.manifest import open_artifact
from dense2moe.convert.machine import describe_machine, versions
from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.convert.recipe.records import HubSource
from dense2moe.convert.report.card import write_card
from dense2moe.convert.report.costs import take_costs
from dense2moe.convert.report.facts import read_facts
from dense2moe.convert.report.names import CARDS_NAME
from dense2moe.convert.report.writer import write_report
from dense2moe.upcycle.training.history import HISTORY_NAME


def list_settings(preparation: Preparation, _: str | None) -> Facts:
    """The recipe as written, and what the model cards add."""
    return {"name": preparation.loaded.name, "recipe": preparation.loaded.text, "license": dict(preparation.license)}


def run_stage(run: StageRun) -> Facts:
    """The page, its JSON and the cards, from all stages' facts."""
    facts = _gather_facts(run)
    history = [
        json.loads(line) for line in (run.inputs["finetune"] / HISTORY_NAME).read_text(encoding="utf-8").splitlines()
    ]
    write_report({**facts, "finetune": {**facts["finetune"], "history": history}}, run.output)
    records = read_facts(facts, run.preparation.loaded.name)
    for variant in facts["variants"]:
        write_card(records, variant, run.inputs[f"onnx-{variant}"], run.output / CARDS_NAME / variant)
    return facts


def _gather_facts(run: StageRun) -> Facts:
    source, loaded = run.recipe.source, run.preparation.loaded
    found, costs = take_costs(run.input_facts)
    facts: Facts = {
        "dense2moe": version("dense2moe"),
        "name": loaded.name,
        "seed": run.recipe.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": asdict(describe_machine()),
        "recipe": loaded.text,
        "keys": dict(run.keys),
        "digests": {
            label: _read_digests(directory)
            for label, directory in run.inputs.items()
            if label == "source" or label.startswith("onnx-")
        },
        "base_model": source.hub if isinstance(source, HubSource) else None,
        "license": dict(run.preparation.license),
        "branches": {},
        "variants": {},
        "costs": costs,
    }
    for label, stage_facts in found.items():
        stage, _, item = label.partition("-")
        if stage == "branch":
            facts["branches"][item] = stage_facts
        elif item:
            facts["variants"].setdefault(item, {})[stage] = stage_facts
        else:
            facts[stage] = stage_facts
    return facts


def _read_digests(artifact: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact."""
    return {name: record["sha256"] for name, record in open_artifact(artifact).manifest["files"].items()}
