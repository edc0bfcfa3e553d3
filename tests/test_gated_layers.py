"""Every lowering computes every gate: fused operators are told what they do not know."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime as ort
import pytest
from expert_layers import (
    WAYS,
    Matrices,
    assert_close,
    build,
    compute,
    draw,
    load,
    make_layer,
    routed,
    run,
    softmax,
)

from dense2moe.export.graph.branches import take_branches
from dense2moe.export.lowering import GROUPED, MOE, QMOE, SWITCHED, UNROLLED, find_lowerings
from dense2moe.upcycle.gates.gate import Above, Gate, Mass, Near, TopK

BIAS = np.array([0.5, -0.5, 0.0, 0.25], np.float32)
GATES = {
    "softmax": routed(renormalize=False),
    "softmax, scaled": routed(scale=2.5),
    "softmax, halved": routed(renormalize=False, scale=0.5),
    "softmax, bias": routed(selection_bias=True),
    "softmax, bias, as they are": routed(renormalize=False, selection_bias=True),
    "sigmoid": routed("sigmoid"),
    "sigmoid, scaled": routed("sigmoid", renormalize=False, scale=2.5),
    "sigmoid, bias": routed("sigmoid", selection_bias=True),
    "sigmoid, bias, scaled": routed("sigmoid", scale=2.5, selection_bias=True),
    "sigmoid, bias, scaled as they are": routed("sigmoid", renormalize=False, scale=2.5, selection_bias=True),
    "softmax, all": Gate(4, TopK(4)),
    "softmax, above": Gate(4, Above(0.3, 3)),
    "sigmoid, above": Gate(4, Above(0.6, 4), "sigmoid"),
    "sigmoid, above as they are": Gate(4, Above(0.6, 4), "sigmoid", renormalize=False),
    "sigmoid, bias, above": Gate(4, Above(0.6, 4), "sigmoid", selection_bias=True),
    "softmax, top-p": Gate(4, Mass(0.7, 4)),
    "softmax, top-p as they are": Gate(4, Mass(0.7, 3), renormalize=False),
    "softmax, skip": Gate(4, Near(0.5, 2)),
    "relu": Gate(4, Above(0.0, 4), "relu"),
    "relu, as they are": Gate(4, Above(0.0, 4), "relu", renormalize=False),
    "relu, top-k": Gate(4, TopK(2), "relu"),
}
"""GLM-4-MoE's gate among them, in each way that its config can ask for; and those of our own mixtures."""


PAIRS = [(way, "sigmoid, bias, scaled") for way in WAYS]
PAIRS += [(way, gate) for way in ("moe", "qmoe_4", "moe_float16", "grouped", "switched_4") for gate in GATES]
"""Each lowering in all that it computes in by GLM-4-MoE's gate, and each gate by every lowering."""

of_each_gate = pytest.mark.parametrize(("name", "kind"), sorted(set(PAIRS)))


def bias_of(gate: Gate) -> np.ndarray | None:
    return BIAS if gate.selection_bias else None


@cache
def loaded(name: str, kind: str) -> tuple[list[Matrices], ort.InferenceSession]:
    """A layer of one of `PAIRS`, its values and its graph, made once."""
    with TemporaryDirectory() as folder:
        layer, values = make_layer(Path(folder), WAYS[name], GATES[kind], selection_bias=bias_of(GATES[kind]))
        return values, load(layer, WAYS[name].lowering)


@of_each_gate
def test_every_lowering_computes_every_gate(name: str, kind: str) -> None:
    """Errors of the largest output, over three draws: 5.3e-7 in float32, 9.7e-4 in float16, 1.8e-2 rounding."""
    way, gate = WAYS[name], GATES[kind]
    values, session = loaded(name, kind)
    for length in (1, 16):
        x, logits = draw(2, length, 64, 4)
        assert_close(run(session, x, logits), compute(values, gate, x, logits, bias_of(gate)), way)


@pytest.mark.parametrize("name", [name for name, gate in GATES.items() if gate.selection_bias])
def test_the_bias_of_these_gates_changes_the_choice(name: str, tmp_path: Path) -> None:
    """Else the equality above would not show that it is added."""
    _, values = make_layer(tmp_path, WAYS["grouped"], GATES[name], selection_bias=BIAS)
    x, logits = draw(2, 8, 64, 4)
    found, unbiased = (compute(values, GATES[name], x, logits, bias) for bias in (BIAS, None))
    assert np.abs(found - unbiased).max() > 0.1


@of_each_gate
def test_scores_of_any_size_are_weighed(name: str, kind: str) -> None:
    """At -30 sigmoids are 1e-13 and their ratios still count; at -200 each is exactly zero, and so is the output.

    onnxruntime's own `Sigmoid` gives zero below -18, and would leave 0 / 0.
    """
    way, gate = WAYS[name], GATES[kind]
    values, session = loaded(name, kind)
    x, logits = draw(2, 16, 64, 4)
    for shift in (-15.0, -30.0, -60.0, -200.0):
        low = (logits + np.float32(shift)).astype(np.float32)
        found = run(session, x, low)
        if shift == -200.0 and gate.score == "sigmoid":
            assert not found.any()
        else:
            expected = compute(values, gate, x, low, bias_of(gate))
            # weights below 1e-20 are told to an operator as 1e-20: outputs of a few units by 1e-20
            limit = way.tolerance * np.abs(expected).max() + 1e-19
            np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


@of_each_gate
def test_a_weight_of_exactly_zero_adds_nothing(name: str, kind: str) -> None:
    """One of a token's two weights is zero in float32; beside it stand tokens with both, and sigmoids with none."""
    way, gate = WAYS[name], GATES[kind]
    values, session = loaded(name, kind)
    x, logits = draw(2, 16, 64, 4)
    logits[::2, 1:] = -200
    if gate.score == "sigmoid":
        logits[1::4] = -200
    expected = compute(values, gate, x, logits, bias_of(gate))
    assert_close(run(session, x, logits), expected, way)


def test_every_gate_has_every_lowering(tmp_path: Path) -> None:
    for gate in GATES.values():
        for name, fused in (("moe", MOE), ("qmoe_4", QMOE)):
            layer, _ = make_layer(tmp_path, WAYS[name], gate, selection_bias=bias_of(gate))
            assert find_lowerings(layer, "auto", "1.32.0") == (fused, GROUPED, UNROLLED)
            assert find_lowerings(layer, "fused") == (fused,)
        assert find_lowerings(layer, "switched") == (SWITCHED,)


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.lowering in (MOE, QMOE, SWITCHED)])
def test_every_fused_node_renormalizes(name: str, tmp_path: Path) -> None:
    """normalize_routing_weights=0 computes wrong values before onnxruntime 1.32, and QMoE ignores it.

    It must never be written: by an operator for any gate, nor for any numbers that it computes in.
    """
    way = WAYS[name]
    gates = GATES if name in ("moe", "qmoe_4", "moe_float16", "switched_4") else ("softmax", "sigmoid, bias, scaled")
    for gate in (softmax(4, 2), *(GATES[kind] for kind in gates)):
        layer, _ = make_layer(tmp_path, way, gate, selection_bias=bias_of(gate))
        written = build(layer, way.lowering)
        fused = [
            node for branch in take_branches(written) for node in branch.graph.node if node.op_type in ("MoE", "QMoE")
        ]
        assert fused
        for node in fused:
            assert {a.name: a.i for a in node.attribute}["normalize_routing_weights"] == 1
