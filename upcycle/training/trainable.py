"""Which parameters train, and their learning rates.

A plan of names and shapes comes first, then the model is changed, then what learns is compared with the plan: libraries
between us and the model rename, merge and skip without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.loaded import SELECTION_BIASES, router_modules, router_parameters
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.heads import TASK_OF_HEAD, split_class
from dense2moe.upcycle.models.parts import layer_of
from dense2moe.upcycle.models.table import find_host
from dense2moe.upcycle.tasks.head import LabelledTask
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.limits import count_last_layers
from dense2moe.upcycle.training.low_rank import add_low_rank, read_updates
from dense2moe.upcycle.training.prompt import PARAMETER, add_prompt

Named = Iterator[tuple[str, nn.Parameter]]

# of every target: the routed ones, and those that every token visits
_EXPERT_PARTS = (
    ".experts.",
    ".shared_expert.",
    ".shared_experts.",
    ".shared_mlp.",
)
_EMBEDDINGS = ("embed", "wte.", "wpe.")
"""What names outside of layers contain that come before the first one."""
_FFN_PARTS = (".mlp.", ".feed_forward.")  # of every dense family with a sparse twin in transformers
_SHARED_GATE = (
    ".shared_expert_gate."  # Qwen2-MoE scales the shared expert's output for each token; it learns as routers do
)


@dataclass(frozen=True)
class Learning:
    """What is to learn, by name: whole parameters and low-rank matrices.

    Names are those in memory. low_rank: of each matrix the shape (number of matrices stacked in it, rows, columns).
    Each of the stacked gets `rank`, multiplied by alpha / rank.
    """

    whole: frozenset[str]
    low_rank: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    rank: int = 0
    alpha: int = 0


def choose_trainable(
    model: PreTrainedModel, settings: FinetuneConfig, sparse_layers: tuple[int, ...]
) -> Callable[[bool], None]:
    """Let only `settings.train` learn; returns the function that ends it.

    Called with True it merges low-rank updates into the weights, with False it takes them off, so that the weights have
    the bits that they had.

    A head with labels learns in any case. A dense model, the control of a mixture whose layers `sparse_layers` have
    experts, learns what corresponds: the FFNs of those layers for the experts, and everything for the routers, which it
    does not have.

    Raises:
        UpcycleError: `last-N` asks for more layers than there are, or something else would learn than what is meant.
    """
    planned = plan_learning(model, settings, sparse_layers)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if PARAMETER in planned.whole:
        add_prompt(model, settings.prompt_tokens)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in planned.whole)
    finish = add_low_rank(model, planned.low_rank, planned.rank, planned.alpha) if planned.low_rank else lambda _: None
    _check_learning(model, planned, names, settings.train)
    return finish


def plan_learning(model: PreTrainedModel, settings: FinetuneConfig, sparse_layers: tuple[int, ...]) -> Learning:
    """What learns by `settings.train`, from names and shapes alone.

    A model without weights will do.

    Raises:
        UpcycleError: `last-N` asks for more layers than there are, or a layer with experts has none by the names that
            this module knows.
    """
    routers = {id(weight) for weight in router_parameters(model)}
    named = {name: parameter for name, parameter in model.named_parameters() if _has_gradient(model, name, parameter)}
    router_names = {name for name, parameter in named.items() if id(parameter) in routers}
    gates = router_names | {name for name in named if _SHARED_GATE in name}
    heads = find_label_heads(model) & named.keys()
    experts = {name for name, _ in expert_parameters(model, sparse_layers)} & named.keys()
    num_layers = model.config.num_hidden_layers
    if routers:
        _check_found(experts, router_names, sparse_layers)
    match settings.train:
        case "all":
            whole = set(named)
        case "experts":
            whole = experts | gates
        case "router":
            whole = gates or set(named)
        case "lora":
            whole = gates
        case "prompt":
            return Learning(frozenset({PARAMETER}))
        case last:
            count = count_last_layers(last, num_layers)
            whole = {name for name in named if _layer_of(name, num_layers) >= num_layers - count}
    if settings.routing == "by-domain":
        whole = whole - router_names
    whole |= heads
    if settings.train != "lora":
        return Learning(frozenset(whole))
    low_rank = _low_rank_shapes(model, named.keys() - gates - heads)
    return Learning(frozenset(whole), low_rank, settings.lora_rank, settings.lora_alpha)


def find_label_heads(model: PreTrainedModel) -> set[str]:
    """Names of what stands on the layers of a model with labels.

    Its classifier, and a pooler before it: they learn whatever else does, as they may be new. Of other models nothing.
    """
    is_labelled = TASK_OF_HEAD.get(split_class(type(model).__name__)[1]) in get_args(LabelledTask)
    if not is_labelled or model.base_model is model:
        return set()
    base = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(base) or ".pooler." in name}


def _has_gradient(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has anything to learn.

    Not with a width of 0, where FSDP fails, nor as the gate of a shared expert of width 0, nor as a selection bias,
    which no gradient reaches.
    """
    if name.endswith(SELECTION_BIASES):
        return False
    if _SHARED_GATE in name:
        block: Any = model.get_submodule(name.partition(_SHARED_GATE)[0])
        return any(weight.numel() for weight in block.shared_expert.parameters())
    return parameter.numel() > 0


def _check_found(experts: set[str], routers: set[str], sparse_layers: tuple[int, ...]) -> None:
    for what, names in (("experts", experts), ("a router", routers)):
        if missing := set(sparse_layers) - {_layer_of(name, -1) for name in names}:
            raise UpcycleError(
                f"finetune: layers {sorted(missing)} are to have experts, and no parameter in them is named as "
                f"{what} of a known architecture; "
                "this version of transformers names them otherwise: install the versions of constraints.txt"
            )


def _low_rank_shapes(model: PreTrainedModel, names: AbstractSet[str]) -> dict[str, tuple[int, int, int]]:
    """Shapes of the matrices in `names` that get low-rank updates.

    Matrices of linear layers and of experts.
    """
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for name, parameter in model.named_parameters():
        if name in names and layer_of(name) >= 0 and (name in linear or (".experts." in name and parameter.ndim == 3)):
            rows, columns = parameter.shape[-2:]
            found[name] = (parameter.numel() // (rows * columns), rows, columns)
    return found


def expert_parameters(model: PreTrainedModel, sparse_layers: tuple[int, ...]) -> Named:
    """Names and parameters of a mixture's experts.

    Of a dense model, those of the FFNs in the layers `sparse_layers`.
    """
    mixture = next(router_modules(model), None) is not None
    ffns = _ffn_names(model)
    for name, parameter in model.named_parameters():
        inside = (
            any(part in name for part in _EXPERT_PARTS)
            if mixture
            else any(part in name for part in ffns) and _layer_of(name, 0) in sparse_layers
        )
        if inside:
            yield name, parameter


def _ffn_names(model: PreTrainedModel) -> tuple[str, ...]:
    """What names of parameters of a dense layer's FFN contain."""
    host = find_host(model.config.model_type)
    if host is None:
        return _FFN_PARTS
    return tuple(
        f"{stack.layer.format(layer=layer)}.{module}."
        for stack in host.stacks
        for layer in range(stack.count_layers(model.config))
        for module in (stack.gate, stack.up, stack.down)
        if module is not None
    )


def _layer_of(name: str, num_layers: int) -> int:
    """A parameter's layer: -1 for the embedding, `num_layers` after the layers."""
    if (number := layer_of(name)) >= 0:
        return number
    return -1 if any(part in name for part in _EMBEDDINGS) else num_layers


def parameter_groups(
    model: PreTrainedModel, settings: FinetuneConfig, sparse_layers: tuple[int, ...]
) -> list[dict[str, Any]]:
    """AdamW's groups of trainable parameters.

    Routers and gates of shared experts (own rate, no weight decay), experts (own rate), the rest.
    Norms and biases have no weight decay. Rates fall by `settings.layer_decay` from layer to layer below the head
    (Clark et al. 2020, appendix B), except of routers, which are new at every depth.
    """
    routers = {id(weight) for weight in router_parameters(model)} | {
        id(p) for name, p in model.named_parameters() if _SHARED_GATE in name
    }
    experts = {id(p) for _, p in expert_parameters(model, sparse_layers)}
    rates = {
        "routers": settings.router_learning_rate,
        "experts": settings.expert_learning_rate or settings.learning_rate,
        "rest": settings.learning_rate,
    }
    num_layers = model.config.num_hidden_layers
    groups: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "routers" if id(parameter) in routers else "experts" if id(parameter) in experts else "rest"
            below = 0 if kind == "routers" else num_layers - _layer_of(name, num_layers)
            key = (kind, kind != "routers" and parameter.ndim >= 2, settings.layer_decay**below)
            groups.setdefault(key, []).append(parameter)
    return [  # the whole rate first, which is told while training goes on
        {"params": groups[key], "lr": rates[key[0]] * key[2], "weight_decay": settings.weight_decay if key[1] else 0.0}
        for key in sorted(groups, key=lambda key: (key[0] == "routers", -key[2]))
    ]


def _check_learning(model: PreTrainedModel, planned: Learning, names: Mapping[int, str], train: str) -> None:
    """Compare trainable parameters with the plan: names, ranks, shapes and scales.

    `names`: by identity, what parameters were called before.

    Raises:
        UpcycleError: something is missing, too much, or of another size.
    """
    updates, adapters = read_updates(model, names)
    expected: dict[str, Any] = {
        name: ((planned.rank * count, columns), (rows, planned.rank * count), planned.alpha / planned.rank)
        for name, (count, rows, columns) in planned.low_rank.items()
    }
    expected |= dict.fromkeys(planned.whole, "whole")
    found: dict[str, Any] = {
        names.get(id(parameter), name): "whole"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapters
    }
    found |= updates
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        told = "; ".join(
            f"{name}: {found.get(name, 'nothing')} learns, {expected.get(name, 'nothing')} was meant"
            for name in wrong[:3]
        )
        raise UpcycleError(
            f"finetune: train is '{train}', and {len(wrong)} parameters would not learn as meant ({told}); "
            "peft or transformers did something else than asked: install the versions of constraints.txt, or choose "
            "another finetune.train"
        )


def stacked_weights(experts: Any) -> torch.Tensor:
    """The first matrices of all experts, [num_experts, ...], low-rank updates included."""
    name, parameter = next((name, p) for name, p in experts.named_parameters() if p.ndim == 3)
    wrapper = experts
    while (wrapped := getattr(wrapper, "parameter_name", None)) is not None:  # peft nests a wrapper for each parameter
        if wrapped == name.rsplit(".", 1)[-1]:
            return cast(torch.Tensor, parameter.detach() + wrapper.get_delta_weight("default").detach())
        wrapper = wrapper.base_layer
    return cast(torch.Tensor, parameter.detach())


def add_expert_dropout(model: PreTrainedModel, share: float) -> Callable[[], None]:
    """Drop experts' inner activations in training; returns how to end it.

    Fedus et al. 2022, section 2.4.
    """
    experts: list[Any] = [module.experts for module in model.modules() if hasattr(module, "experts")] if share else []
    saved = [vars(each).get("act_fn") for each in experts]  # a function; None of a module, which lies elsewhere
    for each in experts:
        vars(each)["act_fn"] = _dropping(each, each.act_fn, share)

    def remove() -> None:
        for each, act_fn in zip(experts, saved, strict=True):
            del vars(each)["act_fn"]
            if act_fn is not None:
                vars(each)["act_fn"] = act_fn

    return remove


def _dropping(experts: nn.Module, act_fn: Callable[[torch.Tensor], torch.Tensor], share: float) -> Any:
    return lambda x: F.dropout(act_fn(x), share, experts.training)
