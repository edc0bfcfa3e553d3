"""Records: what an architecture is, and how dense becomes sparse.

One `Architecture` of transformers says where each part's tensor lies, for surgery and for graphs alike. A `Conversion`
gives every config field of the dense one a fate: a field that bears on the forward pass is carried, or fields of the
target are derived from it, or it must have the one value that the target can express, or the conversion refuses.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, assert_never

from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.models.heads import TASK_OF_HEAD, Head, split_class
from dense2moe.upcycle.models.parts import Ffn, Matrix, Part, matches


def read_field(config: Any, name: str) -> Any:
    """A config's field, or, with a dot, a part's field."""
    return functools.reduce(getattr, name.split("."), config)


def count_layers(num_layers: str, when: tuple[str, Any] | None, config: Any) -> int:
    """The value of a field; 0 where another has not its value."""
    if when is not None and read_field(config, when[0]) != when[1]:
        return 0
    count: int = read_field(config, num_layers)
    return count


@dataclass(frozen=True)
class Stack:
    """Layers that are alike: how many, and where each part lies.

    `num_layers` is the config's field; with a dot, a field of one of its parts. `when` is a field and its value,
    without which a model has none of these layers. `other_norms` stand for the part `ffn_norm` where that is not
    stored: the first that is.
    Parts stand in the order in which they are written. Parts of one name are rows of one tensor. Experts whose names
    have no `{expert}` are stacked in one tensor, [experts, rows, columns].
    """

    num_layers: str
    parts: Mapping[Part, Matrix]
    when: tuple[str, Any] | None = None
    other_norms: tuple[Matrix, ...] = ()

    def count_layers(self, config: Any) -> int:
        """How many layers it has in a model of this config."""
        return count_layers(self.num_layers, self.when, config)


@dataclass(frozen=True)
class SharedExpert:
    """How a config tells the width of a shared expert.

    width_field: None where it is always there, and as wide as a routed expert.
    required: a model of this architecture always builds one; width 0 where none is wanted.
    in_experts: the width counts routed experts, and not neurons.
    """

    width_field: str | None
    required: bool = False
    in_experts: bool = False


PartialLayers = Literal["none", "list", "types", "interval", "step", "last", "any"]
"""How a config says which layers have experts.

none: all have. list: `mlp_only_layers` names the others. types: `mlp_layer_types` has a word for each layer.
interval: each n-th between a first and a last one. step: each n-th of each stack. last: those behind the first few.
any: a mixture of ours names them.
"""


@dataclass(frozen=True)
class Experts:
    """Config fields of a sparse architecture's experts, and what it can hold.

    fixed: config fields whose value does not depend on the source.
    dense_width_field: of the FFNs in layers without experts. num_dense_field: of "last", how many come first.
    top_1: each token visits one expert, whose output is multiplied by its probability.
    """

    count_field: str
    top_k_field: str | None
    width_field: str
    gate: Callable[[Any], Gate]
    fixed: Mapping[str, Any]
    partial_layers: PartialLayers = "none"
    dense_width_field: str = "intermediate_size"
    num_dense_field: str = "first_k_dense_replace"
    shared: SharedExpert | None = None
    top_1: bool = False
    min_experts: int = 1

    def name_layers(self, sparse: Sequence[int], num_layers: int) -> dict[str, Any]:
        """The config fields that give a decoder's layers `sparse` experts.

        Those must be a choice that `partial_layers` allows.
        """
        match self.partial_layers:
            case "none" | "any" | "step":
                return {}
            case "list":
                return {"mlp_only_layers": [layer for layer in range(num_layers) if layer not in sparse]}
            case "types":
                return {"mlp_layer_types": ["sparse" if n in sparse else "dense" for n in range(num_layers)]}
            case "interval":
                first, last = (sparse[0], sparse[-1]) if sparse else (num_layers, 0)
                return {
                    "moe_layer_start_index": first,
                    "moe_layer_end_index": last,
                    "moe_layer_interval": find_interval(sparse),
                }
            case "last":
                return {self.num_dense_field: sparse[0] if sparse else num_layers}
            case _:
                assert_never(self.partial_layers)


def find_interval(layers: Sequence[int]) -> int | None:
    """N, if these are every N-th of the layers; else None."""
    steps = {later - earlier for earlier, later in itertools.pairwise(layers)} or {1}
    step = steps.pop()
    return step if not steps and all((layer + 1) % step == 0 for layer in layers) else None


@dataclass(frozen=True)
class Multipliers:
    """Factors of the forward pass.

    `attention` None is one over the root of the head size. Logits are divided by theirs.
    """

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers, dense or sparse.

    An optional part, such as a bias, is there where the checkpoint has its tensor. `dropped` are tensors that old
    checkpoints carry and no forward pass reads. `ffn_module` is the module below the base model that reads what a
    router in its place would; None where layers cannot be run alone, and then `output_modules` may say for each stack
    which one gives an FFN's output. `experts` is None of a dense architecture. `heads` are the others that it can have.
    `is_host`: only its FFNs are named; all else of it, tensors and config fields, stays as it is; see `host`.

    The rest is for graphs of decoders. `rotary` is the class of its rotary embedding in transformers; None where no
    graph is built. `norm_per_head`: norms of query and key are of each head by itself, and not of the whole row.
    `window` gives a layer's window or None; `refusal` says why the builder does not cover a config, or None.
    """

    model_type: str
    architecture: str
    task: str  # as Hugging Face names tasks
    outside: Mapping[Part, Matrix]
    stacks: tuple[Stack, ...]
    dropped: tuple[str, ...] = ()
    ffn_module: str | None = None
    output_modules: tuple[str, ...] = ()
    is_host: bool = False
    experts: Experts | None = None
    heads: tuple[Head, ...] = ()
    rotary: str | None = None
    norm_per_head: bool = True
    multipliers: Callable[[Any], Multipliers] = lambda _: Multipliers()
    window: Callable[[Any, int], int | None] = lambda _, __: None
    refusal: Callable[[Any], str | None] = lambda _: None

    @property
    def ffn_outputs(self) -> tuple[str, ...]:
        """Of each stack, the module whose output is an FFN's.

        Names are below the base model; empty where unknown.
        """
        return self.output_modules or (() if self.ffn_module is None else (self.ffn_module,))

    def find(self, part: Part, layer: int | None = None) -> str | None:
        """The name of a part's tensor; None where there is none.

        Without `layer`, the pattern of the name in all layers; of the first stack of several.
        """
        matrix = self.outside.get(part) or self.stacks[0].parts.get(part)
        return None if matrix is None else matrix.name if layer is None else matrix.name.format(layer=layer)

    def name(self, part: Part, layer: int | None = None) -> str:
        """The name of a part's tensor, which the architecture has."""
        name = self.find(part, layer)
        assert name is not None, f"{self.model_type} has no {part}"
        return name

    @property
    def start(self) -> str:
        """What the names of its classes begin with."""
        return split_class(self.architecture)[0]

    def find_head(self, architecture: str) -> Head | None:
        """The other head of one of its classes, by name."""
        return next((head for head in self.heads if architecture == self.start + head.ends), None)

    def with_head(self, head: Head) -> Architecture:
        """The same architecture with another head."""
        before = self.base_prefix

        def rename(matrix: Matrix) -> Matrix:
            return replace(matrix, name=head.base + matrix.name.removeprefix(before))

        kept: dict[Part, Matrix] = {part: rename(matrix) for part, matrix in self.outside.items()}
        kept.pop("head", None)
        return replace(
            self,
            architecture=self.start + head.ends,
            task=TASK_OF_HEAD[head.ends],
            outside={**kept, **head.parts},
            stacks=tuple(
                replace(stack, parts={part: rename(matrix) for part, matrix in stack.parts.items()})
                for stack in self.stacks
            ),
            dropped=tuple(head.base + name.removeprefix(before) for name in self.dropped),
        )

    @property
    def base_prefix(self) -> str:
        """What the names of the base model's tensors begin with."""
        module = self.name("embedding").split(".")[:-2]
        return "".join(f"{piece}." for piece in module)

    @property
    def ffn(self) -> Ffn | None:
        """The FFN of a layer without experts."""
        return self._ffn("ffn_gate", "ffn_up", "ffn_down", ("ffn_gate_bias", "ffn_up_bias", "ffn_down_bias"))

    @property
    def routed(self) -> Ffn | None:
        """One routed expert, or all of them where they are stacked."""
        return self._ffn(
            "expert_gate", "expert_up", "expert_down", ("expert_gate_bias", "expert_up_bias", "expert_down_bias")
        )

    @property
    def shared(self) -> Ffn | None:
        """The expert that every token visits."""
        return self._ffn(
            "shared_gate", "shared_up", "shared_down", ("shared_gate_bias", "shared_up_bias", "shared_down_bias")
        )

    def _ffn(self, gate: Part, up: Part, down: Part, biases: tuple[Part, Part, Part]) -> Ffn | None:
        first, second = self.find(gate), self.find(up)
        if second is None:
            return None
        gate_bias, up_bias, down_bias = (self.find(part) for part in biases)
        is_one = first == second
        return Ffn(
            None if is_one else first,
            second,
            self.name(down),
            first is not None,
            None if is_one else gate_bias,
            up_bias,
            down_bias,
        )

    @property
    def shared_is_outside(self) -> bool:
        """Whether the shared expert lies outside of the router's module."""
        return self.shared is not None and _module(self.shared.up) != _module(self.name("router"))

    @property
    def is_stacked(self) -> bool:
        """Whether all experts of a layer lie in one tensor."""
        return self.routed is not None and "{expert}" not in self.routed.up

    def gate(self, config: Any) -> Gate:
        """How tokens choose experts, by a config of this sparse architecture."""
        assert self.experts is not None, f"{self.model_type} is dense"
        return self.experts.gate(config)

    def has_experts(self, layer: int, names: Container[str]) -> bool:
        """Whether a layer has a router in a checkpoint of these tensors."""
        return self.find("router", layer) in names

    def find_part(self, tensor: str) -> Part | None:
        """The part that a tensor is, by its name; None where unknown.

        Of a tensor that holds several parts, the first.
        """
        return next((part for part, matrix in self._all_parts() if matches(matrix.name, tensor)), None)

    def _all_parts(self) -> Iterator[tuple[Part, Matrix]]:
        yield from self.outside.items()
        for stack in self.stacks:
            yield from stack.parts.items()


def _module(name: str) -> list[str]:
    """The module of a layer that holds a tensor, by its name."""
    pieces = name.split(".")
    return pieces[: pieces.index("{layer}") + 2]


@dataclass(frozen=True)
class Required:
    """The only config value that the target can express, and why."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Condition:
    """What must hold of the source's config, and the refusal otherwise.

    A refusal says what is, what must be and why.
    """

    holds: Callable[[Any], bool]
    refusal: Callable[[Any], str]


@dataclass(frozen=True)
class Conversion:
    """A dense architecture, a target, and the fate of every config field.

    carried: same name and meaning on both sides.
    optional: carried where the source has them; no declared field of one side or the other, but its forward pass reads
    them.
    required: must have this value. consumed: read by `derived` or `conditions` alone. neutral: no forward pass reads
    them.
    derived: target fields that follow from the source's config.
    zero_router: what a zero router with k = 1 or 2 gives with plain copies; "bitwise", or equal within rounding.
    by_name_alone: 'auto' never takes it.
    """

    family: Architecture
    target: Architecture
    carried: tuple[str, ...]
    required: Mapping[str, Required] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    derived: Callable[[Any], dict[str, Any]] = lambda _: {}
    consumed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    neutral: tuple[str, ...] = ()
    zero_router: Literal["bitwise", "rounding"] = "bitwise"
    by_name_alone: bool = False

    @property
    def keeps_rest(self) -> bool:
        """Whether all but the FFNs stays, tensors and config fields."""
        return self.target.is_host

    @property
    def target_name(self) -> str:
        """What a recipe calls the target."""
        return "mixture" if self.keeps_rest else self.target.model_type

    @property
    def experts(self) -> Experts:
        """What the target says of its experts."""
        assert self.target.experts is not None, f"{self.target.model_type} is dense"
        return self.target.experts
