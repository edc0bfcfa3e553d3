"""Results of parity, as frozen records of plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dense2moe.export.parity.place import PlacePart
from dense2moe.upcycle.tasks.figure import Figure

Tier = Literal["weights", "operator", "layer", "logits", "language", "task", "routing", "files"]
TIERS: tuple[Tier, ...] = ("weights", "operator", "layer", "logits", "language", "task", "routing", "files")
"""From the one that says most exactly where a fault is to the one that says what it costs."""


@dataclass(frozen=True)
class Limit:
    """A threshold, and a sentence on its source."""

    value: float
    origin: str


@dataclass(frozen=True)
class Check:
    """Logits of one way of feeding the package, against one full forward.

    Of the twin, or of the package itself where it rounds as it computes.

    `first_position`: the first token of a row, padding not counted, whose error is beyond the limit; None where none
    is. `place`: where inside the graph this way is wrong, on the graph's own input there, in words; None where nothing
    is.
    """

    name: str
    num_tokens: int
    max_error: float
    mean_error: float
    relative_error: float
    top1_agreement: float
    num_tie_flips: int
    padded: bool = False
    decoded: bool = False
    first_position: int | None = None
    place: str | None = None


@dataclass(frozen=True)
class MarginBin:
    """Choices of experts whose margin lies in [least, below).

    Of all layers together, by the margin in the reference. `agreement` is the share of choices that are the same in
    both models; None without choices.
    """

    least: float
    below: float | None
    num_choices: int
    agreement: float | None


@dataclass(frozen=True)
class Agreement:
    """The package against one torch model on held-out text.

    By layer, and empty where the package does not show it: agreement of the sets of top-k experts, 1 in a layer without
    experts, and the relative errors of the residual stream and of attention's output. The KL is told apart by whether
    some layer chose other experts for the token: then it is `flipped`, and its KL that of another path and not of
    rounding.
    """

    max_error: float
    mean_error: float
    kl: float
    top1_agreement: float
    routing_agreement: tuple[float, ...]
    hidden_error: tuple[float, ...]
    attention_error: tuple[float, ...] = ()
    top5_agreement: float = 1.0
    margins: tuple[MarginBin, ...] = ()
    flipped_share: float = 0.0
    kl_flipped: float | None = None
    kl_unflipped: float | None = None


@dataclass(frozen=True)
class PlaceCheck:
    """One place, on the graph's own input, against the twin.

    The twin computes with the same arithmetic. Errors relative, the worst token's. `layer` is -1 outside of layers.
    noise: what float32 torch differs by from float64 there, None where it was not measured. `num_flips`: tokens whose
    difference is a flip of a rounding inside, told apart. `factor`: the graph's values are so many times the twin's.
    `first_position`: the first token of a row that is beyond the limit. `experts`: those whose every token is wrong.
    `factors`: the least and largest factor, where each token's output is the twin's times a factor of its own and
    nothing else is wrong. `factor_limit`: what `factor` may differ from 1 by, in a place that is computed in 16 bits:
    their rounding hides small errors of a token, and none that all have alike.
    """

    layer: int
    part: PlacePart
    error: float
    limit: float
    noise: float | None
    num_tokens: int
    num_flips: int = 0
    factor: float = 1.0
    first_position: int | None = None
    experts: tuple[int, ...] = ()
    factors: tuple[float, float] | None = None
    factor_limit: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether it is within its limits."""
        return self.error <= self.limit and (self.factor_limit is None or abs(self.factor - 1) <= self.factor_limit)


@dataclass(frozen=True)
class FreeRun:
    """Greedy text of the package, against the reference's own text.

    Prefixes are the tokens before the first that differs. `largest_gap`: at that token, what the reference's logit of
    its own choice has above that of the package's, relative to the largest logit; 0 where no row differs.
    """

    num_rows: int
    num_tokens: int
    shortest_prefix: int
    mean_prefix: float
    num_diverged: int
    largest_gap: float


@dataclass(frozen=True)
class TaskCheck:
    """A task done by package, twin and fine-tuned model.

    Of a model's scores `metric` is the one that is judged. scores, `package`, `twin` and `finetuned`: accuracy, F1 and
    exact match are shares, the correlation is Spearman's. change: the package's less the fine-tuned model's, with the
    standard error of paired examples. `same_as_*`: the share of equal answers, None where answers are numbers.
    largest_gap: by how much the twin prefers its own answer to the package's, as the relative error of logits (of
    hidden states where texts are compared) that could have turned it, the worst of all `num_examples`; `example` is
    that one's number from 1 on. Examples that differ behind a near-tie flip of experts are counted in `num_tie_flips`,
    and in no gap.
    """

    name: str
    kind: TaskKind | Literal["labels"]
    num_examples: int
    metric: str
    package: dict[str, float]
    twin: dict[str, float]
    finetuned: dict[str, float]
    change: float
    standard_error: float
    same_as_twin: float | None
    same_as_finetuned: float | None
    largest_gap: float
    example: int | None = None
    num_tie_flips: int = 0


@dataclass(frozen=True)
class Forced:
    """KL of the twin with the fine-tuned model's routing forced on it.

    And where the twin chooses itself.
    """

    kl: float
    kl_free: float
    num_tokens: int


@dataclass(frozen=True)
class Noise:
    """Torch's float32 error against float64 on this text.

    Ties of routers are left out. The largest difference of logits, relative to the largest logit.

    `tie_margin`: a choice of experts by less than this, in router logits or biased scores, is a near-tie.
    """

    logits: float
    num_tokens: int
    tie_margin: float


@dataclass(frozen=True)
class ProviderParity:
    """All figures of one execution provider.

    Figures are over the same held-out tokens, agreements over some of them, speeds at batch 1.

    `figures`: the package's, the judged figure first; `twin_figures` and `finetuned_figures` are the same figures of
    the other two models. `figures_error`: the standard error of the first figure, relative to the fine-tuned model's,
    over blocks of `num_language_tokens`.
    `tie_share`: of tokens, those that some layer's router sends by less than a near-tie. `worst_layer` is None where
    the package shows nothing of its layers, the speed of decoding where it does not decode. What was not run is a
    sentence that says why.
    """

    onnxruntime: str
    checks: tuple[Check, ...]
    twin: Agreement
    finetuned: Agreement
    figures: tuple[Figure, ...]
    twin_figures: tuple[Figure, ...]
    finetuned_figures: tuple[Figure, ...]
    worst_layer: int | None
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    places: tuple[PlaceCheck, ...] | str = ()
    weights: WeightsCheck | str = "not run"
    files: FilesCheck | str = "not run"
    free_run: FreeRun | None = None
    tasks: tuple[TaskCheck | str, ...] = ()
    forced: Forced | str = "not run"
    noise: Noise | str = "not run"
    limits: dict[str, Limit] = field(default_factory=dict)
    logits_factor: float | None = None
    figures_error: float = 0.0
    num_language_tokens: int = 0
    tie_share: float = 0.0
    tiers: dict[Tier, str] = field(default_factory=dict)
    placement: dict[str, dict[str, int]] = field(default_factory=dict)
    num_fallback_nodes: int = 0


@dataclass(frozen=True)
class Parity:
    """Figures by provider, or why parity did not run; broken limits."""

    providers: dict[str, ProviderParity | str]
    breaches: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit was met."""
        return not self.breaches


@dataclass(frozen=True)
class FilesCheck:
    """Compared files, and a sentence for each difference or missing file."""

    compared: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no difference was found."""
        return not self.differences


@dataclass(frozen=True)
class WrongRows:
    """Wrong rows of one tensor, or of one expert in it.

    The first, how many, of how many, and how it differs.
    """

    tensor: str
    row: int
    count: int
    num_rows: int
    what: str
    name: str = ""

    def __str__(self) -> str:
        """The rows in words."""
        many = "" if self.count == 1 else f"{self.count:,} of {self.num_rows:,} rows differ from the twin's; "
        one = f"row {self.row}: " if self.num_rows > 1 else ""
        return f"{self.tensor}{': ' if many else ', ' if one else ': '}{many}{one}{self.what}"


@dataclass(frozen=True)
class WeightsCheck:
    """Every row and vector of the twin against the file.

    `wrong` has the first few tensors that differ.

    `not_judged`: tensors that were not found by their rows, and are compared by what the graph makes of them.
    """

    num_rows: int
    num_vectors: int
    num_wrong: int
    wrong: tuple[WrongRows, ...]
    not_judged: tuple[str, ...] = ()


TaskKind = Literal["choice", "answer", "similarity"]
