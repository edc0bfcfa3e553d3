"""A branch: the dense model continued on one domain of the data."""

from __future__ import annotations

from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.training.branch import train_branch
from dense2moe.upcycle.training.branch_config import BranchConfig
from dense2moe.upcycle.training.facts import BranchFacts


def list_settings(preparation: Preparation, domain: str | None) -> Facts:
    """The settings of branches, and the domain.

    Where FFNs alone learn, their layers too.
    """
    config = _find_config(preparation)
    layers = list(_find_layers(preparation.plan)) if config.train == "experts" else None
    return {**config.model_dump(mode="json"), "domain": domain, "layers": layers, "seed": preparation.recipe.seed}


def run_stage(run: StageRun) -> BranchFacts:
    """The dense model continued on the blocks of one domain."""
    assert run.item is not None
    config, layers = _find_config(run.preparation), _find_layers(run.preparation.plan)
    source, data = run.inputs["source"], run.inputs["data"]
    return train_branch(source, data, run.item, run.output, config, layers, run.recipe.seed, run.progress, run.scratch)


def _find_config(preparation: Preparation) -> BranchConfig:
    config = preparation.recipe.counted_branch
    assert config is not None, "a recipe without branches has no domain to repeat them over"
    return config


def _find_layers(plan: UpcyclePlan) -> tuple[int, ...]:
    """The layers whose FFNs become experts."""
    return tuple(site.layer for site in plan.sites)
