"""Models as they are released, every field of their files kept, with tiny weights: right inputs go through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from programs import dense2moe, stages_here
from released import CHAT, RELEASES
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer

from dense2moe.upcycle.checkpoints.loaded import load_model

NAMES = list(RELEASES)
TEXT = "".join(
    f"In year {n} the {who} of house {n % 7} had {3 * n} doors and a garden.\n%%\n"
    for n in range(300)
    for who in ("owner", "keeper")
)


def make_tokenizer(config: dict[str, Any]) -> Tokenizer:
    """A tokenizer of fewer than 300 tokens.

    In the manner of sentencepiece or of bytes as the release's class wants it.
    """
    special = ["<s>", "</s>", "<unk>"]
    if config["tokenizer_class"] in ("LlamaTokenizer", "GemmaTokenizer"):
        letters = ["▁", *map(chr, range(33, 127)), "\n"]
        names = special + [f"<0x{byte:02X}>" for byte in range(256)][: 300 - len(special) - len(letters)] + letters
        tokenizer = Tokenizer(
            models.BPE(
                {name: n for n, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=False, fuse_unk=True
            )
        )
        # Gemma's class has none
        prepended = [normalizers.Prepend("▁")] if config["tokenizer_class"] == "LlamaTokenizer" else []
        tokenizer.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    if config.get("add_bos_token") or config["tokenizer_class"] == "PreTrainedTokenizerFast":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def make_release(name: str, directory: Path) -> Path:
    """The files of a release, with weights drawn as transformers draws them, in bfloat16."""
    config, tokenizer_config, generation = RELEASES[name]
    directory.mkdir(parents=True)
    tokenizer = make_tokenizer(tokenizer_config)
    tokenizer.save(str(directory / "tokenizer.json"))
    added = {
        str(number): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    files = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer_config.json": {"added_tokens_decoder": added, "chat_template": CHAT, **tokenizer_config},
        "special_tokens_map.json": {
            key: tokenizer_config[key] for key in ("bos_token", "eos_token", "unk_token") if tokenizer_config.get(key)
        },
    }
    for file, values in files.items():
        (directory / file).write_text(json.dumps(values, indent=2), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loaded = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model = getattr(transformers, config["architectures"][0])(loaded).to(torch.bfloat16)
    state = {
        key: tensor.clone() for key, tensor in model.state_dict().items() if key not in model.all_tied_weights_keys
    }
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_recipe(source: Path, folder: Path, **upcycle: Any) -> Path:
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    recipe = {
        "source": str(source),
        "upcycle": {"num_experts": 4, "num_experts_per_tok": 2, **upcycle},
        "data": {
            "source": {"kind": "text", "train": [str(folder / "text.txt")], "separator": "%%"},
            "block_size": 64,
            "max_train_tokens": 2048,
            "max_validation_tokens": 640,
            "max_test_tokens": 640,
        },
        "finetune": {"steps": 2, "batch_size": 2, "eval_steps": 2, "warmup_steps": 1, "precision": "float32"},
        "variants": ["float32"],
        "parity": {"num_blocks": 2, "decode_steps": 8},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def run(recipe: Path, until: str) -> Path:
    """The work directory of a run that must end well."""
    with stages_here():
        finished = dense2moe("run", recipe, "--workdir", recipe.parent / "run", "--until", until)
    assert finished.exit_code == 0, finished.output[-1000:]
    return recipe.parent / "run"


def find(run_directory: Path, stage: str) -> Path:
    (found,) = run_directory.glob(f"{stage}-*")
    return found


@torch.no_grad()
@pytest.mark.usefixtures("receipts_in_float32")
@pytest.mark.parametrize("name", NAMES)
def test_a_release_is_upcycled_with_every_field_of_its_files(name: str, tmp_path: Path) -> None:
    source = make_release(name, tmp_path / "release")
    mixture = find(run(write_recipe(source, tmp_path), "upcycle"), "upcycle")
    dense, tokenizer = load_model(source, torch.float32), AutoTokenizer.from_pretrained(source)
    ids = torch.tensor([tokenizer(TEXT[:200])["input_ids"]])
    assert AutoTokenizer.from_pretrained(mixture)(TEXT[:200])["input_ids"] == ids[0].tolist()
    expected = dense(ids).logits
    assert float((load_model(mixture, torch.float32)(ids).logits - expected).abs().max() / expected.abs().max()) < 1e-5
    for file in ("generation_config.json", "tokenizer.json"):
        assert (mixture / file).read_bytes() == (source / file).read_bytes()
    written = json.loads((mixture / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in written
    assert written["rope_theta"] == RELEASES[name][0]["rope_theta"]
    assert written["eos_token_id"] == RELEASES[name][0]["eos_token_id"]


def test_a_tokenizer_that_is_read_otherwise_beside_the_mixture_is_told(tmp_path: Path) -> None:
    """Gemma's class has rules of its own, whatever tokenizer.json says; beside a Mixtral, tokenizer.json rules."""
    source = make_release("gemma-2b-it", tmp_path / "release")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.save(str(source / "tokenizer.json"))
    mixture = find(run(write_recipe(source, tmp_path), "upcycle"), "upcycle")
    notes = json.loads((mixture / "receipt.json").read_text(encoding="utf-8"))["notes"]
    assert any(
        "tokenizes text differently beside the mixture and beside the dense model: by TokenizersBackend and by "
        "GemmaTokenizer" in n
        for n in notes
    )


def test_a_release_with_code_that_transformers_has_itself_goes_the_whole_road(tmp_path: Path) -> None:
    source = make_release("Phi-3-mini-128k-instruct", tmp_path / "release")
    for file in ("configuration_phi3.py", "modeling_phi3.py"):
        (source / file).write_text("raise SystemExit('the code of a checkpoint was run')\n", encoding="utf-8")
    done = run(write_recipe(source, tmp_path), "report")
    report = json.loads((find(done, "report") / "report.json").read_text(encoding="utf-8"))
    assert report["variants"]["float32"]["parity"]["passed"] is True
    control = json.loads((find(done, "finetune") / "control" / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in control  # whose files are not carried


@pytest.mark.usefixtures("receipts_in_float32")
@pytest.mark.parametrize("name", ["Llama-3.2-1B-Instruct", "Qwen2-0.5B-Instruct", "gemma-2b-it"])
def test_a_tied_matrix_that_is_stored_under_the_heads_name_is_the_embedding(name: str, tmp_path: Path) -> None:
    """As some trainers save it; transformers loads it."""
    source = make_release(name, tmp_path / "release")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    for mode in ("whole", "layers"):
        folder = tmp_path / mode
        folder.mkdir()
        mixture = find(run(write_recipe(source, folder, receipt=mode), "upcycle"), "upcycle")
        written = load_file(mixture / "model.safetensors")["model.embed_tokens.weight"].float()
        stored = state["lm_head.weight"].float()
        assert torch.equal(written, stored * 32**0.5 if "gemma" in name else stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["Phi3SmallForCausalLM"]},
            "'auto_map' asks for code from the checkpoint, which is never run",
        ),
        ({"model_type": "phi3small"}, "'auto_map' asks for code from the checkpoint, which is never run"),
        ({"architectures": None}, "'auto_map' asks for code from the checkpoint, which is never run"),
        (
            {"rope_scaling": {"type": "su", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}},
            "the first name of 'longrope'; write that",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized (gptq)"),
        ({"resid_pdrop": 0.1}, "resid_pdrop is 0.1; MixtralForCausalLM needs 0.0"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75; it must be 1"),
    ],
)
def test_what_matters_is_still_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = make_release("Phi-3-mini-4k-instruct", tmp_path / "release")
    (source / "config.json").write_text(json.dumps(RELEASES["Phi-3-mini-4k-instruct"][0] | changes), encoding="utf-8")
    finished = dense2moe("check", write_recipe(source, tmp_path))
    assert finished.exit_code == 1
    assert message in " ".join(finished.output.split())
