"""The same merge by mergekit-moe, on its own ground: a Mistral with a window, experts of two sources, `hidden` prompts.

Which needs an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from families import WINDOW
from fine_tunes import fine_tune
from mixtures import EXACT, MakeDense, load
from router_texts import cut, ffn_inputs, make_blend

from dense2moe import api
from dense2moe.upcycle.building.rounding import ROUNDING_LIMIT
from dense2moe.upcycle.gates.start import prototype_rows

PROGRAM = "DENSE2MOE_MERGEKIT"
RECIPE = "python3.11 -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5"
PROMPTS = (
    ("Licensed under the Apache License", "a"),
    ("limitations under the License", "You may obtain a copy of the License at this place"),
)
"""Two prompts a source, of very different lengths."""

pytestmark = pytest.mark.mergekit


def merge_by_mergekit(
    base: Path, sources: list[Path], prompts: tuple[tuple[str, ...], ...], output: Path, mode: str = "hidden"
) -> Path:
    program = os.environ.get(PROGRAM)
    if program is None:
        pytest.skip(f"{PROGRAM} is not set; make an environment by `{RECIPE}` and set it to its mergekit-moe")
    config = output.with_suffix(".yml")  # JSON is YAML
    experts = [
        {"source_model": str(source), "positive_prompts": list(texts)}
        for source, texts in zip(sources, prompts, strict=True)
    ]
    fields = {"base_model": str(base), "gate_mode": mode, "dtype": "float32", "experts_per_token": 2}
    config.write_text(json.dumps({**fields, "experts": experts}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [program, str(config), str(output)], capture_output=True, text=True, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    return output


def merge_by_us(base: Path, sources: list[Path], prompts: tuple[tuple[str, ...], ...], output: Path) -> Path:
    domains = tuple(api.RouterDomain(prompts=texts) for texts in prompts)
    settings = api.UpcycleConfig(
        merging=api.MergingConfig(method="base"), router=api.RouterConfig(kind="prototypes", domains=domains)
    )
    api.upcycle(base, output, settings, sources={f"source-{number}": each for number, each in enumerate(sources)})
    return output


@pytest.fixture
def models(make_dense: MakeDense, tmp_path: Path) -> tuple[Path, list[Path]]:
    base = make_dense(architecture="MistralForCausalLM", sliding_window=WINDOW, **EXACT)
    return base, [fine_tune(base, tmp_path / name, seed) for seed, name in enumerate(("law", "poems"))]


def routers(directory: Path) -> list[torch.Tensor]:
    return [tensor.double() for name, tensor in load(directory).state_dict().items() if name.endswith(("gate.weight",))]


def test_all_but_routers_and_window_is_the_same(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, sources = models
    theirs = load(merge_by_mergekit(base, sources, PROMPTS, tmp_path / "theirs"))
    ours = load(merge_by_us(base, sources, PROMPTS, tmp_path / "ours"))
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    routed = [name for name in found if name.endswith("gate.weight")]
    assert len(routed) == 2
    for name in found.keys() - set(routed):
        assert torch.equal(found[name], expected[name]), name
    # with one router they are one model, but for the window that mergekit-moe takes away
    theirs.load_state_dict(found)
    ids = torch.randint(300, (1, 4 * WINDOW), generator=torch.Generator().manual_seed(1))
    assert (ours.config.sliding_window, theirs.config.sliding_window) == (WINDOW, None)
    with torch.no_grad():
        own, other = ours(ids).logits, theirs(ids).logits
        theirs.config.sliding_window = WINDOW
        windowed = theirs(ids).logits
    assert torch.equal(own[:, :WINDOW], other[:, :WINDOW]) or relative(own[:, :WINDOW], other[:, :WINDOW]) < 1e-5
    assert relative(own, other) > 100 * ROUNDING_LIMIT
    assert relative(own, windowed) < 1e-5


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def layer_inputs(source: Path, texts: tuple[str, ...]) -> list[torch.Tensor]:
    """The mean over texts of the mean over their tokens of what each layer reads, text by text, without padding."""
    model, found = load(source), []
    for row in cut(texts, source):
        states = model(torch.tensor([row]), output_hidden_states=True).hidden_states[:-1]
        found.append(torch.stack([each[0].mean(0) for each in states]))
    return list(torch.stack(found).mean(0).double())


def test_padding_turns_rows_of_mergekit_s_and_not_ours(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Prompts of one expert are padded to the longest of them."""
    base, sources = models
    lengths = [[len(row) for row in cut(texts, base)] for texts in PROMPTS]
    assert all(abs(first - second) >= 5 for first, second in lengths)
    ours = routers(merge_by_us(base, sources, PROMPTS, tmp_path / "ours"))
    blend = make_blend([base], sources, tmp_path / "blend")
    reads = [ffn_inputs(blend, cut(texts, base)) for texts in PROMPTS]
    for layer, rows in enumerate(ours):
        expected = prototype_rows([each[layer] for each in reads], 2.0).double()
        torch.testing.assert_close(rows, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    theirs = routers(merge_by_mergekit(base, sources, PROMPTS, tmp_path / "theirs", "hidden_avg"))
    unpadded = [layer_inputs(base, texts) for texts in PROMPTS]
    for layer, rows in enumerate(theirs):
        for row, texts in zip(rows, unpadded, strict=True):
            assert float(torch.cosine_similarity(row, texts[layer], dim=0)) < 0.99
