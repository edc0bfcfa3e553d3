"""Router rows of an expert that joins a mixture: read from text, counted by the mixture itself, and read back."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tunes import fine_tune
from mixtures import EXACT, MakeDense, load, quiet
from programs import dense2moe
from router_texts import cut, ffn_inputs, write
from safetensors.torch import load_file, save_file

from dense2moe import api
from dense2moe.upcycle.building import growth
from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, RouterDomain, UpcycleConfig
from dense2moe.upcycle.building.growth import GrownMixture, RowSettings, add_expert
from dense2moe.upcycle.building.growth_plan import plan_growth
from dense2moe.upcycle.building.growth_router import count_visits, read_texts
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.gates.start import ridge_rows

# transformers says so when it builds the shared expert of width 0 that Qwen2-MoE must have.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Initializing zero-element"),
    pytest.mark.usefixtures("receipts_in_float32"),
]

ROUTER = "model.layers.{layer}.block_sparse_moe.gate.weight"


def draw(letters: str, seed: int = 0) -> RouterDomain:
    """Twelve texts, of three of the letters each, so that three texts are kept back."""
    chance = random.Random(seed)
    return RouterDomain(prompts=tuple(write("".join(chance.sample(letters, 3)), 40, number) for number in range(12)))


KNOWN = tuple(draw(letters, seed) for seed, letters in enumerate(("abcdefgh", "ijklmnop", "qrstuvwx")))
NEW = draw("abcdijkl", 7)
"""Letters that the mixture has seen, in texts of another kind: a projection can know what it has seen alone."""


@pytest.fixture(scope="module")
def base(make_dense: MakeDense) -> Path:
    return make_dense(**EXACT)


@pytest.fixture(scope="module")
def mixture(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of the four, an expert each; its routers began by projection."""
    output = tmp_path_factory.mktemp("mixture") / "three"
    router = RouterConfig(kind="nexus", domains=KNOWN, logit_std=2.0)
    settings = UpcycleConfig(num_experts=3, experts=ExpertsConfig(noise=0.3), router=router)
    api.upcycle(base, output, settings)
    return output


@pytest.fixture(scope="module")
def law(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tune(base, tmp_path_factory.mktemp("law") / "law", 5)


def grow(mixture: Path, source: Path, output: Path, kind: Any, **given: Any) -> GrownMixture:
    output.mkdir()
    return add_expert(mixture, source, output, RowSettings(kind, **given), quiet)


def new_row(directory: Path, layer: int) -> torch.Tensor:
    """The new row, less the mean of the others."""
    rows = load_file(directory / "model.safetensors")[ROUTER.format(layer=layer)]
    return rows[-1] - rows[:-1].mean(0)


@pytest.mark.parametrize("kind", ["ridge", "nexus"])
def test_a_row_that_was_read_from_text_finds_its_domain(kind: str, mixture: Path, law: Path, tmp_path: Path) -> None:
    found = grow(mixture, law, tmp_path / "grown", kind, domain=NEW, others=KNOWN).visits
    mean = grow(mixture, law, tmp_path / "mean", "mean", domain=NEW, others=KNOWN).visits
    assert [layer.layer for layer in found] == [0, 1]
    for read, plain in zip(found, mean, strict=True):
        assert read.chance == plain.chance == 0.5
        assert read.own > 0.75
        assert read.others is not None and plain.others is not None
        assert read.own - read.others > 0.25
        assert abs(plain.own - plain.others) < 0.2


def test_a_row_by_ridge_is_the_last_of_a_regression_of_all_domains(mixture: Path, base: Path, tmp_path: Path) -> None:
    """On what layer 0 reads, which is the dense model's still; by the whole model, without padding."""
    grow(mixture, base, tmp_path / "grown", "ridge", domain=NEW, others=KNOWN)
    read = [[text for number, text in enumerate(domain.prompts) if number % 4 != 3] for domain in (*KNOWN, NEW)]
    states = [ffn_inputs(base, cut(texts, base))[0] for texts in read]
    rows = ridge_rows(states, RouterConfig().penalty, 1.0)
    expected = rows[-1] - rows[:-1].mean(0)
    found = new_row(tmp_path / "grown", 0)
    assert float(torch.cosine_similarity(found, expected, dim=0)) > 1 - 1e-6
    stored = load_file(mixture / "model.safetensors")[ROUTER.format(layer=0)]
    spreads = [
        (torch.cat(states).double() @ each.double().T).var(-1, correction=0).mean().sqrt() for each in (stored, rows)
    ]
    assert float(found.norm() / expected.norm()) == pytest.approx(float(spreads[0] / spreads[1]), rel=1e-4)


def test_a_projected_row_grows_as_the_others_have_grown(mixture: Path, law: Path, tmp_path: Path) -> None:
    grow(mixture, law, tmp_path / "grown", "nexus", domain=NEW)
    larger = tmp_path / "larger"
    state = load_file(mixture / "model.safetensors")
    for layer in (0, 1):
        state[ROUTER.format(layer=layer)] = 3 * state[ROUTER.format(layer=layer)] + 0.25
    shutil.copytree(mixture, larger)
    save_file(state, larger / "model.safetensors", metadata={"format": "pt"})
    grow(larger, law, tmp_path / "grown-larger", "nexus", domain=NEW)
    for layer in (0, 1):
        torch.testing.assert_close(
            new_row(tmp_path / "grown-larger", layer), 3 * new_row(tmp_path / "grown", layer), rtol=1e-4, atol=1e-5
        )


def chosen_experts(output: Sequence[torch.Tensor]) -> torch.Tensor:
    return next(each for each in output if each.dtype == torch.int64)


@torch.no_grad()
def slow_visits(grown: Path, rows: Sequence[Sequence[int]], expert: int) -> list[float]:
    """By the whole mixture of transformers, text by text, without padding."""
    model = load(grown)
    chosen: dict[str, list[torch.Tensor]] = {}
    for place, module in model.named_modules():
        if place.endswith("mlp.gate"):
            heard = chosen.setdefault(place, [])
            module.register_forward_hook(lambda _, __, output, into=heard: into.append(chosen_experts(output)))
    for row in rows:
        model(input_ids=torch.tensor([row]), use_cache=False)
    return [float((torch.cat(heard) == expert).any(-1).double().mean()) for heard in chosen.values()]


@pytest.mark.parametrize(
    "settings",
    [
        {"architecture": "LlamaForCausalLM"},
        {"architecture": "Qwen3ForCausalLM"},
        {"architecture": "LlamaForCausalLM", "target": "glm4_moe"},
        {"architecture": "LlamaForCausalLM", "target": "qwen2_moe", "layers": (1,)},
    ],
    ids=lambda given: given.get("target", given["architecture"]),
)
def test_visits_are_those_of_transformers_own_mixture(
    settings: dict[str, Any], make_dense: MakeDense, tmp_path: Path
) -> None:
    """Also with a selection bias, and where some layers have no experts."""
    dense = make_dense(**EXACT, architecture=settings.pop("architecture"))
    small, grown = tmp_path / "small", tmp_path / "grown"
    api.upcycle(dense, small, UpcycleConfig(num_experts=4, experts=ExpertsConfig(noise=0.5), **settings))
    found = grow(small, dense, grown, "normal", domain=NEW).visits
    rows = [row for number, row in enumerate(cut(NEW.prompts, dense)) if number % 4 == 3]
    assert found[0].num_tokens == sum(map(len, rows))
    expected = slow_visits(grown, rows, 4)
    # one token whose logits tie within rounding may go the other way
    assert [layer.own for layer in found] == pytest.approx(expected, abs=1.5 / found[0].num_tokens)
    assert all(layer.others is None for layer in found)
    assert 0 < sum(expected) < len(expected)


def test_a_selection_bias_is_counted(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(**EXACT)
    api.upcycle(dense, tmp_path / "small", UpcycleConfig(num_experts=4, target="glm4_moe"))
    path = tmp_path / "small" / "model.safetensors"
    state = load_file(path)
    for name, tensor in state.items():
        if name.endswith("e_score_correction_bias"):
            tensor -= 1.0  # so that the new one, whose bias is 0, is chosen by all
    save_file(state, path, metadata={"format": "pt"})
    found = grow(tmp_path / "small", dense, tmp_path / "grown", "mean", domain=KNOWN[0]).visits
    assert [layer.own for layer in found] == [1.0, 1.0]


def test_a_byte_that_is_not_what_was_written_is_one_line(
    mixture: Path, law: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = growth.write_tensors

    def write_and_flip(output: Path, *arguments: Any, **settings: Any) -> None:
        written(output, *arguments, **settings)
        path = output / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(growth, "write_tensors", write_and_flip)
    with pytest.raises(UpcycleError, match=r"tensor '.*' on disk is not what was written there; check the disk"):
        api.add_expert(mixture, law, tmp_path / "grown")
    assert not list(tmp_path.glob("grown*"))


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("ridge", {}, "router is ridge, and text of the new expert's domain is not; give it (domain, or --text)"),
        ("nexus", {}, "router is nexus, and text of the new expert's domain is not; give it"),
        ("mean", {"others": KNOWN[:1]}, "text of other domains is given, and text of the new expert's domain is not"),
        ("ridge", {"domain": KNOWN[0]}, "router is ridge, and no text of other domains is given"),
        (
            "mean",
            {"domain": RouterDomain(files=("nowhere/*",))},
            "domain.files[0]: 'nowhere/*' matches no file",
        ),
    ],
)
def test_rows_without_their_text_are_one_line(
    kind: str, given: dict[str, Any], said: str, mixture: Path, law: Path, tmp_path: Path
) -> None:
    with pytest.raises(UpcycleError) as line:
        grow(mixture, law, tmp_path / "grown", kind, **given)
    assert str(line.value).startswith(said)
    assert "\n" not in str(line.value)
    assert not list((tmp_path / "grown").iterdir())


def test_a_mixture_without_a_projection_names_the_other_way(
    mixture_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UpcycleError, match=r"router is nexus, and the mixture has no projection in nexus/; only"):
        grow(mixture_checkpoint, dense_checkpoint, tmp_path / "grown", "nexus", domain=KNOWN[0])


def test_the_command_says_who_visits_the_new_expert(
    mixture: Path, law: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, domain in zip(("a", "b", "c", "new"), (*KNOWN, NEW), strict=True):
        (tmp_path / name).mkdir()
        for number, text in enumerate(domain.prompts):
            (tmp_path / name / f"{number}.txt").write_text(text)
    others = [word for name in "abc" for word in ("--other-text", f"{name}/*.txt")]
    result = dense2moe("add-expert", mixture, law, "grown", "--router", "ridge", "--text", "new/*.txt", *others)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"Of its domain's tokens \d+% visit the new expert \(\d+% to \d+% by layer, \d+ tokens kept back\), and \d+% "
        r"of the other domains'; by chance 50% would\.",
        result.output,
    )
    # the same as by the texts themselves, whose files come in the same order
    plan = plan_growth(open_checkpoint(mixture), open_checkpoint(law))
    texts = read_texts(mixture, NEW, KNOWN, tmp_path)
    assert len(texts.own) == 12
    found = count_visits(open_checkpoint(tmp_path / "grown"), plan.target, texts.divide()[1], quiet)
    assert f"tokens {sum(layer.own for layer in found) / 2:.0%} visit" in result.output
