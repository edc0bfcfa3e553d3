"""The engines that benchmarks/inference.py races, each a process that answers over its standard streams.

    PYTHON benchmarks/engines.py run ENGINE PATH THREADS
    PYTHON benchmarks/engines.py make gguf|onnx|openvino CHECKPOINT OUTPUT [TYPE]

A rival lives in a Python of its own, so nothing but numpy is imported before it is known which engine this is. A line
in is a request as JSON, `{"prompt": [...], "tokens": [...], "num_logits": 0}` with ids; a line out is its answer,
`{"prefill": seconds, "decode": seconds, "logits": [...]}`: the prompt at once, then the tokens one by one, every time
until the last token's logits can be read; of so many runs they are in the answer. `make` writes the file that a rival
runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """A model that is loaded; caches are made in `reset`, outside of the time."""

    def reset(self, capacity: int) -> None:
        """Forget all tokens; so many are to come."""

    def feed(self, ids: np.ndarray) -> None:
        """Run ids [S] after what came before, until the logits of the last can be read."""

    def logits(self) -> np.ndarray:
        """Logits [V] after the last token."""


class Ours:
    """dense2moe's runtime on dense2moe's package."""

    packages = ("onnxruntime",)

    def __init__(self, path: Path, threads: int) -> None:
        from dense2moe.export.runtime.decoder import Decoder

        self.decoder = Decoder(path, num_threads=threads)

    def reset(self, capacity: int) -> None:
        self.cache = self.decoder.new_cache(1, capacity)

    def feed(self, ids: np.ndarray) -> None:
        self.found = self.decoder.run(self.cache, ids[None], logits_to_keep=1)["logits"]

    def logits(self) -> np.ndarray:
        return self.found[0, -1]


class Genai:
    """onnxruntime-genai on dense2moe's package."""

    packages = ("onnxruntime-genai",)

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai as og

        self.og = og
        config = og.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = og.Model(config)

    def reset(self, capacity: int) -> None:
        options = self.og.GeneratorParams(self.model)
        options.set_search_options(max_length=capacity + 1, do_sample=False)
        self.generator = self.og.Generator(self.model, options)

    def feed(self, ids: np.ndarray) -> None:
        self.generator.append_tokens(ids.astype(np.int32))

    def logits(self) -> np.ndarray:
        return np.asarray(self.generator.get_logits()).reshape(-1, self.generator.get_logits().shape[-1])[-1]


class ExportedOnnx:
    """onnxruntime on the graph of transformers' exporter; the cache goes from output to input without a copy."""

    packages = ("onnxruntime", "transformers")

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        self.ort = ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.past = {value.name: value.shape for value in self.session.get_inputs() if "past_key_values" in value.name}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def reset(self, capacity: int) -> None:
        empty = {name: np.zeros((1, heads, 0, size), np.float32) for name, (_, heads, _, size) in self.past.items()}
        self.cache = {name: self.ort.OrtValue.ortvalue_from_numpy(array) for name, array in empty.items()}
        self.length = 0

    def feed(self, ids: np.ndarray) -> None:
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids[None])
        binding.bind_cpu_input("position_ids", np.arange(self.length, self.length + len(ids), dtype=np.int64)[None])
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        found = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        self.cache = {name: found[name.replace("input.", "output.", 1)] for name in self.past}
        self.length += len(ids)
        self.found = found["logits"].numpy()

    def logits(self) -> np.ndarray:
        return self.found[0, -1]


class OpenVino:
    """OpenVINO on what transformers' exporter wrote for it, its cache inside.

    All in float32, where its default would be bfloat16.
    """

    packages = ("openvino",)

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.compiled = core.compile_model(core.read_model(path / "openvino_model.xml"), "CPU", settings)

    def reset(self, capacity: int) -> None:
        self.request = self.compiled.create_infer_request()
        self.length = 0

    def feed(self, ids: np.ndarray) -> None:
        positions = np.arange(self.length, self.length + len(ids), dtype=np.int64)[None]
        self.request.infer({"input_ids": ids[None], "position_ids": positions, "beam_idx": np.zeros(1, np.int32)})
        self.length += len(ids)

    def logits(self) -> np.ndarray:
        return np.array(self.request.get_tensor("logits").data[0, -1])


class LlamaCpp:
    """llama.cpp by llama-cpp-python. Its cache is float16, its default, and float32 for float32 weights."""

    packages = ("llama_cpp_python",)

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.library = llama_cpp
        cache = (
            {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if path.stem.endswith("f32") else {}
        )
        self.model = llama_cpp.Llama(
            str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_batch=1024, verbose=False, **cache
        )

    def reset(self, capacity: int) -> None:
        self.model.reset()

    def feed(self, ids: np.ndarray) -> None:
        self.model.eval(ids.tolist())
        self.pointer = self.library.llama_get_logits_ith(self.model.ctx, -1)  # waits until they are computed

    def logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(self.pointer, shape=(self.model.n_vocab(),)).copy()


class Torch:
    """transformers in eager torch, float32, under the fastest of its experts implementations for prefill.

    And for decoding.
    """

    packages = ("torch", "transformers")
    # `batched_mm` gathers each token's experts: as many gigabytes as a prompt has tokens.
    implementations = {"prefill": ("eager", "grouped_mm"), "decode": ("eager", "grouped_mm", "batched_mm")}  # noqa: RUF012

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.fastest: dict[str, str] = {}
        self.current = ""
        ids = np.arange(2, 130)
        for phase, names in self.implementations.items():
            self.fastest[phase] = min(names, key=lambda name, phase=phase: self._time(phase, name, ids))

    def _time(self, phase: str, name: str, ids: np.ndarray) -> float:
        self.fastest[phase] = name
        seconds = []
        for _ in range(2):
            self.reset(len(ids))
            started = time.perf_counter()
            for piece in [ids] if phase == "prefill" else ids[:8, None]:
                self._run(piece, phase)
            seconds.append(time.perf_counter() - started)
        return seconds[-1]

    def reset(self, capacity: int) -> None:
        self.cache = None

    def feed(self, ids: np.ndarray) -> None:
        self._run(ids, "prefill" if len(ids) > 1 else "decode")

    def _run(self, ids: np.ndarray, phase: str) -> None:
        if self.current != self.fastest[phase]:
            self.current = self.fastest[phase]
            self.model.set_experts_implementation(self.current)
        with self.torch.inference_mode():
            output = self.model(
                input_ids=self.torch.from_numpy(ids)[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        self.cache, self.found = output.past_key_values, output.logits

    def logits(self) -> np.ndarray:
        return self.found[0, -1].numpy()


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "dense2moe": Ours,
    "onnxruntime-genai": Genai,
    "transformers-onnx": ExportedOnnx,
    "openvino": OpenVino,
    "llama.cpp": LlamaCpp,
    "torch": Torch,
}


def answer(engine: Engine, prompt: list[int], tokens: list[int], num_logits: int) -> dict[str, Any]:
    """Seconds of prefill and decoding.

    And the logits [num_logits, V] after the prompt and after each of the first tokens.
    """
    ids, steps = np.array(prompt, np.int64), [np.array([token], np.int64) for token in tokens]
    found: list[np.ndarray] = []
    engine.reset(len(prompt) + len(tokens))
    started = time.perf_counter()
    engine.feed(ids)
    middle = time.perf_counter()
    if num_logits:
        found.append(engine.logits().copy())
    for step in steps:
        engine.feed(step)
        if len(found) < num_logits:
            found.append(engine.logits().copy())
    return {
        "prefill": middle - started,
        "decode": time.perf_counter() - middle,
        "logits": [row.tolist() for row in found],
    }


def run(name: str, path: Path, threads: int) -> None:
    """Serve until standard input ends. Whatever an engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[name](path, threads)
    versions = [f"{package} {importlib.metadata.version(package)}" for package in getattr(engine, "packages", ())]
    note = ", ".join(f"{phase} {chosen}" for phase, chosen in getattr(engine, "fastest", {}).items())
    print(json.dumps({"versions": versions, "note": note}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(
            json.dumps(answer(engine, request["prompt"], request["tokens"], request["num_logits"])),
            file=answers,
            flush=True,
        )


def make_gguf(checkpoint: Path, output: Path, kind: str) -> None:
    """A Mixtral checkpoint as GGUF of the kind f32, q8_0 or q4_0.

    Every matrix but the routers, one tensor in memory at a time.
    """
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    vocabulary, num_experts = config["vocab_size"], config["num_local_experts"]
    kinds = {
        "f32": gguf.GGMLQuantizationType.F32,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
        "q4_0": gguf.GGMLQuantizationType.Q4_0,
    }
    files = {
        name: file
        for path in checkpoint.glob("*.safetensors")
        for file in [safe_open(path, "np")]
        for name in file.keys()  # noqa: SIM118
    }

    def read(name: str) -> np.ndarray:
        return np.ascontiguousarray(files[name].get_tensor(name), dtype=np.float32)

    def rotated(name: str, count: int) -> np.ndarray:
        """Rows of a head in pairs, as llama.cpp rotates them, and not in halves."""
        rows = read(name)
        return np.ascontiguousarray(
            rows.reshape(count, 2, len(rows) // count // 2, hidden).swapaxes(1, 2).reshape(rows.shape)
        )

    reads: dict[str, tuple[Callable[[], np.ndarray], tuple[int, ...], bool]] = {}

    def add(name: str, of: Callable[[], np.ndarray], shape: tuple[int, ...], quantized: bool = True) -> None:
        reads[name] = (of, shape, quantized)

    width = config["intermediate_size"]
    size = config.get("head_dim") or hidden // heads
    add("token_embd.weight", lambda: read("model.embed_tokens.weight"), (vocabulary, hidden))
    add("output_norm.weight", lambda: read("model.norm.weight"), (hidden,), False)
    head = "lm_head.weight" if "lm_head.weight" in files else "model.embed_tokens.weight"
    add("output.weight", lambda: read(head), (vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        block, p = f"blk.{layer}", f"model.layers.{layer}"
        a, m = f"{p}.self_attn", f"{p}.block_sparse_moe"
        add(f"{block}.attn_norm.weight", lambda p=p: read(f"{p}.input_layernorm.weight"), (hidden,), False)
        add(f"{block}.ffn_norm.weight", lambda p=p: read(f"{p}.post_attention_layernorm.weight"), (hidden,), False)
        add(f"{block}.attn_q.weight", lambda a=a: rotated(f"{a}.q_proj.weight", heads), (heads * size, hidden))
        add(f"{block}.attn_k.weight", lambda a=a: rotated(f"{a}.k_proj.weight", kv_heads), (kv_heads * size, hidden))
        add(f"{block}.attn_v.weight", lambda a=a: read(f"{a}.v_proj.weight"), (kv_heads * size, hidden))
        add(f"{block}.attn_output.weight", lambda a=a: read(f"{a}.o_proj.weight"), (hidden, heads * size))
        add(f"{block}.ffn_gate_inp.weight", lambda m=m: read(f"{m}.gate.weight"), (num_experts, hidden), False)
        for theirs, matrix in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            shape = (num_experts, hidden, width) if theirs == "down" else (num_experts, width, hidden)
            experts = [f"{m}.experts.{expert}.{matrix}.weight" for expert in range(num_experts)]
            add(
                f"{block}.ffn_{theirs}_exps.weight",
                lambda experts=experts: np.stack([read(name) for name in experts]),
                shape,
            )

    writer = gguf.GGUFWriter(output, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(num_experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(vocabulary)
    # A vocabulary is required; no text is read by it.
    pieces = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    pieces += [f"t{number}".encode() for number in range(vocabulary - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocabulary - 259)])
    types = {name: kinds[kind] if quantized else kinds["f32"] for name, (_, _, quantized) in reads.items()}
    for name, (_, shape, _) in reads.items():
        if types[name] is kinds["f32"]:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        else:
            stored = gguf.quant_shape_to_byte_shape(shape, types[name])
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (of, _, _) in reads.items():
        writer.write_tensor_data(of() if types[name] is kinds["f32"] else gguf.quants.quantize(of(), types[name]))
    writer.close()


def make_export(kind: str, checkpoint: Path, output: Path) -> None:
    """What transformers' exporter makes for onnxruntime, or for OpenVINO.

    One graph for prefill and decode, of any length, at batch 1.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter, OpenVINOConfig, OpenVINOExporter
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes
    from transformers.exporters.utils import decompose_for_generation

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(2, 18)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    step, inputs = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
    # All dimensions would be taken as dynamic, and the export then takes longer.
    shapes = {
        name: _lengths_only(found) for name, found in get_auto_dynamic_shapes(inputs).items() if found is not None
    }
    if kind == "onnx":
        exported = OnnxExporter().export(
            step, inputs, config=OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions="cpu")
        )
    else:
        exported = OpenVINOExporter().export(step, inputs, config=OpenVINOConfig(dynamic=True, dynamic_shapes=shapes))
    exported.save_pretrained(output)


def _lengths_only(shapes: Any) -> Any:
    """Of each tensor's dynamic dimensions the length.

    Of ids and positions [B, S], and of the cache [B, heads, S, head_dim].
    """
    if isinstance(shapes, dict):
        length = {2: 1, 4: 2}[len(shapes)]
        return {length: shapes[length]}
    return [_lengths_only(found) for found in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("engine", choices=ENGINES)
    runner.add_argument("path", type=Path)
    runner.add_argument("threads", type=int)
    maker = commands.add_parser("make")
    maker.add_argument("what", choices=("gguf", "onnx", "openvino"))
    maker.add_argument("checkpoint", type=Path)
    maker.add_argument("output", type=Path)
    maker.add_argument("kind", nargs="?", default="f32", choices=("f32", "q8_0", "q4_0"))
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.engine, arguments.path, arguments.threads)
    elif arguments.what == "gguf":
        make_gguf(arguments.checkpoint, arguments.output, arguments.kind)
    else:
        make_export(arguments.what, arguments.checkpoint, arguments.output)


if __name__ == "__main__":
    main()
