"""The model card: figures of a package, and how to run it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from dense2moe.convert.report.facts import ReportFacts
from dense2moe.convert.report.figures import figure_title
from dense2moe.convert.report.names import CARD_NAME
from dense2moe.convert.report.numerals import format_count
from dense2moe.convert.report.parity_tables import tier_table
from dense2moe.convert.report.summary import describe_models, row_cells, summarize, summary_columns
from dense2moe.convert.report.templates import load_template
from dense2moe.convert.report.verdicts import judge
from dense2moe.convert.stage_names import StageName
from dense2moe.export.opening import load_tokenizer
from dense2moe.export.package import MAX_LENGTH
from dense2moe.export.runtime.generation import Generation, read_generation
from dense2moe.export.storage import GENAI_CONFIG_NAME
from dense2moe.upcycle.checkpoints.class_heads import find_place, list_parts
from dense2moe.upcycle.checkpoints.pooling_files import read_pooling
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.checkpoints.tokenizer import has_tokenizer
from dense2moe.upcycle.tasks.head import VECTORS
from dense2moe.upcycle.training.task_choice import find_task_name

_TEMPLATE_NAME = "card.md.j2"
_LABELS = {
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "image-classification": "ImageClassification",
}
"""How classes of transformers and optimum end that give labels, by their task."""
_BODIES = {
    "text-generation": "decoder",
    "fill-mask": "fill_mask",
    "feature-extraction": "vectors",
    "question-answering": "answers",
    **dict.fromkeys(_LABELS, "labels"),
}
"""The template that tells how to run a package, by its task."""
_MARKS = re.compile(r"[\\`*_\[\]|~$]|<(?=[A-Za-z/!?])|&(?=[#\w]+;)|^[#>+-]")


def write_card(facts: ReportFacts, variant: str, package: Path, output: Path) -> None:
    """Write the card of one variant as `README.md` into the directory `output`.

    `package` is looked at for what can run it. It says at its head whether parity passed. A licence stands in it only
    where the dense model's card names one; the base model is the dense one, by its id on the hub or its directory's
    name.
    """
    config = json.loads((package / "config.json").read_text(encoding="utf-8"))
    model_config = read_config(package)
    context, task = config.get("max_position_embeddings", 0), find_task_name(model_config)
    tokenizer = load_tokenizer(package) if has_tokenizer(package) else None
    generation = read_generation(package, tokenizer)
    chat = bool(tokenizer and tokenizer.chat_template)
    found = facts.variants[variant]
    rows = [row for row in summarize(facts) if row.passed is None or row.name == f"ONNX {variant}"]
    others = {f"ONNX {name}:" for name in facts.variants if name != variant}
    text = load_template(_TEMPLATE_NAME).render(
        metadata=_metadata(facts, variant, task),
        body=_BODIES[task],
        task=task,
        labels=_LABELS.get(task),
        pooling=read_pooling(package) if task == VECTORS else None,
        parts=list_parts(model_config),
        place=find_place(model_config),
        remote=", trust_remote_code=True" if "mixture" in config else "",
        facts=facts,
        variant=variant,
        name=escape(facts.name),
        origin=escape(facts.source.origin if facts.base_model else _name_source(facts)),
        source=_name_source(facts),
        parity=found.parity,
        breaches=[escape(breach) for breach in found.parity.breaches],
        model=facts.exported,
        onnx=found.onnx,
        models=describe_models(facts),
        figure=facts.figure("dense"),
        figure_title=figure_title(facts.figure("dense")),
        count=format_count,
        figures=_markdown_table(summary_columns(facts), [row_cells(row) for row in rows]),
        tiers=_tier_lines(facts, variant),
        findings=[
            escape(verdict.text)
            for verdict in judge(facts)
            if not any(verdict.text.startswith(other) for other in others)
        ],
        genai=(package / GENAI_CONFIG_NAME).is_file(),
        tell_heads=config.get("num_key_value_heads") not in (None, config.get("num_attention_heads")),
        tell_head_size=_has_own_head_size(config),
        context=context,
        chat=chat,
        prompt="Tell me a story." if chat else "Once",
        num_tokens=min(40, context // 2),
        genai_length=min(context, MAX_LENGTH),
        checkpoint=_name_checkpoint(facts),
        generation=generation,
        sampling=_tell_sampling(generation),
        ends=_tell_ends(generation, tokenizer),
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", facts.recipe)), default=0)),
        digests=facts.digests[f"onnx-{variant}"],
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / CARD_NAME).write_text(text.rstrip() + "\n", encoding="utf-8")


def _has_own_head_size(config: Mapping[str, Any]) -> bool:
    """Whether heads are no equal shares of the hidden size."""
    size, hidden, heads = (config.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    return size is not None and hidden is not None and bool(heads) and size * heads != hidden


def _name_source(facts: ReportFacts) -> str:
    """The dense model's id on the hub, or its directory's name."""
    return facts.base_model or " ".join(Path(facts.source.origin).name.split())


def _name_sources(facts: ReportFacts) -> str | list[str]:
    """The dense model, and all that were fine-tuned from it, by name."""
    others = [each.hub or " ".join(Path(each.origin).name.split()) for each in facts.source.sources]
    return [_name_source(facts), *others] if others else _name_source(facts)


def _name_checkpoint(facts: ReportFacts) -> str:
    """The directory of the exported torch model, in the work directory."""
    stage: StageName = "finetune" if facts.exported == "fine-tuned" else "upcycle"
    return f"{stage}-{facts.keys[stage][:12]}"


def escape(text: str) -> str:
    """Plain text for a line of Markdown: marks and HTML are escaped."""
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def _tell_sampling(generation: Generation) -> str:
    """Settings of sampling or of greedy decoding; empty if there are none."""
    sampling = generation.sampling
    drawn = (
        [f"temperature {sampling.temperature:g}", f"top-k {sampling.top_k}", f"top-p {sampling.top_p:g}"]
        if generation.draws
        else []
    )
    drawn += [f"min-p {sampling.min_p:g}"] if generation.draws and sampling.min_p else []
    return ", ".join(
        [
            *drawn,
            *([f"a repetition penalty of {sampling.repetition_penalty:g}"] if sampling.repetition_penalty != 1 else []),
        ]
    )


def _tell_ends(generation: Generation, tokenizer: Any) -> str:
    """The end tokens, by name if there is a tokenizer."""
    names = {token: None if tokenizer is None else tokenizer.convert_ids_to_tokens(token) for token in generation.ends}
    return " or ".join(
        f"token {token}" if name is None else f"{escape(str(name))} ({token})" for token, name in names.items()
    )


def _metadata(facts: ReportFacts, variant: str, task: str) -> str:
    tags = ["onnx", "onnxruntime", "mixture-of-experts", "sparse-upcycling", "dense2moe", variant]
    license_fields: dict[str, Any] = dict(facts.license)
    data = ModelCardData(
        **license_fields,
        base_model=_name_sources(facts),
        pipeline_tag=task,
        library_name="onnx",
        tags=tags,
        ignore_metadata_errors=False,
    )
    return str(data.to_yaml())


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of GitHub's Markdown; all columns but the first align right."""
    lines = [headers, ["---", *["--:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _tier_lines(facts: ReportFacts, variant: str) -> list[str]:
    """Each tier's question and its answers, by provider if several ran."""
    table = tier_table({variant: facts.variants[variant]})
    lines = []
    for tier, *answers, question in table.rows:
        told = "; ".join(
            f"{answer} ({header.partition(', ')[2]})" if ", " in header else answer
            for header, answer in zip(table.headers[1:-1], answers, strict=True)
        )
        lines.append(escape(f"{tier}: {question} {told}."))
    return lines
