"""Packages that are damaged, foreign, linked or of another model.

One line that names the file, and the right ones open.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto
from programs import dense2moe
from told import tells

from dense2moe.api import export_onnx
from dense2moe.export.errors import ExportError
from dense2moe.export.opening import open_package
from dense2moe.export.parity.precision import find_precision
from dense2moe.export.parity.weights.constants import read_constants
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.export.runtime.sampling import Sampling
from dense2moe.export.storage import DATA_NAME, GENAI_CONFIG_NAME, MODEL_NAME
from dense2moe.upcycle.errors import UpcycleError, one_line_errors
from tests.conftest import MakeDense

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "LICENSE"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
AGAIN = "download the package again, or export it again"
COPY = "copy the file from the checkpoint that the package was made from"


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    """A package to spoil."""
    return Path(shutil.copytree(package, tmp_path / "copy"))


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ExportError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_graph(directory: Path, change: Callable[[ModelProto], object]) -> Path:
    model = onnx.load(directory / MODEL_NAME, load_external_data=False)
    change(model)
    (directory / MODEL_NAME).write_bytes(model.SerializeToString())
    return directory


def change_config(directory: Path, name: str = "config.json", **values: Any) -> Path:
    found = json.loads((directory / name).read_text(encoding="utf-8")) | values
    (directory / name).write_text(
        json.dumps({key: value for key, value in found.items() if value != "left out"}), encoding="utf-8"
    )
    return directory


def outside(model: ModelProto) -> list[TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.external_data]


def set_entry(model: ModelProto, key: str, value: str) -> None:
    next(entry for entry in outside(model)[0].external_data if entry.key == key).value = value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"{directory}: no model\.onnx; it must be an ONNX package, as `dense2moe run` writes it"),
        (b"", rf"{{path}}: is empty; {AGAIN}"),
        (POINTER, r"{path}: is a git-LFS pointer, not the file itself; run `git lfs pull` where it was cloned"),
        (b"\x08\x0a\xff\xff\xff", rf"{{path}}: is no ONNX model \(DecodeError: .*\); {AGAIN}"),
        (onnx.helper.make_tensor("t", 1, [1], [0.0]).SerializeToString(), rf"{{path}}: is no ONNX model.*; {AGAIN}"),
    ],
)
def test_a_graph_that_cannot_be_read_is_one_line(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / MODEL_NAME).write_bytes(content)
    for call in (Decoder, find_precision, read_constants):
        assert re.fullmatch(
            reason.format(directory=re.escape(str(tmp_path)), path=re.escape(str(tmp_path / MODEL_NAME))),
            refusal(call, tmp_path),
        )


def test_what_is_no_directory_is_one_line(tmp_path: Path) -> None:
    assert refusal(open_package, tmp_path / "no").startswith(
        f"{tmp_path / 'no'}: no such directory; it must be an ONNX package"
    )
    (tmp_path / "file").touch()
    assert refusal(open_package, tmp_path / "file").startswith(
        f"{tmp_path / 'file'}: is a file; it must be an ONNX package"
    )


def test_weights_that_are_missing_cut_or_a_pointer_are_one_line(copy: Path) -> None:
    data = copy / DATA_NAME
    whole = data.read_bytes()
    data.write_bytes(whole[:-8])
    assert refusal(Decoder, copy) == (
        f"{data}: has {len(whole) - 8:,} bytes; the tensor 'logits.weight' in model.onnx ends at {len(whole):,}, so "
        f"the file is truncated, or belongs to another model; {AGAIN}"
    )
    data.write_bytes(POINTER)
    assert tells(refusal(Decoder, copy), f"{data}: is a git-LFS pointer", "`git lfs pull`")
    data.unlink()
    assert refusal(Decoder, copy) == f"{data}: no such file; model.onnx has its weights there; {AGAIN}"
    data.write_bytes(whole + b"more")
    assert Decoder(copy).vocab_size == 300


@pytest.mark.parametrize("location", ["../elsewhere", "{root}/elsewhere", "folder/../../elsewhere"])
def test_weights_outside_of_the_package_are_refused(copy: Path, location: str) -> None:
    shutil.copyfile(copy / DATA_NAME, copy.parent / "elsewhere")
    place = location.format(root=copy.parent)
    change_graph(copy, lambda model: [set_entry(model, "location", place)])
    for call in (Decoder, read_constants):
        assert refusal(call, copy) == (
            f"{copy / MODEL_NAME}: its weights lie in '{place}', outside the package; must be a file "
            f"beside model.onnx; {AGAIN}"
        )


def test_a_link_to_a_file_of_somebody_else_is_refused(copy: Path) -> None:
    (copy / DATA_NAME).rename(copy.parent / "elsewhere")
    (copy / DATA_NAME).symlink_to("../elsewhere")
    assert "outside the package; must be a file beside model.onnx" in refusal(Decoder, copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", "-1"),
        ("length", "x"),
        ("offset", "99999999999"),
        ("location", "a\0b"),
        ("location", "*/_ORT_MEM_ADDR_/*"),
    ],
)
def test_places_of_weights_that_cannot_be_are_one_line(copy: Path, key: str, value: str) -> None:
    change_graph(copy, lambda model: set_entry(model, key, value))
    assert refusal(Decoder, copy).startswith(str(copy))


@pytest.fixture
def snapshot(package: Path, tmp_path: Path) -> Path:
    """The package as the hub's cache has it: links into a folder of files that are named by their digests."""
    found = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs = found.parent.parent / "blobs"
    found.mkdir(parents=True)
    blobs.mkdir()
    for file in package.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blobs / digest)
        (found / file.name).symlink_to(Path("../../blobs") / digest)
    return found


@pytest.mark.parametrize("size", [1 << 62, -4, 3])
def test_a_shape_that_its_bytes_do_not_have_is_one_line(copy: Path, size: int) -> None:
    """onnxruntime would first ask for the memory, and print that it has none."""
    model = onnx.load(copy / MODEL_NAME, load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.data_location == TensorProto.EXTERNAL)
    length = int(next(entry.value for entry in tensor.external_data if entry.key == "length"))
    tensor.dims[0] = size
    onnx.save(model, copy / MODEL_NAME)
    takes = 4 * math.prod(tensor.dims)
    where = f"{copy / MODEL_NAME}: the tensor {tensor.name!r} of shape {list(tensor.dims)}"
    assert refusal(open_package, copy) == f"{where} takes {takes:,} bytes; {length:,} are said to be there; {AGAIN}"


def test_a_package_in_the_hub_s_cache_is_the_package(snapshot: Path, package: Path, mixture_checkpoint: Path) -> None:
    texts = [list(Decoder(each, num_threads=1).generate([[0, 34, 90]], 12, Sampling())) for each in (snapshot, package)]
    assert texts[0] == texts[1]
    matrices, expected = (
        {matrix.place: matrix.read() for matrix in read_constants(each).matrices} for each in (snapshot, package)
    )
    assert matrices.keys() == expected.keys()
    assert all(np.array_equal(matrices[place], expected[place]) for place in expected)
    result = dense2moe(
        "parity",
        snapshot,
        "--reference",
        mixture_checkpoint,
        "--data",
        TEXT,
        "--blocks",
        2,
        "--block-size",
        16,
    )
    assert (result.exit_code, result.stdout.endswith("parity passed\n")) == (0, True), result.output
    assert dense2moe("bench", snapshot, "--batch", 1, "--prompt", 4, "--new", 1, "--rounds", 1).exit_code == 0
    assert dense2moe("generate", snapshot, "--prompt", "a", "--max-new-tokens", 2).exit_code == 0


@pytest.mark.parametrize("how", ["copied", "linked"])
def test_weights_with_several_names_are_read(package: Path, tmp_path: Path, how: str) -> None:
    """Hard links, as copies that save space make them."""
    for file in package.iterdir():
        (os.link if how == "linked" else shutil.copyfile)(file, tmp_path / file.name)
    assert len(read_constants(tmp_path).matrices) == len(read_constants(package).matrices)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("config.json", "{", "is no JSON (JSONDecodeError: Expecting property name"),
        ("config.json", "[1]", "is no JSON object; copy it from the checkpoint that the package was made from"),
        ("config.json", POINTER.decode(), "is a git-LFS pointer, not the file itself"),
        ("config.json", "{}", f"max_position_embeddings is missing; must be a whole number from 1 on; {COPY}"),
        (
            "config.json",
            '{"max_position_embeddings": "many"}',
            f'max_position_embeddings is "many"; must be a whole number from 1 on; {COPY}',
        ),
        (
            "config.json",
            '{"max_position_embeddings": true}',
            f"max_position_embeddings is true; must be a whole number from 1 on; {COPY}",
        ),
        (
            "config.json",
            '{"max_position_embeddings": 8, "num_experts_per_tok": []}',
            "num_experts_per_tok is []; must be a whole number from 0 on",
        ),
        (GENAI_CONFIG_NAME, "{", "is no JSON"),
        (
            GENAI_CONFIG_NAME,
            '{"model": 3}',
            f"model.context_length is missing; must be a whole number from 1 on; {COPY}",
        ),
    ],
)
def test_sizes_that_are_not_said_are_one_line(copy: Path, name: str, text: str, reason: str) -> None:
    (copy / "config.json").unlink()
    (copy / name).write_text(text, encoding="utf-8")
    assert refusal(Decoder, copy).startswith(f"{copy / name}: {reason}")


def test_a_config_of_several_parts_has_the_sizes_of_its_language_model(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(
        json.dumps({"model_type": "of_two_parts", "text_config": config}), encoding="utf-8"
    )
    assert Decoder(copy).context_length == 256


def test_a_branch_that_is_missing_is_one_line(copy: Path) -> None:
    change_graph(
        copy, lambda model: model.graph.node.add(op_type="If", name="by_length", input=["one"], output=["either"])
    )
    assert (
        refusal(find_precision, copy)
        == f"{copy / MODEL_NAME}: the node 'by_length' lacks a branch, or what a branch must return; {AGAIN}"
    )


def test_what_onnxruntime_lacks_is_said_with_its_version(copy: Path) -> None:
    change_graph(copy, lambda model: setattr(model.graph.node[3], "op_type", "OfTomorrow"))
    start = (
        f"{copy / MODEL_NAME}: onnxruntime {ort.__version__} cannot load it (InvalidGraph: This is an invalid "
        "model. In Node, "
    )
    message = refusal(Decoder, copy)
    assert message.startswith(start)
    assert message.endswith("; upgrade onnxruntime if it lacks something, or export the package again")


def test_an_operator_set_of_tomorrow_is_one_line(copy: Path) -> None:
    change_graph(copy, lambda model: setattr(model.opset_import[0], "version", 99))
    assert (
        f"onnxruntime {ort.__version__} cannot load it (Fail: ONNX Runtime only *guarantees* support for models"
        in refusal(Decoder, copy)
    )


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        (
            "attention_mask",
            TensorProto.INT32,
            "attention_mask is a tensor(int32); must be a tensor(int64); export it so",
        ),
        (
            "past_key_values.0.key",
            TensorProto.INT8,
            "past_key_values.0.key is a tensor(int8); must be a tensor(float) or tensor(float16) or ",
        ),
    ],
)
def test_other_types_of_inputs_are_one_line(tmp_path: Path, name: str, kind: int, reason: str) -> None:
    helper = onnx.helper
    types = {
        "input_ids": TensorProto.INT64,
        "attention_mask": TensorProto.INT64,
        "past_key_values.0.key": TensorProto.FLOAT,
        name: kind,
    }
    ranks = {"past_key_values.0.key": ["B", 1, "P", 1]}
    inputs = [helper.make_tensor_value_info(key, value, ranks.get(key, ["B", key])) for key, value in types.items()]
    nodes = [
        helper.make_node("Identity", ["past_key_values.0.key"], ["present.0.key"]),
        helper.make_node("Cast", ["input_ids"], ["tokens"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["tokens", "last"], ["logits"]),
    ]
    outputs = [
        helper.make_tensor_value_info(key, types.get(key.replace("present", "past_key_values"), 1), None)
        for key in ("logits", "present.0.key")
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [helper.make_tensor("last", TensorProto.INT64, [1], [-1])])
    onnx.save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / MODEL_NAME
    )
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8}', encoding="utf-8")
    assert refusal(Decoder, tmp_path).startswith(f"{tmp_path / MODEL_NAME}: {reason}")


def test_what_fails_within_a_run_is_one_line(package: Path) -> None:
    decoder = Decoder(package, num_threads=1)
    message = refusal(decoder.run, decoder.new_cache(1, 3), np.full((1, 3), 300))
    assert message.startswith(f"{package / MODEL_NAME}: onnxruntime {ort.__version__} cannot run it (")
    assert "indices element out of data bounds" in message
    assert refusal(next, decoder.generate([[5, 300]], 2, Sampling())) == (
        f"the prompt has the token 300; {package / MODEL_NAME} knows 300, from 0 on; use the tokenizer of its "
        "checkpoint"
    )


def test_errors_of_onnxruntime_are_not_printed_besides(package: Path, capfd: pytest.CaptureFixture[str]) -> None:
    decoder = Decoder(package, num_threads=1)
    refusal(decoder.run, decoder.new_cache(1, 3), np.full((1, 3), 300))
    assert capfd.readouterr() == ("", "")


# Parity: what it is held against.


def parity(package: Path, reference: Path, *options: object, text: Path = TEXT) -> tuple[int, str, str]:
    result = dense2moe(
        "parity", package, "--reference", reference, "--data", text, "--blocks", 2, "--block-size", 16, *options
    )
    return result.exit_code, result.stdout, result.stderr.splitlines()[-1]


def test_the_dense_parent_is_a_reference(package: Path, dense_checkpoint: Path, tmp_path: Path) -> None:
    code, said, _ = parity(
        package, dense_checkpoint, "--max-perplexity-increase", 10, "--json", tmp_path / "parity.json"
    )
    assert code == 0, said
    alone = (
        ": its weights are not the reference's: only the perplexity, the files and the package against itself "
        "are judged, unless --twin is given"
    )
    assert said.endswith(f"parity passed{alone}\n")
    (figures,) = [
        each
        for each in json.loads((tmp_path / "parity.json").read_text())["providers"].values()
        if isinstance(each, dict)
    ]
    judged = {tier for tier, verdict in figures["tiers"].items() if verdict == "passed"}
    assert judged == {"language", "files"}
    assert (
        "config.json: model_type is not compared; the package is a mixture, the checkpoint dense"
        in figures["files"]["missing"]
    )
    # the experts of this mixture were disturbed
    assert figures["figures"][0]["value"] != pytest.approx(figures["finetuned_figures"][0]["value"])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, and 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, and 2"),
        ({"vocab_size": 400}, "vocab_size is 400, and 300"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, and 2"),
    ],
)
def test_a_reference_of_another_shape_is_one_line(
    package: Path, make_dense: MakeDense, change: dict[str, int], what: str
) -> None:
    reference = make_dense(**change)
    code, said, error = parity(package, reference)
    assert (code, said) == (1, "")
    assert (
        error == f"Error: {reference}: {what} in {package}: they belong to different models; give the checkpoint "
        "that the package was made from"
    )


def test_files_that_parity_cannot_read_or_write_are_told_before_the_work(
    package: Path, mixture_checkpoint: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "no" / "parity.json"
    assert parity(package, tmp_path / "none", "--json", missing)[2] == (
        f"Error: {missing}: {missing.parent} is no directory; make it, or give another --json"
    )
    assert (
        parity(package, tmp_path / "none", "--json", tmp_path)[2]
        == f"Error: {tmp_path}: is a directory; --json must name a file"
    )
    assert parity(package, tmp_path / "none")[2].startswith(
        f"Error: {tmp_path / 'none'}: no such directory; it must be a Hugging Face checkpoint"
    )
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1") * 100)
    code, said, error = parity(package, mixture_checkpoint, text=tmp_path / "latin.txt")
    assert (code, said) == (1, "")
    assert error.startswith(f"Error: {tmp_path / 'latin.txt'}")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is no JSON (JSONDecodeError: "),
        ("[]", "variant is null; must be of type str"),
        ('{"variant": "int4"}', "element_type is null"),
    ],
)
def test_a_twin_whose_scheme_is_damaged_is_one_line(
    package: Path, mixture_checkpoint: Path, tmp_path: Path, text: str, what: str
) -> None:
    twin = shutil.copytree(mixture_checkpoint, tmp_path / "twin")
    (twin / "quantization.json").write_text(text, encoding="utf-8")
    code, said, error = parity(package, mixture_checkpoint, "--twin", twin)
    assert (code, said) == (1, "")
    assert error.startswith(f"Error: {twin / 'quantization.json'}: {what}")


def test_a_checkpoint_that_was_never_quantized_is_told_what_it_lacks(mixture_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(mixture_checkpoint, tmp_path / "package")
    assert str(caught.value) == (
        f"{mixture_checkpoint}: no quantization.json, so it was never quantized; quantize the checkpoint into a new "
        "directory, as variant 'float32' to keep its weights as they are, and give that directory"
    )


def test_a_file_that_cannot_be_read_is_not_said_to_hold_something_else(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for what in ("is no JSON", "not valid JSON", "not a safetensors index"):
        with pytest.raises(UpcycleError) as caught, one_line_errors(path, what, "copy it again"):
            path.read_text()
        assert str(caught.value) == f"{path}: cannot be read (No such file or directory); copy it again"
        with (
            pytest.raises(UpcycleError, match=f"{what} \\(ValueError: x\\)"),
            one_line_errors(path, what, "copy it again"),
        ):
            raise ValueError("x")


def test_blocks_beyond_the_context_are_one_line(package: Path, mixture_checkpoint: Path) -> None:
    result = dense2moe("parity", package, "--reference", mixture_checkpoint, "--data", TEXT, "--block-size", 300)
    assert (
        result.stderr.splitlines()[-1]
        == f"Error: {package}: its context holds 256 tokens; blocks have 300; ask for smaller blocks"
    )


# Telemetry.


@pytest.mark.parametrize(
    "module", ["dense2moe.export.runtime.decoder", "dense2moe.convert.pytest_plugin, dense2moe.convert.package_parity"]
)
def test_onnxruntime_leaves_nothing_in_the_user_s_home(package: Path, module: str, tmp_path: Path) -> None:
    """onnxruntime 1.29 and later write a device id and a database below the user's cache directory.

    Where telemetry is on.
    """
    script = (
        f"import {module}; from pathlib import Path; from dense2moe.export.runtime.decoder import Decoder; import "
        "numpy as np; "
        f"decoder = Decoder(Path({str(package)!r}), num_threads=1); decoder.run(decoder.new_cache(1, 2), "
        "np.zeros((1, 2), np.int64))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))} | {
        "HOME": str(tmp_path)
    }
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=ROOT)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_user_s_own_word_on_telemetry_is_kept() -> None:
    script = "import dense2moe.export, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    said = [
        subprocess.run(
            [sys.executable, "-c", script], check=True, env=environment, cwd=ROOT, capture_output=True, text=True
        ).stdout
        for environment in (
            {**os.environ, "ORT_DISABLE_TELEMETRY": "0"},
            {name: v for name, v in os.environ.items() if not name.startswith("ORT_")},
        )
    ]
    assert said == ["0\n", "1\n"]
