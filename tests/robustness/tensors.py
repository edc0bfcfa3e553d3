"""Changes of safetensors files, by header and by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tests.robustness.files import Change
from tests.robustness.trees import TREES, change_tree

Tensor = tuple[str, list[int], bytes]
"""Its dtype, shape and content."""


def _split_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join_safetensors(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _change_header(path: Path, random: Random, what: str) -> None:
    header, data = _split_safetensors(path)
    change_tree(header, what, random)
    _join_safetensors(path, header, data)


def _change_length(path: Path, random: Random) -> None:
    header, data = _split_safetensors(path)
    length = len(json.dumps(header).encode())
    _join_safetensors(
        path, header, data, random.choice((0, 1, length - 1, length + 1, len(data) * 2, 10**8 + 1, 2**63, 2**64 - 1))
    )


def _choose_tensor(header: dict[str, Any], random: Random) -> str:
    return random.choice([name for name in header if name != "__metadata__"])


def _change_dtype(path: Path, random: Random) -> None:
    header, data = _split_safetensors(path)
    kinds = ("F16", "BF16", "I32", "I64", "U8", "F64", "F8_E4M3", "BOOL", "F4", "C64", "X", "", 7)
    header[_choose_tensor(header, random)]["dtype"] = random.choice(kinds)
    _join_safetensors(path, header, data)


def _change_shape(path: Path, random: Random) -> None:
    header, data = _split_safetensors(path)
    entry = header[_choose_tensor(header, random)]
    shape = entry["shape"]
    entry["shape"] = random.choice(
        (shape[::-1], [*shape, 1], [], [0], [-1], [2**40, 2**40], shape[:-1], [size * 2 for size in shape], [1, *shape])
    )
    _join_safetensors(path, header, data)


def _recast(path: Path, random: Random) -> None:
    """A tensor of another width or shape, right in itself: the file is well formed."""
    header, data = _split_safetensors(path)
    name = _choose_tensor(header, random)
    tensors = _read_tensors(header, data)
    dtype, shape, content = tensors[name]
    others: tuple[Tensor, ...] = (
        ("F16", shape, content[: len(content) // 2]),
        ("I32", shape, content),
        ("F64", shape, content * 2),
        ("U8", [len(content)], content),
        (dtype, [*shape, 1], content),
        (dtype, shape[::-1], content),
        (dtype, [2, *shape], content * 2),
        (dtype, [0], b""),
        ("F8_E4M3", shape, content[::4]),
    )
    tensors[name] = random.choice(others)
    _write_tensors(path, header.get("__metadata__"), tensors)


def _rename_tensor(path: Path, random: Random) -> None:
    header, data = _split_safetensors(path)
    name = _choose_tensor(header, random)
    near = (f"model.{name}", name.removeprefix("model."), name.replace("0", "7"), name.upper())
    other = random.choice((*near, "lm_head.weight", "[x]\x1b[31m", "", "x" * 1000))
    _join_safetensors(path, {other if key == name else key: entry for key, entry in header.items()}, data)


def _drop_tensor(path: Path, random: Random) -> None:
    header, data = _split_safetensors(path)
    name = _choose_tensor(header, random)
    _write_tensors(
        path,
        header.get("__metadata__"),
        {each: tensor for each, tensor in _read_tensors(header, data).items() if each != name},
    )


def _add_tensor(path: Path, random: Random) -> None:
    header, data = _split_safetensors(path)
    layer = "model.layers.0."
    names = (
        "x",
        "model.layers.9.mlp.up_proj.weight",
        f"{layer}self_attn.q_proj.bias",
        "lm_head.weight",
        f"{layer}mlp.up_proj.weight_scale",
        "",
    )
    header[random.choice(names)] = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
    _join_safetensors(path, header, data + bytes(16))


def _read_tensors(header: dict[str, Any], data: bytes) -> dict[str, Tensor]:
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in entries.items()
    }


def _write_tensors(path: Path, metadata: Any, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(content)]}
        start += len(content)
    _join_safetensors(path, header, b"".join(content for _, _, content in tensors.values()))


def _fill_tensor(path: Path, random: Random) -> None:
    """Numbers that no training leaves: NaN, infinities, huge ones, nothing but zeros."""
    header, data = _split_safetensors(path)
    start, stop = header[_choose_tensor(header, random)]["data_offsets"]
    start = random.choice((start, stop - 4))
    number = struct.pack("<f", random.choice((float("nan"), float("inf"), 1e38, 1e10, 0.0)))
    _join_safetensors(path, header, data[:start] + number * ((stop - start) // 4) + data[stop:])


def _keep_one_tensor(path: Path, random: Random) -> None:
    header, data = _split_safetensors(path)
    name = _choose_tensor(header, random)
    _write_tensors(path, header.get("__metadata__"), {name: _read_tensors(header, data)[name]})


SAFETENSORS: dict[str, Change] = {f"header {what}": partial(_change_header, what=what) for what in TREES} | {
    "header length": _change_length,
    "dtype": _change_dtype,
    "shape": _change_shape,
    "recast": _recast,
    "rename tensor": _rename_tensor,
    "drop tensor": _drop_tensor,
    "add tensor": _add_tensor,
    "fill tensor": _fill_tensor,
    "one tensor": _keep_one_tensor,
}
