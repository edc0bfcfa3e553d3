"""What of a model learns, and at which rate."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from upcycle.config import FinetuneConfig
from upcycle.errors import UpcycleError
from upcycle.prompt import add_prompt
from upcycle.receipt import router_modules, router_weights

Named = Iterator[tuple[str, nn.Parameter]]

_EXPERT_PARTS = (
    ".experts.",
    ".shared_expert.",
    ".shared_experts.",
    ".shared_mlp.",
)  # of every target: the routed ones, and those that every token visits


def choose_trainable(model: PreTrainedModel, settings: FinetuneConfig, sparse_layers: tuple[int, ...]) -> Callable[[], None]:
    """Let only what `settings.train` names learn; returns what to call after training, which merges low-rank updates into the weights.

    A dense model, the control of a mixture whose layers `sparse_layers` have experts, learns what corresponds: the FFNs of those layers for the
    experts, and everything for the routers, which it does not have.

    Raises:
        UpcycleError: `last-N` asks for more layers than there are.
    """
    routers = {id(weight) for weight in router_weights(model)}
    num_layers = model.config.num_hidden_layers
    learning: set[int]
    match settings.train:
        case "all":
            learning = {id(p) for p in model.parameters()}
        case "experts":
            learning = {id(p) for _, p in expert_parameters(model, sparse_layers)} | routers
        case "router":
            learning = routers or {id(p) for p in model.parameters()}
        case "lora":
            return _add_lora(model, settings, routers)
        case "prompt":
            learning = {id(add_prompt(model, settings.prompt_tokens))}
        case last:
            count = count_last_layers(last, num_layers)
            learning = {id(p) for name, p in model.named_parameters() if _layer_of(name, num_layers) >= num_layers - count}
    if settings.routing == "by-domain":
        learning -= routers
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learning and parameter.numel() > 0)  # FSDP has no gradient of width 0
    return lambda: None


def count_last_layers(train: str, num_layers: int) -> int:
    """N of 'last-N'.

    Raises:
        UpcycleError: the model has fewer layers.
    """
    count = int(train.removeprefix("last-"))
    if count > num_layers:
        raise UpcycleError(f"finetune.train is {train}; it must be at most last-{num_layers}, the layers of the model")
    return count


def expert_parameters(model: PreTrainedModel, sparse_layers: tuple[int, ...]) -> Named:
    """Name and parameter of a mixture's experts; of a dense model's FFNs in the layers `sparse_layers`."""
    mixture = next(router_modules(model), None) is not None
    for name, parameter in model.named_parameters():
        inside = any(part in name for part in _EXPERT_PARTS) if mixture else ".mlp." in name and _layer_of(name, 0) in sparse_layers
        if inside:
            yield name, parameter


def _layer_of(name: str, num_layers: int) -> int:
    """The layer that a parameter is in: -1 for an embedding, `num_layers` for what comes after the layers."""
    if found := re.search(r"\.layers\.(\d+)\.", name):
        return int(found[1])
    return -1 if "embed_tokens" in name else num_layers


def parameter_groups(model: PreTrainedModel, settings: FinetuneConfig, sparse_layers: tuple[int, ...]) -> list[dict[str, Any]]:
    """AdamW's groups of what learns: routers (own rate, no decay), experts (own rate), the rest; norms and biases have no decay."""
    routers = {id(weight) for weight in router_weights(model)}
    experts = {id(p) for _, p in expert_parameters(model, sparse_layers)}
    rates = {
        "routers": settings.router_learning_rate,
        "experts": settings.expert_learning_rate or settings.learning_rate,
        "rest": settings.learning_rate,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "routers" if id(parameter) in routers else "experts" if id(parameter) in experts else "rest"
            groups.setdefault((kind, kind != "routers" and parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[kind], "weight_decay": settings.weight_decay if decays else 0.0}
        for (kind, decays), parameters in groups.items()
    ]


def _add_lora(model: PreTrainedModel, settings: FinetuneConfig, routers: set[int]) -> Callable[[], None]:
    """Low-rank updates (Hu et al. 2021) of every linear layer and of each expert's matrices, by peft; routers learn whole.

    Experts are parameters of three dimensions and no linear layers, which peft leaves out unless they are named.
    """
    import peft  # slow to import, and only this needs it

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.weight.numel() and ".layers." in name]
    stacked = sorted({".".join(name.split(".")[-2:]) for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3})
    config = peft.LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=linear, target_parameters=stacked or None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if id(parameter) in routers:
            parameter.requires_grad_(settings.routing == "learned")

    def merge() -> None:
        adapted.merge_and_unload()

    return merge


def stacked_weights(experts: Any) -> torch.Tensor:
    """The first matrices of all experts, [num_experts, ...], as they compute: with the low-rank update that is not merged yet."""
    name, parameter = next((name, p) for name, p in experts.named_parameters() if p.ndim == 3)
    wrapper = experts
    while (wrapped := getattr(wrapper, "parameter_name", None)) is not None:  # peft nests a wrapper for each parameter
        if wrapped == name.rsplit(".", 1)[-1]:
            return cast(torch.Tensor, parameter.detach() + wrapper.get_delta_weight("default").detach())
        wrapper = wrapper.base_layer
    return cast(torch.Tensor, parameter.detach())


def add_expert_dropout(model: PreTrainedModel, share: float) -> Callable[[], None]:
    """Drop a share of the experts' inner activations in training (Fedus et al. 2022, section 2.4); returns what takes it off again."""
    experts: list[Any] = [module.experts for module in model.modules() if hasattr(module, "experts")] if share else []
    saved = [each.act_fn for each in experts]
    for each in experts:
        each.act_fn = nn.Sequential(each.act_fn, nn.Dropout(share)).train(each.training)

    def remove() -> None:
        for each, act_fn in zip(experts, saved, strict=True):
            each.act_fn = act_fn

    return remove


def domain_experts(domains: torch.Tensor, block_size: int, num_domains: int, num_experts: int, top_k: int) -> torch.Tensor:
    """The experts of each token when domains have experts of their own: int64 [B * block_size, k] from the domain of each block [B].

    The experts are divided evenly, in order; a domain with more than `top_k` has its tokens take turns among them.
    """
    share = num_experts // num_domains
    count = min(top_k, share)
    position = torch.arange(block_size, device=domains.device)[:, None] * count + torch.arange(count, device=domains.device)
    return (domains[:, None, None] * share + position % share).flatten(0, 1)
