"""Mistakes that several records of a recipe make together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dense2moe.convert.recipe.wording import Key, Mistake, join_choices, write_key
from dense2moe.export.variant import CUDA_BLOCKS, QUANTIZED, STATIC
from dense2moe.upcycle.building.config import BIASED_TARGETS
from dense2moe.upcycle.data.config import Columns, DataConfig, ExampleSource, LabelledSource, name_domains
from dense2moe.upcycle.record import named_value

if TYPE_CHECKING:  # which asks here when it is made
    from dense2moe.convert.recipe.records import Recipe

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class ContradictionError(ValueError):
    """Mistakes that several records make together."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__("; ".join(f"{write_key(key)}: {text}" for key, text in mistakes))
        self.mistakes = mistakes


def find_contradictions(recipe: Recipe) -> list[Mistake]:
    """Every mistake records make together, by the key to change."""
    return [
        mistake
        for find in (
            _labels,
            _questions,
            _sizes,
            _limits,
            _mixed_bits,
            _cuda,
            _selection_biases,
            _branches,
            _domains,
            _sources,
        )
        for mistake in find(recipe)
    ]


def _labels(recipe: Recipe) -> Iterator[Mistake]:
    """Labels are counted in examples and text in tokens."""
    labelled = isinstance(recipe.data.source, ExampleSource)
    for split in ("train", "validation", "test"):
        field, other = f"max_{split}_examples", f"max_{split}_tokens"
        if labelled:
            field, other = other, field
        if getattr(recipe.data, field) != DataConfig.model_fields[field].default:
            kind = "examples" if labelled else "text"
            yield ("data", field), f"is given for {kind}, which data.{other} limits; leave it out, or give that"
    if recipe.finetune is None:
        return
    if not isinstance(recipe.data.source, LabelledSource):
        for field in ("label_smoothing", "class_weights"):
            if getattr(recipe.finetune, field) != type(recipe.finetune).model_fields[field].default:
                yield ("finetune", field), "is given, and the data has no labels; leave it out"
        return
    for phase in recipe.training_stages:
        if phase.train == "prompt":
            yield ("finetune", "train"), "is 'prompt', and the data has labels, whose head must learn; use 'all'"


def _questions(recipe: Recipe) -> Iterator[Mistake]:
    """Questions have columns of their own, and windows that go on."""
    source, data = recipe.data.source, recipe.data
    asks = isinstance(source, Columns) and source.question is not None
    for field in ("pair", "words", "image") if asks else ():
        if getattr(source, field, None) is not None:
            yield ("data", "source", field), "is given beside question; must be one of them, as each is a task"
    if data.stride is not None and not asks:
        yield ("data", "stride"), "is given, and the data has no questions, whose contexts it is for; leave it out"
    elif data.stride is not None and data.stride >= data.block_size:
        size = named_value(data, "block_size")
        yield ("data", "stride"), f"is {data.stride}; must be less than data.block_size, which is {size}"


def _sizes(recipe: Recipe) -> Iterator[Mistake]:
    """Every split fills a block; a block holds prompt and decoded tokens."""
    if isinstance(recipe.data.source, ExampleSource):
        return
    block_size, named_size = recipe.data.block_size, named_value(recipe.data, "block_size")
    for field in ("max_train_tokens", "max_validation_tokens", "max_test_tokens"):
        tokens = getattr(recipe.data, field)
        if tokens is not None and tokens < block_size:
            yield (
                ("data", field),
                f"is {named_value(recipe.data, field)}; must be at least data.block_size, which is {named_size}, "
                "to hold one block",
            )
    if recipe.parity.decode_steps >= block_size:
        steps = named_value(recipe.parity, "decode_steps")
        yield (
            ("parity", "decode_steps"),
            f"is {steps}; must be less than data.block_size, which is {named_size}, to leave a prompt",
        )


def _limits(recipe: Recipe) -> Iterator[Mistake]:
    """Every variant has a perplexity limit."""
    if missing := [variant for variant in recipe.variants if variant not in recipe.parity.max_perplexity_increase]:
        yield (
            ("parity", "max_perplexity_increase"),
            f"lacks {join_choices(missing, 'and')}; must have a limit for each of the variants",
        )


def _mixed_bits(recipe: Recipe) -> Iterator[Mistake]:
    """Mixed bits need one limit, and a lowering of known size.

    The limit is what bits are chosen by.
    """
    limits = [name for name in ("budget", "max_perplexity_increase") if getattr(recipe.quantize, name) is not None]
    if len(limits) > 1:
        yield ("quantize", limits[1]), "is given beside budget; must be one of them"
    if limits and "mixed" not in recipe.variants:
        yield (
            ("quantize", limits[0]),
            "is given for variant 'mixed', which variants lacks; add 'mixed' to variants, or leave it out",
        )
    if recipe.quantize.budget is not None and recipe.export.lowering == "switched":
        yield (
            ("export", "lowering"),
            "is 'switched', which writes experts twice; quantize.budget, which counts them once, needs another",
        )
    if "mixed" in recipe.variants and not limits:
        yield (
            ("variants",),
            "has 'mixed'; quantize must have a budget, or a max_perplexity_increase, to choose its bits by",
        )


def _cuda(recipe: Recipe) -> Iterator[Mistake]:
    """CUDA's operators can read what is quantized for them."""
    if recipe.export.device != "cuda":
        return
    if STATIC in recipe.variants:
        yield (
            ("variants",),
            f"has '{STATIC}', whose products CUDA computes as floats; leave it out, or set export.device to 'cpu'",
        )
    is_quantized = any(variant in QUANTIZED and variant != STATIC for variant in recipe.variants)
    if is_quantized and recipe.export.lowering == "auto" and recipe.quantize.block_size not in CUDA_BLOCKS:
        yield (
            ("export", "device"),
            f"is 'cuda'; quantize.block_size, which is {recipe.quantize.block_size}, must be "
            f"{' or '.join(map(str, CUDA_BLOCKS))} for its QMoE operator; or name another export.lowering",
        )


def _selection_biases(recipe: Recipe) -> Iterator[Mistake]:
    """Selection biases are trained only if the target's gate has them."""
    rate = recipe.finetune.bias_update_rate if recipe.finetune else None
    if rate and recipe.upcycle.target not in BIASED_TARGETS:
        targets = join_choices(BIASED_TARGETS)
        target = recipe.upcycle.target
        chosen = "'auto' need not choose one" if target == "auto" else f"it is '{target}'"
        yield (
            ("finetune", "bias_update_rate"),
            f"is {rate:g}; needs upcycle.target {targets}, whose gate has a selection bias, and {chosen}; "
            "set the target, or leave the rate out",
        )


def _branches(recipe: Recipe) -> Iterator[Mistake]:
    """Branches are of several domains, each with experts of its own."""
    names, upcycle = name_domains(recipe.data.source), recipe.upcycle
    if not recipe.branch:
        return
    if recipe.sources:
        yield ("branch",), "is given beside sources; experts are made of one or the other; leave one of them out"
    if len(names) < 2:
        yield (
            ("branch",),
            "is given, and the data has 1 domain; must be 2 or more: give data.source of kind 'domains', or leave "
            "branch out",
        )
        return
    for name in names:
        if not _FOLDER.fullmatch(name):
            yield (
                ("data", "source", "domains", name),
                "names a branch's folder; must be letters, digits, '_' and '-', and begin with a letter or digit",
            )
    if len({name.casefold() for name in names}) < len(names):
        yield ("data", "source", "domains"), "has names that differ in case alone; branches need folders of their own"
    owners = len(names) + (upcycle.base_expert == "routed")
    if "num_experts" in upcycle.model_fields_set and upcycle.num_router_rows % owners:
        experts = "groups of granular experts" if upcycle.group_size > 1 else "experts"
        whose = f"the branches of {len(names)} domains{' and the base' if owners > len(names) else ''}"
        yield (
            ("upcycle", "num_experts"),
            f"is {upcycle.num_experts}, {upcycle.num_router_rows} {experts}; {whose} must divide them evenly; leave it "
            "out to have one each",
        )
    elif upcycle.num_experts_per_tok > (num_experts := _count_rows(recipe) * upcycle.group_size):
        yield (
            ("upcycle", "num_experts_per_tok"),
            f"is {named_value(upcycle, 'num_experts_per_tok')}; must be at most the experts of the branches, which are "
            f"{num_experts}",
        )


def _count_rows(recipe: Recipe) -> int:
    """Distinct router rows.

    By default one a branch, and one for a base that is an expert.
    """
    if recipe.branch and "num_experts" not in recipe.upcycle.model_fields_set:
        return len(recipe.branched) + (recipe.upcycle.base_expert == "routed")
    return recipe.upcycle.num_router_rows


def _domains(recipe: Recipe) -> Iterator[Mistake]:
    """Domains with experts of their own divide the experts evenly."""
    num_domains, num_rows = len(name_domains(recipe.data.source)), _count_rows(recipe)
    if num_domains >= 2 and num_rows % num_domains == 0:
        return
    experts = "groups of granular experts" if recipe.upcycle.group_size > 1 else "experts"
    given = f"the domains, of which the data has {num_domains}"
    must = f"{given}, must be 2 or more and divide the {num_rows} {experts} evenly"
    router = recipe.upcycle.router
    if router.reads_domains and not router.domains:
        yield ("upcycle", "router", "kind"), f"is '{router.kind}' without router.domains; {must}"
    for number, phase in enumerate(recipe.training_stages):
        key: Key = ("finetune", "stages", number) if recipe.finetune and recipe.finetune.stages else ("finetune",)
        if phase.routing == "by-domain":
            yield (*key, "routing"), f"is 'by-domain'; {must}"
        if phase.domain_coefficient:
            yield (*key, "domain_coefficient"), f"is {phase.domain_coefficient:g}; {must}"


def _sources(recipe: Recipe) -> Iterator[Mistake]:
    """Sources are there where settings speak of them."""
    if recipe.sources or recipe.branch:
        return
    for name in ("merging", "base_expert"):
        if getattr(recipe.upcycle, name) != type(recipe.upcycle).model_fields[name].default:
            yield (
                ("upcycle", name),
                "is given without sources, which it is about; add sources or branch, or leave it out",
            )
