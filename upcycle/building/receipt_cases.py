"""What both models read for the receipt, and what is compared."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.building.model_pass import real_logits
from dense2moe.upcycle.building.receipt_text import Text
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.context import is_causal
from dense2moe.upcycle.models.table import find_host

_NUM_ROWS = 2  # images, or sounds
_SOUND_LENGTH = 8000  # samples: half a second
_NUM_FRAMES = 48  # of a spectrogram, two at once: a second
_FULL_PRECISION = torch.float32
_COMPARED = (
    "logits",
    "start_logits",
    "end_logits",
    "projected_states",
    "logits_per_image",
    "image_embeds",
    "text_embeds",
    "reconstruction",
    "last_hidden_state",
    "encoder_last_hidden_state",
)
"""Outputs of transformers' models that are compared, where a model has them."""


@dataclass(frozen=True)
class ReceiptCase:
    """One input, by a name for the receipt.

    `run` gives what is compared of a model's outputs, float32 [N, M]. `num_tokens` is the length of a row, 0 without
    text.
    """

    name: str
    run: Callable[[PreTrainedModel], torch.Tensor]
    num_tokens: int


def choose_cases(
    model: PreTrainedModel, conversion: Conversion, text: Text | None, dtype: torch.dtype
) -> Iterator[ReceiptCase]:
    """Inputs of both models of a conversion, by what the mixture reads."""
    if model.config.is_encoder_decoder and not conversion.keeps_rest:
        assert text is not None
        yield from _decoder_cases(text, dtype)
    else:
        yield from input_cases(model, text, dtype)


def _decoder_cases(text: Text, dtype: torch.dtype) -> Iterator[ReceiptCase]:
    """Texts of a decoder: a long one, a padded batch, and decoding.

    The long one in full precision alone.
    """
    ids, mask = text.ids, text.mask
    if dtype == _FULL_PRECISION:
        run = functools.partial(real_logits, ids=ids[:1], mask=torch.ones_like(ids[:1]), cached=False)
        yield ReceiptCase("one long text", run, ids.shape[1])
    for name, cached in (("padded batch", False), ("decoding with a cache", True)):
        yield ReceiptCase(name, functools.partial(real_logits, ids=ids, mask=mask, cached=cached), ids.shape[1])


def input_cases(model: PreTrainedModel, text: Text | None, dtype: torch.dtype) -> Iterator[ReceiptCase]:
    """Inputs of any model: text, images or sound.

    Alone, padded, of other sizes, of other token types. Images and sounds are drawn, by a seed.
    """
    known = inspect.signature(type(model).forward).parameters
    config = model.config
    if "input_ids" in known and "pixel_values" not in known:
        assert text is not None
        yield from _text_cases(model, text, dtype)
    elif "input_ids" in known:
        assert text is not None
        ids, mask = _pad_behind(model, text)
        both = {"input_ids": ids, "attention_mask": mask, "pixel_values": _draw_images(config, 1.0)}
        yield _case("texts and images", both, ids.shape[1])
    elif "pixel_values" in known:
        yield from _image_cases(model)
    else:
        yield from _sound_cases(model)


def _image_cases(model: PreTrainedModel) -> Iterator[ReceiptCase]:
    known, host = inspect.signature(type(model).forward).parameters, find_host(model.config.model_type)
    given: dict[str, Any] = {}
    images, larger = (_draw_images(model.config, factor) for factor in (1.0, 1.5))
    if "noise" in known:  # by which patches are masked: else drawn anew at every pass
        given["noise"] = _draw(_NUM_ROWS, images[0, 0].numel() // model.config.patch_size**2).abs()
    yield _case("images", given | {"pixel_values": images}, 0)
    if "interpolate_pos_encoding" in known and not given:
        yield _case("larger images", {"pixel_values": larger, "interpolate_pos_encoding": True}, 0)
    elif host is not None and host.any_image_size:
        yield _case("larger images", {"pixel_values": larger}, 0)


def _sound_cases(model: PreTrainedModel) -> Iterator[ReceiptCase]:
    """Sounds or spectrograms, of the length that the model needs."""
    known, config = inspect.signature(type(model).forward).parameters, model.config
    given: dict[str, Any] = {}
    if "input_values" not in known:
        if hasattr(config, "num_mel_bins"):
            given["input_features"] = _draw(_NUM_ROWS, config.num_mel_bins, 2 * config.max_source_positions)
        else:
            given["input_features"] = _draw(_NUM_ROWS, _NUM_FRAMES, config.feature_projection_input_dim)
    elif hasattr(config, "num_mel_bins"):
        given["input_values"] = _draw(_NUM_ROWS, config.max_length, config.num_mel_bins)
    else:
        given["input_values"] = _draw(_NUM_ROWS, _SOUND_LENGTH)
    if "decoder_input_ids" in known:
        given["decoder_input_ids"] = torch.arange(1, 9).repeat(_NUM_ROWS, 1) % config.vocab_size
    yield _case("sounds", given, 0)
    if "attention_mask" in known and not hasattr(config, "num_mel_bins"):
        length = next(iter(given.values())).shape[1]
        mask = torch.ones(_NUM_ROWS, length, dtype=torch.int64)
        mask[0, length // 2 :] = 0
        yield _case("padded sounds", given | {"attention_mask": mask}, 0)


def _text_cases(model: PreTrainedModel, text: Text, dtype: torch.dtype) -> Iterator[ReceiptCase]:
    known, length = inspect.signature(type(model).forward).parameters, text.ids.shape[1]
    is_decoder = "past_key_values" in known and model.can_generate() and not model.config.is_encoder_decoder
    if is_decoder and is_causal(model.config):
        yield from _decoder_cases(text, dtype)
        return
    ids, mask = _pad_behind(model, text)
    needs_pad = type(model).__name__.endswith("ForSequenceClassification")
    if needs_pad and model.config.get_text_config().pad_token_id is None:  # then it refuses batches
        ids, mask = ids[:1], mask[:1]
    given: dict[str, Any] = {"input_ids": ids}
    if "decoder_input_ids" in known:
        given["decoder_input_ids"] = ids.flip(0)
    if "attention_mask" in known:
        given["attention_mask"] = mask
    if dtype == _FULL_PRECISION:
        yield _case("one long text", {name: value[:1] for name, value in given.items()}, length)
    yield _case("padded batch", given, length)
    if "token_type_ids" in known and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        types = (torch.arange(length) >= length // 2).long().repeat(len(ids), 1)
        yield _case("two token types", given | {"token_type_ids": types}, length)


def _pad_behind(model: PreTrainedModel, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask padded behind the text, as encoders are.

    A model's end of text is once in each row, at its end: CLIP, and heads of encoder-decoders, look for it.
    """
    counts = [int(row.sum()) for row in text.mask]
    ids, mask = (
        torch.stack([row.roll(count) for row, count in zip(rows, counts, strict=True)])
        for rows in (text.ids, text.mask)
    )
    config = model.config.get_text_config()
    end, pad, size = config.eos_token_id, config.pad_token_id, config.vocab_size
    if isinstance(end, int) and end < size:
        other = next(token for token in range(size) if token not in (end, pad))
        ids = torch.where(ids == end, other, ids)
        ids[torch.arange(len(ids)), mask.sum(-1) - 1] = end
    if pad is not None and pad < size:  # which transformers' heads for labels of a text look for
        ids = ids.masked_fill(mask == 0, pad)
    return ids, mask


def _case(name: str, given: dict[str, Any], num_tokens: int) -> ReceiptCase:
    return ReceiptCase(name, functools.partial(_run, given=given), num_tokens)


@torch.no_grad()
def _run(model: PreTrainedModel, given: dict[str, Any]) -> torch.Tensor:
    """All compared outputs, float32 [N, 1]; of texts, no padded positions."""
    inputs = {name: value.to(model.dtype) if _is_float(value) else value for name, value in given.items()}
    output, mask = model(**inputs), given.get("attention_mask")
    found = []
    for name in _COMPARED:
        tensor = getattr(output, name, None)
        if tensor is not None:
            if mask is not None and "decoder_input_ids" not in given and tensor.shape[:2] == mask.shape:
                tensor = tensor[mask.bool()]
            found.append(tensor.to(torch.float32).reshape(-1, 1))
    assert found, f"{type(model).__name__} gives none of {', '.join(_COMPARED)}"
    return torch.cat(found)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _draw_images(config: Any, factor: float) -> torch.Tensor:
    """Images [2, channels, height, width], of the config's size times a factor.

    In whole patches.
    """
    own = getattr(config, "vision_config", config)
    size, patch = (
        value if isinstance(value, list | tuple) else (value, value) for value in (own.image_size, own.patch_size)
    )
    sides = (patch_side * round(factor * side / patch_side) for side, patch_side in zip(size, patch, strict=True))
    return _draw(_NUM_ROWS, own.num_channels, *sides)
