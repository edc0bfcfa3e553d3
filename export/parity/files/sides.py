"""The two sides of a comparison: a package, and its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig

from dense2moe.export.names import is_past
from dense2moe.export.opening import open_graphs
from dense2moe.export.parity.precision import has_experts, is_dense
from dense2moe.export.parity.records import FilesCheck
from dense2moe.export.storage import LOWERING_KEY

SHARING_OPERATORS = ("GroupQueryAttention", "PagedAttention")
"""Operators that write the present into the buffer of the past."""

_REASON = 200  # characters of a library's complaint
_T = TypeVar("_T")


@dataclass(frozen=True)
class Failure:
    """Why a file could not be read, in one line."""

    reason: str


@dataclass(frozen=True)
class GraphSide:
    """The graph's side: whether we wrote it, its inputs' and outputs' names.

    And whether past and present can share a buffer. `head_size`: of the keys and values in it, where the graph says it.
    """

    is_ours: bool
    has_experts: bool
    names: Mapping[str, Collection[str]]
    can_share: bool
    head_size: int | None = None


@dataclass(frozen=True)
class Sides:
    """The package, the checkpoint, and what their comparisons share.

    None where it is not there or cannot be read.
    """

    package: Path
    twin: Path
    config: Any
    tokenizer: Any
    graph: GraphSide | None

    @property
    def is_ours(self) -> bool:
        """Whether we wrote the package, so that nothing may be missing."""
        return self.graph is not None and self.graph.is_ours

    @property
    def is_parent(self) -> bool:
        """Whether the checkpoint is dense and the package a mixture.

        One architecture has the other's sizes.
        """
        return self.graph is not None and self.graph.has_experts and self.config is not None and is_dense(self.config)


def attempt(call: Callable[..., _T], *arguments: Any) -> _T | Failure:
    """A library's result or its error; a Rust panic is an error."""
    try:
        return call(*arguments)
    except BaseException as error:
        if isinstance(error, MemoryError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        text = (
            str(error)
            if isinstance(error, ValueError | OSError) or type(error) is Exception
            else f"{type(error).__name__}: {error}"
        )
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
        return Failure(line if len(line) <= _REASON else f"{line[:_REASON]}…")


def or_none(found: _T | Failure) -> _T | None:
    """The result, or None in place of an error."""
    return None if isinstance(found, Failure) else found


def load_config(directory: Path) -> Any:
    """The config of a checkpoint's decoder.

    Also of a model of text and images.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def read_graph(package: Path) -> GraphSide:
    """A package's graph: its maker, names and operators."""
    model = open_graphs(package)[-1].model  # a decoder, where there are several
    weights = {tensor.name for tensor in model.graph.initializer}
    can_share = any(node.op_type in SHARING_OPERATORS for node in model.graph.node)
    shapes = [value.type.tensor_type.shape.dim for value in model.graph.input if is_past(value.name)]
    sizes = {shape[-1].dim_value for shape in shapes if shape}
    return GraphSide(
        is_ours=any(entry.key == LOWERING_KEY for entry in model.metadata_props),
        has_experts=has_experts(model),
        names={
            "inputs": {value.name for value in model.graph.input} - weights,
            "outputs": {value.name for value in model.graph.output},
        },
        can_share=can_share,
        head_size=next(iter(sizes)) or None if can_share and len(sizes) == 1 else None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


def read_sides(sides: Sides, name: str) -> tuple[dict[str, Any], dict[str, Any]] | FilesCheck:
    """A JSON file of package and checkpoint, or the failed check."""
    found, expected = (attempt(read_json, directory / name) for directory in (sides.package, sides.twin))
    if isinstance(found, Failure) or isinstance(expected, Failure):
        pairs = (("package", found), ("checkpoint", expected))
        return FilesCheck(
            (name,), (), tuple(tell_damage(name, whose, each) for whose, each in pairs if isinstance(each, Failure))
        )
    return found, expected


def tell_damage(name: str, whose: str, failure: Failure) -> str:
    """The sentence that a file cannot be read."""
    return f"{name}: the {whose}'s cannot be read ({failure.reason}); it must be a JSON object"


def tell_missing(name: str, in_package: bool, in_twin: bool, is_required: bool) -> FilesCheck:
    """The result for a file that is not on both sides."""
    where = (
        "not in the checkpoint"
        if in_package
        else "not in the package"
        if in_twin
        else "neither in the package nor in the checkpoint"
    )
    wrong = (f"{name}: is not in the package; must be the checkpoint's; copy it",) if is_required and in_twin else ()
    return FilesCheck((), (f"{name}: {where}",), wrong)
