"""Bits of every tensor: by its class, by the recipe, by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from transformers import PreTrainedConfig

from dense2moe.export.coverage import classify_tensor, find_decoder_family, find_refusal
from dense2moe.export.errors import ExportError
from dense2moe.export.quantization.blockwise import is_quantized
from dense2moe.export.quantization.config import BitsOverride, QuantizeConfig
from dense2moe.export.quantization.parameters import classify_tensors
from dense2moe.export.variant import QUANTIZED, Device, ElementType, Variant, float_type
from dense2moe.upcycle.models.parts import TensorClass, layer_of

FLOAT_BITS: dict[ElementType, int] = {"float32": 32, "float16": 16, "bfloat16": 16}


def class_bits(variant: Variant, config: QuantizeConfig, device: Device = "cpu") -> dict[TensorClass, int]:
    """Bits of each tensor class: 32, 16, or fewer if quantized.

    32 is float32, 16 is `float_type`.

    Routers and norms always are 32.
    Of variant 'mixed' these are the fewest that a class may have.
    """
    floats = FLOAT_BITS[float_type(variant, device)]
    if variant not in QUANTIZED:
        return {
            "experts": floats,
            "attention": floats,
            "embedding": floats,
            "head": floats,
            "router": 32,
            "norm": 32,
            "bias": floats,
        }
    if variant == "mixed":
        return {"experts": 4, "attention": 4, "embedding": 4, "head": 4, "router": 32, "norm": 32, "bias": floats}
    own = 4 if variant == "int4" else 8

    def choose(setting: str | int) -> int:
        return own if setting == "variant" else floats if setting == 16 else max(own, int(setting))

    attention, embedding = choose(config.attention_bits), choose(config.embedding_bits)
    head = embedding if config.head_bits == "embedding" else choose(config.head_bits)
    return {
        "experts": own,
        "attention": attention,
        "embedding": embedding,
        "head": head,
        "router": 32,
        "norm": 32,
        "bias": floats,
    }


def check_head(config: QuantizeConfig, tied: bool) -> None:
    """Refuse different bits for a head tied to the embedding.

    Raises:
        ExportError: the recipe asks for them.
    """
    if tied and config.head_bits != "embedding":
        raise ExportError(
            f"quantize.head_bits is {config.head_bits!r}, and this model's head is its embedding; leave it out; set "
            "embedding_bits"
        )


def check_overrides(config: QuantizeConfig, model: PreTrainedConfig) -> None:
    """Refuse overrides of layers that do not exist.

    Raises:
        ExportError: there is one.
    """
    if not config.overrides:
        return
    last = int(model.num_hidden_layers) - 1
    for number, override in enumerate(config.overrides):
        if max(override.layers) > last:
            raise ExportError(
                f"quantize.overrides[{number}].layers has {max(override.layers)}; the model's layers are 0 to "
                f"{last}; correct it"
            )


def plan_classes(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorClass]:
    """The class of every tensor.

    By the family's names where there is a builder, by the model's modules where it has to be traced.

    Raises:
        ExportError: neither knows a tensor.
    """
    if find_refusal(config) is not None:
        return classify_tensors(config, shapes)
    family = find_decoder_family(config)
    return {name: classify_tensor(family, name) for name in shapes}


def plan_bits(
    shapes: Mapping[str, tuple[int, ...]],
    classes: Mapping[str, TensorClass],
    bits: Mapping[TensorClass, int],
    overrides: Sequence[BitsOverride] = (),
) -> dict[str, int]:
    """Every tensor's bits by name: its class's, or an override's.

    An override only gives more bits.

    16 there are `bits["bias"]`, which are floats.
    A tensor without elements (a shared expert of width 0) has nothing to quantize.
    """
    raised: dict[tuple[int, TensorClass], int] = {
        (layer, override.tensors): override.bits for override in overrides for layer in override.layers
    }

    def choose(name: str) -> int:
        own, least = bits[classes[name]], raised.get((layer_of(name), classes[name]), 0)
        return max(own, bits["bias"] if least == 16 else least) if is_quantized(own) else own

    return {name: choose(name) if math.prod(shape) else 32 for name, shape in shapes.items()}


def mean_bits(
    bits: Mapping[TensorClass, int],
    plan: Mapping[str, int],
    classes: Mapping[str, TensorClass],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[TensorClass, float]:
    """Each class's bits; the mean over its weights where they differ.

    A class without tensors has those that it would have.
    """
    found: dict[TensorClass, float] = dict(bits)
    for kind in found:
        sizes = {
            name: math.prod(shapes[name]) for name in plan if classes[name] == kind and math.prod(shapes[name]) > 0
        }
        if sizes:
            mean = sum(size * plan[name] for name, size in sizes.items()) / sum(sizes.values())
            found[kind] = int(mean) if mean == int(mean) else round(mean, 3)
    return found
