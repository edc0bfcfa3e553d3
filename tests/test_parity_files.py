"""Parity reads the files beside the graph: a right package passes, and each difference is one sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from tokenizers import Tokenizer
from told import tells

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.files.comparison import check_files
from dense2moe.export.parity.records import FilesCheck
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.storage import MODEL_NAME
from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.surgery import upcycle
from tests.conftest import MakeDense
from tests.foreign import build_by_genai

ALL = ("tokenizer.json", "generation_config.json", "config.json", "genai_config.json")
Sides = tuple[Path, Path]
Edit = Callable[[Any], Any]


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def export(checkpoint: Path, folder: Path) -> Sides:
    """Our package of a checkpoint, and the checkpoint with its very weights."""
    twin, package = folder / "twin", folder / "package"
    twin.mkdir(parents=True)
    package.mkdir()
    quantize_checkpoint(checkpoint, twin, "float32", QuantizeConfig(method="round"), silent)
    write_package(twin, package, OnnxConfig(lowering="unrolled", activation_bits=32), silent)
    return package, twin


@pytest.fixture(scope="module")
def own(mixture_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """A mixture of ours and its twin. Shared: read only."""
    return export(mixture_checkpoint, tmp_path_factory.mktemp("own"))


@pytest.fixture
def sides(own: Sides, tmp_path: Path) -> Sides:
    """Copies of them for a test's own faults."""
    for directory in own:
        shutil.copytree(directory, tmp_path / directory.name)
    return tmp_path / "package", tmp_path / "twin"


@pytest.fixture
def foreign(sides: Sides) -> Sides:
    """The same package without our mark, as if another maker had written it."""
    path = sides[0] / MODEL_NAME
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, path)
    return sides


def change(path: Path, edit: Edit) -> None:
    """Read JSON, let `edit` change it or give another value, and write it."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    edited = edit(values)
    path.write_text(json.dumps(values if edited is None else edited), encoding="utf-8")


def put(where: str, value: Any) -> Edit:
    """Set the value at a dotted path, or remove it where it is `...`."""

    def edit(values: Any) -> None:
        *parts, last = where.split(".")
        for part in parts:
            values = values[part]
        if value is ...:
            del values[last]
        else:
            values[last] = value

    return edit


def differences(sides: Sides) -> list[str]:
    return list(check_files(*sides).differences)


# Right packages.


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_our_package_of_a_mixture_passes(architecture: str, make_dense: MakeDense, tmp_path: Path) -> None:
    mixture = tmp_path / "mixture"
    mixture.mkdir()
    upcycle(make_dense(architecture=architecture), mixture, UpcycleConfig(), 0, silent)
    package, twin = export(mixture, tmp_path)
    assert check_files(package, twin) == FilesCheck(compared=ALL)
    assert check_files(package, mixture).passed


@pytest.mark.parametrize(
    "ids",
    [
        {"eos_token_id": [7, 1], "pad_token_id": 2},
        {"eos_token_id": 7, "bos_token_id": None},
        {"eos_token_id": None, "bos_token_id": None},
    ],
)
def test_our_package_passes_whatever_special_tokens_the_config_has(
    ids: dict[str, Any], make_dense: MakeDense, tmp_path: Path
) -> None:
    """onnxruntime-genai needs them all, so the writer substitutes those that are not there."""
    assert check_files(*export(make_dense(num_hidden_layers=1, **ids), tmp_path)) == FilesCheck(compared=ALL)


@pytest.mark.parametrize(
    ("ids", "settings"),
    [
        ({}, {}),
        ({"eos_token_id": [1, 5], "pad_token_id": 9}, {}),
        ({"eos_token_id": 5, "bos_token_id": None}, {}),  # the builder adds the tokenizer's end, which is 1
        ({}, {"eos_token_id": [1, 7], "pad_token_id": 8, "do_sample": True, "temperature": 0.5}),
    ],
)
def test_a_package_of_genai_s_builder_passes(
    ids: dict[str, Any], settings: dict[str, Any], make_dense: MakeDense, tmp_path: Path
) -> None:
    checkpoint = make_dense(hidden_size=64, num_hidden_layers=1, **ids)
    change(checkpoint / "generation_config.json", lambda values: values | settings)
    found = check_files(build_by_genai(checkpoint, tmp_path / "package", "fp32"), checkpoint)
    missing = ("generation_config.json: not in the package", "config.json: not in the package")
    assert found == FilesCheck(("tokenizer.json", "genai_config.json"), missing)


def test_what_genai_s_builder_writes_where_nothing_starts_a_text_passes(make_dense: MakeDense, tmp_path: Path) -> None:
    checkpoint = make_dense(hidden_size=64, num_hidden_layers=1, eos_token_id=5, bos_token_id=None)
    for token in ("bos_token", "eos_token"):
        change(checkpoint / "tokenizer_config.json", put(token, ...))
    package = build_by_genai(checkpoint, tmp_path / "package", "fp32")
    model = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 5, 5)
    assert check_files(package, checkpoint).passed


def shorten(values: Any) -> None:
    """A cache of fewer tokens than the model can see."""
    values["model"]["context_length"], values["search"]["max_length"] = 128, 20


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("generation_config.json", put("transformers_version", "4.1")),
        ("generation_config.json", put("_from_model_config", ...)),
        ("generation_config.json", put("temperature", 1.0)),  # transformers' default
        ("generation_config.json", put("do_sample", False)),
        ("generation_config.json", put("eos_token_id", [1])),
        ("config.json", put("transformers_version", "4.1")),
        ("config.json", put("eos_token_id", [1])),
        ("config.json", put("head_dim", ...)),  # is hidden_size / num_attention_heads
        ("genai_config.json", put("model.eos_token_id", [1])),
        ("genai_config.json", shorten),
        ("genai_config.json", put("model.decoder.inputs", ...)),  # genai's defaults are our names
        ("tokenizer_config.json", put("model_max_length", 256)),
    ],
)
def test_what_says_the_same_in_other_words_is_no_difference(sides: Sides, file: str, edit: Edit) -> None:
    change(sides[0] / file, edit)
    assert check_files(*sides) == FilesCheck(compared=ALL)


# The tokenizer.


def rotate(values: Any) -> None:
    """Give each token the id of the one before it, as a table that is off by one does."""
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {token: (number + 1) % len(vocabulary) for token, number in vocabulary.items()}
    for token in values["added_tokens"]:
        token["id"] += 1
    for token in values["post_processor"]["special_tokens"].values():
        token["ids"] = [number + 1 for number in token["ids"]]


def test_ids_rotated_by_one_are_told_with_the_first_and_their_number(sides: Sides) -> None:
    tokens = json.loads((sides[0] / "tokenizer.json").read_text())["model"]["vocab"]
    last = max(tokens, key=lambda token: tokens[token])
    change(sides[0] / "tokenizer.json", rotate)
    assert differences(sides) == [
        f'tokenizer.json: id 0 is {json.dumps(last)} in the package; must be "<s>"; 300 of 300 ids differ',
        "tokenizer_config.json: the id of bos_token is 1; must be 0",
        "tokenizer_config.json: the id of eos_token is 2; must be 1",
    ]


def test_two_tokens_that_changed_places_are_told(sides: Sides) -> None:
    def swap(values: Any) -> None:
        vocabulary = values["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    a, b = (json.loads((sides[0] / "tokenizer.json").read_text())["model"]["vocab"][token] for token in "ab")
    assert a < b
    change(sides[0] / "tokenizer.json", swap)
    (difference,) = differences(sides)
    assert tells(difference, f"tokenizer.json: id {a}", '"b"', '"a"', "2 of 300")


def test_a_token_more_is_told(sides: Sides) -> None:
    token = {
        "id": 300,
        "content": "<pad>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    change(sides[0] / "tokenizer.json", lambda values: values["added_tokens"].append(token))
    (difference,) = differences(sides)
    assert tells(difference, "tokenizer.json: id 300", '"<pad>"', "no token", "1 of 301")


TEXTS = re.compile(r"; \d+ of \d+ texts differ$")


def test_the_same_tokens_cut_otherwise_are_told(sides: Sides) -> None:
    """Without the first merge no text has its token; the vocabulary is the same."""
    tokenizer = Tokenizer.from_file(str(sides[1] / "tokenizer.json"))
    change(sides[0] / "tokenizer.json", lambda values: values["model"].update(merges=[]))
    (sentence,) = differences(sides)
    text = json.loads(sentence.split("the text ")[1].split(", encoded")[0])
    right = tokenizer.encode(text, add_special_tokens=False).ids
    bytes_of_text = Tokenizer.from_file(str(sides[0] / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    place = next(n for n, (one, other) in enumerate(zip(bytes_of_text, right, strict=False)) if one != other)
    assert TEXTS.sub("", sentence) == (
        f"tokenizer.json: the text {json.dumps(text)}, encoded without special tokens, is {bytes_of_text[place:]} in "
        "the package, "
        f"from token {place} on; must be {right[place:]}"
    )


def test_a_text_that_starts_without_its_token_is_told(sides: Sides) -> None:
    change(sides[0] / "tokenizer.json", put("post_processor", None))
    (sentence,) = differences(sides)
    start = (
        'tokenizer.json: the text "", encoded with special tokens, is [] in the package, from token 0 on; must be [0]'
    )
    assert TEXTS.sub("", sentence) == start


def test_a_decoder_that_gives_other_text_is_told(sides: Sides) -> None:
    change(sides[0] / "tokenizer.json", put("decoder", {"type": "Fuse"}))
    (sentence,) = differences(sides)
    assert (
        TEXTS.sub("", sentence)
        == 'tokenizer.json: ids decoded with special tokens are the text "<s>\\u0120" in the package; must be "<s> "'
    )


def test_a_special_token_that_is_an_ordinary_one_is_told(sides: Sides) -> None:
    change(sides[0] / "tokenizer_config.json", put("eos_token", "x"))
    change(sides[0] / "tokenizer.json", lambda values: values["added_tokens"][1].update(special=False))
    vocabulary = json.loads((sides[0] / "tokenizer.json").read_text())["model"]["vocab"]
    sentences = differences(sides)
    assert sentences[-1] == f"tokenizer_config.json: the id of eos_token is {vocabulary['x']}; must be 1"
    assert len(sentences) == 2
    assert sentences[0].startswith("tokenizer.json: ids decoded without special tokens are the text ")


@pytest.mark.parametrize(
    ("ours", "right", "sentence"),
    [
        ("{{ x }}", None, 'is "{{ x }}"; must be none'),
        (None, "{{ x }}", 'is not set; must be "{{ x }}"'),
        ("{% if a %}", "{% if b %}", 'is "a %}"; must be "b %}" from character 6 on'),
    ],
)
def test_another_chat_template_is_told(sides: Sides, ours: str | None, right: str | None, sentence: str) -> None:
    for directory, template in zip(sides, (ours, right), strict=True):
        if template is not None:
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert differences(sides) == [f"chat_template.jinja or tokenizer_config.json: chat_template {sentence}"]


def test_code_beside_a_tokenizer_is_not_run(sides: Sides) -> None:
    for directory in sides:
        (directory / "code.py").write_text(f"open({str(directory / 'was_run')!r}, 'w')\n", encoding="utf-8")
        change(directory / "tokenizer_config.json", put("auto_map", {"AutoTokenizer": [None, "code.Mine"]}))
        change(directory / "config.json", put("auto_map", {"AutoConfig": "code.Config"}))
    check_files(*sides)
    assert not any((directory / "was_run").exists() for directory in sides)


# The configs.


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        ("eos_token_id", 7, "eos_token_id is 7; must be 1"),
        ("eos_token_id", [1, 7], "eos_token_id is [1, 7]; must be 1"),
        ("eos_token_id", ..., "eos_token_id is not set; must be 1"),
        ("bos_token_id", 5, "bos_token_id is 5; must be 0"),
        ("pad_token_id", 5, "pad_token_id is 5; must be none"),
        ("temperature", 0.5, "temperature is 0.5; must be left out"),
        ("do_sample", True, "do_sample is true; must be left out"),
        ("repetition_penalty", 1.25, "repetition_penalty is 1.25; must be left out"),
        ("top_k", 0, "top_k is 0; must be left out"),
        ("use_cache", False, "use_cache is false; must be true"),
        ("\x1b[31m\n", 1, "\\u001b[31m\\n is 1; must be left out"),
    ],
)
def test_other_settings_of_generation_are_told(sides: Sides, where: str, value: Any, sentence: str) -> None:
    change(sides[0] / "generation_config.json", put(where, value))
    assert differences(sides) == [f"generation_config.json: {sentence}"]


def test_a_setting_that_only_the_checkpoint_has_is_told(sides: Sides) -> None:
    change(sides[1] / "generation_config.json", put("top_p", 0.75))
    assert differences(sides) == ["generation_config.json: top_p is not set; must be 0.75"]


def test_a_package_that_ends_at_fewer_tokens_than_the_checkpoint_is_told(sides: Sides) -> None:
    """The ends of text in generation_config.json count, not the one in config.json."""
    for directory in sides:
        change(directory / "generation_config.json", put("eos_token_id", [7, 1]))
    assert differences(sides) == ["genai_config.json: model.eos_token_id is 1; must be [1, 7]"]


def test_without_the_checkpoint_s_generation_config_its_config_says_where_text_ends(sides: Sides) -> None:
    (sides[1] / "generation_config.json").unlink()
    assert check_files(*sides) == FilesCheck(compared=ALL)
    change(sides[0] / "generation_config.json", put("eos_token_id", 7))
    assert differences(sides) == ["generation_config.json: eos_token_id is 7; must be 1"]


@pytest.mark.parametrize(
    ("field", "right"),
    [
        ("vocab_size", 300),
        ("hidden_size", 32),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 8),
        ("max_position_embeddings", 256),
        ("bos_token_id", 0),
        ("eos_token_id", 1),
    ],
)
def test_another_number_in_the_config_is_told(sides: Sides, field: str, right: int) -> None:
    change(sides[0] / "config.json", put(field, 123))
    assert differences(sides) == [f"config.json: {field} is 123; must be {right}"]


def test_another_architecture_and_a_number_left_out_are_told(sides: Sides) -> None:
    change(sides[0] / "config.json", put("model_type", "llama"))
    change(sides[0] / "config.json", put("vocab_size", ...))
    assert differences(sides) == [
        'config.json: model_type is "llama"; must be "mixtral"',
        "config.json: vocab_size is not set; must be 300",
    ]


def test_what_the_checkpoint_leaves_out_is_what_its_class_takes(sides: Sides) -> None:
    """Mixtral has 8 heads for keys and values unless its config says otherwise."""
    change(sides[1] / "config.json", put("num_key_value_heads", ...))
    assert "config.json: num_key_value_heads is 2; must be 8" in differences(sides)


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        ("model.vocab_size", 123, "is 123; must be 300"),
        ("model.vocab_size", ..., "is not set; must be 300"),
        ("model.decoder.hidden_size", 33, "is 33; must be 32"),
        ("model.decoder.num_hidden_layers", 1, "is 1; must be 2"),
        ("model.decoder.num_attention_heads", 2, "is 2; must be 4"),
        ("model.decoder.num_key_value_heads", 4, "is 4; must be 2"),
        ("model.decoder.head_size", 16, "is 16; must be 8"),
        ("model.context_length", 512, "is 512; must be at most 256, the checkpoint's max_position_embeddings"),
        ("model.context_length", "256", 'is "256"; must be at most 256, the checkpoint\'s max_position_embeddings'),
        ("model.eos_token_id", 7, "is 7; must be 1"),
        ("model.eos_token_id", [1, 7], "is [1, 7]; must be 1"),
        ("model.eos_token_id", [], "is []; must be 1"),
        ("model.bos_token_id", 7, "is 7; must be 0"),
        ("model.pad_token_id", 7, "is 7; must be 1"),
        ("model.type", ..., 'is not set; must be a kind of model that onnxruntime-genai knows, such as "decoder"'),
        ("model.decoder.filename", "decoder.onnx", 'is "decoder.onnx"; must be "model.onnx", the file of the graph'),
        ("model.decoder.filename", "x" * 300, f'is "{"x" * 59}…; must be "model.onnx", the file of the graph'),
        ("model.decoder.inputs.past_key_names", "past.%d.key", 'is "past.%d.key"; must be "past_key_values.%d.key"'),
        (
            "model.decoder.inputs.past_key_names",
            "past_key_values.%d.value",
            'is "past_key_values.%d.value"; must be "past_key_values.%d.key"',
        ),
        ("model.decoder.outputs.logits", 1, 'is 1; must be "logits"'),
        (
            "model.decoder.inputs.position_ids",
            "position_ids",
            'is "position_ids"; must be among the graph\'s inputs, which have no "position_ids"',
        ),
        (
            "model.decoder.outputs.states",
            "hidden.%d",
            'is "hidden.%d"; must be among the graph\'s outputs, which have no "hidden.0"',
        ),
        ("model.decoder.outputs", [1], "is [1]; must be an object of names"),
        ("search.max_length", 257, "is 257; must be at most 256, model.context_length"),
        ("search.past_present_share_buffer", False, "is false; must be true: the graph has GroupQueryAttention"),
        ("search.past_present_share_buffer", "yes", 'is "yes"; must be true or false'),
    ],
)
def test_another_value_in_genai_s_config_is_told(sides: Sides, where: str, value: Any, sentence: str) -> None:
    change(sides[0] / "genai_config.json", put(where, value))
    assert differences(sides) == [f"genai_config.json: {where} {sentence}"]


def test_more_layers_than_the_graph_has_are_told_for_each_name(sides: Sides) -> None:
    change(sides[0] / "genai_config.json", put("model.decoder.num_hidden_layers", 10**12))
    assert differences(sides) == [
        "genai_config.json: model.decoder.num_hidden_layers is 1000000000000; must be 2",
        *(
            f'genai_config.json: model.decoder.{side}.{stem}_{kind}_names is "{name}.%d.{kind}"; must be among the '
            f"graph's {side}, "
            f'which have no "{name}.2.{kind}"'
            for side, stem, name in (("inputs", "past", "past_key_values"), ("outputs", "present", "present"))
            for kind in ("key", "value")
        ),
    ]


def test_another_graph_than_the_one_that_is_judged_is_told(sides: Sides) -> None:
    shutil.copyfile(sides[0] / MODEL_NAME, sides[0] / "other.onnx")
    change(sides[0] / "genai_config.json", put("model.decoder.filename", "other.onnx"))
    assert differences(sides) == [
        'genai_config.json: model.decoder.filename is "other.onnx"; must be "model.onnx", the file of the graph'
    ]


def test_a_buffer_cannot_be_shared_without_an_operator_that_does(foreign: Sides) -> None:
    """Another maker may leave it off, which is slower and right; on without the operator is wrong."""
    change(foreign[0] / "genai_config.json", put("search.past_present_share_buffer", False))
    assert check_files(*foreign).passed
    change(foreign[0] / "genai_config.json", put("search.past_present_share_buffer", True))
    assert check_files(*foreign).passed
    model = onnx.load(foreign[0] / MODEL_NAME, load_external_data=False)
    for node in model.graph.node:
        node.op_type = node.op_type.replace("GroupQueryAttention", "MultiHeadAttention")
    onnx.save(model, foreign[0] / MODEL_NAME)
    sentence = "search.past_present_share_buffer is true; must be false: the graph has no GroupQueryAttention"
    assert differences(foreign) == [f"genai_config.json: {sentence}"]


# Files that are not there, or damaged.


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_file_that_our_package_lacks_is_a_difference(sides: Sides, file: str) -> None:
    (sides[0] / file).unlink()
    found = check_files(*sides)
    assert found.differences == (f"{file}: is not in the package; must be the checkpoint's; copy it",)
    assert found.missing == (f"{file}: not in the package",)
    assert found.compared == tuple(name for name in ALL if name != file)


def test_a_package_of_another_maker_may_lack_files_but_not_both_configs(foreign: Sides) -> None:
    for file in ("tokenizer.json", "generation_config.json", "config.json"):
        (foreign[0] / file).unlink()
    missing = tuple(
        f"{file}: not in the package" for file in ("tokenizer.json", "generation_config.json", "config.json")
    )
    assert check_files(*foreign) == FilesCheck(("genai_config.json",), missing)
    (foreign[0] / "genai_config.json").unlink()
    found = check_files(*foreign)
    assert found.missing == (*missing, "genai_config.json: not in the package")
    (difference,) = found.differences
    assert tells(difference, "config.json", "is not in the package", "copy it")


def test_what_the_checkpoint_lacks_is_not_compared(sides: Sides) -> None:
    for directory in sides:
        (directory / "generation_config.json").unlink()
    (sides[1] / "tokenizer.json").unlink()
    missing = (
        "tokenizer.json: not in the checkpoint",
        "generation_config.json: neither in the package nor in the checkpoint",
    )
    assert check_files(*sides) == FilesCheck(("config.json", "genai_config.json"), missing)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
NOT_JSON = "Expecting value: line 1 column 1 (char 0)"


@pytest.mark.parametrize("file", ["generation_config.json", "config.json", "genai_config.json"])
@pytest.mark.parametrize(
    ("text", "reason"), [(POINTER, NOT_JSON), ("[1]", "not a JSON object"), ("[" * 100_000, "RecursionError")]
)
def test_a_damaged_config_is_one_sentence(sides: Sides, file: str, text: str, reason: str) -> None:
    (sides[0] / file).write_text(text, encoding="utf-8")
    (sentence,) = differences(sides)
    assert sentence.startswith(f"{file}: the package's cannot be read ({reason}")
    assert sentence.endswith("); it must be a JSON object")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_one_sentence(sides: Sides, file: str) -> None:
    (sides[0] / file).write_text(POINTER, encoding="utf-8")
    sentence = (
        f"tokenizer.json: the package's tokenizer cannot be read ({file}: {NOT_JSON}); must be the "
        "checkpoint's; copy it"
    )
    assert differences(sides) == [sentence]


def test_a_panic_of_the_tokenizer_is_one_sentence(sides: Sides) -> None:
    """What tokenizers' Rust code raises then is no Exception."""
    change(sides[0] / "tokenizer.json", put("post_processor.special_tokens", {}))
    (sentence,) = differences(sides)
    assert sentence.startswith('tokenizer.json: the text "", encoded with special tokens, is refused (PanicException: ')
    assert "in the package, from token 0 on; must be [0]; " in sentence


def test_an_interrupt_goes_through(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dense2moe.export.parity.files.tokenizer.AutoTokenizer.from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check_files(*sides)


def test_a_damaged_graph_is_one_sentence(sides: Sides) -> None:
    path = sides[0] / MODEL_NAME
    path.write_bytes(path.read_bytes()[:1000])
    (sentence,) = differences(sides)
    assert sentence.startswith("model.onnx: the package's cannot be read (")
    assert sentence.endswith("); it must be an ONNX model")


def test_a_damaged_checkpoint_is_told_as_its_own(sides: Sides) -> None:
    (sides[1] / "tokenizer.json").write_text(POINTER, encoding="utf-8")
    (sides[1] / "generation_config.json").write_text(POINTER, encoding="utf-8")
    assert differences(sides) == [
        f"tokenizer.json: the checkpoint's tokenizer cannot be read (tokenizer.json: {NOT_JSON}); it must be one "
        "that transformers can load",
        f"generation_config.json: the checkpoint's cannot be read ({NOT_JSON}); it must be a JSON object",
    ]
    (sides[1] / "config.json").write_text(POINTER, encoding="utf-8")
    first, *_ = differences(sides)
    assert first.startswith("config.json: the checkpoint's cannot be read (")
