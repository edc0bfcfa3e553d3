"""The receipt accepts what kept the function on any machine, and finds one altered bit in an expert."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from upcycle.checkpoint import open_checkpoint
from upcycle.config import RouterConfig, UpcycleConfig
from upcycle.errors import UpcycleError
from upcycle.mapping import plan_upcycle
from upcycle.receipt import ROUNDING_LIMIT, check_copies, load_model, router_weights, write_receipt
from upcycle.surgery import upcycle

MakeDense = Callable[..., Path]
EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
EXACT = 64  # an FFN width of which the vector loop of `silu` leaves no rest, so that equal means bitwise
NUMBER = r"\d\.\de-\d\d"


def quiet(what: str, done: int, total: int) -> None:
    pass


def make_mixture(source: Path, output: Path, k: int = 2) -> Path:
    output.mkdir()
    upcycle(source, output, UpcycleConfig(num_experts=4, num_experts_per_tok=k, router=RouterConfig(logit_std=1.0)), 0, quiet)
    return output


def receipt(source: Path, output: Path, copied: bool = True, k: int = 2, block_size: int = 64) -> Any:
    return write_receipt(source, output, copied, k, block_size, quiet)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def test_copies_are_compared_with_both_routers_in_both_dtypes_on_both_texts(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(intermediate_size=EXACT)
    found = receipt(dense, make_mixture(dense, tmp_path / "mixture"))
    assert {(c.router, c.dtype, c.text) for c in found} == {
        (router, dtype, text) for router in ("shipped", "zero") for dtype in ("float32", "bfloat16") for text in ("one long text", "padded batch")
    }
    assert len(found) == 8
    assert all(c.bitwise and c.rel == 0.0 for c in found if c.router == "zero")
    assert all(c.rel <= ROUNDING_LIMIT for c in found if c.dtype == "float32")
    assert all(c.bitwise_due for c in found)
    assert {c.num_tokens for c in found} == {64 + 64 // 4}  # longer than a block


@pytest.mark.parametrize("overrides", [{"intermediate_size": 172}, {"intermediate_size": 43}, {"intermediate_size": 64, "hidden_act": "gelu"}])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_ffn_that_torch_cannot_repeat_bit_for_bit_is_accepted_within_rounding(
    overrides: dict[str, Any], k: int, make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense(**overrides)
    found = receipt(dense, make_mixture(dense, tmp_path / "mixture", k), k=k)
    assert max(c.rel for c in found if c.dtype == "float32") <= ROUNDING_LIMIT


def test_progress_ends_where_it_said_it_would(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    write_receipt(dense_checkpoint, mixture_checkpoint, False, 2, 64, lambda *report: seen.append(report))
    assert seen == [("comparing with the dense model", done, 2) for done in range(3)]


@torch.no_grad()
def test_rel_is_what_transformers_gives_by_hand(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense()
    (dense / "tokenizer.json").unlink()
    (dense / "tokenizer_config.json").unlink()
    mixture = make_mixture(dense, tmp_path / "mixture")
    rewrite(mixture, lambda state: [tensor.mul_(1.5) for name, tensor in state.items() if ".w1." in name])
    # Without a tokenizer the text is seeded random ids; one and a quarter blocks of them are the long text.
    ids = torch.randint(300, (4 * 80,), generator=torch.Generator().manual_seed(0))[None, :80]
    for c in receipt(dense, mixture, copied=False):
        if (c.router, c.text) == ("shipped", "one long text"):
            dtype = getattr(torch, c.dtype)
            expected, found = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype)(ids).logits.float() for path in (dense, mixture))
            # Another experts implementation sums in another order; a real difference is near one.
            tolerance = {"float32": 1e-4, "bfloat16": 0.1}[c.dtype]
            assert c.rel == pytest.approx(float((found - expected).abs().max() / expected.abs().max()), rel=tolerance)
            assert c.rel > 0.05


def test_a_model_with_fewer_positions_than_a_block_gets_shorter_texts(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(max_position_embeddings=24)
    assert {c.num_tokens for c in receipt(dense, make_mixture(dense, tmp_path / "mixture"), block_size=1000)} == {24}


def test_noise_is_reported_and_not_refused(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    found = receipt(dense_checkpoint, mixture_checkpoint, copied=False)
    assert all(c.rel > 100 * ROUNDING_LIMIT and not c.bitwise for c in found)


# Planted faults


@pytest.mark.parametrize(("layer", "expert", "matrix"), [(0, 0, "w1"), (0, 1, "w3"), (0, 2, "w2"), (1, 3, "w1"), (1, 2, "w3"), (1, 0, "w2")])
def test_an_expert_altered_on_disk_is_refused(layer: int, expert: int, matrix: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    mixture = make_mixture(dense_checkpoint, tmp_path / "mixture")
    rewrite(mixture, lambda state: state[EXPERT.format(layer=layer, expert=expert, matrix=matrix)].mul_(1.01))
    with pytest.raises(UpcycleError) as excinfo:
        receipt(dense_checkpoint, mixture)
    assert re.fullmatch(
        re.escape(f"{mixture}: shipped router, one long text: differs from the dense model by ") + NUMBER + re.escape("; at most 1e-05"),
        str(excinfo.value),
    )


def test_experts_altered_by_less_than_rounding_are_refused_where_torch_is_exact(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(intermediate_size=EXACT)
    mixture = make_mixture(dense, tmp_path / "mixture")
    # All four, for which two win the tie of a zero router is torch's choice.
    rewrite(mixture, lambda state: [state[EXPERT.format(layer=1, expert=expert, matrix="w2")].mul_(1 + 2**-22) for expert in range(4)])
    with pytest.raises(UpcycleError) as excinfo:
        receipt(dense, mixture)
    assert re.fullmatch(
        re.escape(f"{mixture}: zero router, float32, one long text: differs from the dense model by ")
        + NUMBER
        + re.escape("; it must be bitwise equal"),
        str(excinfo.value),
    )


def test_a_weight_that_is_no_number_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    mixture = make_mixture(dense_checkpoint, tmp_path / "mixture")
    rewrite(mixture, lambda state: state["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(UpcycleError) as excinfo:
        receipt(dense_checkpoint, mixture)
    assert str(excinfo.value) == f"{mixture}: shipped router, one long text: differs from the dense model by nan; at most 1e-05"


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.post_attention_layernorm.weight", "model.norm.weight"])
def test_anything_else_altered_on_disk_is_refused(name: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    mixture = make_mixture(dense_checkpoint, tmp_path / "mixture")
    rewrite(mixture, lambda state: state[name].mul_(1.01))
    with pytest.raises(UpcycleError, match="differs from the dense model by"):
        receipt(dense_checkpoint, mixture)


# Loading


def test_a_written_mixture_loads_without_a_key_missing_or_left_over(mixture_checkpoint: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(mixture_checkpoint, output_loading_info=True)
    assert {kind: set(found) for kind, found in info.items() if found} == {}
    assert type(model).__name__ == "MixtralForCausalLM"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), "loading by transformers reports missing keys: ['model.norm.weight']"),
        (lambda state: state.update({"extra.weight": torch.ones(1)}), "loading by transformers reports unexpected keys: ['extra.weight']"),
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
    stacked = "('model.layers.1.mlp.experts.down_proj', torch.Size([3, 32, 48]), torch.Size([4, 32, 48]))"
    assert str(excinfo.value) == f'{directory}: loading by transformers reports mismatched keys: ["{stacked}"]'


def test_router_weights_are_found_in_order(dense_checkpoint: Path, mixture_checkpoint: Path) -> None:
    state = load_file(mixture_checkpoint / "model.safetensors")
    found = list(router_weights(load_model(mixture_checkpoint, torch.float32)))
    assert len(found) == 2
    assert all(torch.equal(weight, state[f"model.layers.{layer}.block_sparse_moe.gate.weight"]) for layer, weight in enumerate(found))
    assert list(router_weights(load_model(dense_checkpoint, torch.float32))) == []


def test_every_kept_tensor_and_every_expert_is_read_back(dense_checkpoint: Path, tmp_path: Path) -> None:
    mixture = make_mixture(dense_checkpoint, tmp_path / "mixture")
    plan = plan_upcycle(open_checkpoint(dense_checkpoint), UpcycleConfig(num_experts=4))
    num_layers = 2
    num_routers = num_layers  # drawn, not copied
    assert check_copies(dense_checkpoint, mixture, plan, quiet) == len(plan.writes) - num_routers


@pytest.mark.parametrize("expert", range(4))
def test_one_bit_of_any_expert_is_found(expert: int, dense_checkpoint: Path, tmp_path: Path) -> None:
    mixture = make_mixture(dense_checkpoint, tmp_path / "mixture")
    plan = plan_upcycle(open_checkpoint(dense_checkpoint), UpcycleConfig(num_experts=4))
    name = EXPERT.format(layer=1, expert=expert, matrix="w2")

    def flip(state: dict[str, torch.Tensor]) -> None:
        state[name].view(torch.uint8)[0, 0] ^= 1

    rewrite(mixture, flip)
    with pytest.raises(UpcycleError) as caught:
        check_copies(dense_checkpoint, mixture, plan, quiet)
    source = "model.layers.1.mlp.down_proj.weight"
    assert str(caught.value) == f"{mixture}: tensor '{name}' on disk differs from '{source}', of which it is a copy; check the disk"
