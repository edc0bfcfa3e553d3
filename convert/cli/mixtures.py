"""Commands that change a finished mixture: add-expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dense2moe.convert.cli.endings import end_in_one_line
from dense2moe.convert.cli.places import PATH
from dense2moe.convert.cli.terminal import open_console, print_prose
from dense2moe.new_directory import new_directory
from dense2moe.upcycle.imports import uncollected_imports


@click.command(short_help="Add SOURCE to MIXTURE as one more expert.")
@click.argument("mixture", metavar="MIXTURE", type=PATH)
@click.argument("source", metavar="SOURCE", type=PATH)
@click.argument("output", metavar="OUTPUT", type=PATH)
@click.option("--base", type=PATH, help="Dense model that SOURCE was trained on, if SOURCE is a LoRA adapter.")
@click.option(
    "--router",
    type=click.Choice(("mean", "normal", "ridge", "nexus")),
    default="mean",
    show_default=True,
    help="Router row of the new expert: the mean of the others' rows; drawn, as large as they are; read from --text "
    "beside --other-text; or projected from --text alone, for mixtures whose router was of kind nexus.",
)
@click.option(
    "--text", metavar="FILES", multiple=True, help="Text of the new expert's domain: a path or glob; may be repeated."
)
@click.option(
    "--other-text",
    metavar="FILES",
    multiple=True,
    help="Text of a domain that MIXTURE knows: a path or glob; once for each domain.",
)
@click.option(
    "--scale",
    type=click.FloatRange(min=0, min_open=True),
    help="Factor of the new expert's output; needed beside a shared expert [default: 1].",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of a drawn router row.")
@end_in_one_line
def add_expert(
    mixture: Path,
    source: Path,
    output: Path,
    base: Path | None,
    router: Any,
    text: tuple[str, ...],
    other_text: tuple[str, ...],
    scale: float | None,
    seed: int,
) -> None:
    """Add the FFNs of SOURCE to MIXTURE as one more expert.

    Every layer that has experts gets one. MIXTURE is the checkpoint of a mixture. SOURCE is a dense checkpoint, or a
    LoRA adapter, fine-tuned from the mixture's base. OUTPUT must be new. All that MIXTURE has is copied bit by bit, and
    all that is written is read again. With --text the command counts who visits the new expert.
    """
    with uncollected_imports():
        from transformers.utils import logging

        from dense2moe.convert.progress import ProgressDisplay
        from dense2moe.upcycle.building.config import RouterDomain
        from dense2moe.upcycle.building.growth import RowSettings
        from dense2moe.upcycle.building.growth import add_expert as grow
        from dense2moe.upcycle.building.growth_router import describe_visits

    domain = RouterDomain(files=text) if text else None
    row = RowSettings(router, seed, domain, tuple(RouterDomain(files=(files,)) for files in other_text))
    logging.set_verbosity_error()
    with ProgressDisplay() as display, new_directory(output) as directory:
        grown = grow(mixture, source, directory, row, display.stage("add-expert"), base, scale)
        display.finish("add-expert")
    print_prose(open_console(), grown.remarks)
    click.echo(
        f"{output}: {grown.num_experts} experts in {len(grown.layers)} layers, {grown.num_parameters:,} parameters, "
        f"{grown.num_new_parameters:,} of them new"
    )
    if grown.visits:
        print_prose(open_console(), (describe_visits(grown.visits),))
