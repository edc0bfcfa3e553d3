"""Parity: does the package compute what the torch model computes?

Two questions, two numbers. Against the *twin*, the torch model with the very weights of the package: is the export
right? Against the fine-tuned model: did quantizing cost too much? Both references are unpatched transformers in float32
with eager experts; the twin reads the inputs of products as the graph does, rounded where the graph rounds them.

Eight tiers answer, each another question, and all of them for every variant:

    weights    every row of every matrix in the file: is it the twin's?
    operator   each router and each block of experts on the graph's own input, every expert visited: which one is wrong?
    layer      every other place of every layer, embedding and head, on the graph's own input: what differs there?
    logits     prefill, chained decoding, batches, left padding, long rows, text of its own: in what way of feeding it?
    language   perplexity, KL, top-1 and top-5: what does it cost?
    task       accuracy, F1, rank correlation on tasks of the user's: what does it cost there?
    routing    the same experts, by layer and given the reference's margin; KL with routing forced: weights or paths?
    files      tokenizer, generation and genai configs: does the package say of itself what the checkpoint says?

One place from the graph's own input is held to a multiple of float32's noise, measured there against float64, whatever
the graph rounds: the same numbers are rounded in the same way (`dense2moe.export.parity.inside.local`). Whole models
are held to it where the graph computes in float32 alone; where it rounds, to what two equally rounded computations part
by (`dense2moe.export.parity.rounding`), and each way of feeding it to one full prefill of the graph itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from dense2moe.export.blocks import choose_blocks
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.provider import ProviderJudgement
from dense2moe.export.parity.records import Parity, ProviderParity, Tier
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.quantization.twin import SCHEME_NAME, Twin
from dense2moe.export.runtime.decoder import CPU, CUDA, is_at_hand
from dense2moe.export.variant import ElementType
from dense2moe.upcycle.progress import Progress


def check_parity(subject: ParitySubject, config: ParityConfig, progress: Progress) -> Parity:
    """Compare a package with twin and fine-tuned model, on every provider.

    Providers that this machine lacks are left out. Figures are compared on some blocks, taken evenly, and told for all
    text: what the fine-tuned model has there, times the ratio of both on these blocks. A package that no provider here
    can run is a breach.

    Raises:
        ExportError: the package or a checkpoint cannot be loaded, or they are not of one model.
    """
    losses = subject.finetuned_losses
    count = config.num_blocks or -(-config.language_tokens // subject.blocks.shape[1])
    known = None if losses is None else torch.tensor(losses, dtype=torch.float64)
    whole_loss = None if known is None else float(known.mean())
    some = replace(
        subject,
        blocks=choose_blocks(subject.blocks, count),
        counted=None if subject.counted is None else choose_blocks(subject.counted, count),
        finetuned_losses=None if known is None else choose_blocks(known, count).tolist(),
    )
    computes_in = Twin(subject.twin).element_type if (subject.twin / SCHEME_NAME).is_file() else "float32"
    judgement = ProviderJudgement(some, config, progress, whole_loss)
    return judge_everywhere(judgement.judge, computes_in)


def judge_everywhere(
    judge: Callable[[str], tuple[ProviderParity, list[tuple[Tier, str]]]], computes_in: ElementType
) -> Parity:
    """Judge a package on every provider that has its type."""
    providers: dict[str, ProviderParity | str] = {}
    breaches: list[str] = []
    for provider in (CPU, CUDA):
        if provider == CPU and computes_in == "bfloat16":
            providers[provider] = "not run: onnxruntime's CPU does not compute in bfloat16"
            continue
        if provider == CUDA and not is_at_hand(provider):
            providers[provider] = "not run: no CUDA device"
            continue
        result, broken = judge(provider)
        providers[provider] = result
        breaches += [f"{provider}: {tier}: {breach}" for tier, breach in broken]
    if all(isinstance(found, str) for found in providers.values()):
        breaches.append(
            f"compared nowhere: {'; '.join(f'{provider}: {found}' for provider, found in providers.items())}"
        )
    return Parity(providers, tuple(breaches))
