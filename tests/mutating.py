"""Mutations of the code that tests must kill: how their snippets are found.

A mutation is a piece of source text and what it becomes: a sign, a swapped expert, a limit, a missing mask. Its snippet
is looked for in all files of the three packages, so that a file may be moved, and white space, comments and commas
before a closing bracket do not count, so that a line may be wrapped anew. It must be found once.
`benchmarks/mutations.py` makes each of them in a copy of the sources and runs the tests that must fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

PACKAGES = ("convert", "upcycle", "export")
_GAP, _APART = r"(?:\s|#[^\n]*\n)*", r"(?:\s|#[^\n]*\n)+"
_CLOSING = (")", "]", "}")


@dataclass(frozen=True)
class Mutation:
    """A mistake in the code: `snippet` becomes `replacement`, and `test` must fail, in whatever file it stands.

    Of a test with many parameters, `only` names those that are run, as pytest's -k does.
    """

    name: str
    snippet: str
    replacement: str
    test: str
    only: str = ""

    @property
    def chosen(self) -> str:
        """The test as an expression of pytest's -k."""
        return f"{self.test} and {self.only}" if self.only else self.test


def find_tests(root: Path) -> dict[str, list[str]]:
    """The names of the files of tests below `root` that each test stands in."""
    found: dict[str, list[str]] = {}
    for file in sorted((root / "tests").glob("test_*.py")):
        for test in re.findall(r"^(?:async )?def (test_\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(test, []).append(file.name)
    return found


def read_sources(root: Path) -> dict[Path, str]:
    """The text of every Python file of the three packages below `root`, by its path there."""
    files = (file for package in PACKAGES for file in sorted((root / package).rglob("*.py")))
    return {file.relative_to(root): file.read_text(encoding="utf-8") for file in files}


def locate(snippet: str, sources: Mapping[Path, str]) -> Iterator[tuple[Path, int, int]]:
    """Every place where the snippet stands: the file, where it begins there, and where it ends."""
    pattern = _compile(snippet)
    for path, text in sources.items():
        yield from ((path, *found.span()) for found in pattern.finditer(text))


def mutate(mutation: Mutation, sources: Mapping[Path, str]) -> tuple[Path, str]:
    """The file that a mutation changes, and its text with the mutation in it.

    Raises:
        LookupError: the snippet stands nowhere, or more than once.
    """
    places = list(locate(mutation.snippet, sources))
    if len(places) != 1:
        where = ", ".join(f"{path}:{sources[path].count(chr(10), 0, start) + 1}" for path, start, _ in places)
        raise LookupError(
            f"'{mutation.name}': its snippet is found {f'in {where}' if places else 'nowhere'}; it must be found once: "
            f"{mutation.snippet}"
        )
    path, start, stop = places[0]
    return path, sources[path][:start] + mutation.replacement + sources[path][stop:]


def _compile(snippet: str) -> re.Pattern[str]:
    """What matches the snippet's words and signs with any space, comment or trailing comma between them."""
    words = re.findall(r"\w+|[^\w\s]", snippet)
    parts = [re.escape(words[0])]
    for before, word in pairwise(words):
        parts.append(_APART if before[-1].isalnum() and word[0].isalnum() else _GAP)
        parts.append((rf"(?:,{_GAP})?" if word in _CLOSING else "") + re.escape(word))
    return re.compile(
        (r"\b" if words[0][0].isalnum() else "") + "".join(parts) + (r"\b" if words[-1][-1].isalnum() else "")
    )
