"""Router rows that are a projection of domain embeddings, and a domain that the projection has never seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixtures import EXACT, MakeDense, quiet
from router_texts import cut, domains, ffn_inputs
from transformers import AutoModelForCausalLM

from dense2moe import api
from dense2moe.upcycle.building.config import RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.hidden_states import RouterReading, read_routers
from dense2moe.upcycle.building.projection import FOLDER, read_projection, write_projection
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.gates.nexus import describe_texts, fit_projection
from dense2moe.upcycle.tasks.examples import Examples

Array = np.ndarray[Any, np.dtype[np.float64]]
NO_TEXT = Examples.of_blocks(torch.empty(0, 16, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def slow_rows(texts: list[Array], states: list[Array], means: Array, penalty: float, logit_std: float) -> Array:
    """The same by normal equations in the space of embeddings: no singular values, no kernel."""
    mean = np.mean([domain.mean(0) for domain in states], axis=0)
    without = np.eye(len(mean)) - np.outer(mean, mean) / (mean @ mean)
    gram = np.mean([without @ domain.T @ domain @ without / len(domain) for domain in states], axis=0)
    gram += penalty * np.trace(gram) / len(gram) * np.eye(len(gram))
    targets = np.linalg.solve(gram, without @ means.T).T
    centre = np.mean([own.mean(0) for own in texts], axis=0)
    weights = np.concatenate([np.full(len(own), 1 / len(own)) for own in texts])
    moved = np.concatenate(texts) - centre
    size = np.sum(weights * np.sum(moved**2, axis=1)) / len(moved)
    left = (moved.T * weights) @ moved + 0.1 * size * np.eye(moved.shape[1])
    projection = np.linalg.solve(left, (moved.T * weights) @ targets)
    rows = np.stack([own.mean(0) - centre for own in texts]) @ projection
    logits = np.concatenate(states) @ rows.T
    found: Array = rows * logit_std / np.sqrt(np.var(logits, axis=1).mean())
    return found


def test_rows_are_those_of_a_slow_ridge_regression() -> None:
    draw, hidden, counts = np.random.default_rng(0), 12, (5, 9, 6)
    texts = [draw.normal(size=(count, hidden)) + draw.normal(size=hidden) for count in counts]
    states = [draw.normal(size=(8 * count, hidden)) + 2 * draw.normal(size=hidden) + 3 for count in counts]
    means = np.concatenate([domain.reshape(-1, 8, hidden).mean(1) for domain in states])
    expected = slow_rows(texts, states, means, 0.03, 2.0)
    embeddings = describe_texts([torch.from_numpy(own) for own in texts])
    projection = fit_projection(
        [torch.from_numpy(domain).float() for domain in states], torch.from_numpy(means), embeddings, 0.03, 2.0
    )
    found = (embeddings.places @ projection.double()).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())  # float32 states


def read(source: Path, given: tuple[api.RouterDomain, ...], num_experts: int = 4, **router: Any) -> RouterReading:
    settings = UpcycleConfig(num_experts=num_experts, router=RouterConfig(kind="nexus", domains=given, **router))
    found = read_routers(source, settings, NO_TEXT, Path(), 0, quiet)
    assert found is not None
    return found


@torch.no_grad()
def embed(source: Path, domain: api.RouterDomain) -> torch.Tensor:
    """The mean over texts of the mean of their token embeddings, by the whole model, without padding."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    table = model.get_input_embeddings()
    return torch.stack([table(torch.tensor(row)).mean(0) for row in cut(domain.prompts, source)]).mean(0)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GemmaForCausalLM"])
def test_rows_of_padded_texts_are_projections_of_unpadded_ones(architecture: str, make_dense: MakeDense) -> None:
    source = make_dense(architecture=architecture)
    given = domains()
    found = read(source, given)
    assert found.projection is not None
    for site, rows in found.routers.items():
        expected = torch.stack([found.projection.project(embed(source, domain), site) for domain in given])
        torch.testing.assert_close(rows, expected, rtol=0, atol=2e-5 * float(rows.abs().max()))
        torch.testing.assert_close(found.projection.rows(site), rows, rtol=0, atol=1e-6)
        torch.testing.assert_close(rows.sum(0), torch.zeros(rows.shape[1]), rtol=0, atol=1e-4)


def test_a_domain_that_was_not_there_gets_a_row_that_its_tokens_find(dense_checkpoint: Path) -> None:
    *known, new = domains()
    projection = read(dense_checkpoint, tuple(known), 3).projection
    assert projection is not None
    fresh = domains(seed=7)  # other texts of the same letters
    row = projection.project(embed(dense_checkpoint, new), 1)
    rows = torch.cat([projection.rows(1), row[None]])
    first = [
        (ffn_inputs(dense_checkpoint, cut(domain.prompts, dense_checkpoint))[1] @ rows.T).argmax(-1) for domain in fresh
    ]
    shares = [float((chosen == 3).float().mean()) for chosen in first]
    assert shares[3] > 0.7
    assert max(shares[:3]) < 0.3
    assert min(float((first[number] == number).float().mean()) for number in range(3)) > 0.5


def test_a_domain_with_several_rows_has_its_texts_cut_into_clusters(dense_checkpoint: Path) -> None:
    one, other, *rest = domains()
    mixed = (
        api.RouterDomain(prompts=(*one.prompts, *other.prompts)),
        api.RouterDomain(prompts=tuple(text for domain in rest for text in domain.prompts)),
    )
    found = read(dense_checkpoint, mixed)
    states = ffn_inputs(dense_checkpoint, cut(one.prompts, dense_checkpoint))[1]
    others = ffn_inputs(dense_checkpoint, cut(other.prompts, dense_checkpoint))[1]
    winners = [int((each @ found.routers[1].T).argmax(-1).mode().values) for each in (states, others)]
    assert sorted(winners) == [0, 1]
    with pytest.raises(UpcycleError, match="kind 'nexus' has 2 texts of a domain with 3 router rows; must be"):
        read(dense_checkpoint, domains()[:2], 6)


def test_the_projection_is_kept_beside_the_mixture(make_dense: MakeDense, tmp_path: Path) -> None:
    base = make_dense(**EXACT)
    router = RouterConfig(kind="nexus", domains=domains()[:2])
    api.upcycle(base, tmp_path / "out", UpcycleConfig(num_experts=2, layers=(1,), target="qwen2_moe", router=router))
    found = read_projection(tmp_path / "out")
    assert found is not None
    assert list(found.layers) == [1]
    assert read_projection(base) is None
    (tmp_path / "other").mkdir()
    write_projection(found, tmp_path / "other")
    again = read_projection(tmp_path / "other")
    assert again is not None and torch.equal(again.layers[1], found.layers[1])
    path = tmp_path / "other" / FOLDER / "projection.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UpcycleError, match="cannot be read as a projection of router rows") as line:
        read_projection(tmp_path / "other")
    assert "\n" not in str(line.value)
