"""Rows that differ between a file and the twin, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from dense2moe.export.parity.records import WrongRows
from dense2moe.export.parity.weights.matrix import FloatArray, GraphMatrix
from dense2moe.export.parity.weights.row_keys import RowKeys
from dense2moe.export.parity.weights.turned import read_pieces
from dense2moe.upcycle.checkpoints.tensors import TensorEntry, read_tensor
from dense2moe.upcycle.models.parts import layer_of

_MOST_PAIRS = 2048
MOST_TOLD = 5
_SAME = 1e-4  # of the largest difference of two rows: columns that differ by less are told as equal
_STRAIGHT = 1e-2  # of a row's part: what is left of it beside a multiple, where it is one
_LIKE = 1.001  # of a row's own size: a row of zeros differs by as much
_MOST_STRANGE = 16
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
_WITHOUT = "no row of the file equals the twin's"
_WORDS = {
    "embed_tokens": "the embedding",
    "lm_head": "the head",
    "gate": "router",
    "layer": "router",
    "norm": "the final norm",
}
_VAGUE = ("dense", "bias", "proj", "projection", "LayerNorm", "lin", "linear", "value", "key", "query")
"""Ends of names that many tensors of a model have."""


def describe_rows(
    entries: dict[str, TensorEntry],
    some: RowKeys,
    missing: npt.NDArray[np.int64],
    surplus: list[tuple[GraphMatrix, int]],
    strange: list[GraphMatrix],
    zeros: set[str],
) -> tuple[list[WrongRows], int]:
    """Wrong rows in words, by tensor.

    The first missing row of the twin, beside the row of the file that is most like it; and how many rows there are.
    `strange` are matrices of which most rows are none of the twin's, `zeros` tensors beside whose rows there are rows
    of zeros in the file.
    """
    tokens = {entry.shape[0] for name, entry in entries.items() if name in BY_TOKEN}
    heads = [matrix for matrix, _ in surplus if matrix.use == "product" and matrix.shape[0] in tokens]
    owners, rows = some.locate(missing)
    groups: dict[tuple[str, int], list[int]] = {}
    for owner, row in zip(owners.tolist(), rows.tolist(), strict=True):
        name = some.owners[owner]
        groups.setdefault((name, row // entries[name].shape[1] if len(entries[name].shape) == 3 else 0), []).append(row)
    extra = [(matrix, row) for matrix, row in surplus[:_MOST_PAIRS]]
    candidates = [read_scaled(matrix)[row] for matrix, row in extra]
    told: list[WrongRows] = []
    taken: set[int] = set()
    for (name, _), group in list(groups.items())[:MOST_TOLD]:
        true = _read_row(entries[name], group[0])
        tensor, number, count = name_tensor(name, entries[name], group[0])
        near = find_nearest(true, candidates)
        others = (
            candidates
            if near is not None
            else [row for matrix in strange[:_MOST_STRANGE] for row in read_scaled(matrix)]
        )
        near = near if near is not None else find_nearest(true, others)
        if near is not None and others is candidates:
            taken.add(near)
        what = _WITHOUT if near is None else compare_rows(others[near], true)
        if near is None and name in zeros:
            what = "is all zeros in the file"
        told.append(WrongRows(tensor, number, len(group), count, what, name))
    left = [place for place in range(len(extra)) if place not in taken]
    if not groups or len(surplus) > len(missing):  # rows that are there, and others in their place
        by_matrix: dict[str, list[int]] = {}
        for place in left:
            by_matrix.setdefault(extra[place][0].place, []).append(place)
        for where, places in list(by_matrix.items())[: MOST_TOLD - len(told)]:
            matrix, row = extra[places[0]]
            by_token = matrix.use == "table" or matrix in heads
            tensor = (
                ("the embedding" if matrix.use == "table" else "the head") if by_token else f"'{where}' in the graph"
            )
            what = "belongs to another token, or to none" if by_token else "equals no row of the twin"
            what = what if np.isfinite(read_scaled(matrix)[row]).all() else "has NaN or infinite values in the file"
            told.append(WrongRows(tensor, row, len(places), matrix.shape[0], what))
    return told, max(len(missing), len(surplus))


def find_nearest(true: FloatArray, rows: Sequence[FloatArray]) -> int | None:
    """The row most similar to another, if any is similar."""
    if not rows:
        return None
    with np.errstate(invalid="ignore", over="ignore"):  # of a damaged file
        distances = np.nan_to_num(np.abs(np.stack(rows) - true).sum(-1), nan=np.inf)
    best = int(distances.argmin())
    return best if distances[best] <= _LIKE * np.abs(true).sum() else None


def read_scaled(matrix: GraphMatrix) -> FloatArray:
    """A matrix's rows, multiplied by the factors of its input."""
    rows = matrix.read()
    return rows if matrix.input_factors is None else rows * matrix.input_factors()


def compare_rows(found: FloatArray, true: FloatArray) -> str:
    """How a row of the file differs from the twin's, in words."""
    if not found.any():
        return "is all zeros in the file"
    if not np.isfinite(found).all():
        return "has NaN or infinite values in the file"
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


def _read_row(entry: TensorEntry, row: int) -> FloatArray:
    inner = math.prod(entry.shape[1:-1])
    chunk = read_tensor(entry) if len(entry.shape) == 1 else next(read_pieces(entry, row // inner, row // inner + 1))
    found: FloatArray = chunk.to(torch.float32).reshape(-1, entry.shape[-1])[row % inner].numpy()
    return found


def name_tensor(name: str, entry: TensorEntry, row: int) -> tuple[str, int, int]:
    """A tensor in words, its row, and its number of rows."""
    layer, expert = layer_of(name), re.search(r"\bexperts\.(\d+)\.", name)
    pieces = name.removesuffix(".weight").split(".")
    stem = _WORDS.get(pieces[-1], pieces[-1])
    if stem in _VAGUE:  # the names of the modules that it stands in, behind the layer's number
        stem = ".".join(pieces[pieces.index(str(layer)) + 1 if layer >= 0 else 0 :])
    parts = [f"layer {layer}"] if layer >= 0 else []
    count = math.prod(entry.shape[:-1])
    if expert:
        parts.append(f"expert {expert[1]}")
    elif len(entry.shape) == 3:
        parts.append(f"expert {row // entry.shape[1]}")
        row, count = row % entry.shape[1], entry.shape[1]
    return ", ".join([*parts, f"attention's {stem}" if "attn." in name and "." not in stem else stem]), row, count
