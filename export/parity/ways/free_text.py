"""Free text, written by a package."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from dense2moe.export import names
from dense2moe.export.parity.agreement import Follow
from dense2moe.export.parity.forward import Reference
from dense2moe.export.parity.records import FreeRun
from dense2moe.export.parity.taps import FedText, look
from dense2moe.export.runtime.decoder import Decoder


def run_free(
    decoder: Decoder,
    reference: Reference,
    blocks: torch.Tensor,
    num_tokens: int,
    follow: Follow | None = None,
    routers: Sequence[str] = (),
) -> FreeRun:
    """Let the package continue the first halves of blocks [N, S].

    It decodes greedily, each block by itself. And ask the reference what it would have written. One forward of the
    reference over the package's text is enough: up to the first token that differs, both have read the same. `follow`
    runs it with what the package's routers say to that text, whose logits are called `routers`.
    """
    prefixes, gaps = [], []
    half = max(1, min(blocks.shape[1], decoder.context_length) // 2)
    count = min(num_tokens, decoder.context_length - half)
    for block in blocks:
        prompt = block[:half].tolist()
        text = prompt + write_greedily(decoder, prompt, count)
        ids = torch.tensor([text])
        ones = torch.ones_like(ids)
        if follow is None or not routers or reference.reads_in_pieces(len(text)):
            logits = reference.forward(ids, ones, half).logits[0, half - 1 : -1]
        else:
            logits = follow(reference, look(decoder, FedText.whole(ids), routers)).logits[0, half - 1 : -1]
        written = ids[0, half:]
        chosen = logits.argmax(-1)
        differs = (chosen != written).nonzero()[:, 0].tolist()
        prefixes.append(differs[0] if differs else len(written))
        if differs:
            at = differs[0]
            gaps.append(float((logits[at, chosen[at]] - logits[at, written[at]]) / logits.abs().max()))
    return FreeRun(len(blocks), count, min(prefixes), sum(prefixes) / len(prefixes), len(gaps), max(gaps, default=0.0))


def write_greedily(decoder: Decoder, prompt: Sequence[int], count: int, stop: Container[int] = ()) -> list[int]:
    """Greedy tokens after a prompt, at most `count`, until `stop`."""
    cache, ids = decoder.new_cache(1, len(prompt) + count), torch.tensor([prompt])
    written: list[int] = []
    while len(written) < count and not (written and written[-1] in stop):
        logits = decoder.run(cache, ids.numpy(), logits_to_keep=1)[names.LOGITS][0, -1]
        written.append(int(logits.argmax()))
        ids = torch.tensor([written[-1:]])
    return written
