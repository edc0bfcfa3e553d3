"""Our runtime: a package loaded into onnxruntime, with one KV buffer for input and output.

The cache is allocated once at its full capacity and bound as both past and present, so a step copies no cache, in Python or below. Where attention is
not `GroupQueryAttention`, as in a traced graph, the cache grows by concatenation instead: the present of one step is bound as the past of the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from packaging.version import Version

from export.errors import ExportError
from export.storage import MIN_ONNXRUNTIME_KEY, MODEL_NAME

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
ROUTER_LOGITS = "router_logits."
HIDDEN = "hidden."


@dataclass
class Cache:
    """The KV cache of one batch: buffers [B, heads, capacity (or length), head_dim] a layer, the mask so far [B, length], and what fits."""

    buffers: dict[str, ort.OrtValue]
    mask: Ints
    capacity: int


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Decoder:
    """An ONNX decoder package, ready to run.

    With `taps`, the graph's router logits and residual streams become outputs too; nothing else changes.
    """

    def __init__(self, directory: Path, provider: str = CPU, taps: bool = False, num_threads: int = 0) -> None:
        """Load the package in `directory`.

        Raises:
            ExportError: no package there, a runtime older than it needs, or a provider that is not to be had.
        """
        path = directory / MODEL_NAME
        if not path.is_file():
            raise ExportError(f"{directory}: no {MODEL_NAME}; it must be an ONNX package, as `dense2moe run` writes it")
        if provider not in ort.get_available_providers():
            raise ExportError(f"{provider} is not in this onnxruntime ({', '.join(ort.get_available_providers())}); install the [gpu] extra")
        model = onnx.load(path, load_external_data=False)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        needed = self.metadata.get(MIN_ONNXRUNTIME_KEY, "0")
        if Version(ort.__version__) < Version(needed):
            raise ExportError(f"{path}: needs onnxruntime {needed} or newer; this is {ort.__version__}; upgrade it")
        self.provider = provider
        self.taps = _tap_names(model) if taps else []
        self._read = ("logits", *self.taps)
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory.resolve()))
        for name in self.taps:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
        if self.session.get_providers()[0] != provider:
            raise ExportError(f"{provider} could not start, onnxruntime fell back to {self.session.get_providers()[0]}; check the driver")
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.shares_buffer = any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
        self.takes_positions = any(value.name == "position_ids" for value in self.session.get_inputs())
        self.past = {value.name: value.shape for value in self.session.get_inputs() if value.name.startswith("past_key_values.")}
        self.device = "cuda" if provider == CUDA else "cpu"

    @property
    def context_length(self) -> int:
        """Tokens that the model can see at once."""
        return int(self.config["max_position_embeddings"])

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache for `batch_size` rows of at most `capacity` tokens.

        Raises:
            ExportError: `capacity` is beyond the model's context.
        """
        if capacity > self.context_length:
            raise ExportError(f"{capacity} tokens asked for; the model's context holds {self.context_length}; shorten the prompt or the output")
        buffers = {}
        for name, (_, heads, _, head_dim) in self.past.items():
            zeros = np.zeros((batch_size, heads, capacity if self.shares_buffer else 0, head_dim), np.float32)
            buffers[name] = ort.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)
        return Cache(buffers, np.zeros((batch_size, 0), np.int64), capacity)

    def run(self, cache: Cache, ids: Ints, mask: Ints | None = None) -> dict[str, Floats]:
        """Feed ids [B, S] (mask [B, S]: 1 real, 0 padding) after what the cache holds; returns logits [B, S, V] and the taps by name.

        More than one token after a prefill needs a batch of one: `GroupQueryAttention` on the CPU takes no other.
        """
        mask_BT = np.concatenate([cache.mask, np.ones_like(ids) if mask is None else mask.astype(np.int64)], axis=1)
        if mask_BT.shape[1] > cache.capacity:
            raise ExportError(f"{mask_BT.shape[1]} tokens in a cache of {cache.capacity}; ask for a larger one")
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, dtype=np.int64))
        binding.bind_cpu_input("attention_mask", mask_BT)
        if self.takes_positions:
            positions = np.maximum(mask_BT.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name in self._read:
            binding.bind_output(name)
        for name, buffer in cache.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            present = name.replace("past_key_values.", "present.")
            if self.shares_buffer:
                binding.bind_ortvalue_output(present, buffer)
            else:
                binding.bind_output(present, self.device)
        self.session.run_with_iobinding(binding)
        cache.mask = mask_BT
        outputs = binding.get_outputs()  # in the order in which they were bound
        if not self.shares_buffer:
            cache.buffers = dict(zip(cache.buffers, outputs[len(self._read) :], strict=True))
        return {name: value.numpy() for name, value in zip(self._read, outputs, strict=False)}

    def generate(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, stop: Sequence[int] = ()) -> Iterator[int]:
        """Yield up to `max_new_tokens` tokens after `prompt`; ends after the first one in `stop`, which is yielded too.

        Raises:
            ExportError: the prompt is empty, or the context too short.
        """
        if not prompt:
            raise ExportError("the prompt has no tokens; give some text")
        if max_new_tokens < 1:
            return
        cache = self.new_cache(1, len(prompt) + max_new_tokens)
        random = np.random.default_rng(sampling.seed)
        ids = np.array([prompt], np.int64)
        for _ in range(max_new_tokens):
            token = choose_token(self.run(cache, ids)["logits"][0, -1], sampling, random)
            yield token
            if token in stop:
                return
            ids = np.array([[token]], np.int64)


def choose_token(logits: Floats, sampling: Sampling, random: np.random.Generator) -> int:
    """Draw a token from logits [V]: greedy at temperature 0, else softmax over the top-k and then the top-p (nucleus) of them."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        kept = np.searchsorted(probabilities.cumsum(), sampling.top_p) + 1
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return int(random.choice(order, p=probabilities))


def _tap_names(model: onnx.ModelProto) -> list[str]:
    """Router logits and residual streams of every layer, in order; none in a package of other makers."""
    found = {name for node in model.graph.node for name in node.output if name.startswith((ROUTER_LOGITS, HIDDEN))}
    return sorted(found, key=lambda name: (name.split(".")[0], int(name.split(".")[1])))
