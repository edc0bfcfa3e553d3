"""Our runtime for an encoder and a decoder, a graph each.

The encoder reads the text or the sound once. The decoder's first call makes keys and values of what that gave; each
further call reads them where they lie, and its own keys and values grow by concatenation: the present of one step is
bound as the past of the next, and nothing is copied in Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from dense2moe.export import names
from dense2moe.export.errors import ExportError
from dense2moe.export.opening import onnxruntime_errors, open_package, read_config
from dense2moe.export.runtime.decoder import CPU
from dense2moe.export.runtime.generation import read_generation
from dense2moe.export.runtime.inspection import NOTHING, Inspection
from dense2moe.export.runtime.interface import ELEMENT_TYPES, read_cache_shape
from dense2moe.export.runtime.sampling import Floats, Ints, Sampling, choose_tokens, draw_uniforms
from dense2moe.export.runtime.session import make_options, read_metadata, start_session
from dense2moe.export.runtime.single_pass import SinglePass, Tensors
from dense2moe.export.storage import DECODER_NAME, ENCODER_NAME


@dataclass
class Decoding:
    """A batch that is being written.

    What the encoder gave and its mask, the cached keys and values by the inputs' names, the tokens so far, and what the
    encoder showed.
    """

    encoded: Mapping[str, ort.OrtValue]
    past: dict[str, ort.OrtValue]
    length: int = 0
    shown: Tensors = field(default_factory=dict)


class EncoderDecoder:
    """A package of an encoder and a decoder, ready to run.

    What `inspection` says of either graph becomes outputs too.
    """

    def __init__(
        self, directory: Path, provider: str = CPU, inspection: Inspection = NOTHING, num_threads: int = 0
    ) -> None:
        """Load the package in `directory`.

        Raises:
            ExportError: no such package there, a damaged one, a runtime older than it needs, or a provider that is not
                to be had.
        """
        self.encoder = SinglePass(directory, provider, inspection, num_threads, name=ENCODER_NAME)
        package = open_package(directory, DECODER_NAME)
        self.path, model = package.path, package.model
        self.metadata = read_metadata(package, provider)
        _check_interface(model, self.path)
        self.taps = inspection.find_taps(model)
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self.taps)
        self.session = start_session(package, make_options(num_threads), provider)
        config = read_config(directory)
        self.config = dict(config.values)
        self.context_length = config.size("max_position_embeddings")
        self.generation = read_generation(directory)
        inputs = {value.name: value for value in self.session.get_inputs()}
        self._past = {
            name: (read_cache_shape(value, config), onnx.helper.tensor_dtype_to_np_dtype(ELEMENT_TYPES[value.type]))
            for name, value in inputs.items()
            if names.is_past(name)
        }
        self._encoded = [name for name in (names.ENCODER_HIDDEN_STATES, names.ENCODER_ATTENTION_MASK) if name in inputs]
        vocabulary = next(value.shape[2] for value in self.session.get_outputs() if value.name == names.LOGITS)
        self.vocab_size = vocabulary if isinstance(vocabulary, int) else config.size("vocab_size")

    def encode(self, given: Tensors) -> Decoding:
        """Read a batch of texts or sounds; nothing is written yet.

        Raises:
            ExportError: an input is missing, or onnxruntime refuses their values.
        """
        shown = self.encoder.run(given)
        found = {names.ENCODER_HIDDEN_STATES: shown.pop(names.LAST_HIDDEN_STATE).numpy()}
        if names.ENCODER_ATTENTION_MASK in self._encoded:
            found[names.ENCODER_ATTENTION_MASK] = given[names.ATTENTION_MASK].numpy().astype(np.int64)
        batch = len(found[names.ENCODER_HIDDEN_STATES])
        past = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, width), kind))
            for name, ((_, heads, _, width), kind) in self._past.items()
        }
        encoded = {name: ort.OrtValue.ortvalue_from_numpy(found[name]) for name in self._encoded}
        return Decoding(encoded, past, shown=shown)

    def run(self, decoding: Decoding, ids: Ints) -> dict[str, Floats]:
        """Feed ids [B, S]; returns logits [B, S, V] and taps.

        The ids follow those that were fed before.

        Raises:
            ExportError: they are more than the context holds.
        """
        total = decoding.length + ids.shape[1]
        if total > self.context_length:
            raise ExportError(
                f"{total} tokens to write; the model's context holds {self.context_length}; ask for fewer"
            )
        binding = self.session.io_binding()
        binding.bind_cpu_input(names.INPUT_IDS, np.ascontiguousarray(ids, np.int64))
        for name, value in (*decoding.encoded.items(), *decoding.past.items()):
            binding.bind_ortvalue_input(name, value)
        is_cached = decoding.length > 0
        binding.bind_cpu_input(names.USE_CACHE_BRANCH, np.array([is_cached]))
        made = [name for name in decoding.past if not (is_cached and names.attends_to_encoder(name))]
        shown = [names.LOGITS, *self.taps]
        for name in (*map(names.present_of, made), *shown):
            binding.bind_output(name)
        with onnxruntime_errors(self.path, "run"):
            self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        decoding.past |= dict(zip(made, outputs, strict=False))
        decoding.length = total
        return {
            name: np.asarray(value.numpy(), np.float32) for name, value in zip(shown, outputs[len(made) :], strict=True)
        }

    def generate(
        self, given: Tensors, sampling: Sampling, max_new_tokens: int, texts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int | None, ...]]:
        """Yield each row's next token, up to `max_new_tokens` times.

        A row that has ended yields None. How a row begins and ends is as the package says. What is drawn depends on the
        seed and the row's own tokens of `texts`.

        Raises:
            ExportError: the package does not say which token comes first, or the context is too short.
        """
        start, forced = self.generation.decoder_start, self.generation.forced_last
        if start is None:
            raise ExportError(
                f"{self.path.parent}: no file says which token the decoder is given first; set decoder_start_token_id "
                "in generation_config.json"
            )
        decoding, count = self.encode(given), len(texts)
        uniforms = draw_uniforms(texts, sampling.seed, max_new_tokens)
        ids = np.full((count, 1), start, np.int64)
        seen = np.zeros((count, self.vocab_size), np.bool_)
        running = [True] * count
        for step in range(max_new_tokens):
            seen[np.arange(count), ids[:, 0]] = True
            logits = self.run(decoding, ids)[names.LOGITS][:, -1]
            must = self.generation.forced_first if step == 0 else forced if step == max_new_tokens - 1 else None
            chosen = choose_tokens(logits, sampling, uniforms[step], seen)
            tokens = [must if must is not None else token for token in chosen.tolist()]
            yield tuple(token if runs else None for token, runs in zip(tokens, running, strict=True))
            running = [runs and token not in self.generation.ends for token, runs in zip(tokens, running, strict=True)]
            if not any(running):
                return
            ids = np.array(tokens, np.int64)[:, None]


def _check_interface(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a graph that lacks such a decoder's inputs and outputs."""
    inputs, outputs = ({value.name for value in side} for side in (model.graph.input, model.graph.output))
    past = [name for name in inputs if names.is_past(name)]
    needed = {names.INPUT_IDS, names.ENCODER_HIDDEN_STATES, names.USE_CACHE_BRANCH}
    lacking = sorted(needed - inputs | {names.LOGITS, *map(names.present_of, past)} - outputs)
    if lacking or not past:
        raise ExportError(
            f"{path}: lacks {lacking[0] if lacking else names.past(0, 'key', 'decoder')}; the decoder of an encoder "
            "reads input_ids, encoder_hidden_states, use_cache_branch, and past_key_values.N.decoder.key, .value and "
            "N.encoder.key, .value, and gives logits and present; export it with these names"
        )
