"""Recipes of questions: heads that are kept, mistakes of users in one line, and what the data tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_label_training import BLOCK, TRAINING, check, quiet, save_bert, write_questions
from test_question_rows import ROWS, asked
from test_words import word_piece
from transformers import BertConfig, BertForQuestionAnswering

from dense2moe.upcycle.data.blocks import prepare_data
from dense2moe.upcycle.data.config import DataConfig
from dense2moe.upcycle.data.labelled import read_labelled
from dense2moe.upcycle.data.question_examples import read_asked
from dense2moe.upcycle.data.vocabulary import find_vocabulary
from dense2moe.upcycle.record import Record

QUESTIONS = "{kind: table, train: [questions.jsonl], question: question}"


@pytest.mark.parametrize(
    ("data", "fields", "said"),
    [
        (QUESTIONS, {"limits": f"{BLOCK}\n  stride: 24"}, "data.stride: is 24; must be less than data.block_size"),
        ("{kind: table, train: [rows.jsonl]}", {"limits": f"{BLOCK}\n  stride: 8"}, "the data has no questions"),
        (QUESTIONS[:-1] + ", pair: other}", {}, "data.source.pair: is given beside question"),
        (QUESTIONS[:-1] + ", words: words}", {}, "data.source.words: is given beside question"),
        (
            QUESTIONS,
            {"finetune": TRAINING[:-1] + ", class_weights: balanced}"},
            "finetune.class_weights: is 'balanced', and answers are places in a context; leave it out",
        ),
        (
            QUESTIONS,
            {"finetune": TRAINING[:-1] + ", label_smoothing: 0.1}"},
            "finetune.label_smoothing: is 0.1, and answers are places in a context; leave it out",
        ),
        (QUESTIONS, {"limits": "  block_size: 8"}, "leave room for the context"),
        (QUESTIONS[:-1] + ", answers: solutions}", {}, "has no column 'solutions'; it has question, context, answers"),
        (
            f"{{kind: tasks, tasks: {{one: {QUESTIONS}, other: {{kind: table, train: [rows.jsonl]}}}}}}",
            {},
            "'one' answers questions; train it alone",
        ),
    ],
)
def test_questions_that_cannot_be_trained_are_refused(
    data: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save_bert(tmp_path / "source")
    write_questions(tmp_path)
    rows = ({"text": f"n{number}", "label": str(number % 2)} for number in range(60))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert said in check(tmp_path, data, **fields)


def test_a_head_for_questions_keeps_its_labels_whatever_they_are_called(tmp_path: Path) -> None:
    write_questions(tmp_path)
    rows = read_labelled(asked(train=["questions.jsonl"]), tmp_path).rows
    kept = find_vocabulary(rows, BertConfig(architectures=["BertForQuestionAnswering"]))
    drawn = find_vocabulary(rows, BertConfig(architectures=["BertForMaskedLM"]))
    assert (kept.labels, drawn.labels) == (("LABEL_0", "LABEL_1"), ("start", "end"))


def configure(**fields: Any) -> DataConfig:
    source: Record = asked(train=["questions.jsonl"], test=["test.jsonl"])
    return DataConfig.model_validate({"source": source, "block_size": 24, **fields})


def test_data_tells_windows_questions_and_whether_an_answer_may_lack(tmp_path: Path) -> None:
    save_bert(tmp_path / "source")
    tokenizer = word_piece()
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, intermediate_size=24)
    BertForQuestionAnswering(config).save_pretrained(tmp_path / "asked")
    tokenizer.save_pretrained(tmp_path / "asked")
    write_questions(tmp_path)
    again = {**ROWS[0], "answers": {"text": ["1999"], "answer_start": [ROWS[0]["context"].index("1999")]}}
    lines = [json.dumps(row) + "\n" for row in (*ROWS, again)]  # one question asked twice, with other answers
    (tmp_path / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, is_new in (("source", True), ("asked", False)):
        output = tmp_path / f"data of {name}"
        output.mkdir()
        facts = prepare_data(tmp_path / name, output, configure(), tmp_path, quiet)
        assert (facts["task"], facts["new_head"]) == ("question-answering", is_new)
        for split, number in facts["num_windows"].items():
            tensors = load_file(output / f"{split}.safetensors")
            assert len(tensors["input_ids"]) == len(tensors["labels"]) == len(tensors["domains"]) == number
            assert number > facts["num_examples"][split]
            assert ("span_starts" in tensors) == (split != "train")
    told = read_asked(output)
    assert told.may_lack
    assert told.longest == 30
    assert facts["num_examples"]["test"] == 3
    right = [question.right for question in told.questions.values() if question.context == ROWS[0]["context"]]
    assert sorted(right) == [(), ("Kyoto", "in\nKyoto", "1999")]
