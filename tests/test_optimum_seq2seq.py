"""Packages of an encoder and a decoder write text in optimum, loaded as its users load a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import ask_client
from test_hosts import PLAIN, convert, ignore, save_dense

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.variant import Variant
from dense2moe.upcycle.checkpoints.loaded import load_model

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.optimum
NEW_TOKENS = 12

# What a user writes. Of heads that are no equal shares of the hidden size optimum-onnx 0.1.0 has to be told the size.
SCRIPT = """
import json, sys
import optimum.onnxruntime as ort
import torch

written = {}
for package, name, given, options, head_size in json.loads(sys.argv[1]):
    model = getattr(ort, name).from_pretrained(package)
    if head_size is not None:
        model.decoder.embed_size_per_head = head_size
    ids = model.generate(**{key: torch.tensor(value) for key, value in given.items()}, **options)
    written[package] = {"ids": ids.tolist(), "merged": model.decoder.is_merged, "cached": model.can_use_cache}
print(json.dumps(written))
"""


@dataclass(frozen=True)
class Case:
    """A tiny model, optimum's class for it, and how it writes."""

    row: str
    client: str = "ORTModelForSeq2SeqLM"
    variant: Variant = "float32"
    values: Mapping[str, Any] = field(default_factory=dict)
    num_beams: int = 1
    head_size: int | None = None

    @property
    def name(self) -> str:
        return "-".join([self.row, self.variant, *map(str, self.values.values())])


T5 = {"initializer_factor": 3.0, "num_decoder_layers": 2}  # transformers generates with as many layers on both sides
CASES = (
    Case("t5", values=T5),
    Case("t5", variant="int4", values={**T5, "d_kv": 16}, head_size=16),
    Case("bart", variant="int8", values={"init_std": 0.3}, num_beams=3),
    Case("whisper", "ORTModelForSpeechSeq2Seq", values={"init_std": 0.3}),
)


def list_inputs(case: Case) -> dict[str, torch.Tensor]:
    """Three texts, two of them padded; or two sounds."""
    generator = torch.Generator().manual_seed(1)
    if case.row == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator)}
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 2 + [0] * 7])
    return {"input_ids": torch.randint(5, 90, (3, 9), generator=generator), "attention_mask": mask}


def list_options(case: Case) -> dict[str, Any]:
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return {**length, "do_sample": False, "num_beams": case.num_beams, "no_repeat_ngram_size": 1}


@dataclass(frozen=True)
class Written:
    """What optimum wrote of each package, and where packages and twins lie."""

    folder: Path
    answers: dict[str, Any]

    def answer(self, case: Case) -> dict[str, Any]:
        found: dict[str, Any] = self.answers[str(self.folder / case.name / "package")]
        return found


def export(folder: Path, case: Case) -> None:
    """A dense model, its mixture, twin and package."""
    folder.mkdir()
    source = save_dense(folder / "dense", case.row, **case.values)
    plan = convert(source, folder / "moe", {**PLAIN, "experts": {"noise": 0.3}})
    (folder / "task.json").write_text(json.dumps(plan.conversion.family.task))
    for name in ("twin", "package"):
        (folder / name).mkdir()
    quantize_checkpoint(folder / "moe", folder / "twin", case.variant, QuantizeConfig(block_size=16), ignore)
    write_package(folder / "twin", folder / "package", OnnxConfig(lowering="grouped", activation_bits=32), ignore)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """All packages in one process of the other environment, since importing takes longer than they do."""
    folder = tmp_path_factory.mktemp("seq2seq")
    wishes = []
    for case in CASES:
        export(folder / case.name, case)
        given = {name: value.tolist() for name, value in list_inputs(case).items()}
        wishes.append((str(folder / case.name / "package"), case.client, given, list_options(case), case.head_size))
    return Written(folder, ask_client(SCRIPT, json.dumps(wishes)))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_optimum_writes_what_transformers_writes(written: Written, case: Case) -> None:
    """Greedily or by beams, padded texts too, with the cache of the merged decoder."""
    folder, answer = written.folder / case.name, written.answer(case)
    model = load_model(folder / "twin", torch.float32, json.loads((folder / "task.json").read_text()))
    expected = model.generate(**list_inputs(case), **list_options(case)).tolist()
    assert answer["ids"] == expected
    assert len({tuple(row) for row in expected}) > 1
    assert (answer["merged"], answer["cached"]) == (True, True)
