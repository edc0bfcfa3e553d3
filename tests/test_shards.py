"""Shards are what safetensors reads, whatever they are made of.

And copies are the very bytes of their source, however the system copies.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from told import tells

from dense2moe.upcycle.checkpoints.headers import index_tensors
from dense2moe.upcycle.checkpoints.writer import Content, Span, TensorSpec, read_span, write_tensors
from dense2moe.upcycle.errors import UpcycleError

PIECE = 1 << 24  # what is read at a time where the kernel does not copy


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of tensor data in each weight file, in order."""
    files = sorted(directory.glob("*.safetensors"))
    return {file.name: file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files}


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_shards_are_read_by_safetensors_and_obey_the_limit(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    # In float32 12, 12, 4, 0, 40, 24 and 20 bytes; the 40 are more than the limit and lie alone.
    shapes = {"a": (3,), "b": (1, 3), "c": (), "d": (0,), "e": (5, 2), "f": (2, 3), "g": (5,)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    item = dtype.itemsize
    write_tensors(tmp_path, specs_of(tensors), tensors.items(), shard_bytes=7 * item)
    assert sizes(tmp_path) == {
        f"model-0000{number}-of-00004.safetensors": elements * item
        for number, elements in enumerate((7, 10, 6, 5), start=1)
    }
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 28 * item}
    stored: dict[str, str] = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                stored[name] = file.name
                tensor = opened.get_tensor(name)
                assert tensor.dtype == dtype
                assert torch.equal(tensor, tensors[name])
    assert index["weight_map"] == stored
    assert stored.keys() == tensors.keys()
    assert list(index_tensors(tmp_path)) == list(tensors)


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([1] * 10, 8, [5, 5]),  # and not 8 and 2
        ([1] * 10, 4, [4, 4, 2]),  # 3, 3, 3 and 1 would be one shard more
        ([6, 1, 1, 1, 1], 8, [6, 4]),
        ([1, 1, 9, 1], 4, [2, 9, 1]),
        ([5], 8, [5]),
    ],
)
def test_shards_are_as_few_as_the_limit_allows_and_then_as_even_as_can_be(
    lengths: list[int], limit: int, expected: list[int], tmp_path: Path
) -> None:
    tensors = {str(n): torch.zeros(length, dtype=torch.uint8) for n, length in enumerate(lengths)}
    write_tensors(tmp_path, specs_of(tensors), tensors.items(), shard_bytes=limit)
    assert list(sizes(tmp_path).values()) == expected


@pytest.mark.parametrize("limit", [11, 12])
def test_a_tensor_larger_than_the_limit_has_a_shard_of_its_own(limit: int, tmp_path: Path) -> None:
    tensors = {"big": torch.ones(3), "small": torch.ones(1)}
    write_tensors(tmp_path, specs_of(tensors), tensors.items(), shard_bytes=limit)
    assert list(sizes(tmp_path).values()) == [12, 4]


def test_what_fits_into_one_file_has_no_index(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3),
        "b": torch.ones(1, 2, dtype=torch.bfloat16),
        "c": torch.tensor([1, 2], dtype=torch.uint8),
    }
    write_tensors(tmp_path, specs_of(tensors), tensors.items(), shard_bytes=18)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert opened.offset_keys() == list(tensors)


def test_no_tensors_at_all_are_a_file_with_an_empty_header(tmp_path: Path) -> None:
    write_tensors(tmp_path, [], [], shard_bytes=1)
    assert load_file(tmp_path / "model.safetensors") == index_tensors(tmp_path) == {}


def test_a_transposed_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_tensors(tmp_path, specs_of({"a": tensor}), [("a", tensor)], shard_bytes=100, stem="quantized")
    assert load_file(tmp_path / "quantized.safetensors")["a"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


A = TensorSpec("a", torch.float32, (1,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], f"planned {A}, was given nothing"),
        ([("b", torch.ones(1))], f"planned {A}, was given b"),
        ([("a", torch.ones(2))], f"planned {A}, was given the shape (2,)"),
        ([("a", torch.ones(()))], f"planned {A}, was given the shape ()"),
        ([("a", torch.ones(1).half())], f"planned {A}, was given torch.float16"),
        ([("a", [torch.ones(1).int()])], f"planned {A}, was given torch.int32"),
        ([("a", [])], f"planned {A}, was given 0 bytes and not 4"),
        ([("a", [torch.ones(1), torch.ones(1)])], f"planned {A}, was given 8 bytes and not 4"),
        ([("a", torch.ones(1)), ("b", torch.ones(1))], "tensor b was not planned"),
    ],
)
def test_tensors_that_do_not_follow_the_plan_are_our_own_mistake(
    given: list[tuple[str, Any]], message: str, tmp_path: Path
) -> None:
    assert str(A) == "TensorSpec(name='a', dtype=torch.float32, shape=(1,))"
    with pytest.raises(ValueError) as excinfo:
        write_tensors(tmp_path, [A], given, shard_bytes=100)
    assert str(excinfo.value) == message
    assert not isinstance(excinfo.value, UpcycleError)


@pytest.mark.parametrize("num_bytes", [3, 5])
def test_spans_of_another_length_than_planned_are_our_own_mistake(num_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"12345678")
    with pytest.raises(ValueError) as excinfo:
        write_tensors(tmp_path, [A], [("a", [Span(tmp_path / "source", 0, num_bytes)])], shard_bytes=100)
    assert str(excinfo.value) == f"planned {A}, was given {num_bytes} bytes and not 4"


# Contents that follow each other


def test_tensors_of_any_shape_that_follow_each_other_are_one_tensor(tmp_path: Path) -> None:
    whole = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    parts = [whole[:1], whole[1:1], whole[1:3].reshape(-1), whole[3:]]
    write_tensors(tmp_path, specs_of({"a": whole}), [("a", iter(parts))], shard_bytes=100)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], whole)


def test_one_content_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """Memory is that of one content: the one before is on the disk when the next is made."""
    on_disk = []

    def contents() -> Iterator[Content]:
        for _ in range(3):
            on_disk.append((tmp_path / "model.safetensors").read_bytes().count(255))
            yield torch.full((2,), 255, dtype=torch.uint8)

    write_tensors(tmp_path, [TensorSpec("a", torch.uint8, (6,))], [("a", contents())], shard_bytes=100)
    assert on_disk == [0, 2, 4]


def reserved(directory: Path) -> int:
    """Size of the one weight file in `directory`, asked for while the only tensor is made.

    And before the file has any of it.
    """
    sizes_seen: list[int] = []

    def contents() -> Iterator[Content]:
        sizes_seen.append((directory / "model.safetensors").stat().st_size)
        yield torch.full((1000,), 255, dtype=torch.uint8)

    write_tensors(directory, [TensorSpec("a", torch.uint8, (1000,))], [("a", contents())], shard_bytes=1000)
    assert load_file(directory / "model.safetensors")["a"].eq(255).all()
    return sizes_seen[0]


def test_room_for_a_shard_is_taken_before_its_tensors_are_made(tmp_path: Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("no posix_fallocate here")
    assert reserved(tmp_path) == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, None])
def test_where_room_cannot_be_taken_files_grow(
    number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        assert number is not None
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    assert reserved(tmp_path) == (tmp_path / "model.safetensors").stat().st_size - 1000


def test_a_disk_too_small_for_a_shard_is_told_before_any_tensor_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def contents() -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("a tensor was made")
        yield

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path, [TensorSpec("a", torch.uint8, (1,))], contents(), shard_bytes=1000)


# Copies


def copy_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is."""


def copy_a_few_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may copy less than it was asked for."""

    def copy(source: int, target: int, count: int, *, offset_src: int) -> int:
        return os.write(target, os.pread(source, min(count, 7), offset_src))

    monkeypatch.setattr(os, "copy_file_range", copy, raising=False)


def copy_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python offers the call on Linux alone."""
    monkeypatch.delattr(os, "copy_file_range", raising=False)


def refuse_with(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """The kernel says that it cannot copy between these files."""

    def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: Any, **keywords: Any) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "copy_file_range", fail, raising=False)

    return refuse


UNSUPPORTED = {name: refuse_with(getattr(errno, name)) for name in ("EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP")}
WAYS = {
    "kernel": copy_in_the_kernel,
    "few bytes": copy_a_few_bytes_at_a_time,
    "no call": copy_without_the_kernel,
    **UNSUPPORTED,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@every_way
def test_spans_are_copied_byte_for_byte(
    way: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way(monkeypatch)
    source, other = tmp_path / "source", tmp_path / "other"
    data = torch.randint(256, (500,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    source.write_bytes(data)
    other.write_bytes(data[::-1])
    tensor = torch.arange(3, dtype=torch.uint8)
    contents = {
        "whole": [Span(source, 0, 500)],
        "inside": [Span(source, 13, 1)],
        "nothing": [Span(source, 499, 0)],
        "mixed": [Span(other, 490, 10), tensor, Span(source, 100, 50), Span(source, 90, 20), tensor],
    }
    expected = {
        "whole": data,
        "inside": data[13:14],
        "nothing": b"",
        "mixed": data[::-1][490:] + bytes(range(3)) + data[100:150] + data[90:110] + bytes(range(3)),
    }
    specs = [TensorSpec(name, torch.uint8, (len(content),)) for name, content in expected.items()]
    output = tmp_path / "output"
    output.mkdir()
    write_tensors(output, specs, contents.items(), shard_bytes=501)
    assert sizes(output) == {"model-00001-of-00002.safetensors": 500, "model-00002-of-00002.safetensors": 87}
    found = {
        name: bytes_of(tensor) for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert found == expected
    assert (source.read_bytes(), other.read_bytes()) == (data, data[::-1])


def test_the_kernel_is_asked_to_copy_and_asked_no_more_once_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(source: int, target: int, count: int, *, offset_src: int) -> int:
        asked.append((count, offset_src))
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", fail, raising=False)
    (tmp_path / "source").write_bytes(b"12345678")
    spans = [Span(tmp_path / "source", 2, 3), Span(tmp_path / "source", 0, 1)]
    write_tensors(tmp_path, [TensorSpec("a", torch.uint8, (4,))], [("a", spans)], shard_bytes=100)
    assert asked == [(3, 2)]
    assert bytes_of(load_file(tmp_path / "model.safetensors")["a"]) == b"3451"


def test_a_kernel_that_stops_in_the_middle_of_a_span_is_gone_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter([3, None])

    def copy(source: int, target: int, count: int, *, offset_src: int) -> int:
        if (step := next(steps)) is None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.write(target, os.pread(source, step, offset_src))

    monkeypatch.setattr(os, "copy_file_range", copy, raising=False)
    (tmp_path / "source").write_bytes(b"0123456789")
    write_tensors(
        tmp_path, [TensorSpec("a", torch.uint8, (8,))], [("a", [Span(tmp_path / "source", 1, 8)])], shard_bytes=100
    )
    assert bytes_of(load_file(tmp_path / "model.safetensors")["a"]) == b"12345678"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_is_no_reason_to_copy_otherwise(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_with(number)(monkeypatch)
    (tmp_path / "source").write_bytes(b"1234")
    with pytest.raises(OSError) as excinfo:
        write_tensors(tmp_path, [A], [("a", [Span(tmp_path / "source", 0, 4)])], shard_bytes=100)
    assert excinfo.value.errno == number


@every_way
def test_a_source_that_ends_early_is_refused(
    way: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way(monkeypatch)
    source = tmp_path / "source"
    source.write_bytes(b"12345")
    with pytest.raises(UpcycleError) as excinfo:
        write_tensors(tmp_path, [A], [("a", [Span(source, 2, 4)])], shard_bytes=100)
    assert str(excinfo.value) == f"{source}: ended while it was copied; the file changed while it was read; run again"


def test_a_long_span_is_copied_without_the_kernel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_without_the_kernel(monkeypatch)
    data = torch.arange((PIECE + 20) // 4, dtype=torch.int32)
    (tmp_path / "source").write_bytes(bytes_of(data))
    spec = TensorSpec("a", torch.int32, (len(data) - 1,))
    write_tensors(tmp_path, [spec], [("a", [Span(tmp_path / "source", 4, spec.num_bytes)])], shard_bytes=1 << 30)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], data[1:])


def test_many_shards_are_copied_side_by_side_and_every_tensor_is_reported_once(tmp_path: Path) -> None:
    data = torch.randint(256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "source").write_bytes(bytes_of(data))
    specs = [TensorSpec(f"t{n}", torch.uint8, (20,)) for n in range(90)]
    made = {n: torch.full((20,), n, dtype=torch.uint8) for n in range(0, 90, 7)}  # and copies between them
    contents = [
        (spec.name, made[n] if n in made else [Span(tmp_path / "source", 11 * n, 20)]) for n, spec in enumerate(specs)
    ]
    seen: list[tuple[int, int]] = []
    output = tmp_path / "output"
    output.mkdir()
    write_tensors(output, specs, contents, shard_bytes=100, report=lambda done, total: seen.append((done, total)))
    found = {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[f"t{n}"], made.get(n, data[11 * n : 11 * n + 20])) for n in range(90))
    assert seen == [(done, 90) for done in range(1, 91)]


def test_a_copy_that_fails_in_one_of_many_shards_is_told(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 30)
    specs = [TensorSpec(f"t{n}", torch.uint8, (10,)) for n in range(6)]
    contents = [(spec.name, [Span(tmp_path / "source", 25 if n == 3 else 0, 10)]) for n, spec in enumerate(specs)]
    with pytest.raises(UpcycleError) as excinfo:
        write_tensors(tmp_path, specs, contents, shard_bytes=10)
    assert tells(str(excinfo.value), f"{tmp_path / 'source'}: ended", "run again")
    assert not list(tmp_path.glob("*.index.json"))


def test_nothing_is_copied_until_all_is_made(tmp_path: Path) -> None:
    """What copying allocates meanwhile would keep the memory of the tensors made in pieces."""
    (tmp_path / "source").write_bytes(b"\xff" * 10)
    threads, on_disk = threading.active_count(), []
    specs = [TensorSpec(name, torch.uint8, (10,)) for name in "abc"]

    def contents() -> Iterator[tuple[str, torch.Tensor | list[Content]]]:
        yield "a", [Span(tmp_path / "source", 0, 10)]
        yield "b", torch.zeros(10, dtype=torch.uint8)
        on_disk.append(((tmp_path / "model.safetensors").read_bytes().count(255), threading.active_count() - threads))
        yield "c", [Span(tmp_path / "source", 0, 10)]

    write_tensors(tmp_path, specs, contents(), shard_bytes=100)
    assert on_disk == [(0, 0)]
    assert (tmp_path / "model.safetensors").read_bytes().count(255) == 20


# Reading spans


def test_a_span_is_read_in_chunks_that_follow_each_other(tmp_path: Path) -> None:
    data = torch.arange((PIECE + 20) // 4, dtype=torch.int32)
    (tmp_path / "source").write_bytes(bytes_of(data))
    chunks = list(read_span(Span(tmp_path / "source", 4, PIECE + 12)))
    assert [len(chunk) for chunk in chunks] == [PIECE, 12]
    assert torch.equal(torch.cat(chunks).view(torch.int32), data[1:-1])
    assert [len(chunk) for chunk in read_span(Span(tmp_path / "source", 0, PIECE))] == [PIECE]
    assert list(read_span(Span(tmp_path / "source", 0, 0))) == []


def test_a_span_beyond_the_end_of_its_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "source"
    file.write_bytes(b"12345")
    with pytest.raises(UpcycleError) as excinfo:
        list(read_span(Span(file, 2, 4)))
    assert str(excinfo.value) == f"{file}: ended while it was read; the file changed; run again"
