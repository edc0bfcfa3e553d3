"""BART's kin and Whisper: layers that hold the FFN's matrices themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dense2moe.upcycle.models.host import Host, HostHead, HostStack

_ENCODER = HostStack(
    num_layers="encoder_layers",
    layer="encoder.layers.{layer}",
    ffn="fc1",
    passed=("activation_fn", "fc2"),
    up="fc1",
    down="fc2",
    norm="final_layer_norm",
    activation="activation_function",
    inner_dropout="activation_dropout",
    rates=("activation_dropout",),
)
_DECODER = replace(_ENCODER, num_layers="decoder_layers", layer="decoder.layers.{layer}")
PRE_NORM = (_ENCODER, _DECODER)
POST_NORM = (replace(_ENCODER, norm="self_attn_layer_norm"), replace(_DECODER, norm="encoder_attn_layer_norm"))


def _heads(start: str, stacks: tuple[HostStack, HostStack]) -> Mapping[str, HostHead]:
    """The decoder alone."""
    return {f"{start}ForCausalLM": HostHead("text-generation", stacks=stacks[1:])}


BART = Host(model_type="bart", base="BartModel", prefix="model", stacks=POST_NORM, heads=_heads("Bart", POST_NORM))
MBART = Host(model_type="mbart", base="MBartModel", prefix="model", stacks=PRE_NORM, heads=_heads("MBart", PRE_NORM))
PLBART = Host(
    model_type="plbart", base="PLBartModel", prefix="model", stacks=POST_NORM, heads=_heads("PLBart", POST_NORM)
)
BLENDERBOT = Host(
    model_type="blenderbot",
    base="BlenderbotModel",
    prefix="model",
    stacks=PRE_NORM,
    heads=_heads("Blenderbot", PRE_NORM),
)
BLENDERBOT_SMALL = Host(
    model_type="blenderbot-small",
    base="BlenderbotSmallModel",
    prefix="model",
    stacks=POST_NORM,
    heads=_heads("BlenderbotSmall", POST_NORM),
)
PEGASUS = Host(
    model_type="pegasus",
    base="PegasusModel",
    prefix="model",
    stacks=PRE_NORM,
    heads=_heads("Pegasus", PRE_NORM),
)
MARIAN = Host(
    model_type="marian",
    base="MarianModel",
    prefix="model",
    stacks=POST_NORM,
    heads={"MarianMTModel": HostHead("text2text-generation"), **_heads("Marian", POST_NORM)},
)
M2M_100 = Host(
    model_type="m2m_100",
    base="M2M100Model",
    prefix="model",
    stacks=PRE_NORM,
    dropped=("model.*.embed_positions.weights", "model.*.version"),
)
LED = Host(model_type="led", base="LEDModel", prefix="led", stacks=POST_NORM)
WHISPER = Host(
    model_type="whisper",
    base="WhisperModel",
    prefix="model",
    stacks=PRE_NORM,
    heads={
        "WhisperForConditionalGeneration": HostHead("automatic-speech-recognition"),
        "WhisperForAudioClassification": HostHead("audio-classification", prefix="", stacks=PRE_NORM[:1]),
        **_heads("Whisper", PRE_NORM),
    },
)

HOSTS = (
    BART,
    MBART,
    PLBART,
    BLENDERBOT,
    BLENDERBOT_SMALL,
    PEGASUS,
    MARIAN,
    M2M_100,
    LED,
    WHISPER,
)
