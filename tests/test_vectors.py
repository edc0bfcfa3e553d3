"""Vectors of texts: losses by sentence-transformers' formulas, ranks by a loop, figures by scipy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import sem, spearmanr
from transformers import BertConfig, BertModel

from dense2moe.upcycle.tasks.answer import LabelAnswer
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.head import COSINE, RANKING, TEACHER
from dense2moe.upcycle.tasks.held_out import HeldOut, judge_examples
from dense2moe.upcycle.tasks.pooling import Pooling
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.tasks.vectors import vector_task

KINDS = {"scores": (COSINE, 2), "pairs": (RANKING, 2), "triplets": (RANKING, 3), "texts": (TEACHER, 1)}
CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    initializer_range=0.5,
)


def make_task(kind: str, pooling: Pooling = Pooling()) -> Task:  # noqa: B008
    return vector_task(KINDS[kind][0], pooling)


def make_model() -> BertModel:
    torch.manual_seed(0)
    return BertModel(CONFIG).eval()


def draw_batch(kind: str, count: int = 6, length: int = 9) -> dict[str, torch.Tensor]:
    """Texts of many lengths, padded on the right, all of them different."""
    draw = torch.Generator().manual_seed(0)
    shape = (count, KINDS[kind][1])
    lengths = torch.randint(2, length + 1, shape, generator=draw)
    lengths[0, 0] = length
    mask = (torch.arange(length) < lengths[..., None]).long()
    ids = torch.randint(1, 50, (*shape, length), generator=draw) * mask
    labels = {
        "scores": torch.rand(count, generator=draw),
        "texts": torch.randn(count, 16, generator=draw),
    }
    numbers = torch.arange(math.prod(shape)).view(shape)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.get(kind, numbers)}


def embed_alone(model: BertModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean of each text's hidden states, read alone and without padding; [B, K, D]."""
    rows = [
        [
            model(input_ids=ids[None, : int(mask.sum())]).last_hidden_state[0].mean(0)
            for ids, mask in zip(texts, masks, strict=True)
        ]
        for texts, masks in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def loss_by_hand(kind: str, vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As sentence-transformers 5.7 writes CosineSimilarityLoss and MultipleNegativesRankingLoss."""
    if kind == "scores":
        return F.mse_loss(torch.cosine_similarity(vectors[:, 0], vectors[:, 1]), labels)
    if kind == "texts":
        return sum(
            (
                1 - F.normalize(own, dim=0) @ F.normalize(right, dim=0)
                for own, right in zip(vectors[:, 0], labels, strict=True)
            ),
            torch.zeros(()),
        ) / len(labels)
    anchors, candidates = vectors[:, 0], torch.cat([vectors[:, place] for place in range(1, vectors.shape[1])])
    scores = F.normalize(anchors, p=2, dim=1) @ F.normalize(candidates, p=2, dim=1).T * 20.0
    return F.cross_entropy(scores, torch.arange(len(anchors)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_padded_batch_is_the_formula_on_texts_read_alone(kind: str) -> None:
    model, task, batch = make_model(), make_task(kind), draw_batch(kind)
    wanted = loss_by_hand(kind, embed_alone(model, batch), batch["labels"])
    wanted_gradient = torch.autograd.grad(wanted, list(model.encoder.parameters()))
    found = task.loss(task.predictions(model(**task.inputs(batch))), batch)
    gradient = torch.autograd.grad(found, list(model.encoder.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for own, other in zip(gradient, wanted_gradient, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_a_loss_reads_the_pooling_that_the_checkpoint_has() -> None:
    model, batch = make_model(), draw_batch("scores")
    task = make_task("scores", Pooling(("cls",), normalizes=True))
    with torch.no_grad():
        hidden = model(**task.inputs(batch)).last_hidden_state
        first = hidden[:, 0].view(6, 2, 16)
        torch.testing.assert_close(task.loss(hidden, batch), loss_by_hand("scores", first, batch["labels"]))


def test_what_belongs_to_an_anchor_is_no_negative_of_it() -> None:
    """Examples 0 and 1 have one positive, 0 and 2 one anchor; 3's negative is its own positive's text."""
    task, batch = make_task("triplets"), draw_batch("triplets", count=4)
    batch["labels"] = torch.tensor([[0, 10, 20], [1, 10, 21], [0, 12, 22], [3, 13, 13]])
    hidden = torch.randn(12, 9, 16, generator=torch.Generator().manual_seed(1))
    mask = batch["attention_mask"].flatten(0, 1)[..., None]
    units = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).view(4, 3, 16)
    # candidates are positives of 0 to 3, then negatives of 0 to 3
    kept = {0: [0, 3, 4, 5, 6, 7], 1: [1, 2, 3, 4, 5, 6, 7], 2: [1, 2, 3, 4, 5, 6, 7], 3: [0, 1, 2, 3, 4, 5, 6]}
    candidates = torch.cat([units[:, 1], units[:, 2]])
    losses = []
    for row, places in kept.items():
        scores = 20.0 * candidates[places] @ units[row, 0]
        losses.append(scores.logsumexp(0) - scores[places.index(row)])
    torch.testing.assert_close(task.loss(hidden, batch), torch.stack(losses).mean())


def judge(kind: str, batch: dict[str, torch.Tensor]) -> tuple[HeldOut, torch.Tensor, Task]:
    """What the house says of a model, and the vectors of texts read alone."""
    model, task = make_model(), make_task(kind)
    examples = Examples(batch, torch.zeros(len(batch["labels"]), dtype=torch.int64))

    def predict(inputs: dict[str, Any]) -> torch.Tensor:
        return task.predictions(model(**inputs))

    with torch.no_grad():
        return judge_examples(predict, examples, torch.device("cpu"), task), embed_alone(model, batch), task


def test_cosines_are_judged_by_scipy_s_rank_correlation() -> None:
    batch = draw_batch("scores", count=21)
    found, vectors, task = judge("scores", batch)
    cosines = torch.cosine_similarity(vectors[:, 0], vectors[:, 1])
    figures = {figure.name: figure.value for figure in found.figures(task)}
    assert figures["rank correlation"] == pytest.approx(spearmanr(cosines, batch["labels"]).statistic, abs=1e-9)
    assert figures["squared error"] == pytest.approx(float(F.mse_loss(cosines, batch["labels"])), rel=1e-4)
    assert found.losses == pytest.approx((cosines - batch["labels"]).square().tolist(), rel=1e-3, abs=1e-6)


def test_likeness_to_a_teacher_is_the_mean_cosine() -> None:
    batch = draw_batch("texts", count=21)
    found, vectors, task = judge("texts", batch)
    cosines = torch.cosine_similarity(vectors[:, 0], batch["labels"])
    (figure,) = found.figures(task)
    assert (figure.name, figure.better) == ("cosine", "higher")
    assert figure.value == pytest.approx(float(cosines.mean()), abs=1e-6)
    other = [LabelAnswer((cosine + shift,), (1.0,)) for shift, cosine in enumerate(cosines.tolist())]
    assert task.paired_error(found.answers, other) == pytest.approx(sem(range(21)), rel=1e-4)


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_held_out_anchors_are_ranked_among_all_of_their_split(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever batches they are read in, and however many are compared at once."""
    monkeypatch.setattr("dense2moe.upcycle.tasks.vectors._MOST_ROWS", 4)
    batch = draw_batch(kind, count=21)
    found, vectors, task = judge(kind, batch)
    candidates = [*vectors[:, 1], *(vectors[:, 2] if kind == "triplets" else ())]
    ranks, losses = [], []
    for number, anchor in enumerate(vectors[:, 0]):
        cosines = [float(torch.cosine_similarity(anchor, each, dim=0)) for each in candidates]
        ranks.append(1 + sum(cosine > cosines[number] for cosine in cosines))
        losses.append(math.log(sum(math.exp(20 * cosine) for cosine in cosines)) - 20 * cosines[number])
    assert max(ranks) > 3
    assert [answer.said for answer in found.answers] == [(rank,) for rank in ranks]
    assert found.losses == pytest.approx(losses, rel=1e-3, abs=1e-4)
    figures = {figure.name: figure.value for figure in found.figures(task)}
    assert figures["MRR"] == pytest.approx(sum(1 / rank for rank in ranks) / 21)
    assert figures["accuracy@1"] == pytest.approx(ranks.count(1) / 21)


def test_the_error_of_ranks_is_scipy_s_of_the_paired_differences() -> None:
    task = make_task("pairs")
    first, second = ([LabelAnswer((rank,), (1,)) for rank in ranks] for ranks in ((1, 2, 5, 1), (2, 2, 1, 3)))
    wanted = sem([1 - 1 / 2, 0, 1 / 5 - 1, 1 - 1 / 3])
    assert task.paired_error(first, second) == pytest.approx(wanted)
    assert task.paired_error(first, first) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_vectors_teaches_their_directions(kind: str) -> None:
    task, batch = make_task(kind), draw_batch(kind)
    draw = torch.Generator().manual_seed(0)
    own, teacher = (torch.randn(6 * KINDS[kind][1], 9, 16, generator=draw) for _ in range(2))
    mask = batch["attention_mask"].flatten(0, 1)[..., None]
    means = [(hidden * mask).sum(1) / mask.sum(1) for hidden in (own, teacher)]
    wanted = 1 - sum(map(float, torch.cosine_similarity(*means))) / len(means[0])
    assert float(task.divergence(own, teacher, 1.0, batch)) == pytest.approx(wanted, rel=1e-5)
    assert float(task.divergence(own, 3 * own, 1.0, batch)) == pytest.approx(0, abs=1e-6)


def test_texts_alone_are_the_rows_of_their_examples() -> None:
    batch = draw_batch("triplets", count=4)
    examples = Examples(batch, torch.arange(4))
    alone = examples.alone()
    assert len(alone) == 12
    assert alone.domains.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert torch.equal(alone.ids, batch["input_ids"].view(12, 9))
    assert alone.lengths.sum() == examples.lengths.sum() == batch["attention_mask"].sum()
    short = examples.take(examples.lengths.argmin()[None]).batch()
    assert short["input_ids"].shape == (1, 3, int(short["attention_mask"].sum(-1).max()))
