"""Mutated recipes, checkpoints, packages, data and runs end in success or in one line of ours.

The short form belongs to the suite. The long form, `DENSE2MOE_CAMPAIGN=2000 pytest -m campaign`, takes so many cases of
each kind of input. `benchmarks/robustness.py` prints their table, and runs again a case that failed, by the text that
the failure gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import get_args

import pytest

from tests.robustness.campaign import Case, Runner, Table, campaign, judge
from tests.robustness.inputs import Kind
from tests.robustness.misbehaviour import crash, hang, leave
from tests.robustness.mutations import Mutation
from tests.robustness.trees import change_tree
from tests.robustness.worker import Answer

COUNT = "DENSE2MOE_CAMPAIGN"
KINDS: tuple[Kind, ...] = get_args(Kind)
SHORT: dict[Kind, int] = {
    "recipes": 40,
    "checkpoints": 10,
    "sharded checkpoints": 4,
    "references": 2,
    "packages": 14,
    "int8 packages": 6,
    "texts": 4,
    "tasks": 4,
    "prompts": 4,
}
"""All but the runs, which take a whole run to make."""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("campaign"))
    yield runner
    runner.watched.close()


# What is held of a case.


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case("recipes", "check", (Mutation("recipe.yaml: set", 1),))


RIGHT = Answer(1, errors="Error: /x/recipe.yaml:3: seed: is -1; must be at least 0\n")
WRONG = {
    "RuntimeError": Answer(
        1, traceback='Traceback (most recent call last):\n  File "/a/b.py", line 3, in read\nRuntimeError: no\n'
    ),
    "exit code 3": Answer(3, errors=RIGHT.errors),
    "no line of ours": Answer(1, errors="std::bad_alloc\n"),
    "2 lines": Answer(1, errors="Error: /x/a.json: is no JSON;\nfix it\n"),
    "control characters": Answer(1, errors="Error: /x/a.json: \x1b[31mred\n"),
    "a line of": Answer(1, errors=f"Error: /x/a.json: {'x' * 5000}\n"),
    "another library's words": Answer(1, errors=RIGHT.errors, said="[E:onnxruntime:, graph.cc:1] failed\n"),
    "its process": Answer(None, died="ended with code -11"),
    "left a process": Answer(0, left=("sleep 100",)),
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_no_line_of_ours_is_a_failure(reason: str, case: Case, tmp_path: Path) -> None:
    verdict = judge(case, WRONG[reason], [], tmp_path)
    assert verdict.end == "failed"
    assert reason in verdict.reason


def test_a_line_of_ours_is_a_refusal_and_so_is_one_for_each_mistake_of_a_recipe(case: Case, tmp_path: Path) -> None:
    several = Answer(1, errors="✓ source  0.1 s\nError: /x/recipe.yaml:3: seed: is -1\n/x/recipe.yaml:4: name: is ''\n")
    assert [judge(case, answer, [], tmp_path).end for answer in (RIGHT, several, Answer(0))] == [
        "refused",
        "refused",
        "success",
    ]


def test_what_is_written_elsewhere_is_a_failure(case: Case, tmp_path: Path) -> None:
    assert judge(case, RIGHT, ["home/.cache"], tmp_path).reason == "wrote home/.cache"


def test_a_command_that_crashes_hangs_or_leaves_a_process_is_told_and_the_next_one_runs(
    runner: Runner, tmp_path: Path
) -> None:
    crashed, hung, forgot = (
        runner.watched.call(function, directory=tmp_path, patience=4.0) for function in (crash, hang, leave)
    )
    assert crashed.died == "ended with code -6"
    assert hung.died == "still ran after 4 s, and was killed"
    assert forgot.left == ("sleep 60",)
    assert runner.watched.run(["--version"], tmp_path).output == "dense2moe, version 0.1.0\n"


# Mutations.


def test_a_mutation_is_the_same_each_time_and_a_case_is_read_back_from_its_text() -> None:
    trees = [{"a": [1, 2.5, "x"], "b": {"c": None}} for _ in range(2)]
    for what in ("set", "drop", "rename", "add", "swap", "wrap", "nudge"):
        for seed in range(50):
            for tree in trees:
                change_tree(tree, what, Random(seed))
            assert repr(trees[0]) == repr(trees[1])
            trees = trees if trees[0] else [{"a": [1, 2.5, "x"]} for _ in range(2)]
    case = Case(
        "packages",
        "generate",
        (Mutation("package/model.onnx: drop node", 3), Mutation("package/config.json: set", 2**32 - 1)),
    )
    assert Case.parse(str(case)) == case


# The campaign.


def test_right_inputs_succeed(runner: Runner) -> None:
    for kind in SHORT:
        expect_success(runner, kind, next(iter(runner.inputs.of(kind).commands)))


def test_mutated_inputs_end_in_success_or_in_one_line(runner: Runner) -> None:
    table = Table()
    for kind, count in SHORT.items():
        campaign(runner, kind, count, 0, table)
    assert not table.failures, table.report()
    ends = table.total()
    assert ends["success"] > 10, ends  # some mutations change nothing that matters: the inputs are right
    assert ends["refused"] > 40, ends


def expect_success(runner: Runner, kind: Kind, command: str) -> None:
    verdict, answer = runner.run(Case(kind, command, ()))
    assert verdict.end == "success", (kind, command, verdict, answer)


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_mutated_inputs_do(kind: Kind, runner: Runner) -> None:
    if COUNT not in os.environ:
        pytest.skip(f"{COUNT} is not set; it is the number of cases of each kind of input")
    for command in runner.inputs.of(kind).commands:
        expect_success(runner, kind, command)
    table = Table()
    campaign(runner, kind, int(os.environ[COUNT]), 1, table)
    assert not table.failures, table.report()
