"""What `predict` answers is what windows written by hand answer, and optimum's pipeline of the package."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from clients import ask_client
from test_hosts import PLAIN, convert, ignore
from test_prediction import InTorch, save
from transformers import AutoTokenizer, BertForQuestionAnswering

from dense2moe.convert.cli import main
from dense2moe.convert.report.templates import load_template
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.prediction import Predictor
from dense2moe.upcycle.errors import UpcycleError

CONTEXTS = [
    "Barack Obama was born in Honolulu, Hawaii.",
    "The cat sat on a mat.  Unbelievable internationalization was born in Hawaii; " * 4,
    "  Zoë (the cat) sat. ",
]
QUESTIONS = ["who was born in Hawaii", "who sat", "what is unbelievable"]


class Package:
    has_cache = False


@pytest.fixture
def _torch_for_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    where = "dense2moe.export.runtime.prediction"
    monkeypatch.setattr(f"{where}.SinglePass", InTorch)
    monkeypatch.setattr(f"{where}.open_package", lambda _: Package())


def answer_by_hand(directory: Path, question: str, context: str, most: int) -> dict[str, Any]:
    """Every window is read alone, and every pair of tokens tried: the answer, and the least score of none.

    Windows are of plain slices of the context's tokens, whose places the tokenizer tells of the context alone.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = BertForQuestionAnswering.from_pretrained(directory).eval()
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    read = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = read["input_ids"], read["offset_mapping"]
    room = most - len(asked) - 3
    step = room - min(int(most * 0.25), room // 2)
    best: dict[str, Any] = {"score": -torch.inf}
    none = torch.inf
    for begin in range(0, len(ids), step):
        own = ids[begin : begin + room]
        window = [2, *asked, 3, *own, 3]
        types = [0] * (len(asked) + 2) + [1] * (len(own) + 1)
        with torch.no_grad():
            output = model(torch.tensor([window]), token_type_ids=torch.tensor([types]))
        starts, ends = output.start_logits[0], output.end_logits[0]
        none = min(none, float(starts[0] + ends[0]))
        chances = starts.softmax(-1), ends.softmax(-1)
        for first, last in itertools.product(range(len(own)), repeat=2):
            if not first <= last < first + 30:
                continue
            places = first + len(asked) + 2, last + len(asked) + 2
            score = float(starts[places[0]] + ends[places[1]])
            if score > best["score"]:
                place = spans[begin + first][0], spans[begin + last][1]
                chance = float(chances[0][places[0]] * chances[1][places[1]])
                best = {"score": score, "place": place, "chance": chance}
        if begin + room >= len(ids):
            break
    return {**best, "none": none}


@pytest.mark.usefixtures("_torch_for_onnx")
@pytest.mark.parametrize("most", [24, 64])
def test_answers_are_those_of_windows_written_by_hand(most: int, tmp_path: Path) -> None:
    directory = save(tmp_path, "BertForQuestionAnswering", max_position_embeddings=most)
    predictor = Predictor(directory)
    pairs = list(itertools.product(QUESTIONS, CONTEXTS))
    questions, contexts = zip(*pairs, strict=True)
    found = list(predictor.read_questions(questions, contexts))
    lacking = list(predictor.read_questions(questions, contexts, may_lack=True))
    silent = 0
    for (question, context), one, other in zip(pairs, found, lacking, strict=True):
        expected = answer_by_hand(directory, question, context, most)
        assert one.answer is not None
        assert other.answer is not None
        assert (one.input, (one.answer.start, one.answer.end)) == (question, expected["place"])
        assert one.answer.text == context[one.answer.start : one.answer.end]
        assert one.answer.score == pytest.approx(expected["chance"], rel=1e-4)
        is_silent = expected["none"] > expected["score"]
        assert other.answer.text == ("" if is_silent else one.answer.text)
        silent += is_silent
    assert len({each.answer.text for each in found if each.answer}) > 3
    assert 0 <= silent < len(pairs)


@pytest.mark.usefixtures("_torch_for_onnx")
def test_nothing_is_said_where_no_answer_is_likelier_and_only_if_asked(tmp_path: Path) -> None:
    directory = save(tmp_path, "BertForQuestionAnswering")
    predictor = Predictor(directory)
    model = predictor._run.model  # type: ignore[attr-defined]
    with torch.no_grad():
        model.qa_outputs.weight.zero_()  # all places are alike, and the first one's bias decides
        model.qa_outputs.bias.zero_()
    forward = model.forward

    def prefer_none(**given: Any) -> Any:
        output = forward(**given)
        output.start_logits[:, 0] += 3.0
        return output

    model.forward = prefer_none
    (said,) = predictor.read_questions(QUESTIONS[:1], CONTEXTS[:1])
    (none,) = predictor.read_questions(QUESTIONS[:1], CONTEXTS[:1], may_lack=True)
    assert said.answer is not None
    assert none.answer is not None
    assert said.answer.text
    assert (none.answer.text, none.answer.start, none.answer.end) == ("", 0, 0)
    assert none.answer.score > said.answer.score


@pytest.mark.usefixtures("_torch_for_onnx")
def test_longer_answers_are_found_where_they_are_asked_for(tmp_path: Path) -> None:
    predictor = Predictor(save(tmp_path, "BertForQuestionAnswering"))
    (short,) = predictor.read_questions(QUESTIONS[:1], CONTEXTS[1:2], longest=1)
    assert short.answer is not None
    assert " " not in short.answer.text


@pytest.mark.usefixtures("_torch_for_onnx")
def test_questions_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    predictor = Predictor(save(tmp_path, "BertForQuestionAnswering", max_position_embeddings=16))
    with pytest.raises(ExportError, match="answers questions; give each with its context"):
        list(predictor.read_texts(["who"]))
    with pytest.raises(ExportError, match="1 texts and 2 second texts; must be as many"):
        list(predictor.read_questions(["who"], ["a", "b"]))
    with pytest.raises(UpcycleError, match=r"question 'the cat the cat.*leave room for the context"):
        list(predictor.read_questions(["the cat " * 9], ["the cat"]))


def write_answering_package(folder: Path) -> Path:
    save(folder / "dense", "BertForQuestionAnswering", max_position_embeddings=64, num_hidden_layers=1)
    convert(folder / "dense", folder / "moe", PLAIN)
    for name in ("twin", "package"):
        (folder / name).mkdir()
    quantize_checkpoint(folder / "moe", folder / "twin", "float32", QuantizeConfig(), ignore)
    write_package(folder / "twin", folder / "package", OnnxConfig(lowering="grouped"), ignore)
    return folder / "package"


# What a user writes: optimum's class, and the pipeline that transformers had until 5.
SCRIPT = """
import json, sys
from optimum.onnxruntime import ORTModelForQuestionAnswering
from transformers import AutoTokenizer, pipeline

package, contexts, questions = sys.argv[1], *map(json.loads, sys.argv[2:])
tokenizer = AutoTokenizer.from_pretrained(package)
model = ORTModelForQuestionAnswering.from_pretrained(package)
answer = pipeline("question-answering", model=model, tokenizer=tokenizer)
found = []
for context in contexts:
    for question in questions:
        given = tokenizer(question, context, return_tensors="np")
        output = model(**given)
        said = answer(question=question, context=context, max_answer_len=30, align_to_words=False)
        found.append([output.start_logits[0].tolist(), output.end_logits[0].tolist(), said])
print(json.dumps(found, default=float))
"""


def test_the_command_answers_by_a_package_as_optimum_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Contexts are those that one window holds, as the pipeline chooses among windows by probability."""
    package = write_answering_package(tmp_path)
    contexts = [context for context in CONTEXTS if len(context) < 60]
    rows = [{"question": q, "context": c} for c in contexts for q in QUESTIONS]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = CliRunner().invoke(main, ["predict", str(package), str(table), "--json"])
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [each["input"] for each in found] == [row["question"] for row in rows]
    dense = tmp_path / "dense"  # with copies of one FFN the mixture computes what it does
    for row, each in zip(rows, found, strict=True):
        expected = answer_by_hand(dense, row["question"], row["context"], 64)
        assert (each["answer"]["start"], each["answer"]["end"]) == expected["place"]
        assert each["answer"]["score"] == pytest.approx(expected["chance"], rel=1e-4)
    context = tmp_path / "context.txt"
    context.write_text(contexts[0], encoding="utf-8")
    said = found[0]["answer"]
    for given in (["--context", contexts[0]], [str(context)]):
        shown = CliRunner().invoke(main, ["predict", str(package), "--question", QUESTIONS[0], *given])
        assert shown.exit_code == 0, shown.output
        assert f"{said['start']}-{said['end']}" in shown.stdout
    run_card(package, monkeypatch, capsys)
    theirs = ask_client(SCRIPT, package, json.dumps(contexts), json.dumps(QUESTIONS))
    for each, (_, _, told) in zip(found, theirs, strict=True):
        assert each["answer"]["text"] == told["answer"]
        assert (each["answer"]["start"], each["answer"]["end"]) == (told["start"], told["end"])


def run_card(package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The card's code for onnxruntime prints what numpy finds; what is left runs as Python."""
    text = load_template("card_answers.md.j2").render(
        variant="int8", model="fine-tuned", checkpoint="x", remote="", origin="y", source="z"
    )
    code, *others = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(package)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    said = capsys.readouterr().out.rstrip("\n")
    assert said in "Ada Lovelace lives in Rome."
    assert [bool(compile(other, "card", "exec")) for other in others] == [True, True]


@pytest.mark.usefixtures("_torch_for_onnx")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "nothing to read; give --text, or files of texts or images; or --question and --context"),
        (("--question", "who"), "lacks a context (--context, or a text file)"),
        (("--context", "the cat"), "nothing to read"),
        (("--text", "who"), "the package answers questions; give --question and --context, not --text"),
        (("--question", "who", "rows.csv"), "rows.csv:2: has no column 'question'; it has text"),
    ],
)
def test_a_command_that_lacks_a_question_or_its_context_says_so(
    given: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dense2moe.convert.cli.predictions.find_package", lambda directory, _: directory)
    (tmp_path / "rows.csv").write_text("text\na\n", encoding="utf-8")
    directory = save(tmp_path / "model", "BertForQuestionAnswering")
    result = CliRunner().invoke(main, ["predict", str(directory), *given])
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
