"""The ONNX package: graph, external weights, tokenizer, and the configs that runtimes read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from export.config import Device, ElementType, OnnxConfig
from export.decoder import build_decoder, find_candidates
from export.progress import Progress
from export.runtime import PROVIDERS, is_at_hand
from export.storage import LOWERING_KEY, MIN_ONNXRUNTIME_KEY, MODEL_NAME, save_graph
from export.timing import LoweringTime, time_lowerings
from export.twin import Twin
from upcycle.checkpoint import copy_companions


@dataclass(frozen=True)
class OnnxFacts:
    """What was written, and how its lowering was chosen; the lowering is "none" where no layer has experts.

    It is the only one that can be, the fastest of those that were timed here (`timings`, the fastest first), or, where there is no device of the
    kind to time on, the first of those that can be.
    """

    device: Device
    element_type: ElementType
    lowering: str
    choice: Literal["only", "timed", "first, no such device here to time on"]
    timings: tuple[LoweringTime, ...]
    min_onnxruntime: str
    num_nodes: int
    package_bytes: int


def write_package(source: Path, output: Path, config: OnnxConfig, progress: Progress) -> OnnxFacts:
    """Write the package of the (quantized) checkpoint in `source` into `output`; weights go to disk one initializer at a time.

    Raises:
        ExportError: the architecture or the lowering asked for is not covered.
    """
    twin = Twin(source)
    candidates = find_candidates(twin, config)
    timed = len(candidates) > 1 and is_at_hand(PROVIDERS[config.device])
    timings = time_lowerings(twin, config, candidates, output, progress) if timed else []
    ranked = sorted(candidates, key=lambda lowering: [found.lowering for found in timings].index(lowering.name)) if timings else candidates
    graph = build_decoder(twin, config, ranked[0] if ranked else None)
    graph.model.metadata_props.update({MIN_ONNXRUNTIME_KEY: graph.min_onnxruntime, LOWERING_KEY: graph.lowering})
    size = save_graph(graph.model, output, progress)
    copy_companions(source, output)
    twin.checkpoint.config.save_pretrained(output)
    (output / "genai_config.json").write_text(json.dumps(genai_config(twin.checkpoint.config), indent=2) + "\n", encoding="utf-8")
    return OnnxFacts(
        device=config.device,
        element_type=twin.element_type,
        lowering=graph.lowering,
        choice="only" if len(candidates) == 1 else "timed" if timed else "first, no such device here to time on",
        timings=tuple(timings),
        min_onnxruntime=graph.min_onnxruntime,
        num_nodes=len(graph.model.graph),
        package_bytes=size,
    )


def genai_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The description that onnxruntime-genai reads; its type "decoder" takes any graph with these input and output names."""
    heads = config.num_attention_heads
    eos = config.eos_token_id if config.eos_token_id is not None else 0
    first_eos = eos[0] if isinstance(eos, list) else eos
    bos = config.bos_token_id if config.bos_token_id is not None else first_eos
    pad = config.pad_token_id if config.pad_token_id is not None else first_eos
    context = config.max_position_embeddings
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "context_length": context,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_NAME,
                "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
                "hidden_size": config.hidden_size,
                "num_attention_heads": heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
            },
        },
        "search": {"max_length": context, "do_sample": False, "past_present_share_buffer": True},
    }
