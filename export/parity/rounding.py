"""What 8-bit activations cost a twin, simulated in torch, and the limits of a package that follow.

No bound on the logits of a deep model that rounds its activations can be as tight as that of one product: two right computations that round by other
sums part as far from each other as both do from the unrounded twin. So the language tier is held to what the same rounding costs the twin itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from export.parity.agreement import divergence
from export.parity.forward import Reference
from export.parity.records import Limit
from export.parity.ties import same_experts
from export.storage import MODEL_NAME
from export.text import choose_blocks
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


def measure_rounding(reference: Reference, directory: Path, package: Path, blocks: torch.Tensor) -> Rounding | None:
    """What the twin in `directory`, open as `reference`, loses on some of blocks [N, S] by rounding as the graph; None where that rounds nothing."""
    if not (directory / SCHEME_NAME).is_file() or not rounds_as_it_runs(package):
        return None
    ids = choose_blocks(blocks, max(1, _TOKENS // blocks.shape[1]))
    twin, kl, same = Twin(directory), 0.0, list[float]()
    for batch in ids.split(1):
        mask = torch.ones_like(batch)
        expected = reference.forward(batch, mask)
        with reference.rounded(twin):
            found = reference.forward(batch, mask)
        kl += float(divergence(expected.logits, found.logits).sum())
        pairs = [(a, b) for a, b in zip(found.routers, expected.routers, strict=True) if a is not None and b is not None]
        counts = [float(same_experts(a, b, expected.top_k).sum()) for a, b in pairs]
        same = [old + new for old, new in zip(same or [0.0] * len(counts), counts, strict=True)]
    return Rounding(max(kl / ids.numel(), 0.0), min(same, default=float(ids.numel())) / ids.numel(), ids.numel())


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
