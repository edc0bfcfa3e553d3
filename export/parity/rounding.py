"""What 8-bit activations cost a twin, simulated in torch, and the limits of a package that follow.

No bound on the logits of a deep model that rounds its activations can be as tight as that of one product: two right computations that round by other
sums part as far from each other as both do from the unrounded twin. So the language tier is held to what the same rounding costs the twin itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from export.parity.agreement import mean_divergence
from export.parity.forward import Forward, Reference
from export.parity.records import Limit
from export.parity.ties import same_experts
from export.storage import MODEL_NAME
from export.twin import SCHEME_NAME, Twin

_TOKENS = 2048
_MULTIPLE = 2.0
"""Of the simulated loss. On SmolLM2-135M with 4 experts graph and simulation lose the same within a fifth over as many tokens."""
_INT8 = 4  # accuracy_level of the operators that read activations in 8 bits


@dataclass(frozen=True)
class Rounding:
    """What rounding costs the twin: KL in nats from itself unrounded, and the agreement of its experts in the worst layer."""

    kl: float
    routing: float
    num_tokens: int


def rounds_as_it_runs(package: Path) -> bool:
    """Whether the graph of a package has operators that read their inputs in 8 bits, with scales that they find as they run."""
    outer = onnx.load(package / MODEL_NAME, load_external_data=False).graph.node
    inner = (node for holder in outer for attribute in holder.attribute if attribute.HasField("g") for node in attribute.g.node)
    return any(_reads_8_bits(node) for node in (*outer, *inner))


def _reads_8_bits(node: onnx.NodeProto) -> bool:
    values: dict[str, int] = {attribute.name: attribute.i for attribute in node.attribute}
    match node.op_type:
        case "MatMulNBits":
            return values.get("accuracy_level", 0) == _INT8
        case "QMoE":
            return values.get("accuracy_level", 0) == _INT8 or values.get("expert_weight_bits", 4) == 8
        case _:
            return False


class RoundingMeasure:
    """Sums, over batches of text, of what a twin loses by rounding as its graph does."""

    def __init__(self, reference: Reference, directory: Path) -> None:
        """Of the twin in `directory`, open as `reference`."""
        self._reference, self._twin = reference, Twin(directory)
        self._kl, self._same, self._num_tokens = 0.0, list[float](), 0

    def add(self, ids: torch.Tensor, expected: Forward) -> None:
        """Some more text, ids [B, S], and what the twin says to it unrounded; no more than enough of it is taken."""
        if self._num_tokens >= _TOKENS:
            return
        with self._reference.rounded(self._twin):
            found = self._reference.forward(ids, torch.ones_like(ids))
        self._kl += mean_divergence(expected.logits, found.logits) * ids.numel()
        self._num_tokens += ids.numel()
        pairs = [(a, b) for a, b in zip(found.routers, expected.routers, strict=True) if a is not None and b is not None]
        counts = [float(same_experts(a, b, expected.top_k).sum()) for a, b in pairs]
        self._same = [old + new for old, new in zip(self._same or [0.0] * len(counts), counts, strict=True)]

    def result(self) -> Rounding:
        """What was found."""
        count = self._num_tokens
        return Rounding(max(self._kl / count, 0.0), min(self._same, default=float(count)) / count, count)


def open_rounding(reference: Reference, directory: Path, package: Path) -> RoundingMeasure | None:
    """A measure for the twin in `directory`; None where the package rounds nothing."""
    return RoundingMeasure(reference, directory) if (directory / SCHEME_NAME).is_file() and rounds_as_it_runs(package) else None


def rounding_limits(limits: dict[str, Limit], found: Rounding | None) -> dict[str, Limit]:
    """The limits of KL and routing, widened to a multiple of what rounding costs the twin itself, where that is more."""
    if found is None:
        return limits
    wider = dict(limits)
    cost = f"{_MULTIPLE:g} times what rounding activations to 8 bits costs the twin in torch"
    if "kl" in limits and (kl := _MULTIPLE * found.kl) > limits["kl"].value:
        wider["kl"] = Limit(kl, f"{cost}, {found.kl:.1e} nats on {found.num_tokens:,} tokens")
    if "routing" in limits and (routing := 1 - _MULTIPLE * (1 - found.routing)) < limits["routing"].value:
        wider["routing"] = Limit(routing, f"{cost}: {found.routing:.2%} of {found.num_tokens:,} tokens keep their experts in the worst layer")
    return wider
