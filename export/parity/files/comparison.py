"""A package's tokenizer and configs against the checkpoint's.

A graph with the right logits is still another model to its users when the tokenizer gives other ids, when text ends at
another token, or when a runtime is told other sizes. Four things are compared, each where the package has it:

1. The tokenizer: its vocabulary by id, the ids of a set of texts with and without special tokens, the text that ids
   decode to, the special tokens, the chat template. `AutoTokenizer` loads both with the checkpoint's config: the class
   depends on the architecture, and a package of another maker may have no config.json.
2. generation_config.json: where text ends and how it is drawn. A setting that is left out counts as transformers'
   default.
3. config.json: architecture, sizes, special tokens.
4. genai_config.json: the same sizes and tokens, and names that the graph has. onnxruntime-genai wants every special
   token, so where the checkpoint has none the writers' substitutes are right: `dense2moe.export.package.genai_config`,
   and `resolve_special_token_ids` of genai's builder (models/builders/base.py, 0.18.0), which also lets text end at the
   tokenizer's end token.

A package of another maker may leave files out, which is told; from ours none may be missing that the checkpoint has. A
file that cannot be read is a difference. Code beside a tokenizer or a config is never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, AutoTokenizer

from dense2moe.export import names
from dense2moe.export.opening import open_package
from dense2moe.export.parity.precision import has_experts, is_dense
from dense2moe.export.parity.records import FilesCheck
from dense2moe.export.storage import GENAI_CONFIG_NAME, LOWERING_KEY, MODEL_NAME
from dense2moe.upcycle.checkpoints.config_files import CONFIG_NAME, TOKENIZER_CONFIG_NAME
from dense2moe.upcycle.checkpoints.reader import GENERATION_CONFIG_NAME

_TEMPLATE_NAME = "chat_template.jinja"
_VOCABULARY_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
_TOKENIZER_JSON_NAMES = (
    "tokenizer.json",
    TOKENIZER_CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)

_ENGLISH = "The quick brown fox doesn't jump over 13 lazy dogs; “why”, it asks – and naïve café-goers shrug."
_CODE = "def f(x: int) -> str:\n\tif x != 0x1F:\n        return f'{x:>8}' + \"\\n\"  # done\n\n\nprint(f(-3.14e-5))\r\n"
_TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n \n",
    "\t\t x \t",
    "a",
    " a",
    "a ",
    "Hello world",
    " Hello  World ",
    "HELLO hello HeLLo",
    "don't I'LL we've",
    "0 1 23 456 7890 12345678901234567890",
    "3.14159, 1,000,000 and 2026-11-30",
    "<a href='x'>&amp;</a> {\"k\": [1, null]}",
    "https://a.b/c?d=e&f=%20#g",
    "😀 👩‍👩‍👧 🇫🇷 ✅",
    "中文字符和日本語のテキスト、한국어 문장",
    "Привет мир، مرحبا بالعالم",
    "e\u0301 é ﬁ ½ ™ \u00a0\u200b\ufeff\u2028x",
    "\x00\x07\x7f",
    "▁ Ġ Ċ",
    _ENGLISH,
    _CODE,
    " ".join([_ENGLISH, _CODE] * 50),
)

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_DEFAULTS: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "max_length": 20,
    "use_cache": True,
}
"""Defaults of generation settings but those that are 0, off or none.

Source: GenerationConfig._get_default_generation_params, transformers 5.23.
"""

_GENAI_SIZES = {
    "model.vocab_size": "vocab_size",
    "model.decoder.hidden_size": "hidden_size",
    "model.decoder.num_hidden_layers": "num_hidden_layers",
    "model.decoder.num_attention_heads": "num_attention_heads",
    "model.decoder.num_key_value_heads": "num_key_value_heads",
    "model.decoder.head_size": "head_dim",
}
"""Where genai_config.json has a size, and the config's name of it."""

_GENAI_NAMES = names.genai_names()
_GENAI_NAMES["inputs"][names.POSITION_IDS] = names.POSITION_IDS
"""The names in every graph that `dense2moe.export.runtime.decoder.Decoder` takes; genai has the same defaults."""

_SHARING = ("GroupQueryAttention", "PagedAttention")  # operators that write the present into the buffer of the past
_BUILDER_BOS = 1  # what genai's builder writes where it finds none
_OUR_EOS = 0  # and what we write
_SHOWN = 60  # characters of a value in a sentence
_REASON = 200  # and of a library's complaint

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Failure:
    """Why a file could not be read, in one line."""

    reason: str


@dataclass(frozen=True)
class _Graph:
    """Of a graph: whether we wrote it, its names of inputs and outputs.

    And whether past and present can share a buffer.
    """

    is_ours: bool
    has_experts: bool
    names: Mapping[str, Collection[str]]
    can_share: bool


@dataclass(frozen=True)
class _Sides:
    """The package, the checkpoint, and what several comparisons read of them.

    None where it is not there or cannot be read.
    """

    package: Path
    twin: Path
    config: Any
    tokenizer: Any
    graph: _Graph | None

    @property
    def is_ours(self) -> bool:
        """Whether we wrote the package, so that nothing may be missing."""
        return self.graph is not None and self.graph.is_ours

    @property
    def is_parent(self) -> bool:
        """Whether the checkpoint is dense and the package a mixture, made from it or from another.

        One architecture has the other's sizes.
        """
        return self.graph is not None and self.graph.has_experts and self.config is not None and is_dense(self.config)


def check_files(package: Path, twin: Path) -> FilesCheck:
    """Compare the tokenizer and the configs of a package with those of the checkpoint `twin`.

    The checkpoint may be the reference of a package by another maker. A damaged file is a difference, never an
    exception.
    """
    config = _attempt(_load_config, twin)
    tokenizer = None if isinstance(config, _Failure) else _load_tokenizer(twin, config)
    graph = _attempt(_read_graph, package)
    failures = tuple(
        f"{name}: {whose} cannot be read ({found.reason}); {cure}"
        for name, whose, found, cure in (
            (MODEL_NAME, "the package's", graph, "it must be an ONNX model"),
            (CONFIG_NAME, "the checkpoint's", config, "it must be the config of a transformers model"),
            (
                _vocabulary_name(twin),
                "the checkpoint's tokenizer",
                tokenizer,
                "it must be one that transformers can load",
            ),
        )
        if isinstance(found, _Failure)
    )
    sides = _Sides(package, twin, _or_none(config), _or_none(tokenizer), _or_none(graph))
    parts = (
        FilesCheck(differences=failures),
        _check_tokenizer(sides),
        _check_generation(sides),
        _check_config(sides),
        _check_genai(sides),
    )
    return FilesCheck(
        *(
            tuple(entry for part in parts for entry in getattr(part, field))
            for field in ("compared", "missing", "differences")
        )
    )


# What files hold, and how it is told.


def _attempt(call: Callable[..., _T], *arguments: Any) -> _T | _Failure:
    """What a library makes of a file, or its complaint; a panic in Rust is no `Exception`."""
    try:
        return call(*arguments)
    except BaseException as error:
        if isinstance(error, MemoryError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        text = (
            str(error)
            if isinstance(error, ValueError | OSError) or type(error) is Exception
            else f"{type(error).__name__}: {error}"
        )
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
        return _Failure(line if len(line) <= _REASON else f"{line[:_REASON]}…")


def _or_none(found: _T | _Failure) -> _T | None:
    return None if isinstance(found, _Failure) else found


def _load_config(directory: Path) -> Any:
    """The config of a checkpoint's decoder, which is a part of the config in a model of text and images."""
    return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True).get_text_config(
        decoder=True
    )


def _read_graph(package: Path) -> _Graph:
    model = open_package(package).model
    weights = {tensor.name for tensor in model.graph.initializer}
    return _Graph(
        is_ours=any(entry.key == LOWERING_KEY for entry in model.metadata_props),
        has_experts=has_experts(model),
        names={
            "inputs": {value.name for value in model.graph.input} - weights,
            "outputs": {value.name for value in model.graph.output},
        },
        can_share=any(node.op_type in _SHARING for node in model.graph.node),
    )


def _read_json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


def _read_sides(sides: _Sides, name: str) -> tuple[dict[str, Any], dict[str, Any]] | FilesCheck:
    """A JSON file of the package and of the checkpoint, or what is wrong with it."""
    found, expected = (_attempt(_read_json, directory / name) for directory in (sides.package, sides.twin))
    if isinstance(found, _Failure) or isinstance(expected, _Failure):
        pairs = (("package", found), ("checkpoint", expected))
        return FilesCheck(
            (name,), (), tuple(_damaged(name, whose, each) for whose, each in pairs if isinstance(each, _Failure))
        )
    return found, expected


def _damaged(name: str, whose: str, failure: _Failure) -> str:
    return f"{name}: the {whose}'s cannot be read ({failure.reason}); it must be a JSON object"


def _report_missing(name: str, in_package: bool, in_twin: bool, is_required: bool) -> FilesCheck:
    """The result for a file that is not on both sides."""
    where = (
        "not in the checkpoint"
        if in_package
        else "not in the package"
        if in_twin
        else "neither in the package nor in the checkpoint"
    )
    wrong = (f"{name}: is not in the package; must be the checkpoint's; copy it",) if is_required and in_twin else ()
    return FilesCheck((), (f"{name}: {where}",), wrong)


def _show(value: Any) -> str:
    """A value out of a file, short and in one line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _show_ids(ids: Any) -> str:
    if not isinstance(ids, frozenset):
        return _show(ids)
    return "none" if not ids else _show(sorted(ids)) if len(ids) > 1 else _show(min(ids))


def _is(where: str, found: Any, expected: str) -> str:
    """The sentence that a value is another than it must be."""
    return f"{where} is {'not set' if found is None else _show(found)}; must be {expected}"


def _as_ids(value: Any) -> Any:
    """Token ids as a set, whether one, a list or none; anything else as it is."""
    if value is None:
        return frozenset()
    ids = value if isinstance(value, list) else [value]
    return frozenset(ids) if all(type(number) is int for number in ids) else value


def _known_ids(value: Any) -> frozenset[int]:
    """Token ids as a set, which is empty where something else stands in their place."""
    ids = _as_ids(value)
    return ids if isinstance(ids, frozenset) else frozenset()


# The tokenizer.


def _vocabulary_name(directory: Path) -> str:
    return next((name for name in _VOCABULARY_NAMES if (directory / name).is_file()), _VOCABULARY_NAMES[0])


def _load_tokenizer(directory: Path, config: Any) -> Any:
    """The tokenizer in a directory, of the class that goes with `config`.

    None where there is none, a `_Failure` where it does not load.
    """
    if not (directory / _vocabulary_name(directory)).is_file():
        return None
    found = _attempt(
        lambda: AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=False, local_files_only=True)
    )
    if isinstance(found, _Failure):
        for name in _TOKENIZER_JSON_NAMES:  # transformers does not say which file it was
            if (directory / name).is_file() and isinstance(broken := _attempt(_read_json, directory / name), _Failure):
                return _Failure(f"{name}: {broken.reason}")
    return found


def _check_tokenizer(sides: _Sides) -> FilesCheck:
    name = _vocabulary_name(sides.package)
    in_package, in_twin = (
        (directory / _vocabulary_name(directory)).is_file() for directory in (sides.package, sides.twin)
    )
    if not (in_package and in_twin):
        return _report_missing(name if in_package else _vocabulary_name(sides.twin), in_package, in_twin, sides.is_ours)
    if sides.tokenizer is None:
        return FilesCheck()  # the checkpoint's does not load, which has been told
    tokenizer = _load_tokenizer(sides.package, sides.config)
    if isinstance(tokenizer, _Failure):
        return FilesCheck(
            (name,),
            (),
            (
                f"{name}: the package's tokenizer cannot be read ({tokenizer.reason}); must be the checkpoint's; "
                "copy it",
            ),
        )
    return FilesCheck((name,), (), tuple(_compare_tokenizers(name, tokenizer, sides.tokenizer)))


def _compare_tokenizers(name: str, tokenizer: Any, expected: Any) -> Iterator[str]:
    vocabularies = tokenizer.get_vocab(), expected.get_vocab()
    if vocabularies[0] != vocabularies[1]:  # then texts differ too, and say nothing more
        yield _tell_vocabulary(name, *vocabularies)
    elif (sentence := _tell_texts(name, tokenizer, expected)) is not None:
        yield sentence
    for token in ("bos", "eos", "pad", "unk"):
        found, right = (getattr(each, f"{token}_token_id") for each in (tokenizer, expected))
        if found != right:
            yield _is(f"{TOKENIZER_CONFIG_NAME}: the id of {token}_token", found, _show_ids(_as_ids(right)))
    found, right = (_as_template(each.chat_template) for each in (tokenizer, expected))
    if found != right:
        yield _is(f"{_TEMPLATE_NAME} or {TOKENIZER_CONFIG_NAME}: chat_template", *_tell_template(found, right))


def _tell_vocabulary(name: str, found: Mapping[str, int], expected: Mapping[str, int]) -> str:
    ours, theirs = ({number: token for token, number in vocabulary.items()} for vocabulary in (found, expected))
    every = sorted(ours.keys() | theirs.keys())
    wrong = [number for number in every if ours.get(number) != theirs.get(number)]
    if not wrong:
        token = min(token for token in found.keys() | expected.keys() if found.get(token) != expected.get(token))
        return (
            f"{name}: the token {_show(token)} has the id {_show(found.get(token))} in the package; must be "
            f"{_show(expected.get(token))}"
        )
    tokens = [_show(each[wrong[0]]) if wrong[0] in each else "no token" for each in (ours, theirs)]
    return (
        f"{name}: id {wrong[0]} is {tokens[0]} in the package; must be {tokens[1]}; {len(wrong):,} of "
        f"{len(every):,} ids differ"
    )


def _tell_texts(name: str, tokenizer: Any, expected: Any) -> str | None:
    """The first way of encoding or decoding texts that gives something else, in a sentence."""
    added = {str(token) for each in (tokenizer, expected) for token in each.added_tokens_decoder.values()}
    texts = [*_TEXTS, *(text for token in sorted(added) for text in (token, f"a {token} b"))]
    rows: list[list[int] | _Failure] = []
    for adds, how in ((False, "without"), (True, "with")):
        found, rows = (_encode(each, texts, adds) for each in (tokenizer, expected))
        if wrong := [n for n in range(len(texts)) if _as_row(found[n]) != _as_row(rows[n])]:
            what = _tell_row(found[wrong[0]], rows[wrong[0]])
            return (
                f"{name}: the text {_show(texts[wrong[0]])}, encoded {how} special tokens, {what}; {len(wrong):,} "
                f"of {len(texts):,} texts differ"
            )
    encoded = [row for row in rows if not isinstance(row, _Failure)]
    for skips, how in ((False, "with"), (True, "without")):
        back, right = ([_attempt(_decode, each, row, skips) for row in encoded] for each in (tokenizer, expected))
        if wrong := [n for n in range(len(encoded)) if back[n] != right[n]]:
            what = f"{_show(back[wrong[0]])} in the package; must be {_show(right[wrong[0]])}"
            return (
                f"{name}: ids decoded {how} special tokens are the text {what}; {len(wrong):,} of "
                f"{len(encoded):,} texts differ"
            )
    return None


def _encode(tokenizer: Any, texts: Sequence[str], adds_special: bool) -> list[list[int] | _Failure]:
    """The ids of every text; a tokenizer may refuse some."""

    def encode(given: str | Sequence[str]) -> Any:
        return tokenizer(given, add_special_tokens=adds_special, verbose=False)["input_ids"]

    found: list[list[int] | _Failure] | _Failure = _attempt(encode, texts)
    return [_attempt(encode, text) for text in texts] if isinstance(found, _Failure) else found


def _decode(tokenizer: Any, ids: Sequence[int], skips_special: bool) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=skips_special)
    return text


def _as_row(row: list[int] | _Failure) -> list[int] | None:
    """Ids, or none where a text is refused, whatever the complaint."""
    return None if isinstance(row, _Failure) else row


def _tell_row(found: list[int] | _Failure, right: list[int] | _Failure) -> str:
    place = 0 if isinstance(found, _Failure) or isinstance(right, _Failure) else _find_parting(found, right)
    ours, theirs = (
        f"refused ({row.reason})" if isinstance(row, _Failure) else _show(row[place:]) for row in (found, right)
    )
    return f"is {ours} in the package, from token {place} on; must be {theirs}"


def _find_parting(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The first place where two sequences differ, which may be the end of one."""
    return next(
        (n for n, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), min(len(one), len(other))
    )


def _as_template(template: Any) -> Any:
    """A chat template without the line end that Jinja drops as well."""
    return template.removesuffix("\n") if isinstance(template, str) else template


def _tell_template(found: Any, right: Any) -> tuple[Any, str]:
    """What is and what must be, from where two long templates part."""
    if not (isinstance(found, str) and isinstance(right, str)):
        return found, "none" if right is None else _show(right)
    place = _find_parting(found, right)
    return found[place:], f"{_show(right[place:])} from character {place} on"


# The configs of transformers.


def _check_generation(sides: _Sides) -> FilesCheck:
    name = GENERATION_CONFIG_NAME
    in_package, in_twin = ((directory / name).is_file() for directory in (sides.package, sides.twin))
    if in_package and not in_twin and sides.config is not None:
        found = _attempt(_read_json, sides.package / name)
        if isinstance(found, _Failure):
            return FilesCheck((name,), (), (_damaged(name, "package", found),))
        # what transformers makes of a checkpoint without one
        expected = {field: getattr(sides.config, field, None) for field in _IDS}
        return FilesCheck((name,), (), tuple(_compare_settings(found, expected)))
    if not (in_package and in_twin):
        return _report_missing(name, in_package, in_twin, sides.is_ours)
    both = _read_sides(sides, name)
    return both if isinstance(both, FilesCheck) else FilesCheck((name,), (), tuple(_compare_settings(*both)))


def _compare_settings(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    for field in sorted(found.keys() | expected.keys()):
        if field.startswith("_") or field == "transformers_version":
            continue
        where = f"{GENERATION_CONFIG_NAME}: {_show(field)[1:-1]}"
        if field.endswith("token_id"):
            right = _as_ids(expected.get(field))
            if _as_ids(found.get(field)) != right:
                yield _is(where, found.get(field), _show_ids(right))
            continue
        values = [_DEFAULTS.get(field) if each.get(field) is None else each[field] for each in (found, expected)]
        if values[0] != values[1] and (values[0] or values[1]):  # 0, off and none are one
            yield _is(where, found.get(field), "left out" if expected.get(field) is None else _show(expected[field]))


def _check_config(sides: _Sides) -> FilesCheck:
    name = CONFIG_NAME
    in_package, in_twin = ((directory / name).is_file() for directory in (sides.package, sides.twin))
    if not (in_package and in_twin):
        is_required = sides.is_ours or not (sides.package / GENAI_CONFIG_NAME).is_file()
        return _report_missing(name, in_package, in_twin, is_required)
    both = _read_sides(sides, name)
    if isinstance(both, FilesCheck):
        return both
    found, expected = map(_flatten, both)
    if not sides.is_parent:
        return FilesCheck((name,), (), tuple(_compare_configs(found, expected, sides.config)))
    left_out = f"{name}: model_type is not compared; the package is a mixture, the checkpoint dense"
    return FilesCheck(
        (name,),
        (left_out,),
        tuple(_compare_configs(found, {**expected, "model_type": found.get("model_type")}, sides.config)),
    )


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    """A config with the fields of its language model at the top."""
    inner = values.get("text_config")
    return {**inner, **values} if isinstance(inner, dict) else values


def _compare_configs(found: Mapping[str, Any], expected: Mapping[str, Any], config: Any) -> Iterator[str]:
    """Compare fields that one of two files has.

    `config` has the class's defaults for those that the checkpoint's leaves out.
    """
    for field in ("model_type", *_SIZES):
        if found.get(field) is None and expected.get(field) is None:
            continue
        value = found[field] if found.get(field) is not None else _implied(found, field)
        right = expected[field] if expected.get(field) is not None else getattr(config, field, None)
        if right is not None and value != right:
            yield _is(f"{CONFIG_NAME}: {field}", value, _show(right))
    for field in _IDS:
        if field not in found and expected.get(field) is None:
            continue
        right = _as_ids(expected[field] if field in expected else getattr(config, field, None))
        if _as_ids(found.get(field)) != right:
            yield _is(f"{CONFIG_NAME}: {field}", found.get(field), _show_ids(right))


def _implied(values: Mapping[str, Any], field: str) -> Any:
    """What `dense2moe.export.runtime.decoder.Decoder` takes for a field that a config leaves out."""
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if field == "num_key_value_heads":
        return heads
    return (
        width // heads if field == "head_dim" and isinstance(width, int) and isinstance(heads, int) and heads else None
    )


# The config of onnxruntime-genai.


def _check_genai(sides: _Sides) -> FilesCheck:
    name = GENAI_CONFIG_NAME
    if not (sides.package / name).is_file():
        return FilesCheck(missing=(f"{name}: not in the package",))
    found = _attempt(_read_json, sides.package / name)
    if isinstance(found, _Failure):
        return FilesCheck((name,), (), (_damaged(name, "package", found),))
    differences = [*_compare_genai_model(sides.package, found), *_compare_search(found, sides)]
    if sides.config is not None:
        differences += [*_compare_genai_sizes(found, sides.config), *_compare_genai_ids(found, sides)]
    if sides.graph is not None:
        differences += _compare_genai_names(found, sides.graph)
    return FilesCheck((name,), (), tuple(f"{name}: {difference}" for difference in differences))


def _dig(values: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _compare_genai_model(package: Path, found: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(kind := _dig(found, "model.type"), str):
        yield _is("model.type", kind, 'a kind of model that onnxruntime-genai knows, such as "decoder"')
    where, model = "model.decoder.filename", package / MODEL_NAME
    file = _dig(found, where)
    if (
        not isinstance(file, str)
        or _attempt((package / file).is_file) is not True
        or (model.is_file() and not model.samefile(package / file))
    ):
        yield _is(where, file, f"{_show(MODEL_NAME)}, the file of the graph")


def _compare_genai_sizes(found: Mapping[str, Any], config: Any) -> Iterator[str]:
    heads = getattr(config, "num_attention_heads", None)
    for where, field in _GENAI_SIZES.items():
        right = getattr(config, field, None)
        if right is None and heads:
            right = {"num_key_value_heads": heads, "head_dim": config.hidden_size // heads}.get(field)
        if right is not None and _dig(found, where) != right:
            yield _is(where, _dig(found, where), _show(right))
    where, limit, length = (
        "model.context_length",
        getattr(config, "max_position_embeddings", None),
        _dig(found, "model.context_length"),
    )
    if isinstance(limit, int) and not (type(length) is int and 1 <= length <= limit):
        yield _is(where, length, f"at most {limit}, the checkpoint's max_position_embeddings")


def _compare_genai_ids(found: Mapping[str, Any], sides: _Sides) -> Iterator[str]:
    """Compare special tokens with all that a right writer may have put there."""
    read = _attempt(_read_json, sides.twin / GENERATION_CONFIG_NAME)
    settings = {} if isinstance(read, _Failure) else read
    of_config, of_tokenizer = (
        {field: _known_ids(getattr(each, field, None)) for field in _IDS} for each in (sides.config, sides.tokenizer)
    )
    of_settings = {field: _known_ids(settings.get(field)) for field in _IDS}
    ends = of_settings["eos_token_id"] or of_config["eos_token_id"]
    right = (
        [ends, ends | of_tokenizer["eos_token_id"]] if ends else [frozenset({_OUR_EOS}), of_tokenizer["eos_token_id"]]
    )
    right = [ids for number, ids in enumerate(right) if ids and ids not in right[:number]]
    where = "model.eos_token_id"
    if _as_ids(_dig(found, where)) not in right:
        yield _is(where, _dig(found, where), " or ".join(map(_show_ids, right)))
    substitutes = of_config["eos_token_id"].union(*right)
    starts = of_config["bos_token_id"] | of_settings["bos_token_id"]
    pads = of_config["pad_token_id"] | of_settings["pad_token_id"] | of_tokenizer["pad_token_id"]
    for field, known, others in (
        (
            "bos_token_id",
            starts,
            frozenset() if starts else substitutes | of_tokenizer["bos_token_id"] | {_BUILDER_BOS},
        ),
        ("pad_token_id", pads, frozenset() if of_config["pad_token_id"] else substitutes),
    ):
        value = _dig(found, f"model.{field}")
        if type(value) is not int or value not in known | others:
            yield _is(f"model.{field}", value, " or ".join(map(_show, sorted(known or others))))


def _compare_search(found: Mapping[str, Any], sides: _Sides) -> Iterator[str]:
    where, length, context = "search.max_length", _dig(found, "search.max_length"), _dig(found, "model.context_length")
    if length is not None and type(context) is int and not (type(length) is int and length <= context):
        yield _is(where, length, f"at most {context}, model.context_length")
    where, shares = "search.past_present_share_buffer", _dig(found, "search.past_present_share_buffer")
    if sides.graph is None:
        return
    if shares not in (None, False) and not (shares is True and sides.graph.can_share):
        yield _is(where, shares, "true or false" if sides.graph.can_share else f"false: the graph has no {_SHARING[0]}")
    elif not shares and sides.graph.can_share and sides.is_ours:  # right, but the cache is copied at each token
        yield _is(where, shares, f"true: the graph has {_SHARING[0]}")


def _compare_genai_names(found: Mapping[str, Any], graph: _Graph) -> Iterator[str]:
    num_layers = _dig(found, "model.decoder.num_hidden_layers")
    layers = range(num_layers if type(num_layers) is int else 0)
    for side, rights in _GENAI_NAMES.items():
        given = _dig(found, f"model.decoder.{side}")
        if given is not None and not isinstance(given, dict):
            yield _is(f"model.decoder.{side}", given, "an object of names")
        for field, pattern in (given if isinstance(given, dict) else {}).items():
            where, right = f"model.decoder.{side}.{_show(field)[1:-1]}", rights.get(field)
            if not isinstance(pattern, str) or pattern != (right or pattern):
                yield _is(where, pattern, _show(right) if right else "a name")
                continue
            every = (pattern.replace("%d", str(layer)) for layer in layers) if "%d" in pattern else iter([pattern])
            if (lacking := next((name for name in every if name not in graph.names[side]), None)) is not None:
                yield f"{where} is {_show(pattern)}; must be among the graph's {side}, which have no {_show(lacking)}"
