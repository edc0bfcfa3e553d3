"""The blocks of experts of a package, each by itself, on the reference's own input.

The graph is cut open: what a block reads becomes an input `given.N`, and what it adds an output. So the error of one layer is not in the next, and
within a layer the tokens tell which expert is wrong: one that is right has a token that is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

from export.branches import take_branches
from export.parity.forward import Block, Reference, first_of
from export.parity.records import OperatorCheck
from export.parity.ties import TIE_MARGIN, find_margin
from export.runtime import HIDDEN, ROUTER_LOGITS
from export.storage import MODEL_NAME

_GIVEN = "given."
_HEARD = 0.05  # an expert with less weight than this in a token is not judged by it
_STRAIGHT = 1e-3  # relative; an output that differs from a multiple of the reference by less is that multiple


class Blocks:
    """All blocks of experts of a package in one session; `refusal` says why there is none."""

    def __init__(self, directory: Path, provider: str, shared_outside: bool) -> None:
        """`shared_outside`: in the reference a shared expert stands beside the block, so its part is left out here too."""
        branches = take_branches(onnx.load(directory / MODEL_NAME, load_external_data=False))
        self.refusal: str | None = None
        self.outputs, *_ = (_cut_open(model, shared_outside) for model in branches)
        if not self.outputs:
            self.refusal = "not run: the package shows no blocks of experts"
            return
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory.resolve()))
        self.sessions = [ort.InferenceSession(model.SerializeToString(), options, providers=[provider]) for model in branches]

    def run(self, given: Mapping[int, torch.Tensor]) -> list[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
        """Router logits [B * S, E] and output [B, S, H] of every block, for its input [B, S, H], by each branch of the graph."""
        layers = list(self.outputs)
        names = [name for n in layers for name in (f"{ROUTER_LOGITS}{n}", self.outputs[n])]
        feeds = {f"{_GIVEN}{n}": np.ascontiguousarray(given[n].numpy(), np.float32) for n in layers}
        branches = []
        for session in self.sessions:
            tensors = [torch.from_numpy(np.asarray(value, np.float32)) for value in session.run(names, feeds)]
            branches.append({n: (tensors[2 * place], tensors[2 * place + 1]) for place, n in enumerate(layers)})
        return branches


def _cut_open(model: onnx.ModelProto, shared_outside: bool) -> dict[int, str]:
    """Make the graph one of the blocks alone; returns the output of each by its layer."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    outputs: dict[int, str] = {}
    for n in sorted(int(name.removeprefix(ROUTER_LOGITS)) for name in makers if name.startswith(ROUTER_LOGITS)):
        given = next((name for name in (f"layers.{n}.ffn_normed", f"layers.{n}.attended") if name in makers), None)
        joined = makers.get(f"{HIDDEN}{n}")
        if given is None or joined is None or len(joined.input) < 2:
            return {}
        outputs[n] = _block_output(makers, joined.input[1], shared_outside)
        for node in graph.node:
            node.input[:] = [f"{_GIVEN}{n}" if name == given else name for name in node.input]
    del graph.input[:], graph.output[:]
    graph.input.extend(onnx.helper.make_tensor_value_info(f"{_GIVEN}{n}", onnx.TensorProto.FLOAT, ["B", "S", "H"]) for n in outputs)
    shown = [name for n, output in outputs.items() for name in (f"{ROUTER_LOGITS}{n}", output)]
    graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in shown)
    _keep_needed(graph)
    return outputs


def _block_output(makers: Mapping[str, onnx.NodeProto], update: str, shared_outside: bool) -> str:
    """What the block itself computes, before a norm, a factor or a shared expert joins it to the residual stream."""
    while update.endswith(("_multiplied", "_normed")):
        update = makers[update].input[0]
    return makers[update].input[0] if shared_outside and update.endswith(".mixed") else update


def _keep_needed(graph: onnx.GraphProto) -> None:
    """Drop nodes and weights that no output needs; they would want inputs that are no more."""
    needed, nodes = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if (needed - {""}) & set(node.output):
            nodes.append(node)
            needed |= set(node.input) | {name for found in node.attribute for name in _inner_names(found)}
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    kept = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)


def _inner_names(attribute: onnx.AttributeProto) -> set[str]:
    """What the nodes of a subgraph read, the values around it among them."""
    graphs = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    return {name for graph in graphs for node in graph.node for name in (*node.input, *(n for a in node.attribute for n in _inner_names(a)))}


def check_operators(blocks: Blocks, reference: Mapping[int, Block], top_k: int, limits: Mapping[int, float]) -> tuple[OperatorCheck, ...]:
    """Every block on the reference's input, the worst of its branches; tokens at a near-tie are left out.

    A layer's limit tells a wrong expert from a right one.
    """
    branches = blocks.run({n: block.given for n, block in reference.items()})

    def check(n: int) -> OperatorCheck:
        checks = [_check(n, *found[n], reference[n], top_k, limits.get(n, math.inf)) for found in branches]
        return max(checks, key=lambda found: found.output_error if math.isfinite(found.output_error) else math.inf)

    return tuple(map(check, branches[0]))


def _check(layer: int, logits: torch.Tensor, output: torch.Tensor, block: Block, top_k: int, limit: float) -> OperatorCheck:
    true_logits, scores = first_of(block.router).reshape(logits.shape), block.scores.reshape(logits.shape)
    judged = find_margin(scores, top_k) >= TIE_MARGIN
    expected = block.output.reshape(-1, block.output.shape[-1])[judged]
    ours, logits, true_logits = output.reshape(-1, expected.shape[-1])[judged], logits[judged], true_logits[judged]
    size = expected.norm(dim=-1).clamp(min=1e-30)
    errors = (ours - expected).norm(dim=-1) / size
    wrong = ~(errors <= limit)
    experts: tuple[int, ...] = ()
    factors: tuple[float, float] | None = None
    if wrong.any():
        best = scores[judged].topk(top_k, dim=-1).indices
        weights = true_logits.gather(-1, best).softmax(-1)  # whoever is heard by this is by sigmoids, which are less far apart
        chosen = [((best == expert) & (weights >= _HEARD)).any(-1) for expert in range(true_logits.shape[-1])]
        experts = tuple(n for n, heard in enumerate(chosen) if heard.any() and wrong[heard].all())
        factor = (ours * expected).sum(-1) / size.square()
        if bool(((ours - factor[:, None] * expected).norm(dim=-1) <= _STRAIGHT * size).all()):
            factors = float(factor.min()), float(factor.max())
    router_error = float((logits - true_logits).abs().max() / true_logits.abs().max().clamp(min=1e-30)) if judged.any() else 0.0
    return OperatorCheck(layer, int(judged.sum()), router_error, float(errors.max()) if judged.any() else 0.0, experts=experts, factors=factors)


def measure_block_noise(reference: Mapping[int, Block], exact: Reference, top_k: int) -> dict[int, tuple[float, float]]:
    """By layer, what the blocks in float32 differ by from the same in float64: router logits and output, as `check_operators` measures them."""
    noise = {}
    for n, block in reference.items():
        true = exact.run_block(n, block.given)
        output = block.output.double().reshape(true.output.shape)
        found = _check(n, first_of(block.router).double().reshape(-1, first_of(true.router).shape[-1]), output, true, top_k, math.inf)
        noise[n] = found.router_error, found.output_error
    return noise
