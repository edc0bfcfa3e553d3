"""Settings of the ONNX graph."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from dense2moe.export.variant import STATIC, Device, Variant, element_type, rounds_to_8_bits
from dense2moe.upcycle.record import Record


def rounds_activations(variant: Variant, config: OnnxConfig) -> bool:
    """Whether a variant's graph rounds activations to 16 or 8 bits.

    And so differs from its twin by more than float32 noise.
    """
    static = variant == STATIC
    return (
        static
        or rounds_to_8_bits(variant, config.device, config.activation_bits)
        or element_type(variant, config.device) != "float32"
    )


ProductKind = Literal["attention", "experts", "head"]
"""Kinds of quantized products.

An FFN that stands beside experts or in their place counts as one, in a traced decoder as attention.
"""


class RequestConfig(Record):
    """A request to a decoder at batch 1."""

    prompt_tokens: PositiveInt = Field(256, description="Tokens of the prompt.")
    new_tokens: PositiveInt = Field(64, description="Tokens that follow it.")


class OnnxConfig(Record):
    """The ONNX graph."""

    device: Device = Field(
        "cpu",
        description="Where the graph runs. 'cuda' writes quantized variants in float16, as files that both the CPU and "
        "CUDA read; they need quantize.block_size 64 or 128.",
    )
    lowering: Literal["auto", "fused", "grouped", "unrolled", "switched"] = Field(
        "auto",
        description="How experts are written: 'fused' is the MoE or QMoE operator; 'grouped' sorts tokens by expert and"
        " has two products an expert; 'unrolled' is a subgraph an expert; 'switched' is 'fused' for a "
        "decode step and 'grouped' for a prefill, and stores quantized experts twice. 'auto' times the "
        "lowerings that can express the layers on this machine and keeps the fastest; without such a device"
        " to time on it takes the first of them.",
    )
    request: RequestConfig = Field(RequestConfig(), description="The request that 'auto' makes fastest.")
    activation_bits: Literal[8, 32] = Field(
        8,
        description="Precision in which quantized matrix products read activations: 8 rounds them, as other engines do;"
        " 32 is exact and slower.",
    )
    exact_products: Annotated[tuple[ProductKind, ...], Field(strict=False)] = Field(
        (), description="Quantized products that read activations exactly even if `activation_bits` is 8."
    )

    def bits_of(self, product: ProductKind) -> Literal[8, 32]:
        """The precision in which products of a kind read activations."""
        return 32 if product in self.exact_products else self.activation_bits
