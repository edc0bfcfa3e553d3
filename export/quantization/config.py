"""Settings of quantization."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from dense2moe.upcycle.record import NonNegative, Record

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
    """The share in a percentage such as '1 %'."""
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
    """Layers in which a tensor class keeps more bits than elsewhere."""

    tensors: Literal["experts", "attention"] = Field(description="The class.")
    layers: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)] = Field(
        min_length=1, description="The layers, from 0 on."
    )
    bits: Literal[8, 16] = Field(description="Smallest number of bits; 16 leaves the class as floats.")


_SEARCHED_BITS = 8  # and more: by default such weights are searched, and do not learn


class QuantizeConfig(Record):
    """Quantization of weights, and of activations in variant int8-qdq.

    Routers and norms stay in float32. Variant 'mixed' has 4 or 8 bits or floats in every class of every layer, in the
    embedding and in the head, as measured: the best that fits into `budget`, or the smallest that costs no more than
    `max_perplexity_increase`.

    Variant 'int8-qdq' rounds weights to nearest with a scale a row: it reads only the fields of calibration
    and of bits.
    """

    method: Literal["auto", "round", "search", "gptq"] = Field(
        "auto",
        description="How integers are chosen: 'round' takes the scale from the largest weight of a block, 'search' "
        "takes the scale with the smallest squared error, 'gptq' also lets weights compensate, on "
        "calibration text, the errors of all weights rounded before them. 'auto' is 'gptq' for weights of 4"
        " bits, if there is text, and 'search' for 8 bits, where it is as good and takes a fraction of the "
        "time.",
    )
    calibration_tokens: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Largest number of tokens of the training split that 'gptq' and 'int8-qdq' read; 'auto' is four for"
        " each input of an expert's matrices if experts have equal shares, and between 8,192 and 32,768.",
    )
    calibrate_all_experts: bool = Field(
        False, description="Show every expert all tokens in calibration, not only its own."
    )
    input_scaling: Literal["auto", "none", "awq", "smooth"] = Field(
        "auto",
        description="Scales of the inputs of matrices, folded into the norms and matrices before them; combines with "
        "any method, and learns from the same text. 'awq' reduces the errors of weights in large channels; "
        "'smooth' weighs them against the error of rounding inputs to 8 bits; 'auto' is 'smooth' if the "
        "graph rounds inputs and there is text, else 'none'.",
    )
    correct_routers: bool = Field(
        False,
        description="Fit routers, on the same text, to route after quantized layers as they did in the float model.",
    )
    activation_range: Literal["largest", "clip"] = Field(
        "clip",
        description="Variant 'int8-qdq': range of a product's input. 'largest' reaches the largest magnitude on "
        "calibration text, 'clip' cuts off where the squared error is smallest.",
    )
    block_size: Literal[16, 32, 64, 128] = Field(
        32, description="Weights that share one scale, along the input dimension."
    )
    zero_points: bool = Field(
        False,
        description="Give each block a zero point beside its scale, with as many bits as a weight, so that its range "
        "may lie on one side of zero.",
    )
    attention_bits: Literal["variant", 8, 16] = Field(
        8, description="Bits of attention's weights; 16 leaves them as floats; 'variant' follows the variant."
    )
    embedding_bits: Literal["variant", 8, 16] = Field(
        8,
        description="Bits of the embedding, and of a tied head; 16 leaves them as floats; 'variant' follows the "
        "variant.",
    )
    head_bits: Literal["embedding", "variant", 8, 16] = Field(
        "embedding",
        description="Bits of an untied head; 'embedding' follows embedding_bits; 16 leaves it as floats.",
    )
    overrides: Annotated[tuple[BitsOverride, ...], Field(strict=False)] = Field(
        (), description="Layers that keep more bits."
    )
    budget: NumBytes | None = Field(
        None,
        description="Variant 'mixed': largest size of its ONNX package, such as '0.6 GB'; it takes the bits that lose "
        "least within this size.",
    )
    max_perplexity_increase: Percentage | None = Field(
        None,
        description="Variant 'mixed': largest increase of perplexity on validation text, such as '1 %'; it takes the "
        "fewest bits within this limit.",
    )
    search_tokens: PositiveInt = Field(
        8192,
        description="Largest number of tokens of the validation split that the search for the bits of 'mixed' reads.",
    )

    def method_of(self, bits: int) -> Literal["round", "search", "gptq"]:
        """The method that quantizes a matrix with this number of bits.

        The error of 8 bits is next to nothing beside that of inputs rounded to 8 bits, whichever way they are chosen:
        on SmolLM2-135M with 4 experts the whole model loses as much by searched scales as by GPTQ
        (docs/results/activations.md).
        """
        if self.method != "auto":
            return self.method
        return "search" if bits >= _SEARCHED_BITS else "gptq"
