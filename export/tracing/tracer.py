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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer
from transformers.integrations import moe as transformers_moe
from transformers.pytorch_utils import Conv1D

from dense2moe.export import names
from dense2moe.export.coverage import ACTIVATIONS, Activation
from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.parameters import (
    RowRange,
    empty_model,
    find_embeddings,
    find_routers,
    locate_parameters,
)
from dense2moe.export.quantization.twin import FloatWeight, Twin
from dense2moe.export.tracing.interface import BATCH, NEW, PAST, Interface, find_interface
from dense2moe.export.variant import ElementType
from dense2moe.upcycle.checkpoints.layers import find_layers

DOMAIN = "dense2moe"
OPSET = 20


_PLAIN_LINEARS = frozenset({"Linear", "FalconLinear"})
"""Classes of transformers that multiply by their weight and add their bias, and do nothing else."""


@dataclass(frozen=True)
class ExpertsModule:
    """A module of experts.

    The layer it stands in, and what it computes; its matrices are `gate_up_proj` [E, 2I, H], or `up_proj` [E, I, H]
    without a gate, and `down_proj` [E, H, I], and with biases each has a vector for each expert (`down_proj_bias`).
    `suffix` ends the names of all but the first in a layer.
    """

    layer: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    is_gated: bool
    has_bias: bool
    suffix: str = ""


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

    `outputs`: the graph's, by transformers' names. `transposed`: products whose matrix lies [in, out].
    """

    model: ir.Model
    interface: Interface
    outputs: tuple[str, ...]
    num_layers: int
    transposed: frozenset[str] = frozenset()


def trace_model(twin: Twin) -> Trace:
    """Trace the model of a twin, for prefill and decode alike.

    Raises:
        ExportError: onnxscript is not there, the exporter fails, or the model has what this road does not know.
    """
    model = empty_model(twin.checkpoint.config, twin.checkpoint.entries)
    interface = find_interface(model)
    located = locate_parameters(model, {name: entry.shape for name, entry in twin.checkpoint.entries.items()})
    experts = _mark(model)
    _fill(model, located, twin)
    rotary: Any
    for rotary in model.modules():
        if getattr(rotary, "rope_type", None) == "dynamic":
            rotary.rope_type = "default"  # its frequencies change beyond the context only, where a package ends
    with _silence():
        graph = _export(model, interface)
    outputs = tuple(str(value.name) for value in graph.graph.outputs)
    return Trace(located, experts, graph, interface, outputs, len(find_layers(model)), _find_transposed(model))


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
    has_cache = find_interface(model).has_cache
    found = Modules(locate_parameters(model, shapes), _mark(model))
    if has_cache:
        _check_cache(config, DynamicCache(config=config).layers)
    return found


def _find_transposed(model: PreTrainedModel) -> frozenset[str]:
    """The products whose matrix lies [in, out], as Conv1D's does."""
    return frozenset(name for name, module in model.named_modules() if type(module) is Conv1D)


def _mark(model: PreTrainedModel) -> dict[str, ExpertsModule]:
    """Replace large modules' forward by markers, and drop their weights."""
    layers = find_layers(model)
    layer_of = {id(module): n for n, layer in enumerate(layers) for module in layer.modules()}
    found: dict[str, ExpertsModule] = {}
    logits: dict[str, torch.Tensor] = {}  # by experts' module, what its router has just said
    routers = find_routers(model)
    inside = {id(part) for router in routers.values() for part in router.modules() if part is not router}
    for parent, router in routers.items():
        router.register_forward_hook(
            lambda _module, _inputs, output, key=f"{parent}.experts": logits.update({key: _first(output)})
        )
    embeddings = find_embeddings(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and type(module).__name__ in _PLAIN_LINEARS and id(module) not in inside:
            _answer(module, _linear_marker(name, module.out_features))
        elif type(module) is Conv1D:
            _answer(module, _linear_marker(name, module.nf))
        elif module is embeddings and type(module) is nn.Embedding:
            _answer(module, _embedding_marker(name, module.embedding_dim))
        elif hasattr(module, "is_transposed"):
            place = layer_of.get(id(module), -1)
            number = sum(other.layer == place for other in found.values())
            found[name] = _describe(name, module, place, model.config, f".{number}" if number else "")
            _answer(module, _experts_marker(name, found[name], logits))
    layers[0].register_forward_pre_hook(_tap_input, with_kwargs=True)
    for n, layer in enumerate(layers):
        layer.register_forward_hook(lambda _module, _inputs, output, n=n: _tap(names.hidden(n), output))
    if not found:
        raise ExportError(
            f"config.json: model_type {model.config.model_type} has no module of experts that transformers marks as one"
        )
    return found


def _answer(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    for name in list(module._parameters):
        module._parameters.pop(name)
    module.forward = forward


def _describe(name: str, module: Any, layer: int, config: Any, suffix: str) -> ExpertsModule:
    """The experts' computation, where the lowerings can express it."""
    plain = not module.has_gate or module._apply_gate.__func__ is transformers_moe._default_apply_gate
    wrong = {
        "a gate of their own": not plain,
        "transposed weights": module.is_transposed,
        "interleaved weights": module.has_gate and not module.is_concatenated,
        "a norm after them": module.has_post_expert_norm,
        "no layer": layer < 0,
    }
    refused = next((what for what, is_so in wrong.items() if is_so), None)
    function = getattr(module, "act_fn", None)
    activation = _find_activation(function)
    if refused is None and activation is None:
        refused = f"the activation {type(function).__name__}"
    if refused is None and not hasattr(config, "num_experts_per_tok"):
        refused = "no num_experts_per_tok in their config"
    if refused is not None or activation is None:
        raise ExportError(
            f"{name}: experts of model_type {config.model_type} have {refused}; the lowerings write plain experts, "
            f"gated or not, with {', '.join(ACTIVATIONS)}"
        )
    num_experts, hidden, width = module.down_proj.shape
    k = int(config.num_experts_per_tok)
    return ExpertsModule(layer, num_experts, k, hidden, width, activation, module.has_gate, module.has_bias, suffix)


def _find_activation(function: object) -> Activation | None:
    if isinstance(function, nn.Sequential) and all(isinstance(behind, nn.Dropout) for behind in list(function)[1:]):
        function = function[0]
    if function is F.silu:
        return "silu"
    return next((form for name, form in ACTIVATIONS.items() if type(function) is type(ACT2FN[name])), None)


def _symbolic(
    op: str, inputs: list[torch.Tensor], name: str, like: torch.Tensor, shape: tuple[int | torch.SymInt, ...]
) -> torch.Tensor:
    found: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{op}", inputs, {"name": name}, dtype=like.dtype, shape=shape, version=1
    )
    return found


def _linear_marker(name: str, width: int) -> Callable[..., torch.Tensor]:
    return lambda x: _symbolic("Linear", [x], name, x, (*x.shape[:-1], width))


def _embedding_marker(name: str, width: int) -> Callable[..., torch.Tensor]:
    return lambda ids: _symbolic("Embedding", [ids], name, torch.empty(0), (*ids.shape, width))


def _experts_marker(name: str, module: ExpertsModule, logits: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    k = module.num_experts_per_tok
    wrong = (
        f"{name}: a token visits {{}} experts, and config.json says num_experts_per_tok {k}; both must be one number"
    )

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        if top_k_index.shape[-1] != k:
            raise ExportError(wrong.format(top_k_index.shape[-1]))
        x = hidden_states.reshape(-1, module.hidden_size)
        inputs = [x, top_k_weights.reshape(-1, k).to(x.dtype), top_k_index.reshape(-1, k).to(torch.int64)]
        said = logits.pop(name, None)
        if said is not None and said.shape[-1] == module.num_experts:
            inputs.append(
                _tap(
                    names.router_logits(module.layer) + module.suffix, said.reshape(-1, module.num_experts).to(x.dtype)
                )
            )
        return _symbolic("Experts", inputs, name, x, tuple(x.shape)).reshape(hidden_states.shape)

    return forward


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _tap(name: str, output: Any) -> Any:
    """A module's (first) output under a name of its own."""
    if isinstance(output, tuple):
        return (_tap(name, output[0]), *output[1:])
    return _symbolic("Tap", [output], name, output, tuple(output.shape))


def _tap_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the first layer reads, under a name of its own."""
    if args:
        return (_tap(names.ENTERED, args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": _tap(names.ENTERED, kwargs["hidden_states"])}


def _fill(model: PreTrainedModel, located: Mapping[str, tuple[RowRange, ...]], twin: Twin) -> None:
    """Give the remaining parameters and buffers their values, in float32.

    They are all small.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        tensors = []
        for piece in located[name]:
            entry = twin.checkpoint.entries[piece.name]
            whole = (
                twin.checkpoint.read(piece.name).flatten()
                if len(entry.shape) < 2
                else FloatWeight(entry, (piece.start, piece.stop)).read()
            )
            tensors.append(whole[piece.start : piece.stop] if len(entry.shape) < 2 else whole)
        read = torch.cat(tensors).reshape(value.shape).to(value.dtype)
        owner = model.get_submodule(name.rpartition(".")[0])
        kept = nn.Parameter(read, requires_grad=False) if isinstance(value, nn.Parameter) else read
        setattr(owner, name.rpartition(".")[2], kept)


def _export(model: PreTrainedModel, interface: Interface) -> ir.Model:
    try:
        from transformers.exporters.configs import OnnxConfig  # onnxscript is an extra: only this road needs it
        from transformers.exporters.exporter_onnx import OnnxExporter

        exporter = OnnxExporter()
    except ImportError as error:
        raise ExportError(
            f"tracing {model.config.model_type} needs another package ({error}); install the [trace] extra"
        ) from error
    dynamic = torch.export.Dim.DYNAMIC
    try:
        inputs: dict[str, Any] = {name: each.example for name, each in interface.inputs.items()}
        shapes: dict[str, Any] = {name: dict.fromkeys(each.axes, dynamic) for name, each in interface.inputs.items()}
        if interface.has_cache:
            past = _empty_past(model)
            inputs["past_key_values"] = past
            shapes["past_key_values"] = [{0: dynamic, 2: dynamic}] * (2 * len(past.layers))
        exported = exporter.export(model, inputs, config=OnnxConfig(dynamic_shapes=shapes, opset_version=OPSET))
    except ExportError:
        raise
    except (
        Exception
    ) as error:  # of many kinds: whatever the exporter, torch and onnxscript raise for what they cannot follow
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ExportError(
            f"config.json: model_type {model.config.model_type} cannot be traced by transformers' exporter ({reason})"
        ) from error
    graph: ir.Model = exported.program
    return graph


def _empty_past(model: PreTrainedModel) -> DynamicCache:
    """A cache of zeros, in the shapes the model's layers write."""
    with torch.no_grad():
        written = model(input_ids=torch.ones(BATCH, NEW, dtype=torch.int64), use_cache=True).past_key_values
    layers = getattr(written, "layers", ())
    _check_cache(model.config, layers or [written])
    past = DynamicCache()
    for n, layer in enumerate(layers):
        shapes = [(BATCH, value.shape[1], PAST, value.shape[3]) for value in (layer.keys, layer.values)]
        past.update(torch.zeros(shapes[0]), torch.zeros(shapes[1]), n)
    return past


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
    """Silence the exporter's terminal output; it raises what matters."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
