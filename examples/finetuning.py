"""What the finetuning scripts share: train, evaluate, predict."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, ProcessorMixin

from arguments import write_recipe
from data_loading import EpochLoader
from files import write_json
from model_loading import ModelArguments, learning_rate_scales
from publishing import publish
from training import OutputArguments, TrainingArguments, TrainingRun, flat_config, format_table


@dataclass
class TaskArguments:
    """What is to be done."""

    do_train: bool = field(default=False, metadata={"help": "Trains on the training split."})
    do_eval: bool = field(
        default=False,
        metadata={"help": "Evaluates on the validation split: after every epoch, or the given model without training."},
    )
    do_predict: bool = field(default=False, metadata={"help": "Writes predictions for the test split."})

    def __post_init__(self):
        if not (self.do_train or self.do_eval or self.do_predict):
            raise ValueError("Nothing to do: give `--do_train`, `--do_eval` or `--do_predict`.")


def train_and_evaluate(
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    loader: EpochLoader | None,
    compute_losses: Callable[[torch.nn.Module, dict], tuple[torch.Tensor, dict[str, tuple]]],
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]],
    auto_class: str,
    dataset_name: str,
    task_args: TaskArguments,
    model_args: ModelArguments,
    training_args: TrainingArguments,
    output_args: OutputArguments,
    *other_arguments: Any,
) -> PreTrainedModel:
    """
    Does what `--do_train` and `--do_eval` ask for. All processes call this.

    Args:
        loader: Batches to train on; may be None without `--do_train`.
        compute_losses: As [`TrainingRun`] takes it.
        evaluate: From a model on the device to what is measured of it, as `eval_*`.
        auto_class: Name of the auto class that the model is for.
        dataset_name: What it is trained on, for the card.
        other_arguments: Further dataclasses of arguments, for the recipe, the trackers and the card.

    Returns:
        The model to predict with, on the device: the trained one, its weights averaged if they were.
    """

    def end_epoch(epoch: int, model: PreTrainedModel, is_last: bool) -> dict[str, float]:
        if not task_args.do_eval:
            return {}
        results = dict(evaluate(model))
        accelerator.print("\n" + format_table([{"epoch": epoch + 1} | results]))
        return results

    output_dir = Path(output_args.output_dir)
    if not task_args.do_train:
        model = model.to(accelerator.device)
        if task_args.do_eval:
            results = dict(evaluate(model))
            accelerator.print("\n" + format_table([results]))
            if accelerator.is_main_process:
                write_json(output_dir / "eval_results.json", results)
        return model
    arguments = (model_args, *other_arguments, training_args)
    run = TrainingRun(
        accelerator,
        model,
        processor,
        loader,
        training_args,
        output_args,
        compute_losses,
        begin_epoch=lambda epoch: None,
        end_epoch=end_epoch,
        settings=flat_config(*arguments, output_args),
        learning_rate_scales=learning_rate_scales(model, model_args),
    )
    if accelerator.is_main_process:
        write_recipe(output_dir / "recipe.yaml", *arguments)
    run.train()
    publish(run, auto_class, dataset_name, model_args, flat_config(*other_arguments, training_args))
    return run.trained_model()
