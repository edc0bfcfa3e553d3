"""A traced decoder computes the logits of transformers' own, whatever its architecture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import torch
import transformers
from families import SPARSE
from shapes import each_shape
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from dense2moe.export.coverage import ACTIVATIONS, DECODERS, classify_tensor
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig, RequestConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.parameters import classify_tensors
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.decoder import Decoder, Sampling
from dense2moe.export.storage import LOWERING_KEY, MIN_ONNXRUNTIME_KEY, MODEL_NAME, save_graph
from dense2moe.export.tracing.passes import find_traced_candidates, lower_trace
from dense2moe.export.tracing.tracer import trace_model
from dense2moe.export.variant import Variant
from dense2moe.upcycle.checkpoints.reader import open_checkpoint

pytest.importorskip("onnxscript", reason="onnxscript is not installed, with which transformers exports")

VOCABULARY, PREFILL, STEPS = 96, 20, 40  # past the window, and past where factors change
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GROUPS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
# Weights that do not sum to one; a sparse mixer's weights, biases in norms, and a window; latent attention, a dense
# layer, a shared expert, and experts chosen by group and by sigmoids with a bias.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "longrope": (
        "Olmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 1,
            "rope_parameters": LONGROPE,
            "tie_word_embeddings": True,
        },
    ),
    "phimoe": (
        "Phimoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 1,
            "sliding_window": 24,
            "attention_bias": True,
        },
    ),
    "deepseek_v3": ("DeepseekV3", {**LATENT, **GROUPS}),
    # targets without a builder: blocks in parallel and rotation in some layers; a bias of the gate's own; a router that
    # is a module in the gate; sinks
    "cohere2_moe": (
        "Cohere2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 24,
            "head_dim": 8,
        },
    ),
    "ernie4_5_moe": ("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    "granitemoe_swa": (
        "GraniteMoeSWA",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24, "layer_rope_theta": [0, 100.0]},
    ),
}
UNBUILT = ("cohere2_moe", "ernie4_5_moe", "hunyuan_v1_moe", "granitemoe_swa")
# Float32 sums in another order, through two layers: 2e-6 measured over all tests of this file.
EXACT = 5e-6


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def make_model(stem: str, **fields: Any) -> PreTrainedModel:
    """A random model whose norms, biases and routers all show in the logits."""
    config = getattr(transformers, f"{stem}Config")(**SMALL | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{stem}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith(("bias", "sinks")):
                torch.nn.init.uniform_(parameter, -0.3, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                torch.nn.init.uniform_(buffer, -0.3, 0.3)
    return model


class Traced:
    """A model traced once; its twins and its packages."""

    def __init__(self, folder: Path, name: str) -> None:
        stem, fields = MODELS[name]
        self.folder, self.source = folder, folder / "source"
        make_model(stem, **fields).save_pretrained(self.source)
        (self.trace,) = trace_model(Twin(self.twin("float32")))

    def twin(self, variant: Variant, zero_points: bool = False) -> Path:
        twin = self.folder / f"twin-{variant}-{zero_points}"
        if not twin.exists():
            twin.mkdir()
            config = QuantizeConfig(block_size=16, embedding_bits="variant", zero_points=zero_points)
            quantize_checkpoint(self.source, twin, variant, config, silent)
        return twin

    def package(self, variant: Variant, wish: Any, zero_points: bool = False) -> Path:
        package = self.folder / f"package-{variant}-{wish}-{zero_points}"
        if not package.exists():
            package.mkdir()
            twin, config = Twin(self.twin(variant, zero_points)), OnnxConfig(lowering=wish, activation_bits=32)
            (lowering,) = find_traced_candidates(self.trace, twin, config)
            save_graph(lower_trace(self.trace, twin, config, lowering).model, package, silent)
            twin.checkpoint.config.save_pretrained(package)
        return package

    def torch(self, variant: Variant, zero_points: bool = False) -> PreTrainedModel:
        return load(self.twin(variant, zero_points))


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The models, each traced when it is first asked for: a trace takes some fifteen seconds."""
    made: dict[str, Traced] = {}

    def find(name: str) -> Traced:
        if name not in made:
            made[name] = Traced(tmp_path_factory.mktemp(name), name)
        return made[name]

    return find


def draw(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and a mask that lacks the first 6 n tokens of row n."""
    ids = np.random.default_rng(0).integers(2, VOCABULARY, (batch, PREFILL + STEPS))
    mask = np.ones_like(ids)
    for row in range(batch):
        mask[row, : 6 * row] = 0
    return ids, mask


def run(decoder: Decoder, ids: np.ndarray, mask: np.ndarray, pieces: list[int]) -> np.ndarray:
    cache = decoder.new_cache(*ids.shape)
    ends = np.cumsum(pieces)
    return np.concatenate(
        [
            decoder.run(cache, ids[:, e - n : e], mask[:, e - n : e])["logits"]
            for n, e in zip(pieces, ends, strict=True)
        ],
        axis=1,
    )


def expect(model: PreTrainedModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits of one forward over all tokens, without a cache."""
    mask_BT = torch.from_numpy(mask)
    with torch.inference_mode():
        found = model(
            torch.from_numpy(ids),
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
    return found.logits.numpy()


CASES: list[tuple[str, Variant, str, bool]] = [
    ("olmoe", "float32", "fused", False),
    ("olmoe", "float32", "grouped", False),
    ("olmoe", "float32", "unrolled", False),
    ("olmoe", "bfloat16", "fused", False),
    ("deepseek_v3", "bfloat16", "grouped", False),
    ("olmoe", "int8", "grouped", False),
    ("olmoe", "int4", "fused", False),
    ("olmoe", "int4", "switched", False),
    ("olmoe", "int4", "fused", True),
    ("olmoe", "int4", "grouped", True),
    ("phimoe", "float32", "fused", False),
    ("phimoe", "float32", "grouped", False),
    ("phimoe", "int4", "unrolled", False),
    ("deepseek_v3", "float32", "fused", False),
    ("deepseek_v3", "float32", "grouped", False),
    ("deepseek_v3", "int8", "unrolled", True),
]


EVERY_CASE = [*CASES, *((name, variant, "grouped", False) for name in UNBUILT for variant in ("float32", "int8"))]


def name_of(case: tuple[str, Variant, str, bool]) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize(
    ("name", "variant", "wish", "zero_points"), each_shape(EVERY_CASE, set(map(name_of, CASES)), name=name_of)
)
def test_a_traced_decoder_equals_transformers(
    traced: Any, name: str, variant: Variant, wish: str, zero_points: bool
) -> None:
    model, decoder = (
        traced(name).torch(variant, zero_points),
        Decoder(traced(name).package(variant, wish, zero_points), num_threads=1),
    )
    for batch in (1, 3):
        ids, mask = draw(batch)
        expected, real = expect(model, ids, mask), mask.astype(bool)
        for pieces in ([PREFILL + STEPS], [PREFILL] + [1] * STEPS, [PREFILL, 30, 1, STEPS - 31]):
            found = run(decoder, ids, mask, pieces)
            assert np.abs(found - expected)[real].max() < EXACT * np.abs(expected[real]).max(), (batch, len(pieces))


def test_a_traced_longrope_switches_its_factors_where_transformers_does(traced: Any) -> None:
    model, decoder = (
        traced("longrope").torch("float32"),
        Decoder(traced("longrope").package("float32", "grouped"), num_threads=1),
    )
    ids, mask = draw(3)
    real, pieces = mask.astype(bool), [PREFILL] + [1] * STEPS
    for length in (32, 33, PREFILL + STEPS):
        found, expected = (
            run(decoder, ids[:1, :length], mask[:1, :length], [length]),
            expect(model, ids[:1, :length], mask[:1, :length]),
        )
        assert np.abs(found - expected).max() < EXACT * np.abs(expected).max(), length
    cache, parts, mask_BT = DynamicCache(), [], torch.from_numpy(mask)
    positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
    for n, end in zip(pieces, np.cumsum(pieces), strict=True):
        with torch.inference_mode():
            fed = {
                "attention_mask": mask_BT[:, :end],
                "position_ids": positions[:, end - n : end],
                "past_key_values": cache,
            }
            parts.append(model(torch.from_numpy(ids[:, end - n : end]), **fed).logits.numpy())
    expected = np.concatenate(parts, axis=1)
    assert np.abs(run(decoder, ids, mask, pieces) - expected)[real].max() < EXACT * np.abs(expected[real]).max()
    # at once it is another function
    assert np.abs(expect(model, ids, mask) - expected)[real].max() > 100 * EXACT * np.abs(expected[real]).max()


def test_the_window_of_a_traced_decoder_is_seen(traced: Any) -> None:
    """Else the test above would say nothing of it."""
    ids, mask = draw(1)
    model = traced("phimoe").torch("float32")
    narrow = expect(model, ids, mask)
    model.config.sliding_window = None
    assert np.abs(expect(model, ids, mask) - narrow)[:, 24:].max() > 100 * EXACT * np.abs(narrow).max()


def test_a_traced_package_has_the_names_of_every_package(traced: Any) -> None:
    proto = onnx.load(traced("olmoe").package("float32", "grouped") / MODEL_NAME, load_external_data=False)
    dims = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*proto.graph.input, *proto.graph.output]
    }
    pairs = [f"{n}.{t}" for n in range(2) for t in ("key", "value")]
    assert dims == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        **{f"past_key_values.{pair}": ["batch_size", 2, "past_sequence_length", 8] for pair in pairs},
        "logits": ["batch_size", "sequence_length", VOCABULARY],
        **{f"present.{pair}": ["batch_size", 2, "total_sequence_length", 8] for pair in pairs},
    }
    assert {opset.domain for opset in proto.opset_import} <= {"", "com.microsoft"}
    assert proto.producer_name == "dense2moe"


def test_experts_compute_the_tokens_that_chose_them_and_no_others(traced: Any) -> None:
    package = traced("olmoe").package("float32", "grouped")
    proto = onnx.load(package / MODEL_NAME, load_external_data=False)
    inputs = {(layer, e): f"layers.{layer}.moe.input.{e}" for layer in range(2) for e in range(4)}
    products = [node for node in proto.graph.node if set(node.input) & set(inputs.values())]
    assert [node.op_type for node in products] == ["MatMul"] * len(inputs)
    for name in inputs.values():
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(package))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ids, mask = draw(2)
    past = {
        value.name: np.zeros((2, 2, 0, 8), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    found = session.run(list(inputs.values()), {"input_ids": ids, "attention_mask": mask, **past})
    model = traced("olmoe").torch("float32")
    chosen: dict[int, torch.Tensor] = {}
    for n, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, output, n=n: chosen.update({n: output[2]}))
    expect(model, ids, mask)
    # Padding is routed too, here as there; what it computes may differ, so only the sums over all experts and a batch
    # without it are compared.
    assert [sum(len(found[layer * 4 + e]) for e in range(4)) for layer in range(2)] == [ids.size * 2] * 2
    whole = session.run(list(inputs.values()), {"input_ids": ids, "attention_mask": np.ones_like(mask), **past})
    expect(model, ids, np.ones_like(mask))
    assert [len(rows) for rows in whole] == [int((chosen[layer] == e).sum()) for layer, e in inputs]


def test_quantized_experts_attention_and_tables_are_integers_in_a_trace(traced: Any) -> None:
    proto = onnx.load(traced("olmoe").package("int4", "fused") / MODEL_NAME, load_external_data=False)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("QMoE") == 2
    assert kinds.count("MatMulNBits") == 2 * 4 + 1  # attention, and the head
    assert kinds.count("GatherBlockQuantized") == 1
    routers = [tensor for tensor in proto.graph.initializer if tensor.name.endswith("mlp.gate.weight")]
    assert [tensor.data_type for tensor in routers] == [onnx.TensorProto.FLOAT] * 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Any]:
    """OLMoE of one layer through the public functions, in 8 bits, the lowering chosen by the clock.

    Its rotary embedding is a dynamic one.
    """
    folder = tmp_path_factory.mktemp("whole")
    source, twin, package = folder / "source", folder / "twin", folder / "package"
    fields = MODELS["olmoe"][1] | {"num_hidden_layers": 1, "rope_parameters": DYNAMIC, "head_dim": 8}
    make_model("Olmoe", **fields).save_pretrained(source)
    for path in (twin, package):
        path.mkdir()
    quantized = quantize_checkpoint(source, twin, "int8", QuantizeConfig(block_size=16), silent)
    assert (quantized.quantized_expert_share, quantized.bits["router"]) == (1.0, 32)
    request = RequestConfig(prompt_tokens=8, new_tokens=4)
    return source, twin, package, write_package(twin, package, OnnxConfig(activation_bits=32, request=request), silent)


def test_a_traced_package_says_what_it_is(whole: Any) -> None:
    _, _, package, facts = whole
    assert {found.lowering for found in facts.timings} == {"grouped", "unrolled"}
    assert facts.lowering == facts.timings[0].lowering
    decoder = Decoder(package)
    assert (decoder.metadata[LOWERING_KEY], decoder.metadata[MIN_ONNXRUNTIME_KEY]) == (
        facts.lowering,
        facts.min_onnxruntime,
    )
    assert (decoder.shares_buffer, decoder.takes_positions) == (False, False)


def test_parity_of_a_traced_package_passes(whole: Any) -> None:
    source, twin, package, _ = whole
    blocks = torch.randint(2, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(1))
    config = ParityConfig(
        max_relative_error=EXACT, max_kl=1e-8, min_routing_agreement=0.99, max_perplexity_increase={}, decode_steps=8
    )
    parity = check_parity(ParitySubject(package, twin, source, blocks, "int8", False), config, silent)
    assert parity.breaches == ()
    result = parity.providers["CPUExecutionProvider"]
    assert not isinstance(result, str)
    assert len(result.twin.routing_agreement) == len(result.twin.hidden_error) == 1
    # 8 bits show, and the taps do not show them twice
    assert max(result.twin.hidden_error) < EXACT < max(result.finetuned.hidden_error)


def test_greedy_tokens_of_a_traced_package_are_those_of_transformers(whole: Any) -> None:
    _, twin, package, _ = whole
    prompt, count = [5, 17, 44, 3, 80], 24
    model = load(twin)
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()
    decoder = Decoder(package)
    assert [token for (token,) in decoder.generate([prompt], count, Sampling())] == expected
    genai = og.Model(str(package))
    params = og.GeneratorParams(genai)
    params.set_search_options(max_length=len(prompt) + count)
    generator = og.Generator(genai, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0).tolist()[len(prompt) :]
    assert found == expected[: len(found)]
    assert len(found) == count or found[-1] == 1


@pytest.mark.parametrize(
    "family", [family for family in DECODERS if family.routed], ids=lambda family: family.model_type
)
def test_tensors_classified_by_modules_are_as_the_families_have_them(family: Any, tmp_path: Path) -> None:
    model = make_model(family.architecture.removesuffix("ForCausalLM"), **SPARSE[family.model_type].model)
    model.save_pretrained(tmp_path)
    shapes = {name: entry.shape for name, entry in open_checkpoint(tmp_path).entries.items()}
    found = classify_tensors(model.config, shapes)
    assert found == {name: classify_tensor(family, name) for name in shapes}
    assert "experts" in found.values()


@pytest.mark.parametrize(
    ("name", "routers"),
    [
        ("cohere2_moe", ["mlp.gate.weight"]),
        ("ernie4_5_moe", ["mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias"]),
        ("hunyuan_v1_moe", ["mlp.gate.wg.weight"]),
        ("granitemoe_swa", ["block_sparse_moe.router.weight"]),
    ],
)
def test_a_router_is_found_wherever_it_lies_in_its_gate(name: str, routers: list[str], tmp_path: Path) -> None:
    stem, fields = MODELS[name]
    model = make_model(stem, **fields)
    model.save_pretrained(tmp_path)
    shapes = {name: entry.shape for name, entry in open_checkpoint(tmp_path).entries.items()}
    found = classify_tensors(model.config, shapes)
    layer = "model.layers.1."
    assert sorted(each for each, kind in found.items() if kind == "router" and each.startswith(layer)) == [
        f"{layer}{each}" for each in routers
    ]


@pytest.mark.parametrize(
    ("fields", "head", "message"),
    [
        (
            {"is_causal": False},
            "ForCausalLM",
            "config.json: is_causal is False; graphs are written of decoders that read from left to right alone",
        ),
        (
            {},
            "ForTokenClassification",
            "config.json: architectures is MixtralForTokenClassification; graphs are written of decoders with logits "
            "of the next token alone",
        ),
        (
            {},
            "Model",
            "config.json: architectures is MixtralModel; graphs are written of decoders with logits of the next token "
            "alone",
        ),
    ],
)
def test_what_gives_no_next_token_is_refused_before_it_is_quantized(
    fields: dict[str, Any], head: str, message: str, tmp_path: Path
) -> None:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, **fields)
    getattr(transformers, f"Mixtral{head}")(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "twin", "float32", QuantizeConfig(), silent)
    assert not (tmp_path / "twin").exists()


REFUSED = [
    (
        "Qwen2",
        {},
        "config.json: model_type qwen2 has no module of experts that transformers marks as one",
    ),
    (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "model.layers.0.mlp.experts: experts of model_type gpt_oss have a gate of their own; the lowerings write "
        f"plain experts, gated or not, with {', '.join(ACTIVATIONS)}",
    ),
    (
        "Lfm2Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 0, "layer_types": ["full_attention", "conv"]},
        "config.json: model_type lfm2_moe keeps a cache of LinearAttentionLayer; a traced decoder has keys and "
        "values in every layer",
    ),
]


@pytest.mark.parametrize(("stem", "fields", "message"), REFUSED, ids=[stem for stem, *_ in REFUSED])
def test_what_cannot_be_traced_is_refused_in_one_line(
    stem: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_model(stem, **fields).save_pretrained(tmp_path / "source")
    (tmp_path / "twin").mkdir()
    quantize_checkpoint(tmp_path / "source", tmp_path / "twin", "float32", QuantizeConfig(), silent)
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        write_package(tmp_path / "twin", tmp_path, OnnxConfig(), silent)


def test_a_variant_in_float16_is_refused_in_one_line(tmp_path: Path) -> None:
    make_model("Olmoe", **MODELS["olmoe"][1]).save_pretrained(tmp_path / "source")
    (tmp_path / "twin").mkdir()
    quantize_checkpoint(tmp_path / "source", tmp_path / "twin", "float16", QuantizeConfig(), silent)
    message = (
        f"{tmp_path / 'twin'}: olmoe is traced, and a traced graph is float32; leave out the variants in 16 bits, "
        "which are 'float16' and with "
        "export.device 'cuda' all but 'float32'"
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        write_package(tmp_path / "twin", tmp_path, OnnxConfig(), silent)


def test_an_encoder_decoder_is_refused_before_it_is_quantized(tmp_path: Path) -> None:
    fields = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_experts": 4,
    }
    config = transformers.SwitchTransformersConfig(**fields)
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path)
    message = "config.json: model_type switch_transformers has no decoder in transformers (AutoModelForCausalLM)"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        quantize_checkpoint(tmp_path, tmp_path / "twin", "float32", QuantizeConfig(), silent)
    assert not (tmp_path / "twin").exists()


def test_a_tensor_that_is_no_parameter_is_refused(tmp_path: Path) -> None:
    model = make_model("Olmoe", **MODELS["olmoe"][1])
    model.save_pretrained(tmp_path)
    shapes = {name: entry.shape for name, entry in open_checkpoint(tmp_path).entries.items()}
    where, how = "the checkpoint of model_type olmoe", "it must be as transformers' save_pretrained writes it"
    message = f"{where} has a tensor 'mtp.weight' that belongs to no parameter; {how}"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        classify_tensors(model.config, {**shapes, "mtp.weight": (3, 3)})
    del shapes["model.layers.1.mlp.experts.2.up_proj.weight"]
    message = f"{where} has no tensor 'model.layers.1.mlp.experts.2.up_proj.weight'; {how}"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        classify_tensors(model.config, shapes)
