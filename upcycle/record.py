"""Settings as records: frozen and strict, with every key known."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    """Frozen and strict: unknown keys and values of another type are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def named_value(record: BaseModel, field: str) -> str:
    """A value for a message, marked where it is the default."""
    return f"{getattr(record, field)}{'' if field in record.model_fields_set else ' by default'}"
