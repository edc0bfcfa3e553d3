"""A learned prompt is what peft understands by one, and the model beside it stands still."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from dense2moe.upcycle.checkpoints.loaded import load_model
from dense2moe.upcycle.data.blocks import prepare_data, read_blocks
from dense2moe.upcycle.data.config import DataConfig, TextData
from dense2moe.upcycle.training.config import FinetuneConfig, TrainingPhase
from dense2moe.upcycle.training.evaluation import held_out_loss
from dense2moe.upcycle.training.fine_tuning import finetune
from dense2moe.upcycle.training.prompt import add_prompt, get_prompt, read_prompt, run_with_prompt, write_prompt
from tests.conftest import MakeDense

CONFIG = FinetuneConfig(
    train="prompt",
    prompt_tokens=5,
    steps=12,
    batch_size=4,
    learning_rate=0.1,
    warmup_steps=1,
    eval_steps=4,
    patience=99,
    precision="float32",
    control=True,
)


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def data(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for split, count in (("train", 60), ("validation", 20), ("test", 20)):
        (directory / f"{split}.txt").write_text(
            "\n".join(f"{split} the small cat sees {n} red trees" for n in range(count)), encoding="utf-8"
        )
    source = TextData(
        kind="text", train=("train.txt",), validation=("validation.txt",), test=("test.txt",), separator="\n"
    )
    prepare_data(dense_checkpoint, directory, DataConfig(source=source, block_size=16), directory, quiet)
    return directory


# Granite multiplies its embeddings
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GraniteForCausalLM"])
def test_peft_computes_the_same_from_what_is_written(architecture: str, make_dense: MakeDense, tmp_path: Path) -> None:
    import peft

    upcycle(make_dense(architecture=architecture), tmp_path, UpcycleConfig(num_experts=4), 0, quiet)
    model = load_model(tmp_path, torch.float32)
    prompt = add_prompt(model, 3)
    assert get_prompt(model) is prompt
    with torch.no_grad():
        prompt += 0.5
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = run_with_prompt(model, model, {"input_ids": ids}, prompt)
        assert ours.shape == (2, 9, model.config.vocab_size)
        assert float((ours - model(ids).logits).abs().max()) > 1e-2
        write_prompt(prompt, model, tmp_path / "prompt")
        assert torch.equal(read_prompt(tmp_path), prompt)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own
            theirs = peft.PeftModel.from_pretrained(load_model(tmp_path, torch.float32), str(tmp_path / "prompt"))
            torch.testing.assert_close(ours, theirs(input_ids=ids).logits[:, 3:], rtol=1e-5, atol=1e-5)


def test_without_a_prompt_nothing_stands_before_the_text(mixture_checkpoint: Path) -> None:
    model = load_model(mixture_checkpoint, torch.float32)
    ids = torch.arange(12)[None]
    assert read_prompt(mixture_checkpoint) is None
    assert get_prompt(model) is None
    assert torch.equal(run_with_prompt(model, model, {"input_ids": ids}, None), model(ids).logits)


def test_the_prompt_alone_learns_and_is_part_of_what_is_measured(
    dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    facts = finetune(dense_checkpoint, mixture_checkpoint, data, output, CONFIG, 0, quiet, tmp_path / "scratch")
    before, after = load_file(mixture_checkpoint / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    prompt, control = read_prompt(output), read_prompt(output / "control")
    assert prompt is not None
    assert prompt.shape == (5, 32)
    assert control is not None
    losses = [step.train_loss for step in facts.history if step.model == "fine-tuned" and step.train_loss is not None]
    assert losses[-1] < losses[0] - 0.1
    assert facts.evaluations["fine-tuned"].loss < facts.evaluations["upcycled"].loss - 0.1
    model, test = load_model(output, torch.float32), read_blocks(data, "test")
    assert facts.evaluations["fine-tuned"].loss == pytest.approx(held_out_loss(model, test, prompt), rel=1e-5)
    assert held_out_loss(model, test) == pytest.approx(facts.evaluations["upcycled"].loss, rel=1e-5)


class _Killed(BaseException):
    pass


def test_a_killed_run_learns_the_same_prompt(
    dense_checkpoint: Path, mixture_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(
        update={"control": False, "stages": (TrainingPhase(train="router", steps=4), TrainingPhase())}
    )

    def run(name: str, scratch: str, stop: int | None) -> torch.Tensor | None:
        def progress(what: str, done: int, total: int) -> None:
            if what.startswith("training fine-tuned") and done == stop:
                raise _Killed

        output = tmp_path / name
        output.mkdir()
        with torch.random.fork_rng(devices=[]):
            finetune(dense_checkpoint, mixture_checkpoint, data, output, config, 0, progress, tmp_path / scratch)
        return read_prompt(output)

    whole = run("whole", "one", None)
    with pytest.raises(_Killed):
        run("killed", "two", 10)
    again = run("again", "two", None)
    assert whole is not None
    assert again is not None
    assert torch.equal(whole, again)
