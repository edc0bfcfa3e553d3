"""Routers at the start: drawn, or read from hidden states, with logits of the deviation that was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from dense2moe.upcycle.building.experts import seeded_generator
from dense2moe.upcycle.gates.start import draw_router, kmeans_rows, prototype_rows, ridge_rows, router_load, scale_rows

HIDDEN = 24


def states_of(
    sizes: list[int], spread: float = 0.3, seed: int = 0, noise_seed: int = 0, shared: float = 5.0
) -> list[torch.Tensor]:
    """Hidden states of domains of these many tokens.

    One mean that all share, larger than the rest, as in real text, one of the domain, and noise.
    """
    places, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(noise_seed)
    everywhere = torch.randn(HIDDEN, generator=places) * shared
    return [
        everywhere + torch.randn(HIDDEN, generator=places) + spread * torch.randn(size, HIDDEN, generator=noise)
        for size in sizes
    ]


def across(mean: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Without what lies along the mean, by the matrix that projects."""
    return vectors @ (np.eye(HIDDEN) - np.outer(mean, mean) / (mean @ mean))


def deviation(rows: torch.Tensor, states: torch.Tensor) -> float:
    """How far logits differ within a token: root mean square over tokens and rows, in numpy."""
    logits = states.double().numpy() @ rows.double().numpy().T
    return float(np.sqrt(np.mean(np.var(logits, axis=1))))


# Drawn


@pytest.mark.parametrize("logit_std", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", ["ones", "small", "uneven"])
def test_logits_of_normed_states_have_the_deviation_asked_for(logit_std: float, scale: str) -> None:
    hidden, num_experts = 256, 64
    generator = torch.Generator().manual_seed(0)
    weight = {
        "ones": torch.ones(hidden),
        "small": torch.full((hidden,), 0.05),
        "uneven": torch.rand(hidden, generator=generator) * 3,
    }[scale]
    norm = MixtralRMSNorm(hidden)
    norm.weight.data = weight
    with torch.no_grad():
        states = norm(torch.randn(2048, hidden, generator=generator) * 17)
    router = draw_router(num_experts, hidden, float(weight.norm()), logit_std, seeded_generator(0, "router"))
    assert router.shape == (num_experts, hidden)
    assert router.dtype == torch.float32
    found = states @ router.T
    # 64 rows of 256 draws: the standard error is below one percent; 10 % allows for an uneven scale.
    assert float(found.std()) == pytest.approx(logit_std, rel=0.1)
    assert math.isclose(float(found.mean()), 0.0, abs_tol=0.1 * logit_std)


@pytest.mark.parametrize("input_length", [0.0, 1.0])
def test_a_zero_deviation_is_a_zero_router(input_length: float) -> None:
    assert torch.equal(draw_router(3, 5, input_length, 0.0, seeded_generator(0, "a")), torch.zeros(3, 5))


def test_a_router_that_reads_nothing_is_finite() -> None:
    assert draw_router(3, 5, 0.0, 1.0, seeded_generator(0, "a")).isfinite().all()


# Scaled


@pytest.mark.parametrize("logit_std", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("num_rows", [2, 5])
def test_scaled_rows_are_centred_and_their_logits_differ_by_what_was_asked(logit_std: float, num_rows: int) -> None:
    rows = torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(1)) * 40 + 3
    states = torch.cat(states_of([300]))
    found = scale_rows(rows, states, logit_std)
    assert deviation(found, states) == pytest.approx(logit_std, rel=1e-4)  # float32 sums over 24 elements
    assert torch.allclose(found.sum(0), torch.zeros(HIDDEN), atol=1e-5 * float(found.abs().max()))
    differences, expected = found - found[0], rows - rows[0]
    scale = float(differences[1].norm() / expected[1].norm())
    # centring and one factor, no more
    assert torch.allclose(differences, scale * expected, rtol=1e-3, atol=1e-4 * float(differences.abs().max()))


@pytest.mark.parametrize("num_rows", [1, 4])
def test_rows_that_do_not_differ_are_scaled_to_zero(num_rows: int) -> None:
    rows = torch.full((num_rows, HIDDEN), 0.5)
    assert torch.equal(
        scale_rows(rows, torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0)), 1.0),
        torch.zeros(num_rows, HIDDEN),
    )


# Prototypes


def test_prototypes_are_the_mean_of_each_domain_centred_and_across_their_mean() -> None:
    states = states_of([10, 200, 31])
    found = prototype_rows(states, 1.0)
    means = np.stack([domain.double().numpy().mean(0) for domain in states])
    direction = across(means.mean(0), means - means.mean(0))
    expected = direction / deviation(torch.from_numpy(direction), torch.cat(states))
    assert found.dtype == torch.float32
    # The domains' means are a tenth of what is subtracted from them in float32.
    assert np.abs(found.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["prototypes", "ridge", "kmeans"])
def test_what_all_tokens_share_prefers_no_row(kind: str) -> None:
    """A router has no bias.

    A row that lay near the shared mean would win every token, and one that lay away from it none.
    """
    states = states_of([50, 60, 70], shared=50.0)
    rows = {
        "prototypes": lambda: prototype_rows(states, 1.0),
        "ridge": lambda: ridge_rows(states, 1e-2, 1.0),
        "kmeans": lambda: kmeans_rows(torch.cat(states), 3, 1.0, seeded_generator(0, "a")),
    }[kind]()
    means = torch.stack([domain.mean(0) for domain in states])
    mean = torch.cat(states).mean(0) if kind == "kmeans" else means.mean(0)
    # Logits differ by about one; the shared mean is fifty times as long as what tells the domains apart, and float32
    # rounds.
    assert float((rows @ mean).abs().max()) < 1e-3
    assert sorted((means @ rows.T).argmax(-1).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["prototypes", "ridge"])
@pytest.mark.parametrize("sizes", [[100, 100, 100, 100], [100, 400, 20, 200]])
def test_unseen_tokens_of_a_domain_have_their_largest_logit_at_its_row(kind: str, sizes: list[int]) -> None:
    train, unseen = states_of(sizes), states_of(sizes, noise_seed=1)
    rows = prototype_rows(train, 1.0) if kind == "prototypes" else ridge_rows(train, 1e-2, 1.0)
    for number, domain in enumerate(unseen):
        # Chance is a quarter. The domains' means lie about seven, and nearly always more than five, times the noise
        # from each other.
        assert float(((domain @ rows.T).argmax(-1) == number).float().mean()) > 0.95


# Ridge


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("sizes", [[40, 40], [200, 30, 7]])
def test_ridge_is_least_squares_on_rows_augmented_by_the_penalty(penalty: float, sizes: list[int]) -> None:
    states = [domain.double() for domain in states_of(sizes)]
    found = ridge_rows([domain.float() for domain in states], penalty, 1.0)
    # Each domain weighs the same: a token's row is scaled by the root of its weight, and the penalty is as many more
    # rows, with a target of zero.
    weights = np.concatenate([np.full(len(domain), 1 / (len(domain) * len(states))) for domain in states])
    inputs = torch.cat([domain.float() for domain in states]).double().numpy()
    inputs = across(weights @ inputs, inputs)
    targets = np.eye(len(states))[
        np.concatenate([np.full(len(domain), number) for number, domain in enumerate(states)])
    ]
    strength = penalty * (weights @ (inputs**2)).mean()
    roots = np.sqrt(weights)[:, None]
    stacked = np.concatenate([roots * inputs, math.sqrt(strength) * np.eye(HIDDEN)])
    solution = np.linalg.lstsq(stacked, np.concatenate([roots * targets, np.zeros((HIDDEN, len(states)))]), rcond=None)[
        0
    ].T
    expected = solution - solution.mean(0)
    expected /= deviation(torch.from_numpy(expected), torch.cat([domain.float() for domain in states]))
    # Solved in float64; rows and scale are float32.
    assert np.abs(found.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


def test_ridge_of_fewer_tokens_than_dimensions_is_finite() -> None:
    assert ridge_rows(states_of([2, 1, 3]), 1e-2, 1.0).isfinite().all()


def test_ridge_of_states_that_are_all_the_same_is_finite() -> None:
    assert ridge_rows([torch.ones(4, HIDDEN), torch.ones(3, HIDDEN)], 1e-2, 1.0).isfinite().all()


def test_a_domain_with_many_tokens_weighs_no_more_in_a_ridge_than_one_with_few() -> None:
    few, many = states_of([20, 20])
    found = ridge_rows([few, many.repeat(50, 1)], 1e-2, 1.0)
    expected = ridge_rows([few, many], 1e-2, 1.0)
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    # the direction; the scale is over tokens, of which one domain now has most
    assert torch.allclose(cosine, torch.ones(2), atol=1e-5)


# k-means


def clusters(num_clusters: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffled points around as many far directions, and the cluster of each."""
    states = states_of([size] * num_clusters, spread=0.05, seed=seed)
    order = torch.randperm(num_clusters * size, generator=torch.Generator().manual_seed(seed))
    return torch.cat(states)[order], torch.arange(num_clusters).repeat_interleave(size)[order]


@pytest.mark.parametrize("num_clusters", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_kmeans_finds_planted_clusters(num_clusters: int, seed: int) -> None:
    states, planted = clusters(num_clusters, 40, seed)
    rows = kmeans_rows(states, num_clusters, 1.0, seeded_generator(seed, "router 0"))
    assert rows.shape == (num_clusters, HIDDEN)
    found = (states @ rows.T).argmax(-1)
    pairs = set(zip(planted.tolist(), found.tolist(), strict=True))
    assert len(pairs) == num_clusters == len({row for _, row in pairs})  # one row a cluster, and another for each


def test_the_rows_of_kmeans_are_the_centres_of_its_clusters() -> None:
    states, planted = clusters(3, 50)
    rows = kmeans_rows(states, 3, 1.0, seeded_generator(0, "a"))
    points = across(states.double().numpy().mean(0), states.double().numpy())
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    centres = np.stack([points[planted.numpy() == number].mean(0) for number in range(3)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    expected = centres - centres.mean(0)
    expected /= deviation(torch.from_numpy(expected), states)
    closest = np.array([np.linalg.norm(expected - row, axis=1).argmin() for row in rows.double().numpy()])
    assert sorted(closest) == [0, 1, 2]
    # float32 sums over 50 points
    assert np.abs(rows.numpy() - expected[closest]).max() <= 1e-4 * np.abs(expected).max()


def test_kmeans_depends_on_the_generators_seed_alone() -> None:
    states = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(0))
    draws = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            draws.append(kmeans_rows(states, 4, 1.0, seeded_generator(seed, "a")))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_fewer_tokens_than_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens for 4 clusters"):
        kmeans_rows(
            torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0)), 4, 1.0, seeded_generator(0, "a")
        )


@pytest.mark.parametrize("seed", range(5))
def test_a_cluster_that_loses_its_tokens_takes_the_token_that_its_centre_serves_worst(seed: int) -> None:
    """Two directions and four clusters.

    At least two of them have no token, and must not end as rows of NaN or of zeros.
    """
    states = torch.eye(2, 4).repeat_interleave(6, 0)
    rows = kmeans_rows(states, 4, 1.0, seeded_generator(seed, "a"))
    assert rows.isfinite().all()
    assert deviation(rows, states) == pytest.approx(1.0, rel=1e-4)
    assert len({tuple(row.tolist()) for row in rows}) == 2  # each is one of the two directions
    logits = states @ rows.T
    assert {int(row.argmax()) for row in logits[:6]}.isdisjoint({int(row.argmax()) for row in logits[6:]})


def test_as_many_clusters_as_tokens_give_each_token_a_row() -> None:
    states = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3))
    rows = kmeans_rows(states, 5, 1.0, seeded_generator(0, "a"))
    assert sorted((states @ rows.T).argmax(-1).tolist()) == [0, 1, 2, 3, 4]


def test_tokens_that_are_all_the_same_give_a_finite_router() -> None:
    assert kmeans_rows(torch.ones(9, HIDDEN), 3, 1.0, seeded_generator(0, "a")).isfinite().all()


# Load


def test_load_is_each_rows_share_of_the_tokens() -> None:
    rows = torch.eye(3)
    states = torch.tensor([[1.0, 0, 0], [0, 2, 1], [0, 3, 0], [9, 1, 1]])
    assert router_load(rows, states) == [0.5, 0.5, 0.0]


def test_the_load_of_no_tokens_is_zero() -> None:
    assert router_load(torch.eye(3), torch.empty(0, 3)) == [0.0, 0.0, 0.0]
