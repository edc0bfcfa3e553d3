"""Text is split, tokenized and packed without a token lost, and every mistake in what was given is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from texts import (
    digest_texts,
    quiet,
    read_texts,
    refusal,
    sentences,
    settings,
    text_data,
    write,
)
from told import tells
from transformers import PreTrainedTokenizerFast

from dense2moe.upcycle.data.blocks import prepare_data, read_blocks, read_domains, read_text_blocks
from dense2moe.upcycle.data.config import DataConfig, DomainsData, HubData, PythonDocsData, TextData
from dense2moe.upcycle.data.files import text_files
from dense2moe.upcycle.data.held_out import SPLITS, Document, Split
from dense2moe.upcycle.data.python_docs import PythonDocs

# Text files


def test_given_files_are_the_splits(tmp_path: Path) -> None:
    write(tmp_path, a="  one \n", b="two", c="drei ß")
    found = read_texts(text_data(train=("a.txt",), validation=("b.txt",), test=("c.txt",)), tmp_path)
    assert found.domains["text"] == {"train": ("  one",), "validation": ("two",), "test": ("drei ß",)}
    digest = hashlib.sha256("train\0  one\0validation\0two\0test\0drei ß\0".encode()).hexdigest()
    assert found.facts == {"digest": digest}


def test_a_separator_divides_files_and_empty_documents_vanish(tmp_path: Path) -> None:
    write(tmp_path, a="<|x|>one<|x|>\n  <|x|>two\n\nstill two<|x|>", b="three<|x|>four", c="five")
    found = read_texts(
        text_data(train=("a.txt", "b.txt"), validation=("c.txt",), test=("c.txt",), separator="<|x|>"), tmp_path
    )
    assert found.domains["text"]["train"] == ("one", "two\n\nstill two", "three", "four")


def test_globs_are_resolved_in_order_below_the_base(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path, b="", a="", held_out="")
    write(tmp_path / "deep", c="")
    write(tmp_path / "deep" / "er", d="")
    (tmp_path / "folder.txt").mkdir()  # matches, and is no file
    found = text_files(
        text_data(train=("deep/**/*.txt", "[ab].txt"), validation=(str(tmp_path / "held*.txt"),)), tmp_path
    )
    assert [file.relative_to(tmp_path).as_posix() for file in found["train"]] == [
        "deep/c.txt",
        "deep/er/d.txt",
        "a.txt",
        "b.txt",
    ]
    assert found["validation"] == [tmp_path / "held_out.txt"]
    assert found["test"] == []


def test_brackets_in_a_folder_or_in_a_files_own_name_are_no_glob(tmp_path: Path) -> None:
    base = tmp_path / "runs [old]"
    base.mkdir()
    write(base, **{"a[1]": "one", "b": "two"})
    found = text_files(text_data(train=("a[1].txt", "b*.txt")), base)
    assert found["train"] == [base / "a[1].txt", base / "b.txt"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_pattern_without_a_file_is_refused(split: str, tmp_path: Path) -> None:
    write(tmp_path, a="text")
    fields = {"train": ("a.txt",), split: ("a.txt", "b*.txt") if split == "train" else ("b*.txt",)}
    assert refusal(text_files, text_data(**fields), tmp_path) == (
        f"data.source.{split}[{len(fields[split]) - 1}]: 'b*.txt' matches no file below {tmp_path}; give a path or "
        "glob of UTF-8 text files"
    )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_held_out_file_that_is_also_trained_on_is_refused(split: str, tmp_path: Path) -> None:
    write(tmp_path, a="one", b="two")
    assert refusal(text_files, text_data(train=("*.txt",), **{split: ("b.txt",)}), tmp_path) == (
        f"data.source.{split}: {tmp_path / 'b.txt'} is also a train file; held-out text must not be trained on; give "
        "each file one split"
    )


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    assert (
        refusal(read_texts, text_data(train=("a.txt",)), tmp_path)
        == f"{tmp_path / 'a.txt'}: not UTF-8 at byte 3; convert it"
    )


def test_a_split_without_a_document_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a="one document alone", blank=" \n ")
    message = (
        "data.source: no document falls into the {} split; give `{}:` files, or a `separator` that makes more documents"
    )
    assert refusal(read_texts, text_data(train=("a.txt",)), tmp_path) == message.format("validation", "validation")
    assert refusal(read_texts, text_data(train=("blank.txt",)), tmp_path) == message.format("train", "train")
    fields = {"train": ("a.txt",), "validation": ("blank.txt",), "test": ("a.txt",)}
    write(tmp_path, c="other")
    assert refusal(read_texts, text_data(**fields | {"test": ("c.txt",)}), tmp_path) == message.format(
        "validation", "validation"
    )


def hash_number(document: str) -> int:
    return int(hashlib.sha256(document.encode()).hexdigest()[:16], 16) % 1000


def test_without_held_out_files_the_hash_of_a_document_decides(tmp_path: Path) -> None:
    documents = sentences(600)
    write(tmp_path, a="|".join(documents))
    found = read_texts(text_data(train=("a.txt",), separator="|"), tmp_path).domains["text"]
    assert found["test"] == tuple(d for d in documents if hash_number(d) < 50)
    assert found["validation"] == tuple(d for d in documents if 50 <= hash_number(d) < 100)
    assert found["train"] == tuple(d for d in documents if hash_number(d) >= 100)
    assert all(10 <= len(found[split]) <= 60 for split in ("validation", "test"))  # thirty expected of each


def test_with_one_held_out_split_given_only_the_other_is_drawn(tmp_path: Path) -> None:
    documents = sentences(300)
    write(tmp_path, a="|".join(documents), v="validation text")
    found = read_texts(text_data(train=("a.txt",), validation=("v.txt",), separator="|"), tmp_path).domains["text"]
    assert found["validation"] == ("validation text",)
    assert found["test"] == tuple(d for d in documents if hash_number(d) < 50)
    assert set(found["train"]) == set(documents) - set(found["test"])


def test_a_document_keeps_its_split_when_others_come_and_go_and_copies_stay_together(tmp_path: Path) -> None:
    documents = sentences(300)
    write(
        tmp_path,
        a="|".join(documents),
        b="|".join(reversed(documents[100:] + sentences(200, start=300) + documents[:50])),
    )
    first, second = (
        read_texts(text_data(train=(name,), separator="|"), tmp_path).domains["text"] for name in ("a.txt", "b.txt")
    )
    for found in (first, second):
        assert not set(found["train"]) & set(found["validation"])
        assert not set(found["train"]) & set(found["test"])
        assert not set(found["validation"]) & set(found["test"])
    split_of = {document: split for split in SPLITS for document in first[split]}
    assert all(split_of.get(document, split) == split for split in SPLITS for document in second[split])


def test_the_digest_changes_with_every_document_and_its_split(tmp_path: Path) -> None:
    cases = {
        "base": ("a|b", "c", "d"),
        "order": ("b|a", "c", "d"),
        "joined": ("ab", "c", "d"),
        "moved": ("a", "b|c", "d"),
        "other": ("a|b", "c", "e"),
    }
    digests = []
    for name, texts in cases.items():
        for split, text in zip(SPLITS, texts, strict=True):
            write(tmp_path, **{f"{name}-{split}": text})
        source = text_data(**{split: (f"{name}-{split}.txt",) for split in SPLITS}, separator="|")
        digests += [read_texts(source, tmp_path).facts["digest"]]
    assert len(set(digests)) == len(digests)


def test_python_docs_are_read_from_the_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    documents = {
        split: (Document("m", "prose", f"{split} prose"), Document("m", "code", f"{split} code")) for split in SPLITS
    }
    monkeypatch.setattr(
        "dense2moe.upcycle.data.texts.read_python_docs", lambda: PythonDocs(documents, "3.99.0", "f" * 64)
    )
    found = read_texts(PythonDocsData(kind="python-docs"), tmp_path)
    assert found.domains == {
        domain: {split: (f"{split} {domain}",) for split in SPLITS} for domain in ("prose", "code")
    }
    assert found.facts == {"interpreter": "CPython 3.99.0", "digest": "f" * 64}


# Domains, each a source of its own


Corpora = tuple[DomainsData, Path]


@pytest.fixture
def two_domains(tmp_path: Path) -> Corpora:
    """Letters and digits: no token of one is in the other, but for the separator of a text."""
    sources = {}
    for name, alphabet in (("letters", "abcdefgh"), ("digits", "01234567")):
        for split, count in (("train", 30), ("validation", 12), ("test", 14)):
            words = (alphabet[number % 8] * 9 for number in range(count * (2 if name == "digits" else 1)))
            write(tmp_path, **{f"{name}-{split}": "\n".join(words)})
        sources[name] = text_data(**{split: (f"{name}-{split}.txt",) for split in SPLITS}, separator="\n")
    return DomainsData(kind="domains", domains=sources), tmp_path


def test_every_domain_has_documents_and_a_digest_of_its_own(two_domains: Corpora) -> None:
    source, base = two_domains
    found = read_texts(source, base)
    assert list(found.domains) == ["letters", "digits"]
    alone = {name: read_texts(part, base) for name, part in source.domains.items()}
    assert found.domains == {name: texts.domains["text"] for name, texts in alone.items()}
    assert found.facts == {f"digest of {name}": texts.facts["digest"] for name, texts in alone.items()}


@pytest.mark.parametrize("max_train_tokens", [None, 6 * 16])
def test_a_block_holds_one_domain_and_knows_its_number(
    max_train_tokens: int | None, two_domains: Corpora, dense_checkpoint: Path, tmp_path: Path
) -> None:
    source, base = two_domains
    facts = prepare_data(
        dense_checkpoint,
        tmp_path,
        DataConfig(source=source, block_size=16, max_train_tokens=max_train_tokens),
        base,
        quiet,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(dense_checkpoint)
    assert facts["domains"] == ["letters", "digits"]
    for split in SPLITS:
        names, domains = read_domains(tmp_path, split)
        blocks = read_blocks(tmp_path, split)
        assert names == ("letters", "digits")
        assert (domains.dtype, domains.shape) == (torch.int64, (len(blocks),))
        assert set(domains.tolist()) == {0, 1}
        for ids, domain in zip(blocks, domains.tolist(), strict=True):
            characters = set(tokenizer.decode(ids, skip_special_tokens=True)) - {" "}
            assert characters
            assert characters <= set(("abcdefgh", "01234567")[domain])
    if max_train_tokens:
        assert len(read_blocks(tmp_path, "train")) == 6


def test_the_domains_of_a_block_are_those_of_the_texts_packed_alone(
    two_domains: Corpora, dense_checkpoint: Path, tmp_path: Path
) -> None:
    source, base = two_domains
    prepare_data(dense_checkpoint, tmp_path, DataConfig(source=source, block_size=16), base, quiet)
    blocks, (_, domains) = read_blocks(tmp_path, "train"), read_domains(tmp_path, "train")
    for number, part in enumerate(source.domains.values()):
        assert isinstance(part, TextData)
        alone = tmp_path / str(number)
        alone.mkdir()
        prepare_data(dense_checkpoint, alone, settings(part), base, quiet)
        assert torch.equal(blocks[domains == number], read_blocks(alone, "train"))
        assert read_domains(alone, "train")[0] == ("text",)


def test_prose_and_code_are_domains(monkeypatch: pytest.MonkeyPatch, dense_checkpoint: Path, tmp_path: Path) -> None:
    documents = {
        split: (Document("m", "code", f"{split} 1 2 3 " * 20), Document("m", "prose", f"{split} words " * 20))
        for split in SPLITS
    }
    monkeypatch.setattr(
        "dense2moe.upcycle.data.texts.read_python_docs", lambda: PythonDocs(documents, "3.99.0", "f" * 64)
    )
    facts = prepare_data(
        dense_checkpoint,
        tmp_path,
        DataConfig(source=PythonDocsData(kind="python-docs"), block_size=16),
        tmp_path,
        quiet,
    )
    assert facts["domains"] == ["prose", "code"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(dense_checkpoint)
    names, domains = read_domains(tmp_path, "train")
    assert names == ("prose", "code")
    for ids, domain in zip(read_blocks(tmp_path, "train"), domains.tolist(), strict=True):
        assert ("1" in tokenizer.decode(ids)) == (domain == 1)


def test_what_a_domain_lacks_is_told_by_its_name(
    two_domains: Corpora, dense_checkpoint: Path, tmp_path: Path, data_set: Path
) -> None:
    source, base = two_domains
    write(base, blank=" ", short="ab")

    def refused(**fields: Any) -> str:
        digits = source.domains["digits"].model_copy(update=fields)
        config = DataConfig(
            source=DomainsData(kind="domains", domains={**source.domains, "digits": digits}), block_size=16
        )
        return refusal(prepare_data, dense_checkpoint, tmp_path, config, base, quiet)

    where = "data.source.domains.digits"
    assert tells(refused(train=("absent*",)), f"{where}.train[0]", "'absent*'", base, "give")
    assert tells(refused(test=("digits-train.txt",)), f"{where}.test", base / "digits-train.txt", "train file", "split")
    assert tells(refused(validation=("blank.txt",)), where, "validation", "give", "`separator`")
    assert tells(refused(train=("short.txt",)), "the train split of domain 'digits'", "16", "block_size")
    hubs = DomainsData(
        kind="domains", domains={"letters": source.domains["letters"], "set": hub(data_set, text_column="body")}
    )
    assert (
        refusal(read_texts, hubs, base)
        == f"data.source.domains.set: data set '{data_set}': no column 'body'; it has text, label"
    )


@pytest.mark.parametrize("split", SPLITS)
def test_a_limit_that_leaves_no_block_of_a_domain_is_refused(
    split: Split, two_domains: Corpora, dense_checkpoint: Path, tmp_path: Path
) -> None:
    source, base = two_domains
    config = DataConfig(source=source, block_size=16)
    prepare_data(dense_checkpoint, tmp_path, config, base, quiet)
    domains = read_domains(tmp_path, split)[1].tolist()
    assert refusal(
        prepare_data, dense_checkpoint, tmp_path, config.model_copy(update={f"max_{split}_tokens": 16}), base, quiet
    ) == (
        f"data.max_{split}_tokens is 16; it leaves no block of domain 'digits', which has "
        f"{domains.count(1)} of {len(domains)}; raise it"
    )
    prepare_data(dense_checkpoint, tmp_path, config.model_copy(update={f"max_{split}_tokens": 32}), base, quiet)
    assert read_domains(tmp_path, split)[1].tolist() == [0, 1]


def test_what_one_domain_holds_out_another_must_not_train_on(two_domains: Corpora) -> None:
    source, base = two_domains
    more = source.domains["letters"].model_copy(update={"train": ("*-t*n.txt", "digits-test.txt"), "separator": None})
    domains = DomainsData(kind="domains", domains={"letters": more, "digits": source.domains["digits"]})
    assert refusal(read_texts, domains, base) == (
        f"data.source.domains.digits.test: {base / 'digits-test.txt'} is also a file of "
        "data.source.domains.letters.train; held-out text must not be "
        "trained on; give each file one split"
    )


# Data sets of the hub, here from a local folder


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "set"
    directory.mkdir()
    for split in SPLITS:
        rows = [{"text": f"{split} one", "label": 1}, {"text": " \n", "label": 2}, {"text": f"{split} two", "label": 3}]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def hub(path: Path, **fields: Any) -> HubData:
    return HubData(kind="hub", path=str(path), **fields)


def test_a_data_set_is_read_by_split_and_column_and_blank_rows_vanish(data_set: Path, tmp_path: Path) -> None:
    found = read_texts(hub(data_set), tmp_path)
    assert found.domains["text"] == {split: (f"{split} one", f"{split} two") for split in SPLITS}
    assert found.facts == {
        "data set": str(data_set),
        "digest": digest_texts({s: list(d) for s, d in found.domains["text"].items()}),
    }


def test_splits_may_be_renamed_and_sliced(data_set: Path, tmp_path: Path) -> None:
    found = read_texts(hub(data_set, train="test[:1]", validation="train[2:]", test="validation"), tmp_path)
    assert found.domains["text"] == {
        "train": ("test one",),
        "validation": ("train two",),
        "test": ("validation one", "validation two"),
    }


def test_name_and_revision_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, **options: Any) -> datasets.Dataset:
        asked.append((path, name, options))
        return datasets.Dataset.from_dict({"body": ["some text"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HubData(kind="hub", path="owner/set", name="large", revision="abc", text_column="body", validation="dev")
    assert read_texts(source, tmp_path).domains["text"]["validation"] == ("some text",)
    assert asked == [("owner/set", "large", {"revision": "abc", "split": split}) for split in ("train", "dev", "test")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"validation": "dev"},
            ", split 'dev' cannot be loaded (ValueError: Unknown split \"dev\". Should be one of ['train', "
            "'validation', 'test'].); mend that, or give text files of your own",
        ),
        (
            {"name": "large"},
            ", split 'train' cannot be loaded (ValueError: BuilderConfig 'large' not found. Available: ['default']); "
            "mend that, or give text files of your own",
        ),
        ({"text_column": "body"}, ": no column 'body'; it has text, label"),
        ({"train": "train[1:2]"}, ": split 'train[1:2]' has no text in column 'text'"),
        ({"text_column": "label"}, ": column 'label' of split 'train' holds int; it must hold text"),
    ],
)
def test_what_a_data_set_lacks_is_named(fields: dict[str, Any], message: str, data_set: Path, tmp_path: Path) -> None:
    assert refusal(read_texts, hub(data_set, **fields), tmp_path) == f"data.source: data set '{data_set}'{message}"


def test_rows_without_text_are_left_out_as_blank_ones_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **o: datasets.Dataset.from_dict({"text": [None, "some text", None]})
    )
    assert read_texts(HubData(kind="hub", path="owner/set"), tmp_path).domains["text"]["train"] == ("some text",)


def test_a_missing_data_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    assert refusal(read_texts, hub(path), tmp_path) == (
        f"data.source: data set '{path}', split 'train' cannot be loaded ("
        + f"FileNotFoundError: Couldn't find any data file at {path}."[:100]
        + "); mend that, or give text files of your own"
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ConnectionError("Couldn't reach 'owner/set' on the Hub (OfflineModeIsEnabled)"),
            "is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset HF_HUB_OFFLINE",
        ),
        (
            ConnectionError("Couldn't reach 'owner/set' on the Hub (LocalEntryNotFoundError)"),
            "is not in the cache, and the hub cannot be reached; mend the network",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' doesn't exist\n" + "x" * 1000),
            "is not on the hub, or not for you to read; correct the id, or log in (`hf auth login`)",
        ),
        (ValueError("no\nsplit"), "cannot be loaded (ValueError: no split); mend that"),
        (
            ValueError("x" * 1000),
            f"cannot be loaded (ValueError: {'x' * (100 - len('ValueError: '))}); mend that",
        ),
    ],
    ids=["offline", "no network", "no such set", "anything else", "at length"],
)
def test_a_data_set_that_cannot_be_fetched_is_one_clear_line(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load_dataset(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal(read_texts, HubData(kind="hub", path="owner/set"), tmp_path)
    assert message == f"data.source: data set 'owner/set', split 'train' {told}, or give text files of your own"


# What a text may be


def test_the_indentation_of_a_first_line_and_empty_lines_within_stay(tmp_path: Path) -> None:
    write(tmp_path, a="\n \n    def f():\n        pass\n\n\n    x = 1\n|\tcode\n|  \n|plain")
    write(tmp_path, v="v", t="t")
    found = read_texts(text_data(train=("a.txt",), validation=("v.txt",), test=("t.txt",), separator="|"), tmp_path)
    assert found.domains["text"]["train"] == ("    def f():\n        pass\n\n\n    x = 1", "\tcode", "plain")


def test_a_byte_order_mark_is_no_text(tmp_path: Path, dense_checkpoint: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    write(tmp_path, v="v", t="t")
    assert read_texts(text_data(train=("a.txt",), validation=("v.txt",), test=("t.txt",)), tmp_path).domains["text"][
        "train"
    ] == ("one",)
    write(tmp_path, plain="one")
    marked, plain = (read_text_blocks(dense_checkpoint, [tmp_path / name], 2, None) for name in ("a.txt", "plain.txt"))
    assert torch.equal(marked, plain)


def test_a_file_that_two_patterns_match_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, a="one", b="two", v="v")
    (tmp_path / "link.txt").symlink_to("a.txt")
    found = text_files(text_data(train=("b.txt", "[ab].txt", "*k.txt", "./a.txt"), validation=("v.txt",)), tmp_path)
    assert [file.name for file in found["train"]] == ["b.txt", "a.txt"]


@pytest.mark.parametrize("separator", ["\r\n\r\n", "\n\n", "\r\r"])
@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
def test_a_separator_matches_whatever_the_line_ends(separator: str, line_end: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(line_end.join(["one", "", "two", "still two", "", "three"]).encode())
    write(tmp_path, v="v", t="t")
    found = read_texts(
        text_data(train=("a.txt",), validation=("v.txt",), test=("t.txt",), separator=separator), tmp_path
    )
    assert found.domains["text"]["train"] == ("one", "two\nstill two", "three")


def test_the_home_stands_for_itself_in_paths_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home [of me]"
    home.mkdir()
    write(home, a="one", b="two")
    monkeypatch.setenv("HOME", str(home))
    found = text_files(text_data(train=("~/a.txt",), validation=("~/b*",)), tmp_path)
    assert (found["train"], found["validation"]) == ([home / "a.txt"], [home / "b.txt"])
    assert refusal(text_files, text_data(train=("~nobody-of-this-name/a.txt",)), tmp_path) == (
        "'~nobody-of-this-name/a.txt' names no home directory; give the path in full"
    )
