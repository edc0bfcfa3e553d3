"""Branches: the dense model continued on one domain alone, each by itself, and what the controls get for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixtures import dense_ffn, experts
from recipe_files import GOOD, load, mistakes
from report_facts import make_facts
from safetensors.torch import load_file, save_file
from training_runs import changed, make_data, quiet

from dense2moe.convert.checking import prepare
from dense2moe.convert.errors import RecipeError
from dense2moe.convert.progress import ProgressDisplay
from dense2moe.convert.recipe.loading import load_recipe
from dense2moe.convert.report.facts import read_facts
from dense2moe.convert.report.verdicts import verdict_lines
from dense2moe.convert.report.worth import branch_table
from dense2moe.convert.walk import RunOutcome, run_pipeline
from dense2moe.upcycle.building.projection import read_projection
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.data.blocks import FACTS_NAME, read_domains
from dense2moe.upcycle.data.held_out import SPLITS
from dense2moe.upcycle.training.branch import train_branch
from dense2moe.upcycle.training.branch_config import BranchConfig
from dense2moe.upcycle.training.config import FinetuneConfig, TrainingPhase
from dense2moe.upcycle.training.facts import BranchFacts
from dense2moe.upcycle.training.flops import training_flops
from dense2moe.upcycle.training.history import HISTORY_NAME, read_history
from dense2moe.upcycle.training.job import Job, Setup, train_model

__all__ = ["make_data"]  # a fixture

CONFIG = BranchConfig(steps=4, batch_size=4, learning_rate=3e-3, eval_steps=2, precision="float32")
BLOCK = 16


def branch(
    dense: Path,
    data: Path,
    tmp_path: Path,
    config: BranchConfig = CONFIG,
    progress: Any = quiet,
    domain: str = "digits",
) -> tuple[BranchFacts, Path]:
    output = tmp_path / "branch"
    output.mkdir(exist_ok=True)
    return train_branch(dense, data, domain, output, config, (1,), 0, progress, tmp_path / "scratch"), output


# The training


def test_a_branch_is_the_dense_model_trained_on_the_blocks_of_its_domain_alone(
    dense_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """Trained on a directory that holds no other domain's blocks, it has the same weights."""
    facts, output = branch(dense_checkpoint, data, tmp_path)
    alone = tmp_path / "data"
    alone.mkdir()
    for split in SPLITS:
        tensors, number = load_file(data / f"{split}.safetensors"), read_domains(data, split)[0].index("digits")
        chosen = tensors["domains"] == number
        blocks = {
            "input_ids": tensors["input_ids"][chosen],
            "domains": torch.zeros(int(chosen.sum()), dtype=torch.int32),
        }
        save_file(blocks, alone / f"{split}.safetensors")
    (alone / FACTS_NAME).write_text(json.dumps({"domains": ["digits"]}))
    setup = Setup((1,), alone, tmp_path / "other", "float32", 0)
    trained = train_model(Job("branch", dense_checkpoint, tmp_path / "out", (CONFIG.as_phase(),)), setup, None, quiet)
    assert trained.best_step == facts.best_step > 0
    assert changed(output, tmp_path / "out") == set()
    assert changed(output, dense_checkpoint)


def test_a_branch_learns_its_domain_and_its_facts_say_what_it_took(
    dense_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    facts, output = branch(dense_checkpoint, data, tmp_path)
    assert facts.after["digits"] < facts.before["digits"]
    assert list(facts.before) == list(facts.after) == ["letters", "digits"]
    assert facts.spent.num_tokens == 4 * 4 * BLOCK
    shape = load_model(output, torch.float32)
    assert facts.spent.flops == 4 * 4 * BLOCK * training_flops(shape, CONFIG.as_phase(), (1,), BLOCK)
    assert (output / "history.jsonl").is_file()


def test_where_experts_learn_alone_only_ffns_that_become_experts_change(
    dense_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    _, output = branch(dense_checkpoint, data, tmp_path, CONFIG.model_copy(update={"train": "experts"}))
    assert changed(dense_checkpoint, output) == {
        f"model.layers.1.mlp.{matrix}_proj.weight" for matrix in ("gate", "up", "down")
    }


def test_a_killed_branch_goes_on_where_it_was_and_ends_with_the_same_weights(
    dense_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("training") and done == 3:
            raise KeyboardInterrupt

    steps: list[int] = []

    def count(what: str, done: int, total: int) -> None:
        if what.startswith("training"):
            steps.append(done)

    (tmp_path / "whole").mkdir()
    _, whole = branch(dense_checkpoint, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        branch(dense_checkpoint, data, tmp_path, progress=kill)
    _, resumed = branch(dense_checkpoint, data, tmp_path, progress=count)
    assert steps == [3, 4]
    assert changed(whole, resumed) == set()


@pytest.mark.parametrize(
    ("branch", "finetune", "steps"),
    [
        (BranchConfig(steps=3), FinetuneConfig(), 3),
        (BranchConfig(), None, 20),
        (BranchConfig(batch_size=16), FinetuneConfig(steps=720, batch_size=16), 20),  # of 4 domains: 80 of 800 steps
        (BranchConfig(), FinetuneConfig(stages=(TrainingPhase(steps=100), TrainingPhase(steps=260))), 10),
        (BranchConfig(batch_size=64), FinetuneConfig(steps=20), 1),
    ],
)
def test_branches_have_a_tenth_of_all_tokens_where_steps_are_not_given(
    branch: BranchConfig, finetune: FinetuneConfig | None, steps: int
) -> None:
    assert branch.count_steps(finetune, 4).as_phase().steps == steps


# The report


def test_the_report_has_each_branch_s_losses_and_says_what_branches_took() -> None:
    found = make_facts()
    spent = {"num_tokens": 640, "flops": 2e9, "seconds": 3.0, "compute_seconds": 2.0}
    losses = {"prose": {"prose": 2.0, "code": 3.5}, "code": {"prose": 2.5, "code": 3.0}}
    common = {"num_blocks": 32, "before": {"prose": 2.25, "code": 3.25}, "num_steps": 5, "precision": "float32"}
    found["branches"] = {
        name: {**common, "after": after, "best_step": 5, "spent": spent, "warnings": []}
        for name, after in losses.items()
    }
    found["branches"]["code"]["warnings"] = ["branch code: learned nothing"]
    found["finetune"]["spent"] = {"num_tokens": 1280, "flops": 4e9, "seconds": 6.0, "compute_seconds": 4.0}
    facts = read_facts(found, "run")
    table = branch_table(facts.branches)
    assert table.headers == ("Branch", "prose", "code", "mean", "Steps", "Tokens", "Training time")
    assert [row[:4] for row in table.rows] == [
        ("dense", "2.250", "3.250", "2.750"),
        ("prose", "2.000", "3.500", "2.750"),
        ("code", "2.500", "3.000", "2.750"),
    ]
    assert table.rows[1][4:6] == ("5", "640")
    lines = verdict_lines(facts)
    assert "branch code: learned nothing." in lines
    assert any(line.startswith("Before the mixture 2 branches were trained, 1,280 tokens and ") for line in lines)


# A recipe


RECIPE = """\
source: {source}
data:
  source:
    kind: domains
    domains:
{domains}
  block_size: 16
  max_validation_tokens: 320
  max_test_tokens: 320
branch: {{steps: 2, batch_size: 4, learning_rate: 0.003, eval_steps: 1, precision: float32}}
upcycle: {{receipt: layers, router: {{kind: nexus, max_tokens: 64}}}}
finetune: {{steps: 2, batch_size: 4, warmup_steps: 0, eval_steps: 1, precision: float32, domain_coefficient: 0.1}}
variants: [float32]
parity: {{decode_steps: 4}}
"""
ALPHABETS = {"Zeta": "abcdefgh", "digits": "01234567"}
"""Not in the order of the alphabet, and one with a capital."""


@pytest.fixture(scope="module")
def recipe(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    draw = torch.Generator().manual_seed(0)
    for domain, alphabet in ALPHABETS.items():
        lines = [" ".join(alphabet[i] * 2 for i in torch.randint(8, (12,), generator=draw)) for _ in range(200)]
        (folder / f"{domain}.txt").write_text("\n".join(lines))
    domains = "\n".join(f"      {name}: {{kind: text, train: [{name}.txt], separator: '\\n'}}" for name in ALPHABETS)
    domains = domains.replace("'\\n'", '"\\n"')
    (folder / "r.yaml").write_text(RECIPE.format(source=dense_checkpoint, domains=domains))
    return folder / "r.yaml"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages run here; the labels of those that ran."""
    ran: list[str] = []

    def run_here(function: Any, argument: Any, label: str, *_: Any) -> Any:
        ran.append(label)
        return SimpleNamespace(found=function(argument, lambda *_: None), peak_resident_bytes=0)

    monkeypatch.setattr("dense2moe.convert.walk.run_apart", run_here)
    return ran


def run(recipe: Path, workdir: Path, until: str, only: str | None = None) -> RunOutcome:
    with ProgressDisplay() as display:
        outcome = run_pipeline(prepare(load_recipe(recipe), quiet), workdir, until, display, only=only)
    assert outcome is not None
    return outcome


def test_a_recipe_with_branches_makes_an_expert_of_each_in_the_order_of_the_domains(
    recipe: Path, in_process: list[str], tmp_path: Path
) -> None:
    """One branch is trained by itself in another work directory, and copied; then the whole recipe runs."""
    other = run(recipe, tmp_path / "other", "branch", only="digits")
    assert list(other.artifacts) == ["source", "data", "branch-digits"]
    copied = other.artifacts["branch-digits"].directory
    (tmp_path / "work").mkdir()
    copied.rename(tmp_path / "work" / copied.name)
    in_process.clear()
    artifacts = run(recipe, tmp_path / "work", "finetune").artifacts
    assert in_process == ["data", "branch-Zeta", "upcycle", "finetune"]
    for layer in (0, 1):
        found = experts(artifacts["upcycle"].directory, layer, 2)
        for expert, name in zip(found, ALPHABETS, strict=True):
            source = artifacts[f"branch-{name}"].directory
            for (matrix, _), (expected, _) in zip(expert.list(), dense_ffn(source, layer).list(), strict=True):
                assert torch.equal(matrix, expected)
    projections = [read_projection(artifacts[stage].directory) for stage in ("upcycle", "finetune")]
    assert projections[0] and projections[1] and torch.equal(projections[0].layers[1], projections[1].layers[1])
    tuned = artifacts["finetune"].facts
    spent = [artifacts[f"branch-{name}"].facts["spent"] for name in ALPHABETS]
    assert tuned["spent"] == {name: sum(each[name] for each in spent) for name in spent[0]}
    # 2 steps of 4 blocks in the mixture's training and in each of the 2 branches'
    assert tuned["num_steps"] == {
        "fine-tuned": 2,
        "dense continued": 6,
        "dense, same FLOPs": tuned["num_steps"]["dense, same FLOPs"],
    }
    history = read_history(artifacts["finetune"].directory / HISTORY_NAME)
    first = {step.model: (step.num_tokens, step.flops) for step in history if step.step == 0}
    assert first["fine-tuned"] == (tuned["spent"]["num_tokens"], tuned["spent"]["flops"])
    assert first["dense continued"] == (0, 0.0)
    assert {step.model: step.flops for step in history} == tuned["flops"]  # the last of each
    ratio = tuned["flops"]["dense, same FLOPs"] / tuned["flops"]["fine-tuned"]
    assert ratio == pytest.approx(1, abs=0.1)
    assert (
        tuned["flops"]["fine-tuned"]
        > tuned["spent"]["flops"]
        == pytest.approx(tuned["flops"]["dense continued"] * 4 / 6)
    )


def test_a_branch_alone_needs_the_stage_and_a_domain_of_the_data(recipe: Path, tmp_path: Path) -> None:
    for until, only, said in (
        ("report", "digits", "--only digits: needs --until branch, since every stage after it reads all branches"),
        ("branch", "code", f"--only code: no such domain in {recipe}; must be one of Zeta, digits"),
    ):
        with pytest.raises(RecipeError) as caught:
            run(recipe, tmp_path, until, only)
        assert str(caught.value) == said
    plain = recipe.with_name("plain.yaml")
    plain.write_text("\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("branch:")))
    with pytest.raises(RecipeError, match=r"plain\.yaml: has no branch; give `branch: {}`, or another --until"):
        run(plain, tmp_path, "branch")


def test_memory_and_disk_of_each_branch_are_planned(recipe: Path, dense_checkpoint: Path) -> None:
    preparation = prepare(load_recipe(recipe), quiet)
    size = preparation.checkpoint.num_bytes
    for name in ALPHABETS:
        assert preparation.artifact_bytes[f"branch-{name}"] == size
        assert preparation.scratch_bytes[f"branch-{name}"] == size + 9 * 4 * preparation.checkpoint.num_parameters
        assert preparation.memory_bytes[f"branch-{name}"] > size
    assert preparation.plan.settings.num_experts == 2


DOMAINS = """\
source: dense
data:
  source:
    kind: domains
    domains: {{{}: {{kind: text, train: [a]}}, b: {{kind: text, train: [b]}}}}
branch: {{}}
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "source: dense\ndata: {source: {kind: text, train: [a]}}\nbranch: {}\n",
            "3: branch: is given, and the data has 1 domain; must be 2 or more: give data.source of kind 'domains', or "
            "leave branch out",
        ),
        (
            f"{GOOD}branch: {{}}\nsources: {{a: a, b: b}}\n",
            "3: branch: is given beside sources; experts are made of one or the other; leave one of them out",
        ),
        (
            f"{GOOD}branch: {{}}\nupcycle: {{num_experts: 3}}\n",
            "4: upcycle.num_experts: is 3, 3 experts; the branches of 2 domains must divide them evenly; leave it out "
            "to have one each",
        ),
        (
            f"{GOOD}branch: {{}}\nupcycle: {{num_experts: 4, base_expert: routed}}\n",
            "4: upcycle.num_experts: is 4, 4 experts; the branches of 2 domains and the base must divide them evenly; "
            "leave it out to have one each",
        ),
        (
            f"{GOOD}branch: {{}}\nupcycle: {{num_experts_per_tok: 3}}\n",
            "4: upcycle.num_experts_per_tok: is 3; must be at most the experts of the branches, which are 2",
        ),
        (
            DOMAINS.format("'a/b'"),
            "5: data.source.domains.'a/b': names a branch's folder; must be letters, digits, '_' and '-', and begin "
            "with a letter or digit",
        ),
        (
            DOMAINS.format("B"),
            "5: data.source.domains: has names that differ in case alone; branches need folders of their own",
        ),
    ],
)
def test_branches_that_cannot_be_are_refused_in_one_line(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mistakes(text) == [f"r.yaml:{said}"]


@pytest.mark.parametrize(
    "rest", ["finetune: null\n", "upcycle: {num_experts: 4}\n", "upcycle: {router: {kind: ridge}}\n"]
)
def test_branches_go_with_no_fine_tuning_and_with_several_experts_each(
    rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load(f"{GOOD}branch: {{}}\n{rest}").recipe
    assert recipe.branched == ("prose", "code")
    assert recipe.upcycle.num_experts == (4 if "num_experts" in rest else 2)
    assert recipe.counted_branch is not None and recipe.counted_branch.steps in (11, 20)
