"""
The losses of a Faster R-CNN (Girshick 2015, arXiv 1504.08083; Ren et al. 2015, arXiv 1506.01497; of attributes
Anderson et al. 2018, arXiv 1707.07998), with what they are taken of: boxes that are matched to true ones, and sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from .region_operators import box_iou

# What a box is matched to that is matched to no true box: scored as background, or not at all.
BACKGROUND, IGNORED = -1, -2
# From here on the smooth L1 loss is linear: of anchors and of proposals (Ren et al.'s code has 1 / 3² and 1).
ANCHOR_BETA, PROPOSAL_BETA = 1 / 9, 1.0
# True boxes may be so many pixels outside their image, and are cut there; as `InterBERTProcessor` takes them.
TOLERANCE = 1.0


# ---------------------------------------------------------------- true boxes


def read_labels(
    labels: Sequence[Mapping[str, Any]],
    image_sizes: torch.Tensor,
    original_sizes: torch.Tensor,
    num_classes: int,
    num_attributes: int,
) -> list[dict[str, torch.Tensor]]:
    """
    The true boxes of pictures, in pixels of the resized pictures.

    Args:
        labels: One record for each picture:

            - `boxes`: float of shape `(n, 4)`, x1, y1, x2, y2 in pixels of the original picture; n may be 0.
            - `class_ids`: integers of shape `(n,)`, counted without background.
            - `attribute_ids`, *optional*: integers of shape `(n,)`, -1 for none.
        image_sizes: int64 `(images, 2)`, height and width of the resized pictures.
        original_sizes: int64 `(images, 2)`, height and width of the original pictures.
        num_classes, num_attributes: How many there are.

    Returns:
        For each picture `boxes` float32 `(n, 4)`, `class_ids` int64 `(n,)`, and `attribute_ids` int64 `(n,)` where they
        are given and the model has attributes; on the device of the sizes.

    Raises:
        `ValueError`: there are more or fewer records than pictures, or one of them is not as above. The message says
            which.
    """
    if len(labels) != len(image_sizes):
        raise ValueError(f"`labels`: expected a record for each of {len(image_sizes)} images, got {len(labels)}.")
    targets = []
    for number, (record, image_size, original_size) in enumerate(zip(labels, image_sizes, original_sizes, strict=True)):
        name = f"labels[{number}]"
        for column in ("boxes", "class_ids"):
            if column not in record:
                raise ValueError(f"{name}: expected `boxes` and `class_ids`, got {sorted(record)}.")
        boxes = _read_boxes(f"{name}['boxes']", record["boxes"], original_size)
        scale = (image_size / original_size).to(boxes)[[1, 0, 1, 0]]
        target = {"boxes": boxes * scale}
        limits = {"class_ids": (0, num_classes)}
        if num_attributes > 0 and record.get("attribute_ids") is not None:
            limits["attribute_ids"] = (-1, num_attributes)
        for column, limit in limits.items():
            ids = torch.as_tensor(record[column], device=boxes.device).long()
            if ids.shape != boxes.shape[:1]:
                raise ValueError(f"{name}['{column}']: expected one for each of {len(boxes)} boxes, got {ids.numel()}.")
            wrong = ids[(ids < limit[0]) | (ids >= limit[1])]
            if len(wrong):
                raise ValueError(
                    f"{name}['{column}']: expected integers from {limit[0]} to {limit[1] - 1}, got {wrong[0].item()}."
                )
            target[column] = ids
        targets.append(target)
    return targets


def _read_boxes(name: str, boxes: Any, original_size: torch.Tensor) -> torch.Tensor:
    boxes = torch.as_tensor(boxes, device=original_size.device).float()
    if boxes.numel() == 0:
        boxes = boxes.view(0, 4)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: expected shape (n, 4), got {tuple(boxes.shape)}.")
    height, width = original_size.tolist()
    limits = boxes.new_tensor([width, height, width, height])
    # Written such that NaN is outside.
    is_inside = ((boxes >= -TOLERANCE) & (boxes <= limits + TOLERANCE)).all(dim=1)
    if not is_inside.all():
        raise ValueError(
            f"{name}: expected x1, y1, x2, y2 within an image {width} wide and {height} high, got "
            f"{boxes[~is_inside][0].tolist()}."
        )
    boxes = boxes.clamp(min=0).minimum(limits)
    is_empty = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
    if is_empty.any():
        raise ValueError(f"{name}: expected x1 < x2 and y1 < y2 within the image, got {boxes[is_empty][0].tolist()}.")
    return boxes


# ---------------------------------------------------------------- matches and samples


def encode_boxes(boxes: torch.Tensor, references: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """
    What moves and resizes references to boxes (Girshick et al. 2014); `apply_deltas` does so.

    Args:
        boxes (`torch.FloatTensor` of shape `(n, 4)`): x1, y1, x2, y2 with x1 < x2 and y1 < y2.
        references (`torch.FloatTensor` of shape `(n, 4)`): Likewise, anchors or proposals.
        weights (`Sequence[float]`): What the deltas of x, y, width and height are multiplied by.

    Returns:
        float32 `(n, 4)`: how far the centre moves in widths and heights of the reference, and the logarithms of how
        many times as wide and as high the box is, times `weights`.
    """
    boxes, references = boxes.float(), references.float()
    sizes, reference_sizes = boxes[:, 2:] - boxes[:, :2], references[:, 2:] - references[:, :2]
    shifts = (boxes[:, :2] + boxes[:, 2:] - references[:, :2] - references[:, 2:]) / 2 / reference_sizes
    return torch.cat([shifts, (sizes / reference_sizes).log()], dim=1) * boxes.new_tensor(weights)


def match_boxes(
    boxes: torch.Tensor,
    true_boxes: torch.Tensor,
    foreground_iou: float,
    background_iou: float,
    match_best: bool = False,
) -> torch.Tensor:
    """
    Finds the true box that each box overlaps most.

    Args:
        boxes (`torch.FloatTensor` of shape `(n, 4)`): x1, y1, x2, y2: anchors or proposals.
        true_boxes (`torch.FloatTensor` of shape `(m, 4)`): Likewise; m may be 0.
        foreground_iou (`float`): Boxes are matched from this intersection over union on.
        background_iou (`float`): Boxes below this intersection over union are background; those between are ignored.
        match_best (`bool`, *optional*, defaults to `False`):
            Whether the boxes that overlap a true box most are matched in any case, so that every true box that is
            overlapped at all is learned (Ren et al. 2015, section 3.1.2).

    Returns:
        `torch.LongTensor` of shape `(n,)`: numbers of true boxes, `BACKGROUND` or `IGNORED`.
    """
    matches = torch.full(boxes.shape[:1], BACKGROUND, device=boxes.device)
    if len(true_boxes) == 0 or len(boxes) == 0:
        return matches
    overlaps = box_iou(boxes, true_boxes)  # (n, m)
    best, numbers = overlaps.max(dim=1)
    matches[best >= background_iou] = IGNORED
    is_matched = best >= foreground_iou
    if match_best:
        best_of_true = overlaps.amax(dim=0)  # (m,)
        is_matched |= ((overlaps == best_of_true) & (best_of_true > 0)).any(dim=1)
    return torch.where(is_matched, numbers, matches)


def sample_matches(matches: torch.Tensor, num_samples: int, foreground_share: float) -> torch.Tensor:
    """
    Draws boxes to be scored. Where there are fewer matched ones than their share, there is more background.

    Args:
        matches (`torch.LongTensor` of shape `(n,)`): As [`match_boxes`] gives them.
        num_samples (`int`): At most so many are drawn.
        foreground_share (`float`): At most this share of `num_samples` is matched.

    Returns:
        `torch.LongTensor` of shape `(drawn,)`: indices into `matches`, those that are matched first.
    """
    foreground, background = (mask.nonzero()[:, 0] for mask in (matches >= 0, matches == BACKGROUND))
    foreground = _draw(foreground, int(num_samples * foreground_share))
    return torch.cat([foreground, _draw(background, num_samples - len(foreground))])


def _draw(indices: torch.Tensor, count: int) -> torch.Tensor:
    return indices[torch.randperm(len(indices), device=indices.device)[:count]]


# ---------------------------------------------------------------- losses


def objectness_loss(logits: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """
    Binary cross-entropy of whether anchors hold an object.

    Args:
        logits (`torch.FloatTensor` of shape `(n,)`): Of the sampled anchors.
        matches (`torch.LongTensor` of shape `(n,)`): Theirs.

    Returns:
        The mean, of shape `()`; 0 where n is 0.
    """
    loss = functional.binary_cross_entropy_with_logits(logits.float(), (matches >= 0).float(), reduction="sum")
    return loss / max(len(logits), 1)


def proposal_box_loss(
    deltas: torch.Tensor, anchors: torch.Tensor, true_boxes: torch.Tensor, weights: Sequence[float], num_samples: int
) -> torch.Tensor:
    """
    Smooth L1 loss of what moves anchors to their true boxes.

    Args:
        deltas (`torch.FloatTensor` of shape `(n, 4)`): Of the sampled anchors that are matched.
        anchors (`torch.FloatTensor` of shape `(n, 4)`): x1, y1, x2, y2.
        true_boxes (`torch.FloatTensor` of shape `(n, 4)`): Those that they are matched to.
        weights (`Sequence[float]`): Of the deltas, as in [`encode_boxes`].
        num_samples (`int`): How many anchors were sampled, background included.

    Returns:
        The sum divided by `num_samples`, of shape `()`.
    """
    expected = encode_boxes(true_boxes, anchors, weights)
    loss = functional.smooth_l1_loss(deltas.float(), expected, beta=ANCHOR_BETA, reduction="sum")
    return loss / max(num_samples, 1)


def class_loss(logits: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of the classes of proposals.

    Args:
        logits (`torch.FloatTensor` of shape `(n, num_classes + 1)`): Of the sampled proposals, the background last.
        class_ids (`torch.LongTensor` of shape `(n,)`): `num_classes` for background.

    Returns:
        The mean, of shape `()`; 0 where n is 0.
    """
    return functional.cross_entropy(logits.float(), class_ids, reduction="sum") / max(len(logits), 1)


def box_loss(
    deltas: torch.Tensor,
    class_ids: torch.Tensor,
    proposals: torch.Tensor,
    true_boxes: torch.Tensor,
    weights: Sequence[float],
    num_samples: int,
) -> torch.Tensor:
    """
    Smooth L1 loss of what moves proposals to their true boxes, of the true class alone.

    Args:
        deltas (`torch.FloatTensor` of shape `(n, num_classes, 4)` or `(n, 1, 4)`):
            Of the sampled proposals that are matched; one for all classes where boxes are class-agnostic.
        class_ids (`torch.LongTensor` of shape `(n,)`): Classes of the true boxes.
        proposals (`torch.FloatTensor` of shape `(n, 4)`): x1, y1, x2, y2.
        true_boxes (`torch.FloatTensor` of shape `(n, 4)`): Those that they are matched to.
        weights (`Sequence[float]`): Of the deltas, as in [`encode_boxes`].
        num_samples (`int`): How many proposals were sampled, background included.

    Returns:
        The sum divided by `num_samples`, of shape `()`.
    """
    boxes_of = torch.zeros_like(class_ids) if deltas.shape[1] == 1 else class_ids
    deltas = deltas[torch.arange(len(deltas), device=deltas.device), boxes_of]
    expected = encode_boxes(true_boxes, proposals, weights)
    loss = functional.smooth_l1_loss(deltas.float(), expected, beta=PROPOSAL_BETA, reduction="sum")
    return loss / max(num_samples, 1)


def attribute_loss(logits: torch.Tensor, attribute_ids: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of the attributes of proposals (Anderson et al. 2018, section 3.1).

    Args:
        logits (`torch.FloatTensor` of shape `(n, num_attributes + 1)`):
            Of the sampled proposals that are matched, the background last.
        attribute_ids (`torch.LongTensor` of shape `(n,)`): -1 for none, which is not scored.

    Returns:
        The mean over what is scored, of shape `()`; 0 where nothing is.
    """
    loss = functional.cross_entropy(logits.float(), attribute_ids, ignore_index=-1, reduction="sum")
    return loss / (attribute_ids >= 0).sum().clamp(min=1)
