"""Fixtures for every package: tiny checkpoints, made here by transformers."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from shapes import drop_other_families

if TYPE_CHECKING:  # what distributes tests runs none, and needs none of what takes seconds to import
    import torch
    from transformers import PreTrainedTokenizerFast

MakeDense = Callable[..., Path]

# models of the tests are tiny: a second thread makes them no faster, and on a busy machine ten times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for this process, and for the commands that tests run
MANY_OBJECTS = 50_000
_looked = [0.0]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Where tests run, imports are garbage for no collection, and no file waits for the disk.

    Only where the power fails is it asked what the disk has.
    """
    if session.config.getoption("dist", "no") != "no":  # tests run in other processes
        return
    gc.disable()
    os.fsync = lambda _: None  # type: ignore[assignment]
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests of many families, one of each shape runs unless all are asked for."""
    drop_other_families(config, items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays, and whatever is forked for a test has it."""
    if session.items and not gc.isenabled():
        from programs import serve_from_here

        _keep_what_is()
        serve_from_here()
        gc.set_threshold(20_000, 10, 10)  # by default it would look through the newest 700 objects again and again
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """What a file's tests leave (models of transformers imported on the way) stays, and much that one test leaves.

    A single traced graph may leave a hundred thousand objects in torch's caches.
    """
    yield
    if nextitem is None:
        return
    if nextitem.path != item.path:
        _keep_what_is()
    elif time.process_time() > _looked[0] + 1.0:  # seconds; counting takes a millisecond, as most tests do
        _looked[0] = time.process_time()
        if len(gc.get_objects()) > MANY_OBJECTS:
            _keep_what_is()


def _keep_what_is() -> None:
    """Garbage collections that tests ask for, by loading models, need not look through all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Digests of sources that tests read are kept among the tests' own files."""
    os.environ["DENSE2MOE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def receipts_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receipts compare in one dtype, for tests that ask other things of the mixtures that they make."""
    import torch

    monkeypatch.setattr("dense2moe.upcycle.building.receipt.DTYPES", {"float32": torch.float32})


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens that starts every text with `<s>`, as Llama's does; `</s>` is its end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # a text that stays as it is
    tokenizer.train_from_iterator([(Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer.get_vocab_size() == 300
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TINY_DECODER = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # at .02 and two layers, attention and FFN would hardly show in the logits
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
TINY_T5 = {
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_heads": 4,
}


@pytest.fixture(scope="session")
def make_dense(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> MakeDense:
    """Make a tiny checkpoint with a tokenizer, a Llama unless `architecture` names another class of transformers.

    Keywords override its config, `dtype` and `max_shard_size` its file.
    """
    import torch
    import transformers

    def make(
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        architecture: str = "LlamaForCausalLM",
        **overrides: Any,
    ) -> Path:
        model_class = getattr(transformers, architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(
                model_class.config_class(**(TINY_T5 if architecture.startswith("T5") else TINY_DECODER) | overrides)
            )
            for name, parameter in model.named_parameters():
                # a norm of ones would hide a norm that is lost or swapped; Gemma adds the one itself
                if "norm" in name:
                    torch.nn.init.uniform_(
                        parameter, *((-0.5, 0.5) if architecture.startswith("Gemma") else (0.5, 1.5))
                    )
                elif name.endswith((".bias", ".sinks")):  # and these start at zero
                    torch.nn.init.normal_(parameter, std=0.5)
        directory = tmp_path_factory.mktemp("dense")
        model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
        tiny_tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def dense_checkpoint(make_dense: MakeDense) -> Path:
    """A tiny Llama with tied embeddings in float32. Shared: read only."""
    return make_dense()


@pytest.fixture(scope="session")
def mixture_checkpoint(dense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture made from `dense_checkpoint`: 4 experts that differ, top-2. Shared: read only."""
    from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
    from dense2moe.upcycle.building.surgery import upcycle

    output = tmp_path_factory.mktemp("mixture")
    config = UpcycleConfig(
        num_experts=4, num_experts_per_tok=2, experts=ExpertsConfig(noise=0.5), router=RouterConfig(logit_std=1.0)
    )
    upcycle(dense_checkpoint, output, config, 0, lambda what, done, total: None)
    return output


@pytest.fixture(scope="session")
def package(mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 package of `mixture_checkpoint`, grouped. Shared: read only."""
    from dense2moe.export.graph.config import OnnxConfig
    from dense2moe.export.package import write_package
    from dense2moe.export.quantization.config import QuantizeConfig
    from dense2moe.export.quantization.quantizer import quantize_checkpoint

    twin, output = tmp_path_factory.mktemp("twin"), tmp_path_factory.mktemp("package")
    quantize_checkpoint(mixture_checkpoint, twin, "float32", QuantizeConfig(method="round"), lambda *_: None)
    write_package(twin, output, OnnxConfig(lowering="grouped"), lambda *_: None)
    return output
