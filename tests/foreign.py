"""Packages that we did not write, of tiny random models, and the twins whose weights theirs are.

A library for tests and benchmarks.
    mixtral = make_foreign("mixtral", "int4", tmp_path)     # transformers' exporter, then onnxruntime's own quantizer
    Decoder(mixtral.package)                                # mixtral.twin has in float32 what its integers stand for

The exporter is transformers' (its experts are products in a loop that it unrolled); integers are onnxruntime's
`MatMulNBitsQuantizer`'s, float16 is its converter's. Dense models can be onnxruntime-genai's, by `build_by_genai`. None
of these programs knows of this project, and nothing of it is in their files but the names of past and present, which
whoever exports a package chooses."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import numpy_helper
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
)

from dense2moe.export.storage import MODEL_NAME
from dense2moe.export.variant import Variant
from tests.faults.graphs import Graph
from tests.faults.planted import Exported
from tests.faults.stores import Dequantized, Integers

Kind = Literal["llama", "mixtral", "qwen2_moe"]
Accuracy = Literal[0, 4]

VARIANTS: tuple[Variant, ...] = ("float32", "float16", "int8", "int8-qdq", "int4", "mixed")
BLOCK = 32
_SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2}
_CONFIGS: dict[Kind, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mixtral": (MixtralConfig, _EXPERTS | {"num_local_experts": 4, "sliding_window": 20}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        _EXPERTS
        | {
            "num_experts": 4,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
}


# Checkpoints.


def make_checkpoint(
    kind: Kind,
    directory: Path,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """A random model of a kind, its norms and biases random too; the command line wants a tokenizer beside it."""
    config_class, own = _CONFIGS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_class(**_SIZES | own | overrides), dtype=dtype)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # norms of ones would be one tensor of the file, read by all
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def _copy_companions(checkpoint: Path, output: Path) -> None:
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copy(path, output)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other makers' programs say nothing, and leave logging as it was.

    Importing onnxruntime's quantizer would let every library talk.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    level, handlers = root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        logging.disable(disabled)


# Exporters.


def export_by_transformers(
    checkpoint: Path, package: Path, dtype: torch.dtype = torch.float32, fusions: Literal["cpu"] | None = None
) -> Path:
    """transformers' own exporter, with a KV cache that grows; of experts it takes `grouped_mm` alone.

    `fusions` gives onnxruntime's operators.
    """
    with _quiet():
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    c = model.config
    if hasattr(c, "num_experts_per_tok"):
        model.set_experts_implementation("grouped_mm")
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    past, dynamic = DynamicCache(), torch.export.Dim.DYNAMIC
    for layer in range(c.num_hidden_layers):
        empty = torch.zeros(2, c.num_key_value_heads, 5, head_dim, dtype=dtype)
        past.update(empty, empty.clone(), layer)
    inputs = {
        "input_ids": torch.ones(2, 3, dtype=torch.int64),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "position_ids": torch.arange(5, 8).repeat(2, 1),
        "past_key_values": past,
    }
    shapes: dict[str, Any] = {
        name: {0: dynamic, 1: dynamic} for name in ("input_ids", "attention_mask", "position_ids")
    }
    shapes |= {"past_key_values": [{0: dynamic, 2: dynamic}] * (2 * c.num_hidden_layers)}
    with _quiet():
        graph = (
            OnnxExporter()
            .export(model, inputs, config=OnnxConfig(dynamic_shapes=shapes, opset_version=20, ort_fusions=fusions))
            .program
        )
    for values, stem in ((graph.graph.inputs[3:], "past_key_values"), (graph.graph.outputs[1:], "present")):
        for number, value in enumerate(values):
            value.name = f"{stem}.{number // 2}.{('key', 'value')[number % 2]}"
    package.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(graph, package / MODEL_NAME)
    _copy_companions(checkpoint, package)
    return package


def build_by_genai(checkpoint: Path, package: Path, precision: Literal["fp32", "int4"], *options: str) -> Path:
    """onnxruntime-genai's model builder, of dense models; its left padding is wrong.

    `options` are such as `int4_block_size=32`. A test that needs it is skipped where it is not installed.
    """
    with _quiet():
        builder = pytest.importorskip("onnxruntime_genai.models.builder", reason="onnxruntime-genai is not installed")
        where = (None, str(checkpoint), str(package), precision, "cpu", str(package.parent / "cache"))
        builder.create_model(*where, **builder.parse_extra_options(*where, list(options)))
    return package


# What makes weights narrower.


def quantize(
    package: Path,
    output: Path,
    variant: Literal["int8", "int4", "mixed"],
    accuracy: Accuracy = 4,
    symmetric: bool = True,
) -> Path:
    """A float32 package by onnxruntime's quantizer: every product with weights, those of experts too.

    'mixed' has experts in 4 bits and all else in 8; without experts every second product.
    """
    proto = onnx.load(package / MODEL_NAME)
    experts = fold_weights(proto)
    match variant:
        case "int8":
            _quantize_products(proto, 8, accuracy, symmetric)
        case "int4":
            _quantize_products(proto, 4, accuracy, symmetric)
        case "mixed":
            products = [node for node in proto.graph.node if node.op_type == "MatMul"]
            few = [node.name for node in products if node.input[1] in experts] or [node.name for node in products[1::2]]
            proto = _quantize_products(proto, 8, accuracy, symmetric, exclude=few)
            proto = _quantize_products(proto, 4, accuracy, symmetric)
    return _save(proto, package, output)


def _quantize_products(
    proto: onnx.ModelProto, bits: int, accuracy: Accuracy, symmetric: bool, exclude: Sequence[str] = ()
) -> onnx.ModelProto:
    with _quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            proto,
            bits=bits,
            block_size=BLOCK,
            is_symmetric=symmetric,
            accuracy_level=accuracy or None,
            nodes_to_exclude=list(exclude),
        )
        quantizer.process()
    made = quantizer.model.model
    assert isinstance(made, onnx.ModelProto)
    return made


def quantize_static(package: Path, output: Path, symmetric: bool = True, products: bool = False) -> Path:
    """A float32 package by onnxruntime's static quantizer: all products by weights but routers.

    Ranges are measured on tokens. Without `symmetric` activations are unsigned integers with zero points, as is its
    default. With `products` those without weights are rounded too.
    """
    with _quiet():
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
        from onnxruntime.quantization import quantize_static as run
    proto = onnx.load(package / MODEL_NAME)
    fold_weights(proto)
    widths = {tensor.name: tensor.dims[1] for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    left = [
        node.name
        for node in proto.graph.node
        if node.op_type == "MatMul" and widths.get(node.input[1], 5 if products else 0) <= 4  # routers have 4 rows
    ]
    ids = np.random.default_rng(0).integers(2, 300, (1, 128))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(128)[None]}
    for value in proto.graph.input:
        if value.name not in feeds:
            dims = value.type.tensor_type.shape.dim
            feeds[value.name] = np.zeros((1, dims[1].dim_value, 0, dims[3].dim_value), np.float32)

    class Text(CalibrationDataReader):  # type: ignore[misc]
        left: ClassVar = [feeds]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    _save(proto, package, output)
    with _quiet():
        run(
            output / MODEL_NAME,
            output / MODEL_NAME,
            Text(),
            QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=left,
            per_channel=True,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": symmetric,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
            },
        )
    return output


def fold_weights(proto: onnx.ModelProto) -> set[str]:
    """Cut stacked weights [E, K, N] where the graph itself cuts them, `Split` and then `Squeeze`.

    The quantizer takes matrices alone.
    Returns the names of the matrices.
    """
    graph = proto.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    pieces: dict[str, np.ndarray] = {}
    matrices: set[str] = set()
    for node in list(graph.node):
        if node.op_type == "Split" and node.input[0] in tensors and len(tensors[node.input[0]].dims) == 3:
            stack = numpy_helper.to_array(tensors[node.input[0]])
            assert len(node.output) == len(stack)
            pieces |= dict(zip(node.output, stack, strict=True))
            graph.node.remove(node)
        elif node.op_type == "Squeeze" and node.input[0] in pieces:
            graph.initializer.append(numpy_helper.from_array(pieces[node.input[0]], node.output[0]))
            matrices.add(node.output[0])
            graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return matrices


def narrow(package: Path, output: Path, keep_types: bool = False) -> Path:
    """A float32 package by onnxruntime's float16 converter.

    Logits stay float32, and with `keep_types` so does the cache.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    wide = [*DEFAULT_OP_BLOCK_LIST, "ScatterElements"]  # which counts tokens: the CPU adds no float16 there
    wide_proto = onnx.load(package / MODEL_NAME)
    del wide_proto.graph.value_info[:]  # of a fused graph some are wrong
    with _quiet():
        proto = convert_float_to_float16(
            wide_proto, keep_io_types=True if keep_types else ["logits"], op_block_list=wide
        )
    return _save(proto, package, output)


def _save(proto: onnx.ModelProto, package: Path, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, output / MODEL_NAME)
    for path in package.iterdir():
        if path.suffix in (".json", ".jinja") and path.is_file():
            shutil.copy(path, output)
    return output


# Twins.


def write_twin(checkpoint: Path, package: Path, output: Path) -> Path:
    """The checkpoint with what the package's integers stand for in the place of its matrices.

    A row of a product is of that row of the checkpoint which is nearest to it; each may be taken once. So nothing is
    asked of names, or of how matrices are packed or turned in the file."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    stores = [
        store
        for store in Graph(onnx.load(package / MODEL_NAME), checkpoint).stores
        if isinstance(store, Integers | Dequantized)
    ]
    assert stores, f"{package}: no product's weights are integers"
    rows = {width: _Rows(found) for width, found in _by_width(model).items()}
    for store in stores:
        rows[store.values.shape[1]].take(store.values, store.is_table)
    model.save_pretrained(output)
    _copy_companions(checkpoint, output)
    return output


def _by_width(model: torch.nn.Module) -> Mapping[int, list[tuple[bool, torch.Tensor]]]:
    """Matrices [rows, width] of a model, which are its own memory, with whether they are the embedding."""
    found: dict[int, list[tuple[bool, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            found.setdefault(parameter.shape[-1], []).append(
                ("embed" in name, parameter.data.reshape(-1, parameter.shape[-1]))
            )
    return found


class _Rows:
    """All rows of one width of a checkpoint, of which each is replaced once."""

    def __init__(self, matrices: list[tuple[bool, torch.Tensor]]) -> None:
        self.places = [(matrix, row) for _, matrix in matrices for row in range(len(matrix))]
        self.is_table = torch.tensor([table for table, matrix in matrices for _ in range(len(matrix))])
        self.right = torch.cat([matrix.clone() for _, matrix in matrices]).double()
        self.taken: set[int] = set()

    def take(self, values: np.ndarray, is_table: bool) -> None:
        found = torch.from_numpy(np.ascontiguousarray(values)).double()
        distance = torch.cdist(found, self.right)
        distance[:, self.is_table != is_table] = torch.inf
        error, nearest = distance.min(dim=1)
        worst = float((error / self.right[nearest].norm(dim=1)).max())
        # rounding to 4 bits: .15; other rows: 1.4
        assert worst < 0.3, f"a row of the package is {worst:.2f} from every row of the checkpoint"
        places = nearest.tolist()
        assert len(set(places)) == len(places)
        assert not self.taken & set(places), "a row of the checkpoint is in the package twice"
        self.taken |= set(places)
        for place, row in zip(places, found.float(), strict=True):
            matrix, number = self.places[place]
            matrix[number] = row


def write_float16_twin(checkpoint: Path, output: Path) -> Path:
    """The checkpoint with all its weights rounded to float16, in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.save_pretrained(output)
    _copy_companions(checkpoint, output)
    return output


# All of it.


def make_foreign(
    kind: Kind,
    variant: Variant,
    folder: Path,
    seed: int = 0,
    accuracy: Accuracy = 4,
    symmetric: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fusions: Literal["cpu"] | None = None,
    **overrides: Any,
) -> Exported:
    """A package of a random model in a variant, and its twin, below `folder`.

    A model or package that is there already is not made again.
    """
    source, exported = folder / "source", folder / f"float32{'-fused' if fusions else ''}"
    if not source.is_dir():
        make_checkpoint(kind, source, seed, tokenizer, **overrides)
    if not exported.is_dir():
        export_by_transformers(source, exported, fusions=fusions)
    if variant == "float32":
        return Exported(source, source, exported)
    how = f"-{accuracy}{'' if symmetric else '-asymmetric'}" if variant != "float16" else ""
    name = f"{variant}{how}{'-fused' if fusions else ''}"
    package, twin = folder / name / "package", folder / name / "twin"
    if twin.is_dir():
        return Exported(source, twin, package)
    match variant:
        case "int8" | "int4" | "mixed":
            quantize(exported, package, variant, accuracy, symmetric)
            write_twin(source, package, twin)
        case "int8-qdq":
            quantize_static(exported, package, symmetric)
            write_twin(source, package, twin)
        case "float16":
            narrow(exported, package)
            write_float16_twin(source, twin)
        case _:
            raise ValueError(f"no other maker writes {variant} here")
    return Exported(source, twin, package)
