"""What docs/extending.md says of a change is so: its files exist, and its lowering works as it stands there."""

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dense2moe.export import lowering
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.upcycle.models.host import Host, HostStack
from dense2moe.upcycle.models.table import find_host

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def test_every_file_that_it_names_is_there():
    named = re.findall(r"`((?:upcycle|export|convert|tests|docs)/[\w/.]*)`", PAGE)
    assert len(named) > 20
    for path in named:
        assert "NAME" in path or (ROOT / path).exists(), path


def test_a_change_takes_half_a_page():
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    for section in prose.split("\n## ")[1:]:
        assert len(section.splitlines()) <= 32, section.splitlines()[0]


def test_its_host_is_that_of_the_table() -> None:
    (code,) = (block for block in BLOCKS if block.startswith("Host("))
    assert eval(code, {"Host": Host, "HostStack": HostStack}) == find_host("gpt_neox")


@pytest.mark.parametrize("variant", ["float32", "int8"])
def test_its_lowering_computes_what_torch_does(
    variant: str, mixture_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = (block for block in BLOCKS if "NAME = " in block)
    everywhere = ModuleType("everywhere")
    exec(compile(code, "docs/extending.md", "exec"), vars(everywhere))
    record = lowering.Lowering(
        everywhere.NAME, everywhere.min_onnxruntime, everywhere.refusal, everywhere.lower, everywhere.lower_chosen
    )
    monkeypatch.setattr(lowering, "GROUPED", record)
    for folder in ("twin", "package"):
        (tmp_path / folder).mkdir()
    quantize_checkpoint(mixture_checkpoint, tmp_path / "twin", variant, QuantizeConfig(method="round"), silent)
    config = OnnxConfig(lowering="grouped", activation_bits=32)
    assert write_package(tmp_path / "twin", tmp_path / "package", config, silent).lowering == "everywhere"
    ids = np.arange(2, 62).reshape(2, 30)
    decoder = Decoder(tmp_path / "package", num_threads=1)
    found = decoder.run(decoder.new_cache(2, 30), ids)["logits"]
    with torch.no_grad():
        twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)
        expected = twin(torch.from_numpy(ids)).logits.numpy()
    # sums of float32 products in another order
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
