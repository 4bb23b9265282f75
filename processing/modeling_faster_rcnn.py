"""
The bottom-up-attention Faster R-CNN (Anderson et al. 2018, arXiv 1707.07998) in plain PyTorch: from pictures to the
regions that InterBERT reads.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from yaml import safe_load

from .configuration_faster_rcnn import FasterRCNNConfig
from .losses_faster_rcnn import (
    IGNORED,
    attribute_loss,
    box_loss,
    class_loss,
    match_boxes,
    objectness_loss,
    proposal_box_loss,
    read_labels,
    sample_matches,
)
from .region_operators import non_maximum_suppression, roi_pool

STRIDE = 16  # of the map that regions are proposed and pooled on, in pixels
# Deltas of width and height are clamped, so that their exponential stays finite: at most 1000 / 16 times as large.
MAX_LOG_SCALE = math.log(1000 / 16)
# Regions that are pooled and go through the fourth stage at a time: at full size 200 MB of pooled cells.
REGIONS_AT_A_TIME = 256
# What is learned of each image: at most so many anchors, of which at most this share are on objects; and the share of
# the configuration's `num_sampled_proposals` that are (Ren et al. 2015; Girshick 2015).
NUM_SAMPLED_ANCHORS = 256
FOREGROUND_ANCHORS = 0.5
FOREGROUND_PROPOSALS = 0.25


@dataclass
class FasterRCNNOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            The sum of the losses below, with `labels`.
        regions (`list[dict[str, Any]]`, *optional*):
            Without `labels` one record for each image, as [`InterBERTProcessor`] takes it, the highest score first;
            values are tensors on the model's device:

            - `features`: float of shape `(regions, region_feature_size)`.
            - `boxes`: float32 of shape `(regions, 4)`, x1, y1, x2, y2 in pixels of the original image.
            - `width`, `height` (`int`): of the original image.
            - `class_ids`: int64 of shape `(regions,)`, counted without background.
            - `class_scores`: float32 of shape `(regions,)`.
            - `attribute_ids`, `attribute_scores`: likewise, where the model has attributes.
            - `class_probs`, if asked for: float32 of shape `(regions, num_classes + 1)`, the background at 0.
        feature_map (`torch.FloatTensor` of shape `(images, channels, height / 16, width / 16)`, *optional*):
            What regions are proposed and pooled on, with `output_feature_map=True`.
        proposals (`list[torch.FloatTensor]`, *optional*):
            Of each image `(proposals, 4)` in pixels of the resized image, with `output_proposals=True`, best first.
        proposal_logits (`list[torch.FloatTensor]`, *optional*):
            Of each image `(proposals,)`, with `output_proposals=True`.
        objectness_loss, proposal_box_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Of the region proposal network: whether anchors hold an object, and where it is.
        class_loss, box_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Of regions: of what class they are, and where the object is.
        attribute_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Of the regions' attributes, where the model has them and the labels do.
    """

    loss: torch.FloatTensor | None = None
    regions: list[dict[str, Any]] | None = None
    feature_map: torch.FloatTensor | None = None
    proposals: list[torch.FloatTensor] | None = None
    proposal_logits: list[torch.FloatTensor] | None = None
    objectness_loss: torch.FloatTensor | None = None
    proposal_box_loss: torch.FloatTensor | None = None
    class_loss: torch.FloatTensor | None = None
    box_loss: torch.FloatTensor | None = None
    attribute_loss: torch.FloatTensor | None = None


class ConvNorm(nn.Conv2d):
    """A convolution without bias, and its batch norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, bias=False, **kwargs)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(hidden_states))


class Stem(nn.Module):
    def __init__(self, config: FasterRCNNConfig):
        super().__init__()
        self.conv1 = ConvNorm(3, config.stem_channels, 7, stride=2, padding=3)
        self.pool = nn.MaxPool2d(
            3, stride=2, padding=0 if config.caffe_max_pool else 1, ceil_mode=config.caffe_max_pool
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.pool(self.conv1(pixel_values).relu())


class Bottleneck(nn.Module):
    """Three convolutions, the middle one narrow and 3 x 3, beside a shortcut."""

    def __init__(
        self, config: FasterRCNNConfig, in_channels: int, out_channels: int, width: int, stride: int, dilation: int
    ):
        super().__init__()
        strides = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.shortcut = ConvNorm(in_channels, out_channels, 1, stride=stride) if in_channels != out_channels else None
        self.conv1 = ConvNorm(in_channels, width, 1, stride=strides[0])
        self.conv2 = ConvNorm(
            width, width, 3, stride=strides[1], padding=dilation, dilation=dilation, groups=config.num_groups
        )
        self.conv3 = ConvNorm(width, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states if self.shortcut is None else self.shortcut(hidden_states)
        hidden_states = self.conv2(self.conv1(hidden_states).relu()).relu()
        return (self.conv3(hidden_states) + residual).relu()


def make_stage(config: FasterRCNNConfig, number: int, stride: int, dilation: int = 1) -> nn.Sequential:
    """The blocks of a stage, from 0 on."""
    out_channels = config.res2_channels * 2**number
    width = config.num_groups * config.width_per_group * 2**number
    in_channels = config.stem_channels if number == 0 else out_channels // 2
    first = Bottleneck(config, in_channels, out_channels, width, stride, dilation)
    num_others = config.stage_blocks[number] - 1
    others = (Bottleneck(config, out_channels, out_channels, width, 1, dilation) for _ in range(num_others))
    return nn.Sequential(first, *others)


class Backbone(nn.Module):
    """The stem and the first three stages of a ResNet."""

    def __init__(self, config: FasterRCNNConfig):
        super().__init__()
        self.stem = Stem(config)
        self.res2 = make_stage(config, 0, stride=1)
        self.res3 = make_stage(config, 1, stride=2)
        self.res4 = make_stage(config, 2, stride=2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.res4(self.res3(self.res2(self.stem(pixel_values))))


def apply_deltas(deltas: torch.Tensor, boxes: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """
    Moves and resizes boxes (Girshick et al. 2014).

    Args:
        deltas: `(n, classes, 4)`: of the centre in widths and heights, of width and height as logarithms, times
            `weights`.
        boxes: `(n, 4)`: x1, y1, x2, y2.

    Returns:
        float32 `(n, classes, 4)`.
    """
    dx, dy, dw, dh = (deltas.float() / deltas.new_tensor(weights, dtype=torch.float32)).unbind(dim=-1)
    boxes = boxes.float()
    sizes = boxes[:, 2:] - boxes[:, :2]
    (width, height), (x, y) = sizes.unbind(dim=1), (boxes[:, :2] + 0.5 * sizes).unbind(dim=1)
    width, height, x, y = (value[:, None] for value in (width, height, x, y))
    half_width = 0.5 * dw.clamp(max=MAX_LOG_SCALE).exp() * width
    half_height = 0.5 * dh.clamp(max=MAX_LOG_SCALE).exp() * height
    x, y = dx * width + x, dy * height + y
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def clip_boxes(boxes: torch.Tensor, image_size: torch.Tensor) -> torch.Tensor:
    """Boxes `(…, 4)` within an image of height and width `image_size`."""
    height, width = image_size.to(boxes)
    return torch.stack([value.clamp(min=0) for value in boxes.unbind(dim=-1)], dim=-1).minimum(
        torch.stack([width, height, width, height])
    )


class CellAnchors(nn.Module):
    def __init__(self, config: FasterRCNNConfig):
        super().__init__()
        self.config = config
        # Under the name that it has in published checkpoints.
        self.register_buffer("0", self.make())

    def make(self) -> torch.Tensor:
        """float32 `(anchors of a cell, 4)`: x1, y1, x2, y2 in pixels, around 0."""
        anchors = []
        for size in self.config.anchor_sizes:
            for ratio in self.config.anchor_aspect_ratios:
                width = math.sqrt(size**2 / ratio)
                height = ratio * width
                anchors.append([-width / 2, -height / 2, width / 2, height / 2])
        return torch.tensor(anchors)


class AnchorGenerator(nn.Module):
    def __init__(self, config: FasterRCNNConfig):
        super().__init__()
        self.offset = config.anchor_offset
        self.cell_anchors = CellAnchors(config)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """float32 `(height * width * anchors of a cell, 4)`: x1, y1, x2, y2 in pixels."""
        height, width = feature_map.shape[-2:]
        y, x = (
            (torch.arange(size, device=feature_map.device, dtype=torch.float32) + self.offset) * STRIDE
            for size in (height, width)
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        centres = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
        return (centres + self.cell_anchors.get_buffer("0").float()).view(-1, 4)


class RPNHead(nn.Module):
    """For every anchor whether it holds an object, and what moves it there."""

    def __init__(self, config: FasterRCNNConfig):
        super().__init__()
        num_anchors = len(config.anchor_sizes) * len(config.anchor_aspect_ratios)
        self.conv = nn.Conv2d(4 * config.res2_channels, config.rpn_channels, 3, padding=1)
        self.objectness_logits = nn.Conv2d(config.rpn_channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(config.rpn_channels, 4 * num_anchors, 1)
        for layer in (self.conv, self.objectness_logits, self.anchor_deltas):
            layer.initial_std = 0.01

    def forward(self, feature_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(images, anchors)` and deltas `(images, anchors, 4)`, in the order of the anchor generator."""
        hidden_states = self.conv(feature_map).relu()
        logits = self.objectness_logits(hidden_states).permute(0, 2, 3, 1).flatten(1)
        deltas = self.anchor_deltas(hidden_states).permute(0, 2, 3, 1).reshape(*logits.shape, 4)
        return logits, deltas


class ProposalGenerator(nn.Module):
    """The region proposal network (Ren et al. 2015)."""

    def __init__(self, config: FasterRCNNConfig):
        super().__init__()
        self.config = config
        self.anchor_generator = AnchorGenerator(config)
        self.rpn_head = RPNHead(config)

    def forward(
        self, feature_map: torch.Tensor, image_sizes: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Proposals `(n, 4)` and their logits `(n,)` of each image, the highest first."""
        return self.select(self.anchor_generator(feature_map), *self.rpn_head(feature_map), image_sizes)

    def select(
        self, anchors: torch.Tensor, logits: torch.Tensor, deltas: torch.Tensor, image_sizes: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Proposals of what the head says of the anchors, and their logits."""
        config = self.config
        proposals, proposal_logits = [], []
        for image_logits, image_deltas, image_size in zip(logits.float(), deltas, image_sizes, strict=True):
            best = image_logits.argsort(descending=True, stable=True)[: config.pre_nms_top_k]
            boxes = apply_deltas(image_deltas[best, None], anchors[best], config.rpn_box_weights)[:, 0]
            boxes, scores = clip_boxes(boxes, image_size), image_logits[best]
            is_large = (boxes[:, 2:] - boxes[:, :2] > config.min_proposal_size).all(dim=1)
            boxes, scores = boxes[is_large], scores[is_large]
            kept = non_maximum_suppression(boxes, scores, config.rpn_nms_threshold)[: config.post_nms_top_k]
            proposals.append(boxes[kept])
            proposal_logits.append(scores[kept])
        return proposals, proposal_logits

    def losses(
        self,
        anchors: torch.Tensor,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        image_sizes: torch.Tensor,
        targets: list[dict[str, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """
        `objectness_loss` and `proposal_box_loss` of anchors that are sampled from each image. Those that overlap a true
        box by 0.7, or that overlap it most, are on objects, those below 0.3 on none (Ren et al. 2015, section 3.1.2).
        """
        matches = torch.full(logits.shape, IGNORED, device=logits.device)
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        for image_matches, target, image_size in zip(matches, targets, image_sizes, strict=True):
            is_on_image = (centres < image_size.flip(0).to(centres)).all(dim=1)  # and not on its padding
            image_matches[is_on_image] = match_boxes(anchors[is_on_image], target["boxes"], 0.7, 0.3, match_best=True)
        sampled = [sample_matches(image_matches, NUM_SAMPLED_ANCHORS, FOREGROUND_ANCHORS) for image_matches in matches]
        images = _image_indices(sampled)
        sampled = torch.cat(sampled)
        matches = matches[images, sampled]
        is_object = matches >= 0
        return {
            "objectness_loss": objectness_loss(logits[images, sampled], matches),
            "proposal_box_loss": proposal_box_loss(
                deltas[images, sampled][is_object],
                anchors[sampled][is_object],
                _of_matches(targets, "boxes", images[is_object], matches[is_object]),
                self.config.rpn_box_weights,
                num_samples=len(sampled),
            ),
        }


def _image_indices(values: list[torch.Tensor]) -> torch.Tensor:
    """The number of its image for everything that images have: int64 `(values of all images,)`."""
    counts = torch.tensor([len(of_image) for of_image in values], device=values[0].device)
    return torch.arange(len(values), device=values[0].device).repeat_interleave(counts)


def _of_matches(
    targets: list[dict[str, torch.Tensor]], name: str, images: torch.Tensor, matches: torch.Tensor
) -> torch.Tensor:
    """What the true boxes numbered `matches` of `images` have."""
    values = [target[name] for target in targets]
    starts = torch.tensor([0] + [len(of_image) for of_image in values[:-1]], device=matches.device).cumsum(0)
    return torch.cat(values)[starts[images] + matches]


class BoxPredictor(nn.Module):
    """Classes, boxes and attributes of regions."""

    def __init__(self, config: FasterRCNNConfig):
        super().__init__()
        size = config.region_feature_size
        self.cls_score = nn.Linear(size, config.num_classes + 1)
        self.bbox_pred = nn.Linear(size, 4 * (1 if config.class_agnostic_boxes else config.num_classes))
        self.cls_score.initial_std, self.bbox_pred.initial_std = 0.01, 0.001
        self.has_attributes = config.num_attributes > 0
        if self.has_attributes:
            self.cls_embedding = nn.Embedding(config.num_classes + 1, size // 8)
            self.fc_attr = nn.Linear(size + size // 8, size // 4)
            self.attr_score = nn.Linear(size // 4, config.num_attributes + 1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits `(n, num_classes + 1)`, the background last, and deltas `(n, num_classes or 1, 4)`."""
        return self.cls_score(features), self.bbox_pred(features).unflatten(1, (-1, 4))

    def attribute_logits(self, features: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        """`(n, num_attributes + 1)`, the background last. They depend on the class, which may be background, too."""
        embedded = self.cls_embedding(class_ids)
        return self.attr_score(self.fc_attr(torch.cat([features, embedded], dim=1)).relu())


class RegionHeads(nn.Module):
    """From proposals to regions: the fourth stage of the ResNet on what is pooled, and the predictions from it."""

    def __init__(self, config: FasterRCNNConfig):
        super().__init__()
        self.config = config
        stride, dilation = (2, 1) if config.res5_halves else (1, 2)
        self.res5 = make_stage(config, 3, stride=stride, dilation=dilation)
        self.box_predictor = BoxPredictor(config)

    def extract(self, feature_map: torch.Tensor, proposals: list[torch.Tensor]) -> torch.Tensor:
        """The features of all proposals, image by image: `(proposals, region_feature_size)`."""
        image_indices, boxes = _image_indices(proposals), torch.cat(proposals)
        parts = [feature_map.new_zeros(0, self.config.region_feature_size)]
        # In training, batch norm is of all regions.
        at_a_time = max(len(boxes), 1) if self.training else REGIONS_AT_A_TIME
        for part, images in zip(boxes.split(at_a_time), image_indices.split(at_a_time), strict=True):
            pooled = roi_pool(feature_map, part, images, self.config.pooler_size, 1 / STRIDE)
            parts.append(self.res5(pooled).mean(dim=(2, 3)))
        return torch.cat(parts)

    def losses(
        self, feature_map: torch.Tensor, proposals: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """
        `class_loss`, `box_loss` and, where the targets have attributes, `attribute_loss` of proposals that are sampled
        from each image. Those that overlap a true box by 0.5 are of its class (Girshick 2015, section 2.3). The true
        boxes are among them: at first, few proposals are good.
        """
        config = self.config
        all_boxes, all_matches = [], []
        for boxes, target in zip(proposals, targets, strict=True):
            boxes = torch.cat([boxes, target["boxes"]])
            matches = match_boxes(boxes, target["boxes"], 0.5, 0.5)
            sampled = sample_matches(matches, config.num_sampled_proposals, FOREGROUND_PROPOSALS)
            all_boxes.append(boxes[sampled])
            all_matches.append(matches[sampled])
        features = self.extract(feature_map, all_boxes)
        class_logits, deltas = self.box_predictor(features)

        images, matches = _image_indices(all_boxes), torch.cat(all_matches)
        is_object = matches >= 0
        images, matches = images[is_object], matches[is_object]
        true_classes = _of_matches(targets, "class_ids", images, matches)
        class_ids = torch.full_like(is_object, config.num_classes, dtype=torch.long)  # the background
        class_ids[is_object] = true_classes
        losses = {
            "class_loss": class_loss(class_logits, class_ids),
            "box_loss": box_loss(
                deltas[is_object],
                true_classes,
                torch.cat(all_boxes)[is_object],
                _of_matches(targets, "boxes", images, matches),
                config.box_weights,
                num_samples=len(is_object),
            ),
        }
        if all("attribute_ids" in target for target in targets):
            logits = self.box_predictor.attribute_logits(features[is_object], true_classes)
            losses["attribute_loss"] = attribute_loss(logits, _of_matches(targets, "attribute_ids", images, matches))
        return losses


class FasterRCNNForRegionFeatures(PreTrainedModel):
    """
    The detector that finds the regions of pictures, for InterBERT and other models of region features.

    ```python
    >>> detector = FasterRCNNForRegionFeatures.from_pretrained("org/bottom-up-attention").eval()
    >>> image_processor = FasterRCNNImageProcessor.from_pretrained("org/bottom-up-attention")
    >>> with torch.inference_mode():
    ...     regions = detector(**image_processor(["beach.jpg", "kitchen.jpg"])).regions
    >>> regions[0]["boxes"].shape
    torch.Size([36, 4])
    ```
    """

    config_class = FasterRCNNConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: FasterRCNNConfig):
        super().__init__(config)
        self.backbone = Backbone(config)
        self.proposal_generator = ProposalGenerator(config)
        self.roi_heads = RegionHeads(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ConvNorm):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, CellAnchors):
            init.copy_(module.get_buffer("0"), module.make())
        elif hasattr(module, "initial_std"):
            init.normal_(module.weight, std=module.initial_std)

    def forward(
        self,
        pixel_values: torch.FloatTensor,
        image_sizes: torch.LongTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
        min_regions: int | None = None,
        max_regions: int | None = None,
        min_score: float | None = None,
        output_class_probs: bool = False,
        output_feature_map: bool = False,
        output_proposals: bool = False,
        labels: Sequence[Mapping[str, Any]] | None = None,
    ) -> FasterRCNNOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, 3, height, width)`):
                Pictures as [`FasterRCNNImageProcessor`] prepares them: blue, green, red, less the mean; padded with 0
                on the right and below.
            image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
                Height and width of each picture in `pixel_values`, in pixels. By default nothing is padding.
            original_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
                Height and width of each picture before it was resized, which boxes are given in. By default that in
                `pixel_values`.
            min_regions, max_regions (`int`, *optional*), min_score (`float`, *optional*):
                Other than those of the configuration.
            output_class_probs, output_feature_map, output_proposals (`bool`, *optional*, defaults to `False`):
                What is given out beside.
            labels (`Sequence[Mapping[str, Any]]`, *optional*):
                What is true of each picture, in a record like those that are given out; further keys are ignored. With
                them the losses are computed, and the regions are not. In training mode, batch norm is of the images of
                the batch, of which there should be several.

                - `boxes`: float of shape `(n, 4)`, x1, y1, x2, y2 in pixels of the original picture; n may be 0.
                - `class_ids`: integers of shape `(n,)`, counted without background.
                - `attribute_ids`, *optional*: integers of shape `(n,)`, -1 for none. All records have them, or
                  nothing is learned of attributes.

        Raises:
            `ValueError`: an input has another shape, a size is larger than `pixel_values`, or a label is not of its
                picture or its classes.
        """
        image_sizes, original_sizes = self._check_sizes(pixel_values, image_sizes, original_sizes)
        min_regions = self.config.min_regions if min_regions is None else min_regions
        max_regions = self.config.max_regions if max_regions is None else max_regions
        min_score = self.config.min_score if min_score is None else min_score
        if not 0 <= min_regions <= max_regions or max_regions < 1:
            raise ValueError(f"Expected 0 <= `min_regions` <= `max_regions`, got {min_regions} and {max_regions}.")

        if labels is not None:
            sizes = image_sizes.to(self.device), original_sizes.to(self.device)
            labels = read_labels(labels, *sizes, self.config.num_classes, self.config.num_attributes)

        feature_map = self.backbone(pixel_values.to(self.dtype))
        anchors = self.proposal_generator.anchor_generator(feature_map)
        logits, deltas = self.proposal_generator.rpn_head(feature_map)
        with torch.no_grad():  # Proposals are where they are: what is learned of them moves the features.
            proposals, proposal_logits = self.proposal_generator.select(anchors, logits, deltas, image_sizes)
        asked_for = {
            "feature_map": feature_map if output_feature_map else None,
            "proposals": proposals if output_proposals else None,
            "proposal_logits": proposal_logits if output_proposals else None,
        }
        if labels is not None:
            losses = self.proposal_generator.losses(anchors, logits, deltas, image_sizes, labels)
            losses |= self.roi_heads.losses(feature_map, proposals, labels)
            return FasterRCNNOutput(loss=sum(losses.values()), **asked_for, **losses)
        features = self.roi_heads.extract(feature_map, proposals)
        regions = [
            self._select_regions(*values, (min_regions, max_regions, min_score), output_class_probs)
            for values in zip(
                features.split([len(boxes) for boxes in proposals]), proposals, image_sizes, original_sizes, strict=True
            )
        ]
        return FasterRCNNOutput(regions=regions, **asked_for)

    def _check_sizes(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None,
        original_sizes: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"`pixel_values` must have shape (images, 3, height, width), got {tuple(pixel_values.shape)}."
            )
        largest = pixel_values.new_tensor(pixel_values.shape[-2:], dtype=torch.long)
        if image_sizes is None:
            image_sizes = largest.expand(len(pixel_values), 2)
        if original_sizes is None:
            original_sizes = image_sizes
        for name, sizes in (("image_sizes", image_sizes), ("original_sizes", original_sizes)):
            if sizes.shape != (len(pixel_values), 2) or not (sizes > 0).all():
                raise ValueError(
                    f"`{name}` must be positive, of shape ({len(pixel_values)}, 2), got {tuple(sizes.shape)}: "
                    f"{sizes.tolist()}."
                )
        if (image_sizes > largest).any():
            raise ValueError(
                f"`image_sizes` must be within those of `pixel_values`, {largest.tolist()}, got {image_sizes.tolist()}."
            )
        return image_sizes, original_sizes

    def _select_regions(
        self,
        features: torch.Tensor,
        proposals: torch.Tensor,
        image_size: torch.Tensor,
        original_size: torch.Tensor,
        limits: tuple[int, int, float],
        output_class_probs: bool,
    ) -> dict[str, Any]:
        """The record of one image, of the features and boxes of its proposals."""
        min_regions, max_regions, min_score = limits
        predictor = self.roi_heads.box_predictor
        class_logits, deltas = predictor(features)
        probabilities = class_logits.float().softmax(dim=1)
        scores, classes = probabilities[:, :-1].max(dim=1)
        # Each region has the box of its class.
        boxes_of = torch.zeros_like(classes) if deltas.shape[1] == 1 else classes
        deltas = deltas[torch.arange(len(deltas), device=deltas.device), boxes_of]
        boxes = clip_boxes(apply_deltas(deltas[:, None], proposals, self.config.box_weights)[:, 0], image_size)
        for threshold in self.config.nms_thresholds:
            kept = non_maximum_suppression(boxes, scores, threshold)[:max_regions]
            if len(kept) >= min_regions:
                break
        num_kept = max(int((scores[kept] > min_score).sum()), min(min_regions, len(kept)))
        kept = kept[:num_kept]

        height, width = original_size.tolist()
        scale = (original_size / image_size).to(boxes)[[1, 0, 1, 0]]
        record = {
            "features": features[kept],
            "boxes": boxes[kept] * scale,
            "width": width,
            "height": height,
            "class_ids": classes[kept],
            "class_scores": scores[kept],
        }
        if predictor.has_attributes:
            likeliest = class_logits[kept].argmax(dim=1)
            logits = predictor.attribute_logits(features[kept], likeliest)[:, :-1]
            record["attribute_scores"], record["attribute_ids"] = logits.float().softmax(dim=1).max(dim=1)
        if output_class_probs:
            record["class_probs"] = probabilities[kept].roll(1, dims=1)  # the background from the end to the front
        return record

    @classmethod
    def from_original(cls, folder: str | os.PathLike, **kwargs) -> FasterRCNNForRegionFeatures:
        """
        Reads the published checkpoint's format.

        Args:
            folder: With `pytorch_model.bin`, and `config.yaml` or `config.json`.
            kwargs: Values of the configuration that take precedence.

        Raises:
            `ValueError`: a file is missing, or the weights are not those of the configuration.
        """
        folder = Path(folder)
        model = cls(FasterRCNNConfig.from_original(read_original_config(folder), **kwargs))
        path = folder / "pytorch_model.bin"
        if not path.is_file():
            raise ValueError(f"{folder}: expected pytorch_model.bin, got no such file.")
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        problems = list(_state_dict_problems(model.state_dict(), state_dict))
        if problems:
            raise ValueError(f"{path} does not fit its configuration: {'; '.join(problems[:5])}.")
        model.load_state_dict(state_dict)
        return model.eval()


def _lower_keys(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {str(name).lower(): _lower_keys(value) for name, value in values.items()}


def read_original_config(folder: Path) -> dict[str, Any]:
    """
    The configuration of a published checkpoint, its keys in lower case.

    Raises:
        `ValueError`: there is none.
    """
    if (folder / "config.json").is_file():
        return _lower_keys(json.loads((folder / "config.json").read_text("utf-8")))
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: expected config.yaml or config.json, got neither.")
    return _lower_keys(safe_load((folder / "config.yaml").read_text("utf-8")))


def _state_dict_problems(expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> Iterator[str]:
    for name in sorted(expected.keys() | given.keys()):
        if name not in given:
            yield f"{name} is missing"
        elif name not in expected:
            yield f"{name} is left over"
        elif expected[name].shape != given[name].shape:
            yield f"{name}: expected {tuple(expected[name].shape)}, got {tuple(given[name].shape)}"
        elif name.endswith("cell_anchors.0") and not torch.allclose(expected[name], given[name].float(), atol=1e-3):
            yield f"{name}: expected the anchors {expected[name].tolist()}, got {given[name].tolist()}"


FasterRCNNForRegionFeatures.register_for_auto_class("AutoModel")

__all__ = ["FasterRCNNForRegionFeatures", "FasterRCNNOutput"]
