"""The lowering is chosen by measurement, on a part of the model, and nothing of that is left."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dense2moe.export import timing
from dense2moe.export.graph.config import OnnxConfig, RequestConfig
from dense2moe.export.graph.decoder import Cut, build_decoder, find_candidates
from dense2moe.export.lowering import GROUPED
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.speed import Speed
from dense2moe.export.storage import LOWERING_KEY
from dense2moe.export.variant import Variant


class Named(Decoder):
    """Knows the lowering that its package was written with, by the folder's name."""

    def __init__(self, directory: Path, provider: str) -> None:
        super().__init__(directory, provider)
        self.name = directory.name


REQUEST = {"request": RequestConfig(prompt_tokens=8, new_tokens=2)}


def silent(*_: Any) -> None:
    pass


def quantized(mixture: Path, directory: Path, variant: Variant = "float32") -> Twin:
    (directory / "twin").mkdir()
    quantize_checkpoint(mixture, directory / "twin", variant, QuantizeConfig(method="search", block_size=16), silent)
    return Twin(directory / "twin")


@pytest.mark.parametrize("variant", ["float32", "int8", "int4"])
def test_every_candidate_is_timed_and_the_fastest_written(
    mixture_checkpoint: Path, tmp_path: Path, variant: Variant
) -> None:
    twin = quantized(mixture_checkpoint, tmp_path, variant)
    (tmp_path / "package").mkdir()
    config = OnnxConfig(**REQUEST)
    facts = write_package(twin.directory, tmp_path / "package", config, silent)
    assert {time.lowering for time in facts.timings} == {lowering.name for lowering in find_candidates(twin, config)}
    assert len(facts.timings) == 3
    seconds = [time.request_seconds for time in facts.timings]
    assert seconds == sorted(seconds)
    assert facts.lowering == facts.timings[0].lowering
    for time in facts.timings:
        expected = 8 / time.prefill_tokens_per_second + 2 / time.decode_tokens_per_second
        assert time.request_seconds == pytest.approx(expected)
    assert not [path for path in (tmp_path / "package").iterdir() if path.is_dir()], "what was timed is gone"


def test_the_request_decides_between_a_fast_prefill_and_fast_decoding(
    mixture_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = quantized(mixture_checkpoint, tmp_path)
    speeds = {"moe": Speed(100.0, 50.0), "grouped": Speed(1000.0, 10.0), "unrolled": Speed(100.0, 10.0)}
    monkeypatch.setattr(timing, "measure_speed", lambda decoder, *_, **__: speeds[decoder.name])
    monkeypatch.setattr(timing, "Decoder", Named)
    for prompt, new, fastest in ((8, 64, "moe"), (64, 1, "grouped")):
        package = tmp_path / fastest
        package.mkdir()
        facts = write_package(
            twin.directory, package, OnnxConfig(request=RequestConfig(prompt_tokens=prompt, new_tokens=new)), silent
        )
        assert facts.lowering == fastest
        assert facts.timings[-1].lowering == "unrolled"
        assert LOWERING_KEY.encode() in (package / "model.onnx").read_bytes()


def test_candidates_take_turns_with_one_of_them_in_memory(
    mixture_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Decoder]] = []
    turns: list[str] = []

    def measure(decoder: Named, *_: Any, **__: Any) -> Speed:
        assert [ref() for ref in alive] == [None] * len(alive), "the one before is gone"
        alive.append(weakref.ref(decoder))
        turns.append(decoder.name)
        prefill = {"moe": (1.0, 30.0, 2.0), "grouped": (3.0, 3.0, 3.0), "unrolled": (1.0, 1.0, 50.0)}
        return Speed(prefill[turns[-1]][turns.count(turns[-1]) - 1], 1.0)

    monkeypatch.setattr(timing, "measure_speed", measure)
    monkeypatch.setattr(timing, "Decoder", Named)
    twin = quantized(mixture_checkpoint, tmp_path)
    (tmp_path / "package").mkdir()
    facts = write_package(twin.directory, tmp_path / "package", OnnxConfig(), silent)
    assert turns == ["moe", "grouped", "unrolled"] * 3
    assert {time.lowering: time.prefill_tokens_per_second for time in facts.timings} == {
        "moe": 2.0,
        "grouped": 3.0,
        "unrolled": 1.0,
    }, "medians"


def test_a_named_lowering_is_not_timed(
    mixture_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(timing, "measure_speed", refuse)
    twin = quantized(mixture_checkpoint, tmp_path)
    (tmp_path / "package").mkdir()
    facts = write_package(twin.directory, tmp_path / "package", OnnxConfig(lowering="grouped"), silent)
    assert (facts.lowering, facts.timings) == ("grouped", ())


def test_layers_are_timed_until_they_are_large_or_there_are_no_more(
    mixture_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = quantized(mixture_checkpoint, tmp_path)
    depth = twin.checkpoint.config.num_hidden_layers
    assert depth > 1
    assert timing.cut_for_timing(twin).num_layers == depth
    monkeypatch.setattr(timing, "_TIMED_BYTES", 1)
    assert timing.cut_for_timing(twin).num_layers == 1


def test_a_layer_with_experts_is_among_those_timed(
    make_dense: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dense2moe.upcycle.building.config import UpcycleConfig
    from dense2moe.upcycle.building.surgery import upcycle

    (tmp_path / "mixture").mkdir()
    config = UpcycleConfig(num_experts=2, num_experts_per_tok=1, layers=[2])
    upcycle(make_dense(architecture="LlamaForCausalLM", num_hidden_layers=4), tmp_path / "mixture", config, 0, silent)
    monkeypatch.setattr(timing, "_TIMED_BYTES", 1)
    assert timing.cut_for_timing(quantized(tmp_path / "mixture", tmp_path)).num_layers == 3


def test_a_cut_model_has_its_first_layers_and_tokens(mixture_checkpoint: Path, tmp_path: Path) -> None:
    model = build_decoder(quantized(mixture_checkpoint, tmp_path), OnnxConfig(), GROUPED, Cut(1, 5)).model
    assert sum(value.name.startswith("past_key_values.") for value in model.graph.inputs) == 2
    assert model.graph.initializers["embedding.weight"].shape[0] == 5
    assert model.graph.initializers["logits.weight"].shape[1] == 5
