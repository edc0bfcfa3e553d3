"""Of tests of many families one of each shape runs, or all where they are asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from shapes import drop_other_families, each_shape


def kept(markexpr: str, *args: str) -> list[str]:
    """The cases that run of three families, of which one is a shape."""

    def item(param: Any) -> Any:
        return SimpleNamespace(
            name=param.id, iter_markers=lambda name: [mark for mark in param.marks if mark.name == name]
        )

    items: Any = [item(param) for param in each_shape(("llama", "qwen", "gemma"), {"qwen"})]
    plain: Any = SimpleNamespace(name="plain", iter_markers=lambda _: [])
    items.append(plain)
    told: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: told.extend(items))
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr=markexpr), args=args, hook=hook)
    drop_other_families(config, items)
    assert len(items) + len(told) == 4
    return [each.name for each in items]


def test_one_of_each_shape_runs_by_default_and_all_where_they_are_asked_for() -> None:
    assert kept("", "tests") == kept("not gpu", "tests/test_x.py") == ["qwen", "plain"]
    assert kept("every_family", "tests") == ["llama", "qwen", "gemma", "plain"]  # pytest itself takes the plain one out
    assert kept("", "tests/test_x.py::test_y[llama]") == ["llama", "qwen", "gemma", "plain"]


def test_arguments_and_names_of_cases_are_kept() -> None:
    first, second = each_shape([("llama", 1), ("qwen", 2)], {"qwen 2"}, name=lambda case: f"{case[0]} {case[1]}")
    assert (first.values, first.id, second.values, second.id) == (("llama", 1), "llama 1", ("qwen", 2), "qwen 2")


@pytest.mark.parametrize(("cases", "message"), [(["a", "b"], "no cases: \\['c'\\]"), (["a", "a"], "one name")])
def test_a_shape_that_is_no_case_is_refused(cases: list[str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        each_shape(cases, {"c"})
