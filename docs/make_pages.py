"""Pages made from the code: recipe keys, help texts, the Python API."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from click.testing import CliRunner

from dense2moe import api
from dense2moe.convert.cli import main
from dense2moe.convert.recipe.schema import make_schema

HERE: Final = Path(__file__).parent
_HELP: Final = re.compile(r"```console\n\$ dense2moe (?P<arguments>[a-z -]*)--help\n.*?```", re.DOTALL)
_KEYS: Final = re.compile(r"(?<=<!-- keys -->\n).*(?=<!-- end of keys -->)", re.DOTALL)
_FUNCTIONS: Final = re.compile(r"(?<=<!-- functions -->\n).*(?=<!-- end of functions -->)", re.DOTALL)
_SHOWN: Final = (
    api.prepare_data,
    api.upcycle,
    api.add_expert,
    api.branch,
    api.finetune,
    api.quantize,
    api.export_onnx,
    api.check_parity,
    api.Package,
    api.GenerateConfig,
    api.run,
    api.Run,
)
_BOUNDS: Final = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

Schema = Mapping[str, Any]


def make_pages() -> dict[Path, str]:
    """Every page that shows code's own words, as it should read now."""
    recipe, commands, functions = (HERE / name for name in ("recipe.md", "commands.md", "python-api.md"))
    return {
        recipe: _KEYS.sub(lambda _: "\n" + "\n".join(describe_keys(make_schema())) + "\n", _read(recipe)),
        commands: _HELP.sub(lambda found: _show_help(found["arguments"].split()), _read(commands)),
        functions: _FUNCTIONS.sub(lambda _: "\n" + "\n".join(map(_show_object, _SHOWN)), _read(functions)),
    }


def _read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _show_help(arguments: list[str]) -> str:
    arguments = [*arguments, "--help"]
    shown = CliRunner().invoke(main, arguments, prog_name="dense2moe", terminal_width=100).output.rstrip()
    return f"```console\n$ dense2moe {' '.join(arguments)}\n{shown}\n```"


def describe_keys(recipe: Schema) -> Iterator[str]:
    """A section for each record, with a table row for each key."""
    headings: dict[str, str] = {}
    _find_headings(recipe, "", recipe["$defs"], headings)
    yield from _describe_record(recipe, headings)
    for name, heading in headings.items():
        yield from (f"## {heading}", "")
        yield from _describe_record(recipe["$defs"][name], headings)


def _find_headings(record: Schema, place: str, records: Schema, headings: dict[str, str]) -> None:
    """What the section of each record is called: by the first key that holds it, and by its kind where it has one."""
    for key, value in record["properties"].items():
        where = f"{place}.{key}" if place else key
        names = list(dict.fromkeys(_find_names(value)))
        for name in names:
            if name not in headings:
                inner = records[name]
                kind = inner["properties"].get("kind", {}).get("const")
                if kind is None and len(names) > 1:
                    kind = " and ".join(inner.get("required", ()))
                headings[name] = f"{where} ({kind})" if kind else where
                _find_headings(inner, headings[name], records, headings)


def _find_names(value: Schema) -> Iterator[str]:
    """The records that a key may hold, by themselves, in a list or in a mapping."""
    if "$ref" in value:
        yield value["$ref"].rpartition("/")[2]
    for each in (*value.get("anyOf", ()), *value.get("oneOf", ())):
        yield from _find_names(each)
    for inner in (value.get("items"), value.get("additionalProperties")):
        if isinstance(inner, Mapping):
            yield from _find_names(inner)


def _describe_record(record: Schema, headings: Mapping[str, str]) -> Iterator[str]:
    if text := record.get("description"):
        yield from (_one_line(text), "")
    yield from ("| key | value | default | meaning |", "|---|---|---|---|")
    for key, value in record["properties"].items():
        values = " or ".join(dict.fromkeys(_describe_values(value, headings)))
        default = "required" if key in record.get("required", ()) else _describe_default(value)
        meaning = value.get("description") or ("Which kind it is." if key == "kind" else "")
        yield f"| `{key}` | {values} | {default} | {_one_line(meaning)} |"
    yield ""


def _describe_values(value: Schema, headings: Mapping[str, str]) -> Iterator[str]:
    if "$ref" in value:
        heading = headings[value["$ref"].rpartition("/")[2]]
        yield f"[{heading}](#{slug(heading)})"
    for each in (*value.get("anyOf", ()), *value.get("oneOf", ())):
        yield from _describe_values(each, headings)
    if "const" in value:
        yield f"`{value['const']}`"
    elif "enum" in value:
        yield ", ".join(f"`{each}`" for each in value["enum"])
    elif value.get("type") == "array":
        yield f"list of {' or '.join(_describe_values(value['items'], headings))}"
    elif value.get("type") == "object":
        yield f"names to {' or '.join(_describe_values(value['additionalProperties'], headings))}"
    elif "type" in value:
        name = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false"}
        bounds = " and ".join(f"{sign} {value[key]}" for key, sign in _BOUNDS.items() if key in value)
        yield f"{name.get(value['type'], value['type'])}{f' {bounds}' if bounds else ''}"


def _describe_default(value: Schema) -> str:
    if "default" not in value:
        return ""
    default = value["default"]
    if isinstance(default, Mapping) and "$ref" in json.dumps({**value, "default": None}):
        return "each key's own"
    return f"`{json.dumps(default, ensure_ascii=False)}`".replace('"', "")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _show_object(shown: Any) -> str:
    """A function, a class with its public methods, or a record of settings: its signature, docstring and example."""
    if issubclass_of_record(shown):
        return "\n".join([f"## {shown.__name__}", "", *_describe_record(shown.model_json_schema(), {})])
    parts = [f"## {shown.__name__}", "", _show_signature(shown), "", *_show_docstring(shown)]
    if inspect.isclass(shown):
        for name, member in vars(shown).items():
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                what = f"`{name}`" if isinstance(member, property) else f"`{name}{_plain_signature(member)}`"
                text, *rest = (inspect.getdoc(member) or "").split("\n\n", 1)
                parts += [f"- {what}: {' '.join([_one_line(text), *map(_one_line, rest)])}"]
        parts += [""]
    return "\n".join(parts)


def issubclass_of_record(shown: Any) -> bool:
    """Whether it is a record of settings, whose keys are described by themselves."""
    return inspect.isclass(shown) and hasattr(shown, "model_json_schema")


def _plain_signature(function: Any) -> str:
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))
    return signature.replace("(self, ", "(").replace("(self)", "()")


def _show_signature(shown: Any) -> str:
    whole = f"{shown.__name__}{_plain_signature(shown)}".replace(" -> None", "")
    if len(whole) <= 100:
        return f"```text\n{whole}\n```"
    inside, _, returned = whole.partition("(")[2].rpartition(")")
    lines = "".join(f"    {part},\n" for part in re.split(r", (?=\*|\w+:)", inside))
    return f"```text\n{shown.__name__}(\n{lines}){returned}\n```"


def _show_docstring(shown: Any) -> Iterator[str]:
    """The docstring's paragraphs; its sections as lists, and the example as code that a test runs."""
    for part in re.split(r"\n\n(?=\w)", inspect.getdoc(shown) or ""):
        title, _, body = part.partition("\n")
        match title:
            case "Example:":
                yield from ("```python", textwrap.dedent(body).rstrip(), "```", "")
            case "Args:" | "Attributes:":
                entries = re.split(r"\n(?=\S)", textwrap.dedent(body))
                for entry in entries:
                    name, _, meaning = _one_line(entry).partition(": ")
                    yield f"- `{name}`: {meaning}"
                yield ""
            case "Returns:" | "Raises:":
                yield from (
                    f"{title[:-1]} {_one_line(body)}".replace("Raises", "Raises:").replace("Returns", "Returns:"),
                    "",
                )
            case _:
                yield from (_one_line(part), "")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    for page, text in make_pages().items():
        page.write_text(text, encoding="utf-8")
