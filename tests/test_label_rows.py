"""Labelled rows: read from tables, CoNLL files, folders and the hub, divided, numbered; bad ones refused by place."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from transformers import BertConfig

from dense2moe.upcycle.data.config import ConllData, DataConfig, DigitsData, HubTableData, ImagesData, TableData
from dense2moe.upcycle.data.labelled import find_vocabulary, read_labelled
from dense2moe.upcycle.data.rows import LabelledRow, read_conll, read_table
from dense2moe.upcycle.errors import UpcycleError

STRANGE = [
    'a comma, and "quotes"',
    "two\nlines",
    "Zürich 🚀 日本語",
    "line\u2028separator\x85and\x0bmore\x1c",
    " spaces ",
    "a\ttab",
    "x" * 200_000,
]
ROWS = [{"text": text, "label": f"label {number % 2}"} for number, text in enumerate(STRANGE)]


def table(**fields: Any) -> TableData:
    return TableData.model_validate({"kind": "table", "train": ["rows.csv"], **fields})


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), file)


WRITERS: dict[str, Callable[[Path, Sequence[Mapping[str, Any]]], None]] = {
    "rows.csv": write_csv,
    "rows.jsonl": write_lines,
    "rows.json": write_lines,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_table_gives_the_rows_that_were_written(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    found = list(read_table(tmp_path / name, table()))
    assert [{"text": row.text, "label": row.label} for row in found] == ROWS
    assert all(row.where.startswith(str(tmp_path / name)) for row in found)


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    for name, text in (("rows.csv", "text,label\r\na,b\r\n"), ("rows.jsonl", '{"text": "a", "label": "b"}\r\n\r\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        (row,) = read_table(tmp_path / name, table())
        assert (row.text, row.label) == ("a", "b")


def test_columns_are_named_and_pairs_lists_numbers_and_words_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [{"a": "one", "b": "two", "c": label} for label in ("x", 3, True, 0.5, ["x", "y"], [])]
    write_lines(file, rows)
    found = list(read_table(file, table(text="a", pair="b", label="c")))
    assert [row.label for row in found] == ["x", "3", "true", 0.5, ("x", "y"), ()]
    assert {(row.text, row.pair) for row in found} == {("one", "two")}
    write_lines(file, [{"c": 1}, {"c": "2.5"}, {"c": -1e3}])
    values = read_table(file, table(text="c", label="c", problem="value"))
    with pytest.raises(UpcycleError, match="column 'c' holds int; must be a text"):
        list(values)
    write_lines(file, [{"a": "t", "c": value} for value in (1, "2.5", -1e3)])
    assert [row.label for row in read_table(file, table(text="a", label="c", problem="value"))] == [1.0, 2.5, -1000.0]
    write_lines(file, [{"tokens": ["New York", "is"], "tags": ["B-LOC", "O"]}])
    (row,) = read_table(file, table(words="tokens"))
    assert (row.text, row.words, row.answer) == ("New York is", ("New York", "is"), ("B-LOC", "O"))


GOOD = '{"text": "a", "label": "b"}\n'
BAD_TABLES: list[tuple[str, bytes, dict[str, Any], str]] = [
    ("rows.csv", b"body,label\na,b\n", {}, "rows.csv:2: has no column 'text'; it has body, label"),
    ("rows.csv", b"text,label\na,b\n ,b\n", {}, "rows.csv:3: column 'text' is empty; must be a text"),
    ("rows.csv", b"text,label\na,\n", {}, "rows.csv:2: column 'label' is ''; must be a label's name"),
    ("rows.csv", b"text,label\na,b,c\n", {}, "rows.csv:2: has more cells than the first line has names"),
    ("rows.csv", b"text,label\na,b\nc\n", {}, "rows.csv:3: has fewer cells than the first line has names"),
    ("rows.csv", b"text,label,text\na,b,c\n", {}, "rows.csv:1: names a column twice: text, label, text"),
    ("rows.csv", b'text,label\n"a,b\n', {}, "rows.csv: is no CSV"),
    ("rows.csv", b"text,label\n\xff,b\n", {}, "rows.csv: not UTF-8 at byte 11"),
    ("rows.csv", b"text,label\na,many\n", {"problem": "value"}, "is 'many'; must be a number to predict"),
    ("rows.csv", b"text,label\na,nan\n", {"problem": "value"}, "is 'nan'; must be a number to predict"),
    ("rows.jsonl", GOOD.encode() + b"{\n", {}, "rows.jsonl:2: is not JSON"),
    ("rows.jsonl", b"[" * 100_000, {}, "rows.jsonl:1: is not JSON"),
    ("rows.json", b"[1, 2]\n", {}, "rows.json:1: is no JSON object"),
    ("rows.jsonl", b'{"text": 3, "label": "b"}\n', {}, "rows.jsonl:1: column 'text' holds int; must be a text"),
    ("rows.jsonl", b'{"text": null, "label": "b"}\n', {}, "rows.jsonl:1: column 'text' is empty"),
    ("rows.jsonl", b'{"text": "a", "label": null}\n', {}, "column 'label' is None; must be a label's name"),
    ("rows.jsonl", b'{"text": "a", "label": {"x": 1}}\n', {}, "column 'label' is {'x': 1}"),
    ("rows.jsonl", b'{"text": "a", "label": ["x", ""]}\n', {}, "column 'label' is ['x', '']"),
    ("rows.jsonl", b'{"text": "a", "label": NaN}\n', {}, "column 'label' is nan"),
    ("rows.jsonl", b'{"text": "a", "label": 1e999}\n', {}, "column 'label' is inf"),
    ("rows.jsonl", b'{"text": "a\\ud83d", "label": "b"}\n', {}, "column 'text' has \\ud83d, half of a character"),
    ("rows.jsonl", b'{"text": "a", "label": "\\ud83d"}\n', {}, "column 'label' has \\ud83d, half of a character"),
    ("rows.jsonl", b'{"w": ["a"], "tags": ["O", "O"]}\n', {"words": "w"}, "has 1 w and 2 tags; must be as many"),
    ("rows.jsonl", b'{"w": "a b", "tags": ["O"]}\n', {"words": "w"}, "column 'w' is no list of texts"),
    ("rows.jsonl", b'{"w": [], "tags": []}\n', {"words": "w"}, "column 'w' is no list of texts"),
    ("rows.jsonl", b'{"w": ["a", 1], "tags": ["O", "O"]}\n', {"words": "w"}, "column 'w' holds what is no text"),
    ("rows.jsonl", b'{"w": ["a", " "], "tags": ["O", "O"]}\n', {"words": "w"}, "w has an empty word"),
    ("rows.jsonl", b'{"w": ["a"], "tags": [""]}\n', {"words": "w"}, "tags has an empty tag"),
    ("rows.parquet", b"no parquet", {}, "rows.parquet: is no Parquet file"),
    ("rows.tsv", b"text\tlabel\n", {}, "rows.tsv: a table is .csv, .jsonl, .json, .parquet; rename or convert it"),
    ("rows.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", {}, "git-lfs"),
]


@pytest.mark.parametrize(("name", "content", "fields", "said"), BAD_TABLES, ids=[said for *_, said in BAD_TABLES])
def test_a_bad_row_is_refused_by_its_place_in_one_line(
    name: str, content: bytes, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UpcycleError) as caught:
        list(read_table(tmp_path / name, table(**fields)))
    assert said.lower() in str(caught.value).lower()
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows.parquet", [{"text": "a", "label": "b"}, {"text": None, "label": "b"}])
    with pytest.raises(UpcycleError, match=r"rows\.parquet, row 1: column 'text' is empty"):
        list(read_table(tmp_path / "rows.parquet", table()))


# CoNLL


def conll(**fields: Any) -> ConllData:
    return ConllData.model_validate({"kind": "conll", "train": ["words.txt"], **fields})


WORDS = (
    "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\nBlackburn NNP I-NP I-PER"
)


@pytest.mark.parametrize("divider", [" ", "\t", "  "])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\r\n"])
def test_conll_files_give_their_texts(divider: str, ending: str, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes((WORDS.replace(" ", divider) + ending).encode())
    first, second = read_conll(tmp_path / "words.txt", conll())
    assert (first.text, first.words, first.tags) == ("EU rejects", ("EU", "rejects"), ("B-ORG", "O"))
    assert (second.words, second.tags) == (("Peter", "Blackburn"), ("B-PER", "I-PER"))
    assert (first.where, second.where) == (f"{tmp_path}/words.txt:3", f"{tmp_path}/words.txt:7")
    chunks = [row.tags for row in read_conll(tmp_path / "words.txt", conll(tag_column=2))]
    assert chunks == [("B-NP", "B-VP"), ("B-NP", "I-NP")]


@pytest.mark.parametrize(
    ("text", "fields", "said"),
    [
        ("EU B-ORG\nrejects\n", {}, ":2: has 1 columns; must have 2"),
        ("EU B-ORG\n", {"tag_column": 3}, ":1: has 2 columns; must have 4"),
        ("EU B-ORG\n", {"tag_column": -3}, ":1: has 2 columns; must have 3"),
        ("EU\tB-ORG\n\tO\n", {}, ":2: has an empty word"),
        ("EU\tB-ORG\nrejects\t\n", {}, ":2: has an empty tag"),
    ],
)
def test_a_bad_line_of_conll_is_refused_by_its_number(
    text: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UpcycleError) as caught:
        list(read_conll(tmp_path / "words.txt", conll(**fields)))
    assert f"{tmp_path}/words.txt{said}" in str(caught.value)
    assert "\n" not in str(caught.value)


# Splits


def many(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": str(number % 3)} for number in range(start, start + count)]


def splits(folder: Path, **fields: Any) -> dict[str, list[str]]:
    found = read_labelled(table(train=["train.jsonl"], **fields), folder)
    return {split: [row.text for row in rows] for split, rows in found.rows.items()}


def test_splits_that_are_not_given_are_made_by_the_text_alone(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", many(1000))
    first = splits(tmp_path)
    assert {row for rows in first.values() for row in rows} == {row["text"] for row in many(1000)}
    assert all(70 <= len(first[split]) <= 130 for split in ("validation", "test"))
    shuffled = many(1200)
    random.Random(0).shuffle(shuffled)
    write_lines(tmp_path / "train.jsonl", shuffled)
    again = splits(tmp_path)
    for split in first:  # more rows in another order: each text stays where it is
        assert set(first[split]) == {text for text in again[split] if int(text.split()[1]) < 1000}


def test_equal_texts_stay_together_and_no_held_out_text_is_trained(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", many(300) + many(300))
    found = splits(tmp_path)
    for split in found:
        others = {text for other, texts in found.items() if other != split for text in texts}
        assert not others & set(found[split])
        assert len(found[split]) == 2 * len(set(found[split]))


def test_given_splits_are_kept_and_what_they_share_with_training_is_left_out_of_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", many(50))
    write_lines(tmp_path / "test.jsonl", many(10, start=45))
    write_lines(tmp_path / "dev.jsonl", many(20, start=50))
    found = read_labelled(table(train=["train.jsonl"], validation=["dev.jsonl"], test=["test.jsonl"]), tmp_path)
    assert [row.text for row in found.rows["validation"]] == [f"text {number}" for number in range(55, 70)]
    with pytest.raises(UpcycleError, match="validation split has 0 examples; what the test split has is left out of"):
        read_labelled(table(train=["train.jsonl"], validation=["test.jsonl"], test=["test.jsonl"]), tmp_path)
    assert [row.text for row in found.rows["train"]] == [f"text {number}" for number in range(45)]
    assert found.num_shared == 5
    write_lines(tmp_path / "train.jsonl", many(60))
    made = read_labelled(table(train=["train.jsonl"], test=["test.jsonl"]), tmp_path)
    assert [row.text for row in made.rows["test"]] == [f"text {number}" for number in range(45, 55)]
    tested = {row.text for row in made.rows["test"]}
    assert not tested & {row.text for split in ("train", "validation") for row in made.rows[split]}


def test_pairs_are_told_apart_by_both_of_their_texts(tmp_path: Path) -> None:
    rows = [{"text": "same", "pair": f"other {number}", "label": str(number % 2)} for number in range(100)]
    write_lines(tmp_path / "train.jsonl", rows)
    found = read_labelled(table(train=["train.jsonl"], pair="pair"), tmp_path)
    assert all(len(found.rows[split]) > 2 for split in found.rows)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "the train split has 0 examples; must have 2 or more"),
        (many(1), "the train split has 1 example; must have 2 or more; give more rows$"),
        (many(8), "the validation split has 1 example; .*; give more rows, or a `validation:` of its own"),
    ],
)
def test_too_few_rows_are_refused(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", rows)
    with pytest.raises(UpcycleError, match=said):
        splits(tmp_path)


# Labels


def config(task: str | None = None, labels: Sequence[str] = ()) -> BertConfig:
    made = BertConfig(id2label=dict(enumerate(labels))) if labels else BertConfig()
    made.architectures = [task or "BertForMaskedLM"]
    return made


def name(labels: Sequence[Any], own: BertConfig | None = None) -> Any:
    rows = [LabelledRow(f"row {number}", "text", label) for number, label in enumerate(labels)]
    return find_vocabulary({"train": rows, "validation": rows, "test": rows}, own or config())


def tag(labels: Sequence[str], own: BertConfig | None = None) -> Any:
    row = LabelledRow("row", "a b", words=tuple("ab"), tags=tuple(labels))
    return find_vocabulary({"train": [row], "validation": [row], "test": [row]}, own or config())


def test_labels_are_ordered_numbers_by_size_and_tags_with_o_first() -> None:
    assert name(["10", "9", "b", "a", "2"]).labels == ("2", "9", "10", "a", "b")
    assert tag(["I-PER", "B-PER", "O", "B-LOC"]).labels == ("O", "B-LOC", "B-PER", "I-PER")
    assert name([("x", "y"), (), ("a",)]).labels == ("a", "x", "y")
    assert [name(["a", "b"]).problem, name([("a",), ()]).problem, name([0.5, 1.5]).problem] == [
        "single_label_classification",
        "multi_label_classification",
        "regression",
    ]
    assert name([0.5, 1.5]).labels == ("value",)


def test_labels_of_the_checkpoint_are_kept_where_it_has_all_of_them() -> None:
    own = config("BertForSequenceClassification", ["sad", "glad", "mad"])
    assert name(["mad", "sad"], own).labels == ("sad", "glad", "mad")
    assert name(["mad", "new"], own).labels == ("mad", "new")
    assert tag(["O", "B-X"], own).labels == ("O", "B-X")
    assert tag(["O", "B-X"], config("BertForTokenClassification", ["B-X", "I-X", "O"])).labels == ("B-X", "I-X", "O")
    assert name([0.5, 1.5], config("BertForSequenceClassification", ["similarity"])).labels == ("similarity",)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", "a"], "every label is 'a'; must be two or more labels"),
        (["a", 0.5], "row 1: its label is 0.5, and the first row's is 'a'; all must be"),
        ([(), ()], "every list of labels is empty"),
    ],
)
def test_labels_that_are_no_choice_are_refused(labels: Sequence[Any], said: str) -> None:
    with pytest.raises(UpcycleError, match=said):
        name(labels)


def test_tags_that_are_no_choice_are_refused() -> None:
    with pytest.raises(UpcycleError, match="every tag is 'O'; must be two or more tags"):
        tag(["O", "O"])


# Images


def save_images(folder: Path, labels: Sequence[str] = ("cat", "dog"), count: int = 30, seed: int = 0) -> None:
    draw = np.random.default_rng(seed)
    for label in labels:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = draw.integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")


def images(**fields: Any) -> ImagesData:
    return ImagesData.model_validate({"kind": "images", "train": "train", **fields})


def test_images_have_the_names_of_their_folders(tmp_path: Path) -> None:
    save_images(tmp_path / "train")
    (tmp_path / "train" / "cat" / ".hidden").write_bytes(b"of a file manager")
    found = read_labelled(images(), tmp_path)
    every = [row for rows in found.rows.values() for row in rows]
    assert len(every) == 60
    assert all(row.label == Path(row.where).parent.name for row in every)
    keys = [{row.key for row in rows} for rows in found.rows.values()]
    assert not any(a & b for number, a in enumerate(keys) for b in keys[number + 1 :])


def test_an_image_that_is_held_out_is_not_trained_on_under_another_name(tmp_path: Path) -> None:
    save_images(tmp_path / "train")
    save_images(tmp_path / "test", count=5, seed=1)
    (tmp_path / "test" / "cat" / "copy.png").write_bytes((tmp_path / "train" / "dog" / "3.png").read_bytes())
    found = read_labelled(images(test="test"), tmp_path)
    assert found.num_shared == 1 or len(found.rows["train"]) + len(found.rows["validation"]) == 59
    assert not {row.key for row in found.rows["test"]} & {row.key for row in found.rows["train"]}


def test_what_is_no_folder_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=r"data\.source\.train: 'train' is no folder below"):
        read_labelled(images(), tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UpcycleError, match="has no images in folders of their labels; must be train/LABEL/IMAGE"):
        read_labelled(images(), tmp_path)
    save_images(tmp_path / "train", count=3)
    for content in (b"no image", b""):
        (tmp_path / "train" / "cat" / "notes.txt").write_bytes(content)
        with pytest.raises(UpcycleError, match=r"cat/notes\.txt: is no image .*; leave it out, or convert it"):
            read_labelled(images(), tmp_path)
    whole = (tmp_path / "train" / "cat" / "0.png").read_bytes()
    (tmp_path / "train" / "cat" / "notes.txt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UpcycleError, match=r"cat/notes\.txt: is no image"):
        read_labelled(images(), tmp_path)


def test_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    found = read_labelled(DigitsData(kind="digits"), tmp_path)
    rows = {int(row.where.split()[1]): row for rows in found.rows.values() for row in rows}
    theirs = load_digits()
    assert len(rows) == len(theirs.target) == 1797
    for number in (0, 7, 1796):
        assert rows[number].label == str(theirs.target[number])
        np.testing.assert_array_equal(np.asarray(rows[number].image), theirs.images[number] * 15)


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, datasets.Dataset]:
    """Splits of a data set that is asked for; what is not there raises as the library does."""
    held: dict[str, datasets.Dataset] = {}

    def load(path: str, name: str | None, *, revision: str | None, split: str) -> datasets.Dataset:
        assert (path, name, revision) == ("us/it", "small", "main")
        if split not in held:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(held)}.')
        return held[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return held


def of_hub(**fields: Any) -> HubTableData:
    source = {"kind": "hub-table", "path": "us/it", "name": "small", "revision": "main", **fields}
    found = DataConfig.model_validate({"source": source}).source
    assert isinstance(found, HubTableData)
    return found


def test_rows_of_the_hub_have_the_names_of_their_classes(hub: dict[str, datasets.Dataset], tmp_path: Path) -> None:
    kinds = datasets.Features({"body": datasets.Value("string"), "kind": datasets.ClassLabel(names=["no", "yes"])})
    for split, start in (("train", 0), ("dev", 100), ("test", 200)):
        rows = {"body": [f"text {start + number}" for number in range(10)], "kind": [0, 1] * 5}
        hub[split] = datasets.Dataset.from_dict(rows, features=kinds)
    found = read_labelled(of_hub(text="body", label="kind", validation="dev"), tmp_path)
    assert {split: len(rows) for split, rows in found.rows.items()} == {"train": 10, "validation": 10, "test": 10}
    assert [row.label for row in found.rows["test"]] == ["no", "yes"] * 5
    assert found.rows["test"][3].where == "data set 'us/it', row 3 of split 'test'"
    with pytest.raises(UpcycleError, match=r"split 'validation' cannot be loaded \(ValueError: Unknown split"):
        read_labelled(of_hub(text="body", label="kind"), tmp_path)
    with pytest.raises(UpcycleError, match=r"row 0 of split 'train': has no column 'text'; it has body, kind"):
        read_labelled(of_hub(label="kind", validation=None), tmp_path)


def test_words_of_the_hub_have_the_names_of_their_tags(hub: dict[str, datasets.Dataset], tmp_path: Path) -> None:
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-corporation"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    rows = {"tokens": [[f"word{n}", "and"] for n in range(100)], "ner_tags": [[n % 2, 0] for n in range(100)]}
    hub["train"] = datasets.Dataset.from_dict(rows, features=features)
    source = of_hub(words="tokens", tags="ner_tags", validation=None, test=None)
    every = [row for rows in read_labelled(source, tmp_path).rows.values() for row in rows]
    assert len(every) == 100
    assert {row.words[0]: row.tags for row in every}["word7"] == ("B-corporation", "O")


def test_images_of_the_hub_have_the_names_of_their_classes(hub: dict[str, datasets.Dataset], tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(256, size=(8, 8), dtype=np.uint8)) for _ in range(60)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    hub["train"] = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 30}, features=features)
    found = read_labelled(of_hub(image="image", validation=None, test=None), tmp_path)
    every = {row.where: row for rows in found.rows.values() for row in rows}
    assert len(every) == 60
    assert every["data set 'us/it', row 1"].label == "dog"
    with pytest.raises(UpcycleError, match="has no column 'picture'; it has image, label"):
        read_labelled(of_hub(image="picture", validation=None, test=None), tmp_path)
