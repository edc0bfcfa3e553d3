"""Settings of surgery, data and fine-tuning, as frozen records."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    """Frozen and strict: unknown keys and values of another type are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def named_value(record: BaseModel, field: str) -> str:
    """A value for a message, which says where it is none of the file's own but the default."""
    return f"{getattr(record, field)}{'' if field in record.model_fields_set else ' by default'}"


class ExpertsConfig(Record):
    """How the FFN becomes experts. Without noise and redrawing, the mixture computes what the dense model does."""

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


class Domain(Record):
    """Text of one domain, whose hidden states make one router row."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    prompts: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="Texts, in the recipe.")
    files: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="Files or globs, UTF-8.")

    @model_validator(mode="after")
    def _check_text(self) -> Domain:
        if not any(prompt.strip() for prompt in self.prompts) and not self.files:
            raise ValueError("has no text; must have prompts or files")
        return self


class RouterConfig(Record):
    """How the router starts."""

    kind: Literal["normal", "prototypes", "kmeans", "ridge"] = Field(
        "normal",
        description="'normal' draws it; 'prototypes': each row is the mean hidden state of one domain; 'kmeans': the "
        "rows are centres of clusters "
        "of hidden states; 'ridge': the rows are a ridge regression from hidden states to domains.",
    )
    logit_std: NonNegative = Field(
        1.0, description="Standard deviation of the router's logits at the start; 0 makes a zero router."
    )
    domains: Annotated[tuple[Domain, ...], Field(strict=False)] = Field(
        (),
        description="Text of each expert's domain, for 'prototypes' and 'ridge'; for 'kmeans' the text to cluster, "
        "the training split without it.",
    )
    max_tokens: PositiveInt = Field(
        8192, description="Tokens of each domain, or of the training split, that are read at most."
    )
    penalty: PositiveFloat = Field(
        1e-2, description="Penalty of the ridge regression, relative to the mean square of a hidden state's element."
    )

    @model_validator(mode="after")
    def _check_domains(self) -> RouterConfig:
        if self.kind in ("prototypes", "ridge") and len(self.domains) < 2:
            raise ValueError(f"kind '{self.kind}' has {len(self.domains)} domains; must have one for each expert")
        if self.kind == "normal" and self.domains:
            raise ValueError("kind 'normal' has domains; must be 'prototypes', 'kmeans' or 'ridge' to read them")
        if self.kind != "normal" and self.logit_std == 0:
            raise ValueError(
                f"kind '{self.kind}' has a logit_std of 0; must be greater, or nothing is left of what was read"
            )
        return self


_LAYERS = re.compile(r"all|last-half|every-[1-9][0-9]{0,3}")
TargetName = Literal[
    "auto",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
    "granitemoeshared",
    "glm4_moe",
    "flex_olmo",
    "switch_transformers",
]
BIASED_TARGETS: tuple[TargetName, ...] = ("glm4_moe",)
"""Targets whose gates have a selection bias."""


MOST_EXPERTS = 4096
"""Twice the most of any public model, Switch-C; a slip of the pen beyond it would be planned for hours."""


class UpcycleConfig(Record):
    """Sparse upcycling (Komatsuzaki et al. 2022): the FFN becomes experts, and a router is added."""

    target: TargetName = Field(
        "auto",
        description="Mixture-of-experts architecture, by its model_type; 'auto' takes the first that holds the dense "
        "model. 'glm4_moe', whose gates "
        "have a selection bias, is chosen by name alone.",
    )
    num_experts: Annotated[int, Field(gt=0, le=MOST_EXPERTS)] = Field(8, description="Experts a layer.")
    num_experts_per_tok: PositiveInt = Field(2, description="Experts that each token visits (top-k).")
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
        description="An expert that every token visits. 'half': a copy of the FFN that gives one half, the routed "
        "experts the other; "
        "'zero': a copy whose output starts at zero.",
    )
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    receipt: Literal["auto", "whole", "layers"] = Field(
        "auto",
        description="How the result is compared with the dense model: 'whole' holds both in memory, 'layers' one "
        "layer of each at a time; "
        "'auto' takes 'whole' where it fits.",
    )
    shard_bytes: Annotated[int, Field(ge=1_000_000)] = Field(
        5_000_000_000, description="Largest weight file, in bytes."
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: Any) -> Any:
        """One message for a union of which no branch fits."""
        if isinstance(value, str) and _LAYERS.fullmatch(value):
            return value
        if isinstance(value, list | tuple) and value and all(type(item) is int and item >= 0 for item in value):
            if len(set(value)) < len(value):
                raise ValueError("names a layer twice; must name each once")
            return tuple(value)
        raise ValueError(f"is {value!r}; must be all, last-half, every-N, or a list of layer numbers from 0")

    @model_validator(mode="after")
    def _check_numbers(self) -> UpcycleConfig:
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
        if size > 1 and self.router.logit_std == 0 and self.num_experts_per_tok < self.num_experts:
            raise ValueError(
                "router.logit_std is 0; it must be greater with granular experts, or a tie of all chooses parts of "
                "different copies"
            )
        if self.router.kind in ("prototypes", "ridge") and len(self.router.domains) != self.num_router_rows:
            raise ValueError(
                f"router.domains has {len(self.router.domains)} domains; it must have {self.num_router_rows}, one "
                "for each router row"
            )
        return self

    @property
    def group_size(self) -> int:
        """Experts that share one router row: the parts of one copy of the FFN."""
        return self.experts.granularity or 1

    @property
    def num_router_rows(self) -> int:
        """Router rows that differ."""
        return self.num_experts // self.group_size

    @property
    def num_parts(self) -> int:
        """Parts that one FFN is cut into."""
        return self.num_experts if self.experts.kind == "split" else self.group_size


class PythonDocsData(Record):
    """The documentation and source of the running Python interpreter; needs no network and no files."""

    kind: Literal["python-docs"]


class TextData(Record):
    """Text files, as paths or globs.

    Without `validation` or `test`, 5 % of the documents are held out for each, by a hash of their text. Blank lines
    before a document and white space behind it are left out; the first line keeps its indentation. A file that two
    patterns match is read once, and a byte-order mark is no text.
    """

    kind: Literal["text"]
    train: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(description="Files or globs, UTF-8.")
    validation: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Files or globs held out for early stopping."
    )
    test: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Files or globs held out for the reported figures."
    )
    separator: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="What divides a file into documents; a file is one document without it."
    )


class HubData(Record):
    """A data set of the Hugging Face hub, through the `datasets` library."""

    kind: Literal["hub"]
    path: str = Field(description="Data set id, such as 'Salesforce/wikitext'.")
    name: str | None = Field(None, description="Configuration of the data set.")
    revision: str | None = Field(None, description="Commit, tag or branch.")
    text_column: str = Field("text", description="Column that holds the text.")
    train: str = Field("train", description="Split to train on.")
    validation: str = Field("validation", description="Split held out for early stopping.")
    test: str = Field("test", description="Split held out for the reported figures.")


class DomainsData(Record):
    """Text of several domains, each a source of its own. A block holds text of one domain."""

    kind: Literal["domains"]
    domains: Annotated[dict[str, Annotated[TextData | HubData, Field(discriminator="kind")]], Field(min_length=2)] = (
        Field(description="Name of each domain to its text.")
    )


DataSource = PythonDocsData | TextData | HubData | DomainsData


def count_domains(source: DataSource) -> int:
    """How many domains the text of a source is of."""
    match source:
        case PythonDocsData():
            return 2  # prose and code
        case TextData() | HubData():
            return 1
        case DomainsData():
            return len(source.domains)
        case _:
            assert_never(source)


class DataConfig(Record):
    """Text, cut into blocks of tokens."""

    source: Annotated[DataSource, Field(discriminator="kind")]
    block_size: Annotated[int, Field(ge=8)] = Field(256, description="Tokens a block.")
    max_train_tokens: PositiveInt | None = Field(
        None,
        description="Use at most this many tokens, taken evenly from the whole; of a large text no more than about "
        "twice as many are tokenized.",
    )
    max_validation_tokens: PositiveInt = Field(
        32_768, description="Tokens of the validation split that are used, taken evenly from the whole."
    )
    max_test_tokens: PositiveInt = Field(
        32_768, description="Tokens of the test split that are used, taken evenly from the whole."
    )


class Distillation(Record):
    """Learning from the dense parent's whole distribution besides the next token (Hinton et al. 2015)."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="Share of the loss that is distillation; the rest is the next token's."
    )
    temperature: PositiveFloat = Field(
        1.0, description="Both distributions are softened by it, and the divergence is multiplied by its square."
    )


_TRAINED = re.compile(r"all|experts|router|lora|prompt|last-[1-9][0-9]{0,3}")
Schedule = Literal["cosine", "linear", "inverse-sqrt", "constant"]


class TrainingStage(Record):
    """One stage of training: what differs in it from the settings around the list."""

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


class FinetuneConfig(Record):
    """A brief fine-tune with a balance loss a layer.

    And the dense model continued on the same tokens as the control.
    """

    train: str = Field(
        "all",
        description="What learns: 'all', 'experts' (and routers), 'router' (all of them), 'last-N' (the last N "
        "layers), 'lora' (low-rank updates "
        "of experts and every linear layer, merged at the end, and the routers whole), or 'prompt' (vectors before "
        "the text, in the last stage).",
        json_schema_extra={"pattern": f"^({_TRAINED.pattern})$"},
    )
    stages: Annotated[tuple[TrainingStage, ...], Field(strict=False)] = Field(
        (),
        description="Stages that follow each other, each with what differs in it from the settings here; one stage "
        "without the list.",
    )
    steps: PositiveInt = Field(200, description="Optimizer steps at most.")
    batch_size: PositiveInt = Field(8, description="Blocks a step, over all devices and parts of a step.")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Parts that a step is computed in, one after the other, to save memory."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute the layers' inner values twice instead of keeping them, to save memory; done anyway "
        "where most weights do not "
        "learn, or the values would take more than 1 GB.",
    )
    routing: Literal["learned", "by-domain"] = Field(
        "learned",
        description="'by-domain' sends the text of each domain of the data to experts of its own, whatever the "
        "router says.",
    )
    learning_rate: PositiveFloat = Field(
        3e-4, description="Peak learning rate of AdamW, for everything but what has a rate of its own."
    )
    expert_learning_rate: PositiveFloat | None = Field(
        None, description="Peak learning rate of the experts; the common one if not given."
    )
    router_learning_rate: PositiveFloat = Field(1e-3, description="Peak learning rate of the routers.")
    schedule: Schedule = Field(
        "cosine", description="Shape of the rate after the warm-up; 'cosine' and 'linear' end at a tenth of the peak."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(10, description="Steps of linear warm-up.")
    weight_decay: NonNegative = Field(0.0, description="Decoupled weight decay of AdamW; routers and norms have none.")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="Gradients are clipped to this norm; null clips none.")
    balance_coefficient: NonNegative = Field(
        1e-2, description="Weight of the load-balance loss, computed for each layer by itself."
    )
    bias_update_rate: NonNegative | None = Field(
        None,
        description="What a step adds to, or takes from, the selection bias of an expert with too few, or too many, "
        "tokens: balance without a loss, "
        "where routers learn and gates have a bias, which target 'glm4_moe' gives them. 0.001 there if not given; 0 "
        "leaves biases as they are.",
    )
    z_coefficient: NonNegative = Field(0.0, description="Weight of the router z-loss, which keeps router logits small.")
    distillation: Distillation | None = Field(None, description="Also learn from the dense parent's distributions.")
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the experts' inner activations that is dropped."
    )
    lora_rank: PositiveInt = Field(8, description="Rank of the updates with train 'lora'.")
    lora_alpha: PositiveInt = Field(16, description="The updates are multiplied by lora_alpha / lora_rank.")
    prompt_tokens: PositiveInt = Field(16, description="Vectors before the text with train 'prompt'.")
    eval_steps: PositiveInt = Field(
        50, description="Steps between two looks at the validation split, and between two checkpoints."
    )
    patience: PositiveInt = Field(
        3, description="End a stage after this many looks without a better validation loss; the best weights are kept."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Autocast precision of training; 'auto' takes bfloat16 where the device computes in it natively.",
    )
    dtype: Literal["source", "float32"] = Field(
        "source",
        description="What fine-tuned weights are written in: 'source' is the dtype of the dense model's; they are "
        "float32 while they learn.",
    )
    control: bool = Field(
        True,
        description="Also continue the dense model: on the same tokens for the same steps, and for as long as the "
        "mixture took to train.",
    )
    tensorboard: bool = Field(False, description="Also write TensorBoard events into the artifact.")

    @field_validator("steps", mode="before")
    @classmethod
    def _check_steps(cls, value: Any) -> Any:
        if type(value) is int and value == 0:
            raise ValueError("is 0; must be greater than 0, or `finetune: null`, which switches fine-tuning off")
        return value

    @model_validator(mode="after")
    def _check_stages(self) -> FinetuneConfig:
        stages = self.resolve_stages()
        for number, stage in enumerate(stages):
            where = f"stages[{number}]: " if self.stages else ""
            if not _TRAINED.fullmatch(stage.train):
                raise ValueError(
                    f"{where}train is '{stage.train}'; must be all, experts, router, lora, prompt or last-N"
                )
            if stage.warmup_steps >= stage.steps:
                given, steps = named_value(stage, "warmup_steps"), named_value(stage, "steps")
                raise ValueError(f"{where}warmup_steps is {given}; it must be fewer than steps, which is {steps}")
            if stage.train == "prompt" and number + 1 < len(stages):
                raise ValueError(
                    f"{where}train is 'prompt'; it must be that of the last stage, since what follows would not know "
                    "the prompt"
                )
            if stage.routing == "by-domain" and stage.train != "experts":
                raise ValueError(
                    f"{where}routing is by-domain and train is '{stage.train}'; must be experts: routers cannot "
                    "learn from it"
                )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of gradient_accumulation_steps, which is "
                f"{self.gradient_accumulation_steps}"
            )
        return self

    @property
    def bias_step(self) -> float:
        """What a step moves selection biases by.

        By default as much as in DeepSeek-V3 (section 4.2), until its last tokens.
        """
        return 1e-3 if self.bias_update_rate is None else self.bias_update_rate

    def resolve_stages(self) -> tuple[FinetuneConfig, ...]:
        """Every stage with all of its settings, and no list in it."""
        whole = self.model_copy(update={"stages": ()})
        return tuple(whole.model_copy(update=stage.model_dump(exclude_none=True)) for stage in self.stages) or (whole,)
