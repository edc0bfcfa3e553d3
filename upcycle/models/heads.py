"""Heads: what stands on a model's layers, by class.

A dense family and its target are described with one head, most often the next token's. What else transformers has for
both is here: the same layers under another class, whose tensors may have other names, and the head's own matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dense2moe.upcycle.models.parts import Matrix, Part

TASK_OF_HEAD: Mapping[str, str] = {
    "Model": "feature-extraction",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForTokenClassification": "token-classification",
    "ForSequenceClassification": "text-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForMaskedImageModeling": "masked-im",
    "ForConditionalGeneration": "text2text-generation",
    "ForCTC": "automatic-speech-recognition",
    "ForAudioClassification": "audio-classification",
    "EncoderModel": "feature-extraction",
}
"""Tasks, as Hugging Face names them, by how the class of a model ends."""

LABEL_FIELDS = ("id2label", "label2id", "problem_type")
"""Config fields of models with labels."""

PARTS_FIELD = "task_heads"
"""The config field of a head that several tasks share: the name, task, labels and problem of each, in their order."""

LABEL_DROPOUTS = ("classifier_dropout", "hidden_dropout", "token_classification_bias")
"""Undeclared config fields that transformers' generic heads read, where a config has them."""


@dataclass(frozen=True)
class Head:
    """Another head of an architecture.

    ends: how its class's name ends. base: what the names of the base model's tensors begin with there. parts: its own
    tensors. fields: config fields that a target needs, whatever the source says. refusal: why no target has it.
    """

    ends: str
    parts: Mapping[Part, Matrix] = field(default_factory=dict)
    base: str = "model."
    fields: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None


def split_class(architecture: str) -> tuple[str, str]:
    """A class's name without its head, and the head: "Llama" and "ForCausalLM"."""
    ends = max((ends for ends in TASK_OF_HEAD if architecture.endswith(ends)), key=len, default="")
    return architecture[: len(architecture) - len(ends)], ends


def generic_heads(answers: str = "model.") -> tuple[Head, ...]:
    """The heads that transformers gives to every decoder (modeling_layers.py, 5.23).

    `answers` is what the base model's tensors begin with below the head for questions.
    """
    score, outputs = (f"{name}.weight" for name in ("score", "qa_outputs"))
    return (
        Head("Model", base=""),
        Head("ForTokenClassification", {"label_head": Matrix(score), "label_head_bias": Matrix("score.bias")}),
        Head("ForSequenceClassification", {"label_head": Matrix(score)}),
        Head(
            "ForQuestionAnswering",
            {"label_head": Matrix(outputs), "label_head_bias": Matrix("qa_outputs.bias")},
            base=answers,
        ),
    )
