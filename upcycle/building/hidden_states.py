"""Routers read from hidden states of the dense model, domain by domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dense2moe.upcycle.building.blend import make_blend
from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.experts import seeded_generator
from dense2moe.upcycle.building.pieces import Site
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.projection import Projection, make_projection
from dense2moe.upcycle.building.router_text import tokenize_domain
from dense2moe.upcycle.checkpoints.adapter import open_sources
from dense2moe.upcycle.checkpoints.layerwise import embed, mean_states, pad_left, real_tokens, run_layers
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.checkpoints.tokenizer import load_tokenizer
from dense2moe.upcycle.data.packing import choose_evenly
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.gates.nexus import describe_texts, fit_projection
from dense2moe.upcycle.gates.start import (
    kmeans_rows,
    prototype_rows,
    ridge_rows,
    router_load,
    split_clusters,
    split_domains,
)
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import Examples

_BATCH_ROWS = 8


@dataclass(frozen=True)
class RouterReading:
    """Routers read from text, float32 [rows, hidden], by their FFN's number.

    loads: the share of the router's own text that each row would get.
    projection: of domain embeddings to rows, of routers of kind 'nexus'.
    """

    routers: dict[int, torch.Tensor]
    num_tokens: tuple[int, ...]
    loads: dict[int, list[float]]
    projection: Projection | None = None


def read_routers(
    source: Path,
    config: UpcycleConfig,
    training: Examples,
    base: Path,
    seed: int,
    progress: Progress,
    plan: UpcyclePlan | None = None,
    sources: Mapping[str, Path] | None = None,
) -> RouterReading | None:
    """Routers from hidden states of the dense checkpoint in `source`.

    None where the settings draw routers at random. `training` is the text that routers without domains of their own are
    read from; paths of domains' files start at `base`. The plan is made here unless it is given. Where it has
    `sources`, all text is read by the merged weights and the mean of the FFNs that become experts. Memory: one layer of
    the dense model and the hidden states of the text. A mean is over real tokens, never over padding.

    Raises:
        UpcycleError: a domain has no file, no text or no tokens, the domains of the training text are fewer than two or
            do not divide the router rows evenly, or there are fewer tokens than router rows.
    """
    if config.router.kind == "normal":
        return None
    checkpoint = open_checkpoint(source)
    others = open_sources(checkpoint, sources or {})
    plan = plan or plan_upcycle(checkpoint, config, others, tuple(map(str, training.domains.unique().tolist())))
    assert tuple(others) == plan.sources, "read by other sources than were planned"
    config, settings = plan.settings, plan.settings.router
    if settings.kind == "normal":
        return None
    if plan.sources_differ:
        checkpoint = make_blend((checkpoint, *others.values()), plan, seed)
    ffn_module = plan.conversion.family.ffn_module
    assert ffn_module is not None, "the conversion refuses routers from hidden states where layers cannot be run alone"
    sequences = _read_sequences(source, config, training, base)
    num_tokens = tuple(sum(map(len, domain)) for domain in sequences)
    _check_tokens(num_tokens, config)
    owner = torch.tensor([number for number, domain in enumerate(sequences) for _ in domain])
    ids, mask = pad_left([row for domain in sequences for row in domain])
    groups = [torch.nonzero(owner == number).flatten() for number in range(len(sequences))]
    embeddings = None
    if settings.kind == "nexus":
        texts = mean_states(embed(checkpoint, ids, torch.float32), mask)
        groups = _divide_texts(texts, groups, config, seeded_generator(seed, "texts"))
        embeddings = describe_texts([texts[group] for group in groups])
    numbers = {site: number for number, site in enumerate(plan.sites)}
    routers: dict[int, torch.Tensor] = {}
    loads: dict[int, list[float]] = {}
    projections: dict[int, torch.Tensor] = {}
    num_layers = checkpoint.config.num_hidden_layers
    for layer, _, read, _ in run_layers(checkpoint, ids, mask, torch.float32, ffn_module, _BATCH_ROWS, narrow=True):
        progress("reading hidden states", layer + 1, num_layers)
        if (site := numbers.get(Site(0, layer))) is None:
            continue
        states = [real_tokens(read[group], mask[group]) for group in groups]
        if embeddings is None:
            routers[site] = _make_rows(states, config, seeded_generator(seed, f"router {site}"))
        else:
            means = mean_states(read, mask)[torch.cat(groups)]
            projections[layer] = fit_projection(states, means, embeddings, settings.penalty, settings.std)
            routers[site] = embeddings.places.float() @ projections[layer]
        loads[site] = router_load(routers[site], torch.cat(states))
    projection = None if embeddings is None else make_projection(embeddings, projections)
    return RouterReading(routers, num_tokens, loads, projection)


def _divide_texts(
    texts: torch.Tensor, domains: list[torch.Tensor], config: UpcycleConfig, generator: torch.Generator
) -> list[torch.Tensor]:
    """Numbers of the texts [texts, H] that make each router row.

    A domain with several rows has its texts cut into as many clusters.
    """
    count = config.num_router_rows // len(domains)
    if (fewest := min(map(len, domains))) < count:
        raise UpcycleError(
            f"upcycle.router: kind 'nexus' has {fewest} texts of a domain with {count} router rows; must be at least "
            "one text a row; give more prompts, files or tokens"
        )
    found = []
    for numbers in domains:
        nearest = split_clusters(texts[numbers], count, generator)
        found += [
            numbers[nearest == cluster] if bool((nearest == cluster).any()) else numbers for cluster in range(count)
        ]
    return found


def _check_tokens(num_tokens: tuple[int, ...], config: UpcycleConfig) -> None:
    """Refuse less text than one token for each cluster."""
    clusters = config.num_router_rows if config.router.kind == "kmeans" else config.num_router_rows // len(num_tokens)
    found = sum(num_tokens) if config.router.kind == "kmeans" else min(num_tokens)
    if found < clusters:
        raise UpcycleError(
            f"upcycle.router: {found} tokens of text; must be at least one for each of {clusters} clusters"
        )


def _make_rows(states: list[torch.Tensor], config: UpcycleConfig, generator: torch.Generator) -> torch.Tensor:
    settings = config.router
    match settings.kind:
        case "prototypes":
            return prototype_rows(split_domains(states, config.num_router_rows, generator), settings.std)
        case "ridge":
            parts = split_domains(states, config.num_router_rows, generator)
            return ridge_rows(parts, settings.penalty, settings.std)
        case _:
            return kmeans_rows(torch.cat(states), config.num_router_rows, settings.std, generator)


def _read_sequences(source: Path, config: UpcycleConfig, training: Examples, base: Path) -> list[list[list[int]]]:
    """Rows of token ids of each domain, `max_tokens` at most.

    Rows of the training text where there are no domains.
    """
    settings = config.router
    if not settings.domains:
        return _take_blocks(training, config)
    tokenizer = load_tokenizer(source)
    return [
        tokenize_domain(tokenizer, domain, settings.max_tokens, base, f"upcycle.router.domains[{number}]")
        for number, domain in enumerate(settings.domains)
    ]


def _take_blocks(training: Examples, config: UpcycleConfig) -> list[list[list[int]]]:
    """Blocks of the training text, evenly spread over the whole.

    Blocks of each domain, for rows that belong to domains.
    """
    parts = [training]
    if config.router.reads_domains:
        numbers = training.domains.unique()
        if len(numbers) < 2 or config.num_router_rows % len(numbers):
            raise UpcycleError(
                f"upcycle.router: kind is '{config.router.kind}' without domains, and the training text has "
                f"{len(numbers)}; they must be 2 or more and divide the {config.num_router_rows} router rows evenly; "
                "give data.source of kind 'domains', or upcycle.router.domains"
            )
        parts = [training.of_domain(int(number)) for number in numbers]
    wanted = max(1, config.router.max_tokens // training.block_size)
    return [part.take(choose_evenly(len(part), wanted)).rows() for part in parts]
