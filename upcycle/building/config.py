"""Settings of upcycling: experts, how they are made, how routers start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.gates.section import make_choice
from dense2moe.upcycle.models.refused import NO_TARGET
from dense2moe.upcycle.models.table import TARGETS
from dense2moe.upcycle.record import NonNegative, Record


class ExpertsConfig(Record):
    """How the FFN becomes experts.

    Without noise and redrawing, the mixture computes what the dense model does.
    """

    kind: Literal["copies", "granular", "split"] = Field(
        "copies",
        description="'copies': each expert is the FFN; 'granular': each copy is cut into `granularity` experts that "
        "are chosen together; "
        "'split': the experts are disjoint parts of one FFN, so that all of them together are the FFN.",
    )
    granularity: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Experts that one copy of the FFN is cut into; for 'granular' alone."
    )
    noise: NonNegative = Field(
        0.0,
        description="Standard deviation of the noise added to each expert, relative to the weight's own; 0 adds none.",
    )
    drop: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of each expert's neurons that are drawn anew from the weights' own mean and deviation "
        "(Drop-Upcycling).",
    )

    @model_validator(mode="after")
    def _check_granularity(self) -> ExpertsConfig:
        if self.kind == "granular" and self.granularity is None:
            raise ValueError(
                "kind 'granular' has no granularity; must say how many experts one copy of the FFN is cut into"
            )
        if self.kind != "granular" and self.granularity is not None:
            raise ValueError(f"kind '{self.kind}' has a granularity; must be kind 'granular' to have one")
        return self

    @property
    def kept(self) -> bool:
        """Whether every weight of every expert is the dense model's."""
        return self.noise == 0 and self.drop == 0


class RouterDomain(Record):
    """Text of one domain, whose hidden states make one router row."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    prompts: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="Texts, in the recipe.")
    files: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="Files or globs, UTF-8.")

    @model_validator(mode="after")
    def _check_text(self) -> RouterDomain:
        if not any(prompt.strip() for prompt in self.prompts) and not self.files:
            raise ValueError("has no text; must have prompts or files")
        return self


class RouterConfig(Record):
    """How the router starts."""

    kind: Literal["auto", "normal", "prototypes", "kmeans", "ridge", "nexus"] = Field(
        "auto",
        description="'normal' draws the router; 'prototypes': each row is the mean hidden state of one domain; "
        "'kmeans': rows are the centres of clusters of hidden states; 'ridge': rows are a ridge regression "
        "from hidden states to domains; 'nexus': rows are a projection of domain embeddings, which is kept for experts "
        "that are added later (Gritsch et al. 2024). A domain with several rows is cut into as many clusters. 'auto' "
        "is 'ridge' where the data has several domains that divide the router rows evenly, and 'normal' elsewhere; "
        "also where experts are parts of one FFN, the base's, or of sources that are not named as the domains are, in "
        "that order.",
    )
    form: Literal["linear", "mlp", "attention"] = Field(
        "linear",
        description="What gives the logits: 'linear': a row for each expert; 'mlp': the same behind a layer of `size` "
        "neurons with tanh; 'attention': the token's query of `size` numbers against a key for each expert. Two "
        "matrices need `target: mixture`, and are drawn.",
    )
    size: PositiveInt = Field(64, description="Neurons, or numbers of a query, of a router of two matrices.")
    logit_std: NonNegative | None = Field(
        None,
        description="Standard deviation of the router's logits at the start; 0 makes a zero router. If not given, 2 "
        "where rows are of domains, and 1 elsewhere.",
    )
    domains: Annotated[tuple[RouterDomain, ...], Field(strict=False)] = Field(
        (),
        description="Text of each domain, for 'prototypes', 'ridge' and 'nexus', among which the experts are divided "
        "evenly; for 'kmeans' the text to cluster; by default the training split, by the domains of the data.",
    )
    max_tokens: PositiveInt = Field(
        8192, description="Largest number of tokens read of each domain, or of the training split."
    )
    penalty: PositiveFloat = Field(
        1e-2, description="Penalty of the ridge regression, relative to the mean square of a hidden state's element."
    )

    @model_validator(mode="after")
    def _check_domains(self) -> RouterConfig:
        if self.reads_domains and len(self.domains) == 1:
            raise ValueError(f"kind '{self.kind}' has 1 domain; must have 2 or more, or none to take the data's")
        if self.form != "linear" and (self.kind not in ("auto", "normal") or self.domains):
            raise ValueError(f"form '{self.form}' is drawn, and text is to be read; must be kind 'normal', or 'linear'")
        if self.kind == "normal" and self.domains:
            raise ValueError(
                "kind 'normal' has domains; must be 'prototypes', 'kmeans', 'ridge' or 'nexus' to read them"
            )
        if self.reads_text and self.logit_std == 0:
            raise ValueError(
                f"kind '{self.kind}' has a logit_std of 0; must be greater, or nothing is left of what was read"
            )
        return self

    @property
    def reads_text(self) -> bool:
        """Whether rows are read from text for certain.

        Of kind 'auto' the data may decide.
        """
        return self.kind not in ("auto", "normal") or bool(self.domains)

    @property
    def reads_domains(self) -> bool:
        """Whether rows are of domains, given here or with the data.

        Of kind 'auto' it is known once the kind is chosen, unless domains are given here.
        """
        return self.kind in ("prototypes", "ridge", "nexus") or (self.kind == "auto" and bool(self.domains))

    @property
    def std(self) -> float:
        """Standard deviation of the logits at the start, or its default.

        Rows that know something are better spread more: docs/results/domains.md.
        """
        if self.logit_std is None:
            return 2.0 if self.reads_domains else 1.0
        return self.logit_std


READ_STD = {"mlp": 0.628, "attention": 1.0}
"""Deviation of what keys are multiplied with, of a query that varies by 1: of its tanh, or of the query itself."""


class GateConfig(Record):
    """The rule by which tokens choose experts.

    Any but the default needs `target: mixture`. An expert's weight is its score. With `renormalize` the weights of a
    token sum to 1, so that copies of the FFN compute what the FFN does, whichever and however many a token visits.
    """

    score: Literal["softmax", "sigmoid", "relu"] = Field(
        "softmax",
        description="Of the router's logits: their softmax, the sigmoid of each, or the positive part of each.",
    )
    choice: Literal["top-k", "threshold", "top-p", "skip"] = Field(
        "top-k",
        description="'top-k': the num_experts_per_tok with the largest scores; 'threshold': those with a score above "
        "`threshold`, and the largest; 'top-p': the fewest largest that have the share `p` of all scores; 'skip': "
        "those whose score is at least `skip_below` times the largest. Of any, num_experts_per_tok at most. All "
        "experts: 'top-k' of num_experts.",
    )
    threshold: NonNegative | None = Field(
        None,
        description="Score, for 'threshold'; 0 with 'relu' if not given. A softmax of E experts is 1/E on average.",
    )
    p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Share of all scores, for 'top-p'.")
    skip_below: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of a token's largest score, for 'skip'."
    )
    renormalize: bool = Field(True, description="Whether a token's weights are divided by their sum.")

    @model_validator(mode="after")
    def _check_values(self) -> GateConfig:
        if self.score == "relu" and self.choice in ("top-p", "skip"):
            raise ValueError(f"choice is '{self.choice}'; must be 'top-k' or 'threshold' of positive parts ('relu')")
        for choice, name in _GATE_VALUES.items():
            given = getattr(self, name) is not None
            if given and self.choice != choice:
                raise ValueError(f"choice '{self.choice}' has a {name}; must be '{choice}' to have one")
            if not given and self.choice == choice and not (choice == "threshold" and self.score == "relu"):
                raise ValueError(f"choice '{choice}' has no {name}; must have one")
        if self.score != "relu" and self.threshold is not None and self.threshold >= 1:
            raise ValueError(
                f"threshold is {self.threshold:g}; must be below 1, as no score of '{self.score}' is above 1, or "
                "'top-k' with num_experts_per_tok 1"
            )
        return self

    def make(self, num_experts: int, most: int) -> Gate:
        """The gate of a layer whose tokens visit `most` experts at most."""
        value = getattr(self, _GATE_VALUES[self.choice]) if self.choice in _GATE_VALUES else None
        choice = make_choice(self.choice, 0.0 if value is None else value, most)
        return Gate(num_experts, choice, self.score, self.renormalize)


_GATE_VALUES = {"threshold": "threshold", "top-p": "p", "skip": "skip_below"}
"""The setting that a choice needs."""


class MergingConfig(Record):
    """How weights outside of experts are merged, where there are sources.

    A source's change is the source minus the base.
    """

    method: Literal["base", "mean", "greedy-soup", "task-arithmetic", "ties", "dare"] = Field(
        "mean",
        description="'base': the base's own; 'mean': the mean of the sources, and of the base where it is an expert; "
        "'greedy-soup': the mean of those among them whose whole models, added one by one from the best on, do not "
        "raise the loss on the validation split (Wortsman et al. 2022); "
        "'task-arithmetic': the base and `weight` times the sum of the changes (Ilharco et al. 2023); 'ties': the base "
        "and `weight` times the mean of the largest changes that agree in sign with the most of them (Yadav et al. "
        "2023); 'dare': task arithmetic of changes of which many are dropped at random and the others enlarged to make "
        "up for it (Yu et al. 2024).",
    )
    weight: PositiveFloat | None = Field(
        None,
        description="Factor of the merged change, for 'task-arithmetic', 'ties' and 'dare'; 1 for 'ties' if not given, "
        "0.4 for the others.",
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Share of each change that is kept, for 'ties' the largest, for 'dare' drawn; 0.2 if not given.",
    )

    @model_validator(mode="after")
    def _check_method(self) -> MergingConfig:
        for name, methods in (("weight", WEIGHTED), ("density", THINNED)):
            if getattr(self, name) is not None and self.method not in methods:
                raise ValueError(f"method '{self.method}' has a {name}; must be {' or '.join(methods)} to have one")
        return self

    @property
    def factor(self) -> float:
        """The weight, or the method's default.

        Defaults are what Yadav et al. 2023 take where there is no validation set.
        """
        return self.weight or (1.0 if self.method == "ties" else 0.4)

    @property
    def share(self) -> float:
        """The density, or its default."""
        return self.density or 0.2


WEIGHTED = ("task-arithmetic", "ties", "dare")
"""Methods of merging with a weight."""

THINNED = ("ties", "dare")
"""Methods of merging that keep a share of each change."""


_LAYERS = re.compile(r"all|last-half|every-[1-9][0-9]{0,3}")
if TYPE_CHECKING:
    TargetName: TypeAlias = str
else:
    TargetName = Literal[("auto", *(target.model_type for target in TARGETS), "mixture")]
BIASED_TARGETS: tuple[TargetName, ...] = tuple(
    target.model_type for target in TARGETS if target.find("selection_bias") is not None
)
"""Targets whose gates have a selection bias."""


MOST_EXPERTS = 4096
"""Twice the most of any public model, Switch-C; a slip of the pen beyond it would be planned for hours."""


class UpcycleConfig(Record):
    """Sparse upcycling (Komatsuzaki et al. 2022): FFNs become experts with a router."""

    target: TargetName = Field(
        "auto",
        description="Mixture-of-experts architecture, by its model_type; 'auto' takes the first that holds the dense "
        "model. 'glm4_moe', whose gates score by sigmoid and have a selection bias, is chosen by name alone. 'mixture' "
        "keeps the dense architecture, with experts of our own in the place of its FFNs: for every family that "
        "transformers has no sparse architecture for.",
    )
    num_experts: Annotated[int, Field(gt=0, le=MOST_EXPERTS)] = Field(8, description="Experts a layer.")
    num_experts_per_tok: PositiveInt = Field(
        2, description="Experts that each token visits (top-k); at most, of gates by which it may visit fewer."
    )
    gate: GateConfig = GateConfig()
    layers: Annotated[
        str | tuple[Annotated[int, Field(ge=0)], ...],
        Field(
            json_schema_extra={
                "examples": ["all", "last-half", "every-2", [1, 3, 5]],
                "pattern": f"^({_LAYERS.pattern})$",
                "minItems": 1,
                "uniqueItems": True,
            }
        ),
    ] = Field(
        "all",
        description="Layers that get experts: 'all', 'last-half', 'every-N' (the N-th, the 2N-th, …), or a list of "
        "numbers from 0.",
    )
    shared_expert: Literal["none", "half", "zero"] = Field(
        "none",
        description="An expert that every token visits. 'half': a copy of the FFN that gives one half of the output, "
        "the routed experts give the other; 'zero': a copy whose output starts at zero.",
    )
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    merging: MergingConfig = Field(
        MergingConfig(), description="What becomes of all weights that are no expert's, where there are sources."
    )
    base_expert: Literal["none", "routed", "shared"] = Field(
        "none",
        description="What the base's own FFN becomes where there are sources: nothing, an expert as theirs do, or the "
        "shared expert.",
    )
    receipt: Literal["auto", "whole", "layers"] = Field(
        "auto",
        description="How the result is compared with the dense model: 'whole' holds both in memory, 'layers' one layer "
        "of each at a time; 'auto' takes 'whole' if it fits.",
    )
    shard_bytes: Annotated[int, Field(ge=1_000_000)] = Field(
        5_000_000_000, description="Largest weight file, in bytes."
    )

    @field_validator("target", mode="before")
    @classmethod
    def _check_target(cls, value: Any) -> Any:
        """Say why an architecture that transformers has is no target."""
        if isinstance(value, str) and (reason := NO_TARGET.get(value)) is not None:
            raise ValueError(f"is '{value}', which is no target: {reason}; leave it out, or name another")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: Any) -> Any:
        """Refuse layers of a wrong type in one message, not three."""
        if isinstance(value, str) and _LAYERS.fullmatch(value):
            return value
        if isinstance(value, list | tuple) and value and all(type(item) is int and item >= 0 for item in value):
            if len(set(value)) < len(value):
                raise ValueError("names a layer twice; must name each once")
            return tuple(value)
        raise ValueError(f"is {value!r}; must be all, last-half, every-N, or a list of layer numbers from 0")

    @model_validator(mode="before")
    @classmethod
    def _add_shared_expert(cls, values: Any) -> Any:
        """A base that is the shared expert gives one half by default."""
        if isinstance(values, dict) and values.get("base_expert") == "shared":
            return {"shared_expert": "half", **values}
        return values

    @model_validator(mode="after")
    def _check_numbers(self) -> UpcycleConfig:
        """Refuse numbers that do not fit each other.

        The number of experts, where it is left open, follows from the sources: see `count_sources`.
        """
        if "num_experts" not in self.model_fields_set:
            return self
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must be at most num_experts, which is "
                f"{self.num_experts}"
            )
        size = self.group_size
        for name in ("num_experts", "num_experts_per_tok"):
            if getattr(self, name) % size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of experts.granularity, which is {size}"
                )
        kind = self.experts.kind
        if self.gate.choice != "top-k" and kind != "copies":
            raise ValueError(
                f"gate.choice is {self.gate.choice}; it must be top-k with experts of kind '{kind}', which are parts "
                "that are chosen together"
            )
        if size > 1 and self.router.logit_std == 0 and self.num_experts_per_tok < self.num_experts:
            raise ValueError(
                "router.logit_std is 0; it must be greater with granular experts, or a tie of all chooses parts of "
                "different copies"
            )
        if self.router.reads_domains and self.router.domains and self.num_router_rows % len(self.router.domains):
            raise ValueError(
                f"router.domains has {len(self.router.domains)} domains; they must divide the {self.num_router_rows} "
                "router rows evenly"
            )
        return self

    @model_validator(mode="after")
    def _check_base(self) -> UpcycleConfig:
        if self.base_expert == "shared" and self.shared_expert == "none":
            raise ValueError(
                "base_expert is 'shared' and shared_expert is 'none'; must be 'half' or 'zero', or left out"
            )
        return self

    def make_gate(self) -> Gate:
        """The gate that is asked for."""
        return self.gate.make(self.num_experts, self.num_experts_per_tok)

    def count_sources(self, num_sources: int) -> UpcycleConfig:
        """These settings with an expert for each source.

        Unchanged where they say themselves how many experts there are. Granular experts are as many as their groups
        have. `num_sources` is without the base, which counts where it is an expert. Without sources nothing changes,
        and the other numbers must fit the default.

        Raises:
            pydantic.ValidationError: the other numbers do not fit the number of experts.
        """
        if "num_experts" in self.model_fields_set:
            return self
        count = (num_sources + (self.base_expert == "routed")) * self.group_size if num_sources else self.num_experts
        counted = UpcycleConfig.model_validate({**self.model_dump(exclude_unset=True), "num_experts": count})
        return counted if num_sources else self

    def choose_router(self, domains: Sequence[str], sources: Sequence[str], reads_layers: bool) -> UpcycleConfig:
        """These settings with a router of a named kind.

        `domains` are the data's, `sources` those whose FFNs become experts; `reads_layers` says whether layers can be
        run alone, to read their hidden states. A ridge regression on domains did best: docs/results/domains.md.
        """
        router = self.router
        if router.kind != "auto":
            return self
        owning = self.find_owning(domains, sources) and reads_layers and router.logit_std != 0
        chosen = router.model_copy(update={"kind": "ridge" if router.domains or owning else "normal"})
        return self.model_copy(update={"router": chosen})

    def find_owning(self, domains: Sequence[str], sources: Sequence[str]) -> tuple[str, ...]:
        """The data's domains, where each can have experts of its own.

        In the order of the experts. None where there is one alone, or they do not divide the router rows evenly; where
        experts are parts of one FFN or the base's; where sources have other names, or another order.
        """
        divided = len(domains) > 1 and self.num_router_rows % len(domains) == 0
        copied = self.experts.kind != "split" and self.base_expert != "routed"
        named = not sources or tuple(sources) == tuple(domains)
        return tuple(domains) if divided and copied and named else ()

    @property
    def group_size(self) -> int:
        """Experts that share a router row: parts of one FFN copy."""
        return self.experts.granularity or 1

    @property
    def num_router_rows(self) -> int:
        """Distinct router rows."""
        return self.num_experts // self.group_size

    @property
    def num_parts(self) -> int:
        """Parts that one FFN is cut into."""
        return self.num_experts if self.experts.kind == "split" else self.group_size
