"""The recipe: what it accepts, how its file is read, and the schema for editors."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from recipe_files import GOOD, load, mistakes, wrong
from told import tells

from dense2moe.convert.errors import RecipeError
from dense2moe.convert.recipe.loading import load_recipe, resolve_path
from dense2moe.convert.recipe.records import HubSource, LocalSource, Recipe
from dense2moe.convert.recipe.schema import make_schema
from dense2moe.export.errors import ExportError
from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.data.config import DataConfig, PythonDocsData, TextData
from dense2moe.upcycle.training.config import FinetuneConfig


@pytest.fixture(autouse=True)
def _inside_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# What a recipe holds


def test_settings_left_out_are_those_of_the_stages():
    assert load(GOOD).recipe == Recipe(
        name=None,
        seed=0,
        source=LocalSource(path="dense"),
        data=DataConfig(source=PythonDocsData(kind="python-docs")),
        upcycle=UpcycleConfig(),
        finetune=FinetuneConfig(),
        variants=("float32", "int8", "int4"),
        quantize=QuantizeConfig(),
        export=OnnxConfig(),
        parity=ParityConfig(),
    )


def test_given_settings_reach_their_records():
    text = """\
source: dense
seed: 7
data:
  source:
    kind: text
    train: [a.txt, "b/*.txt"]
upcycle: {num_experts: 4, router: {logit_std: 0.5}}
variants: [int4]
parity: {max_perplexity_increase: {int4: 0.1}}
"""
    recipe = load(text).recipe
    assert recipe.seed == 7
    assert recipe.data.source == TextData(kind="text", train=("a.txt", "b/*.txt"))
    assert (recipe.upcycle.num_experts, recipe.upcycle.router.logit_std) == (4, 0.5)
    assert recipe.variants == ("int4",)
    assert recipe.parity.max_perplexity_increase == {"int4": 0.1}


@pytest.mark.parametrize(
    ("written", "source"),
    [
        ("a/b", LocalSource(path="a/b")),
        ("{path: a/b}", LocalSource(path="a/b")),
        ("{hub: org/name}", HubSource(hub="org/name", revision="main")),
        ("{hub: gpt2, revision: v1.0}", HubSource(hub="gpt2", revision="v1.0")),
    ],
)
def test_a_source_is_a_path_or_a_hub_id(written, source):
    assert load(f"source: {written}\ndata: {{source: {{kind: python-docs}}}}\n").recipe.source == source


def test_the_shorthand_works_in_python_as_in_yaml():
    data = DataConfig(source=PythonDocsData(kind="python-docs"))
    assert Recipe(source="dense", data=data) == Recipe(source=LocalSource(path="dense"), data=data)


def test_a_dumped_recipe_is_the_same_recipe():
    recipe = load("source: {hub: o/n}\n" + GOOD.split("\n")[1]).recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_the_name_is_the_files_unless_it_is_given():
    assert load(GOOD).name == "r"
    assert load(GOOD + "name: mine\n").name == "mine"


def test_the_text_and_path_are_kept():
    loaded = load(GOOD)
    assert (loaded.text, loaded.path) == (GOOD, Path("r.yaml"))


def test_records_are_frozen():
    loaded = load(GOOD)
    with pytest.raises(ValidationError, match="frozen"):
        loaded.recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        loaded.recipe.source.path = "other"
    with pytest.raises(AttributeError):
        loaded.name = "other"


# YAML


@pytest.mark.parametrize("written", ["1e-5", "1e-05", "1E-5", "1.0e-5", ".1e-4", "0.00001", "+1e-5"])
def test_numbers_with_exponents_are_floats(written):
    assert load(GOOD + f"finetune: {{learning_rate: {written}}}\n").recipe.finetune.learning_rate == 1 / 100_000


@pytest.mark.parametrize("written", ["on", "yes", "No", "y", "1_000", "1x30", "0b11", "2024-01-01"])
def test_what_yaml_1_1_would_convert_stays_a_string(written):
    assert load(GOOD + f"name: {written}\n").recipe.name == written


def test_a_version_directive_changes_nothing():
    assert load("%YAML 1.1\n---\n" + GOOD + "name: on\n").recipe.name == "on"


@pytest.mark.parametrize(("written", "number"), [("012", 12), ("0x1F", 31), ("0o17", 15), ("+3", 3)])
def test_integers_are_those_of_yaml_1_2(written, number):
    assert load(GOOD + f"seed: {written}\n").recipe.seed == number


def test_quotes_make_a_string():
    assert load(GOOD + "name: '12'\n").recipe.name == "12"
    assert mistakes(GOOD + "seed: '12'\n") == [wrong("seed", "'12' (a string)", "an integer")]


def test_an_alias_repeats_its_anchor():
    recipe = load(
        "source: dense\ndata: {source: {kind: python-docs}, max_test_tokens: &n 4096, max_validation_tokens: *n}\n"
    ).recipe
    assert (recipe.data.max_test_tokens, recipe.data.max_validation_tokens) == (4096, 4096)


def test_an_anchor_may_be_reused():
    assert load(GOOD + "seed: &a 1\nname: &a mine\n").recipe.seed == 1


def test_a_byte_order_mark_is_no_mistake():
    assert load(b"\xef\xbb\xbf" + GOOD.encode()).recipe == load(GOOD).recipe


BOMB = "b0: &b0 [x, x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 64))
TOO_LARGE = "r.yaml: has more than 10000 values or 20 levels, aliases counted; must be a smaller recipe"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: is empty; must have the keys source and data"),
        ("# nothing\n", "r.yaml: is empty; must have the keys source and data"),
        ("# a list\n- 1\n", "r.yaml:2: is a list at the top level; must be a mapping with the keys source and data"),
        ("words\n", "r.yaml:1: is a single value at the top level; must be a mapping with the keys source and data"),
        ("a: b: c\n", "r.yaml:1: column 5: is not YAML: mapping values are not allowed here"),
        (
            "a:\n\tb: 1\n",
            r"r.yaml:2: column 1: is not YAML: while scanning for the next token, found character '\t' that cannot "
            r"start any token",
        ),
        (
            "a: 1\n---\nb: 1\n",
            "r.yaml:2: column 1: is not YAML: expected a single document in the stream, but found another document",
        ),
        ("a: *b\n", "r.yaml:1: column 4: is not YAML: found undefined alias 'b'"),
        ("a: 1\nb: \a\n", "r.yaml:2: has the character 0x7; YAML allows no such character"),
        (
            'a: 1\nb: "\\ud83d"\n',
            r"r.yaml:2: has half a character, '\ud83d'; must have both halves, or the character itself",
        ),
        (
            '"\\ude00\\ud83d": 1\n',
            r"r.yaml:1: has half a character, '\ude00\ud83d'; must have both halves, or the character itself",
        ),
        (b"a: 1\nb: \xff\n", "r.yaml:2: is not UTF-8 (byte 0xff); save it as UTF-8"),
        ("a: 1\n? [1]\n: 2\n", "r.yaml:2: has a key that is no word; must have words for keys"),
        (
            "a: !python/name:os.system x\n",
            "r.yaml:1: has the tag '!python/name:os.system', which does not fit; remove the tag",
        ),
        ("a: !!int x\n", "r.yaml:1: has the tag 'tag:yaml.org,2002:int', which does not fit; remove the tag"),
        ("a: !!set {b}\n", "r.yaml:1: has the tag 'tag:yaml.org,2002:set', which does not fit; remove the tag"),
        (BOMB, TOO_LARGE),
        ("a: &a [*a]\n", TOO_LARGE),
        ("[" * 100_000, TOO_LARGE),
        ("#" * 100_001, "r.yaml: is larger than 100000 bytes; must be a recipe"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) or len(value) > 40 else None,
)
def test_what_is_no_recipe_at_all_is_one_line(text, message):
    assert mistakes(text) == [message]


def test_a_character_that_json_escapes_in_two_halves_is_one():
    assert load(GOOD.replace("dense", '"\\ud83d\\ude00"')).recipe.source == LocalSource(path="\U0001f600")


def test_a_file_that_cannot_be_read_is_one_line():
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("absent.yaml"))
    assert str(caught.value) == "absent.yaml: cannot be read: No such file or directory; give the path of a recipe"


def test_a_key_given_twice_is_refused_with_both_lines():
    assert mistakes(GOOD + "seed: 1\nname: a\nseed: 2\n") == [
        "r.yaml:3: seed: is given again at line 5; must be given once"
    ]


def test_a_key_given_twice_in_a_section_is_refused():
    text = GOOD + "finetune:\n  steps: 30\n  steps: 30\n"
    (mistake,) = mistakes(text)
    assert tells(mistake, "r.yaml:4: finetune.steps", "again", "line 5")


# Paths


def test_a_path_is_looked_up_beside_the_recipe_before_the_current_directory(tmp_path):
    recipe = tmp_path / "recipes" / "r.yaml"
    (tmp_path / "dense").mkdir()
    recipe.parent.mkdir()
    assert resolve_path("dense", recipe, "r.yaml:1: source") == tmp_path / "dense"
    (recipe.parent / "dense").mkdir()
    assert resolve_path("dense", recipe, "r.yaml:1: source") == recipe.parent / "dense"


def test_an_absolute_path_is_itself(tmp_path):
    assert resolve_path(str(tmp_path), Path("elsewhere/r.yaml"), "r.yaml:1: source") == tmp_path


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "dense").mkdir()
    assert resolve_path("~/dense", Path("r.yaml"), "r.yaml:1: source") == tmp_path / "dense"


def test_a_path_that_is_nowhere_names_each_place_tried_once(tmp_path):
    places = {
        "recipes/r.yaml": f"{tmp_path}/recipes/nowhere and {tmp_path}/nowhere",
        "r.yaml": f"{tmp_path}/nowhere",
    }
    for recipe, tried in places.items():
        with pytest.raises(RecipeError) as caught:
            resolve_path("nowhere", Path(recipe), "r.yaml:1: source")
        assert str(caught.value) == f"r.yaml:1: source: 'nowhere' is not there; looked for {tried}; correct the path"


def test_an_unknown_user_is_one_line():
    with pytest.raises(RecipeError) as caught:
        resolve_path("~no-such-user/dense", Path("r.yaml"), "r.yaml:1: source")
    assert str(caught.value) == (
        "r.yaml:1: source: '~no-such-user/dense' names no home directory; give the path in full"
    )


# The schema for editors


def test_the_schema_describes_every_setting_of_the_recipe():
    written = json.loads(json.dumps(make_schema()))
    assert written["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert written["title"] == "Recipe of dense2moe"
    assert list(written["properties"]) == list(Recipe.model_fields)
    assert written["required"] == ["source", "data"]
    assert written["additionalProperties"] is False
    for name in ("LocalSource", "HubSource"):
        assert all(setting["description"] for setting in written["$defs"][name]["properties"].values())
    assert all(setting["description"] for setting in written["properties"].values())


def test_the_schema_knows_the_shorthand_and_the_defaults_of_the_stages():
    properties = make_schema()["properties"]
    branches = properties["source"]["anyOf"]
    assert branches == [
        {"minLength": 1, "type": "string"},
        {"$ref": "#/$defs/LocalSource"},
        {"$ref": "#/$defs/HubSource"},
    ]
    assert properties["finetune"]["default"] == FinetuneConfig().model_dump(mode="json")
    assert properties["variants"]["uniqueItems"] is True


def test_the_schema_agrees_with_the_loader():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(make_schema())
    validator = jsonschema.Draft202012Validator(make_schema())
    data = {"source": {"kind": "python-docs"}}
    good = [
        {"source": source, "data": data} for source in ("dense", {"path": "dense"}, {"hub": "o/n", "revision": "v1"})
    ]
    good += [{"source": "dense", "data": data, "finetune": {"stages": [{"train": "last-2"}, {"train": "all"}]}}]
    good += [
        {"source": "dense", "data": data, "upcycle": {"layers": layers}}
        for layers in ("all", "last-half", "every-2", [0, 3])
    ]
    limits = (
        {"budget": "0.6 GB"},
        {"budget": 600_000_000},
        {"max_perplexity_increase": "1 %"},
        {"max_perplexity_increase": 0.01},
    )
    good += [{"source": "dense", "data": data, "variants": ["mixed"], "quantize": limit} for limit in limits]
    bad = [
        {"data": data},
        {"source": {"path": "a", "hub": "b"}, "data": data},
        {"source": "dense", "data": {"source": {"kind": "txt"}}},
        {"source": "dense", "data": data, "seed": "1"},
        {"source": "dense", "data": data, "upcycle": {"topk": 2}},
        {"source": "dense", "data": data, "variants": ["int8", "int8"]},
        {"source": "", "data": data},
        {"source": "dense", "data": data, "finetune": {"train": "last-0"}},
        {"source": "dense", "data": data, "finetune": {"stages": [{"train": "everything"}]}},
        *(
            {"source": "dense", "data": data, "upcycle": {"layers": layers}}
            for layers in ("half", "every-0", [], [1, 1], [-1])
        ),
        {"source": "dense", "data": data, "upcycle": {"num_experts": 1_000_000}},
        {"source": "dense", "data": data, "upcycle": {"router": {"kind": "kmeans", "domains": [{}]}}},
        *(
            {"source": "dense", "data": data, "variants": ["mixed"], "quantize": {"budget": size}}
            for size in ("0.6", "1 gb", "GB", 0, -1)
        ),
        *(
            {"source": "dense", "data": data, "variants": ["mixed"], "quantize": {"max_perplexity_increase": share}}
            for share in ("1", "%", -0.1)
        ),
    ]
    for values in good:
        assert validator.is_valid(values)
        Recipe.model_validate(values)
    for values in bad:
        assert not validator.is_valid(values)
        with pytest.raises(ValidationError):
            Recipe.model_validate(values)


# Lines


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data.block_size: is 9", "r.yaml:3: data.block_size: is 9"),
        ("data.source.train[1]: 'b' matches no file", "r.yaml:7: data.source.train[1]: 'b' matches no file"),
        ("data.max_test_tokens is 5; raise it", "r.yaml:2: data.max_test_tokens is 5; raise it"),  # of its record
        ("finetune: the loss is NaN", "finetune: the loss is NaN"),  # not in the file
        ("data.txt/source: no such file", "data.txt/source: no such file"),
        ("data.txt: no such file", "data.txt: no such file"),
        ("/a/data: is a file", "/a/data: is a file"),
        ("database is full", "database is full"),
    ],
)
def test_a_refusal_that_begins_with_a_key_tells_its_line(text, told, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "source: dense\ndata:\n  block_size: 64\n  source:\n    kind: text\n    train: [a,\n      b]\n",
        encoding="utf-8",
    )
    with pytest.raises(ExportError) as caught, load_recipe(path).telling_lines():
        raise ExportError(text)
    assert str(caught.value).replace(f"{tmp_path}/", "") == told
