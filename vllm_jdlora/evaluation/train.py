"""A small LoRA trainer, so that the evaluation has adapters of any length of training. For evaluation only.

Plain PEFT LoRA and AdamW on one task file. Killed at any point and started again it goes on from its last checkpoint
and ends with the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_jdlora.adapter import WEIGHTS_FILE, file_digest
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.scored_logits import scored_logits
from vllm_jdlora.evaluation.tasks import read_task
from vllm_jdlora.evaluation.training_data import Batch, Example, epoch_order, in_order, make_batch, read_examples
from vllm_jdlora.evaluation.training_state import Progress, load_checkpoint, save_checkpoint
from vllm_jdlora.peft_config import CONFIG_FILE

METRICS_FILE = "train_metrics.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MEASURED = 64
"""Items of the validation and of the test split that losses are measured on."""
_CLIP = 1.0


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the defaults are those of the adapters that come with the task data.

    Attributes:
        steps: optimizer steps; None: ``epochs`` times the batches of the training split.
        learning_rate: of AdamW (no weight decay), after a linear warm-up of ``warmup`` · steps, then cosine to 0.
        checkpoints: how often the validation loss is measured, evenly spaced, the last time at the end.
        keep: ``best`` by validation loss, or ``last``.
        dtype: of the frozen base model; LoRA and optimizer are fp32.
    """

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("k_proj", "q_proj", "v_proj")
    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 2e-3
    warmup: float = 0.03
    batch: int = 16
    max_tokens: int = 192
    checkpoints: int = 3
    keep: str = "best"
    dtype: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "batch", "max_tokens", "checkpoints"):
            if getattr(self, name) < 1:
                raise JDLoRAError(f"{name} must be at least 1, not {getattr(self, name)}")
        if (self.steps is not None and self.steps < 1) or not self.epochs > 0:
            raise JDLoRAError("steps must be at least 1, epochs more than 0")
        if not 0 < self.learning_rate < 1 or not 0 <= self.warmup < 1:
            raise JDLoRAError("the learning rate and the share of warm-up must be between 0 and 1")
        if self.keep not in ("best", "last") or self.dtype not in DTYPES or not self.targets:
            raise JDLoRAError("keep is best or last, dtype fp32 or bf16, and there must be targets")


def train(
    base_model: Path,
    task_file: Path,
    output: Path,
    settings: TrainSettings | None = None,
    *,
    save_every: int = 25,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train one adapter on the first 80 % of a task file into the PEFT folder ``output`` (bf16).

    Args:
        base_model: Hugging Face folder, with ChatML tokens in its tokenizer.
        task_file: JSONL of {"instruction", "input", "output"}; the next 10 % choose the checkpoint, the last 10 %
            are the test set (both: the first 64 items).
        output: folder to create. While training, the state is in ``NAME.training.safetensors`` beside it.
        settings: see there.
        save_every: steps between two checkpoints.
        show_progress: a tqdm bar on stderr.

    Returns:
        What is written to ``train_metrics.json``.

    Raises:
        JDLoRAError: output exists, bad task file, a checkpoint of another run, or the loss is not finite.
    """
    settings = settings or TrainSettings()
    output = Path(output).absolute()
    if output.exists():
        raise JDLoRAError(f"{output}: exists already; choose another name")
    run = _Run(Path(base_model), Path(task_file), output, settings)
    run.train(save_every, show_progress)
    metrics = run.metrics()
    with written_atomically(output, CONFIG_FILE) as folder:
        run.write(folder, metrics)
    run.checkpoint.unlink(missing_ok=True)
    return metrics


def answer_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, and how many were the most likely ones.

    model: a Hugging Face causal language model. The same loss as of whole sequences.
    """
    logits = scored_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits, batch.labels), (logits.argmax(-1) == batch.labels).sum()


class _Run:
    """One training: model, data, optimizer and how far it is."""

    def __init__(self, base_model: Path, task_file: Path, output: Path, settings: TrainSettings):
        if task_file.suffix != ".jsonl":
            raise JDLoRAError(f"{task_file}: a task is a .jsonl file")
        self.settings = settings
        self.checkpoint = output.with_name(f"{output.name}.training.safetensors")
        self._task = task_file.stem
        self._base_model = base_model
        model, tokenizer = load_for_training(base_model, settings.dtype)
        tasks = {name: read_task(task_file.parent, self._task, split=name) for name in ("train", "validation", "test")}
        self._items = {name: len(task.items) for name, task in tasks.items()}
        self._examples = {name: read_examples(task, tokenizer, settings.max_tokens) for name, task in tasks.items()}
        self._per_epoch = len(self._order(0))
        self.steps = settings.steps or max(1, round(settings.epochs * self._per_epoch))
        self._identity = {
            "settings": json.loads(json.dumps(asdict(settings))),
            "task": file_digest(task_file),
            "base_model": file_digest(base_model / "config.json"),
            "steps": self.steps,
        }
        self._model = _with_lora(model, settings)
        self._lora = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self._lora.values(), lr=settings.learning_rate, weight_decay=0.0)
        self._best: dict[str, Tensor] = {}
        self._done = Progress()

    def train(self, save_every: int, show_progress: bool) -> None:
        from tqdm import tqdm

        if self.checkpoint.exists():
            self._done, self._best = load_checkpoint(self.checkpoint, self._identity, self._lora, self._optimizer)
        marks = {math.ceil(self.steps * (i + 1) / self.settings.checkpoints) for i in range(self.settings.checkpoints)}
        started = time.monotonic() - self._done.seconds
        bar = tqdm(total=self.steps, initial=self._done.step, desc=self._task, unit="step", disable=not show_progress)
        with bar:
            while self._done.step < self.steps:
                self._step()
                step = self._done.step
                if step in marks:
                    self._choose(step)
                bar.update()
                bar.set_postfix(loss=f"{sum(self._done.losses[-20:]) / len(self._done.losses[-20:]):.3f}")
                if step in marks or step % save_every == 0:
                    self._done.seconds = time.monotonic() - started
                    self._save()

    def metrics(self) -> dict[str, Any]:
        """Losses, and the loss and token accuracy on the test items with the kept weights and without any."""
        progress, settings = self._done, self.settings
        if settings.keep == "best":
            self._put(self._best)
        with self._model.disable_adapter():
            base_loss, base_accuracy = self._measure("test")
        loss, accuracy = self._measure("test")
        return {
            "task": self._task,
            "examples": sum(self._items.values()),
            "train": self._items["train"],
            "left_out_as_too_long": self._items["train"] - len(self._examples["train"]),
            "steps": self.steps,
            "epochs": self.steps / self._per_epoch,
            "best_step": progress.best[0],
            "kept_step": progress.best[0] if settings.keep == "best" else self.steps,
            "train_losses": [round(value, 5) for value in progress.losses],
            "validation_losses": progress.validation,
            "base_test_loss": base_loss,
            "lora_test_loss": loss,
            "base_token_acc": base_accuracy,
            "lora_token_acc": accuracy,
            "seconds": progress.seconds,
            "settings": asdict(settings),
        }

    def write(self, folder: Path, metrics: dict[str, Any]) -> None:
        """The PEFT folder's files."""
        from peft import get_peft_model_state_dict

        weights = {k: v.detach().bfloat16().contiguous() for k, v in get_peft_model_state_dict(self._model).items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config = self._model.peft_config["default"].to_dict()
        config |= {"inference_mode": True, "base_model_name_or_path": self._base_model.resolve().name}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        (folder / CONFIG_FILE).write_text(json.dumps(plain, indent=1, sort_keys=True, default=str) + "\n")
        (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=1) + "\n")

    def _order(self, epoch: int) -> list[list[int]]:
        return epoch_order(self._examples["train"], self.settings.batch, self.settings.seed, epoch)

    def _step(self) -> None:
        epoch, place = divmod(self._done.step, self._per_epoch)
        examples: Sequence[Example] = [self._examples["train"][i] for i in self._order(epoch)[place]]
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(self._done.step)
        self._model.train()
        loss, _ = answer_loss(self._model.get_base_model(), make_batch(examples))
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._lora.values(), _CLIP)
        if not bool(loss.isfinite()) or not bool(norm.isfinite()):
            raise JDLoRAError(
                f"{self._task}: the loss is not finite at step {self._done.step}: lower the learning rate"
            )
        self._optimizer.step()
        self._done.losses.append(float(loss.detach()))
        self._done.step += 1

    def _learning_rate(self, step: int) -> float:
        warm = round(self.settings.warmup * self.steps)
        if step < warm:
            return self.settings.learning_rate * (step + 1) / warm
        return self.settings.learning_rate * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm))) / 2

    def _choose(self, step: int) -> None:
        loss, _ = self._measure("validation")
        if not self._done.validation or loss < self._done.best[1]:
            self._best = {name: p.detach().clone() for name, p in self._lora.items()}
        self._done.validation.append((step, loss))

    @torch.no_grad()
    def _measure(self, split: str) -> tuple[float, float]:
        """(loss, token accuracy) over the answers' tokens of the first items of a split."""
        examples = self._examples[split][:_MEASURED]
        self._model.eval()
        total, right, count = 0.0, 0, 0
        for indices in in_order(examples, self.settings.batch):
            batch = make_batch([examples[i] for i in indices])
            loss, correct = answer_loss(self._model.get_base_model(), batch)
            total += float(loss) * len(batch.labels)
            right += int(correct)
            count += len(batch.labels)
        return total / count, right / count

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._lora.items():
            parameter.copy_(weights[name])

    def _save(self) -> None:
        save_checkpoint(self.checkpoint, self._identity, self._done, self._lora, self._optimizer, self._best)


def load_for_training(base_model: Path, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face folder, as backward passes are fastest on a CPU."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise JDLoRAError(f"training needs the extra vllm-jdlora[evaluate] ({error})") from error
    logging.disable_progress_bar()
    try:
        # Eager: torch's fused attention has a backward pass for bf16 on the CPU that takes a third of the whole step.
        model = AutoModelForCausalLM.from_pretrained(base_model, dtype=DTYPES[dtype], attn_implementation="eager")
        return model, AutoTokenizer.from_pretrained(base_model)
    except (OSError, ValueError) as error:
        raise JDLoRAError(f"{base_model}: not a model that transformers can load ({error})") from error


def _with_lora(model: Any, settings: TrainSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets), task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise JDLoRAError(f"no LoRA on {', '.join(settings.targets)}: {error}") from error
