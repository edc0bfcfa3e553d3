"""The JSON of a report is as its schema says, and the schema is the one that is published."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from programs import dense2moe
from report_facts import make_facts, tiered

from dense2moe.convert.report.schema import report_schema
from dense2moe.convert.report.writer import write_report

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = report_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    facts = tiered(make_facts())
    facts["variants"]["int4"]["parity"]["providers"]["CPUExecutionProvider"]["finetuned"]["kl"] = float("nan")
    output = tmp_path_factory.mktemp("report")
    write_report(facts, output)
    return json.loads((output / "report.json").read_text(encoding="utf-8"))


def test_the_published_schema_is_that_of_the_code() -> None:
    """If not: `dense2moe schema --report > recipes/report.schema.json`."""
    printed = dense2moe("schema", "--report").output
    assert (
        json.loads(printed)
        == report_schema()
        == json.loads((ROOT / "recipes" / "report.schema.json").read_text(encoding="utf-8"))
    )


def test_a_report_is_as_the_schema_says(validator, report) -> None:
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(report)] == []


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.0])
def test_a_report_can_be_written_whatever_its_measurements_are(
    value: float, validator: Draft202012Validator, tmp_path: Path
) -> None:
    """All measured numbers are the same impossible one: what a broken model gives.

    What is counted, or set, is finite in every run that ends.
    """
    counted = ("seconds", "bits", "load", "learning_rate", "domains")

    def spoil(item: Any) -> Any:
        match item:
            case dict():
                return {key: found if key in counted else spoil(found) for key, found in item.items()}
            case list() | tuple():
                return [spoil(found) for found in item]
            case _:
                return value if isinstance(item, float) else item

    facts = spoil(tiered(make_facts()))
    write_report(facts, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(report)] == []


def test_a_report_that_lacks_a_figure_or_has_words_for_it_is_not(validator, report) -> None:
    assert report["variants"]["int4"]["parity"]["providers"]["CPUExecutionProvider"]["finetuned"]["kl"] == "NaN"
    spoilt = copy.deepcopy(report)
    del spoilt["variants"]["int8"]["onnx"]["package_bytes"]
    spoilt["finetune"]["evaluations"]["dense"]["figures"][0]["value"] = "low"
    spoilt["summary"][0]["passed"] = 1
    assert {error.json_path for error in validator.iter_errors(spoilt)} == {
        "$.variants.int8.onnx",
        "$.finetune.evaluations.dense.figures[0].value",
        "$.summary[0].passed",
    }


def test_facts_are_read_without_torch() -> None:
    modules = ("facts", "summary", "verdicts", "comparison", "schema", "costs")
    code = "\n".join(
        (
            "import sys",
            *(f"import dense2moe.convert.report.{module}" for module in modules),
            "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'matplotlib', 'scipy'}",
            "print(sorted(heavy & set(sys.modules)))",
        )
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
