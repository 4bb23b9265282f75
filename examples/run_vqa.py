#!/usr/bin/env python
"""
Finetunes InterBERT to answer questions about images, evaluates it, and predicts answers.

A tiny model from scratch on generated scenes, on a CPU:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    accelerate launch --cpu --num_processes 1 examples/run_vqa.py --do_train --do_eval --do_predict \\
        --dataset_name outputs/tiny_scenes --tokenizer_name outputs/tiny_scenes/tokenizer \\
        --config_overrides hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=128,\\
vision_intermediate_size=128,num_hidden_layers=2,num_text_layers=1,num_vision_layers=1,pooler_size=64 \\
        --num_train_epochs 2 --output_dir outputs/tiny_vqa

The trained model alone, on other questions:

    python examples/run_vqa.py --do_eval --model_name_or_path outputs/tiny_vqa --dataset_name outputs/tiny_scenes \\
        --validation_split test --output_dir outputs/tiny_vqa_on_test

The paper's run on VQA 2.0, whose questions are in files of their own:

    accelerate launch --config_file examples/accelerate_configs/eight_gpus_bf16.yaml examples/run_vqa.py \\
        --do_train --do_eval --do_predict --recipe examples/recipes/vqa2.yaml \\
        --model_name_or_path org/interbert-base --dataset_name org/coco-regions \\
        --train_questions v2_OpenEnded_mscoco_train2014_questions.json \\
        --train_annotations v2_mscoco_train2014_annotations.json \\
        --validation_questions v2_OpenEnded_mscoco_val2014_questions.json \\
        --validation_annotations v2_mscoco_val2014_annotations.json \\
        --test_questions v2_OpenEnded_mscoco_test2015_questions.json \\
        --answer_vocabulary trainval_ans2label.json --output_dir interbert-base-vqa2

DAQUAR, which has lists of right answers and no validation split, by a model of the questions alone:

    python examples/run_vqa.py --do_train --do_eval --mask_regions --recipe examples/recipes/daquar.yaml \\
        --bert_name_or_path bert-base-uncased --dataset_name daquar --train_questions daquar/train_questions.jsonl \\
        --answer_vocabulary daquar/answer_space.txt --output_dir outputs/daquar_question_only

Written to the output folder: `eval_predictions.jsonl`, the answer to every question with its score, by the model that
was evaluated last (where weights are averaged, the averaged one); `test_predictions.json` as the server of VQA 2.0
takes it, where the ids of the questions are integers; `test_predictions.jsonl`, the most probable answers.

The score is the official one where all questions have ten answers, else the share of questions whose list holds the
answer, of all and of those whose list has one answer. Beside it stand the scores of two baselines that do not look at
the image: `type_baseline_*` is that of the most frequent answer to the training questions of the same type, where the
type of a question that names none is its first words (`--question_type_words`); `question_baseline_*` is that of the
most frequent answer to the very same question, or to its type where training lacks the question.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed

from arguments import parse_arguments
from configuration_interbert import InterBERTConfig
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
from modeling_interbert import InterBERTForVQA
from processing import RegionDataset
from processing.tasks import (
    ExamplesWithRegions,
    VQACollator,
    VQAExample,
    build_answer_vocabulary,
    normalize_answer,
    questions_of_dataset,
    read_answer_vocabulary,
    read_questions,
    soft_scores,
)
from processing.tasks.vqa import NUM_ANNOTATORS, vqa_score
from publishing import WidgetInputs
from result_files import write_vqa_answers
from training import OutputArguments, TrainingArguments, make_accelerator, set_up_logging

logger = get_logger(__name__)
NUM_KEPT_ANSWERS = 5  # most probable answers that predictions name
GOLDEN_RATIO = (1 + 5**0.5) / 2


@dataclass
class VQAArguments(RegionDatasetArguments):
    """Which questions there are, about which images, and what may be answered."""

    fixed_arguments: ClassVar[tuple[str, ...]] = (
        *RegionDatasetArguments.fixed_arguments,
        "validation_fraction",
        "validation_block_size",
        "answer_vocabulary",
        "answer_scoring",
        "mask_regions",
    )

    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Evaluates on about this part of the images of the training split, which are not trained on, for "
            "datasets without a validation split. Which images is decided by their ids alone."
        },
    )
    validation_block_size: int = field(
        default=1,
        metadata={
            "help": "With `--validation_fraction`, images whose numbers are consecutive are held out together, in "
            "blocks of so many numbers, for datasets whose numbers follow the camera: an image is otherwise evaluated "
            "on after its neighbours were trained on. The number is the last one in the id."
        },
    )
    question_column: str = field(
        default="questions", metadata={"help": "Column of questions, where no files of questions are given."}
    )
    train_questions: list[str] | None = field(
        default=None, metadata={"help": "Questions about images of the training split: files of VQA 2.0, JSONL, CSV."}
    )
    train_annotations: list[str] | None = field(
        default=None, metadata={"help": "Their answers, a file of VQA 2.0 for each of `--train_questions`."}
    )
    validation_questions: list[str] | None = field(default=None, metadata={"help": "Questions to evaluate on."})
    validation_annotations: list[str] | None = field(default=None, metadata={"help": "Their answers."})
    test_questions: list[str] | None = field(default=None, metadata={"help": "Questions to predict answers for."})
    answer_vocabulary: str | None = field(
        default=None,
        metadata={
            "help": "Answers to choose from: JSON {answer: label} or list, or a line for each. By default those of the "
            "checkpoint, else the frequent ones of the training questions."
        },
    )
    min_answer_occurrences: int = field(
        default=9, metadata={"help": "Number of training questions that an answer without a vocabulary file needs."}
    )
    answer_scoring: str | None = field(
        default=None,
        metadata={
            "help": "What the model learns of an answer that c of ten annotators gave: the official score "
            "(leave_one_out), or min(c / 3, 1) (count). Or 1 for every answer that is listed. By default leave_one_out "
            "where all questions have ten answers, else listed.",
            "choices": ["leave_one_out", "count", "listed"],
        },
    )
    max_seq_length: int = field(default=36, metadata={"help": "Questions are cut to this number of tokens."})
    max_regions: int = field(default=100, metadata={"help": "Of each image, this many regions are used."})
    mask_regions: bool = field(
        default=False,
        metadata={
            "help": "Leaves out all regions, in training and evaluation: of every image remains position 0 alone, the "
            "same for all, so that the question decides. The model is otherwise the same one."
        },
    )
    question_type_words: int = field(
        default=2, metadata={"help": "So many first words are the type of a question that names none."}
    )

    def __post_init__(self):
        for name in (
            *("validation_block_size", "min_answer_occurrences", "max_seq_length", "max_regions"),
            "question_type_words",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"`--validation_fraction` must be between 0 and 1, got {self.validation_fraction}.")
        if self.validation_block_size > 1 and self.validation_fraction is None:
            raise ValueError(
                f"`--validation_block_size` {self.validation_block_size} needs `--validation_fraction`, got none."
            )
        if self.validation_fraction is not None and self.validation_questions:
            raise ValueError("Give either `--validation_fraction` or `--validation_questions`, not both.")
        if self.validation_fraction is not None and self.validation_split != "validation":
            raise ValueError("Give either `--validation_fraction` or `--validation_split`, not both.")
        for split in ("train", "validation"):
            questions, annotations = getattr(self, f"{split}_questions"), getattr(self, f"{split}_annotations")
            if annotations is not None and len(annotations) != len(questions or []):
                raise ValueError(
                    f"`--{split}_annotations` must be one file for each of `--{split}_questions` "
                    f"({len(questions or [])}), got {len(annotations)}."
                )


# ---------------------------------------------------------------- questions


@dataclass
class Questions:
    """
    Args:
        examples: Questions.
        regions: The regions of their images, and of others.
        name: Where they are from.
    """

    examples: list[VQAExample]
    regions: RegionDataset
    name: str

    def image_ids(self) -> set[str]:
        return {example.image_id for example in self.examples}

    def num_images(self) -> int:
        return len(self.image_ids())

    def dataset(self) -> ExamplesWithRegions:
        """
        Raises:
            ValueError: the regions of an image are missing.
        """
        return ExamplesWithRegions(self.examples, self.regions)

    def check_answers(self, scoring: str | None):
        """
        Args:
            scoring: That of `--answer_scoring`.

        Raises:
            ValueError: a question has no answers; it has not ten where the scoring counts annotators; or, where none is
                given, some have ten and some have not.
        """
        without = [example.question_id for example in self.examples if not example.answers]
        if without or not self.examples:
            raise ValueError(
                f"Training and evaluation need questions with answers, got {len(without):,} of "
                f"{len(self.examples):,} questions without in {self.name}: {without[:5]}."
            )
        others = [example for example in self.examples if len(example.answers) != NUM_ANNOTATORS]
        may_be_listed = scoring == "listed" or (scoring is None and len(others) == len(self.examples))
        if others and not may_be_listed:
            numbers = {example.question_id: len(example.answers) for example in others[:5]}
            raise ValueError(
                f"Expected the answers of {NUM_ANNOTATORS} annotators to every question in {self.name}, got other "
                f"numbers for {len(others):,} of {len(self.examples):,}: {numbers}. `--answer_scoring listed` takes "
                "every answer that is listed as right."
            )


def load_questions(args: VQAArguments, split: str) -> Questions:
    """The questions of "train", "validation" or "test", of files or of the column of the dataset, and the regions."""
    regions = args.load_regions(split)
    questions = getattr(args, f"{split}_questions")
    annotations = None if split == "test" else getattr(args, f"{split}_annotations")
    if questions is None:
        name = f"column {args.question_column!r} of split {getattr(args, f'{split}_split')!r}"
        return Questions(questions_of_dataset(regions, args.question_column), regions, name)
    paths = zip(questions, annotations or [None] * len(questions), strict=True)
    examples = [example for pair in paths for example in read_questions(*pair)]
    return Questions(examples, regions, ", ".join(questions))


def place_of(image_id: str, block_size: int = 1) -> float:
    """
    Where an image is between 0 and 1, by its id alone: evenly distributed, the same for all images of a block.

    Args:
        block_size: Number of consecutive images that are a block, where this is more than 1. The last number in the id
            counts; ids that differ elsewhere are of different sequences.

    Raises:
        ValueError: `block_size` is more than 1, and the id has no number.
    """
    sequence, block = image_id, 0
    if block_size > 1:
        number = re.search(r"\d+(?=\D*$)", image_id)
        if number is None:
            raise ValueError(f"`--validation_block_size` {block_size} needs image ids with a number, got {image_id!r}.")
        sequence = image_id[: number.start()] + image_id[number.end() :]
        block = int(number[0]) // block_size
    hash_value = int.from_bytes(hashlib.sha256(sequence.encode()).digest()[:8], "big") / 2**64
    # Multiples of the golden ratio are spread more evenly than hashes: of few blocks, the part below a fraction is
    # near that fraction, and from all of the sequence.
    return (hash_value + block * GOLDEN_RATIO) % 1


def split_by_image(questions: Questions, fraction: float, block_size: int = 1) -> tuple[Questions, Questions]:
    """
    Divides questions such that all questions about an image stay together, and all images of a block.

    Args:
        fraction: About this part of the images is split off.
        block_size: Number of consecutive images that stay together, see [`place_of`].

    Returns:
        The rest, and the questions about a `fraction` of the images: those with the lowest places, so that no other
        image and no seed decides on which side an image is.

    Raises:
        ValueError: one side would have no images, or an id has no number to tell its block.
    """
    parts: tuple[list[VQAExample], list[VQAExample]] = [], []
    for example in questions.examples:
        parts[place_of(example.image_id, block_size) < fraction].append(example)
    if not all(parts):
        blocks = "" if block_size == 1 else f" in blocks of {block_size}"
        raise ValueError(
            f"`--validation_fraction` {fraction} leaves no images on one side, got {questions.num_images():,} images"
            f"{blocks}."
        )
    rest, part = (replace(questions, examples=examples) for examples in parts)
    return rest, part


# ---------------------------------------------------------------- answers


def known_answers(model_args: ModelArguments) -> dict[str, int] | None:
    """Labels by answer of the checkpoint, if it was trained to answer questions and names its answers."""
    if model_args.model_name_or_path is None:
        return None
    config = InterBERTConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    # A checkpoint that was converted from the authors' release has no names of its answers.
    is_named = any(name != f"LABEL_{label}" for name, label in config.label2id.items())
    return dict(config.label2id) if "InterBERTForVQA" in (config.architectures or []) and is_named else None


def choose_answers(
    args: VQAArguments, model_args: ModelArguments, known: dict[str, int] | None, train_questions: Questions | None
) -> dict[str, int]:
    """
    Labels by answer: those of the vocabulary file, else of the checkpoint, else of the training questions.

    Args:
        known: Those of the checkpoint, if it has any.
        train_questions: None where the model is not trained.
    """
    if args.answer_vocabulary is not None:
        answers = dict(read_answer_vocabulary(args.answer_vocabulary))
        if known not in (None, answers) and train_questions is None:
            raise ValueError(
                f"Without `--do_train`, `--answer_vocabulary` must hold the answers of the checkpoint, {len(known):,}, "
                f"got {len(answers):,} that are not the same: {sorted(answers.keys() ^ known.keys())[:5]}."
            )
        return answers
    if known is not None:
        return known
    if train_questions is None:
        raise ValueError(
            "Expected `--answer_vocabulary`, or a `--model_name_or_path` that was trained to answer questions, got "
            f"{model_args.model_name_or_path}."
        )
    return build_answer_vocabulary(train_questions.examples, args.min_answer_occurrences)


def answerable(questions: Questions, collator: VQACollator) -> Questions:
    """
    The questions that the model can learn something of: a right answer is among those that it chooses from.

    Raises:
        ValueError: there are none.
    """
    examples = [
        example
        for example in questions.examples
        if collator.labels.keys() & soft_scores(example.answers, collator.scoring)
    ]
    if not examples:
        raise ValueError(
            f"Expected training questions with one of the {len(collator.labels):,} answers that the model chooses "
            f"from, such as {next(iter(collator.labels))!r}, got none in {questions.name}."
        )
    return replace(questions, examples=examples)


def choose_scoring(examples: Sequence[VQAExample]) -> str:
    """The official score where there are ten answers to every question."""
    has_ten = all(len(example.answers or []) == NUM_ANNOTATORS for example in examples)
    return "leave_one_out" if has_ten else "listed"


def measure_answers(answers: Sequence[str], examples: Sequence[VQAExample]) -> dict[str, float]:
    """
    Returns:
        `vqa_score` and `vqa_score_*` for every type of answer where all questions have ten answers, else `accuracy`,
        the share of questions whose list holds the answer, and `single_answer_accuracy`, the same of questions whose
        list has one: where lists are enumerations, as in DAQUAR, one of several answers is not all of the answer.
    """
    if choose_scoring(examples) == "listed":
        scores = score_answers(answers, examples)
        of_single = [score for score, example in zip(scores, examples, strict=True) if len(example.answers) == 1]
        return {"accuracy": mean(scores)} | ({"single_answer_accuracy": mean(of_single)} if of_single else {})
    measured = load_metric("vqa_score").compute(
        predictions=answers,
        references=[example.answers for example in examples],
        answer_types=[example.answer_type for example in examples],
    )
    by_type = {re.sub(r"\W+", "_", name): score for name, score in measured["by_answer_type"].items()}
    return {"vqa_score": measured["vqa_score"]} | {f"vqa_score_{name}": score for name, score in by_type.items()}


def score_answers(answers: Sequence[str], examples: Sequence[VQAExample]) -> list[float]:
    """What each answer contributes to the mean."""
    is_listed = choose_scoring(examples) == "listed"
    return [
        soft_scores(example.answers, "listed").get(normalize_answer(answer), 0.0)
        if is_listed
        else vqa_score(answer, example.answers)
        for answer, example in zip(answers, examples, strict=True)
    ]


def first_words(example: VQAExample, num_words: int | None = None) -> str:
    """The first words of a question, by default all of them, in lower case."""
    return " ".join(example.question.lower().split()[:num_words])


def question_type(example: VQAExample, num_words: int) -> str:
    """The type that a question names, else its first words."""
    return first_words(example, num_words) if example.question_type is None else example.question_type


class FrequentAnswers:
    """
    A baseline that answers without the image, as most of the training questions like this one were answered.

    Args:
        examples: Training questions with answers. The answer to a group of them is the one with the highest sum of
            scores (the most frequent one, where every question has one answer).
        groupings: From a question to its group, the narrowest first. A question is answered as its first group that
            training has; if it has none of them, as all training questions.
    """

    def __init__(self, examples: Sequence[VQAExample], *groupings: Callable[[VQAExample], str]):
        scoring = choose_scoring(examples)
        scores = [soft_scores(example.answers, scoring) for example in examples]
        self.groupings = (*groupings, lambda example: "all")
        self.answers: list[dict[str, str]] = []
        for grouping in self.groupings:
            sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
            for example, scores_of_example in zip(examples, scores, strict=True):
                sums[grouping(example)].update(scores_of_example)
            self.answers.append({group: self._best(of_group) for group, of_group in sums.items()})

    @staticmethod
    def _best(scores: Counter[str]) -> str:
        return min(scores, key=lambda answer: (-scores[answer], answer))

    def _answer(self, example: VQAExample) -> str:
        groups = ((answers, grouping(example)) for grouping, answers in zip(self.groupings, self.answers, strict=True))
        return next(answers[group] for answers, group in groups if group in answers)

    def __call__(self, examples: Sequence[VQAExample]) -> list[str]:
        return [self._answer(example) for example in examples]


# ---------------------------------------------------------------- batches and predictions


@dataclass
class QuestionCollator:
    """
    Args:
        collator: Makes the inputs of the model.
        mask_regions: Leaves out the regions. The model then sees position 0 of an image alone, with a mean of no
            features, 0, and the box of the whole image; not even the number of regions is left.
    """

    collator: VQACollator
    mask_regions: bool

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = self.collator(samples)
        if self.mask_regions:
            for name in ("region_features", "region_boxes", "region_attention_mask"):
                inputs[name] = inputs[name][:, :0]
        return inputs


def identify(sample: dict[str, Any]) -> int | str:
    return sample["example"].question_id


def server_id(example: VQAExample) -> int | str:
    """The id of a question as an integer, if it is one or (of a .csv file) the digits of one."""
    question_id = example.question_id
    return int(question_id) if re.fullmatch("0|[1-9][0-9]*", str(question_id)) else question_id


def right_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Scores of the answers that a model gives, `(batch,)`, from `(batch, num_labels)` both."""
    return labels.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)


def read_answers(inputs: dict[str, torch.Tensor], outputs) -> list[dict[str, Any]]:
    """Of each question the labels of the most probable answers, their probabilities, and the loss if there is one."""
    logits = outputs.logits.float()
    # Not of the probabilities, of which several may be 1.
    best_logits, labels = logits.topk(min(NUM_KEPT_ANSWERS, logits.shape[1]))
    rows = [
        {"labels": best, "probabilities": values}
        for best, values in zip(labels.tolist(), best_logits.sigmoid().tolist(), strict=True)
    ]
    if "labels" in inputs:
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, inputs["labels"], reduction="none")
        for row, loss in zip(rows, losses.sum(dim=1).tolist(), strict=True):
            row["loss"] = loss
    return rows


def describe_questions(
    examples: Sequence[VQAExample], columns: Mapping[str, Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    """Questions with what is known of each of them."""
    for number, example in enumerate(examples):
        question = {"question_id": example.question_id, "image_id": example.image_id, "question": example.question}
        yield question | {name: values[number] for name, values in columns.items()}


def load_splits(task_args: TaskArguments, args: VQAArguments) -> dict[str, Questions]:
    """The questions to train on, to evaluate on and to predict answers for, as far as that is to be done."""
    splits = {}
    if task_args.do_train or task_args.do_eval:
        try:
            train = load_questions(args, "train")
            train.check_answers(args.answer_scoring)
            splits["train"] = train
        except ValueError as error:
            if task_args.do_train or args.validation_fraction is not None or args.train_questions is not None:
                raise
            logger.warning(
                f"There is nothing to learn the most frequent answers from, so they are not evaluated: {error}"
            )
    if args.validation_fraction is not None and "train" in splits:
        splits["train"], splits["validation"] = split_by_image(
            splits["train"], args.validation_fraction, args.validation_block_size
        )
    elif task_args.do_eval:
        splits["validation"] = load_questions(args, "validation")
        splits["validation"].check_answers(args.answer_scoring)
    if task_args.do_predict:
        test = load_questions(args, "test")
        # Answers that some of them have are not asked for.
        splits["test"] = replace(test, examples=[replace(example, answers=None) for example in test.examples])
    if task_args.do_train and task_args.do_eval:
        check_held_out(*(splits[split].image_ids() for split in ("train", "validation")), "images")
    limits = {
        "train": task_args.max_train_samples,
        "validation": task_args.max_eval_samples,
        "test": task_args.max_predict_samples,
    }
    return {
        split: replace(questions, examples=questions.examples[: limits[split]]) for split, questions in splits.items()
    }


def main():
    arguments = parse_arguments(
        (TaskArguments, ModelArguments, VQAArguments, TrainingArguments, OutputArguments),
        description="Finetune and evaluate InterBERT for visual question answering.",
    )
    task_args, model_args, args, training_args, output_args = arguments
    if task_args.do_train:
        output_args.check_output_dir()
        output_args.check_model_card("AutoModelForVisualQuestionAnswering")
    set_up_logging()
    accelerator = make_accelerator(training_args, output_args)
    set_seed(training_args.seed)
    output_dir = Path(output_args.output_dir)

    with accelerator.local_main_process_first():  # so that one process prepares the datasets, and the others read them
        splits = load_splits(task_args, args)
    known = known_answers(model_args)
    label2id = choose_answers(args, model_args, known, splits["train"] if task_args.do_train else None)
    has_new_answers = known not in (None, label2id)
    id2label = {label: answer for answer, label in label2id.items()}
    model, processor = load_model(
        InterBERTForVQA,
        model_args,
        [questions.regions for questions in splits.values()],
        task_values={"label2id": label2id, "id2label": id2label},
        must_be_trained=not task_args.do_train,
        ignore_mismatched_sizes=has_new_answers,
        max_length=args.max_seq_length,
        max_regions=args.max_regions,
    )
    if has_new_answers:
        logger.warning(f"The checkpoint knows other answers, {len(known):,}: its head is not used, but a new one.")
        model.vqa_head.load_state_dict(InterBERTForVQA(model.config).vqa_head.state_dict())

    def make_collator(examples: Sequence[VQAExample]) -> QuestionCollator:
        scoring = args.answer_scoring or choose_scoring(examples)
        return QuestionCollator(
            VQACollator(processor, label2id, scoring, args.max_seq_length, args.max_regions), args.mask_regions
        )

    loader = None
    if task_args.do_train:
        collator = make_collator(splits["train"].examples)
        questions = answerable(splits["train"], collator.collator)
        dataset = questions.dataset()
        loader = make_loader(accelerator, dataset, Batch(collator, identify), dataset.lengths(), training_args)
        num_left_out = len(splits["train"].examples) - len(dataset)
        accelerator.print(
            f"{model.num_parameters():,} parameters; {len(dataset):,} questions about {questions.num_images():,} "
            f"images to train on, {len(label2id):,} answers to choose from; {accelerator.num_processes} process(es).\n"
            f"Left out for lack of a right answer among these: {num_left_out:,} questions."
        )
    if task_args.do_eval:
        validation = splits["validation"]
        load_metric("vqa_score")
        accelerator.print(
            f"{len(validation.examples):,} questions about {validation.num_images():,} images to evaluate on."
        )
    baseline_results, baseline_columns = {}, {}
    if task_args.do_eval and "train" in splits:
        examples = splits["validation"].examples
        by_type = partial(question_type, num_words=args.question_type_words)
        for baseline, groupings in {"type_baseline": [by_type], "question_baseline": [first_words, by_type]}.items():
            answers = FrequentAnswers(splits["train"].examples, *groupings)(examples)
            measured = measure_answers(answers, examples)
            baseline_results |= {f"{baseline}_{name}": value for name, value in measured.items()}
            baseline_columns |= {baseline: answers, f"{baseline}_score": score_answers(answers, examples)}

    def compute_losses(model, inputs):
        outputs = model(**inputs)
        scores = right_answers(outputs.logits.detach(), inputs["labels"])
        return outputs.loss, {"score": (scores.sum(), len(scores))}

    datasets = {split: splits[split].dataset() for split in ("validation", "test") if split in splits}

    def predict_answers(model, split: str) -> list[dict[str, Any]]:
        dataset = datasets[split]
        collator = make_collator(splits[split].examples)
        rows = predict(accelerator, model, dataset, collator, dataset.lengths(), read_answers, training_args)
        return [row | {"answers": [id2label[label] for label in row.pop("labels")]} for row in rows]

    def measure(model):
        examples = splits["validation"].examples
        rows = predict_answers(model, "validation")
        answers = [row["answers"][0] for row in rows]
        results = {"loss": mean(row["loss"] for row in rows)} | measure_answers(answers, examples)
        columns = {"answer": answers, "score": score_answers(answers, examples)} | baseline_columns
        if accelerator.is_main_process:
            write_json_lines(output_dir / "eval_predictions.jsonl", describe_questions(examples, columns))
        return {f"eval_{name}": value for name, value in results.items()} | baseline_results

    widget = None
    if task_args.do_eval and not args.mask_regions:
        questions = defaultdict(list)
        for example in splits["validation"].examples:
            questions[example.image_id].append(example.question)
        # Questions of one image come in the same order as those of the others: not the same kind from each.
        inputs = (
            {"image": image_id, "question": own[number % len(own)]}
            for number, (image_id, own) in enumerate(questions.items())
        )
        widget = WidgetInputs(splits["validation"].regions, inputs)
    model = train_and_evaluate(
        accelerator,
        model,
        processor,
        loader,
        compute_losses,
        measure,
        "AutoModelForVisualQuestionAnswering",
        args.dataset_name,
        arguments,
        widget,
    )
    if task_args.do_predict:
        examples = splits["test"].examples
        rows = predict_answers(model, "test")
        if accelerator.is_main_process:
            columns = {name: [row[name] for row in rows] for name in ("answers", "probabilities")}
            write_json_lines(output_dir / "test_predictions.jsonl", describe_questions(examples, columns))
            path = output_dir / "test_predictions.json"
            path.unlink(missing_ok=True)  # of other questions
            try:
                write_vqa_answers(
                    path, [server_id(example) for example in examples], [row["answers"][0] for row in rows]
                )
            except ValueError as error:
                print(f"{path.name} is not written: {error}")
            print(f"The answers to {len(examples):,} questions are in {output_dir}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
