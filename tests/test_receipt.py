"""The receipt accepts what kept the function on any machine, finds a fault in any layer.

And says what it could not compare.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.facts import Receipt
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.receipt import ROUNDING_LIMIT, choose_mode, rounding_limit, write_receipt
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model, router_modules, router_weights, sparse_layers
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.footprint import receipt_bytes

MakeDense = Callable[..., Path]
EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
EXACT = 64  # an FFN width of which the vector loop of `silu` leaves no rest, so that equal means bitwise
NUMBER = r"\d\.\de-\d\d"
T5 = "T5ForConditionalGeneration"
MISSING = "{} missing, which transformers would draw at random; restore the file that held it"
LEFT_OVER = "{} left over, which transformers would pass over; remove it, or correct config.json"
WINDOW = 12
# Every decoder family, with what is its own, and settings that lead to each target.
DECODERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama to mixtral": ({}, {}),
    "llama to qwen2_moe, some layers": ({}, {"layers": [1]}),
    "llama to granitemoe": ({"attention_bias": True}, {}),
    "llama to granitemoeshared": ({"attention_bias": True}, {"shared_expert": "half"}),
    "mistral": ({"architecture": "MistralForCausalLM", "sliding_window": WINDOW}, {}),
    "phi3": ({"architecture": "Phi3ForCausalLM", "sliding_window": WINDOW}, {}),
    "gemma": ({"architecture": "GemmaForCausalLM", "head_dim": 16}, {}),
    "qwen2": (
        {
            "architecture": "Qwen2ForCausalLM",
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
        {},
    ),
    "qwen3": ({"architecture": "Qwen3ForCausalLM", "head_dim": 16}, {"layers": "every-2"}),
    "olmo2": ({"architecture": "Olmo2ForCausalLM"}, {}),
    "llama to glm4_moe": ({}, {"target": "glm4_moe", "layers": [1]}),
    "qwen3 to glm4_moe": ({"architecture": "Qwen3ForCausalLM", "head_dim": 16}, {"target": "glm4_moe"}),
    "granite": (
        {
            "architecture": "GraniteForCausalLM",
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
        },
        {},
    ),
}


def quiet(what: str, done: int, total: int) -> None:
    pass


def settings(num_experts: int = 4, k: int = 2, logit_std: float = 1.0, **overrides: Any) -> UpcycleConfig:
    """Settings; those of experts by their own names, and the number of parts of a copy as `granularity`."""
    names = ("kind", "granularity", "noise", "drop")
    experts = ExpertsConfig(**{name: overrides.pop(name) for name in names if name in overrides})
    return UpcycleConfig(
        num_experts=num_experts,
        num_experts_per_tok=k,
        experts=experts,
        router=RouterConfig(logit_std=logit_std),
        **overrides,
    )


def make_mixture(source: Path, output: Path, **overrides: Any) -> UpcyclePlan:
    output.mkdir()
    return upcycle(source, output, settings(**overrides), 0, quiet)


def receipt(source: Path, output: Path, plan: UpcyclePlan, block_size: int = 64) -> Receipt:
    return write_receipt(source, output, plan, block_size, quiet)


def refusal(source: Path, output: Path, plan: UpcyclePlan, block_size: int = 64) -> str:
    with pytest.raises(UpcycleError) as excinfo:
        receipt(source, output, plan, block_size)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


# What is compared


def test_copies_are_compared_with_both_routers_in_three_dtypes_by_both_implementations(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    found = receipt(dense, mixture, make_mixture(dense, mixture))
    assert found.mode == "whole"
    assert found.notes == ()
    texts = {"float32": ("one long text", "padded batch", "decoding with a cache")} | dict.fromkeys(
        ("bfloat16", "float16"), ("padded batch", "decoding with a cache")
    )
    expected = [
        (router, dtype, text, experts)
        for dtype, names in texts.items()
        for text in names
        for experts in ("eager", "grouped_mm")
        for router in ("shipped", "zero")
    ]
    assert [(c.router, c.dtype, c.text, c.experts) for c in found.comparisons] == expected
    assert len(expected) == (3 + 2 + 2) * 2 * 2
    for c in found.comparisons:
        assert c.bitwise_due == (c.router == "zero")
        assert c.bitwise == (c.rel == 0.0)
        assert c.limit == (ROUNDING_LIMIT if c.dtype == "float32" else None)
        assert (
            c.bitwise
            if c.router == "zero"
            else c.rel <= {"float32": ROUNDING_LIMIT, "bfloat16": 0.1, "float16": 0.01}[c.dtype]
        )
        assert c.num_tokens == 64 + 64 // 4  # longer than a block
        assert c.group_coverage is None


@pytest.mark.parametrize(
    "overrides",
    [{"intermediate_size": 172}, {"intermediate_size": 43}, {"intermediate_size": 64, "hidden_act": "gelu"}],
)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_ffn_that_torch_cannot_repeat_bit_for_bit_is_accepted_within_rounding(
    overrides: dict[str, Any], k: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = make_dense(**overrides), tmp_path / "mixture"
    found = receipt(dense, mixture, make_mixture(dense, mixture, k=k)).comparisons
    assert not any(c.bitwise_due for c in found if c.dtype == "float32")
    assert max(c.rel for c in found if c.dtype == "float32") <= ROUNDING_LIMIT


def test_progress_ends_where_it_said_it_would(dense_checkpoint: Path, tmp_path: Path) -> None:
    mixture = tmp_path / "mixture"
    plan = make_mixture(dense_checkpoint, mixture)
    seen: list[tuple[str, int, int]] = []
    write_receipt(dense_checkpoint, mixture, plan, 64, lambda *report: seen.append(report))
    assert seen == [("comparing with the dense model", done, 3) for done in range(4)]


@torch.no_grad()
def test_rel_is_what_transformers_gives_by_hand(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    (dense / "tokenizer.json").unlink()
    (dense / "tokenizer_config.json").unlink()
    plan = make_mixture(dense, mixture, noise=0.5)
    # Without a tokenizer the text is seeded random ids; one and a quarter blocks of them are the long text.
    ids = torch.randint(300, (4 * 80,), generator=torch.Generator().manual_seed(0))[None, :80]
    expected, found = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (dense, mixture))
    reference = expected(ids).logits
    judged = {
        (c.text, c.experts): c
        for c in receipt(dense, mixture, plan).comparisons
        if (c.router, c.dtype) == ("shipped", "float32")
    }
    for experts in ("eager", "grouped_mm"):
        found.set_experts_implementation(experts)
        difference = (found(ids).logits - reference).abs()
        # The same operators in the same order.
        assert judged["one long text", experts].rel == pytest.approx(
            float(difference.max() / reference.abs().max()), rel=1e-6
        )
        assert judged["one long text", experts].rel > 0.05
        # The last steps of the cached row alone: the longest of three, so at least as far apart as these.
        assert judged["decoding with a cache", experts].rel > 0.5 * float(
            difference[:, -8:].max() / reference.abs().max()
        )


@torch.no_grad()
def test_rel_of_a_layer_is_what_transformers_gives_by_hand(make_dense: MakeDense, tmp_path: Path) -> None:
    """Of the first layer, which reads the same in both models."""
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    (dense / "tokenizer.json").unlink()
    (dense / "tokenizer_config.json").unlink()
    plan = make_mixture(dense, mixture, noise=0.5, receipt="layers")
    stream = torch.randint(300, (4 * 80,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [stream[0:80], stream[1:41], stream[2:5]]
    outputs: dict[Path, list[torch.Tensor]] = {dense: [], mixture: []}
    added: list[torch.Tensor] = []
    for path, into in outputs.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.model.layers[0].register_forward_hook(lambda _, __, output, into=into: into.append(output[0]))
        if path == dense:
            model.model.layers[0].register_forward_hook(lambda _, given, output: added.append(output[0] - given[0][0]))
        for row in rows:
            model(torch.tensor([row]))
    reference, found, largest = torch.cat(outputs[dense]), torch.cat(outputs[mixture]), torch.cat(added).abs().max()
    assert largest > 0.05 * reference.abs().max()  # so it divides everywhere
    judged = [
        c.rel
        for c in receipt(dense, mixture, plan).comparisons
        if (c.router, c.dtype, c.text) == ("shipped", "float32", "layer 0")
    ]
    # Rows alone, and rows padded, sum in other orders; another order of these differences is a part in a hundred
    # thousand of them.
    assert judged == pytest.approx([float((found - reference).abs().max() / largest)] * 2, rel=1e-4)
    assert judged[0] > 0.05


def test_a_model_with_fewer_positions_than_a_block_gets_shorter_texts(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(max_position_embeddings=24), tmp_path / "mixture"
    found = receipt(dense, mixture, make_mixture(dense, mixture), block_size=1000)
    assert {c.num_tokens for c in found.comparisons} == {24}


# Where the function is kept


KEPT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "copies": ({}, {"shipped", "zero"}),
    "a half shared": ({"shared_expert": "half"}, {"shipped", "zero"}),
    "granular": ({"num_experts": 8, "k": 4, "kind": "granular", "granularity": 2}, {"shipped"}),
    "granular, all chosen": ({"k": 4, "kind": "granular", "granularity": 2}, {"shipped", "zero"}),
    "split, all chosen": ({"k": 4, "kind": "split"}, {"zero"}),
    "split, some chosen": ({"k": 2, "kind": "split"}, set()),
    "noise": ({"noise": 0.5}, set()),
    "dropped neurons": ({"drop": 0.5}, set()),
}


@pytest.mark.parametrize("mode", ["whole", "layers"])
@pytest.mark.parametrize("name", KEPT)
def test_a_limit_stands_only_where_the_function_is_kept(
    name: str, mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    overrides, judged = KEPT[name]
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    found = [
        c
        for c in receipt(dense, mixture, make_mixture(dense, mixture, receipt=mode, **overrides)).comparisons
        if c.router != "no"
    ]
    for c in found:
        assert (c.limit is not None) == (c.router in judged and c.dtype == "float32")
        assert c.bitwise_due == (name == "copies" and c.router == "zero")
        if c.router not in judged and not (mode == "layers" and c.text == "layer 0" and "granular" in name):
            assert not c.bitwise
    if not judged:
        assert all(c.rel > 100 * ROUNDING_LIMIT for c in found)


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_granular_experts_of_a_drawn_router_cover_whole_copies(
    mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, num_experts=8, k=4, kind="granular", granularity=2, receipt=mode)
    found = receipt(dense, mixture, plan).comparisons
    assert {c.group_coverage for c in found if c.router == "shipped"} == {1.0}
    assert all(c.rel <= ROUNDING_LIMIT for c in found if c.router == "shipped" and c.dtype == "float32")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llama to mixtral", "whole"),
        ("llama to mixtral", "layers"),
        ("llama to granitemoe", "whole"),
        ("qwen3", "whole"),
    ],
)
def test_rows_of_one_group_that_are_exchanged_with_anothers_are_refused(
    name: str, mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    granular = {"num_experts": 8, "k": 2, "kind": "granular", "granularity": 2}
    plan = make_mixture(dense, mixture, receipt=mode, **granular | overrides)
    receipt(dense, mixture, plan)

    def exchange(state: dict[str, torch.Tensor]) -> None:
        router = next(tensor for name, tensor in state.items() if tensor.shape == (8, 32) and ".1." in name)
        router[[1, 2]] = router[[2, 1]]

    rewrite(mixture, exchange)
    where = "layer 1" if mode == "layers" else "one long text"
    assert re.fullmatch(
        re.escape(f"{mixture}: shipped router, float32, eager experts, {where}: ")
        + r"\d+\.\d%"
        + re.escape(
            " of the tokens are sent to parts of different copies, as router logits tie; raise "
            "upcycle.router.logit_std or change the seed"
        ),
        refusal(dense, mixture, plan),
    )


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_a_rounded_scale_is_judged_by_the_dtype_that_it_was_rounded_to(
    mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = make_dense(torch.bfloat16, intermediate_size=96), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, num_experts=6, k=3, kind="granular", granularity=3, receipt=mode)
    limit = 10 * torch.finfo(torch.bfloat16).eps
    assert rounding_limit(plan, open_checkpoint(dense)) == limit
    found = [c for c in receipt(dense, mixture, plan).comparisons if c.router == "shipped" and c.dtype == "float32"]
    assert {c.limit for c in found} == {limit}
    assert {c.group_coverage for c in found} == {1.0}
    assert all(ROUNDING_LIMIT < c.rel <= limit for c in found)  # measured: .5 eps
    rewrite(mixture, lambda state: [weight.mul_(1.5) for name, weight in state.items() if ".w2." in name])
    assert "at most 8e-02" in refusal(dense, mixture, plan)


@torch.no_grad()
def test_half_of_a_float16_weight_that_is_no_float16_number_is_measured(make_dense: MakeDense, tmp_path: Path) -> None:
    """Weights of deviation 1e-4, most of which are odd or even multiples of 2^-24 as chance has it.

    Half of the odd ones is rounded.
    """
    dense, mixture = make_dense(torch.float16, intermediate_size=EXACT), tmp_path / "mixture"
    rewrite(dense, lambda state: [weight.mul_(5e-4) for name, weight in state.items() if "down_proj" in name])
    plan = make_mixture(dense, mixture, shared_expert="half")
    downs = [weight.float() for name, weight in load_file(dense / "model.safetensors").items() if "down_proj" in name]
    lost = max(float(((down / 2).half().float() - down / 2).norm() / (down / 2).norm()) for down in downs)
    assert rounding_limit(plan, open_checkpoint(dense)) == pytest.approx(10 * lost, rel=1e-5)
    assert lost > ROUNDING_LIMIT
    receipt(dense, mixture, plan)


# What rounds, or overflows, in the dense model itself


@pytest.mark.parametrize("name", DECODERS)
def test_small_outputs_whose_half_is_no_float16_number_are_no_fault(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Weights as transformers draws them: FFN outputs lie below 1.2e-4, twice the smallest normal number of float16."""
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, initializer_range=0.02, **fields), tmp_path / "mixture"
    found = receipt(dense, mixture, make_mixture(dense, mixture, **overrides))
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
    # float32 would have found it before
    monkeypatch.setattr("dense2moe.upcycle.building.receipt._DTYPES", {"float16": torch.float16})
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


def make_gates_overflow(factor: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: [
        weight.mul_(factor) for name, weight in state.items() if "up_proj" in name or "gate_proj" in name
    ]


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


def test_a_model_that_magnifies_rounding_is_held_to_its_own_noise(make_dense: MakeDense, tmp_path: Path) -> None:
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


# Layer by layer


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_family_passes_layer_by_layer(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    found = receipt(dense, mixture, make_mixture(dense, mixture, receipt="layers", **overrides))
    assert found.mode == "layers"
    assert "compared layer by layer: decoding with a cache and float16 were not run" in found.notes
    layers = [
        (f"layer {n}", experts, router)
        for n in range(2)
        for experts in ("eager", "grouped_mm")
        for router in ("shipped", "zero")
    ]
    assert [(c.dtype, c.text, c.experts, c.router) for c in found.comparisons] == [
        (dtype, *line)
        for dtype in ("float32", "bfloat16")
        for line in (("embedding", "no", "no"), *layers, ("head", "no", "no"))
    ]
    for c in found.comparisons:
        assert c.num_tokens == 80 > WINDOW
        assert c.limit == (ROUNDING_LIMIT if c.dtype == "float32" else None)
        assert c.rel <= (ROUNDING_LIMIT if c.dtype == "float32" else 0.1)
        assert c.bitwise or not c.bitwise_due
        inexact = ("gemma",) if c.router == "no" else ("gemma", "llama to granitemoeshared")
        assert c.bitwise_due == (c.router != "shipped" and name not in inexact)


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_family_passes_as_a_whole(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    found = receipt(dense, mixture, make_mixture(dense, mixture, receipt="whole", **overrides))
    assert found.mode == "whole"
    assert len(found.comparisons) == 28


FAULTS = {
    "an expert": lambda state: [
        weight.mul_(1.01) for name, weight in state.items() if "layers.1." in name and "experts" in name
    ],
    # not all rows: a norm after it would undo that
    "attention": lambda state: state["model.layers.1.self_attn.o_proj.weight"][:16].mul_(1.01),
    "a norm": lambda state: state["model.layers.1.post_attention_layernorm.weight"].mul_(1.01),
}


@pytest.fixture(scope="module")
def three_layers(
    request: pytest.FixtureRequest, make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, UpcyclePlan]:
    """A dense model of a family, its mixture, of which the receipt is good layer by layer, and the plan.

    Shared: read only.
    """
    fields, overrides = DECODERS[request.param]
    dense, mixture = (
        make_dense(intermediate_size=EXACT, num_hidden_layers=3, **fields),
        tmp_path_factory.mktemp("faultless") / "mixture",
    )
    plan = make_mixture(dense, mixture, receipt="layers", **overrides)
    receipt(dense, mixture, plan)
    return dense, mixture, plan


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("three_layers", ["llama to mixtral", "gemma", "qwen3", "olmo2"], indirect=True)
def test_a_fault_in_one_layer_is_named_by_that_layer(
    three_layers: tuple[Path, Path, UpcyclePlan], fault: str, tmp_path: Path
) -> None:
    dense, faultless, plan = three_layers
    mixture = tmp_path / "mixture"
    shutil.copytree(faultless, mixture)
    rewrite(mixture, FAULTS[fault])
    assert re.fullmatch(
        re.escape(f"{mixture}: shipped router, float32, eager experts, layer 1: differs from the dense model by ")
        + NUMBER
        + re.escape("; at most 1e-05"),
        refusal(dense, mixture, plan),
    )


@pytest.mark.parametrize(
    ("name", "tied", "tensor", "part"),
    [
        ("llama to mixtral", True, "model.embed_tokens.weight", "embedding"),
        ("llama to mixtral", True, "model.norm.weight", "head"),
        ("olmo2", False, "model.embed_tokens.weight", "embedding"),
        ("olmo2", False, "lm_head.weight", "head"),
        ("gemma", True, "model.embed_tokens.weight", "embedding"),
        ("gemma", True, "model.norm.weight", "head"),
        ("gemma", True, "lm_head.weight", "head"),
    ],
)
def test_what_is_outside_the_layers_and_altered_on_disk_is_refused_layer_by_layer(
    name: str, tied: bool, tensor: str, part: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Whatever became of the experts."""
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, tie_word_embeddings=tied, **fields), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, receipt="layers", noise=0.5, **overrides)
    # of the embedding, rows of letters, which any text has
    rewrite(mixture, lambda state: state[tensor][:24].mul_(1.01))
    due = "at most 1e-05" if name == "gemma" else "it must be bitwise equal"
    where = re.escape(f"{mixture}: no router, float32, no experts, {part}: differs from the dense model by ")
    assert re.fullmatch(f"{where}{NUMBER}; {due}", refusal(dense, mixture, plan))


@pytest.mark.parametrize(("field", "part"), [("embedding_multiplier", "embedding"), ("logits_scaling", "head")])
@pytest.mark.parametrize("name", ["granite", "llama to granitemoeshared"])
def test_a_multiplier_outside_the_layers_that_is_wrong_is_refused_layer_by_layer(
    name: str, field: str, part: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, receipt="layers", **overrides)
    values = json.loads((mixture / "config.json").read_text())
    (mixture / "config.json").write_text(json.dumps(values | {field: 1.001 * values[field]}))
    assert f"no router, float32, no experts, {part}: differs from the dense model by " in refusal(dense, mixture, plan)


def test_a_head_that_is_tied_on_one_side_alone_is_refused_layer_by_layer(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT, tie_word_embeddings=False), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, receipt="layers")
    path = mixture / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    receipt(dense, mixture, plan)  # transformers ties no head that is stored and different
    rewrite(mixture, lambda state: state.pop("lm_head.weight"))
    assert "float32, no experts, head: differs from the dense model by " in refusal(dense, mixture, plan)


# What a checkpoint holds besides


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def store_another_head(directory: Path) -> None:
    rewrite(directory, lambda state: state.update({HEAD: state[EMBEDDING].flip(0).contiguous()}))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["whole", "layers"])
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "gemma"])
def test_a_head_that_config_json_ties_and_transformers_does_not_is_kept(
    name: str, mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    store_another_head(dense)
    plan = make_mixture(dense, mixture, receipt=mode, **overrides)
    receipt(dense, mixture, plan)
    assert plan.dropped == ()
    assert json.loads((mixture / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(mixture / "model.safetensors")[HEAD], load_file(dense / "model.safetensors")[HEAD])
    ids = torch.arange(2, 42)[None]
    expected, found = (
        load(path)(ids).logits
        for load, path in ((AutoModelForCausalLM.from_pretrained, dense), (load_as_float32, mixture))
    )
    # by the tied head it is more than 1
    assert float((found - expected).abs().max() / expected.abs().max()) <= ROUNDING_LIMIT


def load_as_float32(directory: Path) -> Any:
    return load_model(directory, torch.float32)


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_a_copy_of_the_embedding_stored_as_its_head_is_dropped(
    mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    rewrite(dense, lambda state: state.update({HEAD: state[EMBEDDING].clone()}))
    plan = make_mixture(dense, mixture, receipt=mode)
    receipt(dense, mixture, plan)
    assert plan.dropped == (HEAD,)
    assert json.loads((mixture / "config.json").read_text())["tie_word_embeddings"] is True
    assert HEAD not in load_file(mixture / "model.safetensors")


@pytest.mark.parametrize(("mode", "part"), [("whole", "eager experts, one long text"), ("layers", "no experts, head")])
def test_a_conversion_that_drops_the_head_is_found_by_the_receipt_itself(
    mode: Any, part: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rule that should have kept it switched off."""
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    store_another_head(dense)
    monkeypatch.setattr("dense2moe.upcycle.checkpoints.reader._are_equal", lambda *_: True)
    plan = make_mixture(dense, mixture, receipt=mode)
    assert plan.dropped == (HEAD,)
    assert f"float32, {part}: differs from the dense model by" in refusal(dense, mixture, plan)


OUTSIDE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a tensor too many": (
        lambda state: state.update({"model.extra": torch.ones(3)}),
        LEFT_OVER.format("tensor 'model.extra'"),
    ),
    "a layer too many": (
        lambda state: state.update({"model.layers.2.x": torch.ones(3)}),
        LEFT_OVER.format("tensor 'model.layers.2.x'"),
    ),
    "no norm": (lambda state: state.pop("model.norm.weight"), MISSING.format("tensor 'model.norm.weight'")),
    "no head": (lambda state: state.pop(HEAD), MISSING.format(f"tensor '{HEAD}'")),
    "no embedding": (lambda state: state.pop(EMBEDDING), MISSING.format(f"tensor '{EMBEDDING}'")),
    "a wider head": (
        lambda state: state.update({HEAD: torch.ones(301, 32)}),
        f"tensor '{HEAD}' of shape [301, 32]; by config.json it must be [300, 32]; correct one of the two",
    ),
}


@pytest.mark.parametrize("side", ["dense", "mixture"])
@pytest.mark.parametrize("mode", ["whole", "layers"])
@pytest.mark.parametrize("fault", OUTSIDE)
def test_what_is_missing_or_left_over_on_either_side_is_refused(
    fault: str, mode: Any, side: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    change, reason = OUTSIDE[fault]
    dense, mixture = make_dense(intermediate_size=EXACT, tie_word_embeddings=False), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, receipt=mode)
    changed = dense if side == "dense" else mixture
    rewrite(changed, change)
    assert refusal(dense, mixture, plan) == f"{changed}: {reason}"


def enlarge(size: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Half of the elements of every state are large, and norms hide them from attention and FFN.

    The outliers that large models have, only more.
    """

    def change(state: dict[str, torch.Tensor]) -> None:
        state["model.embed_tokens.weight"][:, 16:] = size
        for name, tensor in state.items():
            if "layernorm" in name:
                tensor.mul_(size)  # which is about what the norm divides by
                tensor[16:] = 0.0

    return change


def test_a_large_residual_stream_hides_no_fault_of_an_ffn_and_is_none(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT, num_hidden_layers=6), tmp_path / "mixture"
    rewrite(dense, make_gates_overflow(1000.0))
    plan = make_mixture(dense, mixture, k=3, receipt="layers")
    receipt(dense, mixture, plan)  # the last bit of 1000 is 4e-5 of what a layer adds
    rewrite(
        mixture,
        lambda state: [
            weight.mul_(1.0001) for name, weight in state.items() if "layers.1." in name and "experts" in name
        ],
    )
    message = refusal(dense, mixture, plan)
    assert "layer 1: differs from the dense model by" in message
    difference = re.search(NUMBER, message)
    assert difference is not None
    assert float(difference[0]) > 5e-5  # of the stream, it would be a thousandth of that


def test_a_layer_that_adds_nothing_is_compared_too(make_dense: MakeDense, tmp_path: Path) -> None:
    def silence(state: dict[str, torch.Tensor]) -> None:
        for name, tensor in state.items():
            if "o_proj" in name or "down_proj" in name:
                tensor.zero_()

    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    rewrite(dense, silence)
    plan = make_mixture(dense, mixture, receipt="layers")
    assert {c.rel for c in receipt(dense, mixture, plan).comparisons} == {0.0}
    rewrite(mixture, lambda state: state["model.layers.1.self_attn.o_proj.weight"].fill_(1e-3))
    assert "layer 1: differs from the dense model by" in refusal(dense, mixture, plan)


def test_a_config_that_lost_a_window_is_found_layer_by_layer(make_dense: MakeDense, tmp_path: Path) -> None:
    fields, _ = DECODERS["mistral"]
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, receipt="layers")
    path = mixture / "config.json"
    assert '"sliding_window": 12' in path.read_text()
    path.write_text(path.read_text().replace('"sliding_window": 12', '"sliding_window": null'))
    assert "layer 0: differs from the dense model by" in refusal(dense, mixture, plan)


# Whole or layer by layer


def plan_of(source: Path, **overrides: Any) -> UpcyclePlan:
    return plan_upcycle(open_checkpoint(source), settings(**overrides))


def free(num_bytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(num_bytes)))


def test_two_models_that_do_not_fit_into_memory_are_compared_layer_by_layer(
    dense_checkpoint: Path, mixture_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, plan = open_checkpoint(dense_checkpoint), plan_of(dense_checkpoint)
    needed = receipt_bytes(plan, dense, 32) / 0.7
    free(needed + 2, monkeypatch)
    assert choose_mode(plan, dense, 32) == "whole"
    free(needed - 2, monkeypatch)
    assert choose_mode(plan, dense, 32) == "layers"


def test_models_that_would_need_more_than_three_gigabytes_are_compared_layer_by_layer(dense_checkpoint: Path) -> None:
    """Both in float32, and six float32 logits for each of 3 × 40 tokens; 0.52 GB are imports."""
    dense, plan = open_checkpoint(dense_checkpoint), plan_of(dense_checkpoint)
    assert (
        receipt_bytes(plan, dense, 32)
        == 520_000_000 + 4 * (plan.num_parameters + dense.num_parameters) + 6 * 4 * 300 * 3 * 40
    )
    length = 3_000_000_000 // (6 * 4 * 300 * 3)
    assert choose_mode(plan, dense, length // 2) == "whole"
    assert choose_mode(plan, dense, length) == "layers"


@pytest.mark.parametrize("asked", ["whole", "layers"])
@pytest.mark.parametrize("num_bytes", [0, 10**15])
def test_a_mode_that_is_asked_for_is_taken_whatever_the_memory(
    asked: Any, num_bytes: int, dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(num_bytes, monkeypatch)
    assert choose_mode(plan_of(dense_checkpoint, receipt=asked), open_checkpoint(dense_checkpoint)) == asked


@pytest.mark.parametrize("asked", ["auto", "whole", "layers"])
def test_an_encoder_decoder_is_held_whole_whatever_the_memory(
    asked: Any, make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_dense(architecture=T5)
    free(0, monkeypatch)
    assert choose_mode(plan_of(dense, k=1, receipt=asked), open_checkpoint(dense)) == "whole"


def test_the_mode_that_memory_allows_is_the_one_that_runs(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_mixture(dense_checkpoint, tmp_path / "mixture")
    free(1, monkeypatch)
    assert receipt(dense_checkpoint, tmp_path / "mixture", plan).mode == "layers"


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_a_source_with_dropped_tensors_of_another_dtype_is_compared(
    mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    rewrite(
        dense,
        lambda state: state.update(
            {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}
        ),
    )
    assert receipt(dense, mixture, make_mixture(dense, mixture, receipt=mode)).mode == mode


# What could not be compared


@pytest.mark.parametrize(
    ("fields", "notes"),
    [
        (
            {"intermediate_size": 172},
            {"bfloat16": "344 bytes (intermediate_size 172)", "float16": "344 bytes (intermediate_size 172)"},
        ),
        (
            {"intermediate_size": 43},
            {
                dtype: f"{size} bytes (intermediate_size 43)"
                for dtype, size in {"float32": 172, "bfloat16": 86, "float16": 86}.items()
            },
        ),
        (
            {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 2},
            {"bfloat16": "72 bytes (hidden_size 36)", "float16": "72 bytes (hidden_size 36)"},
        ),
    ],
)
def test_a_width_that_grouped_mm_refuses_is_noted_and_the_rest_is_run(
    fields: dict[str, Any], notes: dict[str, str], make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = make_dense(**fields), tmp_path / "mixture"
    found = receipt(dense, mixture, make_mixture(dense, mixture))
    assert found.notes == tuple(
        f"grouped_mm in {dtype} was not run: it refuses rows of {reason}" for dtype, reason in notes.items()
    )
    run = {(c.dtype, c.experts) for c in found.comparisons}
    assert run == {
        (d, e)
        for d in ("float32", "bfloat16", "float16")
        for e in ("eager", "grouped_mm")
        if not (e == "grouped_mm" and d in notes)
    }
    ids = torch.arange(20)[None]
    for dtype in notes:  # transformers does refuse it
        model = load_model(mixture, getattr(torch, dtype))
        model.set_experts_implementation("grouped_mm")
        with pytest.raises(RuntimeError, match=r"multiple of 16|16 bytes|stride"):
            model(ids)


@pytest.mark.parametrize("mode", ["whole", "layers"])
@pytest.mark.parametrize(("window", "length"), [(12, 80), (100, 132), (150, 182)])
def test_a_text_is_made_long_enough_to_cross_a_window(
    window: int, length: int, mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = (
        make_dense(architecture="MistralForCausalLM", sliding_window=window, intermediate_size=EXACT),
        tmp_path / "mixture",
    )
    found = receipt(dense, mixture, make_mixture(dense, mixture, receipt=mode))
    assert not any("window" in note for note in found.notes)
    assert {c.num_tokens for c in found.comparisons if c.dtype == "float32"} == {length}


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_a_window_that_no_text_crosses_is_noted(mode: Any, make_dense: MakeDense, tmp_path: Path) -> None:
    fields = {"architecture": "MistralForCausalLM", "sliding_window": 4096, "max_position_embeddings": 8192}
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    found = receipt(dense, mixture, make_mixture(dense, mixture, receipt=mode))
    assert (
        "the text of 80 tokens does not cross the window of 4096; that it was kept is known from the config alone"
        in found.notes
    )


def test_a_window_wider_than_the_context_needs_no_note(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = (
        make_dense(architecture="MistralForCausalLM", sliding_window=4096, intermediate_size=EXACT),
        tmp_path / "mixture",
    )
    assert receipt(dense, mixture, make_mixture(dense, mixture)).notes == ()


# An encoder-decoder


@pytest.mark.parametrize("layers", ["all", "every-2"])
def test_t5_is_judged_by_a_zero_router_alone(layers: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(architecture=T5), tmp_path / "mixture"
    found = receipt(dense, mixture, make_mixture(dense, mixture, k=1, layers=layers))
    assert found.mode == "whole"
    assert found.notes == ()
    assert {(c.router, c.text) for c in found.comparisons if c.dtype == "float32"} == {
        (router, text)
        for router in ("shipped", "zero")
        for text in ("one long text", "padded batch", "decoding with a cache")
    }
    for c in found.comparisons:
        assert c.experts == "its own"
        assert not c.bitwise_due
        assert c.limit == (ROUNDING_LIMIT if (c.router, c.dtype) == ("zero", "float32") else None)
        # a quarter of four times the weights; half precision rounds: measured 3 eps in float32, 1 in the others
        if c.router == "zero":
            assert c.rel <= 8 * torch.finfo(getattr(torch, c.dtype)).eps
        else:
            assert c.rel > 1000 * ROUNDING_LIMIT


@pytest.mark.parametrize(
    "name", ["encoder.block.0.layer.1.mlp.experts.expert_0.wo.weight", "decoder.block.1.layer.0.SelfAttention.q.weight"]
)
def test_t5_altered_on_disk_is_refused(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(architecture=T5), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, k=1)
    rewrite(mixture, lambda state: state[name].mul_(1.1))
    assert re.fullmatch(
        re.escape(f"{mixture}: zero router, float32, its own experts, one long text: differs from the dense model by ")
        + NUMBER
        + re.escape("; at most 1e-05"),
        refusal(dense, mixture, plan),
    )


# Planted faults


@pytest.mark.parametrize(
    ("layer", "expert", "matrix"), [(0, 0, "w1"), (0, 1, "w3"), (0, 2, "w2"), (1, 3, "w1"), (1, 2, "w3"), (1, 0, "w2")]
)
def test_an_expert_altered_on_disk_is_refused(
    layer: int, expert: int, matrix: str, dense_checkpoint: Path, tmp_path: Path
) -> None:
    mixture = tmp_path / "mixture"
    plan = make_mixture(dense_checkpoint, mixture)
    rewrite(mixture, lambda state: state[EXPERT.format(layer=layer, expert=expert, matrix=matrix)].mul_(1.01))
    assert re.fullmatch(
        re.escape(f"{mixture}: shipped router, float32, eager experts, one long text: differs from the dense model by ")
        + NUMBER
        + re.escape("; at most 1e-05"),
        refusal(dense_checkpoint, mixture, plan),
    )


def test_experts_altered_by_less_than_rounding_are_refused_where_torch_is_exact(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, mixture = make_dense(intermediate_size=EXACT), tmp_path / "mixture"
    plan = make_mixture(dense, mixture)
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
        refusal(dense, mixture, plan),
    )


def test_a_weight_that_is_no_number_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    mixture = tmp_path / "mixture"
    plan = make_mixture(dense_checkpoint, mixture)
    rewrite(mixture, lambda state: state["model.norm.weight"].fill_(float("nan")))
    message = (
        f"{mixture}: shipped router, float32, eager experts, one long text: differs from the dense model by "
        "nan; at most 1e-05"
    )
    assert refusal(dense_checkpoint, mixture, plan) == message


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_anything_else_altered_on_disk_is_refused(name: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    mixture = tmp_path / "mixture"
    plan = make_mixture(dense_checkpoint, mixture)
    rewrite(mixture, lambda state: state[name].mul_(1.01))
    assert "differs from the dense model by" in refusal(dense_checkpoint, mixture, plan)


# Loading


def test_a_written_mixture_loads_without_a_key_missing_or_left_over(mixture_checkpoint: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(mixture_checkpoint, output_loading_info=True)
    assert {kind: set(found) for kind, found in info.items() if found} == {}
    assert type(model).__name__ == "MixtralForCausalLM"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), MISSING.format("tensor 'model.norm.weight'")),
        (lambda state: state.update({"extra.weight": torch.ones(1)}), LEFT_OVER.format("tensor 'extra.weight'")),
        (
            lambda state: [state.pop(name) for name in list(state) if "norm" in name],
            MISSING.format(
                "tensors 'model.layers.0.input_layernorm.weight', 'model.layers.0.post_attention_layernorm.weight', "
                "'model.layers.1.input_layernorm.weight' and 2 more"
            ),
        ),
    ],
)
def test_what_transformers_only_warns_about_is_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, dense_checkpoint: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "dense"
    shutil.copytree(dense_checkpoint, directory)
    rewrite(directory, change)
    with pytest.raises(UpcycleError) as excinfo:
        load_model(directory, torch.float32)
    assert str(excinfo.value) == f"{directory}: {message}"


def test_a_mixture_that_lacks_one_experts_matrix_is_refused(mixture_checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "mixture"
    shutil.copytree(mixture_checkpoint, directory)
    rewrite(directory, lambda state: state.pop(EXPERT.format(layer=1, expert=3, matrix="w2")))
    with pytest.raises(UpcycleError) as excinfo:
        load_model(directory, torch.float32)
    shapes = "of shape [3, 32, 48]; by config.json it must be [4, 32, 48]; correct one of the two"
    assert str(excinfo.value) == f"{directory}: tensor 'model.layers.1.mlp.experts.down_proj' {shapes}"


def test_a_model_is_loaded_with_the_head_of_its_task(make_dense: MakeDense, dense_checkpoint: Path) -> None:
    assert type(load_model(dense_checkpoint, torch.bfloat16)).__name__ == "LlamaForCausalLM"
    assert type(load_model(make_dense(architecture=T5), torch.float32, "text2text-generation")).__name__ == T5


def test_router_weights_are_found_in_order(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    state = load_file(mixture_checkpoint / "model.safetensors")
    found = list(router_weights(load_model(mixture_checkpoint, torch.float32)))
    assert len(found) == 2
    assert all(
        torch.equal(weight, state[f"model.layers.{layer}.block_sparse_moe.gate.weight"])
        for layer, weight in enumerate(found)
    )
    assert list(router_weights(load_model(dense_checkpoint, torch.float32))) == []


@pytest.mark.parametrize("name", DECODERS)
def test_every_targets_routers_and_their_layers_are_found(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    fields, overrides = DECODERS[name]
    dense, mixture = make_dense(intermediate_size=EXACT, **fields), tmp_path / "mixture"
    plan = make_mixture(dense, mixture, **overrides)
    model = load_model(mixture, torch.float32)
    assert sparse_layers(model) == tuple(site.layer for site in plan.sites)
    assert len(list(router_modules(model))) == len(plan.sites)
    written = [tensor for tensor in load_file(mixture / "model.safetensors").values() if tensor.shape == (4, 32)]
    assert all(torch.equal(weight, tensor) for weight, tensor in zip(router_weights(model), written, strict=True))


def test_the_routers_of_switch_are_found_in_both_stacks(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, mixture = make_dense(architecture=T5), tmp_path / "mixture"
    make_mixture(dense, mixture, k=1, layers="every-2")
    state = load_file(mixture / "model.safetensors")
    names = [f"encoder.block.{layer}.layer.1" for layer in (1, 3)] + ["decoder.block.1.layer.2"]
    found = list(router_weights(load_model(mixture, torch.float32, "text2text-generation")))
    assert all(
        torch.equal(weight, state[f"{name}.mlp.router.classifier.weight"])
        for weight, name in zip(found, names, strict=True)
    )
