"""Names of graph values, made and parsed in one place.

Builders give values these names, the runtime binds them, parity looks at them; a test holds that no other module spells
one. Inputs and outputs have the names that onnxruntime-genai takes by default, and that other exporters give:

    input_ids, attention_mask, position_ids     [B, S], [B, P + S], [B, S]; positions in packages of other makers alone
    past_key_values.N.key, .value               [B, heads, P, head_dim] of layer N, and as outputs present.N.key, .value
    logits                                      [B, S, V]

Of an encoder and a decoder these are the names of two graphs, as optimum has them. The encoder gives
`last_hidden_state` [B, R, H]; the decoder reads `input_ids`, and besides:

    encoder_attention_mask, encoder_hidden_states   [B, R], [B, R, H]
    past_key_values.N.decoder.key, .value           [B, heads, P, head_dim] of its attention to itself
    past_key_values.N.encoder.key, .value           [B, heads, R, head_dim] of its attention to the encoder
    use_cache_branch                                [1], whether the latter are given

Inside the graph a layer's values begin with `layers.N.`, but for the two that are shown of every decoder, traced ones
too: `router_logits.N` [T, E] and `hidden.N` [B, S, H], the residual stream behind layer N. What a builder names for
itself alone has a stem of its own (`layers.N.ffn.gate_up`) and no function here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

CacheKind = Literal["key", "value"]
CACHE_KINDS: tuple[CacheKind, ...] = ("key", "value")
Attended = Literal["decoder", "encoder"]
ATTENDED: tuple[Attended, ...] = ("decoder", "encoder")
"""What the decoder of an encoder-decoder attends to: itself, and the encoder."""
INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
LAST_HIDDEN_STATE = "last_hidden_state"
ENCODER_HIDDEN_STATES = "encoder_hidden_states"
ENCODER_ATTENTION_MASK = "encoder_attention_mask"
USE_CACHE_BRANCH = "use_cache_branch"
TOKEN_TYPE_IDS = "token_type_ids"  # noqa: S105
LOGITS = "logits"
FIRST_LOGIT = "first_logit"
"""The input [1] that our runtime adds: the first token that the head multiplies."""
ROUTER_NUDGE = "router_nudge"
"""The input [T or 1, E] that our runtime adds: what is added to the router logits of every layer."""

EMBEDDED = "embedded"
ENTERED = "entered"
"""What the first layer reads, where more than a table of tokens makes it."""
FINAL_NORMED = "final_normed"
"""What the head multiplies [B, S, H]."""
MULTIPLIED, NORMED = "_multiplied", "_normed"
"""Ends of names: a block's output times a factor, or behind a norm of its own."""

_PAST, _PRESENT = "past_key_values", "present"
_ROUTER_LOGITS, _HIDDEN, _LAYER = "router_logits", "hidden", "layers"
_SELECTION = "biased_scores"
_STATE = re.compile(rf"(?:{_PAST}|{_PRESENT})\.(\d+)\.(key|value)")
_TAP = re.compile(rf"(?:({_ROUTER_LOGITS}|{_HIDDEN})\.(\d+)|({_LAYER})\.(\d+)\.moe\.{_SELECTION})")


class State(NamedTuple):
    """A cached key or value: its layer, and which of the two."""

    layer: int
    kind: CacheKind


def past(layer: int, kind: CacheKind, attended: Attended | None = None) -> str:
    """The input of a layer's cached keys or values.

    `attended` tells which of a decoder with an encoder beside it.
    """
    return ".".join([_PAST, str(layer), *([attended] if attended else []), kind])


def present(layer: int, kind: CacheKind, attended: Attended | None = None) -> str:
    """Output of a layer's cached keys or values, new tokens included."""
    return present_of(past(layer, kind, attended))


def present_of(past_name: str) -> str:
    """The output that continues a cache input."""
    return _PRESENT + past_name.removeprefix(_PAST)


def is_past(name: str) -> bool:
    """Whether an input is one of the cache's."""
    return name.startswith(f"{_PAST}.")


def attends_to_encoder(name: str) -> bool:
    """Whether a cached key or value is of attention to an encoder."""
    return name.split(".")[2:3] == ["encoder"]


def is_state(name: str) -> bool:
    """Whether an input or output is one of the cache's."""
    return name.startswith((f"{_PAST}.", f"{_PRESENT}."))


def parse_state(name: str) -> State | None:
    """Layer and kind of a cache value; None for any other name."""
    found = _STATE.fullmatch(name)
    return None if found is None else State(int(found[1]), cast(CacheKind, found[2]))


def count_layers(inputs: Iterable[str]) -> int:
    """Number of layers whose keys and values a graph reads."""
    return sum(map(is_past, inputs)) // len(CACHE_KINDS)


def genai_names() -> dict[str, dict[str, str]]:
    """Names of inputs and outputs for onnxruntime-genai, `%d` being a layer."""
    states = {
        side: {f"{side}_{kind}_names": f"{stem}.%d.{kind}" for kind in CACHE_KINDS}
        for side, stem in (("past", _PAST), ("present", _PRESENT))
    }
    return {
        "inputs": {INPUT_IDS: INPUT_IDS, ATTENTION_MASK: ATTENTION_MASK, **states["past"]},
        "outputs": {LOGITS: LOGITS, **states["present"]},
    }


def router_logits(layer: int) -> str:
    """The router's product of a layer [T, E]."""
    return f"{_ROUTER_LOGITS}.{layer}"


def is_router_logits(name: str) -> bool:
    """Whether a value is some layer's router logits."""
    return name.startswith(f"{_ROUTER_LOGITS}.")


def nudged(router: str) -> str:
    """Router logits with the nudge added."""
    return f"{router}.nudged"


def hidden(layer: int) -> str:
    """The residual stream after a layer [B, S, H]."""
    return f"{_HIDDEN}.{layer}"


def is_hidden(name: str) -> bool:
    """Whether a value is the residual stream after some layer."""
    return name.startswith(f"{_HIDDEN}.")


def in_layer(layer: int, part: str) -> str:
    """A value inside a layer."""
    return f"{_LAYER}.{layer}.{part}"


def attention_normed(layer: int) -> str:
    """Attention's input: after its norm."""
    return in_layer(layer, "normed")


def query_key_value(layer: int) -> str:
    """Queries, keys and values of new tokens, side by side."""
    return in_layer(layer, "query_key_value")


def attention(layer: int) -> str:
    """Output of the heads, side by side, before the output matrix."""
    return in_layer(layer, "attention")


def attention_output(layer: int) -> str:
    """Attention's output, after its output matrix."""
    return in_layer(layer, "attention_output")


def attended(layer: int) -> str:
    """The residual stream between attention and the FFN."""
    return in_layer(layer, "attended")


def ffn_normed(layer: int) -> str:
    """The FFN's input: after its norm."""
    return in_layer(layer, "ffn_normed")


def ffn_output(layer: int) -> str:
    """Output of the FFN or the experts."""
    return in_layer(layer, "ffn_output")


def experts(layer: int) -> str:
    """The experts of a layer; their own values begin with this name."""
    return in_layer(layer, "moe")


def mixed(layer: int) -> str:
    """The sum of experts and a shared expert."""
    return in_layer(layer, "mixed")


def is_mixed(name: str) -> bool:
    """Whether a value is the sum of experts and a shared expert."""
    return name.endswith(".mixed")


def selection_scores(experts_name: str) -> str:
    """Scores [T, E] by which experts are chosen.

    Only where router logits alone do not choose.
    """
    return f"{experts_name}.{_SELECTION}"


def order_tap(name: str) -> tuple[str, int] | None:
    """Stem and layer of a value that every layer shows.

    The residual stream, router logits or selection scores.

    None of any other value.
    """
    found = _TAP.fullmatch(name)
    return None if found is None else (found[1] or found[3], int(found[2] or found[4]))
