"""Tasks with labels: losses by loops and by transformers' heads, figures by scikit-learn, seqeval and a bootstrap."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import seqeval.metrics
import torch
from scipy.stats import spearmanr
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score
from sklearn.utils.class_weight import compute_class_weight
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.examples import UNLABELLED, Examples
from dense2moe.upcycle.tasks.head import ONE, SEVERAL, VALUE, LabelHead
from dense2moe.upcycle.tasks.held_out import judge_examples
from dense2moe.upcycle.tasks.label_facts import LabelScores
from dense2moe.upcycle.tasks.labels import LabelLoss, label_task
from dense2moe.upcycle.tasks.paired_error import accuracy_error, entity_error, rank_error, set_error
from dense2moe.upcycle.tasks.task import Task

NAMES = ("red", "green", "blue")
TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
HEADS: dict[str, LabelHead] = {
    "one": LabelHead(NAMES, ONE),
    "several": LabelHead(NAMES, SEVERAL),
    "value": LabelHead(("value",), VALUE),
}
TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
}


def of_texts(kind: str, learned: LabelLoss | None = None) -> Task:
    return label_task("text-classification", HEADS[kind], *([learned] if learned else []))


def of_words(labels: Sequence[str] = TAGS, learned: LabelLoss | None = None) -> Task:
    return label_task("token-classification", LabelHead(tuple(labels)), *([learned] if learned else []))


def draw_batch(kind: str, count: int = 5, length: int = 9) -> dict[str, torch.Tensor]:
    """Texts of many lengths, padded on the right, with labels of one kind."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.linspace(3, length, count).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(3, 50, (count, length), generator=draw) * mask
    labels: dict[str, torch.Tensor] = {
        "one": torch.randint(3, (count,), generator=draw),
        "several": torch.randint(2, (count, 3), generator=draw).float(),
        "value": torch.randn(count, 1, generator=draw),
        "words": torch.where(mask.bool(), torch.randint(5, (count, length), generator=draw), UNLABELLED),
    }
    found = labels[kind]
    if kind == "words":
        found[:, 1] = UNLABELLED  # a piece of a word that is not its first
    return {"input_ids": ids, "attention_mask": mask, "labels": found}


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "words":
        return BertForTokenClassification(BertConfig(**TINY, num_labels=5)).eval()
    problem = {"one": ONE, "several": SEVERAL, "value": VALUE}[kind]
    num_labels = 1 if kind == "value" else 3
    return BertForSequenceClassification(BertConfig(**TINY, num_labels=num_labels, problem_type=problem)).eval()


def find_task(kind: str, learned: LabelLoss | None = None) -> Task:
    return of_words(learned=learned) if kind == "words" else of_texts(kind, learned)


KINDS = ("one", "several", "value", "words")


# Losses


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_one_text_and_its_gradient_are_those_of_transformers_head(kind: str) -> None:
    """Where an example is alone, transformers' mean over words or labels is the example's."""
    model, task, batch = make_model(kind), find_task(kind), draw_batch(kind)
    for place in range(5):
        one = {name: tensor[place : place + 1] for name, tensor in batch.items()}
        theirs = model(**one).loss
        ours = task.loss(model(**task.inputs(one)).logits, one)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # sums of float32 in another order
        expected = torch.autograd.grad(theirs, list(model.parameters()))
        found = torch.autograd.grad(ours, list(model.parameters()))
        for one_gradient, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one_gradient, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["one", "several", "value"])
def test_the_loss_of_a_batch_of_texts_is_that_of_transformers_head(kind: str) -> None:
    model, task, batch = make_model(kind), find_task(kind), draw_batch(kind)
    ours = task.loss(model(**task.inputs(batch)).logits, batch)
    torch.testing.assert_close(ours, model(**batch).loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_has_the_losses_and_answers_of_its_texts_one_at_a_time(kind: str) -> None:
    model, task, batch = make_model(kind), find_task(kind), draw_batch(kind)
    examples = Examples(batch, torch.zeros(5, dtype=torch.int64))
    together = judge_examples(lambda inputs: model(**inputs).logits, examples, torch.device("cpu"), task)
    alone = [
        judge_examples(lambda inputs: model(**inputs).logits, one, torch.device("cpu"), task)
        for one in examples.split(1)
    ]
    for place, one in enumerate(alone):
        assert together.losses[place] == pytest.approx(one.losses[0], rel=1e-5)  # other sizes, other kernels
        assert together.answers[place].right == one.answers[0].right
        assert together.answers[place].said == pytest.approx(one.answers[0].said, rel=1e-5)
    with torch.no_grad():
        mean = task.loss(model(**task.inputs(batch)).logits, batch)
    assert float(mean) == pytest.approx(sum(one.losses[0] for one in alone) / 5, rel=1e-5)


def log_softmax(row: Sequence[float]) -> list[float]:
    total = math.log(sum(math.exp(each) for each in row))
    return [each - total for each in row]


def smoothed(row: Sequence[float], label: int, smoothing: float) -> float:
    """Cross-entropy with a target that gives every label a share of `smoothing` (Szegedy et al. 2016, section 7)."""
    target = [smoothing / len(row) + (1 - smoothing) * (place == label) for place in range(len(row))]
    return -sum(share * log_p for share, log_p in zip(target, log_softmax(row), strict=True))


def smoothed_set(row: Sequence[float], labels: Sequence[float], smoothing: float) -> float:
    """Of each label's two outcomes both get half of `smoothing`; the mean over labels."""
    losses = []
    for logit, label in zip(row, labels, strict=True):
        yes, no = log_softmax([logit, 0.0])
        target = smoothing / 2 + (1 - smoothing) * label
        losses.append(-target * yes - (1 - target) * no)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 1.0, 0.1, 4.0)])
@pytest.mark.parametrize("kind", ["one", "words"])
def test_losses_in_training_are_those_of_a_loop(kind: str, weights: tuple[float, ...], smoothing: float) -> None:
    batch = draw_batch(kind)
    size = 5 if kind == "words" else 3
    shape = (5, 9, size) if kind == "words" else (5, size)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    task = find_task(kind, LabelLoss(smoothing, weights[:size]))
    losses = []
    for row, labels in zip(logits.tolist(), batch["labels"].tolist(), strict=True):
        pairs = zip(row, labels, strict=True) if kind == "words" else [(row, labels)]
        words = [
            smoothed(each, label, smoothing) * (weights[label] if weights else 1.0)
            for each, label in pairs
            if label != UNLABELLED
        ]
        losses.append(sum(words) / len(words))
    assert task.loss(logits, batch).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    with torch.no_grad():  # what is held out has the plain loss, whatever a model learned by
        assert float(task.loss(logits, batch)) == pytest.approx(float(find_task(kind).loss(logits, batch)), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_of_sets_of_labels_are_those_of_a_loop(smoothing: float) -> None:
    batch = draw_batch("several")
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    rows = zip(logits.tolist(), batch["labels"].tolist(), strict=True)
    expected = [smoothed_set(row, labels, smoothing) for row, labels in rows]
    found = find_task("several", LabelLoss(smoothing)).loss(logits, batch)
    assert found.item() == pytest.approx(sum(expected) / 5, rel=1e-5)


def test_balanced_weights_are_scikit_learn_s(tmp_path: Any) -> None:
    from dense2moe.upcycle.training.config import FinetuneConfig
    from dense2moe.upcycle.training.task_choice import choose_label_loss

    counts = {"red": 70, "green": 25, "blue": 5, "never": 0}
    told = {"task": "text-classification", "labels": list(counts), "problem": ONE}
    write_facts(tmp_path, **told, label_counts={"train": counts})
    given = [name for name, count in counts.items() for _ in range(count)]
    expected = compute_class_weight("balanced", classes=np.array(["red", "green", "blue"]), y=given)
    learned = choose_label_loss(tmp_path, FinetuneConfig(class_weights="balanced", label_smoothing=0.1))
    assert learned == LabelLoss(0.1, (*map(pytest.approx, expected), 0.0))
    shares = np.array([count / 100 for count in counts.values()])
    assert float(shares @ np.array(learned.weights)) == pytest.approx(1.0)
    assert choose_label_loss(tmp_path, FinetuneConfig()) == LabelLoss()


def write_facts(folder: Any, **facts: Any) -> None:
    import json

    (folder / "data.json").write_text(json.dumps(facts), encoding="utf-8")


# Distillation


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_certain_of_the_labels_teaches_as_they_do(kind: str) -> None:
    """At temperature 1 the divergence from one-hot distributions is the loss, and has its gradient."""
    task, batch = find_task(kind), draw_batch(kind)
    size = {"words": 5, "value": 1}.get(kind, 3)
    shape = (5, 9, size) if kind == "words" else (5, size)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    certain = {
        "one": lambda labels: 60.0 * torch.nn.functional.one_hot(labels, 3),
        "several": lambda labels: 60.0 * (2 * labels - 1),
        "value": lambda labels: labels,
        "words": lambda labels: 60.0 * torch.nn.functional.one_hot(labels.clamp(min=0), 5),
    }[kind](batch["labels"])
    ours, loss = task.divergence(logits, certain, 1.0, batch), task.loss(logits, batch)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (ours, loss)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["one", "several", "words"])
def test_divergences_are_those_of_torch_and_nothing_from_oneself(kind: str) -> None:
    task, batch = find_task(kind), draw_batch(kind)
    shape = (5, 9, 5) if kind == "words" else (5, 3)
    draw = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    assert float(task.divergence(student, student, 2.0, batch)) == pytest.approx(0.0, abs=1e-6)
    pairs = [(each / 2.0) for each in (student, teacher)]
    if kind == "several":
        distributions = [torch.distributions.Bernoulli(logits=each) for each in pairs]
        divergences = torch.distributions.kl_divergence(distributions[1], distributions[0]).mean(-1)
    else:
        divergences = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=pairs[1]), torch.distributions.Categorical(logits=pairs[0])
        )
    if kind == "words":
        real = batch["labels"] != UNLABELLED
        divergences = torch.stack([row[own].mean() for row, own in zip(divergences, real, strict=True)])
    found = task.divergence(student, teacher, 2.0, batch)
    assert float(found) == pytest.approx(4.0 * float(divergences.mean()), rel=1e-5)


def test_a_teacher_is_not_heard_on_padding() -> None:
    task, batch = find_task("words"), draw_batch("words")
    draw = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 9, 5, generator=draw) for _ in range(2))
    moved = torch.where((batch["labels"] == UNLABELLED)[..., None], torch.full_like(teacher, 1e4), teacher)
    assert not torch.equal(moved, teacher)
    assert float(task.divergence(student, moved, 1.0, batch)) == float(task.divergence(student, teacher, 1.0, batch))


# Figures and tables


def draw_answers(labels: Sequence[str], count: int, words: bool, right_share: float = 0.6) -> list[LabelAnswer]:
    draw = random.Random(count)
    found = []
    for _ in range(count):
        right = tuple(draw.randrange(len(labels)) for _ in range(draw.randrange(1, 9) if words else 1))
        said = tuple(each if draw.random() < right_share else draw.randrange(len(labels)) for each in right)
        found.append(LabelAnswer(said, right))
    return found


def draw_sets(size: int, count: int) -> list[LabelAnswer]:
    draw = random.Random(count)

    def one() -> tuple[int, ...]:
        return tuple(number for number in range(size) if draw.random() < 0.4)

    return [LabelAnswer(*((right := one()), right) if draw.random() < 0.4 else (one(), one())) for _ in range(count)]


def flatten(answers: Sequence[LabelAnswer]) -> tuple[list[float], list[float]]:
    return [n for a in answers for n in a.right], [n for a in answers for n in a.said]


def figures(task: Task, answers: Sequence[LabelAnswer]) -> dict[str, float]:
    found = task.figures([0.25] * len(answers), answers)
    assert found[0].better == "higher"
    return {figure.name: figure.value for figure in found}


def tabulate(scores: LabelScores | None) -> dict[str, dict[str, float]]:
    assert scores is not None
    return {
        each.name: {"precision": each.precision, "recall": each.recall, "f1-score": each.f1, "support": each.support}
        for each in scores.scores
    }


@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_classes_are_scored_as_scikit_learn_scores_them(count: int) -> None:
    task, answers = find_task("one"), draw_answers(NAMES, count, words=False)
    right, said = flatten(answers)
    assert figures(task, answers) == pytest.approx(
        {
            "accuracy": accuracy_score(right, said),
            "macro F1": f1_score(right, said, average="macro", zero_division=0.0),
            "loss": 0.25,
        }
    )
    report = classification_report(
        right, said, labels=range(3), target_names=NAMES, output_dict=True, zero_division=0.0
    )
    scores = task.scores(answers)
    assert tabulate(scores) == {name: pytest.approx(report[name]) for name in NAMES}
    matrix = confusion_matrix(right, said, labels=range(3))
    assert {(each.right, each.said): each.count for each in scores.confusions} == {
        (NAMES[a], NAMES[b]): matrix[a, b] for a in range(3) for b in range(3) if matrix[a, b]
    }


@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_sets_of_labels_are_scored_as_scikit_learn_scores_them(count: int) -> None:
    task, answers = find_task("several"), draw_sets(3, count)
    right, said = (
        np.array([[number in side for number in range(3)] for side in sides])
        for sides in ([a.right for a in answers], [a.said for a in answers])
    )
    assert figures(task, answers) == pytest.approx(
        {
            "micro F1": f1_score(right, said, average="micro", zero_division=0.0),
            "macro F1": f1_score(right, said, average="macro", zero_division=0.0),
            "exact match": accuracy_score(right, said),
            "loss": 0.25,
        }
    )
    report = classification_report(right, said, target_names=NAMES, output_dict=True, zero_division=0.0)
    assert tabulate(task.scores(answers)) == {name: pytest.approx(report[name]) for name in NAMES}


def test_sets_are_read_off_logits_as_transformers_pipeline_reads_them() -> None:
    """A label holds where its sigmoid is above one half."""
    batch, task = draw_batch("several"), find_task("several")
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for answer, row, right in zip(task.answers(logits, batch), logits, batch["labels"], strict=True):
        assert answer.said == tuple(n for n in range(3) if torch.sigmoid(row[n]) > 0.5)
        assert answer.right == tuple(n for n in range(3) if right[n] == 1)


SCHEMES: dict[str, tuple[str, ...]] = {
    "IOB2": TAGS,
    "IOBES": ("O", *(f"{tag}-{kind}" for kind in ("LOC", "PER") for tag in "BIES")),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_entities_are_scored_as_seqeval_scores_them(count: int, scheme: str) -> None:
    labels = SCHEMES[scheme]
    task, answers = of_words(labels), draw_answers(labels, count, words=True, right_share=0.8)
    right, said = (
        [[labels[int(n)] for n in each] for each in side]
        for side in zip(*[(a.right, a.said) for a in answers], strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "entity F1": seqeval.metrics.f1_score(right, said, zero_division=0),
            "precision": seqeval.metrics.precision_score(right, said, zero_division=0),
            "recall": seqeval.metrics.recall_score(right, said, zero_division=0),
            "loss": 0.25,
        }
        report = seqeval.metrics.classification_report(right, said, output_dict=True, zero_division=0)
    assert figures(task, answers) == pytest.approx(expected)
    assert tabulate(task.scores(answers)) == {
        name: pytest.approx(line) for name, line in report.items() if name in ("LOC", "PER")
    }


def bilou(words: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities of well-formed tags of BILOU, found by hand: U- is one, and B- to the next L- is one."""
    found = []
    for place, tag in enumerate(words):
        if tag.startswith("U-"):
            found.append((tag[2:], place, place))
        if tag.startswith("B-"):
            end = next(other for other in range(place, len(words)) if words[other].startswith("L-"))
            found.append((tag[2:], place, end))
    return found


def test_tags_of_bilou_are_entities_too() -> None:
    """Two entities of one type side by side are two, which seqeval alone would not see."""
    labels = ("O", *(f"{tag}-{kind}" for kind in ("LOC", "PER") for tag in "BILU"))
    right = ["B-LOC", "L-LOC", "B-LOC", "I-LOC", "L-LOC", "U-PER", "U-PER", "O", "U-LOC"]
    said = ["B-LOC", "L-LOC", "B-LOC", "L-LOC", "O", "U-PER", "U-PER", "U-PER", "O"]
    answer = LabelAnswer(tuple(map(labels.index, said)), tuple(map(labels.index, right)))
    shared = set(bilou(right)) & set(bilou(said))
    assert (len(bilou(right)), len(bilou(said)), len(shared)) == (5, 5, 3)
    found = figures(of_words(labels), [answer])
    assert (found["precision"], found["recall"]) == (3 / 5, 3 / 5)
    assert tabulate(of_words(labels).scores([answer]))["PER"]["support"] == 2


def test_a_type_of_entity_may_have_any_name() -> None:
    labels = ("O", "B-micro avg", "B-the avg")
    answers = [LabelAnswer((1, 2, 0), (1, 2, 2))]
    assert {each.name: each.support for each in of_words(labels).scores(answers).scores} == {
        "micro avg": 1,
        "the avg": 2,
    }


def test_texts_without_any_entity_have_figures() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = [LabelAnswer((0, 0), (0, 0))]
        assert figures(of_words(), answers)["entity F1"] == 0.0
        assert of_words().scores(answers).scores == ()
        assert entity_error(answers, answers, TAGS) == 0.0


def test_words_whose_labels_are_no_tags_of_entities_have_accuracies() -> None:
    labels = ("NOUN", "VERB", "O")
    answers = draw_answers(labels, 30, words=True)
    right, said = flatten(answers)
    assert figures(of_words(labels), answers)["accuracy"] == pytest.approx(accuracy_score(right, said))


def test_values_are_scored_as_scipy_scores_them() -> None:
    task, draw = find_task("value"), random.Random(0)
    answers = [LabelAnswer((draw.random(),), (draw.randrange(5),)) for _ in range(40)]
    expected = spearmanr([a.said[0] for a in answers], [a.right[0] for a in answers]).statistic
    assert figures(task, answers)["rank correlation"] == pytest.approx(expected)
    assert figures(task, [replace(a, said=(1.0,)) for a in answers])["rank correlation"] == 0.0
    assert figures(task, answers[:1])["rank correlation"] == 0.0
    assert task.scores(answers) is None


# Standard errors of differences


def brute(score: Callable[[Sequence[LabelAnswer]], float], pairs: Sequence[tuple[LabelAnswer, LabelAnswer]]) -> float:
    """The bootstrap as its definition says: examples drawn with replacement, both models scored on each sample."""
    draw, differences = random.Random(1), []
    for _ in range(300):
        sample = draw.choices(pairs, k=len(pairs))
        differences.append(score([one for one, _ in sample]) - score([other for _, other in sample]))
    return float(np.std(differences, ddof=1))


def _accuracy(answers: Sequence[LabelAnswer]) -> float:
    return float(accuracy_score(*flatten(answers)))


def _micro(answers: Sequence[LabelAnswer]) -> float:
    sides = ([a.right for a in answers], [a.said for a in answers])
    return float(
        f1_score(
            *([[n in each for n in range(3)] for each in side] for side in sides), average="micro", zero_division=0.0
        )
    )


def _entities(answers: Sequence[LabelAnswer]) -> float:
    sides = ([a.right for a in answers], [a.said for a in answers])
    right, said = (
        {(number, *entity) for number, each in enumerate(side) for entity in get_entities([TAGS[int(n)] for n in each])}
        for side in sides
    )
    return 2 * len(right & said) / (len(right) + len(said))


def _rank(answers: Sequence[LabelAnswer]) -> float:
    return float(spearmanr([a.said[0] for a in answers], [a.right[0] for a in answers]).statistic)


def _same_right(draw: Callable[[float], list[LabelAnswer]]) -> list[tuple[LabelAnswer, LabelAnswer]]:
    return list(zip(draw(0.5), draw(0.9), strict=True))


def _pairs(kind: str) -> list[tuple[LabelAnswer, LabelAnswer]]:
    draw, found = random.Random(5), []
    for _ in range(60):
        length = draw.randrange(1, 7) if kind in ("entities", "words") else 1
        size = 5 if kind == "entities" else 3
        if kind == "values":
            right = (draw.random(),)
            sides = [(right[0] + draw.gauss(0, noise),) for noise in (0.1, 0.5)]
        elif kind == "sets":
            right = tuple(n for n in range(3) if draw.random() < 0.4)
            sides = [tuple(n for n in range(3) if (n in right) != (draw.random() < noise)) for noise in (0.1, 0.3)]
        else:
            right = tuple(draw.randrange(size) for _ in range(length))
            sides = [tuple(n if draw.random() > noise else draw.randrange(size) for n in right) for noise in (0.1, 0.4)]
        found.append((LabelAnswer(sides[0], right), LabelAnswer(sides[1], right)))
    return found


@pytest.mark.parametrize(
    ("kind", "score", "error"),
    [
        ("classes", _accuracy, accuracy_error),
        ("words", _accuracy, accuracy_error),
        ("sets", _micro, set_error),
        ("entities", _entities, lambda one, other: entity_error(one, other, TAGS)),
        ("values", _rank, rank_error),
    ],
)
def test_paired_errors_are_those_of_a_bootstrap(kind: str, score: Any, error: Any) -> None:
    pairs = _pairs(kind)
    found = error([one for one, _ in pairs], [other for _, other in pairs])
    expected = brute(score, pairs)
    assert found == pytest.approx(expected, rel=0.15)  # a standard deviation of 300 draws has an error of 4 %
    same = error([one for one, _ in pairs], [one for one, _ in pairs])
    assert same == 0.0
    assert found == error([one for one, _ in pairs], [other for _, other in pairs]), "drawn anew"


def test_a_bootstrap_of_many_examples_takes_little_memory() -> None:
    """Weights of all resamples at once would be 800 MB of 50 000 examples."""
    import tracemalloc

    one = [LabelAnswer((n % 3,), (n % 3,)) for n in range(50_000)]
    other = [LabelAnswer(((n + (n % 7 == 0)) % 3,), (n % 3,)) for n in range(50_000)]
    tracemalloc.start()
    found = accuracy_error(one, other)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == pytest.approx(math.sqrt((1 / 7) * (6 / 7) / 50_000), rel=0.1)
    assert peak < 100e6


def test_examples_are_cut_to_their_longest_and_lengths_are_those_of_the_mask() -> None:
    batch = draw_batch("words")
    examples = Examples(batch, torch.zeros(5, dtype=torch.int64))
    assert examples.lengths.tolist() == batch["attention_mask"].sum(-1).tolist()
    widths = [part["input_ids"].shape[1] for part in examples.batches(2)]
    assert widths == [4, 7, 9]
    assert all(first < second for first, second in pairwise(widths))
    for part, whole in zip(examples.split(2), examples.batches(2), strict=True):
        assert whole.keys() == batch.keys()
        assert whole["labels"].shape == whole["input_ids"].shape
        assert int(whole["attention_mask"].sum()) == int(part.lengths.sum())
    assert examples.rows() == [
        ids[:length].tolist() for ids, length in zip(batch["input_ids"], examples.lengths.tolist(), strict=True)
    ]


def test_examples_of_about_the_same_length_are_read_together_and_told_in_their_own_order() -> None:
    batch = draw_batch("words")
    reverse = torch.arange(5).flip(0)
    examples = Examples({name: tensor[reverse] for name, tensor in batch.items()}, torch.zeros(5, dtype=torch.int64))
    widths = []

    def predict(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits that say the token's id, and so which example they are of."""
        widths.append(inputs["input_ids"].shape[1])
        return torch.stack([inputs["input_ids"].float() * (label + 1) / 10 for label in range(5)], -1)

    task = label_task("token-classification", LabelHead(("O", "B-PER", "I-PER", "B-ORG", "I-ORG")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense2moe.upcycle.tasks.held_out.EVALUATION_BATCH", 2)
        found = judge_examples(predict, examples, torch.device("cpu"), task)
    assert widths == sorted(widths)
    alone = [judge_examples(predict, one, torch.device("cpu"), task) for one in examples.split(1)]
    assert found.losses == pytest.approx([each.loss for each in alone], rel=1e-6)
    assert len(set(found.losses)) == 5
    assert [answer.right for answer in found.answers] == [each.answers[0].right for each in alone]
