"""Routers refitted to the inputs that quantized layers give.

So that tokens meet the experts that they met in the float model. The router's logits on the float model's hidden states
are what it is to give on those that it reads now. First by damped least squares, which has a closed form, then by a few
steps on the KL of the scores, which is what routing hangs on. The steps are of L-BFGS on all fitted tokens: nothing in
them is drawn. Tokens that no fit has seen judge: of the router as it was, that of least squares, and that of the steps,
the one with the smallest KL stays. A router is a few thousand weights, and moving it costs no byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dense2moe.export.quantization.aim import damp
from dense2moe.export.quantization.inputs import Inputs
from dense2moe.upcycle.gates.choice import visit_mask
from dense2moe.upcycle.gates.gate import Gate
from dense2moe.upcycle.gates.scores import log_scores, selection_scores

_FITTED_SHARE = 0.75
_STEPS = 10
_MIN_TOKENS = 2
"""For each input, of fitted tokens: below so many least squares follow noise (the figure is that of GPTQ here)."""


@dataclass(frozen=True)
class RouterFacts:
    """Routing on held-out tokens against the float model's.

    Measured before and after the correction.

    Share of tokens with the same experts, and KL of scores in nats.
    `method` is what was kept.
    """

    method: str
    agreement_before: float
    agreement_after: float
    kl_before: float
    kl_after: float

    def describe(self) -> str:
        """The figures in words."""
        agreement = f"{self.agreement_before:.2%} to {self.agreement_after:.2%}"
        return f"same experts {agreement}, KL {self.kl_before:.1e} to {self.kl_after:.1e} ({self.method})"


def correct_router(
    router: torch.Tensor, inputs: Inputs, gate: Gate, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, RouterFacts]:
    """The router [E, H] refitted to quantized inputs, and the gain.

    Float32 in and out.
    `bias` [E] is what it adds to its scores for the choice, and stays.
    """
    fitted = int(_FITTED_SHARE * len(inputs.actual))
    x, wanted = inputs.actual[:fitted], inputs.reference[:fitted] @ router.T
    held, judged = inputs.actual[fitted:], inputs.reference[fitted:] @ router.T
    candidates = {"none": router}
    if fitted >= _MIN_TOKENS * router.shape[1]:
        hessian = damp(x.T @ x).double()
        step = torch.linalg.solve(hessian, (x.T @ (wanted - x @ router.T)).double()).T.float()
        candidates["least squares"] = router + step
        candidates["KL"] = _descend(router + step, x, wanted, gate)
    kls = {
        name: kl_of_scores(held @ candidate.T, judged, gate)
        for name, candidate in candidates.items()
        if torch.isfinite(candidate).all()
    }
    best = min(kls, key=lambda name: kls[name]) if len(held) else "none"
    ours, theirs = (
        [selection_scores(found, gate, bias) for found in (held @ candidates[name].T, judged)]
        for name in ("none", best)
    )
    before, after = (_agreement(found, wanted_scores, gate) for found, wanted_scores in (ours, theirs))
    return candidates[best], RouterFacts(best, before, after, kls["none"], kls[best])


def kl_of_scores(logits: torch.Tensor, wanted: torch.Tensor, gate: Gate) -> float:
    """Mean KL in nats between routers' normalized scores, [tokens, E] each.

    The divergence of `logits` from `wanted`.

    0 of no tokens.
    """
    return float(_kl(logits, wanted, gate)) if len(logits) else 0.0


def _kl(logits: torch.Tensor, wanted: torch.Tensor, gate: Gate) -> torch.Tensor:
    log_p, log_q = (log_scores(each, gate).log_softmax(-1) for each in (wanted, logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _agreement(scores: torch.Tensor, wanted: torch.Tensor, gate: Gate) -> float:
    both = [visit_mask(found, gate.choice) for found in (scores, wanted)]
    return float((both[0] == both[1]).all(-1).float().mean()) if len(scores) else 1.0


def _descend(router: torch.Tensor, x: torch.Tensor, wanted: torch.Tensor, gate: Gate) -> torch.Tensor:
    """The router after gradient steps on the KL."""
    weight = router.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = _kl(x @ weight.T, wanted, gate)
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach()
