"""Texts that belong together, as files have them: read, divided, encoded, and refused by their places."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pydantic import ValidationError
from test_words import word_piece

from dense2moe.upcycle.data.config import HubSentencesData, SentencesData
from dense2moe.upcycle.data.labelled import read_labelled
from dense2moe.upcycle.data.rows import read_rows
from dense2moe.upcycle.data.sentences import SentenceRow, encode_sentences, read_sentences
from dense2moe.upcycle.errors import UpcycleError

ROWS = [
    {"text": "the cat sat", "pair": "a cat, sitting", "score": 4.0, "negative": "Paris"},
    {"text": "born in Honolulu", "pair": "Obama", "score": 0, "negative": "on a mat"},
]


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n".join(map(json.dumps, rows)))
    return folder / name


def describe(**columns: Any) -> SentencesData:
    return SentencesData.model_validate({"kind": "sentences", "train": ["rows.jsonl"], **columns})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_pairs_scores_and_triplets_are_read(name: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path, ROWS, name)
    pairs = list(read_sentences(read_rows(file), describe()))
    assert [row.texts for row in pairs] == [("the cat sat", "a cat, sitting"), ("born in Honolulu", "Obama")]
    assert [row.score for row in pairs] == [None, None]
    scored = read_sentences(read_rows(file), describe(score="score", highest_score=5))
    assert [row.score for row in scored] == [0.8, 0.0]
    anchors = read_sentences(read_rows(file), describe(text="pair", pair="text", negative="negative"))
    assert next(anchors).texts == ("a cat, sitting", "the cat sat", "Paris")
    alone = read_sentences(read_rows(file), describe(pair=None))
    assert [(row.texts, row.problem) for row in alone] == [
        (("the cat sat",), "teacher"),
        (("born in Honolulu",), "teacher"),
    ]


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"score": 4.0}, {"score": "score"}, ":2: column 'score' is 4.0; must be a number from -1 to 1"),
        ({"score": "high"}, {"score": "score"}, ":2: column 'score' is 'high'; must be a number"),
        ({"score": None}, {"score": "score"}, ":2: column 'score' is None; must be a number"),
        ({"score": "nan"}, {"score": "score"}, ":2: column 'score' is 'nan'; must be a number"),
        ({}, {"score": "similarity"}, ":1: has no column 'similarity'; it has text, pair, score, negative"),
        ({"pair": ""}, {}, ":2: column 'pair' is empty; must be a text"),
        ({"negative": 3}, {"negative": "negative"}, ":2: column 'negative' holds int; must be a text"),
    ],
)
def test_a_bad_row_of_sentences_is_refused_by_its_place(
    row: dict[str, Any], columns: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = write_rows(tmp_path, [ROWS[0] | {"score": 1}, ROWS[1] | row])
    with pytest.raises(UpcycleError) as excinfo:
        list(read_sentences(read_rows(file), describe(**columns)))
    assert f"{file}{said}" in str(excinfo.value)
    assert "\n" not in str(excinfo.value)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"score": "s", "negative": "n"}, "has a score, 's', and a negative, 'n'; must have one of them"),
        ({"score": "s", "pair": None}, "has no pair, and a score or a negative"),
        ({"negative": "n", "pair": None}, "has no pair, and a score or a negative"),
    ],
)
def test_columns_that_cannot_be_learned_together_are_refused(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        describe(**columns)


def test_rows_of_equal_texts_stay_together_and_are_not_trained_on_where_held_out(tmp_path: Path) -> None:
    rows = [{"text": f"text {number % 50}", "pair": f"pair {number % 50}"} for number in range(100)]
    write_rows(tmp_path, rows)
    write_rows(tmp_path, rows[:3], "test.jsonl")
    found = read_labelled(describe(test=["test.jsonl"]), tmp_path)
    keys = [{row.key for row in found.rows[split]} for split in ("train", "validation", "test")]
    assert keys[0] | keys[1] | keys[2] == {f"text {number}\0pair {number}" for number in range(50)}
    assert not keys[0] & keys[1]
    assert not keys[2] & (keys[0] | keys[1])
    assert found.num_shared > 0


def test_each_text_is_a_row_of_its_own_and_equal_texts_have_one_number() -> None:
    tokenizer = word_piece()
    texts = [("the cat sat on a mat", "Barack Obama"), ("unbelievable", "the cat sat on a mat")]
    found = encode_sentences(tokenizer, 7, 0, [SentenceRow("here", pair) for pair in texts])
    ids, mask = found.tensors["input_ids"], found.tensors["attention_mask"]
    assert ids.shape == mask.shape == (2, 2, found.longest)
    for row, pair in enumerate(texts):
        for place, text in enumerate(pair):
            wanted = tokenizer(text, truncation=True, max_length=7)["input_ids"]
            assert ids[row, place][mask[row, place].bool()].tolist() == wanted
    assert found.tensors["labels"].tolist() == [[0, 1], [2, 0]]
    assert (found.num_cut, found.num_tokens) == (2, int(mask.sum()))
    scored = encode_sentences(tokenizer, 7, 0, [SentenceRow("here", pair, 0.5) for pair in texts])
    assert torch.equal(scored.tensors["labels"], torch.full((2,), 0.5))


def test_sentences_of_the_hub_are_read_split_by_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held = {
        split: {"sentence1": [f"{split} {n}" for n in range(4)], "sentence2": ["it"] * 4, "score": [0.0, 2.5, 5.0, 1.0]}
        for split in ("train", "dev", "test")
    }

    def load(path: str, name: str | None, *, revision: str | None, split: str) -> datasets.Dataset:
        assert (path, name, revision) == ("us/it", None, None)
        return datasets.Dataset.from_dict(held[split])

    monkeypatch.setattr(datasets, "load_dataset", load)
    columns = {"text": "sentence1", "pair": "sentence2", "score": "score", "highest_score": 5, "validation": "dev"}
    source = HubSentencesData.model_validate({"kind": "hub-sentences", "path": "us/it", **columns})
    found = read_labelled(source, tmp_path)
    assert [(row.texts, row.score) for row in found.rows["validation"]] == [
        (("dev 0", "it"), 0.0),
        (("dev 1", "it"), 0.5),
        (("dev 2", "it"), 1.0),
        (("dev 3", "it"), 0.2),
    ]
    held["test"]["score"][2] = 7.0
    with pytest.raises(UpcycleError, match=r"data set 'us/it', row 2 of split 'test': column 'score' is 7\.0"):
        read_labelled(source, tmp_path)
