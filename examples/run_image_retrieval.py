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

    accelerate launch --multi_gpu --mixed_precision bf16 examples/run_image_retrieval.py --do_train --do_eval \\
        --recipe examples/recipes/flickr30k_retrieval.yaml --model_name_or_path org/interbert-base \\
        --dataset_name org/flickr30k-regions --output_dir interbert-base-flickr30k
    accelerate launch --multi_gpu --mixed_precision bf16 examples/run_image_retrieval.py --do_eval --zero_shot \\
        --model_name_or_path org/interbert-base --dataset_name org/flickr30k-regions --validation_split test \\
        --output_dir outputs/zero_shot

`--do_predict` writes the scores of the test split: a matrix of captions and images, with their ids beside it. Scoring
that was stopped goes on where it was.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from arguments import parse_arguments
from finetuning import TaskArguments, make_loader, train_and_evaluate
from model_loading import ModelArguments, load_model
from modeling_interbert import InterBERTForImageRetrieval
from processing import CaptionedImages, InterBERTProcessor, RegionDataset, load_region_dataset
from processing.tasks import RetrievalCollator, RetrievalExamples
from result_files import write_retrieval_scores
from retrieval_evaluation import recall_of_captions, score_captions_against_images
from training import OutputArguments, TrainingArguments, make_accelerator, set_up_logging


@dataclass
class RetrievalArguments:
    """What is retrieved, and what it is told apart from in training."""

    dataset_name: str = field(metadata={"help": "Region dataset with captions: a local folder or a Hub name."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[:10%%] work."})
    validation_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    test_split: str = field(default="test", metadata={"help": "Split to predict for."})
    caption_column: str = field(default="captions", metadata={"help": "Column of captions."})
    hard_negative_column: str = field(
        default="hard_negatives", metadata={"help": "Column of hard negatives, as mine_hard_negatives.py writes it."}
    )
    zero_shot: bool = field(
        default=False, metadata={"help": "Evaluates a pretrained model as it is: not to be had with `--do_train`."}
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
    eval_size: int | None = field(
        default=None, metadata={"help": "Evaluates on the first images with captions alone. By default on all."}
    )
    captions_per_image: int | None = field(
        default=None, metadata={"help": "Evaluates with the first captions of each image alone. By default with all."}
    )
    score_batch_size: int = field(default=256, metadata={"help": "Pairs that are scored at a time."})

    def __post_init__(self):
        for name in ("num_negatives", "max_regions", "eval_size", "captions_per_image", "score_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass
class Queries:
    """
    Captions and the images to be found by them.

    Args:
        rows: Of the images, in the region dataset.
        captions: Of all images, image by image.
        image_of_caption: int64 `(captions,)`, which of the images each caption is of.
    """

    rows: list[int]
    captions: list[str]
    image_of_caption: np.ndarray

    @classmethod
    def of(cls, regions: RegionDataset, args: RetrievalArguments) -> "Queries":
        images = CaptionedImages(regions, args.caption_column)
        rows = images.usable_images[: args.eval_size].tolist()
        captions = [images.captions(row)[: args.captions_per_image] for row in rows]
        counts = [len(own) for own in captions]
        return cls(rows, [caption for own in captions for caption in own], np.repeat(np.arange(len(rows)), counts))


@dataclass
class Batch:
    """
    What the training loop takes: the inputs of the model, and which captions and images they are of.

    Args:
        collator: Makes the inputs.
    """

    collator: RetrievalCollator

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [
            {"captions": sample["captions"], "image_ids": [record["image_id"] for record in sample["records"]]}
            for sample in samples
        ]
        return {"inputs": self.collator(samples), "ids": ids}


def score(
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: InterBERTProcessor,
    regions: RegionDataset,
    queries: Queries,
    args: RetrievalArguments,
    cache_dir: Path | None = None,
) -> np.ndarray:
    return score_captions_against_images(
        accelerator,
        model,
        processor,
        queries.captions,
        [regions[row] for row in queries.rows],
        batch_size=args.score_batch_size,
        max_length=args.max_seq_length,
        max_regions=args.max_regions,
        cache_dir=cache_dir,
    )


def main():
    arguments = parse_arguments(
        (TaskArguments, ModelArguments, RetrievalArguments, TrainingArguments, OutputArguments),
        description="Finetune and evaluate InterBERT for image retrieval.",
    )
    task_args, model_args, args, training_args, output_args = arguments
    if args.zero_shot and task_args.do_train:
        raise ValueError("`--zero_shot` evaluates a pretrained model as it is: it does not go with `--do_train`.")
    if args.zero_shot and model_args.model_name_or_path is None:
        raise ValueError("`--zero_shot` needs a pretrained model, `--model_name_or_path`.")
    if task_args.do_train:
        output_args.check_output_dir()
    set_up_logging()
    accelerator = make_accelerator(training_args, output_args, find_unused_parameters=True)
    set_seed(training_args.seed)

    def load(split: str) -> RegionDataset:
        return load_region_dataset(args.dataset_name, split, name=args.dataset_config_name)

    with accelerator.local_main_process_first():
        train_regions = load(args.train_split) if task_args.do_train else None
        validation_regions = load(args.validation_split) if task_args.do_eval else None
        test_regions = load(args.test_split) if task_args.do_predict else None
    splits = [regions for regions in (train_regions, validation_regions, test_regions) if regions is not None]
    model, processor = load_model(InterBERTForImageRetrieval, model_args, splits)

    loader = None
    if train_regions is not None:
        images = CaptionedImages(
            train_regions, args.caption_column, args.hard_negative_column, max_regions=args.max_regions
        )
        examples = RetrievalExamples(
            images, args.negatives, args.num_negatives, args.hard_negative_share, training_args.seed
        )
        collator = RetrievalCollator(processor, args.loss, args.max_seq_length, args.max_regions)
        loader = make_loader(accelerator, examples, Batch(collator), examples.lengths(), training_args)
        accelerator.print(f"{len(examples):,} captions to train on; {accelerator.num_processes} process(es).")
    queries = Queries.of(validation_regions, args) if validation_regions is not None else None
    if queries is not None:
        accelerator.print(f"{len(queries.captions):,} captions and {len(queries.rows):,} images to evaluate on.")

    def compute_losses(model, inputs):
        outputs = model(**inputs)
        if args.loss == "choice":
            log_odds = outputs.itm_logits[..., 0] - outputs.itm_logits[..., 1]
            right, count = (log_odds.detach().argmax(dim=-1) == inputs["labels"]).sum(), len(inputs["labels"])
        else:
            right = (outputs.itm_logits.detach().argmax(dim=-1) == inputs["itm_labels"]).sum()
            count = len(inputs["itm_labels"])
        return outputs.loss, {"accuracy": (right, count)}

    def evaluate(model):
        scores = score(accelerator, model, processor, validation_regions, queries, args)
        return {f"eval_{name}": value for name, value in recall_of_captions(scores, queries.image_of_caption).items()}

    model = train_and_evaluate(
        accelerator,
        model,
        processor,
        loader,
        compute_losses,
        evaluate,
        "AutoModelForZeroShotImageClassification",
        args.dataset_name,
        task_args,
        model_args,
        training_args,
        output_args,
        args,
    )
    if test_regions is not None:
        queries = Queries.of(test_regions, args)
        folder = Path(output_args.output_dir)
        scores = score(accelerator, model, processor, test_regions, queries, args, folder / "scores.unfinished")
        if accelerator.is_main_process:
            image_ids = [test_regions[row]["image_id"] for row in queries.rows]
            write_retrieval_scores(folder, scores, queries.captions, queries.image_of_caption, image_ids)
            print(f"The scores of {len(queries.captions):,} captions and {len(image_ids):,} images are in {folder}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
