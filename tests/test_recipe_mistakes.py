"""Every mistake in a recipe, in the words that the user reads."""

from pathlib import Path

import pytest
from families import SPARSE
from pydantic import BaseModel, ValidationError
from recipe_files import GOOD, load, mistakes, unknown, wrong
from told import tells

from dense2moe.convert.errors import RecipeError
from dense2moe.convert.recipe.loading import load_recipe
from dense2moe.convert.recipe.records import Recipe
from dense2moe.convert.recipe.refusals import list_records
from dense2moe.convert.recipe.suggestions import ALIASES
from dense2moe.upcycle.data.config import DataConfig, DomainsData, HubData, PythonDocsData, TextData, name_domains
from dense2moe.upcycle.data.python_docs import DOMAINS
from dense2moe.upcycle.training.config import Distillation, FinetuneConfig


@pytest.fixture(autouse=True)
def _inside_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Unknown and missing keys


@pytest.mark.parametrize(
    ("section", "given", "meant"),
    [
        ("upcycle", "topk", "num_experts_per_tok"),
        ("upcycle", "top_k", "num_experts_per_tok"),
        ("upcycle", "top-k", "num_experts_per_tok"),
        ("upcycle", "k", "num_experts_per_tok"),
        ("upcycle", "num_experts_per_token", "num_experts_per_tok"),
        ("upcycle", "E", "num_experts"),
        ("upcycle", "num_expert", "num_experts"),
        ("upcycle", "n_experts", "num_experts"),
        ("finetune", "lr", "learning_rate"),
        ("finetune", "learning-rate", "learning_rate"),
        ("finetune", "epochs", "steps"),
        ("finetune", "stpes", "steps"),
        ("quantize", "group_size", "block_size"),
        ("parity", "max_KL", "max_kl"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(section, given, meant):
    assert mistakes(GOOD + f"{section}:\n  {given}: 1\n") == [unknown(f"{section}.{given}", meant, line=4)]


KINDS = (
    "'python-docs', 'installed', 'text', 'hub', 'domains', 'table', 'conll', 'images', 'digits', 'hub-table', "
    "'sentences', 'hub-sentences', 'tasks' "
    "or 'chats'"
)


def test_an_unknown_section_names_the_one_that_was_meant():
    assert mistakes(GOOD + "training: {}\n") == ["r.yaml:3: training: unknown key; did you mean 'finetune'?"]


def test_a_key_like_no_other_lists_the_keys():
    assert mistakes(GOOD + "export: {zzz: 1}\n") == [
        "r.yaml:3: export.zzz: unknown key; the keys here are device, lowering, request, activation_bits, "
        "exact_products"
    ]


def test_a_number_of_experts_under_experts_names_num_experts():
    (mistake,) = mistakes(GOOD + "upcycle: {experts: 8}\n")
    assert tells(mistake, "r.yaml:3: upcycle.experts", 8, "kind, granularity", "'num_experts'")


def test_mistakes_in_a_list_of_domains_are_placed_at_their_item():
    text = "upcycle:\n  router:\n    kind: prototypes\n    domains:\n      - {prompts: []}\n      - {file: a}\n"
    assert mistakes(GOOD + text) == [
        "r.yaml:7: upcycle.router.domains[0]: has no text; must have prompts or files",
        unknown("upcycle.router.domains[1].file", "files", line=8),
    ]


@pytest.mark.parametrize(
    ("upcycle", "mistake"),
    [
        ("{layers: every2}", "layers: is 'every2'; must be all, last-half, every-N, or a list of layer numbers from 0"),
        ("{layers: [0, x]}", "layers: is [0, 'x']; must be all, last-half, every-N, or a list of layer numbers from 0"),
        ("{layers: [1, 1]}", "layers: names a layer twice; must name each once"),
        (
            "{target: bert}",
            f"target: is 'bert'; must be 'auto', {', '.join(map(repr, SPARSE))} or 'mixture'",
        ),
        (
            "{target: nllb-moe}",
            "target: is 'nllb-moe', which is no target: whatever its routers say, it sends every token to experts 0 "
            "and 1; leave it out, or name another",
        ),
        (
            "{experts: {kind: granular}}",
            "experts: kind 'granular' has no granularity; must say how many experts one copy of the FFN is cut into",
        ),
        (
            "{experts: {granularity: 2}}",
            "experts: kind 'copies' has a granularity; must be kind 'granular' to have one",
        ),
        ("{experts: {drop: 1}}", "experts.drop: is 1; must be less than 1.0"),
        (
            "{num_experts: 6, num_experts_per_tok: 4, experts: {kind: granular, granularity: 4}}",
            ": num_experts is 6; it must be a multiple of experts.granularity, which is 4",
        ),
        (
            "{router: {kind: ridge, domains: [{prompts: [a]}]}}",
            "router: kind 'ridge' has 1 domain; must have 2 or more, or none to take the data's",
        ),
        (
            "{router: {kind: ridge, domains: [{prompts: [a]}, {prompts: [b]}, {prompts: [c]}]}}",
            ": router.domains has 3 domains; they must divide the 8 router rows evenly",
        ),
    ],
)
def test_a_setting_of_upcycling_that_cannot_be_is_one_line(upcycle, mistake):
    assert mistakes(GOOD + f"upcycle: {upcycle}\n") == [f"r.yaml:3: upcycle.{mistake}".replace(".:", ":")]


def test_every_key_in_the_table_of_aliases_exists():
    def all_keys(record: type[BaseModel]) -> set[str]:
        below = [all_keys(inner) for field in record.model_fields.values() for inner in list_records(field.annotation)]
        return set(record.model_fields).union(*below)

    assert set(ALIASES) - all_keys(Recipe) == set()


def test_a_strange_key_stays_on_one_line():
    first, second = mistakes(GOOD + '"a\\nb": 1\n<<: {seed: 1}\n')
    assert tells(first, r"r.yaml:3: 'a\nb'", "name, seed, source")
    assert tells(second, "r.yaml:4: '<<'", "name, seed, source")


def test_missing_sections_say_what_they_hold():
    assert mistakes("seed: 1\n") == [
        "r.yaml: source: missing; must be a directory, or a mapping with 'path' or 'hub'",
        "r.yaml: data: missing; must be a mapping of the keys source, block_size, stride, max_train_tokens, "
        "max_validation_tokens, max_test_tokens, max_train_examples, max_validation_examples, max_test_examples",
    ]


def test_a_missing_setting_is_placed_at_its_section():
    text = "source: dense\ndata:\n  block_size: 64\n"
    assert mistakes(text) == [f"r.yaml:2: data.source: missing; must be a mapping whose kind is {KINDS}"]


def test_a_missing_setting_is_described():
    text = "source: dense\ndata:\n  source: {kind: text}\n"
    assert mistakes(text) == ["r.yaml:3: data.source.train: missing; must be given: Files or globs, UTF-8."]


def test_an_empty_section_is_refused():
    assert mistakes(GOOD + "quantize:\n") == [
        "r.yaml:3: quantize: is empty; must be a mapping of the keys method, calibration_tokens, "
        "calibrate_all_experts, input_scaling, "
        "correct_routers, activation_range, block_size, zero_points, attention_bits, embedding_bits, "
        "head_bits, overrides, budget, max_perplexity_increase, search_tokens"
    ]


# Types and ranges


@pytest.mark.parametrize(
    ("line", "key", "value", "must"),
    [
        ("finetune: {steps: many}", "finetune.steps", "'many' (a string)", "an integer"),
        ("finetune: {steps: 20.0}", "finetune.steps", "20.0 (a number)", "an integer"),
        ("finetune: {steps: true}", "finetune.steps", "true (a boolean)", "an integer"),
        ("finetune: {steps: }", "finetune.steps", "empty", "an integer"),
        ("finetune: {learning_rate: [1]}", "finetune.learning_rate", "a list", "a number"),
        ("finetune: {control: yes}", "finetune.control", "'yes' (a string)", "true or false"),
        ("finetune: {precision: fp16}", "finetune.precision", "'fp16'", "'auto', 'float32' or 'bfloat16'"),
        ("finetune: {learning_rate: 0}", "finetune.learning_rate", "0", "greater than 0.0"),
        ("finetune: {learning_rate: .inf}", "finetune.learning_rate", "inf", "finite"),
        ("finetune: {weight_decay: .nan}", "finetune.weight_decay", "nan", "finite"),
        ("finetune: {weight_decay: 1e999}", "finetune.weight_decay", "inf", "finite"),
        ("name: 5", "name", "5 (an integer)", "a string"),
        ("name: a/b", "name", "'a/b'", "of the form ^[A-Za-z0-9_][A-Za-z0-9_.-]*$"),
        ("seed: -1", "seed", "-1", "at least 0"),
        ("seed: 4294967296", "seed", "4294967296", "less than 4294967296"),
        ("upcycle: {num_experts: 0}", "upcycle.num_experts", "0", "greater than 0"),
        ("upcycle: {num_experts: {a: 1}}", "upcycle.num_experts", "a mapping", "an integer"),
        ("parity: {min_routing_agreement: 2}", "parity.min_routing_agreement", "2", "at most 1.0"),
        ("parity: {max_perplexity_increase: 1}", "parity.max_perplexity_increase", "1 (an integer)", "a mapping"),
        ("quantize: {block_size: 33}", "quantize.block_size", "33", "16, 32, 64 or 128"),
        ("quantize: {attention_bits: 4}", "quantize.attention_bits", "4", "'variant', 8 or 16"),
        (
            "export: [fused]",
            "export",
            "a list",
            "a mapping of the keys device, lowering, request, activation_bits, exact_products",
        ),
        ("variants: int8", "variants", "'int8' (a string)", "a list"),
        ("variants: []", "variants", "an empty list", "a list of at least 1 item"),
        (
            "variants: [int8, fp8]",
            "variants[1]",
            "'fp8'",
            "'float32', 'float16', 'bfloat16', 'int8', 'int8-qdq', 'int4' or 'mixed'",
        ),
    ],
)
def test_a_wrong_value_says_what_it_is_and_must_be(line, key, value, must):
    assert mistakes(GOOD + line + "\n") == [wrong(key, value, must)]


def test_a_variant_that_is_given_twice_is_refused():
    assert mistakes(GOOD + "variants: [int8, int4, int8]\n") == [
        "r.yaml:3: variants: has 'int8' more than once; must have each once"
    ]


def test_a_long_value_is_shortened():
    shown = "'xxxxxxxxxxxx...xxxxxxxxxxxxx' (a string)"
    assert mistakes(GOOD + f"seed: {'x' * 1000}\n") == [wrong("seed", shown, "an integer")]


def test_a_message_of_a_stages_own_check_is_passed_on():
    text = GOOD + "upcycle: {num_experts: 2, num_experts_per_tok: 3}\nfinetune: {steps: 5}\n"
    assert mistakes(text) == [
        "r.yaml:3: upcycle: num_experts_per_tok is 3; it must be at most num_experts, which is 2",
        "r.yaml:4: finetune: warmup_steps is 10 by default; it must be fewer than steps, which is 5",
    ]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file():
    text = """\
source: {hub: org/name, rev: main}
data: {source: {kind: python-docs}, block_size: 4}
parity:
  max_perplexity_increase: {int3: 1, int8: low}
upcycle:
  topk: 2
  num_experts: 0
seed: 1
seed: 2
"""
    assert mistakes(text) == [
        unknown("source.rev", "revision", line=1),
        wrong("data.block_size", 4, "at least 8", line=2),
        "r.yaml:4: parity.max_perplexity_increase.int3: unknown key; must be 'float32', 'float16', 'bfloat16', "
        "'int8', 'int8-qdq', 'int4' or 'mixed'",
        wrong("parity.max_perplexity_increase.int8", "'low' (a string)", "a number", line=4),
        unknown("upcycle.topk", "num_experts_per_tok", line=6),
        wrong("upcycle.num_experts", 0, "greater than 0", line=7),
        "r.yaml:8: seed: is given again at line 9; must be given once",
    ]


# Sources: no branch of a union shows in a key


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("5", ["source", "5", "a directory, or a mapping with 'path' or 'hub'"]),
        ("[a, b]", ["source", "a list", "a directory, or a mapping with 'path' or 'hub'"]),
        ("{}", ["source: has neither path nor hub; must have one of them"]),
        ("{path: a, hub: b}", ["source: has both path and hub; must have one of them"]),
        ("''", ["source.path", "''", "at least 1 character"]),
        ("{path: 5}", ["source.path", "5", "a string"]),
        ("{path: a, revision: b}", ["source.revision", "path"]),
        ("{hub: a b}", ["source.hub", "'a b'", "^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?$"]),
        ("{hub: a/b, commit: c}", ["source.commit", "'revision'"]),
    ],
)
def test_a_wrong_checkpoint_is_told_by_its_key(source, told):
    (mistake,) = mistakes(f"source: {source}\ndata: {{source: {{kind: python-docs}}}}\n")
    assert tells(mistake, "r.yaml:1", *told)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "text",
            [
                "data.source",
                "'text'",
                KINDS,
            ],
        ),
        (
            "{train: [a.txt]}",
            [f"data.source.kind: missing; must be {KINDS}"],
        ),
        (
            "{kind: txt}",
            [
                "data.source.kind",
                "'txt'",
                KINDS,
            ],
        ),
        (
            "{kind: [text]}",
            [
                "data.source.kind",
                "a list",
                KINDS,
            ],
        ),
        ("{kind: text, train: a.txt}", ["data.source.train", "'a.txt'", "a list"]),
        ("{kind: text, train: []}", ["data.source.train", "an empty list", "at least 1 item"]),
        ("{kind: text, train: [5]}", ["data.source.train[0]", "5", "a string"]),
        ("{kind: text, train: [a], separator: ''}", ["data.source.separator", "''", "at least 1 character"]),
        ("{kind: text, train: [a], text: b}", ["data.source.text", "'test'"]),
        ("{kind: hub, path: o/n, column: c}", ["data.source.column", "'text_column'"]),
    ],
)
def test_a_wrong_data_source_is_told_by_its_key(source, told):
    (mistake,) = mistakes(f"source: dense\ndata:\n  source: {source}\n")
    assert tells(mistake, "r.yaml:3", *told)


TWO = "source: dense\ndata:\n  source: {kind: domains, domains: "
TEXT = "{kind: text, train: [a.txt]}"


@pytest.mark.parametrize(
    ("domains", "messages"),
    [
        ("{}", ["domains: has 0 keys; must have at least 2"]),
        (f"{{a: {TEXT}}}", ["domains: has 1 key; must have at least 2"]),
        ("[a, b]", ["domains: is a list; must be a mapping"]),
        (f"{{a: x, b: {TEXT}}}", ["domains.a: is 'x' (a string); must be a mapping whose kind is 'text' or 'hub'"]),
        (f"{{a: {TEXT}, b: {{kind: python-docs}}}}", ["domains.b.kind: is 'python-docs'; must be 'text' or 'hub'"]),
        (f"{{a: {TEXT}, b: {{train: [b.txt]}}}}", ["domains.b.kind: missing; must be 'text' or 'hub'"]),
        (f"{{a: {TEXT}, b: {{kind: text}}}}", ["domains.b.train: missing; must be given: Files or globs, UTF-8."]),
        (
            "{a: {kind: text, train: a.txt}, b: {kind: hub, path: o/n, column: c}}",
            [
                "domains.a.train: is 'a.txt' (a string); must be a list",
                "domains.b.column: unknown key; did you mean 'text_column'?",
            ],
        ),
    ],
)
def test_a_wrong_domain_is_told_by_its_name(domains, messages):
    assert mistakes(f"{TWO}{domains}}}\n") == [f"r.yaml:3: data.source.{message}" for message in messages]


def test_domains_are_sources_in_the_order_of_the_file():
    domains = load(f"{TWO}{{z: {TEXT}, a: {{kind: hub, path: o/n}}}}}}\n").recipe.data.source.domains
    assert list(domains.items()) == [
        ("z", TextData(kind="text", train=("a.txt",))),
        ("a", HubData(kind="hub", path="o/n")),
    ]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("{stages: [{}, {trian: router}]}", ["finetune.stages[1].trian", "'train'"]),
        ("{stages: [{lr: 1e-3}]}", ["finetune.stages[0].lr", "'learning_rate'"]),
        ("{stages: [{batch_size: 4}]}", ["finetune.stages[0].batch_size", "keys here", "train, steps, routing"]),
        ("{stages: {train: router}}", ["finetune.stages", "a mapping", "a list"]),
        ("{stages: [router]}", ["finetune.stages[0]", "'router'", "train, steps, routing"]),
        ("{stages: [{steps: many}]}", ["finetune.stages[0].steps", "'many'", "an integer"]),
        ("{stages: [{train: 5}]}", ["finetune.stages[0].train", "5", "a string"]),
        ("{stages: [{routing: domain}]}", ["finetune.stages[0].routing", "'domain'", "'learned' or 'by-domain'"]),
        (
            "{stages: [{schedule: step}]}",
            ["finetune.stages[0].schedule", "'step'", "'cosine', 'linear', 'inverse-sqrt' or 'constant'"],
        ),
        ("{stages: [{learning_rate: 0}]}", ["finetune.stages[0].learning_rate", "0", "greater than 0.0"]),
        (
            "{stages: [{train: last}]}",
            ["finetune: stages[0]: train is 'last'; must be all, experts, router, lora, prompt or last-N"],
        ),
        ("{distillation: true}", ["finetune.distillation", "true", "weight, temperature"]),
        ("{distillation: {weight: 2}}", ["finetune.distillation.weight", "2", "at most 1.0"]),
        ("{distillation: {weight: 0}}", ["finetune.distillation.weight", "0", "greater than 0.0"]),
        ("{distillation: {temperature: cold}}", ["finetune.distillation.temperature", "'cold'", "a number"]),
        ("{distillation: {temperatur: 2}}", ["finetune.distillation.temperatur", "'temperature'"]),
        ("{teacher: {weight: 1}}", ["finetune.teacher", "'distillation'"]),
    ],
)
def test_a_wrong_setting_of_a_stage_or_of_distillation_is_told_by_its_key(settings, told):
    (mistake,) = mistakes(GOOD + f"finetune: {settings}\n")
    assert tells(mistake, "r.yaml:3", *told)


def test_a_stage_has_what_it_gives_and_the_settings_around_the_list():
    text = (
        "finetune: {steps: 50, schedule: linear, distillation: {weight: 0.3}, stages: [{train: router, steps: "
        "20}, {learning_rate: 1e-5}]}\n"
    )
    first, second = load(GOOD + text).recipe.finetune.resolve_phases()
    assert (first.train, first.steps, first.schedule, first.learning_rate) == (
        "router",
        20,
        "linear",
        FinetuneConfig().learning_rate,
    )
    assert (second.train, second.steps, second.schedule, second.learning_rate) == ("all", 50, "linear", 1e-5)
    assert {stage.distillation for stage in (first, second)} == {Distillation(weight=0.3)}
    assert first.stages == second.stages == ()


# Checks across records


@pytest.mark.parametrize(
    ("data", "upcycle", "message"),
    [
        (
            "{kind: text, train: [a]}",
            "{num_experts: 4}",
            "of which the data has 1, must be 2 or more and divide the 4 experts evenly",
        ),
        (
            "{kind: python-docs}",
            "{num_experts: 3}",
            "of which the data has 2, must be 2 or more and divide the 3 experts evenly",
        ),
        (
            f"{{kind: domains, domains: {{a: {TEXT}, b: {TEXT}, c: {TEXT}, d: {TEXT}}}}}",
            "{num_experts: 8, num_experts_per_tok: 4, experts: {kind: granular, granularity: 4}, router: {logit_std: "
            "1}}",
            "of which the data has 4, must be 2 or more and divide the 2 groups of granular experts evenly",
        ),
    ],
)
def test_domains_must_divide_the_experts_of_a_stage_by_domain(data, upcycle, message):
    text = (
        f"source: dense\ndata: {{source: {data}}}\nupcycle: {upcycle}\nfinetune:\n  stages:\n  - {{}}\n  - "
        "{train: experts, routing: by-domain}\n"
    )
    assert mistakes(text) == [f"r.yaml:7: finetune.stages[1].routing: is 'by-domain'; the domains, {message}"]
    assert load(text.replace("by-domain", "learned")).recipe.finetune.stages[1].routing == "learned"
    told = text.replace("train: experts, routing: by-domain", "domain_coefficient: 0.1")
    assert mistakes(told) == [f"r.yaml:7: finetune.stages[1].domain_coefficient: is 0.1; the domains, {message}"]


def test_a_router_from_the_domains_of_the_data_needs_domains_that_divide_the_experts():
    text = "source: dense\ndata: {source: {kind: python-docs}}\nupcycle:\n  num_experts: 3\n  router: {kind: ridge}\n"
    assert mistakes(text) == [
        "r.yaml:5: upcycle.router.kind: is 'ridge' without router.domains; the domains, of which the data has 2, must "
        "be 2 or more and divide the 3 experts evenly"
    ]
    assert load(text.replace("num_experts: 3", "num_experts: 4")).recipe.upcycle.router.kind == "ridge"


@pytest.mark.parametrize("target", ["auto", "mixtral"])
def test_a_rate_for_selection_biases_that_no_gate_has_is_refused(target):
    text = GOOD + f"upcycle: {{target: {target}}}\nfinetune:\n  bias_update_rate: 0.001\n"
    chosen = "'auto' need not choose one" if target == "auto" else "it is 'mixtral'"
    assert mistakes(text) == [
        "r.yaml:5: finetune.bias_update_rate: is 0.001; needs upcycle.target 'glm4_moe', 'ernie4_5_moe' or "
        f"'lfm2_moe', whose gate has a selection bias, and {chosen}; set the target, or leave the rate out"
    ]
    assert load(text.replace("0.001", "0")).recipe.finetune.bias_step == 0
    assert load(text.replace(target, "glm4_moe")).recipe.finetune.bias_step == 0.001
    assert load(GOOD).recipe.finetune.bias_step == 0.001


def test_the_domains_of_every_source_are_counted():
    two = DomainsData(kind="domains", domains={name: TextData(kind="text", train=("a",)) for name in "ab"})
    assert name_domains(PythonDocsData(kind="python-docs")) == DOMAINS
    assert [
        len(name_domains(source))
        for source in (TextData(kind="text", train=("a",)), HubData(kind="hub", path="p"), two)
    ] == [1, 1, 2]


def test_every_split_must_have_room_for_one_block():
    text = "source: dense\ndata:\n  source: {kind: python-docs}\n  block_size: 64\n"
    limits = ("max_train_tokens", "max_validation_tokens", "max_test_tokens")
    assert mistakes(text + "".join(f"  {limit}: 63\n" for limit in limits)) == [
        f"r.yaml:{line}: data.{limit}: is 63; must be at least data.block_size, which is 64, to hold one block"
        for line, limit in enumerate(limits, 5)
    ]
    assert load(text + "".join(f"  {limit}: 64\n" for limit in limits)).recipe.data.max_train_tokens == 64


def test_decode_steps_must_leave_a_prompt_in_a_block():
    text = "source: dense\ndata: {source: {kind: python-docs}, block_size: 16}\nparity:\n  decode_steps: "
    assert mistakes(text + "16\n") == [
        "r.yaml:4: parity.decode_steps: is 16; must be less than data.block_size, which is 16, to leave a prompt"
    ]
    assert load(text + "15\n").recipe.parity.decode_steps == 15


def test_every_variant_must_have_a_perplexity_limit():
    text = GOOD + "parity:\n  max_perplexity_increase: {int4: 0.1}\n"
    message = (
        "r.yaml:4: parity.max_perplexity_increase: lacks 'float32' and 'int8'; must have a limit for each of "
        "the variants"
    )
    assert mistakes(text) == [message]
    assert load(text + "variants: [int4]\n").recipe.variants == ("int4",)


def test_quantized_files_for_cuda_are_in_blocks_that_its_operator_reads():
    text = GOOD + "export:\n  device: cuda\n"
    message = (
        "export.device: is 'cuda'; quantize.block_size, which is 32, must be 64 or 128 for its QMoE operator; "
        "or name another export.lowering"
    )
    assert [mistake.split(": ", 1)[1] for mistake in mistakes(text)] == [message]
    for remedy in (
        "quantize: {block_size: 64}\n",
        "quantize: {block_size: 128}\n",
        "variants: [float32, float16]\n",
        "  lowering: grouped\n",
    ):
        assert load(text + remedy).recipe.export.device == "cuda"


def test_static_8_bits_are_not_for_cuda():
    text = GOOD + "export: {device: cuda}\nquantize: {block_size: 64}\nvariants: [int8, int8-qdq]\n"
    message = (
        "variants: has 'int8-qdq', whose products CUDA computes as floats; leave it out, or set export.device to 'cpu'"
    )
    assert [mistake.split(": ", 1)[1] for mistake in mistakes(text)] == [message]
    assert load(text.replace("device: cuda", "device: cpu")).recipe.variants == ("int8", "int8-qdq")


def test_checks_across_records_hold_in_python_too():
    data = DataConfig(source=PythonDocsData(kind="python-docs"), max_test_tokens=8)
    with pytest.raises(
        ValidationError,
        match=r"data\.max_test_tokens: is 8; must be at least data\.block_size, which is 256 by default, to hold one "
        r"block",
    ):
        Recipe(source="dense", data=data)


# Bits chosen by measurement

MIXED = "source: {path: .}\ndata: {source: {kind: python-docs}}\nvariants: [VARIANTS]\nquantize: {QUANTIZE}\n"


@pytest.mark.parametrize(
    ("variants", "quantize", "mistakes"),
    [
        ("mixed", "budget: 0.6 GB", []),
        ("float32, mixed", "max_perplexity_increase: 1 %", []),
        (
            "mixed",
            "block_size: 16",
            [
                "3: variants: has 'mixed'; quantize must have a budget, or a max_perplexity_increase, to choose its "
                "bits by"
            ],
        ),
        (
            "mixed",
            "budget: 1 GB, max_perplexity_increase: 1 %",
            ["4: quantize.max_perplexity_increase: is given beside budget; must be one of them"],
        ),
        (
            "int4",
            "budget: 1 GB",
            [
                "4: quantize.budget: is given for variant 'mixed', which variants lacks; add 'mixed' to variants, or "
                "leave it out"
            ],
        ),
        (
            "mixed",
            "budget: much",
            [
                "4: quantize.budget: is 'much'; must be a size such as '0.6 GB', with one of the units B, kB, MB, "
                "GB, TB, "
                "KiB, MiB, GiB, TiB"
            ],
        ),
        (
            "mixed",
            "max_perplexity_increase: 1 per cent",
            [
                "4: quantize.max_perplexity_increase: is '1 per cent'; must be a percentage such as '1 %', or a "
                "number such as 0.01"
            ],
        ),
    ],
)
def test_a_variant_of_mixed_bits_has_one_limit(
    variants: str, quantize: str, mistakes: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(MIXED.replace("VARIANTS", variants).replace("QUANTIZE", quantize), encoding="utf-8")
    if not mistakes:
        assert "mixed" in load_recipe(file).recipe.variants
        return
    with pytest.raises(RecipeError) as refusal:
        load_recipe(file)
    assert str(refusal.value).splitlines() == [f"{file}:{mistake}" for mistake in mistakes]
