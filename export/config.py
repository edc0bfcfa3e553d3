"""Settings of quantization, graph building and parity, as frozen records."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, assert_never

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

Variant = Literal["float32", "float16", "bfloat16", "int8", "int8-qdq", "int4", "mixed"]
Device = Literal["cpu", "cuda"]
ElementType = Literal["float32", "float16", "bfloat16"]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
STATIC: Final = "int8-qdq"
"""The variant whose activations are integers too, with scales that are part of the file."""
QUANTIZED: tuple[Variant, ...] = ("int8", STATIC, "int4", "mixed")
"""The variants whose weights are integers and scales."""


def element_type(variant: Variant, device: Device) -> ElementType:
    """What a graph's products, attention and KV cache compute in.

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
    """What the scales of integers are rounded to, and stored in, where a graph computes in `element`.

    16 bits, in float32 those with its range.
    """
    return "bfloat16" if element == "float32" else element


def float_type(variant: Variant, device: Device) -> ElementType:
    """What a variant's float weights are stored in, but for those of routers and norms."""
    return "bfloat16" if variant == "bfloat16" else element_type(variant, device)


def rounds_activations(variant: Variant, config: OnnxConfig) -> bool:
    """Whether a variant's graph rounds what it computes with, to 16 or to 8 bits.

    And so differs from its twin by more than float32 noise.
    """
    static = variant == STATIC
    return (
        static
        or rounds_to_8_bits(variant, config.device, config.activation_bits)
        or element_type(variant, config.device) != "float32"
    )


def rounds_to_8_bits(variant: Variant, device: Device, activation_bits: int) -> bool:
    """Whether a variant's quantized products round what they read to 8 bits as they run.

    CUDA's read it in their own type.
    """
    return variant in QUANTIZED and variant != STATIC and device == "cpu" and activation_bits == 8


# the kernel walks the input dimension in tiles of 64; smaller blocks would want a check on a device
CUDA_BLOCKS = (
    64,
    128,
)


class Record(BaseModel):
    """Frozen and strict: unknown keys and values of another type are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


_NUMBER = r"[0-9]+\.?[0-9]*|\.[0-9]+"
_SIZE = rf"\s*({_NUMBER})\s*({'|'.join(_UNITS)})\s*"
_PERCENTAGE = rf"\s*({_NUMBER})\s*%\s*"


def _read_size(value: object) -> object:
    """Bytes of a size as people write it, such as '0.6 GB'."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(_SIZE, value)
    if found is None:
        raise ValueError(f"is '{value}'; must be a size such as '0.6 GB', with one of the units {', '.join(_UNITS)}")
    return int(float(found[1]) * _UNITS[found[2]])


def _read_percentage(value: object) -> object:
    """The share that a percentage such as '1 %' is."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(_PERCENTAGE, value)
    if found is None:
        raise ValueError(f"is '{value}'; must be a percentage such as '1 %', or a number such as 0.01")
    return float(found[1]) / 100


NumBytes = Annotated[
    PositiveInt,
    BeforeValidator(_read_size, json_schema_input_type=PositiveInt | Annotated[str, Field(pattern=f"^{_SIZE}$")]),
]
Percentage = Annotated[
    NonNegative,
    BeforeValidator(
        _read_percentage, json_schema_input_type=NonNegative | Annotated[str, Field(pattern=f"^{_PERCENTAGE}$")]
    ),
]


class BitsOverride(Record):
    """Layers in which a class of tensors keeps more bits than its variant gives it."""

    tensors: Literal["experts", "attention"] = Field(description="The class.")
    layers: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)] = Field(
        min_length=1, description="The layers, from 0 on."
    )
    bits: Literal[8, 16] = Field(description="Bits that it has at least; 16 leaves it as floats.")


_SEARCHED_BITS = 8  # and more: by default such weights are searched, and do not learn


class QuantizeConfig(Record):
    """Quantization: of weights alone in the int8, int4 and mixed variants, and of activations too in int8-qdq.

    Routers and norms stay in float32. Variant 'mixed' has 4 or 8 bits or floats in every class of every layer, in the
    embedding and in the head, as measured: the best that fits into `budget`, or the smallest that costs no more than
    `max_perplexity_increase`.

    Variant 'int8-qdq' rounds weights to nearest with a scale a row: of the fields it reads those of calibration and
    those of bits.
    """

    method: Literal["auto", "round", "search", "gptq"] = Field(
        "auto",
        description="How integers are chosen: 'round' takes the scale from the largest weight of a block, 'search' "
        "takes the scale with the smallest "
        "squared error, 'gptq' also lets weights make up on calibration text for the errors of all that were chosen "
        "before them; 'auto' is 'gptq' "
        "for weights of 4 bits, where there is text, and 'search' for those of 8, where it is as good and takes a "
        "fraction of the time.",
    )
    calibration_tokens: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Tokens of the training split that 'gptq' and 'int8-qdq' read, at most; 'auto' is four for each "
        "input of an expert's matrices "
        "where the experts have equal shares, and 8,192 to 32,768 in all.",
    )
    calibrate_all_experts: bool = Field(
        False, description="Whether in calibration every expert sees all tokens, and not its own alone."
    )
    input_scaling: Literal["auto", "none", "awq", "smooth"] = Field(
        "auto",
        description="Scales of what matrices read, folded into the norms and matrices before them; with any method; "
        "learn from the same text. 'awq': "
        "weights in large channels have smaller errors; 'smooth' weighs that against what rounding the inputs to 8 "
        "bits costs; 'auto' is 'smooth' "
        "where the graph rounds them and there is text, and 'none' elsewhere.",
    )
    correct_routers: bool = Field(
        False,
        description="Whether routers are fitted to route behind quantized matrices as they did in the float model; "
        "learns from the same text.",
    )
    activation_range: Literal["largest", "clip"] = Field(
        "clip",
        description="Variant 'int8-qdq': the range of what a product reads. 'largest' reaches the largest magnitude "
        "on calibration text, 'clip' cuts "
        "off where the squared error is smallest.",
    )
    block_size: Literal[16, 32, 64, 128] = Field(
        32, description="Weights that share one scale, along the input dimension."
    )
    zero_points: bool = Field(
        False,
        description="Whether each block has a zero point beside its scale, of a weight's bits, so that its range may "
        "lie on one side of zero.",
    )
    attention_bits: Literal["variant", 8, 16] = Field(
        8, description="Bits of attention's weights; 16 leaves them as floats; 'variant' follows the variant."
    )
    embedding_bits: Literal["variant", 8, 16] = Field(
        8,
        description="Bits of the embedding, and of a head that is the embedding; 16 leaves them as floats; 'variant' "
        "follows the variant.",
    )
    head_bits: Literal["embedding", "variant", 8, 16] = Field(
        "embedding",
        description="Bits of an output head of its own; 'embedding' follows embedding_bits; 16 leaves it as floats.",
    )
    overrides: Annotated[tuple[BitsOverride, ...], Field(strict=False)] = Field(
        (), description="Layers that keep more bits."
    )
    budget: NumBytes | None = Field(
        None,
        description="Variant 'mixed': bytes of its ONNX package at most, such as '0.6 GB'; its bits are those that "
        "lose least within it.",
    )
    max_perplexity_increase: Percentage | None = Field(
        None,
        description="Variant 'mixed': what perplexity on validation text may rise by, such as '1 %'; its bits are "
        "the fewest that keep to it.",
    )
    search_tokens: PositiveInt = Field(
        8192, description="Tokens of the validation split that the search for the bits of 'mixed' reads, at most."
    )

    def method_of(self, bits: int) -> Literal["round", "search", "gptq"]:
        """How a matrix of so many bits is quantized.

        The error of 8 bits is next to nothing beside that of inputs rounded to 8 bits, whichever way they are chosen:
        on SmolLM2-135M with 4 experts the whole model loses as much by searched scales as by GPTQ
        (docs/results/activations.md).
        """
        if self.method != "auto":
            return self.method
        return "search" if bits >= _SEARCHED_BITS else "gptq"


Product = Literal["attention", "experts", "head"]
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
        description="Where it is to run. 'cuda' writes quantized variants in float16, as files that both the CPU and "
        "CUDA read; they need "
        "quantize.block_size 64 or 128.",
    )
    lowering: Literal["auto", "fused", "grouped", "unrolled", "switched"] = Field(
        "auto",
        description="How experts are written: 'fused' is the MoE or QMoE operator, 'grouped' sorts tokens by expert "
        "and has two products an "
        "expert, 'unrolled' is a subgraph an expert; 'switched' is 'fused' for a decode step and 'grouped' for a "
        "prefill, and has quantized experts "
        "twice in the file and in memory; 'auto' times those that can express the layers on this machine and keeps "
        "the fastest, or takes "
        "the first of them where there is no such device to time on.",
    )
    request: RequestConfig = Field(RequestConfig(), description="The request whose time 'auto' makes shortest.")
    activation_bits: Literal[8, 32] = Field(
        8,
        description="Precision in which quantized matrix products read activations; 8 rounds them, as other engines "
        "do; 32 is exact and slower.",
    )
    exact_products: Annotated[tuple[Product, ...], Field(strict=False)] = Field(
        (), description="Quantized products that read activations exactly although `activation_bits` is 8."
    )

    def bits_of(self, product: Product) -> Literal[8, 32]:
        """The precision in which products of a kind read activations."""
        return 32 if product in self.exact_products else self.activation_bits


class ParityConfig(Record):
    """How closely each ONNX variant must agree, or the run fails."""

    max_relative_error: NonNegative = Field(
        1e-3,
        description="Graphs that compute in float32 alone: largest logit difference from the torch model, relative "
        "to the largest logit, however "
        "large the noise.",
    )
    noise_multiple: PositiveFloat = Field(
        32,
        description="Graphs that compute in float32 alone: how many times what float32 torch differs by from float64 "
        "on this text they may differ "
        "from float32 torch, in logits and in every layer.",
    )
    noise_blocks: Annotated[int, Field(ge=0)] = Field(
        4,
        description="Held-out blocks on which that noise is measured, 4 at most; with 0 `max_relative_error` alone "
        "holds, and the model is not read "
        "once more in float64, at 8 bytes a weight.",
    )
    left_padding: bool = Field(
        True, description="Whether rows of different lengths, padded at their left, must be right too."
    )
    longest_row: PositiveInt = Field(
        1024, description="Tokens of the longest row that is checked, where the model's context and the text have them."
    )
    free_tokens: PositiveInt = Field(
        32, description="Tokens that the package writes greedily by itself, beside the torch model."
    )
    max_kl: NonNegative = Field(
        1e-3, description="Mean KL divergence in nats from the torch model with the same weights."
    )
    min_routing_agreement: Share = Field(
        0.97,
        description="Share of tokens whose top-k experts equal those of the torch model with the same weights, worst "
        "layer.",
    )
    # Measured on the embedded model: float32 3e-8, float16 1e-5 (its KL 7e-7, where a float32 graph has 3e-10),
    # bfloat16 2e-4 to either side, int8 4e-4, int8-qdq 4e-3, int4 5e-3 in blocks of 16. A limit leaves room for a model
    # that is more sensitive, and float16's for depth: its noise grows layer by layer, and this one has four.
    max_perplexity_increase: dict[Variant, NonNegative] = Field(
        {
            "float32": 1e-4,
            "float16": 5e-4,
            "bfloat16": 0.002,
            "int8": 0.005,
            "int8-qdq": 0.02,
            "int4": 0.05,
            "mixed": 0.05,
        },
        description="Relative to the fine-tuned model, on held-out text.",
    )
    tasks: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="Files of tasks, beside the recipe or below the current directory: JSON lines of prompt, choices "
        "and answer (accuracy), of "
        "prompt and answer (F1), or of texts and score (rank correlation).",
    )
    max_score_drop: dict[Variant, NonNegative] = Field(
        {
            "float32": 0.0,
            "float16": 0.005,
            "bfloat16": 0.005,
            "int8": 0.005,
            "int8-qdq": 0.02,
            "int4": 0.02,
            "mixed": 0.02,
        },
        description="What a task's score may lie below the fine-tuned model's by, beside two standard errors of the "
        "difference over its examples.",
    )
    num_examples: Annotated[int, Field(ge=2)] = Field(100, description="Examples of a task at most, taken evenly.")
    answer_tokens: PositiveInt = Field(32, description="Tokens of a written answer at most.")
    language_tokens: PositiveInt = Field(
        4096,
        description="Held-out tokens on which perplexities are compared, in blocks taken evenly; the perplexity of "
        "all text is the fine-tuned "
        "model's there times the ratio of both.",
    )
    num_blocks: PositiveInt | None = Field(None, description="The same in blocks, instead of `language_tokens`.")
    decode_steps: PositiveInt = Field(16, description="Decode steps chained after a prefill, teacher-forced.")
