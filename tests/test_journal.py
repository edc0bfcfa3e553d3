"""A quantization that was stopped goes on where it was, and gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from dense2moe.export.quantization import methods, static
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.facts import BitSearch, QuantizeFacts
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.quantization.sensitivity import Ruler
from dense2moe.export.variant import Variant

NUM_LAYERS = 3


class StoppedError(Exception):
    """The run is over."""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(directory)
    return directory


def draw(count: int, seed: int) -> torch.Tensor:
    return torch.randint(2, 96, (count, 24), generator=torch.Generator().manual_seed(seed))


def run(
    source: Path,
    output: Path,
    variant: Variant,
    scratch: Path | None,
    stop_at: tuple[str, int] | None = None,
    **fields: Any,
) -> QuantizeFacts:
    """Quantize, or stop when progress says so."""
    output.mkdir()

    def progress(what: str, done: int, _: int) -> None:
        if (what, done) == stop_at:
            raise StoppedError

    config = QuantizeConfig.model_validate({"block_size": 16, **fields})
    return quantize_checkpoint(
        source,
        output,
        variant,
        config,
        progress,
        QuantizeInputs(blocks=draw(24, 1), held_out=draw(4, 2), scratch=scratch),
    )


@pytest.fixture(scope="module")
def unbroken(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[QuantizeFacts, Path]]:
    """What a quantization gives that nothing stops, each made once."""
    made: dict[str, tuple[QuantizeFacts, Path]] = {}

    def make(variant: Variant, **fields: Any) -> tuple[QuantizeFacts, Path]:
        name = f"{variant} {fields}"
        if name not in made:
            output = tmp_path_factory.mktemp("unbroken") / "whole"
            made[name] = run(mixture, output, variant, None, **fields), output
        return made[name]

    return make


def files(directory: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name} {name}": tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(a: Path, b: Path) -> bool:
    one, other = files(a), files(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("num_done", "fields"),
    [
        *((num_done, {}) for num_done in range(1, NUM_LAYERS + 1)),
        (1, {"zero_points": True}),
        (2, {"input_scaling": "awq", "correct_routers": True}),
    ],
    ids=str,
)
def test_layers_that_were_done_are_not_done_again(
    num_done: int,
    fields: dict[str, Any],
    mixture: Path,
    unbroken: Callable[..., tuple[QuantizeFacts, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers: list[int] = []
    plain = methods._quantize_layer

    def watch(walk: Any, layer: int, *rest: Any) -> Any:
        layers.append(layer)
        return plain(walk, layer, *rest)

    facts, whole = unbroken("int4", **fields)
    monkeypatch.setattr(methods, "_quantize_layer", watch)
    matrices = 4 + 4 * 3
    with pytest.raises(StoppedError):
        run(
            mixture,
            tmp_path / "killed",
            "int4",
            tmp_path / "scratch",
            ("quantizing", 1 + matrices * num_done),
            **fields,
        )
    assert layers == [*range(num_done)]
    (next((tmp_path / "scratch").glob("layers-*")) / f"{num_done:05d}.partial").write_bytes(b"half of it")
    resumed = run(mixture, tmp_path / "resumed", "int4", tmp_path / "scratch", **fields)
    assert layers == [*range(NUM_LAYERS)]
    assert same(whole, tmp_path / "resumed")
    assert resumed == facts
    assert (tmp_path / "resumed" / "quantization.json").read_text() == (whole / "quantization.json").read_text()


def test_ranges_that_were_measured_are_not_measured_again(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[int] = []
    plain = static._measure

    def watch(walk: Any, layer: int, *rest: Any) -> Any:
        layers.append(layer)
        return plain(walk, layer, *rest)

    monkeypatch.setattr(static, "_measure", watch)
    whole = run(mixture, tmp_path / "whole", "int8-qdq", None)
    matrices = 4 + 4 * 3
    with pytest.raises(StoppedError):
        run(mixture, tmp_path / "killed", "int8-qdq", tmp_path / "scratch", ("quantizing", 1 + matrices + 3))
    layers.clear()
    assert run(mixture, tmp_path / "resumed", "int8-qdq", tmp_path / "scratch") == whole
    assert layers == [2]
    assert same(tmp_path / "whole", tmp_path / "resumed")
    assert (tmp_path / "resumed" / "quantization.json").read_text() == (
        tmp_path / "whole" / "quantization.json"
    ).read_text()


def test_parts_that_were_measured_are_not_measured_again(
    mixture: Path,
    unbroken: Callable[..., tuple[QuantizeFacts, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[int] = []
    plain = Ruler.measure_layer

    def watch(self: Ruler, layer: int, before: torch.Tensor, choices: Any) -> Any:
        measured.append(len(choices))
        return plain(self, layer, before, choices)

    monkeypatch.setattr(Ruler, "measure_layer", watch)
    whole, output = unbroken("mixed", max_perplexity_increase=0.05)
    assert measured == [4, 4, 4]  # attention and experts, in 4 and 8 bits
    stop = ("measuring each part in fewer bits", 2 + 2 + 1)  # within the second layer
    with pytest.raises(StoppedError):
        run(mixture, tmp_path / "killed", "mixed", tmp_path / "scratch", stop, max_perplexity_increase=0.05)
    measured.clear()
    resumed = run(mixture, tmp_path / "resumed", "mixed", tmp_path / "scratch", max_perplexity_increase=0.05)
    assert measured == [0, 2, 4]
    assert isinstance(whole.search, BitSearch)
    assert resumed == whole
    assert same(output, tmp_path / "resumed")


def test_a_plan_of_other_bits_takes_no_layer_of_this_one(
    mixture: Path, unbroken: Callable[..., tuple[QuantizeFacts, Path]], tmp_path: Path
) -> None:
    wide = unbroken("int4", attention_bits=8)[1]
    run(mixture, tmp_path / "narrow", "int4", tmp_path / "scratch", attention_bits="variant")
    run(mixture, tmp_path / "other settings", "int4", tmp_path / "scratch", attention_bits=8, input_scaling="awq")
    run(mixture, tmp_path / "wide again", "int4", tmp_path / "scratch", attention_bits=8)
    assert same(wide, tmp_path / "wide again")
    assert not same(wide, tmp_path / "narrow")
    assert not same(wide, tmp_path / "other settings")
