"""The fine-tuned mixture, and its dense controls."""

from __future__ import annotations

from dataclasses import asdict

from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.convert.stage_names import StageName
from dense2moe.upcycle.building.facts import ReceiptLine, shows_equality
from dense2moe.upcycle.training.facts import NOTHING_SPENT, Spent
from dense2moe.upcycle.training.fine_tuning import finetune, measure_untrained
from dense2moe.upcycle.training.task_choice import choose_label_loss, choose_task


def name_exported(preparation: Preparation) -> StageName:
    """The stage whose mixture is exported.

    The upcycled one where fine-tuning is switched off.
    """
    return "upcycle" if preparation.recipe.finetune is None else "finetune"


def list_settings(preparation: Preparation, _: str | None) -> Facts:
    """The training settings.

    Without fine-tuning only figures are taken, which need no settings.
    """
    if (config := preparation.finetune) is None:
        return {"off": True}
    return {**config.model_dump(mode="json"), "seed": preparation.recipe.seed}


def run_stage(run: StageRun) -> Facts:
    """The fine-tuned mixture, and the dense control.

    The history is in a file beside them: megabytes where there are many experts. Where fine-tuning is switched off, no
    model: the held-out figures of the dense and the upcycled model alone. Where the receipt shows that the
    mixture computes what the dense model does, the dense model's held-out losses are its own.
    """
    source, mixture, data = (run.inputs[name] for name in ("source", "upcycle", "data"))
    equal = shows_equality(ReceiptLine(**line) for line in run.input_facts["upcycle"]["receipt"])
    if (config := run.preparation.finetune) is None:
        facts = measure_untrained(source, mixture, data, run.output, run.progress, choose_task(mixture, data), equal)
    else:
        branches = (run.input_facts[f"branch-{domain}"]["spent"] for domain in run.recipe.branched)
        spent = sum((Spent(**each) for each in branches), NOTHING_SPENT)
        settings = (config, run.recipe.seed, run.progress, run.scratch)
        facts = finetune(
            source,
            mixture,
            data,
            run.output,
            *settings,
            task=choose_task(mixture, data, choose_label_loss(data, config)),
            equal=equal,
            spent=spent,
        )
    return {name: value for name, value in asdict(facts).items() if name != "history"}
