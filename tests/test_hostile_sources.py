"""A hostile source is refused in one line, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import (
    logits,
    quiet,
    rel,
    settings,
)
from safetensors.torch import load_file, save_file

from dense2moe.upcycle.building.rounding import ROUNDING_LIMIT
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.errors import UpcycleError

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

# Hostile sources: refused in one line, and nothing is written


def rewrite_header(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def point_elsewhere(where: str) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        names = load_file(directory / "model.safetensors")
        (directory.parent / "outside.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
        target = where.format(parent=directory.parent)
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, target)})
        )

    return change


def overlap(directory: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        start, stop = header[UP]["data_offsets"]
        header[UP]["data_offsets"] = [start - 128, stop - 128]

    rewrite_header(directory, change)


def repeat_a_name(directory: Path) -> None:
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()
    name = b'"model.norm.weight":'
    start = text.index(name)
    again = text[:-1] + b"," + text[start : text.index(b"}", start) + 1] + b"}"
    path.write_bytes(len(again).to_bytes(8, "little") + again + raw[8 + length :])


def store_twice(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    save_file(state, directory / "model-1.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"]}, directory / "model-2.safetensors")
    names = dict.fromkeys(state, "model-1.safetensors") | {"model.norm.weight": "model-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def say_a_header_of(length: int) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def changed(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    return changed


def configure(**fields: Any) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


UP = "model.layers.1.mlp.up_proj.weight"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an index that names a file above": (
        point_elsewhere("../outside.safetensors"),
        "it must be a *.safetensors file beside the index",
    ),
    "an index that names a file by its root": (
        point_elsewhere("{parent}/outside.safetensors"),
        "it must be a *.safetensors file beside the index",
    ),
    "tensors that overlap": (overlap, "overlaps another tensor at byte"),
    "a truncated file": (truncate, "truncated or corrupt; download it again"),
    "a header of 2^63 bytes": (say_a_header_of(2**63), "truncated or not safetensors"),
    "a header a little longer than the file": (say_a_header_of(10**6), "truncated or not safetensors"),
    "a header of nothing": (say_a_header_of(0), "not a safetensors file"),
    "a name twice in one file": (repeat_a_name, "the name 'model.norm.weight' occurs twice"),
    "a name in two files": (store_twice, "is not listed for this file in the index"),
    "a negative size": (
        lambda path: rewrite_header(path, lambda header: header[UP].update(shape=[-48, -32])),
        "where a count must be",
    ),
    "a size beyond the file": (
        lambda path: rewrite_header(path, lambda header: header[UP].update(shape=[2**40, 32])),
        "bytes; it must have",
    ),
    "a pickle in disguise": (
        lambda path: (path / "model.safetensors").write_bytes(b"\x80\x04" + b"x" * 1000),
        "not safetensors",
    ),
    "a matrix of another shape": (
        tensors(lambda state: state.update({UP: torch.zeros(32, 48)})),
        "'model.layers.1.mlp.up_proj.weight' has shape [32, 48]; by config.json it must be",
    ),
    "a vector in place of a matrix": (
        tensors(lambda state: state.update({UP: torch.zeros(48 * 32)})),
        "has shape [1536]; by config.json it must be",
    ),
    "a number in place of a matrix": (
        tensors(lambda state: state.update({UP: torch.tensor(1.0)})),
        "has shape []; by config.json it must be",
    ),
    "a matrix without rows": (
        tensors(lambda state: state.update({UP: torch.zeros(0, 32)})),
        "has shape [0, 32]; by config.json it must be",
    ),
    "a tensor that nobody knows": (
        tensors(lambda state: state.update({"model.layers.1.mlp.extra": torch.zeros(1)})),
        "has no place in LlamaForCausalLM",
    ),
    "float8 weights": (
        tensors(lambda state: state.update({UP: state[UP].to(torch.float8_e4m3fn)})),
        "is stored as F8_E4M3; it must be one of",
    ),
    "integer weights": (
        tensors(lambda state: state.update({UP: state[UP].to(torch.int8)})),
        "is stored as I8; it must be one of",
    ),
    "a config of another width": (
        configure(intermediate_size=64),
        "has shape [48, 32]; by config.json it must be [64, 32]",
    ),
    "a config of a vast vocabulary": (
        configure(vocab_size=10**12),
        "has shape [300, 32]; by config.json it must be [1000000000000, 32]",
    ),
    "a config of absurdly many layers": (
        configure(num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000; it must be at most 100000",
    ),
    "a config of more layers than tensors": (
        configure(num_hidden_layers=1000),
        "num_hidden_layers is 1000; the files hold",
    ),
    "a config with code": (
        configure(auto_map={"AutoModel": "evil.Model"}, architectures=["EvilModel"]),
        "asks for code from the checkpoint, which is never run",
    ),
    "biases that the target cannot hold": (configure(mlp_bias=True), "mlp_bias is True"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_source_is_refused_and_nothing_is_written(name: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    change, reason = HOSTILE[name]
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(dense_checkpoint, source)
    output.mkdir()
    change(source)
    with pytest.raises(UpcycleError) as excinfo:
        upcycle(source, output, settings(), 0, quiet)
    assert reason in str(excinfo.value)
    assert "\n" not in str(excinfo.value)
    assert list(output.iterdir()) == []


def test_a_source_that_is_no_more_hostile_is_taken(dense_checkpoint: Path, tmp_path: Path) -> None:
    """The changes above, undone: a copy, its header written anew, and an index of a file beside it."""
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(dense_checkpoint, source)
    output.mkdir()
    rewrite_header(source, lambda header: None)
    tensors(lambda state: None)(source)
    configure()(source)
    point_elsewhere("model.safetensors")(source)
    upcycle(source, output, settings(), 0, quiet)
    assert rel(logits(output), logits(dense_checkpoint)) <= ROUNDING_LIMIT
