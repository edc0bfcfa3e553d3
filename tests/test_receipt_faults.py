"""The receipt tells rounding of the dense model itself from a fault, and refuses what was altered on disk."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from receipts import (
    DECODERS,
    EXACT,
    EXPERT,
    NUMBER,
    MakeDense,
    made_once,
    make_gates_overflow,
    make_mixture,
    read_in,
    receipt,
    refusal,
    rewrite,
)
from shapes import each_shape
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.building.rounding import ROUNDING_LIMIT

# What rounds, or overflows, in the dense model itself


# Half a shared expert, folded norms, experts in some layers, a selection bias, and what hides no halves.
@pytest.mark.parametrize(
    "name",
    each_shape(
        DECODERS,
        {"llama to mixtral", "mistral", "llama to granitemoeshared", "gemma", "qwen3", "llama to glm4_moe"},
    ),
)
def test_small_outputs_whose_half_is_no_float16_number_are_no_fault(
    name: str, make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights as transformers draws them: FFN outputs lie below 1.2e-4, twice the smallest normal number of float16."""
    if name != "llama to mixtral":  # which is read in every dtype
        read_in("float16", monkeypatch)
    made = made_once(make_dense, name, dense={"initializer_range": 0.02})
    found = receipt(made.dense, made.mixture, made.plan)
    halved = [c for c in found.comparisons if c.halves_bitwise]
    assert {(c.router, c.dtype) for c in halved} <= {("zero", "float16")}
    assert all(c.bitwise_due and not c.bitwise for c in halved)
    assert halved or name not in ("llama to mixtral", "mistral")  # elsewhere larger numbers beside them hide the halves
    assert bool(halved) == any(
        "bitwise but for FFN outputs whose half is no float16 number" in note for note in found.notes
    )


@pytest.mark.parametrize("name", ["llama to mixtral", "mistral"])
def test_one_altered_row_is_refused_where_halves_are_rounded(
    name: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_in("float16", monkeypatch)  # float32 would have found it before
    fields, overrides = DECODERS[name]
    dense, mixture = (
        make_dense(torch.float16, intermediate_size=EXACT, initializer_range=0.02, **fields),
        tmp_path / "mixture",
    )
    plan = make_mixture(dense, mixture, **overrides)
    assert any(c.halves_bitwise for c in receipt(dense, mixture, plan).comparisons)

    def alter(state: dict[str, torch.Tensor]) -> None:
        """One row of every expert: a zero router ties, and which two it chooses is torch's affair."""
        for key, weight in state.items():
            if re.search(r"layers\.0.*experts\.\d\.w2", key):
                weight[0] *= 1.25  # of an output of 1e-4 beside a state of 2e-2, 11 bits wide

    rewrite(mixture, alter)
    assert re.fullmatch(
        re.escape(f"{mixture}: zero router, float16, eager experts, padded batch: differs from the dense model by ")
        + NUMBER
        + re.escape("; it must be bitwise equal"),
        refusal(dense, mixture, plan),
    )


def test_a_dtype_in_which_the_dense_model_overflows_is_not_compared(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(torch.bfloat16, intermediate_size=EXACT), tmp_path / "mixture"
    rewrite(dense, make_gates_overflow(1000.0))
    found = receipt(dense, mixture, make_mixture(dense, mixture))
    assert {c.dtype for c in found.comparisons} == {"float32", "bfloat16"}
    assert len(found.notes) == 1
    assert re.fullmatch(
        r"float16 was not compared: the dense model itself is not finite in it \(padded batch: \d+ of \d+ numbers "
        r"are NaN or infinite\)",
        found.notes[0],
    )


def test_a_mixture_that_overflows_where_the_dense_model_does_not_is_told(make_dense: MakeDense, tmp_path: Path) -> None:
    """Parts of a copy give up to four times what their weighted sum does."""
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    with torch.no_grad():
        largest: list[float] = []
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        model.model.layers[1].mlp.register_forward_hook(lambda _, __, output: largest.append(float(output.abs().max())))
        model(torch.arange(300)[None, :250])
    rewrite(dense, lambda state: state["model.layers.1.mlp.down_proj.weight"].mul_(30000 / largest[0]))
    plan = make_mixture(dense, mixture, num_experts=8, k=4, kind="granular", granularity=4)
    found = receipt(dense, mixture, plan)
    assert any(not math.isfinite(c.rel) for c in found.comparisons if c.dtype == "float16")
    assert (
        "float16: the mixture overflows where the dense model does not, since its experts' outputs are larger than "
        "their weighted sum" in found.notes
    )


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_a_dense_model_that_is_not_finite_in_float32_cannot_be_compared(
    mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    rewrite(dense, make_gates_overflow(1e30))
    message = refusal(dense, mixture, make_mixture(dense, mixture, receipt=mode))
    assert message.startswith(f"{dense}: the dense model is not finite in float32 (")
    assert message.endswith("), so nothing can be compared; the weights are broken; use others")


def test_a_model_that_magnifies_rounding_is_held_to_its_own_noise(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_in("float32", monkeypatch)
    fields = {"num_hidden_layers": 24, "initializer_range": 0.5, "hidden_size": 64, "intermediate_size": 96}
    dense, mixture = make_dense(**fields), tmp_path / "mixture"
    plan = make_mixture(dense, mixture)
    found = receipt(dense, mixture, plan)
    held = [c for c in found.comparisons if c.limit is not None and c.limit > ROUNDING_LIMIT]
    assert held
    with torch.no_grad():
        narrow, wide = (
            AutoModelForCausalLM.from_pretrained(dense, dtype=dtype) for dtype in (torch.float32, torch.float64)
        )
        ids = torch.arange(300)[None, :80]
        noise = float((wide(ids).logits - narrow(ids).logits).abs().max() / narrow(ids).logits.abs().max())
    for c in held:
        assert ROUNDING_LIMIT < c.rel <= c.limit == 3 * c.noise
        assert noise / 20 < c.noise < noise * 20  # of another text
    assert any(note.startswith("float32: this model magnifies rounding, so rel may be up to ") for note in found.notes)
    rewrite(mixture, lambda state: state["model.layers.20.self_attn.o_proj.weight"].mul_(1.01))
    assert "differs from the dense model by" in refusal(dense, mixture, plan)


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_logits_that_are_all_zero_are_equal(mode: Any, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    rewrite(dense, lambda state: state["model.norm.weight"].zero_())
    found = receipt(dense, mixture, make_mixture(dense, mixture, receipt=mode)).comparisons
    assert {c.rel for c in found if c.text in ("one long text", "head")} == {0.0}


# Planted faults


@pytest.mark.parametrize(
    ("layer", "expert", "matrix"), [(0, 0, "w1"), (0, 1, "w3"), (0, 2, "w2"), (1, 3, "w1"), (1, 2, "w3"), (1, 0, "w2")]
)
def test_an_expert_altered_on_disk_is_refused(
    layer: int, expert: int, matrix: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    made = made_once(make_dense, dense={"intermediate_size": 48})
    mixture = made.copy(tmp_path)
    rewrite(mixture, lambda state: state[EXPERT.format(layer=layer, expert=expert, matrix=matrix)].mul_(1.01))
    assert re.fullmatch(
        re.escape(f"{mixture}: shipped router, float32, eager experts, one long text: differs from the dense model by ")
        + NUMBER
        + re.escape("; at most 1e-05"),
        refusal(made.dense, mixture, made.plan),
    )


def test_experts_altered_by_less_than_rounding_are_refused_where_torch_is_exact(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    made = made_once(make_dense, receipt="whole")
    mixture = made.copy(tmp_path)
    # All four, for which two win the tie of a zero router is torch's choice.
    rewrite(
        mixture,
        lambda state: [
            state[EXPERT.format(layer=1, expert=expert, matrix="w2")].mul_(1 + 2**-22) for expert in range(4)
        ],
    )
    assert re.fullmatch(
        re.escape(f"{mixture}: zero router, float32, eager experts, one long text: differs from the dense model by ")
        + NUMBER
        + re.escape("; it must be bitwise equal"),
        refusal(made.dense, mixture, made.plan),
    )


def test_a_weight_that_is_no_number_is_refused(make_dense: MakeDense, tmp_path: Path) -> None:
    made = made_once(make_dense, receipt="whole")
    mixture = made.copy(tmp_path)
    rewrite(mixture, lambda state: state["model.norm.weight"].fill_(float("nan")))
    message = (
        f"{mixture}: shipped router, float32, eager experts, one long text: differs from the dense model by "
        "nan; at most 1e-05"
    )
    assert refusal(made.dense, mixture, made.plan) == message


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_anything_else_altered_on_disk_is_refused(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    made = made_once(make_dense, receipt="whole")
    mixture = made.copy(tmp_path)
    rewrite(mixture, lambda state: state[name].mul_(1.01))
    assert "differs from the dense model by" in refusal(made.dense, mixture, made.plan)
