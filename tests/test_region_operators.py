"""RoIPool, RoIAlign and non-maximum suppression against hand-worked cases and plain loops."""

import importlib
import math
from unittest.mock import Mock

import pytest
import torch

from processing import region_operators
from processing.region_operators import box_iou, non_maximum_suppression, roi_align, roi_pool

pytestmark = pytest.mark.usefixtures("plain_operators")


@pytest.fixture
def plain_operators(request, monkeypatch):
    """Not torchvision's, where these load, but in the tests that are about them."""
    if "torchvision" not in request.node.name:
        monkeypatch.setattr(region_operators, "torchvision_operators", lambda: None)


def random_boxes(count: int, size: float, generator: torch.Generator) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * size
    return corners.flatten(1)


def test_intersection_over_union_by_hand():
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 6], [1, 1, 1, 1]])
    others = torch.tensor([[0.0, 0, 4, 4], [4, 0, 8, 4], [1, 1, 3, 3], [1, 1, 1, 1]])
    expected = torch.tensor([[1.0, 0, 4 / 16, 0], [4 / 28, 4 / 28, 1 / 19, 0], [0, 0, 0, math.nan]])
    torch.testing.assert_close(box_iou(boxes, others), expected, equal_nan=True)
    assert box_iou(boxes[:0], others).shape == (0, 4) and box_iou(boxes, others[:0]).shape == (3, 0)


def suppress_by_loop(boxes, scores, threshold) -> list[int]:
    kept = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if not any(box_iou(boxes[index : index + 1], boxes[i : i + 1]).item() > threshold for i in kept):
            kept.append(index)
    return kept


def test_suppression_by_hand():
    # The first suppresses the second, which therefore does not suppress the third.
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])
    assert non_maximum_suppression(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.4).tolist() == [0, 2]
    assert non_maximum_suppression(boxes, torch.tensor([0.8, 0.9, 0.7]), 0.4).tolist() == [1]
    # Exactly at the threshold they do not overlap: 6/14.
    assert non_maximum_suppression(boxes[:2], torch.tensor([0.9, 0.8]), 6 / 14).tolist() == [0, 1]


@pytest.mark.parametrize("chunk_elements", [region_operators.CHUNK_ELEMENTS, 1000])
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.7])
def test_suppression_is_that_of_a_loop(threshold, chunk_elements, monkeypatch):
    monkeypatch.setattr(region_operators, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(150, 10.0, generator)
    scores = (torch.rand(150, generator=generator) * 20).round() / 20  # with ties
    boxes[10] = boxes[11] = torch.tensor([3.0, 3, 3, 3])  # no area, twice
    assert non_maximum_suppression(boxes, scores, threshold).tolist() == suppress_by_loop(boxes, scores, threshold)


def test_nothing_to_suppress():
    assert non_maximum_suppression(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []
    assert non_maximum_suppression(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0.5]), 0.5).tolist() == [0]


def round_half_away(value: float) -> int:
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def pool_by_loop(features, boxes, image_indices, output_size, scale):
    """Caffe's RoIPool, bin by bin."""
    _, num_channels, height, width = features.shape
    pooled = torch.zeros(len(boxes), num_channels, output_size, output_size)
    for number, (box, image) in enumerate(zip(boxes.tolist(), image_indices.tolist(), strict=True)):
        x1, y1, x2, y2 = (round_half_away(value * scale) for value in box)
        bin_height, bin_width = max(y2 - y1 + 1, 1) / output_size, max(x2 - x1 + 1, 1) / output_size
        for row in range(output_size):
            top = min(max(math.floor(row * bin_height) + y1, 0), height)
            bottom = min(max(math.ceil((row + 1) * bin_height) + y1, 0), height)
            for column in range(output_size):
                left = min(max(math.floor(column * bin_width) + x1, 0), width)
                right = min(max(math.ceil((column + 1) * bin_width) + x1, 0), width)
                if bottom > top and right > left:
                    cells = features[image, :, top:bottom, left:right]
                    pooled[number, :, row, column] = cells.flatten(1).max(dim=1).values
    return pooled


ODD_BOXES = torch.tensor(
    [
        [0.0, 0, 0, 0],  # one cell
        [8, 8, 8, 8],  # 8/16 rounds away from zero
        [-40, -40, -24, -24],  # outside, before the map
        [1000, 1000, 1100, 1100],  # outside, behind it
        [-64, 32, 400, 90],  # larger than the map
        [30, 30, 20, 20],  # upside down: one cell
        [0, 0, 239, 175],  # all of it
    ]
)


def test_pooling_by_hand():
    features = torch.arange(12.0).view(1, 1, 3, 4)
    # Cells 1 to 2 of both axes: bins of one cell.
    boxes = torch.tensor([[16.0, 16, 32, 32]])
    index = torch.tensor([0])
    assert roi_pool(features, boxes, index, 2, 1 / 16).tolist() == [[[[5, 6], [9, 10]]]]
    # Four columns in three bins: columns 0-1, 1-2, 2-3 (bins overlap); three rows, one in each.
    boxes = torch.tensor([[0.0, 0, 48, 32]])
    assert roi_pool(features, boxes, index, 3, 1 / 16).tolist() == [[[[1, 2, 3], [5, 6, 7], [9, 10, 11]]]]
    # Half of it lies outside, where there is nothing.
    boxes = torch.tensor([[32.0, 0, 80, 16]])
    assert roi_pool(features, boxes, index, 2, 1 / 16).tolist() == [[[[3, 0], [7, 0]]]]


@pytest.mark.parametrize("output_size", [1, 3, 7, 14])
@pytest.mark.parametrize("chunk_elements", [region_operators.CHUNK_ELEMENTS, 500])
def test_pooling_is_that_of_a_loop(output_size, chunk_elements, monkeypatch):
    monkeypatch.setattr(region_operators, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 5, 11, 15, generator=generator)
    boxes = torch.cat([random_boxes(30, 240, generator) - 10, ODD_BOXES])
    image_indices = torch.randint(0, 2, (len(boxes),), generator=generator)
    expected = pool_by_loop(features, boxes, image_indices, output_size, 1 / 16)
    assert torch.equal(roi_pool(features, boxes, image_indices, output_size, 1 / 16), expected)


def test_nothing_to_pool():
    features, index = torch.randn(1, 5, 4, 4), torch.zeros(0, dtype=torch.long)
    assert roi_pool(features, torch.zeros(0, 4), index, 7, 1 / 16).shape == (0, 5, 7, 7)
    assert roi_align(features, torch.zeros(0, 4), index, 7, 1 / 16).shape == (0, 5, 7, 7)


def align_by_loop(features, boxes, image_indices, output_size, scale, sampling_ratio):
    """RoIAlign, sample by sample."""
    _, num_channels, height, width = features.shape
    pooled = torch.zeros(len(boxes), num_channels, output_size, output_size)

    def sample(image, y, x):
        if y < -1 or y > height or x < -1 or x > width:
            return torch.zeros(num_channels)
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = math.floor(y), math.floor(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        dy, dx = y - top, x - left
        maps = features[image]
        return (
            maps[:, top, left] * (1 - dy) * (1 - dx)
            + maps[:, top, right] * (1 - dy) * dx
            + maps[:, bottom, left] * dy * (1 - dx)
            + maps[:, bottom, right] * dy * dx
        )

    for number, (box, image) in enumerate(zip(boxes.tolist(), image_indices.tolist(), strict=True)):
        x1, y1, x2, y2 = (value * scale - 0.5 for value in box)
        bin_height, bin_width = (y2 - y1) / output_size, (x2 - x1) / output_size
        rows = sampling_ratio or math.ceil((y2 - y1) / output_size)
        columns = sampling_ratio or math.ceil((x2 - x1) / output_size)
        for row in range(output_size):
            for column in range(output_size):
                samples = [
                    sample(
                        image,
                        y1 + bin_height * (row + (i + 0.5) / rows),
                        x1 + bin_width * (column + (j + 0.5) / columns),
                    )
                    for i in range(rows)
                    for j in range(columns)
                ]
                if samples:
                    pooled[number, :, row, column] = torch.stack(samples).mean(dim=0)
    return pooled


def test_aligning_by_hand():
    features = torch.arange(12.0).view(1, 1, 3, 4)
    index = torch.tensor([0])
    # One sample in the middle of a box over the cells' middles (1, 1) to (2, 2): the mean of four cells.
    boxes = torch.tensor([[24.0, 24, 40, 40]])
    assert roi_align(features, boxes, index, 1, 1 / 16, sampling_ratio=1).item() == (5 + 6 + 9 + 10) / 4
    # A box of one cell gives that cell.
    boxes = torch.tensor([[16.0, 16, 32, 32]])
    assert roi_align(features, boxes, index, 1, 1 / 16).item() == 5
    # Further than one cell outside there is nothing.
    boxes = torch.tensor([[200.0, 0, 232, 32]])
    assert roi_align(features, boxes, index, 1, 1 / 16).item() == 0


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("chunk_elements", [region_operators.CHUNK_ELEMENTS, 500])
def test_aligning_is_that_of_a_loop(sampling_ratio, chunk_elements, monkeypatch):
    monkeypatch.setattr(region_operators, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 3, 11, 15, generator=generator)
    odd = ODD_BOXES[(ODD_BOXES[:, 2:] >= ODD_BOXES[:, :2]).all(dim=1)]
    boxes = torch.cat([random_boxes(12, 240, generator) - 10, odd])
    image_indices = torch.randint(0, 2, (len(boxes),), generator=generator)
    found = roi_align(features, boxes, image_indices, 4, 1 / 16, sampling_ratio)
    expected = align_by_loop(features, boxes, image_indices, 4, 1 / 16, sampling_ratio)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_operators_are_those_of_torchvision(monkeypatch):
    if region_operators.torchvision_operators() is None:
        pytest.skip("torchvision's operators do not load here")
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 4, 20, 30, generator=generator)
    boxes = random_boxes(60, 300, generator)
    scores = torch.rand(60, generator=generator)
    image_indices = torch.randint(0, 2, (60,), generator=generator)
    regions = features, boxes, image_indices, 7, 1 / 16
    compiled = non_maximum_suppression(boxes, scores, 0.4), roi_pool(*regions), roi_align(*regions)
    monkeypatch.setattr(region_operators, "torchvision_operators", lambda: None)
    plain = non_maximum_suppression(boxes, scores, 0.4), roi_pool(*regions), roi_align(*regions)
    for ours, theirs in zip(plain, compiled, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_torchvision_is_given(monkeypatch):
    operators = Mock()
    monkeypatch.setattr(region_operators, "torchvision_operators", lambda: operators)
    features, boxes, scores = torch.zeros(2, 3, 4, 5), torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), torch.zeros(2)
    image_indices = torch.tensor([1, 0])
    with_images = [[1, 1, 2, 3, 4], [0, 5, 6, 7, 8]]
    assert non_maximum_suppression(boxes, scores, 0.3) is operators.nms.return_value
    operators.nms.assert_called_once_with(boxes, scores, 0.3)
    operators.roi_pool.return_value = torch.full((2, 3, 7, 7), 2.5)
    for dtype in (torch.float32, torch.bfloat16):
        pooled = roi_pool(features.to(dtype), boxes, image_indices, 7, 0.5)
        assert pooled.dtype == dtype and (pooled == 2.5).all()
        given = operators.roi_pool.call_args.args
        assert given[0].dtype == given[1].dtype == torch.float32
        assert torch.equal(given[0], features) and given[1].tolist() == with_images and given[2:] == (7, 0.5)
    assert roi_align(features, boxes, image_indices, 7, 0.5, 2) is operators.roi_align.return_value
    given = operators.roi_align.call_args
    assert given.args[1].tolist() == with_images and given.args[2:] == (7, 0.5, 2) and given.kwargs == {"aligned": True}


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_where_torchvision_does_not_load(error, monkeypatch):
    def fail(name):
        raise error(f"{name} was built for another PyTorch")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert region_operators.torchvision_operators.__wrapped__() is None
