"""Errors of places are measured on one text after the other, and a text leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dense2moe.export.parity.inside.meter import Meter
from dense2moe.export.parity.inside.products import Arithmetic
from dense2moe.export.parity.taps import Seen, Taps

ROUTER = (0, "router")


def make_meter() -> Meter:
    mode: Any = SimpleNamespace(in_double=False)
    meter = Meter(Taps({}, 1), Arithmetic({}, None), mode)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    meter.seen = Seen(ids, torch.ones_like(ids), 3, torch.zeros(1, 3, 5), {})
    return meter


def test_a_token_s_error_is_relative_to_its_own_size() -> None:
    meter = make_meter()
    expected = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]])
    meter.compare(ROUTER, expected, expected + torch.tensor([[[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]))
    assert meter.found[ROUTER].errors.tolist() == [[0.0, 0.5, 0.0]]
    assert meter.found[ROUTER].worst == 0.5
    assert meter.found[ROUTER].first(0.1) == 1


@pytest.mark.parametrize("shakes", [False, True])
def test_a_text_that_ended_early_leaves_nothing_behind(shakes: bool) -> None:
    meter = make_meter()
    meter.measures_noise, meter.shakes = True, shakes
    meter.compare(ROUTER, torch.ones(1, 3, 2), torch.ones(1, 3, 2))
    meter.attended[0] = torch.ones(1, 3, 2)
    assert meter.expected
    meter.forget()
    assert (meter.seen, meter.measures_noise, meter.shakes) == (None, False, False)
    assert not meter.expected
    assert not meter.attended
