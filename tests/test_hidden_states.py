"""Routers read from the dense model's hidden states are those of transformers' own model, unpadded.

And send each domain to its expert.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tunes import fine_tune
from router_texts import ALPHABETS, cut, domains, ffn_inputs, make_blend, write
from transformers import AutoModelForCausalLM

from dense2moe.upcycle.building.config import (
    ExpertsConfig,
    MergingConfig,
    RouterConfig,
    RouterDomain,
    UpcycleConfig,
)
from dense2moe.upcycle.building.experts import seeded_generator
from dense2moe.upcycle.building.hidden_states import RouterReading, read_routers
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.gates.start import kmeans_rows, prototype_rows, ridge_rows
from dense2moe.upcycle.tasks.examples import Examples

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

MakeDense = Callable[..., Path]
NO_TEXT = Examples.of_blocks(torch.empty(0, 16, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "mistral, window": {"architecture": "MistralForCausalLM", "sliding_window": 12},
    "phi3": {"architecture": "Phi3ForCausalLM", "sliding_window": 12},
    "gemma": {"architecture": "GemmaForCausalLM", "head_dim": 16},
    "qwen2": {
        "architecture": "Qwen2ForCausalLM",
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 16},
    "olmo2": {"architecture": "Olmo2ForCausalLM"},
    "granite": {"architecture": "GraniteForCausalLM", "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
}


def quiet(what: str, done: int, total: int) -> None:
    pass


def settings(kind: str, num_experts: int = 4, given: tuple[RouterDomain, ...] = (), **overrides: Any) -> UpcycleConfig:
    own = {name: overrides.pop(name) for name in ("max_tokens", "penalty", "logit_std") if name in overrides}
    router = {"logit_std": 1.0} | own
    return UpcycleConfig(num_experts=num_experts, router=RouterConfig(kind=kind, domains=given, **router), **overrides)


def read(
    source: Path, config: UpcycleConfig, text: Examples = NO_TEXT, base: Path = Path(), seed: int = 0
) -> RouterReading:
    found = read_routers(source, config, text, base, seed, quiet)
    assert found is not None
    return found


def one_domain(blocks: torch.Tensor) -> Examples:
    return Examples.of_blocks(blocks, torch.zeros(len(blocks), dtype=torch.int64))


def prototypes(states: Sequence[torch.Tensor], logit_std: float) -> np.ndarray:
    """Means of domains, centred, without what lies along the mean of means, with logits that differ by `logit_std`.

    In float64.
    """
    means = np.stack([domain.double().numpy().mean(0) for domain in states])
    mean = means.mean(0)
    rows = (means - mean) @ (np.eye(len(mean)) - np.outer(mean, mean) / (mean @ mean))
    logits = torch.cat(list(states)).double().numpy() @ rows.T
    return rows * logit_std / np.sqrt(np.var(logits, axis=1).mean())


def largest_difference(found: torch.Tensor, expected: np.ndarray) -> float:
    assert found.dtype == torch.float32
    return float(np.abs(found.double().numpy() - expected).max() / np.abs(expected).max())


# Rows padded on the left have their rotary positions counted from the padding, and matrix products of another height
# sum in another order: 1e-6 of a hidden state, and means that differ by a tenth of it.
SAME = 2e-5


# Prototypes


@pytest.mark.parametrize("name", SOURCES)
def test_prototypes_are_the_means_that_transformers_gives_without_padding(name: str, make_dense: MakeDense) -> None:
    source, texts = make_dense(intermediate_size=64, **SOURCES[name]), domains()
    found = read(source, settings("prototypes", given=texts, logit_std=1.5))
    rows = [cut(domain.prompts, source) for domain in texts]
    assert len({len(row) for domain in rows for row in domain}) > 4  # lengths that differ, so there was padding
    assert found.num_tokens == tuple(sum(map(len, domain)) for domain in rows)
    states = [ffn_inputs(source, domain) for domain in rows]
    assert sorted(found.routers) == [0, 1]
    for layer, router in found.routers.items():
        assert largest_difference(router, prototypes([domain[layer] for domain in states], 1.5)) <= SAME


def test_a_mean_over_padding_too_would_show(make_dense: MakeDense) -> None:
    """Otherwise the test above would prove nothing of it."""
    source, texts = make_dense(intermediate_size=64), domains()
    rows = [cut(domain.prompts, source) for domain in texts]
    length = max(len(row) for domain in rows for row in domain)
    padded = [[[rows[0][0][0]] * (length - len(row)) + row for row in domain] for domain in rows]
    right, wrong = ([ffn_inputs(source, domain)[0] for domain in given] for given in (rows, padded))
    assert largest_difference(torch.from_numpy(prototypes(wrong, 1.0)).float(), prototypes(right, 1.0)) > 1000 * SAME


def test_a_domain_is_read_up_to_max_tokens_in_rows_of_512(dense_checkpoint: Path) -> None:
    texts = tuple(RouterDomain(prompts=(write(letters, 700), write(letters, 900, 1))) for letters in ALPHABETS)
    found = read(dense_checkpoint, settings("prototypes", given=texts, max_tokens=1000))
    rows = [cut(domain.prompts, dense_checkpoint, 1000) for domain in texts]
    assert [sum(map(len, domain)) for domain in rows] == [1000] * 4
    assert found.num_tokens == (1000,) * 4
    states = [ffn_inputs(dense_checkpoint, domain) for domain in rows]
    for layer, router in found.routers.items():
        assert largest_difference(router, prototypes([domain[layer] for domain in states], 1.0)) <= SAME


def test_prompts_and_files_are_read_in_turn(dense_checkpoint: Path, tmp_path: Path) -> None:
    texts = [[write(letters, 60, seed) for seed in range(3)] for letters in ALPHABETS]
    given = []
    for number, (prompt, *files) in enumerate(texts):
        for place, file in enumerate(files):
            (tmp_path / f"{number}-{place}.txt").write_text(file, encoding="utf-8")
        given.append(RouterDomain(prompts=(prompt,), files=(f"{number}-*.txt",)))
    from_files = read(dense_checkpoint, settings("prototypes", given=tuple(given)), base=tmp_path)
    from_prompts = read(
        dense_checkpoint, settings("prototypes", given=tuple(RouterDomain(prompts=tuple(prompts)) for prompts in texts))
    )
    assert from_files.num_tokens == from_prompts.num_tokens
    assert all(torch.equal(router, from_prompts.routers[site]) for site, router in from_files.routers.items())


def test_a_half_precision_source_is_read_in_float32(make_dense: MakeDense) -> None:
    source, texts = make_dense(torch.bfloat16, intermediate_size=64), domains()
    found = read(source, settings("prototypes", given=texts))
    states = [ffn_inputs(source, cut(domain.prompts, source)) for domain in texts]
    assert largest_difference(found.routers[1], prototypes([domain[1] for domain in states], 1.0)) <= SAME


# Where tokens go


@torch.no_grad()
def routed(mixture: Path, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The expert with the largest logit at every token of unpadded rows.

    For each router of a mixture that transformers has loaded.
    """
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
    routers = [
        getattr(module, "gate", None) or module.router
        for module in model.modules()
        if hasattr(module, "experts") and not hasattr(module, "layers")
    ]
    found: list[list[torch.Tensor]] = [[] for _ in routers]
    for router, into in zip(routers, found, strict=True):
        router.register_forward_hook(
            lambda _, __, output, into=into: into.append(output[0].reshape(-1, output[0].shape[-1]).argmax(-1))
        )
    for row in rows:
        model(input_ids=torch.tensor([row]), use_cache=False)
    return [torch.cat(choices) for choices in found]


@pytest.mark.parametrize("kind", ["prototypes", "ridge"])
@pytest.mark.parametrize("name", ["llama", "gemma", "olmo2"])
def test_unseen_tokens_of_a_domain_go_to_the_expert_of_the_domain(
    name: str, kind: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    source = make_dense(hidden_size=64, intermediate_size=64, **SOURCES[name])
    config = settings(kind, given=domains())
    found = read(source, config)
    upcycle(source, tmp_path, config, 0, quiet, found.routers)
    for number, domain in enumerate(domains(seed=50)):
        rows = [row[1:] for row in cut(domain.prompts, source)]  # without the <s> that all domains share
        for choices in routed(tmp_path, rows):
            assert float((choices == number).float().mean()) > 0.75  # chance is a quarter; measured .85 to 1


@pytest.mark.parametrize("kind", ["prototypes", "ridge", "kmeans"])
def test_the_reported_load_is_where_the_text_that_was_read_goes(
    kind: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    source, texts = make_dense(intermediate_size=64), domains()
    config = settings(kind, given=texts)
    found = read(source, config)
    upcycle(source, tmp_path, config, 0, quiet, found.routers)
    rows = [row for domain in texts for row in cut(domain.prompts, source)]
    for site, choices in enumerate(routed(tmp_path, rows)):
        shares = (torch.bincount(choices, minlength=4) / len(choices)).tolist()
        # a token whose two largest logits tie may go either way
        assert found.loads[site] == pytest.approx(shares, abs=2 / len(choices))
        assert sum(found.loads[site]) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["prototypes", "ridge"])
def test_without_domains_rows_are_read_from_the_training_text_by_its_domains(kind: str, dense_checkpoint: Path) -> None:
    """As from the same text given domain by domain, whatever the order of the blocks."""
    texts = [row[:64] for domain in domains() for row in cut(domain.prompts[:1], dense_checkpoint)[:1]]
    blocks = torch.tensor([text[:48] for text in texts]).reshape(-1, 16)
    numbers = torch.arange(4).repeat_interleave(3)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    found = read(dense_checkpoint, settings(kind), Examples.of_blocks(blocks[shuffled], numbers[shuffled]))
    assert found.num_tokens == (48,) * 4
    states = [ffn_inputs(dense_checkpoint, blocks[numbers == number].tolist()) for number in range(4)]
    make = prototype_rows if kind == "prototypes" else partial(ridge_rows, penalty=1e-2)
    for site, rows in found.routers.items():
        expected = make([domain[site] for domain in states], logit_std=1.0)
        assert torch.allclose(rows, expected, rtol=1e-3, atol=1e-4)


def test_by_default_rows_are_a_ridge_regression_on_the_domains_that_the_text_has(dense_checkpoint: Path) -> None:
    blocks = torch.tensor([cut((each.prompts[0],), dense_checkpoint)[0][:64] for each in domains()]).reshape(-1, 16)
    text = Examples.of_blocks(blocks, torch.arange(4).repeat_interleave(4))
    found = read(dense_checkpoint, UpcycleConfig(num_experts=4), text).routers
    ridge = read(dense_checkpoint, settings("ridge", logit_std=2.0), text).routers
    assert all(torch.equal(found[site], rows) for site, rows in ridge.items())
    assert read_routers(dense_checkpoint, UpcycleConfig(num_experts=4), one_domain(blocks), Path(), 0, quiet) is None


@pytest.mark.parametrize(
    ("kind", "domains", "sources", "given"),
    [
        ("ridge", "abcd", "", {}),
        ("ridge", "ab", "ab", {}),
        ("normal", "a", "", {}),
        ("normal", "abc", "", {}),  # which do not divide 4 experts
        ("normal", "ab", "ba", {}),  # whose experts are not in the order of the domains
        ("normal", "ab", "cd", {}),
        ("normal", "ab", "ab", {"base_expert": "routed"}),
        ("normal", "ab", "", {"experts": ExpertsConfig(kind="split")}),
        ("normal", "ab", "", {"router": RouterConfig(logit_std=0.0)}),
        ("prototypes", "ab", "", {"router": RouterConfig(kind="prototypes")}),
        ("ridge", "a", "", {"router": RouterConfig(domains=domains())}),
    ],
)
def test_a_router_of_no_kind_reads_the_domains_that_have_experts_of_their_own(
    kind: str, domains: str, sources: str, given: dict[str, Any]
) -> None:
    chosen = UpcycleConfig(**{"num_experts": 4, **given}).choose_router(domains, sources, reads_layers=True).router
    assert chosen.kind == kind
    assert chosen.std == (0.0 if chosen.logit_std == 0 else 1.0 if kind == "normal" else 2.0)


@pytest.mark.parametrize("method", ["mean", "base"])
def test_text_is_read_by_the_merged_weights_and_the_mean_of_the_experts(
    method: Any, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Beside a whole model of these weights."""
    base = make_dense(intermediate_size=64)
    sources = {name: fine_tune(base, tmp_path / name, seed) for seed, name in enumerate(("code", "maths"))}
    trunk = [base] if method == "base" else list(sources.values())
    blocks = torch.tensor([cut((each.prompts[0],), base)[0][:64] for each in domains()[:2]]).reshape(2, 4, 16)
    blend = make_blend(trunk, list(sources.values()), tmp_path / "blend")
    reads = [ffn_inputs(blend, part.tolist()) for part in blocks]
    text = Examples.of_blocks(blocks.flatten(0, 1), torch.arange(2).repeat_interleave(4))
    config = settings("prototypes", 2, merging=MergingConfig(method=method))
    found = read_routers(base, config, text, Path(), 0, quiet, sources=sources)
    assert found is not None
    for layer, rows in found.routers.items():
        assert largest_difference(rows, prototypes([each[layer] for each in reads], 1.0)) <= SAME


def test_rows_of_a_domain_with_several_experts_win_its_tokens_and_differ(dense_checkpoint: Path) -> None:
    texts = [cut((domain.prompts[0],), dense_checkpoint)[0][:64] for domain in domains()]
    blocks = torch.tensor(texts).reshape(-1, 16)
    numbers = torch.arange(4).repeat_interleave(4)
    found = read(dense_checkpoint, settings("ridge", 8), Examples.of_blocks(blocks, numbers))
    states = ffn_inputs(dense_checkpoint, blocks.tolist())
    for site, rows in found.routers.items():
        owners = (states[site] @ rows.T).argmax(-1) // 2
        wanted = numbers.repeat_interleave(16)
        assert float((owners == wanted).float().mean()) > 0.75
        pairs = rows.reshape(4, 2, -1)
        assert float((pairs[:, 0] - pairs[:, 1]).norm(dim=-1).min()) > 0.1 * float(rows.norm(dim=-1).mean())


@pytest.mark.parametrize(("num_domains", "num_experts"), [(1, 4), (3, 4)])
def test_domains_of_the_training_text_that_do_not_divide_the_experts_are_refused(
    num_domains: int, num_experts: int, dense_checkpoint: Path
) -> None:
    text = Examples.of_blocks(torch.zeros(6, 16, dtype=torch.int64), torch.arange(6) % num_domains)
    message = refusal(dense_checkpoint, settings("ridge", num_experts), text)
    assert message == (
        f"upcycle.router: kind is 'ridge' without domains, and the training text has {num_domains}; they must be 2 or "
        f"more and divide the {num_experts} router rows evenly; give data.source of kind 'domains', or "
        "upcycle.router.domains"
    )


def test_logits_on_the_text_that_was_read_differ_by_the_deviation_asked_for(make_dense: MakeDense) -> None:
    source, texts = make_dense(intermediate_size=64), domains()
    states = [ffn_inputs(source, cut(domain.prompts, source)) for domain in texts]
    for kind in ("prototypes", "ridge", "kmeans"):
        found = read(source, settings(kind, given=texts, logit_std=2.5))
        for layer, router in found.routers.items():
            logits = torch.cat([domain[layer] for domain in states]).double() @ router.double().T
            assert float(np.sqrt(np.var(logits.numpy(), axis=1).mean())) == pytest.approx(2.5, rel=1e-3)


# k-means


def test_kmeans_without_domains_clusters_blocks_taken_evenly_from_the_training_text(make_dense: MakeDense) -> None:
    source = make_dense(intermediate_size=64)
    blocks = torch.randint(300, (10, 16), generator=torch.Generator().manual_seed(0))
    found = read(source, settings("kmeans", max_tokens=3 * 16 + 15), one_domain(blocks), seed=7)
    assert found.num_tokens == (3 * 16,)
    states = ffn_inputs(source, blocks[[0, 4, 9]].tolist())
    for site, router in found.routers.items():
        expected = kmeans_rows(states[site], 4, 1.0, seeded_generator(7, f"router {site}"))
        assert largest_difference(router, expected.double().numpy()) <= SAME


def test_kmeans_of_less_text_than_asked_for_reads_all_of_it(dense_checkpoint: Path) -> None:
    blocks = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
    assert read(dense_checkpoint, settings("kmeans"), one_domain(blocks)).num_tokens == (48,)


def test_kmeans_with_domains_clusters_their_text_and_not_the_blocks(dense_checkpoint: Path) -> None:
    texts = domains()[:2]  # for kmeans they need not be as many as experts
    blocks = torch.zeros(3, 16, dtype=torch.int64)
    found = read(dense_checkpoint, settings("kmeans", given=texts), one_domain(blocks))
    assert found.num_tokens == tuple(sum(map(len, cut(domain.prompts, dense_checkpoint))) for domain in texts)


def test_kmeans_depends_on_the_seed_alone(dense_checkpoint: Path) -> None:
    blocks = torch.randint(300, (6, 16), generator=torch.Generator().manual_seed(0))
    text = one_domain(blocks)
    one, again, other = (read(dense_checkpoint, settings("kmeans"), text, seed=seed).routers for seed in (1, 1, 2))
    assert all(torch.equal(one[site], again[site]) for site in one)
    assert not any(torch.equal(one[site], other[site]) for site in one)
    assert not torch.equal(one[0], one[1])


# Where the rows are put


@pytest.mark.parametrize(("layers", "chosen"), [("every-2", [1, 3]), ([0, 3], [0, 3]), ("last-half", [2, 3])])
def test_each_sparse_layer_has_the_rows_read_at_it(
    layers: Any, chosen: list[int], make_dense: MakeDense, tmp_path: Path
) -> None:
    source, texts = make_dense(intermediate_size=64, num_hidden_layers=4), domains()
    config = settings("prototypes", given=texts, layers=layers)
    found = read(source, config)
    upcycle(source, tmp_path, config, 0, quiet, found.routers)
    written = open_checkpoint(tmp_path)
    states = [ffn_inputs(source, cut(domain.prompts, source)) for domain in texts]
    assert [name for name in written.entries if name.endswith("mlp.gate.weight")] == [
        f"model.layers.{layer}.mlp.gate.weight" for layer in chosen
    ]
    for layer in chosen:
        router = written.read(f"model.layers.{layer}.mlp.gate.weight")
        assert largest_difference(router, prototypes([domain[layer] for domain in states], 1.0)) <= SAME


def test_the_parts_of_a_granular_copy_share_the_row_of_its_domain(make_dense: MakeDense, tmp_path: Path) -> None:
    source = make_dense(intermediate_size=64)
    config = settings(
        "prototypes", 8, domains(), num_experts_per_tok=4, experts=ExpertsConfig(kind="granular", granularity=2)
    )
    found = read(source, config)
    assert found.routers[0].shape == (4, 32)
    upcycle(source, tmp_path, config, 0, quiet, found.routers)
    written = open_checkpoint(tmp_path).read("model.layers.0.block_sparse_moe.gate.weight")
    assert torch.equal(written, torch.stack([row for row in found.routers[0] for _ in range(2)]))


def test_a_router_in_a_half_precision_checkpoint_is_the_rows_rounded(make_dense: MakeDense, tmp_path: Path) -> None:
    source, config = make_dense(torch.bfloat16, intermediate_size=64), settings("prototypes", given=domains())
    found = read(source, config)
    upcycle(source, tmp_path, config, 0, quiet, found.routers)
    written = open_checkpoint(tmp_path).read("model.layers.1.block_sparse_moe.gate.weight")
    assert torch.equal(written, found.routers[1].to(torch.bfloat16))


# What is read, and refused


def test_a_drawn_router_reads_nothing(tmp_path: Path) -> None:
    assert read_routers(tmp_path / "absent", settings("normal"), NO_TEXT, tmp_path, 0, quiet) is None


def test_progress_counts_the_layers(dense_checkpoint: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    read_routers(
        dense_checkpoint,
        settings("prototypes", given=domains()),
        NO_TEXT,
        Path(),
        0,
        lambda *report: seen.append(report),
    )
    assert seen == [("reading hidden states", 1, 2), ("reading hidden states", 2, 2)]


def refusal(source: Path, config: UpcycleConfig, text: Examples = NO_TEXT, base: Path = Path()) -> str:
    with pytest.raises(UpcycleError) as excinfo:
        read(source, config, text, base)
    return str(excinfo.value)


def test_fewer_tokens_than_clusters_are_refused(dense_checkpoint: Path) -> None:
    message = refusal(dense_checkpoint, settings("kmeans", 8), one_domain(torch.zeros(1, 7, dtype=torch.int64)))
    assert message == "upcycle.router: 7 tokens of text; must be at least one for each of 8 clusters"


def test_no_text_at_all_to_cluster_is_refused(dense_checkpoint: Path) -> None:
    assert (
        refusal(dense_checkpoint, settings("kmeans"))
        == "upcycle.router: 0 tokens of text; must be at least one for each of 4 clusters"
    )


def test_a_domain_whose_files_are_not_there_is_refused_by_its_number(dense_checkpoint: Path, tmp_path: Path) -> None:
    given = (*domains()[:3], RouterDomain(files=("absent/*.txt",)))
    message = refusal(dense_checkpoint, settings("prototypes", given=given), base=tmp_path)
    assert message.startswith("upcycle.router.domains[3].files[0]: 'absent/*.txt' matches no file")


def test_a_file_that_is_not_utf8_is_refused(dense_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    given = (*domains()[:3], RouterDomain(files=("latin.txt",)))
    message = refusal(dense_checkpoint, settings("prototypes", given=given), base=tmp_path)
    assert message == f"{tmp_path / 'latin.txt'}: not UTF-8 at byte 3; convert it"


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_a_file_without_text_is_refused(text: str, dense_checkpoint: Path, tmp_path: Path) -> None:
    """And does not count as the one <s> of the tokenizer, though another file of its domain has text."""
    (tmp_path / "0.txt").write_text("some text")
    (tmp_path / "1.txt").write_text(text)
    given = (domains()[0], RouterDomain(files=("*.txt",)), *domains()[2:])
    message = refusal(dense_checkpoint, settings("prototypes", given=given), base=tmp_path)
    assert (
        message
        == f"{tmp_path / '1.txt'}: has no text; upcycle.router.domains[1].files must be files with text; fill it or "
        "leave it out"
    )


def test_a_domain_without_tokens_is_refused_by_its_number(dense_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense_checkpoint, source)
    path = source / "tokenizer.json"
    # and one that adds no <s>
    deaf = {
        "normalizer": {"type": "Replace", "pattern": {"String": "?"}, "content": ""},
        "post_processor": None,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | deaf))
    given = (domains()[0], RouterDomain(prompts=("???",)), *domains()[2:])
    message = refusal(source, settings("ridge", given=given), base=tmp_path)
    assert message == "upcycle.router.domains[1]: its text has no tokens; give other prompts or files"


def test_an_encoder_decoder_has_no_routers_from_hidden_states(make_dense: MakeDense) -> None:
    config = UpcycleConfig(
        num_experts=4, num_experts_per_tok=1, router=RouterConfig(kind="prototypes", domains=domains())
    )
    assert "upcycle.router.kind is prototypes" in refusal(make_dense(architecture="T5ForConditionalGeneration"), config)
