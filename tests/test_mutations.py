"""The table of mutations: every snippet is found once, and every test that must kill one is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutating import Mutation, find_tests, locate, mutate, read_sources
from mutations import MUTATIONS

ROOT = Path(__file__).parent.parent
SOURCES = read_sources(ROOT)
HERE = Path("convert/a.py")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_snippet_is_found_once_and_its_mutant_is_python(mutation: Mutation) -> None:
    path, text = mutate(mutation, SOURCES)
    assert text != SOURCES[path]
    compile(text, str(path), "exec")


def test_the_test_that_must_kill_each_is_there() -> None:
    tests = find_tests(ROOT)
    assert not [mutation.test for mutation in MUTATIONS if len(tests.get(mutation.test, ())) != 1]


def test_fifty_mutations_have_names_of_their_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 50
    assert len({mutation.snippet for mutation in MUTATIONS}) == len(MUTATIONS)


def test_space_comments_and_trailing_commas_do_not_count() -> None:
    text = "x = add(\n    first,  # one, two\n    second,\n)\n"
    ((path, start, stop),) = locate("add(first, second)", {HERE: text})
    assert (path, text[start:stop]) == (HERE, text[4:-1])


def test_words_are_whole() -> None:
    assert not list(locate("add(x", {HERE: "padd(x)"}))
    assert not list(locate("x + y", {HERE: "x + yes"}))
    assert not list(locate("not x", {HERE: "notx"}))


@pytest.mark.parametrize(
    ("text", "said"), [("x = 1", "nowhere"), ("return 1\nreturn 1", "convert/a.py:1, convert/a.py:2")]
)
def test_a_snippet_that_is_not_found_once_names_its_mutation(text: str, said: str) -> None:
    mutation = Mutation("one too many", "return 1", "return 2", "test_x")
    with pytest.raises(LookupError, match=rf"'one too many'.*{re.escape(said)}"):
        mutate(mutation, {HERE: text})
