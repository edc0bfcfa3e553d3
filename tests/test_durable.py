"""What is kept for resuming.

Damage to any file is found, that folder goes, and what is made again has the same bits.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import dense2moe
from test_journal import StoppedError, same
from test_journal import mixture as make_mixture
from test_journal import run as quantize
from training_runs import CONFIG, TrainAlone, make_data, make_train_alone, quiet

from dense2moe.convert.artifact.manifest import open_artifact
from dense2moe.convert.worker import ProcessResult
from dense2moe.upcycle.durable import RECORD_NAME, begin, discard_damage, is_kept, keep, make, read_facts
from dense2moe.upcycle.training.config import FinetuneConfig, TrainingPhase

ROOT = Path(__file__).parent.parent
mixture, data, train_alone = make_mixture, make_data, make_train_alone  # fixtures


class _KilledError(BaseException):
    pass


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


def become_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def become_a_link(file: Path) -> None:
    other = file.parent.parent / "elsewhere"
    shutil.move(file, other)
    file.symlink_to(other)


DAMAGES: tuple[Callable[[Path], None], ...] = (empty, cut, flip, remove, become_a_directory, become_a_link)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def folders_of(scratch: Path) -> list[str]:
    """The sealed folders below a scratch directory."""
    return sorted(path.parent.relative_to(scratch).as_posix() for path in scratch.rglob(RECORD_NAME))


def copies(scratch: Path, place: Path) -> Iterator[Path]:
    """One copy after the other, each in the place of the last: damage is for one look."""
    while True:
        shutil.rmtree(place, ignore_errors=True)
        yield Path(shutil.copytree(scratch, place))


def test_a_folder_is_whole_once_it_is_sealed_and_gives_its_facts_back(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    begin(folder)
    (folder / "weights").write_bytes(b"123")
    assert not is_kept(folder)
    keep(folder, {"steps": [1, 2], "loss": 0.1})
    assert is_kept(folder)
    assert read_facts(folder) == {"steps": [1, 2], "loss": 0.1}
    assert discard_damage(tmp_path / "a", quiet) == []
    assert (folder / "weights").read_bytes() == b"123"
    begin(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("damage", [*DAMAGES, lambda file: (file.parent / "other").touch()])
@pytest.mark.parametrize("name", ["weights", "deep/config.json", RECORD_NAME])
def test_damage_to_a_sealed_folder_is_told_in_a_line_and_the_folder_goes(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    for number in (1, 2):
        folder = scratch / "layers" / str(number)
        make(folder / "deep")
        (folder / "weights").write_bytes(bytes(range(50)))
        (folder / "deep" / "config.json").write_text("{}", encoding="utf-8")
        keep(folder, [0.5, "x"])
    damage(scratch / "layers" / "1" / name)
    said = discard_damage(scratch, quiet)
    unsealed = name == RECORD_NAME and damage is remove  # as a kill before the end leaves it: nothing to tell
    assert len(said) == (0 if unsealed else 1), said
    for line in said:
        assert line.startswith(f"{scratch / 'layers' / '1'}: ")
        assert line.endswith("; deleted, and made again")
        assert line.isprintable()
    assert folders_of(scratch) == ["layers/2"]
    assert files_of(scratch) == [f"layers/2/{name}" for name in ("deep/config.json", RECORD_NAME, "weights")]


def test_facts_that_were_changed_are_damage(tmp_path: Path) -> None:
    keep(tmp_path / "steps", [10])
    record = tmp_path / "steps" / RECORD_NAME
    for text in (
        record.read_text().replace("10", "11"),
        "[]",
        "5",
        '"',
        "[" * 100_000,
        "{}",
        '{"facts": 1, "files": [], "checksum": 2}',
    ):
        keep(tmp_path / "steps", [10])
        record.write_text(text, encoding="utf-8")
        assert discard_damage(tmp_path, quiet) == [
            f"{tmp_path / 'steps'}: {RECORD_NAME} is damaged; deleted, and made again"
        ]


def test_what_no_record_covers_goes_without_a_word_and_nothing_outside_is_touched(tmp_path: Path) -> None:
    outside, scratch = tmp_path / "outside", tmp_path / "scratch"
    make(outside)
    (outside / "mine.txt").touch()
    keep(scratch / "one", 1)
    (scratch / "loose.json").touch()
    (scratch / "link").symlink_to(outside)
    make(scratch / "unsealed")
    (scratch / "unsealed" / "weights").touch()
    os.mkfifo(scratch / "unsealed" / "pipe")
    assert discard_damage(scratch, quiet) == []
    assert sorted(path.relative_to(scratch).as_posix() for path in scratch.rglob("*")) == [
        "one",
        "one/kept.json",
        "unsealed",
    ]
    assert (outside / "mine.txt").exists()
    for place in (tmp_path / "file", tmp_path / "link"):
        _ = place.touch() if place.name == "file" else place.symlink_to(outside)
        assert discard_damage(place, quiet) == []
        assert not os.path.lexists(place)
    assert (outside / "mine.txt").exists()
    assert discard_damage(tmp_path / "nowhere", quiet) == []


def test_a_record_comes_after_its_files_are_forced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    names = {}
    plain_open, plain_sync, plain_replace = os.open, os.fsync, os.replace

    def open_(path: Any, *rest: Any, **others: Any) -> int:
        file = plain_open(path, *rest, **others)
        names[file] = Path(path).name
        return file

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", lambda file: (order.append(names[file]), plain_sync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), plain_replace(a, b)))
    make(tmp_path / "folder")
    (tmp_path / "folder" / "weights").touch()
    keep(tmp_path / "folder")
    assert order == [tmp_path.name, "weights", "folder", "kept.json.partial", "rename", "folder", tmp_path.name]


# Fine-tuning.


@pytest.fixture(scope="module")
def tuned(train_alone: TrainAlone) -> Callable[..., tuple[object, Path]]:
    """Train in a scratch directory; killed at a step, if one is given. Its history, and its directory."""

    def run(config: FinetuneConfig, scratch: Path, killed_at: int | None = None) -> tuple[object, Path]:
        def progress(what: str, done: int, _: int) -> None:
            if what.startswith("training fine-tuned") and done == killed_at:
                raise _KilledError

        trained, output = train_alone(config, scratch, progress)
        return trained.history, output

    return run


LEARNING = CONFIG.model_copy(
    update={
        "stages": (TrainingPhase(train="router", steps=2), TrainingPhase(steps=6)),
        "eval_steps": 2,
        "tensorboard": True,
    }
)
HARMLESS = CONFIG.model_copy(update={"learning_rate": 1e-20, "router_learning_rate": 1e-20, "steps": 4})


@pytest.fixture(scope="module", params=[(LEARNING, 7), (HARMLESS, 3)], ids=["learning", "harmless"])
def killed(
    request: pytest.FixtureRequest, tuned: Callable[..., tuple[object, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[FinetuneConfig, Path, tuple[object, Path]]:
    """Settings, what a killed run left, and what an unbroken run gives.

    The kept weights are the newest ones, or those of the start.
    """
    config, killed_at = request.param
    scratch = tmp_path_factory.mktemp("killed")
    with pytest.raises(_KilledError):
        tuned(config, scratch, killed_at)
    return config, scratch, tuned(config, tmp_path_factory.mktemp("unbroken"))


def contents(tuned: tuple[object, Path]) -> tuple[object, dict[str, bytes]]:
    """The history, and every file."""
    history, output = tuned
    names = [name for name in files_of(output) if not name.startswith("tensorboard/")]
    return history, {name: (output / name).read_bytes() for name in names}


def test_every_file_of_a_killed_fine_tuning_is_covered(
    killed: tuple[FinetuneConfig, Path, tuple[object, Path]], tmp_path: Path
) -> None:
    _, scratch, _ = killed
    assert discard_damage(scratch, quiet) == []
    fresh = copies(scratch, tmp_path / "copy")
    for name in files_of(scratch):
        for damage in DAMAGES:
            copy = next(fresh)
            damage(copy / name)
            said = discard_damage(copy, quiet)
            assert len(said) == (0 if damage is remove and name.endswith(RECORD_NAME) else 1), name
            (gone,) = set(folders_of(scratch)) - set(folders_of(copy))
            assert name.startswith(f"{gone}/")


def test_a_fine_tuning_of_which_a_folder_was_thrown_away_ends_with_the_same_bits(
    killed: tuple[FinetuneConfig, Path, tuple[object, Path]], tuned: Callable[..., tuple[object, Path]], tmp_path: Path
) -> None:
    config, scratch, unbroken = killed
    folders = folders_of(scratch)
    places = {"fine-tuned/steps"} | (
        {"fine-tuned/phase-0/trained", "fine-tuned/phase-1/checkpoints/checkpoint-4"}
        if config is LEARNING
        else {f"fine-tuned/phase-0/checkpoints/{name}" for name in ("start", "checkpoint-2")}
    )
    assert places <= set(folders), folders
    fresh = copies(scratch, tmp_path / "copy")
    for folder in (None, *folders):
        copy = next(fresh)
        if folder is not None:
            shutil.rmtree(copy / folder)
        assert contents(tuned(config, copy)) == contents(unbroken), folder


# Quantizing.


def test_a_quantization_of_which_a_part_was_thrown_away_ends_with_the_same_bits(mixture: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    settings = {"max_perplexity_increase": 0.05}
    whole = quantize(mixture, tmp_path / "whole", "mixed", None, **settings)
    with pytest.raises(StoppedError):
        quantize(
            mixture, tmp_path / "killed", "mixed", scratch, ("measuring each part in fewer bits", 2 + 2 + 1), **settings
        )
    assert discard_damage(scratch, quiet) == []
    folders = folders_of(scratch)
    layers, records = ([name for name in folders if name.startswith(start)] for start in ("layers-", "sensitivities/"))
    assert (len(layers), len(records), len(folders)) == (3, 5, 8)
    fresh = copies(scratch, tmp_path / "copy")
    for number, folder in enumerate((layers[1], records[1])):
        copy = next(fresh)
        for file in files_of(copy / folder):
            flip(copy / folder / file)
        assert len(discard_damage(copy, quiet)) == 1
        assert quantize(mixture, tmp_path / f"resumed-{number}", "mixed", copy, **settings) == whole
        assert same(tmp_path / "whole", tmp_path / f"resumed-{number}")


# The run.


def test_a_run_says_what_was_damaged_and_succeeds(
    dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing behind: neither what it kept, nor what a run with other settings did."""
    recipe, work = tmp_path / "tiny.json", tmp_path / "work"
    source = {"kind": "text", "train": [str(ROOT / "upcycle" / "*" / "*.py")], "separator": "\n\n"}
    fields: dict[str, Any] = {
        "source": str(dense_checkpoint),
        "data": {
            "source": source,
            "block_size": 32,
            "max_train_tokens": 4096,
            "max_validation_tokens": 1024,
            "max_test_tokens": 1024,
        },
        "upcycle": {"num_experts": 4, "receipt": "layers"},
        "finetune": {"steps": 4, "eval_steps": 1, "warmup_steps": 1, "batch_size": 4, "control": False},
    }
    recipe.write_text(json.dumps(fields), encoding="utf-8")

    def run() -> Any:
        return dense2moe("run", recipe, "--workdir", work, "--until", "finetune")

    def run_here(function: Any, argument: Any, label: str, held: int, progress: Any) -> ProcessResult[Any]:
        def watch(what: str, done: int, total: int) -> None:
            if what.startswith("training fine-tuned") and done == killed_at:
                raise KeyboardInterrupt
            progress(what, done, total)

        return ProcessResult(function(argument, watch), 0)

    monkeypatch.setattr("dense2moe.convert.walk.run_apart", run_here)
    killed_at = 3
    assert run().exit_code == 130
    killed_at = 0
    (scratch,) = work.glob("finetune-*.resume")
    stale = shutil.copytree(scratch, work / "finetune-0123456789ab.resume")
    kept = [
        shutil.copytree(scratch, work / name)
        for name in ("finetune-mine.resume", "mine-0123456789ab.resume", "quantize-int8-0123456789ab.resume")
    ]
    for name in ("finetune-0123456789ab.partial", "upcycle-0123456789ab.partial"):
        (work / name).mkdir()
    sealed = next(work.glob("upcycle-*[0-9a-f]"))
    after_its_seal = shutil.copytree(scratch, sealed.with_name(f"{sealed.name}.resume"))
    (newest,) = scratch.glob("fine-tuned/phase-0/checkpoints/checkpoint-2")
    empty(newest / "optimizer.pt")
    finished = run()
    assert finished.exit_code == 0, finished.stderr
    (line,) = (line for line in finished.stderr.splitlines() if line.startswith("!"))
    assert line == f"! {newest}: 'optimizer.pt' is damaged; deleted, and made again"
    assert not list(work.glob("*.partial"))
    assert not (stale.exists() or after_its_seal.exists() or scratch.exists())
    # folders that are nobody's, and of a stage that is not finished
    assert sorted(work.glob("*.resume")) == sorted(kept)
    digests = [open_artifact(next(work.glob("finetune-" + 12 * "[0-9a-f]"))).manifest["files"]["model.safetensors"]]
    shutil.rmtree(next(work.glob("finetune-" + 12 * "[0-9a-f]")))
    assert run().exit_code == 0
    digests.append(open_artifact(next(work.glob("finetune-" + 12 * "[0-9a-f]"))).manifest["files"]["model.safetensors"])
    assert digests[0] == digests[1]
