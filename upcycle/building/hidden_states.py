"""Routers read from hidden states of the dense model, domain by domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dense2moe.upcycle.building.config import Domain, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.experts import seeded_generator
from dense2moe.upcycle.building.pieces import Site
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.checkpoints.layerwise import pad_left, real_tokens, run_layers
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.checkpoints.tokenizer import encode, load_tokenizer
from dense2moe.upcycle.data.documents import read_file
from dense2moe.upcycle.data.files import match_files
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.gates.start import kmeans_rows, prototype_rows, ridge_rows, router_load
from dense2moe.upcycle.progress import Progress

_MAX_ROW_TOKENS = 512
_BATCH_ROWS = 8


@dataclass(frozen=True)
class RouterReading:
    """Routers read from text: by the number of their FFN, float32 [rows, hidden].

    loads: the share of the router's own text that each row would get.
    """

    routers: dict[int, torch.Tensor]
    num_tokens: tuple[int, ...]
    loads: dict[int, list[float]]


def read_routers(
    source: Path,
    config: UpcycleConfig,
    blocks: torch.Tensor,
    base: Path,
    seed: int,
    progress: Progress,
    plan: UpcyclePlan | None = None,
) -> RouterReading | None:
    """Routers from hidden states of the dense checkpoint in `source`; None where the settings draw them.

    `blocks` are training text, token ids [blocks, block_size], for k-means without domains of its own; paths of
    domains' files start at `base`. The plan is made here unless it is given. Memory: one layer of the dense model and
    the hidden states of the text. A mean is over real tokens, never over padding.

    Raises:
        UpcycleError: a domain has no file, no text or no tokens, or there are fewer tokens than router rows.
    """
    settings = config.router
    if settings.kind == "normal":
        return None
    checkpoint = open_checkpoint(source)
    plan = plan or plan_upcycle(checkpoint, config)
    ffn_module = plan.conversion.family.ffn_module
    assert ffn_module is not None, "the conversion refuses routers from hidden states where layers cannot be run alone"
    sequences = _read_sequences(source, settings, blocks, base)
    num_tokens = tuple(sum(map(len, domain)) for domain in sequences)
    if settings.kind == "kmeans" and sum(num_tokens) < config.num_router_rows:
        raise UpcycleError(
            f"upcycle.router: {sum(num_tokens)} tokens of text; must be at least one for each of "
            f"{config.num_router_rows} clusters"
        )
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
    """Rows of token ids and their mask, int64 [B, S], and the domain of each row, int64 [B]."""

    ids: torch.Tensor
    mask: torch.Tensor
    owner: torch.Tensor


def _make_rows(states: list[torch.Tensor], config: UpcycleConfig, generator: torch.Generator) -> torch.Tensor:
    settings = config.router
    match settings.kind:
        case "prototypes":
            return prototype_rows(states, settings.logit_std)
        case "ridge":
            return ridge_rows(states, settings.penalty, settings.logit_std)
        case _:
            return kmeans_rows(torch.cat(states), config.num_router_rows, settings.logit_std, generator)


def _read_sequences(source: Path, settings: RouterConfig, blocks: torch.Tensor, base: Path) -> list[list[list[int]]]:
    """Rows of token ids of each domain, `max_tokens` at most; the training text where there are no domains."""
    if not settings.domains:
        wanted = max(1, settings.max_tokens // blocks.shape[1])
        places = torch.linspace(0, len(blocks) - 1, min(wanted, len(blocks))).round().long()
        return [blocks[places].tolist()]
    tokenizer = load_tokenizer(source)
    domains = []
    for number, domain in enumerate(settings.domains):
        rows = _tokenize(tokenizer, _read_domain(domain, number, base), settings.max_tokens)
        if not rows:
            raise UpcycleError(f"upcycle.router.domains[{number}]: its text has no tokens; give other prompts or files")
        domains.append(rows)
    return domains


def _read_domain(domain: Domain, number: int, base: Path) -> list[str]:
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
    """Rows of at most 512 tokens, the texts' own beginnings kept apart, and `max_tokens` in all."""
    rows: list[list[int]] = []
    left = max_tokens
    for text in texts:
        ids = encode(tokenizer, text)[:left]
        rows += [ids[start : start + _MAX_ROW_TOKENS] for start in range(0, len(ids), _MAX_ROW_TOKENS)]
        left -= len(ids)
    return rows
