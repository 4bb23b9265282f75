"""From pictures to records, with tiny random detectors and backbones."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling
from transformers import BertConfig, ResNetBackbone, ResNetConfig, YolosConfig, YolosForObjectDetection
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from pictures import UNREADABLE, open_picture, upright
from processing import FasterRCNNConfig, FasterRCNNForRegionFeatures, FasterRCNNImageProcessor
from processing.region_extractors import (
    BackboneFeatures,
    BottomUpExtractor,
    DetectorExtractor,
    WindowExtractor,
    load_region_extractor,
    read_pictures,
)
from processing.region_formats import check_record

SIDE = 64


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = ((60, 80), (90, 40), (70, 70))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def features() -> BackboneFeatures:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    return BackboneFeatures(
        ResNetBackbone(config).eval(), ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_normalize=False)
    )


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 64],
        patch_size=16,
        num_detection_tokens=20,
        num_labels=5,
    )
    model = YolosForObjectDetection(config).eval()
    torch.nn.init.normal_(model.vit.embeddings.detection_tokens)  # which find the same box otherwise
    return model, YolosImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 64}, do_pad=True)


def make_bottom_up(**limits) -> BottomUpExtractor:
    torch.manual_seed(0)
    config = FasterRCNNConfig(
        depth=50, stem_channels=4, res2_channels=8, width_per_group=2, rpn_channels=4, num_classes=7, num_attributes=3
    )
    model = FasterRCNNForRegionFeatures(config).eval()
    return BottomUpExtractor(model, FasterRCNNImageProcessor(shortest_edge=96, longest_edge=128), **limits)


def check_records(records, pictures, width):
    for number, (record, picture) in enumerate(zip(records, pictures, strict=True)):
        check_record({"image_id": str(number), **record})
        assert (record["width"], record["height"]) == picture.size
        assert record["features"].shape == (len(record["boxes"]), width) and record["features"].dtype == np.float16
        if "class_scores" in record:
            assert (np.diff(record["class_scores"]) <= 0).all()


def test_bottom_up_attention(pictures):
    extractor = make_bottom_up(min_regions=3, max_regions=5)
    records = extractor(pictures)
    check_records(records, pictures, extractor.region_feature_size)
    assert all(3 <= len(record["boxes"]) <= 5 and "class_probs" not in record for record in records)
    assert {"attribute_ids", "attribute_scores"} <= records[0].keys()
    (record,) = make_bottom_up(class_probs=True)(pictures[:1])
    assert record["class_probs"].shape[1] == 8 and record["class_probs"].dtype == np.float16


def test_damaged_exif_is_passed_over(pictures, tmp_path):
    pictures[0].save(tmp_path / "exif.jpg", exif=b"Exif\x00\x00garbage-not-tiff")
    expected = FasterRCNNImageProcessor()(Image.fromarray(np.asarray(Image.open(tmp_path / "exif.jpg"))))
    for picture in (*read_pictures([tmp_path / "exif.jpg"]), upright(Image.open(tmp_path / "exif.jpg"))):
        assert torch.equal(FasterRCNNImageProcessor()(picture)["pixel_values"], expected["pixel_values"])


def test_a_damaged_png_is_unreadable(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(200, 200, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    data = file.getvalue()
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    (tmp_path / "damaged.png").write_bytes(data[:second] + b"\x00\x01\x02\x03" + data[second + 4 :])
    with pytest.raises(UNREADABLE):
        open_picture(str(tmp_path), "damaged")
    for read in (FasterRCNNImageProcessor(), lambda path: read_pictures([path])):
        with pytest.raises(ValueError, match=r"images\[0\]: expected a picture"):
            read(str(tmp_path / "damaged.png"))


def test_a_box_is_a_region_once(pictures, detector, features):
    """As of detectors that score each class of a query by itself, such as RT-DETR."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 20, 20], [0, 0, 10, 10], [5, 5, 20, 20]])
    detection = {"boxes": boxes, "scores": torch.tensor([0.5, 0.9, 0.6, 0.7, 0.8]), "labels": torch.arange(5)}
    extractor = DetectorExtractor(*detector, features, min_regions=4, max_regions=6, min_score=0.2)
    record = extractor._select(detection, pictures[0])
    assert record["class_ids"].tolist() == [1, 4] and record["boxes"].tolist() == boxes[[1, 4]].tolist()


def test_any_detector_with_any_backbone(pictures, detector, features):
    extractor = DetectorExtractor(*detector, features, min_regions=4, max_regions=6, min_score=0.99)
    records = extractor(pictures)
    check_records(records, pictures, 8)
    assert [len(record["boxes"]) for record in records] == [4, 4, 4]
    many = DetectorExtractor(*detector, features, min_regions=4, max_regions=6, min_score=0.0)(pictures)
    assert [len(record["boxes"]) for record in many] == [6, 6, 6]
    np.testing.assert_array_equal(many[1]["boxes"][:4], records[1]["boxes"])
    # The boxes are those that Transformers itself gives.
    model, processor = detector
    with torch.inference_mode():
        outputs = model(**processor(pictures, return_tensors="pt"))
    sizes = [(picture.height, picture.width) for picture in pictures]
    for record, expected in zip(many, processor.post_process_object_detection(outputs, 0.0, sizes), strict=True):
        best = expected["scores"].argsort(descending=True, stable=True)[:6]
        np.testing.assert_allclose(record["class_scores"], expected["scores"][best], rtol=1e-5)
        assert record["class_ids"].tolist() == expected["labels"][best].tolist()
        limits = np.array([record["width"], record["height"]] * 2)
        np.testing.assert_allclose(record["boxes"], expected["boxes"][best].numpy().clip(0, limits), atol=1e-3)


def test_an_image_processor_that_crops(pictures, features):
    """That of ResNet and ConvNeXt, which resizes the shortest edge alone."""
    processor = ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=0.875, resample=Resampling.BILINEAR)
    processor.do_normalize = False
    cropping = BackboneFeatures(features.backbone, processor)
    boxes = [torch.tensor([[0.0, 0, *picture.size], [5, 10, 25, 30]]) for picture in pictures]
    for given, expected in zip(cropping.of_boxes(pictures, boxes), features.of_boxes(pictures, boxes), strict=True):
        torch.testing.assert_close(given, expected)


def test_windows(pictures, features):
    records = WindowExtractor(features, grids=(1, 2))(pictures)
    check_records(records, pictures, 8)
    assert records[0]["boxes"].tolist() == [
        [0, 0, 80, 60],
        *([0, 0, 40, 30], [40, 0, 80, 30], [0, 30, 40, 60], [40, 30, 80, 60]),
    ]
    assert "class_ids" not in records[0]


def test_features_are_of_what_is_in_the_box(features):
    """A picture whose left half is one colour and whose right half another, and both alone."""
    left, right = (10, 200, 30), (220, 40, 160)
    halves = Image.new("RGB", (200, 100), left)
    halves.paste(right, (100, 0, 200, 100))
    inner = torch.tensor([[30.0, 30, 60, 70], [140, 30, 170, 70]])
    plain = torch.tensor([[40.0, 20, 160, 80]])
    with torch.inference_mode():
        found, of_left, of_right = features.of_boxes(
            [halves, Image.new("RGB", (200, 100), left), Image.new("RGB", (200, 100), right)], [inner, plain, plain]
        )
    # Not the same to the digit: the backbone sees further than the box.
    distances = torch.cdist(found, torch.cat([of_left, of_right]))
    assert distances[0, 0] < 0.2 * distances[0, 1] and distances[1, 1] < 0.2 * distances[1, 0]


def test_one_by_one_and_in_a_batch(pictures, detector, features):
    for extractor in (WindowExtractor(features), DetectorExtractor(*detector, features)):
        for batched, picture in zip(extractor(pictures[:1] * 2), pictures[:1] * 2, strict=True):
            (alone,) = extractor([picture])
            for name, value in alone.items():
                np.testing.assert_allclose(batched[name], value, atol=2e-3)


def test_bad_arguments(detector, features):
    with pytest.raises(ValueError, match="0 <= `min_regions` <= `max_regions`, got 7 and 6"):
        DetectorExtractor(*detector, features, min_regions=7, max_regions=6)
    with pytest.raises(ValueError, match="`grids` must be numbers of at least 1"):
        WindowExtractor(features, grids=())


def test_what_is_no_backbone(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected one of Transformers' backbones, got a BertConfig"):
        load_region_extractor("windows", backbone=str(tmp_path))


@pytest.mark.parametrize("part", ["detector", "backbone"])
def test_no_code_of_a_repository_is_run(part, features, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "backbone").mkdir()
    features.backbone.save_pretrained(tmp_path / "backbone")
    features.image_processor.save_pretrained(tmp_path / "backbone")
    config = {"model_type": "unknown", "auto_map": {"AutoConfig": "configuration_unknown.UnknownConfig"}}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "foreign" / "configuration_unknown.py").write_text(f"open({str(ran)!r}, 'w')")
    names = {"detector": "windows", "backbone": str(tmp_path / "backbone")} | {part: str(tmp_path / "foreign")}
    with pytest.raises(ValueError, match="custom code|trust_remote_code"):
        load_region_extractor(names["detector"], backbone=names["backbone"])
    assert not ran.exists()


def test_a_picture_of_a_single_row():
    (record,) = make_bottom_up(min_regions=1)([Image.new("RGB", (900, 1), "red")])
    assert (record["width"], record["height"]) == (900, 1) and len(record["boxes"]) >= 1
    check_record({"image_id": "a", **record})
