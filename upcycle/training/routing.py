"""Routing during training: hooks in, losses and figures of each layer out.

1. The balance loss is each layer's own, with the load of the whole batch, whichever processes share it and however many
   parts it is computed in. Its gradient in one part needs the load of the parts to come (a product of two means is no
   sum over parts), so a step of several parts begins with a forward pass of all of them without gradients, which only
   counts: about a quarter more time, and only where the loss has a weight.
2. Where a gate has a selection bias and its router learns, each step ends by moving the bias against the load of all
   its tokens: of all parts, of all processes, as the gate chose. No gradient reaches the bias, and no optimizer holds
   it. In a phase in which a router does not learn (`prompt`, `by-domain`, the first layers of `last-N`) its bias stays:
   it belongs to the scores that it was balanced for.
3. Where domains have experts of their own (`by-domain`), the routers are overruled: each token goes to the experts of
   its domain, with equal weights.
4. Noise on the logits makes tokens try other experts while training (noisy top-k, Shazeer et al. 2017, section 2.1, and
   V-MoE, Riquelme et al. 2021, section 2.3, whose noise has one deviation); evaluations have none.
5. The domain loss tells routers which experts are whose, without overruling them. Its weight falls with the steps that
   are done, so that in the end the text alone decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.layers import find_layers
from dense2moe.upcycle.checkpoints.loaded import (
    count_experts,
    router_modules,
    router_weights,
    selection_biases,
)
from dense2moe.upcycle.gates.balance import (
    balance_loss,
    chosen_load,
    describe_routing,
    expert_counts,
    expert_load,
    mean_scores,
    move_bias,
    sparsity_loss,
    z_loss,
)
from dense2moe.upcycle.gates.domains import domain_experts, domain_loss, faded
from dense2moe.upcycle.gates.facts import LayerRouting
from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.gates.routes import route
from dense2moe.upcycle.models.routing import find_gate
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.processes import mean_over_processes, sum_over_processes
from dense2moe.upcycle.training.sharding import gathered
from dense2moe.upcycle.training.trainable import stacked_weights


@dataclass(frozen=True)
class RouterLoss:
    """A loss of the routers: name, scalar value and weight.

    The name is the history's; the value is multiplied by the weight.
    """

    name: str
    value: torch.Tensor
    coefficient: float


def read_gate(model: PreTrainedModel) -> Gate:
    """The gate of the layers of a model that has experts."""
    gate = find_gate(model.config)
    assert gate is not None, "a dense model has no gate"
    return gate


@contextmanager
def hooked_routers(model: torch.nn.Module, hook: Callable[[int, torch.Tensor, Any], Any]) -> Iterator[None]:
    """Context manager: `hook` ends each router's pass.

    The hook gets the router's number, its logits and everything that the router returns. What the hook returns, if it
    is not None, takes the place of what the router returned.
    """
    handles = [
        router.register_forward_hook(lambda _, __, output, number=number: hook(number, output[0], output))
        for number, router in enumerate(router_modules(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SaidLogits:
    """Router logits of a pass, by router.

    A router that several layers share (ALBERT) is asked once for each of them.
    """

    def __init__(self) -> None:
        self._said: dict[int, list[torch.Tensor]] = {}

    def add(self, number: int, logits: torch.Tensor) -> None:
        """Keep the logits [tokens, num_experts] of one call."""
        self._said.setdefault(number, []).append(logits)

    def take(self, num_blocks: int, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Each router's logits of all its calls; they are then forgotten.

        [calls * tokens, num_experts], ordered by block, so that a block is as long as before, times the calls. With a
        `mask` [num_blocks, S] of real tokens, logits of padding are left out: it says nothing about text.
        """
        real = None if mask is None else mask.bool().flatten()
        found = [
            _order(calls if real is None else [_without_padding(logits, real) for logits in calls], num_blocks, real)
            for _, calls in sorted(self._said.items())
        ]
        self._said.clear()
        return tuple(found)


def _without_padding(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Logits of real tokens, unless the model has dropped the others itself."""
    return logits[real] if len(logits) == len(real) else logits


def _order(calls: list[torch.Tensor], num_blocks: int, real: torch.Tensor | None) -> torch.Tensor:
    """The logits of several calls as one."""
    if len(calls) == 1:
        return calls[0]
    if real is not None:
        return torch.cat(calls)
    return torch.cat([logits.unflatten(0, (num_blocks, -1)) for logits in calls], 1).flatten(0, 1)


class Routing:
    """Routing of a model in training: router logits, losses and figures.

    A dense model has no router: nothing is heard, forced or added to its loss.

    A step is `begin_step`, for each of its parts `tell`, a pass within `listening`, `count` and `losses`, then
    `end_step`.
    """

    def __init__(
        self, model: PreTrainedModel, settings: FinetuneConfig, num_domains: int, sparse_layers: tuple[int, ...]
    ) -> None:
        self.num_domains, self.sparse_layers = num_domains, sparse_layers
        self.model, self.num_experts = model, count_experts(model)
        self.settings = settings.settle(num_domains, self.num_experts)
        self._weights = self.settings.router_losses
        self._said = SaidLogits()  # of the pass that runs
        self._listens = False
        self._logits: tuple[torch.Tensor, ...] = ()  # of the last pass, [tokens, num_experts] a layer
        self._forced: torch.Tensor | None = None  # experts of each token, int64 [tokens, k], whatever routers say
        self._domains = torch.empty(0, dtype=torch.int64)  # of the blocks that are read
        self._mask: torch.Tensor | None = None  # their real tokens, where some are padding
        self._num_parts, self._domain_coefficient = 1, self._weights.domain_coefficient
        self._load_ahead: torch.Tensor | None = None  # of the whole step, before its first part
        self._watched: list[tuple[torch.Tensor, torch.Tensor]] = []  # loads and mean scores of parts without a loss
        self._counts: dict[int, torch.Tensor] = {}  # tokens of each expert in this step, by the router's number
        self._loads: list[torch.Tensor] = []  # of each part since the last description

    @cached_property
    def gate(self) -> Gate:
        """How tokens choose experts in every layer that has some."""
        return read_gate(self.model)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Context manager: routers are recorded, and overruled by domain where set.

        Where domains have experts of their own.
        """
        with hooked_routers(self.model, self._hear):
            yield

    def _hear(self, number: int, logits: torch.Tensor, output: Any) -> Any:
        is_noisy = self.settings.router_noise > 0 and self.model.training and self._forced is None
        if is_noisy:
            logits = logits + torch.randn_like(logits) * self.settings.router_noise
        if self._listens:
            self._said.add(number, logits)
        if is_noisy:
            routes = route(logits.float(), self.gate, tuple(selection_biases(self.model))[number])
            experts, weights = routes.as_table(self.gate.max_experts_per_token)
            return logits, weights.to(output[1].dtype), experts
        if self._forced is None:
            return None
        weights = torch.full_like(self._forced, 1 / self._forced.shape[1], dtype=output[1].dtype)
        return logits, weights, self._forced

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context manager: a forward pass's router logits are recorded.

        A layer that is computed twice calls its router again in the backward pass: who kept these logits would keep all
        that they were computed from.
        """
        self._listens = True
        try:
            yield
            self._logits = self._said.take(max(1, len(self._domains)), self._mask)
        finally:
            self._listens, self._said = False, SaidLogits()

    def tell(self, domains: torch.Tensor, block_size: int, mask: torch.Tensor | None = None) -> None:
        """Send the next blocks to their domains' experts, if so set.

        Domains are int64 [blocks]. `mask` [blocks, block_size] has the real tokens, where some are padding: losses,
        loads and biases see no other.
        """
        self._domains, self._forced, self._mask = domains, None, mask
        if self.num_experts and self.settings.routing == "by-domain":
            count = self.gate.max_experts_per_token
            self._forced = domain_experts(domains, block_size, self.num_domains, self.num_experts, count)

    def begin_step(self, num_parts: int, done: float) -> None:
        """Begin a step of `num_parts` parts."""
        self._num_parts, self._load_ahead = num_parts, None
        self._domain_coefficient = faded(self._weights.domain_coefficient, self._weights.domain_fade, done)

    @property
    def needs_count(self) -> bool:
        """Whether the balance loss needs the load of the whole step.

        The load of later parts is not known yet.
        """
        return bool(
            self.num_experts
            and self._forced is None
            and self._num_parts > 1
            and self._weights.balance_coefficient
            and self._load_ahead is None
        )

    def count_ahead(self, passes: Iterable[Callable[[], Any]]) -> None:
        """Run every part of the step without gradients, to count loads.

        With the random numbers that the parts will draw.
        """
        loads = []
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for run in passes:
                with self.listening():
                    run()
                loads.append(self._measure_load((None,) * len(self._logits)))
        self._load_ahead = torch.stack(loads).mean(0)

    def count(self) -> None:
        """Count the last pass's tokens per expert, for biases and figures."""
        for number, bias in self.moving_biases().items():
            counts = expert_counts(self._logits[number], self.gate, bias)
            self._counts[number] = self._counts[number] + counts if number in self._counts else counts
        if self._logits:
            self._loads.append(self._measure_load(selection_biases(self.model)))

    def losses(self) -> Iterator[RouterLoss]:
        """The routers' losses over the last pass, averaged over layers.

        None where the routers are overruled.
        """
        if not self._logits or self._forced is not None:
            return
        if self._weights.balance_coefficient or self._num_parts == 1:
            yield RouterLoss("balance_loss", self._balance(), self._weights.balance_coefficient)
        else:
            self._watched.append(self._watch())
        if self.settings.z_coefficient:
            mean = torch.stack([z_loss(logits) for logits in self._logits]).mean()
            yield RouterLoss("z_loss", mean, self.settings.z_coefficient)
        if self.settings.sparsity_coefficient:
            mean = torch.stack([sparsity_loss(logits, self.gate) for logits in self._logits]).mean()
            yield RouterLoss("sparsity_loss", mean, self.settings.sparsity_coefficient)
        if self._domain_coefficient:
            wanted = self._token_domains()
            losses = [domain_loss(logits, self.gate, wanted, self.num_domains) for logits in self._logits]
            yield RouterLoss("domain_loss", torch.stack(losses).mean(), self._domain_coefficient)

    def _token_domains(self) -> torch.Tensor:
        """Domains of blocks, or where some have padding of each real token."""
        if self._mask is None:
            return self._domains
        return self._domains[:, None].expand(self._mask.shape)[self._mask.bool()]

    def let_go(self) -> None:
        """Keep the last pass's logits, but not their graph."""
        self._logits = tuple(logits.detach() for logits in self._logits)

    def end_step(self) -> torch.Tensor | None:
        """Move selection biases by this step's tokens; returns a watched balance.

        The balance that is only watched, and is no part of the loss.
        """
        balance = None
        if self._watched:
            loads, scores = (torch.stack(each).mean(0) for each in zip(*self._watched, strict=True))
            balance = loads.shape[-1] * (loads * scores).sum(-1).mean()
            self._watched = []
        for number, bias in self.moving_biases().items():
            move_bias(bias, sum_over_processes(self._counts.pop(number)), self.settings.bias_step)
        return balance

    def moving_biases(self) -> dict[int, torch.Tensor]:
        """Selection biases that move, by router number.

        They belong to routers that learn.
        """
        if not self.settings.bias_step:
            return {}
        pairs = enumerate(zip(router_weights(self.model), selection_biases(self.model), strict=True))
        return {number: bias for number, (weight, bias) in pairs if bias is not None and weight.requires_grad}

    def describe(self) -> tuple[LayerRouting, ...]:
        """How each layer routes; nothing of a dense model.

        Its load over all that was read since the last call; entropy and margin over this process's last part. Every
        process must ask for it.
        """
        if not self._logits:
            return ()
        loads, self._loads = torch.stack(self._loads).mean(0), []
        weights = (weights for layer in find_layers(self.model) for weights in _stacked_weights(layer))
        biases = selection_biases(self.model)
        return describe_routing(self.sparse_layers, loads, self._logits, weights, biases, self.gate)

    def _measure_load(self, biases: Iterable[torch.Tensor | None]) -> torch.Tensor:
        """Load of each expert over all processes; [layers, num_experts].

        Over what the processes have just read.

        By the routers, or by what overrules them.
        """
        if self._forced is None:
            pairs = zip(self._logits, biases, strict=True)
            loads = torch.stack([expert_load(logits, self.gate, bias) for logits, bias in pairs])
        else:
            loads = torch.stack([chosen_load(self._forced, logits.shape[-1]) for logits in self._logits])
        return mean_over_processes(loads)

    def _balance(self) -> torch.Tensor:
        """Mean over layers of the balance loss.

        With the load of all processes and parts.
        """
        loads = self._load_ahead
        if loads is None:
            loads = self._measure_load((None,) * len(self._logits))
        pairs = zip(self._logits, loads, strict=True)
        return torch.stack([balance_loss(logits, self.gate, load) for logits, load in pairs]).mean()

    def _watch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a part's loads and mean scores to a watched balance.

        [layers, num_experts] each.
        """
        scores = torch.stack([mean_scores(logits.detach(), self.gate) for logits in self._logits])
        return self._measure_load((None,) * len(self._logits)), scores


def _stacked_weights(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    """First matrices of a decoder layer's experts.

    Every process must call it.
    """
    with gathered(layer):
        yield from (stacked_weights(module.experts) for module in layer.modules() if hasattr(module, "experts"))
