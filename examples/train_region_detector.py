#!/usr/bin/env python
"""
Trains a region detector, the Faster R-CNN of bottom-up attention, on pictures with boxes and classes, and evaluates it.

A small one from scratch on generated scenes, on a CPU:

    python examples/generate_scenes.py outputs/tiny_scenes --num_train 200 --num_validation 50 --num_test 50
    accelerate launch --cpu --num_processes 1 examples/train_region_detector.py --do_train --do_eval \\
        --dataset_name outputs/tiny_scenes --per_device_train_batch_size 8 --learning_rate 2e-3 \\
        --output_dir outputs/tiny_detector

The same for nine minutes of one core: of the test split it finds 99.5 % of the objects, 97.5 % of them with the right
class. Then what it finds as a region dataset:

    python examples/generate_scenes.py outputs/scenes --num_train 12000 --num_validation 200 --num_test 200
    accelerate launch --cpu --num_processes 1 examples/train_region_detector.py --do_train --do_eval \\
        --dataset_name outputs/scenes --max_train_steps 1100 --per_device_train_batch_size 8 --learning_rate 2e-3 \\
        --num_warmup_steps 50 --output_dir outputs/scene_detector
    python examples/train_region_detector.py --do_eval --model_name_or_path outputs/scene_detector \\
        --dataset_name outputs/scenes --validation_split test --output_dir outputs/scene_detector_on_test
    python examples/extract_regions.py outputs/scenes outputs/detected_scenes --detector outputs/scene_detector \\
        --split train

A detector of objects in photographs, finetuned for 33 classes of products on several GPUs:

    accelerate launch --multi_gpu --mixed_precision bf16 examples/train_region_detector.py --do_train --do_eval \\
        --model_name_or_path org/bottom-up-attention --config_overrides num_classes=33 --dataset_name org/products \\
        --group_by_length --per_device_train_batch_size 4 --num_train_epochs 12 --output_dir product-detector

Written to the output folder: the detector with its image processor, and `eval_results.json`: the share of true boxes
that are found (a region overlaps them by an intersection over union of 0.5), the share of these whose class is right,
and the share of regions that are on a true box. Losses are those of Ren et al. 2015; attributes are not learned.
"""

from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed

from arguments import parse_arguments, to_recipe
from data_loading import Batch, check_held_out
from files import write_text
from finetuning import TaskArguments, evaluate_alone, make_loader, measure_at_end_of_epochs, predict
from processing import FasterRCNNConfig, FasterRCNNForRegionFeatures, FasterRCNNImageProcessor
from processing.region_operators import box_iou
from publishing import upload_model
from training import (
    OutputArguments,
    TrainingArguments,
    TrainingRun,
    flat_config,
    make_accelerator,
    set_up_logging,
)

logger = get_logger(__name__)
# A new detector, unless `--config_overrides` says otherwise: a narrow ResNet-50 for simple pictures on a CPU.
SMALL = {
    "depth": 50,
    "stem_channels": 16,
    "res2_channels": 32,
    "width_per_group": 8,
    "stride_in_1x1": False,
    "caffe_max_pool": False,
    "res5_halves": True,
    "rpn_channels": 64,
    "anchor_aspect_ratios": (1.0,),
    "anchor_offset": 0.5,
    "pre_nms_top_k": 200,
    "post_nms_top_k": 32,
    "num_sampled_proposals": 32,
    "pooler_size": 4,
    "num_attributes": 0,
    "class_agnostic_boxes": True,
    "min_regions": 3,
    "max_regions": 10,
    "min_score": 0.2,
}
# A true box is found by a region that overlaps it so much.
FOUND_IOU = 0.5


@dataclass
class PictureArguments:
    """Which pictures there are, with their boxes."""

    dataset_name: str = field(
        metadata={
            "help": "Pictures with boxes: a local folder or a Hub name of a dataset with the columns `image_id`, "
            "`width`, `height`, `boxes` (x1, y1, x2, y2 in pixels) and `class_ids` (from 0, without background)."
        }
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(
        default="train", metadata={"help": "Split to train on; train+validation and train[:10%%] work, too."}
    )
    validation_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    image_column: str = field(default="image", metadata={"help": "Column of pictures."})


@dataclass
class DetectorArguments:
    """Which detector is trained, and what it starts from."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Detector to go on from, with its image processor. By default a new, small one."},
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of `--model_name_or_path` on the Hub."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Values of the configuration, such as res2_channels=64,max_regions=36. Weights of a checkpoint "
            "that have another shape then are new."
        },
    )
    anchor_sizes: list[float] | None = field(
        default=None,
        metadata={"help": "Square roots of the anchors' areas, in pixels of the resized picture, of a new detector."},
    )
    shortest_edge: int | None = field(
        default=None,
        metadata={"help": "Pixels of the shorter side of a resized picture. By default 256, or as it was."},
    )
    longest_edge: int | None = field(
        default=None, metadata={"help": "Pixels of the longer side, at most. By default 427, or as it was."}
    )

    def __post_init__(self):
        if self.model_name_or_path is not None and self.anchor_sizes is not None:
            raise ValueError("`--anchor_sizes` is for a new detector: that of `--model_name_or_path` has its own.")


# ---------------------------------------------------------------- pictures


class LabelledPictures(torch.utils.data.Dataset):
    """
    Pictures with what is true of them: `image_id`, `image` (PIL, RGB) and `labels` as the detector takes them.

    Args:
        dataset: One split.
        image_column: That of the pictures.

    Attributes:
        labels: What is true of each picture: `boxes` float32 `(n, 4)` in its pixels, `class_ids` int64 `(n,)`.
        num_classes: That there are.

    Raises:
        ValueError: a column is missing or of another type, there is no picture or no box, or a box is not within its
            picture or has no class; the message names the image.
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str):
        columns = ["image_id", "width", "height", "boxes", "class_ids", image_column]
        missing = [name for name in columns if name not in dataset.column_names]
        if missing:
            raise ValueError(f"The dataset needs the columns {missing}, got {dataset.column_names}.")
        if not isinstance(dataset.features[image_column], datasets.Image):
            raise ValueError(f"Column {image_column!r} must hold pictures, got {dataset.features[image_column]}.")
        if len(dataset) == 0:
            raise ValueError("The dataset must have at least one picture, got none.")
        self.dataset = dataset.select_columns(columns)
        self.image_column = image_column
        self.image_ids = list(dataset["image_id"])
        without_pictures = self.dataset.remove_columns(image_column).with_format("numpy")
        self.labels = [self._read_labels(row) for row in without_pictures]
        self.num_classes = max(
            (int(labels["class_ids"].max()) + 1 for labels in self.labels if len(labels["boxes"])), default=0
        )
        if self.num_classes == 0:
            raise ValueError("Column 'boxes' must have boxes, got none.")

    def _read_labels(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        boxes = np.array(list(row["boxes"]), dtype=np.float32).reshape(-1, 4)
        class_ids = np.array(row["class_ids"], dtype=np.int64)
        if len(class_ids) != len(boxes) or (class_ids < 0).any():
            raise ValueError(
                f"image_id {row['image_id']}: expected a class for each of {len(boxes)} boxes, got {class_ids}."
            )
        limits = np.array([row["width"], row["height"]] * 2)
        is_inside = ((boxes >= -1) & (boxes <= limits + 1)).all(axis=1)
        is_right = is_inside & (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
        if not is_right.all():
            raise ValueError(
                f"image_id {row['image_id']}: expected boxes (x1, y1, x2, y2) with x1 < x2 and y1 < y2, within the "
                f"picture of {limits[0]} x {limits[1]} pixels, got {boxes[np.argmin(is_right)].tolist()}."
            )
        return {"boxes": torch.tensor(boxes), "class_ids": torch.tensor(class_ids)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        values = self.dataset[row]
        picture = values[self.image_column]
        expected = (values["width"], values["height"])
        if picture is None or picture.size != expected:
            got = "none" if picture is None else f"one of {picture.width} x {picture.height}"
            raise ValueError(
                f"image_id {values['image_id']}: expected a picture of {expected[0]} x {expected[1]} pixels, which the "
                f"boxes are in, got {got}."
            )
        return {"image_id": values["image_id"], "image": picture.convert("RGB"), "labels": self.labels[row]}

    def shapes(self) -> np.ndarray:
        """Integers `(pictures,)` by which those of similar shape are put together: widths in percent of heights."""
        widths, heights = (np.array(self.dataset[name]) for name in ("width", "height"))
        return np.round(100 * widths / heights).astype(np.int64)


@dataclass
class PictureCollator:
    """
    Args:
        image_processor: That of the detector.
        with_labels: Whether losses are to be computed, or regions are to be found.
    """

    image_processor: FasterRCNNImageProcessor
    with_labels: bool

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = dict(self.image_processor([sample["image"] for sample in samples], return_tensors="pt"))
        return inputs | ({"labels": [sample["labels"] for sample in samples]} if self.with_labels else {})


def load_pictures(args: PictureArguments, split: str, max_samples: int | None) -> LabelledPictures:
    dataset = datasets.load_dataset(args.dataset_name, name=args.dataset_config_name, split=split)
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    return LabelledPictures(dataset, args.image_column)


# ---------------------------------------------------------------- the detector


def build_detector(
    args: DetectorArguments, num_classes: int
) -> tuple[FasterRCNNForRegionFeatures, FasterRCNNImageProcessor]:
    """
    A new detector, or that of the checkpoint, and its image processor.

    Args:
        num_classes: Of the dataset.

    Raises:
        ValueError: the detector has fewer classes than the dataset.
    """
    edges = {name: getattr(args, name) for name in ("shortest_edge", "longest_edge") if getattr(args, name) is not None}
    if args.model_name_or_path is None:
        sizes = {"anchor_sizes": args.anchor_sizes or [32.0, 64.0]}
        config = FasterRCNNConfig(**SMALL, **sizes, num_classes=num_classes)
        image_processor = FasterRCNNImageProcessor(**({"shortest_edge": 256, "longest_edge": 427} | edges))
    else:
        source = {"pretrained_model_name_or_path": args.model_name_or_path, "revision": args.model_revision}
        config = FasterRCNNConfig.from_pretrained(**source)
        image_processor = FasterRCNNImageProcessor.from_pretrained(**source, **edges)
    if args.config_overrides is not None:
        config.update_from_string(args.config_overrides)
        config.validate()  # setting values checks each of them, but not whether they fit together
        if args.model_name_or_path is not None and "num_classes" in args.config_overrides:
            config.num_attributes = 0  # they are predicted from the classes, and nothing is learned of them here
    if config.num_classes < num_classes:
        raise ValueError(
            f"The detector must have the dataset's {num_classes} classes, got {config.num_classes}: see "
            "`--config_overrides num_classes=...`."
        )
    if args.model_name_or_path is None:
        return FasterRCNNForRegionFeatures(config), image_processor
    detector, info = FasterRCNNForRegionFeatures.from_pretrained(
        **source, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
    )
    new = sorted({name for name, *_ in info["mismatched_keys"]} | set(info["missing_keys"]))
    if new:
        logger.warning(f"These weights are new, and not those of the checkpoint: {', '.join(new)}.")
    return detector, image_processor


# ---------------------------------------------------------------- evaluation


def read_regions(inputs: dict[str, torch.Tensor], outputs) -> list[dict[str, torch.Tensor]]:
    """Boxes and classes of the regions of each picture."""
    return [{name: record[name].cpu() for name in ("boxes", "class_ids")} for record in outputs.regions]


def measure_regions(found: list[dict[str, torch.Tensor]], labels: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """
    Args:
        found: Of each picture `boxes` float32 `(n, 4)` in pixels and `class_ids` int64 `(n,)`.
        labels: What is true of each, likewise.

    Returns:
        - `eval_recall`: share of true boxes that a region overlaps by an intersection over union of at least 0.5.
        - `eval_class_accuracy`: of those, the share for which the region that overlaps most has the right class.
        - `eval_precision`: share of regions that so overlap a true box.
        - `eval_regions_per_image`: how many regions a picture has, in the mean.
    """
    num_true = num_found = num_right = num_regions = num_precise = 0
    for regions, truth in zip(found, labels, strict=True):
        num_true, num_regions = num_true + len(truth["boxes"]), num_regions + len(regions["boxes"])
        if len(truth["boxes"]) == 0 or len(regions["boxes"]) == 0:
            continue
        overlaps = box_iou(truth["boxes"], regions["boxes"]).nan_to_num()  # (true boxes, regions)
        best, numbers = overlaps.max(dim=1)
        is_found = best >= FOUND_IOU
        num_found += int(is_found.sum())
        num_right += int((regions["class_ids"][numbers] == truth["class_ids"])[is_found].sum())
        num_precise += int((overlaps.amax(dim=0) >= FOUND_IOU).sum())
    return {
        "eval_recall": num_found / max(num_true, 1),
        "eval_class_accuracy": num_right / max(num_found, 1),
        "eval_precision": num_precise / max(num_regions, 1),
        "eval_regions_per_image": num_regions / len(labels),
    }


# ---------------------------------------------------------------- what becomes of it

CARD = """---
library_name: transformers
pipeline_tag: object-detection
tags:
- interbert
- custom_code
---

# A region detector

A Faster R-CNN on a ResNet-C4 (the detector of bottom-up attention, Anderson et al. 2018) with {num_parameters:,}
parameters and {num_classes:,} classes, trained on `{dataset_name}` by `examples/train_region_detector.py`;
`recipe.yaml` holds its arguments. It turns pictures into region datasets:

    python examples/extract_regions.py photographs my_regions --detector {name}

{results}
"""


def identify(sample: dict[str, Any]) -> str:
    return sample["image_id"]


def publish_detector(run: TrainingRun, args: PictureArguments):
    """Writes the trained detector with its card, and uploads it if that was asked for. All processes call this."""
    run.write_final_model()
    detector = run.trained_model()
    if not run.accelerator.is_main_process:
        return
    output_args = run.output_args
    measured = {name: value for name, value in run.results[-1].items() if name.startswith("eval_")}
    results = [f"- {name.removeprefix('eval_')}: {value:.4f}" for name, value in measured.items()]
    if results:
        results = [f"Measured on the split `{args.validation_split}` (`eval_results.json`):\n", *results]
    card = CARD.format(
        num_parameters=detector.num_parameters(),
        num_classes=detector.config.num_classes,
        dataset_name=args.dataset_name,
        name=run.repo_id or output_args.output_dir,
        results="\n".join(results or ["It was not evaluated while it was trained."]),
    )
    write_text(run.output_dir / "README.md", card)
    print(f"\nThe detector is in {output_args.output_dir}: examples/extract_regions.py takes it as --detector.")
    upload_model(run)


def main():
    arguments = parse_arguments(
        (TaskArguments, DetectorArguments, PictureArguments, TrainingArguments, OutputArguments),
        description="Train and evaluate a region detector.",
    )
    task_args, detector_args, args, training_args, output_args = arguments
    if task_args.do_predict:
        raise ValueError("`--do_predict`: examples/extract_regions.py writes the regions of pictures.")
    if task_args.do_train:
        output_args.check_output_dir()
        output_args.check_model_card("FasterRCNNForRegionFeatures")
        output_args.check_widget(False)
    elif detector_args.model_name_or_path is None:
        raise ValueError(
            "Without `--do_train` there must be a trained detector: expected `--model_name_or_path`, got none."
        )
    set_up_logging()
    accelerator = make_accelerator(training_args, output_args)
    set_seed(training_args.seed)

    splits = {}
    with accelerator.local_main_process_first():  # so that one process prepares the dataset, and the others read it
        if task_args.do_train:
            splits["train"] = load_pictures(args, args.train_split, task_args.max_train_samples)
        if task_args.do_eval:
            splits["validation"] = load_pictures(args, args.validation_split, task_args.max_eval_samples)
    if len(splits) == 2:
        check_held_out(splits["train"].image_ids, splits["validation"].image_ids, "pictures")
    detector, image_processor = build_detector(detector_args, max(pictures.num_classes for pictures in splits.values()))
    if detector.roi_heads.box_predictor.has_attributes:
        # Nothing is learned of attributes: what predicts them has no gradients.
        predictor = detector.roi_heads.box_predictor
        for module in (predictor.cls_embedding, predictor.fc_attr, predictor.attr_score):
            module.requires_grad_(False)
    counts = ", ".join(f"{len(pictures):,} pictures for {split}" for split, pictures in splits.items())
    accelerator.print(
        f"{detector.num_parameters():,} parameters; {counts}; {detector.config.num_classes:,} classes; "
        f"{accelerator.num_processes} process(es)."
    )

    def compute_losses(model, inputs):
        outputs = model(**inputs)
        parts = {name: value for name, value in outputs.items() if name.endswith("_loss")}
        return outputs.loss, {name: (loss.detach(), 1) for name, loss in parts.items()}

    def evaluate(model):
        pictures = splits["validation"]
        collator = PictureCollator(image_processor, with_labels=False)
        found = predict(accelerator, model, pictures, collator, pictures.shapes(), read_regions, training_args)
        return measure_regions(found, pictures.labels)

    if task_args.do_train:
        pictures = splits["train"]
        collate = Batch(PictureCollator(image_processor, with_labels=True), identify)
        run = TrainingRun(
            accelerator,
            detector,
            image_processor,
            make_loader(accelerator, pictures, collate, pictures.shapes(), training_args),
            training_args,
            output_args,
            compute_losses,
            begin_epoch=lambda epoch: None,
            end_epoch=measure_at_end_of_epochs(task_args, evaluate),
            settings=flat_config(*arguments),
            recipe=to_recipe(*arguments[:-1]),
            fixed_arguments=("train_split",),
        )
        run.train()
        publish_detector(run, args)
    else:
        evaluate_alone(accelerator, detector.to(accelerator.device), evaluate, arguments)
    accelerator.end_training()


if __name__ == "__main__":
    main()
