"""Changes of JSON, JSON lines, YAML and plain text."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from random import Random

import ruamel.yaml

from tests.robustness.files import Change
from tests.robustness.trees import TREES, change_tree, odd_value


def _change_json(path: Path, random: Random, what: str) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    change_tree(tree, what, random)
    path.write_text(json.dumps(tree), encoding="utf-8")


def _change_yaml(path: Path, random: Random, what: str) -> None:
    """As JSON, which is YAML too."""
    tree = ruamel.yaml.YAML(typ="safe", pure=True).load(path)
    change_tree(tree, what, random)
    path.write_text(json.dumps(tree, indent=random.choice((None, 1))), encoding="utf-8")


def _change_line(path: Path, random: Random, what: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    number = random.randrange(len(lines))
    tree = json.loads(lines[number])
    change_tree(tree, what, random)
    lines[number] = json.dumps(tree)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _insert(path: Path, random: Random, pieces: tuple[str, ...]) -> None:
    text = path.read_text(encoding="utf-8")
    at = random.randrange(len(text) + 1)
    path.write_bytes((text[:at] + random.choice(pieces) + text[at:]).encode("utf-8", "surrogatepass"))


def _repeat_line(path: Path, random: Random) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    number = random.randrange(len(lines))
    lines.insert(random.randrange(len(lines) + 1), lines[number])
    path.write_text("".join(lines), encoding="utf-8")


def _drop_line(path: Path, random: Random) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    del lines[random.randrange(len(lines))]
    path.write_text("".join(lines), encoding="utf-8")


def _indent_line(path: Path, random: Random) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    number = random.randrange(len(lines))
    lines[number] = random.choice((" ", "  ", "\t", "- ", "? ", "# ")) + lines[number]
    path.write_text("".join(lines), encoding="utf-8")


def _replace_whole(path: Path, random: Random, texts: tuple[str, ...]) -> None:
    path.write_bytes(random.choice(texts).encode("utf-8", "surrogatepass"))


def _repeat_key(path: Path, random: Random) -> None:
    text = path.read_text(encoding="utf-8")
    tree = json.loads(text)
    if isinstance(tree, dict) and tree:
        key = random.choice(list(tree))
        path.write_text(f"{{{json.dumps(key)}: {json.dumps(odd_value(random))}, {text.lstrip()[1:]}", encoding="utf-8")


_JSON_PIECES = (
    ",",
    "}",
    "{",
    "]",
    "[",
    '"',
    "//",
    "NaN",
    "-",
    "1e999",
    "\\u",
    "\\ud83d",
    "\x00",
    "\x1b",
    "\ufeff",
    "9" * 5000,
    "'",
)
_WHOLE_JSON = (
    "null",
    "[]",
    "{}",
    "0",
    '"x"',
    "true",
    "NaN",
    "[" * 100_000,
    '{"x":' * 100_000,
    "{" * 10,
    "[1,2",
    "\ufeff{}",
    '{"\ud83d": 1}',
    "9" * 10_000,
)
_YAML_PIECES = (
    ": ",
    "- ",
    "\t",
    "&a ",
    "*a",
    "!!python/object/apply:os.system ",
    "!!binary ",
    "!x ",
    "? ",
    "| ",
    "> ",
    "%",
    "@",
    "`",
    '"',
    "'",
    "{",
    "}",
    "[",
    "]",
    "#",
    "<<: ",
    "\n---\n",
    "\n...\n",
    "\x00",
    "\x1b[31m",
    "\ud83d",
    "\u2028",
    "\ufeff",
    "=",
    "~",
    "0o7",
    "9" * 5000,
    "\\ud83d",
    '"\\ud83d"',
    "[/INST]",
)
_WHOLE_YAML = (
    "",
    "null",
    "[]",
    "{}",
    "- x",
    "source",
    "source: x",
    "data: {}",
    "&a [*a]",
    "a: &a {b: *a}",
    "[" * 1000,
    "{a: " * 1000,
    "? [a]\n: b",
    '"\\ud83d\\ude00": 1',
    '"\\ud83d": 1',
    "!!set {a}",
    "%YAML 9.9\n---\na: 1",
    "---\n---\n",
    "\x00",
    "# only a comment",
    "source: {hub: a/b, revision: x}\ndata: {source: {kind: hub}}",
    "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\ne: &e [*d, *d, *d, "
    "*d]\nf: [*e, *e, *e, *e, *e, *e]",
)


_WHOLE_TEXTS = (
    b" ",
    b"\n",
    b"\n" * 5000,
    b"x",
    b"x " * 20,
    b"a" * 200_000,
    b"\x00" * 1000,
    b"\xff" * 1000,
    b"<s></s>" * 500,
    b"%%",
    b"\n\n" * 500,
    b"\xef\xbb\xbf",
    "\U0001f600".encode() * 500,
    "é\u0301".encode() * 500,
    b"\r\n\r\n" * 100,
    b"\r" * 100,
    b"\x1b[31m" * 100,
    b"\x1f\x8b\x08\x00" + bytes(100),
    b"PK\x03\x04",
)
_PIECES = (
    b"\x00",
    b"<s>",
    b"</s>",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\r",
    b"a" * 10_000,
    b"\x0c",
    "\u2028".encode(),
    "\U0001f600".encode(),
    b"\n\n\n\n",
    b"{}",
    b"[]",
    b"1e999",
)


def _replace_text(path: Path, random: Random) -> None:
    path.write_bytes(random.choice(_WHOLE_TEXTS))


def _shorten_text(path: Path, random: Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: random.choice((1, 10, 40, 100, 200, 400, 1000))])


def _insert_bytes(path: Path, random: Random) -> None:
    data = path.read_bytes()
    at = random.randrange(len(data) + 1)
    path.write_bytes(data[:at] + random.choice(_PIECES) + data[at:])


def _end_lines(path: Path, random: Random) -> None:
    path.write_bytes(
        path.read_bytes().replace(b"\n", random.choice((b"\r\n", b"\r", b"\n\r", b"", b" ", "\u2028".encode())))
    )


TEXT: dict[str, Change] = {
    "text": _replace_text,
    "short": _shorten_text,
    "insert": _insert_bytes,
    "ends of lines": _end_lines,
}


JSON: dict[str, Change] = {what: partial(_change_json, what=what) for what in TREES} | {
    "repeat key": _repeat_key,
    "insert": partial(_insert, pieces=_JSON_PIECES),
    "whole": partial(_replace_whole, texts=_WHOLE_JSON),
}
JSON_LINES: dict[str, Change] = {what: partial(_change_line, what=what) for what in TREES} | {
    "repeat line": _repeat_line,
    "drop line": _drop_line,
    "piece": partial(_insert, pieces=_JSON_PIECES),
}
YAML: dict[str, Change] = {what: partial(_change_yaml, what=what) for what in TREES} | {
    "repeat line": _repeat_line,
    "drop line": _drop_line,
    "indent line": _indent_line,
    "insert": partial(_insert, pieces=_YAML_PIECES),
    "whole": partial(_replace_whole, texts=_WHOLE_YAML),
}
