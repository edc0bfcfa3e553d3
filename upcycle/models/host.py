"""Hosts: dense families whose FFNs a mixture of our own replaces.

Where transformers has no sparse architecture for a family, the dense one stays, and `mixture.Mixture` takes each FFN's
place. So of a host no more is known than where its FFNs are: all other tensors and config fields are kept as they
are, and any head of the family that has a task is carried along.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.models.architecture import Architecture, Conversion, Experts, SharedExpert, Stack
from dense2moe.upcycle.models.heads import TASK_OF_HEAD
from dense2moe.upcycle.models.parts import Matrix, Part

CLASS_PREFIX = "Mixture"
MODEL_TYPE_PREFIX = "mixture_"
"""What is put before the dense names of classes and model types; `mixture.py`, which stands alone, repeats it."""

Half = Literal["first", "last"]


TRAINED_TASKS = ("text-generation", "fill-mask")
"""Tasks that models are trained for with nothing but text."""


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
    norm: the module whose output the FFN reads; None where it has no weights.
    transposed: whether matrices are stored as transformers' Conv1D has them.
    activation: the config's field for its name. dropout, inner_dropout: fields, or None.
    """

    num_layers: str
    layer: str
    ffn: str
    up: str
    down: str
    gate: str | None = None
    gate_rows: Half | None = None
    norm: str | None = None
    passed: tuple[str, ...] = ()
    transposed: bool = False
    activation: str = "hidden_act"
    dropout: str | None = None
    inner_dropout: str | None = None

    @property
    def is_gated(self) -> bool:
        """Whether an expert has a gate."""
        return self.gate is not None or self.gate_rows is not None

    def name(self, module: str) -> str:
        """A module's name below the base model."""
        return f"{self.layer}.{module}"


@dataclass(frozen=True)
class Host:
    """A dense family of transformers.

    base: the class of its base model, and `prefix` the attribute that holds it in a model with a head.
    heads: its classes with another start than the base's, by their tasks.
    dropped: patterns of tensors that checkpoints carry and no forward pass reads, such as another head's.
    oldest_transformers: the first version whose modules have these names.
    """

    model_type: str
    base: str
    prefix: str
    stacks: tuple[HostStack, ...]
    dropped: tuple[str, ...] = ()
    oldest_transformers: str = "4.57.0"
    zero_router: Literal["bitwise", "rounding"] = "bitwise"

    @property
    def start(self) -> str:
        """What the names of its classes begin with."""
        return self.base.removesuffix("Model")

    def find_task(self, architecture: str) -> str | None:
        """The task of one of its classes; None where it has none."""
        return TASK_OF_HEAD.get(architecture.removeprefix(self.start)) if architecture.startswith(self.start) else None


def _dense_parts(stack: HostStack, prefix: str) -> dict[Part, Matrix]:
    start = f"{prefix}{stack.layer}."
    up = f"{start}{stack.up}"
    parts: dict[Part, Matrix] = {}
    if stack.norm is not None:
        parts["ffn_norm"] = Matrix(f"{start}{stack.norm}.weight")
        parts["ffn_norm_bias"] = Matrix(f"{start}{stack.norm}.bias")

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
    return Gate(config.num_experts, TopK(config.num_experts_per_tok))


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
    prefix = "" if architecture == host.base else f"{host.prefix}." if host.prefix else ""
    family = Architecture(
        host.model_type,
        architecture,
        task,
        outside={},
        stacks=tuple(Stack(stack.num_layers, _dense_parts(stack, prefix)) for stack in host.stacks),
        dropped=host.dropped,
        output_modules=tuple(stack.name(stack.passed[-1] if stack.passed else stack.ffn) for stack in host.stacks),
    )
    target = Architecture(
        MODEL_TYPE_PREFIX + host.model_type,
        CLASS_PREFIX + architecture,
        task,
        outside={},
        stacks=tuple(Stack(stack.num_layers, _sparse_parts(stack, prefix)) for stack in host.stacks),
        experts=_EXPERTS,
    )
    return Conversion(family, target, carried=(), zero_router=host.zero_router, keeps_rest=True)
