"""A pytest fixture that compares a package with its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:  # pytest loads every plugin that is installed; torch and transformers come with the first use alone
    from dense2moe.export.parity.records import Parity
    from dense2moe.export.parity.single_pass import PassParity


class AssertParity(Protocol):
    """The fixture `assert_parity`; limits are a recipe's `parity` keys."""

    def __call__(
        self,
        package: str | Path,
        *,
        reference: str | Path,
        data: str | Path | Sequence[str | Path] = (),
        block_size: int = 256,
        num_blocks: int | None = None,
        twin: str | Path | None = None,
        tasks: Sequence[str | Path] = (),
        **limits: Any,
    ) -> Parity | PassParity:
        """Fail the test, with a line for each broken limit.

        Unless the package computes what the checkpoint `reference` does on the text `data`.
        """


@pytest.fixture(scope="session")
def assert_parity() -> AssertParity:
    """Fail with a line for each broken limit of parity.

    Call it as `assert_parity("package", reference="checkpoint", data="held-out.txt")`.

    It returns all figures.
    """
    from dense2moe.convert.package_parity import check_package
    from dense2moe.export.parity.config import ParityConfig

    def check(
        package: str | Path,
        *,
        reference: str | Path,
        data: str | Path | Sequence[str | Path] = (),
        block_size: int = 256,
        num_blocks: int | None = None,
        twin: str | Path | None = None,
        tasks: Sequence[str | Path] = (),
        **limits: Any,
    ) -> Parity | PassParity:
        __tracebackhide__ = True
        files = [Path(data)] if isinstance(data, str | Path) else [Path(file) for file in data]
        config = ParityConfig(tasks=tuple(map(str, tasks)), **limits)
        parity = check_package(
            Path(package),
            Path(reference),
            files,
            block_size,
            num_blocks,
            config,
            lambda *_: None,
            Path(twin) if twin else None,
        )
        if not parity.passed:
            pytest.fail("\n".join([f"{package} is not {reference}:", *parity.breaches]), pytrace=False)
        return parity

    return check
