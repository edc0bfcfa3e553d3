"""The quantizers of others that benchmarks/quantization.py compares, each in a Python of its own.

    PYTHON benchmarks/quantizers.py NAME CHECKPOINT OUTPUT --calibration FILE --held-out FILE [--bits 4]
        [--block-size 32]

Each reads a Mixtral in float32, quantizes the matrices of its experts and attention, and leaves router, embedding and
head as they are. It writes the checkpoint again into OUTPUT, with the weights that its integers stand for, for the
benchmark to judge as any other, and `facts.json`: its version and the bytes of the integers with their scales and
offsets. Token ids come as .npy, [N, S]. llama.cpp also runs the held-out ones itself, which rounds activations to 8
bits: its logits [N, S, V] are `logits.npy`.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")


def read_tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {
        name: tensor.astype(np.float32)
        for path in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def write_checkpoint(checkpoint: Path, output: Path, weights: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """The checkpoint with these weights in place of its own; no other matrix may be missing."""
    from safetensors.numpy import save_file

    tensors = read_tensors(checkpoint)
    missing = {name for name in tensors if name.split(".")[-2] in MATRICES} ^ set(weights)
    assert not missing, f"not the matrices of the checkpoint: {sorted(missing)[:4]}"
    for name, weight in weights.items():
        assert weight.shape == tensors[name].shape, name
        tensors[name] = np.ascontiguousarray(weight, np.float32)
    for path in checkpoint.iterdir():
        if path.suffix in (".json", ".model") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, output / path.name)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    (output / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def run_llama_cpp(kind: str, arguments: argparse.Namespace) -> None:
    """llama.cpp's own quantizer, every matrix of the one kind.

    With importance, weighted by each input's mean square on the calibration text.
    """
    import gguf
    import llama_cpp
    from engines import make_gguf

    whole, small = arguments.output / "whole.gguf", arguments.output / "quantized.gguf"
    make_gguf(arguments.checkpoint, whole, "f32")
    kind, _, weighted = kind.partition("+")
    settings = llama_cpp.llama_model_quantize_default_params()
    file_type = {
        "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
        "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
        "q4_k": "LLAMA_FTYPE_MOSTLY_Q4_K_S",
    }[kind]
    settings.ftype = getattr(llama_cpp, file_type)
    settings.pure = True
    settings.output_tensor_type = settings.token_embedding_type = llama_cpp.GGML_TYPE_F32
    if weighted:
        importance = {name: values.astype(np.float32).ravel() for name, values in np.load(arguments.importance).items()}
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # a nameless one ends it
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.data, entry.size = (
                name.encode(),
                values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
                values.size,
            )
        settings.imatrix = entries
    assert llama_cpp.llama_model_quantize(str(whole).encode(), str(small).encode(), ctypes.byref(settings)) == 0
    config = json.loads((arguments.checkpoint / "config.json").read_text(encoding="utf-8"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights, num_bytes, kinds = {}, 0, set()
    for tensor in gguf.GGUFReader(small).tensors:
        if not tensor.name.startswith("blk.") or "norm" in tensor.name or "gate_inp" in tensor.name:
            continue
        number, part = int(tensor.name.split(".")[1]), tensor.name.split(".")[2]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        num_bytes += int(tensor.n_bytes)
        kinds.add(tensor.tensor_type.name)
        if part.startswith("attn"):
            name = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}[part]
            if name in heads:  # rows in halves again, where llama.cpp has them in pairs
                values = values.reshape(heads[name], -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
            weights[f"model.layers.{number}.self_attn.{name}.weight"] = values
        else:
            name = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}[part]
            weights |= {
                f"model.layers.{number}.block_sparse_moe.experts.{n}.{name}.weight": matrix
                for n, matrix in enumerate(values)
            }
    held_out = np.load(arguments.held_out)
    model = llama_cpp.Llama(
        str(small),
        n_ctx=held_out.shape[1],
        n_batch=held_out.shape[1],
        logits_all=True,
        verbose=False,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    logits = np.empty((*held_out.shape, model.n_vocab()), np.float32)
    for row, ids in zip(logits, held_out, strict=True):
        model.reset()
        model.eval(ids.tolist())
        row[:] = model.scores[: len(ids)]
    np.save(arguments.output / "logits.npy", logits)
    whole.unlink()
    version = f"llama-cpp-python {importlib.metadata.version('llama_cpp_python')}"
    write_checkpoint(
        arguments.checkpoint,
        arguments.output,
        weights,
        {"version": version, "num_bytes": num_bytes, "kinds": sorted(kinds)},
    )


def run_gptqmodel(arguments: argparse.Namespace) -> None:
    """GPTQ by GPTQModel on the CPU, symmetric, inputs in their own order; read back from the integers of its file."""
    # it refuses to start with the one of two cores; and no compiler
    os.environ |= {
        "GPTQMODEL_CPU_WORKERS": "2",
        "GPTQMODEL_DISABLE_PACK_EXT": "1",
    }
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    settings = QuantizeConfig(bits=arguments.bits, group_size=arguments.block_size, sym=True, desc_act=False)
    model = GPTQModel.load(str(arguments.checkpoint), settings, device="cpu", dtype=torch.float32)
    text = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in np.load(arguments.calibration).tolist()]
    model.quantize(text, batch_size=8)
    packed = arguments.output / "packed"
    model.save(str(packed))
    tensors = {name: tensor for path in packed.glob("*.safetensors") for name, tensor in load_file(path).items()}
    weights, num_bytes = {}, 0
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        # [I / 8 or 4, O], [groups, O], [I]
        words, scales, groups = (tensors[f"{name}.{part}"] for part in ("qweight", "scales", "g_idx"))
        shifts = np.arange(0, 32, arguments.bits, dtype=np.uint32)[None, :, None]
        codes = (
            (words.numpy().view(np.uint32)[:, None] >> shifts & (2**arguments.bits - 1))
            .reshape(-1, words.shape[1])
            .astype(np.float32)
        )
        codes = codes[: len(groups)]  # the last word may hold more inputs than there are
        weight = (codes - 2 ** (arguments.bits - 1)) * scales.float().numpy()[groups.numpy()]
        for theirs, ours in {
            ".mlp.experts.": ".block_sparse_moe.experts.",
            ".gate_proj": ".w1",
            ".down_proj": ".w2",
            ".up_proj": ".w3",
        }.items():
            name = name.replace(theirs, ours)
        weights[f"{name}.weight"] = weight.T
        num_bytes += words.nbytes + scales.nbytes  # no zero points, since all are the middle
    facts = {
        "version": f"gptqmodel {importlib.metadata.version('gptqmodel')}",
        "num_bytes": num_bytes,
        "kinds": ["symmetric"],
    }
    write_checkpoint(arguments.checkpoint, arguments.output, weights, facts)


QUANTIZERS: dict[str, Callable[[argparse.Namespace], None]] = {
    **{
        f"llama.cpp-{kind}": lambda arguments, kind=kind: run_llama_cpp(kind, arguments)
        for kind in ("q8_0", "q4_0", "q4_k", "q4_0+importance", "q4_k+importance")
    },
    "gptqmodel": run_gptqmodel,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=QUANTIZERS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--importance", type=Path, help="mean square of each input of GGUF's tensors, .npz")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    QUANTIZERS[arguments.name](arguments)


if __name__ == "__main__":
    main()
