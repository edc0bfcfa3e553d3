"""Settings of fine-tuning: what learns, at which rates, and for how long."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from dense2moe.upcycle.record import NonNegative, Record, named_value


@dataclass(frozen=True)
class RouterLosses:
    """Weights of the routers' own losses in one phase.

    `domain_fade` is the share of the phase's steps at which the domain loss has faded to 0.
    """

    balance_coefficient: float
    domain_coefficient: float
    domain_fade: float


class Distillation(Record):
    """Learning from the dense parent's distribution too (Hinton et al. 2015)."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="Share of the loss that is distillation; the rest is the next token's."
    )
    temperature: PositiveFloat = Field(
        1.0, description="Both distributions are softened by it, and the divergence is multiplied by its square."
    )


_TRAINED = re.compile(r"all|experts|router|lora|prompt|last-[1-9][0-9]{0,3}")
Schedule = Literal["cosine", "linear", "inverse-sqrt", "constant"]


class TrainingPhase(Record):
    """One training phase: settings that differ from those around the list."""

    train: str | None = Field(
        None, description="As `finetune.train`.", json_schema_extra={"pattern": f"^({_TRAINED.pattern})$"}
    )
    steps: PositiveInt | None = Field(None, description="As `finetune.steps`.")
    routing: Literal["learned", "by-domain"] | None = Field(None, description="As `finetune.routing`.")
    learning_rate: PositiveFloat | None = Field(None, description="As `finetune.learning_rate`.")
    expert_learning_rate: PositiveFloat | None = Field(None, description="As `finetune.expert_learning_rate`.")
    router_learning_rate: PositiveFloat | None = Field(None, description="As `finetune.router_learning_rate`.")
    schedule: Schedule | None = Field(None, description="As `finetune.schedule`.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="As `finetune.warmup_steps`.")
    balance_coefficient: NonNegative | None = Field(None, description="As `finetune.balance_coefficient`.")
    domain_coefficient: NonNegative | None = Field(None, description="As `finetune.domain_coefficient`.")
    domain_fade: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="As `finetune.domain_fade`.")


class FinetuneConfig(Record):
    """A brief fine-tune with a balance loss, and a dense control."""

    train: str = Field(
        "all",
        description="What learns: 'all', 'experts' (and routers), 'router' (all of them), 'last-N' (the last N layers),"
        " 'lora' (low-rank updates of experts and every linear layer, merged at the end, and whole "
        "routers), or 'prompt' (vectors before the text, in the last phase).",
        json_schema_extra={"pattern": f"^({_TRAINED.pattern})$"},
    )
    stages: Annotated[tuple[TrainingPhase, ...], Field(strict=False)] = Field(
        (),
        description="Phases of training, one after the other, each with what differs in it from the settings here; one "
        "phase without the list.",
    )
    steps: PositiveInt = Field(200, description="Largest number of optimizer steps.")
    batch_size: PositiveInt = Field(8, description="Blocks in a step, over all devices and parts of a step.")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Parts that a step is computed in, one after the other, to save memory."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute the layers' activations again in the backward pass instead of keeping them, to save "
        "memory; done anyway if most weights do not learn, or the activations would take more than 1 GB.",
    )
    routing: Literal["learned", "by-domain"] = Field(
        "learned",
        description="'by-domain' sends the text of each domain of the data to experts of its own, whatever the router "
        "says.",
    )
    group_by_length: bool = Field(
        True,
        description="Whether padded examples of about the same length share a batch, so that little padding is "
        "computed.",
    )
    learning_rate: PositiveFloat = Field(
        3e-4, description="Peak learning rate of AdamW, for everything without a rate of its own."
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Rates of the last layer are multiplied by this once, of the one before it twice, and so on down "
        "to the embeddings; what stands on the layers, and routers, keep theirs.",
    )
    expert_learning_rate: PositiveFloat | None = Field(
        None, description="Peak learning rate of the experts; `learning_rate` if not given."
    )
    router_learning_rate: PositiveFloat = Field(1e-3, description="Peak learning rate of the routers.")
    schedule: Schedule = Field(
        "cosine", description="Shape of the rate after the warm-up; 'cosine' and 'linear' end at a tenth of the peak."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(10, description="Steps of linear warm-up.")
    weight_decay: NonNegative = Field(0.0, description="Decoupled weight decay of AdamW; routers and norms have none.")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="Gradients are clipped to this norm; null clips none.")
    balance_coefficient: NonNegative | None = Field(
        None,
        description="Weight of the load-balance loss, computed for each layer by itself; 0.01 if not given, and 0 "
        "beside a domain loss.",
    )
    bias_update_rate: NonNegative | None = Field(
        None,
        description="Step of the selection bias: added for an expert with too few tokens, subtracted for an expert with"
        " too many. Balances without a loss, in phases in which routers learn, and needs gates with a bias,"
        " which targets 'glm4_moe', 'ernie4_5_moe' and 'lfm2_moe' have. 0.001 there if not given; 0 leaves biases as"
        " they are.",
    )
    domain_coefficient: NonNegative | None = Field(
        None,
        description="Weight of the domain loss: the cross-entropy of each router with the domain of the text, whose "
        "experts have places of their own; it fades to 0. If not given, 0.1 where the data has several domains that "
        "divide the experts evenly and routers learn, and 0 elsewhere.",
    )
    domain_fade: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="Share of a phase's steps at which the domain loss has faded to 0."
    )
    z_coefficient: NonNegative = Field(0.0, description="Weight of the router z-loss, which keeps router logits small.")
    sparsity_coefficient: NonNegative = Field(
        0.0,
        description="Weight of a loss by which tokens visit fewer experts, for gates that leave it open: the entropy "
        "of a softmax, the sum of other scores.",
    )
    router_noise: NonNegative = Field(
        0.0,
        description="Standard deviation of noise that is added to router logits while training, so that other experts "
        "are tried (noisy top-k); 1 / num_experts in V-MoE.",
    )
    distillation: Distillation | None = Field(None, description="Also learn from the dense parent's distributions.")
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the experts' inner activations that is dropped."
    )
    lora_rank: PositiveInt = Field(8, description="Rank of the updates with train 'lora'.")
    lora_alpha: PositiveInt = Field(16, description="The updates are multiplied by lora_alpha / lora_rank.")
    prompt_tokens: PositiveInt = Field(16, description="Vectors before the text with train 'prompt'.")
    eval_steps: PositiveInt = Field(
        50, description="Steps between two evaluations on the validation split, and between two checkpoints."
    )
    patience: PositiveInt = Field(
        3,
        description="End a phase after this many evaluations without a better validation loss; the best weights are "
        "kept.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Autocast precision of training; 'auto' takes bfloat16 where the device computes in it natively.",
    )
    dtype: Literal["source", "float32"] = Field(
        "source",
        description="Type of the fine-tuned weights on disk: 'source' is the dense model's; they are float32 while they"
        " learn.",
    )
    control: bool = Field(
        True,
        description="Also train the dense model further: on the same tokens for the same steps, and for as many steps "
        "as take the mixture's floating-point operations.",
    )
    control_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, strict=False)] = Field(
        (1.0,),
        description="Factors of the learning rate that the control is tried with, such as [0.5, 1, 2]; the one with "
        "the best validation loss counts.",
        json_schema_extra={"uniqueItems": True},
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of a right label's probability that all labels get in training; of data with labels."
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="'balanced' weighs a label in training by how rare it is, so that each label counts as much; of "
        "data with labels.",
    )
    tensorboard: bool = Field(False, description="Also write TensorBoard events into the artifact.")

    @field_validator("steps", mode="before")
    @classmethod
    def _check_steps(cls, value: Any) -> Any:
        if type(value) is int and value == 0:
            raise ValueError("is 0; must be greater than 0, or `finetune: null`, which switches fine-tuning off")
        return value

    @model_validator(mode="after")
    def _check_phases(self) -> FinetuneConfig:
        phases = self.resolve_phases()
        for number, phase in enumerate(phases):
            where = f"stages[{number}]: " if self.stages else ""
            if not _TRAINED.fullmatch(phase.train):
                raise ValueError(
                    f"{where}train is '{phase.train}'; must be all, experts, router, lora, prompt or last-N"
                )
            if phase.warmup_steps >= phase.steps:
                given, steps = named_value(phase, "warmup_steps"), named_value(phase, "steps")
                raise ValueError(f"{where}warmup_steps is {given}; it must be fewer than steps, which is {steps}")
            if phase.train == "prompt" and number + 1 < len(phases):
                raise ValueError(
                    f"{where}train is 'prompt'; it must be the last phase's, since what follows would not know "
                    "the prompt"
                )
            if phase.routing == "by-domain" and phase.train != "experts":
                raise ValueError(
                    f"{where}routing is by-domain and train is '{phase.train}'; must be experts: routers cannot "
                    "learn from it"
                )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of gradient_accumulation_steps, which is "
                f"{self.gradient_accumulation_steps}"
            )
        return self

    def settle(self, num_domains: int, num_experts: int) -> FinetuneConfig:
        """These settings with every weight of a routers' loss given.

        Domains that divide the experts evenly have experts of their own, in order, and a loss that tells routers so;
        beside it a balance loss would pull the domains together. The weights did best in docs/results/domains.md.
        Where experts are not the domains', one domain is to be given.
        """
        divided = num_domains > 1 and num_experts > 0 and num_experts % num_domains == 0
        stages = tuple(
            stage.model_copy(update=phase._choose_weights(divided))
            for stage, phase in zip(self.stages, self.resolve_phases(), strict=False)  # one phase without stages
        )
        return self.model_copy(update={"stages": stages, **self._choose_weights(divided)})

    def _choose_weights(self, divided: bool) -> dict[str, float]:
        """The weights of the routers' losses in one phase."""
        domain, balance = self.domain_coefficient, self.balance_coefficient
        if domain is None:
            domain = 0.1 if divided and self.routing == "learned" and self.train != "prompt" else 0.0
        if balance is None:
            balance = 0.0 if domain else 1e-2
        return {"domain_coefficient": domain, "balance_coefficient": balance}

    @property
    def router_losses(self) -> RouterLosses:
        """Weights of the losses that routers alone have, once settled."""
        balance, domain = self.balance_coefficient, self.domain_coefficient
        assert balance is not None, "not settled"
        assert domain is not None, "not settled"
        return RouterLosses(balance, domain, self.domain_fade)

    @property
    def bias_step(self) -> float:
        """How much a step moves selection biases.

        By default as much as in DeepSeek-V3 (section 4.2), until its last tokens.
        """
        return 1e-3 if self.bias_update_rate is None else self.bias_update_rate

    def resolve_phases(self) -> tuple[FinetuneConfig, ...]:
        """Every phase with all of its settings, and no list in it."""
        whole = self.model_copy(update={"stages": ()})
        return tuple(whole.model_copy(update=phase.model_dump(exclude_none=True)) for phase in self.stages) or (whole,)
