"""The `python-docs` data set, read from the running interpreter.

English reference prose and Python code that every machine with Python already has: the help topics of `pydoc_data`, the
docstrings of the standard library and of the compiled built-in modules, and the standard library's source. Nothing is
downloaded and nothing is stored in this repository; another interpreter version gives another text, so users record
`PythonDocs.version` and `PythonDocs.digest`.

Held-out text is never trained on: see `held_out`. A module's docstrings and its source stay together.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dense2moe.upcycle.data.held_out import SPLITS, Document, Split, digest_documents, divide
from dense2moe.upcycle.errors import UpcycleError

Domain = Literal["prose", "code"]

DOMAINS: tuple[Domain, ...] = ("prose", "code")

_MAX_SOURCE_BYTES = 400_000
# Tables and generated text, not prose or code; tests; and vendored or vanished packages that differ between builds.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data", "_pyrepl"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata",)


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
    by_split = divide(documents)
    for split in SPLITS:
        if not by_split[split]:
            raise UpcycleError(_no_text(split))
    return PythonDocs(by_split, platform.python_version(), digest_documents(by_split))


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
