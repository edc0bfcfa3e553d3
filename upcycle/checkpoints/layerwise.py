"""One decoder layer at a time, run by plain transformers.

A model too large to be held is run layer after layer: each is built as a model of one layer of the same class, from the
tensors of that layer alone, with the embedding and the final norm taken out of it. These two, and the head, are built
as models of no layer. Memory is one layer, or the head's matrix, and the hidden states.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from dense2moe.upcycle.checkpoints.loading import refuse_incomplete
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.memory import give_heap_back

_BLOCKS = "model.layers.{layer}."
_EMBEDDING = "model.embed_tokens.weight"
_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"
HEAD_TENSORS = (_NORM, _EMBEDDING, _HEAD)
"""What a model of the head is made of, by names in the checkpoint."""


def load_layer(
    checkpoint: Checkpoint, layer: int, dtype: torch.dtype, replaced: Mapping[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """A model of one layer, `layer` of the checkpoint, in `dtype`.

    `inputs_embeds` in, hidden states after the layer out; experts run `eager`.
    Tensors in `replaced`, by their names in the checkpoint, stand in for its own.

    Raises:
        UpcycleError: transformers finds weights missing, left over or of another shape.
    """
    give_heap_back()  # what the layer before left there does not fit this one
    config = _config_of_layer(checkpoint.config, layer)
    prefix = _BLOCKS.format(layer=layer)
    other = replaced or {}
    state = {
        name.replace(prefix, "layers.0.", 1): other[name] if name in other else checkpoint.read(name)
        for name in checkpoint.entries
        if name.startswith(prefix)
    }
    state["embed_tokens.weight"] = torch.zeros(1, config.hidden_size)
    state["norm.weight"] = torch.zeros(config.hidden_size)
    with warnings.catch_warnings():
        # a shared expert of width 0
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
        model, info = _model_class(config).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    refuse_incomplete(
        info,
        f"{checkpoint.directory}: layer {layer}",
        lambda name: f"model.{name}".replace("model.layers.0.", prefix, 1),
    )
    model.norm = torch.nn.Identity()
    if any(hasattr(module, "experts") for module in model.modules()):
        model.set_experts_implementation("eager")
    return cast(PreTrainedModel, model.eval())


def _name_in_decoder(name: str) -> str:
    """A base model tensor's name in the whole decoder and its files."""
    return f"model.{name}"


def _model_class(config: Any) -> Any:
    return AutoModel._model_mapping[type(config)]


def _config_of_layer(config: Any, layer: int) -> Any:
    """The config of a model that is this one layer."""
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    one.vocab_size = 1
    one.pad_token_id = None
    if getattr(one, "layer_types", None):
        one.layer_types = [config.layer_types[layer]]
    if hasattr(one, "mlp_only_layers"):
        one.mlp_only_layers = [0] if layer in config.mlp_only_layers else []
    if hasattr(one, "first_k_dense_replace"):
        one.first_k_dense_replace = int(layer < config.first_k_dense_replace)
    if hasattr(one, "embedding_multiplier"):
        one.embedding_multiplier = 1.0  # what comes in is hidden states, multiplied already
    return one


def _config_without_layers(config: Any) -> Any:
    """The config of a model that has no layer."""
    none = copy.deepcopy(config)
    none.num_hidden_layers = 0
    none.pad_token_id = None
    for name in ("layer_types", "mlp_only_layers"):
        if getattr(none, name, None):
            setattr(none, name, [])
    return none


@torch.no_grad()
def embed(
    checkpoint: Checkpoint, ids: torch.Tensor, dtype: torch.dtype, replaced: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Input of the first layer, [B, S, H], for token ids.

    Token ids are [B, S]; the result is in `dtype`. In `dtype`. A model of the ids' own rows of the embedding, and no
    layer. An embedding in `replaced`, by its name in the checkpoint, stands in for its own.

    Raises:
        UpcycleError: transformers finds weights missing, left over or of another shape.
    """
    rows, places = ids.unique(return_inverse=True)
    config = _config_without_layers(checkpoint.config)
    config.vocab_size = len(rows)
    if replaced is not None and _EMBEDDING in replaced:
        table = replaced[_EMBEDDING][rows]
    else:
        table = torch.cat([checkpoint.read_rows(_EMBEDDING, int(row), int(row) + 1) for row in rows])
    state = {"embed_tokens.weight": table, "norm.weight": torch.zeros(config.hidden_size)}
    model, info = _model_class(config).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    refuse_incomplete(info, f"{checkpoint.directory}: embedding", _name_in_decoder)
    states = model.embed_tokens(places)
    return cast(torch.Tensor, states * getattr(config, "embedding_multiplier", 1.0))


@torch.no_grad()
def apply_final_norm(checkpoint: Checkpoint, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Input of the head, [tokens, H], from the last layer's states.

    The states are [tokens, H], in `dtype`. A model of the final norm, and no layer.

    Raises:
        UpcycleError: transformers finds weights missing, left over or of another shape.
    """
    config = _config_without_layers(checkpoint.config)
    config.vocab_size = 1
    state = {"embed_tokens.weight": torch.zeros(1, config.hidden_size), "norm.weight": checkpoint.read(_NORM)}
    model, info = _model_class(config).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    refuse_incomplete(info, f"{checkpoint.directory}: final norm", _name_in_decoder)
    return cast(torch.Tensor, model.norm(states))


@torch.no_grad()
def apply_head(checkpoint: Checkpoint, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits [tokens, vocabulary] in `dtype` of the last layer's states [tokens, H].

    Raises:
        UpcycleError: transformers finds weights missing, left over or of another shape.
    """
    return cast(torch.Tensor, load_head(checkpoint, dtype)(inputs_embeds=states[None], use_cache=False).logits[0])


def load_head(
    checkpoint: Checkpoint, dtype: torch.dtype, replaced: Mapping[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """A model of the final norm and the head alone, in `dtype`.

    The last layer's states as `inputs_embeds` in, `logits` out. Tensors in `replaced`, by their names in the
    checkpoint, stand in for its own. Without them, where config.json ties a head that is stored as well, transformers
    is given both matrices and decides whether it ties them.

    Raises:
        UpcycleError: transformers finds weights missing, left over or of another shape.
    """
    config = _config_without_layers(checkpoint.config)
    if hasattr(config, "embedding_multiplier"):
        config.embedding_multiplier = 1.0  # what comes in is hidden states
    other = replaced or {}
    if not other and _HEAD in checkpoint.entries and (config.tie_word_embeddings or checkpoint.untied):
        stored = {name: name for name in HEAD_TENSORS}
    else:
        # The head is given as a tied one, in the embedding's place, whether it is or not: its matrix is held once, and
        # no embedding beside it.
        stored = {_NORM: _NORM, _EMBEDDING: _EMBEDDING if config.tie_word_embeddings else _HEAD}
    config.tie_word_embeddings = True
    state = {
        name: other[source] if source in other else checkpoint.read(source)
        for name, source in stored.items()
        if source in checkpoint.entries
    }
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    named = stored | {_HEAD: stored.get(_HEAD, stored[_EMBEDDING])}
    refuse_incomplete(info, f"{checkpoint.directory}: head", lambda name: named.get(name, name))
    return cast(PreTrainedModel, model.eval())


@torch.no_grad()
def run_layers(
    checkpoint: Checkpoint,
    ids: torch.Tensor,
    mask: torch.Tensor,
    dtype: torch.dtype,
    ffn_module: str,
    batch_rows: int = 8,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run a dense decoder layer by layer.

    Token ids and mask are [B, S]. Yields the layer's number, what it read, what its FFN read and what it gave, each [B,
    S, H]. `ffn_module` is the FFN's place below the base model, with `{layer}`; `batch_rows` of the B rows are run at
    once.
    """

    def find_ffn(model: PreTrainedModel) -> torch.nn.Module:
        return model.get_submodule(ffn_module.format(layer=0))

    for layer, states, read, after in _run_layers(checkpoint, ids, mask, dtype, find_ffn, batch_rows):
        assert read is not None, "every layer has an FFN"
        yield layer, states, read, after


@torch.no_grad()
def run_sparse_layers(
    checkpoint: Checkpoint,
    ids: torch.Tensor,
    mask: torch.Tensor,
    dtype: torch.dtype,
    find_router: Callable[[PreTrainedModel], torch.nn.Module | None],
    batch_rows: int = 8,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run a mixture layer by layer, and tell what its routers read.

    Token ids and mask are [B, S]. Yields the number of each layer with experts, and its router's input [B, S, H].
    `find_router` gives the router of a model of one layer, None where it has none.
    """
    for layer, _, read, _ in _run_layers(checkpoint, ids, mask, dtype, find_router, batch_rows):
        if read is not None:
            yield layer, read


def _run_layers(
    checkpoint: Checkpoint,
    ids: torch.Tensor,
    mask: torch.Tensor,
    dtype: torch.dtype,
    find_module: Callable[[PreTrainedModel], torch.nn.Module | None],
    batch_rows: int,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Each layer's states before and after, and what a module of it read."""
    states = embed(checkpoint, ids, dtype)
    for layer in range(checkpoint.config.num_hidden_layers):
        model = load_layer(checkpoint, layer, dtype)
        read: list[torch.Tensor] = []
        module = find_module(model)
        if module is not None:
            module.register_forward_pre_hook(lambda _, arguments, into=read: into.append(arguments[0]))
        after = torch.cat(
            [
                model(inputs_embeds=part, attention_mask=part_mask, use_cache=False).last_hidden_state
                for part, part_mask in zip(states.split(batch_rows), mask.split(batch_rows), strict=True)
            ]
        )
        del model, module  # before the next layer is loaded
        heard = torch.cat([part.reshape(-1, *states.shape[1:]) for part in read]) if read else None
        yield layer, states, heard, after
        states = after


def real_tokens(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Float32 states [tokens, H] of the real tokens of [B, S, H].

    Pads are dropped.
    """
    return states[mask.bool()].to(torch.float32)


def mean_states(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean state [B, H] of each row [B, S, H], without padding."""
    real = mask.to(states.dtype)[..., None]
    return (states * real).sum(1) / real.sum(1).clamp(min=1.0)


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, int64 [B, S], of rows of unequal length.

    Padded on the left, with the first token of the first row.

    The pad is the first token of the first row.
    """
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), rows[0][0])
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = 1
    return ids, mask
