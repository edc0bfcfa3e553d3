"""A brief fine-tune of the mixture, and of the dense model as its control.

The Trainer of transformers, on accelerate, runs the loop, so that one process and many are the same code. What is ours: the per-layer balance
loss, a learning rate of its own for the routers with a warm-up in which only they learn, and the routing statistics in the history.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from upcycle.balance import LayerRouting, balance_loss, describe_routing
from upcycle.checkpoint import copy_companions
from upcycle.config import FinetuneConfig
from upcycle.data import read_blocks
from upcycle.errors import UpcycleError
from upcycle.evaluation import Evaluation, evaluate, held_out_loss, next_token_loss
from upcycle.progress import Progress
from upcycle.receipt import load_model, router_weights, sparse_layers
from upcycle.target import add_alias_fields

CONTROL_DIRECTORY = "control"
HISTORY_NAME = "history.jsonl"
_MIN_LR_SHARE = 0.1  # the cosine ends here, as in Llama's and OLMoE's recipes


@dataclass(frozen=True)
class Step:
    """One line of the history; losses in nats a token, the balance loss is 1 when balanced."""

    model: str
    step: int
    num_tokens: int
    train_loss: float | None = None
    balance_loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    layers: tuple[LayerRouting, ...] = ()


@dataclass(frozen=True)
class FinetuneFacts:
    """What fine-tuning did: held-out figures of each model, the history, and which step was kept."""

    evaluations: dict[str, Evaluation]
    history: tuple[Step, ...]
    best_steps: dict[str, int]
    precision: str
    router_task_gradient: float
    warnings: tuple[str, ...] = field(default=())


def finetune(dense: Path, mixture: Path, data: Path, output: Path, config: FinetuneConfig, seed: int, progress: Progress) -> FinetuneFacts:
    """Fine-tune the checkpoint in `mixture` on the blocks in `data`; writes the best weights (by validation loss) to `output` in float32.

    With `config.control` the checkpoint in `dense` is continued on the same batches in the same order and written to `output/control`.
    The history goes to `output/history.jsonl`.

    Raises:
        UpcycleError: the loss became NaN or infinite.
        OSError: the disk is full or not writable.
    """
    train, validation, test = (read_blocks(data, split) for split in ("train", "validation", "test"))
    evaluations = {"dense": evaluate(dense, test, "dense", progress), "upcycled": evaluate(mixture, test, "upcycled", progress)}
    precision = _precision(config)
    history: list[Step] = []
    best_steps = {}
    jobs = [("fine-tuned", mixture, output)]
    if config.control:
        (output / CONTROL_DIRECTORY).mkdir()
        jobs.append(("dense continued", dense, output / CONTROL_DIRECTORY))
    gradient = _router_task_gradient(mixture, train[: config.batch_size])
    for name, source, target in jobs:
        best_steps[name] = _train(name, source, target, train, validation, config, precision, seed, history, progress)
        evaluations[name] = evaluate(target, test, name, progress)
    with (output / HISTORY_NAME).open("w", encoding="utf-8") as file:
        for step in history:
            file.write(json.dumps(asdict(step)) + "\n")
    return FinetuneFacts(evaluations, tuple(history), best_steps, precision, gradient, tuple(_warnings(history, gradient)))


def _precision(config: FinetuneConfig) -> str:
    if config.precision != "auto":
        return config.precision
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def _router_task_gradient(mixture: Path, blocks: torch.Tensor) -> float:
    """Norm of the next-token loss's gradient in the routers, relative to that in all weights.

    About zero (1e-9) while experts are equal and weights are renormalized: the router then learns from the balance loss alone, until the
    experts have come apart.
    """
    model = load_model(mixture, torch.float32)
    next_token_loss(model(input_ids=blocks, use_cache=False).logits, blocks).backward()
    squares = {id(p): float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None}
    routers = sum(squares.get(id(p), 0.0) for p in router_weights(model))
    return math.sqrt(routers / max(sum(squares.values()), 1e-30))


def _warnings(history: list[Step], gradient: float) -> Iterator[str]:
    if gradient < 1e-6:
        yield (
            f"the routers' task gradient was {gradient:.0e} of the whole at the start: equal experts give a renormalizing router nothing to learn "
            "from; it followed the balance loss until the experts came apart; set upcycle.experts.noise to start them apart"
        )
    last = next((step for step in reversed(history) if step.layers), None)
    for layer in last.layers if last else ():
        dead = [expert for expert, load in enumerate(layer.load) if load < 0.1 / len(layer.load)]
        if dead:
            yield f"layer {layer.number}: experts {dead} get less than a tenth of their share of tokens; raise finetune.balance_coefficient"


def _train(
    name: str, source: Path, target: Path, train: torch.Tensor, validation: torch.Tensor, config: FinetuneConfig, precision: str, seed: int,
    history: list[Step], progress: Progress,
) -> int:  # fmt: skip
    """Train one model and save its best weights; returns the step that they come from."""
    model = load_model(source, torch.float32)
    model.config.use_cache = False
    scratch = target / "trainer"
    eval_steps = min(config.eval_steps, config.steps)
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_grad_norm,
        bf16=precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
        logging_steps=max(1, config.steps // 50),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        include_num_input_tokens_seen="all",  # the last batch of an epoch may be smaller
        dataloader_pin_memory=False,
    )
    trainer = _MixtureTrainer(
        model=model,
        args=arguments,
        train_dataset=_Blocks(train),
        eval_dataset=_Blocks(validation),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=config.patience)],
        settings=config,
    )
    trainer.add_callback(_Watch(trainer, name, history, progress))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    kept_step = int(best.rsplit("-", 1)[1]) if best else trainer.state.global_step
    model.config.use_cache = True
    if trainer.is_world_process_zero():
        model.save_pretrained(target)
        add_alias_fields(target)
        copy_companions(source, target)
        shutil.rmtree(scratch, ignore_errors=True)
    return kept_step


class _Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index]}


class _MixtureTrainer(Trainer):
    """The Trainer with a per-layer balance loss and two learning-rate schedules; a model without routers trains as it is."""

    loss_is_scaled_for_ga = False

    def __init__(self, *, settings: FinetuneConfig, **trainer_arguments: Any) -> None:
        self.mixture: PreTrainedModel = trainer_arguments["model"]
        self.routers = {id(p) for p in router_weights(self.mixture)}
        self.sparse_layers = sparse_layers(self.mixture)
        self.settings = settings
        self.balance: list[float] = []
        self.routing: tuple[torch.Tensor, ...] = ()
        super().__init__(**trainer_arguments)
        self.model_accepts_loss_kwargs = False
        self.remove_callback(transformers.PrinterCallback)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: torch.Tensor | int | None = None
    ) -> Any:
        """Next-token loss plus, for a mixture, the mean over layers of each layer's balance loss."""
        ids = inputs["input_ids"]
        if not self.routers:
            return next_token_loss(model(input_ids=ids).logits, ids)
        outputs = model(input_ids=ids, output_router_logits=True)
        self.routing = tuple(logits.detach() for logits in outputs.router_logits)
        top_k = self.mixture.config.num_experts_per_tok
        balance = torch.stack([balance_loss(logits, top_k) for logits in outputs.router_logits]).mean()
        self.balance.append(float(balance.detach()))
        return next_token_loss(outputs.logits, ids) + self.settings.balance_coefficient * balance

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The plain next-token loss on the validation blocks, without the balance loss."""
        model = self.mixture
        model.eval()
        metrics = {f"{metric_key_prefix}_loss": held_out_loss(model, cast(_Blocks, self.eval_dataset).blocks)}
        model.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_best_model(self) -> None:
        """Take over every weight of the best checkpoint.

        The Trainer's own way keeps the last step's experts and routers, with a warning: it looks for the names in memory, where experts are stacked,
        and the file has one tensor an expert.
        """
        best = load_model(Path(cast(str, self.state.best_model_checkpoint)), torch.float32)
        self.mixture.load_state_dict(best.state_dict())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the balance loss and the routing to what the Trainer logs."""
        if "loss" in logs and self.balance:
            mean = sum(self.balance) / len(self.balance)
            logs = {**logs, "balance_loss": mean, "loss": logs["loss"] - self.settings.balance_coefficient * mean}
            self.balance = []
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with three groups: routers (own rate, no decay), matrices, and norms (no decay)."""
        parameters = [p for p in self.mixture.parameters() if p.requires_grad]
        rest = [p for p in parameters if id(p) not in self.routers]
        groups = [
            {"params": [p for p in parameters if id(p) in self.routers], "lr": self.settings.router_learning_rate, "weight_decay": 0.0},
            {"params": [p for p in rest if p.ndim >= 2], "lr": self.settings.learning_rate, "weight_decay": self.settings.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "lr": self.settings.learning_rate, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Linear warm-up and cosine for all; everything but the routers waits for the router warm-up to end."""
        settings = self.settings
        optimizer = optimizer or cast(torch.optim.Optimizer, self.optimizer)
        wait = settings.router_warmup_steps if self.routers else 0

        def rate(delay: int, step: int) -> float:
            step -= delay
            if step < 0:
                return 0.0
            if step < settings.warmup_steps:
                return (step + 1) / settings.warmup_steps
            share = (step - settings.warmup_steps) / max(1, num_training_steps - delay - settings.warmup_steps)
            return _MIN_LR_SHARE + (1 - _MIN_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

        router_group = bool(self.routers)
        delays = [0 if router_group and number == 0 else wait for number in range(len(optimizer.param_groups))]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [partial(rate, delay) for delay in delays])
        return self.lr_scheduler


class _Watch(TrainerCallback):
    """Moves what the Trainer logs into our history, and stops on a loss that is no number."""

    def __init__(self, trainer: _MixtureTrainer, name: str, history: list[Step], progress: Progress) -> None:
        self.trainer, self.name, self.history, self.progress = trainer, name, history, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(f"training {self.name}", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, model: Any = None, **_: Any) -> None:
        logs = logs or {}
        loss, validation = logs.get("loss"), logs.get("eval_loss")
        if loss is None and validation is None:
            return
        for value in (loss, validation):
            if value is not None and not math.isfinite(value):
                raise UpcycleError(f"finetune: the loss of {self.name} is {value} at step {state.global_step}; lower finetune.learning_rate")
        routing = self.trainer.routing if loss is not None else ()
        layers = describe_routing(self.trainer.sparse_layers, routing, model.config.num_experts_per_tok) if routing else ()
        tokens, rate = state.num_input_tokens_seen, logs.get("learning_rate")
        self.history.append(Step(self.name, state.global_step, tokens, loss, logs.get("balance_loss"), validation, rate, layers))
