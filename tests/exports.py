"""Tiny decoders exported: the twin in torch beside the package in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from packaging.version import Version
from transformers import MixtralConfig, MixtralForCausalLM

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.storage import MODEL_NAME
from dense2moe.export.variant import Variant

VOCABULARY = 96
PREFILL, STEPS = 20, 24
EXACT_PRODUCTS = {"activation_bits": 32, "lowering": "grouped"}  # 8 bits round; what that costs is measured apart
# those need text
VARIANTS: tuple[Variant, ...] = tuple(variant for variant in get_args(Variant) if variant not in ("int8-qdq", "mixed"))
LAYER_PARTS = (
    "attention norm",
    "query, key and value",
    "cache",
    "attention",
    "attention output",
    "FFN norm",
    "router",
    "experts",
    "residual stream",
)
"""Parts of a layer that a package shows inside."""
Padding = Literal["left", "right", "none"]


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class Export:
    """A tiny mixture exported: its twin in torch, and its package in onnxruntime."""

    def __init__(
        self, source: Path, directory: Path, variant: Variant, quantize: QuantizeConfig, config: OnnxConfig
    ) -> None:
        self.twin, self.package = directory / "twin", directory / "package"
        for path in (self.twin, self.package):
            path.mkdir()
        quantize_checkpoint(source, self.twin, variant, quantize, silent, QuantizeInputs(device=config.device))
        self.facts = write_package(self.twin, self.package, config, silent)
        if Version(ort.__version__) < Version(self.facts.min_onnxruntime):
            # in .ci/runtimes
            pytest.skip(f"the package needs onnxruntime {self.facts.min_onnxruntime}, this is {ort.__version__}")

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.package, inspection=Inspection(streams=True), num_threads=1)

    @cached_property
    def torch(self) -> MixtralForCausalLM:
        return MixtralForCausalLM.from_pretrained(self.twin, dtype=torch.float32, experts_implementation="eager").eval()

    @property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.package / MODEL_NAME)

    def expect(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits of one forward over all tokens, without a cache."""
        mask_BT = torch.from_numpy(mask)
        positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            return self.torch(
                torch.from_numpy(ids), attention_mask=mask_BT, position_ids=positions, use_cache=False
            ).logits.numpy()

    def run(self, ids: np.ndarray, mask: np.ndarray, pieces: list[int]) -> np.ndarray:
        """Logits of the package, fed in pieces of so many tokens."""
        cache = self.decoder.new_cache(*ids.shape)
        ends = np.cumsum(pieces)
        assert ends[-1] == ids.shape[1]
        parts = [
            self.decoder.run(cache, ids[:, end - n : end], mask[:, end - n : end])["logits"]
            for n, end in zip(pieces, ends, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    def error(self, ids: np.ndarray, mask: np.ndarray, pieces: list[int]) -> float:
        """Largest difference at real tokens, relative to the largest logit."""
        found, expected = self.run(ids, mask, pieces), self.expect(ids, mask)
        real = mask.astype(bool)
        return float(np.abs(found - expected)[real].max() / np.abs(expected[real]).max())


Make = Callable[..., Export]


def make_exports(tmp_path: Path) -> Make:
    """Make a tiny mixture of the given config, quantize it and export it."""

    def build(
        variant: Variant = "float32",
        quantize: dict[str, Any] | None = None,
        onnx_config: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Export:
        source = tmp_path / "source"
        make_mixture(source, **fields)
        return Export(
            source,
            tmp_path,
            variant,
            QuantizeConfig(**{"method": "search"} | (quantize or {})),
            OnnxConfig(**EXACT_PRODUCTS | (onnx_config or {})),
        )

    return build


def make_mixture(directory: Path, **fields: Any) -> None:
    """A random Mixtral whose attention, experts and norms all show in the logits."""
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**small | fields))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)


def draw_ids(batch: int, length: int = PREFILL + STEPS) -> np.ndarray:
    return np.random.default_rng(0).integers(2, VOCABULARY, (batch, length))


def pad(batch: int, padding: Padding) -> np.ndarray:
    """A mask over a padded prompt and the tokens after it; the first row of three lacks 12 tokens, the second 6."""
    mask = np.ones((batch, PREFILL + STEPS), np.int64)
    for row in range(batch):
        if padding == "left":
            mask[row, : 6 * (batch - 1 - row)] = 0
        if padding == "right":
            mask[row, PREFILL - 6 * (batch - 1 - row) : PREFILL] = 0
    return mask


# Float32 sums in another order, through two layers: 3e-6 measured over all tests of this file.
EXACT = 5e-6
# In float16 each product rounds what it reads and writes by 2^-11 of itself, and so do attention and its cache: 6e-3
# measured over all tests.
FLOAT16 = 1e-2


def assert_same_logits(export: Export, limit: float = EXACT) -> None:
    """Prefill and chained decode steps, one row and three, padded on either side."""
    for batch, padding in ((1, "none"), (3, "left"), (3, "right")):
        ids, mask = draw_ids(batch), pad(batch, padding)
        assert export.error(ids[:, :PREFILL], mask[:, :PREFILL], [PREFILL]) < limit, (batch, padding, "prefill")
        assert export.error(ids, mask, [PREFILL] + [1] * STEPS) < limit, (batch, padding, "decode")
