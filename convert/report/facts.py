"""Facts of a run: the records that reports, cards and comparisons read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from dense2moe.convert.errors import ArtifactError
from dense2moe.convert.machine import Machine
from dense2moe.export.facts import OnnxFacts
from dense2moe.export.parity.records import ProviderParity
from dense2moe.export.quantization.facts import QuantizeFacts
from dense2moe.upcycle.building.facts import ReceiptLine, SoupLook, SourceDistance
from dense2moe.upcycle.tasks.figure import Figure
from dense2moe.upcycle.training.facts import BranchFacts, Evaluation, FinetuneFacts
from dense2moe.upcycle.training.history import ModelName

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class StageCost:
    """What a stage took: seconds, peak resident memory, and planned memory.

    Bytes, None where it said nothing. Where several processes share a stage it is the first one's memory; where a stage
    has no process of its own, the run's up to then.
    """

    seconds: float
    peak_resident_bytes: int
    planned_bytes: int | None


@dataclass(frozen=True)
class FineTunedFacts:
    """A checkpoint or an adapter fine-tuned from the dense one.

    `hub` is its id on the hub; `remarks` are its differences from the dense one beside its weights.
    """

    name: str
    origin: str
    hub: str | None
    kind: Literal["checkpoint", "adapter"]
    remarks: list[str]


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
    sources: list[FineTunedFacts] = field(default_factory=list)


@dataclass(frozen=True)
class DataFacts:
    """The text: block size, tokens of each split, domains, SHA-256.

    `digest` is None where each domain has its own. In `report.json` the entries of `details` stand beside the others:
    whatever else the text's source tells, such as the interpreter or the digest of one domain.
    """

    block_size: int
    num_tokens: dict[str, int]
    domains: list[str]
    digest: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def has_new_head(self) -> bool:
        """Whether labels got a head that the dense model had not."""
        return bool(self.details.get("new_head"))


@dataclass(frozen=True)
class UpcycleFacts:
    """The mixture before training.

    Its shape and size, what its routers were read from, and the receipt that the function was kept.

    `router` is how routers start, None in older reports, which did not tell; `router_loads`: by layer, the share of the
    router's text that each expert would get. Where there are sources, `experts` names the one that each routed expert
    is made of ("" is the dense model), `merging` the method by which the rest was merged, and `distances` tells how far
    each source is from the dense model. `soup` has every look of a greedy soup.
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
    experts: list[str] = field(default_factory=list)
    merging: str | None = None
    distances: list[SourceDistance] = field(default_factory=list)
    soup: list[SoupLook] = field(default_factory=list)
    router: str | None = None


@dataclass(frozen=True)
class ParityFacts:
    """Parity of one variant.

    Figures by execution provider, or why one was not run; every broken limit in words; and whether there was none.
    """

    providers: dict[str, ProviderParity | str]
    breaches: list[str]
    passed: bool

    @property
    def measured(self) -> ProviderParity | None:
        """Figures on the CPU, or on the first provider that ran."""
        ran = {name: found for name, found in self.providers.items() if isinstance(found, ProviderParity)}
        return ran.get(CPU) or next(iter(ran.values()), None)


@dataclass(frozen=True)
class VariantFacts:
    """One ONNX variant, stage by stage."""

    quantize: QuantizeFacts
    onnx: OnnxFacts
    parity: ParityFacts


@dataclass(frozen=True)
class ReportFacts:
    """What the stages of a run found.

    Losses and KL are in nats a token, sizes in bytes, agreements and loads are shares, errors relative unless named so.
    By stage what it found; `keys` and `digests` are SHA-256: of what each artifact was made from, and of the files in
    the dense checkpoint and in the packages. `base_model` is a model id of the hub, `license` what the dense model's
    card says. `costs` is what each stage took, by its label, but for the report's own. `branches` is by domain.
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
    branches: dict[str, BranchFacts]
    upcycle: UpcycleFacts
    finetune: FinetuneFacts
    variants: dict[str, VariantFacts]
    costs: dict[str, StageCost]

    @property
    def exported(self) -> ModelName:
        """The torch model that the ONNX variants were made from."""
        return "fine-tuned" if "fine-tuned" in self.finetune.evaluations else "upcycled"

    def figure(self, model: ModelName) -> Figure:
        """The figure that a torch model is judged by."""
        return self.finetune.evaluations[model].figures[0]


def read_facts(found: Mapping[str, Any], where: str) -> ReportFacts:
    """The facts of a run as records.

    They come from `report.json`, or from the report artifact, which leaves the history out.

    Raises:
        ArtifactError: facts are missing, or are not what this version writes; one line, which begins with `where`.
    """
    try:
        facts = _adapter().validate_python(_complete(found))
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        lacking = [each for each in errors if each["type"] == "missing"] or errors
        wrong = list(dict.fromkeys(_name(each["loc"], found) for each in lacking))
    else:
        wrong = list(_lacking(facts))
    if not wrong:
        return facts
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise ArtifactError(
        f"{where}: its report has no {wrong[0]}{more} that this version can read: it was written by another version "
        "of dense2moe; run its recipe again"
    )


@cache
def _adapter() -> TypeAdapter[ReportFacts]:
    return TypeAdapter(ReportFacts)


def _complete(found: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts with a history and branches.

    The text's details are together.
    """
    completed = {"branches": {}, **found}
    if isinstance(finetune := found.get("finetune"), Mapping):
        completed["finetune"] = {"history": (), **finetune}
    if isinstance(data := found.get("data"), Mapping):
        known = {each.name for each in fields(DataFacts)}
        completed["data"] = {name: value for name, value in data.items() if name in known} | {
            "details": {name: value for name, value in data.items() if name not in known}
        }
    return completed


def _lacking(facts: ReportFacts) -> Iterator[str]:
    """Facts without a value that older versions did not write."""
    figured: dict[str, Evaluation | ProviderParity] = {
        f"finetune.evaluations.{name}": found for name, found in facts.finetune.evaluations.items()
    }
    for name, variant in facts.variants.items():
        for provider, found in variant.parity.providers.items():
            if isinstance(found, ProviderParity):
                figured[f"variants.{name}.parity.providers.{provider}"] = found
    yield from (f"{name}.figures" for name, found in figured.items() if not found.figures)


def _name(place: tuple[int | str, ...], found: Any) -> str:
    """A place in nested facts, with dots.

    The names that pydantic adds for members of a union are left out.
    """
    parts = []
    for number, part in enumerate(place, 1):
        inside = part in found if isinstance(found, Mapping) else isinstance(part, int)
        if inside:
            found = found[part]
        if inside or number == len(place):
            parts.append(str(part))
    return ".".join(parts)
