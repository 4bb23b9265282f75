"""The training loop that all scripts share, with its arguments and its optimizer."""

import json
import logging
import math
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    send_to_device,
    set_seed,
)
from safetensors.torch import load_model
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, SchedulerType, get_scheduler
from transformers.utils.logging import disable_progress_bar

from checkpointing import CheckpointFolder, find_damage
from data_loading import EpochLoader
from files import write_json, write_text
from model_cards import CHECKPOINTS
from publishing import create_repository, upload_checkpoint
from result_files import RESULT_FILES

logger = get_logger(__name__)
# Exit status after SIGTERM, once a checkpoint has been written: 128 + 15, as shells report a process that it ended.
TERMINATED = 143
MOST_STEPS_BEFORE_EXIT = 10  # with several processes
# Both sides of a resumed run must agree in these: they decide on its position in the data, or are part of its state.
FIXED_ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bert_learning_rate_scale",
    "streaming",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "group_by_length",
    "seed",
    "num_processes",
    "batches_per_epoch",
)
# They take arguments that there are not.
SCHEDULES_WITH_ARGUMENTS = (
    "reduce_lr_on_plateau",
    "greedy",
    "warmup_stable_decay",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
)
# These change nothing of what is learned.
FREE_ARGUMENTS = (
    "do_eval",
    "do_predict",
    "eval_every_epoch",
    "max_eval_samples",
    "max_predict_samples",
    "per_device_eval_batch_size",
    "dataloader_num_workers",
    "ddp_timeout",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "save_total_limit",
    "logging_steps",
    "with_tracking",
    "report_to",
    "push_to_hub",
    "push_checkpoints",
    "hub_model_id",
    "hub_private_repo",
)


@dataclass
class TrainingArguments:
    """How the model is optimized."""

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size of each process for training."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size of each process for evaluation."})
    num_train_epochs: int = field(default=1, metadata={"help": "Number of passes over the training data."})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Number of optimizer steps, in place of `num_train_epochs`."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Number of batches whose gradients are added up for one optimizer step."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate, after the warm-up."})
    weight_decay: float = field(
        default=0.01, metadata={"help": "Decoupled weight decay of the matrices; biases and LayerNorms have none."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's β1."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's β2."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's ε."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "The gradient is scaled down to this norm."})
    lr_scheduler_type: SchedulerType = field(
        default=SchedulerType.LINEAR, metadata={"help": "Course of the learning rate after the warm-up."}
    )
    num_warmup_steps: float = field(
        default=0,
        metadata={"help": "Optimizer steps over which the learning rate rises from 0; below 1, their share of all."},
    )
    lr_decay_epochs: list[int] | None = field(
        default=None,
        metadata={
            "help": "After each of these numbers of epochs the learning rate is multiplied by 0.1; with "
            "`--lr_scheduler_type constant_with_warmup`."
        },
    )
    group_by_length: bool = field(
        default=False,
        metadata={"help": "Batches hold samples of similar lengths, so that little of them is padding."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keeps an exponential moving average of the weights, of this rate at most (paper: 0.9999), and "
            "saves it as the trained model: `eval_*` are measured of it, `eval_raw_*` of the others. 0 is none."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Computes activations anew in the backward pass, to save memory."}
    )
    torch_compile: bool = field(
        default=False, metadata={"help": "Compiles the model with torch.compile, for sizes that change."}
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "By default what `accelerate launch` says.", "choices": ["no", "fp16", "bf16"]},
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Worker processes that load the data; 0 loads it in the training process."}
    )
    ddp_timeout: int = field(
        default=7200,
        metadata={
            "help": "Seconds that processes wait for one another: longer than one of them takes to prepare the dataset "
            "when it is used for the first time."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of weights, order, negatives and masks."})

    def __post_init__(self):
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "num_train_epochs",
            "max_train_steps",
            "gradient_accumulation_steps",
            "ddp_timeout",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if self.lr_scheduler_type in SCHEDULES_WITH_ARGUMENTS:
            name = SchedulerType(self.lr_scheduler_type).value
            raise ValueError(f"`--lr_scheduler_type` {name} needs arguments that there are not.")
        if self.lr_scheduler_type == SchedulerType.CONSTANT and self.num_warmup_steps:
            raise ValueError(
                f"`--num_warmup_steps` {self.num_warmup_steps} needs another `--lr_scheduler_type` than constant, such "
                "as constant_with_warmup."
            )
        if self.num_warmup_steps < 0:
            raise ValueError(f"`--num_warmup_steps` must not be negative, got {self.num_warmup_steps}.")
        if self.lr_decay_epochs is not None and self.lr_scheduler_type != SchedulerType.CONSTANT_WITH_WARMUP:
            raise ValueError(
                "`--lr_decay_epochs` goes with `--lr_scheduler_type constant_with_warmup`, got "
                f"{SchedulerType(self.lr_scheduler_type).value}."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`--ema_decay` must be at least 0 and below 1, got {self.ema_decay}.")
        if self.ema_decay == 0:
            self.ema_decay = None  # so that the command line can take back what a recipe gives
        if not self.max_grad_norm > 0:
            raise ValueError(f"`--max_grad_norm` must be positive, got {self.max_grad_norm}.")


@dataclass
class OutputArguments:
    """What is written, where, and how often."""

    output_dir: str = field(
        metadata={
            "help": "Folder for the trained model, its processor, checkpoints and results; of several machines, one "
            "that all of them share."
        }
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Trains although `output_dir` already holds a model, and writes over it."}
    )
    checkpointing_steps: str | None = field(
        default=None,
        metadata={
            "help": "Writes a checkpoint to go on from: every so many optimizer steps, or every 'epoch'. After SIGTERM "
            f"the training writes one in any case, and exits with status {TERMINATED} (a launcher of several processes "
            "has a status of its own)."
        },
    )
    save_total_limit: int | None = field(
        default=None, metadata={"help": "So many of the newest checkpoints are kept. By default all are."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint to go on from exactly; 'latest' for the newest one of `output_dir` that is not "
            "damaged, or the beginning if there is none."
        },
    )
    logging_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps between two updates of what is shown and logged. So often losses are checked to "
            "be finite, too."
        },
    )
    with_tracking: bool = field(default=False, metadata={"help": "Logs to the trackers of `--report_to`."})
    report_to: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={"help": "Trackers, such as tensorboard, wandb or trackio, or 'all' that are installed."},
    )
    model_card: str | None = field(
        default=None,
        metadata={
            "help": "What the card says beside what is measured: one of the checkpoints in model_cards/.",
            "choices": list(CHECKPOINTS),
        },
    )
    widget_pictures: bool = field(
        default=False,
        metadata={
            "help": "Shows what the model says of three images of the validation split on the page of the model. Their "
            "pictures are uploaded with it: see to it that they may be."
        },
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Uploads the trained model to the Hub."})
    push_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Uploads the model of each checkpoint, its weights not averaged, to the branch 'checkpoints'."
        },
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to upload to. By default the name of `output_dir`."}
    )
    hub_private_repo: bool = field(
        default=False, metadata={"help": "Creates the repository, if it is a new one, as a private one."}
    )
    hub_token: str | None = field(default=None, metadata={"help": "Token for the upload, if not logged in."})

    def __post_init__(self):
        steps = self.checkpointing_steps
        if self.logging_steps < 1:
            raise ValueError(f"`--logging_steps` must be at least 1, got {self.logging_steps}.")
        if steps is not None and steps != "epoch" and not (steps.isdigit() and int(steps) > 0):
            raise ValueError(f"`--checkpointing_steps` must be a positive number or 'epoch', got {steps!r}.")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(f"`--save_total_limit` must be at least 1, got {self.save_total_limit}.")
        if self.push_checkpoints and not (self.push_to_hub and self.checkpointing_steps):
            raise ValueError("`--push_checkpoints` goes with `--push_to_hub` and `--checkpointing_steps`.")

    def check_model_card(self, auto_class: str):
        """
        To be called before a training of a model for this auto class.

        Raises:
            ValueError: `--model_card` is of a checkpoint for another task.
        """
        if self.model_card is not None and CHECKPOINTS[self.model_card].auto_class != auto_class:
            fitting = [name for name, checkpoint in CHECKPOINTS.items() if checkpoint.auto_class == auto_class]
            raise ValueError(f"`--model_card`: expected one of {fitting} for this task, got {self.model_card}.")

    def check_widget(self, has_examples: bool):
        """
        To be called before a training.

        Args:
            has_examples: It evaluates on images with texts, and the model has a pipeline for them.

        Raises:
            ValueError: `--widget_pictures` is to show such examples, and there are none.
        """
        if self.widget_pictures and not has_examples:
            raise ValueError(
                "`--widget_pictures`: expected pretraining with matching, or image retrieval or VQA with regions and "
                "`--do_eval`, whose images and texts could be shown, got another training."
            )

    def check_output_dir(self):
        """
        To be called before a training.

        Raises:
            ValueError: the output folder holds a trained model or checkpoints, and neither is the run to go on nor are
                they to be overwritten.
        """
        checkpoints = CheckpointFolder(Path(self.output_dir))
        if self.overwrite_output_dir:
            return
        has_model = (Path(self.output_dir) / "config.json").exists()
        if self.resume_from_checkpoint == "latest" and (checkpoints.checkpoints() or not has_model):
            return
        if self.resume_from_checkpoint is not None and checkpoints.has(Path(self.resume_from_checkpoint)):
            return
        if has_model:
            raise ValueError(
                f"`--output_dir` {self.output_dir} already holds a model: choose another folder or give "
                "`--overwrite_output_dir`."
            )
        if checkpoints.checkpoints():
            raise ValueError(
                f"`--output_dir` {self.output_dir} holds checkpoints of a run: go on with `--resume_from_checkpoint "
                "latest`, choose another folder, or give `--overwrite_output_dir`."
            )


def make_accelerator(
    training_args: TrainingArguments, output_args: OutputArguments, find_unused_parameters: bool = False
) -> Accelerator:
    """`find_unused_parameters` is for models of which not every parameter takes part in every loss."""
    accelerator = Accelerator(
        gradient_accumulation_steps=training_args.gradient_accumulation_steps,
        mixed_precision=training_args.mixed_precision,
        log_with=output_args.report_to if output_args.with_tracking else None,
        project_config=ProjectConfiguration(project_dir=output_args.output_dir),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters),
            InitProcessGroupKwargs(timeout=timedelta(seconds=training_args.ddp_timeout)),
        ],
    )
    # The arguments have the last word, also over what `accelerate launch` says.
    accelerator.gradient_accumulation_steps = training_args.gradient_accumulation_steps
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["gradient_accumulation_steps"] = training_args.gradient_accumulation_steps
        config["gradient_clipping"] = training_args.max_grad_norm
        # DeepSpeed cannot read it off a loader, since ours are not prepared by Accelerate.
        config["train_micro_batch_size_per_gpu"] = training_args.per_device_train_batch_size
    return accelerator


def set_up_logging():
    """Messages of the scripts, without those of Accelerate and Transformers on every file that they write."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    disable_progress_bar()


def flat_config(*arguments) -> dict[str, int | float | str | bool]:
    """All fields of several dataclasses of arguments, as trackers take them."""
    values = {name: value for group in arguments for name, value in vars(group).items()}
    return {
        name: value if isinstance(value, int | float | bool) else str(value)
        for name, value in values.items()
        if name != "hub_token"
    }


def make_optimizer(
    model: torch.nn.Module, args: TrainingArguments, learning_rate_scales: Mapping[str, float] = MappingProxyType({})
) -> torch.optim.Optimizer:
    """
    AdamW without weight decay on biases and LayerNorms (everything of one dimension).

    Args:
        learning_rate_scales: By name of a parameter, what its learning rate is multiplied by, if not by 1.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = learning_rate_scales.get(name, 1.0)
            groups.setdefault((scale, args.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": scale * args.learning_rate, "weight_decay": weight_decay}
            for (scale, weight_decay), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ],
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, args: TrainingArguments, num_steps: int, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The course of the learning rate over `num_steps` steps of the optimizer."""
    num_warmup_steps = round(args.num_warmup_steps if args.num_warmup_steps >= 1 else args.num_warmup_steps * num_steps)
    if args.lr_decay_epochs is None:
        return get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps, num_steps)
    decay_steps = [epoch * steps_per_epoch for epoch in args.lr_decay_epochs]

    def scale(step: int) -> float:
        return min(1.0, step / max(1, num_warmup_steps)) * 0.1 ** sum(step >= start for start in decay_steps)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


class Totals:
    """Sums of named numbers, each with the count of what it adds up; on the device, so that no step waits for them."""

    def __init__(self):
        self.pairs: dict[str, tuple[torch.Tensor | float, torch.Tensor | float]] = {}

    def add(self, values: Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]]):
        """Adds sums and counts; tensors are of shape `()`, without a gradient."""
        for name, (total, count) in values.items():
            before = self.pairs.get(name, (0, 0))
            self.pairs[name] = (before[0] + total, before[1] + count)

    def flush(self) -> dict[str, tuple[float, float]]:
        """Sums and counts over all processes since the last call."""
        # Processes may have counted different things, or nothing.
        own = {name: (float(total), float(count)) for name, (total, count) in self.pairs.items()}
        self.pairs.clear()
        totals: dict[str, tuple[float, float]] = {}
        for of_process in gather_object([own]):
            add_totals(totals, of_process)
        return totals


def add_totals(totals: dict[str, tuple[float, float]], others: Mapping[str, tuple[float, float]]):
    for name, (total, count) in others.items():
        before = totals.get(name, (0, 0))
        totals[name] = (before[0] + total, before[1] + count)


def means_of(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Means of everything that was counted."""
    return {name: total / count for name, (total, count) in totals.items() if count}


class TrainingRun:
    """
    A model being trained.

    Args:
        model: A model, not yet prepared by Accelerate.
        processor: Saved with the model.
        loader: Batches, each with `inputs` (tensors) and `ids` (what identifies its samples, for a report).
        compute_losses: From model and inputs to the loss, and to named sums with the count of what they add up.
        begin_epoch: Called with the number of the epoch, from 0, before its first batch.
        end_epoch: Called with the number of the epoch, the unwrapped model and whether it was the last epoch; returns
            what it measured. None where nothing is to be measured.
        settings: All arguments, for the trackers, and to be compared when a run goes on.
        recipe: The arguments as a recipe, for the output folder.
        learning_rate_scales: As [`make_optimizer`] takes them.
        fixed_arguments: Names in `settings` that say what is learned: a run does not go on with others.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        loader: EpochLoader,
        training_args: TrainingArguments,
        output_args: OutputArguments,
        compute_losses: Callable[[torch.nn.Module, dict], tuple[torch.Tensor, dict[str, tuple]]],
        begin_epoch: Callable[[int], None],
        end_epoch: Callable[[int, torch.nn.Module, bool], dict[str, float]] | None,
        settings: Mapping[str, Any],
        recipe: str,
        learning_rate_scales: Mapping[str, float] = MappingProxyType({}),
        fixed_arguments: Sequence[str] = (),
    ):
        self.accelerator = accelerator
        self.processor = processor
        self.loader = loader
        self.training_args = training_args
        self.output_args = output_args
        self.compute_losses = compute_losses
        self.begin_epoch = begin_epoch
        self.end_epoch = end_epoch
        self.settings = settings
        self.recipe = recipe
        self.fixed_arguments = (*FIXED_ARGUMENTS, *fixed_arguments)
        # Before the training, so that a wrong name or token shows at once.
        is_pushed = output_args.push_to_hub and accelerator.is_main_process
        self.repo_id = create_repository(output_args, model.config) if is_pushed else None
        self.output_dir = Path(output_args.output_dir)
        self.checkpoints = CheckpointFolder(self.output_dir, output_args.save_total_limit)

        # Every epoch consists of whole steps.
        steps_per_epoch = len(loader) // training_args.gradient_accumulation_steps
        self.num_steps = training_args.num_train_epochs * steps_per_epoch
        if training_args.max_train_steps is not None:
            self.num_steps = training_args.max_train_steps
        self.averaged: AveragedModel | None = None
        if training_args.ema_decay is not None:
            if self._is_sharded:
                raise ValueError(
                    "`--ema_decay` is not for FSDP and DeepSpeed, which divide or replace the weights: give 0."
                )
            self.averaged = AveragedModel(model, device=accelerator.device, multi_avg_fn=self._move_averages)
            self.averaged.n_averaged = self.averaged.n_averaged.cpu()  # every step looks at it
            accelerator.register_for_checkpointing(self.averaged)
        if training_args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if training_args.torch_compile:
            model.compile(dynamic=True)
        optimizer = make_optimizer(model, training_args, learning_rate_scales)
        # Not prepared: the schedule counts optimizer steps, however many processes take them together.
        self.lr_scheduler = make_scheduler(optimizer, training_args, self.num_steps, steps_per_epoch)
        self.model_class = type(model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.lr_scheduler)
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

        self.step = 0
        self.results: list[dict[str, float]] = []
        self.run_id = uuid.uuid4().hex[:8]
        self.totals = Totals()
        # What was collected since the last time that it was shown, and since the epoch began.
        self.shown_totals: dict[str, tuple[float, float]] = {}
        self.epoch_totals: dict[str, tuple[float, float]] = {}
        self._unchecked: list[tuple[int, torch.Tensor, dict[str, tuple], list]] = []
        self._upload: tuple[Path, Future] | None = None
        self._is_terminated = False
        # Where every process drew the same, they would all drop the same units.
        set_seed(training_args.seed, device_specific=True)

    # ------------------------------------------------------------ the loop

    def train(self) -> list[dict[str, float]]:
        """
        Trains from the beginning, or from the checkpoint that is to be resumed.

        Returns:
            For each epoch its mean training losses, as `train_*`, and what `end_epoch` measured. `all_results.json` in
            the output folder holds the same, from the first epoch on.

        Raises:
            SystemExit: after SIGTERM and a checkpoint.
            FloatingPointError: a loss is not finite.
        """
        self.resume()
        if self.accelerator.is_main_process:
            write_text(self.output_dir / "recipe.yaml", self.recipe)
            self._remove_results()
        self.start_trackers()
        self.progress_bar = tqdm(
            total=self.num_steps,
            initial=self.step,
            desc="Training",
            disable=not self.accelerator.is_local_main_process,
        )
        self._start_clock()
        previous_handler = signal.signal(signal.SIGTERM, self._terminate)
        try:
            while self.step < self.num_steps or not self.results or self.results[-1]["step"] < self.step:
                self.train_epoch()
        finally:
            signal.signal(signal.SIGTERM, previous_handler)
        self.progress_bar.close()
        self._end_upload()
        return self.results

    def _remove_results(self):
        """Of weights that are no more, once this run trains on; at its beginning those of a run before it, too."""
        patterns = ["non_finite_loss_*.json"]
        if self.step < self.num_steps:
            patterns += RESULT_FILES
        if self.step == 0:
            patterns.append("all_results.json")
        for pattern in patterns:
            for path in self.output_dir.glob(pattern):
                path.unlink()

    def train_epoch(self):
        epoch = self.loader.epoch
        self.begin_epoch(epoch)
        self.model.train()
        # Where the last checkpoint was written after the last step, only its evaluation is left.
        batches = self._timed(self.loader) if self.step < self.num_steps else ()
        for batch in batches:
            self.take_batch(batch)
            if self.accelerator.sync_gradients:
                self.after_step()
            if self.step == self.num_steps:
                break

        self.collect()
        if self._any_process(self._is_terminated):
            self._save_and_exit()
        ends_with_checkpoint = self.output_args.checkpointing_steps == "epoch"
        if ends_with_checkpoint and self.end_epoch is not None:
            # Measuring may take longer than the training, and is all that is left to do from here.
            self.save_checkpoint(is_pushed=False)
        self._stop_clock()
        result = {f"train_{name}": value for name, value in means_of(self.epoch_totals).items()}
        result |= self._evaluate(epoch)
        self.epoch_totals.clear()
        self.results.append({"epoch": epoch + 1, "step": self.step} | result)
        if self.accelerator.is_main_process:
            write_json(self.output_dir / "all_results.json", self.results)
            if (folder := self.checkpoints.folder(self.step)).exists():
                self._write_evaluation(folder, is_checkpoint=True)
        self.accelerator.log({f"epoch/{name}": value for name, value in result.items()}, step=self.step)
        if self.loader.batch == len(self.loader):  # else the run ends here, and may go on another time
            self.loader.begin_epoch(epoch + 1)
        self._start_clock()
        if self._any_process(self._is_terminated):
            self._save_and_exit()
        if ends_with_checkpoint:
            self.save_checkpoint()

    def _evaluate(self, epoch: int) -> dict[str, float]:
        """
        What `end_epoch` measures of the weights that will be saved; where these are averaged, of the others too, as
        `eval_raw_*`.
        """
        if self.end_epoch is None:
            return {}
        is_last = self.step == self.num_steps
        result = self.end_epoch(epoch, self._whole_model(), is_last)
        if self.averaged is None:
            rows = [result]
        else:
            if self._any_process(self._is_terminated):
                self._save_and_exit()
            raw, result = result, self.end_epoch(epoch, self.averaged.module, is_last)
            rows = [{"weights": "raw"} | raw, {"weights": "averaged"} | result]
            result = {name.replace("eval_", "eval_raw_", 1): value for name, value in raw.items()} | result
        if result:
            self.accelerator.print("\n" + format_table({"epoch": epoch + 1} | row for row in rows))
        return result

    def _move_averages(self, averages: list[torch.Tensor], weights: list[torch.Tensor], _):
        # Low at first, so that short runs are not evaluated on their initial weights.
        rate = min(self.training_args.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(averages, weights, 1 - rate)

    def _whole_model(self) -> torch.nn.Module:
        """The unwrapped model, to be evaluated; where FSDP divides it among processes, a copy in one piece."""
        model = self.accelerator.unwrap_model(self.model)
        if self.accelerator.distributed_type != DistributedType.FSDP:
            return model
        # The divided one gathers its layers in forward passes, of which every process would have to have equally many.
        state_dict = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in model.state_dict().items()
        }
        whole = self.model_class(model.config).to(self.accelerator.device)
        whole.load_state_dict(state_dict)
        return whole

    def _timed(self, batches: Iterable) -> Iterator:
        """Counts the seconds for which a batch is waited for."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            add_totals(self.shown_totals, {"loading_seconds": (time.perf_counter() - start, 0)})
            yield batch

    def take_batch(self, batch: dict[str, Any]):
        """Adds the gradients of a batch, and takes a step of the optimizer where it is the last one of it."""
        accelerator = self.accelerator
        inputs = send_to_device(batch["inputs"], accelerator.device, non_blocking=True)
        with accelerator.accumulate(self.model):
            loss, values = self.compute_losses(self.model, inputs)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self.model.parameters(), self.training_args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        loss = loss.detach()
        self._unchecked.append((self.step + 1, loss, values, batch["ids"]))
        self.totals.add({"loss": (loss, 1), "samples": (len(batch["ids"]), 0)} | values)
        masks = [inputs[name] for name in ("attention_mask", "region_attention_mask") if name in inputs]
        positions, size = sum(mask.sum() for mask in masks), sum(mask.numel() for mask in masks)
        self.totals.add({"positions": (positions, 0), "padding": (size - positions, size)})
        # DeepSpeed clips by itself. Of a step that is skipped, the norm is infinite.
        if accelerator.sync_gradients and norm is not None and not accelerator.optimizer_step_was_skipped:
            # FSDP has a part of it in every process.
            self.totals.add({"gradient_norm": (norm.full_tensor() if isinstance(norm, DTensor) else norm, 1)})

    def after_step(self):
        """Schedule, log, checkpoint, and the end if it was asked for."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        self.step += 1
        if self.averaged is not None:
            self.averaged.update_parameters(self.accelerator.unwrap_model(self.model))
        self.progress_bar.update()
        is_logged = self.step % self.output_args.logging_steps == 0
        if is_logged:
            self.log()
        steps = self.output_args.checkpointing_steps
        is_saved = steps not in (None, "epoch") and self.step % int(steps) == 0
        # Processes have to agree, which takes a moment: alone, one looks after every step.
        is_terminated = self._is_terminated
        if self.accelerator.num_processes > 1:
            is_asked = self.step % min(self.output_args.logging_steps, MOST_STEPS_BEFORE_EXIT) == 0
            is_terminated = is_asked and self._any_process(is_terminated)
        if is_terminated:
            self._save_and_exit()
        if is_saved:
            self.save_checkpoint()

    def _save_and_exit(self):
        # There may be little time: nothing is uploaded.
        self.save_checkpoint(is_pushed=False)
        self.accelerator.end_training()
        self.accelerator.print(
            f"\nTerminated after step {self.step} of {self.num_steps}: --resume_from_checkpoint latest goes on."
        )
        raise SystemExit(TERMINATED)

    def _terminate(self, signal_number, frame):
        self._is_terminated = True

    def _any_process(self, value: bool) -> bool:
        flag = torch.tensor(float(value), device=self.accelerator.device)
        return self.accelerator.reduce(flag, reduction="sum").item() > 0

    # ------------------------------------------------------------ what is watched

    def _start_clock(self):
        self._clock = time.perf_counter()

    def _stop_clock(self):
        """Adds the time since its start to what is shown: evaluations and checkpoints do not count."""
        if self._clock is not None:
            add_totals(self.shown_totals, {"seconds": (time.perf_counter() - self._clock, 0)})
        self._clock = None

    def collect(self):
        """Gathers what the steps since the last call counted, after a look at their losses."""
        self.check_losses()
        totals = self.totals.flush()
        add_totals(self.shown_totals, totals)
        add_totals(self.epoch_totals, totals)

    def log(self):
        self.collect()
        self._stop_clock()
        means, sums = means_of(self.shown_totals), {name: total for name, (total, _) in self.shown_totals.items()}
        self.shown_totals.clear()
        self._start_clock()
        rates = {
            "samples_per_second": sums["samples"] / sums["seconds"],
            "tokens_per_second": sums["positions"] / sums["seconds"],
            "loading_share": sums["loading_seconds"] / sums["seconds"],
            "memory_gib": memory_bytes(self.accelerator.device) / 2**30,
        }
        learning_rates = sorted(set(self.lr_scheduler.get_last_lr()), reverse=True)
        rates |= {f"learning_rate{'' if i == 0 else f'_{i}'}": value for i, value in enumerate(learning_rates)}
        shown = {name: f"{value:.3f}" for name, value in means.items() if name.endswith("loss")}
        self.progress_bar.set_postfix(
            shown | {"samples/s": f"{rates['samples_per_second']:.1f}"},
            refresh=False,
        )
        self.accelerator.log({f"train/{name}": value for name, value in (means | rates).items()}, step=self.step)

    def check_losses(self):
        """
        Looks at all losses since the last call, for which a device has to be waited for.

        Raises:
            FloatingPointError: one is not finite, in this or in another process.
        """
        losses = torch.stack([loss for _, loss, _, _ in self._unchecked]) if self._unchecked else torch.zeros(1)
        is_finite = losses.isfinite().tolist()
        message = "The loss of another process is not finite."
        if not all(is_finite):
            message = self._report_loss(*self._unchecked[is_finite.index(False)])
        self._unchecked.clear()
        if self._any_process(not all(is_finite)):
            raise FloatingPointError(message)

    def _report_loss(self, step: int, loss: torch.Tensor, values: dict[str, tuple], ids: list) -> str:
        """Writes down which samples gave this loss, and says where."""
        process = self.accelerator.process_index
        path = self.output_dir / f"non_finite_loss_{process}.json"
        means = {name: float(total) / max(float(count), 1) for name, (total, count) in values.items()}
        # JSON knows no NaN.
        report = {"step": step, "epoch": self.loader.epoch + 1, "process": process, "loss": str(loss.item())}
        write_json(path, report | {"means": {name: str(mean) for name, mean in means.items()}, "samples": ids})
        return (
            f"The loss is {loss.item()} at step {step} (epoch {report['epoch']}, process {process}): "
            f"{', '.join(f'{name} {mean:.4g}' for name, mean in means.items())}. {path} names the samples."
        )

    def start_trackers(self):
        if not self.output_args.with_tracking:
            return
        # A run that goes on is the same run for each tracker, and replaces what was logged after the checkpoint.
        same_run = {"id": self.run_id, "resume": "allow"}
        self.accelerator.init_trackers(
            "interbert",
            config=dict(self.settings),
            init_kwargs={
                "tensorboard": {"purge_step": self.step + 1},
                "wandb": {"name": self.output_dir.name} | same_run,
                "trackio": {"name": f"{self.output_dir.name}-{self.run_id}", "resume": "allow"},
            },
        )

    # ------------------------------------------------------------ checkpoints

    def save_checkpoint(self, is_pushed: bool = True):
        """All that the run needs to go on as if it had not stopped."""
        self.collect()
        self._stop_clock()
        uploading = self._upload[0] if self._upload is not None else None
        folder = self.checkpoints.save(self.accelerator, self.step, self._write_checkpoint, keep=uploading)
        if is_pushed and self.output_args.push_checkpoints and self.accelerator.is_main_process:
            # The training does not wait for an upload that is still going on: this one is left out then.
            if self._upload is None or self._upload[1].done():
                self._end_upload()
                self._upload = folder, upload_checkpoint(folder, self.repo_id, self.step, self.output_args.hub_token)
        self._start_clock()

    def _end_upload(self):
        """Waits for the upload of a checkpoint. The training does not fail with it."""
        if self._upload is not None:
            folder, upload = self._upload
            if upload.exception() is not None:
                logger.warning(f"{folder} could not be uploaded: {upload.exception()}.")
            self._upload = None
            self.checkpoints.remove_old()

    def _write_checkpoint(self, folder: Path):
        self.accelerator.save_state(str(folder))
        torch.save(self.loader.state_dict(), folder / f"data_{self.accelerator.process_index}.bin")
        if self.accelerator.is_main_process:
            run = {
                "step": self.step,
                "run_id": self.run_id,
                "settings": self._comparable_settings(),
                "results": self.results,
                "shown_totals": self.shown_totals,
                "epoch_totals": self.epoch_totals,
            }
            write_json(folder / "training_state.json", run)
            self._write_evaluation(folder, is_checkpoint=True)

    def _write_evaluation(self, folder: Path, is_checkpoint: bool = False):
        """`eval_results.json`: what was measured of these weights, if anything. A checkpoint's are not averaged."""
        if self.results and self.results[-1]["step"] == self.step:
            measured = {name: value for name, value in self.results[-1].items() if not name.startswith("train_")}
            if is_checkpoint and self.averaged is not None:
                raw = {name: value for name, value in measured.items() if name.startswith("eval_raw_")}
                measured = {name: measured[name] for name in ("epoch", "step")}
                measured |= {name.replace("eval_raw_", "eval_", 1): value for name, value in raw.items()}
            if measured.keys() > {"epoch", "step"}:
                write_json(folder / "eval_results.json", measured)

    @property
    def _is_sharded(self) -> bool:
        # Accelerate then writes and reads weights by itself.
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    def _save_weights(self, models: list, weights: list, folder: str):
        weights.clear()
        self._write_model(Path(folder), self.accelerator.get_state_dict(self.model))

    def _load_weights(self, models: list, folder: str):
        if not self._is_sharded:
            models.clear()
            load_model(self.accelerator.unwrap_model(self.model), Path(folder) / "model.safetensors")

    def _write_model(self, folder: Path, state_dict: dict[str, torch.Tensor]):
        """Writes weights (safetensors), configuration, processor, and the code of all three."""
        if self.accelerator.is_main_process:
            config = self.accelerator.unwrap_model(self.model).config
            # Not the model itself: FSDP has given it another class, whose code would be written, and gathers tied
            # weights one by one.
            with torch.device("meta"):
                model = self.model_class(config)
            model.load_state_dict(state_dict, assign=True)
            model.tie_weights()
            model.save_pretrained(folder)
            self.processor.save_pretrained(folder)

    def trained_model(self) -> PreTrainedModel:
        """What is saved in the end, to be used: the averaged model where there is one. All processes call this."""
        return self.averaged.module if self.averaged is not None else self._whole_model()

    def write_final_model(self):
        """
        Writes the trained model to the output folder, `config.json` last: a folder that has one holds a complete model,
        and an interrupted run can be started again. All processes call this.
        """
        unfinished = self.output_dir / "final.unfinished"
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            (self.output_dir / "config.json").unlink(missing_ok=True)
        if self.averaged is not None:
            state_dict = self.averaged.module.state_dict()
        else:
            state_dict = self.accelerator.get_state_dict(self.model)  # gathered, where it is divided among processes
        self._write_model(unfinished, state_dict)
        if self.accelerator.is_main_process:
            self._write_evaluation(self.output_dir)
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(self.output_dir / path.name)
            unfinished.rmdir()
        self.accelerator.wait_for_everyone()

    def resume(self):
        """
        Goes on from the checkpoint of `--resume_from_checkpoint`.

        Raises:
            ValueError: there is no such checkpoint, it is damaged, or it is of a run over other data, in other batches,
                or of another number of processes.
        """
        # One process looks: others may see another state of a folder that is not on their machine.
        chosen = [self._choose_checkpoint() if self.accelerator.is_main_process else None]
        folder, error = broadcast_object_list(chosen)[0]
        if error is not None:
            raise ValueError(error)
        if folder is None:
            return
        if not (folder / "training_state.json").exists():
            raise ValueError(f"{folder} is not to be seen from process {self.accelerator.process_index}.")
        run = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
        if run["step"] > self.num_steps:
            raise ValueError(f"{folder} is of step {run['step']}, behind the last step of this run, {self.num_steps}.")
        self._compare_settings(folder, run)
        self.accelerator.load_state(str(folder))
        position = torch.load(folder / f"data_{self.accelerator.process_index}.bin", weights_only=True)
        self.loader.load_state_dict(position)
        self.shown_totals, self.epoch_totals = run["shown_totals"], run["epoch_totals"]
        self.step, self.run_id = run["step"], run["run_id"]
        # JSON has no NaN, which a correlation of answers that are all the same is.
        self.results = [
            {name: math.nan if value is None else value for name, value in row.items()} for row in run["results"]
        ]
        if self.accelerator.is_main_process:
            self.checkpoints.remove_after(self.step if self.checkpoints.has(folder) else -1)
        logger.info(f"Going on from {folder}, after step {self.step}.")

    def _choose_checkpoint(self) -> tuple[Path | None, str | None]:
        """The checkpoint to go on from, if any, and what is wrong with it."""
        requested = self.output_args.resume_from_checkpoint
        if requested is None:
            self.checkpoints.remove_after(-1)  # they are to be overwritten
            return None, None
        if requested == "latest":
            folder = self.checkpoints.newest_valid()
            if folder is None:
                logger.info(f"{self.output_dir} has no checkpoint to go on from: the training begins.")
            return folder, None
        damage = find_damage(Path(requested))
        return Path(requested), None if damage is None else f"`--resume_from_checkpoint` {requested}: {damage}."

    def _comparable_settings(self) -> dict[str, Any]:
        more = {"num_processes": self.accelerator.num_processes, "batches_per_epoch": len(self.loader)}
        return {**self.settings, **more}

    def _compare_settings(self, folder: Path, run: Mapping[str, Any]):
        before, now = run["settings"], self._comparable_settings()
        changed = {
            name: f"{name} was {before.get(name)}, is {now.get(name)}"
            for name in {**before, **now}
            if name not in FREE_ARGUMENTS and before.get(name) != now.get(name)
        }
        if before.get("streaming") and before["dataloader_num_workers"] != now["dataloader_num_workers"]:
            changed["dataloader_num_workers"] = (
                f"dataloader_num_workers was {before['dataloader_num_workers']}, is {now['dataloader_num_workers']}, "
                "each of which has a place of its own in a stream"
            )
        fixed = (*self.fixed_arguments, "dataloader_num_workers")
        if "ema_decay" in changed and "None" in (before.get("ema_decay"), now.get("ema_decay")):
            fixed = (*fixed, "ema_decay")
        wrong = [changed[name] for name in changed if name in fixed]
        if wrong:
            raise ValueError(f"{folder} is of another run: {'; '.join(wrong)}.")
        for change in changed.values():
            logger.warning(f"The run goes on with other settings: {change}.")


def memory_bytes(device: torch.device) -> int:
    """The most that tensors took on a GPU; on a CPU what the process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def format_table(rows: Iterable[dict[str, float]]) -> str:
    """Rows with the same keys as a plain-text table: whole numbers as they are, others with three decimals."""
    rows = list(rows)
    cells = [[str(v) if isinstance(v, int | str) else f"{v:.3f}" for v in row.values()] for row in rows]
    header = list(rows[0])
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
