"""Settings of quantization, graph building and parity, as frozen records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Variant = Literal["float32", "int8", "int4"]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
    """Frozen and strict: unknown keys and values of another type are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class QuantizeConfig(Record):
    """Weight-only quantization of the int8 and int4 variants; routers and norms always stay in float32."""

    method: Literal["round", "search", "gptq"] = Field(
        "gptq",
        description="How integers are chosen: 'round' takes the scale from the largest weight of a block, 'search' takes the scale with the smallest "
        "squared error, 'gptq' also lets later weights make up for the errors of earlier ones on calibration text.",
    )
    calibration_tokens: PositiveInt = Field(32768, description="Tokens of the training split that 'gptq' reads, at most.")
    calibrate_all_experts: bool = Field(False, description="Whether in calibration every expert sees all tokens, and not its own alone.")
    block_size: Literal[16, 32, 64, 128] = Field(32, description="Weights that share one scale, along the input dimension.")
    attention_bits: Literal["variant", 8, 16] = Field(
        8, description="Bits of attention's weights; 16 leaves them in float32; 'variant' follows the variant."
    )
    embedding_bits: Literal["variant", 8, 16] = Field(
        8, description="Bits of the embedding and the output head; 16 leaves them in float32; 'variant' follows the variant."
    )


class RequestConfig(Record):
    """A request to a decoder at batch 1."""

    prompt_tokens: PositiveInt = Field(256, description="Tokens of the prompt.")
    new_tokens: PositiveInt = Field(64, description="Tokens that follow it.")


class OnnxConfig(Record):
    """The ONNX graph."""

    lowering: Literal["auto", "fused", "grouped", "unrolled"] = Field(
        "auto",
        description="How experts are written: 'fused' is the MoE or QMoE operator, 'grouped' sorts tokens by expert and has two products an "
        "expert, 'unrolled' is a subgraph an expert; 'auto' times those that can express the layers on this machine and keeps the fastest.",
    )
    request: RequestConfig = Field(RequestConfig(), description="The request whose time 'auto' makes shortest.")
    activation_bits: Literal[8, 32] = Field(
        8, description="Precision in which quantized matrix products read activations; 8 rounds them, as other engines do; 32 is exact and slower."
    )


class ParityConfig(Record):
    """How closely each ONNX variant must agree, or the run fails."""

    max_relative_error: NonNegative = Field(
        1e-3, description="float32: largest logit difference from the torch model, relative to the largest logit."
    )
    max_kl: NonNegative = Field(1e-3, description="Quantized: mean KL divergence in nats from the torch model with the same integers.")
    min_routing_agreement: Share = Field(
        0.97, description="Share of tokens whose top-k experts equal those of the torch model with the same integers, worst layer."
    )
    max_perplexity_increase: dict[Variant, NonNegative] = Field(
        {"float32": 1e-4, "int8": 0.005, "int4": 0.05}, description="Relative to the fine-tuned model, on held-out text."
    )
    num_blocks: PositiveInt | None = Field(
        None, description="Compare on at most this many held-out blocks, taken evenly; all of the test split without it."
    )
    decode_steps: PositiveInt = Field(16, description="Decode steps chained after a prefill, teacher-forced.")
