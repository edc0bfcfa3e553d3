"""The task of answering: losses of transformers' head, figures of SQuAD's evaluation, spans by a search of pairs."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from clients import ask_client
from transformers import BertConfig, BertForQuestionAnswering

from dense2moe.upcycle.tasks.answer import TextAnswer, WindowAnswer
from dense2moe.upcycle.tasks.answer_scores import (
    answers_error,
    average_answers,
    match_exactly,
    match_words,
    normalize,
    score_answer,
)
from dense2moe.upcycle.tasks.asked import Asked, Question
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.held_out import judge_examples
from dense2moe.upcycle.tasks.questions import join_windows, question_task, take_ends
from dense2moe.upcycle.tasks.spans import find_best_span, score_none

# What SQuAD's evaluation (evaluate-v2.0.py) says, by hand: said, right, exact match, F1.
BY_HAND: list[tuple[str, tuple[str, ...], float, float]] = [
    ("Denver Broncos", ("Denver Broncos", "The Denver Broncos!"), 1.0, 1.0),
    ("the  denver broncos", ("Denver Broncos.",), 1.0, 1.0),
    ("Broncos", ("Denver Broncos",), 0.0, 2 / 3),
    ("in Denver, Colorado", ("Denver",), 0.0, 0.5),
    ("Denver Denver", ("Denver",), 0.0, 2 / 3),
    ("a b b c", ("b c c", "d"), 0.0, 2 / 3),  # without the article b b c: two words of three on both sides
    ("Panthers", ("Denver Broncos",), 0.0, 0.0),
    ("it's", ("its",), 1.0, 1.0),
    ("U.S.A.", ("USA",), 1.0, 1.0),
    ("theatre", ("atre",), 0.0, 0.0),  # an article only as a word
    ("", (), 1.0, 1.0),
    ("Denver", (), 0.0, 0.0),
    ("", ("Denver",), 0.0, 0.0),
    ("the", ("The", "a"), 1.0, 1.0),  # of which nothing is left: as no answer
    ("x", ("the", "x"), 1.0, 1.0),
]


@pytest.mark.parametrize(("said", "right", "exact", "f1"), BY_HAND)
def test_an_answer_scores_as_in_squad_s_evaluation(said: str, right: tuple[str, ...], exact: float, f1: float) -> None:
    answer = TextAnswer(said, right)
    assert score_answer(answer, match_exactly) == exact
    assert score_answer(answer, match_words) == pytest.approx(f1)


def test_normalized_text() -> None:
    assert normalize(" The quick--brown\tfox, an  (old) A. ") == "quickbrown fox old"


def draw_answers(count: int, seed: int = 0) -> list[TextAnswer]:
    draw = random.Random(seed)
    words = ["the", "a", "Denver", "broncos", "U.S.", "—", "Zoë", "won!", ""]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randrange(4))).strip()

    return [TextAnswer(text(), tuple(text() for _ in range(draw.randrange(3)))) for _ in range(count)]


SQUAD_METRICS = """
import json, sys
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1, normalize_answer
rows = []
for said, right in json.loads(sys.argv[1]):
    golds = [each for each in right if normalize_answer(each)] or [""]
    rows.append([max(score(gold, said) for gold in golds) for score in (compute_exact, compute_f1)])
print(json.dumps(rows))
"""


def test_scores_are_those_of_transformers_squad_metrics() -> None:
    """Which transformers had until 5."""
    answers = draw_answers(300)
    theirs = ask_client(SQUAD_METRICS, json.dumps([[each.said, each.right] for each in answers]))
    ours = [[score_answer(each, score) for score in (match_exactly, match_words)] for each in answers]
    np.testing.assert_allclose(ours, theirs)


def test_the_error_of_a_difference_is_that_of_its_mean() -> None:
    own, other = (
        draw_answers(60, 1),
        [
            TextAnswer(each.said, answer.right)
            for each, answer in zip(draw_answers(60, 2), draw_answers(60, 1), strict=True)
        ],
    )
    differences = np.array(
        [score_answer(a, match_words) - score_answer(b, match_words) for a, b in zip(own, other, strict=True)]
    )
    assert answers_error(own, other) == pytest.approx(differences.std(ddof=1) / math.sqrt(60))
    assert answers_error(own, own) == 0.0
    assert answers_error(own[:1], other[:1]) == 0.0
    assert average_answers(own, match_words) - average_answers(other, match_words) == pytest.approx(differences.mean())


# Spans


@pytest.mark.parametrize("longest", [1, 3, 30])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_span_is_that_of_all_pairs(longest: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 14, generator=draw)
    spans = torch.tensor([(0, 0), *[(-1, -1)] * 3, *[(4 * n, 4 * n + 3) for n in range(8)], (-1, -1), (-1, -1)])
    pairs = [(i, j) for i, j in itertools.product(range(4, 12), repeat=2) if i <= j < i + longest]
    expected = max(pairs, key=lambda pair: float(logits[0, pair[0]]) + float(logits[1, pair[1]]))
    score, first, last = find_best_span(logits, spans, longest)
    assert (first, last) == expected
    assert score == pytest.approx(float(logits[0, first] + logits[1, last]))
    assert score_none(logits, spans) == pytest.approx(float(logits[0, 0] + logits[1, 0]))


def test_windows_of_a_question_are_one_answer() -> None:
    """The best stretch of all windows; nothing where the least score of none is above it, and only if that may be."""
    questions = {7: Question("the cat sat", ("cat",)), 3: Question("on a mat", ())}
    answers = [
        WindowAnswer(7, none=9.0, score=2.0, start=0, end=3),
        WindowAnswer(3, none=4.0, score=3.0, start=3, end=8),
        WindowAnswer(7, none=1.0, score=2.5, start=3, end=7),
        WindowAnswer(3, none=3.5, score=1.0, start=0, end=2),
    ]
    assert join_windows(answers, Asked(questions)) == [TextAnswer("", ()), TextAnswer("cat", ("cat",))]
    said = join_windows(answers, Asked(questions, may_lack=False))
    assert said == [TextAnswer("a mat", ()), TextAnswer("cat", ("cat",))]
    task = question_task(Asked(questions))
    figures = {figure.name: figure.value for figure in task.figures([0.5] * 4, answers)}
    assert figures == {"answer F1": 1.0, "exact match": 1.0, "loss": 0.5}
    scores = task.scores(answers)
    assert scores is not None
    assert [(each.name, each.f1, each.support) for each in scores.scores] == [("answer", 1.0, 1), ("no answer", 1.0, 1)]
    assert question_task(Asked(questions, may_lack=False)).scores(answers) is None


# Losses

TINY = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    initializer_range=0.5,
)
ASKED = Asked({number: Question("abcdefghijklmnopqrstuvwxyz", ("cd",)) for number in range(5)})


def make_model() -> Any:
    torch.manual_seed(0)
    return BertForQuestionAnswering(TINY).eval()


def draw_windows(length: int = 12) -> dict[str, torch.Tensor]:
    """Windows of many lengths: a question of two tokens between marks, then a context of a letter a token."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 7, 9, 10, length])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(3, 50, (5, length), generator=draw) * mask
    letters = torch.arange(length) - 4
    is_letter = (letters >= 0) & (torch.arange(length) < lengths[:, None] - 1)
    spans = torch.stack([torch.where(is_letter, letters, -1), torch.where(is_letter, letters + 1, -1)], -1)
    spans[:, 0] = 0
    labels = torch.tensor([[4, 4], [0, 0], [5, 7], [4, 8], [6, 10]])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": is_letter.long(),
        "labels": labels,
        "span_starts": spans[..., 0],
        "span_ends": spans[..., 1],
        "questions": torch.arange(5),
    }


def test_the_loss_of_a_window_and_its_gradient_are_those_of_transformers_answering_head() -> None:
    model, task, batch = make_model(), question_task(ASKED), draw_windows()
    for place, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        one = {name: tensor[place : place + 1] for name, tensor in batch.items()}
        one |= {name: one[name][:, :length] for name in ("input_ids", "attention_mask", "token_type_ids")}
        start, end = one["labels"].T
        theirs = model(**task.inputs(one), start_positions=start, end_positions=end).loss
        ours = task.loss(task.predictions(model(**task.inputs(one))), one)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        expected = torch.autograd.grad(theirs, list(model.parameters()))
        found = torch.autograd.grad(ours, list(model.parameters()))
        for one_gradient, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one_gradient, other, rtol=1e-4, atol=1e-6)


def test_a_padded_batch_has_the_losses_and_answers_of_its_windows_one_at_a_time() -> None:
    model, task, batch = make_model(), question_task(ASKED), draw_windows()
    examples = Examples(batch, torch.zeros(5, dtype=torch.int64))

    def predict(inputs: dict[str, Any]) -> torch.Tensor:
        return task.predictions(model(**inputs))

    together = judge_examples(predict, examples, torch.device("cpu"), task)
    alone = [judge_examples(predict, one, torch.device("cpu"), task) for one in examples.split(1)]
    for place, one in enumerate(alone):
        assert together.losses[place] == pytest.approx(one.losses[0], rel=1e-5)  # other sizes, other kernels
        own, other = together.answers[place], one.answers[0]
        assert (own.question, own.start, own.end) == (place, other.start, other.end)
        assert (own.none, own.score) == pytest.approx((other.none, other.score), rel=1e-4)
    with torch.no_grad():
        mean = task.loss(take_ends(model(**task.inputs(batch))), batch)
    assert float(mean) == pytest.approx(sum(one.losses[0] for one in alone) / 5, rel=1e-5)


def test_the_divergence_from_itself_is_none_and_from_another_a_loop_s() -> None:
    task, batch = question_task(ASKED), draw_windows()
    draw = torch.Generator().manual_seed(1)
    own, other = (torch.randn(5, 2, 12, generator=draw) for _ in range(2))
    assert float(task.divergence(own, own, 2.0, batch)) == pytest.approx(0.0, abs=1e-6)
    total = 0.0
    for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        for end in range(2):
            p, q = ((each[row, end, :length] / 2).double().softmax(-1) for each in (other, own))
            total += 4 * sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
    assert float(task.divergence(own, other, 2.0, batch)) == pytest.approx(total / 10, rel=1e-5)
