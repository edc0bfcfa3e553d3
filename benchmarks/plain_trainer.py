"""A dense model trained on labels as anybody would, by transformers' Trainer: what `labels.py` compares with.

    python benchmarks/plain_trainer.py '{"model": …, "source": …, "most_tokens": …, "steps": …, …}'

Nothing of dense2moe is imported. Rates and steps are as in the recipes: AdamW without decay, a warm-up of a tenth, a
cosine, gradients clipped to 1. The cosine ends at a tenth of the peak, as dense2moe's does.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
from seqeval.metrics import f1_score
from sklearn.model_selection import train_test_split
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def read_table(path: str, label: str) -> list[dict[str, Any]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return [{"text": row["text"], "label": row[label]} for row in csv.DictReader(file)]


def read_tags(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for text in re.split(r"\n\s*\n", Path(path).read_text(encoding="utf-8").replace("\r", "")):
        pairs = [line.split("\t") for line in text.splitlines() if line.strip()]
        if pairs:
            rows.append({"words": [pair[0] for pair in pairs], "tags": [pair[-1].strip() for pair in pairs]})
    return rows


def encode_tags(tokenizer: Any, row: dict[str, Any], numbers: dict[str, int], most: int) -> dict[str, Any]:
    encoded = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=most)
    labels, last = [], None
    for place in encoded.word_ids():
        labels.append(-100 if place is None or place == last else numbers[row["tags"][place]])
        last = place
    return {**encoded, "labels": labels}


def main() -> None:
    settings = json.loads(sys.argv[1])
    source, model_path, most = settings["source"], settings["model"], settings["most_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if source["kind"] == "table":
        train, test = (read_table(source[split][0], source["label"]) for split in ("train", "test"))
        train, validation = train_test_split(train, test_size=0.1, random_state=settings["seed"])
        names = sorted({row["label"] for row in train})
        numbers = {name: number for number, name in enumerate(names)}
        sets = [
            [
                {**tokenizer(row["text"], truncation=True, max_length=most), "labels": numbers[row["label"]]}
                for row in rows
            ]
            for rows in (train, validation[:500], test)
        ]
        model_class, collator = AutoModelForSequenceClassification, DataCollatorWithPadding(tokenizer)

        def score(found: Any) -> dict[str, float]:
            return {"figure": float((found.predictions.argmax(-1) == found.label_ids).mean())}
    else:
        splits = [read_tags(source[split][0]) for split in ("train", "validation", "test")]
        names = sorted({tag for rows in splits for row in rows for tag in row["tags"]})
        numbers = {name: number for number, name in enumerate(names)}
        sets = [[encode_tags(tokenizer, row, numbers, most) for row in rows] for rows in splits]
        sets[1] = sets[1][:500]
        model_class, collator = AutoModelForTokenClassification, DataCollatorForTokenClassification(tokenizer)

        def score(found: Any) -> dict[str, float]:
            said, right = [], []
            for given, true in zip(found.predictions.argmax(-1), found.label_ids, strict=True):
                real = true != -100
                said.append([names[number] for number in given[real]])
                right.append([names[number] for number in true[real]])
            return {"figure": float(f1_score(right, said))}

    set_seed(settings["seed"])
    model = model_class.from_pretrained(model_path, num_labels=len(names))
    steps = settings["steps"]
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=directory,
                max_steps=steps,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=32,
                learning_rate=settings["learning_rate"],
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr_rate": 0.1},
                warmup_steps=steps // 10,
                weight_decay=0.0,
                max_grad_norm=1.0,
                eval_strategy="steps",
                save_strategy="steps",
                eval_steps=steps // 3,
                save_steps=steps // 3,
                load_best_model_at_end=True,
                metric_for_best_model="figure",
                greater_is_better=True,
                seed=settings["seed"],
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=sets[0],
            eval_dataset=sets[1],
            data_collator=collator,
            compute_metrics=score,
        )
        trainer.train()
        result = trainer.evaluate(sets[2])
    figure = result["eval_figure"]
    assert numpy.isfinite(figure)
    Path(settings["output"]).write_text(json.dumps({"figure": figure}), encoding="utf-8")


if __name__ == "__main__":
    main()
