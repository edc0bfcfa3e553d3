"""Was it worth it? The mixture beside dense models of equal cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dense2moe.convert.report.facts import ReportFacts
from dense2moe.convert.report.figures import describe_change, figures_agree, format_figure
from dense2moe.convert.report.grid import Grid
from dense2moe.convert.report.numerals import format_seconds, format_special
from dense2moe.convert.report.summary import TORCH_MODELS, Verdict
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.training.crossing import Crossing
from dense2moe.upcycle.training.facts import BranchFacts, OracleRouting, Spent
from dense2moe.upcycle.training.history import ModelName

TOKENS: ModelName = "dense continued"
COMPUTE: ModelName = "dense, same FLOPs"
_LEAST_GAP = 1e-3  # nats a token: a change of a gap that is smaller is none


def judge_worth(facts: ReportFacts) -> Iterator[Verdict]:
    """The answer in one sentence, where there is a control."""
    evaluations = facts.finetune.evaluations
    if "fine-tuned" not in evaluations or TOKENS not in evaluations:
        return
    tuned = facts.figure("fine-tuned")
    rivals = {
        "the dense model as it came": facts.figure("dense"),
        "it continued on the same tokens": facts.figure(TOKENS),
    }
    if facts.data.has_new_head:  # nobody has trained it yet
        del rivals["the dense model as it came"]
        rivals = {"the dense model trained on the same examples": rivals.popitem()[1]}
    if COMPUTE in evaluations:
        rivals["it continued with the same compute"] = facts.figure(COMPUTE)
    told = ", ".join(
        f"{describe_change(tuned, rival)} {name} ({format_figure(rival)})" for name, rival in rivals.items()
    )
    figures = f"the mixture's {tuned.name} is {format_figure(tuned)}, {told}"
    wins = [_beats(tuned, rival) for rival in rivals.values()]
    crossing = _describe_crossings(facts.finetune.crossings)
    if all(wins):
        yield Verdict(f"Was it worth it? Yes: {figures}.{crossing}", True)
    elif COMPUTE in evaluations and all(wins[:-1]):
        yield Verdict(f"Was it worth it? On equal tokens yes, on equal compute not yet: {figures}.{crossing}", None)
    else:
        yield Verdict(f"Was it worth it? No: {figures}.{crossing}", False)


def _describe_crossings(crossings: Mapping[ModelName, Crossing]) -> str:
    """Whether the run ended before or after the mixture overtakes each control."""
    units: dict[ModelName, str] = {TOKENS: "tokens", COMPUTE: "compute"}
    told = [
        f"at equal {unit} {_describe_crossing(crossings[name])}" for name, unit in units.items() if name in crossings
    ]
    return f" By validation loss, {'; '.join(told)}." if told else ""


def _describe_crossing(found: Crossing) -> str:
    if found.at is None:
        moved = found.last_gap - found.first_gap
        trend = "closing" if moved < -_LEAST_GAP else "widening" if moved > _LEAST_GAP else "staying"
        return (
            f"the run ended before the crossing: the mixture is {found.last_gap:.3f} nats behind at the end and was "
            f"{found.first_gap:.3f} behind at the first look, so the gap is {trend}"
        )
    if found.at == found.begin:
        return "the mixture is ahead from the first look on"
    return f"the mixture overtakes after {100 * found.at / found.end:.0f} % of the run"


def _beats(tuned: Figure, rival: Figure) -> bool:
    """Whether a figure is better than another by more than rounding."""
    return tuned.gain(rival.value) > 0 and not figures_agree(tuned, rival, 4)


def domain_table(facts: ReportFacts) -> Grid:
    """The held-out loss of every torch model on each domain's text."""
    evaluations = facts.finetune.evaluations
    rows = {name: evaluations[name].domain_losses for name in TORCH_MODELS if name in evaluations}
    return _losses_table("Loss, nats", {name: losses for name, losses in rows.items() if losses})


def branch_table(branches: Mapping[str, BranchFacts]) -> Grid:
    """Each branch's loss on each domain's text, and what it took.

    The dense model, which all of them began as, comes first.
    """
    if not branches:
        return Grid((), ())
    first = next(iter(branches.values()))
    table = _losses_table("Branch", {"dense": first.before} | {name: found.after for name, found in branches.items()})
    took = [("", "", ""), *(_cost_cells(found.spent, found.num_steps) for found in branches.values())]
    rows = tuple((*row, *cells) for row, cells in zip(table.rows, took, strict=True))
    return Grid((*table.headers, "Steps", "Tokens", "Training time"), rows)


def _cost_cells(spent: Spent, num_steps: int) -> tuple[str, str, str]:
    return f"{num_steps:,}", f"{spent.num_tokens:,}", format_seconds(spent.seconds)


def oracle_table(oracle: OracleRouting | None) -> Grid:
    """The loss on each domain, as routed and with routers overruled."""
    if oracle is None:
        return Grid((), ())
    return _losses_table(
        "Tokens go to",
        {
            "the routers' choice": oracle.routed,
            "the domain's best expert alone": oracle.oracle,
            **{f"expert {number} alone": losses for number, losses in enumerate(oracle.experts)},
            "experts drawn by chance": oracle.random,
        },
    )


def _losses_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Grid:
    """Losses by domain, and their mean."""
    if not rows:
        return Grid((), ())
    domains = list(next(iter(rows.values())))
    return Grid(
        (title, *domains, "mean"),
        tuple((name, *map(_format_loss, [*(of[each] for each in domains), _mean(of)])) for name, of in rows.items()),
    )


def _mean(losses: Mapping[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def _format_loss(loss: float) -> str:
    return format_special(loss) or f"{loss:.3f}"
