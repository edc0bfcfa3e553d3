"""The controls: at several learning rates, and with as many steps as fit."""

from __future__ import annotations

import pytest
from training_runs import CONFIG, Start, changed, make_data, make_start, weights

from dense2moe.upcycle.training.controls import stretch

__all__ = ["make_data", "make_start"]  # fixtures


def test_the_control_is_tried_at_every_rate_and_the_best_counts(start: Start) -> None:
    """At the best of several rates the control is what it is at that rate alone."""
    rates = (1e-6, 1.0, 1e-7)
    config = CONFIG.model_copy(update={"steps": 4, "control": True, "control_rates": rates})
    tried, output = start(config)
    alone, single = start(config.model_copy(update={"control_rates": (1.0,)}))
    assert tried.control_rate == 1.0
    name = "dense continued"
    assert [s for s in tried.history if s.model == name] == [s for s in alone.history if s.model == name]
    assert weights(output / "control").keys() == weights(single / "control").keys()
    assert changed(output / "control", single / "control") == set()


@pytest.mark.parametrize(("ratio", "steps"), [(4.0, (40, 80)), (1.0, (10, 20)), (1.26, (13, 25)), (0.01, (2, 2))])
def test_the_control_of_equal_compute_has_as_many_steps_as_fit(ratio: float, steps: tuple[int, ...]) -> None:
    """And one step more than each warm-up at least."""
    stages = tuple(CONFIG.model_copy(update={"steps": count}) for count in (10, 20))
    stretched = stretch(stages, ratio)
    assert tuple(stage.steps for stage in stretched) == steps
    assert [stage.model_copy(update={"steps": 1}) for stage in stretched] == [
        CONFIG.model_copy(update={"steps": 1})
    ] * 2
