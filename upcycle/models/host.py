"""Hosts: dense families whose FFNs a mixture of our own replaces.

Where transformers has no sparse architecture for a family, the dense one stays, and `mixture.Mixture` takes each FFN's
place. So of a host no more is known than where its FFNs are: all other tensors and config fields are kept as they
are, and any head of the family that has a task is carried along.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.gates.section import read_gate_section
from dense2moe.upcycle.models.architecture import (
    Architecture,
    Condition,
    Conversion,
    Experts,
    SharedExpert,
    Stack,
    count_layers,
)
from dense2moe.upcycle.models.heads import TASK_OF_HEAD
from dense2moe.upcycle.models.parts import AddOne, Matrix, Part

CLASS_PREFIX = "Mixture"
MODEL_TYPE_PREFIX = "mixture_"
"""What is put before the dense names of classes and model types; `mixture.py`, which stands alone, repeats it."""

Half = Literal["first", "last"]


READ_FROM = "5.23.0"
"""The version of transformers that the facts of hosts were read from."""


@dataclass(frozen=True)
class HostStack:
    """Layers that are alike, and the FFN in each.

    Names are below the base model, with `{layer}` for a layer's number.

    num_layers: the config's field; with a dot, a field of one of its parts.
    layer: the module that is a layer; all other names are below it.
    ffn: the module that experts take the place of.
    passed: modules behind it that belong to the FFN, and become identities.
    gate, up, down: the modules of its matrices; no gate where the FFN has none, or where `up` holds its rows.
    gate_rows: which half of `up` is the gate, "first" or "last".
    norm: the module whose output the FFN reads, and `other_norms`, where a model has no such module, of which the
    first that it has; None where that norm has no weights. `norm_adds_one`: its output is multiplied by 1 + w.
    attention_post_norm, ffn_post_norm: where the FFN reads the residual stream itself, the modules whose outputs were
    added to that.
    transposed: whether matrices are stored as transformers' Conv1D has them.
    activation: the config's field for its name; `activation_name`, where no field has it, the name itself.
    dropout, inner_dropout: fields, or None. `rates`: numbers of the layer, its own dropouts behind what experts took
    the place of, that become 0.
    when: a config's field and its value; the layers are such only then.
    runs: the field that says how often such layers run, where several share their weights.
    """

    num_layers: str
    layer: str
    ffn: str
    up: str
    down: str
    gate: str | None = None
    gate_rows: Half | None = None
    norm: str | None = None
    other_norms: tuple[str, ...] = ()
    norm_adds_one: bool = False
    attention_post_norm: str | None = None
    ffn_post_norm: str | None = None
    passed: tuple[str, ...] = ()
    transposed: bool = False
    activation: str = "hidden_act"
    activation_name: str | None = None
    dropout: str | None = None
    inner_dropout: str | None = None
    rates: tuple[str, ...] = ()
    when: tuple[str, Any] | None = None
    runs: str | None = None

    def count_layers(self, config: Any) -> int:
        """How many such layers a model of this config has."""
        return count_layers(self.num_layers, self.when, config)

    @property
    def is_gated(self) -> bool:
        """Whether an expert has a gate."""
        return self.gate is not None or self.gate_rows is not None

    def name(self, module: str) -> str:
        """A module's name below the base model."""
        return f"{self.layer}.{module}"


@dataclass(frozen=True)
class HostHead:
    """What is special about one class of a family.

    task: as Hugging Face names it. prefix: the attribute that holds the layers' base, "" where the class itself does.
    stacks: those that it has; None for all.
    """

    task: str
    prefix: str | None = None
    stacks: tuple[HostStack, ...] | None = None


@dataclass(frozen=True)
class Host:
    """A dense family of transformers.

    base: the class of its base model, and `prefix` the attribute that holds it in a model with a head.
    heads: classes that differ from what their names and the base say; None of one that is refused.
    stand_ins: classes for pretraining alone, which have no task, and what their checkpoints are read as.
    embedding: the module of token embeddings, where a stack's FFN reads the residual stream itself.
    conditions: what must hold of a config.
    dropped: patterns of tensors that checkpoints carry and no forward pass reads, such as another head's.
    reads_both_ways: whether tokens see later ones too, unless the config says `is_decoder`.
    counts_past_padding: whether positions are counted from behind the padding's own.
    absent: patterns of a base model's tensors that checkpoints may lack, since no hidden state needs them.
    trains_in_half: whether transformers computes it under autocast to bfloat16.
    any_image_size: whether it reads images of every size, without being told so.
    oldest_transformers: a version since which its classes exist, its modules have these names, and its config is read
    as it is written here; a test runs 4.57.6, and what that cannot read has `READ_FROM`.
    """

    model_type: str
    base: str
    prefix: str
    stacks: tuple[HostStack, ...]
    heads: Mapping[str, HostHead | None] = field(default_factory=dict, hash=False)
    stand_ins: Mapping[str, str] = field(default_factory=dict, hash=False)
    embedding: str | None = None
    conditions: tuple[Condition, ...] = ()
    dropped: tuple[str, ...] = ()
    reads_both_ways: bool = False
    counts_past_padding: bool = False
    absent: tuple[str, ...] = ("pooler.*",)
    trains_in_half: bool = True
    any_image_size: bool = False
    oldest_transformers: str = "4.57.0"
    zero_router: Literal["bitwise", "rounding"] = "bitwise"

    @property
    def start(self) -> str:
        """What the names of its classes begin with."""
        return self.base.removesuffix("Model")

    def find_class(self, architectures: Sequence[str] | None) -> str | None:
        """The class that a config's checkpoint is read as.

        None where that class has no task.
        """
        named = architectures[0] if architectures else self.base
        named = self.stand_ins.get(named, named)
        return named if self.find_task(named) is not None else None

    def find_absent(self, architecture: str, names: Iterable[str]) -> tuple[str, ...]:
        """Patterns of what a checkpoint of these names lacks, and may."""
        if architecture.removeprefix(CLASS_PREFIX) != self.base:
            return ()
        return tuple(pattern for pattern in self.absent if not fnmatch.filter(names, pattern))

    def find_task(self, architecture: str) -> str | None:
        """The task of one of its classes; None where it has none."""
        if architecture in self.heads:
            head = self.heads[architecture]
            return None if head is None else head.task
        return TASK_OF_HEAD.get(architecture.removeprefix(self.start)) if architecture.startswith(self.start) else None

    def find_prefix(self, architecture: str) -> str:
        """What stands before the layers' names in one of its classes.

        Empty, or with a dot at its end.
        """
        head = self.heads.get(architecture)
        prefix = self.prefix if head is None or head.prefix is None else head.prefix
        return "" if architecture == self.base or not prefix else f"{prefix}."

    def list_stacks(self, architecture: str) -> tuple[HostStack, ...]:
        """The layers of one of its classes."""
        head = self.heads.get(architecture)
        return self.stacks if head is None or head.stacks is None else head.stacks


def _dense_stack(stack: HostStack, prefix: str) -> Stack:
    others = tuple(Matrix(f"{prefix}{stack.name(norm)}.weight") for norm in stack.other_norms)
    return Stack(stack.num_layers, _dense_parts(stack, prefix), stack.when, others)


def _dense_parts(stack: HostStack, prefix: str) -> dict[Part, Matrix]:
    start = f"{prefix}{stack.layer}."
    up = f"{start}{stack.up}"
    parts: dict[Part, Matrix] = {}
    if stack.norm is not None:
        parts["ffn_norm"] = Matrix(f"{start}{stack.norm}.weight", fold=AddOne() if stack.norm_adds_one else None)
        parts["ffn_norm_bias"] = Matrix(f"{start}{stack.norm}.bias")
    if stack.attention_post_norm is not None:
        parts["attention_post_norm"] = Matrix(f"{start}{stack.attention_post_norm}.weight")
    if stack.ffn_post_norm is not None:
        parts["ffn_post_norm"] = Matrix(f"{start}{stack.ffn_post_norm}.weight")

    def add(part: Part, bias: Part, module: str, half: Half | None = None) -> None:
        parts[part] = Matrix(f"{module}.weight", half=half, transposed=stack.transposed)
        parts[bias] = Matrix(f"{module}.bias", half=half)

    if stack.gate is not None:
        add("ffn_gate", "ffn_gate_bias", f"{start}{stack.gate}")
    if stack.gate_rows is not None:
        add("ffn_gate", "ffn_gate_bias", up, stack.gate_rows)
        add("ffn_up", "ffn_up_bias", up, "last" if stack.gate_rows == "first" else "first")
    else:
        add("ffn_up", "ffn_up_bias", up)
    add("ffn_down", "ffn_down_bias", f"{start}{stack.down}")
    return parts


def _sparse_parts(stack: HostStack, prefix: str) -> dict[Part, Matrix]:
    start = f"{prefix}{stack.layer}.{stack.ffn}"
    experts, shared = f"{start}.experts", f"{start}.shared_expert"
    first = f"{experts}.gate_up_proj" if stack.is_gated else f"{experts}.up_proj"
    gate: dict[Part, Matrix] = {"expert_gate": Matrix(first)} if stack.is_gated else {}
    gate_bias: dict[Part, Matrix] = {"expert_gate_bias": Matrix(f"{first}_bias")} if stack.is_gated else {}
    shared_gate: dict[Part, Matrix] = (
        {
            "shared_gate": Matrix(f"{shared}.gate_proj.weight"),
            "shared_gate_bias": Matrix(f"{shared}.gate_proj.bias"),
        }
        if stack.is_gated
        else {}
    )
    return {
        "router": Matrix(f"{start}.router.weight"),
        "router_query": Matrix(f"{start}.router.query"),
        **gate,
        "expert_up": Matrix(first),
        **gate_bias,
        "expert_up_bias": Matrix(f"{first}_bias"),
        "expert_down": Matrix(f"{experts}.down_proj"),
        "expert_down_bias": Matrix(f"{experts}.down_proj_bias"),
        **shared_gate,
        "shared_up": Matrix(f"{shared}.up_proj.weight"),
        "shared_up_bias": Matrix(f"{shared}.up_proj.bias"),
        "shared_down": Matrix(f"{shared}.down_proj.weight"),
        "shared_down_bias": Matrix(f"{shared}.down_proj.bias"),
    }


def _gate(config: Any) -> Gate:
    return read_gate_section(config.mixture)


_EXPERTS = Experts(
    count_field="num_experts",
    top_k_field="num_experts_per_tok",
    width_field="intermediate_size",
    gate=_gate,
    fixed={},
    partial_layers="any",
    shared=SharedExpert("shared_size"),
)


@lru_cache(maxsize=256)
def convert_host(host: Host, architecture: str) -> Conversion:
    """The conversion of one of a host's classes, which has a task."""
    task = host.find_task(architecture)
    assert task is not None, f"{architecture} has no task"
    prefix, stacks = host.find_prefix(architecture), host.list_stacks(architecture)
    family = Architecture(
        host.model_type,
        architecture,
        task,
        outside={} if host.embedding is None else {"embedding": Matrix(f"{prefix}{host.embedding}.weight")},
        stacks=tuple(_dense_stack(stack, prefix) for stack in stacks),
        dropped=host.dropped,
        output_modules=tuple(stack.name(stack.passed[-1] if stack.passed else stack.ffn) for stack in stacks),
        is_host=True,
    )
    target = Architecture(
        MODEL_TYPE_PREFIX + host.model_type,
        CLASS_PREFIX + architecture,
        task,
        outside={},
        stacks=tuple(Stack(stack.num_layers, _sparse_parts(stack, prefix), stack.when) for stack in stacks),
        experts=_EXPERTS,
        is_host=True,
    )
    return Conversion(family, target, carried=(), conditions=host.conditions, zero_router=host.zero_router)
