"""The code in a model card runs as it stands, and every piece of it writes the same text."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import dense2moe
from report_facts import make_facts, records
from tokenizers import AddedToken
from transformers import AutoTokenizer

from dense2moe.convert.report.card import escape, write_card
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.variant import Variant
from dense2moe.upcycle.checkpoints.config_files import complete_tokenizer
from dense2moe.upcycle.checkpoints.loaded import load_model

TRANSFORMERS_4, OPTIMUM = "DENSE2MOE_TRANSFORMERS_4_PYTHON", "DENSE2MOE_OPTIMUM_PYTHON"
CHAT = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt "
    "%}model:{% endif %}"
)
DRAWS = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3, "bos_token_id": 0}


def silent(*_: Any) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Release:
    """A written card, beside its package and the directory of a run that holds the checkpoint."""

    card: str
    package: Path
    run: Path
    end: int
    text: str

    def code(self, library: str) -> str:
        """The one piece of Python in the card that imports a model from a library."""
        pieces = re.findall(r"```python\n(.*?)```", self.card, re.DOTALL)
        (found,) = (
            code
            for code in pieces
            if re.search(rf"^(from {library}.* import \w+Model|import {library})", code, re.MULTILINE)
        )
        return found

    def execute(self, library: str, monkeypatch: pytest.MonkeyPatch, python: str | None = None) -> str:
        """What that code prints, run as it stands where the card says: by another python, or here."""
        monkeypatch.chdir(self.run if library == "transformers" else self.package)
        if python is None:
            with redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(self.code(library), "card", "exec"), {})
            return printed.getvalue()
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ORT_DISABLE_TELEMETRY")
        }
        finished = subprocess.run(
            [python, "-c", self.code(library)],
            capture_output=True,
            check=False,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )
        assert finished.returncode == 0, finished.stderr.decode()[-2000:]
        return finished.stdout.decode()

    def generate(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """What the card's command prints."""
        (line,) = re.findall(r"```sh\n(dense2moe .*)\n```", self.card)
        monkeypatch.chdir(self.package)
        finished = dense2moe(*shlex.split(line)[1:])
        assert (finished.exit_code, finished.stderr) == (0, "")
        return finished.stdout


def write_greedily(checkpoint: Path, ids: list[int], penalty: float) -> list[int]:
    """Tokens that the checkpoint writes after a prompt, from its logits alone."""
    model = load_model(checkpoint, torch.float32)
    text = list(ids)
    for _ in range(40):
        logits = model(torch.tensor([text])).logits[0, -1]
        seen = torch.tensor(sorted(set(text)))
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        text.append(int(logits.argmax()))
    return text[len(ids) :]


@torch.no_grad()
def make_release(
    source: Path, folder: Path, variant: Variant, settings: dict[str, Any], chat: bool, puts_start: bool
) -> Release:
    facts = make_facts()
    run, package = folder / "run", folder / "package"
    checkpoint = run / f"finetune-{facts['keys']['finetune'][:12]}"
    shutil.copytree(source, checkpoint)
    if not puts_start:
        path = checkpoint / "tokenizer.json"
        path.write_text(
            json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"post_processor": None}), encoding="utf-8"
        )
    if chat:
        (checkpoint / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": "Tell me a story."}]
    ids = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        if chat
        else tokenizer("Once")["input_ids"]
    )
    written = write_greedily(checkpoint, ids, settings.get("repetition_penalty", 1.0))
    place = next(n for n, token in enumerate(written) if n >= 12 and token not in written[:n])
    end = written[place]
    tokenizer.backend_tokenizer.add_special_tokens(
        [AddedToken(tokenizer.convert_ids_to_tokens(end), special=True, normalized=False)]
    )
    tokenizer.save_pretrained(checkpoint)
    complete_tokenizer(checkpoint)
    text = tokenizer.decode(written[:place] if chat else ids + written[:place], skip_special_tokens=True)
    (checkpoint / "generation_config.json").write_text(
        json.dumps({**settings, "eos_token_id": [1, end]}), encoding="utf-8"
    )
    (folder / "twin").mkdir()
    package.mkdir()
    quantize_checkpoint(checkpoint, folder / "twin", variant, QuantizeConfig(method="search", block_size=16), silent)
    write_package(folder / "twin", package, OnnxConfig(lowering="grouped"), silent)
    write_card(records(facts), variant, package, folder / "card")
    return Release((folder / "card" / "README.md").read_text(encoding="utf-8"), package, run, end, text + "\n")


CASES: dict[str, dict[str, Any]] = {
    "a start that the tokenizer puts": {"settings": {}, "chat": False, "puts_start": True},
    "a start that it only knows": {"settings": {"bos_token_id": 0}, "chat": False, "puts_start": False},
    "a chat that is drawn": {"settings": DRAWS, "chat": True, "puts_start": False},
}


@pytest.fixture(scope="module", params=CASES)
def release(
    request: pytest.FixtureRequest, mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Release:
    return make_release(mixture_checkpoint, tmp_path_factory.mktemp("release"), "float32", **CASES[request.param])


def environment(variable: str, recipe: str) -> str:
    python = os.environ.get(variable)
    if python is None:
        pytest.skip(f"{variable} is not set; make an environment by `{recipe}` and set it to that one's python")
    return python


def test_genai_transformers_and_dense2moe_write_one_text(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the checkpoint's logits say.

    And ends at the second of two end tokens, before its 40 tokens are written.
    """
    pytest.importorskip("onnxruntime_genai")
    assert release.text.startswith("Once") or "--chat" in release.card
    assert release.generate(monkeypatch) == release.text
    assert release.execute("onnxruntime_genai", monkeypatch) == release.text
    assert release.execute("transformers", monkeypatch) == release.text


@pytest.mark.optimum
def test_optimum_writes_that_text(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    python = environment(
        OPTIMUM, "python3.11 -m venv optimum && optimum/bin/pip install optimum-onnx==0.1.0 onnxruntime torch==2.13.0"
    )
    assert release.execute("optimum", monkeypatch, python) == release.text


@pytest.mark.transformers4
def test_transformers_4_writes_that_text(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    python = environment(
        TRANSFORMERS_4,
        "python3.11 -m venv transformers4 && transformers4/bin/pip install transformers==4.57.6 torch==2.13.0",
    )
    assert release.execute("transformers", monkeypatch, python) == release.text


@pytest.fixture(scope="module")
def rounded(mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(
        mixture_checkpoint, tmp_path_factory.mktemp("rounded"), "int8", **CASES["a start that the tokenizer puts"]
    )


def test_the_code_of_a_rounded_package_runs_in_genai(rounded: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime_genai")
    assert rounded.execute("onnxruntime_genai", monkeypatch).startswith("Once")
    assert rounded.generate(monkeypatch).startswith("Once")
    assert "rounded to int8, so its text may differ from the checkpoint's" in rounded.card


@pytest.mark.optimum
def test_the_code_of_a_rounded_package_runs_in_optimum(rounded: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    python = environment(
        OPTIMUM, "python3.11 -m venv optimum && optimum/bin/pip install optimum-onnx==0.1.0 onnxruntime torch==2.13.0"
    )
    assert rounded.execute("optimum", monkeypatch, python).startswith("Once")


def test_the_card_says_how_text_is_chosen_and_where_it_ends(release: Release) -> None:
    draws = "--temperature 0\n" in release.card
    assert draws == ("says to draw (temperature 0.7, top-k 50, top-p 0.9, a repetition penalty of 1.3)" in release.card)
    assert draws == (release.card.count("do_sample=False)") == 3)
    tokenizer = AutoTokenizer.from_pretrained(release.package)
    assert (
        f"A text ends at {escape('</s>')} (1) or {escape(tokenizer.convert_ids_to_tokens(release.end))} "
        f"({release.end})." in release.card
    )
    assert "once: 256 unless told otherwise, 256 at most." in release.card
    assert release.card.count('os.environ["ORT_DISABLE_TELEMETRY"] = "1"') == 2


def test_settings_that_some_runtimes_lack_are_told(release: Release, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(release.package, package)
    settings = {"do_sample": True, "min_p": 0.1, "num_beams": 3, "no_repeat_ngram_size": 2}
    (package / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    write_card(records(make_facts()), "float32", package, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "says to draw (temperature 1, top-k 50, top-p 1, min-p 0.1)" in text
    assert "onnxruntime-genai has no min-p." in text
    assert "only optimum and transformers follow num_beams 3, no_repeat_ngram_size 2." in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a plain name-1.0, 0.9 < 0.97 & more", "a plain name-1.0, 0.9 < 0.97 & more"),
        ("<script>alert(1)</script>", r"\<script>alert(1)\</script>"),
        ("a\n# b `c` *d* _e_", r"a # b \`c\` \*d\* \_e\_"),
        ("![x](y) | &lt; ~~z~~", r"!\[x\](y) \| \&lt; \~\~z\~\~"),
        ("# x", r"\# x"),
        ("- x", r"\- x"),
        ("\\<b>", r"\\\<b>"),
    ],
)
def test_a_text_of_others_is_no_markdown(text: str, expected: str) -> None:
    assert escape(text) == expected


def test_names_in_the_card_are_escaped(release: Release, tmp_path: Path) -> None:
    facts = make_facts()
    facts["name"] = "x <img src=y>\n# injected [a](b)"
    facts["base_model"], facts["source"]["origin"] = None, "models/<b>*bold*"
    write_card(records(facts), "float32", release.package, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "\n# x \\<img src=y> # injected \\[a\\](b), float32\n" in text
    assert "from \\<b>\\*bold\\*, LlamaForCausalLM" in text
