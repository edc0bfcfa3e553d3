"""The recipe as records: what to convert, on which text, and how."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Discriminator, Field, ValidationError, field_validator, model_validator
from pydantic import Tag as Kind

from dense2moe.convert.recipe.contradictions import ContradictionError, find_contradictions
from dense2moe.convert.recipe.wording import join_choices, show_value
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.variant import Variant
from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.data.config import DataConfig, name_domains
from dense2moe.upcycle.record import Record
from dense2moe.upcycle.training.branch_config import BranchConfig
from dense2moe.upcycle.training.config import FinetuneConfig

_NAME: Final = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
HUB_ID: Final = r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?$"


class LocalSource(Record):
    """A dense checkpoint in a local directory."""

    path: str = Field(
        min_length=1, description="Directory of the checkpoint, beside the recipe or below the current directory."
    )


class HubSource(Record):
    """A dense checkpoint of the Hugging Face hub."""

    hub: str = Field(pattern=HUB_ID, description="Model id, such as 'HuggingFaceTB/SmolLM2-135M'.")
    revision: str = Field("main", min_length=1, description="Commit, tag or branch; a commit makes the run repeatable.")


def _from_shorthand(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _source_tag(value: object) -> str | None:
    keys = type(value).model_fields if isinstance(value, Record) else value if isinstance(value, dict) else ()
    tags = [tag for tag in ("path", "hub") if tag in keys]
    return tags[0] if len(tags) == 1 else None


Source = Annotated[
    Annotated[LocalSource, Kind("path")] | Annotated[HubSource, Kind("hub")],
    Discriminator(_source_tag),
    BeforeValidator(
        _from_shorthand, json_schema_input_type=Annotated[str, Field(min_length=1)] | LocalSource | HubSource
    ),
]


class Recipe(Record):
    """What to convert, on which text, and with which settings."""

    name: str | None = Field(
        None,
        pattern=_NAME,
        description="Name of the run and of its directory; the file's name without it.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every random choice.")
    source: Source = Field(
        description="The dense checkpoint: a local directory, or an id of the Hugging Face hub with its revision."
    )
    sources: dict[str, Source] = Field(
        {},
        description="Checkpoints, or LoRA adapters as peft writes them, that were fine-tuned from `source`, by names "
        "of your own: their FFNs become the experts.",
    )
    data: DataConfig = Field(description="The text that the model is fine-tuned and measured on.")
    branch: BranchConfig | None = Field(
        None,
        description="Continue the dense model on each domain of the data by itself; the FFNs of these branches become "
        "the experts, in the order of the domains.",
    )
    upcycle: UpcycleConfig = Field(UpcycleConfig(), description="How the dense model becomes a mixture of experts.")
    finetune: FinetuneConfig | None = Field(
        FinetuneConfig(),
        description="How the mixture of experts is trained; null switches it off, and the upcycled model is exported "
        "as it is.",
    )
    variants: Annotated[tuple[Variant, ...], Field(strict=False)] = Field(
        ("float32", "int8", "int4"),
        min_length=1,
        description="Precisions of the ONNX models, each made and measured.",
        json_schema_extra={"uniqueItems": True},
    )
    quantize: QuantizeConfig = Field(
        QuantizeConfig(), description="How the int8, int8-qdq, int4 and mixed variants are quantized."
    )
    export: OnnxConfig = Field(OnnxConfig(), description="How the ONNX graph is built.")
    parity: ParityConfig = Field(
        ParityConfig(), description="How closely each ONNX model must agree with the torch model."
    )

    @property
    def branched(self) -> tuple[str, ...]:
        """The domains that have branches; none without `branch`."""
        return name_domains(self.data.source) if self.branch else ()

    @property
    def counted_branch(self) -> BranchConfig | None:
        """The settings of branches with the steps of each."""
        return self.branch.count_steps(self.finetune, len(self.branched)) if self.branch else None

    @property
    def training_stages(self) -> tuple[FinetuneConfig, ...]:
        """Every training phase with all its settings.

        None where fine-tuning is switched off.
        """
        return self.finetune.resolve_phases() if self.finetune else ()

    @field_validator("sources")
    @classmethod
    def _check_names(cls, sources: dict[str, Source]) -> dict[str, Source]:
        """A name is also a directory and a key in messages."""
        if wrong := [name for name in sources if not re.fullmatch(_NAME, name)]:
            raise ValueError(f"has the name {show_value(wrong[0])}; must be of the form {_NAME}")
        return sources

    @field_validator("variants")
    @classmethod
    def _check_unique(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if twice := [variant for variant in dict.fromkeys(variants) if variants.count(variant) > 1]:
            raise ValueError(f"has {join_choices(twice, 'and')} more than once; must have each once")
        return variants

    @model_validator(mode="before")
    @classmethod
    def _count_experts(cls, values: Any) -> Any:
        """An expert for each source or branch, unless told otherwise."""
        if not isinstance(values, dict):
            return values
        sources, upcycle = values.get("sources"), values.get("upcycle", {})
        try:
            if isinstance(sources, dict) and sources:
                num_sources = len(sources)
            elif values.get("branch") is not None:
                num_sources = len(name_domains(DataConfig.model_validate(values.get("data")).source))
            else:
                num_sources = 0
            settings = UpcycleConfig.model_validate(upcycle).count_sources(num_sources)
        except ValidationError:  # told where the field is read, whose own numbers are then all there
            if isinstance(upcycle, dict) and not sources and values.get("branch") is None:
                upcycle = {"num_experts": UpcycleConfig().num_experts, **upcycle}
            return {**values, "upcycle": upcycle}
        return {**values, "upcycle": settings} if num_sources else values

    @model_validator(mode="after")
    def _check_across_records(self) -> Recipe:
        if mistakes := find_contradictions(self):
            raise ContradictionError(mistakes)
        return self
