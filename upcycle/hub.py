"""What the Hugging Face hub refuses, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from dense2moe.upcycle.errors import MendableError, UpcycleError, describe_error, foreign_errors, shorten

_MOST_LETTERS = 100
_REASONS: tuple[tuple[str, str, str], ...] = (
    ("GatedRepoError", "is gated", "accept its terms on its page and log in (`hf auth login`)"),
    (
        "RepositoryNotFoundError|DatasetNotFoundError",
        "is not on the hub, or not for you to read",
        "correct the id, or log in (`hf auth login`)",
    ),
    ("RevisionNotFoundError", "has no such revision", "give a commit, tag or branch that it has"),
    ("OfflineModeIsEnabled", "is not in the cache, and HF_HUB_OFFLINE forbids to fetch it", "unset HF_HUB_OFFLINE"),
    (
        "LocalEntryNotFoundError|Connect(ion)?Error|Connect(ion)?Timeout|ReadTimeout|ConnectionRefusedError",
        "is not in the cache, and the hub cannot be reached",
        "mend the network",
    ),
)
"""By the names of exceptions of huggingface_hub, datasets and httpx: what is, and how to mend it.

Names, since datasets quotes those of huggingface_hub in a text of its own, and neither is imported here. The first that
is found counts.
"""


@contextmanager
def tell_hub_errors(what: str, instead: str, kind: type[MendableError] = UpcycleError) -> Iterator[None]:
    """Context manager: what the hub's libraries raise becomes one line.

    Only calls of theirs belong inside. The line says `what` was to be fetched, why it cannot be, how to mend it, and
    what to give `instead`. Their own texts are several sentences, and differ with the way in which a connection failed.

    Raises:
        MendableError: of this `kind`.
    """

    def tell(error: BaseException) -> MendableError:
        chain = list(_list_causes(error))
        named = " ".join(f"{type(each).__name__} {each}" for each in chain)
        found = next((reason for reason in _REASONS if re.search(rf"\b({reason[0]})\b", named)), None)
        if found is None:
            return kind(f"{what} cannot be loaded ({describe_error(error)[:_MOST_LETTERS]}); mend that, or {instead}")
        _, reason, mend = found
        return kind(f"{what} {reason}{_quote_system(chain, reason)}; {mend}, or {instead}")

    with foreign_errors(tell):
        yield


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _quote_system(chain: list[BaseException], reason: str) -> str:
    """The system's own words, where the network is the reason."""
    if not reason.endswith("reached"):
        return ""
    words = [each.strerror for each in chain if isinstance(each, OSError) and each.strerror]
    return f" ({shorten(words[-1])[:_MOST_LETTERS]})" if words else ""
