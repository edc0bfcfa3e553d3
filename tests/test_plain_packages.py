"""Decoders whose experts have biases, and a gate or none, from calibration to the package.

No architecture of transformers has such experts and a builder, so one is bent: GraniteMoE, whose experts are stacked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.granitemoe import modeling_granitemoe

from dense2moe.export import coverage
from dense2moe.export.coverage import find_decoder_family
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.records import ProviderParity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.parity.weights.constants import read_constants
from dense2moe.export.parity.weights.rows import check_weights
from dense2moe.export.quantization.blockwise import dequantize, quantize
from dense2moe.export.quantization.calibration import CalibrationWalk
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.input_scaling import ScalingRecord, scale_layer
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.runtime.decoder import CPU, Decoder
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.models.parts import Matrix, Part
from tests.conftest import MakeDense
from tests.test_calibration import draw_blocks, load, make_mixture, moments_of, recorded

KINDS = {"gated": "silu", "relu": "relu", "gelu": "gelu_pytorch_tanh"}
"""With a gate and without one, by the activation."""
SPARSE = "model.layers.{layer}.block_sparse_moe."
BIASES: dict[Part, str] = {"expert_up_bias": "experts.gate_up_proj_bias", "expert_down_bias": "experts.down_proj_bias"}


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class Experts(nn.Module):
    """GraniteMoE's, with biases, and without a gate where the FFN has none."""

    gated = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        count, inner, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
        rows = 2 * inner if self.gated else inner
        self.gate_up_proj = nn.Parameter(torch.empty(count, rows, hidden))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(count, rows))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(count, hidden))
        self.activate = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            tokens, places = torch.where(experts == expert)
            inner = F.linear(x[tokens], self.gate_up_proj[expert], self.gate_up_proj_bias[expert])
            gate, up = inner.chunk(2, -1) if self.gated else (inner, 1.0)
            given = F.linear(self.activate(gate) * up, self.down_proj[expert], self.down_proj_bias[expert])
            output.index_add_(0, tokens, given * weights[tokens, places, None])
        return output


class UngatedExperts(Experts):
    """Those without a gate."""

    gated = False


@pytest.fixture(params=KINDS)
def source(
    request: pytest.FixtureRequest, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A bent GraniteMoE, which transformers and our tables know meanwhile."""
    kind: str = request.param
    dense = make_dense(architecture="GraniteForCausalLM", hidden_act=KINDS[kind], intermediate_size=64)
    mixture = make_mixture(dense, tmp_path / "source", {"router": {"logit_std": 1.0}})
    state, generator = load_file(mixture / "model.safetensors"), torch.Generator().manual_seed(0)
    for layer in range(2):
        prefix = SPARSE.format(layer=layer)
        first, last = state[f"{prefix}input_linear.weight"], state[f"{prefix}output_linear.weight"]
        if kind != "gated":
            first = state[f"{prefix}input_linear.weight"] = first.chunk(2, 1)[1].contiguous()
        for bias, matrix in zip(BIASES.values(), (first, last), strict=True):
            state[f"{prefix}{bias}"] = torch.randn(matrix.shape[:2], generator=generator) / 2
    save_file(state, mixture / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(modeling_granitemoe, "GraniteMoeExperts", Experts if kind == "gated" else UngatedExperts)
    family = next(family for family in coverage.DECODERS if family.model_type == "granitemoe")
    parts = {
        part: matrix for part, matrix in family.stacks[0].parts.items() if kind == "gated" or part != "expert_gate"
    }
    parts |= {part: Matrix(SPARSE + name) for part, name in BIASES.items()}
    if kind == "gated":
        parts["expert_gate_bias"] = parts["expert_up_bias"]
    bent = replace(family, stacks=(replace(family.stacks[0], parts=parts),))
    monkeypatch.setattr(coverage, "DECODERS", (bent, *coverage.DECODERS))
    return mixture


def test_calibration_sees_what_torch_computes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group in the second layer behind the first one, whose experts are replaced one after another."""
    checkpoint, blocks = open_checkpoint(source), draw_blocks(4)
    walk = CalibrationWalk(checkpoint, find_decoder_family(checkpoint.config), blocks, all_experts=False)
    model, replaced = load(source), {}
    for group in walk.read_layer(0):
        group.read()
        for name, rows in group.matrices:
            weight = walk.read_matrix(name, rows)
            rounded = dequantize(quantize(weight, 4, 16), weight.shape[1], 4)
            walk.replace(name, rows, rounded)
            replaced.setdefault(name, []).append(rounded)
    whole = {name: torch.cat(parts).reshape(checkpoint.entries[name].shape) for name, parts in replaced.items()}
    layer = model.model.layers[0]
    for name, tensor in whole.items():
        own = name.replace("input_linear.weight", "experts.gate_up_proj")
        own = own.replace("output_linear.weight", "experts.down_proj")
        layer.get_parameter(own.removeprefix("model.layers.0.")).data.copy_(tensor)
    walk.advance(0, whole)
    with recorded(monkeypatch) as calls, torch.no_grad():
        states = model(input_ids=blocks, use_cache=False, output_hidden_states=True).hidden_states
    torch.testing.assert_close(walk.states, states[1], rtol=1e-4, atol=1e-4)
    groups = list(walk.read_layer(1))
    assert sum(len(group.read().actual) for group in groups if group.expert is not None) == 2 * 2 * blocks.numel()
    for group in groups:
        expected, _ = moments_of(calls, [walk.read_matrix(*matrix) for matrix in group.matrices])
        inputs = group.read().actual.double()
        scale = float(expected.abs().max() + 1e-9)
        torch.testing.assert_close(inputs.T @ inputs, expected, rtol=1e-4, atol=1e-4 * scale)


def test_scaled_inputs_keep_the_function(source: Path, tmp_path: Path) -> None:
    """What experts' last matrices read is scaled behind a gate or a ReLU, bias included, and nowhere else."""
    checkpoint, blocks = open_checkpoint(source), draw_blocks(4)
    family = find_decoder_family(checkpoint.config)
    walk, record = CalibrationWalk(checkpoint, family, blocks, all_experts=False), ScalingRecord()
    plan = {
        name: 4 if len(entry.shape) > 1 and "bias" not in name else 32 for name, entry in checkpoint.entries.items()
    }
    plan |= {name: 32 for name in plan if "router" in name}
    scaled = scale_layer(walk, 0, plan, QuantizeConfig(block_size=16, input_scaling="smooth"), record)
    biased = SPARSE.format(layer=0) + BIASES["expert_up_bias"]
    assert (biased in scaled.tensors) == (checkpoint.config.hidden_act != "gelu_pytorch_tanh")
    assert (record.num_without_place == 4) == (checkpoint.config.hidden_act == "gelu_pytorch_tanh")
    state = load_file(source / "model.safetensors")
    (tmp_path / "scaled").mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            (tmp_path / "scaled" / path.name).write_bytes(path.read_bytes())
    save_file(state | scaled.tensors, tmp_path / "scaled" / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        found, expected = (load(path)(input_ids=blocks).logits for path in (tmp_path / "scaled", source))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_package_is_its_twin(source: Path, tmp_path: Path) -> None:
    """In 4 bits by GPTQ; the biases are the source's, in every way of writing them."""
    twin, blocks = tmp_path / "twin", draw_blocks(40)
    twin.mkdir()
    config = QuantizeConfig(method="gptq", block_size=16)
    facts = quantize_checkpoint(source, twin, "int4", config, silent, QuantizeInputs(blocks=blocks, activation_bits=32))
    assert facts.quantized_expert_share == 1
    before, after = open_checkpoint(source), open_checkpoint(twin)
    for name in (name for name in before.entries if name.endswith("_bias")):
        assert torch.equal(before.read(name), after.read(name))
    ids = blocks[:2].numpy()
    with torch.no_grad():
        expected = load(twin)(input_ids=blocks[:2]).logits.numpy()
    for lowering in ("grouped", "switched") if before.config.hidden_act == "relu" else ("fused",):
        package = tmp_path / lowering
        package.mkdir()
        write_package(twin, package, OnnxConfig(lowering=lowering, activation_bits=32), silent)
        decoder = Decoder(package, num_threads=1)
        found = decoder.run(decoder.new_cache(*ids.shape), ids)["logits"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        weights = check_weights(read_constants(package), twin).check
        assert (weights.num_wrong, weights.not_judged) == (0, ())


@pytest.mark.parametrize("source", ["gelu"], indirect=True)
def test_parity_judges_such_experts_in_every_tier(source: Path, tmp_path: Path) -> None:
    """In 8 bits, activations too, by the operator: inside of layers as well."""
    twin, package, blocks = tmp_path / "twin", tmp_path / "package", draw_blocks(4, length=24)
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(source, twin, "int8", QuantizeConfig(method="round", block_size=16), silent)
    write_package(twin, package, OnnxConfig(lowering="fused"), silent)
    config = ParityConfig(max_perplexity_increase={}, longest_row=24, free_tokens=4)
    parity = check_parity(ParitySubject(package, twin, source, blocks, "int8", True), config, silent)
    assert parity.passed, parity.breaches
    found = parity.providers[CPU]
    assert isinstance(found, ProviderParity)
    assert {tier for tier, result in found.tiers.items() if result != "passed"} == {"task"}


@pytest.mark.parametrize("source", ["gated"], indirect=True)
def test_a_wrong_bias_of_an_expert_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "twin").mkdir()
    quantize_checkpoint(source, tmp_path / "twin", "float32", QuantizeConfig(), silent)
    for lowering in ("fused", "grouped"):
        (tmp_path / lowering).mkdir()
        write_package(tmp_path / "twin", tmp_path / lowering, OnnxConfig(lowering=lowering), silent)
    state = load_file(tmp_path / "twin" / "model.safetensors")
    name = SPARSE.format(layer=1) + BIASES["expert_up_bias"]
    state[name][2, 5] += 1
    save_file(state, tmp_path / "twin" / "model.safetensors", metadata={"format": "pt"})
    for lowering in ("fused", "grouped"):
        (wrong,) = check_weights(read_constants(tmp_path / lowering), tmp_path / "twin").check.wrong
        assert str(wrong).startswith("layer 1, gate_up_proj_bias of expert 2: ")
