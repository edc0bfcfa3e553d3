"""Routers of two matrices: an MLP, and attention of the token to a key for each expert."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import ROWS
from programs import dense2moe, stages_here
from test_end_to_end import write_recipe
from test_label_training import TRAINING, quiet, save_bert, write, write_classes
from test_recipe_hosts import make_gpt2, save_source
from transformers import AutoTokenizer

from dense2moe.upcycle.building.config import RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model, router_modules
from dense2moe.upcycle.models.mixture import MixtureRouter
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.trainable import parameter_groups, plan_learning

FORMS = ("mlp", "attention")
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _stages_here() -> Iterator[None]:
    with stages_here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense2moe.convert.report.writer.draw_pictures", lambda facts, rows: [])
        yield


@each_form
def test_logits_and_gradients_are_those_of_a_loop(form: str) -> None:
    router = MixtureRouter(3, 2, 6, None, {"form": form, "size": 4}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
    tokens = torch.randn(7, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    logits, weights, experts = router(tokens)
    rows = []
    for token in tokens:
        query = torch.stack([(token * row).sum() for row in router.query])
        read = torch.tanh(query) if form == "mlp" else query
        rows.append(torch.stack([(read * key).sum() / 2.0 for key in router.weight]))  # 2 is the root of the size
    torch.testing.assert_close(logits, torch.stack(rows))
    best = torch.stack(rows).softmax(-1).topk(2)
    assert torch.equal(experts, best.indices)
    shares = best.values / best.values.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, shares, check_dtype=False, rtol=1e-6, atol=0)
    upstream = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    inputs = (tokens, router.query, router.weight)
    found = torch.autograd.grad((logits * upstream).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((torch.stack(rows) * upstream).sum(), inputs)
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other)


def make(folder: Path, form: str, **router: Any) -> Path:
    torch.manual_seed(0)
    ROWS["bert"].make(hidden_size=64, num_attention_heads=4).save_pretrained(folder / "dense")
    (folder / "moe").mkdir()
    config = UpcycleConfig(
        target="mixture", num_experts=16, router=RouterConfig.model_validate({"form": form, "size": 32, **router})
    )
    upcycle(folder / "dense", folder / "moe", config, 0, quiet)
    return folder / "moe"


@each_form
def test_logits_are_spread_as_asked_for_at_the_start(form: str, tmp_path: Path) -> None:
    model = load_model(make(tmp_path, form, logit_std=2.0), torch.float32, "fill-mask")
    said: list[torch.Tensor] = []
    for router in router_modules(model):
        router.register_forward_hook(lambda _, __, output: said.append(output[0]))
    with torch.no_grad():
        model(input_ids=torch.randint(3, 90, (8, 12), generator=torch.Generator().manual_seed(0)))
    for logits in said:
        assert float(logits.std()) == pytest.approx(2.0, rel=0.35)
    assert len(said) == 2


@each_form
def test_both_matrices_learn_as_routers_do(form: str, tmp_path: Path) -> None:
    model = load_model(make(tmp_path, form), torch.float32, "fill-mask")
    own = {name for name, _ in model.named_parameters() if ".router." in name}
    assert len(own) == 4
    settings = FinetuneConfig(train="router", router_learning_rate=0.5, learning_rate=0.1)
    assert plan_learning(model, settings, (0, 1)).whole == own
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)
    (group,) = parameter_groups(model, settings, (0, 1))
    assert len(group["params"]) == 4
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)


@each_form
def test_a_checkpoint_is_saved_and_loaded_whole(form: str, tmp_path: Path) -> None:
    model = load_model(make(tmp_path, form), torch.float32, "fill-mask")
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", torch.float32, "fill-mask")
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@each_form
def test_an_encoder_with_such_routers_goes_the_whole_road(form: str, tmp_path: Path) -> None:
    save_bert(tmp_path / "source")
    recipe = write(tmp_path, write_classes(tmp_path), finetune=TRAINING, variants="int8")
    text = recipe.read_text(encoding="utf-8")
    router = f"num_experts_per_tok: 2, router: {{form: {form}, size: 8}}, gate: {{choice: top-p, p: 0.6}}"
    recipe.write_text(text.replace("num_experts_per_tok: 2", router), encoding="utf-8")
    finished = dense2moe("run", recipe, "--workdir", tmp_path / "run")
    assert finished.exit_code == 0, finished.stdout + finished.stderr
    (parity,) = (tmp_path / "run").glob("parity-int8-*/parity.json")
    assert json.loads(parity.read_text(encoding="utf-8"))["passed"]


def test_a_decoder_with_an_attention_router_is_judged_by_its_routers(dense_checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_gpt2(len(AutoTokenizer.from_pretrained(dense_checkpoint)) + 2)
    save_source(model, dense_checkpoint, tmp_path / "source")
    files = Path(__file__).parent.parent / "upcycle" / "*" / "*.py"
    recipe = write_recipe(tmp_path / "r.yaml", source=tmp_path / "source", text=files)
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("upcycle: {", "upcycle: {router: {form: attention, size: 8}, ", 1), encoding="utf-8")
    finished = dense2moe("run", recipe, "--workdir", tmp_path / "run")
    assert finished.exit_code == 0, finished.stdout + finished.stderr
    (report,) = (tmp_path / "run").glob("report-*/report.json")
    facts = json.loads(report.read_text(encoding="utf-8"))
    parity = facts["variants"]["float32"]["parity"]["providers"]["CPUExecutionProvider"]
    assert min(parity["finetuned"]["routing_agreement"]) > 0.99


def test_text_makes_no_rows_of_two_matrices() -> None:
    with pytest.raises(ValueError, match="form 'mlp' is drawn, and text is to be read"):
        RouterConfig.model_validate({"form": "mlp", "kind": "kmeans"})


def test_a_target_with_linear_routers_names_the_one_that_takes_any(dense_checkpoint: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", source=dense_checkpoint, text=Path(__file__))
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("upcycle: {", "upcycle: {router: {form: mlp}, ", 1), encoding="utf-8")
    found = dense2moe("check", recipe)
    assert found.exit_code == 1
    assert "has linear routers" in " ".join(found.stderr.split())
    assert "upcycle.target mixture would hold it" in " ".join(found.stderr.split())
