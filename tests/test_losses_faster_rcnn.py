"""The losses of the region detector: by hand, against plain loops over all anchors and proposals, and in training."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from processing import FasterRCNNConfig, FasterRCNNForRegionFeatures, modeling_faster_rcnn
from processing.losses_faster_rcnn import (
    BACKGROUND,
    IGNORED,
    attribute_loss,
    box_loss,
    class_loss,
    encode_boxes,
    match_boxes,
    objectness_loss,
    proposal_box_loss,
    read_labels,
    sample_matches,
)
from processing.modeling_faster_rcnn import apply_deltas
from processing.region_operators import roi_pool

LN2, LN3 = math.log(2), math.log(3)
PARTS = ("objectness_loss", "proposal_box_loss", "class_loss", "box_loss")


def tiny_config(**values) -> FasterRCNNConfig:
    tiny = {
        "depth": 50,
        "stem_channels": 8,
        "res2_channels": 8,
        "width_per_group": 4,
        "stride_in_1x1": False,
        "caffe_max_pool": False,
        "res5_halves": True,
        "rpn_channels": 16,
        "anchor_sizes": (24.0, 48.0),
        "anchor_aspect_ratios": (1.0, 2.0),
        "anchor_offset": 0.5,
        "post_nms_top_k": 20,
        "pooler_size": 4,
        "num_classes": 3,
        "num_attributes": 0,
        "min_regions": 0,
        "max_regions": 10,
        "min_score": 0.5,
    }
    return FasterRCNNConfig(**(tiny | values))


# ---------------------------------------------------------------- matches and samples


def test_encoding_by_hand():
    reference, box = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[-4.0, 4, 16, 24]])
    # The centre goes from (5, 10) to (6, 14): 0.1 widths and 0.2 heights. It is twice as wide and as high as before.
    expected = torch.tensor([[0.1 * 10, 0.2 * 10, LN2 * 5, 0]])
    torch.testing.assert_close(encode_boxes(box, reference, (10, 10, 5, 5)), expected)


def test_encoding_is_the_inverse_of_moving():
    corners = torch.rand(2, 50, 2) * 100
    boxes, references = torch.cat([corners, corners + 1 + torch.rand(2, 50, 2) * 60], dim=2)
    for weights in ((1.0, 1.0, 1.0, 1.0), (10.0, 20.0, 5.0, 4.0)):
        deltas = encode_boxes(boxes, references, weights)
        torch.testing.assert_close(apply_deltas(deltas[:, None], references, weights)[:, 0], boxes, atol=1e-3, rtol=0)


TRUE_BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [200, 200, 210, 210]])
BOXES = torch.tensor(
    [
        [0.0, 0, 10, 10],  # the first true box
        [0, 0, 10, 8],  # 80 % of it
        [0, 0, 10, 5],  # 50 %
        [0, 0, 10, 2],  # 20 %
        [25, 0, 35, 10],  # 50 of 150 pixels together with the second one, which no other overlaps more
        [100, 100, 110, 110],  # none
    ]
)


@pytest.mark.parametrize(
    "foreground, background, match_best, expected",
    [
        (0.7, 0.3, False, [0, 0, IGNORED, BACKGROUND, IGNORED, BACKGROUND]),
        # Nothing overlaps the third true box: not everything is "best" for it.
        (0.7, 0.3, True, [0, 0, IGNORED, BACKGROUND, 1, BACKGROUND]),
        (0.5, 0.5, False, [0, 0, 0, BACKGROUND, BACKGROUND, BACKGROUND]),
    ],
)
def test_matches_by_hand(foreground, background, match_best, expected):
    assert match_boxes(BOXES, TRUE_BOXES, foreground, background, match_best).tolist() == expected


def test_without_true_boxes_all_is_background():
    assert match_boxes(BOXES, torch.zeros(0, 4), 0.7, 0.3, match_best=True).tolist() == [BACKGROUND] * 6


def test_samples():
    matches = torch.tensor([0] * 10 + [BACKGROUND] * 20 + [IGNORED] * 5)
    for num_samples, share, num_foreground, num_background in (
        (16, 0.5, 8, 8),
        (8, 0.25, 2, 6),
        (24, 0.5, 10, 14),  # fewer are matched than there could be
        (64, 0.5, 10, 20),
    ):
        sampled = sample_matches(matches, num_samples, share)
        assert len(set(sampled.tolist())) == len(sampled)
        assert matches[sampled].tolist() == [0] * num_foreground + [BACKGROUND] * num_background
    draws = [sample_matches(matches, 8, 0.25).tolist() for _ in range(200)]
    assert set().union(*draws) == set(range(30))


# ---------------------------------------------------------------- losses by hand


def test_objectness_by_hand():
    # Probabilities 1/2, 3/4 and 3/4, of which the last should be none.
    loss = objectness_loss(torch.tensor([0, LN3, LN3]), torch.tensor([2, 0, BACKGROUND]))
    assert loss.item() == pytest.approx((LN2 - math.log(3 / 4) - math.log(1 / 4)) / 3)


def test_boxes_of_anchors_by_hand():
    anchors, boxes = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[-4.0, 4, 16, 24]])
    deltas = torch.tensor([[0.1 + 0.05, 0.2, LN2 - 0.5, 0]])
    # Below 1/9: 9 x² / 2. Above: x - 1/18.
    expected = 9 * 0.05**2 / 2 + 0.5 - 1 / 18
    loss = proposal_box_loss(deltas, anchors, boxes, (1, 1, 1, 1), num_samples=4)
    assert loss.item() == pytest.approx(expected / 4)
    # Deltas are learned in the weights that they are applied with.
    loss = proposal_box_loss(deltas * 2, anchors, boxes, (2, 2, 2, 2), num_samples=4)
    assert loss.item() == pytest.approx((9 * 0.1**2 / 2 + 1 - 1 / 18) / 4)


def test_classes_by_hand():
    # Probabilities of the right ones: 3/5 and, of the background, 1/4.
    logits = torch.tensor([[LN3, 0, 0], [LN2, 0, 0]])
    loss = class_loss(logits, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(-(math.log(3 / 5) + math.log(1 / 4)) / 2)


def test_boxes_of_proposals_by_hand():
    proposals, boxes = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[-4.0, 4, 16, 24]])
    right = torch.tensor([1.0, 2.0, 5 * LN2, 0])
    # Up to 1: x² / 2. Above: x - 1/2.
    deltas = right + torch.tensor([0.5, 3, 0, 0])
    expected = 0.5**2 / 2 + 3 - 0.5
    weights = (10, 10, 5, 5)
    loss = box_loss(deltas[None, None], torch.tensor([1]), proposals, boxes, weights, num_samples=5)
    assert loss.item() == pytest.approx(expected / 5)
    # Of several classes, the deltas of the others do not count.
    of_classes = torch.stack([right + 100, deltas, right - 100])[None]
    loss = box_loss(of_classes, torch.tensor([1]), proposals, boxes, weights, num_samples=5)
    assert loss.item() == pytest.approx(expected / 5)


def test_attributes_by_hand():
    logits = torch.tensor([[LN3, 0, 0], [7.0, 8, 9], [LN2, 0, 0]])
    loss = attribute_loss(logits, torch.tensor([0, -1, 1]))
    assert loss.item() == pytest.approx(-(math.log(3 / 5) + math.log(1 / 4)) / 2)


def test_losses_of_nothing():
    """They are 0, and have gradients: a process whose images have no objects takes part in a step."""
    nothing = {
        "logits": torch.zeros(0, 3, requires_grad=True),
        "deltas": torch.zeros(0, 3, 4, requires_grad=True),
        "boxes": torch.zeros(0, 4),
        "ids": torch.zeros(0, dtype=torch.long),
    }
    logits, deltas, boxes, ids = nothing.values()
    unlabelled = torch.zeros(2, 3, requires_grad=True)
    for loss in (
        objectness_loss(logits[:, 0], ids),
        proposal_box_loss(deltas[:, 0], boxes, boxes, (1, 1, 1, 1), 0),
        class_loss(logits, ids),
        box_loss(deltas, ids, boxes, boxes, (1, 1, 1, 1), 0),
        attribute_loss(logits, ids),
        attribute_loss(unlabelled, torch.tensor([-1, -1])),
    ):
        assert loss.item() == 0
        loss.backward()


# ---------------------------------------------------------------- all of it


def iou(a: list[float], b: list[float]) -> float:
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def smooth_l1(found: list[float], box: list[float], reference: list[float], weights, beta: float) -> float:
    expected = [
        ((box[i] + box[i + 2]) - (reference[i] + reference[i + 2])) / 2 / (reference[i + 2] - reference[i])
        for i in (0, 1)
    ]
    expected += [math.log((box[i + 2] - box[i]) / (reference[i + 2] - reference[i])) for i in (0, 1)]
    total = 0.0
    for value, target, weight in zip(found, expected, weights, strict=True):
        difference = abs(value - target * weight)
        total += difference**2 / 2 / beta if difference < beta else difference - beta / 2
    return total


LABELS = [
    {"boxes": [[10.0, 10, 40, 40], [12, 30, 60, 50], [70, 4, 96, 60]], "class_ids": [2, 0, 1]},
    {"boxes": [[4.0, 6, 30, 20]], "class_ids": [1], "more": "is ignored"},
]
# The second picture is smaller than the batch, and was twice as large.
IMAGE_SIZES = torch.tensor([[64, 96], [48, 64]])
ORIGINAL_SIZES = torch.tensor([[64, 96], [96, 128]])


@pytest.fixture
def pixel_values() -> torch.Tensor:
    pixel_values = torch.randn(2, 3, 64, 96) * 0.1
    pixel_values[1, :, 48:] = pixel_values[1, :, :, 64:] = 0
    return pixel_values


def moved(config: FasterRCNNConfig) -> FasterRCNNForRegionFeatures:
    """A detector of which no two outputs are alike."""
    detector = FasterRCNNForRegionFeatures(config)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return detector.eval()


@pytest.mark.parametrize("class_agnostic_boxes", [False, True])
@torch.no_grad()
def test_against_loops_over_everything(monkeypatch, pixel_values, class_agnostic_boxes):
    # Everything is sampled, so that nothing is left to chance.
    for name, value in (("NUM_SAMPLED_ANCHORS", 10**6), ("FOREGROUND_ANCHORS", 1), ("FOREGROUND_PROPOSALS", 1)):
        monkeypatch.setattr(modeling_faster_rcnn, name, value)
    config = tiny_config(num_sampled_proposals=10**6, class_agnostic_boxes=class_agnostic_boxes)
    detector = moved(config)
    generator, heads = detector.proposal_generator, detector.roi_heads
    outputs = detector(
        *(pixel_values, IMAGE_SIZES, ORIGINAL_SIZES),
        labels=LABELS,
        output_feature_map=True,
        output_proposals=True,
    )
    assert outputs.regions is None
    assert outputs.loss.item() == pytest.approx(sum(outputs[name].item() for name in PARTS))
    assert "attribute_loss" not in outputs

    anchors = generator.anchor_generator(outputs.feature_map).tolist()
    logits, deltas = (values.tolist() for values in generator.rpn_head(outputs.feature_map))
    sums, num_anchors, num_proposals = dict.fromkeys(PARTS, 0.0), 0, 0
    for number, record in enumerate(LABELS):
        scale = 1 if number == 0 else 0.5
        true_boxes = [[scale * value for value in box] for box in record["boxes"]]
        height, width = IMAGE_SIZES[number].tolist()
        on_image = [
            i for i, box in enumerate(anchors) if (box[0] + box[2]) / 2 < width and (box[1] + box[3]) / 2 < height
        ]
        assert len(on_image) == (len(anchors) if number == 0 else len(anchors) // 2)
        overlaps = {i: [iou(anchors[i], box) for box in true_boxes] for i in on_image}
        best_of_true = [max(overlaps[i][j] for i in on_image) for j in range(len(true_boxes))]
        for i in on_image:
            best = max(overlaps[i])
            is_best = any(a == b for a, b in zip(overlaps[i], best_of_true, strict=True))
            if 0.3 <= best < 0.7 and not is_best:
                continue
            num_anchors += 1
            is_object = best >= 0.7 or is_best
            probability = 1 / (1 + math.exp(-logits[number][i]))
            sums["objectness_loss"] -= math.log(probability if is_object else 1 - probability)
            if is_object:
                box = true_boxes[overlaps[i].index(best)]
                sums["proposal_box_loss"] += smooth_l1(deltas[number][i], box, anchors[i], (1, 1, 1, 1), 1 / 9)

        proposals = [*outputs.proposals[number].tolist(), *true_boxes]
        pooled = roi_pool(
            outputs.feature_map[[number]], torch.tensor(proposals), torch.zeros(len(proposals)).long(), 4, 1 / 16
        )
        features = heads.res5(pooled).mean(dim=(2, 3))
        class_logits, box_deltas = heads.box_predictor(features)
        for proposal, row_logits, row_deltas in zip(proposals, class_logits, box_deltas, strict=True):
            num_proposals += 1
            of_proposal = [iou(proposal, box) for box in true_boxes]
            match = of_proposal.index(max(of_proposal)) if max(of_proposal) >= 0.5 else None
            class_id = 3 if match is None else record["class_ids"][match]
            sums["class_loss"] -= row_logits.log_softmax(dim=0)[class_id].item()
            if match is not None:
                own = row_deltas[0 if class_agnostic_boxes else class_id].tolist()
                sums["box_loss"] += smooth_l1(own, true_boxes[match], proposal, (10, 10, 5, 5), 1)
    counts = {"objectness_loss": num_anchors, "proposal_box_loss": num_anchors}
    for name in PARTS:
        expected = sums[name] / counts.get(name, num_proposals)
        assert outputs[name].item() == pytest.approx(expected, rel=1e-3), name
        assert expected > 0


def test_attributes_depend_on_the_true_class(pixel_values):
    detector = moved(tiny_config(num_attributes=4)).train()
    with torch.no_grad():
        detector.roi_heads.box_predictor.fc_attr.bias.fill_(1)  # so that units are active
    labels = [dict(record, attribute_ids=[1, -1, 3][: len(record["boxes"])]) for record in LABELS]
    sizes = (IMAGE_SIZES, ORIGINAL_SIZES)

    def measure(labels) -> torch.Tensor:
        torch.manual_seed(0)
        return detector(pixel_values, *sizes, labels=labels)

    outputs = measure(labels)
    assert outputs.loss.item() == pytest.approx(sum(outputs[n].item() for n in (*PARTS, "attribute_loss")))
    outputs.loss.backward()
    # True boxes with an attribute are of the classes 2 and 1; another class, and the background (3), have no part.
    gradients = detector.roi_heads.box_predictor.cls_embedding.weight.grad.abs().sum(dim=1)
    assert (gradients > 0).tolist() == [False, True, True, False]
    # What is no attribute is not learned.
    nothing = measure([dict(record, attribute_ids=[-1] * len(record["boxes"])) for record in LABELS])
    assert nothing.attribute_loss.item() == 0
    assert "attribute_loss" not in measure(LABELS)


def test_pictures_without_objects(pixel_values):
    detector = FasterRCNNForRegionFeatures(tiny_config()).train()
    nothing = {"boxes": torch.zeros(0, 4), "class_ids": torch.zeros(0, dtype=torch.long)}
    outputs = detector(pixel_values, IMAGE_SIZES, ORIGINAL_SIZES, labels=[nothing, {"boxes": [], "class_ids": []}])
    outputs.loss.backward()
    assert outputs.proposal_box_loss.item() == outputs.box_loss.item() == 0
    assert outputs.objectness_loss.item() > 0 and outputs.class_loss.item() > 0
    assert all(parameter.grad is not None for parameter in detector.parameters())
    # Beside one with objects.
    outputs = detector(pixel_values, IMAGE_SIZES, ORIGINAL_SIZES, labels=[nothing, LABELS[1]])
    assert outputs.proposal_box_loss.item() > 0


def test_a_picture_is_learned():
    torch.manual_seed(0)
    picture = torch.zeros(1, 3, 96, 128)
    boxes = torch.tensor([[10.0, 12, 34, 36], [60, 30, 110, 80]])
    for (x1, y1, x2, y2), colour in zip(boxes.int().tolist(), ((80, -60, 10), (-70, 90, 40)), strict=True):
        picture[0, :, y1:y2, x1:x2] = torch.tensor(colour, dtype=torch.float32)[:, None, None]
    inputs = {"pixel_values": picture, "original_sizes": torch.tensor([[192, 256]])}
    labels = [{"boxes": boxes * 2, "class_ids": torch.tensor([2, 0])}]
    detector = FasterRCNNForRegionFeatures(tiny_config(class_agnostic_boxes=True)).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1, end_factor=0.01, total_iters=90)
    losses = []
    for _ in range(90):
        loss = detector(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5]), losses
    detector.eval()
    with torch.inference_mode():
        regions = detector(**inputs, min_regions=2, max_regions=2).regions
    found = dict(zip(regions[0]["class_ids"].tolist(), regions[0]["boxes"].tolist(), strict=True))
    assert found.keys() == {0, 2}
    assert iou(found[2], [20, 24, 68, 72]) > 0.5 and iou(found[0], [120, 60, 220, 160]) > 0.5
    # What is found has the form of labels.
    with torch.inference_mode():
        assert detector(**inputs, labels=regions).loss.item() < 0.5


@pytest.mark.parametrize(
    "labels, message",
    [
        ([], r"`labels`: expected a record for each of 2 images, got 0"),
        ([LABELS[0]], r"expected a record for each of 2 images, got 1"),
        ([LABELS[0], {"boxes": []}], r"labels\[1\]: expected `boxes` and `class_ids`, got \['boxes'\]"),
        (
            [LABELS[0], {"boxes": [[1, 2, 3]], "class_ids": [0]}],
            r"labels\[1\]\['boxes'\]: expected shape .n, 4., got .1, 3.",
        ),
        (
            [LABELS[0], {"boxes": [[1, 2, 3, 4], [0, 0, 130, 9]], "class_ids": [0, 0]}],
            r"labels\[1\]\['boxes'\]: expected .* image 128 wide and 96 high, got \[0.0, 0.0, 130.0, 9.0\]",
        ),
        (
            [LABELS[0], {"boxes": [[1, 2, math.nan, 4]], "class_ids": [0]}],
            r"labels\[1\]\['boxes'\]: .*got \[1.0, 2.0, nan",
        ),
        (
            [{"boxes": [[5, 2, 5, 4]], "class_ids": [0]}, LABELS[1]],
            r"labels\[0\]\['boxes'\]: expected x1 < x2 and y1 < y2 within the image, got \[5.0, 2.0, 5.0, 4.0\]",
        ),
        (
            [LABELS[0], {"boxes": [[1, 2, 3, 4]], "class_ids": [3]}],
            r"labels\[1\]\['class_ids'\]: expected integers from 0 to 2, got 3",
        ),
        (
            [LABELS[0], {"boxes": [[1, 2, 3, 4]], "class_ids": [-1]}],
            r"\['class_ids'\]: expected integers from 0 to 2, got -1",
        ),
        (
            [LABELS[0], {"boxes": [[1, 2, 3, 4]], "class_ids": [0, 1]}],
            r"labels\[1\]\['class_ids'\]: expected one for each of 1 boxes, got 2",
        ),
        (
            [LABELS[0], {"boxes": [[1, 2, 3, 4]], "class_ids": [0], "attribute_ids": [4]}],
            r"labels\[1\]\['attribute_ids'\]: expected integers from -1 to 3, got 4",
        ),
    ],
)
def test_bad_labels(labels, message, pixel_values):
    detector = FasterRCNNForRegionFeatures(tiny_config(num_attributes=4))
    with pytest.raises(ValueError, match=message):
        detector(pixel_values, IMAGE_SIZES, ORIGINAL_SIZES, labels=labels)


def test_boxes_a_pixel_outside_are_cut():
    labels = [{"boxes": [[-1.0, 2, 97, 64.5]], "class_ids": [0]}, LABELS[1]]
    first, second = read_labels(labels, IMAGE_SIZES, ORIGINAL_SIZES, 3, 0)
    assert first["boxes"].tolist() == [[0, 2, 96, 64]]
    assert second["boxes"].tolist() == [[2, 3, 15, 10]]  # in pixels of the resized picture


# ---------------------------------------------------------------- what training needs


def test_pooling_with_gradients():
    features = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor(
        [[0.0, 0, 30, 20], [3, 3, 3, 3], [-20, -20, 90, 70], [50, 30, 55, 39], [80, 60, 90, 70]]
    )  # a cell is 10 pixels; the last one is outside
    images = torch.tensor([0, 1, 1, 0, 1])
    arguments = (boxes, images, 3, 0.1)
    pooled = roi_pool(features, *arguments)
    with torch.no_grad():
        assert torch.equal(pooled, roi_pool(features, *arguments))
    assert (pooled[4] == 0).all() and (pooled < 0).any()
    assert torch.autograd.gradcheck(lambda values: roi_pool(values, *arguments), features)


def test_pooling_gradients_by_hand():
    features = torch.tensor([[[[1.0, 5, 2], [4, 3, -1]]]], requires_grad=True)
    # The left bin has the columns 0 and 1, the right one 1 and 2; both rows are in one bin each.
    roi_pool(features, torch.tensor([[0.0, 0, 2, 1]]), torch.tensor([0]), 2, 1.0).sum().backward()
    assert features.grad.tolist() == [[[[0, 2, 0], [1, 1, 0]]]]


def test_regions_are_the_same_where_gradients_are_recorded(pixel_values):
    detector = moved(tiny_config())
    recorded = detector(pixel_values, min_regions=10).regions
    with torch.inference_mode():
        expected = detector(pixel_values, min_regions=10).regions
    for record, expected_record in zip(recorded, expected, strict=True):
        assert record["features"].requires_grad and len(record["features"]) > 1
        for name in ("features", "boxes", "class_scores"):
            torch.testing.assert_close(record[name], expected_record[name], atol=1e-4, rtol=1e-4)


def test_initial_weights():
    torch.manual_seed(0)
    detector = FasterRCNNForRegionFeatures(tiny_config(res2_channels=64, rpn_channels=64, num_classes=50))
    stem = detector.backbone.stem.conv1
    assert stem.weight.std().item() == pytest.approx(math.sqrt(2 / (7 * 7 * 8)), rel=0.05)
    head, predictor = detector.proposal_generator.rpn_head, detector.roi_heads.box_predictor
    for module, expected in (
        (head.conv, 0.01),
        (head.objectness_logits, 0.01),
        (head.anchor_deltas, 0.01),
        (predictor.cls_score, 0.01),
        (predictor.bbox_pred, 0.001),
    ):
        assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert (module.bias == 0).all()


def test_weights_that_a_checkpoint_lacks_are_new(tmp_path):
    detector = moved(tiny_config())
    detector.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    anchors = weights.pop("proposal_generator.anchor_generator.cell_anchors.0")
    del weights["roi_heads.box_predictor.bbox_pred.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = FasterRCNNForRegionFeatures.from_pretrained(tmp_path)
    assert torch.equal(loaded.proposal_generator.anchor_generator.cell_anchors.get_buffer("0"), anchors)
    assert loaded.roi_heads.box_predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.3)
    for name, weight in weights.items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    source = Path(modeling_faster_rcnn.__file__).with_name("losses_faster_rcnn.py")
    assert (tmp_path / source.name).read_bytes() == source.read_bytes()
