"""Commands that read a recipe: check, plan, run, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dense2moe.convert.cli.endings import end_in_one_line
from dense2moe.convert.cli.places import PATH
from dense2moe.convert.cli.terminal import open_console, print_prose
from dense2moe.convert.errors import ArtifactError
from dense2moe.convert.stage_names import STAGE_NAMES
from dense2moe.upcycle.imports import uncollected_imports

if TYPE_CHECKING:  # torch and transformers take seconds to import; only the commands that need them do
    from dense2moe.convert.preparation import Preparation

_RECIPE = click.argument("recipe", type=PATH)


@click.command(short_help="Read RECIPE and all it names: could a run start?")
@_RECIPE
@end_in_one_line
def check(recipe: Path) -> None:
    """Read RECIPE and its files, and say whether a run could start."""
    preparation = _prepare(recipe)
    conversion = preparation.plan.conversion
    exports = ", ".join(preparation.lowerings) or "no ONNX yet"
    click.echo(f"{recipe}: good. {conversion.family.architecture} to {conversion.target.architecture}, {exports}")
    if preparation.last_stage is not None:
        last, reason = preparation.last_stage
        print_prose(open_console(), [f"{reason}; run it with --until {last}"])
    print_prose(open_console(), preparation.remarks)


@click.command(short_help="Show what RECIPE would make: sizes, disk, memory.")
@_RECIPE
@click.option("--workdir", type=PATH, help="Directory of the artifacts [default: runs/NAME].")
@end_in_one_line
def plan(recipe: Path, workdir: Path | None) -> None:
    """Show what RECIPE would make: sizes, parameters, disk and memory."""
    from dense2moe.convert.preview import plan_tables

    preparation = _prepare(recipe)
    console = open_console()
    for title, table in plan_tables(preparation, workdir or _default_workdir(preparation), console.width):
        print_prose(console, [title])
        console.print(table)
        click.echo()


@click.command(short_help="Run RECIPE, from the dense model to ONNX and a report.")
@_RECIPE
@click.option("--workdir", type=PATH, help="Directory of the artifacts [default: runs/NAME].")
@click.option("--until", type=click.Choice(STAGE_NAMES), default="report", show_default=True, help="Last stage to run.")
@click.option("--only", metavar="DOMAIN", help="With --until branch: train this domain's branch alone.")
@end_in_one_line
def run(recipe: Path, workdir: Path | None, until: Any, only: str | None) -> None:
    """Run RECIPE: upcycle, fine-tune, quantize, export, check parity, report.

    Finished artifacts are reused, so a second run takes seconds. A killed run resumes at the stage it was in, and
    training at its last checkpoint. A changed setting makes new artifacts beside the old. A broken limit of parity
    ends in exit code 1, after the report is written.
    """
    from dense2moe.convert.progress import ProgressDisplay
    from dense2moe.convert.report.costs import cost_table, read_costs, take_costs
    from dense2moe.convert.report.facts import read_facts
    from dense2moe.convert.report.names import HTML_NAME
    from dense2moe.convert.report.summary import summary_table
    from dense2moe.convert.report.verdicts import verdict_lines
    from dense2moe.convert.walk import run_pipeline
    from dense2moe.upcycle.training.processes import leave_processes

    preparation = _prepare(recipe, apart=True)
    workdir = workdir or _default_workdir(preparation)
    with ProgressDisplay() as display:
        outcome = run_pipeline(preparation, workdir, until, display, only=only)
    leave_processes()
    if outcome is None:
        return  # the first process of several tells what came out
    if (report := outcome.artifacts.get("report")) is not None:
        facts = read_facts(report.facts, str(workdir))
        costs = take_costs({label: artifact.facts for label, artifact in outcome.artifacts.items()})[1]
        console = open_console()
        console.print(cost_table(read_costs(costs)))
        console.print(summary_table(facts, console.width))
        print_prose(console, verdict_lines(facts))
        click.echo(f"report: {report.directory / HTML_NAME}")
    else:
        for label, artifact in outcome.artifacts.items():
            click.echo(f"{label}: {artifact.directory}")
    if outcome.breaches:
        raise ArtifactError("\n".join(["parity was broken:", *outcome.breaches]))


@click.command(short_help="Print the JSON schema of recipes, or of report.json.")
@click.option("--report", is_flag=True, help="Print the schema of report.json instead.")
def schema(report: bool) -> None:
    """Print the JSON schema of recipes, for editors, or of report.json."""
    if report:
        from dense2moe.convert.report.schema import report_schema

        click.echo(json.dumps(report_schema(), indent=2))
        return
    from dense2moe.convert.recipe.schema import make_schema

    click.echo(json.dumps(make_schema(), indent=2))


def _prepare(recipe: Path, apart: bool = False) -> Preparation:
    """The preparation of a recipe's run.

    `apart`: the server of stages' processes may begin its imports.
    """
    from dense2moe.convert.recipe.loading import load_recipe
    from dense2moe.convert.worker import start_server

    loaded = load_recipe(recipe)  # a misspelt key is told in a moment, before the slow imports
    if apart:
        start_server()
    with uncollected_imports():
        from transformers.utils import logging

        from dense2moe.convert.checking import prepare

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return prepare(loaded, lambda *_: None)


def _default_workdir(preparation: Preparation) -> Path:
    return Path("runs") / preparation.loaded.name
