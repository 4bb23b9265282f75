"""
Operators on boxes and feature maps in plain PyTorch: intersection over union, non-maximum suppression, RoIPool (as in
Caffe, Girshick 2015) and RoIAlign (He et al. 2017). torchvision's compiled operators compute the same, and take their
place where they load.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

# Elements of a temporary that is made at a time: 256 MiB in float32.
CHUNK_ELEMENTS = 2**26


@functools.cache
def torchvision_operators() -> Any | None:
    """The module of torchvision's operators; None where it is not installed or was built for another PyTorch."""
    try:
        return importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError):
        return None


def box_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    Intersection over union of each box with each of the others.

    Args:
        boxes (`torch.FloatTensor` of shape `(n, 4)`): x1, y1, x2, y2 with x1 <= x2 and y1 <= y2.
        others (`torch.FloatTensor` of shape `(m, 4)`): Likewise.

    Returns:
        `torch.FloatTensor` of shape `(n, m)`, in [0, 1]; NaN where both boxes have no area.
    """
    upper_left = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    lower_right = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersections = (lower_right - upper_left).clamp(min=0).prod(dim=-1)  # (n, m)
    areas, other_areas = ((sides[:, 2:] - sides[:, :2]).prod(dim=-1) for sides in (boxes, others))
    return intersections / (areas[:, None] + other_areas[None] - intersections)


def non_maximum_suppression(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """
    Goes through the boxes from the highest score down, and keeps those that overlap no box kept before.

    Args:
        boxes (`torch.FloatTensor` of shape `(n, 4)`): x1, y1, x2, y2 with x1 <= x2 and y1 <= y2.
        scores (`torch.FloatTensor` of shape `(n,)`): Of equal ones, the first comes first.
        iou_threshold (`float`): Boxes overlap whose intersection over union is above it.

    Returns:
        `torch.LongTensor` of shape `(kept,)`: indices of the boxes that are kept, the highest score first.
    """
    if torchvision_operators() is not None:
        return torchvision_operators().nms(boxes, scores, iou_threshold)
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    # overlaps[i, j]: box i comes before box j and would suppress it.
    rows = max(1, CHUNK_ELEMENTS // max(1, 4 * len(boxes)))
    overlaps = torch.cat([box_iou(chunk, boxes) > iou_threshold for chunk in boxes.split(rows)] or [boxes.new_zeros(0)])
    overlaps = overlaps.view(len(boxes), len(boxes)).triu(diagonal=1)
    # A box is kept if no kept box suppresses it. From all boxes on, each round makes at least one more decision final,
    # in the order of the boxes; in practice a few rounds settle all of them.
    keep = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    while True:
        kept = ~overlaps[keep].any(dim=0)
        if torch.equal(kept, keep):
            return order[keep]
        keep = kept


def roi_pool(
    features: torch.Tensor, boxes: torch.Tensor, image_indices: torch.Tensor, output_size: int, spatial_scale: float
) -> torch.Tensor:
    """
    Caffe's RoIPool: divides each box into a grid of bins of whole cells, and takes the maximum of each. A box has at
    least one cell; bins outside the map are 0.

    Args:
        features (`torch.FloatTensor` of shape `(images, channels, height, width)`): Maps.
        boxes (`torch.FloatTensor` of shape `(n, 4)`): x1, y1, x2, y2 in pixels.
        image_indices (`torch.LongTensor` of shape `(n,)`): The map that each box is on.
        output_size (`int`): Bins of each side.
        spatial_scale (`float`): Cells of the map for a pixel, 1/16 for a stride of 16.

    Returns:
        `torch.FloatTensor` of shape `(n, channels, output_size, output_size)`.
    """
    if torchvision_operators() is not None:
        # It wants features and boxes of one dtype, and pixels have more digits than bfloat16.
        pooled = torchvision_operators().roi_pool(
            features.float(), _with_images(boxes, image_indices), output_size, spatial_scale
        )
        return pooled.to(features.dtype)
    if features.requires_grad and torch.is_grad_enabled():
        return _roi_pool_with_gradients(features, boxes, image_indices, output_size, spatial_scale)
    height, width = features.shape[-2:]
    scaled = boxes * spatial_scale
    corners = torch.sign(scaled) * (scaled.abs() + 0.5).floor()  # half away from zero, unlike torch.round
    row_starts, row_ends = _bins(corners[:, 1], corners[:, 3], output_size, height)
    column_starts, column_ends = _bins(corners[:, 0], corners[:, 2], output_size, width)
    pooled = _range_maxima(features, image_indices, (row_starts, row_ends), (column_starts, column_ends))
    is_empty = (row_ends <= row_starts)[:, :, None] | (column_ends <= column_starts)[:, None, :]  # (n, bins, bins)
    return pooled.masked_fill_(is_empty[:, None], 0)


def _roi_pool_with_gradients(
    features: torch.Tensor, boxes: torch.Tensor, image_indices: torch.Tensor, output_size: int, spatial_scale: float
) -> torch.Tensor:
    """
    As [`roi_pool`], and gradients go to the cell of each bin that has the maximum (Girshick 2015, section 2.3).

    Cells are put in order; the one of the highest rank in a bin is the one that is pooled.
    """
    num_images, num_channels, height, width = features.shape
    cells = features.permute(0, 2, 3, 1).flatten(0, 2)  # (images * height * width, channels)
    order = cells.detach().argsort(dim=0)
    numbers = torch.arange(1, len(cells) + 1, device=features.device)[:, None].expand_as(order)
    ranks = torch.zeros_like(order).scatter_(0, order, numbers)
    maps = ranks.view(num_images, height, width, num_channels).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        highest = roi_pool(maps, boxes, image_indices, output_size, spatial_scale).long()
    highest = highest.permute(0, 2, 3, 1)  # (n, bins, bins, channels); 0 where a bin is outside the map
    chosen = order.gather(0, (highest - 1).clamp(min=0).flatten(0, 2))
    pooled = cells.gather(0, chosen).view(highest.shape).masked_fill(highest == 0, 0)
    return pooled.permute(0, 3, 1, 2)


def _with_images(boxes: torch.Tensor, image_indices: torch.Tensor) -> torch.Tensor:
    """Boxes as torchvision takes them: `(n, 5)`, the image's index first."""
    return torch.cat([image_indices[:, None].to(boxes), boxes], dim=1)


def _bins(first: torch.Tensor, last: torch.Tensor, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and ends of the bins between the cells `first` and `last`: int64 `(n, count)`, clipped to the map."""
    lengths = (last - first + 1).clamp(min=1)[:, None] / count  # (n, 1)
    numbers = torch.arange(count, device=first.device)
    starts = (numbers * lengths).floor() + first[:, None]
    ends = ((numbers + 1) * lengths).ceil() + first[:, None]
    return starts.clamp(0, size).long(), ends.clamp(0, size).long()


def _range_maxima(
    features: torch.Tensor,
    image_indices: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    columns: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """
    Maxima over rectangles of cells, `(n, channels, bins, bins)`; anything where a rectangle is empty.

    A range is the union of two windows of a power of two, which may overlap: maxima over such windows of the whole map
    are made once, and each rectangle is the maximum of four of them.
    """
    num_channels, height, width = features.shape[1:]
    row_levels, column_levels = ((ends - starts).clamp(min=1).log2().long() for starts, ends in (rows, columns))
    tables = []  # [row level][column level]: (images, height, width, channels)
    by_rows = features.permute(0, 2, 3, 1).contiguous()
    for row_level in range(int(row_levels.max()) + 1 if row_levels.numel() else 0):
        if row_level:
            by_rows = _double_window(by_rows, 2 ** (row_level - 1), dim=1)
        table = by_rows
        tables.append(table)
        for column_level in range(1, int(column_levels.max()) + 1):
            table = _double_window(table, 2 ** (column_level - 1), dim=2)
            tables.append(table)
    num_boxes, num_bins = row_levels.shape
    pooled = features.new_empty(num_boxes, num_bins, num_bins, num_channels)
    if not tables:
        return pooled.permute(0, 3, 1, 2)
    # (levels * images * height * width, channels): every cell of every table is a row.
    cells = torch.stack(tables).flatten(0, 3)
    num_column_levels = int(column_levels.max()) + 1
    num_cells = features.shape[0] * height * width
    level_offsets = (row_levels[:, :, None] * num_column_levels + column_levels[:, None, :]) * num_cells
    offsets = level_offsets + image_indices[:, None, None] * (height * width)  # (n, bins, bins)

    def corners(bounds, levels, size):
        """First cells of the two windows, within the map also where a range is empty."""
        starts, ends = bounds
        return starts.clamp(max=size - 1), (ends - 2**levels).clamp(min=0, max=size - 1)

    chunk = max(1, CHUNK_ELEMENTS // (num_bins**2 * num_channels))
    row_corners, column_corners = corners(rows, row_levels, height), corners(columns, column_levels, width)
    for start in range(0, num_boxes, chunk):
        part = slice(start, start + chunk)
        for number, (row, column) in enumerate((row, column) for row in row_corners for column in column_corners):
            index = offsets[part] + row[part, :, None] * width + column[part, None, :]
            values = cells[index.flatten()].view(*index.shape, num_channels)
            if number == 0:
                pooled[part] = values
            else:
                torch.maximum(pooled[part], values, out=pooled[part])
    return pooled.permute(0, 3, 1, 2).contiguous()


def _double_window(table: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """From maxima over `length` cells onward to maxima over twice as many; where the map ends, over those there are."""
    doubled = table.clone()
    rest = table.shape[dim] - length
    if rest > 0:
        front = doubled.narrow(dim, 0, rest)
        torch.maximum(front, table.narrow(dim, length, rest), out=front)
    return doubled


def roi_align(
    features: torch.Tensor,
    boxes: torch.Tensor,
    image_indices: torch.Tensor,
    output_size: int,
    spatial_scale: float,
    sampling_ratio: int = 0,
) -> torch.Tensor:
    """
    RoIAlign with aligned corners (half a cell off, as Detectron2 has it): divides each box into a grid of bins, and
    takes the mean of bilinear samples in each. Samples further than one cell outside the map are 0.

    Args:
        features, boxes, image_indices, output_size, spatial_scale: As in [`roi_pool`].
        sampling_ratio (`int`, *optional*, defaults to 0):
            Samples of each side of a bin; 0 takes one for each cell that the bin has begun.

    Returns:
        `torch.FloatTensor` of shape `(n, channels, output_size, output_size)`.
    """
    if torchvision_operators() is not None:
        return torchvision_operators().roi_align(
            features, _with_images(boxes, image_indices), output_size, spatial_scale, sampling_ratio, aligned=True
        )
    num_channels = features.shape[1]
    pooled = features.new_zeros(len(boxes), num_channels, output_size, output_size)
    starts = boxes[:, [1, 0]] * spatial_scale - 0.5  # (n, 2): y, x
    lengths = (boxes[:, [3, 2]] - boxes[:, [1, 0]]) * spatial_scale
    if sampling_ratio > 0:
        counts = torch.full_like(lengths, sampling_ratio, dtype=torch.long)
    else:
        counts = (lengths / output_size).ceil().long()
    # Boxes with equally many samples are one batch.
    for count in counts.unique(dim=0):
        num_rows, num_columns = count.tolist()
        if num_rows < 1 or num_columns < 1:
            continue
        members = (counts == count).all(dim=1).nonzero()[:, 0]
        chunk = max(1, CHUNK_ELEMENTS // (output_size**2 * num_rows * num_columns * num_channels))
        for part in members.split(chunk):
            samples = _bilinear_samples(
                features, image_indices[part], starts[part], lengths[part], output_size, (num_rows, num_columns)
            )  # (part, bins * rows, bins * columns, channels)
            grid = samples.view(len(part), output_size, num_rows, output_size, num_columns, num_channels)
            pooled[part] = grid.mean(dim=(2, 4)).permute(0, 3, 1, 2)
    return pooled


def _bilinear_samples(
    features: torch.Tensor,
    image_indices: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    num_bins: int,
    counts: tuple[int, int],
) -> torch.Tensor:
    """Samples in the middles of the parts that boxes are divided into: `(n, bins * rows, bins * columns, channels)`."""
    lower, upper, weights, is_inside = [], [], [], []
    for axis, count in enumerate(counts):
        size = features.shape[2 + axis]
        middles = (torch.arange(num_bins * count, device=features.device) + 0.5) / (num_bins * count)
        positions = starts[:, axis, None] + middles * lengths[:, axis, None]  # (n, bins * count)
        is_inside.append((positions >= -1) & (positions <= size))
        positions = positions.clamp(0, size - 1)
        lower.append(positions.floor().long())
        upper.append((lower[axis] + 1).clamp(max=size - 1))
        weights.append(positions - lower[axis])
    maps = features.permute(0, 2, 3, 1)
    index = image_indices[:, None, None]
    row_weight, column_weight = weights[0][:, :, None, None], weights[1][:, None, :, None]

    def at(rows, columns):
        return maps[index, rows[:, :, None], columns[:, None, :]]

    above = at(lower[0], lower[1]) * (1 - column_weight) + at(lower[0], upper[1]) * column_weight
    below = at(upper[0], lower[1]) * (1 - column_weight) + at(upper[0], upper[1]) * column_weight
    samples = above * (1 - row_weight) + below * row_weight
    return samples * (is_inside[0][:, :, None] & is_inside[1][:, None, :])[..., None]
