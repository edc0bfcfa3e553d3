"""pydantic's errors in our words."""

from __future__ import annotations

import math
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from dense2moe.convert.recipe.contradictions import ContradictionError
from dense2moe.convert.recipe.records import Recipe
from dense2moe.convert.recipe.suggestions import list_keys, suggest
from dense2moe.convert.recipe.wording import Key, Mistake, join_choices, show_value

_MUST_BE: Final = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "finite",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "of the form {pattern}",
    "string_too_short": "a string of at least {min_length} character",
    "too_short": "a list of at least {min_length} item",
}


def explain(error: ErrorDetails) -> list[Mistake]:
    """One pydantic error in our words, under the file's key."""
    ctx, given = error.get("ctx", {}), error["input"]
    key, parent, records = _locate(error["loc"])
    match error["type"]:
        case "value_error" if isinstance(ctx["error"], ContradictionError):
            return ctx["error"].mistakes
        case "value_error":
            text = str(ctx["error"])
        case "extra_forbidden":
            assert parent is not None
            text = f"unknown key; {suggest(str(key[-1]), parent) or f'the keys here are {list_keys(parent)}'}"
        case "missing":
            assert parent is not None
            text = (
                "missing; must be "
                f"{_mapping(records) if records else f'given: {parent.model_fields[str(key[-1])].description}'}"
            )
        case "union_tag_invalid" | "union_tag_not_found" if (
            isinstance(given, dict) and "kind" in records[0].model_fields
        ):
            key = (*key, "kind")
            found = f"is {show_value(given['kind'])}" if "kind" in given else "missing"
            text = f"{found}; must be {join_choices(map(_record_tag, records))}"
        case "union_tag_not_found" if isinstance(given, dict):
            text = (
                f"has {'both' if 'hub' in given else 'neither'} path {'and' if 'hub' in given else 'nor'} hub; "
                "must have one of them"
            )
        case "model_type" | "model_attributes_type" | "union_tag_not_found":
            suggestion = suggest(str(key[-1]), parent) if parent else ""
            text = f"is {_typed(given)}; must be {_mapping(records)}" + (f"; {suggestion}" if suggestion else "")
        case _ if error["loc"][-1] == "[key]":
            text = f"unknown key; must be {ctx['expected']}"
        case "too_short" if len(given) >= ctx["min_length"]:
            return []  # its items are refused one by one
        case "too_short" if isinstance(given, dict):
            text = f"has {len(given)} key{'' if len(given) == 1 else 's'}; must have at least {ctx['min_length']}"
        case _ if isinstance(given, float) and not math.isfinite(given):
            return []  # refused when it was read
        case kind if kind in _MUST_BE:
            text = (
                f"is {_typed(given) if kind.endswith('_type') else show_value(given)}; must be "
                f"{_MUST_BE[kind].format(**ctx)}"
            )
        case _:
            text = f"is {show_value(given)}; {error['msg']}"
    return [(key, text)]


def _locate(loc: tuple[int | str, ...]) -> tuple[Key, type[BaseModel] | None, tuple[type[BaseModel], ...]]:
    """The file's key for a pydantic location, and its record.

    And the records that may be its value.
    """
    key: Key = ()
    parent: type[BaseModel] | None = None
    records: tuple[type[BaseModel], ...] = (Recipe,)
    named = False  # by the recipe itself, as domains are
    for part in loc:
        if named:
            key, parent, named = (*key, part), None, False
        elif len(records) > 1:  # the tag of a union's branch, which no file has
            records = tuple(record for record in records if part == _record_tag(record))
        elif isinstance(part, int):  # an item of a list, whose record is the list's
            key = (*key, part)
        elif part != "[key]":
            parent = records[0] if records else None
            field = parent.model_fields.get(str(part)) if parent else None
            key, records = (*key, part), list_records(field.annotation) if field else ()
            named = bool(records) and field is not None and get_origin(field.annotation) is dict
    return key, parent, records


def list_records(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The records that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return tuple(record for part in get_args(annotation) for record in list_records(part))


def _record_tag(record: type[BaseModel]) -> str:
    """The name of a record in a union: `kind`, or first key."""
    kind = record.model_fields.get("kind")
    return str(get_args(kind.annotation)[0]) if kind else next(iter(record.model_fields))


def _mapping(records: tuple[type[BaseModel], ...]) -> str:
    if len(records) == 1:
        return f"a mapping of the keys {list_keys(records[0])}"
    tags = join_choices(map(_record_tag, records))
    return (
        f"a mapping whose kind is {tags}"
        if "kind" in records[0].model_fields
        else f"a directory, or a mapping with {tags}"
    )


def _typed(value: object) -> str:
    kinds = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    return f"{show_value(value)} ({kinds[type(value)]})" if type(value) in kinds else show_value(value)
