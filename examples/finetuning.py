"""What the finetuning scripts share: train, evaluate, predict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from arguments import to_recipe
from data_loading import DatasetLoader, EpochLoader, outlive_sigterm
from files import write_json, write_text
from model_loading import ModelArguments, learning_rate_scales
from processing import RegionDataset, ShuffledBatchSampler, load_region_dataset
from publishing import WidgetInputs, publish
from training import OutputArguments, TrainingArguments, TrainingRun, flat_config, format_table

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRICS = Path(__file__).resolve().parent / "metrics"


@dataclass
class TaskArguments:
    """What is to be done."""

    do_train: bool = field(default=False, metadata={"help": "Trains on the training split."})
    do_eval: bool = field(
        default=False,
        metadata={"help": "Evaluates on the validation split: while training, or the given model without training."},
    )
    do_predict: bool = field(default=False, metadata={"help": "Writes predictions for the test split."})
    eval_every_epoch: bool = field(
        default=True, metadata={"help": "Evaluates after every epoch of a training, not after the last one alone."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "For trying out: trains on the first samples only (of retrieval: images)."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluates on the first samples only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predicts for the first samples only."})

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if not (self.do_train or self.do_eval or self.do_predict):
            raise ValueError("Nothing to do: give `--do_train`, `--do_eval` or `--do_predict`.")


@dataclass
class RegionDatasetArguments:
    """Which images there are."""

    fixed_arguments: ClassVar[tuple[str, ...]] = ("dataset_config_name", "train_split")

    dataset_name: str = field(metadata={"help": "Region dataset: a local folder or a Hub name."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(
        default="train", metadata={"help": "Split to train on; train+validation and train[:10%%] work, too."}
    )
    validation_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    test_split: str = field(default="test", metadata={"help": "Split to predict for."})

    def load_regions(self, split: str) -> RegionDataset:
        """The regions of "train", "validation" or "test"."""
        return load_region_dataset(self.dataset_name, getattr(self, f"{split}_split"), name=self.dataset_config_name)


def train_and_evaluate(
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    loader: EpochLoader | None,
    compute_losses: Callable[[torch.nn.Module, dict], tuple[torch.Tensor, dict[str, tuple]]],
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]],
    auto_class: str,
    dataset_name: str,
    arguments: tuple[TaskArguments, ModelArguments, Any, TrainingArguments, OutputArguments],
    widget: WidgetInputs | None = None,
) -> PreTrainedModel:
    """
    Does what `--do_train` and `--do_eval` ask for. All processes call this.

    Args:
        loader: Batches to train on; may be None without `--do_train`.
        compute_losses: As [`TrainingRun`] takes it.
        evaluate: From a model on the device to what is measured of it, as `eval_*`, and what it is to be compared with
            under other names.
        auto_class: Name of the auto class that the model is for.
        dataset_name: What it is trained on, for the card.
        arguments: All of the script, those of its own in the middle, whose `fixed_arguments` are names as
            [`TrainingRun`] takes them.
        widget: Examples for the page on the Hub, if any.

    Returns:
        The model to predict with, on the device: the trained one, its weights averaged if they were.
    """
    task_args, model_args, own_args, training_args, output_args = arguments
    if not task_args.do_train:
        model = model.to(accelerator.device)
        if task_args.do_eval:
            evaluate_alone(accelerator, model, evaluate, arguments)
        return model

    output_args.check_widget(widget is not None)
    run = TrainingRun(
        accelerator,
        model,
        processor,
        loader,
        training_args,
        output_args,
        compute_losses,
        begin_epoch=lambda epoch: None,
        end_epoch=measure_at_end_of_epochs(task_args, evaluate),
        settings=flat_config(*arguments),
        recipe=to_recipe(*arguments[:-1]),
        learning_rate_scales=learning_rate_scales(model, model_args),
        fixed_arguments=own_args.fixed_arguments,
    )
    run.train()
    card_arguments = flat_config(task_args, own_args, training_args)
    return publish(run, auto_class, dataset_name, model_args, card_arguments, widget)


def evaluate_alone(
    accelerator: Accelerator,
    model: PreTrainedModel,
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]],
    arguments: tuple[Any, ...],
):
    """
    Evaluates without a training: shows what was measured, and writes it to `eval_results.json` and the arguments to
    `eval_recipe.yaml`. All processes call this.

    Args:
        model: On the device.
        evaluate: As [`train_and_evaluate`] takes it.
        arguments: All of the script, the `OutputArguments` last.
    """
    results = dict(evaluate(model))
    accelerator.print("\n" + format_table([results]))
    if accelerator.is_main_process:
        output_dir = Path(arguments[-1].output_dir)
        write_json(output_dir / "eval_results.json", results)
        write_text(output_dir / "eval_recipe.yaml", to_recipe(*arguments[:-1]))


def measure_at_end_of_epochs(
    task_args: TaskArguments, evaluate: Callable[[PreTrainedModel], Mapping[str, float]]
) -> Callable[[int, PreTrainedModel, bool], dict[str, float]] | None:
    """What [`TrainingRun`] takes as `end_epoch`: measures as often as was asked for; None where it was not."""

    def end_epoch(epoch: int, model: PreTrainedModel, is_last: bool) -> dict[str, float]:
        return dict(evaluate(model)) if task_args.eval_every_epoch or is_last else {}

    return end_epoch if task_args.do_eval else None


@cache
def load_metric(name: str, config_name: str | None = None) -> "EvaluationModule":
    """One of the modules in `metrics/`. To be called before a training, in which it would fail late."""
    try:
        import evaluate  # takes seconds
    except ImportError as error:
        raise ImportError("Evaluation needs evaluate: pip install 'interbert[metrics]'.") from error
    return evaluate.load(str(METRICS / name), config_name, keep_in_memory=True)


def make_loader(
    accelerator: Accelerator,
    dataset: Dataset,
    collate_fn: Callable[[list], dict[str, Any]],
    lengths: np.ndarray,
    args: TrainingArguments,
) -> DatasetLoader:
    """This process's share of a dataset to train on, shuffled anew in every epoch."""
    sampler = ShuffledBatchSampler(
        len(dataset),
        args.per_device_train_batch_size,
        lengths=lengths if args.group_by_length else None,
        seed=args.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        batches_per_step=args.gradient_accumulation_steps,
    )
    return DatasetLoader(
        dataset,
        sampler,
        collate_fn,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


@torch.inference_mode()
def predict(
    accelerator: Accelerator,
    model: PreTrainedModel,
    dataset: Dataset,
    collator: Callable[[list], dict[str, torch.Tensor]],
    lengths: np.ndarray,
    read_outputs: Callable[[dict[str, torch.Tensor], ModelOutput], Sequence[Any]],
    args: TrainingArguments,
) -> list[Any]:
    """
    What a model says of every sample of a dataset. The samples are divided among the processes, those of similar
    lengths together.

    Args:
        lengths: Of the samples, integers `(len(dataset),)`.
        read_outputs: From the inputs and the outputs of a batch to what is kept of each of its samples.

    Returns:
        What is kept of each sample, in the order of the dataset, the same in every process.
    """
    model.eval()
    own = np.argsort(-lengths, kind="stable")[accelerator.process_index :: accelerator.num_processes].tolist()
    loader = DataLoader(
        Subset(dataset, own),
        args.per_device_eval_batch_size,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=outlive_sigterm,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # beginning to read would change the training after it otherwise
    )
    kept: list[Any] = []
    for inputs in tqdm(loader, desc="Predicting", leave=False, disable=not accelerator.is_local_main_process):
        inputs = send_to_device(inputs, accelerator.device)
        with accelerator.autocast():
            outputs = model(**inputs)
        kept += read_outputs(inputs, outputs)
    numbered = gather_object(list(zip(own, kept, strict=True)))
    return [of_sample for _, of_sample in sorted(numbered, key=lambda item: item[0])]
