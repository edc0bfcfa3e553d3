"""Markers in place of a model's large modules, and names for values.

A marked module answers with one node of a domain of ours, which torch's exporter keeps as it is, and has no weights.
`tracer` tells the kinds of markers, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations import moe as transformers_moe
from transformers.pytorch_utils import Conv1D

from dense2moe.export import names
from dense2moe.export.coverage import ACTIVATIONS, Activation
from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.parameters import find_embeddings, find_routers
from dense2moe.upcycle.checkpoints.layers import find_blocks, find_layers, find_stacks
from dense2moe.upcycle.checkpoints.mixture_classes import is_own
from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.models.routing import assume_gate

DOMAIN = "dense2moe"
_PLAIN_LINEARS = frozenset({"Linear", "FalconLinear"})
"""Classes of transformers that multiply by their weight and add their bias, and do nothing else."""


@dataclass(frozen=True)
class ExpertsModule:
    """A module of experts.

    The layer it stands in, and what it computes; its matrices are `gate_up_proj` [E, 2I, H], or `up_proj` [E, I, H]
    without a gate, and `down_proj` [E, H, I], and with biases each has a vector for each expert (`down_proj_bias`).
    `gate` has the choice of experts alone: their weights are the model's. `suffix` ends the names of all but the first
    in a layer; `stack` counts the stacks of layers before.
    """

    layer: int
    gate: Gate
    hidden_size: int
    intermediate_size: int
    activation: Activation
    is_gated: bool
    has_bias: bool
    suffix: str = ""
    stack: int = 0


def mark_modules(model: PreTrainedModel) -> dict[str, ExpertsModule]:
    """Replace large modules' forward by markers, and drop their weights.

    Layers are numbered through, but in an encoder and a decoder, which are two graphs, each from 0 on.

    Raises:
        ExportError: the model has no experts, or experts that no lowering can express.
    """
    graphs = find_stacks(model) if model.config.is_encoder_decoder else (find_layers(model),)
    layers = [(n, layer) for graph in graphs for n, layer in enumerate(graph)]
    place_of = {id(module): (n, id(layer)) for n, layer in layers for module in layer.modules()}
    stack_of = {id(layer): number for number, stack in enumerate(find_stacks(model)) for layer in stack}
    found: dict[str, ExpertsModule] = {}
    num_experts_modules: dict[int, int] = {}  # by layer
    logits: dict[str, torch.Tensor] = {}  # by experts' module, what its router has just said
    routers = find_routers(model)
    inside = {id(part) for router in routers.values() for part in router.modules() if part is not router}
    for parent, router in routers.items():
        router.register_forward_hook(
            lambda _module, _inputs, output, key=f"{parent}.experts": logits.update({key: _first(output)})
        )
    table = getattr(find_embeddings(model), "weight", None)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and type(module).__name__ in _PLAIN_LINEARS and id(module) not in inside:
            _answer(module, _linear_marker(name, module.out_features))
        elif type(module) is Conv1D:
            _answer(module, _linear_marker(name, module.nf))
        elif isinstance(module, nn.Embedding) and module.weight is table and _is_plain(module):
            _answer(module, _embedding_marker(name, module.embedding_dim, getattr(module, "embed_scale", None)))
        elif hasattr(module, "is_transposed"):
            layer_number, own = place_of.get(id(module), (-1, -1))
            number = num_experts_modules.get(own, 0)
            num_experts_modules[own] = number + 1
            described = _describe(name, module, layer_number, model.config, f".{number}" if number else "")
            found[name] = replace(described, stack=stack_of.get(own, 0))
            _answer(module, _experts_marker(name, found[name], logits))
    blocks = find_blocks(model)
    for block in blocks if model.config.is_encoder_decoder else blocks[:1]:
        block[0].register_forward_pre_hook(_tap_input, with_kwargs=True)
    for n, layer in layers:
        layer.register_forward_hook(lambda _module, _inputs, output, n=n: _tap(names.hidden(n), output))
    if not found and not is_own(model.config.model_type):  # of ours, no layer may have any
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
    told = assume_gate(config)
    assert told is not None, "asked above"
    gate = Gate(num_experts, told.choice)
    return ExpertsModule(layer, gate, hidden, width, activation, module.has_gate, module.has_bias, suffix)


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


def _is_plain(module: nn.Embedding) -> bool:
    """Whether it gives rows of its table, or rows times its `embed_scale`."""
    return type(module) is nn.Embedding or type(module).__name__.endswith("ScaledWordEmbedding")


def _embedding_marker(name: str, width: int, scale: float | None) -> Callable[..., torch.Tensor]:
    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        rows = _symbolic("Embedding", [input_ids], name, torch.empty(0), (*input_ids.shape, width))
        return rows if scale is None else rows * scale

    return forward


def _experts_marker(name: str, module: ExpertsModule, logits: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    k = module.gate.max_experts_per_token
    wrong = (
        f"{name}: a token visits {{}} experts, and config.json says num_experts_per_tok {k}; both must be one number"
    )

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        if top_k_index.shape[-1] != k:
            raise ExportError(wrong.format(top_k_index.shape[-1]))
        x = hidden_states.reshape(-1, module.hidden_size)
        inputs = [x, top_k_weights.reshape(-1, k).to(x.dtype), top_k_index.reshape(-1, k).to(torch.int64)]
        said = logits.pop(name, None)
        if said is not None and said.shape[-1] == module.gate.num_experts:
            inputs.append(
                _tap(
                    names.router_logits(module.layer) + module.suffix,
                    said.reshape(-1, module.gate.num_experts).to(x.dtype),
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
