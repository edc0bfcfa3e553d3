"""Which experts the tokens of each label go to: beside a loop over examples, one at a time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hosts import ROWS
from safetensors.torch import save_file
from sklearn.metrics import mutual_info_score
from test_label_training import make_mixture, quiet

from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.tasks.head import ONE, SEVERAL, VALUE, LabelHead, LabelledTask
from dense2moe.upcycle.tasks.labels import label_task
from dense2moe.upcycle.tasks.questions import QUESTION_HEAD
from dense2moe.upcycle.training.label_routing import mark, mark_labels, measure_labels, name_labels
from dense2moe.upcycle.training.routing import hooked_routers

LENGTHS = (12, 3, 7, 5)
NAMES = ("O", "B-X", "I-X", "never")


def write_texts(folder: Path, labels: torch.Tensor) -> Path:
    """The test split of four texts with labels."""
    mask = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).int()
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(1)).int() * mask
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels, "domains": torch.zeros(4, dtype=torch.int32)}
    save_file(tensors, folder / "test.safetensors")
    (folder / "data.json").write_text(json.dumps({"domains": ["text"]}), encoding="utf-8")
    return folder


def word_labels() -> torch.Tensor:
    """Labels of first pieces alone, -100 elsewhere and at padding."""
    found = torch.randint(3, (4, 12), generator=torch.Generator().manual_seed(2)).int()
    found[:, 2] = -100
    return torch.where(torch.arange(12) < torch.tensor(LENGTHS)[:, None], found, -100).int()


CASES: dict[str, tuple[LabelledTask, str | None, torch.Tensor]] = {
    "words": ("token-classification", None, word_labels()),
    "one": ("text-classification", ONE, torch.tensor([0, 2, 1, 0], dtype=torch.int32)),
    "several": (
        "text-classification",
        SEVERAL,
        torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]]),
    ),
}


def labels_of(labels: torch.Tensor, row: int, token: int) -> list[int]:
    own = labels[row]
    if own.ndim == 0:
        return [int(own)]
    if own.is_floating_point():
        return torch.nonzero(own).flatten().tolist()
    return [int(own[token])] if own[token] >= 0 else []


@pytest.mark.parametrize("case", CASES)
def test_tokens_of_labels_are_counted_as_a_loop_over_texts_counts_them(case: str, tmp_path: Path) -> None:
    name, kind, labels = CASES[case]
    task = label_task(name, LabelHead(NAMES, kind))
    mixture, data = make_mixture(tmp_path), write_texts(tmp_path, labels)
    found = measure_labels(mixture, data, task)
    assert found is not None
    model = load_model(mixture, torch.float32, name, task.head)
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(1))
    pairs: list[list[tuple[int, int]]] = [[], []]  # of each layer: label and expert
    for row, length in enumerate(LENGTHS):
        said: dict[int, torch.Tensor] = {}
        with torch.no_grad(), hooked_routers(model, lambda number, logits, _, said=said: said.update({number: logits})):
            model(input_ids=ids[row : row + 1, :length])
        for layer, logits in said.items():
            for token, chosen in enumerate(logits.topk(2).indices.tolist()):
                pairs[layer] += [(label, expert) for label in labels_of(labels, row, token) for expert in chosen]
    assert list(found.loads) == list(NAMES[:3])  # no example has the last
    for layer, own in enumerate(pairs):
        counted, by_label = Counter(own), Counter(label for label, _ in own)
        for label in range(3):
            expected = [counted[label, expert] / by_label[label] for expert in range(4)]
            assert found.loads[NAMES[label]][layer] == pytest.approx(expected, abs=1e-9)
    assert max(found.information) > 0.001  # experts are not the same for all labels here


def test_an_image_s_label_is_that_of_all_its_patches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ROWS["vit"].make(initializer_range=0.5).save_pretrained(tmp_path / "dense")
    (tmp_path / "mixture").mkdir()
    config = UpcycleConfig(
        num_experts=4, num_experts_per_tok=2, experts=ExpertsConfig(noise=0.5), router=RouterConfig(logit_std=2.0)
    )
    upcycle(tmp_path / "dense", tmp_path / "mixture", config, 0, quiet)
    task = label_task("image-classification", LabelHead(("a", "b"), ONE))
    model = load_model(tmp_path / "mixture", torch.float32, task.name, task.head)
    size = model.config.image_size
    pixels = torch.randn(5, model.config.num_channels, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32)
    tensors = {"pixel_values": pixels, "labels": labels, "domains": torch.zeros(5, dtype=torch.int32)}
    save_file(tensors, tmp_path / "test.safetensors")
    (tmp_path / "data.json").write_text(json.dumps({"domains": ["images"], "image_tokens": 5}), encoding="utf-8")
    found = measure_labels(tmp_path / "mixture", tmp_path, task)
    assert found is not None
    said: dict[int, torch.Tensor] = {}
    with torch.no_grad(), hooked_routers(model, lambda number, logits, _: said.update({number: logits})):
        model(pixel_values=pixels)
    for layer, logits in said.items():
        chosen = logits.topk(2).indices.view(5, -1, 2)
        for number, name in enumerate(("a", "b")):
            share = torch.bincount(chosen[labels == number].flatten(), minlength=4).double()
            assert found.loads[name][layer] == pytest.approx((share / share.sum()).tolist(), abs=1e-9)
        table = torch.tensor([found.loads[name][layer] for name in ("a", "b")], dtype=torch.float64).mul(1e6).numpy()
        assert found.information[layer] == pytest.approx(mutual_info_score(None, None, contingency=table), abs=1e-5)


def test_numbers_to_predict_have_no_label(tmp_path: Path) -> None:
    task = label_task("text-classification", LabelHead(("value",), VALUE))
    assert measure_labels(tmp_path, tmp_path, task) is None


def test_layers_that_share_a_router_count_every_pass() -> None:
    """ALBERT's router says as many rows as there are tokens, once for each layer."""
    batch = {"labels": torch.tensor([[1, -100], [0, -100]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    marked = mark_labels(batch, 2, 6)
    assert marked.tolist() == [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]] * 2


def test_tokens_of_question_context_and_answer_are_told_apart() -> None:
    """Two windows, by hand: marks, a question of two, a context of three or two; padding is none."""
    starts = torch.tensor([[0, -1, -1, -1, 0, 4, 8, -1], [0, -1, -1, -1, 0, 4, -1, -1]])
    ends = torch.tensor([[0, -1, -1, -1, 3, 7, 9, -1], [0, -1, -1, -1, 3, 6, -1, -1]])
    batch = {
        "attention_mask": torch.tensor([[1] * 8, [1] * 7 + [0]]),
        "labels": torch.tensor([[5, 6], [0, 0]]),
        "span_starts": starts,
        "span_ends": ends,
    }
    numbers = mark(batch, QUESTION_HEAD, 30).argmax(-1).tolist()  # of two layers
    assert numbers == [0, 0, 0, 0, 1, 2, 2, 0, 0, 0, 0, 0, 1, 1, 0] * 2
    assert name_labels(QUESTION_HEAD) == ("question", "context", "answer")
    assert name_labels(LabelHead(("value",), VALUE)) == ()
