"""How benchmarks/quantization.py judges.

A package against the float32 one on held-out tokens, by its logits and by its routing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

from dense2moe.export.names import is_router_logits
from dense2moe.export.parity.ties import same_experts
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.storage import MODEL_NAME
from dense2moe.upcycle.gates.gate import TopK

Routers = dict[str, np.ndarray]
"""Router logits of one batch, by the name that the graph has for them."""


@dataclass(frozen=True)
class Outcome:
    """One model against the float32 one over the same tokens: losses in nats, shares of tokens.

    None is what could not be had.
    """

    loss: float
    increase_error: float  # the standard error over blocks of its loss above float32's
    kl: float
    top1: float
    num_bytes: int
    routing: tuple[float, ...] | None = None  # share of tokens with the same experts, by layer
    same: float | None = None  # and in every layer
    kl_same: float | None = None
    kl_flipped: float | None = None
    kl_forced: float | None = None


def products(model: onnx.ModelProto, *kinds: str) -> Iterator[onnx.NodeProto]:
    """The products with the matrices that are quantized: all but those of the routers and the head."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if (
            node.op_type in kinds
            and node.input[1] in constants
            and not (is_router_logits(node.output[0]) or node.output[0].startswith("logits"))
        ):
            yield node


def weight_bytes(package: Path) -> int:
    """Bytes of what those products multiply with, scales and zero points included."""
    model = onnx.load(package / MODEL_NAME)
    sizes = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer}
    return sum(sizes.get(name, 0) for node in products(model, "MatMul", "MatMulNBits") for name in node.input[1:])


def copy(package: Path, folder: Path, *but: str) -> Path:
    """A new directory with the files of a package, but for some.

    Copies: onnxruntime reads no weights through symbolic links, and onnx none of a file with two hard links.
    """
    folder.mkdir(parents=True)
    for path in package.iterdir():
        if path.name not in but:
            shutil.copyfile(path, folder / path.name)
    return folder


def feeds(model: onnx.ModelProto, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """What a session takes to run ids [B, S] after nothing."""
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in model.graph.input}
    past = {
        name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_key_values.")
    }
    return {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64), **past}


def force_routers(package: Path, folder: Path, num_threads: int) -> Callable[[torch.Tensor, Routers], torch.Tensor]:
    """The package with router logits as inputs: ids [B, S] and those to log probabilities [B, S, V]."""
    copy(package, folder)
    model = onnx.load(package / MODEL_NAME, load_external_data=False)
    for node in [node for node in model.graph.node if is_router_logits(node.output[0])]:
        model.graph.node.remove(node)
        model.graph.input.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
    onnx.save(model, folder / MODEL_NAME)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it would tell that the routers are unused
    options.intra_op_num_threads = num_threads
    session = ort.InferenceSession(folder / MODEL_NAME, options, providers=["CPUExecutionProvider"])
    return lambda ids, routers: torch.from_numpy(session.run(["logits"], feeds(model, ids) | routers)[0]).log_softmax(
        -1
    )


def run(decoder: Decoder, ids: torch.Tensor) -> tuple[torch.Tensor, Routers]:
    """Log probabilities [B, S, V], and router logits of each layer with experts."""
    found = decoder.run(decoder.new_cache(*ids.shape), ids.numpy())
    taps = {name: np.array(found[name]) for name in decoder.taps if is_router_logits(name)}
    return torch.from_numpy(np.array(found["logits"])).log_softmax(-1), taps


def next_losses(log_q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What each next token costs in nats, [B, S - 1]."""
    return -log_q[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL of q from p in nats, by token [B * S]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).flatten()


class Judge:
    """Compares models with the float32 package on held-out blocks [N, S]; the float32 one is run once."""

    def __init__(self, floats: Path, blocks: torch.Tensor, num_threads: int) -> None:
        self.num_threads = num_threads
        self.batches = blocks.split(4)
        decoder = Decoder(floats, inspection=Inspection(streams=True), num_threads=num_threads)
        self.choice = TopK(int(decoder.config["num_experts_per_tok"]))
        self.expected = [run(decoder, ids) for ids in self.batches]
        self.loss = float(
            torch.cat(
                [next_losses(log_p, ids) for (log_p, _), ids in zip(self.expected, self.batches, strict=True)]
            ).mean()
        )

    def compare(self, found: list[torch.Tensor], num_bytes: int) -> Outcome:
        """By log probabilities [B, S, V] of every batch alone."""
        triples = [
            (log_q, log_p, ids) for log_q, (log_p, _), ids in zip(found, self.expected, self.batches, strict=True)
        ]
        losses = torch.cat([next_losses(log_q, ids) for log_q, _, ids in triples])
        increases = (losses - torch.cat([next_losses(log_p, ids) for _, log_p, ids in triples])).mean(-1)
        same = torch.cat([log_q.argmax(-1) == log_p.argmax(-1) for log_q, log_p, _ in triples])
        kl = torch.cat([divergence(log_p, log_q) for log_q, log_p, _ in triples])
        return Outcome(
            float(losses.mean()),
            float(increases.std() / len(increases) ** 0.5),
            float(kl.mean()),
            float(same.float().mean()),
            num_bytes,
        )

    def compare_package(self, package: Path, folder: Path, num_bytes: int | None = None) -> Outcome:
        """By its routing too. `folder` is to be made, and worked in; the bytes are the package's own if not given."""
        decoder, forced = (
            Decoder(package, inspection=Inspection(streams=True), num_threads=self.num_threads),
            force_routers(package, folder, self.num_threads),
        )
        found = [run(decoder, ids) for ids in self.batches]
        # [L, N * S]
        same = torch.cat(
            [self._same(routers, own) for (_, routers), (_, own) in zip(found, self.expected, strict=True)], dim=1
        )
        kl = torch.cat([divergence(log_p, log_q) for (log_q, _), (log_p, _) in zip(found, self.expected, strict=True)])
        told = [
            divergence(log_p, forced(ids, own)) for (log_p, own), ids in zip(self.expected, self.batches, strict=True)
        ]
        everywhere = same.all(0)
        halves = [float(kl[chosen].mean()) if chosen.any() else 0.0 for chosen in (everywhere, ~everywhere)]
        plain = self.compare([log_q for log_q, _ in found], weight_bytes(package) if num_bytes is None else num_bytes)
        return replace(
            plain,
            routing=tuple(same.float().mean(1).tolist()),
            same=float(everywhere.float().mean()),
            kl_same=halves[0],
            kl_flipped=halves[1],
            kl_forced=float(torch.cat(told).mean()),
        )

    def _same(self, routers: Routers, own: Routers) -> torch.Tensor:
        """Whether each token of a batch meets the same experts, by layer [L, B * S]."""
        pairs = [(torch.from_numpy(routers[name]), torch.from_numpy(logits)) for name, logits in own.items()]
        return torch.stack([same_experts(a, b, self.choice).flatten() for a, b in pairs])
