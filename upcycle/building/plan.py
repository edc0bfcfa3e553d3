"""The plan of an upcycling, from names and shapes alone.

For each part of the target, the piece of the source's same part. Complete and exclusive: every row of every source
tensor is used or its tensor listed as dropped, every target tensor is written once. Nothing here reads a weight. A
target tensor is a run of pieces, one after the other in the order of its bytes, so that a piece that changes nothing is
a copy of bytes from one file to another. In the FFN's place stand:

1. the router, of rows that are drawn or read from hidden states, and its selection bias, of zeros;
2. experts, each of some or all neurons of the FFN: its gate of the FFN's gate, and so for up and down;
3. a shared expert, of the FFN as well, with zeros for its down projection or for the vector that scales it.

Of several sources, which are fine-tuned from one base and have its names and shapes, each expert is one's FFN, and all
other parts are the base's or all checkpoints' merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedConfig

from dense2moe.upcycle.building.agreement import check_agreement
from dense2moe.upcycle.building.choice import choose_conversion
from dense2moe.upcycle.building.config import GateConfig, UpcycleConfig
from dense2moe.upcycle.building.pieces import (
    ExpertPart,
    Keep,
    Merged,
    RouterKeys,
    RouterRows,
    SelectionBias,
    Site,
    Write,
    Zeros,
)
from dense2moe.upcycle.building.planner import Planner
from dense2moe.upcycle.building.source import check_tensors, refuse_unknown_fields, refuse_untied
from dense2moe.upcycle.building.target_config import make_target_config
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.models.architecture import Conversion
from dense2moe.upcycle.models.table import find_conversion, find_family


@dataclass(frozen=True)
class UpcyclePlan:
    """What will be written, in this order.

    `sources` are the names of the checkpoints beside the base, and `owners` the number of the checkpoint that each
    routed expert is made of, as `Slice` numbers them. `sources_differ` is false where every source is known to hold the
    base's own weights; names and shapes do not tell. `soup` has the numbers of the checkpoints whose mean the rest is
    where the method is a greedy soup; None before they are chosen.
    """

    conversion: Conversion
    settings: UpcycleConfig
    target_config: PreTrainedConfig
    writes: tuple[Write, ...]
    dropped: tuple[str, ...]
    sites: tuple[Site, ...]
    num_layers: int
    sources: tuple[str, ...] = ()
    owners: tuple[int, ...] = ()
    sources_differ: bool = False
    soup: tuple[int, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle everything but the conversion, which holds functions.

        The other process takes the conversion from the table of conversions.
        """
        known = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "conversion"}
        return _restore_plan, (self.conversion.family.architecture, self.conversion.target.architecture, known)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights written."""
        return sum(write.spec.num_bytes for write in self.writes)

    @property
    def num_parameters(self) -> int:
        """Parameters of the mixture."""
        return sum(_count(write) for write in self.writes)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: all but unvisited experts."""
        experts = sum(
            _count(write) for write in self.writes if isinstance(piece := write.pieces[0], ExpertPart) and piece.routed
        )
        return self.num_parameters - experts + experts * self.settings.num_experts_per_tok // self.settings.num_experts

    @property
    def keeps_function(self) -> bool:
        """Whether the function is kept whatever the router says, within rounding."""
        experts = self.settings.experts
        kept = experts.kept and not self.sources_differ and self.settings.gate.renormalize
        return kept and experts.kind != "split" and not self.conversion.experts.top_1

    @property
    def keeps_function_at_zero(self) -> bool:
        """Whether it does with a zero router.

        Parts of one FFN must all be chosen then, and a tie of all must not mix parts of several copies.
        """
        experts, k = self.settings.experts, self.settings.num_experts_per_tok
        kept = experts.kept and not self.sources_differ and self.settings.gate.renormalize
        return kept and (experts.kind == "copies" or k == self.settings.num_experts)

    @property
    def bitwise_at_zero(self) -> bool:
        """Whether it does so bit for bit, where torch's activation allows it.

        ½x + ½x = x, unless ½x is smaller than the dtype's normal numbers.
        """
        plain = self.settings.experts.kind == "copies" and self.settings.shared_expert != "half"
        return (
            self.keeps_function_at_zero
            and plain
            and self.settings.num_experts_per_tok <= 2
            and self.settings.gate == GateConfig()
            and self.conversion.zero_router == "bitwise"
        )


def _restore_plan(family: str, target: str, known: dict[str, Any]) -> UpcyclePlan:
    return UpcyclePlan(conversion=find_conversion(family, target), **known)


def _count(write: Write) -> int:
    return 0 if isinstance(write.pieces[0], SelectionBias) else torch.Size(write.spec.shape).numel()


def plan_upcycle(
    checkpoint: Checkpoint,
    config: UpcycleConfig,
    sources: Mapping[str, Checkpoint] | None = None,
    domains: Sequence[str] = (),
) -> UpcyclePlan:
    """Plan the mixture of experts that a dense checkpoint becomes.

    `sources` are fine-tuned from it, by name: their FFNs become the experts. A source that is yet to be trained can be
    planned for with the base in its place, since a plan is made of names and shapes. `domains` are the training text's,
    which routers may be read from. The plan's settings have the number of experts and the kind of router that follow.

    Raises:
        UpcycleError: the architecture, a config value or a setting has no place in the target; a number does not
            divide; tensors are missing, unknown or of another shape than the config says; a source is not of the base.
    """
    others = dict(sources or {})
    where = str(checkpoint.directory / "config.json")
    try:
        config = config.count_sources(len(others))
    except ValidationError as error:
        raise UpcycleError(f"upcycle: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    family = find_family(checkpoint.config.model_type, checkpoint.config.architectures, where, checkpoint.config)
    refuse_untied(checkpoint, family)  # first: the config was read as untied for the tensor's sake
    conversion = choose_conversion(checkpoint.config, config, where)
    config = config.choose_router(domains, tuple(others), reads_layers=family.ffn_module is not None)
    refuse_unknown_fields(checkpoint.config, conversion, where)
    dropped = set(check_tensors(checkpoint, family))
    for name, source in others.items():
        check_agreement(checkpoint, name, source, conversion)
        refuse_untied(source, family)
        dropped |= set(check_tensors(source, family))
    checkpoints = (checkpoint, *others.values())
    planner = Planner(checkpoints, conversion, config, frozenset(dropped))
    sites = planner.sites()
    writes = tuple(planner.writes(sites))
    _check_use(checkpoints, writes, planner)
    num_layers = sum(stack.count_layers(checkpoint.config) for stack in family.stacks)
    target_config = make_target_config(checkpoint, conversion, config, sites, planner.widths)
    assert len({write.spec.name for write in writes}) == len(writes)
    assert hasattr(target_config, conversion.experts.count_field)
    return UpcyclePlan(
        conversion,
        config,
        target_config,
        writes,
        tuple(sorted(dropped)),
        sites,
        num_layers,
        tuple(others),
        planner.owners,
        sources_differ=bool(others),
    )


def _check_use(checkpoints: tuple[Checkpoint, ...], writes: tuple[Write, ...], planner: Planner) -> None:
    """Every row of every tensor is used, or left out by design.

    And what the FFN's experts do not share goes to one place alone.
    """
    used: dict[tuple[int, str], set[tuple[int, int]]] = {}
    kept: list[tuple[str, int, int, bool]] = []
    for write in writes:
        for piece in write.pieces:
            match piece:
                case Keep(rows=rows) | Merged(rows=rows):
                    kept.append((rows.source, rows.start, rows.stop, piece.fold is None))
                    for number in range(len(checkpoints)) if isinstance(piece, Merged) else (0,):
                        used.setdefault((number, rows.source), set()).add((rows.start, rows.stop))
                case ExpertPart(matrix=rows) if piece.num_neurons > 0:
                    used.setdefault((rows.checkpoint, rows.source), set()).add((rows.start, rows.stop))
                case ExpertPart() | Zeros() | SelectionBias() | RouterRows() | RouterKeys():
                    pass
    assert len(kept) == len(set(kept)), "the tables move one slice to two places"
    for number in range(len(checkpoints)):
        for name, entry in planner.entries[number].items():
            if planner.leaves_out(number, name):
                assert (number, name) not in used, f"{name} of checkpoint {number} is used after all"
                continue
            position = 0
            for start, stop in sorted(used.get((number, name), ())):
                assert start == position, f"the tables leave out rows {position} to {start} of {name}"
                position = stop
            assert position == entry.num_rows, f"the tables leave out rows of {name}"
