"""Heads that a checkpoint does not have: drawn once for dense model and mixture, on layers that stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from hosts import ROWS
from safetensors.torch import load_file
from transformers import PreTrainedModel

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.head import ENDS_OF_SPAN, ONE, SEVERAL, VALUE, LabelHead, LabelledTask
from dense2moe.upcycle.tasks.questions import QUESTION_HEAD, take_ends
from dense2moe.upcycle.tasks.task import take_logits

TAGS = LabelHead(("O", "B-X", "I-X"))
CLASSES = LabelHead(("no", "yes", "perhaps", "never"), ONE)
HEADS: dict[LabelledTask, LabelHead] = {
    "token-classification": TAGS,
    "text-classification": CLASSES,
    "question-answering": QUESTION_HEAD,
}
ENDS = {
    "token-classification": "ForTokenClassification",
    "text-classification": "ForSequenceClassification",
    "question-answering": "ForQuestionAnswering",
}
READ = {"question-answering": take_ends}
SHAPES = {"token-classification": (2, 9, 3), "text-classification": (2, 4), "question-answering": (2, 2, 9)}
TEXTS = ("bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2", "albert", "mpnet", "gpt2")
IMAGES = ("vit", "deit", "dinov2", "beit")
Pair = tuple[Path, Path]


def quiet(what: str, done: int, total: int) -> None:
    pass


def save(name: str, folder: Path, architecture: str | None = None, **values: Any) -> Path:
    torch.manual_seed(1)
    model = ROWS[name].make(architecture, **values)
    for parameter in model.parameters():  # nothing is as it was drawn, biases and norms not either
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def make_pair(name: str, folder: Path, architecture: str | None = None, **values: Any) -> Pair:
    dense, mixture = save(name, folder / "dense", architecture, **values), folder / "mixture"
    mixture.mkdir()
    upcycle(dense, mixture, UpcycleConfig(num_experts=4, num_experts_per_tok=2), 0, quiet)
    return dense, mixture


@pytest.fixture(autouse=True)
def _quick(receipts_in_float32: None) -> None:
    pass


def head_names(model: PreTrainedModel) -> set[str]:
    """Tensors outside of the base model, and a pooler."""
    prefix = f"{model.base_model_prefix}."
    return {name for name in model.state_dict() if not name.startswith(prefix) or "pooler" in name}


def task_cases() -> list[Any]:
    return [(name, task) for name in TEXTS for task in HEADS if hasattr(transformers, start_of(name) + ENDS[task])]


def start_of(name: str) -> str:
    return ROWS[name].architecture.removesuffix("ForMaskedLM").removesuffix("LMHeadModel")


@pytest.mark.parametrize(("name", "task"), task_cases())
def test_dense_model_and_mixture_begin_with_one_head_and_their_own_layers(
    name: str, task: LabelledTask, tmp_path: Path
) -> None:
    dense, mixture = make_pair(name, tmp_path)
    torch.manual_seed(7)  # what was drawn before does not matter
    one, other = (load_model(each, torch.float32, task, HEADS[task]) for each in (dense, mixture))
    again = load_model(dense, torch.float32, task, HEADS[task])
    assert type(other).__name__.endswith(type(one).__name__)
    drawn = head_names(one)
    assert drawn
    assert drawn == head_names(other)
    for key in drawn:
        assert torch.equal(one.state_dict()[key], other.state_dict()[key]), key
        assert torch.equal(one.state_dict()[key], again.state_dict()[key]), key
    assert any(float(one.state_dict()[key].abs().max()) > 0 for key in drawn)
    stored = load_file(dense / "model.safetensors")
    kept = {key: tensor for key, tensor in one.state_dict().items() if key not in drawn}
    for key, tensor in kept.items():
        assert torch.equal(tensor, stored[key]), key
    for model in (one, other):
        assert model.config.id2label == dict(enumerate(HEADS[task].labels))
        kind = HEADS[task].kind
        assert model.config.problem_type == (None if kind == ENDS_OF_SPAN else kind)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = (READ.get(task, take_logits)(model(input_ids=ids)) for model in (other, one))
    assert logits.shape == SHAPES[task]
    # copies of one FFN, weighted: rounding
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [each for each in IMAGES if each in ROWS])
def test_image_models_have_new_heads_too(name: str, tmp_path: Path) -> None:
    start = ROWS[name].architecture.partition("For")[0].removesuffix("Model")
    dense, mixture = make_pair(name, tmp_path, f"{start}Model")
    head = LabelHead(tuple("0123456789"), ONE)
    one, other = (load_model(each, torch.float32, "image-classification", head) for each in (dense, mixture))
    for key in head_names(one):
        if "pooler" not in key:
            assert torch.equal(one.state_dict()[key], other.state_dict()[key]), key
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert one(pixel_values=pixels).logits.shape == (2, 10)


def test_a_base_without_a_pooler_gets_one_with_the_head(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = transformers.BertConfig(**cast(Any, ROWS["bert"].values))
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "dense")
    assert not any("pooler" in key for key in load_file(tmp_path / "dense" / "model.safetensors"))
    (tmp_path / "mixture").mkdir()
    upcycle(tmp_path / "dense", tmp_path / "mixture", UpcycleConfig(num_experts=4, num_experts_per_tok=2), 0, quiet)
    one, other = (
        load_model(tmp_path / each, torch.float32, "text-classification", CLASSES) for each in ("dense", "mixture")
    )
    poolers = [key for key in one.state_dict() if "pooler" in key]
    assert poolers
    for key in head_names(one):
        assert torch.equal(one.state_dict()[key], other.state_dict()[key]), key


def test_a_pooler_that_is_there_is_kept(tmp_path: Path) -> None:
    dense, mixture = make_pair("bert", tmp_path, "BertModel")
    stored = load_file(dense / "model.safetensors")
    for each in (dense, mixture):
        model = load_model(each, torch.float32, "text-classification", CLASSES)
        assert torch.equal(model.bert.pooler.dense.weight, stored["pooler.dense.weight"])
        assert torch.equal(model.bert.pooler.dense.bias, stored["pooler.dense.bias"])


@pytest.mark.parametrize("head", [CLASSES, LabelHead(CLASSES.labels, SEVERAL)])
def test_a_checkpoint_that_has_these_labels_keeps_its_head(head: LabelHead, tmp_path: Path) -> None:
    """The kind of problem is the data's, where the checkpoint names none: pipelines read it."""
    names = dict(enumerate(CLASSES.labels))
    dense, mixture = make_pair("bert", tmp_path, "BertForSequenceClassification", id2label=names)
    stored = load_file(dense / "model.safetensors")
    for each in (dense, mixture):
        model = load_model(each, torch.float32, "text-classification", head)
        assert torch.equal(model.classifier.weight, stored["classifier.weight"])
        assert torch.equal(model.bert.pooler.dense.weight, stored["bert.pooler.dense.weight"])
        assert model.config.problem_type == head.kind


@pytest.mark.parametrize(
    "head", [LabelHead(("a", "b", "c", "d"), ONE), LabelHead(("no", "yes"), ONE), LabelHead(("value",), VALUE)]
)
def test_a_checkpoint_with_other_labels_gets_a_new_head(head: LabelHead, tmp_path: Path) -> None:
    names = dict(enumerate(CLASSES.labels))
    dense, mixture = make_pair("bert", tmp_path, "BertForSequenceClassification", id2label=names)
    stored = load_file(dense / "model.safetensors")
    one, other = (load_model(each, torch.float32, "text-classification", head) for each in (dense, mixture))
    assert one.classifier.weight.shape == (len(head.labels), 32)
    assert not torch.equal(one.classifier.weight[:1], stored["classifier.weight"][:1])
    assert torch.equal(one.classifier.weight, other.classifier.weight)
    assert torch.equal(one.bert.pooler.dense.weight, stored["bert.pooler.dense.weight"])


def test_a_family_without_such_a_class_is_refused_in_one_line(tmp_path: Path) -> None:
    dense = save("gpt-neox-japanese", tmp_path / "dense")
    with pytest.raises(UpcycleError) as caught:
        load_model(dense, torch.float32, "token-classification", TAGS)
    assert "of which transformers has no model for token-classification; give a checkpoint of a family" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(UpcycleError, match="has no model for image-classification"):
        load_model(dense, torch.float32, "image-classification", LabelHead(("a", "b"), ONE))


def test_layers_are_whole_or_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    dense = save("bert", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    name = "bert.encoder.layer.1.attention.self.query.weight"
    for changed, said in (
        ({key: value for key, value in tensors.items() if key != name}, f"tensor '{name}' missing"),
        (tensors | {"bert.encoder.layer.1.extra": torch.zeros(2)}, "unused, which transformers would ignore"),
        (tensors | {name: torch.zeros(3, 3)}, r"of shape \[3, 3\]; by config.json it must be"),
    ):
        save_file(changed, dense / "model.safetensors", {"format": "pt"})
        with pytest.raises(UpcycleError, match=said):
            load_model(dense, torch.float32, "token-classification", TAGS)


def test_the_draw_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    dense = save("bert", tmp_path / "dense")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_model(dense, torch.float32, "token-classification", TAGS)
    assert torch.equal(torch.rand(4), expected)
