"""Our runtime: a package in onnxruntime, with one shared KV buffer.

One buffer is both input and output. The cache is allocated once at its full capacity and bound as both past and
present, so a step copies no cache, in Python or below. A step binds the new tokens, the mask so far and the place of
its logits, each an address in memory of ours, and nothing else. Where attention is not `GroupQueryAttention`, as in a
traced graph, the cache grows by concatenation instead: the present of one step is bound as the past of the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from dense2moe.export import names
from dense2moe.export.errors import ExportError
from dense2moe.export.opening import onnxruntime_errors, open_package, read_config
from dense2moe.export.runtime.inspection import NOTHING, Inspection, let_logits_be_cut, let_routers_be_nudged
from dense2moe.export.runtime.interface import (
    ELEMENT_TYPES,
    check_interface,
    check_types,
    read_cache_shape,
)
from dense2moe.export.runtime.sampling import Floats, Ints, Sampling, choose_tokens, draw_uniforms
from dense2moe.export.runtime.session import make_options, read_metadata, start_session
from dense2moe.export.variant import Device

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
PROVIDERS: dict[Device, str] = {"cpu": CPU, "cuda": CUDA}


def is_at_hand(provider: str) -> bool:
    """Whether this machine and this onnxruntime offer a provider."""
    return provider in ort.get_available_providers() and (provider != CUDA or torch.cuda.is_available())


@dataclass
class Cache:
    """The KV cache of one batch.

    Buffers [B, heads, capacity (or length), head_dim] a layer in the graph's type, and which slots [B, capacity] are
    real tokens. `bound` is what the binding was last made for: batch, tokens and tokens with logits; the arrays after
    it are those that it points to. `taps` are the values inside the graph that a run shows.
    """

    buffers: dict[str, ort.OrtValue]
    binding: ort.IOBinding
    slots: Ints
    length: int = 0
    bound: tuple[int, int, int] | None = None
    ids: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    first_logit: Ints = field(default_factory=lambda: np.zeros(1, np.int64))
    taps: tuple[str, ...] = ()
    logits: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))

    @property
    def capacity(self) -> int:
        """Tokens that fit, padding included."""
        return int(self.slots.shape[1])

    @property
    def mask(self) -> Ints:
        """The mask [B, length] of the tokens so far."""
        return self.slots[:, : self.length]


class Decoder:
    """An ONNX decoder package, ready to run.

    What `inspection` says becomes outputs too; nothing else changes.
    """

    def __init__(
        self,
        directory: Path,
        provider: str = CPU,
        inspection: Inspection = NOTHING,
        num_threads: int = 0,
        profile: Path | None = None,
    ) -> None:
        """Load the package in `directory`.

        `profile` is where onnxruntime's profile of it begins its name.

        Raises:
            ExportError: no package there, a damaged one, a runtime older than it needs, or a provider that is not to be
                had.
        """
        package = open_package(directory)
        path, model = package.path, package.model
        self.path, self.metadata, self.provider = path, read_metadata(package, provider), provider
        self.taps = inspection.find_taps(model)
        shown = list(dict.fromkeys([*self.taps, *inspection.values]))
        options = make_options(num_threads, profile)
        options.enable_mem_pattern = (
            False  # one is kept for every shape of the inputs, and the mask has another with each token
        )
        # onnxruntime infers the type
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in shown)
        self.num_experts = inspection.num_experts if inspection.routers else 0
        let_routers_be_nudged(model, inspection.routers)
        self._cuts_logits = let_logits_be_cut(model)
        check_interface(model, path)
        config = read_config(directory)
        self.config, self.context_length = dict(config.values), config.size("max_position_embeddings")
        self.num_experts_per_tok = config.size("num_experts_per_tok", default=0, least=0)
        self.session = start_session(package, options, provider)
        self._run_options = ort.RunOptions()
        # who looks inside has a model of torch beside it: what a long text took is given back
        if shown and provider == CPU:
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.shares_buffer = any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
        self.takes_positions = any(value.name == names.POSITION_IDS for value in self.session.get_inputs())
        values = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        check_types(values, path)
        self.past = {
            name: (read_cache_shape(value, config), ELEMENT_TYPES[value.type])
            for name, value in values.items()
            if names.is_past(name)
        }
        self.device = "cuda" if provider == CUDA else "cpu"
        logits = values[names.LOGITS]
        self._vocab_size = logits.shape[2] if isinstance(logits.shape[2], int) else config.size("vocab_size")
        self._logits_type = onnx.helper.tensor_dtype_to_np_dtype(ELEMENT_TYPES[logits.type])

    @property
    def vocab_size(self) -> int:
        """Number of tokens with logits."""
        return self._vocab_size

    def check_ids(self, where: str, ids: Iterable[int]) -> None:
        """Refuse tokens that the model does not know.

        `where` names their source in the error.

        Raises:
            ExportError: an id is beyond the vocabulary.
        """
        if (largest := max(ids, default=0)) >= self._vocab_size:
            raise ExportError(
                f"{where} has the token {largest}; {self.path} knows {self._vocab_size:,}, from 0 on; use the "
                "tokenizer of its checkpoint"
            )

    def new_cache(self, batch_size: int, capacity: int, taps: Sequence[str] | None = None) -> Cache:
        """An empty cache for `batch_size` rows of `capacity` tokens.

        At most so many; its runs show `taps`. Or all that the decoder was opened with.

        Raises:
            ExportError: `capacity` is beyond the model's context.
        """
        if capacity > self.context_length:
            raise ExportError(
                f"{capacity} tokens asked for; the model's context holds {self.context_length}; shorten the prompt "
                "or the output"
            )
        buffers, binding = {}, self.session.io_binding()
        for name, ((_, heads, _, head_dim), element_type) in self.past.items():
            buffers[name] = self._new_buffer(
                (batch_size, heads, capacity if self.shares_buffer else 0, head_dim), element_type
            )
            if self.shares_buffer:
                binding.bind_ortvalue_input(name, buffers[name])
                binding.bind_ortvalue_output(names.present_of(name), buffers[name])
        return Cache(
            buffers,
            binding,
            np.zeros((batch_size, capacity), np.int64),
            taps=tuple(self.taps if taps is None else taps),
        )

    def _new_buffer(self, shape: tuple[int, ...], element_type: int) -> ort.OrtValue:
        """Zeros on the device.

        Bfloat16, which numpy does not have, is not written: attention reads no slot before it has written it.
        """
        if element_type == onnx.TensorProto.BFLOAT16:
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, element_type, self.device, 0)
        return ort.OrtValue.ortvalue_from_numpy(
            np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(element_type)), self.device, 0
        )

    def read_cache(self, cache: Cache) -> dict[str, Floats]:
        """Cached keys and values by input name.

        Each is [B, heads, capacity or length, head_dim].
        """
        return {name: np.asarray(buffer.numpy(), np.float32) for name, buffer in cache.buffers.items()}

    def run(
        self,
        cache: Cache,
        ids: Ints,
        mask: Ints | None = None,
        logits_to_keep: int = 0,
        nudge: torch.Tensor | None = None,
    ) -> dict[str, Floats]:
        """Feed ids [B, S]; returns logits [B, S, V] and taps, float32.

        The ids follow those in the cache. The mask [B, S] is 1 for a real token and 0 for padding. With
        `logits_to_keep` only so many of the last tokens have logits. A package of other makers has them all computed,
        and then cut. `nudge` [B * S, E] is added to the router logits of every layer. More than one token after a
        prefill needs a batch of one: `GroupQueryAttention` on the CPU takes no other.
        """
        batch, length = ids.shape
        total = cache.length + length
        if total > cache.capacity:
            raise ExportError(f"{total} tokens in a cache of {cache.capacity}; ask for a larger one")
        cache.slots[:, cache.length : total] = 1 if mask is None else mask
        kept = min(logits_to_keep or length, length) if self._cuts_logits else length
        # What is bound is not copied, so these arrays must live until the run is over; those of a step are bound once
        # and written anew.
        mask_BT = np.ascontiguousarray(cache.slots[:, :total])
        cache.binding.bind_cpu_input(names.ATTENTION_MASK, mask_BT)
        positions = (
            np.ascontiguousarray(np.maximum(mask_BT.cumsum(axis=1) - 1, 0)[:, -length:])
            if self.takes_positions
            else None
        )
        if positions is not None:
            cache.binding.bind_cpu_input(names.POSITION_IDS, positions)
        if not self.shares_buffer:
            for name, buffer in cache.buffers.items():
                cache.binding.bind_ortvalue_input(name, buffer)
                cache.binding.bind_output(names.present_of(name), self.device)
        if cache.bound != (batch, length, kept):
            self._bind(cache, batch, length, kept)
        cache.ids[:] = ids
        if self.num_experts:
            added = (
                np.zeros((1, self.num_experts), np.float32)
                if nudge is None
                else np.ascontiguousarray(nudge.numpy(), np.float32)
            )
            cache.binding.bind_cpu_input(names.ROUTER_NUDGE, added)
        for name in cache.taps:
            cache.binding.bind_output(name)
        with onnxruntime_errors(self.path, "run"):
            self.session.run_with_iobinding(cache.binding, self._run_options)
        cache.length = total
        if not self.shares_buffer:
            # the outputs that were bound first
            cache.buffers = dict(zip(cache.buffers, cache.binding.get_outputs(), strict=False))
        found = {names.LOGITS: self._take_logits(cache, logits_to_keep)}
        if cache.taps:
            # Outputs come in the order in which they were first bound: the cache, the logits, the taps.
            tapped = cache.binding.get_outputs()[-len(cache.taps) :]
            found |= {
                name: np.asarray(value.numpy(), np.float32) for name, value in zip(cache.taps, tapped, strict=True)
            }
        return found

    def _bind(self, cache: Cache, batch: int, length: int, kept: int) -> None:
        """Bind new arrays for ids [B, S] and the last logits.

        The logits of the last `kept` of them.
        """
        cache.bound, cache.ids = (batch, length, kept), np.zeros((batch, length), np.int64)
        cache.logits = np.empty((batch, kept, self._vocab_size), self._logits_type)
        cache.first_logit[0] = length - kept
        cache.binding.bind_cpu_input(names.INPUT_IDS, cache.ids)
        if self._cuts_logits:
            cache.binding.bind_cpu_input(names.FIRST_LOGIT, cache.first_logit)
        cache.binding.bind_ortvalue_output(names.LOGITS, ort.OrtValue.ortvalue_from_numpy(cache.logits))

    def _take_logits(self, cache: Cache, count: int) -> Floats:
        """The last tokens' logits.

        Of a step a copy, since the next step overwrites them.
        """
        found = cache.logits[:, -count:]  # -0 is all of them
        if cache.ids.shape[1] > 1:
            cache.bound = None  # the next call binds arrays of its own
            return np.asarray(found, np.float32)
        return np.array(found, np.float32)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop: Sequence[int] = ()
    ) -> Iterator[tuple[int | None, ...]]:
        """Yield each prompt's next token, up to `max_new_tokens` times.

        A row that has ended yields None. A row ends after its first token in `stop`, which is yielded too; the batch
        goes on until all have ended. Shorter prompts are padded at their left, which changes no token but by rounding:
        greedy rows are those of each prompt alone, and so are drawn ones, whose numbers depend on the seed and the
        prompt alone.

        Raises:
            ExportError: a prompt is empty or has a token that the model does not know, or the context is too short.
        """
        for number, prompt in enumerate(prompts, 1):
            where = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            if not prompt:
                raise ExportError(f"{where} has no tokens; give some text")
            if len(prompt) > self.context_length:
                raise ExportError(
                    f"{where} has {len(prompt)} tokens; the model's context holds {self.context_length}; shorten it"
                )
            self.check_ids(where, prompt)
        if max_new_tokens < 1 or not prompts:
            return
        width = max(len(prompt) for prompt in prompts)
        cache = self.new_cache(len(prompts), width + max_new_tokens)
        uniforms = draw_uniforms(prompts, sampling.seed, max_new_tokens)
        seen = np.zeros((len(prompts), self.vocab_size), np.bool_) if sampling.repetition_penalty != 1 else None
        ids, mask = np.zeros((2, len(prompts), width), np.int64)
        for row, prompt in enumerate(prompts):
            if seen is not None:
                seen[row, [token for token in prompt if token < self.vocab_size]] = True
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        running = [True] * len(prompts)
        for step in range(max_new_tokens):
            logits = self.run(cache, ids, mask if step == 0 else None, logits_to_keep=1)[names.LOGITS][:, -1]
            chosen = choose_tokens(logits, sampling, uniforms[step], seen)
            tokens = chosen.tolist()
            if seen is not None:
                seen[np.arange(len(prompts)), chosen] = True
            yield tuple(token if runs else None for token, runs in zip(tokens, running, strict=True))
            running = [runs and token not in stop for token, runs in zip(tokens, running, strict=True)]
            if not any(running):
                return
            ids = chosen[:, None]
