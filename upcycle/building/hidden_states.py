"""Routers read from hidden states of the dense model, domain by domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.building.config import RouterDomain, UpcycleConfig
from dense2moe.upcycle.building.experts import seeded_generator
from dense2moe.upcycle.building.pieces import Site
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.checkpoints.layerwise import pad_left, real_tokens, run_layers
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.checkpoints.tokenizer import encode, load_tokenizer
from dense2moe.upcycle.data.documents import read_file
from dense2moe.upcycle.data.examples import Examples
from dense2moe.upcycle.data.files import match_files
from dense2moe.upcycle.data.packing import choose_evenly
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.gates.start import kmeans_rows, prototype_rows, ridge_rows, router_load, split_domains
from dense2moe.upcycle.progress import Progress

_MAX_ROW_TOKENS = 512
_BATCH_ROWS = 8


@dataclass(frozen=True)
class RouterReading:
    """Routers read from text, float32 [rows, hidden], by their FFN's number.

    loads: the share of the router's own text that each row would get.
    """

    routers: dict[int, torch.Tensor]
    num_tokens: tuple[int, ...]
    loads: dict[int, list[float]]


def read_routers(
    source: Path,
    config: UpcycleConfig,
    training: Examples,
    base: Path,
    seed: int,
    progress: Progress,
    plan: UpcyclePlan | None = None,
) -> RouterReading | None:
    """Routers from hidden states of the dense checkpoint in `source`.

    None where the settings draw routers at random. `training` is the text that routers without domains of their own are
    read from; paths of domains' files start at `base`. The plan is made here unless it is given. Memory: one layer of
    the dense model and the hidden states of the text. A mean is over real tokens, never over padding.

    Raises:
        UpcycleError: a domain has no file, no text or no tokens, the domains of the training text are fewer than two or
            do not divide the router rows evenly, or there are fewer tokens than router rows.
    """
    settings = config.router
    if settings.kind == "normal":
        return None
    checkpoint = open_checkpoint(source)
    plan = plan or plan_upcycle(checkpoint, config)
    ffn_module = plan.conversion.family.ffn_module
    assert ffn_module is not None, "the conversion refuses routers from hidden states where layers cannot be run alone"
    sequences = _read_sequences(source, config, training, base)
    num_tokens = tuple(sum(map(len, domain)) for domain in sequences)
    _check_tokens(num_tokens, config)
    owner = torch.tensor([number for number, domain in enumerate(sequences) for _ in domain])
    batch = _Batch(*pad_left([row for domain in sequences for row in domain]), owner)
    numbers = {site: number for number, site in enumerate(plan.sites)}
    routers, loads = {}, {}
    num_layers = checkpoint.config.num_hidden_layers
    for layer, _, read, _ in run_layers(checkpoint, batch.ids, batch.mask, torch.float32, ffn_module, _BATCH_ROWS):
        progress("reading hidden states", layer + 1, num_layers)
        if (site := numbers.get(Site(0, layer))) is None:
            continue
        states = [
            real_tokens(read[batch.owner == number], batch.mask[batch.owner == number])
            for number in range(len(sequences))
        ]
        routers[site] = _make_rows(states, config, seeded_generator(seed, f"router {site}"))
        loads[site] = router_load(routers[site], torch.cat(states))
    return RouterReading(routers, num_tokens, loads)


@dataclass(frozen=True)
class _Batch:
    """Token ids and mask, int64 [B, S], and each row's domain [B]."""

    ids: torch.Tensor
    mask: torch.Tensor
    owner: torch.Tensor


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
            return prototype_rows(split_domains(states, config.num_router_rows, generator), settings.logit_std)
        case "ridge":
            parts = split_domains(states, config.num_router_rows, generator)
            return ridge_rows(parts, settings.penalty, settings.logit_std)
        case _:
            return kmeans_rows(torch.cat(states), config.num_router_rows, settings.logit_std, generator)


def _read_sequences(source: Path, config: UpcycleConfig, training: Examples, base: Path) -> list[list[list[int]]]:
    """Rows of token ids of each domain, `max_tokens` at most.

    Rows of the training text where there are no domains.
    """
    settings = config.router
    if not settings.domains:
        return _take_blocks(training, config)
    tokenizer = load_tokenizer(source)
    domains = []
    for number, domain in enumerate(settings.domains):
        rows = _tokenize(tokenizer, _read_domain(domain, number, base), settings.max_tokens)
        if not rows:
            raise UpcycleError(f"upcycle.router.domains[{number}]: its text has no tokens; give other prompts or files")
        domains.append(rows)
    return domains


def _take_blocks(training: Examples, config: UpcycleConfig) -> list[list[list[int]]]:
    """Blocks of the training text, evenly spread over the whole.

    Blocks of each domain, for rows that belong to domains.
    """
    parts = [training.ids]
    if config.router.reads_domains:
        numbers = training.domains.unique()
        if len(numbers) < 2 or config.num_router_rows % len(numbers):
            raise UpcycleError(
                f"upcycle.router: kind is '{config.router.kind}' without domains, and the training text has "
                f"{len(numbers)}; they must be 2 or more and divide the {config.num_router_rows} router rows evenly; "
                "give data.source of kind 'domains', or upcycle.router.domains"
            )
        parts = [training.ids[training.domains == number] for number in numbers]
    wanted = max(1, config.router.max_tokens // training.block_size)
    return [part[choose_evenly(len(part), wanted)].tolist() for part in parts]


def _read_domain(domain: RouterDomain, number: int, base: Path) -> list[str]:
    texts = list(domain.prompts)
    for file in match_files(domain.files, base, f"upcycle.router.domains[{number}].files"):
        text = "".join(read_file(file))
        if not text.strip():  # a tokenizer's own <s> would be all of the domain
            raise UpcycleError(
                f"{file}: has no text; upcycle.router.domains[{number}].files must be files with text; fill it or "
                "leave it out"
            )
        texts.append(text)
    return texts


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Rows of at most 512 tokens, `max_tokens` in all.

    Every text begins a row of its own.
    """
    rows: list[list[int]] = []
    left = max_tokens
    for text in texts:
        ids = encode(tokenizer, text)[:left]
        rows += [ids[start : start + _MAX_ROW_TOKENS] for start in range(0, len(ids), _MAX_ROW_TOKENS)]
        left -= len(ids)
    return rows
