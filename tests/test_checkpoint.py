"""The reader refuses every broken or hostile file in one clear line, and reads what safetensors does, whole.

By rows and in chunks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from told import tells
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.checkpoints.headers import index_tensors, read_header
from dense2moe.upcycle.checkpoints.reader import Checkpoint, check_values, open_checkpoint
from dense2moe.upcycle.checkpoints.tensors import CHUNK_ELEMENTS, read_chunks
from dense2moe.upcycle.errors import UpcycleError

MAX_HEADER_BYTES = 100_000_000  # the format's limit, in safetensors' README
FORMAT = {"__metadata__": {"format": "pt"}}


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UpcycleError) as excinfo:
        call(*arguments)
    message = str(excinfo.value)
    assert "\n" not in message
    return message


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def checkpoint_of(directory: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    """A checkpoint whose config is never asked."""
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint(directory, None, index_tensors(directory))  # type: ignore[arg-type]


def write_index(directory: Path, weight_map: Any) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


# The directory and its config


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    assert (
        refusal(open_checkpoint, path)
        == f"{path}: no such directory; it must be a Hugging Face checkpoint (config.json and *.safetensors)"
    )


def test_a_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert (
        refusal(open_checkpoint, path)
        == f"{path}: is a file; it must be a checkpoint directory with config.json and *.safetensors"
    )


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    assert refusal(open_checkpoint, tmp_path) == (
        f"{tmp_path}: no config.json; it must be a Hugging Face checkpoint (config.json and *.safetensors)"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": ', "not valid JSON (JSONDecodeError: Expecting value: line 1 column 7 (char 6)); restore the file"),
        (
            b"\xff",
            "not valid JSON (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid start "
            "byte); restore the file",
        ),
        (b"{}", "no 'model_type'; it must be the config of a transformers model"),
        (b"[]", "no 'model_type'; it must be the config of a transformers model"),
        (b'{"model_type": 5}', "no 'model_type'; it must be the config of a transformers model"),
        (
            b'{"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}',
            "'auto_map' asks for code from the checkpoint, which is never run; use a model that transformers itself "
            "knows",
        ),
        (
            b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
            "the weights are quantized (gptq); upcycling needs float32, float16 or bfloat16 weights; give the model "
            "as it was before, or "
            "dequantize it and remove 'quantization_config'",
        ),
        (
            b'{"model_type": "llama", "quantization_config": "awq"}',
            "the weights are quantized (unknown); upcycling needs float32, float16 or bfloat16 weights; give the "
            "model as it was before, or "
            "dequantize it and remove 'quantization_config'",
        ),
    ],
)
def test_a_config_that_is_no_plain_model_is_refused(text: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    assert refusal(open_checkpoint, tmp_path) == f"{tmp_path / 'config.json'}: {reason}"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"model_type": "nonesuch"}', "nonesuch"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4}', "33"),
    ],
)
def test_a_config_that_transformers_refuses_is_refused_with_its_reason(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    before, reason = refusal(open_checkpoint, tmp_path).split(": transformers cannot read this config (")
    assert before == str(path)
    assert named in reason


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_nested_beyond_reason_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_text("[" * 100_000)
    assert refusal(open_checkpoint, tmp_path).startswith(f"{tmp_path / name}: not ")


# The weight files and their index


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    assert refusal(index_tensors, tmp_path) == (
        f"{tmp_path}: no model.safetensors and no model.safetensors.index.json; the weights must be in safetensors"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt", "weights.pkl"])
def test_pickled_weights_are_never_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert refusal(index_tensors, tmp_path) == (
        f"{tmp_path / name}: pickled weights can run code and are never loaded; convert them to model.safetensors first"
    )


def test_pickles_beside_safetensors_are_ignored(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert list(index_tensors(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    "file_name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "..", ""]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(file_name: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    path = write_index(directory, {"a": file_name})
    assert (
        refusal(index_tensors, directory)
        == f"{path}: 'a' is said to be in '{file_name}'; it must be a *.safetensors file beside the index"
    )


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = write_index(tmp_path, {"a": "model-00001-of-00001.safetensors"})
    assert (
        refusal(index_tensors, tmp_path)
        == f"{path}: names model-00001-of-00001.safetensors, which is not there; download it"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("{}", "KeyError: 'weight_map'"),
        ('{"weight_map": ["a"]}', "AttributeError: 'list' object has no attribute 'items'"),
        ("[]", "TypeError: list indices must be integers or slices, not str"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "ValueError: the name 'a' occurs twice"),
    ],
)
def test_an_index_of_another_form_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    assert refusal(index_tensors, tmp_path) == (
        f"{path}: not a safetensors index ({reason}); it must hold a 'weight_map' object of name to file; download "
        "it again"
    )


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors")
    write_index(tmp_path, {"a": "x.safetensors"})
    assert refusal(index_tensors, tmp_path) == (
        f"{tmp_path / 'x.safetensors'}: tensor 'b' is not listed for this file in the index; mend the index"
    )


def test_a_tensor_that_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    assert refusal(index_tensors, tmp_path) == (
        f"{tmp_path / 'x.safetensors'}: tensor 'b' must be here by the index but is not; download this file again"
    )


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "y.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    assert (
        refusal(index_tensors, tmp_path)
        == f"{tmp_path / 'y.safetensors'}: tensor 'a' is also in x.safetensors; each must be stored once"
    )


# One file's header


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"??", "Expecting value: line 1 column 1 (char 0)"),
        (b"\xff\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ([], "the header is no JSON object"),
        (b'{"a": {}, "a": {}}', "the name 'a' occurs twice"),
        (
            b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 4]}}',
            "the name 'dtype' occurs twice",
        ),
        ({"a": []}, "list indices must be integers or slices, not str"),
        ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "'dtype'"),
        ({"a": entry(0, 4, "1")}, "tensor 'a' has no dtype and shape"),  # type: ignore[arg-type]
        ({"a": entry(0, 4, [1], dtype=4)}, "tensor 'a' has no dtype and shape"),  # type: ignore[arg-type]
        ({"a": entry(-4, 0, [1])}, "tensor 'a' has -4 where a count must be"),
        ({"a": entry(0, -4, [1])}, "tensor 'a' has -4 where a count must be"),
        ({"a": entry(0, 4, [-1, -1])}, "tensor 'a' has -1 where a count must be"),
        ({"a": entry(0, 4, [True])}, "tensor 'a' has True where a count must be"),
        ({"a": entry(0, 4, [1.0])}, "tensor 'a' has 1.0 where a count must be"),  # type: ignore[list-item]
    ],
)
def test_a_malformed_header_is_refused(header: Any, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes(header, b"\0" * 4))
    assert refusal(read_header, file) == f"{file}: malformed safetensors header ({reason}); download it again"


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
        {"a": entry(0, 4, []) | {"data_offsets": [0]}},
    ],
    ids=["deep", "long number", "one offset"],
)
def test_a_malformed_header_is_refused_in_whatever_words_of_python(header: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes(header, b"\0" * 4))
    message = refusal(read_header, file)
    assert message.startswith(f"{file}: malformed safetensors header (")
    assert message.endswith("); download it again")


@pytest.mark.parametrize(
    ("header", "num_bytes", "reason"),
    [
        (
            {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},
            12,
            "tensor 'b' overlaps another tensor at byte 4 (expected 8); the file is corrupt; download it again",
        ),
        (
            {"a": entry(0, 4, [1]), "b": entry(0, 4, [1])},
            4,
            "tensor 'b' overlaps another tensor at byte 0 (expected 4); the file is corrupt; download it again",
        ),
        (
            {"b": entry(8, 12, [1]), "a": entry(0, 4, [1])},
            12,
            "tensor 'b' leaves a gap before it at byte 8 (expected 4); the file is corrupt; download it again",
        ),
        (
            {"a": entry(4, 8, [1])},
            8,
            "tensor 'a' leaves a gap before it at byte 4 (expected 0); the file is corrupt; download it again",
        ),
        ({"a": entry(0, 4, [2])}, 4, "tensor 'a' of shape [2] F32 has 4 bytes; it must have 8"),
        ({"a": entry(0, 4, [1]), "b": entry(4, 0, [1])}, 4, "tensor 'b' of shape [1] F32 has -4 bytes; it must have 4"),
        (
            {"a": entry(0, 4, [1 << 62, 4], "F32")},
            4,
            f"tensor 'a' of shape [{1 << 62}, 4] F32 has 4 bytes; it must have {1 << 66}",
        ),
        ({"a": entry(0, 4, [8], "F4")}, 4, "tensor 'a' has dtype F4; it must be one of F32, F16, BF16"),
    ],
)
def test_spans_that_do_not_tile_the_data_are_refused(header: Any, num_bytes: int, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes(header, b"\0" * num_bytes))
    assert refusal(read_header, file) == f"{file}: {reason}"


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_truncated_file_and_one_with_trailing_bytes_are_refused(extra: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, file)
    size = file.stat().st_size
    os.truncate(file, size + extra)
    assert refusal(read_header, file) == (
        f"{file}: {size + extra} bytes; by its header it must have {size}; truncated or corrupt; download it again"
    )


@pytest.mark.parametrize("content", [b"", b"\x10\0\0", b"\0" * 8, b"\x01" + b"\0" * 7 + b"{"])
def test_a_file_too_short_for_a_header_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert (
        refusal(read_header, file)
        == f"{file}: not a safetensors file ({len(content)} bytes, no header); download it again"
    )


@pytest.mark.parametrize(
    "content",
    [(1 << 63).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"{}"],
    ids=["absurd", "one byte short"],
)
def test_a_header_longer_than_its_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    said = int.from_bytes(content[:8], "little")
    assert refusal(read_header, file) == (
        f"{file}: header says {said} bytes in a file of {len(content)}; truncated or not safetensors; download it again"
    )


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json", "LICENSE"]
)
def test_a_pointer_of_git_lfs_in_any_file_s_place_is_told(name: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(dense_checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12\n"
    )
    assert refusal(open_checkpoint, tmp_path) == (
        f"{tmp_path / name}: is a git-LFS pointer, not the file itself; run `git lfs pull` where it was cloned, or "
        "download the file"
    )


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "\ud83d", "a" * 501])
def test_a_tensor_s_name_that_no_line_can_show_is_refused(name: str, tmp_path: Path) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    message = refusal(read_header, file)
    assert message.isprintable()
    assert message.endswith("must have a name of printable characters, 500 at most); download it again")


@pytest.mark.parametrize("metadata", [[], "pt", {"format": 1}])
def test_metadata_that_safetensors_refuses_is_refused(metadata: object, tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": metadata}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert tells(refusal(read_header, file), file, "header", "__metadata__", "download it again")


def test_a_state_of_training_is_not_called_weights(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"arguments")
    (tmp_path / "optimizer.pt").write_bytes(b"moments")
    assert tells(refusal(index_tensors, tmp_path), tmp_path, "no model.safetensors", "must be in safetensors")


def test_a_header_over_the_formats_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(file, MAX_HEADER_BYTES + 100)  # sparse: takes no room on the disk
    assert tells(refusal(read_header, file), file, MAX_HEADER_BYTES + 1, MAX_HEADER_BYTES + 100, "download it again")


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_with_their_count(
    dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    bad = torch.ones(5, 5, dtype=dtype)
    bad[0, 1] = bad[3, 2] = value
    checkpoint = checkpoint_of(tmp_path, {"bad": bad})
    assert refusal(list, check_values(checkpoint)) == (
        f"{tmp_path / 'model.safetensors'}: tensor 'bad' holds 2 NaN or infinite values; the checkpoint is broken; "
        "use another"
    )


@pytest.mark.parametrize(
    ("dtype", "name", "hint"),
    [
        (torch.float64, "F64", ""),
        (torch.int64, "I64", ""),
        (torch.int32, "I32", ""),
        (torch.uint8, "U8", ""),
        (torch.bool, "BOOL", ""),
        (torch.float8_e4m3fn, "F8_E4M3", "; dequantize it first"),
        (torch.float8_e5m2, "F8_E5M2", "; dequantize it first"),
    ],
)
def test_weights_of_another_dtype_are_refused(dtype: torch.dtype, name: str, hint: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"a": torch.zeros(2).to(dtype)})
    assert refusal(list, check_values(checkpoint)) == (
        f"{tmp_path / 'model.safetensors'}: tensor 'a' is stored as {name}; it must be one of F32, F16, BF16{hint}"
    )


@pytest.mark.parametrize(
    "dropped", [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), torch.tensor([float("nan")])]
)
def test_a_tensor_that_is_dropped_may_hold_anything(dropped: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"a": torch.ones(2), "b": dropped})
    assert sorted(check_values(checkpoint, ("b",))) == ["a", "b"]
    with pytest.raises(UpcycleError):
        list(check_values(checkpoint, ("a",)))


def test_checking_values_names_every_tensor_once(dense_checkpoint: Path) -> None:
    assert list(check_values(open_checkpoint(dense_checkpoint))) == list(index_tensors(dense_checkpoint))


# Reading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_reads_as_safetensors_loads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 5), "vector": (7,), "scalar": (), "empty": (0, 4), "odd": (1, 3, 1)}
    save_file(
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    checkpoint = Checkpoint(tmp_path, None, index_tensors(tmp_path))  # type: ignore[arg-type]
    expected = load_file(tmp_path / "model.safetensors")
    assert checkpoint.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found, tensor)


def test_every_tensor_of_a_sharded_checkpoint_reads_as_transformers_loads_it(make_dense: Callable[..., Path]) -> None:
    directory = make_dense(torch.bfloat16, max_shard_size="30KB", tie_word_embeddings=False)
    assert len(list(directory.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    expected = model.state_dict()
    assert checkpoint.entries.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
    assert checkpoint.num_parameters == sum(p.numel() for p in model.parameters())
    assert checkpoint.num_bytes == 2 * checkpoint.num_parameters
    assert checkpoint.config.to_dict() == model.config.to_dict()


def test_a_read_tensor_outlives_its_file_and_may_be_written_to(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"a": torch.arange(4.0)})
    tensor = checkpoint.read("a")
    (tmp_path / "model.safetensors").write_bytes(b"")
    tensor += 1
    assert tensor.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_file_that_shrinks_under_the_reader_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"a": torch.ones(4)})
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert (
        refusal(checkpoint.read, "a")
        == f"{file}: ended inside tensor 'a'; the file changed while it was read; run again"
    )


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 3), "vector": (5,), "stack": (5, 2, 3), "flat": (5, 0)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        checkpoint = checkpoint_of(
            tmp_path, {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        )
        for name in shapes:
            whole = checkpoint.read(name)
            for start, stop in ((0, 5), (1, 4), (4, 5), (2, 2)):
                found = checkpoint.read_rows(name, start, stop)
                assert found.dtype == dtype
                assert found.shape == whole[start:stop].shape
                assert torch.equal(found, whole[start:stop])


def test_rows_of_a_file_that_shrank_are_refused_where_they_are_gone(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"a": torch.arange(8.0).reshape(4, 2)})
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert checkpoint.read_rows("a", 1, 3).tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert tells(refusal(checkpoint.read_rows, "a", 2, 4), f"{file}: ended", "'a'", "run again")


@pytest.mark.parametrize(
    ("shape", "start", "stop", "lengths"),
    [
        ((7, 4), 0, None, [2, 2, 2, 1]),  # two rows of four are at most ten elements
        ((7, 4), 3, 6, [2, 1]),
        ((7, 4), 6, 7, [1]),
        ((3, 40), 0, None, [1, 1, 1]),  # a row is never cut
        ((23,), 0, None, [10, 10, 3]),
        ((4, 2, 3), 1, 4, [1, 1, 1]),
        ((2, 3), 0, None, [2]),
    ],
)
def test_chunks_follow_each_other_and_are_as_small_as_rows_allow(
    shape: tuple[int, ...],
    start: int,
    stop: int | None,
    lengths: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dense2moe.upcycle.checkpoints.tensors.CHUNK_ELEMENTS", 10)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    checkpoint = checkpoint_of(tmp_path, {"before": torch.ones(3), "tensor": whole})
    chunks = list(read_chunks(checkpoint.entries["tensor"], start, stop))
    assert [len(chunk) for chunk in chunks] == lengths
    assert torch.equal(torch.cat(chunks), whole[start:stop])


@pytest.mark.parametrize("shape", [(), (0, 4), (3, 0)])
def test_a_tensor_without_rows_or_elements_is_one_chunk(shape: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"tensor": torch.ones(shape)})
    (chunk,) = read_chunks(checkpoint.entries["tensor"])
    assert torch.equal(chunk, torch.ones(shape))


def test_a_chunk_of_a_large_tensor_is_a_small_part_of_it(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"tensor": torch.zeros(3, CHUNK_ELEMENTS // 2, dtype=torch.float16)})
    assert [tuple(chunk.shape) for chunk in read_chunks(checkpoint.entries["tensor"])] == [
        (2, CHUNK_ELEMENTS // 2),
        (1, CHUNK_ELEMENTS // 2),
    ]


def test_a_symlinked_weight_file_is_followed(dense_checkpoint: Path, tmp_path: Path) -> None:
    """The hub's cache is made of symbolic links."""
    shutil.copyfile(dense_checkpoint / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors").symlink_to(dense_checkpoint / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(
        checkpoint.read("model.norm.weight"), open_checkpoint(dense_checkpoint).read("model.norm.weight")
    )
