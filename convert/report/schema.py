"""The JSON schema of `report.json`, made from the records of facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from dense2moe.convert.report.facts import ReportFacts
from dense2moe.convert.report.summary import Row, Verdict

_NUMBER = {
    "description": "A number; one that JSON lacks is its name.",
    "anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}],
}


@dataclass(frozen=True)
class Report(ReportFacts):
    """What `report.json` holds: facts, a row a model, verdicts.

    Of a verdict `good` is true, false (bad) or null (neither).
    """

    summary: list[Row]
    verdicts: list[Verdict]


def report_schema() -> dict[str, Any]:
    """JSON schema of `report.json`.

    A later version may add keys; none that is required here goes away without notice.
    """
    schema = _name_numbers(TypeAdapter(Report).json_schema(mode="serialization"))
    del schema["$defs"]["DataFacts"]["properties"]["details"]  # its entries stand beside the others
    schema["$defs"]["Number"] = _NUMBER
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Report of dense2moe"}


def _name_numbers(value: Any) -> Any:
    """Plain numbers as references to `Number`, without titles that repeat keys.

    Each paragraph of a description becomes one line.
    """
    if isinstance(value, dict):
        if value.get("type") == "number":
            return {"$ref": "#/$defs/Number"}
        return {
            key: _paragraphs(item) if key == "description" and isinstance(item, str) else _name_numbers(item)
            for key, item in value.items()
            if not (key == "title" and isinstance(item, str))
        }
    return [_name_numbers(item) for item in value] if isinstance(value, list) else value


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
