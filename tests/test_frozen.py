"""Weights that stay narrow compute what their float32 copies do, and what learns is float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dense2moe.upcycle.building.config import RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model, router_weights
from dense2moe.upcycle.checkpoints.products import product
from dense2moe.upcycle.tasks.next_token import distillation_loss, next_token_loss
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.expert_forward import use_sorted_experts
from dense2moe.upcycle.training.frozen import keep_narrow, load_frozen, stored_dtype
from dense2moe.upcycle.training.low_rank import merge_low_rank, use_low_rank
from dense2moe.upcycle.training.trainable import choose_trainable

MakeDense = Callable[..., Path]
IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GraniteForCausalLM",
    "GemmaForCausalLM",
    "OlmoForCausalLM",
)


@pytest.fixture(scope="module")
def narrow_mixture(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of 4 experts in bfloat16."""
    output = tmp_path_factory.mktemp("narrow")
    config = UpcycleConfig(num_experts=4, num_experts_per_tok=2, router=RouterConfig(logit_std=1.0))
    upcycle(make_dense(dtype=torch.bfloat16), output, config, 0, lambda *_: None)
    return output


@pytest.mark.parametrize("rows", [3, 40])
def test_a_product_with_a_narrow_matrix_and_its_gradient_are_those_of_its_float32_copy(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the larger matrix is cast in parts
    monkeypatch.setattr("dense2moe.upcycle.checkpoints.products._CAST_ELEMENTS", 64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, 16, generator=generator).to(torch.bfloat16)
    given = torch.randn(5, 16, generator=generator)
    results = []
    for multiply, matrix in ((product, weight), (F.linear, weight.float())):
        x = given.clone().requires_grad_()
        found = multiply(x, matrix)
        found.square().sum().backward()
        results.append((found.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_narrow_dense_model_gives_the_logits_of_a_float32_copy(architecture: str, make_dense: MakeDense) -> None:
    directory = make_dense(architecture=architecture, dtype=torch.bfloat16)
    with torch.no_grad():
        found, wide = (
            model(input_ids=IDS, use_cache=False).logits
            for model in (load_frozen(directory), load_model(directory, torch.float32))
        )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wide, rtol=1e-5, atol=1e-5 * float(wide.abs().max()))


def test_a_narrow_mixture_gives_the_logits_of_a_float32_copy(narrow_mixture: Path) -> None:
    with torch.no_grad():
        found, wide = (
            model(input_ids=IDS).logits
            for model in (load_frozen(narrow_mixture), load_model(narrow_mixture, torch.float32))
        )
    torch.testing.assert_close(found, wide, rtol=1e-5, atol=1e-5 * float(wide.abs().max()))


@pytest.mark.parametrize("train", ["router", "experts", "lora", "last-1", "all"])
def test_what_learns_is_float32_and_has_the_gradients_of_a_float32_model_and_nothing_else_does(
    train: str, narrow_mixture: Path
) -> None:
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        model = load_model(narrow_mixture, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            choose_trainable(model, FinetuneConfig(train=train), (0, 1))
        with torch.no_grad():  # an update of zero would have no gradient for its first factor
            for number, (name, parameter) in enumerate(model.named_parameters()):
                if "lora_" in name:
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)
                        / 8
                    )
        if dtype == torch.bfloat16:
            use_low_rank(model)
            keep_narrow(model)
            use_sorted_experts(model)
        next_token_loss(model(input_ids=IDS, use_cache=False).logits, IDS).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if dtype == torch.bfloat16:
            learning = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
            matrices = {
                p.dtype
                for name, p in model.named_parameters()
                if not p.requires_grad and p.ndim > 1 and "gate.weight" not in name
            }
    assert set(learning.values()) == {torch.float32}
    assert matrices <= {torch.bfloat16}
    assert gradients[0].keys() == gradients[1].keys() == learning.keys()
    for name, gradient in gradients[0].items():
        expected = gradients[1][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()), msg=name)


def test_a_low_rank_update_is_merged_in_float32(narrow_mixture: Path) -> None:
    model = load_model(narrow_mixture, torch.bfloat16)
    finish = choose_trainable(model, FinetuneConfig(train="lora"), (0, 1))
    use_low_rank(model)
    keep_narrow(model)
    expected = {}
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "parameter_name"):
            first, second = module.lora_A["default"].weight, module.lora_B["default"].weight
            torch.nn.init.normal_(second, std=1e-3)  # far below the last bit of a bfloat16 weight
            count, rows, columns = module.get_param().shape
            update = torch.einsum("orE,Eri->Eoi", second.view(rows, -1, count), first.view(count, -1, columns)) * 2
            expected[id(module.get_param())] = (module.get_param().float() + update, module.get_param())
    merge_low_rank(model, torch.float32)
    finish(True)
    for wanted, parameter in expected.values():
        torch.testing.assert_close(parameter.data, wanted.detach(), rtol=0, atol=1e-6)


def test_a_loss_by_blocks_has_the_value_and_the_gradient_of_one_over_all() -> None:
    generator = torch.Generator().manual_seed(0)
    given, teacher = (torch.randn(3, 7, 11, generator=generator) for _ in range(2))
    ids = torch.randint(0, 11, (3, 7), generator=generator)

    def plainly(logits: torch.Tensor) -> torch.Tensor:
        said, taught = (part[:, :-1].flatten(0, 1) / 2 for part in (logits, teacher))
        divergence = (taught.softmax(-1) * (taught.log_softmax(-1) - said.log_softmax(-1))).sum(-1).mean() * 4
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + 3 * divergence

    results = []
    for loss in (lambda logits: next_token_loss(logits, ids) + 3 * distillation_loss(logits, teacher, 2.0), plainly):
        logits = given.clone().requires_grad_()
        value = loss(logits)
        value.backward()
        results.append((value.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_the_dtype_of_a_checkpoint_is_the_one_that_holds_all_its_tensors(
    narrow_mixture: Path, mixture_checkpoint: Path
) -> None:
    assert stored_dtype(narrow_mixture) == torch.bfloat16
    assert stored_dtype(mixture_checkpoint) == torch.float32
    assert load_file(narrow_mixture / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert all(weight.dtype == torch.float32 for weight in router_weights(load_frozen(narrow_mixture)))
