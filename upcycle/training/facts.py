"""Facts of fine-tuning: figures of each model, history, steps, seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.tasks.label_facts import LabelScores
from dense2moe.upcycle.training.config import RouterLosses
from dense2moe.upcycle.training.crossing import Crossing
from dense2moe.upcycle.training.history import ModelName, Step


@dataclass(frozen=True)
class SameLosses:
    """Why a model has another model's held-out losses.

    The two were shown to be equal but for rounding. `model` is the other. Both read `num_blocks` blocks, and
    `difference` is the largest between the two mean losses of one of these blocks, in nats a token.
    """

    model: ModelName
    num_blocks: int
    difference: float


@dataclass(frozen=True)
class Evaluation:
    """A torch model on held-out text: figures, size and speed.

    `figures`: of the task, the one that a model is judged by first. `loss` is the task's mean loss, in nats a token of
    text; `block_losses` has the loss of each block or example. Decoding is greedy, by plain transformers, in the dtype
    that the checkpoint has; a model that does not decode has the speed of a pass as `prefill_tokens_per_second`.
    `domain_losses` has the loss on each domain's text, where there are several domains. `same` is given where the
    losses were computed on another model. `labels` has the scores of each label, of tasks that have some.
    """

    loss: float
    figures: tuple[Figure, ...]
    num_parameters: int
    weight_bytes: int
    decode_tokens_per_second: float | None
    block_losses: tuple[float, ...] = ()
    same: SameLosses | None = None
    domain_losses: dict[str, float] = field(default_factory=dict)
    prefill_tokens_per_second: float | None = None
    labels: LabelScores | None = None


@dataclass(frozen=True)
class DomainRouting:
    """Which experts the text of each domain goes to, on held-out blocks.

    loads: domain, then layer, then the share of the (token, slot) pairs of each expert. between: for each layer, half
    the sum of absolute differences of two domains' loads, the mean over pairs of domains. within: the same between two
    halves of one domain, the mean over domains. information: for each layer, the mutual information of expert and
    domain in nats, domains weighing the same: 0 where all are routed alike, at most the logarithm of their number.
    """

    loads: dict[str, tuple[tuple[float, ...], ...]]
    between: tuple[float, ...]
    within: tuple[float, ...]
    information: tuple[float, ...]


@dataclass(frozen=True)
class LabelRouting:
    """Which experts the tokens of each label go to, on held-out examples.

    loads: label, then layer, then the share of the (token, slot) pairs of each expert. information: for each layer, the
    mutual information of expert and label in nats, labels weighing the same. Labels that no held-out example has are
    left out.
    """

    loads: dict[str, tuple[tuple[float, ...], ...]]
    information: tuple[float, ...]


@dataclass(frozen=True)
class OracleRouting:
    """Losses of a mixture by domain, with its routers overruled.

    In nats a token, over `num_blocks` blocks that all rows share. routed: as the routers choose. experts: every token
    to this expert alone. best_expert: by domain the expert with the lowest such loss. random: every token to experts
    drawn by chance, as many as it visits.
    """

    num_blocks: int
    routed: dict[str, float]
    experts: tuple[dict[str, float], ...]
    best_expert: dict[str, int]
    random: dict[str, float]

    @property
    def oracle(self) -> dict[str, float]:
        """By domain the loss of its best expert alone."""
        return {name: self.experts[expert][name] for name, expert in self.best_expert.items()}


@dataclass(frozen=True)
class Spent:
    """What training took: tokens, operations, seconds.

    `flops` by `training_flops`; `compute_seconds` as in `FinetuneFacts`.
    """

    num_tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    compute_seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(
            self.num_tokens + other.num_tokens,
            self.flops + other.flops,
            self.seconds + other.seconds,
            self.compute_seconds + other.compute_seconds,
        )


NOTHING_SPENT = Spent()


@dataclass(frozen=True)
class BranchFacts:
    """What a branch did: the dense model continued on one domain alone.

    before, after: losses by domain in nats a token, on the same `num_blocks` blocks of the test split. best_step: the
    step whose weights were kept, 0 where none was better than the start on the domain's validation split.
    """

    num_blocks: int
    before: dict[str, float]
    after: dict[str, float]
    best_step: int
    num_steps: int
    spent: Spent
    precision: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class FinetuneFacts:
    """What fine-tuning did.

    Held-out figures of each model, the history, which step was kept, and the steps and seconds of training. Of
    `best_steps`, 0 is the start: no evaluation was better, and the weights are as they were. Without
    fine-tuning there are the figures of the dense and the upcycled model alone, no precision and no gradient.
    `compute_seconds` are the processor's, of all threads, or the clock's where a GPU computes. `flops` are the
    operations of training by `training_flops`: by them the control of equal compute gets its steps. `control_rate` is
    the factor of the learning rates at which the controls did best. `spent` is what branches took before there was a
    mixture: it counts in the mixture's `flops`, `seconds` and `compute_seconds`, and the controls were given as much.
    `router_losses` are the mixture's, by phase. `crossings` compare validation losses with each control, in tokens with
    the one that was continued on the same tokens, in operations with the other. `visits`: by layer the mean number of
    experts of a token, at the last step that was looked at.
    """

    evaluations: dict[ModelName, Evaluation]
    history: tuple[Step, ...]
    best_steps: dict[ModelName, int]
    num_steps: dict[ModelName, int]
    seconds: dict[ModelName, float]
    precision: str | None
    router_task_gradient: float | None
    domains: DomainRouting | None = None
    sparse_layers: tuple[int, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    compute_seconds: dict[ModelName, float] = field(default_factory=dict)
    flops: dict[ModelName, float] = field(default_factory=dict)
    control_rate: float | None = None
    oracle: OracleRouting | None = None
    spent: Spent = NOTHING_SPENT
    router_losses: tuple[RouterLosses, ...] = ()
    crossings: dict[ModelName, Crossing] = field(default_factory=dict)
    labels: LabelRouting | None = None
    visits: tuple[float, ...] = ()
