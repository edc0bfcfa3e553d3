"""A fixture for pytest, by which a package's own tests hold it to its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:  # pytest loads every plugin that is installed; torch and transformers come with the first use alone
    from dense2moe.export.parity.records import Parity


class AssertParity(Protocol):
    """What the fixture `assert_parity` is; limits are the fields of `parity` in a recipe."""

    def __call__(
        self,
        package: str | Path,
        *,
        reference: str | Path,
        data: str | Path | Sequence[str | Path],
        block_size: int = 256,
        num_blocks: int | None = None,
        twin: str | Path | None = None,
        tasks: Sequence[str | Path] = (),
        **limits: Any,
    ) -> Parity:
        """Fail the test, with a line for each broken limit.

        Unless the package computes what the checkpoint `reference` does on the text `data`.
        """


@pytest.fixture(scope="session")
def assert_parity() -> AssertParity:
    """`assert_parity("package", reference="checkpoint", data="held-out.txt")` fails with a line for each broken limit.

    It returns all figures.
    """
    from dense2moe.convert.package_parity import check_package
    from dense2moe.export.parity.config import ParityConfig

    def check(
        package: str | Path,
        *,
        reference: str | Path,
        data: str | Path | Sequence[str | Path],
        block_size: int = 256,
        num_blocks: int | None = None,
        twin: str | Path | None = None,
        tasks: Sequence[str | Path] = (),
        **limits: Any,
    ) -> Parity:
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
