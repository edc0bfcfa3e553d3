"""Slow imports are made without the garbage collector, which then leaves what they made alone."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from dense2moe.upcycle.imports import uncollected_imports


def run_python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def collector():
    """The garbage collector is as it was after the test."""
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    yield
    gc.unfreeze()
    if was_frozen:  # else every collection of the tests behind this file passes over all that was imported
        gc.collect()
        gc.freeze()
    (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_waits_and_is_then_as_it_was(enabled: bool, collector: None) -> None:
    (gc.enable if enabled else gc.disable)()
    with uncollected_imports():
        assert not gc.isenabled()
    assert gc.isenabled() == enabled
    with pytest.raises(ImportError), uncollected_imports():
        raise ImportError
    assert gc.isenabled() == enabled


def test_what_was_imported_is_left_alone_and_nothing_is_where_all_was_there(
    collector: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.unfreeze()
    with uncollected_imports():
        pass
    assert gc.get_freeze_count() == 0
    (tmp_path / "a_module_of_this_test.py").write_text("held = [[]]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with uncollected_imports():
        from a_module_of_this_test import held
    assert all(held is not found for found in gc.get_objects())
    monkeypatch.delitem(sys.modules, "a_module_of_this_test")


def test_the_command_line_imports_so(dense_checkpoint: Path, tmp_path: Path) -> None:
    """The collector never runs while `check` imports, what it made is frozen, and hardly any import is behind it.

    What transformers imports lazily would be imported in the middle of the plan, and with the collector.
    """
    recipe = tmp_path / "recipe.yaml"
    text = tmp_path / "text.txt"
    text.write_text("".join(f"This is document {number}.\n" for number in range(500)))
    data = f"{{block_size: 32, source: {{kind: text, train: [{text}], separator: .}}}}"
    recipe.write_text(f"source: {dense_checkpoint}\ndata: {data}\n")
    code = """
import gc, sys
import dense2moe.convert.cli
from dense2moe.upcycle import imports
seen, frozen = [], []
plan = "dense2moe.upcycle.building.plan"
gc.callbacks.append(lambda phase, _: seen.append("torch" in sys.modules and plan not in sys.modules))
freeze = gc.freeze
gc.freeze = lambda: (frozen.append((set(sys.modules))), freeze())
try:
    dense2moe.convert.cli.main(["check", sys.argv[1]], standalone_mode=False)
finally:
    late = {name for name in set(sys.modules) - frozen[-1] if not name.startswith(("dense2moe.", "encodings."))}
    print(any(seen), gc.get_freeze_count() > 100_000, "transformers.modeling_utils" in frozen[-1], len(late))
"""
    collected, frozen, early, num_late = run_python(code, str(recipe)).splitlines()[-1].split()
    assert (collected, frozen, early) == ("False", "True", "True")
    assert int(num_late) < 120, num_late  # Llama's own, the tokenizer's and data sets' readers, of 2,900
