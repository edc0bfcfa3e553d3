"""Record of what calibration saw and changed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dense2moe.export.quantization.input_scaling import ScalingRecord
from dense2moe.export.quantization.router_correction import RouterFacts


@dataclass
class CalibrationRecord:
    """What calibration saw and changed.

    Tokens of each expert by layer, by layer the experts with too few of them for GPTQ, their matrices, and how many
    times the text would be enough for the one that lacks most; routing before and after correction by layer; groups of
    matrices with scaled inputs; and the float tensors that stand in the place of the checkpoint's, by name.

    `input_scales` are those of static quantization: of what a matrix reads, by the name of its tensor; one an expert
    where experts that read different things are stacked in it. `column_scales` [K] are what the columns of a matrix
    were multiplied by before it was quantized, where no tensor has taken that in.
    """

    expert_tokens: dict[int, list[int]] = field(default_factory=dict)
    scarce_experts: dict[int, int] = field(default_factory=dict)
    num_searched: int = 0
    largest_lack: float = 1.0
    routers: dict[int, RouterFacts] = field(default_factory=dict)
    scaling: ScalingRecord = field(default_factory=ScalingRecord)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    input_scales: dict[str, list[float]] = field(default_factory=dict)
    column_scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, other: CalibrationRecord) -> None:
        """Add another layer's record."""
        self.expert_tokens |= other.expert_tokens
        self.scarce_experts |= other.scarce_experts
        self.num_searched += other.num_searched
        self.largest_lack = max(self.largest_lack, other.largest_lack)
        self.routers |= other.routers
        self.scaling.add(other.scaling)
        self.replaced |= other.replaced
        self.input_scales |= other.input_scales
        self.column_scales |= other.column_scales

    def write(self) -> dict[str, Any]:
        """Facts for JSON, without the tensors in `replaced`."""
        facts = {
            name: getattr(self, name)
            for name in ("expert_tokens", "scarce_experts", "num_searched", "largest_lack", "input_scales")
        }
        return facts | {
            "routers": {layer: asdict(found) for layer, found in self.routers.items()},
            "scaling": asdict(self.scaling),
        }

    @classmethod
    def read(cls, facts: Mapping[str, Any], replaced: Mapping[str, torch.Tensor]) -> CalibrationRecord:
        """The record, from the facts that `write` made."""
        by_layer = {
            name: {int(layer): value for layer, value in facts[name].items()}
            for name in ("expert_tokens", "scarce_experts")
        }
        routers = {int(layer): RouterFacts(**found) for layer, found in facts["routers"].items()}
        return cls(
            **{
                **facts,
                **by_layer,
                "routers": routers,
                "scaling": ScalingRecord(**facts["scaling"]),
                "replaced": dict(replaced),
            }
        )

    def describe_tokens(self) -> dict[int, str]:
        """Tokens by layer, in words.

        The fewest tokens of an expert, the median, and experts with fewer than twice the width of a matrix of theirs.
        """
        return {
            layer: f"fewest {min(counts):,}, median {statistics.median_low(counts):,}; too few in "
            f"{self.scarce_experts.get(layer, 0)} of "
            f"{len(counts)} experts"
            for layer, counts in self.expert_tokens.items()
        }
