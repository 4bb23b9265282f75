"""
From pictures to region records: by the bottom-up-attention detector, by any other detector with the features of any
backbone, or in windows where there is no detector.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import is_pil_image, load_image

from .image_processing_faster_rcnn import FasterRCNNImageProcessor
from .modeling_faster_rcnn import FasterRCNNForRegionFeatures
from .region_operators import roi_align

# Bins of each side that a region is aligned to, before their mean is its feature.
ALIGNED_SIZE = 7
LIMITS = ("min_regions", "max_regions", "min_score")
DOWNLOAD_TIMEOUT = 30.0  # seconds, of a picture by its URL


class RegionExtractor(ABC):
    """
    Finds the regions of pictures. `extractor(pictures)` gives one record for each, as a region dataset has it, without
    `image_id`: `width`, `height`, `boxes` float32 `(n, 4)` in pixels, `features` float16 `(n, region_feature_size)`,
    and where there are classes `class_ids` int32 and `class_scores` float32 `(n,)`, the highest score first.

    Attributes:
        limits: Those that apply, see [`limited`]; none of windows.
    """

    limits: dict[str, Any]

    @property
    @abstractmethod
    def region_feature_size(self) -> int:
        """Width of the features."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the regions are found."""

    @abstractmethod
    def limited(self, **limits) -> RegionExtractor:
        """
        The same extractor, with the same weights, and other limits.

        Args:
            limits: `min_regions`, `max_regions` and `min_score`, as far as they change: so many of the best regions are
                kept; of those up to `min_score`, only as many as `min_regions` calls for. A `max_regions` alone lowers
                `min_regions` to it.

        Raises:
            ValueError: there is no such limit, or they contradict each other.
        """

    @abstractmethod
    def extract(self, pictures: Sequence[Any]) -> list[Mapping[str, Any]]:
        """The records of PIL's pictures in RGB; values may be tensors on any device."""

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Any]) -> list[dict[str, Any]]:
        """
        Args:
            pictures: At least one of PIL's.
        """
        return [_to_arrays(record) for record in self.extract([picture.convert("RGB") for picture in pictures])]


def read_pictures(images: Sequence[Any]) -> list[Any]:
    """
    Args:
        images: PIL's pictures, paths, URLs, base64, or arrays of red, green and blue from 0 to 255, `(height, width,
            3)` or `(3, height, width)`.

    Returns:
        PIL's pictures in RGB, turned as their EXIF orientation says.

    Raises:
        ValueError: one cannot be read. The message says which.
    """
    return [_read_picture(index, image) for index, image in enumerate(images)]


def _read_picture(index: int, image: Any) -> Any:
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    try:
        if isinstance(image, str) or is_pil_image(image):
            picture = load_image(image, timeout=DOWNLOAD_TIMEOUT)
            picture.info.pop("exif", None)  # done with; where it is damaged, it would fail the detector's processor
            return picture
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
        return to_pil_image(image).convert("RGB")
    except Exception as error:  # those of the network, of PIL and of arrays have nothing in common
        given = f"{image!r:.80}" if isinstance(image, str) else f"{type(image).__name__} ({error})"
        raise ValueError(f"images[{index}]: expected a picture, its path, URL or base64, got {given}.") from error


DTYPES = {
    "boxes": np.float32,
    "features": np.float16,
    "class_ids": np.int32,
    "class_scores": np.float32,
    "class_probs": np.float16,
    "attribute_ids": np.int32,
    "attribute_scores": np.float32,
}


def _to_arrays(record: Mapping[str, Any]) -> dict[str, Any]:
    arrays = {"width": int(record["width"]), "height": int(record["height"])}
    return arrays | {
        name: record[name].detach().float().cpu().numpy().astype(dtype)
        for name, dtype in DTYPES.items()
        if name in record
    }


def _change_limits(limits: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(changes.keys() - set(LIMITS))
    if unknown:
        raise ValueError(f"A detector has the limits {', '.join(LIMITS)}, got {unknown[0]}.")
    changed = {**limits, **changes}
    if "min_regions" not in changes:
        changed["min_regions"] = min(changed["min_regions"], changed["max_regions"])
    if not 0 <= changed["min_regions"] <= changed["max_regions"] or changed["max_regions"] < 1:
        raise ValueError(
            f"Expected 0 <= `min_regions` <= `max_regions`, got {changed['min_regions']} and {changed['max_regions']}."
        )
    return changed


class BottomUpExtractor(RegionExtractor):
    """
    The regions of the bottom-up-attention Faster R-CNN.

    Args:
        detector: In evaluation mode.
        image_processor: That of the detector.
        class_probs: Whether records have the probabilities of all classes, which `region_objective="soft_class"` needs.
        limits: Other than those of the detector's configuration, see [`RegionExtractor.limited`]: 10 to 36 or 36 for
            pretraining, 10 to 100 above 0.2 for VQA (Anderson et al. 2018), at most 16 above 0.1 for products
            (InterBERT, appendix).
    """

    def __init__(
        self,
        detector: FasterRCNNForRegionFeatures,
        image_processor: BaseImageProcessor,
        class_probs: bool = False,
        **limits,
    ):
        self.detector = detector
        self.image_processor = image_processor
        self.class_probs = class_probs
        self.limits = _change_limits({name: getattr(detector.config, name) for name in LIMITS}, limits)

    def limited(self, **limits) -> BottomUpExtractor:
        return BottomUpExtractor(
            self.detector, self.image_processor, self.class_probs, **_change_limits(self.limits, limits)
        )

    @property
    def region_feature_size(self) -> int:
        return self.detector.config.region_feature_size

    @property
    def device(self) -> torch.device:
        return self.detector.device

    def extract(self, pictures: Sequence[Any]) -> list[Mapping[str, Any]]:
        inputs = self.image_processor(list(pictures), return_tensors="pt").to(self.detector.device)
        return self.detector(**inputs, output_class_probs=self.class_probs, **self.limits).regions


class BackboneFeatures:
    """
    Features of boxes on the last map of a backbone.

    Args:
        backbone: As [`AutoBackbone`] loads it, in evaluation mode.
        image_processor: That of the backbone. Pictures are resized for it as a whole, and it cuts nothing off.
    """

    def __init__(self, backbone: PreTrainedModel, image_processor: BaseImageProcessor):
        self.backbone = backbone
        self.image_processor = image_processor

    @property
    def size(self) -> int:
        return self.backbone.channels[-1]

    def of_boxes(self, pictures: Sequence[Any], boxes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            boxes: Of each picture `(n, 4)`, in its pixels.

        Returns:
            Of each picture `(n, size)`.
        """
        device = self.backbone.device
        boxes = [image_boxes.to(device, torch.float32) for image_boxes in boxes]
        # A square for every picture, so that all of a batch are of one size; boxes follow.
        side = _side(self.image_processor.size)
        # Not by the image processor: ConvNeXt's resizes by the shortest edge alone, and then cuts a part off.
        squares = [picture.resize((side, side), self.image_processor.resample) for picture in pictures]
        inputs = self.image_processor(squares, do_resize=False, do_center_crop=False, return_tensors="pt")
        feature_map = self.backbone(inputs["pixel_values"].to(device, self.backbone.dtype)).feature_maps[-1].float()
        height, width = feature_map.shape[-2:]
        on_map = [
            image_boxes * image_boxes.new_tensor([width / picture.width, height / picture.height] * 2)
            for picture, image_boxes in zip(pictures, boxes, strict=True)
        ]
        counts = [len(image_boxes) for image_boxes in boxes]
        image_indices = torch.arange(len(boxes), device=device).repeat_interleave(torch.tensor(counts, device=device))
        aligned = roi_align(feature_map, torch.cat(on_map), image_indices, ALIGNED_SIZE, spatial_scale=1.0)
        return list(aligned.mean(dim=(2, 3)).split(counts))


def _side(size: Mapping[str, int]) -> int:
    """Of the square that stands for the size of an image processor, in pixels."""
    names = [name for name in ("shortest_edge", "height", "longest_edge") if size.get(name)]
    if not names:
        raise ValueError(f"The backbone's image processor must have a size in pixels, got {dict(size)}.")
    return size[names[0]]


class DetectorExtractor(RegionExtractor):
    """
    The boxes of any detector of Transformers, with the features of any backbone.

    Args:
        detector: As [`AutoModelForObjectDetection`] loads it, in evaluation mode.
        detector_processor: Its image processor.
        features: Of the boxes.
        limits: See [`RegionExtractor.limited`]; by default 10 to 36 regions above 0.2.
    """

    def __init__(
        self,
        detector: PreTrainedModel,
        detector_processor: BaseImageProcessor,
        features: BackboneFeatures,
        **limits,
    ):
        self.detector = detector
        self.detector_processor = detector_processor
        self.features = features
        self.limits = _change_limits({"min_regions": 10, "max_regions": 36, "min_score": 0.2}, limits)

    def limited(self, **limits) -> DetectorExtractor:
        limits = _change_limits(self.limits, limits)
        return DetectorExtractor(self.detector, self.detector_processor, self.features, **limits)

    @property
    def region_feature_size(self) -> int:
        return self.features.size

    @property
    def device(self) -> torch.device:
        return self.detector.device

    def extract(self, pictures: Sequence[Any]) -> list[Mapping[str, Any]]:
        inputs = self.detector_processor(list(pictures), return_tensors="pt").to(self.detector.device)
        sizes = [(picture.height, picture.width) for picture in pictures]
        detections = self.detector_processor.post_process_object_detection(
            self.detector(**inputs), threshold=-1.0, target_sizes=sizes
        )
        records = [self._select(detection, picture) for detection, picture in zip(detections, pictures, strict=True)]
        features = self.features.of_boxes(pictures, [record["boxes"] for record in records])
        return [record | {"features": own} for record, own in zip(records, features, strict=True)]

    def _select(self, detection: Mapping[str, torch.Tensor], picture: Any) -> dict[str, Any]:
        order = detection["scores"].argsort(descending=True, stable=True)
        # Detectors that score each class by itself give a box once for every one of its best classes.
        _, box_numbers = detection["boxes"][order].unique(dim=0, return_inverse=True)
        firsts: dict[int, int] = {}
        for position, number in enumerate(box_numbers.tolist()):
            firsts.setdefault(number, position)
        order = order[list(firsts.values())][: self.limits["max_regions"]]
        num_above = int((detection["scores"][order] > self.limits["min_score"]).sum())
        order = order[: max(num_above, min(self.limits["min_regions"], len(order)))]
        limits = detection["boxes"].new_tensor([picture.width, picture.height] * 2)
        return {
            "width": picture.width,
            "height": picture.height,
            "boxes": detection["boxes"][order].clamp(min=0).minimum(limits),
            "class_ids": detection["labels"][order],
            "class_scores": detection["scores"][order],
        }


class WindowExtractor(RegionExtractor):
    """
    Windows in place of objects: grids of equal cells over the picture, with the features of any backbone. They have no
    classes, and pretraining predicts their features (`--region_objective feature`).

    Args:
        features: Of the windows.
        grids: Numbers of cells of each side; (1, 2, 4) gives the whole picture, its quarters, and 16 cells.
    """

    def __init__(self, features: BackboneFeatures, grids: Sequence[int] = (2, 4)):
        if len(grids) == 0 or min(grids) < 1:
            raise ValueError(f"`grids` must be numbers of at least 1, at least one of them, got {list(grids)}.")
        self.features = features
        self.grids = tuple(grids)
        self.limits = {}

    def limited(self, **limits) -> WindowExtractor:
        if limits:
            raise ValueError(f"`{next(iter(limits))}`: windows are as many as `grids` says, got {limits}.")
        return self

    @property
    def region_feature_size(self) -> int:
        return self.features.size

    @property
    def device(self) -> torch.device:
        return self.features.backbone.device

    def extract(self, pictures: Sequence[Any]) -> list[Mapping[str, Any]]:
        shares = torch.tensor(
            [
                [column / count, row / count, (column + 1) / count, (row + 1) / count]
                for count in self.grids
                for row in range(count)
                for column in range(count)
            ]
        )
        boxes = [shares * torch.tensor([picture.width, picture.height] * 2) for picture in pictures]
        features = self.features.of_boxes(pictures, boxes)
        return [
            {"width": picture.width, "height": picture.height, "boxes": own_boxes, "features": own_features}
            for picture, own_boxes, own_features in zip(pictures, boxes, features, strict=True)
        ]


def detector_settings(region_detector: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """
    What a configuration says of a detector, as the arguments of [`load_region_extractor`].

    Raises:
        ValueError: no detector is named.
    """
    if isinstance(region_detector, (str, os.PathLike)):
        return {"name_or_path": os.fspath(region_detector)}
    if not isinstance(region_detector, Mapping) or "name_or_path" not in region_detector:
        raise ValueError(f"`region_detector`: expected a name, or a dict with a `name_or_path`, got {region_detector}.")
    return dict(region_detector)


def load_region_extractor(
    name_or_path: str,
    revision: str = "main",
    backbone: str | None = None,
    backbone_revision: str = "main",
    grids: Sequence[int] | None = None,
    class_probs: bool = False,
    device: str | torch.device = "cpu",
    **limits,
) -> RegionExtractor:
    """
    Args:
        name_or_path: A Faster R-CNN as [`FasterRCNNForRegionFeatures`] saves it, or a folder with the published
            checkpoint; any detector of Transformers; or `"windows"`. No code of its repository is run.
        revision: Branch, tag or commit of the detector on the Hub.
        backbone: Checkpoint whose features regions get; for all but a Faster R-CNN. No code of its repository is run.
        backbone_revision: Branch, tag or commit of the backbone on the Hub.
        grids: Of [`WindowExtractor`].
        class_probs: See [`BottomUpExtractor`].
        limits: See [`RegionExtractor.limited`].

    Raises:
        ValueError: an argument is missing, does not go with this kind of detector, or is no detector or backbone.
        OSError: there is no such checkpoint.
    """
    is_windows = name_or_path == "windows"
    if grids is not None and not is_windows:
        raise ValueError(f"`grids`: expected none, as {name_or_path} finds regions itself, got {list(grids)}.")
    folder = Path(name_or_path)
    is_original = (folder / "pytorch_model.bin").is_file() and not (folder / "preprocessor_config.json").is_file()
    model_type = None
    if not is_original and not is_windows:
        model_type = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)[0].get("model_type")
    if is_original or model_type == "faster_rcnn":
        if backbone is not None:
            raise ValueError(f"`backbone`: expected none, as {name_or_path} gives features itself, got {backbone}.")
        loaded = "from_original" if is_original else "from_pretrained"
        options = {} if is_original else {"revision": revision}
        detector = getattr(FasterRCNNForRegionFeatures, loaded)(name_or_path, **options).eval().to(device)
        image_processor = getattr(FasterRCNNImageProcessor, loaded)(name_or_path, **options)
        return BottomUpExtractor(detector, image_processor, class_probs, **limits)
    if class_probs:
        raise ValueError(f"`class_probs`: only a Faster R-CNN gives them, got {name_or_path}.")
    if backbone is None:
        raise ValueError(f"`backbone`: expected a checkpoint for the features of {name_or_path}, got none.")
    features = _load_backbone(backbone, backbone_revision, device)
    if is_windows:
        extractor = WindowExtractor(features) if grids is None else WindowExtractor(features, grids)
        return extractor.limited(**limits)
    options = {"revision": revision, "trust_remote_code": False}
    detector = AutoModelForObjectDetection.from_pretrained(name_or_path, **options).eval().to(device)
    return DetectorExtractor(detector, AutoImageProcessor.from_pretrained(name_or_path, **options), features, **limits)


def _load_backbone(name_or_path: str, revision: str, device: str | torch.device) -> BackboneFeatures:
    options = {"revision": revision, "trust_remote_code": False}
    config_class = type(AutoConfig.from_pretrained(name_or_path, **options))
    if config_class not in MODEL_FOR_BACKBONE_MAPPING:
        raise ValueError(f"`backbone`: expected one of Transformers' backbones, got a {config_class.__name__}.")
    # AutoBackbone takes no folders.
    backbone = MODEL_FOR_BACKBONE_MAPPING[config_class].from_pretrained(name_or_path, revision=revision)
    return BackboneFeatures(backbone.eval().to(device), AutoImageProcessor.from_pretrained(name_or_path, **options))
