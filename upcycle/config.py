"""Settings of surgery, data and fine-tuning, as frozen records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    """Frozen and strict: unknown keys and values of another type are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ExpertsConfig(Record):
    """How the FFN becomes experts."""

    noise: NonNegative = Field(0.0, description="Standard deviation of the noise added to each expert, relative to the weight's own; 0 copies.")


class RouterConfig(Record):
    """How the router starts."""

    logit_std: NonNegative = Field(1.0, description="Standard deviation of the router's logits at the start; 0 makes a zero router.")


class UpcycleConfig(Record):
    """Sparse upcycling (Komatsuzaki et al. 2022): the FFN of every layer is copied into experts and a router is added."""

    num_experts: PositiveInt = Field(8, description="Experts a layer.")
    num_experts_per_tok: PositiveInt = Field(2, description="Experts that each token visits (top-k).")
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    shard_bytes: Annotated[int, Field(ge=1_000_000)] = Field(5_000_000_000, description="Largest weight file, in bytes.")

    @model_validator(mode="after")
    def _check_top_k(self) -> UpcycleConfig:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}; it must be at most num_experts, which is {self.num_experts}")
        return self


class PythonDocsData(Record):
    """The documentation and source of the running Python interpreter; needs no network and no files."""

    kind: Literal["python-docs"]


class TextData(Record):
    """Text files, as paths or globs. Without `validation` or `test`, 5 % of the documents are held out for each, by a hash of their text."""

    kind: Literal["text"]
    train: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(description="Files or globs, UTF-8.")
    validation: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="Files or globs held out for early stopping.")
    test: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="Files or globs held out for the reported figures.")
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


class DataConfig(Record):
    """Text, cut into blocks of tokens."""

    source: Annotated[PythonDocsData | TextData | HubData, Field(discriminator="kind")]
    block_size: Annotated[int, Field(ge=8)] = Field(256, description="Tokens a block.")
    max_train_tokens: PositiveInt | None = Field(None, description="Use at most this many tokens, taken evenly from the whole.")
    max_validation_tokens: PositiveInt = Field(32_768, description="Tokens of the validation split that are used, taken evenly from the whole.")
    max_test_tokens: PositiveInt = Field(32_768, description="Tokens of the test split that are used, taken evenly from the whole.")


class FinetuneConfig(Record):
    """A brief fine-tune of every weight, with a balance loss a layer, and the dense model continued on the same tokens as the control."""

    steps: PositiveInt = Field(200, description="Optimizer steps at most.")
    batch_size: PositiveInt = Field(8, description="Blocks a step on each device.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Batches a step.")
    learning_rate: PositiveFloat = Field(3e-4, description="Peak learning rate of AdamW, for experts and everything else.")
    router_learning_rate: PositiveFloat = Field(1e-3, description="Peak learning rate of the routers.")
    weight_decay: NonNegative = Field(0.0, description="Decoupled weight decay of AdamW; routers and norms have none.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(10, description="Steps of linear warm-up, counted after the router's.")
    router_warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps at the start in which only the routers learn.")
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradients are clipped to this norm.")
    balance_coefficient: NonNegative = Field(1e-2, description="Weight of the load-balance loss, computed for each layer by itself.")
    eval_steps: PositiveInt = Field(50, description="Steps between two looks at the validation split.")
    patience: PositiveInt = Field(3, description="Stop after this many looks without a better validation loss; the best weights are kept.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Autocast precision of training; 'auto' takes bfloat16 where the device computes in it natively."
    )
    control: bool = Field(True, description="Also continue the dense model on the same tokens for the same steps.")

    @model_validator(mode="after")
    def _check_warmup(self) -> FinetuneConfig:
        if self.warmup_steps + self.router_warmup_steps >= self.steps:
            total = self.warmup_steps + self.router_warmup_steps
            raise ValueError(f"warmup_steps and router_warmup_steps are {total} together; they must be fewer than steps, which is {self.steps}")
        return self
