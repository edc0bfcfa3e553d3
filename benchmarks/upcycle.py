"""Time and memory of upcycling: dense2moe, mergekit-moe and `cp`.

    python benchmarks/upcycle.py [--mergekit PATH/TO/mergekit-moe] [--workdir DIRECTORY]
    python benchmarks/upcycle.py --sources 2 [--mergekit PATH/TO/mergekit-moe] [--workdir DIRECTORY]

Makes a bfloat16 checkpoint of random weights in the shape of TinyLlama 1.1B and turns it into 4 experts: plain copies
and a random router. The least that this can cost is the writing, and that is what `cp -r` of the finished output
measures. The contenders take turns; medians of 3 rounds and their ratios are printed. It needs 18 GB of free disk, 8
times the checkpoint, and an idle machine. Smaller shapes only try it out: imports fill their time.

What is measured. Each contender is a fresh process, so its start and its imports count; a row shows what they are
alone. dense2moe imports as its command line does (`upcycle/imports.py`). The contenders take turns, each round from the
next one on. The clock stops when the data is on the disk: a `sync` before it starts, and another inside the span. What
one reads (for `cp` the mixture, for the others the dense checkpoint) is read once just before, so that all find it in
the page cache, as far as memory allows. On a file system that shares blocks between copies, `cp` writes nothing and its
ratio says nothing. Memory is the kernel's count of the process's peak, mapped file pages included, the largest of the
rounds. A process starts with the peak of the one that started it, which is why this one imports nothing but the
standard library, and why `cp` shows a few MB more than it takes.

With `--sources` it is a merge: a Mistral with a sliding window is the base, experts come from as many other
checkpoints, and routers are read from two prompts an expert, in mergekit's words by `gate_mode: hidden`. Our merge has
two rows: what mergekit does too, and all that `upcycle` does beside it (distances of the sources, every tensor read
back, the receipt).

mergekit-moe runs from its own environment (`pip install mergekit==0.1.5`), with its own settings; it demands a
tokenizer, so the checkpoint has one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

NUM_EXPERTS, NUM_HEADS, NUM_KV_HEADS = 4, 32, 4
SHARD_BYTES = 1_000_000_000
MB, GB = 1e6, 1e9
MOST_AGAINST_CP, MOST_AGAINST_MERGEKIT, MOST_MEGABYTES = 1.3, 1 / 3, 600
CP, COPIES, MERGEKIT, NOISE, DROP = "cp -r", "dense2moe", "mergekit-moe", "dense2moe, noise 0.01", "dense2moe, drop 0.5"
START = "dense2moe, start and plan alone"
MERGE, PROVED = "dense2moe, merge", "dense2moe, merge, distances, read back, receipt"
WINDOW = 1024
EXPERTS = {COPIES: {}, NOISE: {"noise": 0.01}, DROP: {"drop": 0.5}}
"""Contender to its ExpertsConfig."""


@dataclass(frozen=True)
class Run:
    """What one contender took in one round."""

    seconds: float
    peak_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Contender:
    """A command that ends with the directory to write, and the directories that it reads."""

    command: tuple[str, ...]
    sources: tuple[Path, ...]


def make_checkpoint(
    directory: Path, layers: int, hidden: int, intermediate: int, vocabulary: int, window: int, seed: int
) -> None:
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

    config = (MistralConfig if window else LlamaConfig)(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["MistralForCausalLM" if window else "LlamaForCausalLM"],
        dtype="bfloat16",
        **({"sliding_window": window} if window else {}),
    )
    config.save_pretrained(directory)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        used += 2 * shape.numel()
        if shards[-1] and used > SHARD_BYTES:
            shards.append([])
            used = 2 * shape.numel()
        shards[-1].append(name)
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # A norm's weights lie around 1, a matrix's around 0.
        tensors = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(
                float(len(shapes[name]) == 1), 0.02, generator=generator
            )
            for name in names
        }
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def run_upcycle(experts: str, source: Path, output: Path) -> None:
    from dense2moe.upcycle.imports import uncollected_imports

    with uncollected_imports():
        from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
        from dense2moe.upcycle.building.surgery import upcycle

    config = UpcycleConfig(
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        experts=ExpertsConfig.model_validate_json(experts),
        router=RouterConfig(logit_std=1.0),
    )
    output.mkdir()
    upcycle(source, output, config, 0, lambda *_: None)


def make_prompts() -> list[list[str]]:
    """Two prompts of each expert, of unequal lengths."""
    return [
        [" ".join(f"w{3 + (number * 97 + place * 31) % 900}" for place in range(length)) for length in (40, 11)]
        for number in range(NUM_EXPERTS)
    ]


def run_merge(proved: bool, source: Path, output: Path, sources: list[Path]) -> None:
    from dense2moe.upcycle.imports import uncollected_imports

    with uncollected_imports():
        from dense2moe.upcycle.building.config import MergingConfig, RouterConfig, RouterDomain, UpcycleConfig
        from dense2moe.upcycle.building.hidden_states import read_routers
        from dense2moe.upcycle.building.making import make_mixture
        from dense2moe.upcycle.building.plan import plan_upcycle
        from dense2moe.upcycle.building.surgery import upcycle
        from dense2moe.upcycle.checkpoints.adapter import open_sources
        from dense2moe.upcycle.checkpoints.reader import open_checkpoint
        from dense2moe.upcycle.tasks.examples import Examples

    import torch

    domains = tuple(RouterDomain(prompts=tuple(prompts)) for prompts in make_prompts())
    config = UpcycleConfig(
        num_experts=NUM_EXPERTS,
        router=RouterConfig(kind="prototypes", domains=domains),
        merging=MergingConfig(method="base"),
    )
    base, others = open_checkpoint(source), {each.name: each for each in sources}
    plan = plan_upcycle(base, config, open_sources(base, others))
    no_text = Examples.of_blocks(torch.zeros((0, 256), dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    output.mkdir()
    if proved:
        make_mixture(source, output, plan, no_text, Path(), 0, 256, lambda *_: None, others)
        return
    reading = read_routers(source, config, no_text, Path(), 0, lambda *_: None, plan, others)
    upcycle(source, output, config, 0, lambda *_: None, reading and reading.routers, plan, others)


def run_plan(source: Path, output: Path) -> None:
    """What comes before the first byte: the interpreter, the imports and the plan."""
    from dense2moe.upcycle.imports import uncollected_imports

    with uncollected_imports():
        from dense2moe.upcycle.building.config import UpcycleConfig
        from dense2moe.upcycle.building.plan import plan_upcycle
        from dense2moe.upcycle.building.surgery import upcycle  # noqa: F401 (imported for its time)
        from dense2moe.upcycle.checkpoints.reader import open_checkpoint

    plan_upcycle(open_checkpoint(source), UpcycleConfig(num_experts=NUM_EXPERTS))
    output.mkdir()


def this_script(command: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(Path(__file__).resolve()), f"--{command}", *map(str, arguments))


def contenders(
    folder: Path, source: Path, mixture: Path, mergekit: Path | None, initializations: bool
) -> dict[str, Contender]:
    result = {CP: Contender(("cp", "-r", str(mixture)), (mixture,))}
    for name, experts in EXPERTS.items():
        if name == COPIES or initializations:
            result[name] = Contender(this_script("run-upcycle", json.dumps(experts), source), (source,))
        if name == COPIES:
            result[START] = Contender(this_script("run-plan", source), (source,))
        if name == COPIES and mergekit:
            copies = [{"source_model": str(source)}] * NUM_EXPERTS
            config = write_mergekit_config(folder, source, "random", copies)
            result[MERGEKIT] = Contender((str(mergekit), str(config)), (source,))
    return result


def merging_contenders(
    folder: Path, source: Path, sources: list[Path], mixture: Path, mergekit: Path | None, checks: bool
) -> dict[str, Contender]:
    read = (source, *sources)
    result = {CP: Contender(("cp", "-r", str(mixture)), (mixture,))}
    for name, proved in ((MERGE, False), (PROVED, True)) if checks else ((MERGE, False),):
        arguments = json.dumps({"proved": proved, "sources": [str(each) for each in sources]})
        result[name] = Contender(this_script("run-merge", arguments, source), read)
    if mergekit:
        share = NUM_EXPERTS // len(sources)
        experts = [
            {"source_model": str(sources[number // share]), "positive_prompts": prompts}
            for number, prompts in enumerate(make_prompts())
        ]
        config = write_mergekit_config(folder, source, "hidden", experts)
        result[MERGEKIT] = Contender((str(mergekit), str(config)), read)
    return result


def write_mergekit_config(folder: Path, source: Path, mode: str, experts: list[dict[str, object]]) -> Path:
    config = folder / "mergekit.yml"  # JSON is YAML
    fields = {"base_model": str(source), "gate_mode": mode, "dtype": "bfloat16", "experts_per_token": 2}
    config.write_text(json.dumps({**fields, "experts": experts}))
    return config


def start(command: Iterable[str], log: Path) -> int:
    """Run a command to its end; returns its peak resident bytes."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            list(command), stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(
            f"{' '.join(command)}\nended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}"
        )
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(contender: Contender, folder: Path) -> Run:
    output = folder / "output"
    for source in contender.sources:
        read_through(source)
    os.sync()
    started = time.perf_counter()
    peak_bytes = start((*contender.command, str(output)), folder / "log")
    os.sync()
    seconds = time.perf_counter() - started
    run = Run(seconds, peak_bytes, sum(file.stat().st_size for file in output.iterdir()))
    shutil.rmtree(output)
    return run


def read_through(directory: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def race(entries: dict[str, Contender], folder: Path, rounds: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {name: [] for name in entries}
    names = list(entries)
    for number in range(rounds):
        # no contender always meets the cache that one other leaves
        for name in names[number % len(names) :] + names[: number % len(names)]:
            runs[name].append(measure(entries[name], folder))
            print(f"round {number + 1} of {rounds}, {name}: {runs[name][-1].seconds:.1f} s", file=sys.stderr)
    return runs


def print_machine(folder: Path, mergekit: Path | None) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file_system = subprocess.run(
        ["df", "--output=fstype", folder], capture_output=True, text=True, check=False
    ).stdout.split()
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("dense2moe", "torch", "transformers", "safetensors")
    ]
    if mergekit:
        question = (
            "from importlib.metadata import version; print(*[f'{name} {version(name)}' for name in "
            "('mergekit', 'torch', 'transformers')])"
        )
        answer = subprocess.run(
            [mergekit.parent / "python", "-c", question], capture_output=True, text=True, check=False
        ).stdout.strip()
        versions.append(answer or "mergekit of an unknown version")
    print(f"{date.today()}, {processor}, {os.cpu_count()} cores, {memory / GB:.0f} GB memory,")
    print(
        f"{file_system[-1] if file_system else 'unknown'} file system, Python {platform.python_version()}, "
        f"{', '.join(versions)}\n"
    )


def print_table(runs: dict[str, list[Run]], mergekit: Path | None, own: str) -> None:
    medians = {name: statistics.median(run.seconds for run in of) for name, of in runs.items()}
    print(
        f"| contender | seconds, median (min–max) | against cp | against mergekit-moe | against {own} | GB written | "
        "peak resident MB |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, of in runs.items():
        seconds = [run.seconds for run in of]
        cells = [name, f"{medians[name]:.1f} ({min(seconds):.1f}–{max(seconds):.1f})"]
        cells += [f"{medians[name] / medians[rival]:.2f}×" if rival in medians else "" for rival in (CP, MERGEKIT, own)]
        cells += [f"{of[-1].written_bytes / GB:.2f}", f"{peak_megabytes(of):.0f}"]
        print(f"| {' | '.join(cells)} |")
    if not mergekit:
        print(f"| {MERGEKIT} | not run: no --mergekit | | | | | |")
    print()
    if own == COPIES:
        judge("time against cp", medians[own] / medians[CP], MOST_AGAINST_CP, "×")
    if mergekit:
        judge("time against mergekit-moe", medians[own] / medians[MERGEKIT], MOST_AGAINST_MERGEKIT, "×")
    for name in (*EXPERTS, MERGE):
        if name in runs:
            judge(f"peak resident of {name}", peak_megabytes(runs[name]), MOST_MEGABYTES, " MB")


def peak_megabytes(runs: Iterable[Run]) -> float:
    return max(run.peak_bytes for run in runs) / MB


def judge(what: str, value: float, most: float, unit: str) -> None:
    digits = 0 if unit == " MB" else 2
    print(
        f"- {what}: {value:.{digits}f}{unit}, at most {most:.{digits}f}{unit}: {'met' if value <= most else 'MISSED'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048, help=f"hidden size, a multiple of {2 * NUM_HEADS}")
    parser.add_argument("--intermediate", type=int, default=5632, help="width of the FFN")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--workdir",
        type=Path,
        help="directory on the disk to measure (default: the one for temporary files); left as it was",
    )
    parser.add_argument("--mergekit", type=Path, help="the executable mergekit-moe of another environment")
    parser.add_argument(
        "--initializations",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also noise and dropped neurons; of a merge also all that is checked beside it",
    )
    parser.add_argument(
        "--double",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the peak memory with twice the layers",
    )
    parser.add_argument(
        "--sources", type=int, default=0, help="merge so many checkpoints, 1, 2 or 4, instead of copying one"
    )
    # The parts that this script runs as processes of their own.
    parser.add_argument("--make-checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run-upcycle", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--window", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--run-merge", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--run-plan", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make_checkpoint:
        make_checkpoint(
            arguments.make_checkpoint,
            arguments.layers,
            arguments.hidden,
            arguments.intermediate,
            arguments.vocabulary,
            arguments.window,
            arguments.seed,
        )
    elif arguments.run_upcycle:
        experts, source, output = arguments.run_upcycle
        run_upcycle(experts, Path(source), Path(output))
    elif arguments.run_merge:
        given, source, output = arguments.run_merge
        settings = json.loads(given)
        run_merge(settings["proved"], Path(source), Path(output), [Path(each) for each in settings["sources"]])
    elif arguments.run_plan:
        run_plan(*arguments.run_plan)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.workdir) as name:
            run_benchmark(arguments, Path(name).resolve())


def run_benchmark(arguments: argparse.Namespace, folder: Path) -> None:
    source, mixture = folder / "dense", folder / "mixture"
    mergekit = arguments.mergekit.absolute() if arguments.mergekit else None
    if mergekit and not os.access(mergekit, os.X_OK):
        raise SystemExit(f"{mergekit}: not an executable; --mergekit must be the path of mergekit-moe")

    def make(layers: int, to: Path = source, seed: int = 0) -> None:
        shape = (
            "--layers",
            layers,
            "--hidden",
            arguments.hidden,
            "--intermediate",
            arguments.intermediate,
            "--vocabulary",
            arguments.vocabulary,
            "--window",
            WINDOW if arguments.sources else 0,
            "--seed",
            seed,
        )
        start(this_script("make-checkpoint", to, *shape), folder / "log")

    make(arguments.layers)
    if arguments.sources:
        own, sources = MERGE, [folder / f"source-{number}" for number in range(arguments.sources)]
        for number, each in enumerate(sources):
            make(arguments.layers, each, number + 1)
        entries = merging_contenders(folder, source, sources, mixture, mergekit, arguments.initializations)
    else:
        own, entries = COPIES, contenders(folder, source, mixture, mergekit, arguments.initializations)
    # Both programs are started once before the rounds, so that neither is read from the disk inside the span; ours
    # leaves what cp copies.
    start((*entries[own].command, str(mixture)), folder / "log")
    if mergekit:
        start((str(mergekit), "--help"), folder / "log")
    runs = race(entries, folder, arguments.rounds)
    what = f"Merging {arguments.sources} sources of" if arguments.sources else "Upcycling"
    print(
        f"{what} {arguments.layers} layers, hidden {arguments.hidden}, FFN {arguments.intermediate}, to "
        f"{NUM_EXPERTS} experts,",
        end=" ",
    )
    print(f"medians of {arguments.rounds}; what is read is in the page cache;")
    print_machine(folder, mergekit)
    print_table(runs, mergekit, own)
    if arguments.double and not arguments.sources:
        shutil.rmtree(source)
        shutil.rmtree(mixture)
        make(2 * arguments.layers)
        judge(
            f"peak resident with {2 * arguments.layers} layers",
            peak_megabytes([measure(entries[COPIES], folder)]),
            MOST_MEGABYTES,
            " MB",
        )


if __name__ == "__main__":
    main()
