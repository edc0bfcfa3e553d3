"""Every host as ONNX in float32, beside transformers: one row, and three rows with padding."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from families_page import NONE, check_figure, find_figure
from hosts import ROWS
from shapes import each_shape
from test_hosts import PLAIN, convert, ignore, save_dense
from transformers import PreTrainedModel

from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.storage import find_graph
from dense2moe.upcycle.checkpoints.loaded import load_model

pytest.importorskip("onnxscript")
DIFFERENT = {**PLAIN, "experts": {"noise": 0.3}}  # experts that differ: no wrong one can pass for another
ONNX = "ONNX float32"
SAMPLES = 4000  # of sound
_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def draw(session: ort.InferenceSession, model: PreTrainedModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs of a graph, without a past; of several rows the first is padded, on the left before a cache."""
    generator = torch.Generator().manual_seed(rows)
    has_cache = any(value.name.startswith("past") for value in session.get_inputs())
    mask = torch.ones(rows, length, dtype=torch.int64)
    if rows > 1:
        mask[0, : length // 2 if has_cache else 0] = 0
        mask[0, length if has_cache else length // 2 :] = 0
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 2) or 2)
    texts = {
        "input_ids": torch.randint(5, min(vocabulary, 90), (rows, length), generator=generator)
        if vocabulary > 5
        else mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "token_type_ids": (torch.arange(length) >= length // 2).long().repeat(rows, 1),
    }
    return {
        value.name: texts[value.name]
        if value.name in texts
        else torch.randn(
            [rows, *(size if isinstance(size, int) else 4000 for size in value.shape[1:])], generator=generator
        )
        for value in session.get_inputs()
        if not value.name.startswith("past")
    }


class Writer:
    """The graphs of an encoder and a decoder, run as whoever has read optimum's names would run them."""

    def __init__(self, package: Path) -> None:
        providers = ["CPUExecutionProvider"]
        self.encoder = ort.InferenceSession(package / "onnx" / "encoder_model.onnx", providers=providers)
        self.decoder = ort.InferenceSession(package / "onnx" / "decoder_model_merged.onnx", providers=providers)

    def write(self, given: dict[str, torch.Tensor], pieces: list[torch.Tensor]) -> torch.Tensor:
        """Logits of tokens that are fed piece by piece; the encoder is asked once."""
        read = {value.name: given[value.name].numpy() for value in self.encoder.get_inputs()}
        known = {"encoder_hidden_states": self.encoder.run(["last_hidden_state"], read)[0]}
        if "attention_mask" in read:
            known["encoder_attention_mask"] = read["attention_mask"]
        rows = len(pieces[0])
        states = {
            value.name: np.zeros([rows, value.shape[1], 0, value.shape[3]], np.float32)
            for value in self.decoder.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        names = [value.name for value in self.decoder.get_outputs()]
        logits = []
        for number, ids in enumerate(pieces):
            flag = {"input_ids": ids.numpy(), "use_cache_branch": np.array([number > 0])}
            found = dict(zip(names, self.decoder.run(names, {**known, **states, **flag}), strict=True))
            logits.append(torch.from_numpy(found.pop("logits")))
            for name, value in found.items():
                if number == 0 or ".decoder." in name:  # those of the encoder's output are given once
                    states[name.replace("present", "past_key_values")] = value
        return torch.cat(logits, 1)


def run(session: ort.InferenceSession, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A graph's outputs, with an empty past where it has one."""
    rows = len(next(iter(given.values())))
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        kind = _TYPES[value.type]
        past = [rows, value.shape[1], 0, value.shape[3]] if value.name.startswith("past") else []
        feeds[value.name] = np.zeros(past, kind) if past else given[value.name].numpy().astype(kind)
    names = [value.name for value in session.get_outputs() if not value.name.startswith("present")]
    return {name: torch.from_numpy(found) for name, found in zip(names, session.run(names, feeds), strict=True)}


def count_positions(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Positions behind padding, which a decoder's graph counts itself."""
    takes = "position_ids" in inspect.signature(model.forward).parameters and model.can_generate()
    if not takes or "position_ids" in given or "attention_mask" not in given:
        return {}
    return {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def measure_pair(package: Path, model: PreTrainedModel) -> float:
    """The largest difference of any logit, relative to the largest: prefill, steps with a cache, padded rows."""
    writer, worst = Writer(package), 0.0
    for rows, length in ((1, 7), (3, 18)):
        given = draw(writer.encoder, model, rows, length)
        ids = torch.randint(5, 90, (rows, 6), generator=torch.Generator().manual_seed(rows))
        expected = model(**given, decoder_input_ids=ids).logits
        found = writer.write(given, [ids[:, :3], *ids[:, 3:].split(1, 1)])
        assert expected.shape == found.shape
        worst = max(worst, float((expected - found).abs().max() / expected.abs().max()))
    return worst


@torch.no_grad()
def measure(package: Path, model: PreTrainedModel) -> float:
    """The largest difference of any output at a real token, relative to that output's largest number."""
    if find_graph(package, "encoder_model.onnx").exists():
        return measure_pair(package, model)
    session = ort.InferenceSession(find_graph(package), providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows, length in ((1, 7), (3, 18)):
        given = draw(session, model, rows, length)
        positions = count_positions(model, given)
        expected, found = model(**given, **positions), run(session, given)
        assert found
        for name, value in found.items():
            own, mask = expected[name], given.get("attention_mask")
            if mask is not None and own.shape[:2] == mask.shape:
                own, value = own[mask.bool()], value[mask.bool()]
            assert own.shape == value.shape
            worst = max(worst, float((own - value).abs().max() / own.abs().max()))
    return worst


@pytest.mark.parametrize("name", each_shape(ROWS, {"distilbert", "t5"}))
def test_a_float32_package_gives_what_transformers_does(name: str, tmp_path: Path) -> None:
    """Within 1e-4, by plain onnxruntime; what cannot be written is refused, and the page says so."""
    plan = convert(save_dense(tmp_path / "dense", name), tmp_path / "moe", DIFFERENT)
    line = name, ROWS[name].architecture, plan.conversion.target_name
    twin, package = tmp_path / "twin", tmp_path / "package"
    twin.mkdir()
    package.mkdir()
    try:
        quantize_checkpoint(tmp_path / "moe", twin, "float32", QuantizeConfig(), ignore)
        write_package(twin, package, OnnxConfig(lowering="grouped"), ignore)
    except ExportError as refusal:
        refused = str(refusal)
    else:
        refused = ""
    if refused:
        assert find_figure(line, ONNX) == NONE, refused
        return
    error = measure(package, load_model(twin, torch.float32, plan.conversion.family.task))
    assert error < 1e-4
    check_figure(line, ONNX, error)
