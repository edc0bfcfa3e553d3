"""Tables of labels: scores of each, and the most frequent mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dense2moe.convert.report.facts import ReportFacts
from dense2moe.convert.report.figures import figure_title, format_figure
from dense2moe.convert.report.grid import Grid
from dense2moe.convert.report.numerals import NONE, format_score
from dense2moe.convert.report.summary import TORCH_MODELS
from dense2moe.upcycle.tasks.figure import Figure

_FEW_FIGURES = 2  # such as perplexity, and the loss that it is made of
_MOST_LABELS = 100
_MOST_MISTAKES = 12


def figure_table(facts: ReportFacts) -> Grid:
    """Every figure of each model, where there are more than two."""
    evaluations = facts.finetune.evaluations
    models: dict[str, tuple[Figure, ...]] = {
        name: evaluations[name].figures for name in TORCH_MODELS if name in evaluations
    }
    for name, variant in facts.variants.items():
        if (measured := variant.parity.measured) is not None:
            models[f"ONNX {name}"] = measured.figures
    figures = {figure.name: figure for own in models.values() for figure in own}
    if len(figures) <= _FEW_FIGURES:
        return Grid((), ())
    rows = (
        (figure_title(replace(figure, unit="")), *(format_figure(_find(own, name)) for own in models.values()))
        for name, figure in figures.items()
    )
    return Grid(("Figure", *models), tuple(rows))


def _find(figures: Sequence[Figure], name: str) -> Figure | None:
    return next((figure for figure in figures if figure.name == name), None)


def label_table(facts: ReportFacts) -> Grid:
    """Scores of each label, and the F1 of other models.

    Rare labels are left out where there are more than 100.
    """
    evaluations = facts.finetune.evaluations
    own = evaluations[facts.exported].labels
    if own is None:
        return Grid((), ())
    others = [name for name in TORCH_MODELS if name.startswith("dense") and name != "dense" and name in evaluations]
    f1_of = {
        name: {each.name: each.f1 for each in found.scores}
        for name in others
        if (found := evaluations[name].labels) is not None
    }
    shown = sorted(own.scores, key=lambda each: -each.support)[:_MOST_LABELS]
    rows = tuple(
        (
            each.name,
            f"{each.support:,}",
            *map(format_score, (each.precision, each.recall, each.f1)),
            *(format_score(f1_of[name][each.name]) if each.name in f1_of[name] else NONE for name in f1_of),
        )
        for each in shown
    )
    return Grid(("Label", "Support", "Precision", "Recall", "F1", *(f"F1, {name}" for name in f1_of)), rows)


def confusion_table(facts: ReportFacts) -> Grid:
    """The pairs of right and said labels that are most often mistaken."""
    own = facts.finetune.evaluations[facts.exported].labels
    wrong = [] if own is None else [each for each in own.confusions if each.right != each.said]
    rows = tuple((each.right, each.said, f"{each.count:,}") for each in wrong[:_MOST_MISTAKES])
    return Grid(("Right", "Said", "Times"), rows) if rows else Grid((), ())
