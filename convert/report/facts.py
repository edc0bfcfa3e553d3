"""The facts of a report, as records from which its JSON schema is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from dense2moe.convert.machine import Machine
from dense2moe.convert.report.costs import StageCost
from dense2moe.convert.report.summary import Row, Verdict
from dense2moe.export.facts import OnnxFacts
from dense2moe.export.parity.records import ProviderParity
from dense2moe.export.quantization.facts import QuantizeFacts
from dense2moe.upcycle.building.facts import ReceiptLine
from dense2moe.upcycle.training.facts import FinetuneFacts

_NUMBER = {
    "description": "A number; one that JSON lacks is its name.",
    "anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}],
}


@dataclass(frozen=True)
class SourceFacts:
    """The dense checkpoint.

    Where it came from, its class in transformers, and its size; a dtype for each kind of tensor in it.
    """

    origin: str
    architecture: str
    num_parameters: int
    num_bytes: int
    dtype: str


@dataclass(frozen=True)
class DataFacts:
    """The text: tokens a block, tokens of each split, names of the domains, SHA-256 of all documents.

    And what else its source tells.
    """

    block_size: int
    num_tokens: dict[str, int]
    domains: list[str]
    digest: str


@dataclass(frozen=True)
class UpcycleFacts:
    """The mixture before training.

    Its shape and size, what its routers were read from, and the receipt that the function was kept.

    `router_loads`: by layer, the share of the router's text that each expert would get.
    """

    target: str
    num_experts: int
    num_experts_per_tok: int
    num_layers: int
    num_sparse_layers: int
    num_parameters: int
    num_active_parameters: int
    num_bytes: int
    dropped: list[str]
    keeps_function: bool
    num_tensors_compared: int
    router_text_tokens: list[int]
    router_loads: dict[str, list[float]]
    receipt_mode: str
    receipt_notes: list[str]
    receipt: list[ReceiptLine]


@dataclass(frozen=True)
class ParityFacts:
    """Parity of one variant.

    Figures by execution provider, or why one was not run; every broken limit in words; and whether there was none.
    """

    providers: dict[str, ProviderParity | str]
    breaches: list[str]
    passed: bool


@dataclass(frozen=True)
class VariantFacts:
    """One ONNX variant, stage by stage."""

    quantize: QuantizeFacts
    onnx: OnnxFacts
    parity: ParityFacts


@dataclass(frozen=True)
class ReportFacts:
    """What `report.json` holds.

    Losses and KL are in nats a token, sizes in bytes, agreements and loads are shares, errors relative unless named so.
    By stage what it found; `keys` and `digests` are SHA-256: of what each artifact was made from, and of the files in
    the dense checkpoint and in the packages. `base_model` is a model id of the hub, `license` what the dense model's
    card says. `costs` is what each stage took, by its label, but for the report's own. `summary` has a row for each
    model, `verdicts` what the numbers say: good, bad (false) or neither (null).
    """

    dense2moe: str
    name: str
    seed: int
    created: str
    versions: dict[str, str]
    machine: Machine
    recipe: str
    keys: dict[str, str]
    digests: dict[str, dict[str, str]]
    base_model: str | None
    license: dict[str, str]
    source: SourceFacts
    data: DataFacts
    upcycle: UpcycleFacts
    finetune: FinetuneFacts
    variants: dict[str, VariantFacts]
    costs: dict[str, StageCost]
    summary: list[Row]
    verdicts: list[Verdict]


def report_schema() -> dict[str, Any]:
    """JSON schema of `report.json`.

    A later version may add keys; none that is required here goes away without notice.
    """
    schema = _name_numbers(TypeAdapter(ReportFacts).json_schema(mode="serialization"))
    schema["$defs"]["Number"] = _NUMBER
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Report of dense2moe"}


def _name_numbers(value: Any) -> Any:
    """Every plain number as a reference to `Number`, without the titles that only repeat the keys."""
    if isinstance(value, dict):
        if value.get("type") == "number":
            return {"$ref": "#/$defs/Number"}
        return {
            key: _name_numbers(item) for key, item in value.items() if not (key == "title" and isinstance(item, str))
        }
    return [_name_numbers(item) for item in value] if isinstance(value, list) else value
