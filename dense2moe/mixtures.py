"""Mixtures from Python: made of dense checkpoints, and grown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import NonNegativeInt, PositiveFloat

from dense2moe.arguments import PathLike, check_arguments, keep_quiet, read_given_blocks
from dense2moe.new_directory import new_directory
from dense2moe.upcycle.building.config import RouterDomain, UpcycleConfig
from dense2moe.upcycle.building.facts import Receipt, SoupLook, SourceDistance
from dense2moe.upcycle.building.growth import GrownMixture, RouterRow, RowSettings
from dense2moe.upcycle.building.growth import add_expert as grow
from dense2moe.upcycle.building.making import make_mixture
from dense2moe.upcycle.building.plan import UpcyclePlan, plan_upcycle
from dense2moe.upcycle.building.vocabulary import compare_companions
from dense2moe.upcycle.checkpoints.adapter import open_sources
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.data.blocks import read_domains
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.context import find_context
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import Examples

_BLOCK_SIZE = 256  # as in a recipe
_NO_TEXT = Examples.of_blocks(torch.zeros((0, _BLOCK_SIZE), dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True)
class Upcycled:
    """A mixture that was written.

    Attributes:
        plan: where every tensor came from, and the sizes of the mixture.
        receipt: how its logits compare with the dense model's.
        distances: how far each source is from the dense model, by class of tensor.
        soup: of a greedy soup every look, with the held-out loss of the models averaged, and which stayed.
        remarks: how sources differ from the dense model beside their weights, a line each.
    """

    plan: UpcyclePlan
    receipt: Receipt
    distances: tuple[SourceDistance, ...] = ()
    soup: tuple[SoupLook, ...] = ()
    remarks: tuple[str, ...] = ()


@check_arguments
def upcycle(
    dense: PathLike,
    output: PathLike,
    config: UpcycleConfig | None = None,
    *,
    data: PathLike | None = None,
    seed: NonNegativeInt = 0,
    sources: Mapping[str, PathLike] | None = None,
    progress: Progress | None = None,
) -> Upcycled:
    """Make a mixture of experts from a dense checkpoint, and compare both.

    With `sources`, which are fine-tuned from it, their FFNs become the experts, and the rest is merged. Memory does not
    grow with the model while it is written. The result is an architecture of transformers, which loads without code of
    ours.

    Args:
        dense: a Hugging Face checkpoint in safetensors.
        output: new directory of the mixture.
        config: experts, router, layers; 8 experts and top-2 if not given, or one expert a source.
        data: a directory of `prepare_data`: training text for routers that are read from it, by default where it has
            several domains that divide the experts evenly; validation text for a greedy soup.
        seed: seed of the router, the noise and the neurons that are drawn.
        sources: checkpoints, or LoRA adapters as peft writes them, by name.
        progress: called as the work goes on.

    Returns:
        The plan that was carried out, and the receipt: relative errors of logits in three dtypes. Of sources, how far
        they are from the dense checkpoint.

    Raises:
        MendableError: the checkpoint cannot be upcycled so, or what was written does not compute what the dense model
            computes; nothing is left then.

    Example:
        made = upcycle("dense", "mixture", UpcycleConfig(num_experts=4, num_experts_per_tok=2), seed=1)
        print(made.plan.num_parameters, made.plan.num_active_parameters)
        print(max(line.rel for line in made.receipt.comparisons if line.dtype == "float32"))
    """
    config, source = config or UpcycleConfig(), Path(dense)
    if data is None and config.router.reads_text and not config.router.domains:
        raise UpcycleError(
            f"upcycle.router: kind '{config.router.kind}' has no domains; give them, or `data` with training text"
        )
    if data is None and config.merging.method == "greedy-soup" and sources:
        raise UpcycleError("upcycle.merging: method 'greedy-soup' chooses by held-out loss; give `data`")
    base, paths = open_checkpoint(source), {name: Path(path) for name, path in (sources or {}).items()}
    others = open_sources(base, paths)
    remarks = tuple(
        remark for name, other in others.items() for remark in compare_companions(base, f"sources.{name}", other)
    )
    training, domains = _NO_TEXT, tuple[str, ...]()
    if data is not None:
        training, (domains, _) = read_examples(Path(data), "train"), read_domains(Path(data), "train")
    plan = plan_upcycle(base, config, others, domains)
    with new_directory(output) as directory:
        block_size = min(training.block_size, find_context(plan.target_config))
        made = make_mixture(
            source,
            directory,
            plan,
            training,
            Path.cwd(),
            seed,
            block_size,
            progress or keep_quiet,
            paths,
            read_given_blocks(data, "validation"),
        )
    return Upcycled(made.plan, made.receipt, made.distances, made.soup, remarks)


@check_arguments
def add_expert(
    mixture: PathLike,
    source: PathLike,
    output: PathLike,
    *,
    base: PathLike | None = None,
    router: RouterRow = "mean",
    domain: RouterDomain | None = None,
    others: Sequence[RouterDomain] = (),
    scale: PositiveFloat | None = None,
    seed: NonNegativeInt = 0,
    progress: Progress | None = None,
) -> GrownMixture:
    """Add a dense model to a finished mixture, as one more expert.

    Every sparse layer gets its FFN. All that the mixture has is copied bit by bit, all that is written is read again,
    and memory does not grow with the model. What the source has learned outside of its FFNs is left out. A router row
    that is read from text of the new domain finds its tokens; any other knows nothing of it before the routers are
    fine-tuned on text that has it.

    Args:
        mixture: the mixture's checkpoint, whose experts are whole FFNs.
        source: a checkpoint fine-tuned from the mixture's base, or a LoRA adapter as peft writes it.
        output: new directory of the grown mixture.
        base: the dense checkpoint that an adapter was trained on; for adapters alone.
        router: "mean": the mean of the others' rows, so that its logit is the mean of theirs, never the largest;
            "normal": drawn, as large as the others; "ridge": read from `domain` beside `others`; "nexus": projected
            from `domain` alone, for mixtures whose router was of kind "nexus".
        domain: text of the new expert's domain; files are found below the current directory.
        others: text of domains that the mixture knows.
        scale: factor of the new expert's output; a mixture with a shared expert needs it: 0.5 where the shared expert
            was made to give one half.
        seed: seed of a drawn row.
        progress: called as the work goes on.

    Returns:
        Experts of a layer, the layers, parameters, and how the source differs beside its weights. With `domain`, how
        many of its tokens, of a part kept back, visit the new expert in each layer, and how many of the others'.

    Raises:
        MendableError: the source's FFN cannot be an expert of the mixture: another base, width or activation, or
            granular or split experts; or text is missing. Nothing is left then.

    Example:
        law = RouterDomain(files=("corpus.txt",))
        grown = add_expert("mixture", "dense", "grown", domain=law)
        print(grown.num_experts, grown.num_new_parameters, [layer.own for layer in grown.visits])
    """
    adapted = None if base is None else Path(base)
    row = RowSettings(router, seed, domain, tuple(others))
    with new_directory(output) as directory:
        return grow(Path(mixture), Path(source), directory, row, progress or keep_quiet, adapted, scale)
