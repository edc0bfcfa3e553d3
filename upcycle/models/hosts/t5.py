"""T5 and its kin, whose FFNs have a gate since T5 1.1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dense2moe.upcycle.models.host import READ_FROM, Host, HostHead, HostStack


def _stacks(num_layers: str, layer: str) -> tuple[HostStack, HostStack]:
    """Layers without a gate, and with one."""
    start = "DenseReluDense"
    plain = HostStack(
        num_layers=num_layers,
        layer=layer,
        ffn=start,
        up=f"{start}.wi",
        down=f"{start}.wo",
        norm="layer_norm",
        activation="dense_act_fn",
        inner_dropout="dropout_rate",
        when=("is_gated_act", False),
    )
    gated = replace(plain, gate=f"{start}.wi_0", up=f"{start}.wi_1", when=("is_gated_act", True))
    return plain, gated


_ENCODER = _stacks("num_layers", "encoder.block.{layer}.layer.1")
_DECODER = _stacks("num_decoder_layers", "decoder.block.{layer}.layer.2")


def _heads(start: str) -> Mapping[str, HostHead]:
    return {
        f"{start}ForConditionalGeneration": HostHead("text2text-generation", prefix=""),
        f"{start}ForQuestionAnswering": HostHead("question-answering", prefix=""),
        f"{start}EncoderModel": HostHead("feature-extraction", prefix="", stacks=_ENCODER),
        f"{start}ForTokenClassification": HostHead("token-classification", stacks=_ENCODER),
    }


T5, _MT5, UMT5 = (
    Host(
        model_type=model_type,
        base=f"{start}Model",
        prefix="transformer",
        stacks=(*_ENCODER, *_DECODER),
        heads=_heads(start),
        zero_router="rounding",  # in half precision the dense model keeps its last matrix, and its product, in float32
    )
    for model_type, start in (("t5", "T5"), ("mt5", "MT5"), ("umt5", "UMT5"))
)
MT5 = replace(_MT5, oldest_transformers=READ_FROM)  # 4 scales hidden states before a head that shares its weights

HOSTS = (
    T5,
    MT5,
    UMT5,
)
