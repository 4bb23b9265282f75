#!/usr/bin/env python
"""
Pretrains InterBERT on a region dataset with captions: masked words, masked regions, image-text matching.

A tiny model from scratch on generated scenes, on a CPU:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    accelerate launch --cpu --num_processes 1 examples/run_pretrain.py \\
        --dataset_name outputs/tiny_scenes --tokenizer_name outputs/tiny_scenes/tokenizer \\
        --config_overrides hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=128,\\
vision_intermediate_size=128,num_hidden_layers=2,num_text_layers=1,num_vision_layers=1,pooler_size=64 \\
        --num_train_epochs 1 --retrieval_eval_size 20 --output_dir outputs/tiny_pretrained

The paper's two stages at base size, started from BERT, on several GPUs:

    accelerate launch --config_file examples/accelerate_configs/eight_gpus_bf16.yaml examples/run_pretrain.py \\
        --dataset_name org/my-regions --bert_name_or_path bert-base-uncased \\
        --objectives mlm,mom,itm msm,mrm,itm --stage_epochs 5 10 \\
        --per_device_train_batch_size 64 --group_by_length --learning_rate 1e-4 --num_warmup_steps 10000 \\
        --output_dir interbert-base --push_to_hub

`--recipe` reads arguments from files, such as those of examples/recipes; examples/accelerate_configs has
configurations for `accelerate launch --config_file`. A run that was stopped goes on exactly where its newest checkpoint
was written when the same command is given again with `--resume_from_checkpoint latest`.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import send_to_device, set_seed
from torch.utils.data import DataLoader, Subset

from arguments import parse_arguments, to_recipe
from data_loading import Batch, DatasetLoader, EpochLoader, StreamLoader, check_held_out
from model_loading import ModelArguments, learning_rate_scales, load_model
from modeling_interbert import InterBERTForPreTraining
from modeling_interbert.modeling_interbert import InterBERTForPreTrainingOutput
from processing import (
    InterBERTProcessor,
    PretrainingCollator,
    PretrainingPairs,
    RegionDataset,
    RegionStream,
    ShuffledBatchSampler,
    StreamedBatches,
    load_region_dataset,
)
from processing.pretraining import PretrainingObjectives
from processing.ranking import retrieval_recall
from processing.streaming import load_split_alone
from processing.words import MASKING_UNITS, read_similar_words, share_with_similar_words
from publishing import WidgetInputs, match_inputs, publish
from retrieval_evaluation import score_captions_against_images
from training import (
    OutputArguments,
    Totals,
    TrainingArguments,
    TrainingRun,
    flat_config,
    make_accelerator,
    means_of,
    set_up_logging,
)

logger = get_logger(__name__)
# Captions of which it is said how many words have similar ones.
NUM_SAMPLED_CAPTIONS = 1_000


@dataclass
class DataArguments:
    """What the model is pretrained on."""

    dataset_name: str = field(metadata={"help": "Region dataset: a local folder or a Hub name."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[:90%%] work."})
    validation_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Reads the training split from one end to the other, in parts, instead of preparing all of it. An "
            "epoch is then as many batches as its captions fill."
        },
    )
    caption_column: str = field(default="captions", metadata={"help": "Column of captions."})
    hard_negative_column: str = field(
        default="hard_negatives", metadata={"help": "Column of hard negatives, as mine_hard_negatives.py writes it."}
    )
    max_seq_length: int = field(default=36, metadata={"help": "Captions are cut to this number of tokens."})
    max_regions: int = field(default=36, metadata={"help": "Of each image, this many regions are used."})
    max_train_images: int | None = field(default=None, metadata={"help": "For trying out: the first images only."})
    retrieval_eval_size: int = field(
        default=200,
        metadata={
            "help": "Zero-shot retrieval is evaluated on the first caption of each of the first so many validation "
            "images, every caption against every image; 0 leaves it out."
        },
    )
    retrieval_eval_every_epoch: bool = field(
        default=True, metadata={"help": "False evaluates retrieval after the last epoch only."}
    )

    def __post_init__(self):
        if self.retrieval_eval_size < 0:
            raise ValueError(f"`--retrieval_eval_size` must not be negative, got {self.retrieval_eval_size}.")
        if self.streaming and self.max_train_images is not None:
            raise ValueError("`--max_train_images` is for data that are not streamed.")


@dataclass
class ObjectiveArguments:
    """What the model is trained to do."""

    objectives: list[str] = field(
        default_factory=lambda: ["mlm,mom,itm"],
        metadata={
            "help": "Per stage its objectives, joined by commas: mlm or msm (masked words or segments), mom or mrm "
            "(masked regions, or anchors with what overlaps them), itm (matching)."
        },
    )
    stage_epochs: list[int] | None = field(
        default=None,
        metadata={
            "help": "Epochs of each stage, in place of `--num_train_epochs`; the last one lasts as long as there are "
            "more of `--max_train_steps`."
        },
    )
    region_objective: str | None = field(
        default=None,
        metadata={
            "help": "What a masked region is scored against: the detector's class probabilities, its class, or the "
            "feature. By default soft_class where the dataset has probabilities, else hard_class where it has classes, "
            "else feature.",
            "choices": ["soft_class", "hard_class", "feature"],
        },
    )
    conditional_masking: bool = field(
        default=True, metadata={"help": "Masks one modality of a pair at a time, in turn."}
    )
    hard_negative_share: list[float] = field(
        default_factory=lambda: [0.0],
        metadata={
            "help": "Of the mismatched pairs, the share whose caption is one of the image's hard negatives: one "
            "number, or one per stage."
        },
    )
    in_batch_negative_share: float = field(
        default=0.0, metadata={"help": "Of the mismatched pairs, the share whose caption is taken from the same batch."}
    )
    text_mask_probability: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of words that are masked (mlm, by default 0.15) or begin a masked segment (msm, 0.10). Two "
            "numbers are those of the first and of the last epoch that is trained, between which it changes by equal "
            "steps; the evaluation always masks by the last one."
        },
    )
    masking_unit: str = field(
        default="token",
        metadata={
            "help": "What is masked as a whole: single tokens, words between white space and punctuation, or Chinese "
            "words as jieba finds them.",
            "choices": list(MASKING_UNITS),
        },
    )
    similar_words: str | None = field(
        default=None,
        metadata={
            "help": "JSON table of words and those like them, as find_similar_words.py writes it: words become similar "
            "ones in place of [MASK] (MLM as correction). Words of several tokens need another `--masking_unit` than "
            "token, Chinese ones jieba."
        },
    )
    region_mask_probability: float = field(
        default=0.15, metadata={"help": "Share of regions that are masked (mom), or anchors of masked groups (mrm)."}
    )
    mlm_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the masked words' loss."})
    region_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the masked regions' loss."})
    itm_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the matching loss."})

    def __post_init__(self):
        if self.stage_epochs is None and len(self.objectives) > 1:
            raise ValueError(
                f"{len(self.objectives)} stages of `--objectives` need as many `--stage_epochs`, got none."
            )
        if self.stage_epochs is not None and len(self.stage_epochs) != len(self.objectives):
            raise ValueError(
                f"`--stage_epochs` must have one number per stage of `--objectives` ({len(self.objectives)}), got "
                f"{len(self.stage_epochs)}."
            )
        for objectives in self.objectives:
            PretrainingObjectives.parse(objectives)
        if any(num_epochs < 1 for num_epochs in self.stage_epochs or []):
            raise ValueError(f"`--stage_epochs` must be at least 1 each, got {self.stage_epochs}.")
        rates = {
            "text_mask_probability": self.text_mask_probability or [],
            "region_mask_probability": [self.region_mask_probability],
            "in_batch_negative_share": [self.in_batch_negative_share],
            "hard_negative_share": self.hard_negative_share,
        }
        for name, values in rates.items():
            if not all(0 <= value <= 1 for value in values):
                raise ValueError(f"`--{name}` must be between 0 and 1, got {values}.")
        if max(self.hard_negative_share) + self.in_batch_negative_share > 1:
            raise ValueError(
                "`--hard_negative_share` and `--in_batch_negative_share` must add up to at most 1, got "
                f"{self.hard_negative_share} and {self.in_batch_negative_share}."
            )
        if len(self.hard_negative_share) not in (1, len(self.objectives)):
            raise ValueError(
                f"`--hard_negative_share` must be one number, or one per stage of `--objectives` "
                f"({len(self.objectives)}), got {len(self.hard_negative_share)}."
            )
        if self.text_mask_probability is not None and len(self.text_mask_probability) not in (1, 2):
            raise ValueError(
                "`--text_mask_probability` must be one number, or those of the first and of the last epoch, got "
                f"{len(self.text_mask_probability)}."
            )
        text_objectives = {PretrainingObjectives.parse(objectives).text for objectives in self.objectives} - {None}
        if self.has_masking_schedule and len(text_objectives) > 1:
            raise ValueError(
                "Two numbers of `--text_mask_probability` are shares of all words in mlm, and of the words that begin "
                f"a segment in msm: expected stages of one of the two, got {self.objectives}."
            )

    @property
    def leaves_out_a_head(self) -> bool:
        """Whether some stage has no masked words, no masked regions or no matching."""
        stages = [PretrainingObjectives.parse(objectives) for objectives in self.objectives]
        return any(None in (stage.text, stage.regions) or not stage.matching for stage in stages)

    @property
    def has_matching(self) -> bool:
        """Whether the match head is trained in some stage."""
        return any(PretrainingObjectives.parse(objectives).matching for objectives in self.objectives)

    @property
    def has_masked_regions(self) -> bool:
        """Whether the region head is trained in some stage."""
        return any(PretrainingObjectives.parse(objectives).regions is not None for objectives in self.objectives)

    def stage_of(self, epoch: int) -> int:
        """The stage of an epoch, both counted from 0."""
        for stage, num_epochs in enumerate(self.stage_epochs or []):
            if epoch < num_epochs:
                return stage
            epoch -= num_epochs
        return len(self.objectives) - 1

    def objectives_of(self, epoch: int) -> str:
        """Objectives of an epoch, counted from 0."""
        return self.objectives[self.stage_of(epoch)]

    def negative_shares_of(self, epoch: int) -> dict[str, float]:
        """Shares of hard and of in-batch negatives in an epoch, counted from 0."""
        hard = self.hard_negative_share[self.stage_of(epoch) if len(self.hard_negative_share) > 1 else 0]
        return {"hard_negative_share": hard, "in_batch_negative_share": self.in_batch_negative_share}

    @property
    def has_masking_schedule(self) -> bool:
        """Whether the masking rate changes from epoch to epoch."""
        return self.text_mask_probability is not None and len(self.text_mask_probability) == 2

    def text_mask_probability_of(self, epoch: int, num_epochs: int) -> float | None:
        """Masking rate of an epoch, counted from 0, of so many; None is the default of its objective."""
        if self.text_mask_probability is None:
            return None
        return float(np.linspace(self.text_mask_probability[0], self.text_mask_probability[-1], num_epochs)[epoch])

    @property
    def last_text_mask_probability(self) -> float | None:
        """Masking rate of the last epoch, and of the evaluation after every epoch."""
        return None if self.text_mask_probability is None else self.text_mask_probability[-1]


def count_epochs(args: TrainingArguments, batches_per_epoch: int) -> int:
    """Epochs that are trained, of which the last one may be cut short, with so many batches of each process."""
    if args.max_train_steps is None:
        return args.num_train_epochs
    return -(-args.max_train_steps // (batches_per_epoch // args.gradient_accumulation_steps))


def choose_region_objective(requested: str | None, regions: RegionDataset | RegionStream) -> str:
    """The requested objective, hard_class in place of a missing soft_class; by default the first that can be had."""
    has_probabilities = "class_probs" in regions.column_names
    if requested == "soft_class" and not has_probabilities:
        logger.warning("The dataset has no `class_probs`, which soft_class needs: hard_class is used instead.")
        return "hard_class"
    if requested is None:
        has_classes = "class_ids" in regions.column_names
        requested = "soft_class" if has_probabilities else "hard_class" if has_classes else "feature"
        logger.info(f"Masked regions are scored by {requested}.")
    return requested


def build_model(
    args: ModelArguments,
    splits: list[RegionDataset | RegionStream],
    region_objective: str | None,
    has_masked_regions: bool,
    **limits,
) -> tuple[InterBERTForPreTraining, InterBERTProcessor]:
    """
    The model and the processor, with the sizes that all splits of the dataset call for.

    Args:
        has_masked_regions: The dataset must have what a checkpoint's region head is scored against.
        limits: `max_length` and `max_regions`, see [`load_model`].
    """
    values = {}
    if args.model_name_or_path is None:
        objective = choose_region_objective(region_objective, splits[0])
        values["region_objective"] = objective
        if objective != "feature":
            values["num_region_classes"] = max(regions.num_region_classes(objective) for regions in splits)
    model, processor = load_model(InterBERTForPreTraining, args, splits, new_values=values, **limits)
    config = model.config
    if region_objective not in (None, config.region_objective) and args.model_name_or_path is not None:
        raise ValueError(
            f"`--region_objective` must be that of the checkpoint, {config.region_objective}, got {region_objective}."
        )
    if has_masked_regions and config.region_objective != "feature":
        classes = max(regions.num_region_classes(config.region_objective) for regions in splits)
        if classes > config.num_region_classes:
            raise ValueError(
                f"The model's region head must have the dataset's {classes} classes, got {config.num_region_classes}."
            )
    return model, processor


def score_objectives(
    outputs: InterBERTForPreTrainingOutput, inputs: dict[str, torch.Tensor], region_objective: str
) -> dict[str, tuple[torch.Tensor | float, int]]:
    """
    Loss and accuracy of masked words, masked regions and matching, as far as the inputs have labels for them.

    Returns:
        `{mlm,region,itm}_{loss,accuracy}`: the sum over everything that is scored, and how much that is. Features have
        no right class, hence no accuracy.
    """
    scored = {}
    if "labels" in inputs:
        scored["mlm"] = outputs.mlm_logits, inputs["labels"][inputs["labels"] != -100]
    if "region_targets" in inputs:
        targets = inputs["region_targets"][inputs["region_target_mask"].bool()]
        scored["region"] = (
            outputs.region_logits,
            targets.argmax(dim=-1) if region_objective == "soft_class" else targets,
        )
    if "itm_labels" in inputs:
        scored["itm"] = outputs.itm_logits, inputs["itm_labels"]
    totals = {}
    for name, (logits, targets) in scored.items():
        count = len(targets)
        totals[f"{name}_loss"] = outputs[f"{name}_loss"].detach() * count, count
        if targets.dim() == 1:
            totals[f"{name}_accuracy"] = (logits.detach().argmax(dim=-1) == targets).sum(), count
    return totals


@torch.inference_mode()
def evaluate_objectives(
    accelerator: Accelerator, model: InterBERTForPreTraining, pairs: PretrainingPairs, collator, batch_size: int
) -> dict[str, float]:
    """
    Loss and accuracy of masked words, masked regions and matching, each averaged over everything that is scored.
    The pairs are divided among the processes, none twice.
    """
    model.eval()
    own_pairs = Subset(pairs, range(accelerator.process_index, len(pairs), accelerator.num_processes))
    totals = Totals()
    # With a generator of its own, the evaluation changes nothing of the training after it.
    loader = DataLoader(own_pairs, batch_size=batch_size, collate_fn=collator, generator=torch.Generator())
    for inputs in loader:
        inputs = send_to_device(inputs, accelerator.device)
        with accelerator.autocast():
            outputs = model(**inputs)
        totals.add(score_objectives(outputs, inputs, model.config.region_objective))
    return {f"eval_{name}": value for name, value in means_of(totals.flush()).items()}


@dataclass
class TrainingPairs:
    """
    Makes the pairs of a dataset, or of a part of one that is streamed, with the objectives of the current epoch.

    Args:
        data_args: With the columns.
        objective_args: With the objectives of all epochs.
        epoch: The current one, counted from 0.
    """

    data_args: DataArguments
    objective_args: ObjectiveArguments
    epoch: int = 0

    def __call__(self, regions: RegionDataset, seed: int) -> PretrainingPairs:
        return PretrainingPairs(
            regions,
            self.data_args.caption_column,
            seed=seed,
            objectives=self.objective_args.objectives_of(self.epoch),
            hard_negative_column=self.data_args.hard_negative_column,
            max_regions=self.data_args.max_regions,
            **self.objective_args.negative_shares_of(self.epoch),
        )


def identify(sample: dict[str, Any]) -> dict[str, Any]:
    return {"image_id": sample["record"]["image_id"], "caption": sample["caption"]}


def main():
    arguments = parse_arguments(
        (ModelArguments, DataArguments, ObjectiveArguments, TrainingArguments, OutputArguments),
        description="Pretrain InterBERT on a region dataset.",
    )
    model_args, data_args, objective_args, training_args, output_args = arguments
    if objective_args.stage_epochs is not None:
        training_args.num_train_epochs = sum(objective_args.stage_epochs)
    output_args.check_output_dir()
    output_args.check_model_card("AutoModelForPreTraining")
    output_args.check_widget(objective_args.has_matching)
    set_up_logging()
    accelerator = make_accelerator(training_args, output_args, objective_args.leaves_out_a_head)
    set_seed(training_args.seed)

    with accelerator.local_main_process_first():  # so that one process prepares the dataset, and the others read it
        name, options = data_args.dataset_name, {"name": data_args.dataset_config_name}
        if data_args.streaming:
            columns = [data_args.caption_column, data_args.hard_negative_column]
            train_regions = RegionStream.open(name, data_args.train_split, columns=columns, **options)
            validation_regions = load_split_alone(name, data_args.validation_split, **options)
        else:
            train_regions = load_region_dataset(name, data_args.train_split, **options)
            validation_regions = load_region_dataset(name, data_args.validation_split, **options)
    model, processor = build_model(
        model_args,
        [train_regions, validation_regions],
        objective_args.region_objective,
        objective_args.has_masked_regions,
        max_length=data_args.max_seq_length,
        max_regions=data_args.max_regions,
    )
    if data_args.max_train_images is not None:
        first = range(min(data_args.max_train_images, len(train_regions)))
        train_regions = RegionDataset(train_regions.dataset.select(first))
    if not data_args.streaming:
        check_held_out(train_regions.image_ids, validation_regions.image_ids, "images")

    if any(objective_args.hard_negative_share) and data_args.hard_negative_column not in train_regions.column_names:
        raise ValueError(
            f"`--hard_negative_share` needs the column {data_args.hard_negative_column!r}, which "
            f"examples/mine_hard_negatives.py adds; the dataset has {train_regions.column_names}."
        )
    make_pairs = TrainingPairs(data_args, objective_args)
    # Random negatives, whatever the training has: the accuracies of all runs are of the same pairs.
    validation_pairs = PretrainingPairs(
        validation_regions,
        data_args.caption_column,
        seed=training_args.seed,
        objectives=objective_args.objectives_of(0),
        fixed_epoch=0,
    )
    similar_words = None
    if objective_args.similar_words is not None:
        similar_words = read_similar_words(
            objective_args.similar_words, processor.tokenizer, objective_args.masking_unit
        )
    collator = PretrainingCollator(
        processor,
        objectives=objective_args.objectives_of(0),
        region_objective=model.config.region_objective,
        conditional_masking=objective_args.conditional_masking,
        text_mask_probability=objective_args.last_text_mask_probability,
        region_mask_probability=objective_args.region_mask_probability,
        max_length=data_args.max_seq_length,
        max_regions=data_args.max_regions,
        masking_unit=objective_args.masking_unit,
        similar_words=similar_words,
    )
    # With one masking rate, or the losses of two epochs could not be compared.
    evaluation_collator = copy.copy(collator)
    own_share = {
        "batch_size": training_args.per_device_train_batch_size,
        "seed": training_args.seed,
        "process_index": accelerator.process_index,
        "num_processes": accelerator.num_processes,
    }
    loading = {
        "collate_fn": Batch(collator, identify),
        "num_workers": training_args.dataloader_num_workers,
        "pin_memory": accelerator.device.type == "cuda",
    }
    loader: EpochLoader
    train_pairs = None
    if data_args.streaming:
        num_pairs = train_regions.num_values(data_args.caption_column)
        batches_of_all = training_args.gradient_accumulation_steps * accelerator.num_processes
        steps = num_pairs // (training_args.per_device_train_batch_size * batches_of_all)
        if steps == 0:
            raise ValueError(
                "Streaming leaves out what does not fill a step: expected at least "
                f"{training_args.per_device_train_batch_size * batches_of_all:,} captions (batch size, accumulation "
                f"and processes multiplied), got {num_pairs:,} in {data_args.train_split}."
            )
        loader = StreamLoader(
            StreamedBatches(train_regions, make_pairs, group_by_length=training_args.group_by_length, **own_share),
            batches_per_epoch=steps * training_args.gradient_accumulation_steps,
            **loading,
        )
    else:
        train_pairs = make_pairs(train_regions, training_args.seed)
        num_pairs = len(train_pairs)
        sampler = ShuffledBatchSampler(
            num_pairs,
            lengths=train_pairs.lengths() if training_args.group_by_length else None,
            batches_per_step=training_args.gradient_accumulation_steps,
            **own_share,
        )
        loader = DatasetLoader(train_pairs, sampler, **loading)
    num_epochs = count_epochs(training_args, len(loader))
    if objective_args.has_masking_schedule and num_epochs == 1:
        raise ValueError(
            "Two numbers of `--text_mask_probability` are those of the first and of the last epoch: expected at least "
            "2 epochs, got 1."
        )
    if similar_words is not None:
        captions = (train_pairs or validation_pairs).sample_captions(NUM_SAMPLED_CAPTIONS)
        share = share_with_similar_words(captions, processor.tokenizer, objective_args.masking_unit, similar_words)
        if share == 0:
            raise ValueError(
                f"`--similar_words` {objective_args.similar_words}: expected words of the dataset, got none of those "
                f"in {len(captions):,} captions, such as {captions[0]!r}."
            )
        accelerator.print(
            f"{share:.1%} of the words in {len(captions):,} captions have similar ones; masked ones without any become "
            "random words."
        )
    retrieved = []
    # A match head that nothing has trained would be measured, and what it guesses would go into the card.
    if objective_args.has_matching or model_args.model_name_or_path is not None:
        retrieved = validation_pairs.usable_images()[: data_args.retrieval_eval_size].tolist()
    weights = {
        "mlm_loss": objective_args.mlm_loss_weight,
        "region_loss": objective_args.region_loss_weight,
        "itm_loss": objective_args.itm_loss_weight,
    }
    num_images = train_regions.num_rows if data_args.streaming else len(train_regions)
    accelerator.print(
        f"{model.num_parameters():,} parameters; {num_images:,} images with {num_pairs:,} captions to train on, "
        f"{len(validation_pairs):,} captions to evaluate on; {accelerator.num_processes} process(es)."
    )
    if train_pairs is not None:
        accelerator.print(
            f"Left out for lack of captions or regions: {train_pairs.num_skipped_images:,} images for training, "
            f"{validation_pairs.num_skipped_images:,} for evaluation."
        )

    region_objective = model.config.region_objective

    def compute_losses(model, inputs):
        outputs = model(**inputs)
        loss = sum(weight * outputs[name] for name, weight in weights.items() if outputs.get(name) is not None)
        return loss, score_objectives(outputs, inputs, region_objective)

    def begin_epoch(epoch):
        make_pairs.epoch = epoch
        objectives = objective_args.objectives_of(epoch)
        if train_pairs is not None:
            train_pairs.set_objectives(objectives)
            train_pairs.set_negative_shares(**objective_args.negative_shares_of(epoch))
        validation_pairs.set_objectives(objectives)
        collator.set_objectives(objectives)
        collator.set_text_mask_probability(objective_args.text_mask_probability_of(epoch, num_epochs))
        evaluation_collator.set_objectives(objectives)

    def end_epoch(epoch, model, is_last):
        results = evaluate_objectives(
            accelerator, model, validation_pairs, evaluation_collator, training_args.per_device_eval_batch_size
        )
        if retrieved and (is_last or data_args.retrieval_eval_every_epoch):
            scores = score_captions_against_images(
                accelerator,
                model,
                processor,
                [validation_regions.captions(i, data_args.caption_column)[0] for i in retrieved],
                [validation_regions[i] for i in retrieved],
                batch_size=training_args.per_device_eval_batch_size,
                max_length=data_args.max_seq_length,
                max_regions=data_args.max_regions,
            )
            recalls = retrieval_recall(scores, np.arange(len(retrieved))[:, None])
            results |= {f"eval_{name}": value for name, value in recalls.items()}
        return results

    run = TrainingRun(
        accelerator,
        model,
        processor,
        loader,
        training_args,
        output_args,
        compute_losses,
        begin_epoch,
        end_epoch,
        settings=flat_config(*arguments),
        recipe=to_recipe(model_args, data_args, objective_args, training_args),
        fixed_arguments=("train_split", "caption_column"),
        learning_rate_scales=learning_rate_scales(model, model_args),
    )
    run.train()
    shown = (
        (validation_regions[row]["image_id"], validation_regions.captions(row, data_args.caption_column)[0])
        for row in validation_pairs.usable_images()
    )
    publish(
        run,
        "AutoModelForPreTraining",
        data_args.dataset_name,
        model_args,
        flat_config(data_args, objective_args, training_args),
        WidgetInputs(validation_regions, match_inputs(shown)) if objective_args.has_matching else None,
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
