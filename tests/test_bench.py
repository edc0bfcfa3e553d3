"""The bench: right sums, the loads that were asked for, packages of other makers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
from programs import dense2moe

from dense2moe.convert.bench import bench_package, bench_table
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.speed import Load, time_loads
from dense2moe.export.storage import MODEL_NAME


def silent(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with our names that nothing of ours wrote.

    Logits [B, S, 1] are the tokens, its past grows by one zero a token.
    """
    directory = tmp_path_factory.mktemp("foreign")
    helper, ints, floats = onnx.helper, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    past = helper.make_tensor_value_info("past_key_values.0.key", floats, ["B", 1, "P", 1])
    inputs = [
        *(
            helper.make_tensor_value_info(name, ints, ["B", f"{name}_length"])
            for name in ("input_ids", "attention_mask")
        ),
        past,
    ]
    outputs = [
        helper.make_tensor_value_info("logits", floats, ["B", "S", 7]),
        helper.make_tensor_value_info("present.0.key", floats, None),
    ]
    nodes = [
        helper.make_node("OneHot", ["input_ids", "depth", "values"], ["logits"]),
        helper.make_node("Cast", ["input_ids"], ["tokens"], to=floats),
        helper.make_node("Unsqueeze", ["tokens", "places"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
    ]
    constants = [helper.make_tensor("depth", ints, [1], [7]), helper.make_tensor("values", floats, [2], [0, 1])]
    constants.append(helper.make_tensor("places", ints, [2], [1, 3]))
    opset = [helper.make_opsetid("", 17)]
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", inputs, outputs, constants), ir_version=10, opset_imports=opset
        ),
        directory / MODEL_NAME,
    )
    (directory / "config.json").write_text('{"max_position_embeddings": 32}', encoding="utf-8")
    return directory


class Watched(Decoder):
    """Keeps the shape of all that it is fed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.fed: list[tuple[int, int, int]] = []

    def run(self, cache, ids, mask=None, logits_to_keep=0):
        assert ids.max() < 7
        self.fed.append((*ids.shape, cache.length))
        return super().run(cache, ids, mask, logits_to_keep)


def test_every_load_is_prefilled_at_once_and_decoded_token_by_token_in_turn(foreign) -> None:
    decoder = Watched(foreign)
    loads = [Load(1, 5, 2), Load(3, 9, 1)]
    times = time_loads(decoder, loads, 2, silent)
    turn = [(1, 5, 0), (1, 1, 5), (1, 1, 6), (3, 9, 0), (3, 1, 9)]
    assert decoder.fed == turn * 3
    assert [found.load for found in times] == loads
    assert all(len(found.prefill_seconds) == len(found.decode_seconds) == 2 for found in times)
    assert [found.cache_bytes for found in times] == [4 * 7, 4 * 30]


def test_the_figures_are_those_of_the_rounds(foreign) -> None:
    found = bench_package(foreign, [Load(2, 8, 4), Load(1, 8, 0)], "cpu", 1, 3, silent)
    assert (found.package, found.lowering, found.num_threads, found.num_rounds) == (foreign.name, None, 1, 3)
    assert found.package_bytes == (foreign / MODEL_NAME).stat().st_size
    first, second = found.loads
    for stage, tokens in (("prefill", 16), ("decode", 8)):
        seconds, speeds = first[f"{stage}_seconds"], first[f"{stage}_tokens_per_second"]
        assert speeds == {
            "median": tokens / statistics.median(seconds),
            "slowest": tokens / max(seconds),
            "fastest": tokens / min(seconds),
        }
    assert second["decode_tokens_per_second"] is None
    assert 0 < found.idle_bytes <= found.peak_bytes
    assert found.peak_bytes >= 0.9 * psutil.Process().memory_info().rss
    assert bench_table(found, 80).row_count == 2


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = dense2moe(*arguments)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_crosses_batches_and_prompts(foreign) -> None:
    code, text, _ = invoke("bench", foreign, "--batch", "1,2", "--prompt", "4,8", "--new", 2, "--rounds", 1, "--json")
    assert code == 0
    found = json.loads(text)
    assert [(load["batch_size"], load["prompt_tokens"], load["new_tokens"]) for load in found["loads"]] == [
        (1, 4, 2),
        (1, 8, 2),
        (2, 4, 2),
        (2, 8, 2),
    ]
    assert found["machine"]["memory_bytes"] == psutil.virtual_memory().total
    code, text, _ = invoke("bench", foreign, "--batch", 1, "--prompt", 4, "--new", 2, "--rounds", 1, "--threads", 1)
    assert code == 0
    assert "1 thread; medians of 1 rounds after one to warm up" in text.replace("\n", " ")
    assert "Memory: " in text
    assert "Machine: " in text


def test_a_load_beyond_the_context_is_one_line(foreign) -> None:
    assert invoke("bench", foreign, "--batch", 1, "--prompt", "4,30", "--new", 4)[::2] == (
        1,
        "Error: 30 tokens and 4 new ones are 34; the model's context holds 32; ask for fewer\n",
    )


@pytest.mark.parametrize("value", ["0", "1,,2", "one", "-1"])
def test_counts_that_are_none_are_refused(foreign, value) -> None:
    code, _, error = invoke("bench", foreign, f"--batch={value}")
    assert code == 2
    assert f"'{value}' must be whole numbers from 1 on, separated by commas, such as 1,4" in " ".join(error.split())
