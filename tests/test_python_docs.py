"""The `python-docs` data set: the same text every time, and nothing of the held-out text in the training text."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dense2moe.upcycle.data import held_out, python_docs
from dense2moe.upcycle.data.held_out import SPLITS, split_of
from dense2moe.upcycle.data.python_docs import PythonDocs, read_python_docs
from dense2moe.upcycle.errors import UpcycleError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def docs() -> PythonDocs:
    return read_python_docs()


def test_another_process_with_another_hash_seed_reads_the_same_text(docs: PythonDocs) -> None:
    script = (
        "from dense2moe.upcycle.data.python_docs import read_python_docs; docs = read_python_docs(); "
        "print(docs.version, docs.digest)"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "default", "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == [platform.python_version(), docs.digest]


def test_hooks_that_a_program_replaced_do_not_change_the_text(
    docs: PythonDocs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pytest, debuggers and rich replace them."""
    before = {d.name: d.text for d in python_docs._builtin_docs()}
    for hook in ("excepthook", "displayhook", "unraisablehook", "breakpointhook"):
        monkeypatch.setattr(sys, hook, lambda *arguments: None)
    assert {d.name: d.text for d in python_docs._builtin_docs()} == before
    for hook in ("excepthook", "displayhook", "unraisablehook", "breakpointhook"):
        assert f"\n\n{hook}\n" in before["sys"]


def test_the_digest_is_of_all_text_in_order(docs: PythonDocs) -> None:
    parts = [f"{split}\0{d.name}\0{d.domain}\0{d.text}\0" for split in SPLITS for d in docs.documents[split]]
    assert docs.digest == hashlib.sha256("".join(parts).encode()).hexdigest()
    assert docs.version == platform.python_version()


def test_held_out_splits_are_small_and_every_split_has_prose_and_code(docs: PythonDocs) -> None:
    size = {split: sum(len(d.text) for d in docs.documents[split]) for split in SPLITS}
    total = sum(size.values())
    assert total > 5_000_000
    for split in ("validation", "test"):
        assert 0.02 < size[split] / total < 0.2  # five percent of the modules, whose sizes differ
    assert all({d.domain for d in docs.documents[split]} == {"prose", "code"} for split in SPLITS)
    assert all(d.text.strip() for split in SPLITS for d in docs.documents[split])


def test_a_module_lies_in_one_split_with_all_its_texts(docs: PythonDocs) -> None:
    modules = {split: {d.name for d in docs.documents[split]} for split in SPLITS}
    assert not modules["train"] & modules["validation"]
    assert not modules["train"] & modules["test"]
    assert not modules["validation"] & modules["test"]
    assert all(split_of(module) == split for split in SPLITS for module in modules[split])


@pytest.mark.parametrize(("later", "earlier"), [("train", "test"), ("train", "validation"), ("validation", "test")])
def test_no_paragraph_is_shared_by_the_modules_own_key(later: str, earlier: str, docs: PythonDocs) -> None:
    keys = {
        split: {held_out.paragraph_key(p) for d in docs.documents[split] for p in held_out.paragraphs(d.text)} - {""}  # type: ignore[index]
        for split in (later, earlier)
    }
    assert len(keys[earlier]) > 500
    assert not keys[later] & keys[earlier]


@pytest.mark.parametrize(("later", "earlier"), [("train", "test"), ("train", "validation"), ("validation", "test")])
def test_no_paragraph_of_forty_characters_is_shared_as_it_stands(later: str, earlier: str, docs: PythonDocs) -> None:
    def paragraphs(split: str) -> set[str]:
        found: set[str] = set()
        for document in docs.documents[split]:  # type: ignore[index]
            lines: list[str] = []
            for line in [*document.text.split("\n"), ""]:
                if line.strip():
                    lines.append(line.strip())
                else:
                    found.add("\n".join(lines))
                    lines = []
        # Forty characters of text; rules of `#` or of blanks carry none.
        return {p for p in found if len(re.sub(r"[\s#]+", " ", p).strip()) >= 40}

    assert len(paragraphs(earlier)) > 500
    assert not paragraphs(later) & paragraphs(earlier)


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("threading", 14),
        ("subprocess", 44),
        ("statistics", 53),
        ("imaplib", 99),
        ("os", 118),
        ("json", 807),
        ("pydoc_data.topics.lambda", 353),
    ],
)
def test_the_split_of_a_name_is_its_sha256_modulo_a_thousand(module: str, number: int) -> None:
    # As `printf NAME | sha256sum`, the first sixteen hexadecimal digits modulo 1000: below 50 test, below 100
    # validation.
    assert int(hashlib.sha256(module.encode()).hexdigest()[:16], 16) % 1000 == number
    assert split_of(module) == ("test" if number < 50 else "validation" if number < 100 else "train")


def test_shared_paragraphs_are_cut_whatever_their_blanks_comment_signs_and_case() -> None:
    paragraph = "Licensed to the PSF under a Contributor Agreement.\nSee the file for the terms."
    keys = {held_out.paragraph_key(paragraph)}
    variants = [
        paragraph.upper(),
        "# " + paragraph.replace("\n", "\n#   "),
        "    " + paragraph.replace(" ", "  "),
        paragraph.replace("\n", " "),
    ]
    text = "\n\n".join(["kept before", *variants, "kept after"])
    document = held_out.Document("m", "code", text)
    assert held_out.without(document, keys).text == "kept before\n\nkept after"


def test_short_paragraphs_may_be_shared() -> None:
    assert held_out.paragraph_key("x" * 39) == ""
    assert held_out.paragraph_key("x" * 40) == "x" * 40
    assert held_out.paragraph_key("#" * 80) == ""


def test_an_interpreter_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(python_docs.sys, "builtin_module_names", ("sys",))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UpcycleError) as excinfo:
        read_python_docs()
    missing = next(split for split in SPLITS if split != split_of("sys"))
    assert str(excinfo.value) == (
        f"data 'python-docs': this interpreter ({sys.executable}) gives no text for the {missing} split; "
        "it must come with the standard library's source and pydoc_data; use a full CPython, or data of kind 'text'"
    )
