"""Several tasks at once: each learns, answers and is judged as it would be alone, on one trunk."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from programs import dense2moe, stages_here
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import accuracy_score
from test_label_training import TAGS, TRAINING, check, draw_texts, save_bert, write, write_classes, write_words
from test_prediction import InTorch
from test_recipe_hosts import make_gpt2
from test_words import word_piece
from transformers import AutoTokenizer, BertForTokenClassification, pipeline

from dense2moe.convert.cli import main
from dense2moe.export.runtime.prediction import Predictor
from dense2moe.upcycle.checkpoints.class_heads import put_head
from dense2moe.upcycle.data.blocks import prepare_data
from dense2moe.upcycle.data.config import DataConfig, TasksData
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.tasks.examples import trim
from dense2moe.upcycle.tasks.head import ONE, SEVERAL, VALUE, HeadPart, join_head
from dense2moe.upcycle.tasks.labels import LabelLoss
from dense2moe.upcycle.tasks.several import several_tasks

PARTS = (
    HeadPart("words", "token-classification", ("O", "B-PET", "I-PET")),
    HeadPart("class", "text-classification", ("bad", "fair", "good"), ONE),
    HeadPart("value", "text-classification", ("value",), VALUE),
    HeadPart("sets", "text-classification", ("a", "b"), SEVERAL),
)
STARTS = (0, 3, 6, 7)
NUM_LABELS = 9
ROWS = torch.tensor([1, 0, 3, 2, 1, 0])
LENGTHS = torch.tensor([4, 6, 2, 5, 3, 4])
MASK = (torch.arange(6) < LENGTHS[:, None]).long()


def make_batch() -> dict[str, torch.Tensor]:
    """Six texts of four tasks, those of other tasks as `prepare_tasks` writes them."""
    words = torch.full((6, 6), -100)
    words[1, [1, 2, 4]] = torch.tensor([0, 1, 2])
    words[5, [1, 2]] = torch.tensor([1, 0])
    return {
        "input_ids": torch.randint(3, 90, (6, 6), generator=torch.Generator().manual_seed(0)) * MASK,
        "attention_mask": MASK,
        "parts": ROWS,
        "labels.0": words,
        "labels.1": torch.tensor([2, -100, -100, -100, 0, -100]),
        "labels.2": torch.tensor([[0.0], [0.0], [0.0], [0.7], [0.0], [0.0]]),
        "labels.3": torch.tensor([[0.0, 0], [0, 0], [1, 0], [0, 0], [0, 0], [0, 0]]),
    }


def by_hand(logits: torch.Tensor, place: str) -> list[torch.Tensor]:
    """The loss of each of the six texts, row by row."""
    batch, losses = make_batch(), []
    for row, part in enumerate(ROWS.tolist()):
        at = 0 if place == "first" else int(LENGTHS[row]) - 1
        labels = batch[f"labels.{part}"][row]
        if part == 0:
            real = labels != -100
            losses.append(F.cross_entropy(logits[row, real, 0:3], labels[real]))
        elif part == 1:
            losses.append(F.cross_entropy(logits[row, at, 3:6][None], labels[None]))
        elif part == 2:
            losses.append((logits[row, at, 6] - labels[0]) ** 2)
        else:
            losses.append(F.binary_cross_entropy_with_logits(logits[row, at, 7:9], labels))
    return losses


def draw_logits() -> torch.Tensor:
    return torch.randn(6, 6, NUM_LABELS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_batch_of_several_tasks_has_the_losses_of_its_texts_by_hand(place: Any) -> None:
    task, logits, batch = several_tasks(join_head(PARTS, place)), draw_logits(), make_batch()
    expected = torch.stack(by_hand(logits, place))
    torch.testing.assert_close(task.loss(logits, batch), expected.mean())
    for row in range(6):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        length = int(LENGTHS[row])
        torch.testing.assert_close(task.loss(logits[row : row + 1, :length], trim(alone)), expected[row])


def test_a_task_learns_in_its_own_rows_of_the_head_alone() -> None:
    task, batch = several_tasks(join_head(PARTS, "first")), make_batch()
    for part, start in enumerate(STARTS):
        own = {name: tensor[part == ROWS] for name, tensor in batch.items()}
        logits = draw_logits()[part == ROWS].requires_grad_()
        task.loss(logits, own).backward()
        assert logits.grad is not None
        touched = torch.nonzero(logits.grad.abs().sum((0, 1))).flatten().tolist()
        assert touched == list(range(start, start + len(PARTS[part].labels)))


def test_a_teacher_s_divergence_is_that_of_each_task() -> None:
    task, batch = several_tasks(join_head(PARTS, "first")), make_batch()
    logits, teacher = draw_logits(), draw_logits().flip(0)
    found = task.divergence(logits, teacher, 2.0, batch)
    rows = []
    for row, part in enumerate(ROWS.tolist()):
        start, size = STARTS[part], len(PARTS[part].labels)
        own, wanted = (each[row, :, start : start + size] for each in (logits, teacher))
        if part == 0:
            real = batch["labels.0"][row] != -100
            kl = F.kl_div((own[real] / 2).log_softmax(-1), (wanted[real] / 2).softmax(-1), reduction="batchmean")
            rows.append(kl * 4)
        elif part == 1:
            kl = F.kl_div((own[0] / 2).log_softmax(-1), (wanted[0] / 2).softmax(-1), reduction="sum")
            rows.append(kl * 4)
        elif part == 2:
            rows.append((own[0, 0] - wanted[0, 0]) ** 2)
        else:
            pairs = [torch.stack([each[0] / 2, torch.zeros(size)], -1) for each in (own, wanted)]
            kl = F.kl_div(pairs[0].log_softmax(-1), pairs[1].softmax(-1), reduction="none").sum(-1).mean()
            rows.append(kl * 4)
    torch.testing.assert_close(found, torch.stack(rows).mean())


def test_weights_of_labels_are_those_of_their_task() -> None:
    weights = (1.0, 1.0, 1.0, 4.0, 1.0, 0.5, 9.0, 9.0, 9.0)
    task, logits = several_tasks(join_head(PARTS, "first"), LabelLoss(weights=weights)), draw_logits()
    expected = by_hand(logits, "first")
    expected[0], expected[4] = expected[0] * 0.5, expected[4] * 4
    torch.testing.assert_close(task.loss(logits, make_batch()), torch.stack(expected).mean())
    with torch.no_grad():
        torch.testing.assert_close(task.loss(logits, make_batch()), torch.stack(by_hand(logits, "first")).mean())


def test_figures_are_those_of_each_task_alone_and_their_mean() -> None:
    head = join_head(PARTS, "last")
    task, batch = several_tasks(head), make_batch()
    logits = draw_logits()
    answers = task.answers(logits, batch)
    figures = {figure.name: figure.value for figure in task.figures([0.5] * 6, answers)}
    said, right = [], []
    for row in (1, 5):
        real = batch["labels.0"][row] != -100
        said.append([PARTS[0].labels[number] for number in logits[row, real, :3].argmax(-1)])
        right.append([PARTS[0].labels[number] for number in batch["labels.0"][row, real]])
    classes = [int(logits[row, LENGTHS[row] - 1, 3:6].argmax()) for row in (0, 4)]
    assert figures["words: entity F1"] == pytest.approx(entity_f1(right, said, zero_division=0))
    assert figures["class: accuracy"] == accuracy_score([2, 0], classes)
    firsts = [figures[name] for name in ("words: entity F1", "class: accuracy", "value: rank correlation")]
    assert figures["mean of tasks"] == pytest.approx((sum(firsts) + figures["sets: micro F1"]) / 4)
    assert next(iter(figures)) == "mean of tasks"
    scores = task.scores(answers)
    assert scores is not None
    assert {each.name.split("/")[0] for each in scores.scores} == {"words", "class", "sets"}
    others = several_tasks(head).answers(logits.flip(1), batch)
    assert task.paired_error(answers, answers) == 0.0
    assert task.paired_error(answers, others) > 0.0


def test_labels_of_which_several_hold_are_not_cut_as_padding_is() -> None:
    """Where a text may have as many labels as its batch has tokens."""
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 1]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    found = trim({"input_ids": mask, "attention_mask": mask, "labels": labels})
    assert found["input_ids"].shape == (2, 2)
    assert torch.equal(found["labels"], labels)


# Data


def write_tasks(folder: Path) -> str:
    """Sets of four kinds, as a recipe names them; words and classes have texts in common."""
    save_bert(folder / "source")
    write_classes(folder)
    write_words(folder)
    for name, count, label in (  # ranks of a handful of values turn over by rounding alone
        ("values", 240, lambda words: len(words) / 7),
        ("sets", 40, lambda words: sorted(set(words) & {*TAGS})),
    ):
        lines = (json.dumps({"text": " ".join([*words, name]), "label": label(words)}) for words in draw_texts(count))
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    kinds = {
        "pets": {"kind": "table", "train": ["rows.jsonl"]},
        "words": {"kind": "conll", "train": ["words.conll"]},
        "lengths": {"kind": "table", "train": ["values.jsonl"]},
        "sets": {"kind": "table", "train": ["sets.jsonl"]},
    }
    return json.dumps({"kind": "tasks", "temperature": 2, "tasks": kinds})


def prepare(folder: Path, source: dict[str, Any]) -> dict[str, Any]:
    (folder / "data").mkdir()
    config = DataConfig(source=TasksData.model_validate(source), block_size=24)
    return prepare_data(folder / "source", folder / "data", config, folder, lambda *_: None)


def test_what_one_task_holds_out_no_task_trains_on(tmp_path: Path) -> None:
    save_bert(tmp_path / "source")
    texts = [" ".join(words) for words in itertools.permutations(("the", "cat", "sat", "on", "mat"), 3)]  # 60
    for name, own in {"a": texts[:40], "a-test": texts[40:50], "b": texts[20:], "b-test": texts[:10]}.items():
        rows = [{"text": text, "label": str(number % 2)} for number, text in enumerate(own)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tasks = {name: {"kind": "table", "train": [f"{name}.jsonl"], "test": [f"{name}-test.jsonl"]} for name in "ab"}
    facts = prepare(tmp_path, {"kind": "tasks", "tasks": tasks})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    read = {split: read_examples(tmp_path / "data", split) for split in ("train", "validation", "test")}
    trained = {tokenizer.decode(ids, skip_special_tokens=True) for ids in read["train"].rows()}
    tested = {tokenizer.decode(ids, skip_special_tokens=True) for ids in read["test"].rows()}
    encoded = [tokenizer(text)["input_ids"] for text in texts[:10] + texts[40:50]]
    assert tested == {tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded}
    validated = {tokenizer.decode(ids, skip_special_tokens=True) for ids in read["validation"].rows()}
    assert not trained & (tested | validated)
    assert not validated & tested
    assert facts["num_shared_with_held_out"] > 10
    assert facts["domains"] == ["a", "b"]


def test_smaller_tasks_are_met_more_often_by_the_temperature(tmp_path: Path) -> None:
    source = json.loads(write_tasks(tmp_path))
    facts = prepare(tmp_path, source)
    examples = read_examples(tmp_path / "data", "train")
    counted = torch.bincount(examples.tensors["parts"]).tolist()
    sizes = [round(count / times) for count, times in zip(counted, facts["repeats"].values(), strict=True)]
    shares = [size**0.5 for size in sizes]
    for count, share in zip(counted, shares, strict=True):
        assert count / sum(counted) == pytest.approx(share / sum(shares), abs=0.01)
    assert max(counted) == max(sizes)  # the largest once
    assert torch.equal(examples.domains, examples.tensors["parts"])
    shutil.rmtree(tmp_path / "data")
    plain = prepare(tmp_path, {**source, "temperature": 1})
    assert set(plain["repeats"].values()) == {1.0}
    assert plain["num_examples"] == {**facts["num_examples"], "train": sum(sizes)}  # what is held out is never repeated


# The whole road


def test_a_recipe_of_several_tasks_runs_to_a_package_that_says_all(tmp_path: Path) -> None:
    from click.testing import CliRunner

    data = write_tasks(tmp_path)
    training = TRAINING[:-1] + ", class_weights: balanced, balance_coefficient: 0.01}"
    recipe = write(tmp_path, data, finetune=training, variants="int8")
    with stages_here():
        finished = dense2moe("run", recipe, "--workdir", tmp_path / "run")
    assert finished.exit_code == 0, finished.stderr
    (folder,) = (tmp_path / "run").glob("report-*")
    facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    names = [figure["name"] for figure in facts["finetune"]["evaluations"]["fine-tuned"]["figures"]]
    assert names[0] == "mean of tasks"
    assert {"pets: accuracy", "words: entity F1", "lengths: rank correlation", "sets: micro F1"} <= set(names)
    assert set(facts["finetune"]["evaluations"]["fine-tuned"]["domain_losses"]) == {"pets", "words", "lengths", "sets"}
    assert facts["variants"]["int8"]["parity"]["passed"]
    assert "Lengths: rank correlation" in (folder / "report.html").read_text(encoding="utf-8")
    result = CliRunner().invoke(main, ["predict", str(tmp_path / "run"), "--text", "cat runs Paris", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["tasks"]
    (checkpoint,) = (tmp_path / "run").glob("finetune-*")
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    assert [each["name"] for each in config.task_heads] == list(said)
    assert set(said["lengths"]) == {"value"}
    assert {each["label"] for each in said["pets"]["labels"]} == {"pet", "none"}
    table = CliRunner().invoke(main, ["predict", str(tmp_path / "run"), "--text", "cat runs Paris"])
    assert all(name in table.output for name in said)
    (card,) = (tmp_path / "run").glob("report-*/cards/int8/README.md")
    assert "task_heads" in card.read_text(encoding="utf-8")


def test_what_each_task_says_is_what_transformers_says_of_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside pipelines on a model for each task: the trunk with the task's rows of the head."""
    where = "dense2moe.export.runtime.prediction"
    monkeypatch.setattr(f"{where}.SinglePass", InTorch)
    monkeypatch.setattr(f"{where}.open_package", lambda _: type("Package", (), {"has_cache": False}))
    save_bert(tmp_path / "dense", initializer_range=0.6, max_position_embeddings=16)
    head = join_head(PARTS, "first")
    config = put_head(
        transformers.BertConfig.from_pretrained(tmp_path / "dense"), "token-classification", head, tmp_path
    )
    torch.manual_seed(0)
    whole = BertForTokenClassification(config).eval()
    whole.save_pretrained(tmp_path / "several")
    word_piece().save_pretrained(tmp_path / "several")
    predictor = Predictor(tmp_path / "several")
    texts = ["the cat sat on a mat", "Barack Obama", " ".join(["cat dog"] * 20)]
    found = list(predictor.read_texts(texts))

    own = PARTS[0].labels
    labels = {"id2label": dict(enumerate(own)), "label2id": {name: number for number, name in enumerate(own)}}
    alone = BertForTokenClassification(transformers.BertConfig.from_pretrained(tmp_path / "dense", **labels)).eval()
    weights = whole.state_dict()
    alone.load_state_dict({name: tensor[:3] if "classifier" in name else tensor for name, tensor in weights.items()})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "several")
    entities = pipeline("token-classification", model=alone, tokenizer=tokenizer, aggregation_strategy="first")
    for prediction, wanted in zip(found[:2], entities(texts[:2]), strict=True):
        stands = [(each.label, each.start, each.end) for each in prediction.tasks["words"].entities]
        assert stands == [(each["entity_group"], each["start"], each["end"]) for each in wanted]
    for text, prediction in zip(texts, found, strict=True):
        with torch.no_grad():
            logits = whole(**tokenizer(text, truncation=True, max_length=16, return_tensors="pt")).logits[0, 0]
        score, number = logits[3:6].softmax(-1).max(0)
        best = prediction.tasks["class"].labels[0]
        assert (best.label, best.score) == (PARTS[1].labels[int(number)], pytest.approx(float(score), rel=1e-4))
        assert prediction.tasks["value"].value == pytest.approx(float(logits[6]), rel=1e-4)
        assert {each.label for each in prediction.tasks["sets"].labels} == {
            name for name, logit in zip("ab", logits[7:9], strict=True) if logit > 0
        }
    assert [prediction.is_cut for prediction in found] == [False, False, True]
    assert max(each.end for each in found[2].tasks["words"].entities) > len(texts[2]) // 2  # to its end, in strides
    (pair,) = predictor.read_texts(["cat"], ["dog"])
    assert set(pair.tasks) == {"class", "value", "sets"}
    (empty,) = predictor.read_texts(["..."])
    assert len(empty.tasks) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tasks: tasks.pop("pets") and [tasks.pop(name) for name in ("lengths", "sets")], "2"),
        (lambda tasks: tasks["pets"].update(test=["sets.jsonl"]), "is also a file of data.source.tasks.sets.train"),
        (lambda tasks: tasks["pets"].update(label="none"), "has no column 'none'"),
        (lambda tasks: tasks.update(pictures={"kind": "digits"}), "digits"),
        (lambda tasks: tasks.update(pictures={"kind": "hub-table", "path": "a/b", "image": "image"}), "reads images"),
    ],
)
def test_tasks_that_cannot_be_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    source = json.loads(write_tasks(tmp_path))
    change(source["tasks"])
    assert said in check(tmp_path, json.dumps(source))


def test_a_task_of_one_label_is_named(tmp_path: Path) -> None:
    source = json.loads(write_tasks(tmp_path))
    write_classes(tmp_path, labels=("same",))
    assert "data.source.tasks.pets: every label is 'same'" in check(tmp_path, json.dumps(source))


def test_two_tasks_whose_labels_have_one_name_are_refused(tmp_path: Path) -> None:
    save_bert(tmp_path / "source")
    for file, labels in {"one": ("b/c", "d"), "other": ("c", "e")}.items():
        rows = [{"text": f"{file} {number}", "label": labels[number % 2]} for number in range(40)]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files = {"a": "one.jsonl", "a/b": "other.jsonl"}
    tasks = {name: {"kind": "table", "train": [file]} for name, file in files.items()}
    said = check(tmp_path, json.dumps({"kind": "tasks", "tasks": tasks}))
    assert "data.source.tasks.a/b: its label 'c' and one of 'a' are both 'a/b/c' in the shared head" in said


def test_a_decoder_learns_several_tasks_at_its_last_tokens(tmp_path: Path) -> None:
    """Its config keeps keys and values, which a layer that is computed twice must not read of itself."""
    data = write_tasks(tmp_path)
    make_gpt2(len(AutoTokenizer.from_pretrained(tmp_path / "source"))).save_pretrained(tmp_path / "source")
    recipe = write(tmp_path, data)
    with stages_here():
        finished = dense2moe("run", recipe, "--workdir", tmp_path / "run", "--until", "finetune")
    assert finished.exit_code == 0, finished.stderr
    (config,) = (tmp_path / "run").glob("finetune-*/config.json")
    assert json.loads(config.read_text(encoding="utf-8"))["use_cache"]
