"""Tasks: what models answer equals what transformers says they do, and a package that answers worse is told."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import dense2moe
from scipy import stats
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerFast

from dense2moe.convert.checking import prepare
from dense2moe.convert.errors import RecipeError
from dense2moe.convert.recipe.loading import load_recipe
from dense2moe.convert.report.parity_tables import parity_sections
from dense2moe.convert.report.verdicts import describe_task, verdict_lines
from dense2moe.convert.stages.parity import list_settings
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.answers.evaluation import score_task
from dense2moe.export.parity.answers.examples import MultipleChoice, Similarity, TaskFile
from dense2moe.export.parity.answers.outcome import (
    ModelAnswer,
    PackageModel,
    ScoredRow,
    TorchModel,
    answer_task,
    encode_task,
)
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.forward import open_reference
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.records import Limit, ProviderParity, TaskCheck
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.parity.verdicts import find_breaches
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import CPU, Decoder
from dense2moe.export.runtime.generation import Generation
from dense2moe.export.runtime.inspection import Inspection
from tests.report_facts import make_facts, records, tiered
from tests.task_examples import ANSWERS, CHOICES, PAIRS, write_task

BLOCKS = torch.randint(2, 300, (4, 48), generator=torch.Generator().manual_seed(0))
CONTEXT = 256
GENERATION = Generation(start=0, ends=(1,))  # of the tiny tokenizer


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def package(mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture in float32. Shared: read only; its twin lies beside it."""
    return export(mixture_checkpoint, tmp_path_factory.mktemp("float32"))


def export(checkpoint: Path, folder: Path) -> Path:
    for name in ("twin", "package"):
        (folder / name).mkdir()
    quantize_checkpoint(checkpoint, folder / "twin", "float32", QuantizeConfig(), silent)
    write_package(folder / "twin", folder / "package", OnnxConfig(lowering="grouped"), silent)
    return folder / "package"


# --- What a model answers


def load(directory: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(directory, experts_implementation="eager").eval()


def both_models(package: Path, task: TaskFile, num_tokens: int = 8) -> list[list[ModelAnswer] | None]:
    tokenizer = AutoTokenizer.from_pretrained(package)
    encoded = encode_task(task, tokenizer, GENERATION, CONTEXT, num_tokens)
    with open_reference(package.parent / "twin") as reference:
        return [
            answer_task(model, encoded, tokenizer, num_tokens)
            for model in (TorchModel(reference), PackageModel(Decoder(package, inspection=Inspection(streams=True))))
        ]


@torch.inference_mode()
def test_choices_have_the_likelihood_that_transformers_loss_says(
    package: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load(package.parent / "twin")
    expected = []
    for example in CHOICES:
        for choice in example.choices:
            ids = tiny_tokenizer(example.prompt + choice, return_tensors="pt").input_ids
            # a choice that begins with a space has tokens of its own
            num_scored = len(tiny_tokenizer(choice, add_special_tokens=False).input_ids)
            labels = ids.clone()
            labels[:, :-num_scored] = -100
            expected.append(-float(model(ids, labels=labels).loss) * num_scored)
    for outcomes in both_models(package, TaskFile("t", "choice", CHOICES)):
        assert outcomes is not None
        found = [value for outcome in outcomes for value in outcome.values]
        assert found == pytest.approx(expected, abs=2e-4)  # float32 sums of up to 8 losses of 6 nats
        assert score_task(TaskFile("t", "choice", CHOICES), outcomes)["accuracy"] == np.mean(
            [np.argmax(expected[3 * n : 3 * n + 3]) == n % 3 for n in range(24)]
        )


def test_a_choice_is_scored_from_where_its_tokens_leave_the_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Where prompt and choice make one token, all choices are scored from before it on.

    So that they are scored on the same text.
    """
    example = MultipleChoice(prompt="Licens", choices=("e", "ing terms"), answer=0)
    prompt = tuple(tiny_tokenizer("Licens").input_ids)
    whole = [tuple(tiny_tokenizer("Licens" + choice).input_ids) for choice in example.choices]
    assert whole[0][: len(prompt)] != prompt  # "License" is a token, or ends in one that covers both
    rows = encode_task(TaskFile("t", "choice", (example, example)), tiny_tokenizer, GENERATION, CONTEXT, 8).rows[0]
    start = next(n for n, pair in enumerate(zip(prompt, whole[0], strict=False)) if pair[0] != pair[1])
    assert rows == tuple(ScoredRow(ids, start) for ids in whole)


def test_a_prompt_that_is_too_long_loses_its_beginning_and_a_choice_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    long = MultipleChoice(prompt="work " * 20, choices=(" the", " of"), answer=0)
    (row, _), *_ = encode_task(TaskFile("t", "choice", (long, long)), tiny_tokenizer, GENERATION, 16, 8).rows
    whole = tiny_tokenizer(long.prompt + " the").input_ids
    assert len(row.fed) == 16
    assert row.ids == tuple(whole[-17:])
    with pytest.raises(ExportError, match=r"task 't', example 1: a choice has .* tokens; the model's context holds 4"):
        encode_task(
            TaskFile("t", "choice", (MultipleChoice(prompt="a", choices=("derivative works", "b"), answer=0),) * 2),
            tiny_tokenizer,
            GENERATION,
            4,
            8,
        )
    with pytest.raises(ExportError, match=r"example 1: a text has .* tokens; the model's context holds 4"):
        encode_task(
            TaskFile("t", "similarity", (Similarity(texts=("derivative works of", "a"), score=1),) * 2),
            tiny_tokenizer,
            GENERATION,
            4,
            8,
        )
    with pytest.raises(
        ExportError, match=r"parity\.answer_tokens is 8; must be less than the model's context, which is 8"
    ):
        encode_task(TaskFile("t", "answer", ANSWERS), tiny_tokenizer, GENERATION, 8, 8)


def test_an_empty_prompt_needs_a_token_that_starts_a_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """With none before it the first token of a choice would count in no score."""
    task = TaskFile("t", "choice", (MultipleChoice(prompt="", choices=("a", "b"), answer=0),) * 2)
    assert {row.start for rows in encode_task(task, tiny_tokenizer, GENERATION, CONTEXT, 8).rows for row in rows} == {1}
    startless = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str()), eos_token="</s>"
    )
    startless.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(
        ExportError, match="task 't', example 1: the prompt is empty, and the tokenizer has no token that starts a text"
    ):
        encode_task(task, startless, Generation(), CONTEXT, 8)


def test_a_row_is_not_padded_past_the_switch_of_a_longrope(
    package: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """There the model computes all tokens otherwise, the padded row's too."""
    read: list[tuple[int, int]] = []

    class Watched(PackageModel):
        def hidden(self, ids: torch.Tensor) -> torch.Tensor | None:
            read.append((ids.shape[0], ids.shape[1]))
            return super().hidden(ids)

    texts = ("a" * 3, "b" * 4, "c" * 8, "d" * 8, "e" * 9)  # the letters that no merge takes together
    lengths = [len(tiny_tokenizer(text).input_ids) for text in texts]
    task = TaskFile(
        "t", "similarity", tuple(Similarity(texts=(text, texts[0]), score=float(n)) for n, text in enumerate(texts))
    )
    for switch in (None, 6):
        read.clear()
        answer_task(
            Watched(Decoder(package, inspection=Inspection(streams=True))),
            encode_task(task, tiny_tokenizer, GENERATION, CONTEXT, 8, switch),
            tiny_tokenizer,
            8,
        )
        if switch is None:
            assert read == [(5, max(lengths))]
        else:
            beyond = {length for length in lengths if length > switch}
            assert {size for _, size in read if size > switch} == beyond
            assert all(count == lengths.count(size) for count, size in read if size > switch)


@torch.inference_mode()
def test_answers_are_what_transformers_generates(package: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = load(package.parent / "twin")
    expected = []
    for example in ANSWERS:
        ids = tiny_tokenizer(example.prompt, return_tensors="pt").input_ids
        text = tiny_tokenizer.decode(
            model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True
        )
        expected.append(text.partition("\n")[0].strip())
    for outcomes in both_models(package, TaskFile("t", "answer", ANSWERS)):
        assert outcomes is not None
        assert [outcome.text for outcome in outcomes] == expected


def test_answers_are_the_likeliest_tokens_whatever_a_checkpoint_forbids(package: Path, tmp_path: Path) -> None:
    task = TaskFile("t", "answer", ANSWERS)
    expected = both_models(package, task)
    home = shutil.copytree(package.parent, tmp_path / "home")
    settings = {
        "suppress_tokens": list(range(3, 200)),
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 6,
        "repetition_penalty": 1.7,
    }
    (home / "twin" / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert both_models(home / package.name, task) == expected


@torch.inference_mode()
def test_texts_are_as_alike_as_the_means_of_what_the_last_layer_gives(
    package: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load(package.parent / "twin")
    states: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, given: states.append(given[0]))

    def mean(text: str) -> torch.Tensor:
        model(tiny_tokenizer(text, return_tensors="pt").input_ids)
        return states.pop()[0].double().mean(0)

    expected = [
        float(torch.cosine_similarity(mean(a), mean(b), dim=0)) for a, b in (example.texts for example in PAIRS)
    ]
    for outcomes in both_models(package, TaskFile("t", "similarity", PAIRS)):
        assert outcomes is not None
        assert [outcome.values[0] for outcome in outcomes] == pytest.approx(expected, abs=1e-5)
        scores = score_task(TaskFile("t", "similarity", PAIRS), outcomes)
        assert scores["Spearman's correlation"] == pytest.approx(
            stats.spearmanr(expected, [pair.score for pair in PAIRS]).statistic, abs=0.05
        )


# --- Parity


def run(package: Path, finetuned: Path, tasks: Sequence[TaskFile], **settings: Any) -> ProviderParity:
    config = ParityConfig(
        max_perplexity_increase={},
        longest_row=48,
        free_tokens=4,
        answer_tokens=8,
        tasks=tuple(task.name for task in tasks),
        **settings,
    )
    result = check_parity(
        ParitySubject(package, package.parent / "twin", finetuned, BLOCKS, "float32", False, tasks=tasks),
        config,
        silent,
    )
    assert isinstance(result.providers[CPU], ProviderParity)
    return result.providers[CPU]


def tasks_of(checkpoint: Path) -> list[TaskFile]:
    """Tasks whose right answers are those that a checkpoint gives, so that it scores 1."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    given = [
        TaskFile("choices", "choice", CHOICES),
        TaskFile("answers", "answer", ANSWERS),
        TaskFile("pairs", "similarity", PAIRS),
    ]
    made = []
    with open_reference(checkpoint) as reference:
        for task in given:
            outcomes = answer_task(
                TorchModel(reference), encode_task(task, tokenizer, GENERATION, CONTEXT, 8), tokenizer, 8
            )
            assert outcomes is not None
            pairs = zip(task.examples, outcomes, strict=True)
            update = {
                "choice": lambda outcome: {"answer": outcome.chosen},
                "answer": lambda outcome: {"answer": outcome.text or "?"},
                "similarity": lambda outcome: {"score": outcome.values[0]},
            }[task.kind]
            made.append(
                TaskFile(
                    task.name,
                    task.kind,
                    tuple(example.model_copy(update=update(outcome)) for example, outcome in pairs),
                )
            )
    return made


def test_a_right_package_does_its_tasks_as_the_checkpoint_does(package: Path, mixture_checkpoint: Path) -> None:
    result = run(package, mixture_checkpoint, tasks_of(mixture_checkpoint))
    assert find_breaches(result) == []
    assert result.tiers["task"] == "passed"
    for check in result.tasks:
        assert isinstance(check, TaskCheck)
        assert check.package == check.twin == check.finetuned
        # an empty answer is no "?"
        assert check.package[check.metric] == pytest.approx(1.0, abs=0.2 if check.kind == "answer" else 1e-9)
        assert (check.change, check.standard_error, check.num_tie_flips) == (0, 0, 0)
        assert check.same_as_twin == check.same_as_finetuned == (None if check.kind == "similarity" else 1)
        assert 0 <= check.largest_gap < result.limits["logits"].value


def test_a_package_of_another_model_fails_at_every_task(
    package: Path, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    """The weights of all experts negated: each tier tells, the tasks by score and by answer."""
    other = tmp_path / "checkpoint"
    shutil.copytree(mixture_checkpoint, other)
    model = load(other)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.neg_()
    model.save_pretrained(other)
    tasks = tasks_of(mixture_checkpoint)
    wrong = export(other, tmp_path)
    shutil.rmtree(tmp_path / "twin")
    shutil.copytree(package.parent / "twin", tmp_path / "twin")
    result = run(wrong, mixture_checkpoint, tasks)
    lines = [line for tier, line in find_breaches(result) if tier == "task"]
    assert result.tiers["task"] == "broken"
    assert sum("the twin answers otherwise, by a relative error of" in line for line in lines) == 2
    assert sum("the twin gives another similarity, by a relative error of" in line for line in lines) == 1
    assert any(
        line.startswith("'choices': accuracy 0.")
        and "below the fine-tuned model's; at most 0 and two standard errors" in line
        for line in lines
    )


def test_without_tasks_the_tier_says_that_there_were_none(package: Path, mixture_checkpoint: Path) -> None:
    assert run(package, mixture_checkpoint, []).tiers["task"] == "not run: no task was given"


CHECK = TaskCheck(
    "intents",
    "choice",
    100,
    "accuracy",
    {"accuracy": 0.6},
    {"accuracy": 0.6},
    {"accuracy": 0.7},
    -0.1,
    0.02,
    1.0,
    0.9,
    0.0,
)
SKELETON = {
    "checks": (),
    "figures": (),
    "places": "not run",
    "logits_factor": None,
    "free_run": None,
}


def breaches_of(check: TaskCheck, **limits: float) -> list[str]:
    result: Any = object.__new__(ProviderParity)
    for name, value in {
        **SKELETON,
        "tasks": (check,),
        "worst_layer": None,
        "limits": {n: Limit(v, "") for n, v in limits.items()},
    }.items():
        object.__setattr__(result, name, value)
    agreement = type("Same", (), {"kl": 0.0, "routing_agreement": (), "hidden_error": ()})()
    object.__setattr__(result, "twin", agreement)
    return [line for tier, line in find_breaches(result) if tier == "task"]


def test_a_score_may_drop_by_the_limit_and_two_standard_errors() -> None:
    assert breaches_of(CHECK, score=0.0601) == []
    shown = "(the package shows nothing of its layers)"
    line = (
        "'intents': accuracy 0.6000 is 0.1000 ± 0.0200 below the fine-tuned model's; at most 0.05 and two "
        f"standard errors {shown}"
    )
    assert breaches_of(CHECK, score=0.05) == [line]
    assert breaches_of(replace(CHECK, change=0.1), score=0.0) == []
    assert breaches_of(replace(CHECK, change=math.nan), score=0.0) != []


def test_another_answer_is_a_breach_where_the_twin_is_surer_than_rounding() -> None:
    check = replace(CHECK, change=0.0, largest_gap=2e-5, example=7)
    assert breaches_of(check, logits=2e-5) == []
    line = (
        "'intents', example 7: the twin answers otherwise, by a relative error of 2.0e-05 > 1.0e-05 (the package "
        "shows nothing of its layers)"
    )
    assert breaches_of(check, logits=1e-5) == [line]
    assert breaches_of(check) == []  # a graph that rounds activations has no such limit


# --- The command, the recipe, the report


def test_the_command_takes_tasks(package: Path, mixture_checkpoint: Path, tmp_path: Path) -> None:
    def parity(file: Path, *options: str) -> Any:
        text = str(Path(__file__).parent.parent / "LICENSE")
        given = [
            "parity",
            package,
            "--reference",
            mixture_checkpoint,
            "--data",
            text,
            "--blocks",
            4,
            "--block-size",
            48,
        ]
        return dense2moe(*given, "--task", file, "--json", tmp_path / "parity.json", *options)

    result = parity(write_task(tmp_path / "words.jsonl", CHOICES))
    assert result.exit_code == 0, result.output
    assert "  words: accuracy 0." in result.output
    assert ", as the fine-tuned model's\n" in result.output
    found = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))["providers"][CPU]
    assert found["tiers"]["task"] == "passed"
    assert found["limits"]["score"]["value"] == 0
    assert found["tasks"][0]["num_examples"] == 24
    parity(write_task(tmp_path / "words.jsonl", CHOICES), "--max-score-drop", "0.25")
    assert (
        json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))["providers"][CPU]["limits"]["score"]["value"]
        == 0.25
    )
    refused = parity(tmp_path / "none.jsonl")
    assert refused.exit_code == 1
    assert refused.stderr.strip().splitlines()[-1].startswith(f"Error: {tmp_path / 'none.jsonl'}: cannot be read")


def test_the_fixture_takes_tasks(package: Path, mixture_checkpoint: Path, tmp_path: Path, assert_parity: Any) -> None:
    task = write_task(tmp_path / "words.jsonl", CHOICES)
    text = Path(__file__).parent.parent / "LICENSE"
    found = assert_parity(
        package, reference=mixture_checkpoint, data=text, block_size=48, num_blocks=4, tasks=[task], longest_row=48
    )
    assert found.providers[CPU].tasks[0].name == "words"


def test_another_task_makes_another_parity_and_nothing_else(tmp_path: Path, dense_checkpoint: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text(f"{split} " * 200, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"source: {dense_checkpoint}\ndata: {{source: {{kind: text, train: [train.txt], validation: "
        "[validation.txt], test: [test.txt]}, "
        "block_size: 32}\nparity: {tasks: [words.jsonl]}\n",
        encoding="utf-8",
    )
    with pytest.raises(RecipeError, match=r"'words.jsonl' is not there; looked for"):
        prepare(load_recipe(recipe), silent)
    settings = []
    for examples in (CHOICES, CHOICES[1:]):
        write_task(tmp_path / "words.jsonl", examples)
        preparation = prepare(load_recipe(recipe), silent)
        assert preparation.tasks == (TaskFile("words", "choice", examples),)
        settings.append(list_settings(preparation, "int8"))
    assert settings[0].pop("task_files") != settings[1].pop("task_files")
    assert settings[0] == settings[1]


def test_the_report_tells_the_tasks() -> None:
    facts = tiered(make_facts())
    assert "intents" not in " ".join(verdict_lines(records(facts)))
    check = {
        **CHECK.__dict__,
        "package": {"accuracy": 0.6, "macro F1": 0.5},
        "twin": {"accuracy": 0.6, "macro F1": 0.5},
    }
    facts["variants"]["int8"]["parity"]["providers"][CPU]["tasks"] = [
        check | {"finetuned": {"accuracy": 0.7, "macro F1": 0.6}},
        "not run: 'pairs' …",
    ]
    told = "intents: accuracy 0.600, −0.100 ± 0.020 beside the fine-tuned model's"
    assert (
        describe_task(
            replace(
                CHECK,
                **{name: check[name] for name in ("package", "twin")},
                finetuned={"accuracy": 0.7, "macro F1": 0.6},
            )
        )
        == told
    )
    assert next(line for line in verdict_lines(records(facts)) if line.startswith("ONNX int8")).endswith(
        f"; {told}; parity passed."
    )
    sections = {section.name: dict(section.providers[0].tables) for section in parity_sections(records(facts))}
    assert sections["int8"]["Tasks"].rows == (
        ("intents", "100", "accuracy", "0.700", "0.600", "0.600", "−0.100 ± 0.020", "90.00 %", "100 %"),
        ("", "", "macro F1", "0.600", "0.500", "0.500", "", "", ""),
    )
    assert "Tasks" not in sections["float32"]
