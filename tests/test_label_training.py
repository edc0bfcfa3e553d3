"""Training on labels: padding counts nowhere, the best step is the figure's, and recipes run to their reports."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hosts import ROWS
from PIL import Image
from programs import dense2moe, stages_here
from test_words import word_piece
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    ViTImageProcessor,
)

from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.tasks.head import ONE, LabelHead
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.history import Step
from dense2moe.upcycle.training.routing import Routing
from dense2moe.upcycle.training.trainable import plan_learning


@pytest.fixture(scope="module", autouse=True)
def _stages_here() -> Iterator[None]:
    with stages_here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense2moe.convert.report.writer.draw_pictures", lambda facts, rows: [])
        yield


def quiet(what: str, done: int, total: int) -> None:
    pass


# Routing


def make_mixture(folder: Path) -> Path:
    torch.manual_seed(0)
    ROWS["bert"].make(initializer_range=0.5).save_pretrained(folder / "dense")
    (folder / "mixture").mkdir()
    config = UpcycleConfig(
        num_experts=4, num_experts_per_tok=2, experts=ExpertsConfig(noise=0.5), router=RouterConfig(logit_std=2.0)
    )
    upcycle(folder / "dense", folder / "mixture", config, 0, quiet)
    return folder / "mixture"


def read_routing(model: Any, settings: FinetuneConfig, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
    """What one step of one part says of its routing."""
    routing = Routing(model, settings, 1, (0, 1))
    with routing.hooks():
        routing.begin_step(1, 0.0)
        routing.tell(torch.zeros(len(ids), dtype=torch.int64), ids.shape[1], mask)
        with routing.listening():
            model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask)
        routing.count()
        losses = {each.name: each.value.item() for each in routing.losses()}
    return losses | {f"load {layer.number}": layer.load for layer in routing.describe()}


def test_padding_counts_in_no_loss_and_no_load_of_routers(tmp_path: Path) -> None:
    """Sums over texts, each alone and unpadded, give what the padded batch says."""
    head = LabelHead(("no", "yes"), ONE)
    model = load_model(make_mixture(tmp_path), torch.float32, "text-classification", head)
    settings = FinetuneConfig(balance_coefficient=0.1, z_coefficient=0.01)
    lengths, size = (3, 5, 12), 12
    mask = (torch.arange(size) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 96, (3, size), generator=torch.Generator().manual_seed(0)) * mask
    with torch.no_grad():
        padded = read_routing(model, settings, ids, mask)
        alone = [
            read_routing(model, settings, row[None, :length], None) for row, length in zip(ids, lengths, strict=True)
        ]
        blind = read_routing(model, settings, ids, None)
    share = torch.tensor(lengths).double() / sum(lengths)

    def average(name: str) -> Any:
        return torch.tensordot(share, torch.tensor([each[name] for each in alone], dtype=torch.float64), dims=1)

    assert padded["z_loss"] == pytest.approx(float(average("z_loss")), rel=1e-5)
    assert blind["z_loss"] != pytest.approx(padded["z_loss"], rel=1e-3)
    for layer in (0, 1):
        assert padded[f"load {layer}"] == pytest.approx(average(f"load {layer}").tolist(), abs=1e-6)
    # the balance loss is a product of two means over all real tokens: by transformers' formula, on logits of real ones
    expected = []
    said: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    from dense2moe.upcycle.training.routing import hooked_routers

    with torch.no_grad(), hooked_routers(model, lambda number, logits, _: said[number].append(logits)):
        for row, length in zip(ids, lengths, strict=True):
            model(input_ids=row[None, :length])
    for logits in (torch.cat(each) for each in said.values()):
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(2).indices.flatten()
        load = torch.bincount(chosen, minlength=4) / len(chosen)
        expected.append(4 * float((load * probabilities.mean(0)).sum()))
    assert padded["balance_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_the_best_step_is_that_of_the_figure_and_then_of_the_loss() -> None:
    from dense2moe.upcycle.tasks.labels import label_task
    from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
    from dense2moe.upcycle.training.watch import TrainingWatch

    class Phase:
        task = label_task("text-classification", LabelHead(("no", "yes"), ONE))

    watch = TrainingWatch.__new__(TrainingWatch)
    watch.phase = Phase()  # type: ignore[assignment]
    figures = [(0, 0.9, 0.50), (1, 0.2, 0.70), (2, 0.8, 0.75), (3, 0.7, 0.75), (4, 0.1, 0.60)]
    watch.history = [
        Step("fine-tuned", step, 0, validation_loss=loss, validation_figure=figure) for step, loss, figure in figures
    ]
    assert watch.best_step == 3
    Phase.task = NEXT_TOKEN
    assert watch.best_step == 4


# Recipes

WORDS = ("red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "Paris", "Rome")
TAGS = {"cat": "B-PET", "dog": "B-PET", "bird": "B-PET", "Paris": "B-PLACE", "Rome": "B-PLACE"}


def draw_texts(count: int) -> list[list[str]]:
    draw = random.Random(0)
    return [[*draw.choices(WORDS, k=draw.randrange(2, 9)), f"n{number}"] for number in range(count)]


def save_bert(folder: Path, architecture: str = "BertForMaskedLM", **values: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = word_piece()
    model = ROWS["bert"].make(architecture, vocab_size=len(tokenizer), **values)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_classes(folder: Path, count: int = 60, labels: tuple[str, ...] = ("pet", "none")) -> str:
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for words in draw_texts(count):
            label = labels[0] if set(words) & {"cat", "dog", "bird"} else labels[-1]
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return "{kind: table, train: [rows.jsonl]}"


def write_words(folder: Path) -> str:
    texts = ("\n".join(f"{word} {TAGS.get(word, 'O')}" for word in words) for words in draw_texts(60))
    (folder / "words.conll").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return "{kind: conll, train: [words.conll]}"


def write_questions(folder: Path) -> str:
    """What somebody does in a place: half of the questions have no answer, and contexts are longer than a window."""
    draw = random.Random(0)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for words in draw_texts(80):
            context = " ".join([*words, *draw.choices(("red", "green", "blue"), k=20)])
            found = next((word for word in words if word in TAGS), None)
            answers = {"text": [found] * bool(found), "answer_start": [context.index(found)] if found else []}
            file.write(json.dumps({"question": "which cat?", "context": context, "answers": answers}) + "\n")
    return "{kind: table, train: [questions.jsonl], question: question}"


def write_images(folder: Path) -> str:
    draw = np.random.default_rng(0)
    for number in range(60):
        pixels = draw.integers(128, size=(16, 16, 3), dtype=np.uint8) + np.uint8(100 * (number % 2))
        place = folder / "pictures" / ("dark", "bright")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return "{kind: images, train: pictures}"


def save_vit(folder: Path) -> Path:
    torch.manual_seed(0)
    ROWS["vit"].make("ViTModel").save_pretrained(folder)
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size).save_pretrained(folder)
    return folder


RECIPE = """\
source: source
data:
  source: {data}
{limits}
upcycle: {{num_experts: 4, num_experts_per_tok: 2}}
finetune: {finetune}
variants: [{variants}]
quantize: {{block_size: 16}}
"""
TRAINING = "{steps: 4, eval_steps: 2, warmup_steps: 1, batch_size: 8, learning_rate: 1.0e-3, control: false}"
BLOCK = "  block_size: 24"


def write(
    folder: Path, data: str, finetune: str = TRAINING, variants: str = "float32, int8", limits: str = BLOCK
) -> Path:
    recipe = folder / "recipe.yaml"
    text = RECIPE.format(data=data, finetune=finetune, variants=variants, limits=limits)
    recipe.write_text(text, encoding="utf-8")
    return recipe


KINDS: dict[str, tuple[Any, Any, str]] = {
    "token-classification": (save_bert, write_words, "entity F1"),
    "text-classification": (save_bert, write_classes, "accuracy"),
    "question-answering": (save_bert, write_questions, "answer F1"),
    "image-classification": (save_vit, write_images, "accuracy"),
}


@pytest.mark.parametrize("task", KINDS)
def test_a_recipe_with_labels_runs_to_its_report(task: str, tmp_path: Path) -> None:
    save, write_data, figure = KINDS[task]
    save(tmp_path / "source")
    limits = BLOCK if task != "image-classification" else ""
    variants = (
        "float32, int8" if task in ("token-classification", "question-answering") else "int8"
    )  # a graph takes seconds to trace
    recipe = write(tmp_path, write_data(tmp_path), variants=variants, limits=limits)
    finished = dense2moe("run", recipe, "--workdir", tmp_path / "run")
    assert finished.exit_code == 0, finished.stderr
    (folder,) = (tmp_path / "run").glob("report-*")
    facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert facts["finetune"]["evaluations"]["fine-tuned"]["figures"][0]["name"] == figure
    for found in facts["variants"].values():
        assert found["parity"]["passed"], finished.stdout
        (checked,) = found["parity"]["providers"]["CPUExecutionProvider"]["tasks"]
        assert (checked["name"], checked["metric"]) == (task, figure)
        assert checked["same_as_twin"] == 1.0


# As users break it


def check(folder: Path, data: str, **fields: Any) -> str:
    """What `check` and `run` say of a recipe that cannot be: one line, and the same."""
    recipe = write(folder, data, **fields)
    finished = dense2moe("check", recipe)
    assert finished.exit_code == 1, finished.stdout
    lines = [line for line in finished.stderr.splitlines() if line.strip()]
    assert "Traceback" not in finished.stderr
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize(
    ("finetune", "said"),
    [
        ("null", "finetune: is null, and the checkpoint, a BertForMaskedLM, has no head for these labels"),
        (TRAINING[:-1] + ", train: prompt}", "is 'prompt', and the data has labels"),
        (TRAINING[:-1] + ", distillation: {weight: 0.5}}", "there is nothing to learn from"),
        (TRAINING[:-1] + ", routing: by-domain, train: experts}", "by-domain"),
        (TRAINING[:-1] + ", batch_size: 4096}", "batch_size"),
    ],
)
def test_settings_that_labels_cannot_have_are_refused(finetune: str, said: str, tmp_path: Path) -> None:
    save_bert(tmp_path / "source")
    data = write_classes(tmp_path)
    if said == "batch_size":
        finetune = finetune.replace("batch_size: 8, ", "")
        finished = dense2moe("run", write(tmp_path, data, finetune=finetune), "--workdir", tmp_path / "run")
        assert finished.exit_code == 1
        assert said in finished.stderr
        return
    assert said in check(tmp_path, data, finetune=finetune)


def test_one_label_alone_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path / "source")
    assert "every label is 'same'" in check(tmp_path, write_classes(tmp_path, labels=("same",)))


def test_class_weights_of_values_are_refused(tmp_path: Path) -> None:
    save_bert(tmp_path / "source")
    lines = (json.dumps({"text": " ".join(words), "label": len(words) / 7}) for words in draw_texts(60))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for setting, said in (("class_weights: balanced", "finetune.class_weights"), ("label_smoothing: 0.1", "smoothing")):
        finetune = f"{TRAINING[:-1]}, {setting}}}"
        assert said in check(tmp_path, "{kind: table, train: [rows.jsonl]}", finetune=finetune)


@pytest.mark.parametrize("train", ["experts", "router", "lora", "last-1"])
def test_a_head_learns_whatever_else_does(train: str) -> None:
    """It may be new; a head of random numbers that stays would make nothing of what the layers learn."""
    config = BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    for model in (BertForSequenceClassification(config), BertForTokenClassification(config)):
        learning = plan_learning(model, FinetuneConfig(train=train), (0, 1))
        heads = {name for name, _ in model.named_parameters() if name.startswith("classifier") or ".pooler." in name}
        assert heads
        assert heads <= learning.whole
        assert not heads & learning.low_rank.keys()
    masked = plan_learning(BertForMaskedLM(config), FinetuneConfig(train="experts"), (0, 1))
    assert not any(name.startswith("cls.") for name in masked.whole)
