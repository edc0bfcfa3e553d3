"""The interfaces of a model's traced graphs: files, inputs and outputs.

Names are those of transformers and so of optimum: `input_ids`, `attention_mask`, `token_type_ids` where a model has
more than one type; `pixel_values`; `input_features` or `input_values`; `logits` of a head, `start_logits` and
`end_logits`, `last_hidden_state` of a model without a head. Of a decoder past keys and values are added, by the tracer.

A model is one graph, but for an encoder and a decoder together. These are two, in optimum's files: the encoder gives
`last_hidden_state`, which the decoder reads as `encoder_hidden_states`, with the text's mask as
`encoder_attention_mask` where there is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from dense2moe.export import names
from dense2moe.export.errors import ExportError
from dense2moe.export.storage import DECODER_NAME, ENCODER_NAME, MODEL_NAME
from dense2moe.upcycle.models.context import find_context, is_causal
from dense2moe.upcycle.models.table import find_host

BATCH, PAST, NEW, ENCODED = 2, 5, 3, 7
"""Sizes of the traced example: all different, none of them 0 or 1."""

ModelPart = Literal["whole", "encoder", "decoder"]

_TEXT_AXES = {0: "batch_size", 1: "sequence_length"}
_ENCODED_AXES = {0: "batch_size", 1: "encoder_sequence_length"}
_SOUND_SAMPLES, _SOUND_FRAMES = 4000, 40


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph: an example and named free axes.

    `argument` is the forward's name for it where that is another, and `in_tuple` whether it takes a tuple of it.
    """

    example: torch.Tensor
    axes: Mapping[int, str]
    argument: str | None = None
    in_tuple: bool = False


@dataclass(frozen=True)
class Interface:
    """What a graph reads, by name, and whether it has a cache.

    `most_tokens` is the longest text that the model's positions are made for; `file` holds the graph of `part`.
    """

    inputs: Mapping[str, GraphInput]
    has_cache: bool = False
    most_tokens: int = 512
    part: ModelPart = "whole"
    file: str = MODEL_NAME

    def list_arguments(self) -> dict[str, Any]:
        """The forward's arguments of the example."""
        return {each.argument or name: _nest(each, each.example) for name, each in self.inputs.items()}

    def list_axes(self, free: Any) -> dict[str, Any]:
        """The forward's arguments, with `free` for each free axis."""
        return {
            each.argument or name: _nest(each, dict.fromkeys(each.axes, free)) for name, each in self.inputs.items()
        }

    def make_inputs(self, batch_size: int, length: int) -> dict[str, torch.Tensor]:
        """The traced example's inputs, repeated to other sizes.

        As many rows, and tokens where there are some.
        """
        made = {}
        for name, each in self.inputs.items():
            value = each.example[:1].expand(batch_size, *each.example.shape[1:])
            if each.axes.get(1) == _TEXT_AXES[1]:
                value = value[:, :1].expand(batch_size, length)
            made[name] = value.contiguous()
        return made


def _nest(each: GraphInput, value: Any) -> Any:
    return (value,) if each.in_tuple else value


def find_interfaces(model: PreTrainedModel) -> tuple[Interface, ...]:
    """The interfaces of a model's graphs.

    One, or an encoder's and a decoder's.

    Raises:
        ExportError: it has an encoder and a decoder and writes no text, or reads what is not known here.
    """
    config = model.config
    if not config.is_encoder_decoder:
        return (find_interface(model),)
    if not model.can_generate():
        raise ExportError(
            f"config.json: {type(model).__name__} has an encoder and a decoder and writes no text; two graphs are "
            "written of classes with logits of the next token, one of an encoder by itself"
        )
    known = inspect.signature(type(model.get_encoder()).forward).parameters
    read = _encoder_inputs(known, config)
    hidden = GraphInput(torch.zeros(BATCH, ENCODED, config.hidden_size), _ENCODED_AXES, "encoder_outputs", True)
    inputs = {names.ENCODER_HIDDEN_STATES: hidden}
    if names.ATTENTION_MASK in read:
        mask = GraphInput(torch.ones(BATCH, ENCODED, dtype=torch.int64), _ENCODED_AXES, names.ATTENTION_MASK)
        inputs = {names.ENCODER_ATTENTION_MASK: mask} | inputs
    ids = GraphInput(torch.ones(BATCH, NEW, dtype=torch.int64), _TEXT_AXES, "decoder_input_ids")
    most = find_context(config)
    return (
        Interface(read, False, most, "encoder", ENCODER_NAME),
        Interface({names.INPUT_IDS: ids} | inputs, True, most, "decoder", DECODER_NAME),
    )


def find_interface(model: PreTrainedModel) -> Interface:
    """What a model of one graph reads.

    It follows from its forward's arguments and its config.

    Raises:
        ExportError: it reads what is not known here.
    """
    known, config = inspect.signature(type(model).forward).parameters, model.config
    host = find_host(config.model_type)
    shared = next((stack for stack in (() if host is None else host.stacks) if stack.runs is not None), None)
    if shared is not None and getattr(config, str(shared.runs)) != shared.count_layers(config):
        raise ExportError(
            f"config.json: layers of model_type {config.model_type} share their weights; a graph has each layer's own"
        )
    if "input_ids" in known and "past_key_values" in known and model.can_generate() and is_causal(config):
        return Interface(_decoder_inputs(known), has_cache=True)
    inputs = _encoder_inputs(known, config)
    if not inputs:
        raise ExportError(f"config.json: model_type {config.model_type} reads {', '.join(known)}, which are not known")
    return Interface(inputs, most_tokens=find_context(config))


def _encoder_inputs(known: Mapping[str, Any], config: Any) -> dict[str, GraphInput]:
    """What is read in one pass: text, images, sound."""
    inputs: dict[str, GraphInput] = {}
    if "input_ids" in known:
        inputs |= _text_inputs(known, config)
    if "pixel_values" in known:
        inputs["pixel_values"] = GraphInput(_images(config), {0: "batch_size"})
    if "input_features" in known:
        inputs["input_features"] = _sound_features(config)
    if "input_values" in known:
        inputs["input_values"] = _sound_values(config)
    return inputs


def _decoder_inputs(known: Mapping[str, Any]) -> dict[str, GraphInput]:
    found = {
        names.INPUT_IDS: GraphInput(torch.ones(BATCH, NEW, dtype=torch.int64), _TEXT_AXES),
        names.ATTENTION_MASK: GraphInput(
            torch.ones(BATCH, PAST + NEW, dtype=torch.int64), {0: "batch_size", 1: "total_sequence_length"}
        ),
    }
    if names.POSITION_IDS in known:
        positions = torch.arange(PAST, PAST + NEW).repeat(BATCH, 1)
        found[names.POSITION_IDS] = GraphInput(positions, _TEXT_AXES)
    return found


def _text_inputs(known: Mapping[str, Any], config: Any) -> dict[str, GraphInput]:
    ids = torch.ones(BATCH, PAST, dtype=torch.int64)
    found = {names.INPUT_IDS: GraphInput(ids, _TEXT_AXES)}
    if names.ATTENTION_MASK in known:
        found[names.ATTENTION_MASK] = GraphInput(ids.clone(), _TEXT_AXES)  # one tensor would be one input
    if names.TOKEN_TYPE_IDS in known and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        found[names.TOKEN_TYPE_IDS] = GraphInput(torch.zeros_like(ids), _TEXT_AXES)
    return found


def _sound_features(config: Any) -> GraphInput:
    """Whisper's spectrogram of 30 seconds, or frames of any number (Wav2Vec2-BERT)."""
    if hasattr(config, "num_mel_bins"):
        size = (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        return GraphInput(torch.zeros(size), {0: "batch_size"})
    return GraphInput(
        torch.zeros(BATCH, _SOUND_FRAMES, config.feature_projection_input_dim), {0: "batch_size", 1: "num_frames"}
    )


def _sound_values(config: Any) -> GraphInput:
    """Samples of any number, or a spectrogram of one length (AST)."""
    if hasattr(config, "num_mel_bins"):
        return GraphInput(torch.zeros(BATCH, config.max_length, config.num_mel_bins), {0: "batch_size"})
    return GraphInput(torch.zeros(BATCH, _SOUND_SAMPLES), {0: "batch_size", 1: "num_samples"})


def _images(config: Any) -> torch.Tensor:
    own = getattr(config, "vision_config", config)
    size = own.image_size if isinstance(own.image_size, list | tuple) else (own.image_size, own.image_size)
    return torch.zeros(BATCH, own.num_channels, *size)
