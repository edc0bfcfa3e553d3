"""What `predict` says is what transformers' own pipelines say of the torch model; long texts are read to their end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from hosts import ROWS
from PIL import Image
from test_hosts import PLAIN, convert, ignore
from test_words import word_piece
from transformers import AutoTokenizer, PreTrainedTokenizerFast, ViTImageProcessor, pipeline

from dense2moe.convert.cli import main
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.prediction import Predictor
from dense2moe.upcycle.checkpoints.pooling_files import read_pooling
from dense2moe.upcycle.errors import UpcycleError

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TEXTS = ["the cat sat on a mat", "Barack Obama was born in Honolulu", "unbelievable internationalization"]


def save(folder: Path, architecture: str, labels: tuple[str, ...] = (), **values: Any) -> Path:
    """A model of random weights that tell labels apart, with its tokenizer."""
    torch.manual_seed(1)
    named = {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    model = ROWS["bert"].make(architecture, vocab_size=90, initializer_range=0.6, **(named if labels else {}), **values)
    model.save_pretrained(folder)
    word_piece().save_pretrained(folder)
    return folder


class InTorch:
    """The torch model of a directory in the place of a graph."""

    def __init__(self, directory: Path, _: str) -> None:
        config = transformers.AutoConfig.from_pretrained(directory)
        self.model = getattr(transformers, config.architectures[0]).from_pretrained(directory).eval()

    def run(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return dict(self.model(**given).items())


@pytest.fixture(autouse=True)
def _torch_for_onnx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "with_onnx" not in request.fixturenames:
        where = "dense2moe.export.runtime.prediction"
        monkeypatch.setattr(f"{where}.SinglePass", InTorch)
        monkeypatch.setattr(f"{where}.open_package", lambda _: SimpleNamespace(has_cache=False))


def test_labels_and_their_probabilities(tmp_path: Path) -> None:
    directory = save(tmp_path, "BertForSequenceClassification", ("bad", "fair", "good"))
    said = pipeline("text-classification", model=str(directory), top_k=None)(TEXTS)
    for found, wanted in zip(Predictor(directory).read_texts(TEXTS), said, strict=True):
        assert [each.label for each in found.labels] == [each["label"] for each in wanted]
        assert [each.score for each in found.labels] == pytest.approx([each["score"] for each in wanted], rel=1e-5)


def test_several_labels_are_those_above_one_half(tmp_path: Path) -> None:
    directory = save(
        tmp_path, "BertForSequenceClassification", ("a", "b", "c"), problem_type="multi_label_classification"
    )
    said = pipeline("text-classification", model=str(directory), top_k=None)(TEXTS)
    for found, wanted in zip(Predictor(directory).read_texts(TEXTS), said, strict=True):
        assert {each.label for each in found.labels} == {each["label"] for each in wanted if each["score"] > 0.5}


def test_pairs_are_read_with_their_types(tmp_path: Path) -> None:
    directory = save(tmp_path, "BertForSequenceClassification", ("no", "yes"))
    pairs = [{"text": first, "text_pair": TEXTS[0]} for first in TEXTS]
    said = pipeline("text-classification", model=str(directory))(pairs)
    found = list(Predictor(directory).read_texts(TEXTS, [TEXTS[0]] * 3))
    assert [each.labels[0].label for each in found] == [each["label"] for each in said]
    assert [each.labels[0].score for each in found] == pytest.approx([each["score"] for each in said], rel=1e-5)


def test_entities_stand_where_transformers_finds_them(tmp_path: Path) -> None:
    directory = save(tmp_path, "BertForTokenClassification", TAGS)
    said = pipeline("token-classification", model=str(directory), aggregation_strategy="first")(TEXTS)
    for found, wanted in zip(Predictor(directory).read_texts(TEXTS), said, strict=True):
        assert [(each.label, each.start, each.end) for each in found.entities] == [
            (each["entity_group"], each["start"], each["end"]) for each in wanted
        ]
        scores = [each["score"] for each in wanted]
        assert [each.score for each in found.entities] == pytest.approx(scores, rel=1e-4)
    assert any(found for found in said)


def test_words_for_a_mask(tmp_path: Path) -> None:
    directory = save(tmp_path, "BertForMaskedLM")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(directory)
    text = "the cat [MASK] on a mat"
    said = pipeline("fill-mask", model=str(directory))(text)
    (found,) = Predictor(directory).read_texts([text])
    assert [each.score for each in found.labels] == pytest.approx([each["score"] for each in said], rel=1e-4)
    with pytest.raises(ExportError, match="has 0 masks; must have one"):
        list(Predictor(directory).read_texts(["the cat"]))


POOLED: dict[str, Any] = {
    "cls_token": lambda hidden: hidden[0],
    "max_tokens": lambda hidden: torch.stack([column.max() for column in hidden.T]),
    "mean_tokens": lambda hidden: sum(hidden) / len(hidden),
    "mean_sqrt_len_tokens": lambda hidden: sum(hidden) / math.sqrt(len(hidden)),
    "weightedmean_tokens": lambda hidden: sum(n * row for n, row in enumerate(hidden, 1)) / sum(range(len(hidden) + 1)),
    "lasttoken": lambda hidden: hidden[-1],
}
"""By hand, and in the order in which sentence-transformers puts several behind each other."""


def save_pooling(directory: Path, settings: Any, kinds: Sequence[str] = ("Transformer", "Pooling")) -> None:
    """Settings as sentence-transformers writes them."""
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": paths.get(kind, "2")} for kind in kinds]
    (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")


@pytest.mark.parametrize(
    ("modes", "normalizes"),
    [*(((mode,), mode == "mean_tokens") for mode in POOLED), (("mean_tokens", "cls_token"), True)],
)
def test_vectors_are_pooled_as_the_settings_beside_the_model_say(
    modes: tuple[str, ...], normalizes: bool, tmp_path: Path
) -> None:
    directory = save(tmp_path, "BertModel")
    settings = {f"pooling_mode_{name}": name in modes for name in POOLED}
    save_pooling(directory, settings, ("Transformer", "Pooling", *(["Normalize"] if normalizes else [])))
    tokenizer, model = (
        AutoTokenizer.from_pretrained(directory),
        transformers.BertModel.from_pretrained(directory).eval(),
    )
    for text, found in zip(TEXTS, Predictor(directory).read_texts(TEXTS), strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        wanted = torch.cat([pool(hidden) for name, pool in POOLED.items() if name in modes])
        wanted = wanted / wanted.norm() if normalizes else wanted
        torch.testing.assert_close(torch.tensor(found.vector), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("named", "modes"), [("lasttoken", ("lasttoken",)), (["mean", "cls"], ("mean", "cls"))])
def test_newer_settings_name_their_modes(named: Any, modes: tuple[str, ...], tmp_path: Path) -> None:
    save_pooling(tmp_path, {"pooling_mode": named})
    assert read_pooling(tmp_path).modes == modes


@pytest.mark.parametrize(
    ("settings", "kinds", "said"),
    [
        ({"pooling_mode": "attention"}, ("Pooling",), "its pooling is ['attention']; must be one or more of cls, max"),
        ({"pooling_mode_cls_token": False}, ("Pooling",), "its pooling is []"),
        ([], ("Pooling",), "holds a list; must hold a dict"),
        ({"pooling_mode": "mean"}, ("Pooling", "Dense"), "has a module of type 'Dense'"),
    ],
)
def test_vectors_that_would_be_others_are_refused(
    settings: Any, kinds: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    directory = save(tmp_path, "BertModel")
    save_pooling(directory, settings, kinds)
    with pytest.raises(UpcycleError) as excinfo:
        Predictor(directory)
    assert said in str(excinfo.value)
    classifier = save(tmp_path / "other", "BertForMaskedLM")
    save_pooling(classifier, settings, kinds)  # whose vectors nobody asks for
    assert Predictor(classifier).task == "fill-mask"


@dataclass
class ByToken:
    """A model that labels each token by its id, whatever stands around; it reads 16 at most."""

    longest: int = 0

    def run(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = given["input_ids"]
        self.longest = max(self.longest, ids.shape[1])
        return {"logits": torch.nn.functional.one_hot(ids % len(TAGS), len(TAGS)).float() * 9}


@pytest.mark.parametrize("num_words", [1, 11, 12, 13, 14, 15, 40, 101])
def test_a_long_text_is_read_to_its_end_and_each_word_once(num_words: int, tmp_path: Path) -> None:
    directory = save(tmp_path, "BertForTokenClassification", TAGS, max_position_embeddings=16)
    predictor, model, tokenizer = Predictor(directory), ByToken(), AutoTokenizer.from_pretrained(directory)
    predictor._reader.text_pass.model = model
    words = (" ".join(TEXTS) + " " * 3).split()
    text = "  ".join(words[number % len(words)] for number in range(num_words))
    (found,) = predictor.read_texts([text])
    assert model.longest <= 16
    expected, place = [], 0
    for word in text.split():
        start = text.index(word, place)
        place = start + len(word)
        tag = TAGS[tokenizer(word, add_special_tokens=False)["input_ids"][0] % len(TAGS)]
        expected.append((tag, start, place))
    joined: list[list[Any]] = []
    for before, (tag, start, end) in zip(["O", *(each[0] for each in expected)], expected, strict=False):
        if tag == "O":
            continue
        if tag[0] == "I" and before[2:] == tag[2:]:
            joined[-1][2] = end
        else:
            joined.append([tag[2:], start, end])
    assert [[each.label, each.start, each.end] for each in found.entities] == joined


def test_a_text_that_is_cut_is_told(tmp_path: Path) -> None:
    directory = save(tmp_path, "BertForSequenceClassification", ("no", "yes"), max_position_embeddings=16)
    short, long = Predictor(directory).read_texts(["the cat", "the cat " * 40])
    assert (short.is_cut, long.is_cut) == (False, True)
    assert "is_cut" not in short.describe()


def test_what_the_package_cannot_read_is_one_line(tmp_path: Path) -> None:
    predictor = Predictor(save(tmp_path, "BertForSequenceClassification", ("no", "yes")))
    with pytest.raises(ExportError, match="reads text; give texts"):
        list(predictor.read_images([tmp_path / "a.png"]))
    with pytest.raises(ExportError, match="2 texts and 1 second texts; must be as many"):
        list(predictor.read_texts(["a", "b"], ["c"]))
    with pytest.raises(ExportError, match="answers no questions; give what it reads"):
        list(predictor.read_questions(["a"], ["b"]))
    with pytest.raises(ExportError, match="is for no known task; predict reads packages for"):
        Predictor(save(tmp_path / "next", "BertForNextSentencePrediction"))


@pytest.mark.usefixtures("with_onnx")
def test_the_command_reads_images_by_a_package(tmp_path: Path) -> None:
    """A package of onnxruntime, beside the pipeline on the torch model that it was made from."""
    torch.manual_seed(0)
    labels = {"id2label": {0: "cat", 1: "dog", 2: "fish"}, "label2id": {"cat": 0, "dog": 1, "fish": 2}}
    model = ROWS["vit"].make("ViTForImageClassification", num_hidden_layers=1, initializer_range=0.3, **labels)
    model.save_pretrained(tmp_path / "dense")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", PLAIN)
    for name in ("twin", "package"):
        (tmp_path / name).mkdir()
    quantize_checkpoint(tmp_path / "moe", tmp_path / "twin", "float32", QuantizeConfig(), ignore)
    write_package(tmp_path / "twin", tmp_path / "package", OnnxConfig(lowering="grouped"), ignore)
    images = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(images):
        Image.new("RGB", (20, 20), (200 * number, 90, 10)).save(path)
    said = pipeline("image-classification", model=str(tmp_path / "dense"))([Image.open(path) for path in images])
    result = CliRunner().invoke(main, ["predict", str(tmp_path / "package"), *map(str, images), "--json"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for line, path, wanted in zip(lines, images, said, strict=True):
        assert line["input"] == str(path)
        assert [each["label"] for each in line["labels"]] == [each["label"] for each in wanted]
        scores = [each["score"] for each in wanted]
        assert [each["score"] for each in line["labels"]] == pytest.approx(scores, abs=1e-5)
    table = CliRunner().invoke(main, ["predict", str(tmp_path / "package"), str(images[0])])
    assert said[0][0]["label"] in table.stdout
    refused = CliRunner().invoke(main, ["predict", str(tmp_path / "package")])
    assert refused.exit_code == 1
    assert "nothing to read; give --text, or files" in refused.output


@pytest.fixture
def with_onnx() -> None:
    """Packages are real ones."""
