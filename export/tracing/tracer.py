"""Any sparse model traced, with markers in place of its large weights.

transformers' exporter follows the model's own forward, so whatever a family does between its matrices is right by
construction: its attention, its norms, how its router chooses. What holds weights is not followed. Before the trace,
plain products, the embedding and the modules of experts are made to answer with one node of a domain of ours each,
which the exporter keeps as it is:

    Embedding(input_ids) → rows          Linear(x) → x W^T + b
    Experts(x [T, H], weights [T, k], chosen [T, k]) → mixed [T, H]
    Tap(x) → x, and the same with the router logits: values that keep a name

The passes replace them. So no expert is unrolled and recognized again, a trace of a large model needs no weights and
takes as long as that of a small one, and its weights come from the twin, quantized or not, one at a time when the file
is written. Names of modules are the nodes' attributes: nothing is guessed from the shape of a graph. What stays in the
trace as it is: norms, routers, rotary frequencies.

A cache grows by concatenation: layers with a window keep all keys too, and mask them.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.parameters import RowRange, empty_model, locate_parameters
from dense2moe.export.quantization.twin import FloatWeight, Twin
from dense2moe.export.tracing.attention import mark_attention
from dense2moe.export.tracing.interface import BATCH, PAST, Interface, find_interfaces
from dense2moe.export.tracing.marking import ExpertsModule, mark_modules
from dense2moe.export.variant import ElementType

OPSET = 20
_DRAWING = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
_WEIGHTLESS = ("'Linear' object has no attribute 'weight'", "'Linear' object has no attribute 'bias'")
"""How torch says that a marked product has no weights."""


@dataclass(frozen=True)
class Modules:
    """What a model's graph will be made of.

    `located`: where in the checkpoint the rows of every parameter lie. `experts`: the modules of experts by name.
    """

    located: Mapping[str, tuple[RowRange, ...]]
    experts: Mapping[str, ExpertsModule]


@dataclass(frozen=True)
class Trace(Modules):
    """A graph with markers.

    `outputs`: the graph's, by transformers' names. `num_cached`: layers whose keys and values it reads. `head`: the
    product that gives logits. `transposed`: products whose matrix lies [in, out].
    """

    model: ir.Model
    interface: Interface
    outputs: tuple[str, ...]
    num_cached: int
    head: str | None = None
    transposed: frozenset[str] = frozenset()


def trace_model(twin: Twin) -> tuple[Trace, ...]:
    """Trace the model of a twin.

    It is one graph, or an encoder's and a decoder's.

    A decoder's is for prefill and decode alike.

    Raises:
        ExportError: onnxscript is not there, the exporter fails, or the model has what this road does not know.
    """
    model = empty_model(twin.checkpoint.config, twin.checkpoint.entries)
    interfaces = find_interfaces(model)
    located = locate_parameters(model, {name: entry.shape for name, entry in twin.checkpoint.entries.items()})
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    experts = mark_modules(model)
    _fill(model, located, twin)
    rotary: Any
    for rotary in model.modules():
        if getattr(rotary, "rope_type", None) == "dynamic":
            rotary.rope_type = "default"  # its frequencies change beyond the context only, where a package ends
    traces = []
    for interface in interfaces:
        with _silence(), mark_attention(not interface.has_cache):
            graph, num_cached = _export(model, interface)
        outputs = tuple(str(value.name) for value in graph.graph.outputs)
        traces.append(Trace(located, experts, graph, interface, outputs, num_cached, head, _find_transposed(model)))
    return tuple(traces)


def check_traced_type(config: PreTrainedConfig, element: ElementType, where: str) -> None:
    """Refuse a graph in 16 bits.

    Raises:
        ExportError: it is asked for; `where` begins the message.
    """
    if element != "float32":
        raise ExportError(
            f"{where}: {config.model_type} is traced, and a traced graph is float32; leave out the variants in 16 "
            "bits, which are 'float16' and with export.device 'cuda' all but 'float32'"
        )


def describe_modules(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> Modules:
    """The modules of a model's graph, from config and shapes alone.

    Raises:
        ExportError: the model has what this road does not know.
    """
    model = empty_model(config, shapes)
    has_cache = any(interface.has_cache for interface in find_interfaces(model))
    found = Modules(locate_parameters(model, shapes), mark_modules(model))
    if has_cache:
        _check_cache(config, DynamicCache(config=config).layers)
    return found


def _find_transposed(model: PreTrainedModel) -> frozenset[str]:
    """The products whose matrix lies [in, out], as Conv1D's does."""
    return frozenset(name for name, module in model.named_modules() if type(module) is Conv1D)


def _fill(model: PreTrainedModel, located: Mapping[str, tuple[RowRange, ...]], twin: Twin) -> None:
    """Give the remaining parameters and buffers their values, in float32.

    They are all small. What the checkpoint lacks the model makes.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name not in located:
            if value.is_meta:
                owner.to_empty(device="cpu", recurse=False)
                model._init_weights(owner)
            continue
        tensors = []
        for piece in located[name]:
            entry = twin.checkpoint.entries[piece.name]
            whole = (
                twin.checkpoint.read(piece.name).flatten()
                if len(entry.shape) < 2
                else FloatWeight(entry, (piece.start, piece.stop)).read()
            )
            tensors.append(whole[piece.start : piece.stop] if len(entry.shape) < 2 else whole)
        joined = torch.cat(tensors) if tensors else torch.zeros(0)  # such as no register tokens
        read = joined.reshape(value.shape).to(value.dtype)
        kept = nn.Parameter(read, requires_grad=False) if isinstance(value, nn.Parameter) else read
        setattr(owner, name.rpartition(".")[2], kept)


def _export(model: PreTrainedModel, interface: Interface) -> tuple[ir.Model, int]:
    """An interface's graph, and the number of layers with a cache."""
    try:
        from transformers.exporters.configs import OnnxConfig  # onnxscript is an extra: only this road needs it
        from transformers.exporters.exporter_onnx import OnnxExporter

        exporter = OnnxExporter()
    except ImportError as error:
        raise ExportError(
            f"tracing {model.config.model_type} needs another package ({error}); install the [trace] extra"
        ) from error
    dynamic = torch.export.Dim.DYNAMIC
    num_cached = 0
    try:
        inputs, shapes = interface.list_arguments(), interface.list_axes(dynamic)
        if interface.has_cache:
            past = _empty_past(model, inputs)
            num_cached = len(past)
            inputs["past_key_values"] = past
            shapes["past_key_values"] = [{0: dynamic, 2: dynamic}] * (2 * num_cached)
        part = model.get_encoder() if interface.part == "encoder" else model
        exported = exporter.export(part, inputs, config=OnnxConfig(dynamic_shapes=shapes, opset_version=OPSET))
    except ExportError:
        raise
    except (
        Exception
    ) as error:  # of many kinds: whatever the exporter, torch and onnxscript raise for what they cannot follow
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if isinstance(error, AttributeError) and str(error).endswith(_WEIGHTLESS):
            reason = "it reads the weights of a product elsewhere than in the product's own forward"
        raise ExportError(
            f"config.json: model_type {model.config.model_type} cannot be traced by transformers' exporter ({reason})"
        ) from error
    graph: ir.Model = exported.program
    if drawn := sorted({node.op_type for node in graph.graph} & _DRAWING):
        raise ExportError(
            f"config.json: {type(model).__name__} draws numbers ({', '.join(drawn)}) in each pass; a graph must give "
            "the same outputs for the same inputs; take a class that draws none, such as the base model"
        )
    if not interface.has_cache:  # outputs of a part, as of each tower, are outputs of the whole in another form
        kept = [value for value in graph.graph.outputs if "." not in str(value.name)]
        graph.graph.outputs[:] = kept or list(graph.graph.outputs)
    return graph, num_cached


def _empty_past(model: PreTrainedModel, inputs: Mapping[str, Any]) -> DynamicCache | EncoderDecoderCache:
    """A cache of zeros, in the shapes the model's layers write.

    Of an encoder and a decoder no keys and values of the encoder's output are there, so that the graph computes them.
    """
    ids = {name: value for name, value in inputs.items() if name not in ("attention_mask", "position_ids")}
    with torch.no_grad():
        written = model(**ids, use_cache=True).past_key_values
    is_pair = isinstance(written, EncoderDecoderCache)
    own = written.self_attention_cache if is_pair else written
    layers = getattr(own, "layers", ())
    _check_cache(model.config, layers or [written])
    past = DynamicCache()
    for n, layer in enumerate(layers):
        shapes = [(BATCH, value.shape[1], PAST, value.shape[3]) for value in (layer.keys, layer.values)]
        past.update(torch.zeros(shapes[0]), torch.zeros(shapes[1]), n)
    return EncoderDecoderCache(past, DynamicCache()) if is_pair else past


def _check_cache(config: PreTrainedConfig, layers: Sequence[Any]) -> None:
    """Refuse a cache with more in a layer than keys and values."""
    strange = next((type(layer).__name__ for layer in layers if not isinstance(layer, DynamicLayer)), None)
    if strange is not None:
        raise ExportError(
            f"config.json: model_type {config.model_type} keeps a cache of {strange}; a traced decoder has keys and "
            "values in every layer"
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the exporter's terminal output; it raises what matters.

    torch prints a whole graph where it fails.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
