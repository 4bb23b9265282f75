"""The training loop that all scripts share, with its arguments, its optimizer and its checkpoints."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, ProjectConfiguration
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, SchedulerType, get_scheduler


@dataclass
class TrainingArguments:
    """How the model is optimized."""

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size of each process for training."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size of each process for evaluation."})
    num_train_epochs: int = field(default=1, metadata={"help": "Number of passes over the training data."})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Number of optimizer steps; ends the training before `num_train_epochs`."}
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
    num_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps over which the learning rate rises from 0."}
    )
    group_by_length: bool = field(
        default=False,
        metadata={"help": "Batches hold samples of similar lengths, so that little of them is padding."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Computes activations anew in the backward pass, to save memory."}
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "By default what `accelerate launch` says.", "choices": ["no", "fp16", "bf16"]},
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Worker processes that load the data; 0 loads it in the training process."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of weights, order, negatives and masks."})

    def __post_init__(self):
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "num_train_epochs",
            "max_train_steps",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.max_grad_norm > 0:
            raise ValueError(f"`--max_grad_norm` must be positive, got {self.max_grad_norm}.")


@dataclass
class OutputArguments:
    """What is written, where, and how often."""

    output_dir: str = field(metadata={"help": "Folder for the trained model, its processor and the results."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Trains although `output_dir` already holds a model, and writes over it."}
    )
    checkpointing_steps: str | None = field(
        default=None,
        metadata={"help": "Saves the model on the way: every so many optimizer steps, or every 'epoch'."},
    )
    logging_steps: int = field(
        default=10, metadata={"help": "Optimizer steps between two updates of the losses that are shown."}
    )
    with_tracking: bool = field(default=False, metadata={"help": "Logs to the trackers of `--report_to`."})
    report_to: str = field(
        default="all", metadata={"help": "Tracker, such as tensorboard or wandb, or 'all' that are installed."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Uploads the trained model to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to upload to. By default the name of `output_dir`."}
    )
    hub_token: str | None = field(default=None, metadata={"help": "Token for the upload, if not logged in."})

    def __post_init__(self):
        steps = self.checkpointing_steps
        if self.logging_steps < 1:
            raise ValueError(f"`--logging_steps` must be at least 1, got {self.logging_steps}.")
        if steps is not None and steps != "epoch" and not (steps.isdigit() and int(steps) > 0):
            raise ValueError(f"`--checkpointing_steps` must be a positive number or 'epoch', got {steps!r}.")
        if (Path(self.output_dir) / "config.json").exists() and not self.overwrite_output_dir:
            raise ValueError(
                f"`--output_dir` {self.output_dir} already holds a model: choose another folder or give "
                "`--overwrite_output_dir`."
            )


def make_accelerator(
    training_args: TrainingArguments, output_args: OutputArguments, find_unused_parameters: bool = False
) -> Accelerator:
    """`find_unused_parameters` is for models of which not every parameter takes part in every loss."""
    return Accelerator(
        gradient_accumulation_steps=training_args.gradient_accumulation_steps,
        mixed_precision=training_args.mixed_precision,
        log_with=output_args.report_to if output_args.with_tracking else None,
        project_config=ProjectConfiguration(project_dir=output_args.output_dir),
        # The order of an epoch depends on the seed and the epoch alone, and is the same in every process.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=training_args.seed),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
    )


def flat_config(*arguments) -> dict[str, int | float | str | bool]:
    """All fields of several dataclasses of arguments, as trackers take them."""
    values = {name: value for group in arguments for name, value in vars(group).items()}
    return {
        name: value if isinstance(value, int | float | bool) else str(value)
        for name, value in values.items()
        if name != "hub_token"
    }


def make_optimizer(model: torch.nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW without weight decay on biases and LayerNorms (everything of one dimension)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )


class RunningMeans:
    """Means of named losses since the last call of `reset`, kept on the device so that no step waits for them."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def update(self, values: dict[str, torch.Tensor]):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        return {name: value.item() for name, value in accelerator.reduce(means, reduction="mean").items()}


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    train_dataloader: DataLoader,
    training_args: TrainingArguments,
    output_args: OutputArguments,
    compute_losses: Callable[[torch.nn.Module, dict], dict[str, torch.Tensor]],
    begin_epoch: Callable[[int], None],
    end_epoch: Callable[[int, torch.nn.Module, bool], dict[str, float]],
    save: Callable[[torch.nn.Module, Path], None],
) -> list[dict[str, float]]:
    """
    Trains a model.

    Args:
        compute_losses: From model and batch to named losses; the one named "loss" is minimized.
        begin_epoch: Called with the number of the epoch, from 0, before its first batch.
        end_epoch: Called with the number of the epoch, the unwrapped model and whether it was the last epoch; returns
            what it measured.
        save: Called with the unwrapped model and an empty folder to write a checkpoint to.

    Returns:
        For each epoch its mean training losses, as `train_*`, and what `end_epoch` measured. `all_results.json` in the
        output folder holds the same, from the first epoch on.
    """
    optimizer = make_optimizer(model, training_args)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    steps_per_epoch = -(-len(train_dataloader) // training_args.gradient_accumulation_steps)
    num_steps = training_args.num_train_epochs * steps_per_epoch
    if training_args.max_train_steps is not None:
        num_steps = min(num_steps, training_args.max_train_steps)
    # Not prepared: the schedule counts optimizer steps, however many processes take them together.
    lr_scheduler = get_scheduler(
        training_args.lr_scheduler_type,
        optimizer=optimizer.optimizer,
        num_warmup_steps=training_args.num_warmup_steps,
        num_training_steps=num_steps,
    )
    checkpoint_steps = output_args.checkpointing_steps

    results = []
    step = 0
    shown, epoch_means = RunningMeans(), RunningMeans()
    progress_bar = tqdm(total=num_steps, desc="Training", disable=not accelerator.is_local_main_process)
    for epoch in range(training_args.num_train_epochs):
        if step == num_steps:
            break
        begin_epoch(epoch)
        model.train()
        epoch_means.reset()
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                losses = compute_losses(model, batch)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), training_args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            shown.update(losses)
            epoch_means.update(losses)
            if not accelerator.sync_gradients:
                continue

            if not accelerator.optimizer_step_was_skipped:
                lr_scheduler.step()
            step += 1
            progress_bar.update()
            if step % output_args.logging_steps == 0:
                values = shown.compute(accelerator)
                shown.reset()
                progress_bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
                accelerator.log(
                    {f"train/{name}": value for name, value in values.items()}
                    | {"train/learning_rate": lr_scheduler.get_last_lr()[0]},
                    step=step,
                )
            if checkpoint_steps not in (None, "epoch") and step % int(checkpoint_steps) == 0:
                save_atomically(accelerator, model, Path(output_args.output_dir) / f"step_{step}", save)
            if step == num_steps:
                break

        result = {f"train_{name}": value for name, value in epoch_means.compute(accelerator).items()}
        result |= end_epoch(epoch, accelerator.unwrap_model(model), step == num_steps)
        results.append({"epoch": epoch + 1, "step": step} | result)
        if accelerator.is_main_process:
            write_json(Path(output_args.output_dir) / "all_results.json", results)
        accelerator.log({f"epoch/{name}": value for name, value in result.items()}, step=step)
        if checkpoint_steps == "epoch":
            save_atomically(accelerator, model, Path(output_args.output_dir) / f"epoch_{epoch + 1}", save)
    progress_bar.close()
    return results


def save_atomically(
    accelerator: Accelerator,
    model: torch.nn.Module,
    folder: Path,
    save: Callable[[torch.nn.Module, Path], None],
):
    """Writes a checkpoint under a temporary name first, so that a folder of the right name is always complete."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save(accelerator.unwrap_model(model), unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    accelerator.wait_for_everyone()


def write_json(path: Path, value):
    """Writes under another name first, so that a file of this name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=2), encoding="utf-8")
    unfinished.replace(path)


def write_model(model: PreTrainedModel, processor: ProcessorMixin, output_dir: str | os.PathLike):
    """Writes weights (safetensors), configuration, processor, and the code of all three."""
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


def write_final_model(model: PreTrainedModel, processor: ProcessorMixin, output_dir: str | os.PathLike):
    """
    Writes the trained model to the output folder, `config.json` last: a folder that has one holds a complete model, and
    an interrupted run can be started again.
    """
    output_dir = Path(output_dir)
    unfinished = output_dir / "final.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    (output_dir / "config.json").unlink(missing_ok=True)
    write_model(model, processor, unfinished)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(output_dir / path.name)
    unfinished.rmdir()


def create_repository(output_args: OutputArguments) -> str:
    """Creates the repository to upload to, before the training, so that a wrong name or token shows at once."""
    api = HfApi(token=output_args.hub_token)
    repo_id = output_args.hub_model_id or Path(output_args.output_dir).absolute().name
    return api.create_repo(repo_id, exist_ok=True).repo_id


def push_folder(output_args: OutputArguments, repo_id: str) -> str:
    """Uploads the output folder, without the checkpoints on the way, in one commit. Returns its URL."""
    commit = HfApi(token=output_args.hub_token).upload_folder(
        repo_id=repo_id,
        folder_path=output_args.output_dir,
        commit_message="End of training",
        ignore_patterns=["step_*", "epoch_*", "*.unfinished"],
    )
    return str(commit.commit_url)


def format_table(rows: Iterable[dict[str, float]]) -> str:
    """Rows with the same keys as a plain-text table: whole numbers as they are, others with three decimals."""
    rows = list(rows)
    cells = [[str(v) if isinstance(v, int | str) else f"{v:.3f}" for v in row.values()] for row in rows]
    header = list(rows[0])
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
