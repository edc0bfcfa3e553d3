"""The campaign: mutated inputs go through the command line, and each ends in success or in one line of ours.

A case is a kind of input, a command and one or two mutations; `run_case` says how it ended, and `Table` counts. Held of
every case:

1. The exit code is 0, or 1 or 2 with one line that begins with `Error: ` (a line for each mistake of a recipe or each
   broken limit or file, as these commands promise), without control characters; no traceback, and nothing that other
   libraries print past our streams.
2. Nothing is written but below the work directory: not among the inputs, in the current directory, in the home or the
   temporary directory.
3. No process is left, none dies or hangs.
4. A success that says something that can be checked is right: an upcycled artifact has a receipt, and files as its
   manifest says.

Where `run` refuses an input, `check` is asked too: what it calls good was refused late.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from dense2moe.convert.artifact.verification import verify
from tests.robustness.inputs import Input, Inputs, Kind
from tests.robustness.mutations import Mutation
from tests.robustness.worker import Answer, Watched

End = Literal["success", "refused", "late", "failed"]
_LONGEST_LINE = 2000
_HARMLESS = re.compile(r"Ignored unknown kwarg option .*\n?")
"""What tokenizers says of a field of tokenizer.json that it does not know; nothing turns it off."""


@dataclass(frozen=True)
class Case:
    """One command on one kind of input, mutated."""

    kind: Kind
    command: str
    mutations: tuple[Mutation, ...]

    def __str__(self) -> str:
        return " | ".join([self.kind, self.command, *map(str, self.mutations)])

    @classmethod
    def parse(cls, text: str) -> Case:
        """What `str` made of one."""
        kind, command, *mutations = text.split(" | ")
        return cls(kind, command, tuple(map(Mutation.parse, mutations)))


@dataclass(frozen=True)
class Verdict:
    """How a case ended: where it failed by what, and what tells its kind from other failures.

    `late`: refused, but not by `check`.
    """

    end: End
    reason: str = ""
    group: str = ""


# Cases.


def cases(kind: Kind, found: Input) -> st.SearchStrategy[Case]:
    """Cases of a kind; two mutations are of two files."""
    mutation = st.builds(Mutation, st.sampled_from(sorted(found.table)), st.integers(0, 2**32 - 1))
    several = st.lists(mutation, min_size=1, max_size=2, unique_by=lambda each: found.table[each.name][0])
    return st.builds(Case, st.just(kind), st.sampled_from(sorted(found.commands)), several.map(tuple))


def draw(kind: Kind, found: Input, count: int, number: int, visit: Callable[[Case], None]) -> None:
    """Let `visit` see so many cases, the same for a `number`.

    But for those that hypothesis makes of numbers that it finds in our code.
    """

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(kind, found))
    def each(case: Case) -> None:
        visit(case)

    each()


# One case.


class Runner:
    """What cases are run with: right inputs, the watched process, and a folder in which each case has its own."""

    def __init__(self, folder: Path) -> None:
        self.inputs = Inputs(folder / "inputs")
        self.watched = Watched(folder / "watched")
        self._case = folder / "case"
        set_hypothesis_home_dir(folder / "hypothesis")  # and not the current directory

    def run(self, case: Case) -> tuple[Verdict, Answer]:
        """Mutate a copy of the input, run the command, and look at what it did."""
        found = self.inputs.of(case.kind)
        shutil.rmtree(self._case, ignore_errors=True)
        for name in ("cwd", "work"):
            (self._case / name).mkdir(parents=True)
        copied = self._case / "input"
        shutil.copytree(found.folder, copied, symlinks=True)
        # a file before its folder
        for mutation in sorted(case.mutations, key=lambda each: -len(found.table[each.name][0])):
            mutation.apply(copied, found.table)
        work = self._case / "work"
        arguments = [each.format(input=copied, work=work) for each in found.commands[case.command]]
        watched = [copied, self._case / "cwd", self.watched.folder / "home", self.watched.folder / "tmp"]
        self.watched.start()
        before = {folder: _listing(folder) for folder in watched}
        answer = self.watched.run(arguments, self._case / "cwd")
        changed = [path for folder in watched for path in _differences(folder, before[folder])]
        verdict = judge(case, answer, changed, work)
        if verdict.end == "refused" and case.command == "run" and "check" in found.commands:
            checked = self.watched.run(
                [each.format(input=copied) for each in found.commands["check"]], self._case / "cwd"
            )
            verdict = Verdict("late", answer.errors) if checked.code == 0 else verdict
        return verdict, answer


def _listing(folder: Path) -> dict[str, str]:
    """What is below a folder: kind, mode and content of each."""
    return {str(path.relative_to(folder)): _describe(path) for path in sorted(folder.rglob("*"))}


def _describe(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"link to {os.readlink(path)}"
    content = (
        hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) and status.st_mode & 0o400 else ""
    )
    return f"{status.st_mode:o} {content}"


def _differences(folder: Path, before: dict[str, str]) -> list[str]:
    after = _listing(folder)
    return [
        f"{folder.name}/{name}" for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)
    ]


def judge(case: Case, answer: Answer, changed: Sequence[str], work: Path) -> Verdict:
    """How a case ended: `changed` are paths where nothing may be written, `work` is where everything may."""
    reasons = [
        *([f"its process {answer.died}"] if answer.died else []),
        *([_innermost(answer.traceback)] if answer.traceback else []),
        *(f"wrote {path}" for path in changed),
        *(f"left a process: {line}" for line in answer.left),
    ]
    if not reasons and answer.code:
        reasons = _misprints(answer)
    if not reasons and answer.code == 0:
        reasons = _mistakes(case, work)
    if reasons:
        return Verdict("failed", "; ".join(reasons), _group(reasons[0]))
    return Verdict("success" if answer.code == 0 else "refused")


def _misprints(answer: Answer) -> list[str]:
    """What is wrong with the words of a refusal."""
    # how far stages came
    lines = [line for line in answer.errors.split("\n") if line.strip() and not line.startswith(("✓ ", "… "))]
    if answer.code not in (1, 2):
        return [f"exit code {answer.code}"]
    if not lines or not lines[0].startswith("Error: "):
        return [f"no line of ours: {answer.errors[:300]!r}"]
    if _HARMLESS.sub("", answer.said).strip():
        return [f"another library's words: {answer.said[:300]!r}"]
    if len(lines) > 1 and not (lines[0] == "Error: parity was broken:" or _are_places(lines)):
        return [f"{len(lines)} lines: {answer.errors[:300]!r}"]
    if strange := [line for line in lines if not line.isprintable()]:
        return [f"control characters: {strange[0][:300]!r}"]
    if long := [line for line in lines if len(line) > _LONGEST_LINE]:
        return [f"a line of {len(long[0])} letters: {long[0][:300]!r}"]
    return []


def _are_places(lines: Sequence[str]) -> bool:
    """Whether each line says where, below one directory: a recipe's mistakes, the files that `verify` names."""
    places = [line.removeprefix("Error: ").split(":")[0] for line in lines]
    return all(place.startswith("/") and place.startswith(os.path.dirname(places[0])) for place in places)


def _mistakes(case: Case, work: Path) -> list[str]:
    """What is wrong with a success."""
    if "checkpoints" not in case.kind or case.command != "run":
        return []
    found = [folder for folder in work.glob("upcycle-*") if folder.is_dir()]
    if len(found) != 1:
        return [f"{len(found)} upcycled artifacts"]
    if mismatches := verify(found[0]):
        return [f"not as its manifest says: {mismatches[0]}"]
    facts = json.loads((found[0] / "manifest.json").read_text(encoding="utf-8"))["facts"]
    return [] if facts["receipt"] else ["no receipt"]


def _innermost(text: str) -> str:
    """A traceback in one line: the last error, and the innermost frames of it."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text)
    where = " < ".join(f"{'/'.join(file.split('/')[-2:])}:{line} {name}" for file, line, name in reversed(frames[-4:]))
    return f"{text.strip().splitlines()[-1][:200]} in {where}"


def _group(reason: str) -> str:
    """What is common to reasons of one kind: no numbers, no names of ours."""
    error, _, frames = reason.partition(" in ")
    if frames and "<" in frames:
        return f"{error.split(':')[0]} in {' < '.join(frames.split(' < ')[:2])}"
    return re.sub(r"/\S+|'[^']*'|\d+", "…", reason)[:100]


# All cases.


@dataclass
class Table:
    """How cases ended, by kind of input and mutation, and the cases that failed or were refused late."""

    ends: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failures: dict[tuple[str, str], list[tuple[Case, Verdict, Answer]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    late: list[tuple[Case, Verdict]] = field(default_factory=list)

    def add(self, case: Case, verdict: Verdict, answer: Answer) -> None:
        """Count a case under each of its mutations and once under its kind."""
        self.ends[case.kind, ""][verdict.end] += 1
        for mutation in case.mutations:
            self.ends[case.kind, mutation.name][verdict.end] += 1
        if verdict.end == "failed":
            self.failures[case.kind, verdict.group].append((case, verdict, answer))
        if verdict.end == "late":
            self.late.append((case, verdict))

    def total(self) -> Counter[str]:
        """Ends of all cases."""
        return sum((counts for (_, name), counts in self.ends.items() if not name), Counter[str]())

    def markdown(self) -> str:
        """The tables, for a page.

        By kind of input, and by mutation, whatever the file; a case of two mutations is under both.
        """
        head = ["cases", "success", "refused in one line", "of these late", "failed"]
        mutations: dict[str, Counter[str]] = defaultdict(Counter)
        for (_, name), counts in sorted(self.ends.items()):
            if name:
                mutations[re.sub(r"stray .*", "stray file", name.partition(": ")[2])] += counts
        rows = [
            _row(head, "input"),
            _rule(head),
            *(_row(_counts(counts), kind) for (kind, name), counts in self.ends.items() if not name),
        ]
        rows += [_row(_counts(self.total()), "all"), "", _row(head, "mutation"), _rule(head)]
        return "\n".join([*rows, *(_row(_counts(counts), name) for name, counts in sorted(mutations.items()))]) + "\n"

    def report(self, most_lines: int = 12) -> str:
        """Every distinct failure: how often, how to see it again, and the end of its traceback."""
        lines = []
        for (kind, group), found in sorted(self.failures.items(), key=lambda entry: -len(entry[1])):
            case, verdict, answer = min(found, key=lambda each: len(each[0].mutations))
            lines += [f"{kind}: {len(found)} x {group}", f"    case: {case}", f"    {verdict.reason[:600]}"]
            lines += [f"    {line}" for line in answer.traceback.strip().splitlines()[-most_lines:]]
        return "\n".join(lines)


def _counts(counts: Counter[str]) -> list[str]:
    refused = counts["refused"] + counts["late"]
    return [str(each) for each in (sum(counts.values()), counts["success"], refused, counts["late"], counts["failed"])]


def _row(cells: Sequence[str], name: str) -> str:
    return f"| {' | '.join([name, *cells])} |"


def _rule(cells: Sequence[str]) -> str:
    return "|---|" + "--:|" * len(cells)


def campaign(runner: Runner, kind: Kind, count: int, number: int, table: Table) -> None:
    """Run so many cases of a kind."""

    def visit(case: Case) -> None:
        table.add(case, *runner.run(case))

    draw(kind, runner.inputs.of(kind), count, number, visit)
