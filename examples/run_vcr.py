#!/usr/bin/env python
"""
Finetunes InterBERT for visual commonsense reasoning (VCR), evaluates it, and predicts for the leaderboard. As in the
authors' release there are two models, each trained on its own task: one chooses answers (Q→A), the other rationales of
the right answer (QA→R). Together they choose both (Q→AR).

Tiny models from scratch on generated scenes, on a CPU:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    python examples/generate_vcr.py outputs/tiny_scenes outputs/tiny_vcr
    for task in answer rationale; do
        accelerate launch --cpu --num_processes 1 examples/run_vcr.py --do_train --do_eval --task $task \\
            --dataset_name outputs/tiny_scenes --metadata_folder outputs/tiny_vcr/vcr1images \\
            --train_annotations outputs/tiny_vcr/train.jsonl --validation_annotations outputs/tiny_vcr/val.jsonl \\
            --tokenizer_name outputs/tiny_scenes/tokenizer \\
            --config_overrides hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,\\
intermediate_size=128,vision_intermediate_size=128,num_hidden_layers=2,num_text_layers=1,num_vision_layers=1,\\
pooler_size=64 --num_train_epochs 2 --output_dir outputs/tiny_vcr_$task
    done
    python examples/run_vcr.py --do_eval --do_predict --task both \\
        --model_name_or_path outputs/tiny_vcr_answer --rationale_model_name_or_path outputs/tiny_vcr_rationale \\
        --dataset_name outputs/tiny_scenes --metadata_folder outputs/tiny_vcr/vcr1images \\
        --validation_annotations outputs/tiny_vcr/val.jsonl --test_annotations outputs/tiny_vcr/test.jsonl \\
        --output_dir outputs/tiny_vcr_both

The paper's run, here of the answers; `vcr_rationale.yaml` is for the rationales:

    accelerate launch --config_file examples/accelerate_configs/eight_gpus_bf16.yaml examples/run_vcr.py \\
        --do_train --do_eval --recipe examples/recipes/vcr_answer.yaml --model_name_or_path org/interbert-base \\
        --dataset_name org/vcr-regions --annotated_dataset_name org/vcr-annotated-boxes \\
        --train_annotations vcr1annots/train.jsonl --validation_annotations vcr1annots/val.jsonl \\
        --output_dir interbert-base-vcr-answer

Written to the output folder: `eval_predictions.jsonl`, the probabilities of the choices of every annotation, by the
model that was evaluated last (where weights are averaged, the averaged one). `--task rationale --answer_predictions`
takes such a file of the other model, and evaluates Q→AR without it. `--do_predict` writes `test_predictions.jsonl`, of
the rationales for each of the four answers, and of both tasks together `test_predictions.csv` for the leaderboard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean as mean
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from arguments import parse_arguments
from data_loading import Batch, check_held_out
from files import write_json_lines
from finetuning import (
    RegionDatasetArguments,
    TaskArguments,
    load_metric,
    make_loader,
    predict,
    train_and_evaluate,
)
from model_loading import ModelArguments, load_model
from modeling_interbert import InterBERTForMultipleChoice
from processing import load_region_dataset
from processing.tasks import VCRCollator, VCRDataset, VCRExample, read_vcr
from processing.tasks.files import read_records
from processing.tasks.vcr import MAX_LENGTHS, NUM_CHOICES
from result_files import write_vcr_probabilities
from training import OutputArguments, TrainingArguments, make_accelerator, set_up_logging


@dataclass
class VCRArguments(RegionDatasetArguments):
    """What is chosen, and for which images."""

    fixed_arguments: ClassVar[tuple[str, ...]] = (*RegionDatasetArguments.fixed_arguments, "task")

    train_annotations: str | None = field(default=None, metadata={"help": "VCR's train.jsonl."})
    validation_annotations: str | None = field(default=None, metadata={"help": "VCR's val.jsonl."})
    test_annotations: str | None = field(default=None, metadata={"help": "VCR's test.jsonl, without labels."})
    image_id: str = field(
        default="img_id",
        metadata={
            "help": "What the region dataset calls an image: train-0 and the like, or the name of its file.",
            "choices": ["img_id", "img_fn"],
        },
    )
    metadata_folder: str | None = field(
        default=None,
        metadata={
            "help": "VCR's folder vcr1images: puts the annotated boxes before the detector's regions, each with the "
            "features of the region that it overlaps most."
        },
    )
    annotated_dataset_name: str | None = field(
        default=None,
        metadata={"help": "The same with features of their own: a region dataset of the annotated boxes."},
    )
    task: str = field(
        default="answer",
        metadata={
            "help": "Chooses answers (Q→A), or rationales of the right answer (QA→R). Both are for two trained models.",
            "choices": ["answer", "rationale", "both"],
        },
    )
    rationale_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "With `--task both` the model of the rationales; `--model_name_or_path` is that of answers."},
    )
    answer_predictions: str | None = field(
        default=None,
        metadata={
            "help": "With `--task rationale` the eval_predictions.jsonl of a model of the answers, to evaluate Q→AR."
        },
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Texts are cut to this number of tokens. By default 60 with answers, 80 with rationales."},
    )
    max_regions: int = field(default=100, metadata={"help": "Of each image, this many regions are used."})

    def __post_init__(self):
        for name in ("max_seq_length", "max_regions"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if self.metadata_folder is not None and self.annotated_dataset_name is not None:
            raise ValueError("Give either `--metadata_folder` or `--annotated_dataset_name`, not both.")
        if (self.task == "both") != (self.rationale_model_name_or_path is not None):
            raise ValueError("`--task both` and `--rationale_model_name_or_path` go together, got one of them.")
        if self.answer_predictions is not None and self.task != "rationale":
            raise ValueError(f"`--answer_predictions` goes with `--task rationale`, got `--task {self.task}`.")

    @property
    def tasks(self) -> list[str]:
        return ["answer", "rationale"] if self.task == "both" else [self.task]


# ---------------------------------------------------------------- annotations


def load_annotations(args: VCRArguments, split: str, max_samples: int | None) -> VCRDataset:
    """
    The (first) annotations of "train", "validation" or "test" with the regions of their images.

    Raises:
        ValueError: no file is given.
    """
    path = getattr(args, f"{split}_annotations")
    if path is None:
        raise ValueError(f"Expected `--{split}_annotations`, got none.")
    regions = args.load_regions(split)
    annotated = None
    if args.annotated_dataset_name is not None:
        annotated = load_region_dataset(args.annotated_dataset_name, getattr(args, f"{split}_split"))
    return VCRDataset(read_vcr(path, args.image_id)[:max_samples], regions, args.metadata_folder, annotated)


def label_of(example: VCRExample, task: str) -> int | None:
    return example.answer_label if task == "answer" else example.rationale_label


def check_labels(examples: Sequence[VCRExample], tasks: Sequence[str], path: str):
    """
    Raises:
        ValueError: a label is missing.
    """
    # Rationales are those of the right answer.
    needed = ["answer", *tasks]
    without = [example.annot_id for example in examples if any(label_of(example, task) is None for task in needed)]
    if without or not examples:
        raise ValueError(
            f"{path}: training and evaluation need annotations with labels, got {len(without):,} of "
            f"{len(examples):,} without: {without[:5]}."
        )


# ---------------------------------------------------------------- choices


def read_choices(inputs: dict[str, torch.Tensor], outputs) -> list[dict[str, Any]]:
    """Of each annotation the probabilities of the choices, and the loss if there is one."""
    logits = outputs.logits.float()
    rows = [{"probabilities": probabilities} for probabilities in logits.softmax(dim=1).tolist()]
    if "labels" in inputs:
        losses = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
        for row, loss in zip(rows, losses.tolist(), strict=True):
            row["loss"] = loss
    return rows


def identify(sample: dict[str, Any]) -> str:
    return sample["example"].annot_id


def choice_of(probabilities: Sequence[float]) -> int:
    return int(np.argmax(probabilities))


def read_answer_predictions(path: str, examples: Sequence[VCRExample]) -> list[int]:
    """
    The answers that another model chose.

    Raises:
        ValueError: there is none to one of the annotations, or the file is another one.
    """
    rows = [row for row in read_records(path) if row["task"] == "answer"]
    choices = {row["annot_id"]: choice_of(row["probabilities"]) for row in rows}
    missing = [example.annot_id for example in examples if example.annot_id not in choices]
    if missing:
        raise ValueError(
            f"`--answer_predictions` {path}: expected an answer to each of {len(examples):,} annotations, got none to "
            f"{len(missing):,}: {missing[:5]}."
        )
    return [choices[example.annot_id] for example in examples]


def measure_choices(choices: Mapping[str, Sequence[int]], examples: Sequence[VCRExample]) -> dict[str, float]:
    """
    Args:
        choices: By task, "answer" or "rationale" or both, what is chosen of each annotation.

    Returns:
        `answer_accuracy`, `rationale_accuracy`; of both tasks also `answer_and_rationale_accuracy`.
    """
    if len(choices) == 2:
        return load_metric("vcr_accuracy").compute(
            predictions=[dict(zip(choices, chosen, strict=True)) for chosen in zip(*choices.values(), strict=True)],
            references=[{task: label_of(example, task) for task in choices} for example in examples],
        )
    ((task, chosen),) = choices.items()
    is_right = [choice == label_of(example, task) for choice, example in zip(chosen, examples, strict=True)]
    return {f"{task}_accuracy": mean(is_right)}


def main():
    arguments = parse_arguments(
        (TaskArguments, ModelArguments, VCRArguments, TrainingArguments, OutputArguments),
        description="Finetune and evaluate InterBERT for visual commonsense reasoning.",
    )
    task_args, model_args, args, training_args, output_args = arguments
    if task_args.do_train:
        if args.task == "both":
            raise ValueError("Each task has a model of its own: `--do_train` takes `--task answer` or rationale.")
        output_args.check_output_dir()
        output_args.check_model_card("AutoModelForMultipleChoice")
    if args.answer_predictions is not None and not task_args.do_eval:
        raise ValueError("`--answer_predictions` are evaluated with the rationales, `--do_eval`.")
    set_up_logging()
    accelerator = make_accelerator(training_args, output_args)
    set_seed(training_args.seed)
    output_dir = Path(output_args.output_dir)

    asked_for = {
        "train": (task_args.do_train, task_args.max_train_samples),
        "validation": (task_args.do_eval, task_args.max_eval_samples),
        "test": (task_args.do_predict, task_args.max_predict_samples),
    }
    with accelerator.local_main_process_first():  # so that one process prepares the datasets, and the others read them
        datasets = {
            split: load_annotations(args, split, max_samples)
            for split, (is_asked_for, max_samples) in asked_for.items()
            if is_asked_for
        }
    for split, dataset in datasets.items():
        if split != "test":
            check_labels(dataset.examples, args.tasks, getattr(args, f"{split}_annotations"))

    if "train" in datasets and "validation" in datasets:
        held_out = [datasets[split].examples for split in ("train", "validation")]
        check_held_out(*([example.annot_id for example in examples] for examples in held_out), "annotations")
        check_held_out(*([example.image_id for example in examples] for examples in held_out), "images")

    regions = [dataset.region_dataset for dataset in datasets.values()]
    model, processor = load_model(
        InterBERTForMultipleChoice,
        model_args,
        regions,
        must_be_trained=not task_args.do_train,
        max_length=args.max_seq_length or MAX_LENGTHS[args.tasks[0]],
        max_regions=args.max_regions,
    )
    processors = dict.fromkeys(args.tasks, processor)
    other_models: dict[str, PreTrainedModel] = {}
    if args.rationale_model_name_or_path is not None:
        rationale_args = ModelArguments(model_name_or_path=args.rationale_model_name_or_path)
        rationale_model, processors["rationale"] = load_model(
            InterBERTForMultipleChoice,
            rationale_args,
            regions,
            must_be_trained=True,
            max_length=args.max_seq_length or MAX_LENGTHS["rationale"],
            max_regions=args.max_regions,
        )
        other_models["rationale"] = rationale_model.to(accelerator.device)

    def make_collator(task: str, given_answer: int | None = None) -> VCRCollator:
        return VCRCollator(processors[task], task, args.max_seq_length, args.max_regions, given_answer)

    loader = None
    if task_args.do_train:
        collate_fn = Batch(make_collator(args.task), identify)
        loader = make_loader(accelerator, datasets["train"], collate_fn, datasets["train"].lengths(), training_args)
        accelerator.print(
            f"{model.num_parameters():,} parameters; {len(datasets['train']):,} annotations to train on; "
            f"{accelerator.num_processes} process(es)."
        )
    chosen_before: dict[str, list[int]] = {}
    if task_args.do_eval:
        load_metric("vcr_accuracy")
        if args.answer_predictions is not None:
            examples = datasets["validation"].examples
            chosen_before["answer"] = read_answer_predictions(args.answer_predictions, examples)
        accelerator.print(f"{len(datasets['validation']):,} annotations to evaluate on.")

    def compute_losses(model, inputs):
        outputs = model(**inputs)
        is_right = outputs.logits.detach().argmax(dim=1) == inputs["labels"]
        return outputs.loss, {"accuracy": (is_right.sum(), len(is_right))}

    def choose(model, split: str, collator: VCRCollator) -> list[dict[str, Any]]:
        dataset = datasets[split]
        return predict(accelerator, model, dataset, collator, dataset.lengths(), read_choices, training_args)

    def measure(model):
        examples = datasets["validation"].examples
        results: dict[str, float] = {}
        choices = dict(chosen_before)
        lines: list[dict[str, Any]] = []
        for task, task_model in ({args.tasks[0]: model} | other_models).items():
            rows = choose(task_model, "validation", make_collator(task))
            results[f"{task}_loss"] = mean(row["loss"] for row in rows)
            choices[task] = [choice_of(row["probabilities"]) for row in rows]
            lines += [
                {
                    "annot_id": example.annot_id,
                    "image_id": example.image_id,
                    "task": task,
                    "probabilities": row["probabilities"],
                    "label": label_of(example, task),
                    "score": float(choice == label_of(example, task)),
                }
                for example, row, choice in zip(examples, rows, choices[task], strict=True)
            ]
        results |= measure_choices(choices, examples)
        if accelerator.is_main_process:
            write_json_lines(output_dir / "eval_predictions.jsonl", lines)
        return {f"eval_{name}": value for name, value in results.items()}

    model = train_and_evaluate(
        accelerator,
        model,
        processor,
        loader,
        compute_losses,
        measure,
        "AutoModelForMultipleChoice",
        args.dataset_name,
        arguments,
    )
    if task_args.do_predict:
        probabilities = {}
        for task, task_model in ({args.tasks[0]: model} | other_models).items():
            # Which answer is right is not known here: rationales are chosen for each of them.
            given_answers = range(NUM_CHOICES) if task == "rationale" else [None]
            by_answer = [choose(task_model, "test", make_collator(task, given)) for given in given_answers]
            of_task = [[row["probabilities"] for row in rows] for rows in zip(*by_answer, strict=True)]
            probabilities[task] = of_task if task == "rationale" else [rows[0] for rows in of_task]
        if accelerator.is_main_process:
            annot_ids = [example.annot_id for example in datasets["test"].examples]
            columns = {f"{task}_probabilities": values for task, values in probabilities.items()}
            write_json_lines(
                output_dir / "test_predictions.jsonl",
                (
                    {"annot_id": annot_id} | {name: values[number] for name, values in columns.items()}
                    for number, annot_id in enumerate(annot_ids)
                ),
            )
            if len(probabilities) == 2:
                write_vcr_probabilities(
                    output_dir / "test_predictions.csv",
                    annot_ids,
                    np.array(probabilities["answer"]),
                    np.array(probabilities["rationale"]),
                )
            print(f"The predictions for {len(annot_ids):,} annotations are in {output_dir}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
