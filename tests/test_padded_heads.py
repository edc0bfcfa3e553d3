"""Heads whose size 8 does not divide end in zeros in the cache, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exports import EXACT, FLOAT16, Make, assert_same_logits, draw_ids, make_exports
from onnx import numpy_helper
from test_decoder import expect_pieces, make_longrope
from test_package import generate_in_genai
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import CPU, Decoder
from dense2moe.export.storage import MODEL_NAME
from dense2moe.export.variant import Device, Variant

HEAD, CACHED = 20, 24


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a tiny mixture of the given config, quantize it and export it."""
    return make_exports(tmp_path)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.mark.parametrize(
    ("variant", "device", "limit"),
    [("float16", "cpu", FLOAT16), ("bfloat16", "cpu", EXACT), ("int4", "cpu", EXACT), ("int4", "cuda", FLOAT16)],
)
def test_every_element_type_equals_its_twin(make: Make, variant: Variant, device: Device, limit: float) -> None:
    """Every expert is chosen, so that no rounding can change which."""
    export = make(
        variant,
        {"block_size": 16 if device == "cpu" else 64},
        {"device": device},
        head_dim=HEAD,
        num_experts_per_tok=4,
        hidden_size=64,
        intermediate_size=96,
        sliding_window=16,
    )
    assert_same_logits(export, limit)


def test_a_longrope_rotates_heads_before_they_are_padded(make: Make) -> None:
    export = make_longrope(make, HEAD)
    ids = draw_ids(2)
    mask, pieces = np.ones_like(ids), [20, *[1] * 24]
    expected = expect_pieces(export, ids, mask, pieces)
    assert np.abs(export.run(ids, mask, pieces) - expected).max() < EXACT * np.abs(expected).max()


def test_norms_of_queries_and_keys_read_heads_before_they_are_padded(tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = Qwen3MoeConfig(**small, head_dim=HEAD, initializer_range=0.2, max_position_embeddings=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    source, twin, package = (tmp_path / name for name in ("source", "twin", "package"))
    model.save_pretrained(source)
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(source, twin, "float32", QuantizeConfig(), silent)
    write_package(twin, package, OnnxConfig(lowering="grouped"), silent)
    ids = draw_ids(2, 24)
    decoder = Decoder(package, num_threads=1)
    found = decoder.run(decoder.new_cache(*ids.shape), ids)["logits"]
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(found - expected).max() < EXACT * np.abs(expected).max()


def test_clients_are_told_the_size_of_the_cache(make: Make) -> None:
    export = make(head_dim=HEAD)
    assert {shape[-1] for shape, _ in export.decoder.past.values()} == {CACHED}
    assert json.loads((export.package / "config.json").read_text())["head_dim"] == CACHED
    assert json.loads((export.twin / "config.json").read_text())["head_dim"] == HEAD


def test_genai_generates_the_tokens_of_transformers(make: Make) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    export = make(head_dim=HEAD, eos_token_id=None)
    prompt = draw_ids(1, 7)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 1}
    expected = export.torch.generate(torch.from_numpy(prompt), **options)[0, 7:].tolist()
    found = generate_in_genai(og.Model(str(export.package)), prompt[0].tolist())
    assert found[: len(expected)] == expected


def test_parity_judges_the_padding_too(make: Make, tmp_path: Path) -> None:
    """Ones in the place of zeros change no logits: all scores of a query grow alike."""
    export = make(head_dim=HEAD)
    blocks = torch.from_numpy(np.random.default_rng(0).integers(2, 96, (3, 32)))
    config = ParityConfig(max_perplexity_increase={}, free_tokens=2, decode_steps=2, longest_row=32, noise_blocks=1)

    def judge(package: Path) -> tuple[str, ...]:
        subject = ParitySubject(package, export.twin, export.twin, blocks, "float32", False)
        return check_parity(subject, config, silent).breaches

    assert judge(export.package) == ()
    faulty = shutil.copytree(export.package, tmp_path / "faulty")
    proto = onnx.load(faulty / MODEL_NAME)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1.0), "one_of_padding"))
    for node in proto.graph.node:
        if node.op_type == "Pad":
            node.input.append("one_of_padding")
    onnx.save(proto, faulty / MODEL_NAME)
    config_json = json.loads((faulty / "config.json").read_text())
    (faulty / "config.json").write_text(json.dumps(config_json | {"head_dim": HEAD}))
    lines = judge(faulty)
    assert lines[0].startswith(f"{CPU}: layer: layer 0, the cached keys and values, on the graph's own input: ")
    assert lines[-1] == f"{CPU}: files: config.json: head_dim is {HEAD}; must be {CACHED}"
