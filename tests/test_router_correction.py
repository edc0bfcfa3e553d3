"""A corrected router routes what it reads now as the router did what it read in the float model.

Or stays what it was.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.inputs import Inputs
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.quantization.router_correction import correct_router, kl_of_scores
from dense2moe.export.quantization.twin import SCHEME_NAME
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.gates.gate import Gate, TopK
from tests.conftest import MakeDense
from tests.test_calibration import CASES, draw_blocks, load, make_mixture

GATE = Gate(6, TopK(2))


def draw(tokens: int, noise: float) -> tuple[torch.Tensor, Inputs]:
    """A router of 6 experts, and inputs of width 16 that are bent and noisy in one stream."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(tokens, 16, generator=generator)
    bend = torch.eye(16) + 0.3 * torch.randn(16, 16, generator=generator) / 4
    actual = reference @ bend + noise * torch.randn(tokens, 16, generator=generator)
    return torch.randn(6, 16, generator=generator), Inputs(actual, reference)


def softmax(logits: np.ndarray) -> np.ndarray:
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def test_kl_is_that_of_its_formula_in_float64() -> None:
    router, inputs = draw(50, 0.1)
    logits, wanted = inputs.actual @ router.T, inputs.reference @ router.T
    p, q = (softmax(found.double().numpy()) for found in (wanted, logits))
    assert kl_of_scores(logits, wanted, GATE) == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-4)
    assert kl_of_scores(logits[:0], wanted[:0], GATE) == 0.0


def test_a_router_of_bent_inputs_is_unbent() -> None:
    router, inputs = draw(2000, 0.01)
    corrected, facts = correct_router(router, inputs, GATE)
    assert facts.method == "KL"
    assert facts.kl_after < 0.02 * facts.kl_before
    assert facts.agreement_before < 0.9 < 0.97 < facts.agreement_after
    same = [
        (inputs.reference[1500:] @ router.T).topk(2).indices.sort(-1).values
        == (inputs.actual[1500:] @ w.T).topk(2).indices.sort(-1).values
        for w in (router, corrected)
    ]
    assert float(same[0].all(-1).float().mean()) == pytest.approx(facts.agreement_before)
    assert float(same[1].all(-1).float().mean()) == pytest.approx(facts.agreement_after)


def test_steps_on_the_kl_are_better_than_least_squares_where_logits_are_noisy() -> None:
    router, inputs = draw(2000, 0.3)
    corrected, facts = correct_router(router, inputs, GATE)
    x, wanted = inputs.actual[:1500].double().numpy(), (inputs.reference[:1500] @ router.T).double().numpy()
    solved = torch.from_numpy(np.linalg.lstsq(x, wanted, rcond=None)[0].T).float()
    held, judged = inputs.actual[1500:], inputs.reference[1500:] @ router.T
    assert facts.kl_after == pytest.approx(kl_of_scores(held @ corrected.T, judged, GATE))
    assert facts.kl_after < kl_of_scores(held @ solved.T, judged, GATE) < facts.kl_before


@pytest.mark.parametrize("tokens", [0, 1, 20, 400])
def test_a_router_that_nothing_disturbs_stays_bit_for_bit(tokens: int) -> None:
    router, inputs = draw(tokens, 0.0)
    corrected, facts = correct_router(router, Inputs(inputs.reference, inputs.reference), GATE)
    assert torch.equal(corrected, router)
    assert (facts.method, facts.agreement_before, facts.agreement_after) == ("none", 1.0, 1.0)


def test_a_fit_that_does_not_hold_for_other_tokens_is_refused() -> None:
    """The first tokens are bent, the last are not."""
    router, inputs = draw(400, 0.0)
    actual = torch.cat([inputs.actual[:300], inputs.reference[300:]])
    corrected, facts = correct_router(router, Inputs(actual, inputs.reference), GATE)
    assert facts.method == "none"
    assert torch.equal(corrected, router)


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe, shared", "qwen3_moe, some layers", "granitemoe, stacked", "flex_olmo"]
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_routing_of_the_twin_is_nearer_to_the_model(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    """In transformers, on other text, where nothing else makes up for errors; the router stays in float32."""
    architecture, overrides, settings = CASES[name]
    mixture = make_mixture(make_dense(architecture=architecture, **overrides), tmp_path / "mixture", settings)
    held_out = draw_blocks(32, seed=1)

    def scores(directory: Path) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(
                [
                    found.flatten(0, -2)
                    for found in load(directory)(input_ids=held_out, output_router_logits=True).router_logits
                ]
            )

    expected, kls = scores(mixture), []
    for correct in (False, True):
        twin = tmp_path / f"twin {correct}"
        twin.mkdir()
        config = QuantizeConfig(
            method="search", input_scaling="none", correct_routers=correct, attention_bits="variant", block_size=16
        )
        facts = quantize_checkpoint(
            mixture, twin, "int4", config, lambda *_: None, QuantizeInputs(blocks=draw_blocks(96))
        )
        kls.append(kl_of_scores(scores(twin), expected, GATE))
    assert kls[1] < 0.95 * kls[0]
    routers = [
        key for key, entry in open_checkpoint(twin).entries.items() if entry.shape == (4, 32) and entry.dtype == "F32"
    ]
    assert len(facts.routing_by_layer) == len(routers) == len(json.loads((twin / SCHEME_NAME).read_text())["routers"])
    assert all(text.endswith(("(KL)", "(least squares)", "(none)")) for text in facts.routing_by_layer.values())


def test_a_dense_model_has_no_router_to_correct(dense_checkpoint: Path, tmp_path: Path) -> None:
    facts = quantize_checkpoint(
        dense_checkpoint,
        tmp_path,
        "int4",
        QuantizeConfig(correct_routers=True),
        lambda *_: None,
        QuantizeInputs(blocks=draw_blocks(8)),
    )
    assert facts.routing_by_layer == {}


def test_correction_without_text_is_refused_in_one_line(mixture_checkpoint: Path, tmp_path: Path) -> None:
    message = (
        r"^quantize\.correct_routers is true, which learns from text, and there is none; give blocks of it, or "
        r"set it to false$"
    )
    with pytest.raises(ExportError, match=message):
        quantize_checkpoint(
            mixture_checkpoint, tmp_path, "int4", QuantizeConfig(method="search", correct_routers=True), lambda *_: None
        )
