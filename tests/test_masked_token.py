"""The task of predicting masked tokens."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.masked_token import Masking, masked_token, read_masking

MASK, SPECIALS, VOCABULARY = 4, (0, 1, 2, 3, 4), 50


@pytest.fixture
def masking() -> Masking:
    return Masking(MASK, SPECIALS, VOCABULARY)


def draw(rows: int, length: int) -> torch.Tensor:
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 2, 3
    return ids


def test_shares_are_those_of_bert(masking: Masking) -> None:
    ids = draw(200, 100)
    chosen, read = masking.choose(ids), masking.corrupt(ids)
    assert float(chosen.float().mean()) == pytest.approx(0.15, abs=0.01)
    masked, kept = (read == MASK) & chosen, (read == ids) & chosen
    assert float(masked.sum() / chosen.sum()) == pytest.approx(0.8, abs=0.02)
    assert float(kept.sum() / chosen.sum()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(read[~chosen], ids[~chosen])
    assert not chosen[:, [0, -1]].any()


def test_a_block_is_masked_alike_in_every_batch(masking: Masking) -> None:
    ids = draw(6, 30)
    alone = torch.cat([masking.corrupt(block[None]) for block in ids])
    assert torch.equal(alone, masking.corrupt(ids))
    assert torch.equal(masking.corrupt(ids.flip(0)).flip(0), alone)


def test_every_block_has_something_to_predict(masking: Masking) -> None:
    assert (masking.choose(draw(50, 3)).sum(-1) == 1).all()


def test_the_loss_is_of_chosen_tokens_alone(masking: Masking) -> None:
    """Against a loop in Python, value and gradient."""
    ids = draw(3, 20)
    logits = torch.randn(3, 20, VOCABULARY, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = masked_token(masking).loss(logits, {"input_ids": ids})
    chosen = masking.choose(ids)
    expected = []
    for block in range(3):
        losses = [
            -logits[block, place].log_softmax(-1)[ids[block, place]] for place in range(20) if chosen[block, place]
        ]
        expected.append(sum(losses) / len(losses))
    mean = sum(expected) / 3
    assert found.item() == pytest.approx(mean.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    (own,) = torch.autograd.grad(mean, logits)
    torch.testing.assert_close(gradient, own)


def test_a_model_diverges_from_itself_by_nothing(masking: Masking) -> None:
    task = masked_token(masking)
    logits = torch.randn(2, 10, VOCABULARY)
    assert float(task.divergence(logits, logits, 2.0, {})) == pytest.approx(0, abs=1e-6)
    assert float(task.divergence(logits, logits * 2, 2.0, {})) > 0.01
    assert [figure.name for figure in task.figures([math.log(7)], [])] == ["masked perplexity", "masked loss"]


def test_a_tokenizer_without_a_mask_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UpcycleError, match="no mask_token"):
        read_masking(tiny_tokenizer, "here")
