#!/usr/bin/env python
"""
Finetunes InterBERT for caption-based image retrieval and evaluates it: every caption against every image, both ways.

A tiny pretrained model on generated scenes, on a CPU:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    accelerate launch --cpu --num_processes 1 examples/run_image_retrieval.py --do_train --do_eval \\
        --dataset_name outputs/tiny_scenes --tokenizer_name outputs/tiny_scenes/tokenizer \\
        --config_overrides hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=128,\\
vision_intermediate_size=128,num_hidden_layers=2,num_text_layers=1,num_vision_layers=1,pooler_size=64 \\
        --num_train_epochs 1 --output_dir outputs/tiny_retrieval

The paper's run on Flickr30K, from a pretrained checkpoint, and the same checkpoint zero-shot:

    accelerate launch --config_file examples/accelerate_configs/eight_gpus_bf16.yaml examples/run_image_retrieval.py \\
        --recipe examples/recipes/flickr30k_retrieval.yaml --do_train --do_eval \\
        --model_name_or_path org/interbert-base --dataset_name org/flickr30k-regions \\
        --output_dir interbert-base-flickr30k
    accelerate launch --config_file examples/accelerate_configs/eight_gpus_bf16.yaml examples/run_image_retrieval.py \\
        --do_eval --zero_shot --model_name_or_path org/interbert-base --dataset_name org/flickr30k-regions \\
        --validation_split test --output_dir outputs/zero_shot

Evaluation tells recall of images by captions and of captions by images, and the precision among the five best images:
of captions, for each of which one image is right, a fifth of R@5. With `--queries` other texts are evaluated in their
place, each with its relevant images and with its pool; build_queries.py writes such. Of texts with pools, images alone
are retrieved: an image is in the pools of few texts, and most of these are its own.

`--do_predict` writes the scores of the test split: a matrix of captions and images, of log-odds whose sigmoid is the
match score, with their ids beside it. Scoring that was stopped goes on where it was.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import Subset
from transformers import PreTrainedModel

from arguments import parse_arguments
from data_loading import Batch, check_held_out
from finetuning import RegionDatasetArguments, TaskArguments, make_loader, train_and_evaluate
from model_loading import ModelArguments, load_model
from modeling_interbert import InterBERTForImageRetrieval
from processing import CaptionedImages, InterBERTProcessor, RegionDataset
from processing.ranking import precision_at_k, retrieval_recall
from processing.tasks import RetrievalCollator, RetrievalExamples, read_queries
from processing.titles import draw_images
from publishing import WidgetInputs, match_inputs
from result_files import check_ids, write_retrieval_scores
from retrieval_evaluation import score_captions_against_images
from training import OutputArguments, TrainingArguments, make_accelerator, set_up_logging

# Of the images to train on: independent of `--seed`, so that all runs that are compared see the same ones.
IMAGE_SEED = 0


@dataclass
class RetrievalArguments(RegionDatasetArguments):
    """What is retrieved, and what it is told apart from in training."""

    fixed_arguments: ClassVar[tuple[str, ...]] = (
        *RegionDatasetArguments.fixed_arguments,
        "num_train_images",
        "caption_column",
        "negatives",
        "num_negatives",
        "hard_negative_share",
        "loss",
    )

    num_train_images: int | None = field(
        default=None,
        metadata={
            "help": "Trains on so many images, drawn from those with captions and regions. They are always the same, "
            "those of a smaller number among those of a larger one. By default on all."
        },
    )
    caption_column: str = field(default="captions", metadata={"help": "Column of captions."})
    hard_negative_column: str = field(
        default="hard_negatives", metadata={"help": "Column of hard negatives, as mine_hard_negatives.py writes it."}
    )
    zero_shot: bool = field(
        default=False,
        metadata={
            "help": "Makes sure that a pretrained model is evaluated as it is: refused with `--do_train`. It changes "
            "nothing else."
        },
    )
    negatives: str = field(
        default="images",
        metadata={
            "help": "What a caption and its image are told apart from: other images (paper), or a random caption, a "
            "random image and a hard caption (release).",
            "choices": ["images", "pairs"],
        },
    )
    num_negatives: int = field(default=3, metadata={"help": "Number of other images, with `--negatives images`."})
    hard_negative_share: float = field(
        default=0.0, metadata={"help": "Probability of another image to be a hard one, with `--negatives images`."}
    )
    loss: str = field(
        default="choice",
        metadata={
            "help": "Chooses the right one among the pairs of a caption (paper), or classifies each pair (release).",
            "choices": ["choice", "pairs"],
        },
    )
    max_seq_length: int = field(default=30, metadata={"help": "Captions are cut to this number of tokens."})
    max_regions: int = field(default=100, metadata={"help": "Of each image, this many regions are used."})
    queries: str | None = field(
        default=None,
        metadata={
            "help": "Evaluates these texts in place of captions: JSON lines of a `text`, the ids of the `relevant` "
            "images and, if these are not to be found among all images, those of its `pool`."
        },
    )
    captions_per_image: int | None = field(
        default=None, metadata={"help": "Evaluates with the first captions of each image alone. By default with all."}
    )

    def __post_init__(self):
        for name in ("num_train_images", "num_negatives", "max_seq_length", "max_regions", "captions_per_image"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if self.negatives == "pairs" and self.hard_negative_share:
            raise ValueError("`--hard_negative_share` is for `--negatives images`: of the pairs, one is a hard one.")
        if self.queries is not None and self.captions_per_image is not None:
            raise ValueError("`--captions_per_image` is for captions, in whose place `--queries` are evaluated.")


@dataclass
class RetrievalTrainingArguments(TrainingArguments):
    """How the model is optimized, and how many pairs are scored at a time."""

    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Pairs of a caption and an image that each process scores at a time, at most."}
    )


ARGUMENT_CLASSES = (TaskArguments, ModelArguments, RetrievalArguments, RetrievalTrainingArguments, OutputArguments)


@dataclass
class Queries:
    """
    Texts and the images to be found by them.

    Args:
        records: Region records of the images, read when they are asked for.
        image_ids: Of the images.
        num_left_out: Images that have no captions or no regions.
        texts: What is searched for.
        right_images: Of each text, the numbers of its images.
        pools: Of each text, the numbers of the images that it is searched among, if these are not all.
    """

    records: Sequence[dict[str, Any]]
    image_ids: list[str]
    num_left_out: int
    texts: list[str]
    right_images: list[list[int]]
    pools: list[list[int] | None]

    @classmethod
    def of_captions(cls, regions: RegionDataset, max_images: int | None, args: RetrievalArguments) -> "Queries":
        """The captions of the (first) images, image by image."""
        images = CaptionedImages(regions, args.caption_column)
        rows = images.usable_images[:max_images].tolist()
        captions = [images.captions(row)[: args.captions_per_image] for row in rows]
        all_ids = regions.image_ids
        texts = [caption for own in captions for caption in own]
        return cls(
            Subset(regions, rows),
            [all_ids[row] for row in rows],
            images.num_skipped_images,
            texts,
            right_images=[[number] for number, own in enumerate(captions) for _ in own],
            pools=[None] * len(texts),
        )

    @classmethod
    def of_file(cls, path: str, regions: RegionDataset) -> "Queries":
        """
        Texts of a file, searched for among all images that have regions.

        Raises:
            ValueError: an image is not there, or has no regions.
        """
        queries = read_queries(path)
        all_ids = regions.image_ids
        rows = np.flatnonzero(regions.region_counts()).tolist()
        image_ids = [all_ids[row] for row in rows]
        numbers = {image_id: number for number, image_id in enumerate(image_ids)}

        def number_of(image_id: str) -> int:
            if image_id not in numbers:
                raise ValueError(f"{path}: expected ids of images with regions, got {image_id!r}.")
            return numbers[image_id]

        return cls(
            Subset(regions, rows),
            image_ids,
            len(all_ids) - len(rows),
            [query.text for query in queries],
            right_images=[[number_of(image_id) for image_id in query.relevant] for query in queries],
            pools=[None if query.pool is None else [number_of(i) for i in query.pool] for query in queries],
        )

    def __str__(self) -> str:
        return (
            f"{len(self.texts):,} texts and {len(self.records):,} images (left out for lack of captions or regions: "
            f"{self.num_left_out:,})"
        )

    def measure(self, scores: np.ndarray) -> dict[str, float]:
        """
        Recall, median rank and precision of scores `(texts, images)`, -inf outside of the pools. Where there are such,
        images do not search for texts, few of which would compete.
        """
        measured = retrieval_recall(scores, self.right_images) | precision_at_k(scores, self.right_images, ks=(5,))
        has_pools = any(pool is not None for pool in self.pools)
        return {name: value for name, value in measured.items() if not (has_pools and name.startswith("text_"))}


def choose_training_images(regions: RegionDataset, task_args: TaskArguments, args: RetrievalArguments) -> RegionDataset:
    """
    What `--max_train_samples` and `--num_train_images` leave of the training split.

    Raises:
        ValueError: there are not so many images with regions and captions.
    """
    if task_args.max_train_samples is not None:
        first = range(min(task_args.max_train_samples, len(regions)))
        regions = RegionDataset(regions.dataset.select(first))
    if args.num_train_images is not None:
        usable = CaptionedImages(regions, args.caption_column).usable_images.tolist()
        if len(usable) < args.num_train_images:
            raise ValueError(
                f"`--num_train_images` {args.num_train_images:,} needs as many images with regions and "
                f"{args.caption_column} in {args.dataset_name}, {args.train_split}, got {len(usable):,}."
            )
        image_ids = regions.image_ids
        drawn = set(draw_images([[image_ids[row]] for row in usable], args.num_train_images, IMAGE_SEED))
        regions = RegionDataset(regions.dataset.select([row for row in usable if image_ids[row] in drawn]))
    return regions


def identify(sample: dict[str, Any]) -> dict[str, Any]:
    return {"captions": sample["captions"], "image_ids": [record["image_id"] for record in sample["records"]]}


def is_chosen(log_odds: torch.Tensor) -> torch.Tensor:
    """Whether the first of the pairs `(batch, pairs)` has a higher score than each of the others, `(batch,)`."""
    return log_odds[:, 0] > log_odds[:, 1:].amax(dim=1)


def score(
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: InterBERTProcessor,
    queries: Queries,
    args: RetrievalArguments,
    batch_size: int,
    cache_dir: Path,
) -> np.ndarray:
    return score_captions_against_images(
        accelerator,
        model,
        processor,
        queries.texts,
        queries.records,
        batch_size=batch_size,
        max_length=args.max_seq_length,
        max_regions=args.max_regions,
        cache_dir=cache_dir,
        pools=queries.pools,
    )


def main():
    arguments = parse_arguments(ARGUMENT_CLASSES, description="Finetune and evaluate InterBERT for image retrieval.")
    task_args, model_args, args, training_args, output_args = arguments
    if args.zero_shot and task_args.do_train:
        raise ValueError("`--zero_shot` evaluates a pretrained model as it is: it does not go with `--do_train`.")
    if args.zero_shot and model_args.model_name_or_path is None:
        raise ValueError("`--zero_shot` needs a pretrained model, `--model_name_or_path`.")
    if args.queries is not None and not task_args.do_eval:
        raise ValueError("`--queries` are evaluated, `--do_eval`: predictions are of captions.")
    if args.queries is not None and task_args.max_eval_samples is not None:
        raise ValueError("`--max_eval_samples` is for captions: `--queries` are evaluated as they are.")
    if task_args.do_train:
        output_args.check_output_dir()
        output_args.check_model_card("AutoModelForZeroShotImageClassification")
    set_up_logging()
    accelerator = make_accelerator(training_args, output_args, find_unused_parameters=True)
    set_seed(training_args.seed)

    with accelerator.local_main_process_first():
        train_regions = args.load_regions("train") if task_args.do_train else None
        validation_regions = args.load_regions("validation") if task_args.do_eval else None
        test_regions = args.load_regions("test") if task_args.do_predict else None
    splits = [regions for regions in (train_regions, validation_regions, test_regions) if regions is not None]
    model, processor = load_model(
        InterBERTForImageRetrieval,
        model_args,
        splits,
        must_be_trained=not task_args.do_train,
        max_length=args.max_seq_length,
        max_regions=args.max_regions,
    )

    loader = None
    if train_regions is not None:
        train_regions = choose_training_images(train_regions, task_args, args)
        images = CaptionedImages(
            train_regions, args.caption_column, args.hard_negative_column, max_regions=args.max_regions
        )
        examples = RetrievalExamples(
            images, args.negatives, args.num_negatives, args.hard_negative_share, training_args.seed
        )
        collator = RetrievalCollator(processor, args.loss, args.max_seq_length, args.max_regions)
        loader = make_loader(accelerator, examples, Batch(collator, identify), examples.lengths(), training_args)
        accelerator.print(
            f"{len(examples):,} captions to train on (images left out for lack of captions or regions: "
            f"{images.num_skipped_images:,}); {accelerator.num_processes} process(es)."
        )
    validation, test = None, None
    if validation_regions is not None:
        if args.queries is not None:
            validation = Queries.of_file(args.queries, validation_regions)
        else:
            validation = Queries.of_captions(validation_regions, task_args.max_eval_samples, args)
        accelerator.print(f"{validation} to evaluate on; {accelerator.num_processes} process(es).")
    if test_regions is not None:
        test = Queries.of_captions(test_regions, task_args.max_predict_samples, args)
        check_ids("image_ids", test.image_ids)
        accelerator.print(f"{test} to score.")
    if train_regions is not None and validation is not None:
        check_held_out(train_regions.image_ids, validation.image_ids, "images")
    batch_size = training_args.per_device_eval_batch_size
    cache_dir = Path(output_args.output_dir) / "scores.unfinished"

    def compute_losses(model, inputs):
        outputs = model(**inputs)
        if args.loss == "choice":
            log_odds = outputs.itm_logits[..., 0] - outputs.itm_logits[..., 1]
            right, count = is_chosen(log_odds.detach()).sum(), len(inputs["labels"])
        else:
            right = (outputs.itm_logits.detach().argmax(dim=-1) == inputs["itm_labels"]).sum()
            count = len(inputs["itm_labels"])
        return outputs.loss, {"accuracy": (right, count)}

    def evaluate(model):
        scores = score(accelerator, model, processor, validation, args, batch_size, cache_dir)
        return {f"eval_{name}": value for name, value in validation.measure(scores).items()}

    widget = None
    if validation_regions is not None:
        pairs = zip(validation.right_images, validation.texts, strict=True)
        inputs = match_inputs((validation.image_ids[right[0]], text) for right, text in pairs)
        widget = WidgetInputs(validation_regions, inputs)
    model = train_and_evaluate(
        accelerator,
        model,
        processor,
        loader,
        compute_losses,
        evaluate,
        "AutoModelForZeroShotImageClassification",
        args.dataset_name,
        arguments,
        widget,
    )
    if test is not None:
        scores = score(accelerator, model, processor, test, args, batch_size, cache_dir)
        if accelerator.is_main_process:
            folder = Path(output_args.output_dir)
            image_of_caption = [number for (number,) in test.right_images]
            write_retrieval_scores(folder, scores, test.texts, image_of_caption, test.image_ids)
            print(f"The scores of {len(test.texts):,} captions and {len(test.records):,} images are in {folder}.")
    if accelerator.is_main_process:
        shutil.rmtree(cache_dir, ignore_errors=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
