"""The variants of a package: their names, devices and element types."""

from __future__ import annotations

from typing import Final, Literal, assert_never

Variant = Literal["float32", "float16", "bfloat16", "int8", "int8-qdq", "int4", "mixed"]
Device = Literal["cpu", "cuda"]
ElementType = Literal["float32", "float16", "bfloat16"]
STATIC: Final = "int8-qdq"
"""The variant whose activations are integers too, with scales that are part of the file."""

QUANTIZED: tuple[Variant, ...] = ("int8", STATIC, "int4", "mixed")
"""The variants whose weights are integers and scales."""


def element_type(variant: Variant, device: Device) -> ElementType:
    """The type in which products, attention and KV cache compute.

    CUDA has no float32 kernel that reads quantized experts. The CPU has no bfloat16 kernel that computes: there a
    bfloat16 graph computes in float32.
    """
    match variant:
        case "float32" | "float16":
            return variant
        case "bfloat16":
            return "float32" if device == "cpu" else "bfloat16"
        case "int8-qdq":
            return "float32"
        case "int8" | "int4" | "mixed":
            return "float32" if device == "cpu" else "float16"
        case _:
            assert_never(variant)


def scale_type(element: ElementType) -> ElementType:
    """The type in which scales of integers are stored.

    What they are rounded to where a graph computes in `element`.

    16 bits, in float32 those with its range.
    """
    return "bfloat16" if element == "float32" else element


def float_type(variant: Variant, device: Device) -> ElementType:
    """The type of a variant's stored float weights.

    Routers and norms stay in float32.
    """
    return "bfloat16" if variant == "bfloat16" else element_type(variant, device)


def rounds_to_8_bits(variant: Variant, device: Device, activation_bits: int) -> bool:
    """Whether a variant's quantized products round their inputs to 8 bits.

    CUDA's read it in their own type.
    """
    return variant in QUANTIZED and variant != STATIC and device == "cpu" and activation_bits == 8


# the kernel walks the input dimension in tiles of 64; smaller blocks would want a check on a device
CUDA_BLOCKS = (
    64,
    128,
)
