"""The ONNX package: graph, external weights, tokenizer, and configs for runtimes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dense2moe.export import names
from dense2moe.export.coverage import find_refusal
from dense2moe.export.facts import LoweringChoice, LoweringTime, OnnxFacts
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.graph.decoder import DecoderGraph, build_decoder, find_candidates
from dense2moe.export.graph.invariants import check_graphs
from dense2moe.export.heads import describe_cache, head_size
from dense2moe.export.lowering import Lowering
from dense2moe.export.quantization.twin import Twin
from dense2moe.export.runtime.decoder import PROVIDERS, is_at_hand
from dense2moe.export.runtime.encoder_decoder import EncoderDecoder
from dense2moe.export.runtime.generation import Generation, read_generation
from dense2moe.export.runtime.pass_speed import measure_passes
from dense2moe.export.runtime.single_pass import SinglePass
from dense2moe.export.runtime.speed import Speed
from dense2moe.export.runtime.writing_speed import measure_writing
from dense2moe.export.storage import (
    GENAI_CONFIG_NAME,
    LOWERING_KEY,
    MIN_ONNXRUNTIME_KEY,
    MODEL_NAME,
    has_cache,
    save_graph,
    save_package_config,
)
from dense2moe.export.timing import cut_for_timing, time_lowerings
from dense2moe.export.tracing.passes import find_traced_candidates, lower_traces
from dense2moe.export.tracing.tracer import Trace, check_traced_type, trace_model
from dense2moe.upcycle.checkpoints.mixture_classes import is_own
from dense2moe.upcycle.checkpoints.reader import copy_companions
from dense2moe.upcycle.progress import Progress

MAX_LENGTH = 4096
"""Tokens of prompt and answer for which onnxruntime-genai allocates its cache, unless it is told another number."""
Timings = Sequence[LoweringTime]
Graphs = Mapping[str, DecoderGraph]
"""The graphs of a package by the names of their files."""


def write_package(source: Path, output: Path, config: OnnxConfig, progress: Progress) -> OnnxFacts:
    """Write the package of the (quantized) checkpoint in `source` into `output`.

    Weights go to disk one initializer at a time.

    Raises:
        ExportError: the architecture or the lowering asked for is not covered, or what was written breaks an invariant
            (`dense2moe.export.graph.invariants`).
    """
    twin = Twin(source)
    write = _build if find_refusal(twin.checkpoint.config) is None else _trace
    graphs, choice, timings = write(twin, config, output, progress)
    size = 0
    for name, graph in graphs.items():
        graph.model.metadata_props.update({MIN_ONNXRUNTIME_KEY: graph.min_onnxruntime, LOWERING_KEY: graph.lowering})
        size += save_graph(graph.model, output, progress, name)
    check_graphs(output, twin, tuple(graphs))
    copy_companions(source, output)
    graph = list(graphs.values())[-1]
    described = describe_cache(twin.checkpoint.config) if graph.shares_buffer else twin.checkpoint.config
    save_package_config(described, output, MODEL_NAME in graphs and has_cache(graph.model))
    if len(graphs) == 1 and (shapes := set(_cache_shapes(graph))) and not is_own(twin.checkpoint.config.model_type):
        description = genai_config(described, graph.shares_buffer, read_generation(output))
        if shapes == {_cache_shape(description)}:
            (output / GENAI_CONFIG_NAME).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return OnnxFacts(
        device=config.device,
        element_type=twin.element_type,
        lowering=graph.lowering,
        choice=choice,
        timings=tuple(timings),
        min_onnxruntime=graph.min_onnxruntime,
        num_nodes=sum(len(each.model.graph) for each in graphs.values()),
        package_bytes=size,
    )


def _build(twin: Twin, config: OnnxConfig, folder: Path, progress: Progress) -> tuple[Graphs, LoweringChoice, Timings]:
    """The graph from the checkpoint's tensors."""
    candidates = find_candidates(twin, config)
    cut = cut_for_timing(twin)
    lowering, choice, timings = _choose(
        twin, config, candidates, lambda found: {MODEL_NAME: build_decoder(twin, config, found, cut)}, folder, progress
    )
    return {MODEL_NAME: build_decoder(twin, config, lowering)}, choice, timings


def _trace(twin: Twin, config: OnnxConfig, folder: Path, progress: Progress) -> tuple[Graphs, LoweringChoice, Timings]:
    """The graphs traced from the model, where no builder fits."""
    check_traced_type(twin.checkpoint.config, twin.element_type, str(twin.directory))
    progress("tracing", 0, 1)
    traces = trace_model(twin)
    progress("tracing", 1, 1)
    candidates = find_traced_candidates(traces[0], twin, config)
    lowering, choice, timings = _choose(
        twin,
        config,
        candidates,
        lambda found: lower_traces(traces, twin, config, found),
        folder,
        progress,
        _find_measure(traces[0], config),
    )
    return lower_traces(traces, twin, config, lowering), choice, timings


def _find_measure(trace: Trace, config: OnnxConfig) -> Callable[[Path], Speed] | None:
    """What takes a traced package's speed.

    It follows from the graph that reads first. None is a decoder's.
    """
    if trace.interface.part == "encoder":
        return partial(_measure_pair, trace, config)
    return None if trace.interface.has_cache else partial(_measure_passes, trace, config)


def _measure_passes(trace: Trace, config: OnnxConfig, directory: Path) -> Speed:
    """The speed of a package without a cache.

    On one text, image or sound like the traced ones.
    """
    length = min(config.request.prompt_tokens, trace.interface.most_tokens)
    package = SinglePass(directory, PROVIDERS[config.device])
    return measure_passes(package, trace.interface.make_inputs(1, length), length, num_rounds=1)


def _measure_pair(trace: Trace, config: OnnxConfig, directory: Path) -> Speed:
    """The speed of an encoder and a decoder.

    On one text or sound like the traced ones.
    """
    length = min(config.request.prompt_tokens, trace.interface.most_tokens)
    package = EncoderDecoder(directory, PROVIDERS[config.device])
    return measure_writing(package, trace.interface.make_inputs(1, length), length, config.request.new_tokens, 1)


def _choose(
    twin: Twin,
    config: OnnxConfig,
    candidates: Sequence[Lowering],
    build: Callable[[Lowering], Graphs],
    folder: Path,
    progress: Progress,
    measure: Callable[[Path], Speed] | None = None,
) -> tuple[Lowering | None, LoweringChoice, Timings]:
    """The lowering to write, how it was chosen, and deciding times.

    The lowering is None for a model without experts.
    """
    if len(candidates) < 2:
        return next(iter(candidates), None), "only", ()
    if not is_at_hand(PROVIDERS[config.device]):
        return candidates[0], "first, as no such device was there to time on", ()
    timings = time_lowerings(twin, config, candidates, build, folder, progress, measure)
    return next(lowering for lowering in candidates if lowering.name == timings[0].lowering), "timed", timings


def _cache_shapes(graph: DecoderGraph) -> list[tuple[Any, Any]]:
    """Number and size of heads, for every cached key and value."""
    past = [value.shape for value in graph.model.graph.inputs if value.name and names.is_past(value.name)]
    return [(shape[1], shape[3]) for shape in past if shape is not None]


def _cache_shape(description: dict[str, Any]) -> tuple[Any, Any]:
    decoder = description["model"]["decoder"]
    return decoder["num_key_value_heads"], decoder["head_size"]


def genai_config(
    config: PreTrainedConfig, shares_buffer: bool = True, generation: Generation | None = None
) -> dict[str, Any]:
    """The description that onnxruntime-genai reads.

    Its type "decoder" takes any graph with these input and output names. Text ends, and is drawn, as `generation` says.
    It may be as long as the context, but by default no longer than 4,096 tokens: the cache of all of
    `search.max_length` is allocated at once, 34 GB for 131,072 tokens of an 8 B model. It knows one shape of keys and
    values, so a model whose shapes differ, as with latent attention, gets none.
    """
    heads = config.num_attention_heads
    ends = list(generation.ends) if generation is not None and generation.ends else config.eos_token_id
    eos = 0 if ends is None else ends[0] if isinstance(ends, list) and len(ends) == 1 else ends
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
                "head_size": head_size(config),
                "hidden_size": config.hidden_size,
                "num_attention_heads": heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
                **names.genai_names(),
            },
        },
        "search": {
            "max_length": min(context, MAX_LENGTH),
            "past_present_share_buffer": shares_buffer,
            **_genai_search(generation or Generation(), config.vocab_size),
        },
    }


def _genai_search(generation: Generation, vocab_size: int) -> dict[str, Any]:
    """Sampling settings in onnxruntime-genai's terms.

    It has no min_p, and takes a top_k of 0 for greedy.
    """
    sampling = generation.sampling
    drawn = (
        {"temperature": sampling.temperature, "top_k": sampling.top_k or vocab_size, "top_p": sampling.top_p}
        if generation.draws
        else {}
    )
    penalty = {"repetition_penalty": sampling.repetition_penalty} if sampling.repetition_penalty != 1 else {}
    return {"do_sample": generation.draws, **drawn, **penalty}
