"""Changes of any file and of folders, and files that were not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.robustness.trees import odd_value

Change = Callable[[Path, Random], None]
"""Changes a file, or what stands in its place."""


_POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid "
    "sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def _remove(path: Path, random: Random) -> None:
    path.unlink()


def _empty(path: Path, random: Random) -> None:
    path.write_bytes(b"")


def _cut(path: Path, random: Random) -> None:
    data = path.read_bytes()
    path.write_bytes(
        data[
            : random.choice(
                (random.randrange(len(data) + 1), random.randrange(min(64, len(data)) + 1), max(0, len(data) - 1))
            )
        ]
    )


def _extend(path: Path, random: Random) -> None:
    path.write_bytes(
        path.read_bytes()
        + random.choice((b"\x00", b"\n", b"x", b"}", b"\xff\xfe", b"\x00" * 4096, random.randbytes(100)))
    )


def _flip(path: Path, random: Random) -> None:
    """One to eight bytes; half of the time among the first, where headers are."""
    data = bytearray(path.read_bytes())
    within = random.choice((len(data), min(256, len(data))))
    for _ in range(random.choice((1, 2, 8)) if data else 0):
        data[random.randrange(within)] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def _erase(path: Path, random: Random) -> None:
    """A stretch of zeros, as a file system leaves it."""
    data = bytearray(path.read_bytes())
    start = random.randrange(len(data) + 1)
    stop = min(len(data), start + random.choice((1, 16, 512, 4096)))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def _spoil_utf8(path: Path, random: Random) -> None:
    data = path.read_bytes()
    at = random.randrange(len(data) + 1)
    path.write_bytes(
        data[:at] + random.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\x80")) + data[at:]
    )


def _encode(path: Path, random: Random) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    path.write_bytes(text.encode(random.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1")), "replace"))


def _point(path: Path, random: Random) -> None:
    path.write_text(_POINTER, encoding="utf-8")


def _make_directory(path: Path, random: Random) -> None:
    path.unlink()
    path.mkdir()


def _link_to_nothing(path: Path, random: Random) -> None:
    path.unlink()
    path.symlink_to("not-there")


def _link_to_itself(path: Path, random: Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _forbid(path: Path, random: Random) -> None:
    path.chmod(0)


def _take_place_of(path: Path, random: Random) -> None:
    """The bytes of another file of the folder."""
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    if others:
        path.write_bytes(random.choice(others).read_bytes())


FILES: dict[str, Change] = {
    "remove": _remove,
    "empty": _empty,
    "cut": _cut,
    "extend": _extend,
    "flip": _flip,
    "erase": _erase,
    "spoil UTF-8": _spoil_utf8,
    "encode": _encode,
    "LFS pointer": _point,
    "directory": _make_directory,
    "dangling link": _link_to_nothing,
    "looping link": _link_to_itself,
    "another file": _take_place_of,
} | ({} if os.geteuid() == 0 else {"forbid": _forbid})


# Folders, and files that were not there.


def _remove_folder(path: Path, random: Random) -> None:
    shutil.rmtree(path)


def _empty_folder(path: Path, random: Random) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _turn_into_file(path: Path, random: Random) -> None:
    shutil.rmtree(path)
    path.write_bytes(random.choice((b"", b"x", b"{}")))


def _link_folder_to_itself(path: Path, random: Random) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.name)


def _link_files(path: Path, random: Random) -> None:
    """As the hub's cache has them: each file a link to one of another name elsewhere, which is no fault."""
    blobs = path.with_name(f"{path.name} blobs")
    blobs.mkdir()
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / blobs.name / str(number))


_STRAY = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b'{"x": 1}',
    b"\xff\xfe",
    b"{% for x in",
    b"{{ raise_exception('x') }}",
    b"PK\x03\x04",
    b"import os\nos.abort()\n",
)


def write_stray(path: Path, random: Random) -> None:
    path.write_bytes(random.choice((*_STRAY, _POINTER.encode(), json.dumps(odd_value(random)).encode())))


FOLDER: dict[str, Change] = {
    "remove": _remove_folder,
    "empty": _empty_folder,
    "file": _turn_into_file,
    "looping link": _link_folder_to_itself,
    "links": _link_files,
}
STRAYS = (
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "LICENSE",
    "README.md",
    "modeling_x.py",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "manifest.json",
    "run.json",
    "[x]\x1b[31m.json",
    "model.onnx_data",
    "config.json~",
)
"""Files that may lie beside a model; where there is one already, it is replaced."""
