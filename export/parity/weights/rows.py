"""Every weight of a package beside the twin's: each expert, each row, also those that no text visits.

Rows are recognized by what they hold, not by names: so a package of any exporter is judged, whatever it calls its
matrices, in whatever order it has laid their rows, and whether it has packed them, turned them or put several below
each other. A row of K numbers is told from others by its products with two fixed random vectors, and its length; two
rows that differ anywhere differ there, but for an accident of one in many millions.

Each row of the twin must be in the file, and the file must have no row besides, but for rows of zeros, which only fill
a block. Where a row of the one and a row of the other are left over, they belong together by what they have in common,
and the message says how they differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import cKDTree

from dense2moe.export.parity.records import WeightsCheck, WrongRows
from dense2moe.export.parity.weights.constants import Constants, Floats, Matrix
from dense2moe.upcycle.checkpoints.reader import Checkpoint, TensorEntry, open_checkpoint, read_chunks, read_tensor

_TOLERANCE = 1e-5
"""Of a row's length.

What its products with such vectors may differ by in float32, 39 numbers of which round to 2e-6 each at most (K =
1,536).
"""
_NO_KEY = 1e30  # of a row that is not all numbers: no other is as long
_MOST_PAIRS = 2048
_MOST_TOLD = 5
_SAME = 1e-4  # of the largest difference of two rows: columns that differ by less are told as equal
_STRAIGHT = 1e-2  # of a row's part: what is left of it beside a multiple, where it is one
_LIKE = 1.001  # of a row's own size: a row of zeros differs by as much
_MOST_STRANGE = 16
_BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
_WEIGHTS_ALONE = ("MatMulNBits", "MoE", "QMoE", "GatherBlockQuantized")
"""Operators that multiply by nothing but a model's weights, where others may have constants of the graph's own."""
_WITHOUT = "no row of the file is the twin's"
_WORDS = {
    "embed_tokens": "the embedding",
    "lm_head": "the head",
    "gate": "router",
    "layer": "router",
    "norm": "the final norm",
}


@dataclass(frozen=True)
class Found:
    """What a file was found to hold: the check, and by tensor of the twin the matrices that multiply by rows of it."""

    check: WeightsCheck
    operators: dict[str, tuple[Matrix, ...]] = field(default_factory=dict)


@dataclass
class _Rows:
    """Rows of one width from many matrices: their keys [rows, 3], and where each matrix begins."""

    owners: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    keys: list[npt.NDArray[np.float32]] = field(default_factory=list)
    total: int = 0

    def add(self, owner: str, keys: npt.NDArray[np.float32]) -> None:
        if not self.owners or self.owners[-1] != owner:
            self.owners.append(owner)
            self.starts.append(self.total)
        self.keys.append(keys)
        self.total += len(keys)

    def joined(self) -> npt.NDArray[np.float32]:
        if len(self.keys) > 1:
            self.keys = [np.concatenate(self.keys)]
        return self.keys[0]

    def locate(self, places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """By place, the number of its owner and the row in it."""
        owner = np.searchsorted(self.starts, places, side="right") - 1
        return owner, places - np.asarray(self.starts)[owner]


def check_weights(constants: Constants, twin: Path) -> Found:
    """Compare a file's constants with a checkpoint."""
    checkpoint = open_checkpoint(twin)
    # What belongs to an expert without neurons, as its gate does, computes nothing, and no graph needs it.
    empty = tuple(name.rsplit(".", 2)[0] for name, entry in checkpoint.entries.items() if not entry.num_elements)
    entries = {
        name: entry
        for name, entry in checkpoint.entries.items()
        if entry.num_elements and not (empty and name.startswith(empty))
    }
    matrices = {name: entry for name, entry in entries.items() if len(entry.shape) > 1 and min(entry.shape[-2:]) > 1}
    vectors = {name: entry for name, entry in entries.items() if name not in matrices}
    by_width: dict[int, list[Matrix]] = {}
    widths = {entry.shape[-1] for entry in matrices.values()}
    for matrix in (_without_padding(matrix, widths) for matrix in constants.matrices):
        by_width.setdefault(matrix.shape[1], []).append(matrix)
    operators: dict[str, list[Matrix]] = {}
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
    for line in _check_vectors(checkpoint, vectors, constants):
        wrong.append(line)
        num_wrong += 1
    check = WeightsCheck(num_rows, len(vectors), num_wrong, tuple(wrong[:_MOST_TOLD]), tuple(not_judged))
    return Found(check, {name: tuple(found) for name, found in operators.items()})


def _without_padding(matrix: Matrix, widths: set[int]) -> Matrix:
    """A matrix without the columns of zeros that fill its last block, where it is as wide as one of the twin's then."""
    rows, width = matrix.shape
    own = max((each for each in widths if width - matrix.operator.block_size < each < width), default=None)
    if width in widths or own is None or not matrix.operator.block_size:
        return matrix
    return replace(matrix, shape=(rows, own), read=partial(_cut, matrix.read, own))


def _cut(read: Callable[[], Floats], width: int) -> Floats:
    """The first columns of a matrix; all of them where those behind are no zeros, which no row of the twin is then."""
    whole = read()
    return (
        np.ascontiguousarray(whole[:, :width])
        if not whole[:, width:].any()
        else np.full((len(whole), width), np.nan, np.float32)
    )


def _draw_vectors(width: int) -> torch.Tensor:
    """Two vectors [2, K] no two entries of which are alike, so that a row with two entries exchanged is another."""
    return torch.randn(2, width, generator=torch.Generator().manual_seed(width))


def _key(rows: torch.Tensor, vectors: torch.Tensor) -> npt.NDArray[np.float32]:
    """Of each row [N, K] its products with two vectors, and its length; float32 [N, 3].

    Of rows that are not all numbers all three are one number.
    """
    lengths = rows.norm(dim=-1)
    good = lengths.isfinite()
    products = [torch.where(good, rows @ vector, _NO_KEY) for vector in vectors]
    return torch.stack([*products, torch.where(good, lengths, _NO_KEY)], -1).numpy()


def _match(
    entries: dict[str, TensorEntry], matrices: Sequence[Matrix], width: int, operators: dict[str, list[Matrix]]
) -> tuple[list[WrongRows], int]:
    """The rows of all tensors of one width against those of all matrices of it."""
    vectors = _draw_vectors(width)
    narrow = {matrix.narrow for matrix in matrices}
    theirs: dict[torch.dtype | None, _Rows] = {kind: _Rows() for kind in narrow | {None}}
    for name, entry in entries.items():
        for chunk in read_chunks(entry):
            rows = chunk.to(torch.float32).reshape(-1, width)
            for kind, known in theirs.items():
                known.add(name, _key(rows if kind is None else rows.to(kind).to(torch.float32), vectors))
    trees = {kind: (cKDTree(known.joined()), known) for kind, known in theirs.items()}
    ours: dict[torch.dtype | None, list[npt.NDArray[np.float32]]] = {}
    some = theirs[None]
    names = some.owners
    surplus: list[tuple[Matrix, int]] = []
    strange: list[Matrix] = []
    zeros: set[str] = set()
    shapes = {entry.shape[-2:] for entry in entries.values()}
    for matrix in matrices:
        tree, known = trees[matrix.narrow]
        keys = _key(torch.from_numpy(matrix.read()), vectors)
        places, good = _look_up(keys, tree)
        scaled = None
        if matrix.input_factors is not None and good.mean() < 0.5:
            scaled = _key(torch.from_numpy(_read(matrix)), vectors)
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
    return _describe(entries, some, missing, surplus, strange, zeros)


def _look_up(keys: npt.NDArray[np.float32], tree: cKDTree) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The nearest of the rows in a tree, and whether it is the same."""
    distances, places = tree.query(keys)
    return places, distances <= _TOLERANCE * np.maximum(keys[:, 2], 1e-20)


def _misplaced(
    matrix: Matrix, places: npt.NDArray[np.int64], good: npt.NDArray[np.bool_], known: _Rows
) -> list[tuple[Matrix, int]]:
    """Rows of a table, or of a head, that are those of another token."""
    owners, rows = known.locate(places)
    is_head = matrix.use == "product" and all(known.owners[owner] in _BY_TOKEN for owner in np.unique(owners[good]))
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


def _describe(
    entries: dict[str, TensorEntry],
    some: _Rows,
    missing: npt.NDArray[np.int64],
    surplus: list[tuple[Matrix, int]],
    strange: list[Matrix],
    zeros: set[str],
) -> tuple[list[WrongRows], int]:
    """In words, by tensor.

    The first missing row of the twin, beside the row of the file that is most like it; and how many rows there are.
    `strange` are matrices of which most rows are none of the twin's, `zeros` tensors beside whose rows there are rows
    of zeros in the file.
    """
    tokens = {entry.shape[0] for name, entry in entries.items() if name in _BY_TOKEN}
    heads = [matrix for matrix, _ in surplus if matrix.use == "product" and matrix.shape[0] in tokens]
    owners, rows = some.locate(missing)
    groups: dict[tuple[str, int], list[int]] = {}
    for owner, row in zip(owners.tolist(), rows.tolist(), strict=True):
        name = some.owners[owner]
        groups.setdefault((name, row // entries[name].shape[1] if len(entries[name].shape) == 3 else 0), []).append(row)
    extra = [(matrix, row) for matrix, row in surplus[:_MOST_PAIRS]]
    candidates = [_read(matrix)[row] for matrix, row in extra]
    told: list[WrongRows] = []
    taken: set[int] = set()
    for (name, _), group in list(groups.items())[:_MOST_TOLD]:
        true = _read_row(entries[name], group[0])
        tensor, number, count = _words(name, entries[name], group[0])
        near = _nearest(true, candidates)
        others = (
            candidates if near is not None else [row for matrix in strange[:_MOST_STRANGE] for row in _read(matrix)]
        )
        near = near if near is not None else _nearest(true, others)
        if near is not None and others is candidates:
            taken.add(near)
        what = _WITHOUT if near is None else _compare(others[near], true)
        if near is None and name in zeros:
            what = "is all zeros in the file"
        told.append(WrongRows(tensor, number, len(group), count, what, name))
    left = [place for place in range(len(extra)) if place not in taken]
    if not groups or len(surplus) > len(missing):  # rows that are there, and others in their place
        by_matrix: dict[str, list[int]] = {}
        for place in left:
            by_matrix.setdefault(extra[place][0].place, []).append(place)
        for where, places in list(by_matrix.items())[: _MOST_TOLD - len(told)]:
            matrix, row = extra[places[0]]
            by_token = matrix.use == "table" or matrix in heads
            tensor = (
                ("the embedding" if matrix.use == "table" else "the head") if by_token else f"'{where}' in the graph"
            )
            what = "is that of another token, or of none" if by_token else "is no row of the twin"
            what = what if np.isfinite(_read(matrix)[row]).all() else "is not all numbers in the file"
            told.append(WrongRows(tensor, row, len(places), matrix.shape[0], what))
    return told, max(len(missing), len(surplus))


def _nearest(true: Floats, rows: Sequence[Floats]) -> int | None:
    """The row that is most like another, if any is at all."""
    if not rows:
        return None
    with np.errstate(invalid="ignore", over="ignore"):  # of a damaged file
        distances = np.nan_to_num(np.abs(np.stack(rows) - true).sum(-1), nan=np.inf)
    best = int(distances.argmin())
    return best if distances[best] <= _LIKE * np.abs(true).sum() else None


def _read(matrix: Matrix) -> Floats:
    """The rows of a matrix as the twin has them, what multiplies its input counted in."""
    rows = matrix.read()
    return rows if matrix.input_factors is None else rows * matrix.input_factors()


def _compare(found: Floats, true: Floats) -> str:
    if not found.any():
        return "is all zeros in the file"
    if not np.isfinite(found).all():
        return "is not all numbers in the file"
    difference = np.abs(found - true)
    columns = np.nonzero(difference > _SAME * difference.max())[0]
    first, last = int(columns[0]), int(columns[-1])
    part, own = found[first : last + 1].astype(np.float64), true[first : last + 1].astype(np.float64)
    where = f"columns {first} to {last}" if last > first else f"column {first}"
    outside = np.concatenate([true[:first], true[last + 1 :]])
    where = "the whole row" if not outside.any() and len(true) > 1 else where
    factor = float(part @ own / max(float(own @ own), 1e-300))
    if np.linalg.norm(part - factor * own) <= _STRAIGHT * np.linalg.norm(part):
        return (
            f"{where} in the file {'is' if where == 'the whole row' or first == last else 'are'} {factor:.4g} "
            "times the twin's"
        )
    return (
        f"{where} in the file differ{'s' if first == last or where == 'the whole row' else ''} from the twin's by "
        f"up to {difference.max():.2g}"
    )


def _read_row(entry: TensorEntry, row: int) -> Floats:
    inner = math.prod(entry.shape[1:-1])
    chunk = read_tensor(entry) if len(entry.shape) == 1 else next(read_chunks(entry, row // inner, row // inner + 1))
    found: Floats = chunk.to(torch.float32).reshape(-1, entry.shape[-1])[row % inner].numpy()
    return found


def _words(name: str, entry: TensorEntry, row: int) -> tuple[str, int, int]:
    """A tensor of a checkpoint in words, the row in it, and of how many."""
    layer, expert = (re.search(rf"\b{word}s\.(\d+)\.", name) for word in ("layer", "expert"))
    stem = name.removesuffix(".weight").split(".")[-1]
    stem = _WORDS.get(stem, stem)
    parts = [f"layer {layer[1]}"] if layer else []
    count = math.prod(entry.shape[:-1])
    if expert:
        parts.append(f"expert {expert[1]}")
    elif len(entry.shape) == 3:
        parts.append(f"expert {row // entry.shape[1]}")
        row, count = row % entry.shape[1], entry.shape[1]
    return ", ".join([*parts, f"attention's {stem}" if "attn." in name else stem]), row, count


def _check_vectors(
    checkpoint: Checkpoint, vectors: dict[str, TensorEntry], constants: Constants
) -> Iterator[WrongRows]:
    """Norms, biases and the like: each must be in the file, by itself or as a part of a longer one."""
    by_size: dict[int, list[Floats]] = {}
    for values in constants.vectors.values():
        by_size.setdefault(len(values), []).append(values)
    columns = [matrix.read().reshape(-1) for matrix in constants.matrices if 1 in matrix.shape]
    for name, entry in vectors.items():
        true = checkpoint.read(name).to(torch.float32).reshape(-1).numpy()
        kinds = [
            true,
            *(torch.from_numpy(true).to(kind).to(torch.float32).numpy() for kind in (torch.float16, torch.bfloat16)),
        ]
        own = [*by_size.get(len(true), []), *(each for each in columns if len(each) == len(true))]
        if any(np.allclose(each, kind, rtol=1e-6, atol=0) for each in own for kind in kinds) or _is_inside(
            kinds, by_size, len(true)
        ):
            continue
        tensor, *_ = _words(name, entry, 0)
        nearest = min(own, key=lambda each: float(np.abs(each - true).sum()), default=None)
        what = (
            "no vector of the file is the twin's"
            if nearest is None
            else _compare(nearest, true).replace("column", "element")
        )
        yield WrongRows(tensor, 0, 1, 1, what.replace("row", "vector"))


def _is_inside(kinds: Sequence[Floats], by_size: dict[int, list[Floats]], size: int) -> bool:
    """Whether a vector is a part of a longer one, as biases of several products that are one."""
    for length, found in by_size.items():
        if length <= size:
            continue
        for values in found:
            for true in kinds:
                for start in np.nonzero(np.isclose(values[: length - size + 1], true[0], rtol=1e-6, atol=0))[0]:
                    if np.allclose(values[start : start + size], true, rtol=1e-6, atol=0):
                        return True
    return False
