"""The receipt accepts what kept the function on any machine, and says what it could not compare."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from receipts import (
    EXACT,
    NUMBER,
    T5,
    MakeDense,
    made_once,
    make_mixture,
    read_in,
    receipt,
    refusal,
    rewrite,
    settings,
)
from safetensors.torch import load_file
from shapes import each_shape
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.building.footprint import choose_mode, receipt_bytes
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.rounding import ROUNDING_LIMIT, rounding_limit
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.checkpoints.reader import open_checkpoint

# What is compared


def test_copies_are_compared_with_both_routers_in_three_dtypes_by_both_implementations(
    make_dense: MakeDense,
) -> None:
    found = made_once(make_dense, receipt="whole").receipt
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
@pytest.mark.parametrize(("k", "mode"), [(1, "layers"), (2, "whole"), (3, "layers")])
def test_an_ffn_that_torch_cannot_repeat_bit_for_bit_is_accepted_within_rounding(
    overrides: dict[str, Any], k: int, mode: Any, make_dense: MakeDense
) -> None:
    found = [
        c for c in made_once(make_dense, dense=overrides, k=k, receipt=mode).receipt.comparisons if c.router != "no"
    ]
    assert not any(c.bitwise_due for c in found if c.dtype == "float32")
    assert max(c.rel for c in found if c.dtype == "float32") <= ROUNDING_LIMIT


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_progress_ends_where_it_said_it_would(mode: Any, make_dense: MakeDense) -> None:
    made = made_once(make_dense, receipt=mode)
    assert made.receipt
    assert made.progress == [("comparing with the dense model", done, 3) for done in range(4)]


@torch.no_grad()
def test_rel_is_what_transformers_gives_by_hand(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_in("float32", monkeypatch)
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
def test_rel_of_a_layer_is_what_transformers_gives_by_hand(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first layer, which reads the same in both models."""
    read_in("float32", monkeypatch)
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


@pytest.mark.parametrize(
    ("name", "mode"),
    each_shape(
        [(name, mode) for name in KEPT for mode in ("layers", "whole")],
        # layer by layer all, and as a whole one for each set of routers that are judged
        {f"{name}, layers" for name in KEPT} | {"copies, whole", "granular, whole", "split, all chosen, whole"},
        name=", ".join,
    ),
)
def test_a_limit_stands_only_where_the_function_is_kept(name: str, mode: Any, make_dense: MakeDense) -> None:
    overrides, judged = KEPT[name]
    found = [c for c in made_once(make_dense, receipt=mode, **overrides).receipt.comparisons if c.router != "no"]
    for c in found:
        assert (c.limit is not None) == (c.router in judged and c.dtype == "float32")
        assert c.bitwise_due == (name == "copies" and c.router == "zero")
        if c.router not in judged and not (mode == "layers" and c.text == "layer 0" and "granular" in name):
            assert not c.bitwise
    if not judged:
        assert all(c.rel > 100 * ROUNDING_LIMIT for c in found)


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_granular_experts_of_a_drawn_router_cover_whole_copies(mode: Any, make_dense: MakeDense) -> None:
    found = made_once(make_dense, receipt=mode, **KEPT["granular"][0]).receipt.comparisons
    assert {c.group_coverage for c in found if c.router == "shipped"} == {1.0}
    assert all(c.rel <= ROUNDING_LIMIT for c in found if c.router == "shipped" and c.dtype == "float32")


@pytest.mark.parametrize(
    ("name", "mode"),
    each_shape(
        [
            ("llama to mixtral", "whole"),
            ("llama to mixtral", "layers"),
            ("llama to granitemoe", "whole"),
            ("llama to granitemoe", "layers"),
            ("qwen3", "whole"),
            ("qwen3", "layers"),
        ],
        # experts apart and stacked, and in some layers alone
        {"llama to mixtral, whole", "llama to mixtral, layers", "llama to granitemoe, layers", "qwen3, layers"},
        name=", ".join,
    ),
)
def test_rows_of_one_group_that_are_exchanged_with_anothers_are_refused(
    name: str, mode: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    made = made_once(make_dense, name, receipt=mode, num_experts=8, k=2, kind="granular", granularity=2)
    assert made.receipt
    mixture = made.copy(tmp_path)

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
        refusal(made.dense, mixture, made.plan),
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


@pytest.mark.parametrize(
    ("window", "length", "mode"), [(12, 80, "whole"), (12, 80, "layers"), (100, 132, "layers"), (150, 182, "layers")]
)
def test_a_text_is_made_long_enough_to_cross_a_window(
    window: int, length: int, mode: Any, make_dense: MakeDense
) -> None:
    found = made_once(make_dense, "mistral", dense={"sliding_window": window}, receipt=mode).receipt
    assert not any("window" in note for note in found.notes)
    assert {c.num_tokens for c in found.comparisons if c.dtype == "float32"} == {length}


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_a_window_that_no_text_crosses_is_noted(mode: Any, make_dense: MakeDense) -> None:
    fields = {"sliding_window": 4096, "max_position_embeddings": 8192}
    found = made_once(make_dense, "mistral", dense=fields, receipt=mode).float32_receipt
    assert (
        "the text of 80 tokens does not cross the window of 4096; only the config shows that the window was kept"
        in found.notes
    )


def test_a_window_wider_than_the_context_needs_no_note(make_dense: MakeDense) -> None:
    made = made_once(make_dense, "mistral", dense={"sliding_window": 4096}, receipt="whole")
    assert made.float32_receipt.notes == ()


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
