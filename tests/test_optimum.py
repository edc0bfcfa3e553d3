"""A package runs in optimum's `ORTModelForCausalLM`.

Which needs an older transformers and so an environment of its own.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import run_client
from transformers import AutoModelForCausalLM

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.variant import Variant
from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle

PROMPTS = [[0, 34], list(range(40, 60)), [0, 299, 298, 2, 2, 150]]
NUM_TOKENS = 48

# What a user writes; two lines of it are for optimum-onnx 0.1.0, whose table of grouped-query architectures lacks
# Mixtral, and whose table of those with a size of their own for heads has Gemma and few others.
SCRIPT = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
package, wishes = sys.argv[1], json.loads(sys.argv[2])
model = ORTModelForCausalLM.from_pretrained(package, use_io_binding=wishes["use_io_binding"])
if wishes["tell_heads"]:
    model.num_key_value_heads = model.config.num_key_value_heads
if wishes["tell_head_size"]:
    model.embed_size_per_head = model.config.head_dim
width = max(map(len, wishes["prompts"]))
ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in wishes["prompts"]])
mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in wishes["prompts"]])
options = dict(max_new_tokens=wishes["num_tokens"], do_sample=False, pad_token_id=1, eos_token_id=None)
print(json.dumps(model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()))
"""

pytestmark = pytest.mark.optimum


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def run_optimum(package: Path, prompts: list[list[int]], **wishes: Any) -> subprocess.CompletedProcess[str]:
    arguments = json.dumps(
        {
            "prompts": prompts,
            "num_tokens": NUM_TOKENS,
            "use_io_binding": True,
            "tell_heads": True,
            "tell_head_size": False,
        }
        | wishes
    )
    return run_client(SCRIPT, package, arguments)


def generate_in_optimum(package: Path, prompts: list[list[int]], **wishes: Any) -> list[list[int]]:
    finished = run_optimum(package, prompts, **wishes)
    assert finished.returncode == 0, finished.stderr[-2000:]
    tokens: list[list[int]] = json.loads(finished.stdout)
    return tokens


def generate_in_torch(twin: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32, experts_implementation="eager").eval()
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def export(source: Path, folder: Path, variant: Variant) -> tuple[Path, Path]:
    twin, package = folder / "twin", folder / "package"
    for path in (twin, package):
        path.mkdir()
    quantize_checkpoint(source, twin, variant, QuantizeConfig(method="search", block_size=16), silent)
    write_package(twin, package, OnnxConfig(activation_bits=32, lowering="grouped"), silent)
    return twin, package


@pytest.mark.parametrize("use_io_binding", [True, False])
@pytest.mark.parametrize("variant", ["float32", "int4"])
def test_optimum_generates_the_tokens_of_transformers(
    mixture_checkpoint: Path, tmp_path: Path, variant: Variant, use_io_binding: bool
) -> None:
    """Each prompt alone, and all of them as one batch padded at the left."""
    twin, package = export(mixture_checkpoint, tmp_path, variant)
    expected = [generate_in_torch(twin, prompt) for prompt in PROMPTS]
    assert generate_in_optimum(package, PROMPTS[1:2], use_io_binding=use_io_binding) == expected[1:2]
    assert generate_in_optimum(package, PROMPTS, use_io_binding=use_io_binding) == expected


@pytest.mark.parametrize("head_dim", [16, 20])
def test_optimum_runs_an_architecture_that_it_knows_without_being_told_its_heads(
    make_dense: Any, tmp_path: Path, head_dim: int
) -> None:
    """But of heads that are no equal shares of the hidden size their size, here padded to 24."""
    mixture = tmp_path / "mixture"
    mixture.mkdir()
    config = UpcycleConfig(
        num_experts=4, num_experts_per_tok=2, experts=ExpertsConfig(noise=0.5), router=RouterConfig(logit_std=1.0)
    )
    upcycle(
        make_dense(architecture="Qwen3ForCausalLM", head_dim=head_dim, num_attention_heads=2, num_key_value_heads=1),
        mixture,
        config,
        0,
        silent,
    )
    twin, package = export(mixture, tmp_path, "float32")
    assert json.loads((package / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen3_moe"
    assert generate_in_optimum(package, PROMPTS, tell_heads=False, tell_head_size=head_dim != 16) == [
        generate_in_torch(twin, prompt) for prompt in PROMPTS
    ]


def test_optimum_takes_the_heads_of_a_mixtral_for_its_query_heads(mixture_checkpoint: Path, tmp_path: Path) -> None:
    """Why the script has to tell: should a newer optimum know, the line in README may go."""
    _, package = export(mixture_checkpoint, tmp_path, "float32")
    finished = run_optimum(package, PROMPTS, tell_heads=False, use_io_binding=False)
    assert finished.returncode == 1
    assert "index: 1 Got: 4 Expected: 2" in finished.stderr
