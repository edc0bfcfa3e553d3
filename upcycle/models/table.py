"""The table of architectures and of conversions between them.

Facts alone: nothing here, nor in a family's file, imports torch or transformers, so that a recipe is looked at quickly.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

from dense2moe.upcycle.errors import UpcycleError, shorten
from dense2moe.upcycle.models import (
    cohere2,
    ernie4_5,
    eurobert,
    gemma,
    glm4_moe,
    granite,
    hunyuan_v1,
    lfm2,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    t5,
)
from dense2moe.upcycle.models.architecture import Architecture, Conversion, Stack
from dense2moe.upcycle.models.heads import LABEL_DROPOUTS, LABEL_FIELDS, PARTS_FIELD, TASK_OF_HEAD, Head, split_class
from dense2moe.upcycle.models.host import CLASS_PREFIX, MODEL_TYPE_PREFIX, Host, convert_host
from dense2moe.upcycle.models.hosts import bart, bert, clip, dinov2, distilbert, gpt2, gpt_neox, opt, phi, vit, wav2vec2
from dense2moe.upcycle.models.hosts import llama as llama_hosts
from dense2moe.upcycle.models.hosts import t5 as t5_hosts
from dense2moe.upcycle.models.refused import PARTS, REFUSED

DENSE_FAMILIES: tuple[Architecture, ...] = (
    llama.LLAMA,
    mistral.MISTRAL,
    phi3.PHI3,
    gemma.GEMMA,
    qwen2.QWEN2,
    qwen3.QWEN3,
    olmo2.OLMO2,
    granite.GRANITE,
    granite.GRANITE_SWA,
    cohere2.COHERE2,
    ernie4_5.ERNIE4_5,
    hunyuan_v1.HUNYUAN_V1_DENSE,
    lfm2.LFM2,
    eurobert.EUROBERT,
    t5.T5,
)
TARGETS: tuple[Architecture, ...] = (
    mixtral.MIXTRAL,
    qwen2.QWEN2_MOE,
    qwen3.QWEN3_MOE,
    granite.GRANITE_MOE,
    granite.GRANITE_MOE_SHARED,
    glm4_moe.GLM4_MOE,
    olmo2.FLEX_OLMO,
    granite.GRANITE_MOE_SWA,
    cohere2.COHERE2_MOE,
    ernie4_5.ERNIE4_5_MOE,
    hunyuan_v1.HUNYUAN_V1_MOE,
    lfm2.LFM2_MOE,
    t5.SWITCH_TRANSFORMERS,
)
CONVERSIONS: tuple[Conversion, ...] = (
    *llama.CONVERSIONS,
    *mistral.CONVERSIONS,
    *phi3.CONVERSIONS,
    *gemma.CONVERSIONS,
    *qwen2.CONVERSIONS,
    *qwen3.CONVERSIONS,
    *olmo2.CONVERSIONS,
    *granite.CONVERSIONS,
    *cohere2.CONVERSIONS,
    *ernie4_5.CONVERSIONS,
    *hunyuan_v1.CONVERSIONS,
    *lfm2.CONVERSIONS,
    *eurobert.CONVERSIONS,
    *t5.CONVERSIONS,
)

HOSTS: tuple[Host, ...] = (
    *bart.HOSTS,
    *bert.HOSTS,
    *clip.HOSTS,
    *dinov2.HOSTS,
    *distilbert.HOSTS,
    *gpt2.HOSTS,
    *gpt_neox.HOSTS,
    *llama_hosts.HOSTS,
    *opt.HOSTS,
    *phi.HOSTS,
    *t5_hosts.HOSTS,
    *vit.HOSTS,
    *wav2vec2.HOSTS,
)
"""Families whose FFNs a mixture of ours replaces."""

_HOSTS = {host.model_type: host for host in HOSTS}

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The fields, over all families of transformers, that say how many experts a layer has."""

# Fields of every PreTrainedConfig: bookkeeping, generation defaults and class labels, none read by a decoder's forward
# pass.
COMMON_NEUTRAL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "model_type",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
        PARTS_FIELD,
        "chunk_size_feed_forward",
        "_from_model_config",
    }
)


GENERIC_FIELDS = ("is_causal",)
"""Undeclared fields that transformers' own code reads of any decoder's config (masking_utils.py, 5.23).

Every native conversion carries them over, where a source has them.
"""


def list_conversions(family: Architecture) -> list[Conversion]:
    """What a family can become: the nearest first, our mixture last."""
    rows = [row for row in CONVERSIONS if row.family is family]
    if not rows and not family.is_host:
        rows = list(_convert_head(family.model_type, family.architecture))
    host = find_host(family.model_type)
    if host is None:
        return rows
    own = convert_host(host, family.architecture)
    return [*rows, own if family.is_host else replace(own, by_name_alone=True)]


def find_host(model_type: str) -> Host | None:
    """The host of this model type, dense or as a mixture."""
    return _HOSTS.get(model_type.removeprefix(MODEL_TYPE_PREFIX))


def find_architecture(config: Any) -> Architecture:
    """The dense or sparse architecture of a model's config."""
    known = next((each for each in (*DENSE_FAMILIES, *TARGETS) if each.model_type == config.model_type), None)
    assert known is not None, f"no table has {config.model_type}"
    named = (config.architectures or [known.architecture])[0]
    return known if known.find_head(named) is None else _take_head(known.model_type, named)


def find_native(model_type: str, architectures: Any) -> Architecture | None:
    """The dense family with a native twin of a config, or None."""
    if not _are_names(architectures):
        return None
    family = next((family for family in DENSE_FAMILIES if family.model_type == model_type), None)
    if family is None or not architectures or family.architecture in architectures:
        return family
    head = family.find_head(architectures[0])
    return None if head is None or head.refusal is not None else _take_head(model_type, architectures[0])


@cache
def _take_head(model_type: str, architecture: str) -> Architecture:
    """An architecture with another head, by its class's name."""
    known = next(each for each in (*DENSE_FAMILIES, *TARGETS) if each.model_type == model_type)
    head = known.find_head(architecture)
    assert head is not None, f"{model_type} has no {architecture}"
    return known.with_head(head)


@cache
def _convert_head(model_type: str, architecture: str) -> tuple[Conversion, ...]:
    """The conversions of a family with another head."""
    family, (_, ends) = _take_head(model_type, architecture), split_class(architecture)
    found = []
    for row in CONVERSIONS:
        head = row.target.find_head(row.target.start + ends)
        if row.family.model_type == model_type and head is not None:
            own = row.family.find_head(architecture)
            assert own is not None
            found.append(_replace_head(row, family, _take_head(row.target.model_type, row.target.start + ends), own))
    return tuple(found)


def _replace_head(row: Conversion, family: Architecture, target: Architecture, head: Head) -> Conversion:
    return replace(
        row,
        family=family,
        target=target,
        carried=(*row.carried, *LABEL_FIELDS),
        optional=(*row.optional, *LABEL_DROPOUTS),
        derived=lambda config: {**row.derived(config), **head.fields},
    )


def _are_names(architectures: Any) -> bool:
    """Whether a config's `architectures` is what it must be: names, or none."""
    return architectures is None or (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    )


def find_hosted(config: Any) -> str | None:
    """The class of a host that a config's checkpoint is read as.

    Dense or a mixture; None where there is none. A family with a sparse twin in transformers is read as its source.
    """
    host, names = find_host(config.model_type), config.architectures
    if host is None or not _are_names(names) or find_native(config.model_type, names) is not None:
        return None
    if config.model_type.startswith(MODEL_TYPE_PREFIX):
        own = names[0].removeprefix(CLASS_PREFIX) if names else host.base
        return CLASS_PREFIX + own if host.find_task(own) is not None else None
    return host.find_class(names)


def list_stacks(hosted: str) -> tuple[Stack, ...]:
    """The layers of a host's class, dense or a mixture."""
    own = hosted.removeprefix(CLASS_PREFIX)
    return convert_host(_find_owner(own), own).family.stacks


def _find_owner(architecture: str) -> Host:
    """The host of one of transformers' classes, which has a task."""
    return next(host for host in HOSTS if host.find_task(architecture) is not None)


def find_conversion(family: str, target: str) -> Conversion:
    """The conversion between two architectures, by their classes in transformers."""
    if target == CLASS_PREFIX + family:
        return convert_host(_find_owner(family), family)
    others = (_convert_head(dense.model_type, family) for dense in DENSE_FAMILIES if dense.find_head(family))
    known = itertools.chain(CONVERSIONS, *others)
    rows = [row for row in known if (row.family.architecture, row.target.architecture) == (family, target)]
    assert len(rows) == 1, f"{family} to {target}: {len(rows)} rows"
    return rows[0]


def find_family(model_type: str, architectures: Any, where: str, config: Any = None) -> Architecture:
    """The family of a config.

    `where` names it in a refusal, and what it holds tells what is missing of a family that no table names.

    Raises:
        UpcycleError: `architectures` is neither None nor a list of names; no family covers it: says why, where that is
            known, and what is supported.
    """
    if not _are_names(architectures):
        raise UpcycleError(
            f"{where}: architectures is {shorten(repr(architectures))}; it must be a list of class names, such as "
            "['LlamaForCausalLM']"
        )
    if (native := find_native(model_type, architectures)) is not None:
        return native
    if (host := _HOSTS.get(model_type)) is not None:
        if (architecture := host.find_class(architectures)) is not None:
            return convert_host(host, architecture).family
        assert architectures, "a host's base model needs no name"
        others = ", ".join(dict.fromkeys((host.base, *filter(host.find_task, host.heads))))
        raise UpcycleError(
            f"{where}: architectures is {shorten(architectures[0])}; it must be {others}, or {host.start} followed by "
            f"one of {', '.join(sorted(set(TASK_OF_HEAD) - {'Model'}))}"
        )
    named = shorten(f"{architectures[0]} ({model_type})" if architectures else model_type)
    related = next((family for family in DENSE_FAMILIES if family.model_type == model_type), None)
    if related is not None:
        head = related.find_head(architectures[0]) if architectures else None
        what = "another head than its targets" if head is None else head.refusal
        heads = [related.start + other.ends for other in related.heads if other.refusal is None]
        raise UpcycleError(f"{where}: {named} has {what}; give a {' or '.join((related.architecture, *heads))}")
    if (reason := REFUSED.get(model_type)) is not None:
        raise UpcycleError(
            f"{where}: {named} has {reason}, so that no experts can take its place; give a model of another family"
        )
    values = vars(config) if config is not None else {}
    if any(isinstance(count := values.get(name), int) and count > 1 for name in EXPERT_COUNTS):
        raise UpcycleError(
            f"{where}: {named} is a mixture of experts already; give a dense model, such as the one that it was made "
            "from"
        )
    if any(values.get(name) for name in PARTS):
        raise UpcycleError(
            f"{where}: {named} is made of several models; save the one whose FFNs shall become experts by a class of "
            "its own, and give that"
        )
    raise UpcycleError(
        f"{where}: {named} cannot be upcycled: no table says where its FFNs are; docs/upcycling.md lists the families "
        "that can be, and docs/extending.md tells how one is added"
    )
