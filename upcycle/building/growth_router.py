"""The router row of an expert that joins a finished mixture.

The rows that are there stay. The new one is their mean plus a direction, so that its logit is the mean of theirs plus
whatever the direction makes of a token:

- ridge: the ridge regression of domains on what the routers read, with the new domain as one more (DUME, 2026: its text
  adds to the second moments, and one more row is solved for). Its row, less the mean row of the other domains.
- nexus: the projection of the new domain's embedding (`gates.nexus`). Needs none of the others' text.

Either has the length at which its logits differ as much as those of the rows that are there. What text is read from is
read by the mixture, layer by layer; every fourth piece of it is kept back, and read by the grown mixture from its files
to count who visits the new expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.building.config import RouterConfig, RouterDomain
from dense2moe.upcycle.building.projection import Projection
from dense2moe.upcycle.building.router_text import tokenize_domain
from dense2moe.upcycle.checkpoints.layerwise import embed, mean_states, pad_left, real_tokens, run_sparse_layers
from dense2moe.upcycle.checkpoints.loaded import router_modules
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tokenizer import load_tokenizer
from dense2moe.upcycle.gates import start
from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.gates.scores import visit_experts
from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.progress import Progress

_HELD_OUT = 4
"""Every so many pieces of text one is kept back for counting visits."""


@dataclass(frozen=True)
class NewExpertVisits:
    """Tokens that choose a layer's new expert, on held-out text.

    Attributes:
        layer: the layer's number.
        own: share of the tokens of the expert's domain that visit it.
        others: share of the other domains' tokens that do; None where none were given.
        chance: share that would, were experts drawn.
        num_tokens: tokens of the expert's domain that were counted.
    """

    layer: int
    own: float
    others: float | None
    chance: float
    num_tokens: int


@dataclass(frozen=True)
class DomainTexts:
    """Rows of token ids, of the new domain and of others."""

    own: list[list[int]]
    others: list[list[list[int]]]

    @property
    def domains(self) -> list[list[list[int]]]:
        """The others, and the new one last."""
        return [*self.others, self.own]

    def divide(self) -> tuple[DomainTexts, DomainTexts]:
        """What is read, and what is kept back.

        A domain of fewer than four pieces is both.
        """

        def take(rows: list[list[int]], kept_back: bool) -> list[list[int]]:
            if len(rows) < _HELD_OUT:
                return rows
            return [row for number, row in enumerate(rows) if (number % _HELD_OUT == _HELD_OUT - 1) == kept_back]

        read, kept = (
            DomainTexts(take(self.own, part), [take(rows, part) for rows in self.others]) for part in (False, True)
        )
        return read, kept


def read_texts(mixture: Path, domain: RouterDomain, others: Sequence[RouterDomain], base: Path) -> DomainTexts:
    """Text of the new domain and of others, by the mixture's tokenizer.

    Raises:
        UpcycleError: there is no tokenizer, or a domain has no file, no text or no tokens.
    """
    tokenizer, most = load_tokenizer(mixture), RouterConfig().max_tokens
    own = tokenize_domain(tokenizer, domain, most, base, "domain")
    return DomainTexts(
        own,
        [tokenize_domain(tokenizer, other, most, base, f"others[{number}]") for number, other in enumerate(others)],
    )


def ridge_rows(
    mixture: Checkpoint, target: Architecture, texts: DomainTexts, progress: Progress
) -> dict[int, torch.Tensor]:
    """Each layer's new router row by ridge regression, float32 [H]."""
    found = {}
    for layer, states in _read_states(mixture, texts, progress):
        rows = _read_rows(mixture, target, layer)
        fitted = start.ridge_rows(states, RouterConfig().penalty, 1.0)
        direction = fitted[-1] - fitted[:-1].mean(0)
        found[layer] = rows.mean(0) + direction * start.logit_spread(rows, torch.cat(states))
    return found


def nexus_rows(
    mixture: Checkpoint, target: Architecture, texts: DomainTexts, projection: Projection
) -> dict[int, torch.Tensor]:
    """Each layer's new router row by projection, float32 [H].

    Its length grows as much as training has made the other rows grow.
    """
    ids, mask = pad_left(texts.own)
    embedding = mean_states(embed(mixture, ids, torch.float32), mask).mean(0)
    found = {}
    for layer in projection.layers:
        rows = _read_rows(mixture, target, layer)
        growth = _spread(rows) / max(_spread(projection.rows(layer)), 1e-30)
        found[layer] = rows.mean(0) + growth * projection.project(embedding, layer)
    return found


def count_visits(
    grown: Checkpoint, target: Architecture, texts: DomainTexts, progress: Progress
) -> tuple[NewExpertVisits, ...]:
    """Which tokens choose a grown mixture's last expert, by layer."""
    gate = target.gate(grown.config)
    chance = gate.max_experts_per_token / gate.num_experts
    found = []
    for layer, (*others, own) in _read_states(grown, texts, progress):
        rows = _read_rows(grown, target, layer)
        name = target.find("selection_bias", layer)
        bias = grown.read(name).to(torch.float32) if gate.selection_bias and name is not None else None

        visited = [_share(states, rows, gate, bias) for states in (own, *others)]
        weights = [len(states) for states in others]
        mean = sum(share * weight for share, weight in zip(visited[1:], weights, strict=True)) / max(1, sum(weights))
        found.append(NewExpertVisits(layer, visited[0], mean if others else None, chance, len(own)))
    return tuple(found)


def describe_visits(visits: Sequence[NewExpertVisits]) -> str:
    """Who visits a new expert, in one sentence over all layers."""
    own = [layer.own for layer in visits]
    others = [layer.others for layer in visits if layer.others is not None]
    beside = f", and {sum(others) / len(others):.0%} of the other domains'" if others else ""
    return (
        f"Of its domain's tokens {sum(own) / len(own):.0%} visit the new expert ({min(own):.0%} to {max(own):.0%} by "
        f"layer, {visits[0].num_tokens:,} tokens kept back){beside}; by chance {visits[0].chance:.0%} would."
    )


def _share(states: torch.Tensor, rows: torch.Tensor, gate: Gate, bias: torch.Tensor | None) -> float:
    """Share of the tokens [tokens, H] that choose the last expert."""
    return float(visit_experts(states @ rows.T, gate, bias)[:, -1].double().mean())


def _read_states(
    mixture: Checkpoint, texts: DomainTexts, progress: Progress
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """What each router reads of each domain, float32 [tokens, H]."""
    counts = [len(domain) for domain in texts.domains]
    ids, mask = pad_left([row for domain in texts.domains for row in domain])
    num_layers = int(mixture.config.num_hidden_layers)
    for layer, read in run_sparse_layers(mixture, ids, mask, torch.float32, _find_router):
        progress("reading hidden states", layer + 1, num_layers)
        yield layer, [real_tokens(*pair) for pair in zip(read.split(counts), mask.split(counts), strict=True)]


def _find_router(model: PreTrainedModel) -> torch.nn.Module | None:
    return next(router_modules(model), None)


def _read_rows(mixture: Checkpoint, target: Architecture, layer: int) -> torch.Tensor:
    name = target.find("router", layer)
    assert name is not None, f"{target.architecture} has no router"
    return mixture.read(name).to(torch.float32)


def _spread(rows: torch.Tensor) -> float:
    """Root mean square of the centred rows' elements."""
    return float((rows - rows.mean(0)).square().mean().sqrt())
