"""What fine-tuning did not help is told, and settings that contradict each other are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dense2moe.upcycle.gates.facts import LayerRouting
from dense2moe.upcycle.tasks.figure import Better, Figure
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.facts import Evaluation
from dense2moe.upcycle.training.history import Step
from dense2moe.upcycle.training.phase import Trained
from dense2moe.upcycle.training.remarks import find_harm, find_imbalance

CONFIG = FinetuneConfig()


def test_weights_that_are_worse_on_the_test_split_are_told() -> None:
    def evaluation(value: float, better: Better) -> Evaluation:
        return Evaluation(2.0, (Figure("figure", value, "", better),), 1, 4, 1.0)

    trained = {"fine-tuned": Trained((), 8, 9, 1.0, 1.0), "dense continued": Trained((), 9, 9, 1.0, 1.0)}
    values = {"upcycled": 2.0, "fine-tuned": 2.5, "dense": 2.0, "dense continued": 1.5}
    for better, worse in (("lower", "fine-tuned"), ("higher", "dense continued")):  # the loss says nothing of a score
        evaluations = {name: evaluation(value, better) for name, value in values.items()}
        (found,) = find_harm(trained, evaluations)
        assert found == (
            f"{worse}: the kept weights, of step {trained[worse].best_step}, have a figure of {values[worse]:g} on the "
            "test split, the start had 2; lower finetune.learning_rate, or give more text or steps"
        )


def test_experts_that_are_dead_between_the_last_two_looks_are_named() -> None:
    def step(number: int, *loads: tuple[float, ...]) -> Step:
        return Step(
            "fine-tuned",
            number,
            0,
            layers=tuple(LayerRouting(2 * n + 1, load, 1.0, 0.0, 1.0) for n, load in enumerate(loads)),
        )

    def look(number: int) -> Step:
        return Step("fine-tuned", number, 0, validation_loss=1.0)

    # A tenth of the share of one of four is .025. The last two lines are of three steps and of one: (3 * 0 + .096) / 4
    # is .024, and .104 / 4 is .026.
    history = (
        step(2, (0.0, 0.0, 0.0, 1.0), (0.25,) * 4),
        look(2),
        step(5, (0.25,) * 4, (0.0, 1.0, 0.0, 0.0)),
        step(6, (0.0, 0.0, 0.0, 1.0), (0.096, 0.8, 0.104, 0.0)),
        look(6),
        Step("dense continued", 6, 0, validation_loss=1.0),
    )
    assert list(find_imbalance(history, 1.0, (CONFIG,))) == [
        "layer 3: experts [0, 3] get less than a tenth of their share of tokens; raise finetune.balance_coefficient"
    ]
    assert list(find_imbalance((Step("dense continued", 2, 0),), 1.0, (CONFIG,))) == []


def test_routers_that_never_learned_are_told_instead_of_dead_experts() -> None:
    history = (Step("fine-tuned", 1, 0, layers=(LayerRouting(0, (1.0, 0.0), 0.1, 0.0, 1.0),)),)
    forced = CONFIG.model_copy(update={"train": "experts", "routing": "by-domain"})
    (warning,) = find_imbalance(history, 1.0, (forced,))
    assert warning.startswith("the last of finetune.stages is by-domain: the routers have not learned")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 5, "warmup_steps": 5}, "warmup_steps is 5; it must be fewer than steps, which is 5"),
        (
            {"stages": [{}, {"steps": 9}]},
            r"stages\[1\]: warmup_steps is 10 by default; it must be fewer than steps, which is 9",
        ),
        ({"train": "last-0"}, "train is 'last-0'; must be all, experts, router, lora, prompt or last-N"),
        (
            {"stages": [{"train": "prompts"}]},
            r"stages\[0\]: train is 'prompts'; must be all, experts, router, lora, prompt or last-N",
        ),
        ({"stages": [{"train": "prompt"}, {}]}, r"stages\[0\]: train is 'prompt'; it must be the last phase's"),
        (
            {"routing": "by-domain"},
            "routing is by-domain and train is 'all'; must be experts: routers cannot learn from it",
        ),
        (
            {"batch_size": 9, "gradient_accumulation_steps": 2},
            "batch_size is 9; it must be a multiple of gradient_accumulation_steps, which is 2",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FinetuneConfig(**fields)
