"""Scaled inputs leave the function of every architecture as it is, and lower the error where channels stand out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import EXPORTED
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from dense2moe.export.coverage import find_decoder_family
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.calibration import CalibrationWalk, Group
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.input_scaling import ScaledLayer, ScalingRecord, fold, scale_layer
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from tests.test_calibration import draw_blocks, load, make_mixture

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of width 0

MakeDense = Callable[..., Path]


def make(name: str, make_dense: MakeDense, directory: Path) -> Path:
    case = EXPORTED[name]
    dense = make_dense(architecture=case.architecture, **case.overrides)
    return dense if case.upcycle is None else make_mixture(dense, directory, case.upcycle)


def draw_scales(group: Group, width: int, walk: CalibrationWalk, generator: torch.Generator) -> torch.Tensor:
    config = walk.checkpoint.config
    if group.place != "output":
        return torch.rand(width, generator=generator) * 4 + 0.25
    heads = config.num_key_value_heads
    own = torch.rand(heads, 1, width // config.num_attention_heads, generator=generator) * 4 + 0.25
    return own.expand(-1, config.num_attention_heads // heads, -1).flatten()


@pytest.mark.parametrize("name", EXPORTED)
def test_folding_alone_keeps_the_logits_of_transformers(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    mixture = make(name, make_dense, tmp_path / "mixture")
    checkpoint, generator = open_checkpoint(mixture), torch.Generator().manual_seed(0)
    family = find_decoder_family(checkpoint.config)
    walk = CalibrationWalk(checkpoint, family, draw_blocks(2), all_experts=False)
    tensors = {key: checkpoint.read(key) for key in checkpoint.entries}
    folded = set()
    for layer in range(checkpoint.config.num_hidden_layers):
        groups = list(walk.read_float(layer))
        scaled = ScaledLayer(walk, layer)
        together = [[group] for group in groups if group.place != "first"]
        together.append([group for group in groups if group.place == "first"])
        for parts in together:
            norm = {"attention": family.find("attention_norm"), "first": family.find("ffn_norm")}.get(
                parts[0].place, ""
            )
            if norm is not None:
                fold(
                    scaled,
                    family,
                    parts,
                    draw_scales(parts[0], walk.read_matrix(*parts[0].matrices[0]).shape[1], walk, generator),
                )
                folded.add(parts[0].place)
        tensors |= scaled.changed
    shutil.copytree(mixture, tmp_path / "folded")
    save_file(tensors, tmp_path / "folded" / "model.safetensors", metadata={"format": "pt"})
    assert folded == (
        {"output", "last"} if family.find("attention_norm") is None else {"attention", "output", "first", "last"}
    )
    ids = torch.randint(2, 300, (3, 40), generator=generator)
    with torch.no_grad():
        expected, found = (load(path)(input_ids=ids).logits for path in (mixture, tmp_path / "folded"))
    changed = [key for key in tensors if not torch.equal(tensors[key], checkpoint.read(key))]
    assert len(changed) > 6 * checkpoint.config.num_hidden_layers
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def plant(
    mixture: Path,
    directory: Path,
    norms: tuple[str, ...] = ("input_layernorm.weight", "post_attention_layernorm.weight"),
) -> Path:
    """The mixture with norms that make four channels twenty times as large as the others.

    Its head may be its embedding.
    """
    shutil.copytree(mixture, directory)
    checkpoint = open_checkpoint(mixture)
    tensors = {key: checkpoint.read(key) for key in checkpoint.entries}
    for key in tensors:
        if key.endswith(norms):
            tensors[key] = tensors[key].index_fill(0, torch.tensor([3, 9, 17, 26]), 20.0)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("method", ["search", "round", "gptq"])
def test_salient_channels_are_rounded_less(method: str, mixture_checkpoint: Path, tmp_path: Path) -> None:
    mixture = plant(mixture_checkpoint, tmp_path / "mixture")
    held_out = draw_blocks(16, seed=1)
    errors = []
    with torch.no_grad():
        expected = load(mixture)(input_ids=held_out, output_hidden_states=True).hidden_states[1]
    for scaling in ("none", "awq"):
        twin = tmp_path / scaling
        twin.mkdir()
        config = QuantizeConfig(method=method, input_scaling=scaling, attention_bits="variant", block_size=16)
        facts = quantize_checkpoint(
            mixture, twin, "int4", config, lambda *_: None, QuantizeInputs(blocks=draw_blocks(64))
        )
        assert (facts.num_scaled_groups > 0) == (scaling == "awq")
        with torch.no_grad():
            errors.append(
                float(
                    (load(twin)(input_ids=held_out, output_hidden_states=True).hidden_states[1] - expected)
                    .square()
                    .mean()
                )
            )
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", ["search", "round", "gptq"])
def test_the_head_s_salient_channels_are_rounded_less_and_its_norm_makes_up_for_it(method: str, tmp_path: Path) -> None:
    """The head by itself: the float model's last states through the twin's final norm and head."""
    small = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**small)).eval()
    with torch.no_grad():
        model.model.norm.weight[[3, 9, 17, 26]] = 20.0
        model.save_pretrained(tmp_path / "mixture")
        states = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
        expected = model.lm_head(model.model.norm(states))
        errors = []
        for scaling in ("none", "awq"):
            (tmp_path / scaling).mkdir()
            config = QuantizeConfig(method=method, input_scaling=scaling, head_bits="variant", block_size=16)
            quantize_checkpoint(
                tmp_path / "mixture",
                tmp_path / scaling,
                "int4",
                config,
                lambda *_: None,
                QuantizeInputs(blocks=draw_blocks(64)),
            )
            twin = load(tmp_path / scaling)
            errors.append(float((twin.lm_head(twin.model.norm(states)) - expected).square().mean()))
            assert torch.equal(twin.model.norm.weight, model.model.norm.weight) == (scaling == "none")
            package = tmp_path / f"{scaling} package"
            package.mkdir()
            write_package(tmp_path / scaling, package, OnnxConfig(activation_bits=32), lambda *_: None)
            decoder, ids = Decoder(package), draw_blocks(2)
            found = decoder.run(decoder.new_cache(*ids.shape), ids.numpy())["logits"]
            torch.testing.assert_close(torch.from_numpy(found), twin(ids).logits, rtol=1e-3, atol=1e-3)
    assert errors[1] < 0.9 * errors[0]


def test_what_cannot_be_folded_is_counted(make_dense: MakeDense, tmp_path: Path) -> None:
    mixture = make("olmo2, norms after", make_dense, tmp_path / "mixture")
    (tmp_path / "twin").mkdir()
    config = QuantizeConfig(method="search", input_scaling="awq", attention_bits="variant", block_size=16)
    facts = quantize_checkpoint(
        mixture, tmp_path / "twin", "int4", config, lambda *_: None, QuantizeInputs(blocks=draw_blocks(16))
    )
    assert facts.num_groups_without_place == 2 * 2, "attention's and the FFN's first matrices, in two layers"


def test_nothing_is_scaled_where_attention_stays_in_float(mixture_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(mixture_checkpoint)
    walk = CalibrationWalk(checkpoint, find_decoder_family(checkpoint.config), draw_blocks(2), all_experts=False)
    plan = dict.fromkeys(checkpoint.entries, 32)
    record = ScalingRecord()
    assert scale_layer(walk, 0, plan, QuantizeConfig(), record).tensors == {}
    assert record == ScalingRecord()


def test_scaling_without_text_is_refused_in_one_line(mixture_checkpoint: Path, tmp_path: Path) -> None:
    message = (
        r"^quantize\.input_scaling is 'awq', which learns from text, and there is none; give blocks of it, or "
        r"set it to 'none'$"
    )
    with pytest.raises(ExportError, match=message):
        quantize_checkpoint(
            mixture_checkpoint, tmp_path, "int4", QuantizeConfig(method="search", input_scaling="awq"), lambda *_: None
        )
