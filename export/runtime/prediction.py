"""Predictions of a package: labels, entities, answers, masked words or vectors.

What the outputs mean is read from the package's own config: its class tells the task, `id2label` the names. How texts
become predictions is told by readers, one a task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, cast

from dense2moe.export.errors import ExportError
from dense2moe.export.opening import open_package
from dense2moe.export.runtime.answering import AnswerReader, open_answers
from dense2moe.export.runtime.decoder import CPU, CUDA
from dense2moe.export.runtime.label_reading import read_labels
from dense2moe.export.runtime.predictions import Prediction
from dense2moe.export.runtime.row_reading import open_fillings, open_labels, open_vectors
from dense2moe.export.runtime.single_pass import SinglePass
from dense2moe.export.runtime.text_pass import TextPass
from dense2moe.export.runtime.word_reading import open_words
from dense2moe.export.variant import Device
from dense2moe.upcycle.checkpoints.class_heads import find_task_of, list_labels, list_parts
from dense2moe.upcycle.checkpoints.processor import load_processor, open_image, process_images
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.tasks.head import ANSWERING
from dense2moe.upcycle.tasks.spans import LONGEST_ANSWER

_BATCH = 8  # images
_OF_IMAGES = "image-classification"


class Reader(Protocol):
    """Says what a package says of texts."""

    def read(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[Prediction]:
        """Predictions of texts, or of pairs of texts, in their order."""


READERS: Mapping[str, Callable[[TextPass], Reader]] = {
    "text-classification": open_labels,
    "token-classification": open_words,
    "fill-mask": open_fillings,
    "feature-extraction": open_vectors,
    ANSWERING: open_answers,
}
"""What reads texts for a task, as Hugging Face names tasks."""


@dataclass
class Predictor:
    """A package of one pass, loaded with its tokenizer or image processor.

    tasks: what it is for, by the names of several tasks at once; one task has no name.

    Raises:
        ExportError, UpcycleError: no package there, a damaged one, one that decodes, or of a task that is not predicted
            here.

    Example:
        predictor = Predictor("work/onnx-int8")
        for prediction in predictor.read_texts(["Ada Lovelace lived in London."]):
            print(prediction.entities)
    """

    directory: Path
    device: Device = "cpu"
    task: str = field(init=False)
    labels: tuple[str, ...] = field(init=False)
    tasks: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.directory = Path(self.directory)
        package = open_package(self.directory)
        if package.has_cache:
            raise ExportError(f"{self.directory}: continues text, token by token; use `dense2moe generate`")
        config = read_config(self.directory)
        self.task, self.labels = find_task_of(config) or "", list_labels(config)
        if self.task not in (*READERS, _OF_IMAGES):
            raise ExportError(
                f"{self.directory}: is for {self.task or 'no known task'}; predict reads packages for "
                f"{', '.join((*READERS, _OF_IMAGES))}"
            )
        self.tasks = {part.name: part.task for part in list_parts(config)} or {"": self.task}
        self._problem = config.problem_type
        self._run = SinglePass(self.directory, CPU if self.device == "cpu" else CUDA)
        if self.task == _OF_IMAGES:
            self._processor = load_processor(self.directory)
        else:
            self._reader = READERS[self.task](TextPass(self.directory, config, self._run))

    def read_texts(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Iterator[Prediction]:
        """Predictions of texts, or of pairs of texts, in their order.

        Questions have their contexts as second texts.

        Raises:
            ExportError: the package reads images, or there are not as many second texts.
        """
        if self.task == _OF_IMAGES:
            raise ExportError(f"{self.directory}: reads images; give image files")
        if pairs is not None and len(pairs) != len(texts):
            raise ExportError(f"{len(texts)} texts and {len(pairs)} second texts; must be as many")
        yield from self._reader.read(texts, pairs)

    def read_questions(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        may_lack: bool = False,
        longest: int = LONGEST_ANSWER,
    ) -> Iterator[Prediction]:
        """Answers to questions, each with its context, in their order.

        `may_lack` and `longest` as of an `AnswerReader`.

        Raises:
            ExportError: the package answers no questions, or there are not as many contexts.
            UpcycleError: a question leaves no room for its context.
        """
        if self.task != ANSWERING:
            raise ExportError(f"{self.directory}: is for {self.task}, and answers no questions; give what it reads")
        self._reader = replace(cast(AnswerReader, self._reader), may_lack=may_lack, longest=longest)
        yield from self.read_texts(questions, contexts)

    def read_images(self, files: Sequence[Path]) -> Iterator[Prediction]:
        """Predictions of image files, in their order.

        Raises:
            ExportError, UpcycleError: the package reads text, or a file is no image.
        """
        if self.task != _OF_IMAGES:
            raise ExportError(f"{self.directory}: reads text; give texts")
        for start in range(0, len(files), _BATCH):
            some = files[start : start + _BATCH]
            pixels = process_images(self._processor, [open_image(file) for file in some], some[0])
            logits = self._run.run({"pixel_values": pixels})["logits"]
            for file, row in zip(some, logits, strict=True):
                yield Prediction(str(file), **read_labels(row, self.labels, self._problem))
