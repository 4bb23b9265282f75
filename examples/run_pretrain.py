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

    accelerate launch --multi_gpu --mixed_precision bf16 examples/run_pretrain.py \\
        --dataset_name org/my-regions --bert_name_or_path bert-base-uncased \\
        --objectives mlm,mom,itm msm,mrm,itm --stage_epochs 5 10 \\
        --per_device_train_batch_size 64 --group_by_length --learning_rate 1e-4 --num_warmup_steps 10000 \\
        --output_dir interbert-base --push_to_hub

Two processes on a CPU: `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...`.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, RandomSampler, Subset
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

from configuration_interbert import InterBERTConfig
from model_cards import PretrainedCard
from modeling_interbert import InterBERTForPreTraining
from processing import (
    InterBERTProcessor,
    LengthGroupedSampler,
    PretrainingCollator,
    PretrainingPairs,
    RegionDataset,
    load_region_dataset,
)
from retrieval_evaluation import recall_at_k, score_captions_against_images
from training import (
    OutputArguments,
    TrainingArguments,
    create_repository,
    flat_config,
    format_table,
    make_accelerator,
    push_folder,
    train,
    write_final_model,
    write_model,
)

logger = get_logger(__name__)


@dataclass
class ModelArguments:
    """Which model is pretrained, and what it starts from: an InterBERT, a BERT, or nothing."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "InterBERT checkpoint to go on from, with its processor."}
    )
    bert_name_or_path: str | None = field(
        default=None, metadata={"help": "BERT checkpoint to start from, with its tokenizer."}
    )
    layout: str = field(
        default="paper",
        metadata={
            "help": "How the layers of `--bert_name_or_path` are used: all as interaction layers (paper), or the "
            "first half as interaction layers and the second as text stream (release).",
            "choices": ["paper", "release"],
        },
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a model from scratch: a folder, a file or a Hub name."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Values of the configuration, such as hidden_size=128,num_text_layers=2."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "BERT tokenizer, if not that of the checkpoint."}
    )

    def __post_init__(self):
        if self.model_name_or_path is not None and self.bert_name_or_path is not None:
            raise ValueError("Give either `--model_name_or_path` or `--bert_name_or_path`, not both.")
        if self.model_name_or_path is not None and (self.config_name or self.config_overrides or self.tokenizer_name):
            raise ValueError(
                "`--config_name`, `--config_overrides` and `--tokenizer_name` are for new models: the checkpoint of "
                "`--model_name_or_path` has its own."
            )
        if self.model_name_or_path is None and self.bert_name_or_path is None and self.tokenizer_name is None:
            raise ValueError("A model from scratch needs `--tokenizer_name`.")


@dataclass
class DataArguments:
    """What the model is pretrained on."""

    dataset_name: str = field(metadata={"help": "Region dataset: a local folder or a Hub name."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[:90%%] work."})
    validation_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    caption_column: str = field(default="captions", metadata={"help": "Column of captions."})
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
        default=None, metadata={"help": "Epochs of each stage, in place of `--num_train_epochs`."}
    )
    region_objective: str | None = field(
        default=None,
        metadata={
            "help": "What a masked region is scored against: the detector's class probabilities, its class, or the "
            "feature. By default soft_class where the dataset has probabilities, else hard_class.",
            "choices": ["soft_class", "hard_class", "feature"],
        },
    )
    conditional_masking: bool = field(
        default=True, metadata={"help": "Masks one modality of a pair at a time, in turn."}
    )
    text_mask_probability: float | None = field(
        default=None,
        metadata={"help": "Share of tokens that are masked (mlm, 0.15) or begin a masked segment (msm, 0.10)."},
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

    @property
    def leaves_out_a_head(self) -> bool:
        """Whether some stage has no masked words, no masked regions or no matching."""
        return any(len(objectives.split(",")) < 3 for objectives in self.objectives)

    def of_epoch(self, epoch: int) -> str:
        """Objectives of an epoch, counted from 0."""
        for objectives, num_epochs in zip(self.objectives, self.stage_epochs or [], strict=False):
            if epoch < num_epochs:
                return objectives
            epoch -= num_epochs
        return self.objectives[-1]


def choose_region_objective(requested: str | None, regions: RegionDataset) -> str:
    """The requested objective if the dataset has what it needs; hard_class in place of a missing soft_class."""
    has_probabilities = "class_probs" in regions.column_names
    if requested == "soft_class" and not has_probabilities:
        logger.warning("The dataset has no `class_probs`, which soft_class needs: hard_class is used instead.")
        return "hard_class"
    if requested is None:
        requested = "soft_class" if has_probabilities else "hard_class"
        logger.info(f"Masked regions are scored by {requested}.")
    return requested


def load_checkpoint(
    args: ModelArguments, region_objective: str | None, region_feature_size: int
) -> tuple[InterBERTForPreTraining, InterBERTProcessor]:
    """The model and the processor of `--model_name_or_path`, if they fit the dataset and the other arguments."""
    model = InterBERTForPreTraining.from_pretrained(args.model_name_or_path)
    processor = InterBERTProcessor.from_pretrained(args.model_name_or_path)
    if model.config.region_feature_size != region_feature_size:
        raise ValueError(
            f"The dataset's region features must be as wide as the model's, {model.config.region_feature_size}, got "
            f"{region_feature_size}."
        )
    if region_objective not in (None, model.config.region_objective):
        raise ValueError(
            f"`--region_objective` must be that of the checkpoint, {model.config.region_objective}, got "
            f"{region_objective}."
        )
    return model, processor


def build_model(
    args: ModelArguments, splits: list[RegionDataset], region_objective: str | None
) -> tuple[InterBERTForPreTraining, InterBERTProcessor]:
    """The model and the processor, with the sizes that all splits of the dataset call for."""
    region_feature_size = splits[0].region_feature_size
    if any(regions.region_feature_size != region_feature_size for regions in splits):
        raise ValueError(f"All splits must have features as wide as the first, {region_feature_size}.")
    if args.model_name_or_path is not None:
        model, processor = load_checkpoint(args, region_objective, region_feature_size)
        config = model.config
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.bert_name_or_path)
        processor = InterBERTProcessor(tokenizer, region_feature_size=region_feature_size)
        objective = choose_region_objective(region_objective, splits[0])
        sizes = {"region_feature_size": region_feature_size, "region_objective": objective}
        if objective != "feature":
            sizes["num_region_classes"] = max(regions.num_region_classes(objective) for regions in splits)
        if args.config_name is not None:
            config = InterBERTConfig.from_pretrained(args.config_name, **sizes)
        elif args.bert_name_or_path is not None:
            bert_config = AutoConfig.from_pretrained(args.bert_name_or_path)
            config = InterBERTConfig.from_bert_config(bert_config, layout=args.layout, **sizes)
        else:
            config = InterBERTConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
        if args.config_overrides is not None:
            config.update_from_string(args.config_overrides)
            config.validate()  # setting values checks each of them, but not whether they fit together
        if args.bert_name_or_path is not None:
            model = InterBERTForPreTraining.from_bert(args.bert_name_or_path, config=config, layout=args.layout)
        else:
            model = InterBERTForPreTraining(config)

    if len(processor.tokenizer) > config.vocab_size:
        raise ValueError(
            f"The model's vocabulary must hold the tokenizer's {len(processor.tokenizer)} tokens, got "
            f"{config.vocab_size}."
        )
    if config.region_objective != "feature":
        classes = max(regions.num_region_classes(config.region_objective) for regions in splits)
        if classes > config.num_region_classes:
            raise ValueError(
                f"The model's region head must have the dataset's {classes} classes, got {config.num_region_classes}."
            )
    return model, processor


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
    sums = torch.zeros(3, 3, dtype=torch.float64, device=accelerator.device)  # objective × (loss, correct, scored)
    for batch in DataLoader(own_pairs, batch_size=batch_size, collate_fn=collator):
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.autocast():
            outputs = model(**batch)
        scored = []
        if "labels" in batch:
            scored.append((0, outputs.mlm_loss, outputs.mlm_logits, batch["labels"][batch["labels"] != -100]))
        if "region_targets" in batch:
            targets = batch["region_targets"][batch["region_target_mask"].bool()]
            if model.config.region_objective == "soft_class":
                targets = targets.argmax(dim=-1)
            scored.append((1, outputs.region_loss, outputs.region_logits, targets))
        if "itm_labels" in batch:
            scored.append((2, outputs.itm_loss, outputs.itm_logits, batch["itm_labels"]))
        for row, loss, logits, targets in scored:
            # A feature has no right class: its accuracy stays 0 / 0.
            is_class = targets.dim() == 1
            correct = (logits.argmax(dim=-1) == targets).sum() if is_class else 0
            sums[row] += torch.tensor([loss * len(targets), correct, len(targets)], device=sums.device)
    sums = accelerator.reduce(sums, reduction="sum").tolist()

    results = {}
    for name, (loss, correct, count) in zip(("mlm", "region", "itm"), sums, strict=True):
        if count:
            results[f"eval_{name}_loss"] = loss / count
            if name != "region" or model.config.region_objective != "feature":
                results[f"eval_{name}_accuracy"] = correct / count
    return results


def main():
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ObjectiveArguments, TrainingArguments, OutputArguments),
        description="Pretrain InterBERT on a region dataset.",
    )
    arguments = parser.parse_args_into_dataclasses()
    model_args, data_args, objective_args, training_args, output_args = arguments
    if objective_args.stage_epochs is not None:
        training_args.num_train_epochs = sum(objective_args.stage_epochs)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    accelerator = make_accelerator(training_args, output_args, objective_args.leaves_out_a_head)
    set_seed(training_args.seed)
    if output_args.push_to_hub and accelerator.is_main_process:
        repo_id = create_repository(output_args)

    with accelerator.main_process_first():  # so that one process prepares the dataset, and the others read it
        train_regions, validation_regions = (
            load_region_dataset(data_args.dataset_name, split, name=data_args.dataset_config_name)
            for split in (data_args.train_split, data_args.validation_split)
        )
    model, processor = build_model(model_args, [train_regions, validation_regions], objective_args.region_objective)
    if data_args.max_train_images is not None:
        first = range(min(data_args.max_train_images, len(train_regions)))
        train_regions = RegionDataset(train_regions.dataset.select(first))

    if training_args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    first_objectives = objective_args.of_epoch(0)
    train_pairs = PretrainingPairs(
        train_regions, data_args.caption_column, seed=training_args.seed, objectives=first_objectives
    )
    validation_pairs = PretrainingPairs(
        validation_regions,
        data_args.caption_column,
        seed=training_args.seed,
        objectives=first_objectives,
        fixed_epoch=0,
    )
    collator = PretrainingCollator(
        processor,
        objectives=first_objectives,
        region_objective=model.config.region_objective,
        conditional_masking=objective_args.conditional_masking,
        text_mask_probability=objective_args.text_mask_probability,
        region_mask_probability=objective_args.region_mask_probability,
        max_length=data_args.max_seq_length,
        max_regions=data_args.max_regions,
    )
    # Accelerate tells either sampler the epoch.
    if training_args.group_by_length:
        batch_size = training_args.per_device_train_batch_size
        sampler = LengthGroupedSampler(train_pairs.lengths(), batch_size, seed=training_args.seed)
    else:
        sampler = RandomSampler(train_pairs)
    train_dataloader = DataLoader(
        train_pairs,
        batch_size=training_args.per_device_train_batch_size,
        sampler=sampler,
        collate_fn=collator,
        num_workers=training_args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    retrieved = validation_pairs.usable_images()[: data_args.retrieval_eval_size].tolist()
    weights = {
        "mlm_loss": objective_args.mlm_loss_weight,
        "region_loss": objective_args.region_loss_weight,
        "itm_loss": objective_args.itm_loss_weight,
    }
    accelerator.print(
        f"{model.num_parameters():,} parameters; {len(train_regions):,} images with {len(train_pairs):,} captions to "
        f"train on, {len(validation_pairs):,} captions to evaluate on; {accelerator.num_processes} process(es)."
    )
    accelerator.print(
        f"Left out for lack of captions or regions: {train_pairs.num_skipped_images:,} images for training, "
        f"{validation_pairs.num_skipped_images:,} for evaluation."
    )

    def compute_losses(model, batch):
        outputs = model(**batch)
        losses = {name: outputs[name] for name in weights if outputs.get(name) is not None}
        return {"loss": sum(weights[name] * loss for name, loss in losses.items())} | losses

    def begin_epoch(epoch):
        objectives = objective_args.of_epoch(epoch)
        for part in (train_pairs, validation_pairs, collator):
            part.set_objectives(objectives)
        train_pairs.set_epoch(epoch)

    def end_epoch(epoch, model, is_last):
        results = evaluate_objectives(
            accelerator, model, validation_pairs, collator, training_args.per_device_eval_batch_size
        )
        if retrieved and (is_last or data_args.retrieval_eval_every_epoch):
            scores = score_captions_against_images(
                accelerator,
                model,
                processor,
                [validation_regions.captions(i, data_args.caption_column)[0] for i in retrieved],
                [validation_regions[i] for i in retrieved],
                max_length=data_args.max_seq_length,
                max_regions=data_args.max_regions,
            )
            results |= {f"eval_{name}": value for name, value in recall_at_k(scores).items()}
        accelerator.print("\n" + format_table([{"epoch": epoch + 1} | results]))
        return results

    if output_args.with_tracking:
        accelerator.init_trackers("interbert_pretraining", config=flat_config(*arguments))
    results = train(
        accelerator,
        model,
        train_dataloader,
        training_args,
        output_args,
        compute_losses,
        begin_epoch,
        end_epoch,
        save=lambda model, folder: write_model(model, processor, folder),
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_final_model(accelerator.unwrap_model(model), processor, output_args.output_dir)
        PretrainedCard(
            repo_id=repo_id if output_args.push_to_hub else output_args.output_dir,
            config=model.config,
            num_parameters=model.num_parameters(),
            dataset_name=data_args.dataset_name,
            training_arguments=flat_config(data_args, objective_args, training_args),
            results=results,
            initialized_from=model_args.model_name_or_path or model_args.bert_name_or_path,
        ).render().save(Path(output_args.output_dir) / "README.md")
        print(
            f"\nThe model is in {output_args.output_dir}:\n\n    "
            f'AutoModelForPreTraining.from_pretrained("{output_args.output_dir}", trust_remote_code=True)\n'
        )
        if output_args.push_to_hub:
            print(f"Uploaded: {push_folder(output_args, repo_id)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
