"""Faults planted in a file are found in it: a rounded router, norm or score, an expert that is floats."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, MixtralConfig, MixtralForCausalLM

from dense2moe.export.errors import ExportError
from dense2moe.export.graph import layers as layer_module
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.graph.invariants import check_graphs
from dense2moe.export.nodes.writer import GraphWriter
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.quantization.twin import Twin, Weight
from dense2moe.export.storage import DATA_NAME, MODEL_NAME
from dense2moe.export.variant import Variant

VARIANTS: tuple[Variant, ...] = get_args(Variant)
BLOCKS = torch.randint(2, 96, (4, 16), generator=torch.Generator().manual_seed(0))


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def make_package(source: Path, folder: Path, variant: Variant, lowering: Any) -> tuple[Path, Path]:
    """A twin and its package."""
    twin, package = folder / f"{variant} twin", folder / f"{variant} {lowering}"
    if not twin.exists():
        twin.mkdir()
        config = QuantizeConfig(
            method="search", block_size=16, max_perplexity_increase=1.0 if variant == "mixed" else None
        )
        quantize_checkpoint(source, twin, variant, config, silent, QuantizeInputs(blocks=BLOCKS, held_out=BLOCKS))
    package.mkdir()
    write_package(twin, package, OnnxConfig(lowering=lowering, activation_bits=32), silent)
    return twin, package


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral whose widths blocks of 16 divide, with a head of its own. Shared: read only."""
    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**small))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    directory = tmp_path_factory.mktemp("source")
    model.save_pretrained(directory)
    return directory


Find = Callable[[Variant, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def find(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Find:
    """The twin and the package of a variant and a lowering, each made once. Shared: read only."""
    folder, made = tmp_path_factory.mktemp("packages"), dict[tuple[Variant, str], tuple[Path, Path]]()

    def get(variant: Variant, lowering: str) -> tuple[Path, Path]:
        if (variant, lowering) not in made:
            made[variant, lowering] = make_package(source, folder, variant, lowering)
        return made[variant, lowering]

    return get


Fault = Callable[[ModelProto], None]


def plant(package: Path, directory: Path, fault: Fault) -> Path:
    """A copy of a package with a fault in its graph."""
    shutil.copytree(package, directory)
    proto = onnx.load(directory / MODEL_NAME)
    fault(proto)
    (directory / DATA_NAME).unlink()
    onnx.save(proto, directory / MODEL_NAME)
    return directory


def maker(proto: ModelProto, value: str) -> NodeProto:
    return next(node for node in proto.graph.node if value in node.output)


def insert(proto: ModelProto, before: NodeProto, *nodes: NodeProto) -> None:
    place = next(number for number, node in enumerate(proto.graph.node) if node is before or node.name == before.name)
    for number, node in enumerate(nodes):
        proto.graph.node.insert(place + number, node)


def round_input(proto: ModelProto, node: NodeProto, place: int, to: int = TensorProto.FLOAT16) -> None:
    """Cast an input of a node to another type and back."""
    name = node.input[place]
    casts = [
        helper.make_node("Cast", [name], [f"{name}.rounded"], f"{name}/round", to=to),
        helper.make_node("Cast", [f"{name}.rounded"], [f"{name}.back"], f"{name}/back", to=TensorProto.FLOAT),
    ]
    node.input[place] = f"{name}.back"
    insert(proto, node, *casts)


def replace_initializer(proto: ModelProto, name: str, array: np.ndarray) -> None:
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def store_a_router_in_float16(proto: ModelProto) -> None:
    node = maker(proto, "router_logits.1")
    name = node.input[1]
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    replace_initializer(proto, name, numpy_helper.to_array(tensor).astype(np.float16))
    node.input[1] = f"{name}.widened"
    insert(proto, node, helper.make_node("Cast", [name], [f"{name}.widened"], f"{name}/widen", to=TensorProto.FLOAT))


def cast_a_router(proto: ModelProto) -> None:
    round_input(proto, maker(proto, "router_logits.1"), 1)


def round_what_a_router_reads(proto: ModelProto) -> None:
    round_input(proto, maker(proto, "router_logits.1"), 0, TensorProto.BFLOAT16)


def quantize_input(proto: ModelProto, node: NodeProto, place: int) -> None:
    """Round an input of a node to 8 bits."""
    proto.graph.initializer.extend(
        [numpy_helper.from_array(np.float32(0.1), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    )
    name = node.input[place]
    nodes = [
        helper.make_node("QuantizeLinear", [name, "scale", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "dequantize"),
    ]
    node.input[place] = "dq"
    insert(proto, node, *nodes)


def quantize_what_a_router_reads(proto: ModelProto) -> None:
    quantize_input(proto, maker(proto, "router_logits.0"), 0)


def quantize_a_router(proto: ModelProto) -> None:
    quantize_input(proto, maker(proto, "router_logits.0"), 1)


def lose_a_router(proto: ModelProto) -> None:
    name = maker(proto, "router_logits.1").input[1]
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    replace_initializer(proto, name, numpy_helper.to_array(tensor) * np.float32(1.0001))


def norm_in_float16(proto: ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "SimplifiedLayerNormalization")
    (x, scale), (y,) = node.input, node.output
    before = [
        helper.make_node("Cast", [name], [f"{name}.narrow"], f"{name}/narrow", to=TensorProto.FLOAT16)
        for name in (x, scale)
    ]
    node.input[:], node.output[:] = [f"{x}.narrow", f"{scale}.narrow"], [f"{y}.narrow"]
    insert(proto, node, *before)
    place = next(number for number, each in enumerate(proto.graph.node) if each.name == node.name)
    proto.graph.node.insert(
        place + 1, helper.make_node("Cast", [f"{y}.narrow"], [y], f"{y}/widen", to=TensorProto.FLOAT)
    )


def round_the_logits(proto: ModelProto) -> None:
    readers = [node for node in proto.graph.node if "router_logits.1" in node.input]
    round_input(proto, readers[0], list(readers[0].input).index("router_logits.1"))


def round_the_weights(proto: ModelProto) -> None:
    readers = [node for node in proto.graph.node if "layers.1.moe.weights" in node.input]
    round_input(proto, readers[0], list(readers[0].input).index("layers.1.moe.weights"))


def multiply_an_expert_by_floats(proto: ModelProto) -> None:
    """The down projection of one expert as a float matrix of the same shape."""
    node = maker(proto, "layers.1.moe.expert.2.down")
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((48, 32), np.float32), "floats"))
    node.op_type, node.domain = "MatMul", ""
    del node.attribute[:]
    node.input[:] = [node.input[0], "floats"]


def multiply_attention_by_floats(proto: ModelProto) -> None:
    node = maker(proto, "layers.1.attention_output")
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((32, 32), np.float32), "floats"))
    node.op_type, node.domain = "MatMul", ""
    del node.attribute[:]
    node.input[:] = [node.input[0], "floats"]


def experts_by_the_float_operator(proto: ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "QMoE")
    matrices = {"floats1": np.zeros((4, 96, 32), np.float32), "floats2": np.zeros((4, 32, 48), np.float32)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in matrices.items())
    node.op_type = "MoE"
    node.input[:] = [node.input[0], node.input[1], "floats1", "", "floats2"]


def widen_an_experts_integers(proto: ModelProto) -> None:
    """The weights of one expert dequantized beforehand."""
    node = maker(proto, maker(proto, "layers.0.moe.expert.3.gate_up").input[1])
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((32, 96), np.float32), "floats"))
    node.op_type = "Identity"
    del node.attribute[:]
    node.input[:] = ["floats"]


ROUTER = r"model\.layers\.{}\.block_sparse_moe\.gate\.weight"
EVERYWHERE = [
    (variant, lowering) for variant in ("int8", "float16", "int8-qdq") for lowering in ("grouped", "unrolled")
]
NOT_HELD = f"the graph does not hold '{ROUTER.replace('{}', '1')}' in float32; a router must not be rounded"
ROUNDED_VALUES = (
    rf"node 'router_logits.(.)/MatMul' \(MatMul\) multiplies '{ROUTER.replace('{}', '.')}' by values "
    r"rounded to {}; they must be float32"
)
ROUNDED_CHOICE = (
    r"node '{}/round' \(Cast\) rounds to float16 what chooses experts by "
    rf"'{ROUTER.replace('{}', '1')}'; it must be float32"
)
FLOAT_EXPERT = r"node '{}' \(MatMul\) multiplies an expert's tokens by floats; its weights must be integers"
ELEMENTS = r"products read matrices of [\d,]+ floats and [\d,]+ integers; the twin has [\d,]+ and [\d,]+"
CASES: list[tuple[Fault, list[tuple[Variant, str]], str]] = [
    (store_a_router_in_float16, [(variant, "unrolled") for variant in VARIANTS], NOT_HELD),
    (lose_a_router, [("int4", "fused")], NOT_HELD),
    (
        cast_a_router,
        [("int8", "grouped"), ("float16", "fused")],
        rf"node 'router_logits.1.weight/round' \(Cast\) reads '{ROUTER.replace('{}', '1')}' in float16; it must be "
        r"float32",
    ),
    (
        quantize_a_router,
        [("int8-qdq", "grouped"), ("float32", "fused")],
        rf"node 'quantize' \(QuantizeLinear\) rounds '{ROUTER.replace('{}', '0')}'; a router must stay float32",
    ),
    (round_what_a_router_reads, [(variant, "grouped") for variant in VARIANTS], ROUNDED_VALUES.format("bfloat16")),
    (quantize_what_a_router_reads, [("int8-qdq", "grouped"), ("int4", "fused")], ROUNDED_VALUES.format("int8")),
    (
        norm_in_float16,
        [("float32", "fused"), ("int8-qdq", "unrolled")],
        r"node '.*' \(SimplifiedLayerNormalization\) normalizes in float16; it must be float32",
    ),
    (round_the_logits, EVERYWHERE, ROUNDED_CHOICE.format("router_logits.1")),
    (round_the_weights, [("int4", "grouped"), ("bfloat16", "unrolled")], ROUNDED_CHOICE.format("layers.1.moe.weights")),
    (
        multiply_an_expert_by_floats,
        [(variant, lowering) for variant in ("int8", "int4", "int8-qdq") for lowering in ("grouped", "unrolled")],
        FLOAT_EXPERT.format(r"layers.1.moe.expert.2.down/\w+"),
    ),
    (widen_an_experts_integers, [("int8-qdq", "grouped")], FLOAT_EXPERT.format("layers.0.moe.expert.3.gate_up/MatMul")),
    (multiply_attention_by_floats, [("int4", "fused"), ("int8-qdq", "grouped")], ELEMENTS),
    (experts_by_the_float_operator, [("int4", "fused")], ELEMENTS),
]
PLANTED = [
    pytest.param(fault, variant, lowering, message, id=f"{fault.__name__}-{variant}-{lowering}")
    for fault, ways, message in CASES
    for variant, lowering in ways
]


@pytest.mark.parametrize(("fault", "variant", "lowering", "message"), PLANTED)
def test_a_planted_fault_is_found_in_the_file(
    find: Find, tmp_path: Path, fault: Fault, variant: Variant, lowering: str, message: str
) -> None:
    twin, package = find(variant, lowering)
    faulty = plant(package, tmp_path / "faulty", fault)
    with pytest.raises(ExportError, match=f"^{re.escape(str(faulty))}: {message}$"):
        check_graphs(faulty, Twin(twin))


@pytest.mark.parametrize("lowering", ["fused", "grouped", "unrolled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_package_written_anew_without_a_fault_passes(
    find: Find, tmp_path: Path, variant: Variant, lowering: str
) -> None:
    if lowering == "fused" and variant in ("int8", "int8-qdq", "mixed"):
        lowering = "grouped"  # with exact activations there is no other
    twin, package = find(variant, lowering)
    check_graphs(plant(package, tmp_path / "anew", lambda proto: None), Twin(twin))


def test_names_do_not_matter(find: Find, tmp_path: Path) -> None:
    """Values, nodes and weights under numbers for names: what is wrong is found all the same."""

    def rename(proto: ModelProto) -> None:
        multiply_an_expert_by_floats(proto)
        kept = {value.name for value in (*proto.graph.input, *proto.graph.output)} | {""}
        numbers: dict[str, str] = {}
        for node in proto.graph.node:
            node.name = f"node {len(numbers)}"
            for names in (node.input, node.output):
                names[:] = [name if name in kept else numbers.setdefault(name, f"v{len(numbers)}") for name in names]
        for tensor in proto.graph.initializer:
            tensor.name = numbers.get(tensor.name, tensor.name)

    twin, package = find("int4", "unrolled")
    with pytest.raises(
        ExportError, match=r"\(MatMul\) multiplies an expert's tokens by floats; its weights must be integers$"
    ):
        check_graphs(plant(package, tmp_path / "faulty", rename), Twin(twin))


def test_a_builder_at_fault_writes_no_package(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer_module.add_exact_linear

    def lossy(graph: GraphWriter, x: Any, weight: Weight, name: str) -> Any:
        rounded = graph.op("Cast", [x], f"{name}.rounded", {"to": TensorProto.FLOAT16})
        return right(graph, graph.op("Cast", [rounded], f"{name}.back", {"to": TensorProto.FLOAT}), weight, name)

    monkeypatch.setattr(layer_module, "add_exact_linear", lossy)
    with pytest.raises(
        ExportError,
        match=r"multiplies 'model.layers.0.*gate.weight' by values rounded to float16; they must be float32$",
    ):
        make_package(source, tmp_path, "int4", "fused")


# Gates with a selection bias

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The twin and the int4 package of a random GLM-4-MoE with a dense layer and a shared expert. Shared: read only."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "first_k_dense_replace": 1,
        "rope_parameters": rope,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Glm4MoeForCausalLM(Glm4MoeConfig(**small))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.uniform_(buffer, -0.3, 0.3)
    folder = tmp_path_factory.mktemp("biased")
    model.save_pretrained(folder / "source")
    return make_package(folder / "source", folder, "int4", "grouped")


def change_a_bias(proto: ModelProto) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "layers.1.moe.selection_bias")
    tensor.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32), tensor.name)
    )


def choose_without_a_bias(proto: ModelProto) -> None:
    node = maker(proto, "layers.1.moe.biased_scores")
    node.op_type = "Identity"
    del node.input[1:]


def round_biased_scores(proto: ModelProto) -> None:
    (reader,) = [node for node in proto.graph.node if "layers.1.moe.biased_scores" in node.input]
    round_input(proto, reader, 0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (change_a_bias, f"the graph does not hold '{BIAS}' in float32; a router must not be rounded"),
        (choose_without_a_bias, f"the graph adds '{BIAS}' to nothing; it must choose experts"),
        (
            round_biased_scores,
            "node 'layers.1.moe.biased_scores/round' (Cast) rounds to float16 what chooses experts by "
            "'model.layers.1.mlp.gate.weight'; it must be "
            "float32",
        ),
    ],
)
def test_a_fault_of_a_selection_bias_is_found(
    fault: Fault, message: str, biased: tuple[Path, Path], tmp_path: Path
) -> None:
    twin, package = biased
    check_graphs(plant(package, tmp_path / "anew", lambda proto: None), Twin(twin))
    faulty = plant(package, tmp_path / "faulty", fault)
    with pytest.raises(ExportError, match=f"^{re.escape(f'{faulty}: {message}')}$"):
        check_graphs(faulty, Twin(twin))
