"""The control at several learning rates."""

from __future__ import annotations

from training_runs import CONFIG, Start, changed, make_data, make_start, weights

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
