"""Questions with answers: read from tables, SQuAD's files and the hub, divided by context; bad rows refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_label_rows import WRITERS, table, write_lines

from dense2moe.upcycle.data.config import HubTableData, TableData
from dense2moe.upcycle.data.labelled import read_labelled
from dense2moe.upcycle.data.questions import QuestionRow
from dense2moe.upcycle.data.rows import read_hub_rows, read_table
from dense2moe.upcycle.errors import UpcycleError

CONTEXT = 'Zoë said "hello", 🚀 in\nKyoto, in 1999.'
ROWS: list[dict[str, Any]] = [
    {
        "question": "Where?",
        "context": CONTEXT,
        "answers": {"text": ["Kyoto", "in\nKyoto"], "answer_start": [23, 20]},
    },
    {"question": "Who else?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
]


def asked(**fields: Any) -> TableData:
    return table(question="question", **fields)


def tell(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {
            "question": row.question,
            "context": row.context,
            "answers": {"text": list(row.answers), "answer_start": list(row.starts)},
        }
        for row in rows
    ]


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table in which answers are JSON where cells are text."""
    if file.suffix == ".csv":
        rows = [{**row, "answers": json.dumps(row["answers"])} for row in rows]
    WRITERS[file.name](file, rows)


def nest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same rows in SQuAD's own shape, each a paragraph."""
    paragraphs = []
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        asked_here = {"id": "x", "question": row["question"], "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": row["context"], "qas": [asked_here]})
    return {"version": "v2.0", "data": [{"title": "one", "paragraphs": paragraphs}]}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_table_gives_the_questions_that_were_written(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, ROWS)
    assert tell(list(read_table(tmp_path / name, asked()))) == ROWS


@pytest.mark.parametrize("indent", [None, 2])
def test_squad_s_own_file_gives_the_same_questions(indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "train-v2.0.json").write_text(json.dumps(nest(ROWS), indent=indent), encoding="utf-8")
    assert tell(list(read_table(tmp_path / "train-v2.0.json", asked()))) == ROWS


def test_columns_have_names_and_answers_may_be_pairs(tmp_path: Path) -> None:
    row = {"q": " Where? ", "c": CONTEXT, "a": [{"text": "Kyoto", "answer_start": 23}]}
    write_lines(tmp_path / "rows.jsonl", [row])
    (found,) = read_table(tmp_path / "rows.jsonl", table(question="q", context="c", answers="a"))
    assert isinstance(found, QuestionRow)
    assert (found.question, found.answers, found.starts) == ("Where?", ("Kyoto",), (23,))


@pytest.mark.parametrize("as_pairs", [False, True])
def test_a_data_set_of_the_hub_gives_the_same_questions(as_pairs: bool) -> None:
    rows = [dict(row) for row in ROWS]
    if as_pairs:
        for row in rows:
            pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            row["answers"] = [{"text": text, "answer_start": start} for text, start in pairs]
    source = HubTableData.model_validate({"kind": "hub-table", "path": "squad", "question": "question"})
    assert tell(list(read_hub_rows(datasets.Dataset.from_list(rows), source, "train"))) == ROWS


def row(**changed: Any) -> dict[str, Any]:
    return {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Kyoto"], "answer_start": [23]}, **changed}


BAD: list[tuple[dict[str, Any], str]] = [
    (row(answers={"text": ["Kyoto"], "answer_start": [22]}), "answer 'Kyoto' does not stand at character 22 of column"),
    (row(answers={"text": ["Kyoto"], "answer_start": [22]}), "it begins at 23 first"),
    (row(answers={"text": ["Osaka"], "answer_start": [23]}), "the context does not have it; correct the row"),
    (row(answers={"text": ["1999."], "answer_start": [-5]}), "does not stand at character -5"),
    (row(answers={"text": ["1999. "], "answer_start": [33]}), "does not stand at character 33"),
    (row(answers={"text": [" "], "answer_start": [3]}), "column 'answers' has an empty answer"),
    (row(answers={"text": ["Kyoto"], "answer_start": []}), 'must be {"text": ["…"], "answer_start": [0]}'),
    (row(answers={"text": ["Kyoto"], "answer_start": ["23"]}), 'must be {"text"'),
    (row(answers={"text": ["Kyoto"], "answer_start": [True]}), 'must be {"text"'),
    (row(answers={"text": [3], "answer_start": [23]}), 'must be {"text"'),
    (row(answers={"text": ["Kyoto"]}), 'must be {"text"'),
    (row(answers=None), "column 'answers' is None; must be {\"text\""),
    (row(answers=["Kyoto"]), "column 'answers' is ['Kyoto']; must be {\"text\""),
    (row(answers="{'text': ['Kyoto'], 'answer_start': [23]}"), 'must be JSON: {"text"'),
    (row(question=" "), "column 'question' is empty; must be a text"),
    (row(context=None), "column 'context' is empty; must be a text"),
    ({"question": "Where?", "context": CONTEXT}, "has no column 'answers'; it has question, context"),
]


@pytest.mark.parametrize(("bad", "said"), BAD, ids=[f"{number} {said}" for number, (_, said) in enumerate(BAD)])
def test_a_bad_question_is_refused_by_file_and_row(bad: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [ROWS[0], bad])
    with pytest.raises(UpcycleError) as caught:
        list(read_table(tmp_path / "rows.jsonl", asked()))
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:2: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_question_of_squad_s_own_file_is_named_by_its_place(tmp_path: Path) -> None:
    nested = nest([ROWS[0], row(answers={"text": ["Kyoto"], "answer_start": [2]})])
    (tmp_path / "dev.json").write_text(json.dumps(nested), encoding="utf-8")
    with pytest.raises(UpcycleError, match=r"dev\.json, data\[0\]\.paragraphs\[1\]\.qas\[0\]: answer 'Kyoto' does not"):
        list(read_table(tmp_path / "dev.json", asked()))
    del nested["data"][0]["paragraphs"][0]["qas"]
    (tmp_path / "dev.json").write_text(json.dumps(nested), encoding="utf-8")
    with pytest.raises(UpcycleError, match=r"dev\.json, data\[0\]\.paragraphs\[0\]: has no list of qas"):
        list(read_table(tmp_path / "dev.json", asked()))


def ask_often(num_contexts: int, questions: int = 3) -> list[dict[str, Any]]:
    return [
        {"question": f"q{n}", "context": f"context {c}", "answers": {"text": [], "answer_start": []}}
        for c in range(num_contexts)
        for n in range(questions)
    ]


def test_questions_of_one_context_fall_into_one_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", ask_often(100))
    rows = read_labelled(asked(train=["rows.jsonl"]), tmp_path).rows
    contexts = {split: {each.context for each in own} for split, own in rows.items()}
    assert sum(map(len, rows.values())) == 300
    assert all(len(rows[split]) == 3 * len(own) for split, own in contexts.items())
    assert 4 <= len(contexts["test"]) <= 20
    assert not contexts["test"] & contexts["train"]


def test_given_splits_may_share_contexts_and_not_questions(tmp_path: Path) -> None:
    many = ask_often(40)
    write_lines(tmp_path / "train.jsonl", many)
    write_lines(tmp_path / "test.jsonl", [{**many[0], "question": "new"}, many[1]])
    write_lines(tmp_path / "validation.jsonl", [{**many[2], "question": "other"}, many[3]])
    files = {"train": ["train.jsonl"], "validation": ["validation.jsonl"], "test": ["test.jsonl"]}
    found = read_labelled(asked(**files), tmp_path)
    assert (len(found.rows["train"]), found.num_shared) == (118, 2)
