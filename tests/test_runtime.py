"""Packages run with one shared cache, and tokens are chosen as asked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import MixtralForCausalLM

from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.names import FINAL_NORMED, FIRST_LOGIT
from dense2moe.export.package import write_package
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import CUDA, Decoder
from dense2moe.export.runtime.inspection import Inspection
from dense2moe.export.runtime.sampling import Sampling
from dense2moe.export.storage import MIN_ONNXRUNTIME_KEY, MODEL_NAME
from dense2moe.upcycle.building.config import ExpertsConfig, RouterConfig, UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle

MakeDense = Callable[..., Path]

GREEDY = Sampling()
PROMPTS = [[0, 34], [7], list(range(40, 80)), [0, 299, 298, 2, 2, 2, 150, 33, 8, 90, 61, 270]]

BATCH = [[0, 34], list(range(40, 80)), [0, 299, 298, 2, 2, 2, 150, 33, 8, 90, 61, 270]]


@pytest.fixture(scope="module")
def package(mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 package of the mixture."""
    twin, output = tmp_path_factory.mktemp("twin"), tmp_path_factory.mktemp("package")
    quantize_checkpoint(
        mixture_checkpoint, twin, "float32", QuantizeConfig(method="search"), lambda what, done, total: None
    )
    write_package(twin, output, OnnxConfig(lowering="grouped"), lambda what, done, total: None)
    return output


@pytest.fixture(scope="module")
def decoder(package: Path) -> Decoder:
    return Decoder(package, num_threads=1)


def generate(
    decoder: Decoder, prompt: list[int], count: int, sampling: Sampling = GREEDY, stop: list[int] | None = None
) -> list[int]:
    """What follows one prompt."""
    return generate_batch(decoder, [prompt], count, sampling, stop)[0]


def generate_batch(
    decoder: Decoder, prompts: list[list[int]], count: int, sampling: Sampling = GREEDY, stop: list[int] | None = None
) -> list[list[int]]:
    """What follows each prompt; once a row has ended, nothing comes of it any more."""
    steps = list(decoder.generate(prompts, count, sampling, stop or []))
    rows = [[step[row] for step in steps] for row in range(len(prompts))]
    ends = [row.index(None) if None in row else len(row) for row in rows]
    assert all(set(row[end:]) <= {None} for row, end in zip(rows, ends, strict=True))
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


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
    opset = [helper.make_opsetid("", 21)]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, axes), ir_version=10, opset_imports=opset),
        tmp_path / MODEL_NAME,
    )
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
    assert sorted(cache.buffers) == [
        f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")
    ]
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
    one, other = decoder.generate([[0, 34]], 12, GREEDY), decoder.generate([[5, 6, 7]], 12, GREEDY)
    assert [pair[0] for (pair, _) in zip(one, other, strict=True)] == alone


def test_what_a_larger_cache_adds_is_nothing(decoder: Decoder) -> None:
    ids = np.arange(2, 32)[None]
    small, large = (decoder.run(decoder.new_cache(1, capacity), ids)["logits"] for capacity in (30, 256))
    np.testing.assert_array_equal(small, large)


def test_taps_change_no_bit_of_the_logits(package: Path, decoder: Decoder) -> None:
    tapped = Decoder(package, inspection=Inspection(streams=True), num_threads=1)
    assert tapped.taps == ["hidden.0", "hidden.1", "router_logits.0", "router_logits.1"]
    assert decoder.taps == []
    caches = [each.new_cache(2, 40) for each in (decoder, tapped)]
    for ids in (np.arange(2, 62).reshape(2, 30), np.array([[7], [8]]), np.array([[9], [10]])):
        plain, with_taps = (each.run(cache, ids) for each, cache in zip((decoder, tapped), caches, strict=True))
        np.testing.assert_array_equal(plain["logits"], with_taps["logits"])
        assert list(plain) == ["logits"]
        shapes = {name: value.shape for name, value in with_taps.items()}
        batch, length = ids.shape
        assert shapes == {
            "logits": (batch, length, 300),
            "hidden.0": (batch, length, 32),
            "hidden.1": (batch, length, 32),
            "router_logits.0": (batch * length, 4),
            "router_logits.1": (batch * length, 4),
        }


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_equal_those_of_transformers(
    mixture_checkpoint: Path, decoder: Decoder, prompt: list[int]
) -> None:
    model = MixtralForCausalLM.from_pretrained(mixture_checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=1
    )
    assert generate(decoder, prompt, 64, stop=[1]) == tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("head_dim", [8, 16])  # those of 16 are rotated by the attention itself
def test_a_padded_batch_generates_what_each_prompt_does_alone_and_transformers_does(
    make_dense: MakeDense, tmp_path: Path, head_dim: int
) -> None:
    mixture, twin, package = tmp_path / "mixture", tmp_path / "twin", tmp_path / "package"
    for path in (mixture, twin, package):
        path.mkdir()
    config = UpcycleConfig(
        num_experts=4, num_experts_per_tok=2, experts=ExpertsConfig(noise=0.5), router=RouterConfig(logit_std=1.0)
    )
    upcycle(make_dense(head_dim=head_dim), mixture, config, 0, lambda *_: None)
    quantize_checkpoint(mixture, twin, "float32", QuantizeConfig(method="search"), lambda *_: None)
    write_package(twin, package, OnnxConfig(lowering="grouped"), lambda *_: None)
    decoder = Decoder(package, num_threads=1)
    together = generate_batch(decoder, BATCH, 64, stop=[1])
    assert together == [generate(decoder, prompt, 64, stop=[1]) for prompt in BATCH]
    model = MixtralForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    width = max(map(len, BATCH))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in BATCH])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in BATCH])
    rows = model.generate(
        ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=299, eos_token_id=1
    )[:, width:].tolist()
    assert together == [row[: row.index(1) + 1] if 1 in row else row for row in rows]


def test_a_row_that_ends_leaves_the_others_as_they_are(decoder: Decoder) -> None:
    free = generate_batch(decoder, BATCH, 30)
    stops = [free[0][3], free[1][9]]  # one for the first row, one for the second, and what they do to each other
    ends = [next((at + 1 for at, token in enumerate(row) if token in stops), 30) for row in free]
    assert len(set(ends)) > 1
    assert generate_batch(decoder, BATCH, 30, stop=stops) == [row[:end] for row, end in zip(free, ends, strict=True)]


def test_a_batch_ends_when_its_last_row_has(decoder: Decoder) -> None:
    free = generate_batch(decoder, BATCH, 30)
    steps = list(decoder.generate(BATCH, 30, GREEDY, [row[4] for row in free]))
    assert (
        len(steps)
        == max(next(at + 1 for at, token in enumerate(row) if token in {each[4] for each in free}) for row in free)
        < 30
    )


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(1.0, top_k=20), Sampling(1.0, top_p=0.8)])
def test_a_prompt_draws_the_same_tokens_alone_and_in_a_batch(decoder: Decoder, sampling: Sampling) -> None:
    assert generate_batch(decoder, BATCH, 40, sampling) == [generate(decoder, prompt, 40, sampling) for prompt in BATCH]


def test_equal_prompts_draw_different_tokens_and_the_first_what_it_draws_alone(decoder: Decoder) -> None:
    sampling = Sampling(temperature=1.0)
    first, second = generate_batch(decoder, [[0, 34], [0, 34]], 20, sampling)
    assert first == generate(decoder, [0, 34], 20, sampling)
    assert first != second


@pytest.mark.parametrize("kept", [1, 2, 5, 99])
def test_logits_to_keep_are_those_of_the_last_tokens(decoder: Decoder, kept: int) -> None:
    ids = np.arange(2, 14).reshape(2, 6)
    whole = decoder.run(decoder.new_cache(2, 8), ids)["logits"]
    cut = decoder.run(decoder.new_cache(2, 8), ids, logits_to_keep=kept)["logits"]
    assert cut.shape == (2, min(kept, 6), 300)
    # 1e-6: products of other sizes may be summed in another order.
    np.testing.assert_allclose(cut, whole[:, -kept:], rtol=0, atol=1e-6 * np.abs(whole).max())


def test_all_logits_come_again_after_some_were_kept(decoder: Decoder) -> None:
    cache = decoder.new_cache(1, 8)
    assert [decoder.run(cache, np.full((1, 3), 9), logits_to_keep=kept)["logits"].shape[1] for kept in (1, 0)] == [1, 3]


def test_logits_outlive_the_next_step(decoder: Decoder) -> None:
    cache = decoder.new_cache(1, 8)
    first = decoder.run(cache, np.array([[2, 3, 4]]), logits_to_keep=1)["logits"]
    before = first.copy()
    decoder.run(cache, np.array([[200]]), logits_to_keep=1)
    np.testing.assert_array_equal(first, before)


def test_a_package_that_cannot_cut_its_logits_generates_the_same(
    package: Path, decoder: Decoder, tmp_path: Path
) -> None:
    """As other makers write it: no value bears the name by which ours is cut."""
    model = onnx.load(package / MODEL_NAME, load_external_data=False)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["otherwise" if name == FINAL_NORMED else name for name in names]
    shutil.copytree(package, tmp_path, dirs_exist_ok=True)
    (tmp_path / MODEL_NAME).write_bytes(model.SerializeToString())
    other = Decoder(tmp_path, num_threads=1)
    assert [FIRST_LOGIT in {value.name for value in each.session.get_inputs()} for each in (decoder, other)] == [
        True,
        False,
    ]
    assert generate_batch(other, BATCH, 20) == generate_batch(decoder, BATCH, 20)
    ids = np.arange(2, 14).reshape(2, 6)
    assert other.run(other.new_cache(2, 8), ids, logits_to_keep=2)["logits"].shape == (2, 2, 300)


def test_generation_ends_after_the_first_stop_token(decoder: Decoder) -> None:
    tokens = generate(decoder, [0, 34], 30)
    stop = tokens[7]
    assert generate(decoder, [0, 34], 30, stop=[299999, stop]) == tokens[: tokens.index(stop) + 1]


def test_no_tokens_asked_for_are_no_tokens(decoder: Decoder) -> None:
    assert generate(decoder, [0, 34], 0) == []


def test_the_context_may_be_filled_to_the_last_token(decoder: Decoder) -> None:
    assert len(generate(decoder, [0] * 250, 6)) == 6
    with pytest.raises(
        ExportError, match=r"^257 tokens asked for; the model's context holds 256; shorten the prompt or the output$"
    ):
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
    with pytest.raises(ExportError, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        decoder.run(cache, np.full((2, 3), 9))


def test_an_empty_prompt_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ExportError, match=r"^the prompt has no tokens; give some text$"):
        generate(decoder, [], 3)
    with pytest.raises(ExportError, match=r"^prompt 2 has no tokens"):
        generate_batch(decoder, [[5], []], 3)


def test_no_prompts_are_no_steps(decoder: Decoder) -> None:
    assert list(decoder.generate([], 3, GREEDY)) == []


def test_a_prompt_longer_than_the_context_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ExportError, match=r"^the prompt has 257 tokens; the model's context holds 256; shorten it$"):
        generate(decoder, [0] * 257, 3)
    with pytest.raises(ExportError, match=r"^prompt 2 has 300 tokens; .* 256; shorten"):
        generate_batch(decoder, [[5], [0] * 300], 3)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    message = f"{tmp_path}: no model.onnx; it must be an ONNX package, as `dense2moe run` writes it"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        Decoder(tmp_path)


def test_a_package_for_a_newer_runtime_is_refused(package: Path, tmp_path: Path) -> None:
    model = onnx.load(package / MODEL_NAME, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == MIN_ONNXRUNTIME_KEY:
            entry.value = "99.1"
    shutil.copytree(package, tmp_path, dirs_exist_ok=True)
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


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.5, top_k=1), Sampling(temperature=1.5, top_p=1e-9), Sampling(temperature=1e-6)]
)
def test_sampling_among_one_token_is_greedy(decoder: Decoder, sampling: Sampling) -> None:
    assert generate(decoder, [0, 34], 20, sampling) == generate(decoder, [0, 34], 20)


def test_a_float16_package_has_a_cache_of_half_the_bytes_and_float32_logits(
    mixture_checkpoint: Path, tmp_path: Path, decoder: Decoder
) -> None:
    twin, package = tmp_path / "twin", tmp_path / "package"
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(mixture_checkpoint, twin, "float16", QuantizeConfig(method="search"), lambda *_: None)
    write_package(twin, package, OnnxConfig(lowering="grouped"), lambda *_: None)
    narrow = Decoder(package, inspection=Inspection(streams=True), num_threads=1)
    caches = [each.new_cache(2, 20) for each in (decoder, narrow)]
    wide_bytes, narrow_bytes = (sum(buffer.numpy().nbytes for buffer in cache.buffers.values()) for cache in caches)
    assert wide_bytes == 2 * narrow_bytes
    found = narrow.run(caches[1], np.full((2, 5), 9))
    assert {values.dtype for values in found.values()} == {np.dtype(np.float32)}
    assert len(list(narrow.generate([[0, 34]], 8, Sampling()))) == 8


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_does(mixture_checkpoint: Path, tmp_path: Path) -> None:
    """Float32 on both sides; 1e-3 relative, since CUDA's products may use TF32."""
    if "CUDAExecutionProvider" not in ort.get_available_providers() or not torch.cuda.is_available():
        pytest.skip("no CUDA device, or no onnxruntime-gpu")
    twin, package = tmp_path / "twin", tmp_path / "package"
    twin.mkdir()
    package.mkdir()
    quantize_checkpoint(mixture_checkpoint, twin, "float32", QuantizeConfig(method="search"), lambda *_: None)
    write_package(twin, package, OnnxConfig(lowering="grouped"), lambda *_: None)
    ids = np.arange(2, 34, dtype=np.int64)[None]
    logits = [
        (decoder := Decoder(package, provider)).run(decoder.new_cache(1, 32), ids)["logits"]
        for provider in ("CPUExecutionProvider", "CUDAExecutionProvider")
    ]
    assert np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max() < 1e-3
