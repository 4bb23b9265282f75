#!/usr/bin/env python
"""
Finetunes InterBERT on the text-only tasks of GLUE that the paper reports (CoLA, SST-2, STS-B, RTE), evaluates it, and
predicts for GLUE's server. Or finetunes a BERT, with the same recipe, for comparison (the paper's Table 5).

A tiny model on generated sentences, on a CPU, and the trained model alone:

    python examples/generate_glue.py outputs/tiny_glue
    accelerate launch --cpu --num_processes 1 examples/run_glue.py --do_train --do_eval --do_predict \\
        --task_name rte --data_dir outputs/tiny_glue --bert_name_or_path outputs/tiny_glue/bert --layout release \\
        --per_device_train_batch_size 16 --learning_rate 1e-3 --num_train_epochs 3 --output_dir outputs/tiny_rte
    python examples/run_glue.py --do_eval --task_name rte --data_dir outputs/tiny_glue \\
        --model_name_or_path outputs/tiny_rte --output_dir outputs/tiny_rte_evaluated

The paper's recipe from a pretrained checkpoint, with GLUE from the Hub, and a plain BERT with the same recipe:

    accelerate launch --num_processes 1 --mixed_precision bf16 examples/run_glue.py \\
        --recipe examples/recipes/glue.yaml --do_train --do_eval --do_predict \\
        --task_name sst2 --dataset_name nyu-mll/glue \\
        --model_name_or_path org/interbert-base --output_dir interbert-base-sst2
    accelerate launch --num_processes 1 --mixed_precision bf16 examples/run_glue.py \\
        --recipe examples/recipes/glue.yaml --do_train --do_eval --do_predict \\
        --task_name sst2 --dataset_name nyu-mll/glue \\
        --architecture bert --bert_name_or_path bert-base-uncased --output_dir bert-base-sst2

The paper's single-stream variant is an InterBERT without layers in its streams, `--config_overrides
num_text_layers=0,num_vision_layers=0`. Texts are put in lower case by the tokenizer, if it is an uncased one, as the
paper's.

Beside the accuracy stands `majority_accuracy`, that of always answering with the most frequent class; a constant
answer has a Matthews correlation of 0. Written to the output folder: `eval_predictions.tsv`, by the model that was
evaluated last (where weights are averaged, the averaged one), and CoLA.tsv, SST-2.tsv, STS-B.tsv or RTE.tsv as GLUE's
server takes it.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arguments import parse_arguments
from data_loading import Batch
from finetuning import TaskArguments, load_metric, make_loader, predict, train_and_evaluate
from model_loading import ModelArguments, load_model
from modeling_interbert import InterBERTForSequenceClassification
from processing import InterBERTProcessor
from processing.region_dataset import base_splits
from processing.tasks import (
    GLUE_TASKS,
    STS_SCORES,
    GLUECollator,
    GLUEExample,
    GLUETask,
    read_glue,
    read_glue_dataset,
    split_glue,
)
from result_files import write_glue_answers
from training import OutputArguments, TrainingArguments, make_accelerator, set_up_logging

# By split, its files: those of GLUE and, of STS-B, those of the STS benchmark.
FILES = {
    "train": ("train.tsv", "sts-train.csv"),
    "validation": ("dev.tsv", "sts-dev.csv"),
    "test": ("test.tsv", "sts-test.csv"),
}


@dataclass
class GLUEArguments:
    """Which task, its data, and what is finetuned on it."""

    fixed_arguments: ClassVar[tuple[str, ...]] = (
        "task_name",
        "architecture",
        "dataset_config_name",
        "train_split",
        "validation_fraction",
    )

    task_name: str = field(metadata={"help": "Task of GLUE.", "choices": list(GLUE_TASKS)})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "GLUE's files: a folder with train.tsv, dev.tsv and test.tsv of the task (or the STS benchmark's "
            "sts-train.csv and so on), or one with the folders CoLA, SST-2, STS-B and RTE."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "In place of files a dataset with the columns of nyu-mll/glue on the Hub: its name, or a folder."
        },
    )
    dataset_config_name: str | None = field(
        default=None,
        metadata={"help": "Configuration of the dataset. By default that of the task's name, if there is one."},
    )
    train_split: str = field(
        default="train",
        metadata={"help": "Split of the dataset to train on; train+validation and train[:10%%] work, too."},
    )
    validation_split: str = field(default="validation", metadata={"help": "Split of the dataset to evaluate on."})
    test_split: str = field(default="test", metadata={"help": "Split of the dataset to predict for."})
    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Evaluates on this share of the training data, which is held out with all sentences that it shares "
            "with others, the same for every seed. By default on the validation data."
        },
    )
    architecture: str = field(
        default="interbert",
        metadata={
            "help": "What is finetuned: an InterBERT, or the BERT of `--bert_name_or_path` itself.",
            "choices": ["interbert", "bert"],
        },
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "A sentence, or a pair of them, is cut to this number of tokens."}
    )

    def __post_init__(self):
        if (self.data_dir is None) == (self.dataset_name is None):
            raise ValueError("Give either `--data_dir` or `--dataset_name`.")
        if self.data_dir is not None:
            for name in ("dataset_config_name", "train_split", "validation_split", "test_split"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"`--{name}` is for `--dataset_name`; `--data_dir` has a file for each split.")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"`--validation_fraction` must be between 0 and 1, got {self.validation_fraction}.")
        if self.max_seq_length < 1:
            raise ValueError(f"`--max_seq_length` must be at least 1, got {self.max_seq_length}.")

    @property
    def task(self) -> GLUETask:
        return GLUE_TASKS[self.task_name]


# ---------------------------------------------------------------- data


def load_split(args: GLUEArguments, split: str) -> list[GLUEExample] | None:
    """
    Examples of a split, "train", "validation" or "test"; None if there is no such split.

    Raises:
        ValueError: there is no such folder or dataset, or its contents are not those of the task.
    """
    return _load_files(args, split) if args.data_dir is not None else _load_dataset(args, split)


def _load_files(args: GLUEArguments, split: str) -> list[GLUEExample] | None:
    folder = Path(args.data_dir).expanduser()
    if not folder.is_dir():
        raise ValueError(f"The folder {folder} of `--data_dir` does not exist.")
    if (folder / args.task.title).is_dir():
        folder = folder / args.task.title
    for name in FILES[split]:
        if (folder / name).is_file():
            return read_glue(folder / name, args.task_name)
    return None


def _load_dataset(args: GLUEArguments, split: str) -> list[GLUEExample] | None:
    dataset = _open_dataset(args, getattr(args, f"{split}_split"))
    return None if dataset is None else read_glue_dataset(dataset, args.task_name)


def _open_dataset(args: GLUEArguments, name: str) -> datasets.Dataset | None:
    path, config_name = str(Path(args.dataset_name).expanduser()), args.dataset_config_name
    try:
        if config_name is None and args.task_name in datasets.get_dataset_config_names(path):
            config_name = args.task_name
        if not set(base_splits(name)) <= set(datasets.get_dataset_split_names(path, config_name)):
            return None
        return datasets.load_dataset(path, config_name, split=name)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(f"Could not load split {name!r} of the dataset {path!r}: {error}") from error


def _check_apart(args: GLUEArguments):
    """
    Raises:
        ValueError: rows are both in the split to train on and in that to evaluate on, as of train and train[:10%].
    """
    names = (args.train_split, args.validation_split)
    train_bases, validation_bases = (set(base_splits(name)) for name in names)
    if not train_bases & validation_bases:
        return
    wholes = {base: _open_dataset(args, base) for base in train_bases | validation_bases}
    if any(whole is None for whole in wholes.values()):
        return  # said where it is loaded
    lengths = {base: len(whole) for base, whole in wholes.items()}
    train, validation = (datasets.ReadInstruction.from_spec(name).to_absolute(lengths) for name in names)
    num_shared = sum(
        max(0, min(one.to, other.to) - max(one.from_, other.from_))
        for one in train
        for other in validation
        if one.splitname == other.splitname
    )
    if num_shared > 0:
        raise ValueError(
            f"Evaluation needs other rows than the training, got {' and '.join(names)}, which share {num_shared:,}."
        )


def load_splits(task_args: TaskArguments, args: GLUEArguments) -> dict[str, list[GLUEExample]]:
    """
    What is to be trained on, evaluated on and predicted for, by "train", "validation" and "test".

    Raises:
        ValueError: some of it is missing, or has no labels.
    """
    source = args.data_dir or args.dataset_name
    is_held_out = args.validation_fraction is not None
    if task_args.do_train and task_args.do_eval and not is_held_out:
        _check_apart(args)
    validation, train = None if is_held_out else load_split(args, "validation"), None
    if task_args.do_train or (task_args.do_eval and is_held_out):
        train = load_split(args, "train")
        if train is None:
            raise ValueError(f"{source} has no training data: {_missing(args, 'train')}.")
        _check_labels(train, "training data", source)
        if is_held_out:
            train, validation = split_glue(train, args.validation_fraction)
    splits = {}
    if task_args.do_train:
        splits["train"] = train[: task_args.max_train_samples]
    if task_args.do_eval:
        if validation is None:
            raise ValueError(
                f"{source} has no validation data: {_missing(args, 'validation')}. `--validation_fraction` holds out a "
                "part of the training data for it."
            )
        _check_labels(validation, "validation data", source)
        splits["validation"] = validation[: task_args.max_eval_samples]
    if task_args.do_predict:
        splits["test"] = (load_split(args, "test") or [])[: task_args.max_predict_samples]
        if not splits["test"]:
            raise ValueError(f"{source} has nothing to predict for: {_missing(args, 'test')}.")
    return splits


def _missing(args: GLUEArguments, split: str) -> str:
    if args.data_dir is None:
        return f"expected a split {getattr(args, f'{split}_split')!r}"
    names = FILES[split] if args.task_name == "stsb" else FILES[split][:1]
    return f"expected {' or '.join(names)} there or in its folder {args.task.title}"


def _check_labels(examples: Sequence[GLUEExample], what: str, source: str):
    unlabelled = sum(example.label is None for example in examples)
    if unlabelled or not examples:
        raise ValueError(
            f"The {what} of {source} must have labels, got {unlabelled:,} of {len(examples):,} examples without."
        )


def lengths_of(examples: Sequence[GLUEExample]) -> np.ndarray:
    """Lengths in characters, int64 `(examples,)`, by which batches are made up."""
    return np.array([len(example.sentence1) + len(example.sentence2 or "") for example in examples])


# ---------------------------------------------------------------- model


def label_values(task: GLUETask) -> dict[str, Any]:
    """What a model's configuration says of the task; STS-B has one output, a score."""
    names = task.label_names or ("score",)
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in enumerate(names)},
        "problem_type": "regression" if task.label_names is None else "single_label_classification",
    }


def check_trained_for(name_or_path: str, revision: str | None, task_name: str):
    """
    Raises:
        ValueError: the checkpoint is not that of a model with the labels of the task.
    """
    label2id = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)[0].get("label2id")
    expected = label_values(GLUE_TASKS[task_name])["label2id"]
    if label2id != expected:
        raise ValueError(
            f"Without `--do_train` the checkpoint must be of a model for {task_name}, with the labels "
            f"{list(expected)}, got {name_or_path} with {list(label2id or {}) or 'none'}."
        )


def load_bert(
    args: ModelArguments, values: dict[str, Any], must_be_trained: bool
) -> tuple[BertForSequenceClassification, PreTrainedTokenizerBase]:
    """
    The BERT of `--bert_name_or_path`, with its tokenizer.

    Raises:
        ValueError: other arguments than this are given, it is not a BERT, or not trained but must be.
    """
    path = args.bert_name_or_path
    given = [name for name, value in vars(args).items() if value != getattr(ModelArguments, name)]
    if given != ["bert_name_or_path"]:
        raise ValueError(
            "`--architecture bert` takes `--bert_name_or_path` alone, got "
            f"{', '.join(f'`--{name}`' for name in given)}."
        )
    model_type = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
    if model_type != "bert":
        raise ValueError(f"`--architecture bert` needs a BERT, of model_type 'bert', got {path} of {model_type!r}.")
    model, info = BertForSequenceClassification.from_pretrained(path, output_loading_info=True, **values)
    if must_be_trained and info["missing_keys"]:
        raise ValueError(
            f"Without `--do_train`, `--bert_name_or_path` must have all weights of a classifier, got {path} without "
            f"{', '.join(sorted(info['missing_keys']))}."
        )
    return model, AutoTokenizer.from_pretrained(path)


def build_model(
    model_args: ModelArguments, args: GLUEArguments, must_be_trained: bool
) -> tuple[PreTrainedModel, InterBERTProcessor | PreTrainedTokenizerBase, InterBERTProcessor]:
    """
    Args:
        must_be_trained: The model is used as it is.

    Returns:
        The model, what is saved with it, and what makes its inputs.
    """
    is_bert = args.architecture == "bert"
    name_or_path = model_args.bert_name_or_path if is_bert else model_args.model_name_or_path
    if must_be_trained and name_or_path is not None:
        check_trained_for(name_or_path, model_args.model_revision, args.task_name)
    values = label_values(args.task)
    if not is_bert:
        model, processor = load_model(
            InterBERTForSequenceClassification,
            model_args,
            task_values=values,
            must_be_trained=must_be_trained,
            max_length=args.max_seq_length,
        )
        return model, processor, processor
    model, tokenizer = load_bert(model_args, values, must_be_trained)
    # A tokenizer would save the padding of its last call: the one that is saved is not called.
    return model, tokenizer, InterBERTProcessor(copy.deepcopy(tokenizer))


# ---------------------------------------------------------------- evaluation


def read_logits(inputs: dict[str, torch.Tensor], outputs) -> list[list[float]]:
    """Logits of each example."""
    return outputs.logits.float().tolist()


def answers_of(logits: torch.Tensor, task: GLUETask) -> list[int] | list[float]:
    """The most probable class of each example, or its score, from `(examples, labels)`."""
    return logits.squeeze(1).tolist() if task.label_names is None else logits.argmax(dim=1).tolist()


def measure(logits: torch.Tensor, labels: Sequence[int | float], task_name: str) -> dict[str, float]:
    """
    The loss, the task's metrics and, of classes, the accuracy of always answering with the most frequent one.

    Args:
        logits: float32 `(examples, labels)`.
        labels: Classes, or scores.
    """
    task = GLUE_TASKS[task_name]
    if task.label_names is None:
        loss = torch.nn.functional.mse_loss(logits.squeeze(1), torch.tensor(labels))
    else:
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    metrics = load_metric("glue_metrics", task_name).compute(predictions=answers_of(logits, task), references=labels)
    results = {"eval_loss": loss.item()} | {f"eval_{name}": value for name, value in metrics.items()}
    if task.label_names is not None:
        results["majority_accuracy"] = np.bincount(labels).max().item() / len(labels)
    return results


def answer_texts(answers: Sequence[int | float], task_name: str) -> list[str]:
    """As GLUE's server takes them: classes of RTE by name, those of others by number, scores from 0 to 5."""
    if task_name == "stsb":
        low, high = STS_SCORES
        return [f"{min(max(score, low), high):.3f}" for score in answers]
    if task_name == "rte":
        return [GLUE_TASKS[task_name].label_names[label] for label in answers]
    return [str(label) for label in answers]


def main():
    arguments = parse_arguments(
        (TaskArguments, ModelArguments, GLUEArguments, TrainingArguments, OutputArguments),
        description="Finetune and evaluate InterBERT, or a BERT, on GLUE.",
    )
    task_args, model_args, args, training_args, output_args = arguments
    if task_args.do_train:
        output_args.check_output_dir()
        output_args.check_model_card("AutoModelForSequenceClassification")
    set_up_logging()
    # A text leaves InterBERT's parameters of the image without gradients.
    accelerator = make_accelerator(training_args, output_args, find_unused_parameters=args.architecture == "interbert")
    set_seed(training_args.seed)
    output_dir = Path(output_args.output_dir)

    with accelerator.local_main_process_first():  # so that one process prepares the dataset, and the others read it
        splits = load_splits(task_args, args)
    model, saved_processor, processor = build_model(model_args, args, must_be_trained=not task_args.do_train)
    collator = GLUECollator(processor, args.task_name, args.max_seq_length)
    loader = None
    if "train" in splits:
        examples = splits["train"]
        loader = make_loader(accelerator, examples, Batch(collator, asdict), lengths_of(examples), training_args)
    if "validation" in splits:
        load_metric("glue_metrics", args.task_name)
    counts = [f"{len(examples):,} {split}" for split, examples in splits.items()]
    accelerator.print(
        f"{model.num_parameters():,} parameters; {args.task.title}: {', '.join(counts)} examples; "
        f"{accelerator.num_processes} process(es)."
    )

    def compute_losses(model, inputs):
        outputs = model(**inputs)
        if args.task.label_names is None:
            return outputs.loss, {}
        right = outputs.logits.detach().argmax(dim=1) == inputs["labels"]
        return outputs.loss, {"accuracy": (right.sum(), len(right))}

    def predict_logits(model, split: str) -> torch.Tensor:
        examples = splits[split]
        return torch.tensor(
            predict(accelerator, model, examples, collator, lengths_of(examples), read_logits, training_args)
        )

    def evaluate_model(model):
        logits = predict_logits(model, "validation")
        if accelerator.is_main_process:
            answers = answer_texts(answers_of(logits, args.task), args.task_name)
            write_glue_answers(output_dir / "eval_predictions.tsv", answers)
        return measure(logits, [example.label for example in splits["validation"]], args.task_name)

    model = train_and_evaluate(
        accelerator,
        model,
        saved_processor,
        loader,
        compute_losses,
        evaluate_model,
        "AutoModelForSequenceClassification",
        args.dataset_name or args.data_dir,
        arguments,
    )
    if "test" in splits:
        answers = answers_of(predict_logits(model, "test"), args.task)
        if accelerator.is_main_process:
            path = output_dir / f"{args.task.title}.tsv"
            write_glue_answers(path, answer_texts(answers, args.task_name))
            print(f"{len(answers):,} predictions are in {path}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
