"""The plan of an upcycling: from names and shapes alone.

Complete and exclusive: every source tensor is used or listed as dropped, every target tensor is written once. Nothing here reads a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from upcycle.checkpoint import DTYPES, Checkpoint, TensorEntry, TensorSpec
from upcycle.config import UpcycleConfig
from upcycle.errors import UpcycleError
from upcycle.family import COMMON_NEUTRAL, Family, find_family


@dataclass(frozen=True)
class Keep:
    """Write the source tensor as it is."""

    source: str


@dataclass(frozen=True)
class CopyExpert:
    """Write one expert's copy of an FFN matrix, with the noise of the settings."""

    source: str


@dataclass(frozen=True)
class DrawRouter:
    """Write a fresh router, scaled to the norm that it reads."""

    norm: str


Rule = Keep | CopyExpert | DrawRouter


@dataclass(frozen=True)
class Write:
    """One target tensor and the rule that makes it."""

    spec: TensorSpec
    rule: Rule


@dataclass(frozen=True)
class UpcyclePlan:
    """What will be written. Writes with one source follow each other, so each source tensor is read once."""

    family: Family
    target_config: PreTrainedConfig
    writes: tuple[Write, ...]
    dropped: tuple[str, ...]
    num_experts: int
    num_experts_per_tok: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights written."""
        return sum(write.spec.num_bytes for write in self.writes)

    @property
    def num_parameters(self) -> int:
        """Parameters of the mixture."""
        return sum(torch.Size(write.spec.shape).numel() for write in self.writes)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: everything but the experts that it does not visit."""
        experts = sum(torch.Size(write.spec.shape).numel() for write in self.writes if isinstance(write.rule, CopyExpert))
        return self.num_parameters - experts + experts * self.num_experts_per_tok // self.num_experts


def plan_upcycle(checkpoint: Checkpoint, config: UpcycleConfig) -> UpcyclePlan:
    """Plan the mixture of experts that a dense checkpoint becomes.

    Raises:
        UpcycleError: the architecture or a config value has no place in the target; tensors are missing, unknown or of another shape than
            the config says.
    """
    family = find_family(checkpoint.config.model_type, checkpoint.config.architectures)
    target_config = _target_config(checkpoint, family, config)
    dropped = _check_tensors(checkpoint, family)
    num_layers: int = checkpoint.config.num_hidden_layers
    writes: list[Write] = []
    used = set(dropped)

    def keep(name: str) -> None:
        if name in checkpoint.entries and name not in used:
            writes.append(Write(_spec_like(checkpoint.entries[name], name), Keep(name)))
            used.add(name)

    for pattern in family.kept:
        if "{layer}" not in pattern:
            keep(pattern)
    for layer in range(num_layers):
        for pattern in family.kept:
            if "{layer}" in pattern:
                keep(pattern.format(layer=layer))
        ffn = family.ffn
        norm = checkpoint.entries[ffn.router_norm.format(layer=layer)]
        router_shape = (config.num_experts, norm.num_elements)
        writes.append(Write(TensorSpec(ffn.router.format(layer=layer), DTYPES[norm.dtype], router_shape), DrawRouter(norm.name)))
        for source, target in ((ffn.gate, ffn.expert_gate), (ffn.up, ffn.expert_up), (ffn.down, ffn.expert_down)):
            entry = checkpoint.entries[source.format(layer=layer)]
            used.add(entry.name)
            for expert in range(config.num_experts):
                writes.append(Write(_spec_like(entry, target.format(layer=layer, expert=expert)), CopyExpert(entry.name)))
    assert used == set(checkpoint.entries), f"the family table leaves out {sorted(set(checkpoint.entries) - used)}"
    assert len({write.spec.name for write in writes}) == len(writes)
    return UpcyclePlan(family, target_config, tuple(writes), dropped, config.num_experts, config.num_experts_per_tok)


def _spec_like(entry: TensorEntry, name: str) -> TensorSpec:
    return TensorSpec(name, DTYPES[entry.dtype], entry.shape)


def _target_config(checkpoint: Checkpoint, family: Family, config: UpcycleConfig) -> PreTrainedConfig:
    """Carry the config over from the *loaded* object: the two architectures' defaults differ, so absent json keys must not stay absent."""
    source = checkpoint.config
    where = f"{checkpoint.directory / 'config.json'}"
    for name, required in family.required.items():
        if (value := getattr(source, name, required.value)) != required.value:
            raise UpcycleError(f"{where}: {name} is {value}; {family.target_architecture} needs {required.value}: {required.reason}")
    known = {*family.carried, *family.required, *family.neutral, *COMMON_NEUTRAL}
    defaults = type(source)()
    for name, value in _declared_fields(source).items():
        if name not in known and value != getattr(defaults, name, None):
            raise UpcycleError(
                f"{where}: {name} is {value}, and what it does is not known to {family.target_architecture}; remove it or set its default"
            )
    fields: dict[str, Any] = {name: getattr(source, name) for name in family.carried}
    fields |= dict(family.target_defaults)
    fields |= {family.expert_count_field: config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    try:
        target = AutoConfig.for_model(family.target_model_type, **fields)
    except Exception as error:  # the target's own validation: transformers raises strict dataclass errors of several kinds
        raise UpcycleError(f"{where}: {family.target_architecture} refuses these values: {' '.join(str(error).split())[:300]}") from error
    target.architectures = [family.target_architecture]
    target.dtype = source.dtype
    return target


def _declared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that the config's class declares: what its model can read. Foreign keys in the json reach no forward pass."""
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__ if hasattr(config, name)}


def _check_tensors(checkpoint: Checkpoint, family: Family) -> tuple[str, ...]:
    """Compare the stored tensors with those of transformers' own model of this config; returns the names that are dropped."""
    expected = expected_shapes(checkpoint.config)
    layers = range(checkpoint.config.num_hidden_layers)
    droppable = {pattern.format(layer=layer) for pattern in family.dropped for layer in layers}
    if checkpoint.config.tie_word_embeddings:
        droppable.add("lm_head.weight")  # transformers ties it to the embedding whatever is stored
    dropped = tuple(sorted(droppable & set(checkpoint.entries)))
    for name, shape in expected.items():
        if name not in checkpoint.entries:
            raise UpcycleError(f"{checkpoint.directory}: tensor '{name}' is missing; by config.json it must be there with shape {list(shape)}")
        found = checkpoint.entries[name].shape
        if found != shape:
            raise UpcycleError(f"{checkpoint.directory}: tensor '{name}' has shape {list(found)}; by config.json it must be {list(shape)}")
    for name, entry in checkpoint.entries.items():
        if name not in expected and name not in dropped:
            raise UpcycleError(f"{checkpoint.directory}: tensor '{name}' has no place in {family.architecture}; it would be lost; remove it")
        if name not in dropped and entry.dtype not in DTYPES:
            raise UpcycleError(f"{checkpoint.directory}: tensor '{name}' is stored as {entry.dtype}; it must be one of {', '.join(DTYPES)}")
    return dropped


def expected_shapes(config: PreTrainedConfig) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of transformers' own causal model of this config, tied copies left out; allocates nothing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
