"""A package is complete, says what it needs, and runs in onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from dense2moe.export.facts import OnnxFacts
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import genai_config, write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.runtime.decoder import Decoder, Sampling
from dense2moe.export.storage import DATA_NAME, LOWERING_KEY, MIN_ONNXRUNTIME_KEY, MODEL_NAME
from dense2moe.export.variant import Variant

# those need text
VARIANTS: tuple[Variant, ...] = tuple(variant for variant in get_args(Variant) if variant not in ("int8-qdq", "mixed"))
NUM_TOKENS = 64
PROMPTS = [
    [0, 34],
    [0, 69, 72, 101, 260, 271],
    [7],
    list(range(40, 80)),
    [0, 299, 298, 2, 2, 2, 150, 33, 8, 90, 61, 270],
]


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def export(source: Path, directory: Path, variant: Variant, **config: Any) -> tuple[Path, Path, OnnxFacts]:
    """The twin, the package, and what was written; products are exact unless `config` says otherwise."""
    twin, package = directory / "twin", directory / "package"
    for path in (twin, package):
        path.mkdir()
    quantize_checkpoint(
        source,
        twin,
        variant,
        QuantizeConfig(method="search"),
        silent,
        QuantizeInputs(device=config.get("device", "cpu")),
    )
    return (
        twin,
        package,
        write_package(twin, package, OnnxConfig(**{"activation_bits": 32, "lowering": "grouped"} | config), silent),
    )


def generate_in_torch(twin: Path, prompt: list[int]) -> list[int]:
    model = MixtralForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=1)[
        0, len(prompt) :
    ].tolist()


def generate_in_genai(model: og.Model, prompt: list[int]) -> list[int]:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NUM_TOKENS, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


@pytest.mark.parametrize(
    ("variant", "lowering"),
    [*((variant, "unrolled") for variant in VARIANTS), ("float32", "auto"), ("int4", "auto"), ("int4", "switched")],
)
def test_genai_generates_the_tokens_of_transformers(
    mixture_checkpoint: Path, tmp_path: Path, variant: Variant, lowering: str
) -> None:
    """Of the twin, so that the quantized packages must agree as well."""
    twin, package, _ = export(mixture_checkpoint, tmp_path, variant, lowering=lowering)
    model = og.Model(str(package))
    lengths = []
    for prompt in PROMPTS:
        expected = generate_in_torch(twin, prompt)
        assert generate_in_genai(model, prompt) == expected
        lengths.append(len(expected))
    assert sum(lengths) > 3 * NUM_TOKENS  # an early end of text would make this an easy test


@pytest.mark.parametrize("variant", ["float16", "int8", "int4"])
def test_genai_runs_a_file_for_cuda_on_the_cpu(mixture_checkpoint: Path, tmp_path: Path, variant: Variant) -> None:
    """It gives the cache the type that the graph declares, here float16.

    Its tokens are those of our runtime on the same file.
    """
    _, package, facts = export(mixture_checkpoint, tmp_path, variant, device="cuda")
    assert facts.element_type == "float16"
    model, decoder = og.Model(str(package)), Decoder(package)
    for prompt in PROMPTS:
        assert generate_in_genai(model, prompt) == [
            token for (token,) in decoder.generate([prompt], NUM_TOKENS, Sampling(), stop=[1])
        ]


def test_genai_runs_8_bit_activations(mixture_checkpoint: Path, tmp_path: Path) -> None:
    _, package, _ = export(mixture_checkpoint, tmp_path, "int8", activation_bits=8)
    model = og.Model(str(package))
    assert all(0 <= token < 300 for prompt in PROMPTS for token in generate_in_genai(model, prompt))


def test_genai_reads_the_tokenizer(mixture_checkpoint: Path, tmp_path: Path) -> None:
    _, package, _ = export(mixture_checkpoint, tmp_path, "float32")
    text = "def f(x):\n    return x + 1"
    # It leaves out what a tokenizer's post-processor adds, here <s>.
    expected = AutoTokenizer.from_pretrained(mixture_checkpoint)(text, add_special_tokens=False).input_ids
    tokenizer = og.Tokenizer(og.Model(str(package)))
    assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.decode(np.array(expected, np.int32)) == text


def test_genai_config_describes_the_model(mixture_checkpoint: Path, tmp_path: Path) -> None:
    _, package, _ = export(mixture_checkpoint, tmp_path, "float32")
    assert json.loads((package / "genai_config.json").read_text(encoding="utf-8")) == {
        "model": {
            "type": "decoder",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "context_length": 256,
            "vocab_size": 300,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": 8,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": 256, "past_present_share_buffer": True, "do_sample": False},
    }


@pytest.mark.parametrize(
    ("fields", "bos", "eos", "pad"),
    [
        ({"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5}, 3, 4, 5),
        ({"bos_token_id": 3, "eos_token_id": [6, 7], "pad_token_id": None}, 3, [6, 7], 6),
        ({"bos_token_id": None, "eos_token_id": 4, "pad_token_id": None}, 4, 4, 4),
        ({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}, 0, 0, 0),
    ],
)
def test_special_tokens_fall_back_to_the_end_of_text(fields: dict[str, Any], bos: int, eos: Any, pad: int) -> None:
    model = genai_config(MixtralConfig(**fields))["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (bos, eos, pad)


def test_an_explicit_head_size_is_told() -> None:
    config = MixtralConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    assert genai_config(config)["model"]["decoder"]["head_size"] == 16


@pytest.mark.parametrize(
    ("variant", "config", "lowering", "needed"),
    [
        ("float32", {}, "grouped", "1.23"),
        ("float32", {"lowering": "fused"}, "moe", "1.23.1"),
        ("float32", {"lowering": "unrolled"}, "unrolled", "1.23"),
        ("int8", {}, "grouped", "1.23"),
        # the block is as wide as the hidden size
        (
            "int8",
            {"lowering": "fused", "activation_bits": 8},
            "qmoe",
            "1.31",
        ),
        ("int4", {"lowering": "fused", "activation_bits": 8}, "qmoe", "1.31"),
        ("float16", {"lowering": "fused"}, "moe", "1.23.1"),
        ("float16", {"device": "cuda"}, "grouped", "1.29"),  # CUDA's GroupQueryAttention takes a bias from there on
        ("int8", {"device": "cuda"}, "grouped", "1.29"),
    ],
)
def test_the_file_says_its_lowering_and_the_runtime_it_needs(
    mixture_checkpoint: Path, tmp_path: Path, variant: Variant, config: dict[str, Any], lowering: str, needed: str
) -> None:
    _, package, facts = export(mixture_checkpoint, tmp_path, variant, **config)
    proto = onnx.load(package / MODEL_NAME, load_external_data=False)
    assert {entry.key: entry.value for entry in proto.metadata_props} == {
        MIN_ONNXRUNTIME_KEY: needed,
        LOWERING_KEY: lowering,
    }
    assert (facts.lowering, facts.min_onnxruntime) == (lowering, needed)


def test_a_package_holds_all_that_runtimes_read(mixture_checkpoint: Path, tmp_path: Path) -> None:
    twin, package, _ = export(mixture_checkpoint, tmp_path, "int4")
    companions = ("tokenizer.json", "tokenizer_config.json")
    assert {path.name for path in package.iterdir()} >= {
        MODEL_NAME,
        DATA_NAME,
        "config.json",
        "genai_config.json",
        *companions,
    }
    for name in companions:
        assert (package / name).read_bytes() == (mixture_checkpoint / name).read_bytes()
    assert json.loads((package / "config.json").read_text()) == json.loads((twin / "config.json").read_text())


def test_large_weights_lie_outside_the_graph(mixture_checkpoint: Path, tmp_path: Path) -> None:
    _, package, _ = export(mixture_checkpoint, tmp_path, "float32")
    proto = onnx.load(package / MODEL_NAME, load_external_data=False)
    outside = [tensor for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    inside = [tensor for tensor in proto.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    assert {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"} == {
        DATA_NAME
    }
    assert all(tensor.ByteSize() < 2048 for tensor in inside)
    assert any(".gate_up" in tensor.name for tensor in outside)


def test_writing_twice_gives_the_same_bytes(mixture_checkpoint: Path, tmp_path: Path) -> None:
    packages = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        packages.append(export(mixture_checkpoint, tmp_path / name, "int4")[1])
    for name in (MODEL_NAME, DATA_NAME, "genai_config.json", "config.json"):
        assert (packages[0] / name).read_bytes() == (packages[1] / name).read_bytes()


def test_progress_counts_the_weights_to_the_end(mixture_checkpoint: Path, tmp_path: Path) -> None:
    twin, package, _ = export(mixture_checkpoint, tmp_path, "float32")
    seen: list[tuple[str, int, int]] = []
    write_package(twin, package, OnnxConfig(lowering="grouped"), lambda *step: seen.append(step))
    total = len(onnx.load(package / MODEL_NAME, load_external_data=False).graph.initializer)
    assert {what for what, _, _ in seen} == {"writing weights"}
    assert {count for _, _, count in seen} == {total}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == total
