"""Mutations of a user's files: each has a name and takes every choice from a seed, so that both say it again.

    table = tabulate({"config.json": JSON, "model.safetensors": SAFETENSORS})
    Mutation("config.json: drop", 7).apply(folder, table)

`FILES` is what can be done to any file; `JSON`, `JSON_LINES`, `YAML`, `SAFETENSORS`, `MODEL` (ONNX) and `TEXT` are what
can be done to files of these formats, mostly by structure: the file stays well formed, and says something else."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import onnx
import ruamel.yaml

Change = Callable[[Path, Random], None]
"""Changes a file, or what stands in its place."""
Table = Mapping[str, tuple[str, Change]]
"""By name, the file that is changed, relative to the input, and its change."""
Place = tuple[Any, Any]
"""A list or mapping, and the index or key of one of its values."""


@dataclass(frozen=True)
class Mutation:
    """A change of a table by its name, and the seed of whatever it chooses."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name} @{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Mutation:
        """What `str` made of one."""
        name, _, seed = text.rpartition(" @")
        return cls(name, int(seed))

    def apply(self, folder: Path, table: Table) -> None:
        """Change the file below `folder`."""
        file, change = table[self.name]
        change(folder / file, Random(f"{self.name} {self.seed}"))


# Values.

_DEEP = 200
_NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    5,
    7,
    1000,
    2**31,
    2**32,
    2**53 + 1,
    2**63,
    -(2**63),
    2**64,
    10**30,
    0.5,
    -0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
)
_TEXTS = (
    "",
    " ",
    "x",
    "0",
    "-1",
    "null",
    "true",
    "nan",
    "[/INST]",
    "[red]red[/red]",
    "<script>alert(1)</script>",
    "{{ 1/0 }}",
    "${HOME}",
    "%s%d%n",
    "\\",
    "'\"",
    "`",
    "\x1b[31mred\x1b[0m",
    "\r\n",
    "two\nlines",
    "\x00",
    "\x07",
    "\u2028",
    "\u202e",
    "\ufeff",
    "\ud83d",
    "\ud83d\ude00",
    "\U0001f600",
    "é",
    "ｆｕｌｌ",
    "../..",
    "/",
    "~",
    "~nobody",
    "*",
    "**",
    "[a-",
    "con",
    "file:///etc/passwd",
    "a" * 300,
    "a" * 5000,
    "1e999",
    "0x10",
    "llama",
    "LlamaForCausalLM",
    "float8_e4m3fn",
    "bfloat16",
)
_EMPTY: tuple[Any, ...] = ([], {}, [[]], [None], {"": None}, {"x": {}}, [0] * 64, ["x", 1, None])


def odd_value(random: Random) -> Any:
    """A value that the one who wrote a reader may not have thought of."""
    match random.randrange(8):
        case 0 | 1:
            return random.choice(_NUMBERS)
        case 2 | 3 | 4:
            return random.choice(_TEXTS)
        case 5:
            return random.choice((None, True, False))
        case 6:
            return copy.deepcopy(random.choice(_EMPTY))
        case _:
            return _nest(random.choice((0, "x", None)), random.choice((2, 25, _DEEP)), random.random() < 0.5)


def _nest(value: Any, depth: int, in_lists: bool) -> Any:
    for _ in range(depth):
        value = [value] if in_lists else {"x": value}
    return value


# Trees of values.


def _choose_place(tree: Any, random: Random) -> Place:
    """A value of a tree: each level is as likely as the next, so that a vocabulary does not outweigh all else."""
    place: Place | None = None
    while isinstance(tree, dict | list) and tree and (place is None or random.random() < 0.6):
        key = random.choice(list(tree)) if isinstance(tree, dict) else random.randrange(len(tree))
        place, tree = (tree, key), tree[key]
    assert place is not None
    return place


def _set(place: Place, random: Random) -> None:
    parent, key = place
    parent[key] = odd_value(random)


def _drop(place: Place, random: Random) -> None:
    parent, key = place
    del parent[key]


def _rename(place: Place, random: Random) -> None:
    parent, key = place
    value = parent.pop(key)
    if isinstance(parent, dict):
        parent[random.choice([*_TEXTS, f"{key}_", str(key).upper(), str(key)[:-1]])] = value
    else:
        parent.insert(random.randrange(len(parent) + 1), value)


def _add(place: Place, random: Random) -> None:
    parent, key = place
    if isinstance(parent, dict):
        parent[random.choice((*_TEXTS, *_WELL_KNOWN, *_WELL_KNOWN))] = odd_value(random)
    else:
        parent.insert(key, odd_value(random))


def _swap(place: Place, random: Random) -> None:
    parent, key = place
    other = random.choice(list(parent)) if isinstance(parent, dict) else random.randrange(len(parent))
    parent[key], parent[other] = parent[other], parent[key]


def _wrap(place: Place, random: Random) -> None:
    parent, key = place
    parent[key] = random.choice(
        (lambda value: [value], lambda value: {"x": value}, str, lambda value: [value, copy.deepcopy(value)])
    )(parent[key])


def _nudge(place: Place, random: Random) -> None:
    """A number that is nearly right, a text that is."""
    parent, key = place
    value = parent[key]
    match value:
        case bool():
            parent[key] = not value
        case int():
            whole = (value + 1, value - 1, -value, value * 2, value // 2, value * 1000, value * 10**7)
            parent[key] = random.choice((*whole, float(value), value + 0.5, str(value)))
        case float():
            parent[key] = random.choice((-value, value * 2, value * 1e6, value * 1e-6, 0.0, str(value)))
        case str():
            at = random.randrange(len(value) + 1)
            parent[key] = random.choice(
                (value[:at], value[:at] + random.choice(_TEXTS) + value[at:], value.upper(), value * 2, f" {value}")
            )
        case list():
            parent[key] = random.choice((value * 2, value[:-1], value[::-1], value[:1] * len(value)))
        case dict():
            parent[key] = random.choice((list(value), list(value.values()), {}, str(value)))
        case _:
            parent[key] = odd_value(random)


_WELL_KNOWN = (
    "sliding_window",
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "quantization_config",
    "auto_map",
    "layer_types",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "torch_dtype",
    "dtype",
    "vocab_size",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "tie_word_embeddings",
    "pretraining_tp",
    "architectures",
    "model_type",
    "text_config",
    "hidden_act",
    "added_tokens_decoder",
    "chat_template",
    "tokenizer_class",
    "model_max_length",
    "extra_special_tokens",
    "temperature",
    "top_k",
    "do_sample",
    "max_length",
    "stop_strings",
    "__class__",
    "x",
)
_TREES: dict[str, Callable[[Place, Random], None]] = {
    "set": _set,
    "drop": _drop,
    "rename": _rename,
    "add": _add,
    "swap": _swap,
    "wrap": _wrap,
    "nudge": _nudge,
}


def change_tree(tree: Any, what: str, random: Random) -> None:
    """Do one of `_TREES` at one place, seldom at more."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if tree:
            _TREES[what](_choose_place(tree, random), random)


def _change_json(path: Path, random: Random, what: str) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    change_tree(tree, what, random)
    path.write_text(json.dumps(tree), encoding="utf-8")


def _change_yaml(path: Path, random: Random, what: str) -> None:
    """As JSON, which is YAML too."""
    tree = ruamel.yaml.YAML(typ="safe", pure=True).load(path)
    change_tree(tree, what, random)
    path.write_text(json.dumps(tree, indent=random.choice((None, 1))), encoding="utf-8")


def _change_line(path: Path, random: Random, what: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    number = random.randrange(len(lines))
    tree = json.loads(lines[number])
    change_tree(tree, what, random)
    lines[number] = json.dumps(tree)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# Text of JSON and YAML.


def _insert(path: Path, random: Random, pieces: tuple[str, ...]) -> None:
    text = path.read_text(encoding="utf-8")
    at = random.randrange(len(text) + 1)
    path.write_bytes((text[:at] + random.choice(pieces) + text[at:]).encode("utf-8", "surrogatepass"))


def _repeat_line(path: Path, random: Random) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    number = random.randrange(len(lines))
    lines.insert(random.randrange(len(lines) + 1), lines[number])
    path.write_text("".join(lines), encoding="utf-8")


def _drop_line(path: Path, random: Random) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    del lines[random.randrange(len(lines))]
    path.write_text("".join(lines), encoding="utf-8")


def _indent_line(path: Path, random: Random) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    number = random.randrange(len(lines))
    lines[number] = random.choice((" ", "  ", "\t", "- ", "? ", "# ")) + lines[number]
    path.write_text("".join(lines), encoding="utf-8")


def _replace_whole(path: Path, random: Random, texts: tuple[str, ...]) -> None:
    path.write_bytes(random.choice(texts).encode("utf-8", "surrogatepass"))


def _repeat_key(path: Path, random: Random) -> None:
    text = path.read_text(encoding="utf-8")
    tree = json.loads(text)
    if isinstance(tree, dict) and tree:
        key = random.choice(list(tree))
        path.write_text(f"{{{json.dumps(key)}: {json.dumps(odd_value(random))}, {text.lstrip()[1:]}", encoding="utf-8")


_JSON_PIECES = (
    ",",
    "}",
    "{",
    "]",
    "[",
    '"',
    "//",
    "NaN",
    "-",
    "1e999",
    "\\u",
    "\\ud83d",
    "\x00",
    "\x1b",
    "\ufeff",
    "9" * 5000,
    "'",
)
_WHOLE_JSON = (
    "null",
    "[]",
    "{}",
    "0",
    '"x"',
    "true",
    "NaN",
    "[" * 100_000,
    '{"x":' * 100_000,
    "{" * 10,
    "[1,2",
    "\ufeff{}",
    '{"\ud83d": 1}',
    "9" * 10_000,
)
_YAML_PIECES = (
    ": ",
    "- ",
    "\t",
    "&a ",
    "*a",
    "!!python/object/apply:os.system ",
    "!!binary ",
    "!x ",
    "? ",
    "| ",
    "> ",
    "%",
    "@",
    "`",
    '"',
    "'",
    "{",
    "}",
    "[",
    "]",
    "#",
    "<<: ",
    "\n---\n",
    "\n...\n",
    "\x00",
    "\x1b[31m",
    "\ud83d",
    "\u2028",
    "\ufeff",
    "=",
    "~",
    "0o7",
    "9" * 5000,
    "\\ud83d",
    '"\\ud83d"',
    "[/INST]",
)
_WHOLE_YAML = (
    "",
    "null",
    "[]",
    "{}",
    "- x",
    "source",
    "source: x",
    "data: {}",
    "&a [*a]",
    "a: &a {b: *a}",
    "[" * 1000,
    "{a: " * 1000,
    "? [a]\n: b",
    '"\\ud83d\\ude00": 1',
    '"\\ud83d": 1',
    "!!set {a}",
    "%YAML 9.9\n---\na: 1",
    "---\n---\n",
    "\x00",
    "# only a comment",
    "source: {hub: a/b, revision: x}\ndata: {source: {kind: hub}}",
    "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\ne: &e [*d, *d, *d, "
    "*d]\nf: [*e, *e, *e, *e, *e, *e]",
)


# Any file.

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


def _write_stray(path: Path, random: Random) -> None:
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
    "model.onnx.data",
    "config.json~",
)
"""Files that may lie beside a model; where there is one already, it is replaced."""


# Safetensors.

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


SAFETENSORS: dict[str, Change] = {f"header {what}": partial(_change_header, what=what) for what in _TREES} | {
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


# ONNX.

_OPERATORS = (
    "Identity",
    "Relu",
    "MatMul",
    "Nonesuch",
    "",
    "Loop",
    "If",
    "MoE",
    "QMoE",
    "GroupQueryAttention",
    "Cast",
    "Gather",
    "Constant",
)
_INTEGERS = (0, -1, 1, 2, 3, 7, 2**31, -(2**63), 2**63 - 1)


def _change_onnx(path: Path, random: Random, what: str) -> None:
    proto = onnx.load_model(path, load_external_data=False)
    _ONNX[what](proto, random)
    path.write_bytes(proto.SerializeToString())


def _drop_node(proto: onnx.ModelProto, random: Random) -> None:
    del proto.graph.node[random.randrange(len(proto.graph.node))]


def _repeat_node(proto: onnx.ModelProto, random: Random) -> None:
    proto.graph.node.append(random.choice(proto.graph.node))


def _change_operator(proto: onnx.ModelProto, random: Random) -> None:
    random.choice(proto.graph.node).op_type = random.choice(_OPERATORS)


def _change_domain(proto: onnx.ModelProto, random: Random) -> None:
    random.choice(proto.graph.node).domain = random.choice(("", "com.microsoft", "ai.onnx.ml", "x.y", "\x1b[31m"))


def _change_edge(proto: onnx.ModelProto, random: Random) -> None:
    node = random.choice([node for node in proto.graph.node if node.input])
    others = [name for other in proto.graph.node for name in other.output] + [
        tensor.name for tensor in proto.graph.initializer
    ]
    node.input[random.randrange(len(node.input))] = random.choice((random.choice(others), "", "not-there"))


def _change_arity(proto: onnx.ModelProto, random: Random) -> None:
    node = random.choice([node for node in proto.graph.node if node.input])
    if random.random() < 0.5:
        del node.input[random.randrange(len(node.input))]
    else:
        node.input.append(node.input[0])


def _rename_output(proto: onnx.ModelProto, random: Random) -> None:
    node = random.choice(proto.graph.node)
    node.output[random.randrange(len(node.output))] = random.choice(
        ("x", "", node.input[0] if node.input else "y", "logits")
    )


def _shuffle_nodes(proto: onnx.ModelProto, random: Random) -> None:
    nodes = list(proto.graph.node)
    random.shuffle(nodes)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _choose_attribute(proto: onnx.ModelProto, random: Random) -> tuple[onnx.NodeProto, int]:
    node = random.choice([node for node in proto.graph.node if node.attribute])
    return node, random.randrange(len(node.attribute))


def _drop_attribute(proto: onnx.ModelProto, random: Random) -> None:
    node, number = _choose_attribute(proto, random)
    del node.attribute[number]


def _change_attribute(proto: onnx.ModelProto, random: Random) -> None:
    node, number = _choose_attribute(proto, random)
    attribute = node.attribute[number]
    match attribute.type:
        case onnx.AttributeProto.INT:
            attribute.i = random.choice((*_INTEGERS, attribute.i + 1))
        case onnx.AttributeProto.FLOAT:
            attribute.f = random.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
        case onnx.AttributeProto.STRING:
            attribute.s = random.choice((b"", b"x", b"\xff", b"swiglu", b"relu"))
        case onnx.AttributeProto.INTS:
            attribute.ints[:] = random.choice((list(attribute.ints)[:-1], [*attribute.ints, 1], [-1], [2**40]))
        case _:
            attribute.type = onnx.AttributeProto.INT


def _retype_attribute(proto: onnx.ModelProto, random: Random) -> None:
    node, number = _choose_attribute(proto, random)
    name = node.attribute[number].name
    node.attribute[number].CopyFrom(
        onnx.helper.make_attribute(name, random.choice((1, 1.0, "x", [1, 2], [1.0], ["x"])))
    )


def _rename_attribute(proto: onnx.ModelProto, random: Random) -> None:
    node, number = _choose_attribute(proto, random)
    node.attribute[number].name = random.choice(("x", "", f"{node.attribute[number].name}_"))


def _cut_initializer(proto: onnx.ModelProto, random: Random) -> None:
    tensor = random.choice(
        [tensor for tensor in proto.graph.initializer if tensor.raw_data] or list(proto.graph.initializer)
    )
    tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]


def _change_dims(proto: onnx.ModelProto, random: Random) -> None:
    tensor = random.choice(proto.graph.initializer)
    dims = list(tensor.dims)
    tensor.dims[:] = random.choice(
        (dims[::-1], dims[:-1], [*dims, 1], [2 * size for size in dims], [0], [-1], [2**40, 2**40], [2**62])
    )


def _change_tensor_type(proto: onnx.ModelProto, random: Random) -> None:
    random.choice(proto.graph.initializer).data_type = random.choice((0, 1, 2, 6, 7, 8, 10, 11, 16, 21, 22, 99))


def _drop_initializer(proto: onnx.ModelProto, random: Random) -> None:
    del proto.graph.initializer[random.randrange(len(proto.graph.initializer))]


def _rename_initializer(proto: onnx.ModelProto, random: Random) -> None:
    tensor = random.choice(proto.graph.initializer)
    tensor.name = random.choice(("", "x", random.choice(proto.graph.initializer).name, "input_ids", "[red]\x1b[31m"))


def _change_external(proto: onnx.ModelProto, random: Random) -> None:
    """Where the bytes of a tensor lie."""
    outside = [tensor for tensor in proto.graph.initializer if tensor.external_data]
    if not outside:
        return
    entry = random.choice(random.choice(outside).external_data)
    values = {
        "location": (
            "",
            "x",
            "../model.onnx.data",
            "/etc/passwd",
            "config.json",
            ".",
            "model.onnx",
            "a\x00b",
            "x" * 5000,
        ),
        "offset": ("-1", "1", "7", "x", "", "99999999", str(2**63), str(2**64), "1e3"),
        "length": ("-1", "0", "1", "x", "", "99999999", str(2**63)),
    }
    if random.random() < 0.2:
        entry.key = random.choice(("", "x", "offset", "length", "location", "checksum"))
    else:
        entry.value = random.choice(values.get(entry.key, ("x",)))


def _inline_external(proto: onnx.ModelProto, random: Random) -> None:
    outside = [tensor for tensor in proto.graph.initializer if tensor.external_data]
    if outside:
        tensor = random.choice(outside)
        if random.random() < 0.5:
            tensor.data_location = onnx.TensorProto.DEFAULT
        else:
            del tensor.external_data[random.randrange(len(tensor.external_data))]


def _change_value(proto: onnx.ModelProto, random: Random) -> None:
    """An input or output of the graph."""
    values = random.choice((proto.graph.input, proto.graph.output))
    value = random.choice(values)
    kind = value.type.tensor_type
    match random.randrange(7):
        case 0:
            values.remove(value)
        case 1:
            value.name = random.choice(
                ("x", "", "logits", "input_ids", "past_key_values.9.key", "present.key", f"{value.name}\x1b")
            )
        case 2:
            kind.elem_type = random.choice((0, 1, 7, 8, 10, 99))
        case 3 if kind.shape.dim:
            kind.shape.dim[random.randrange(len(kind.shape.dim))].dim_value = random.choice(_INTEGERS)
        case 4 if kind.shape.dim:
            del kind.shape.dim[random.randrange(len(kind.shape.dim))]
        case 5:
            value.ClearField("type")
        case _:
            values.append(value)


def _change_opset(proto: onnx.ModelProto, random: Random) -> None:
    entry = random.choice(proto.opset_import)
    match random.randrange(3):
        case 0:
            proto.opset_import.remove(entry)
        case 1:
            entry.version = random.choice((0, -1, 1, 7, 99, 2**40))
        case _:
            entry.domain = random.choice(("", "x", "com.microsoft"))


def _change_version(proto: onnx.ModelProto, random: Random) -> None:
    proto.ir_version = random.choice((0, -1, 1, 3, 99, 2**40))


def _drop_graph(proto: onnx.ModelProto, random: Random) -> None:
    match random.randrange(4):
        case 0:
            proto.ClearField("graph")
        case 1:
            del proto.graph.node[:]
        case 2:
            del proto.graph.initializer[:]
        case _:
            del proto.graph.output[:]


_ONNX: dict[str, Callable[[onnx.ModelProto, Random], None]] = {
    "drop node": _drop_node,
    "repeat node": _repeat_node,
    "operator": _change_operator,
    "domain": _change_domain,
    "edge": _change_edge,
    "arity": _change_arity,
    "output name": _rename_output,
    "order of nodes": _shuffle_nodes,
    "drop attribute": _drop_attribute,
    "attribute": _change_attribute,
    "type of attribute": _retype_attribute,
    "name of attribute": _rename_attribute,
    "cut initializer": _cut_initializer,
    "dims": _change_dims,
    "type of initializer": _change_tensor_type,
    "drop initializer": _drop_initializer,
    "name of initializer": _rename_initializer,
    "external": _change_external,
    "inline": _inline_external,
    "interface": _change_value,
    "opset": _change_opset,
    "IR version": _change_version,
    "drop graph": _drop_graph,
}


# Text.

_WHOLE_TEXTS = (
    b" ",
    b"\n",
    b"\n" * 5000,
    b"x",
    b"x " * 20,
    b"a" * 200_000,
    b"\x00" * 1000,
    b"\xff" * 1000,
    b"<s></s>" * 500,
    b"%%",
    b"\n\n" * 500,
    b"\xef\xbb\xbf",
    "\U0001f600".encode() * 500,
    "é\u0301".encode() * 500,
    b"\r\n\r\n" * 100,
    b"\r" * 100,
    b"\x1b[31m" * 100,
    b"\x1f\x8b\x08\x00" + bytes(100),
    b"PK\x03\x04",
)
_PIECES = (
    b"\x00",
    b"<s>",
    b"</s>",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\r",
    b"a" * 10_000,
    b"\x0c",
    "\u2028".encode(),
    "\U0001f600".encode(),
    b"\n\n\n\n",
    b"{}",
    b"[]",
    b"1e999",
)


def _replace_text(path: Path, random: Random) -> None:
    path.write_bytes(random.choice(_WHOLE_TEXTS))


def _shorten_text(path: Path, random: Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: random.choice((1, 10, 40, 100, 200, 400, 1000))])


def _insert_bytes(path: Path, random: Random) -> None:
    data = path.read_bytes()
    at = random.randrange(len(data) + 1)
    path.write_bytes(data[:at] + random.choice(_PIECES) + data[at:])


def _end_lines(path: Path, random: Random) -> None:
    path.write_bytes(
        path.read_bytes().replace(b"\n", random.choice((b"\r\n", b"\r", b"\n\r", b"", b" ", "\u2028".encode())))
    )


TEXT: dict[str, Change] = {
    "text": _replace_text,
    "short": _shorten_text,
    "insert": _insert_bytes,
    "ends of lines": _end_lines,
}


# By format.

JSON: dict[str, Change] = {what: partial(_change_json, what=what) for what in _TREES} | {
    "repeat key": _repeat_key,
    "insert": partial(_insert, pieces=_JSON_PIECES),
    "whole": partial(_replace_whole, texts=_WHOLE_JSON),
}
JSON_LINES: dict[str, Change] = {what: partial(_change_line, what=what) for what in _TREES} | {
    "repeat line": _repeat_line,
    "drop line": _drop_line,
    "piece": partial(_insert, pieces=_JSON_PIECES),
}
YAML: dict[str, Change] = {what: partial(_change_yaml, what=what) for what in _TREES} | {
    "repeat line": _repeat_line,
    "drop line": _drop_line,
    "indent line": _indent_line,
    "insert": partial(_insert, pieces=_YAML_PIECES),
    "whole": partial(_replace_whole, texts=_WHOLE_YAML),
}
MODEL: dict[str, Change] = {what: partial(_change_onnx, what=what) for what in _ONNX}


def tabulate(files: Mapping[str, Mapping[str, Change]], folder: str | None = None) -> Table:
    """All that can be done to each file, its own changes and those of any file.

    And to the folder of a model, to which strays can be added.
    """
    table = {
        f"{file}: {what}": (file, change)
        for file, changes in files.items()
        for what, change in (FILES | dict(changes)).items()
    }
    if folder is not None:
        table |= {f"{folder}: {what}": (folder, change) for what, change in FOLDER.items()}
        table |= {f"{folder}: stray {name!a}": (f"{folder}/{name}", _write_stray) for name in STRAYS}
    return table
