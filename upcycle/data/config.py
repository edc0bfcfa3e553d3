"""Settings of the text: its source, and how much is used."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, assert_never

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

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


Files = Annotated[tuple[str, ...], Field(strict=False)]


class Columns(Record):
    """Columns of a table of labelled texts."""

    text: str = Field("text", description="Column of the text.")
    pair: str | None = Field(None, description="Column of a second text, of tasks on pairs of texts.")
    label: str = Field("label", description="Column of the label, the list of labels, or the number.")
    problem: Literal["auto", "value"] = Field(
        "auto",
        description="'value' predicts numbers; 'auto' does so where they are written with a point (not in CSV, where "
        "everything is text).",
    )
    words: str | None = Field(None, description="Column of the text's words, as a list, where words have tags.")
    tags: str = Field("tags", description="Column of the words' tags, as a list.")
    question: str | None = Field(
        None, description="Column of the question, such as 'question', where answers are stretches of a context."
    )
    context: str = Field("context", description="Column of the text that questions are answered from.")
    answers: str = Field(
        "answers",
        description='Column of the right answers, as of SQuAD: {"text": [...], "answer_start": [...]}, whose places '
        "count characters of the context; both empty where it has no answer. In CSV as JSON.",
    )


class TableData(Columns):
    """Labelled texts in tables: CSV, JSON lines or Parquet.

    A label is a name, a list of names where several may hold, or a number to predict. With `words` and `tags`, each
    word has a tag of its own; with `question`, answers are stretches of a context, and SQuAD's own JSON is read too,
    whatever the columns. Without `validation` or `test`, 10 % of the rows are held out for each, by a hash of
    their text; a training row whose text is also held out is left out.
    """

    kind: Literal["table"]
    train: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(
        description="Files or globs: .csv, .jsonl, .json (lines) or .parquet."
    )
    validation: Files = Field((), description="Files or globs held out for early stopping.")
    test: Files = Field((), description="Files or globs held out for the reported figures.")


class ConllData(Record):
    """Texts whose words have tags, a word a line (CoNLL).

    Columns are divided by tabs or spaces, an empty line ends a text, and lines of -DOCSTART- are left out. Splits are
    made as for tables.
    """

    kind: Literal["conll"]
    train: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(description="Files or globs, UTF-8.")
    validation: Files = Field((), description="Files or globs held out for early stopping.")
    test: Files = Field((), description="Files or globs held out for the reported figures.")
    word_column: Annotated[int, Field(ge=0)] = Field(0, description="Column of the word, from 0 on.")
    tag_column: int = Field(-1, description="Column of the tag, from 0 on; -1 is the last one.")


class ImagesData(Record):
    """Images in folders that are named by their labels."""

    kind: Literal["images"]
    train: str = Field(min_length=1, description="Folder with a folder of images for each label.")
    validation: str | None = Field(None, description="Such a folder, held out for early stopping.")
    test: str | None = Field(None, description="Such a folder, held out for the reported figures.")


class DigitsData(Record):
    """Scikit-learn's 1,797 handwritten digits of 8 by 8 pixels; needs no network."""

    kind: Literal["digits"]


class HubSplits(Record):
    """Splits of a data set of the Hugging Face hub."""

    path: str = Field(description="Data set id, such as 'PolyAI/banking77'.")
    name: str | None = Field(None, description="Configuration of the data set.")
    revision: str | None = Field(None, description="Commit, tag or branch.")
    train: str = Field("train", description="Split to train on.")
    validation: str | None = Field("validation", description="Split held out for early stopping; null makes one.")
    test: str | None = Field("test", description="Split held out for the reported figures; null makes one.")


class HubTableData(Columns, HubSplits):
    """Labelled examples of the Hugging Face hub, through the `datasets` library.

    Columns as of tables. A missing split is made by a hash of the texts.
    """

    kind: Literal["hub-table"]
    image: str | None = Field(None, description="Column of the image, where examples are images.")


class SentenceColumns(Record):
    """Columns of a table of texts that belong together."""

    text: str = Field("text", description="Column of the first text, or of the anchor.")
    pair: str | None = Field(
        "pair",
        description="Column of the second text, or of the positive; null for texts alone, which learn the vectors of "
        "the dense model.",
    )
    score: str | None = Field(
        None,
        description="Column of the pair's score, which cosines learn; without one a text learns which belongs to it.",
    )
    highest_score: PositiveFloat = Field(1.0, description="Score of a cosine of 1; STS-B's is 5.")
    negative: str | None = Field(None, description="Column of a text that does not belong to the anchor.")

    @model_validator(mode="after")
    def _check_score(self) -> Self:
        if self.pair is None and (self.score is not None or self.negative is not None):
            raise ValueError("has no pair, and a score or a negative, which say something of pairs; leave them out")
        if self.score is not None and self.negative is not None:
            raise ValueError(
                f"has a score, '{self.score}', and a negative, '{self.negative}'; must have one of them; leave the "
                "other out"
            )
        return self

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns of an example's texts, in their order."""
        return tuple(column for column in (self.text, self.pair, self.negative) if column is not None)


class SentencesData(SentenceColumns):
    """Texts that belong together, of which a model learns vectors.

    CSV, JSON lines or Parquet: pairs with a score, pairs that belong together, triplets of an anchor, its positive and
    a negative, or texts alone, of which the dense model's vectors are learned. Splits are made as for tables, by all
    texts of a row.
    """

    kind: Literal["sentences"]
    train: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(
        description="Files or globs: .csv, .jsonl, .json (lines) or .parquet."
    )
    validation: Files = Field((), description="Files or globs held out for early stopping.")
    test: Files = Field((), description="Files or globs held out for the reported figures.")


class HubSentencesData(SentenceColumns, HubSplits):
    """Texts that belong together, of the Hugging Face hub.

    Through the `datasets` library; columns as of `sentences`. A missing split is made by a hash of the texts.
    """

    kind: Literal["hub-sentences"]


class ChatData(Record):
    """Conversations, of which a decoder learns what the assistant says.

    JSON lines (or CSV, Parquet) of messages with roles and contents, or of prompts and completions, rendered by the
    tokenizer's chat template. Splits are made as for tables, by the texts that are not the assistant's.
    """

    kind: Literal["chats"]
    train: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(
        description="Files or globs: .jsonl, .json (lines), .csv or .parquet."
    )
    validation: Files = Field((), description="Files or globs held out for early stopping.")
    test: Files = Field((), description="Files or globs held out for the reported figures.")
    messages: str = Field("messages", description="Column of the conversation: a list of role and content.")
    prompt: str = Field("prompt", description="Column of the prompt, where there are no messages.")
    completion: str = Field("completion", description="Column of what is said to the prompt.")
    template: str | None = Field(
        None,
        description="File with a chat template, for a tokenizer that has none; it goes along with the trained model.",
    )


class TasksData(Record):
    """Several tasks at once, each with labelled texts of its own.

    One model learns them all, with a head for each. Batches hold examples of every task. A training text that any task
    holds out is left out.
    """

    kind: Literal["tasks"]
    tasks: Annotated[
        dict[str, Annotated[TableData | ConllData | HubTableData, Field(discriminator="kind")]], Field(min_length=2)
    ] = Field(description="Name of each task to its data.")

    @field_validator("tasks")
    @classmethod
    def _check_texts(cls, tasks: dict[str, Any]) -> dict[str, Any]:
        for name, own in tasks.items():
            if isinstance(own, HubTableData) and own.image is not None:
                raise ValueError(f"'{name}' reads images; several tasks at once must read texts")
            if isinstance(own, Columns) and own.question is not None:
                raise ValueError(f"'{name}' answers questions; train it alone, as several tasks share labels of tokens")
        return tasks

    temperature: Annotated[float, Field(ge=1)] = Field(
        1.0,
        description="A task with n examples is met in proportion to n^(1/temperature): its examples are met more than "
        "once in an epoch. 1 takes them as they are.",
    )


TextSource = PythonDocsData | InstalledData | TextData | HubData | DomainsData
OneTask = TableData | ConllData | ImagesData | DigitsData | HubTableData | SentencesData | HubSentencesData
LabelledSource = OneTask | TasksData
ExampleSource = LabelledSource | ChatData
DataSource = TextSource | ExampleSource


def reads_images(source: DataSource) -> bool:
    """Whether examples are images, so that there is no text to tokenize."""
    return isinstance(source, ImagesData | DigitsData) or (
        isinstance(source, HubTableData) and source.image is not None
    )


def count_texts(source: DataSource) -> int:
    """How many texts an example has, each of `block_size` tokens at most."""
    return len(source.text_columns) if isinstance(source, SentenceColumns) else 1


def name_domains(source: DataSource) -> tuple[str, ...]:
    """The names of the domains in a source's text, in their order."""
    match source:
        case PythonDocsData():
            return ("prose", "code")
        case TextData() | HubData():
            return ("text",)
        case DomainsData() | InstalledData():
            return tuple(source.domains)
        case TasksData():
            return tuple(source.tasks)
        case SentencesData() | HubSentencesData():
            return ("text",)
        case TableData() | ConllData() | HubTableData() | ImagesData() | DigitsData() | ChatData():
            return ("images" if reads_images(source) else "text",)
        case _:
            assert_never(source)


class DataConfig(Record):
    """Text, cut into blocks of tokens, or examples with labels."""

    source: Annotated[DataSource, Field(discriminator="kind")]
    block_size: Annotated[int, Field(ge=8)] = Field(256, description="Tokens a block; of a labelled text the most.")
    stride: PositiveInt | None = Field(
        None,
        description="Tokens that two stretches of a long context share, where questions are answered; a third of "
        "block_size if not given.",
    )
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
    max_train_examples: PositiveInt | None = Field(
        None, description="Largest number of labelled examples to train on, taken evenly; of each task, of several."
    )
    max_validation_examples: PositiveInt | None = Field(
        None, description="Largest number of labelled examples of the validation split, taken evenly."
    )
    max_test_examples: PositiveInt | None = Field(
        None, description="Largest number of labelled examples of the test split, taken evenly."
    )
