"""The command line: a recipe checked, planned, run, and what came of it."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar, cast

import click

from dense2moe.upcycle.errors import MendableError, find_os_error, is_out_of_memory, one_line_errors, shorten
from dense2moe.upcycle.imports import uncollected_imports

if TYPE_CHECKING:  # torch and transformers take seconds to import; only the commands that need them do
    from dense2moe.convert.stages import Preparation

_STAGES = ("source", "data", "upcycle", "finetune", "quantize", "onnx", "parity", "report")
_RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
_KEPT = "what is finished is kept, and the same command goes on from there"
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _mendable(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """What the user can mend ends in one line and exit code 1, a signal in one line and its own code.

    A bug keeps its traceback.
    """

    @wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        from dense2moe.convert.termination import Terminated, termination_raised

        try:
            with termination_raised():
                return function(*args, **kwargs)
        except MendableError as error:
            raise click.ClickException(str(error)) from error
        except Terminated as error:
            _end(f"{'terminated' if error.signal == signal.SIGTERM else 'hung up'}; {_KEPT}", error.signal)
        except KeyboardInterrupt:
            _end(f"interrupted; {_KEPT}", signal.SIGINT)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except EOFError as error:  # click would take it for the end of its own input, and say 'Aborted!' alone
            raise RuntimeError("a file or a pipe ended early") from error
        except Exception as error:
            if (line := _describe_system(error, kwargs)) is not None:
                raise click.ClickException(line) from error
            raise

    return wrapped


def _end(line: str, number: int) -> NoReturn:
    with suppress(OSError):  # the terminal may be what is gone
        click.echo(line, err=True)
    sys.exit(128 + number)


def _describe_system(error: Exception, arguments: Mapping[str, Any]) -> str | None:
    """One line on what the system refused, the disk or memory, whichever library passed it on.

    None where it refused nothing.
    """
    from dense2moe.convert.artifact import describe_os_error

    if is_out_of_memory(error):
        return (
            f"out of memory ({shorten(error) or type(error).__name__}); close other programs, or take a smaller "
            "model or less text"
        )
    if (cause := find_os_error(error)) is None:
        return None
    place = next(
        (value for name in ("workdir", "output", "directory") if isinstance(value := arguments.get(name), Path)), None
    )
    return describe_os_error(
        cause,
        place or Path("the work directory"),
        "--workdir" if place is None or "workdir" in arguments else "directory",
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="dense2moe", prog_name="dense2moe")
def main() -> None:
    """Turn a pretrained dense transformer into a Mixture of Experts in ONNX, and show that it is the same model."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # what a terminal cannot show ends no command; stderr is made so by Python
        sys.stdout.reconfigure(errors="replace")


@main.command()
@_RECIPE
@_mendable
def check(recipe: Path) -> None:
    """Read RECIPE and everything it names, and say whether a run could start."""
    preparation = _prepare(recipe)
    conversion = preparation.plan.conversion
    exports = ", ".join(preparation.lowerings) or "no ONNX yet"
    click.echo(f"{recipe}: good. {conversion.family.architecture} to {conversion.target.architecture}, {exports}")
    if preparation.last_stage is not None:
        last, reason = preparation.last_stage
        click.echo(f"{reason}; run it with --until {last}")


@main.command()
@_RECIPE
@click.option("--workdir", type=click.Path(path_type=Path), help="Directory of the artifacts [default: runs/NAME].")
@_mendable
def plan(recipe: Path, workdir: Path | None) -> None:
    """Show what RECIPE would make: sizes, parameters, disk and memory, before any work."""
    from dense2moe.convert.planning import plan_tables

    preparation = _prepare(recipe)
    console = _console()
    for table in plan_tables(preparation, workdir or _default_workdir(preparation)):
        console.print(table)


@main.command()
@_RECIPE
@click.option("--workdir", type=click.Path(path_type=Path), help="Directory of the artifacts [default: runs/NAME].")
@click.option("--until", type=click.Choice(_STAGES), default="report", show_default=True, help="Last stage to run.")
@_mendable
def run(recipe: Path, workdir: Path | None, until: Any) -> None:
    """Run RECIPE: upcycle, fine-tune, quantize, export, check parity, report.

    Finished artifacts are reused, so a second run costs seconds, and a killed one goes on at the stage it was in,
    fine-tuning at its last checkpoint. Another setting makes new artifacts beside the old. A broken parity threshold
    ends in exit code 1, after the report is written.
    """
    from dense2moe.convert.pipeline import run_pipeline
    from dense2moe.convert.progress import ProgressDisplay
    from dense2moe.convert.report.costs import cost_table, take_costs
    from dense2moe.convert.report.summary import summary_table, verdict_lines
    from dense2moe.convert.report.writer import HTML_NAME
    from dense2moe.upcycle.training.processes import leave_processes

    preparation = _prepare(recipe, apart=True)
    workdir = workdir or _default_workdir(preparation)
    with ProgressDisplay() as display:
        outcome = run_pipeline(preparation, workdir, until, display)
    leave_processes()
    if outcome is None:
        return  # the first process of several tells what came out
    if (facts := outcome.facts) is not None:
        _console().print(
            cost_table(take_costs({label: artifact.facts for label, artifact in outcome.artifacts.items()})[1])
        )
        _console().print(summary_table(facts))
        for line in verdict_lines(facts):
            click.echo(line)
        click.echo(f"report: {outcome.artifacts['report'].directory / HTML_NAME}")
    else:
        for label, artifact in outcome.artifacts.items():
            click.echo(f"{label}: {artifact.directory}")
    if outcome.breaches:
        raise click.ClickException("\n".join(["parity was broken:", *outcome.breaches]))


@main.command()
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@_mendable
def show(directory: Path) -> None:
    """Show the results of RUN, a work directory: its summary table, or how far it came."""
    from dense2moe.convert.artifact import is_locked, open_artifact
    from dense2moe.convert.report.costs import cost_table, take_costs
    from dense2moe.convert.report.summary import summary_table, verdict_lines
    from dense2moe.convert.report.writer import HTML_NAME

    state = _read_run(directory)
    # as a kill or a power cut leaves it
    status = "stopped" if state["status"] == "running" and not is_locked(directory) else state["status"]
    click.echo(f"{state['name']}: {status} ({state['recipe']})")
    _, costs = take_costs({label: open_artifact(directory / name).facts for label, name in state["artifacts"].items()})
    if costs:
        _console().print(cost_table(costs))
    if "report" in state["artifacts"]:
        report = open_artifact(directory / state["artifacts"]["report"])
        _console().print(summary_table(report.facts))
        for line in verdict_lines(report.facts):
            click.echo(line)
        click.echo(f"report: {report.directory / HTML_NAME}")
    else:
        for label, name in state["artifacts"].items():
            click.echo(f"{label}: {directory / name}")


@main.command()
@click.argument("first", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("second", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--html", "output", type=click.Path(path_type=Path, dir_okay=False), help="Also write the comparison as one page."
)
@_mendable
def compare(first: Path, second: Path, output: Path | None) -> None:
    """Set two runs side by side: their recipes, figures with ratios, and parity.

    Each RUN is a work directory. Of the recipes only the keys that differ are shown; a ratio is the second run's figure
    over the first's.
    """
    from dense2moe.convert.artifact import open_artifact
    from dense2moe.convert.report.comparison import compare_runs, comparison_tables, write_comparison

    _check_output(output, "--html")
    states = [_read_run(directory) for directory in (first, second)]
    for directory, state in zip((first, second), states, strict=True):
        if "report" not in state["artifacts"]:
            raise click.ClickException(f"{directory}: the run has no report yet; finish it with `dense2moe run`")
    names = [str(state["name"]) for state in states]
    if names[0] == names[1]:
        names = [str(first), str(second)]
    reports = [
        open_artifact(directory / state["artifacts"]["report"]).facts
        for directory, state in zip((first, second), states, strict=True)
    ]
    found = compare_runs(reports[0], reports[1], (names[0], names[1]))
    for table in comparison_tables(found):
        _console().print(table)
    for note in found.notes:
        click.echo(note)
    if output is not None:
        with one_line_errors(output, "cannot be written", "give another --html"):
            write_comparison(found, output)
        click.echo(f"comparison: {output}")


@main.command()
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("output", metavar="DIRECTORY", type=click.Path(path_type=Path))
@click.option("--variant", help="Which ONNX model [default: its first].")
@_mendable
def package(directory: Path, output: Path, variant: str | None) -> None:
    """Copy an ONNX model of RUN with its model card into a new DIRECTORY for the hub.

    RUN is a work directory. DIRECTORY holds the package, its model card (README.md with the hub's metadata: figures,
    the verdict of parity, how to run it, recipe, provenance) and the report. The run must have come to its report,
    which writes the cards; artifacts stay as they are.
    """
    from dense2moe.convert.artifact import open_artifact
    from dense2moe.convert.release import gather_package

    state = _read_run(directory)
    found = _find_package(directory, variant)
    label = next(
        label for label, name in state["artifacts"].items() if label.startswith("onnx-") and directory / name == found
    )
    if "report" not in state["artifacts"]:
        raise click.ClickException(f"{directory}: the run has no report yet; finish it with `dense2moe run`")
    report = open_artifact(directory / state["artifacts"]["report"])
    variant = label.removeprefix("onnx-")
    names = gather_package(open_artifact(found), report, variant, output)
    click.echo(f"{output}: {variant}, {len(names)} files: {', '.join(names)}")
    if not report.facts["variants"][variant]["parity"]["passed"]:
        click.echo("parity was broken; the card says so at its head", err=True)


@main.command()
@click.argument("directory", metavar="ARTIFACT", type=click.Path(path_type=Path))
@_mendable
def verify(directory: Path) -> None:
    """Check every file of ARTIFACT against its recorded digests.

    ARTIFACT is an artifact of a run, a work directory, which stands for all of its run's artifacts, or a package that
    `dense2moe package` made.
    """
    from dense2moe.convert import digests
    from dense2moe.convert.artifact import MANIFEST_NAME
    from dense2moe.convert.artifact import verify as find_mismatches
    from dense2moe.convert.pipeline import RUN_NAME

    if not (directory / MANIFEST_NAME).exists() and (directory / digests.DIGESTS_NAME).is_file():
        if mismatches := [f"{directory}: {line}" for line in digests.find_mismatches(directory)]:
            raise click.ClickException("\n".join(mismatches))
        click.echo(f"{directory}: a package, every file as {digests.DIGESTS_NAME} says")
        return
    directories = [directory]
    if (directory / RUN_NAME).is_file():
        directories = [directory / name for name in _read_run(directory)["artifacts"].values()]
    mismatches = [f"{one}: {line}" for one in directories for line in find_mismatches(one)]
    if mismatches:
        raise click.ClickException("\n".join(mismatches))
    click.echo(
        f"{directory}: {len(directories)} {'artifact' if len(directories) == 1 else 'artifacts'}, every file as its "
        "manifest says"
    )


@main.command()
@click.argument("directory", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option(
    "--prompt", "prompts", multiple=True, help="Text to go on from; - reads standard input. May be given several times."
)
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), help="File with a prompt on each line.")
@click.option("--variant", help="Which package, where ARTIFACT is a work directory [default: its first].")
@click.option(
    "--chat",
    is_flag=True,
    help="Each prompt is what a user says, in the tokenizer's chat template; only the answer is printed.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="Tokens to write at most [default: the package's, or 128]."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    help="0 is greedy [default: the package's; 1 where another option draws].",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    help="Draw from the k likeliest tokens; 0 from all [default: the package's, or 50].",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Nucleus sampling: keep this mass [default: the package's, or 1].",
)
@click.option(
    "--min-p",
    type=click.FloatRange(min=0, max=1),
    help="Least share of the likeliest token's mass [default: the package's, or 0].",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    help="1 is none [default: the package's, or 1].",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draws.")
@click.option("--cuda", is_flag=True, help="Run on CUDA instead of the CPU.")
@_mendable
def generate(
    directory: Path,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    variant: str | None,
    chat: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int,
    cuda: bool,
) -> None:
    """Go on from prompts with the ONNX model in ARTIFACT, a package or a work directory.

    One text is printed as it comes. Several are one batch, and printed with a heading each when all have ended. Where a
    text ends, and how tokens are chosen, is what transformers reads in the package's generation_config.json; options
    here go before it. --top-k, --top-p or --min-p alone draws, at the package's temperature or 1.
    """
    texts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in prompts]
    texts += [] if prompts_file is None else _read_prompts(prompts_file)
    if not texts:
        raise click.ClickException("no prompt; give --prompt, or --prompts with a file of them")
    with uncollected_imports():
        from transformers.utils import logging

        from dense2moe.export.opening import load_tokenizer
        from dense2moe.export.runtime.decoder import CPU, CUDA, Decoder
        from dense2moe.export.runtime.generation import read_generation
        from dense2moe.export.runtime.text import chat_ids, decode_stream, start_ids

    logging.set_verbosity_error()
    package = _find_package(directory, variant)
    decoder = Decoder(package, CUDA if cuda else CPU)
    tokenizer = load_tokenizer(package)
    generation = read_generation(package, tokenizer)
    ids = [chat_ids(tokenizer, text) if chat else start_ids(tokenizer, text, generation.start) for text in texts]
    longest = max(ids, key=len)
    room = decoder.context_length - len(longest)
    if room < 1:
        where = "--prompt" if len(ids) == 1 else f"prompt {ids.index(longest) + 1}"
        raise click.ClickException(
            f"{where}: has {len(longest)} tokens; the model's context holds {decoder.context_length}; shorten it"
        )
    if generation.strange:
        click.echo(
            f"{package}: generation_config.json has settings that are not followed here: "
            f"{', '.join(generation.strange)}",
            err=True,
        )
    sampling = generation.choose_sampling(seed, temperature, top_k, top_p, min_p, repetition_penalty)
    steps = decoder.generate(
        ids, min(max_new_tokens or generation.max_new_tokens or 128, room), sampling, generation.ends
    )
    shown = ["" if chat else text for text in texts]
    before: list[list[int]] = [[] for _ in ids] if chat else ids
    if len(texts) == 1:
        click.echo(shown[0], nl=False)
        for piece in decode_stream(tokenizer, before[0], (token for (token,) in steps if token is not None)):
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()
        return
    for number, (text, start, row) in enumerate(zip(shown, before, zip(*steps, strict=True), strict=True), 1):
        click.echo(f"== {number} of {len(texts)}")
        click.echo(text + "".join(decode_stream(tokenizer, start, (token for token in row if token is not None))))


def _parse_counts(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, divided by commas, each once."""
    parts = value.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} must be whole numbers from 1 on, divided by commas, such as 1,4")
    return tuple(dict.fromkeys(int(part) for part in parts))


@main.command()
@click.argument("directory", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option("--variant", help="Which package, where ARTIFACT is a work directory [default: its first].")
@click.option("--batch", "batches", callback=_parse_counts, default="1,4", show_default=True, help="Prompts at once.")
@click.option(
    "--prompt", "prompts", callback=_parse_counts, default="64,256", show_default=True, help="Tokens of a prompt."
)
@click.option(
    "--new", "num_new", type=click.IntRange(min=0), default=64, show_default=True, help="Tokens decoded after it."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Rounds that are timed, after one that is not.",
)
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to run it."
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Threads of onnxruntime; 0 is its own choice.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every round, the machine, the versions.")
@_mendable
def bench(
    directory: Path,
    variant: str | None,
    batches: tuple[int, ...],
    prompts: tuple[int, ...],
    num_new: int,
    rounds: int,
    provider: Any,
    threads: int,
    as_json: bool,
) -> None:
    """Measure prefill, decode and memory of ARTIFACT, an ONNX package or a work directory.

    Every batch with every prompt, in turn in each round; medians and spread, memory, and the machine. The package may
    be of other makers, if its inputs and outputs have our names: input_ids, attention_mask, past_key_values.N.key,
    present.N.key, logits.
    """
    from dense2moe.convert.progress import ProgressDisplay

    with uncollected_imports():
        from dense2moe.convert.bench import bench_lines, bench_package, bench_table
        from dense2moe.export.runtime.speed import Load

    package = _find_package(directory, variant)
    loads = [Load(batch, prompt, num_new) for batch in batches for prompt in prompts]
    with ProgressDisplay() as display:
        found = bench_package(package, loads, provider, threads, rounds, display.stage("bench"))
        display.finish("bench")
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    _console().print(bench_table(found))
    for line in bench_lines(found):
        click.echo(line)


@main.command()
@click.argument("directory", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option(
    "--reference", required=True, type=click.Path(path_type=Path), help="Checkpoint that the package must compute like."
)
@click.option(
    "--data",
    "files",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Text file in UTF-8. May be given several times.",
)
@click.option(
    "--twin",
    type=click.Path(path_type=Path),
    help="Checkpoint with the package's own weights, where these are quantized.",
)
@click.option("--variant", help="Which package, where ARTIFACT is a work directory [default: its first].")
@click.option("--blocks", type=click.IntRange(min=1), help="Blocks of text at most, taken evenly [default: all].")
@click.option("--block-size", type=click.IntRange(min=8), default=256, show_default=True, help="Tokens a block.")
@click.option(
    "--padding/--no-padding", default=True, show_default=True, help="Whether rows padded at their left must be right."
)
@click.option(
    "--max-perplexity-increase",
    type=click.FloatRange(min=0),
    help="Relative to the reference's [default: the variant's].",
)
@click.option(
    "--task", "tasks", multiple=True, type=click.Path(), help="File of a task, JSON lines. May be given several times."
)
@click.option(
    "--max-score-drop",
    type=click.FloatRange(min=0),
    help="What its score may lie below the reference's by [default: the variant's].",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for all figures.")
@_mendable
def parity(
    directory: Path,
    reference: Path,
    files: tuple[Path, ...],
    twin: Path | None,
    variant: str | None,
    blocks: int | None,
    block_size: int,
    padding: bool,
    max_perplexity_increase: float | None,
    tasks: tuple[str, ...],
    max_score_drop: float | None,
    json_path: Path | None,
) -> None:
    """Check that the ONNX decoder in ARTIFACT computes what a checkpoint does, on your text.

    ARTIFACT is a package, also one of another maker with our names of inputs and outputs, or a work directory. A broken
    limit is one line that names where, and exit code 1. A task is a file with an object on each line: prompt, choices
    and answer; or prompt and answer; or texts (two) and score.
    """
    package = _find_package(directory, variant)
    _check_output(json_path, "--json")
    for file in files:
        if not file.is_file():
            raise click.ClickException(f"{file}: no such file; --data must be a text file in UTF-8")
    with uncollected_imports():
        from transformers.utils import logging

        from dense2moe.convert.package_parity import check_package, describe, is_judged_alone, write_json
        from dense2moe.convert.progress import ProgressDisplay
        from dense2moe.export.parity.config import ParityConfig
        from dense2moe.export.parity.precision import find_precision

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    limits = {"max_perplexity_increase": max_perplexity_increase, "max_score_drop": max_score_drop}
    given = {name: {find_precision(package).variant: limit} for name, limit in limits.items() if limit is not None}
    config = ParityConfig(left_padding=padding, tasks=tasks).model_copy(update=given)
    with ProgressDisplay() as display:
        found = check_package(package, reference, files, block_size, blocks, config, display.stage("parity"), twin)
        display.finish("parity")
    if json_path is not None:
        with one_line_errors(json_path, "cannot be written", "give another --json"):
            write_json(found, json_path)
    for line in describe(found):
        click.echo(line)
    if not found.passed:
        raise click.ClickException("\n".join(["parity was broken:", *found.breaches]))
    only = (
        ": its weights are not the reference's: only the perplexity, the files and the package against itself are "
        "judged, unless --twin is given"
    )
    click.echo(f"parity passed{only if is_judged_alone(found) else ''}")


@main.command()
@click.option("--report", is_flag=True, help="That of report.json instead.")
def schema(report: bool) -> None:
    """Print the JSON schema of recipes, for editors, or of the reports' JSON."""
    if report:
        with uncollected_imports():
            from dense2moe.convert.report.facts import report_schema

        click.echo(json.dumps(report_schema(), indent=2))
        return
    from dense2moe.convert.recipe import schema as recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))


def _prepare(recipe: Path, apart: bool = False) -> Preparation:
    """What a recipe needs; `apart`.

    Stages are to follow, in processes of their own, whose server may begin its imports.
    """
    from dense2moe.convert.recipe import load_recipe
    from dense2moe.convert.worker import start_server

    loaded = load_recipe(recipe)  # a misspelt key is told in a moment, before the slow imports
    if apart:
        start_server()
    with uncollected_imports():
        from transformers.utils import logging

        from dense2moe.convert.stages import prepare

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return prepare(loaded, lambda *_: None)


def _default_workdir(preparation: Preparation) -> Path:
    return Path("runs") / preparation.loaded.name


def _console() -> Any:
    from rich.console import Console

    # texts are also the user's: brackets and colons stay as they are
    plain: dict[str, Any] = {
        "markup": False,
        "emoji": False,
    }
    return Console(**plain) if sys.stdout.isatty() else Console(width=100, force_terminal=False, **plain)


def _read_run(directory: Path) -> dict[str, Any]:
    from dense2moe.convert.pipeline import RUN_NAME

    path = directory / RUN_NAME
    if not path.is_file():
        raise click.ClickException(
            f"{directory}: no {RUN_NAME}; it must be the work directory of a run, such as runs/quickstart"
        )
    try:
        state: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise click.ClickException(f"{path}: not JSON ({shorten(error)}); run the recipe again") from error
    match state:
        case {"name": str(), "status": str(), "recipe": str(), "artifacts": {**artifacts}} if all(
            map(_is_name, artifacts.values())
        ):
            return cast(dict[str, Any], state)
    raise click.ClickException(
        f"{path}: not the state of a run, which has name, status, recipe, and artifacts with the names of their "
        "directories; run the recipe again"
    )


def _is_name(value: object) -> bool:
    """Whether it is the name of a file or directory, and no path out of the folder that holds it."""
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and value.isprintable()


def _check_output(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written, before the work."""
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir():
        raise click.ClickException(f"{path}: {folder} is no directory; make it, or give another {option}")
    if path.is_dir():
        raise click.ClickException(f"{path}: is a directory; {option} must name a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise click.ClickException(f"{path}: no permission to write it; give another {option}")


def _find_package(directory: Path, variant: str | None) -> Path:
    from dense2moe.convert.pipeline import RUN_NAME

    if not (directory / RUN_NAME).is_file():
        if variant is not None:
            raise click.ClickException(
                f"{directory}: is not the work directory of a run, which --variant chooses from; leave it out"
            )
        return directory
    packages = {
        label.removeprefix("onnx-"): name
        for label, name in _read_run(directory)["artifacts"].items()
        if label.startswith("onnx-")
    }
    if not packages:
        raise click.ClickException(f"{directory}: the run has made no ONNX package yet; finish it with `dense2moe run`")
    if variant is not None and variant not in packages:
        raise click.ClickException(f"{directory}: no variant '{variant}'; it has {', '.join(packages)}")
    return directory / str(packages[variant or next(iter(packages))])


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(
            f"{path}: cannot be read ({error}); it must be a text file with a prompt on each line"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise click.ClickException(f"{path}:{number}: is empty; every line must be a prompt")
    return lines
