"""Commands that read what a run left: show, compare, package, verify."""

from __future__ import annotations

from pathlib import Path

import click

from dense2moe.convert.cli.endings import end_in_one_line
from dense2moe.convert.cli.places import PATH, check_output, find_package
from dense2moe.convert.cli.terminal import open_console, print_prose
from dense2moe.convert.errors import ArtifactError
from dense2moe.convert.run_state import RUN_NAME, RunState, read_run
from dense2moe.upcycle.errors import one_line_errors


@click.command(short_help="Show the results of RUN, or how far it came.")
@click.argument("directory", metavar="RUN", type=PATH)
@end_in_one_line
def show(directory: Path) -> None:
    """Show the results of RUN: its summary, or its finished stages.

    RUN is a work directory.
    """
    from dense2moe.convert.artifact.locking import is_locked
    from dense2moe.convert.artifact.manifest import open_artifact
    from dense2moe.convert.report.costs import cost_table, read_costs, take_costs
    from dense2moe.convert.report.facts import read_facts
    from dense2moe.convert.report.names import HTML_NAME
    from dense2moe.convert.report.summary import summary_table
    from dense2moe.convert.report.verdicts import verdict_lines

    state = read_run(directory)
    # as a kill or a power cut leaves it
    status = "stopped" if state.status == "running" and not is_locked(directory) else state.status
    artifacts = {label: open_artifact(directory / name) for label, name in state.artifacts.items()}
    report = artifacts.get("report")
    facts = read_facts(report.facts, str(directory)) if report else None  # what is too old is refused before all else
    _, costs = take_costs({label: artifact.facts for label, artifact in artifacts.items()})
    click.echo(f"{state.name}: {status} ({state.recipe})")
    console = open_console()
    if costs:
        console.print(cost_table(read_costs(costs)))
    if report and facts:
        console.print(summary_table(facts, console.width))
        print_prose(console, verdict_lines(facts))
        click.echo(f"report: {report.directory / HTML_NAME}")
    else:
        for label, name in state.artifacts.items():
            click.echo(f"{label}: {directory / name}")


@click.command(short_help="Compare two runs side by side: recipes, figures, parity.")
@click.argument("first", metavar="RUN", type=PATH)
@click.argument("second", metavar="RUN", type=PATH)
@click.option("--html", "output", type=PATH, help="Also write the comparison as one page.")
@end_in_one_line
def compare(first: Path, second: Path, output: Path | None) -> None:
    """Compare two runs side by side: recipes, figures with ratios, and parity.

    Each RUN is a work directory. Only the recipe keys that differ are shown. A ratio is the second run's figure divided
    by the first run's.
    """
    from dense2moe.convert.artifact.manifest import open_artifact
    from dense2moe.convert.report.comparison import compare_runs, comparison_tables, write_comparison
    from dense2moe.convert.report.facts import read_facts

    check_output(output, "--html")
    states = [read_run(directory) for directory in (first, second)]
    reports = [
        read_facts(open_artifact(_find_report(directory, state)).facts, str(directory))
        for directory, state in zip((first, second), states, strict=True)
    ]
    names = [state.name for state in states]
    if names[0] == names[1]:
        names = [str(first), str(second)]
    found = compare_runs(reports[0], reports[1], (names[0], names[1]))
    console = open_console()
    for table in comparison_tables(found, console.width):
        console.print(table)
    print_prose(console, found.notes)
    if output is not None:
        with one_line_errors(output, "cannot be written", "give another --html"):
            write_comparison(found, output)
        click.echo(f"comparison: {output}")


@click.command(short_help="Copy an ONNX model of RUN into a DIRECTORY for the hub.")
@click.argument("directory", metavar="RUN", type=PATH)
@click.argument("output", metavar="DIRECTORY", type=PATH)
@click.option("--variant", help="Variant to copy [default: the first].")
@end_in_one_line
def package(directory: Path, output: Path, variant: str | None) -> None:
    """Copy an ONNX model of RUN, ready for release, into DIRECTORY.

    RUN is a work directory whose run has written its report. DIRECTORY must be new; it gets the package, the report and
    the model card: README.md with the hub's metadata, figures, the verdict of parity, code to run the model, the recipe
    and provenance.
    """
    from dense2moe.convert.artifact.manifest import open_artifact
    from dense2moe.convert.release import gather_package
    from dense2moe.convert.report.facts import read_facts

    state = read_run(directory)
    found = find_package(directory, variant)
    report = open_artifact(_find_report(directory, state))
    variant = next(variant for variant, name in state.packages.items() if directory / name == found)
    passed = read_facts(report.facts, str(directory)).variants[variant].parity.passed
    names = gather_package(open_artifact(found), report, variant, output)
    click.echo(f"{output}: {variant}, {len(names)} files: {', '.join(names)}")
    if not passed:
        click.echo("parity was broken; the card says so at its head", err=True)


@click.command()
@click.argument("directory", metavar="ARTIFACT", type=PATH)
@end_in_one_line
def verify(directory: Path) -> None:
    """Check every file of ARTIFACT against its recorded digest.

    ARTIFACT is one artifact of a run, a work directory with all artifacts of a run, or a directory that `dense2moe
    package` made.
    """
    from dense2moe.convert import digests
    from dense2moe.convert.artifact.manifest import MANIFEST_NAME
    from dense2moe.convert.artifact.verification import verify as find_mismatches

    if not (directory / MANIFEST_NAME).exists() and (directory / digests.DIGESTS_NAME).is_file():
        if mismatches := [f"{directory}: {line}" for line in digests.find_mismatches(directory)]:
            raise ArtifactError("\n".join(mismatches))
        click.echo(f"{directory}: a package, every file as {digests.DIGESTS_NAME} says")
        return
    directories = [directory]
    if (directory / RUN_NAME).is_file():
        directories = [directory / name for name in read_run(directory).artifacts.values()]
    mismatches = [f"{one}: {line}" for one in directories for line in find_mismatches(one)]
    if mismatches:
        raise ArtifactError("\n".join(mismatches))
    click.echo(
        f"{directory}: {len(directories)} {'artifact' if len(directories) == 1 else 'artifacts'}, every file as its "
        "manifest says"
    )


def _find_report(directory: Path, state: RunState) -> Path:
    if "report" not in state.artifacts:
        raise ArtifactError(f"{directory}: the run has no report yet; finish it with `dense2moe run`")
    return directory / state.artifacts["report"]
