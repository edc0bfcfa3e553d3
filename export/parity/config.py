"""Settings of parity: its limits, texts and tasks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from dense2moe.export.variant import Variant
from dense2moe.upcycle.record import NonNegative, Record

Share = Annotated[float, Field(ge=0, le=1)]


class ParityConfig(Record):
    """How closely each ONNX variant must agree, or the run fails."""

    max_relative_error: NonNegative = Field(
        1e-3,
        description="Graphs that compute in float32 alone: largest logit error against the torch model, relative to the"
        " largest logit, whatever the noise.",
    )
    noise_multiple: PositiveFloat = Field(
        32,
        description="Graphs that compute in float32 alone: allowed error, as a multiple of float32 torch's own error "
        "against float64 on this text, in logits and in every layer.",
    )
    noise_blocks: Annotated[int, Field(ge=0)] = Field(
        4,
        description="Held-out blocks on which that error is measured, 4 at most; with 0 `max_relative_error` is the "
        "only limit, and the model is not read once more in float64, at 8 bytes a weight.",
    )
    left_padding: bool = Field(True, description="Also judge rows of different lengths, padded on the left.")
    longest_row: PositiveInt = Field(
        1024, description="Tokens of the longest row that is checked, as far as the model's context and the text reach."
    )
    free_tokens: PositiveInt = Field(
        32, description="Tokens that the package decodes greedily by itself, beside the torch model."
    )
    max_kl: NonNegative = Field(
        1e-3, description="Mean KL divergence in nats from the torch model with the same weights."
    )
    min_routing_agreement: Share = Field(
        0.97,
        description="Share of tokens that visit the same top-k experts as in the torch model with the same weights, "
        "worst layer.",
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
        description="Largest relative increase of perplexity over the fine-tuned model, on held-out text.",
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
        description="Largest allowed drop of a task's score below the fine-tuned model's, plus two standard errors of "
        "the difference over its examples.",
    )
    num_examples: Annotated[int, Field(ge=2)] = Field(100, description="Examples of a task to read, taken evenly.")
    answer_tokens: PositiveInt = Field(32, description="Largest number of tokens of a written answer.")
    language_tokens: PositiveInt = Field(
        4096,
        description="Held-out tokens on which perplexities are compared, in blocks taken evenly. The perplexity of all "
        "text is the fine-tuned model's perplexity times the ratio measured here.",
    )
    num_blocks: PositiveInt | None = Field(
        None, description="Blocks on which perplexities are compared, instead of `language_tokens`."
    )
    decode_steps: PositiveInt = Field(16, description="Decode steps chained after a prefill, teacher-forced.")
