"""Faults to plant in packages without a cache: what parity must name of encoders and models of images.

As those of decoders (`tests.faults.planted`), they know no names of nodes: rows are found by their values in the twin,
masks and token types by the interface.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper

from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.runtime.single_pass import SinglePass
from dense2moe.export.storage import find_graph
from tests.faults.graphs import Graph
from tests.faults.stores import Array, Inexpressible

LEAST_EFFECT = 1e-4
"""Relative to the largest number of an output or a layer: a package in which a fault is planted differs by more."""


@dataclass(frozen=True)
class PassFault:
    """A fault in words, how it is planted, and what the first breach has in it."""

    words: str
    plant: Callable[[Graph], None]
    place: str

    def is_named(self, breaches: tuple[str, ...]) -> bool:
        """Whether the first breach, `tier: message`, names the place."""
        return bool(breaches) and re.search(self.place, breaches[0]) is not None


def _read(g: Graph, pattern: str) -> Array:
    """The one tensor of the twin with such a name."""
    found = fnmatch.filter(g.checkpoint.entries, pattern)
    if len(found) != 1:
        raise Inexpressible(f"the twin has {len(found)} tensors {pattern}")
    return g.checkpoint.read(found[0]).to(torch.float32).numpy()


def _head(g: Graph) -> Array:
    names = ("classifier.weight", "qa_outputs.weight", "classifier.out_proj.weight")
    return _read(g, next((name for name in names if name in g.checkpoint.entries), names[0]))


def take_other_pooler_weights(g: Graph) -> None:
    for rows in g.find(_read(g, "pooler.dense.weight")):
        rows.scale(0.9)


def take_other_head_weights(g: Graph) -> None:
    for rows in g.find(_head(g)):
        rows.scale(0.9)


def exchange_two_labels(g: Graph) -> None:
    """Rows of the head: every row of it is in the file."""
    for rows in g.find(_head(g)):
        rows.some([0]).exchange(rows.some([1]))


def _expert(g: Graph, number: int) -> Array:
    return _read(g, f"*.{g.at.layer}.*experts.down_proj")[number]


def zero_a_row(g: Graph) -> None:
    for rows in g.find(_expert(g, g.at.expert)):
        rows.some([5]).scale(0.0)


def swap_two_experts(g: Graph) -> None:
    for first, second in zip(g.find(_expert(g, 0)), g.find(_expert(g, 1)), strict=True):
        first.exchange(second)


def _has(g: Graph, name: str) -> None:
    if not any(value.name == name for value in g.main.input):
        raise Inexpressible(f"the graph reads no {name}")


def take_the_mask_from_the_wrong_side(g: Graph) -> None:
    _has(g, "attention_mask")
    axis, step, begin, end = (
        g.constant(np.array([number], np.int64)) for number in (1, -1, np.iinfo(np.int64).max, np.iinfo(np.int64).min)
    )
    g.alter("attention_mask", lambda value, out: [helper.make_node("Slice", [value, begin, end, axis, step], [out])])


def read_padding(g: Graph) -> None:
    _has(g, "attention_mask")
    one = g.constant(np.array(1, np.int64))
    g.alter("attention_mask", lambda value, out: [helper.make_node("Max", [value, one], [out])])


def ignore_token_types(g: Graph) -> None:
    _has(g, "token_type_ids")
    zero = g.constant(np.array(0, np.int64))
    g.alter("token_type_ids", lambda value, out: [helper.make_node("Mul", [value, zero], [out])])


_MASK = r"(layer|outputs|rows): .*padded: .*look at the mask"
_ALL = (
    PassFault("a pooler of other weights", take_other_pooler_weights, r"weights: pooler"),
    PassFault("a head of other weights", take_other_head_weights, r"weights: (classifier|qa_outputs|out_proj)"),
    PassFault("two labels exchanged", exchange_two_labels, r"outputs: (start_)?logits on the graph's own input"),
    PassFault("a row of zeros in an expert", zero_a_row, r"weights: layer 1, expert 2, down_proj, row 5"),
    PassFault("two experts swapped", swap_two_experts, r"layer: layer 1\b"),
    PassFault("the mask from the wrong side", take_the_mask_from_the_wrong_side, _MASK),
    PassFault("padding not masked", read_padding, _MASK),
    PassFault("token types ignored", ignore_token_types, r"layer: the embeddings"),
)
PASS_FAULTS: dict[str, PassFault] = {fault.words: fault for fault in _ALL}


def plant_pass_fault(package: Path, twin: Path, target: Path, fault: PassFault) -> Path:
    """A copy of a package with the fault, whose outputs are others.

    Raises:
        Inexpressible: the graph cannot have it.
    """
    shutil.copytree(package, target, ignore=shutil.ignore_patterns("*.onnx_data"))
    proto = onnx.load(find_graph(package))
    fault.plant(Graph(proto, twin))
    onnx.save(proto, find_graph(target))
    effect = _measure(package, target)
    assert effect > LEAST_EFFECT, f"'{fault.words}' changes nothing: {effect:.1e}"
    return target


def _measure(right: Path, wrong: Path) -> float:
    """The largest relative difference of any output or layer; the second of two rows is padded."""
    packages = [SinglePass(path, inspection=Inspection(streams=True)) for path in (right, wrong)]
    given = packages[0].draw_inputs(2, 16, torch.Generator().manual_seed(0))
    if "attention_mask" in given:
        given["attention_mask"][1, 6:] = 0
    if "token_type_ids" in given:
        given["token_type_ids"][:, 8:] = 1
    first, second = (package.run(given) for package in packages)
    return max(float((first[name] - second[name]).abs().max() / first[name].abs().max()) for name in first)
