"""Passes for the receipt: logits, hidden states, and what routers do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.building.receipt_text import DECODE_STEPS
from dense2moe.upcycle.checkpoints.loaded import router_modules, router_weights


def real_logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cached: bool) -> torch.Tensor:
    """Float32 logits [tokens, vocabulary] of the real tokens; pads are dropped.

    Token ids and mask are [B, S]; see `_logits`.
    """
    logits = _logits(model, ids, mask, cached)
    return logits[mask[:, -logits.shape[1] :].bool()]


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cached: bool) -> torch.Tensor:
    """Float32 logits [B, S, vocabulary] of ids and mask [B, S].

    `cached`: of the last steps alone, decoded token by token after a prefill.
    An encoder-decoder reads the ids twice, as its input and as what it is to say.
    """
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:  # the encoder by itself: Switch refuses `use_cache` in a call that encodes too
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
        given = {"encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": ids}
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    if not cached:
        return cast(torch.Tensor, model(**given, use_cache=False).logits).to(torch.float32)
    prompt = ids.shape[1] - DECODE_STEPS
    logits, past = [], None
    for start, stop in [(0, prompt), *((n, n + 1) for n in range(prompt, ids.shape[1]))]:
        step = given | {name: ids[:, start:stop]}
        if not model.config.is_encoder_decoder:
            step["attention_mask"] = mask[:, :stop]
        output = model(**step, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits[:, -1:])
    return torch.cat(logits[1:], dim=1).to(torch.float32)


@torch.no_grad()
def real_states(model: PreTrainedModel, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Output of a one-layer model at the real tokens: float32 [tokens, H].

    Its input is states [B, S, H].
    """
    given = model(inputs_embeds=states.to(model.dtype), attention_mask=mask, use_cache=False).last_hidden_state
    return cast(torch.Tensor, given[mask.bool()].to(torch.float32))


@contextmanager
def set_router(model: PreTrainedModel, router: str) -> Iterator[None]:
    """Context manager: the model's routers are unchanged ("shipped") or all zero."""
    weights = [] if router == "shipped" else list(router_weights(model))
    saved = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    yield
    with torch.no_grad():
        for weight, old in zip(weights, saved, strict=True):
            weight.copy_(old)


@contextmanager
def watch_groups(model: PreTrainedModel, size: int) -> Iterator[list[float]]:
    """Context manager: collects shares of tokens sent to whole FFN copies.

    A share for each layer.

    `size` experts are one copy; where it is 1, nothing is collected.
    """
    coverage: list[float] = []

    def watch(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        copies = (output[2] // size).sort(-1).values.view(len(output[2]), -1, size)
        coverage.append(float((copies == copies[..., :1]).all(-1).all(-1).float().mean()))

    handles = [router.register_forward_hook(watch) for router in router_modules(model)] if size > 1 else []
    yield coverage
    for handle in handles:
        handle.remove()
