"""The cost of replacing weights, measured on text layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.layerwise import embed, load_head, load_layer, name_head_tensors
from dense2moe.upcycle.checkpoints.reader import Checkpoint

Weights = Mapping[str, torch.Tensor]
"""Tensors by their names in a checkpoint, float32; they may be made when they are read."""

_BATCH_ROWS = 8
_BATCH_TOKENS = 256
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class Cost:
    """Mean next-token loss, and mean KL divergence from the unchanged model.

    Both in nats a token.
    """

    loss: float
    kl: float


class Ruler:
    """Measures a decoder with replaced weights against the unchanged one.

    On blocks of token ids [N, S].
    """

    def __init__(self, checkpoint: Checkpoint, blocks: torch.Tensor) -> None:
        self.checkpoint, self.blocks = checkpoint, blocks
        self.num_layers = int(checkpoint.config.num_hidden_layers)
        self._reference = self._run_from(0, [embed(checkpoint, blocks, torch.float32)])[0]

    def measure(self, weights: Weights) -> Cost:
        """The cost of all these weights together."""
        states = embed(self.checkpoint, self.blocks, torch.float32, weights)
        for layer in range(self.num_layers):
            states = _run(load_layer(self.checkpoint, layer, torch.float32, weights), states)
        return self._judge([states], weights)[0]

    def measure_outside(self, choices: Sequence[Weights]) -> list[Cost]:
        """Each choice's own cost, for embeddings and heads."""
        after = self._run_from(0, [embed(self.checkpoint, self.blocks, torch.float32, weights) for weights in choices])
        return [self._judge([states], weights)[0] for states, weights in zip(after, choices, strict=True)]

    def measure_layer(
        self, layer: int, before: torch.Tensor, choices: Sequence[Weights]
    ) -> tuple[list[Cost], torch.Tensor]:
        """Each choice's cost in one layer, and the states after it.

        States are [N, S, H]. `before` is what the layer reads where nothing is replaced; `embed` gives what the first
        one does.
        """
        after = [_run(load_layer(self.checkpoint, layer, torch.float32, weights), before) for weights in choices]
        own = _run(load_layer(self.checkpoint, layer, torch.float32), before)
        return self._judge(self._run_from(layer + 1, after), {}), own

    def _run_from(self, layer: int, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run streams of states [N, S, H] through the remaining layers.

        From `layer` on; each layer is loaded once for all streams.
        """
        for number in range(layer, self.num_layers):
            model = load_layer(self.checkpoint, number, torch.float32)
            streams = [_run(model, states) for states in streams]
        return streams

    @torch.no_grad()
    def _judge(self, streams: Sequence[torch.Tensor], weights: Weights) -> list[Cost]:
        """The cost of each stream of states [N, S, H].

        All are read by the head that has these weights. Each head is loaded once for all streams, and the logits of
        the model as it is are computed once.
        """
        own = load_head(self.checkpoint, torch.float32)
        changed = any(name in weights for name in name_head_tensors(self.checkpoint))
        head = load_head(self.checkpoint, torch.float32, weights) if changed else own
        targets = torch.cat(
            [self.blocks[:, 1:], torch.full_like(self.blocks[:, :1], -100)], 1
        ).flatten()  # the last token has no successor
        kl, loss = [0.0] * len(streams), [0.0] * len(streams)
        for start in range(0, len(targets), _BATCH_TOKENS):
            part = slice(start, start + _BATCH_TOKENS)
            log_p = _log_probabilities(own, self._reference.flatten(0, 1)[part])
            for number, states in enumerate(streams):
                log_q = _log_probabilities(head, states.flatten(0, 1)[part])
                kl[number] += float((log_p.exp() * (log_p - log_q)).double().sum())
                loss[number] += float(F.nll_loss(log_q, targets[part], reduction="sum", ignore_index=-100).double())
        count = int((targets >= 0).sum())
        return [Cost(nats / count, max(total / self.blocks.numel(), 0.0)) for nats, total in zip(loss, kl, strict=True)]


def _log_probabilities(head: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [T, V] of the next token, for states [T, H]."""
    return cast(torch.Tensor, head(inputs_embeds=states[None], use_cache=False).logits[0].log_softmax(-1))


@torch.no_grad()
def _run(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [model(inputs_embeds=part, use_cache=False).last_hidden_state for part in states.split(_BATCH_ROWS)]
    )
