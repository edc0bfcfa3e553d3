"""Gates by which tokens visit different numbers of experts: against loops in float64, and on the whole road."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import dense2moe, stages_here
from test_end_to_end import write_recipe
from test_label_training import TRAINING, make_mixture, save_bert, write, write_classes
from test_recipe_hosts import make_gpt2, save_source
from transformers import AutoTokenizer

from dense2moe.upcycle.building.config import GateConfig, UpcycleConfig
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.gates.balance import balance_loss, expert_counts, expert_load, sparsity_loss
from dense2moe.upcycle.gates.choice import choice_margin, visit_mask
from dense2moe.upcycle.gates.gate import Above, Gate, Mass, Near, TopK
from dense2moe.upcycle.gates.routes import route
from dense2moe.upcycle.gates.scores import selection_scores
from dense2moe.upcycle.gates.section import describe_gate, read_gate_section
from dense2moe.upcycle.models.mixture import MixtureRouter
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.routing import Routing

E = 5
GATES = {
    "threshold": Gate(E, Above(0.25, E)),
    "threshold, three at most": Gate(E, Above(0.1, 3)),
    "sigmoid threshold": Gate(E, Above(0.55, E), "sigmoid"),
    "sigmoid threshold as they are": Gate(E, Above(0.55, E), "sigmoid", renormalize=False),
    "top-p": Gate(E, Mass(0.6, E)),
    "top-p, two at most": Gate(E, Mass(0.9, 2)),
    "skip": Gate(E, Near(0.6, 2)),
    "relu": Gate(E, Above(0.0, E), "relu"),
    "relu as they are": Gate(E, Above(0.0, E), "relu", renormalize=False),
    "relu top-k": Gate(E, TopK(2), "relu"),
    "sigmoid": Gate(E, TopK(2), "sigmoid"),
    "all": Gate(E, TopK(E)),
}
each_gate = pytest.mark.parametrize("gate", GATES.values(), ids=list(GATES))


def draw_logits(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5


def weigh(gate: Gate, row: torch.Tensor) -> dict[int, torch.Tensor]:
    """A token's experts and weights, one after the other; with gradients."""
    scores = {"softmax": torch.softmax(row, 0), "sigmoid": torch.sigmoid(row), "relu": torch.relu(row)}[gate.score]
    order = sorted(range(E), key=lambda expert: -row[expert].item())[: gate.max_experts_per_token]
    visited, reached = [order[0]], scores[order[0]].item()
    for expert in order[1:]:
        match gate.choice:
            case Above(level):
                goes = scores[expert].item() > level
            case Mass(share):
                goes = reached < share * scores.sum().item()
            case Near(share):
                goes = scores[expert].item() >= share * scores[order[0]].item()
            case _:
                goes = True
        if not goes:
            break
        visited.append(expert)
        reached += scores[expert].item()
    own = {expert: scores[expert] for expert in visited}
    if gate.renormalize:
        if gate.score == "relu":
            own[order[0]] = own[order[0]].clamp(min=1e-20)
        total = sum(own.values())
        own = {expert: score / total for expert, score in own.items()}
    return own


def table_of(gate: Gate, logits: torch.Tensor) -> torch.Tensor:
    """The weight of each expert in each token [T, E]."""
    routes = route(logits, gate, None)
    return torch.zeros_like(logits).index_put((routes.token, routes.expert), routes.weight)


@each_gate
def test_routes_and_their_gradients_are_those_of_a_loop(gate: Gate) -> None:
    logits = draw_logits(64).requires_grad_()
    upstream = torch.randn(64, E, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = table_of(gate, logits)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), logits)
    rows = logits.detach().clone().requires_grad_()
    expected = torch.zeros(64, E, dtype=torch.float64)
    for token in range(64):
        for expert, weight in weigh(gate, rows[token]).items():
            expected[token, expert] = weight
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), rows)
    torch.testing.assert_close(found, expected.detach(), check_dtype=False)
    torch.testing.assert_close(gradient, wanted)
    visits = torch.tensor([len(weigh(gate, row)) for row in logits])
    assert route(logits, gate, None).token.bincount(minlength=64).tolist() == visits.tolist()
    if gate.may_leave_free:
        assert 1 < float(visits.double().mean()) < gate.max_experts_per_token


@each_gate
def test_the_router_of_a_mixture_says_the_same(gate: Gate) -> None:
    """Its file stands alone, so the rule is written twice."""
    router = MixtureRouter(E, gate.max_experts_per_token, 8, describe_gate(gate) or None).double()
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits, weights, experts = router(hidden)
    said = torch.zeros(40, E, dtype=torch.float64).scatter_add(1, experts, weights)
    torch.testing.assert_close(said, table_of(gate, logits.float()).double(), rtol=1e-5, atol=1e-7)
    if gate.score != "relu":  # whose visits may have a weight of 0
        assert int((weights != 0).sum()) == int(expert_counts(logits.float(), gate).sum())


@each_gate
def test_a_section_gives_the_gate_back(gate: Gate) -> None:
    section = {"num_experts": E, "num_experts_per_tok": gate.max_experts_per_token, "gate": describe_gate(gate)}
    assert read_gate_section(json.loads(json.dumps(section))) == gate
    assert describe_gate(Gate(4, TopK(2))) == {}


@each_gate
def test_smaller_changes_than_the_margin_choose_the_same(gate: Gate) -> None:
    """And of changes of about its size, some choose others."""
    scores = selection_scores(draw_logits(200), gate, None)
    margin = choice_margin(scores, gate.choice)
    chosen = visit_mask(scores, gate.choice)
    if gate.choice == TopK(E):
        assert margin.isinf().all()
        return
    moved = torch.zeros(200, dtype=torch.bool)
    draw = torch.Generator().manual_seed(3)
    for _ in range(60):
        change = torch.rand(200, E, dtype=torch.float64, generator=draw) * 2 - 1
        share = 1 / (2 * E)  # of a sum of all, each may be changed
        small = visit_mask(scores + change * (margin * share)[:, None], gate.choice)
        assert torch.equal(small, chosen)
        moved |= (visit_mask(scores + change * 3 * margin[:, None], gate.choice) != chosen).any(-1)
    assert moved.double().mean() > 0.9


@each_gate
def test_loads_count_visits_alone(gate: Gate) -> None:
    logits = draw_logits(50)
    expected = [0] * E
    for row in logits:
        for expert in weigh(gate, row):
            expected[expert] += 1
    assert expert_counts(logits, gate).tolist() == expected
    assert expert_load(logits, gate).tolist() == pytest.approx([count / sum(expected) for count in expected])
    assert torch.isfinite(balance_loss(logits, gate))


def test_ties_and_extremes() -> None:
    """Equal scores, no positive part, one expert for all, and no tokens."""
    equal = torch.zeros(1, E)
    assert visit_mask(selection_scores(equal, GATES["threshold"], None), Above(0.25, E)).sum() == 1  # none is above
    assert visit_mask(selection_scores(equal, GATES["top-p"], None), Mass(0.6, E)).sum() == 3  # 0.2 each
    assert visit_mask(selection_scores(equal, GATES["skip"], None), Near(0.6, 2)).sum() == 2
    low = torch.tensor([[-3.0, -1.0, -2.0, -4.0, -5.0]])
    assert table_of(GATES["relu"], low).tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0]]
    assert not table_of(GATES["relu as they are"], low).any()
    sure = torch.tensor([[80.0, 0, 0, 0, 0]])
    for name in ("threshold", "top-p", "skip"):
        assert table_of(GATES[name], sure).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    for gate in GATES.values():
        assert table_of(gate, torch.zeros(0, E)).shape == (0, E)


# Settings


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"choice": "threshold"}, "choice 'threshold' has no threshold"),
        ({"choice": "top-p"}, "choice 'top-p' has no p"),
        ({"choice": "threshold", "threshold": 1.0}, "no score of 'softmax' is above 1"),
        ({"threshold": 0.3}, "choice 'top-k' has a threshold; must be 'threshold'"),
        ({"choice": "skip", "skip_below": 1.5}, "less than or equal to 1"),
        ({"score": "relu", "choice": "top-p", "p": 0.5}, "must be 'top-k' or 'threshold' of positive parts"),
    ],
)
def test_wrong_gates_are_refused(gate: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GateConfig.model_validate(gate)


def test_parts_of_an_ffn_need_top_k() -> None:
    values = {"num_experts": 4, "experts": {"kind": "split"}, "gate": {"choice": "top-p", "p": 0.5}}
    with pytest.raises(ValueError, match="it must be top-k with experts of kind 'split'"):
        UpcycleConfig.model_validate(values)


def test_a_target_with_a_gate_of_its_own_names_the_one_that_takes_any(dense_checkpoint: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", source=dense_checkpoint, text=Path(__file__))
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("upcycle: {", "upcycle: {gate: {choice: top-p, p: 0.5}, ", 1), encoding="utf-8")
    found = dense2moe("check", recipe)
    assert found.exit_code == 1
    assert "upcycle.gate is given" in found.stderr
    assert "upcycle.target mixture would hold it" in " ".join(found.stderr.split())


# The whole road


@pytest.fixture(autouse=True)
def _stages_here() -> Iterator[None]:
    with stages_here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense2moe.convert.report.writer.draw_pictures", lambda facts, rows: [])
        yield


@pytest.mark.parametrize(
    "gate",
    ["{score: sigmoid, choice: threshold, threshold: 0.5}", "{score: relu, choice: threshold, renormalize: false}"],
)
def test_an_encoder_goes_the_whole_road(gate: str, tmp_path: Path) -> None:
    save_bert(tmp_path / "source")
    training = TRAINING[:-1] + ", balance_coefficient: 0.01, sparsity_coefficient: 0.01, router_noise: 0.1}"
    recipe = write(tmp_path, write_classes(tmp_path), finetune=training, variants="int8")
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("num_experts_per_tok: 2", f"num_experts_per_tok: 4, gate: {gate}"), encoding="utf-8")
    finished = dense2moe("run", recipe, "--workdir", tmp_path / "run")
    assert finished.exit_code == 0, finished.stdout + finished.stderr
    assert "By its gate a token visited" in finished.stdout
    (receipt,) = (tmp_path / "run").glob("upcycle-*/manifest.json")
    facts = json.loads(receipt.read_text(encoding="utf-8"))["facts"]
    assert facts["keeps_function"] == ("renormalize" not in gate)
    assert any("does not sum to 1" in note or "do not sum to 1" in note for note in facts["receipt_notes"]) == (
        "renormalize" in gate
    )


def test_a_decoder_is_judged_by_the_experts_that_it_visits(dense_checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_gpt2(len(AutoTokenizer.from_pretrained(dense_checkpoint)) + 2)
    save_source(model, dense_checkpoint, tmp_path / "source")
    recipe = write_recipe(
        tmp_path / "r.yaml",
        source=tmp_path / "source",
        text=Path(__file__).parent.parent / "upcycle" / "*" / "*.py",
        k=3,
    )
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("upcycle: {", "upcycle: {gate: {choice: top-p, p: 0.6}, ", 1), encoding="utf-8")
    finished = dense2moe("run", recipe, "--workdir", tmp_path / "run")
    assert finished.exit_code == 0, finished.stdout + finished.stderr
    (report,) = (tmp_path / "run").glob("report-*/report.json")
    facts = json.loads(report.read_text(encoding="utf-8"))
    parity = facts["variants"]["float32"]["parity"]["providers"]["CPUExecutionProvider"]
    assert min(parity["finetuned"]["routing_agreement"]) > 0.99
    (package,) = (tmp_path / "run").glob("onnx-float32-*")
    written = dense2moe("generate", package, "--prompt", "a", "--max-new-tokens", "2")
    assert written.exit_code == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "relu"])
def test_the_sparsity_loss_is_as_by_hand(score: Any) -> None:
    logits = draw_logits(30).float()
    rows = []
    for row in logits.tolist():
        if score == "softmax":
            total = sum(math.exp(x) for x in row)
            rows.append(-sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in row))
        else:
            rows.append(sum(1 / (1 + math.exp(-x)) if score == "sigmoid" else max(x, 0.0) for x in row))
    assert float(sparsity_loss(logits, Gate(E, TopK(2), score))) == pytest.approx(sum(rows) / 30, rel=1e-5)


def test_noise_chooses_other_experts_in_training_alone(tmp_path: Path) -> None:
    """Weights and experts are those of the noisy logits, which losses and loads see too."""
    model = load_model(make_mixture(tmp_path), torch.float32, "fill-mask")
    routing = Routing(model, FinetuneConfig(router_noise=0.5, balance_coefficient=0.1), 1, (0, 1))
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    inside: list[Any] = []
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    handles = [each.register_forward_pre_hook(lambda _, given: inside.append(given[1:])) for each in experts]

    def run(seed: int) -> tuple[list[Any], tuple[torch.Tensor, ...]]:
        inside.clear()
        torch.manual_seed(seed)
        routing.tell(torch.zeros(4, dtype=torch.int64), 12)
        with routing.hooks(), routing.listening(), torch.no_grad():
            model(input_ids=ids)
        return list(inside), routing._logits

    model.eval()
    plain, logits = run(0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, run(1)[0], strict=True))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    noisy, heard = run(0)
    again, _ = run(0)
    other, _ = run(1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(noisy, again, strict=True))
    assert not torch.equal(noisy[0][0], other[0][0])
    difference = heard[0] - logits[0]
    assert float(difference.std()) == pytest.approx(0.5, rel=0.15)
    for (chosen, weights), said in zip(noisy, heard, strict=True):
        best = said.softmax(-1).topk(2)
        assert torch.equal(chosen, best.indices)
        torch.testing.assert_close(weights, best.values / best.values.sum(-1, keepdim=True))
    for handle in handles:
        handle.remove()
