"""Settings of quantization, graph building and parity, as frozen records."""

from __future__ import annotations

from typing import Annotated, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Variant = Literal["float32", "float16", "int8", "int4"]
Device = Literal["cpu", "cuda"]
ElementType = Literal["float32", "float16"]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def element_type(variant: Variant, device: Device) -> ElementType:
    """What a graph's products, attention and KV cache compute in: CUDA has no float32 kernel that reads quantized experts."""
    match variant:
        case "float32" | "float16":
            return variant
        case "int8" | "int4":
            return "float32" if device == "cpu" else "float16"
        case _:
            assert_never(variant)


def rounds_activations(variant: Variant, config: OnnxConfig) -> bool:
    """Whether a variant's graph rounds what it computes with, to float16 or to 8 bits, and so differs from its twin by more than float32 noise."""
    quantized = variant in ("int8", "int4")
    return element_type(variant, config.device) == "float16" or (quantized and config.activation_bits == 8)


CUDA_BLOCKS = (64, 128)  # the kernel walks the input dimension in tiles of 64; smaller blocks would want a check on a device


class Record(BaseModel):
    """Frozen and strict: unknown keys and values of another type are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class QuantizeConfig(Record):
    """Weight-only quantization of the int8 and int4 variants; routers and norms always stay in float32."""

    method: Literal["round", "search", "gptq"] = Field(
        "gptq",
        description="How integers are chosen: 'round' takes the scale from the largest weight of a block, 'search' takes the scale with the smallest "
        "squared error, 'gptq' also lets weights make up on calibration text for the errors of all that were chosen before them.",
    )
    calibration_tokens: PositiveInt = Field(32768, description="Tokens of the training split that 'gptq' reads, at most.")
    calibrate_all_experts: bool = Field(False, description="Whether in calibration every expert sees all tokens, and not its own alone.")
    input_scaling: Literal["none", "awq"] = Field(
        "none",
        description="'awq' scales what matrices read before they are quantized, folded into the norms and matrices before them, so that weights in "
        "large channels have smaller errors; with any method; learns from the same text.",
    )
    correct_routers: bool = Field(
        False,
        description="Whether routers are fitted to route behind quantized matrices as they did in the float model; learns from the same text.",
    )
    block_size: Literal[16, 32, 64, 128] = Field(32, description="Weights that share one scale, along the input dimension.")
    attention_bits: Literal["variant", 8, 16] = Field(
        8, description="Bits of attention's weights; 16 leaves them as floats; 'variant' follows the variant."
    )
    embedding_bits: Literal["variant", 8, 16] = Field(
        8, description="Bits of the embedding, and of a head that is the embedding; 16 leaves them as floats; 'variant' follows the variant."
    )
    head_bits: Literal["embedding", "variant", 8, 16] = Field(
        "embedding", description="Bits of an output head of its own; 'embedding' follows embedding_bits; 16 leaves it as floats."
    )


class RequestConfig(Record):
    """A request to a decoder at batch 1."""

    prompt_tokens: PositiveInt = Field(256, description="Tokens of the prompt.")
    new_tokens: PositiveInt = Field(64, description="Tokens that follow it.")


class OnnxConfig(Record):
    """The ONNX graph."""

    device: Device = Field(
        "cpu",
        description="Where it is to run. 'cuda' writes quantized variants in float16, as files that both the CPU and CUDA read; they need "
        "quantize.block_size 64 or 128.",
    )
    lowering: Literal["auto", "fused", "grouped", "unrolled"] = Field(
        "auto",
        description="How experts are written: 'fused' is the MoE or QMoE operator, 'grouped' sorts tokens by expert and has two products an "
        "expert, 'unrolled' is a subgraph an expert; 'auto' times those that can express the layers on this machine and keeps the fastest, or takes "
        "the first of them where there is no such device to time on.",
    )
    request: RequestConfig = Field(RequestConfig(), description="The request whose time 'auto' makes shortest.")
    activation_bits: Literal[8, 32] = Field(
        8, description="Precision in which quantized matrix products read activations; 8 rounds them, as other engines do; 32 is exact and slower."
    )


class ParityConfig(Record):
    """How closely each ONNX variant must agree, or the run fails."""

    max_relative_error: NonNegative = Field(
        1e-3,
        description="Graphs that compute in float32 alone: largest logit difference from the torch model, relative to the largest logit.",
    )
    max_kl: NonNegative = Field(1e-3, description="Mean KL divergence in nats from the torch model with the same weights.")
    min_routing_agreement: Share = Field(
        0.97, description="Share of tokens whose top-k experts equal those of the torch model with the same weights, worst layer."
    )
    # Measured on the embedded model: float32 3e-8, float16 1e-5 (its KL 7e-7, where a float32 graph has 3e-10), int8 4e-4, int4 5e-3 in blocks of 16.
    # A limit leaves room for a model that is more sensitive, and float16's for depth: its noise grows layer by layer, and this one has four.
    max_perplexity_increase: dict[Variant, NonNegative] = Field(
        {"float32": 1e-4, "float16": 5e-4, "int8": 0.005, "int4": 0.05}, description="Relative to the fine-tuned model, on held-out text."
    )
    num_blocks: PositiveInt | None = Field(
        None, description="Compare on at most this many held-out blocks, taken evenly; all of the test split without it."
    )
    decode_steps: PositiveInt = Field(16, description="Decode steps chained after a prefill, teacher-forced.")
