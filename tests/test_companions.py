"""What belongs to a model goes along by rule; what does not stays behind, here and on the hub."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from dense2moe.convert.artifact.manifest import MANIFEST_NAME
from dense2moe.convert.report.names import CARD_NAME, HTML_NAME
from dense2moe.convert.stages.upcycle import RECEIPT_NAME
from dense2moe.export.quantization.twin import SCHEME_NAME
from dense2moe.export.storage import DATA_NAME, GENAI_CONFIG_NAME, MODEL_NAME
from dense2moe.upcycle.checkpoints.companions import HUB_IGNORED, belongs, find_companions
from dense2moe.upcycle.checkpoints.reader import copy_companions
from dense2moe.upcycle.training.history import HISTORY_NAME

CARRIED = (
    "LICENSE",
    "LICENSE.txt",
    "license.md",
    "Notice",
    "NOTICE.md",
    "USE_POLICY.md",
    "USAGE_POLICY",
    "ACCEPTABLE-USE.pdf",
    "COPYING",
    "CITATION.cff",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "source.spm",
    "vocab.json",
    "vocab.txt",
    "vocab-src.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "SYSTEM_PROMPT.txt",
    "normalizer.json",
    "sentence_bert_config.json",
)
LEFT = (
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "model.gguf",
    "model.onnx",
    "model.onnx_data",
    "openvino_tokenizer.xml",
    "params.json",
    "modeling_phi3.py",
    "train.sh",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "training_args.bin",
    "trainer_state.json",
    "all_results.json",
    "events.out.tfevents.17.host",
    "training_loss.png",
    "README.md",
    "README_zh.md",
    "config.json",
    ".gitattributes",
    "quantize_config.json",
    "adapter_config.json",
    "two\nlines",
)
MODEL = ("config.json", "model.safetensors.index.json", "README.md", "adapter_config.json")


@pytest.mark.parametrize("name", CARRIED)
def test_what_belongs_to_a_model_goes_along(name: str) -> None:
    assert belongs(name)
    assert not any(fnmatchcase(name, pattern) for pattern in HUB_IGNORED), "left behind on the hub"


@pytest.mark.parametrize("name", LEFT)
def test_weights_code_states_and_what_is_written_anew_stay_behind(name: str) -> None:
    assert not belongs(name)


@pytest.mark.parametrize(
    "name",
    [
        MANIFEST_NAME,
        RECEIPT_NAME,
        HISTORY_NAME,
        SCHEME_NAME,
        CARD_NAME,
        HTML_NAME,
        GENAI_CONFIG_NAME,
        MODEL_NAME,
        DATA_NAME,
    ],
)
def test_no_name_that_a_stage_writes_goes_along(name: str) -> None:
    """Stages copy from each other's directories, and would copy each other's records."""
    assert not belongs(name)


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.safetensors",
        "original/params.json",
        "fp8/model.safetensors",
        "onnx/model.onnx",
        "model.safetensors",
    ],
)
def test_other_formats_are_never_fetched_by_the_rule(name: str) -> None:
    assert any(fnmatchcase(name, pattern) for pattern in HUB_IGNORED)


@pytest.mark.parametrize("name", MODEL)
def test_what_is_read_but_not_carried_is_fetched(name: str) -> None:
    assert not any(fnmatchcase(name, pattern) for pattern in HUB_IGNORED)


def test_files_are_copied_through_links_with_the_usual_mode(tmp_path: Path) -> None:
    """The hub's cache is made of links, and its files are private."""
    source, output, blobs = tmp_path / "source", tmp_path / "output", tmp_path / "blobs"
    for folder in (source, output, blobs):
        folder.mkdir()
    for name in ("additional_chat_templates", "original", "1_Pooling", "2_Dense"):
        (source / name).mkdir()
    (blobs / "1a2b").write_bytes(b"text\r\n\xff")
    (blobs / "1a2b").chmod(0o600)
    (source / "LICENSE").symlink_to(Path("..", "blobs", "1a2b"))
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "2_Dense" / "model.safetensors").write_bytes(b"weights behind")
    (source / "original" / "tokenizer.model").write_text("another format's")
    (source / "gone.txt").symlink_to(tmp_path / "nowhere")
    (source / "round.txt").symlink_to("round.txt")
    os.mkfifo(source / "pipe.txt")
    with (source / "huge.txt").open("wb") as file:
        file.truncate(100_000_001)
    (source / "model.safetensors").write_bytes(b"weights")
    names = (
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "LICENSE",
        "additional_chat_templates/tool_use.jinja",
    )
    assert find_companions(source) == names
    copy_companions(source, output)
    assert sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir()) == sorted(
        names
    )
    assert (output / "LICENSE").read_bytes() == b"text\r\n\xff"
    umask = os.umask(0)
    os.umask(umask)
    for name in names:
        assert not (output / name).is_symlink()
        assert (output / name).stat().st_mode & 0o777 == 0o666 & ~umask
