"""Every row of a package's weights against the twin's, by value.

Names of tensors do not matter. Rows are recognized by what they hold, not by names: so a package of any exporter is
judged, whatever it calls its matrices, in whatever order it has laid their rows, and whether it has packed them, turned
them or put several below each other. A row of K numbers is told from others by its products with two fixed random
vectors, and its length; two rows that differ anywhere differ there, but for an accident of one in many millions.

Each row of the twin must be in the file, and the file must have no row besides, but for rows of zeros, which only fill
a block. Where a row of the one and a row of the other are left over, they belong together by what they have in common,
and the message says how they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import cKDTree

from dense2moe.export.parity.records import WeightsCheck, WrongRows
from dense2moe.export.parity.weights.differences import (
    BY_TOKEN,
    MOST_TOLD,
    compare_rows,
    describe_rows,
    name_tensor,
    read_scaled,
)
from dense2moe.export.parity.weights.matrix import Constants, FloatArray, GraphMatrix
from dense2moe.export.parity.weights.row_keys import RowKeys
from dense2moe.export.parity.weights.settings import as_stored, check_epsilons, check_input_scales
from dense2moe.export.parity.weights.turned import read_pieces, squeeze, turn
from dense2moe.export.quantization.parameters import find_transposed, find_unread, norms_add_one
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.checkpoints.tensors import TensorEntry

_TOLERANCE = 1e-5
"""Of a row's length.

What its products with such vectors may differ by in float32, 39 numbers of which round to 2e-6 each at most (K =
1,536).
"""
_MOST_EXPERTS = 1024
"""Of matrices with more rows than this none is a stack of experts' biases."""
_NO_KEY = 1e30  # of a row that is not all numbers: no other is as long
_WEIGHTS_ALONE = ("MatMulNBits", "MoE", "QMoE", "GatherBlockQuantized")
"""Operators that multiply by nothing but a model's weights, where others may have constants of the graph's own."""


@dataclass(frozen=True)
class FoundWeights:
    """The weights check, and the graph's matrices for each tensor.

    By tensor of the twin: the graph's matrices that hold rows of the tensor. `rounded`: see `Constants`.
    """

    check: WeightsCheck
    operators: dict[str, tuple[GraphMatrix, ...]] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()


def check_weights(constants: Constants, twin: Path) -> FoundWeights:
    """Compare a file's constants with a checkpoint."""
    checkpoint = open_checkpoint(twin)
    # What belongs to an expert without neurons, as its gate does, computes nothing, and no graph needs it.
    empty = tuple(name.rsplit(".", 2)[0] for name, entry in checkpoint.entries.items() if not entry.num_elements)
    transposed = find_transposed(checkpoint.config)
    is_unread = find_unread(checkpoint.config)
    entries = {
        name: turn(entry) if name in transposed else replace(entry, shape=squeeze(entry.shape))
        for name, entry in checkpoint.entries.items()
        if entry.num_elements and not (empty and name.startswith(empty))
    }
    matrices = {
        name: entry
        for name, entry in entries.items()
        if len(entry.shape) > 1 and min(entry.shape[-2:]) > 1 and not _is_stacked_bias(name, entry)
    }
    vectors = {name: entry for name, entry in entries.items() if name not in matrices}
    held = _HeldVectors(constants)
    for name in [name for name in entries if is_unread(name) and not _is_held(entries[name], constants, held)]:
        matrices.pop(name, None)
        vectors.pop(name, None)
    by_width: dict[int, list[GraphMatrix]] = {}
    widths = {entry.shape[-1] for entry in matrices.values()}
    for matrix in (_without_padding(matrix, widths) for matrix in constants.matrices):
        by_width.setdefault(matrix.shape[1], []).append(matrix)
    operators: dict[str, list[GraphMatrix]] = {}
    wrong: list[WrongRows] = []
    not_judged: list[str] = []
    num_wrong = num_rows = 0
    for width in sorted(widths):
        looked_for = {name: entry for name, entry in matrices.items() if entry.shape[-1] == width}
        found, count = _match(looked_for, by_width.get(width, []), width, operators)
        if constants.unread and count:  # integers that nobody is known to read may be these
            lost = [name for name in looked_for if name not in operators]
            not_judged += lost
            if all(wrong_rows.name in lost for wrong_rows in found):
                found, count = [], 0
        wrong += found
        num_wrong += count
        num_rows += sum(math.prod(entry.shape[:-1]) for entry in looked_for.values())
    others = [
        *_check_vectors(checkpoint, vectors, held),
        *check_epsilons(constants, checkpoint),
        *check_input_scales(operators, checkpoint, twin),
    ]
    wrong += others
    num_wrong += len(others)
    check = WeightsCheck(num_rows, len(vectors), num_wrong, tuple(wrong[:MOST_TOLD]), tuple(not_judged))
    return FoundWeights(check, {name: tuple(found) for name, found in operators.items()}, constants.rounded)


def _is_held(entry: TensorEntry, constants: Constants, held: _HeldVectors) -> bool:
    """Whether a file has a vector, or a matrix's first row."""
    first = next(read_pieces(entry, 0, 1 if len(entry.shape) > 1 else None)).to(torch.float32).numpy().reshape(-1)
    if len(entry.shape) < 2 or min(entry.shape) == 1:
        return held.has(first, 0, 1)
    same = (matrix for matrix in constants.matrices if matrix.shape[1] == len(first))
    return any(np.isclose(matrix.read(), first, rtol=1e-5, atol=1e-12).all(1).any() for matrix in same)


def _without_padding(matrix: GraphMatrix, widths: set[int]) -> GraphMatrix:
    """A matrix without padding columns, if the twin has that width."""
    rows, width = matrix.shape
    own = max((each for each in widths if width - matrix.operator.block_size < each < width), default=None)
    if width in widths or own is None or not matrix.operator.block_size:
        return matrix
    return replace(matrix, shape=(rows, own), read=partial(_cut, matrix.read, own))


def _cut(read: Callable[[], FloatArray], width: int) -> FloatArray:
    """A matrix's first columns; NaN where the cut columns are not zero."""
    whole = read()
    return (
        np.ascontiguousarray(whole[:, :width])
        if not whole[:, width:].any()
        else np.full((len(whole), width), np.nan, np.float32)
    )


def _draw_vectors(width: int) -> torch.Tensor:
    """Two vectors [2, K] with all entries different, so that order counts."""
    return torch.randn(2, width, generator=torch.Generator().manual_seed(width))


def _key(rows: torch.Tensor, vectors: torch.Tensor) -> npt.NDArray[np.float32]:
    """Each row's key, float32 [N, 3], from rows [N, K].

    A key is the products with two fixed vectors, and the row's length.

    Of rows that are not all numbers all three are one number.
    """
    lengths = rows.norm(dim=-1)
    good = lengths.isfinite()
    products = [torch.where(good, rows @ vector, _NO_KEY) for vector in vectors]
    return torch.stack([*products, torch.where(good, lengths, _NO_KEY)], -1).numpy()


def _match(
    entries: dict[str, TensorEntry],
    matrices: Sequence[GraphMatrix],
    width: int,
    operators: dict[str, list[GraphMatrix]],
) -> tuple[list[WrongRows], int]:
    """Match tensors' rows with matrices' rows of one width."""
    vectors = _draw_vectors(width)
    narrow = {matrix.narrow for matrix in matrices}
    theirs: dict[torch.dtype | None, RowKeys] = {kind: RowKeys() for kind in narrow | {None}}
    for name, entry in entries.items():
        for chunk in read_pieces(entry):
            rows = chunk.to(torch.float32).reshape(-1, width)
            for kind, known in theirs.items():
                known.add(name, _key(rows if kind is None else rows.to(kind).to(torch.float32), vectors))
    trees = {kind: (cKDTree(known.joined()), known) for kind, known in theirs.items()}
    ours: dict[torch.dtype | None, list[npt.NDArray[np.float32]]] = {}
    some = theirs[None]
    names = some.owners
    surplus: list[tuple[GraphMatrix, int]] = []
    strange: list[GraphMatrix] = []
    zeros: set[str] = set()
    shapes = {entry.shape[-2:] for entry in entries.values()}
    for matrix in matrices:
        tree, known = trees[matrix.narrow]
        keys = _key(torch.from_numpy(matrix.read()), vectors)
        places, good = _look_up(keys, tree)
        scaled = None
        if matrix.input_factors is not None and good.mean() < 0.5:
            scaled = _key(torch.from_numpy(read_scaled(matrix)), vectors)
            again = _look_up(scaled, tree)
            if again[1].mean() > good.mean():
                keys, (places, good) = scaled, again
            else:
                scaled = None
        taken = matrix if scaled is not None else replace(matrix, input_factors=None)
        ours.setdefault(matrix.narrow, []).append(keys)
        lengths = keys[:, 2]
        owners, _ = known.locate(places[good])
        if good.mean() >= 0.5:
            for owner in np.unique(owners):
                operators.setdefault(names[owner], []).append(taken)
        elif matrix.use == "stored":
            continue
        # it is no matrix of the twin: a rotary table, a constant of the graph's own, or one that is wrong throughout
        if good.mean() < 0.5:
            strange.append(taken)
            if lengths.any() and (
                matrix.operator.op in _WEIGHTS_ALONE or (matrix.use == "product" and matrix.shape in shapes)
            ):
                # The rows may be right elsewhere, as in another branch, or in the table of a tied head.
                surplus += [(taken, int(row)) for row in np.nonzero(~good)[0]]
        else:
            zeros |= {names[owner] for owner in np.unique(owners)} if (lengths == 0).any() else set()
            surplus += [(taken, int(row)) for row in np.nonzero(~good & (lengths != 0))[0]]
            surplus += _misplaced(taken, places, good, known)
    is_found = np.zeros(some.total, bool)
    for kind, found in ours.items():
        is_found |= _look_up(theirs[kind].joined(), cKDTree(np.concatenate(found)))[1]
    missing = np.nonzero(~is_found)[0]
    if not len(missing) and not surplus:
        return [], 0
    return describe_rows(entries, some, missing, surplus, strange, zeros)


def _look_up(keys: npt.NDArray[np.float32], tree: cKDTree) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The nearest row in a tree, and whether it is equal."""
    distances, places = tree.query(keys)
    return places, distances <= _TOLERANCE * np.maximum(keys[:, 2], 1e-20)


def _misplaced(
    matrix: GraphMatrix, places: npt.NDArray[np.int64], good: npt.NDArray[np.bool_], known: RowKeys
) -> list[tuple[GraphMatrix, int]]:
    """Rows of a table or head that belong to another token."""
    owners, rows = known.locate(places)
    is_head = matrix.use == "product" and all(known.owners[owner] in BY_TOKEN for owner in np.unique(owners[good]))
    if matrix.use != "table" and not is_head:
        return []
    keys = known.joined()
    lengths = keys[:, 2]
    place_of_own = places - rows + np.arange(len(rows))
    inside = place_of_own < len(keys)
    same = np.zeros(len(rows), bool)
    difference = np.abs(keys[place_of_own[inside]] - keys[places[inside]]).max(-1)
    same[inside] = difference <= _TOLERANCE * np.maximum(lengths[places[inside]], 1e-20)
    return [(matrix, int(row)) for row in np.nonzero(good & ~same)[0]]


def _check_vectors(checkpoint: Checkpoint, vectors: dict[str, TensorEntry], held: _HeldVectors) -> Iterator[WrongRows]:
    """Norms, biases and other vectors that the file lacks.

    Each must be in the file, or inside a longer vector; that of an expert may be a row of stacked ones.
    """
    adds_one = norms_add_one(checkpoint.config)
    for name, entry in vectors.items():
        whole = checkpoint.read(name).to(torch.float32).numpy()
        if adds_one and "norm" in name and held.has(1 + whole, 0, 1):  # a traced graph may have folded the sum
            continue
        count = len(whole) if _is_stacked_bias(name, entry) else 1
        for number, true in enumerate(whole.reshape(count, -1)):
            if held.has(true, number, count):
                continue
            tensor, *_ = name_tensor(name, entry, 0)
            nearest = held.find_nearest(true)
            what = (
                "no vector of the file equals the twin's"
                if nearest is None
                else compare_rows(nearest, true).replace("column", "element")
            )
            where = tensor if count == 1 else f"{tensor} of expert {number}"
            yield WrongRows(where, 0, 1, 1, what.replace("row", "vector"))


class _HeldVectors:
    """A file's vectors by size, and its matrices that no product reads."""

    def __init__(self, constants: Constants) -> None:
        columns = [matrix.read().reshape(-1) for matrix in constants.matrices if 1 in matrix.shape]
        self._vectors: dict[int, list[FloatArray]] = {}
        for values in constants.vectors:
            self._vectors.setdefault(len(values), []).append(values)
        self._columns: dict[int, list[FloatArray]] = {}
        for values in columns:
            self._columns.setdefault(len(values), []).append(values)
        stored = [matrix for matrix in constants.matrices if matrix.use == "stored" and not matrix.part]
        stacks = [
            *constants.expert_biases,
            *(matrix.read() for matrix in stored if matrix.shape[0] < _MOST_EXPERTS),
        ]
        self._rows = [row for stack in stacks for row in stack]
        self._places = np.array([(number, len(stack)) for stack in stacks for number in range(len(stack))]).reshape(
            -1, 2
        )
        self._starts = np.array([(row[0], row[1 % len(row)]) for row in self._rows], np.float32).reshape(-1, 2)

    def has(self, true: FloatArray, number: int, count: int) -> bool:
        """Whether a vector is in the file, the `number`-th of `count`."""
        kinds = as_stored(true)
        return (
            any(np.allclose(each, kind, rtol=1e-6, atol=0) for each in self._of_size(len(true)) for kind in kinds)
            or _is_inside(kinds, self._vectors, len(true))
            or any(_is_in(each, kind) for kind in kinds for each in self._rows_that_start(kind, number, count))
        )

    def _rows_that_start(self, true: FloatArray, number: int, count: int) -> Iterator[FloatArray]:
        """Rows with a vector's first number in front or next.

        Of stacks of `count` rows, the `number`-th ones.
        """
        fits = np.isclose(self._starts, true[0], rtol=1e-6, atol=0).any(1)
        if count > 1:
            fits &= (self._places == (number, count)).all(1)
        return (self._rows[place] for place in np.nonzero(fits)[0])

    def find_nearest(self, true: FloatArray) -> FloatArray | None:
        """The vector of the file, of the same size, that differs least."""
        return min(self._of_size(len(true)), key=lambda each: float(np.abs(each - true).sum()), default=None)

    def _of_size(self, size: int) -> list[FloatArray]:
        return [*self._vectors.get(size, []), *self._columns.get(size, [])]


def _is_stacked_bias(name: str, entry: TensorEntry) -> bool:
    """Whether a tensor has the biases of all experts, stacked."""
    return name.endswith("bias") and len(entry.shape) == 2 and entry.shape[0] > 1


def _is_in(row: FloatArray, true: FloatArray) -> bool:
    """Whether a row has a vector, maybe in turns with another.

    Or its halves in turns; behind it are zeros.
    """
    turns = () if len(true) % 2 else ((row, true.reshape(2, -1).T.reshape(-1)),)
    return any(
        np.allclose(own[: len(each)], each, rtol=1e-6, atol=0) and not own[len(each) :].any()
        for own, each in ((row, true), (row[0::2], true), (row[1::2], true), *turns)
        if len(own) >= len(each)
    )


def _is_inside(kinds: Sequence[FloatArray], by_size: dict[int, list[FloatArray]], size: int) -> bool:
    """Whether a vector is part of a longer one, as fused biases."""
    for length, found in by_size.items():
        if length <= size:
            continue
        for values in found:
            for true in kinds:
                for start in np.nonzero(np.isclose(values[: length - size + 1], true[0], rtol=1e-6, atol=0))[0]:
                    if np.allclose(values[start : start + size], true, rtol=1e-6, atol=0):
                        return True
    return False
