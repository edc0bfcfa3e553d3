"""Commands that load an ONNX package: generate, bench, parity."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dense2moe.convert.cli.endings import end_in_one_line
from dense2moe.convert.cli.places import PATH, check_output, find_package
from dense2moe.convert.cli.terminal import open_console, print_prose
from dense2moe.upcycle.errors import one_line_errors
from dense2moe.upcycle.imports import uncollected_imports


@click.command(short_help="Continue prompts with the ONNX model in ARTIFACT.")
@click.argument("directory", metavar="ARTIFACT", type=PATH)
@click.option("--prompt", "prompts", multiple=True, help="Prompt; - reads standard input. May be given several times.")
@click.option("--prompts", "prompts_file", type=PATH, help="File with a prompt on each line.")
@click.option("--variant", help="Variant to use, if ARTIFACT is a work directory [default: its first].")
@click.option(
    "--chat",
    is_flag=True,
    help="Put each prompt into the tokenizer's chat template, as the user's message, and print only the answer.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="New tokens at most [default: the package's, or 128]."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    help="Sampling temperature; 0 is greedy [default: the package's; 1 if another option turns sampling on].",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    help="Sample from the k likeliest tokens; 0 is all [default: the package's, or 50].",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Nucleus sampling: keep this probability mass [default: the package's, or 1].",
)
@click.option(
    "--min-p",
    type=click.FloatRange(min=0, max=1),
    help="Smallest probability, as a share of the likeliest token's [default: the package's, or 0].",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    help="Penalty for tokens that occurred before; 1 is none [default: the package's, or 1].",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of sampling.")
@click.option("--cuda", is_flag=True, help="Run on CUDA instead of the CPU.")
@end_in_one_line
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
    """Continue prompts with the ONNX model in ARTIFACT.

    ARTIFACT is a package or a work directory. The text of one prompt is printed as it comes. Several prompts are one
    batch, printed with a heading each when all have ended. The package's generation_config.json says where a text ends
    and how tokens are chosen, as in transformers; options override it. --top-k, --top-p or --min-p alone turns sampling
    on, at the package's temperature or 1.
    """
    texts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in prompts]
    texts += [] if prompts_file is None else _read_prompts(prompts_file)
    if not texts:
        raise click.ClickException("no prompt; give --prompt, or --prompts with a file of them")
    with uncollected_imports():
        from transformers.utils import logging

        from dense2moe.export.runtime.continuation import GenerateConfig, Package

    logging.set_verbosity_error()
    package = Package(find_package(directory, variant), "cuda" if cuda else "cpu")
    if package.ignored_settings:
        click.echo(
            f"{package.directory}: generation_config.json has settings that are not followed here: "
            f"{', '.join(package.ignored_settings)}",
            err=True,
        )
    config = GenerateConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        chat=chat,
    )
    follows = package.continues and not chat
    if len(texts) == 1:
        pieces = package.stream(texts[0], config)
        click.echo(texts[0] if follows else "", nl=False)
        for piece in pieces:
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()
        return
    for number, (text, continued) in enumerate(zip(texts, package.generate(texts, config), strict=True), 1):
        click.echo(f"== {number} of {len(texts)}")
        click.echo(text + continued if follows else continued)


def _parse_counts(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, separated by commas, each once."""
    parts = value.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} must be whole numbers from 1 on, separated by commas, such as 1,4")
    return tuple(dict.fromkeys(int(part) for part in parts))


@click.command(short_help="Measure prefill, decode and memory of the model in ARTIFACT.")
@click.argument("directory", metavar="ARTIFACT", type=PATH)
@click.option("--variant", help="Variant to use, if ARTIFACT is a work directory [default: its first].")
@click.option(
    "--batch",
    "batches",
    callback=_parse_counts,
    default="1,4",
    show_default=True,
    help="Batch sizes, separated by commas.",
)
@click.option(
    "--prompt",
    "prompts",
    callback=_parse_counts,
    default="64,256",
    show_default=True,
    help="Prompt lengths in tokens, separated by commas.",
)
@click.option(
    "--new",
    "num_new",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Tokens decoded after the prompt.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Timed rounds, after one round of warm-up.",
)
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Execution provider."
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Threads of onnxruntime; 0 leaves the choice to it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every round, the machine, the versions.")
@end_in_one_line
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
    """Measure prefill, decode and memory of an ONNX package.

    ARTIFACT is a package or a work directory. Each round measures every batch size with every prompt length. Printed
    are medians and spread, memory, and the machine. Of a package without a cache, such as an encoder's, passes are
    timed: rows as long as a prompt, or of the one size that it reads. The package may be of another maker, if its
    inputs and outputs have our names: input_ids, attention_mask, past_key_values.N.key, present.N.key, logits.
    """
    from dense2moe.convert.progress import ProgressDisplay

    with uncollected_imports():
        from dense2moe.convert.bench import bench_lines, bench_package, bench_table
        from dense2moe.export.runtime.speed import Load

    package = find_package(directory, variant)
    loads = [Load(batch, prompt, num_new) for batch in batches for prompt in prompts]
    with ProgressDisplay() as display:
        found = bench_package(package, loads, provider, threads, rounds, display.stage("bench"))
        display.finish("bench")
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    console = open_console()
    console.print(bench_table(found, console.width))
    print_prose(console, bench_lines(found))


@click.command(short_help="Check that the ONNX model in ARTIFACT computes the same.")
@click.argument("directory", metavar="ARTIFACT", type=PATH)
@click.option(
    "--reference",
    required=True,
    type=PATH,
    help="Checkpoint whose outputs the package must give.",
)
@click.option(
    "--data",
    "files",
    multiple=True,
    type=PATH,
    help="Text file in UTF-8; a package without a cache needs none. May be given several times.",
)
@click.option(
    "--twin",
    type=PATH,
    help="Checkpoint with the package's own weights, if they are quantized.",
)
@click.option("--variant", help="Variant to use, if ARTIFACT is a work directory [default: its first].")
@click.option("--blocks", type=click.IntRange(min=1), help="Blocks of text to read, taken evenly [default: all].")
@click.option("--block-size", type=click.IntRange(min=8), default=256, show_default=True, help="Tokens in a block.")
@click.option("--padding/--no-padding", default=True, show_default=True, help="Also judge batches padded on the left.")
@click.option(
    "--max-perplexity-increase",
    type=click.FloatRange(min=0),
    help="Largest relative increase over the reference's perplexity [default: the variant's].",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=click.Path(readable=False),
    help="File of a task in JSON lines. May be given several times.",
)
@click.option(
    "--max-score-drop",
    type=click.FloatRange(min=0),
    help="Largest drop of a task's score below the reference's, plus two standard errors [default: the variant's].",
)
@click.option("--json", "json_path", type=PATH, help="Write all figures to this file.")
@end_in_one_line
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
    """Check that the ONNX model in ARTIFACT computes like a checkpoint.

    Both read the text of --data; an encoder and a model of images or sound, which have no cache, read drawn inputs too,
    and need no text. ARTIFACT is a work directory or a package, also one of another maker with our names of inputs and
    outputs. Each broken limit is one line that names the place, and the exit
    code is 1. A task is a file with a JSON object on each line: prompt, choices and answer; or prompt and answer; or
    two texts and a score.
    """
    package = find_package(directory, variant)
    check_output(json_path, "--json")
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
    print_prose(open_console(), describe(found))
    if not found.passed:
        raise click.ClickException("\n".join(["parity was broken:", *found.breaches]))
    only = (
        ": its weights are not the reference's: only the perplexity, the files and the package against itself are "
        "judged, unless --twin is given"
    )
    click.echo(f"parity passed{only if is_judged_alone(found) else ''}")


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
