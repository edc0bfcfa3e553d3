"""Files of tasks, and how answers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dense2moe.export.errors import ExportError
from dense2moe.export.parity.answers.examples import Answer, MultipleChoice, Similarity, TaskFile, read_task, read_tasks
from dense2moe.export.parity.answers.scores import (
    answer_f1,
    is_exact,
    macro_f1,
    mean_difference_error,
    rank_correlation,
    rank_correlation_error,
)
from dense2moe.export.parity.records import TaskKind
from tests.task_examples import ANSWERS, CHOICES, PAIRS, write_task


def test_a_file_says_by_its_keys_what_kind_of_task_it_is(tmp_path: Path) -> None:
    kinds: dict[TaskKind, Sequence[MultipleChoice | Answer | Similarity]] = {
        "choice": CHOICES,
        "answer": ANSWERS,
        "similarity": PAIRS,
    }
    for kind, examples in kinds.items():
        assert read_task(write_task(tmp_path / f"{kind}.jsonl", examples)) == TaskFile(kind, kind, tuple(examples))


def test_a_right_choice_is_named_by_its_text_or_its_place() -> None:
    assert (
        MultipleChoice(prompt="", choices=("a", "b"), answer="b").right
        == MultipleChoice(prompt="", choices=("a", "b"), answer=1).right
        == 1
    )


@pytest.mark.parametrize(
    ("lines", "refusal"),
    [
        (["no"], ":1: is not JSON (Expecting value: line 1 column 1 (char 0)); must be an object such as"),
        (["[1]"], ":1: is no JSON object; must be one"),
        (
            ['{"question": "a"}'],
            ":1: has the keys question; must have prompt, choices and answer; or prompt and answer; or texts and score",
        ),
        (
            ['{"prompt": "a", "answer": "b"}', "", '{"prompt": "a"}'],
            ":3: answer: Field required; the file's first line makes it a task of kind answer",
        ),
        (
            ['{"prompt": "a", "choices": ["b", "c"], "answer": 2}'],
            ":1: answer is 2; must be one of the choices, or its place, 0 to 1",
        ),
        (
            ['{"prompt": "a", "choices": ["b", "c"], "answer": "d"}'],
            ":1: answer is 'd'; must be one of the choices, or its place, 0 to 1",
        ),
        (['{"prompt": "a", "choices": ["b", "b"], "answer": 0}'], ":1: choices has a text twice; must have each once"),
        (
            ['{"prompt": "a", "choices": ["b", ""], "answer": 0}'],
            ":1: choices.1: String should have at least 1 character",
        ),
        (
            ['{"texts": ["a", "b"], "score": "high"}'],
            ":1: score: Input should be a valid number, unable to parse string as a number",
        ),
        (['{"prompt": "a", "answer": "b"}'], ": has 1 examples; a task needs two or more, one JSON object a line"),
        ([], ": has 0 examples; a task needs two or more, one JSON object a line"),
        (
            ['{"texts": ["a", "b"], "score": 1}'] * 2,
            ": every score is the same; a correlation needs scores that differ",
        ),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path: Path, lines: list[str], refusal: str) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ExportError) as refused:
        read_task(file)
    assert str(refused.value).startswith(f"{file}{refusal}")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"none\.jsonl: cannot be read"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "other").mkdir()
    files = [write_task(folder / "task.jsonl", ANSWERS) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(ExportError, match="another task has the name 'task' too"):
        read_tasks(files)


def test_examples_are_taken_evenly() -> None:
    assert TaskFile("t", "choice", CHOICES).cut(3).examples == (CHOICES[0], CHOICES[8], CHOICES[16])
    assert TaskFile("t", "choice", CHOICES).cut(100).examples == CHOICES


def test_f1_and_exact_match_are_those_of_squad() -> None:
    assert is_exact("The Broncos!", ["broncos"])
    assert answer_f1("Denver Broncos won", ["Denver Broncos", "Broncos"]) == pytest.approx(
        2 * (2 / 3) * 1 / (2 / 3 + 1)
    )
    assert answer_f1("no", ["yes"]) == 0
    assert answer_f1("the", ["a"]) == 1  # articles alone are nothing, and nothing is nothing
    assert answer_f1("", ["yes"]) == 0


def test_macro_f1_is_the_mean_over_classes() -> None:
    """Class 0: precision 1/2, recall 1; class 1: 0; class 2: 1."""
    assert macro_f1([0, 0, 2], [0, 1, 2]) == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_the_error_of_a_difference_is_that_of_pairs() -> None:
    found, other = [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]
    assert mean_difference_error(found, other) == pytest.approx(stats.sem(np.subtract(found, other)))
    assert mean_difference_error(found, found) == 0
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0


def test_the_bootstrap_has_the_error_that_many_samples_show() -> None:
    generator = np.random.default_rng(1)

    def sample() -> list[list[float]]:
        true = generator.normal(size=100)
        return [list(true + generator.normal(size=100)), list(true + 2 * generator.normal(size=100)), list(true)]

    differences = []
    for _ in range(300):
        a, b, c = sample()
        differences.append(rank_correlation(a, c) - rank_correlation(b, c))
    assert rank_correlation_error(*sample()) == pytest.approx(np.std(differences), rel=0.35)
