"""The `python-docs` data set, read from the running interpreter.

English reference prose and Python code that every machine with Python already has: the help topics of `pydoc_data`, the
docstrings of the standard library and of the compiled built-in modules, and the standard library's source. Nothing is
downloaded and nothing is stored in this repository; another interpreter version gives another text, so users record
`PythonDocs.version` and `PythonDocs.digest`.

Held-out text is never trained on. Two rules see to that:

1. A whole module falls into one split, by the SHA-256 of its dotted name, so its docstrings and its source stay
   together.
2. A paragraph (text between blank lines) of at least `_MIN_SHARED_CHARS` characters that occurs anywhere in the test
   split is cut out of validation and train, and one that occurs in validation is cut out of train. Help topics quote
   each other and modules share licence headers; rule 1 alone would leak them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dense2moe.upcycle.errors import UpcycleError

Split = Literal["train", "validation", "test"]
Domain = Literal["prose", "code"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DOMAINS: tuple[Domain, ...] = ("prose", "code")

_HELD_OUT_PER_MILLE: dict[Split, int] = {"test": 50, "validation": 50}
_MIN_SHARED_CHARS = 40
_MAX_SOURCE_BYTES = 400_000
# Tables and generated text, not prose or code; tests; and vendored or vanished packages that differ between builds.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data", "_pyrepl"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata",)


@dataclass(frozen=True)
class Document:
    """One text, its domain, and its module, which decides the split."""

    module: str
    domain: Domain
    text: str


@dataclass(frozen=True)
class PythonDocs:
    """The whole data set: documents by split, interpreter's version, the text's SHA-256."""

    documents: dict[Split, tuple[Document, ...]]
    version: str
    digest: str


def read_python_docs() -> PythonDocs:
    """Read the data set from the running interpreter; takes about three seconds.

    Raises:
        UpcycleError: the interpreter comes without the standard library's source or without `pydoc_data`.
    """
    documents = [*_topics(), *_builtin_docs(), *_library()]
    by_split: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    for document in sorted(documents, key=lambda d: (d.module, d.domain)):
        by_split[split_of(document.module)].append(document)
    for split, texts in by_split.items():
        if not texts:
            raise UpcycleError(_no_text(split))
    held_out: set[str] = set()
    for split in ("test", "validation", "train"):
        by_split[split] = [d for d in (_without(d, held_out) for d in by_split[split]) if d.text.strip()]
        if split != "train":
            held_out |= {key for d in by_split[split] for key in map(_paragraph_key, _paragraphs(d.text)) if key}
    digest = hashlib.sha256()
    for split in SPLITS:
        for document in by_split[split]:
            digest.update(f"{split}\0{document.module}\0{document.domain}\0{document.text}\0".encode())
    return PythonDocs({s: tuple(d) for s, d in by_split.items()}, platform.python_version(), digest.hexdigest())


def read_sample() -> str:
    """A document of the data set, found at once.

    Raises:
        UpcycleError: as `read_python_docs`.
    """
    sample = next(_topics(), None)
    if sample is None or not (Path(sysconfig.get_paths()["stdlib"]) / "os.py").is_file():
        raise UpcycleError(_no_text("any"))
    return sample.text


def _no_text(split: str) -> str:
    return (
        f"data 'python-docs': this interpreter ({sys.executable}) gives no text for the {split} split; "
        "it must come with the standard library's source and pydoc_data; use a full CPython, or data of kind 'text'"
    )


def split_of(module: str) -> Split:
    """The split of a dotted module name, by hash.

    SHA-256 of the name modulo 1000: the first 50 are test, the next 50 validation.
    """
    number = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") % 1000
    for split, share in _HELD_OUT_PER_MILLE.items():
        if number < share:
            return split
        number -= share
    return "train"


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text)


def _paragraph_key(paragraph: str) -> str:
    """What makes two paragraphs the same text.

    The words, without white space and comment signs; empty where too short to matter.
    """
    key = " ".join(paragraph.replace("#", " ").split()).casefold()
    return key if len(key) >= _MIN_SHARED_CHARS else ""


def _without(document: Document, held_out: set[str]) -> Document:
    kept = [p for p in _paragraphs(document.text) if _paragraph_key(p) not in held_out]
    return Document(document.module, document.domain, "\n\n".join(kept))


def _topics() -> Iterator[Document]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in topics.items():
        yield Document(f"pydoc_data.topics.{name}", "prose", text.strip() + "\n")


def _builtin_docs() -> Iterator[Document]:
    """Docstrings of modules compiled into the interpreter.

    Importing them runs no Python code.
    """
    for name in sorted(set(sys.builtin_module_names)):
        module = importlib.import_module(name)
        parts = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
        for attribute in sorted(vars(module)):
            # Of a hook the interpreter's own (`sys.__excepthook__`), not what a debugger, pytest or rich has put in its
            # place.
            value = vars(module).get(f"__{attribute}__") or getattr(module, attribute, None)
            if attribute.startswith("_") or not callable(value):
                continue
            parts.append(_entry(attribute, inspect.getdoc(value)))
            if inspect.isclass(value):
                own = ((m, inspect.getdoc(v)) for m, v in sorted(vars(value).items()) if not m.startswith("_"))
                parts += [_entry(f"{attribute}.{member}", doc) for member, doc in own]
        text = "\n\n".join(p for p in dict.fromkeys(parts) if p)
        if len(text) > 200:
            yield Document(name, "prose", text + "\n")


def _entry(name: str, doc: str | None) -> str:
    if not doc or len(doc) < 20:
        return ""
    return f"{name}\n" + "\n".join("    " + line if line else "" for line in doc.splitlines())


def _library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if (
            _SKIPPED_FOLDERS & set(relative.parts)
            or relative.name.startswith(_SKIPPED_PREFIXES)
            or path.stat().st_size > _MAX_SOURCE_BYTES
        ):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # a few files of the library are not UTF-8, or templates
            continue
        yield Document(module, "code", source.strip() + "\n")
        parts = [_entry(name, doc) for name, doc in _docstrings(tree, module)]
        text = "\n\n".join(p for p in parts if p)
        if len(text) > 200:
            yield Document(module, "prose", text + "\n")


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str | None]]:
    """Names, signatures and docstrings in source order, as `help()` shows them."""
    yield module, ast.get_docstring(tree)
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        prefix, node = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield f"class {prefix}{child.name}", ast.get_docstring(child)
                stack.append((f"{prefix}{child.name}.", child))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}({ast.unparse(child.args)})", ast.get_docstring(child)
