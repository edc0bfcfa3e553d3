"""The auto class of transformers that loads a task's models."""

from __future__ import annotations

from typing import Any

from optimum.exporters.tasks import TasksManager


def find_model_class(task: str) -> Any:
    """The auto class for a Hugging Face task name, from optimum's table.

    "text-generation" gives `AutoModelForCausalLM`, "text2text-generation" `AutoModelForSeq2SeqLM`.
    """
    return TasksManager.get_model_class_for_task(task, framework="pt")
