"""Names of graph values: one module makes and parses them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dense2moe.export import names

EXPORT = Path(__file__).parent.parent / "export"
SPELLED = re.compile(
    r"(past_key_values|present|router_logits|hidden|layers)\.|(final_normed|first_logit|router_nudge|embedded)\b"
    r"|.*\b(biased_scores|query_key_value|ffn_normed)$|.*\.nudged$"
)
"""How a name of a value begins or ends, in a text of the code."""


def texts(path: Path) -> Iterator[str]:
    """The texts of a module, parts of f-strings among them, but for docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_other_module_spells_a_name_of_a_graph_value() -> None:
    spelled = {
        (path.relative_to(EXPORT).as_posix(), text)
        for path in EXPORT.rglob("*.py")
        if path.name != "names.py"
        for text in texts(path)
        if SPELLED.match(text) and " " not in text
    }
    assert spelled == set()


def test_what_is_made_is_parsed_again() -> None:
    for layer in (0, 7, 123):
        for kind in names.CACHE_KINDS:
            assert names.parse_state(names.past(layer, kind)) == (layer, kind)
            assert names.parse_state(names.present(layer, kind)) == (layer, kind)
            assert names.present_of(names.past(layer, kind)) == names.present(layer, kind)
        assert names.order_tap(names.hidden(layer)) == ("hidden", layer)
        assert names.order_tap(names.router_logits(layer)) == ("router_logits", layer)
        assert names.order_tap(names.selection_scores(names.experts(layer))) == ("layers", layer)


@pytest.mark.parametrize(
    "name", ["past_key_values.0.keys", "past_key_values.x.key", "past.0.key", "xpresent.0.key", ""]
)
def test_what_only_resembles_a_value_of_the_cache_is_none(name: str) -> None:
    assert names.parse_state(name) is None


@pytest.mark.parametrize(
    "name", ["router_logits.1.weight", "router_logits.1.nudged", "hidden.x", "hidden", "layers.1.moe.scores", "logits"]
)
def test_what_only_resembles_a_tap_is_none(name: str) -> None:
    assert names.order_tap(name) is None


def test_layers_are_counted_by_their_caches() -> None:
    inputs = [names.past(layer, kind) for layer in range(3) for kind in names.CACHE_KINDS]
    assert names.count_layers([names.INPUT_IDS, names.ATTENTION_MASK, *inputs]) == 3
    assert names.count_layers([names.INPUT_IDS]) == 0


def test_the_names_are_those_that_onnxruntime_genai_takes_by_default() -> None:
    """As its `Config::Model::Decoder::Inputs` and `Outputs` have them."""
    assert names.genai_names() == {
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
