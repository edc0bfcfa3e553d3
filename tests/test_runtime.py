"""Packages run with one shared cache, and tokens are chosen as asked."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import MixtralForCausalLM

from export.config import OnnxConfig, QuantizeConfig
from export.errors import ExportError
from export.package import write_package
from export.runtime import CUDA, HIDDEN, ROUTER_LOGITS, Decoder, Sampling, choose_token
from export.storage import MIN_ONNXRUNTIME_KEY, MODEL_NAME
from export.twin import quantize_checkpoint

GREEDY = Sampling()
PROMPTS = [[0, 34], [7], list(range(40, 80)), [0, 299, 298, 2, 2, 2, 150, 33, 8, 90, 61, 270]]


@pytest.fixture(scope="module")
def package(mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 package of the mixture."""
    twin, output = tmp_path_factory.mktemp("twin"), tmp_path_factory.mktemp("package")
    quantize_checkpoint(mixture_checkpoint, twin, "float32", QuantizeConfig(), lambda what, done, total: None)
    write_package(twin, output, OnnxConfig(lowering="grouped"), lambda what, done, total: None)
    return output


@pytest.fixture(scope="module")
def decoder(package: Path) -> Decoder:
    return Decoder(package, num_threads=1)


def generate(decoder: Decoder, prompt: list[int], count: int, sampling: Sampling = GREEDY, stop: list[int] | None = None) -> list[int]:
    return list(decoder.generate(prompt, count, sampling, stop or []))


def test_positions_are_given_to_a_graph_that_asks_for_them(tmp_path: Path) -> None:
    """A graph whose logits [B, S, 1] are its positions, and whose past grows by one zero for each token."""
    helper, ints, floats = onnx.helper, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    names = ("input_ids", "attention_mask", "position_ids")
    past = helper.make_tensor_value_info("past_key_values.0.key", floats, ["B", 1, "P", 1])
    inputs = [*(helper.make_tensor_value_info(name, ints, ["B", f"{name}_length"]) for name in names), past]
    outputs = [helper.make_tensor_value_info(name, floats, None) for name in ("logits", "present.0.key")]
    nodes = [
        helper.make_node("Cast", ["position_ids"], ["positions"], to=floats),
        helper.make_node("Unsqueeze", ["positions", "last"], ["logits"]),
        helper.make_node("Unsqueeze", ["logits", "one"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
    ]
    axes = [helper.make_tensor(name, ints, [1], [axis]) for name, axis in (("last", -1), ("one", 1))]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, axes), ir_version=10), tmp_path / MODEL_NAME)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8}', encoding="utf-8")
    decoder = Decoder(tmp_path)
    assert (decoder.takes_positions, decoder.shares_buffer) == (True, False)
    cache = decoder.new_cache(2, 5)
    first = decoder.run(cache, np.full((2, 3), 9), np.array([[1, 1, 1], [0, 0, 1]]))["logits"]
    assert first[..., 0].tolist() == [[0, 1, 2], [0, 0, 0]]
    for step in (1, 2):
        assert decoder.run(cache, np.full((2, 1), 9))["logits"][..., 0].tolist() == [[2 + step], [step]]
    assert cache.buffers["past_key_values.0.key"].numpy()[..., 0].tolist() == [[[0, 1, 2, 3, 4]], [[0, 0, 0, 1, 2]]]
    with pytest.raises(ExportError, match=r"^6 tokens in a cache of 5; ask for a larger one$"):
        decoder.run(cache, np.full((2, 1), 9))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_is_written_in_place_and_never_grows(decoder: Decoder, batch: int) -> None:
    cache = decoder.new_cache(batch, 20)
    assert sorted(cache.buffers) == [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    buffers, addresses = dict(cache.buffers), {name: buffer.data_ptr() for name, buffer in cache.buffers.items()}
    earlier: dict[str, np.ndarray] = {}
    filled = 0
    for length in (5, 1, 1, 1):
        decoder.run(cache, np.full((batch, length), 9))
        filled += length
        for name, buffer in cache.buffers.items():
            assert buffer is buffers[name]
            assert buffer.data_ptr() == addresses[name]
            values = buffer.numpy()
            assert values.shape == (batch, 2, 20, 8)  # kv heads, capacity, head size
            assert (values[:, :, :filled] != 0).any(axis=-1).all()
            assert (values[:, :, filled:] == 0).all()
            if name in earlier:
                np.testing.assert_array_equal(values[:, :, : filled - length], earlier[name])
            earlier[name] = values[:, :, :filled].copy()
    assert cache.mask.shape == (batch, 8)


def test_two_caches_do_not_mix(decoder: Decoder) -> None:
    alone = generate(decoder, [0, 34], 12)
    one, other = decoder.generate([0, 34], 12, GREEDY), decoder.generate([5, 6, 7], 12, GREEDY)
    assert [pair[0] for pair in zip(one, other, strict=True)] == alone


def test_what_a_larger_cache_adds_is_nothing(decoder: Decoder) -> None:
    ids = np.arange(2, 32)[None]
    small, large = (decoder.run(decoder.new_cache(1, capacity), ids)["logits"] for capacity in (30, 256))
    np.testing.assert_array_equal(small, large)


def test_taps_change_no_bit_of_the_logits(package: Path, decoder: Decoder) -> None:
    tapped = Decoder(package, taps=True, num_threads=1)
    assert tapped.taps == [f"{HIDDEN}0", f"{HIDDEN}1", f"{ROUTER_LOGITS}0", f"{ROUTER_LOGITS}1"]
    assert decoder.taps == []
    caches = [each.new_cache(2, 40) for each in (decoder, tapped)]
    for ids in (np.arange(2, 62).reshape(2, 30), np.array([[7], [8]]), np.array([[9], [10]])):
        plain, with_taps = (each.run(cache, ids) for each, cache in zip((decoder, tapped), caches, strict=True))
        np.testing.assert_array_equal(plain["logits"], with_taps["logits"])
        assert list(plain) == ["logits"]
        shapes = {name: value.shape for name, value in with_taps.items()}
        batch, length = ids.shape
        assert shapes == {
            "logits": (batch, length, 300), f"{HIDDEN}0": (batch, length, 32), f"{HIDDEN}1": (batch, length, 32),
            f"{ROUTER_LOGITS}0": (batch * length, 4), f"{ROUTER_LOGITS}1": (batch * length, 4),
        }  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_equal_those_of_transformers(mixture_checkpoint: Path, decoder: Decoder, prompt: list[int]) -> None:
    model = MixtralForCausalLM.from_pretrained(mixture_checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=1)
    assert generate(decoder, prompt, 64, stop=[1]) == tokens[0, len(prompt) :].tolist()


def test_generation_ends_after_the_first_stop_token(decoder: Decoder) -> None:
    tokens = generate(decoder, [0, 34], 30)
    stop = tokens[7]
    assert generate(decoder, [0, 34], 30, stop=[299999, stop]) == tokens[: tokens.index(stop) + 1]


def test_no_tokens_asked_for_are_no_tokens(decoder: Decoder) -> None:
    assert generate(decoder, [0, 34], 0) == []


def test_the_context_may_be_filled_to_the_last_token(decoder: Decoder) -> None:
    assert len(generate(decoder, [0] * 250, 6)) == 6
    with pytest.raises(ExportError, match=r"^257 tokens asked for; the model's context holds 256; shorten the prompt or the output$"):
        generate(decoder, [0] * 250, 7)


def test_a_full_cache_says_so(decoder: Decoder) -> None:
    cache = decoder.new_cache(1, 4)
    decoder.run(cache, np.array([[2, 3, 4]]))
    with pytest.raises(ExportError, match=r"^5 tokens in a cache of 4; ask for a larger one$"):
        decoder.run(cache, np.array([[5, 6]]))


def test_a_call_refused_leaves_the_cache_as_it_was(decoder: Decoder) -> None:
    cache, other = decoder.new_cache(1, 4), decoder.new_cache(1, 4)
    for each in (cache, other):
        decoder.run(each, np.array([[2, 3, 4]]))
    with pytest.raises(ExportError):
        decoder.run(cache, np.array([[5, 6]]))
    np.testing.assert_array_equal(*(decoder.run(each, np.array([[5]]))["logits"] for each in (cache, other)))


def test_onnxruntime_refuses_a_second_piece_of_several_rows(decoder: Decoder) -> None:
    """Should it ever take one, `Decoder.run` may say so."""
    cache = decoder.new_cache(2, 8)
    decoder.run(cache, np.full((2, 3), 9))
    with pytest.raises(RuntimeError, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        decoder.run(cache, np.full((2, 3), 9))


def test_an_empty_prompt_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ExportError, match=r"^the prompt has no tokens; give some text$"):
        generate(decoder, [], 3)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    message = f"{tmp_path}: no model.onnx; it must be an ONNX package, as `dense2moe run` writes it"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        Decoder(tmp_path)


def test_a_package_for_a_newer_runtime_is_refused(package: Path, tmp_path: Path) -> None:
    model = onnx.load(package / MODEL_NAME, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == MIN_ONNXRUNTIME_KEY:
            entry.value = "99.1"
    (tmp_path / MODEL_NAME).write_bytes(model.SerializeToString())
    message = f"{tmp_path / MODEL_NAME}: needs onnxruntime 99.1 or newer; this is {ort.__version__}; upgrade it"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        Decoder(tmp_path)


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="onnxruntime-gpu is installed")
def test_a_provider_that_is_not_there_is_refused(package: Path) -> None:
    message = f"{CUDA} is not in this onnxruntime ({', '.join(ort.get_available_providers())}); install the [gpu] extra"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        Decoder(package, CUDA)


def test_a_seed_decides_the_samples(decoder: Decoder) -> None:
    draws = [generate(decoder, [0, 34], 20, Sampling(temperature=1.0, seed=seed)) for seed in (3, 3, 4)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.5, top_k=1), Sampling(temperature=1.5, top_p=1e-9), Sampling(temperature=1e-6)])
def test_sampling_among_one_token_is_greedy(decoder: Decoder, sampling: Sampling) -> None:
    assert generate(decoder, [0, 34], 20, sampling) == generate(decoder, [0, 34], 20)


def draw(logits: list[float], sampling: Sampling, count: int = 4000) -> dict[int, float]:
    """The share of each token among `count` draws."""
    random = np.random.default_rng(0)
    tokens = Counter(choose_token(np.array(logits, np.float32), sampling, random) for _ in range(count))
    return {token: number / count for token, number in sorted(tokens.items())}


LOGITS = [np.log(p) for p in (0.1, 0.4, 0.2, 0.3)]


# Shares of 4000 draws have a standard deviation of at most .008; the seed is fixed.
@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), {1: 1.0}),
        (Sampling(temperature=1.0), {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        (Sampling(temperature=0.5), {0: 1 / 30, 1: 16 / 30, 2: 4 / 30, 3: 9 / 30}),  # squares of the shares
        (Sampling(temperature=1.0, top_k=2), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(temperature=1.0, top_k=9), {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        (Sampling(temperature=1.0, top_p=0.35), {1: 1.0}),
        (Sampling(temperature=1.0, top_p=0.65), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(temperature=1.0, top_p=0.75), {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}),
        (Sampling(temperature=1.0, top_k=3, top_p=0.75), {1: 4 / 7, 3: 3 / 7}),  # of the best three, the best two hold 7/9
        (Sampling(temperature=1.0, top_p=0.0), {1: 1.0}),
    ],
)
def test_tokens_are_drawn_by_their_probabilities(sampling: Sampling, expected: dict[int, float]) -> None:
    found = draw(LOGITS, sampling)
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=0.03)


def test_the_first_of_equal_logits_is_the_greedy_one() -> None:
    assert draw([1.0, 2.0, 2.0], Sampling(), 1) == {1: 1.0}
    assert draw([1.0, 2.0, 2.0], Sampling(temperature=1.0, top_k=1), 20) == {1: 1.0}


def test_large_logits_overflow_nothing() -> None:
    assert draw([-1e30, 1e30, 3e38], Sampling(temperature=0.7), 10) == {2: 1.0}


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_does(mixture_checkpoint: Path, tmp_path: Path) -> None:
    """Float32 on both sides; 1e-3 relative, since CUDA's products may use TF32."""
    if "CUDAExecutionProvider" not in ort.get_available_providers() or not torch.cuda.is_available():
        pytest.skip("no CUDA device, or no onnxruntime-gpu")
    twin, package = tmp_path / "twin", tmp_path / "package"
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(mixture_checkpoint, twin, "float32", QuantizeConfig(), lambda *_: None)
    write_package(twin, package, OnnxConfig(lowering="grouped"), lambda *_: None)
    ids = np.arange(2, 34, dtype=np.int64)[None]
    logits = [
        (decoder := Decoder(package, provider)).run(decoder.new_cache(1, 32), ids)["logits"]
        for provider in ("CPUExecutionProvider", "CUDAExecutionProvider")
    ]
    assert np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max() < 1e-3
