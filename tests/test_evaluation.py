"""Held-out loss is what transformers computes, and an evaluation measures what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.facts import ReceiptLine, shows_equality
from dense2moe.upcycle.building.receipt import write_receipt
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.next_token import next_token_loss
from dense2moe.upcycle.training.evaluation import decode_speed, evaluate, held_out_loss
from dense2moe.upcycle.training.prompt import run_with_prompt

MakeDense = Callable[..., Path]


def quiet(what: str, done: int, total: int) -> None:
    pass


def random_blocks(num: int, size: int = 24) -> torch.Tensor:
    return torch.randint(300, (num, size), generator=torch.Generator().manual_seed(0))


def test_the_loss_of_two_tokens_is_as_by_hand() -> None:
    # Position 0 predicts token 1 with probability 3/4, position 1 predicts token 0 with 1/2; the last position predicts
    # nothing.
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [100.0, -100.0]]])
    ids = torch.tensor([[0, 1, 0]])
    assert float(next_token_loss(logits, ids)) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(2, 16, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ids = random_blocks(2, 16)
    loss = next_token_loss(logits, ids)
    assert loss.dtype == torch.float32
    assert float(loss) == float(next_token_loss(logits.float(), ids))


@pytest.mark.parametrize("num_blocks", [1, 8, 19])
def test_held_out_loss_is_the_mean_of_transformers_own_loss_of_each_block(
    num_blocks: int, mixture_checkpoint: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixture_checkpoint).eval()
    blocks = random_blocks(num_blocks)
    with torch.no_grad():
        expected = [float(model(input_ids=block[None], labels=block[None]).loss) for block in blocks]
    # Batches of eight sum in another order than single blocks.
    assert held_out_loss(model, blocks) == pytest.approx(sum(expected) / num_blocks, rel=1e-5)


@pytest.mark.parametrize("name", ["dense_checkpoint", "mixture_checkpoint"])
def test_an_evaluation_counts_and_measures_the_model(name: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(name)
    blocks = random_blocks(3)
    seen: list[tuple[str, int, int]] = []
    found = evaluate(directory, Examples.of_blocks(blocks), "this one", lambda *report: seen.append(report))
    state = load_file(directory / "model.safetensors")
    assert found.num_parameters == sum(tensor.numel() for tensor in state.values())
    assert found.weight_bytes == (directory / "model.safetensors").stat().st_size
    assert found.loss == held_out_loss(load_model(directory, torch.float32), blocks)
    assert found.figures[0].value == math.exp(found.loss)
    assert found.decode_tokens_per_second > 0
    assert seen == [("evaluating this one", 0, 1), ("evaluating this one", 1, 1)]


def test_a_checkpoint_in_bfloat16_is_evaluated_in_float32(make_dense: MakeDense) -> None:
    directory = make_dense(torch.bfloat16)
    blocks = random_blocks(2)
    expected = held_out_loss(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), blocks)
    assert evaluate(directory, Examples.of_blocks(blocks), "half", lambda *report: None).loss == expected


@pytest.fixture(scope="module")
def equal_mixture(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ReceiptLine]]:
    """A mixture of equal experts, and its receipt."""
    output = tmp_path_factory.mktemp("equal")
    plan = upcycle(dense_checkpoint, output, UpcycleConfig(num_experts=4, num_experts_per_tok=2), 0, quiet)
    return output, list(write_receipt(dense_checkpoint, output, plan, 24, quiet).comparisons)


@pytest.fixture
def read_ids(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The blocks that are read for their losses, as they are read."""
    seen: list[torch.Tensor] = []

    def recorded(call: Any, model: Any, inputs: Any, prompt: Any, read: Any) -> torch.Tensor:
        seen.extend(inputs["input_ids"])
        return run_with_prompt(call, model, inputs, prompt, read)

    monkeypatch.setattr("dense2moe.upcycle.training.evaluation.run_with_prompt", recorded)
    return seen


def test_a_mixture_shown_to_be_equal_is_read_on_a_few_blocks_and_has_the_dense_figures(
    dense_checkpoint: Path, equal_mixture: tuple[Path, list[ReceiptLine]], read_ids: list[torch.Tensor]
) -> None:
    blocks = random_blocks(21)
    dense = evaluate(dense_checkpoint, Examples.of_blocks(blocks), "dense", quiet)
    read_ids.clear()
    found = evaluate(equal_mixture[0], Examples.of_blocks(blocks), "upcycled", quiet, equal=("dense", dense))
    assert torch.equal(torch.stack(read_ids), blocks[[0, 5, 10, 15]])
    assert (found.loss, found.figures, found.block_losses) == (dense.loss, dense.figures, dense.block_losses)
    assert found.num_parameters > dense.num_parameters
    assert found.same is not None
    assert (found.same.model, found.same.num_blocks) == ("dense", 4)
    own = held_out_loss(load_model(equal_mixture[0], torch.float32), blocks)
    assert own == pytest.approx(found.loss, abs=1e-5)


def test_a_mixture_whose_losses_differ_is_read_on_every_block(
    dense_checkpoint: Path, mixture_checkpoint: Path, read_ids: list[torch.Tensor]
) -> None:
    blocks = random_blocks(9)
    dense = evaluate(dense_checkpoint, Examples.of_blocks(blocks), "dense", quiet)
    found = evaluate(mixture_checkpoint, Examples.of_blocks(blocks), "upcycled", quiet, equal=("dense", dense))
    assert found == replace(
        evaluate(mixture_checkpoint, Examples.of_blocks(blocks), "upcycled", quiet),
        decode_tokens_per_second=found.decode_tokens_per_second,
    )
    assert found.same is None
    one_off = replace(dense, block_losses=(*dense.block_losses[:6], math.nan, *dense.block_losses[7:]))
    assert evaluate(dense_checkpoint, Examples.of_blocks(blocks), "dense", quiet, equal=("dense", one_off)).same is None


def test_few_blocks_are_all_read(
    dense_checkpoint: Path, equal_mixture: tuple[Path, list[ReceiptLine]], read_ids: list[torch.Tensor]
) -> None:
    blocks = random_blocks(4)
    dense = evaluate(dense_checkpoint, Examples.of_blocks(blocks), "dense", quiet)
    assert (
        evaluate(equal_mixture[0], Examples.of_blocks(blocks), "upcycled", quiet, equal=("dense", dense)).same is None
    )
    assert len(read_ids) == 8


def test_a_receipt_shows_equality_where_the_written_router_is_held_to_a_limit(
    equal_mixture: tuple[Path, list[ReceiptLine]],
) -> None:
    lines = equal_mixture[1]
    assert shows_equality(lines)
    assert not shows_equality([])
    for line in lines:
        others = [other for other in lines if other != line]
        is_counted = line.dtype == "float32" and line.router == "shipped"
        assert shows_equality([*others, replace(line, limit=None)]) != is_counted
        assert shows_equality([*others, replace(line, rel=1.0)]) != is_counted


def test_shards_count_as_weights_and_their_index_does_not(make_dense: MakeDense) -> None:
    directory = make_dense(max_shard_size="30KB")
    files = list(directory.glob("model-*.safetensors"))
    assert len(files) > 1
    assert evaluate(
        directory, Examples.of_blocks(random_blocks(1)), "sharded", lambda *report: None
    ).weight_bytes == sum(file.stat().st_size for file in files)


def test_decoding_is_greedy_one_token_a_step_with_a_cache(
    dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(dense_checkpoint, torch.float32)
    prompt = random_blocks(1)[0, :7]
    expected = model.generate(
        prompt[None], max_new_tokens=15, min_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 7:].tolist()
    fed: list[list[int]] = []
    clock = iter(range(100))
    monkeypatch.setattr(
        "dense2moe.upcycle.training.evaluation.time", SimpleNamespace(perf_counter=lambda: 2.0 * next(clock))
    )

    def forward(**arguments: Any) -> Any:
        fed.append(arguments["input_ids"].flatten().tolist())
        return model(**arguments)

    class Counted:
        device = model.device
        __call__ = staticmethod(forward)

    # Each repeat takes two seconds of this clock for five tokens.
    assert decode_speed(Counted(), prompt, num_tokens=5, repeats=3) == 2.5  # type: ignore[arg-type]
    assert fed == [prompt.tolist(), *([token] for token in expected)]


def test_the_median_of_the_repeats_is_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 0.0, 100.0, 0.0, 2.0])
    monkeypatch.setattr("dense2moe.upcycle.training.evaluation.time", SimpleNamespace(perf_counter=lambda: next(ticks)))

    class Model:
        device = torch.device("cpu")

        def __call__(self, **arguments: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(1, 1, 4), past_key_values=None)

    assert decode_speed(Model(), torch.tensor([1, 2]), num_tokens=10, repeats=3) == 5.0  # type: ignore[arg-type]
