"""Experts of merged sources, forced one by one, against the dense architecture.

The mixture of sources that differ computes what no dense model does. What can be proved is each expert: where all
experts of a layer are made the same one, the layer must compute what the dense architecture's own layer does with the
mixture's attention and norms and that source's FFN. With the base's own attention, of sources that differ from the base
in their FFNs alone, that layer is the source's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.building.comparison import OutputPair
from dense2moe.upcycle.building.facts import ReceiptLine
from dense2moe.upcycle.building.model_pass import real_states
from dense2moe.upcycle.building.pieces import Merged, Site
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.building.receipt_text import Text
from dense2moe.upcycle.checkpoints.layerwise import load_layer, run_layers
from dense2moe.upcycle.checkpoints.reader import Checkpoint, open_checkpoint
from dense2moe.upcycle.models.parts import AddOne, Part, layer_of

_FFN: tuple[Part, ...] = ("ffn_gate", "ffn_up", "ffn_down")


def compare_experts(
    base: Checkpoint,
    output: Path,
    plan: UpcyclePlan,
    sources: Mapping[str, Checkpoint],
    text: Text,
    limit: float,
) -> Iterator[ReceiptLine]:
    """Compare each expert, or group of granular ones, in all layers.

    In float32, on the hidden states that the base has before a layer; gives the largest rel of all layers. The shared
    expert is silent meanwhile.
    """
    checkpoints, mixture = (base, *sources.values()), open_checkpoint(output)
    ffn_module, size = plan.conversion.family.ffn_module, plan.settings.group_size
    assert ffn_module is not None
    worst: dict[int, OutputPair] = {}
    for layer, before, _, _ in run_layers(base, text.ids, text.mask, torch.float32, ffn_module):
        if Site(0, layer) not in plan.sites:
            continue
        rest = _read_merged(plan, mixture, layer)
        model = load_layer(mixture, layer, torch.float32)
        _silence_shared(model, plan)
        experts = [weight for weight in model.parameters() if weight.dim() == 3]
        own = [weight.detach().clone() for weight in experts]
        for first in range(0, plan.settings.num_experts, size):
            _force(experts, own, slice(first, first + size))
            found = real_states(model, before, text.mask)
            ffn = _read_ffn(plan, checkpoints[plan.owners[first]], layer)
            dense = load_layer(base, layer, torch.float32, {**rest, **ffn})
            expected = real_states(dense, before, text.mask)
            pair = OutputPair(found, expected, before[text.mask.bool()].to(torch.float32))
            if first not in worst or pair.rel > worst[first].rel:
                worst[first] = pair
    for first, pair in worst.items():
        name = ("the dense model", *plan.sources)[plan.owners[first]]
        text_name = f"each layer, expert {first} ({name}) alone"
        num_tokens = text.ids.shape[1]
        yield ReceiptLine("shipped", "float32", text_name, "eager", num_tokens, pair.rel, pair.bitwise, False, limit)


def _read_merged(plan: UpcyclePlan, mixture: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    """The merged tensors of a layer, by their dense names, from disk."""
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for write in plan.writes:
        match write.pieces:
            case (Merged(rows=merged, fold=fold),) if layer_of(merged.source) == layer:
                stored = mixture.read(write.spec.name).to(torch.float32)
                rows.setdefault(merged.source, {})[merged.start] = stored - 1.0 if isinstance(fold, AddOne) else stored
    return {name: torch.cat([part for _, part in sorted(parts.items())]) for name, parts in rows.items()}


def _read_ffn(plan: UpcyclePlan, checkpoint: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    """The FFN of a source in one layer, as experts have it.

    Half of its output where a shared expert gives the other half.
    """
    family = plan.conversion.family
    names = {name: part for part in _FFN if (name := family.find(part, layer)) is not None}
    half = plan.settings.shared_expert == "half"
    return {
        name: checkpoint.read(name).to(torch.float32) * (0.5 if half and part == "ffn_down" else 1.0)
        for name, part in names.items()
    }


@torch.no_grad()
def _force(experts: list[torch.nn.Parameter], own: list[torch.Tensor], group: slice) -> None:
    """Give all experts, stacked [experts, rows, columns], the weights of one group."""
    for weight, values in zip(experts, own, strict=True):
        part = values[group]
        weight.copy_(part.repeat(len(weight) // len(part), 1, 1))


@torch.no_grad()
def _silence_shared(model: PreTrainedModel, plan: UpcyclePlan) -> None:
    name = plan.conversion.target.find("shared_down", 0)
    weights = dict(model.named_parameters())
    if name is not None and (weight := weights.get(name.removeprefix("model."))) is not None:
        weight.zero_()
