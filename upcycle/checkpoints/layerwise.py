"""One decoder layer at a time, run by plain transformers.

A model too large to be held is run layer after layer: each is built as a model of one layer of the same class, from the
tensors of that layer alone, with the embedding and the final norm taken out of it. These two, and the head, are built
as models of no layer. Memory is one layer, or the head's matrix, and the hidden states.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from transformers import AutoModel, PreTrainedModel

from dense2moe.upcycle.checkpoints.loading import by_turn, refuse_incomplete
from dense2moe.upcycle.checkpoints.narrow import keep_linear_narrow
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.checkpoints.tensors import DTYPES
from dense2moe.upcycle.memory import give_heap_back
from dense2moe.upcycle.models.table import find_architecture

_PER_LAYER = ("layer_types", "mlp_layer_types", "layer_rope_theta")
"""Config fields that are a list with one value for each layer."""


@dataclass(frozen=True)
class _Names:
    """Names of tensors in a checkpoint.

    base: what those of the base model begin with. layers: what those of a layer begin with. head: None where the model
    has no matrix from states to logits of tokens.
    """

    base: str
    layers: str
    embedding: str
    norm: str
    head: str | None

    def in_base(self, name: str) -> str:
        """The name of a tensor in the base model."""
        return name.removeprefix(self.base)

    def module(self, name: str) -> str:
        """The module of the base model that holds a tensor."""
        return self.in_base(name).rpartition(".")[0]


def _name_parts(checkpoint: Checkpoint) -> _Names:
    family = find_architecture(checkpoint.config)
    layers = family.name("ffn_norm" if family.find("ffn_norm") else "ffn_post_norm").partition("{layer}")[0]
    return _Names(
        family.base_prefix,
        layers + "{layer}.",
        family.name("embedding"),
        family.name("final_norm"),
        family.find("head"),
    )


def name_head_tensors(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the tensors that a model's head is made of."""
    names = _name_parts(checkpoint)
    return tuple(name for name in (names.norm, names.embedding, names.head) if name is not None)


@dataclass(frozen=True)
class _Stored:
    """A tensor that is read when transformers asks for it."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.checkpoint.read(self.name)[index].clone()  # in memory as torch aligns it


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
    config, names = _config_of_layer(checkpoint, layer), _name_parts(checkpoint)
    prefix, first = (names.layers.format(layer=number) for number in (layer, 0))
    other = replaced or {}
    state = {
        names.in_base(name.replace(prefix, first, 1)): other[name] if name in other else _Stored(checkpoint, name)
        for name in checkpoint.entries
        if name.startswith(prefix)
    }
    state[names.in_base(names.embedding)] = torch.zeros(1, config.hidden_size)
    state[names.in_base(names.norm)] = torch.zeros(config.hidden_size)
    with warnings.catch_warnings(), by_turn():
        # a shared expert of width 0
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
        model, info = _model_class(config).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    refuse_incomplete(
        info,
        f"{checkpoint.directory}: layer {layer}",
        lambda name: f"{names.base}{name}".replace(first, prefix, 1),
    )
    model.set_submodule(names.module(names.norm), torch.nn.Identity())
    if any(hasattr(module, "experts") for module in model.modules()):
        model.set_experts_implementation("eager")
    return cast(PreTrainedModel, model.eval())


def _model_class(config: Any) -> Any:
    return AutoModel._model_mapping[type(config)]


def _config_of_layer(checkpoint: Checkpoint, layer: int) -> Any:
    """The config of a model that is this one layer."""
    config, family = checkpoint.config, find_architecture(checkpoint.config)
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    one.vocab_size = 1
    one.pad_token_id = None
    for name in _PER_LAYER:
        if getattr(one, name, None):
            setattr(one, name, [getattr(config, name)[layer]])
    if family.experts is not None:
        sparse = [0] if family.has_experts(layer, checkpoint.entries) else []
        for name, value in family.experts.name_layers(sparse, 1).items():
            setattr(one, name, value)
    if hasattr(one, "embedding_multiplier"):
        one.embedding_multiplier = 1.0  # what comes in is hidden states, multiplied already
    return one


def _config_without_layers(config: Any) -> Any:
    """The config of a model that has no layer."""
    none = copy.deepcopy(config)
    none.num_hidden_layers = 0
    none.pad_token_id = None
    for name in (*_PER_LAYER, "mlp_only_layers"):
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
    config, names = _config_without_layers(checkpoint.config), _name_parts(checkpoint)
    config.vocab_size = len(rows)
    if replaced is not None and names.embedding in replaced:
        table = replaced[names.embedding][rows]
    else:
        table = checkpoint.pick_rows(names.embedding, rows)
    state = {names.in_base(names.embedding): table, names.in_base(names.norm): torch.zeros(config.hidden_size)}
    model, info = _model_class(config).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    refuse_incomplete(info, f"{checkpoint.directory}: embedding", lambda name: names.base + name)
    states = model.get_submodule(names.module(names.embedding))(places)
    return cast(torch.Tensor, states * getattr(config, "embedding_multiplier", 1.0))


@torch.no_grad()
def apply_final_norm(checkpoint: Checkpoint, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Input of the head, [tokens, H], from the last layer's states.

    The states are [tokens, H], in `dtype`. A model of the final norm, and no layer.

    Raises:
        UpcycleError: transformers finds weights missing, left over or of another shape.
    """
    config, names = _config_without_layers(checkpoint.config), _name_parts(checkpoint)
    config.vocab_size = 1
    state = {
        names.in_base(names.embedding): torch.zeros(1, config.hidden_size),
        names.in_base(names.norm): checkpoint.read(names.norm),
    }
    model, info = _model_class(config).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    refuse_incomplete(info, f"{checkpoint.directory}: final norm", lambda name: names.base + name)
    return cast(torch.Tensor, model.get_submodule(names.module(names.norm))(states))


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
    config, names = _config_without_layers(checkpoint.config), _name_parts(checkpoint)
    assert names.head is not None, "the model has no logits of tokens"
    if hasattr(config, "embedding_multiplier"):
        config.embedding_multiplier = 1.0  # what comes in is hidden states
    other = replaced or {}
    if not other and names.head in checkpoint.entries and (config.tie_word_embeddings or checkpoint.untied):
        stored = {name: name for name in name_head_tensors(checkpoint)}
    else:
        # The head is given as a tied one, in the embedding's place, whether it is or not: its matrix is held once, and
        # no embedding beside it.
        matrix = names.embedding if config.tie_word_embeddings else names.head
        stored = {names.norm: names.norm, names.embedding: matrix}
    config.tie_word_embeddings = True
    state = {
        name: other[source] if source in other else checkpoint.read(source)
        for name, source in stored.items()
        if source in checkpoint.entries
    }
    model_class: Any = getattr(transformers, find_architecture(checkpoint.config).architecture)
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    named = stored | {names.head: stored.get(names.head, stored[names.embedding])}
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
    narrow: bool = False,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run a dense decoder layer by layer.

    Token ids and mask are [B, S]. Yields the layer's number, what it read, what its FFN read and what it gave, each [B,
    S, H]. `ffn_module` is the FFN's place below the base model, with `{layer}`; `batch_rows` of the B rows are run at
    once. `narrow`: matrices stay as they are stored, and are cast to float32 where they are multiplied, which takes
    half the memory; biases are then added after the product is rounded.
    """

    def find_ffn(model: PreTrainedModel) -> torch.nn.Module:
        return model.get_submodule(ffn_module.format(layer=0))

    for layer, states, read, after in _run_layers(checkpoint, ids, mask, dtype, find_ffn, batch_rows, narrow):
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
    narrow: bool = False,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Each layer's states before and after, and a module's input."""
    states = embed(checkpoint, ids, dtype)
    for layer in range(checkpoint.config.num_hidden_layers):
        model = load_layer(checkpoint, layer, _stored_dtype(checkpoint, layer) if narrow else dtype)
        if narrow:
            keep_linear_narrow(model)
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


def _stored_dtype(checkpoint: Checkpoint, layer: int) -> torch.dtype:
    """The one dtype of a layer's tensors; float32 where they differ."""
    prefix = _name_parts(checkpoint).layers.format(layer=layer)
    found = {entry.dtype for name, entry in checkpoint.entries.items() if name.startswith(prefix)}
    return DTYPES[found.pop()] if len(found) == 1 and found <= DTYPES.keys() else torch.float32


def real_tokens(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Float32 states [tokens, H] of the real tokens of [B, S, H].

    Pads are dropped.
    """
    return states[mask.bool()].to(torch.float32)


def mean_states(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean state [B, H] of each row, without padding."""
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
