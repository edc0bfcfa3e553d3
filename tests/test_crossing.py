"""Where a mixture overtakes its control, on curves whose crossings are known."""

from __future__ import annotations

import pytest

from dense2moe.upcycle.training.crossing import Crossing, find_crossing, find_crossings, trace_best
from dense2moe.upcycle.training.history import Step, count_costs

CONTROL = ((1.0, 4.0), (4.0, 2.0), (16.0, 1.0))


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        # 1 above at 4 and 1 below at 16: equal in the middle between their logarithms
        (((4.0, 3.0), (16.0, 0.0)), Crossing(4.0, 16.0, 8.0, 1.0, -1.0)),
        (((2.0, 2.5), (16.0, 0.5)), Crossing(2.0, 16.0, 2.0, -0.5, -0.5)),
        (((4.0, 3.0), (16.0, 1.5)), Crossing(4.0, 16.0, None, 1.0, 0.5)),
        # it was ahead for a while
        (((2.0, 1.0), (16.0, 1.25)), Crossing(2.0, 16.0, None, -2.0, 0.25)),
        # its last point is before the control's, and it stays where it is
        (((1.0, 4.0), (4.0, 0.5)), Crossing(1.0, 16.0, 1.0, 0.0, -0.5)),
    ],
)
def test_the_mixture_overtakes_where_its_loss_falls_below_for_good(mixture, expected):
    found = find_crossing(mixture, CONTROL)
    assert found is not None
    assert vars(found) == pytest.approx(vars(expected))


def test_nothing_is_compared_with_no_curve():
    assert find_crossing((), CONTROL) is None
    assert find_crossing(CONTROL, ()) is None


def test_a_curve_has_the_best_loss_of_its_phase_so_far():
    points = [(0, 0, 5.0), (0, 10, 4.0), (0, 20, None), (0, 30, 4.5), (1, 30, 6.0), (1, None, 1.0), (1, 40, 3.0)]
    assert trace_best(points) == ((10, 4.0), (30, 6.0), (40, 3.0))


def steps(model: str, losses: dict[int, float], phase_of: int = 99) -> list[Step]:
    return [Step(model, step, 10 * step, int(step > phase_of), validation_loss=loss) for step, loss in losses.items()]


def test_operations_are_those_of_each_phase_and_begin_behind_the_branches():
    counted = count_costs(steps("fine-tuned", {0: 3.0, 2: 2.0, 3: 1.0}, phase_of=2), (5.0, 7.0), 1000, 100.0)
    assert [(step.num_tokens, step.flops) for step in counted] == [(1000, 100.0), (1020, 110.0), (1030, 117.0)]


def test_controls_are_compared_in_tokens_and_in_operations():
    mixture = count_costs(steps("fine-tuned", {0: 4.0, 2: 3.0, 4: 1.5}), (2.0,), 0, 0.0)
    tokens = count_costs(steps("dense continued", {0: 4.0, 2: 3.5, 4: 2.0}), (1.0,), 0, 0.0)
    compute = count_costs(steps("dense, same FLOPs", {0: 4.0, 4: 2.0, 8: 1.25}), (1.0,), 0, 0.0)
    found = find_crossings([*mixture, *tokens, *compute])
    assert vars(found["dense continued"]) == {"begin": 20, "end": 40, "at": 20, "first_gap": -0.5, "last_gap": -0.5}
    assert vars(found["dense, same FLOPs"]) == {"begin": 4, "end": 8, "at": None, "first_gap": 1.0, "last_gap": 0.25}
    assert find_crossings(mixture) == {}
