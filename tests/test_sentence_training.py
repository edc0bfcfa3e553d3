"""Training of vectors: by recipes to their reports, and as users break it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import ROWS
from programs import dense2moe, stages_here
from test_label_training import TRAINING, check, save_bert, write
from transformers import AutoModel, BertModel

from dense2moe.api import DataConfig, ExpertsConfig, FinetuneConfig, UpcycleConfig, finetune, prepare_data, upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.tasks.head import RANKING, VECTORS, LabelHead

NAMES = ("input_ids", "attention_mask", "labels")


@pytest.fixture(scope="module", autouse=True)
def _stages_here() -> Iterator[None]:
    with stages_here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense2moe.convert.report.writer.draw_pictures", lambda facts, rows: [])
        yield


ANIMALS = ("red cat", "blue dog", "green bird")


def write_sentences(folder: Path, **columns: Any) -> str:
    """Pairs about the same animal, or of a score; a table of some of their columns."""
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(60):
            about, other = draw.sample(ANIMALS, 2)
            is_same = number % 2
            row = {
                "text": f"n{number} the {about} runs",
                "pair": f"a {about if is_same or 'score' not in columns else other} sleeps in Paris n{number}",
                "score": 5.0 if is_same else 1.0,
                "negative": f"n{number} {other}",
            }
            file.write(json.dumps(row) + "\n")
    return json.dumps({"kind": "sentences", "train": ["rows.jsonl"], **columns})


KINDS = {
    "scores": ({"score": "score", "highest_score": 5}, "rank correlation"),
    "pairs": ({}, "MRR"),
    "triplets": ({"negative": "negative"}, "MRR"),
}


def read_width(package: Path) -> int:
    """The hidden size of a package's model."""
    width: int = json.loads((package / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    return width


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_of_sentences_runs_to_its_report(kind: str, tmp_path: Path) -> None:
    columns, figure = KINDS[kind]
    save_bert(tmp_path / "source", **({"architecture": "BertModel"} if kind != "pairs" else {}))
    recipe = write(
        tmp_path, write_sentences(tmp_path, **columns), variants="float32, int8" if kind == "scores" else "int8"
    )
    finished = dense2moe("run", recipe, "--workdir", tmp_path / "run")
    assert finished.exit_code == 0, finished.stderr
    (folder,) = (tmp_path / "run").glob("report-*")
    facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert facts["finetune"]["evaluations"]["fine-tuned"]["figures"][0]["name"] == figure
    for found in facts["variants"].values():
        assert found["parity"]["passed"], finished.stdout
        (checked,) = found["parity"]["providers"]["CPUExecutionProvider"]["tasks"]
        assert (checked["name"], checked["metric"]) == ("feature-extraction", figure)
    for package in (tmp_path / "run").glob("onnx-*"):
        assert (package / "modules.json").is_file()
    assert dense2moe("package", tmp_path / "run", tmp_path / "out", "--variant", "int8").exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'SentenceTransformer(".", backend="onnx")' in card
    assert "a vector is their pooling: mean" in card
    said = dense2moe("predict", tmp_path / "out", "--text", "a red cat", "--json")
    assert len(json.loads(said.stdout)["vector"]) == read_width(tmp_path / "out")


@pytest.mark.parametrize(
    ("finetune", "said"),
    [
        ("null", "finetune: is null, and the checkpoint, a BertForMaskedLM, has no head for feature-extraction"),
        (TRAINING[:-1] + ", class_weights: balanced}", "finetune.class_weights: is 'balanced', and texts have vectors"),
        (TRAINING[:-1] + ", label_smoothing: 0.1}", "finetune.label_smoothing: is 0.1, and texts have vectors"),
        (TRAINING[:-1] + ", gradient_accumulation_steps: 8}", "finetune.batch_size: is 8, in 8 parts; a text is told"),
        (TRAINING[:-1] + ", distillation: {temperature: 2}}", "distillation.temperature: is 2, and texts have vectors"),
        (TRAINING[:-1] + ", train: prompt}", "is 'prompt', and the data has labels"),
    ],
)
def test_settings_that_vectors_cannot_have_are_refused(finetune: str, said: str, tmp_path: Path) -> None:
    save_bert(tmp_path / "source")
    assert said in check(tmp_path, write_sentences(tmp_path), finetune=finetune)


def test_a_model_whose_vectors_are_made_otherwise_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    source = save_bert(tmp_path / "source", "BertModel")
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in ("Transformer", "Dense")]
    (source / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    assert "has a module of type 'Dense'" in check(tmp_path, write_sentences(tmp_path))


def prepare(folder: Path, **columns: Any) -> Path:
    """Data for a dense model in `folder/source`."""
    source = json.loads(write_sentences(folder, **columns))
    config = DataConfig.model_validate({"source": source | {"train": [str(folder / "rows.jsonl")]}, "block_size": 24})
    prepare_data(folder / "source", folder / "data", config)
    return folder / "data"


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "modernbert"])
def test_vectors_of_a_masked_model_are_those_that_transformers_has(family: str, tmp_path: Path) -> None:
    """Its layers without its head, with padding, and whatever names files have."""
    model = ROWS[family].make()
    assert type(model).__name__.endswith("ForMaskedLM")
    model.save_pretrained(tmp_path)
    mask = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    given = {
        "input_ids": torch.randint(5, 40, (2, 8), generator=torch.Generator().manual_seed(0)),
        "attention_mask": mask,
    }
    found = load_model(tmp_path, torch.float32, VECTORS, LabelHead((), RANKING))
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(tmp_path).eval()(**given).last_hidden_state
        torch.testing.assert_close(found(**given).last_hidden_state, wanted)


def make_mixture(folder: Path) -> Path:
    """A mixture whose vectors are not its dense model's, as its experts have been moved."""
    config = UpcycleConfig(num_experts=2, num_experts_per_tok=1, experts=ExpertsConfig(noise=4.0))
    upcycle(folder / "source", folder / "mixture", config)
    return folder / "mixture"


def test_texts_alone_have_the_vectors_of_the_dense_model(tmp_path: Path) -> None:
    """By transformers, each read alone; in their order, whatever batches they were read in."""
    save_bert(tmp_path / "source", "BertModel")
    model = BertModel.from_pretrained(tmp_path / "source").eval()
    for split in ("train", "test"):
        examples = read_examples(prepare(tmp_path, pair=None) if split == "train" else tmp_path / "data", split)
        assert examples.ids.shape[:2] == (len(examples), 1)
        for ids, mask, vector in zip(*(examples.tensors[name] for name in NAMES), strict=True):
            with torch.no_grad():
                hidden = model(input_ids=ids[:, : int(mask.sum())]).last_hidden_state
            torch.testing.assert_close(vector, hidden[0].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("columns", "distillation"), [({"pair": None}, None), ({}, {"weight": 1.0})], ids=["texts", "pairs"]
)
def test_a_mixture_learns_the_vectors_of_its_dense_model(
    columns: dict[str, Any], distillation: dict[str, float] | None, tmp_path: Path
) -> None:
    save_bert(tmp_path / "source", "BertModel")
    data, mixture = prepare(tmp_path, **columns), make_mixture(tmp_path)
    config = FinetuneConfig.model_validate(
        {
            "steps": 24,
            "eval_steps": 12,
            "warmup_steps": 1,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "control": False,
            "distillation": distillation,
        }
    )
    facts = finetune(tmp_path / "source", mixture, data, tmp_path / "trained", config)
    told = [step.distillation_loss if distillation else step.train_loss for step in facts.history]
    losses = [loss for loss in told if loss is not None]
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "trained" / "1_Pooling" / "config.json").is_file()
    if distillation is None:
        before, after = (facts.evaluations[name].figures[0].value for name in ("upcycled", "fine-tuned"))
        assert facts.evaluations["dense"].figures[0].value == pytest.approx(1.0, abs=1e-5)
        assert 1 - after < (1 - before) / 2
