"""Mixtures of experts in the FFNs' places, in any transformers model.

This file stands alone: it needs torch and transformers and nothing of dense2moe, and lies beside every checkpoint that
uses it, as `modeling_mixture.py`. `AutoModel...from_pretrained(directory, trust_remote_code=True)` runs it from there;
after `import dense2moe` nothing of the checkpoint is run.

A config here is a dense family's own, under a `model_type` of its own (`mixture_bert`), with a section `mixture`:

    num_experts, num_experts_per_tok, oldest_transformers (the first whose modules have the names below), gate and
    router (see `MixtureRouter`; both may be absent), and sites, a list; each site is one kind of FFN of the model:
        ffn              the module that experts take the place of, below the base model, with `{layer}` in it
        passed           modules behind it that belong to the FFN, and become identities
        rates            numbers of a module that is its dropout behind what experts took the place of, and become 0
        layers           the numbers of the layers that have experts
        hidden_size, intermediate_size (of one expert), activation (its name in transformers)
        gated            whether an expert is down(act(gate(x)) * up(x)), or down(act(up(x)))
        up_bias, down_bias
        inner_dropout, dropout   behind the activation, and behind the whole
        shared_size      of the expert that every token visits; 0 for none

A class here is made of the dense one: `MixtureBertForMaskedLM` is `BertForMaskedLM` whose FFNs are `Mixture`s.
"""

from __future__ import annotations

import copy
import pathlib
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.integrations.moe import use_experts_implementation

    IS_TRANSFORMERS_4 = False
except ImportError:  # transformers 4 runs experts one after another, and names tensors as the files do
    IS_TRANSFORMERS_4 = True

    def use_experts_implementation(**_: Any) -> Callable[[Any], Any]:  # type: ignore[misc]
        """Leave a class as it is."""
        return lambda experts_class: experts_class


FILE_NAME = "modeling_mixture.py"
OLDEST_TRANSFORMERS = "4.57.0"
PREFIX = "Mixture"
MODEL_TYPE_PREFIX = "mixture_"


class MixtureRouter(nn.Module):
    """Scores of experts, of which a token visits some.

    Takes tokens [T, H]; gives logits [T, E], weights [T, k] and the experts' numbers [T, k]. An expert of weight 0 is
    not visited. A `gate` says what is other than a softmax of which the k largest are kept and made to sum to 1:

        score        softmax, sigmoid, or relu, the positive part
        choice       top-k; threshold: scores above `value`, and the largest; top-p: the fewest largest that reach the
                     share `value` of the sum of all scores; skip: scores of at least the share `value` of the largest
        renormalize  whether weights are divided by their sum

    A `router` has a `form`, mlp or attention, and a `size`: logits are then of a query of so many numbers.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        gate: dict[str, Any] | None = None,
        router: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.gate = num_experts, top_k, gate
        self.form = router["form"] if router else "linear"
        size = router["size"] if router else hidden_size
        self.weight = nn.Parameter(torch.zeros(num_experts, size))
        if router:
            self.query = nn.Parameter(torch.zeros(size, hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the class."""
        logits = self._score(hidden_states)
        if self.gate is None:
            scores = F.softmax(logits, dim=-1, dtype=torch.float32)
            weights, indices = torch.topk(scores, self.top_k, dim=-1)
            weights = weights / weights.sum(dim=-1, keepdim=True)
        else:
            scores = _SCORES[self.gate["score"]](logits.float())
            best, indices = torch.topk(scores, self.top_k, dim=-1)
            visited = _VISITED[self.gate["choice"]](best, scores.sum(-1, keepdim=True), self.gate.get("value", 0.0))
            weights = best.relu() * visited
            if self.gate["renormalize"]:
                weights = _renormalize(weights, self.gate["score"])
        return logits, weights.to(hidden_states.dtype), indices

    def _score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [T, E] of tokens, or of their queries."""
        if self.form == "linear":
            return F.linear(hidden_states, self.weight)
        query = F.linear(hidden_states, self.query)
        query = query.tanh() if self.form == "mlp" else query
        return F.linear(query * self.query.shape[0] ** -0.5, self.weight)


_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": lambda logits: logits,  # whose order tells zeros apart; weights are positive parts
}
_SMALLEST_TOTAL = 1e-20


def _renormalize(weights: torch.Tensor, score: str) -> torch.Tensor:
    """Weights [T, k] over their sum.

    Where all positive parts are 0, the first expert has the whole weight; sigmoids that are all 0 stay so.
    """
    if score == "relu":
        raised = torch.maximum(weights, _SMALLEST_TOTAL * _is_first(weights))
        return torch.div(raised, raised.sum(dim=-1, keepdim=True))
    return torch.div(weights, weights.sum(dim=-1, keepdim=True) + _SMALLEST_TOTAL)


def _is_first(best: torch.Tensor) -> torch.Tensor:
    return torch.arange(best.shape[-1], device=best.device) == 0


_VISITED: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "top-k": lambda best, _, __: torch.ones_like(best, dtype=torch.bool),
    "threshold": lambda best, _, level: _is_first(best) | (best > level),
    "top-p": lambda best, total, share: best.cumsum(-1) - best < share * total,
    "skip": lambda best, _, share: best >= share * best[..., :1],
}
"""Which of the largest scores [T, k] are visited, from them, the sum of all scores [T, 1], and the gate's value."""


class _Experts(nn.Module):
    """All experts of a layer, as transformers' implementations of experts read them.

    Parameters are stacked: `up_proj` [E, I, H], or `gate_up_proj` [E, 2 I, H] with the gates' rows first, and
    `down_proj` [E, H, I].
    """

    act_fn: Any

    def __init__(self, config: Any, site: dict[str, Any], num_experts: int, act_fn: nn.Module) -> None:
        super().__init__()
        hidden, inner, self.num_experts = site["hidden_size"], site["intermediate_size"], num_experts
        self.first_name = "gate_up_proj" if site["gated"] else "up_proj"
        rows = 2 * inner if site["gated"] else inner
        setattr(self, self.first_name, nn.Parameter(torch.empty(num_experts, rows, hidden)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))
        if site["up_bias"] or site["down_bias"]:
            setattr(self, f"{self.first_name}_bias", nn.Parameter(torch.zeros(num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, hidden))
        self.__dict__["act_fn"] = act_fn  # the mixture's own submodule

    def _bias(self, name: str, expert: int) -> torch.Tensor | None:
        bias: torch.Tensor | None = getattr(self, f"{name}_bias", None)
        return None if bias is None else bias[expert]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Each expert on the tokens that visit it, [T, H].

        Hidden states are [T, H], the experts' numbers and weights [T, k].
        """
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, places = torch.where((top_k_index == expert) & (top_k_weights != 0))
            if not len(tokens):
                continue
            inner = F.linear(
                hidden_states[tokens], getattr(self, self.first_name)[expert], self._bias(self.first_name, expert)
            )
            if self.first_name == "up_proj":
                inner = self.act_fn(inner)
            else:
                gate, up = inner.chunk(2, dim=-1)
                inner = self.act_fn(gate) * up
            given = F.linear(inner, self.down_proj[expert], self._bias("down_proj", expert))
            given = given * top_k_weights[tokens, places, None]
            output.index_add_(0, tokens, given.to(output.dtype))
        return output


@use_experts_implementation(has_gate=True, has_bias=False)
class GatedExperts(_Experts):
    """Experts with a gate and without biases."""


@use_experts_implementation(has_gate=True, has_bias=True)
class GatedExpertsWithBias(_Experts):
    """Experts with a gate and with biases."""


@use_experts_implementation(has_gate=False, has_bias=False)
class PlainExperts(_Experts):
    """Experts with neither."""


@use_experts_implementation(has_gate=False, has_bias=True)
class PlainExpertsWithBias(_Experts):
    """Experts without a gate, with biases."""


class MixtureSharedExpert(nn.Module):
    """The expert that every token visits: [T, H] of tokens [T, H]."""

    act_fn: Any

    def __init__(self, site: dict[str, Any], act_fn: nn.Module) -> None:
        super().__init__()
        hidden, inner = site["hidden_size"], site["shared_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=site["up_bias"]) if site["gated"] else None
        self.up_proj = nn.Linear(hidden, inner, bias=site["up_bias"])
        self.down_proj = nn.Linear(inner, hidden, bias=site["down_bias"])
        self.__dict__["act_fn"] = act_fn  # the mixture's own submodule

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See the class."""
        up = self.up_proj(hidden_states)
        inner = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * up
        output: torch.Tensor = self.down_proj(inner)
        return output


class Mixture(nn.Module):
    """A mixture in an FFN's place: [..., H] to [..., H].

    What stands beside the FFN (norm, residual stream) stays where it is. `act_fn` is of all experts together: where it
    learns, its parameters have the names that they have in a dense FFN.
    """

    def __init__(self, config: Any, site: dict[str, Any]) -> None:
        super().__init__()
        section = config.mixture
        count = section["num_experts"]
        self.router = MixtureRouter(
            count, section["num_experts_per_tok"], site["hidden_size"], section.get("gate"), section.get("router")
        )
        self.act_fn = _activation(site)
        experts_class = _EXPERTS[site["gated"], site["up_bias"] or site["down_bias"]]
        self.experts = experts_class(config, site, count, self.act_fn)
        self.shared_expert = MixtureSharedExpert(site, self.act_fn) if site["shared_size"] else None
        self.dropout = nn.Dropout(site["dropout"]) if site["dropout"] else None

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """See the class; other arguments of an FFN are not used."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.router(tokens)
        output: torch.Tensor = self.experts(tokens, indices, weights)
        if self.shared_expert is not None:
            output = output + self.shared_expert(tokens)
        output = output.reshape(hidden_states.shape)
        if self.dropout is not None:
            output = self.dropout(output)
        return output


_EXPERTS = {
    (True, False): GatedExperts,
    (True, True): GatedExpertsWithBias,
    (False, False): PlainExperts,
    (False, True): PlainExpertsWithBias,
}


def _activation(site: dict[str, Any]) -> nn.Module:
    """The activation between an expert's matrices, and the dropout behind it."""
    activation: nn.Module = ACT2FN[site["activation"]].to(torch.get_default_dtype())
    return nn.Sequential(activation, nn.Dropout(site["inner_dropout"])) if site["inner_dropout"] else activation


def put_experts(model: Any, config: Any) -> None:
    """Put a mixture in every place that a config names."""
    sites = [(base, site) for site in config.mixture["sites"] if (base := find_base(model, site["ffn"])) is not None]
    if not sites:
        raise AttributeError(_explain_missing(model, config.mixture["sites"][0]["ffn"]))
    for base, site in sites:
        for layer in site["layers"]:
            _set(base, site["ffn"].format(layer=layer), Mixture(config, site))
            for name in site["passed"]:
                _set(base, name.format(layer=layer), nn.Identity())
            for name in site.get("rates", ()):
                _set(base, name.format(layer=layer), 0.0)


def find_base(model: Any, name: str) -> Any:
    """The module that a site's names are below.

    The base model, or the model itself; None where neither has such a part: a class may have only some of its family's,
    such as the decoder alone.
    """
    part = name.partition(".")[0]
    bases = (getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None, model)
    return next((base for base in bases if hasattr(base, part)), None)


def _set(base: Any, name: str, value: Any) -> None:
    parent, _, own = name.rpartition(".")
    try:
        module = base.get_submodule(parent)
        getattr(module, own)
    except AttributeError as error:
        raise AttributeError(_explain_missing(base, name)) from error
    setattr(module, own, value)


def _explain_missing(model: Any, name: str) -> str:
    return (
        f"{type(model).__name__} of transformers {transformers.__version__} has no module {name}, which experts take "
        "the place of; use the version of transformers that the config's transformers_version names"
    )


def check_transformers(config: Any) -> None:
    """Refuse a version of transformers whose modules have other names.

    Raises:
        ImportError: the config's section `mixture` names a newer one.
    """
    oldest = config.mixture.get("oldest_transformers", OLDEST_TRANSFORMERS)
    if _numbers(transformers.__version__) < _numbers(oldest):
        raise ImportError(
            f"{config.model_type} needs transformers {oldest} or newer; this is {transformers.__version__}, in which "
            "the modules that experts take the place of have other names; run pip install --upgrade transformers"
        )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


class _MixtureConfig:
    """What a config has beside the dense family's fields."""

    mixture: dict[str, Any]

    @property
    def num_experts(self) -> int:
        """Experts of each layer that has some."""
        return int(self.mixture["num_experts"])

    @num_experts.setter
    def num_experts(self, _: Any) -> None:
        """A dense family's own field of this name counts none."""

    @property
    def num_experts_per_tok(self) -> int:
        """Experts that a token visits."""
        return int(self.mixture["num_experts_per_tok"])

    @num_experts_per_tok.setter
    def num_experts_per_tok(self, _: Any) -> None:
        """As above."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the config, and this file beside it."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # the dense family's
        write_source(save_directory)


class _MixtureModel:
    """What a model has beside the dense class."""

    config: Any
    _wish: str | None = None
    _is_built = False
    _can_set_experts_implementation_cached_value = True  # what transformers would else look for in the source

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_transformers(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the dense class's
        self._is_built = True
        if not IS_TRANSFORMERS_4:
            self.config._experts_implementation_internal = self._check_and_adjust_experts_implementation(self._wish)
        put_experts(self, config)
        if IS_TRANSFORMERS_4:
            _keep_present(self)
        self.post_init()  # type: ignore[attr-defined]

    def _check_and_adjust_experts_implementation(self, experts_implementation: str | None) -> str:
        """Keep the wish until dense modules, which know no experts, are built."""
        if self._is_built:
            return super()._check_and_adjust_experts_implementation(experts_implementation)  # type: ignore[misc, no-any-return]
        self._wish = experts_implementation
        return "eager"

    def initialize_weights(self) -> None:
        """Draw the weights that no file gave.

        Ours come first: dense models within the model would take them for known.
        """
        for module in self.modules():  # type: ignore[attr-defined]  # the dense class's
            if isinstance(module, MixtureRouter | _Experts) and not getattr(module, "_is_hf_initialized", False):
                _draw(module, getattr(self.config, "initializer_range", None) or 0.02)
        super().initialize_weights()  # type: ignore[misc]

    def _initialize_weights(self, module: nn.Module, *_: Any) -> None:
        """Draw what a module lacks as the dense class would.

        Of classes that are not its own, transformers passes over modules without weights of their own, among them
        heads that ModernBERT draws as a whole.
        """
        super()._initialize_weights(module)  # type: ignore[misc]


def _keep_present(model: Any) -> None:
    """Forget modules of float32 that are gone: transformers 4 looks for them."""
    present = {part for name, _ in model.named_parameters() for part in name.split(".")}
    for field in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        setattr(model, field, [name for name in getattr(model, field) or () if name in present] or None)


@torch.no_grad()
def _draw(module: nn.Module, std: float) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if not getattr(parameter, "_is_hf_initialized", False):
            parameter.zero_() if name.endswith("_bias") else parameter.normal_(std=std)


def write_source(directory: str | pathlib.Path) -> None:
    """Write this file into a checkpoint's directory."""
    path = pathlib.Path(directory) / FILE_NAME
    own = pathlib.Path(__file__).read_bytes()
    if not path.exists() or path.read_bytes() != own:
        path.write_bytes(own)


@cache
def find_class(name: str) -> Any:
    """Make a config's or a model's class `MixtureX` of transformers' `X`.

    Raises:
        AttributeError: transformers has no such class.
    """
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__} has no {name}")
    dense = getattr(transformers, name.removeprefix(PREFIX), None)
    if dense is None:
        raise AttributeError(
            f"transformers {transformers.__version__} has no class {name.removeprefix(PREFIX)}, which {name} is made "
            "of; use the version that config.json names as transformers_version, or a newer one"
        )
    if issubclass(dense, PreTrainedModel):
        return _make_model_class(name, dense)
    own = {"model_type": MODEL_TYPE_PREFIX + dense.model_type, "__module__": __name__, "__doc__": dense.__doc__}
    return type(name, (_MixtureConfig, dense), own)


def _make_model_class(name: str, dense: Any) -> Any:
    config_class = find_class(PREFIX + dense.config_class.__name__)
    made = type(name, (_MixtureModel, dense), {"config_class": config_class, "__module__": __name__})
    if not IS_TRANSFORMERS_4:
        mapping = get_checkpoint_conversion_mapping(dense.__name__) or get_checkpoint_conversion_mapping(
            dense.config_class.model_type
        )
        if mapping is not None:
            register_checkpoint_conversion_mapping(name, copy.deepcopy(mapping), overwrite=True)
    return made


def __getattr__(name: str) -> Any:
    return find_class(name)
