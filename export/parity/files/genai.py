"""A package's genai_config.json beside its graph and its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dense2moe.export import names
from dense2moe.export.parity.files.configs import TOKEN_IDS
from dense2moe.export.parity.files.sentences import as_ids, known_ids, show, show_ids, tell_wrong
from dense2moe.export.parity.files.sides import (
    SHARING_OPERATORS,
    Failure,
    GraphSide,
    Sides,
    attempt,
    read_json,
    tell_damage,
)
from dense2moe.export.parity.records import FilesCheck
from dense2moe.export.storage import GENAI_CONFIG_NAME, MODEL_NAME
from dense2moe.upcycle.checkpoints.reader import GENERATION_CONFIG_NAME

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

_BUILDER_BOS = 1  # what genai's builder writes where it finds none
_OUR_EOS = 0  # and what we write


def check_genai(sides: Sides) -> FilesCheck:
    """Compare genai_config.json with the checkpoint and the graph."""
    name = GENAI_CONFIG_NAME
    if not (sides.package / name).is_file():
        return FilesCheck(missing=(f"{name}: not in the package",))
    found = attempt(read_json, sides.package / name)
    if isinstance(found, Failure):
        return FilesCheck((name,), (), (tell_damage(name, "package", found),))
    differences = [*_compare_genai_model(sides.package, found), *_compare_search(found, sides)]
    if sides.config is not None:
        cached = sides.graph.head_size if sides.graph is not None else None
        differences += [*_compare_genai_sizes(found, sides.config, cached), *_compare_genai_ids(found, sides)]
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
        yield tell_wrong("model.type", kind, 'a kind of model that onnxruntime-genai knows, such as "decoder"')
    where, model = "model.decoder.filename", package / MODEL_NAME
    file = _dig(found, where)
    if (
        not isinstance(file, str)
        or attempt((package / file).is_file) is not True
        or (model.is_file() and not model.samefile(package / file))
    ):
        yield tell_wrong(where, file, f"{show(MODEL_NAME)}, the file of the graph")


def _compare_genai_sizes(found: Mapping[str, Any], config: Any, cached: int | None) -> Iterator[str]:
    """Compare sizes with the checkpoint's, and `cached` heads with the graph's."""
    heads = getattr(config, "num_attention_heads", None)
    for where, field in _GENAI_SIZES.items():
        right = cached if field == "head_dim" and cached is not None else getattr(config, field, None)
        if right is None and heads:
            right = {"num_key_value_heads": heads, "head_dim": config.hidden_size // heads}.get(field)
        if right is not None and _dig(found, where) != right:
            yield tell_wrong(where, _dig(found, where), show(right))
    where, limit, length = (
        "model.context_length",
        getattr(config, "max_position_embeddings", None),
        _dig(found, "model.context_length"),
    )
    if isinstance(limit, int) and not (type(length) is int and 1 <= length <= limit):
        yield tell_wrong(where, length, f"at most {limit}, the checkpoint's max_position_embeddings")


def _compare_genai_ids(found: Mapping[str, Any], sides: Sides) -> Iterator[str]:
    """Compare special tokens with every value a correct writer could use."""
    read = attempt(read_json, sides.twin / GENERATION_CONFIG_NAME)
    settings = {} if isinstance(read, Failure) else read
    of_config, of_tokenizer = (
        {field: known_ids(getattr(each, field, None)) for field in TOKEN_IDS}
        for each in (sides.config, sides.tokenizer)
    )
    of_settings = {field: known_ids(settings.get(field)) for field in TOKEN_IDS}
    ends = of_settings["eos_token_id"] or of_config["eos_token_id"]
    right = (
        [ends, ends | of_tokenizer["eos_token_id"]] if ends else [frozenset({_OUR_EOS}), of_tokenizer["eos_token_id"]]
    )
    right = [ids for number, ids in enumerate(right) if ids and ids not in right[:number]]
    where = "model.eos_token_id"
    if as_ids(_dig(found, where)) not in right:
        yield tell_wrong(where, _dig(found, where), " or ".join(map(show_ids, right)))
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
            yield tell_wrong(f"model.{field}", value, " or ".join(map(show, sorted(known or others))))


def _compare_search(found: Mapping[str, Any], sides: Sides) -> Iterator[str]:
    where, length, context = "search.max_length", _dig(found, "search.max_length"), _dig(found, "model.context_length")
    if length is not None and type(context) is int and not (type(length) is int and length <= context):
        yield tell_wrong(where, length, f"at most {context}, model.context_length")
    where, shares = "search.past_present_share_buffer", _dig(found, "search.past_present_share_buffer")
    if sides.graph is None:
        return
    if shares not in (None, False) and not (shares is True and sides.graph.can_share):
        yield tell_wrong(
            where,
            shares,
            "true or false" if sides.graph.can_share else f"false: the graph has no {SHARING_OPERATORS[0]}",
        )
    elif not shares and sides.graph.can_share and sides.is_ours:  # right, but the cache is copied at each token
        yield tell_wrong(where, shares, f"true: the graph has {SHARING_OPERATORS[0]}")


def _compare_genai_names(found: Mapping[str, Any], graph: GraphSide) -> Iterator[str]:
    num_layers = _dig(found, "model.decoder.num_hidden_layers")
    layers = range(num_layers if type(num_layers) is int else 0)
    for side, rights in _GENAI_NAMES.items():
        given = _dig(found, f"model.decoder.{side}")
        if given is not None and not isinstance(given, dict):
            yield tell_wrong(f"model.decoder.{side}", given, "an object of names")
        for field, pattern in (given if isinstance(given, dict) else {}).items():
            where, right = f"model.decoder.{side}.{show(field)[1:-1]}", rights.get(field)
            if not isinstance(pattern, str) or pattern != (right or pattern):
                yield tell_wrong(where, pattern, show(right) if right else "a name")
                continue
            every = (pattern.replace("%d", str(layer)) for layer in layers) if "%d" in pattern else iter([pattern])
            if (lacking := next((name for name in every if name not in graph.names[side]), None)) is not None:
                yield f"{where} is {show(pattern)}; must be among the graph's {side}, which have no {show(lacking)}"
