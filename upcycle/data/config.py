"""Settings of the text: its source, and how much is used."""

from __future__ import annotations

from typing import Annotated, Literal, assert_never

from pydantic import Field, PositiveInt

from dense2moe.upcycle.record import Record


class PythonDocsData(Record):
    """Documentation and source of the running Python; needs no network."""

    kind: Literal["python-docs"]


class InstalledPart(Record):
    """Files of some installed packages."""

    packages: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(
        description="Names of installed Python packages, as pip knows them."
    )
    files: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(
        description="Patterns of recorded file names, such as 'torch/include/*.h', whose * also stands for /."
    )


class InstalledData(Record):
    """Text of installed Python packages, in domains; needs no network.

    A file is a document. Whole files are held out, by a hash of their names: 5 % for validation, 5 % for the test.
    Paragraphs that held-out files share are left out of the others. Files of more than 400 kB, or not in UTF-8, are
    passed over.
    """

    kind: Literal["installed"]
    domains: Annotated[dict[str, InstalledPart], Field(min_length=1)] = Field(
        description="Name of each domain to its files."
    )


class TextData(Record):
    """Text files, as paths or globs.

    Without `validation` or `test`, 5 % of the documents are held out for each, by a hash of their text. Blank lines
    before a document and white space behind it are left out; the first line keeps its indentation. A file that two
    patterns match is read once, and a byte-order mark is no text.
    """

    kind: Literal["text"]
    train: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(description="Files or globs, UTF-8.")
    validation: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Files or globs held out for early stopping."
    )
    test: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Files or globs held out for the reported figures."
    )
    separator: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Text between two documents of a file; without it a file is one document."
    )


class HubData(Record):
    """A data set of the Hugging Face hub, through the `datasets` library."""

    kind: Literal["hub"]
    path: str = Field(description="Data set id, such as 'Salesforce/wikitext'.")
    name: str | None = Field(None, description="Configuration of the data set.")
    revision: str | None = Field(None, description="Commit, tag or branch.")
    text_column: str = Field("text", description="Column that holds the text.")
    train: str = Field("train", description="Split to train on.")
    validation: str = Field("validation", description="Split held out for early stopping.")
    test: str = Field("test", description="Split held out for the reported figures.")


class DomainsData(Record):
    """Text of several domains, each with a source of its own.

    A block holds text of one domain.
    """

    kind: Literal["domains"]
    domains: Annotated[dict[str, Annotated[TextData | HubData, Field(discriminator="kind")]], Field(min_length=2)] = (
        Field(description="Name of each domain to its text.")
    )


DataSource = PythonDocsData | InstalledData | TextData | HubData | DomainsData


def name_domains(source: DataSource) -> tuple[str, ...]:
    """The names of the domains in a source's text, in their order."""
    match source:
        case PythonDocsData():
            return ("prose", "code")
        case TextData() | HubData():
            return ("text",)
        case DomainsData() | InstalledData():
            return tuple(source.domains)
        case _:
            assert_never(source)


class DataConfig(Record):
    """Text, cut into blocks of tokens."""

    source: Annotated[DataSource, Field(discriminator="kind")]
    block_size: Annotated[int, Field(ge=8)] = Field(256, description="Tokens a block.")
    max_train_tokens: PositiveInt | None = Field(
        None,
        description="Largest number of tokens to use, taken evenly from the whole text; of a large text at most about "
        "twice as many are tokenized.",
    )
    max_validation_tokens: PositiveInt = Field(
        32_768, description="Largest number of tokens of the validation split to use, taken evenly from the whole."
    )
    max_test_tokens: PositiveInt = Field(
        32_768, description="Largest number of tokens of the test split to use, taken evenly from the whole."
    )
