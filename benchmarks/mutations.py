"""Mutations of the code, and which tests kill them.

`python benchmarks/mutations.py [--only NAME] [--output FILE]`: every mutation of `tests/mutations.py` is made
in a copy of the sources, and the tests that must fail are run there; before that, once, all these tests without a
mutation, which must pass. A mutation survives where they pass with it. Torch, transformers and onnxruntime are imported
once, and each mutation has a process forked from there, which has not imported anything of ours yet. The exit code is 1
where one survives, cannot be made, or cannot be imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # where the table is

from mutating import Mutation, find_tests, mutate, read_sources  # noqa: E402
from mutations import MUTATIONS  # noqa: E402

_PATIENCE = 480.0
"""Seconds that tests may take; a mutation that makes them endless is killed as well."""
_ARGUMENTS = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
_LEFT_OUT = shutil.ignore_patterns(".git", ".*cache*", "__pycache__", "*.egg-info", "runs", "logs", "build", "dist")
_WARM = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Phi3ForCausalLM")


@dataclass(frozen=True)
class Outcome:
    """What tests said of one mutation, or of the code as it is where they are for it alone."""

    name: str
    verdict: str
    seconds: float
    killed_by: str = ""


@click.command()
@click.option("--only", "names", multiple=True, help="Only mutations whose name has this in it; may be given again.")
@click.option("--list", "lists", is_flag=True, help="Only list the mutations and their tests.")
@click.option("--baseline/--no-baseline", default=True, help="First run the tests once without a mutation.")
@click.option("--mutants/--no-mutants", default=True, help="Run the tests with each mutation.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Add the outcomes to a file as JSON lines; what it has is not run again.",
)
def main(names: Sequence[str], lists: bool, baseline: bool, mutants: bool, output: Path | None) -> None:
    """Make every mutation in a copy of the sources, and see whether its tests fail."""
    known = _read_names(output) if mutants else set()
    chosen = [
        mutation
        for mutation in MUTATIONS
        if mutation.name not in known and (not names or any(name in mutation.name for name in names))
    ]
    tests = find_tests(ROOT)
    if lost := [mutation for mutation in chosen if mutation.test not in tests]:
        raise click.ClickException("\n".join(f"'{each.name}': there is no {each.test}" for each in lost))
    chosen.sort(key=lambda mutation: tests[mutation.test])
    if lists:
        for mutation in chosen:
            click.echo(f"{mutation.name}: {' '.join(tests[mutation.test])} -k '{mutation.chosen}'")
        return
    sources = read_sources(ROOT)
    try:
        changes = [(mutation, *mutate(mutation, sources)) for mutation in chosen]
    except LookupError as error:
        raise click.ClickException(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "sources"
        shutil.copytree(ROOT, copy, ignore=_LEFT_OUT)
        _import_what_is_slow()
        if baseline:
            _check_unmutated(copy, chosen, tests)
        outcomes = list(_run_mutants(copy, changes if mutants else [], tests, output))
    killed = [outcome for outcome in outcomes if outcome.verdict == "killed"]
    click.echo(f"{len(killed)} of {len(outcomes)} killed, {sum(outcome.seconds for outcome in outcomes):.0f} s")
    for outcome in outcomes:
        if outcome.verdict != "killed":
            click.echo(f"{outcome.verdict}: {outcome.name}", err=True)
    sys.exit(len(killed) < len(outcomes))


def _run_mutants(
    copy: Path, changes: Sequence[tuple[Mutation, Path, str]], tests: Mapping[str, list[str]], output: Path | None
) -> Iterator[Outcome]:
    """Make each mutation in the copy and run its test; told as they come."""
    for number, (mutation, path, text) in enumerate(changes, 1):
        with _changed(copy / path, text, number):
            found = _judge(mutation.name, *_run_tests(copy, tests[mutation.test], mutation.chosen))
        click.echo(f"{found.verdict:9} {found.seconds:6.1f} s  {found.name}  {found.killed_by}")
        if output is not None:
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found.__dict__) + "\n")
        yield found


def _read_names(output: Path | None) -> set[str]:
    """The mutations that an earlier run has written the outcomes of."""
    if output is None or not output.exists():
        return set()
    return {json.loads(line)["name"] for line in output.read_text(encoding="utf-8").splitlines()}


@contextmanager
def _changed(path: Path, text: str, number: int) -> Iterator[None]:
    """For the length of a `with`: a file has another text, and a date that no compiled file has."""
    before, status = path.read_bytes(), path.stat()
    path.write_text(text, encoding="utf-8")
    os.utime(path, (number, number))
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, (status.st_atime, status.st_mtime))


def _import_what_is_slow() -> None:
    """Import what tests need and nothing of ours, so that forked processes have it at once."""
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in _WARM:
        getattr(transformers, name)
    assert not any(name.startswith("dense2moe") for name in sys.modules)


def _check_unmutated(copy: Path, chosen: Sequence[Mutation], tests: Mapping[str, list[str]]) -> None:
    """Run the tests of all mutations, a file at a time, on the code as it is; a test that fails ends the program."""
    for files in dict.fromkeys(tuple(tests[mutation.test]) for mutation in chosen):
        own = dict.fromkeys(f"({each.chosen})" for each in chosen if tuple(tests[each.test]) == files)
        code, said, seconds = _run_tests(copy, files, " or ".join(own))
        click.echo(f"{'passed' if code == 0 else 'FAILED':9} {seconds:6.1f} s  {' '.join(files)} as it is")
        if code != 0:
            what = "takes too long" if code is None else "fails"
            raise click.ClickException(f"{' '.join(files)} {what} without a mutation:\n{said[-4000:]}")


def _judge(name: str, code: int | None, said: str, seconds: float) -> Outcome:
    """What pytest's exit code means: 0 passed, 1 failed, none that it took too long, and others an error of ours.

    A negative one is the signal that a crash ended it by.
    """
    first = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", said, re.MULTILINE)
    match code:
        case 0:
            return Outcome(name, "survived", seconds)
        case 1:
            return Outcome(name, "killed", seconds, first[1] if first else "")
        case None:
            return Outcome(name, "killed", seconds, "time ran out")
        case _ if code < 0:
            return Outcome(name, "killed", seconds, f"crashed by {signal.Signals(-code).name}")
        case _:
            click.echo(said[-3000:], err=True)
            return Outcome(name, "broken", seconds)


def _run_tests(copy: Path, files: Sequence[str], chosen: str) -> tuple[int | None, str, float]:
    """Run tests of the copy in a forked process; returns pytest's exit code, what it printed, and the seconds."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            _become(copy, said.fileno(), lambda: _pytest(files, chosen))
        code = _wait(process)
        said.seek(0)
        return code, said.read(), time.monotonic() - began


def _pytest(files: Sequence[str], chosen: str) -> int:
    import pytest

    return int(pytest.main([*_ARGUMENTS, "-k", chosen, *(f"tests/{file}" for file in files)]))


def _become(copy: Path, said: int, work: Callable[[], int]) -> None:
    """In the forked process: stand in the copy, print into `said`, do the work and end with what it returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(copy)
        sys.path[:] = [str(copy), *(path for path in sys.path if not path.startswith(str(ROOT)))]
        sys.modules.pop("mutations", None)
        os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(process: int) -> int | None:
    """The exit code of a process; none where it took too long and was ended with all that it began."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


if __name__ == "__main__":
    main()
