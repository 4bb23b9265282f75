"""
The region detector: `fixtures/parity/detector` holds a narrow model in the published checkpoint's format with what its
port computes.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file

from processing import (
    FasterRCNNConfig,
    FasterRCNNForRegionFeatures,
    FasterRCNNImageProcessor,
    InterBERTProcessor,
    modeling_faster_rcnn,
)
from processing.modeling_faster_rcnn import apply_deltas, clip_boxes

PARITY = Path(__file__).parent / "fixtures" / "parity" / "detector"
# The whole recording, of two images, is too large for the repository.
SHARED_PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity" / "detector"
ALL_RECORDED = Path(os.environ.get("INTERBERT_DETECTOR_PARITY", SHARED_PARITY)) / "io.safetensors"
PROCESSING = Path(__file__).resolve().parent.parent / "processing"
NAMES = {  # of the expected values: ours, and how far they may be off
    "boxes": ("boxes", 1e-2),
    "obj_ids": ("class_ids", 0),
    "obj_probs": ("class_scores", 1e-4),
    "attr_ids": ("attribute_ids", 0),
    "attr_probs": ("attribute_scores", 1e-4),
    "roi_features": ("features", 1e-4),
}


@pytest.fixture(scope="module")
def detector() -> FasterRCNNForRegionFeatures:
    return FasterRCNNForRegionFeatures.from_original(PARITY)


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    """One of the recorded images, with what the port computes."""
    recorded = load_file(PARITY / "io.safetensors")
    image = recorded.pop("image")  # without the padding that it was recorded with
    height, width = recorded.pop("canvas_size").tolist()
    padding = (0, width - image.shape[2], 0, height - image.shape[1])
    return recorded | {"images": torch.nn.functional.pad(image, padding)[None]}


@torch.inference_mode()
def detect(detector, recorded, images=slice(None), **options):
    sizes = recorded["image_shapes"]
    return detector(
        recorded["images"][images],
        sizes[images],
        (sizes * recorded["scales_yx"]).round().long()[images],
        **options,
    )


def check_regions(record: dict, recorded: dict, image: int):
    for name, (ours, tolerance) in NAMES.items():
        torch.testing.assert_close(record[ours], recorded[f"expected.{image}.{name}"], atol=tolerance, rtol=0)


def check_outputs(outputs, recorded: dict, numbers: list[int]):
    """What is computed of some of the recorded images."""
    expected = recorded["expected.res4"][numbers]
    assert (outputs.feature_map - expected).abs().max() < 1e-4 * expected.abs().max()
    assert len(outputs.regions) == len(numbers)
    for place, number in enumerate(numbers):
        torch.testing.assert_close(
            outputs.proposals[place], recorded[f"expected.{number}.proposals"], atol=1e-2, rtol=0
        )
        torch.testing.assert_close(
            outputs.proposal_logits[place], recorded[f"expected.{number}.proposal_logits"], atol=1e-4, rtol=1e-4
        )
        check_regions(outputs.regions[place], recorded, number)


EVERYTHING = {"output_feature_map": True, "output_proposals": True}


@pytest.mark.parametrize("numbers", [[0], [0, 0]], ids=["alone", "twice"])
def test_parity(detector, recorded, numbers):
    check_outputs(detect(detector, recorded, numbers, **EVERYTHING), recorded, numbers)


@pytest.mark.skipif(not ALL_RECORDED.is_file(), reason="INTERBERT_DETECTOR_PARITY names no folder with all images")
@pytest.mark.parametrize("numbers", [[0, 1], [0], [1]], ids=["batch", "first", "second"])
def test_parity_of_all_recorded_images(detector, numbers):
    recorded = load_file(ALL_RECORDED)
    check_outputs(detect(detector, recorded, numbers, **EVERYTHING), recorded, numbers)


@pytest.mark.parametrize("upper_case_yaml", [False, True])
def test_saved_as_safetensors_it_is_the_same(detector, recorded, upper_case_yaml, tmp_path):
    folder = PARITY
    if upper_case_yaml:  # as the published checkpoint has it
        folder = tmp_path / "original"
        folder.mkdir()
        shutil.copy(PARITY / "pytorch_model.bin", folder)

        def upper(values):
            return (
                {name.upper(): upper(value) for name, value in values.items()} if isinstance(values, dict) else values
            )

        (folder / "config.yaml").write_text(yaml.safe_dump(upper(json.loads((PARITY / "config.json").read_text()))))
    FasterRCNNForRegionFeatures.from_original(folder).save_pretrained(tmp_path / "saved")
    model, info = FasterRCNNForRegionFeatures.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for number, record in enumerate(detect(model, recorded).regions):
        check_regions(record, recorded, number)


def test_it_opens_without_the_package(detector, recorded, tmp_path):
    detector.save_pretrained(tmp_path / "saved")
    FasterRCNNImageProcessor(shortest_edge=64, longest_edge=96).save_pretrained(tmp_path / "saved")
    for name in (
        "configuration_faster_rcnn",
        "modeling_faster_rcnn",
        "image_processing_faster_rcnn",
        "region_operators",
    ):
        assert (tmp_path / "saved" / f"{name}.py").read_bytes() == (PROCESSING / f"{name}.py").read_bytes()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    code = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "processing":
            raise ModuleNotFoundError(f"{name} must not be needed")
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoImageProcessor, AutoModel
image_processor = AutoImageProcessor.from_pretrained("saved", trust_remote_code=True)
detector = AutoModel.from_pretrained("saved", trust_remote_code=True)
with torch.inference_mode():
    (record,) = detector(**image_processor("picture.png")).regions
print(record["width"], record["height"], record["boxes"].tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    inputs = FasterRCNNImageProcessor(shortest_edge=64, longest_edge=96)(picture)
    with torch.inference_mode():
        (record,) = detector(**inputs).regions
    width, height, boxes = result.stdout.splitlines()[-1].split(" ", 2)
    assert (int(width), int(height)) == (90, 70) == (record["width"], record["height"])
    torch.testing.assert_close(torch.tensor(json.loads(boxes)), record["boxes"], atol=1e-4, rtol=0)


def full_size_state_dict() -> dict[str, torch.Tensor]:
    """The published checkpoint's names and shapes, after the narrow one's names: 16 times as wide, and deeper."""
    narrow = torch.load(PARITY / "pytorch_model.bin", weights_only=True)
    shapes = {}
    for name, tensor in narrow.items():
        parts = name.split(".")
        if "res" in name and "roi" not in name or "res5" in name:
            shape = list(tensor.shape)
            if len(shape) == 4:
                shape[:2] = (16 * size for size in shape[:2])
                if parts[1] == "res2" and parts[2] == "0" and parts[3] in ("shortcut", "conv1") and shape[2] == 1:
                    shape[1] = 64  # the stem's channels
            elif len(shape) == 1:
                shape = [16 * shape[0]]
            shapes[name] = shape
        elif "stem" in name:
            shapes[name] = [64 if size == 8 else size for size in tensor.shape]
    for number in range(6, 23):  # blocks of ResNet-101 that ResNet-50 has not
        for name in [name for name in shapes if name.startswith("backbone.res4.5.")]:
            shapes[name.replace("res4.5.", f"res4.{number}.")] = shapes[name]
    rpn, boxes = "proposal_generator.rpn_head", "roi_heads.box_predictor"
    shapes |= {
        "proposal_generator.anchor_generator.cell_anchors.0": [12, 4],
        f"{rpn}.conv.weight": [512, 1024, 3, 3],
        f"{rpn}.conv.bias": [512],
        f"{rpn}.objectness_logits.weight": [12, 512, 1, 1],
        f"{rpn}.objectness_logits.bias": [12],
        f"{rpn}.anchor_deltas.weight": [48, 512, 1, 1],
        f"{rpn}.anchor_deltas.bias": [48],
        f"{boxes}.cls_score.weight": [1601, 2048],
        f"{boxes}.cls_score.bias": [1601],
        f"{boxes}.bbox_pred.weight": [6400, 2048],
        f"{boxes}.bbox_pred.bias": [6400],
        f"{boxes}.cls_embedding.weight": [1601, 256],
        f"{boxes}.fc_attr.weight": [512, 2304],
        f"{boxes}.fc_attr.bias": [512],
        f"{boxes}.attr_score.weight": [401, 512],
        f"{boxes}.attr_score.bias": [401],
    }
    state_dict = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}  # a number each in the file
    state_dict["proposal_generator.anchor_generator.cell_anchors.0"] = narrow[
        "proposal_generator.anchor_generator.cell_anchors.0"
    ]
    return state_dict | {name: torch.tensor(0) for name in state_dict if name.endswith("num_batches_tracked")}


def test_the_published_sizes_load(tmp_path):
    values = json.loads((PARITY / "config.json").read_text())
    values["resnets"] |= {"depth": 101, "stem_out_channels": 64, "res2_out_channels": 256, "width_per_group": 64}
    values["proposal_generator"]["hidden_channels"] = 512
    values["roi_heads"]["num_classes"], values["roi_box_head"]["num_attrs"] = 1600, 400
    (tmp_path / "config.json").write_text(json.dumps(values))
    torch.save(full_size_state_dict(), tmp_path / "pytorch_model.bin")
    model = FasterRCNNForRegionFeatures.from_original(tmp_path)
    assert (model.config.region_feature_size, model.config.num_classes) == (2048, 1600)
    defaults = FasterRCNNConfig().to_dict()
    read = ("nms_thresholds", "min_regions", "max_regions", "pre_nms_top_k", "post_nms_top_k")
    for name, value in model.config.to_dict().items():
        if name not in read:
            assert list(value) == list(defaults[name]) if isinstance(value, tuple | list) else value == defaults[name]


def test_another_checkpoint_is_refused(tmp_path):
    shutil.copy(PARITY / "config.json", tmp_path)
    with pytest.raises(ValueError, match="expected pytorch_model.bin, got no such file"):
        FasterRCNNForRegionFeatures.from_original(tmp_path)
    with pytest.raises(ValueError, match="expected config.yaml or config.json, got neither"):
        FasterRCNNForRegionFeatures.from_original(tmp_path / "nowhere")
    state_dict = torch.load(PARITY / "pytorch_model.bin", weights_only=True)
    del state_dict["backbone.stem.conv1.weight"]
    state_dict["more"] = torch.zeros(1)
    state_dict["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(3)
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    message = r"conv1.weight is missing; more is left over; .*cls_score.bias: expected \(13,\), got \(3,\)"
    with pytest.raises(ValueError, match=message):
        FasterRCNNForRegionFeatures.from_original(tmp_path)
    with pytest.raises(ValueError, match="rpn.in_features: expected .'res4'., got .'p2'."):
        FasterRCNNConfig.from_original(
            json.loads((PARITY / "config.json").read_text()) | {"rpn": {"in_features": ["p2"]}}
        )


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_is_executed(tmp_path, capsys):
    shutil.copy(PARITY / "config.json", tmp_path)
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        FasterRCNNForRegionFeatures.from_original(tmp_path)
    assert "executed" not in capsys.readouterr().out


# ---------------------------------------------------------------- parts


def test_deltas_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 20]])
    # The centre moves by 0.1 widths and 0.2 heights; the width doubles.
    deltas = torch.tensor([[[1.0, 2.0, 5 * np.log(2), 0.0]]])
    found = apply_deltas(deltas, boxes, (10, 10, 5, 5))
    torch.testing.assert_close(found, torch.tensor([[[6.0 - 10, 14 - 10, 6 + 10, 14 + 10]]]))
    # At most 1000/16 times as wide.
    found = apply_deltas(torch.tensor([[[0.0, 0, 100, 0]]]), boxes, (1, 1, 1, 1))
    torch.testing.assert_close(found[0, 0, 2] - found[0, 0, 0], torch.tensor(10 * 1000 / 16))


def test_boxes_are_clipped():
    boxes = torch.tensor([[-5.0, 3, 200, 50], [1, 2, 3, 4]])
    assert clip_boxes(boxes, torch.tensor([40, 100])).tolist() == [[0, 3, 100, 40], [1, 2, 3, 4]]


def test_regions_at_a_time_change_nothing(detector, recorded, monkeypatch):
    monkeypatch.setattr(modeling_faster_rcnn, "REGIONS_AT_A_TIME", 7)
    for number, record in enumerate(detect(detector, recorded).regions):
        check_regions(record, recorded, number)


def test_how_many_regions(detector, recorded):
    scores = recorded["expected.0.obj_probs"]
    for options, expected in (
        ({"min_regions": 2, "max_regions": 5}, 5),
        ({"min_regions": 1, "max_regions": 5, "min_score": 0.993}, 3),
        ({"min_regions": 4, "max_regions": 5, "min_score": 0.993}, 4),
        ({"min_regions": 0, "max_regions": 5, "min_score": 1.0}, 0),
    ):
        record = detect(detector, recorded, **options).regions[0]
        assert len(record["boxes"]) == len(record["features"]) == expected, options
        torch.testing.assert_close(record["class_scores"], scores[:expected], atol=1e-4, rtol=0)
    # The first threshold that leaves enough of them: more overlap where more are wanted.
    few = detect(detector, recorded, min_regions=1, max_regions=40).regions[0]
    many = detect(detector, recorded, min_regions=len(few["boxes"]) + 1, max_regions=40).regions[0]
    assert len(many["boxes"]) > len(few["boxes"])
    with pytest.raises(ValueError, match="0 <= `min_regions` <= `max_regions`, got 9 and 5"):
        detect(detector, recorded, min_regions=9, max_regions=5)


def test_class_probabilities_have_the_background_first(detector, recorded):
    record = detect(detector, recorded, output_class_probs=True).regions[0]
    assert record["class_probs"].shape == (12, 13)
    torch.testing.assert_close(record["class_probs"].sum(dim=1), torch.ones(12))
    best = record["class_probs"][:, 1:].max(dim=1)
    assert torch.equal(best.indices, record["class_ids"]) and torch.equal(best.values, record["class_scores"])


def test_interbert_reads_what_is_found(detector, recorded):
    from model_fixtures import tiny_processor

    processor = InterBERTProcessor(tiny_processor().tokenizer, region_feature_size=128)
    inputs = processor(regions=detect(detector, recorded).regions, return_tensors="pt")
    assert inputs["region_features"].shape == (1, 12, 128)
    assert inputs["region_boxes"].min() >= 0 and inputs["region_boxes"].max() <= 1


def test_half_precision(recorded):
    detector = FasterRCNNForRegionFeatures.from_original(PARITY).to(torch.bfloat16)
    for number, record in enumerate(detect(detector, recorded).regions):
        assert record["features"].dtype == torch.bfloat16 and record["boxes"].dtype == torch.float32
        # The best regions are much the same ones.
        found = {tuple(box) for box in record["boxes"].round(decimals=-1).int().tolist()}
        expected = {tuple(box) for box in recorded[f"expected.{number}.boxes"].round(decimals=-1).int().tolist()}
        assert len(found & expected) >= 2


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"pixel_values": torch.zeros(2, 1, 64, 64)}, r"shape \(images, 3, height, width\), got \(2, 1, 64, 64\)"),
        (
            {"pixel_values": torch.zeros(2, 3, 64, 64), "image_sizes": torch.tensor([[64, 64]])},
            r"`image_sizes` must be positive, of shape \(2, 2\), got \(1, 2\)",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 64, 64), "image_sizes": torch.tensor([[64, 80]])},
            r"within those of `pixel_values`, \[64, 64\], got \[\[64, 80\]\]",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 64, 64), "original_sizes": torch.tensor([[0, 80]])},
            "`original_sizes` must be positive",
        ),
    ],
)
def test_bad_inputs(detector, inputs, message):
    with pytest.raises(ValueError, match=message):
        detector(**inputs)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"depth": 34}, "34"),
        ({"num_classes": 0}, "`num_classes` must be positive, got 0"),
        ({"min_regions": 10, "max_regions": 9}, "not be above `max_regions`, got 10 and 9"),
        ({"box_weights": (1, 1, 1)}, "`box_weights` must be four positive numbers"),
        ({"nms_thresholds": ()}, "`nms_thresholds` must be positive numbers, at least one"),
        ({"num_attributes": -1}, "`num_attributes` must not be negative"),
    ],
)
def test_bad_configurations(values, message):
    with pytest.raises(StrictDataclassError, match=message):
        FasterRCNNConfig(**values)


@pytest.mark.parametrize("num_classes, num_attributes", [(33, 0), (5, 2)])
@torch.inference_mode()
def test_other_classes(num_classes, num_attributes):
    config = FasterRCNNConfig(
        depth=50,
        stem_channels=4,
        res2_channels=8,
        width_per_group=2,
        rpn_channels=4,
        num_classes=num_classes,
        num_attributes=num_attributes,
        class_agnostic_boxes=True,
        res5_halves=True,
        stride_in_1x1=False,
        caffe_max_pool=False,
        pooler_size=6,
    )
    (record,) = FasterRCNNForRegionFeatures(config).eval()(torch.randn(1, 3, 96, 128), output_class_probs=True).regions
    assert record["class_probs"].shape[1] == num_classes + 1 and record["features"].shape[1] == 64
    assert ("attribute_ids" in record) == (num_attributes > 0)


# ---------------------------------------------------------------- pictures


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_pictures_are_prepared(picture, tmp_path):
    image_processor = FasterRCNNImageProcessor(shortest_edge=40, longest_edge=60)
    inputs = image_processor(picture)
    assert inputs["pixel_values"].shape == (1, 3, 40, 60)
    assert inputs["image_sizes"].tolist() == inputs["original_sizes"].tolist() == [[40, 60]]
    pixels = np.asarray(picture).astype(np.float32)
    expected = np.stack([pixels[..., 2] - 102.9801, pixels[..., 1] - 115.9465, pixels[..., 0] - 122.7717])
    np.testing.assert_allclose(inputs["pixel_values"][0], expected, atol=1e-4)
    # The same picture in every way that it can be given.
    picture.save(tmp_path / "a.png")
    encoded = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    array = np.asarray(picture)
    for given in (
        *(str(tmp_path / "a.png"), tmp_path / "a.png", encoded, array, array.transpose(2, 0, 1)),
        *(torch.from_numpy(array.copy()), [array]),
    ):
        assert torch.equal(image_processor(given)["pixel_values"], inputs["pixel_values"])
    grey = (
        image_processor(picture.convert("L"))["pixel_values"]
        + torch.tensor([102.9801, 115.9465, 122.7717])[:, None, None]
    )
    torch.testing.assert_close(grey[0, 0], grey[0, 2])


def test_pictures_are_resized_and_padded(picture):
    image_processor = FasterRCNNImageProcessor(shortest_edge=80, longest_edge=100)
    tall = picture.rotate(90, expand=True).crop((0, 0, 30, 60))
    inputs = image_processor([picture, tall])
    # 40 x 60: twice as large would be 120 wide, so 100/60 times; 60 x 30: 100/60 times as well.
    assert inputs["image_sizes"].tolist() == [[67, 100], [100, 50]]
    assert inputs["original_sizes"].tolist() == [[40, 60], [60, 30]]
    assert inputs["pixel_values"].shape == (2, 3, 100, 100)
    assert not inputs["pixel_values"][0, :, 67:].any() and not inputs["pixel_values"][1, :, :, 50:].any()
    alone = image_processor(tall)["pixel_values"][0]
    assert torch.equal(inputs["pixel_values"][1, :, :, :50], alone)


def test_orientation_of_a_file_is_applied(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert FasterRCNNImageProcessor()(str(tmp_path / "turned.jpg"))["original_sizes"].tolist() == [[60, 40]]


def test_settings_are_those_of_the_original(tmp_path):
    image_processor = FasterRCNNImageProcessor.from_original(PARITY, shortest_edge=600)
    assert image_processor.image_mean == [102.9801, 115.9465, 122.7717] and image_processor.shortest_edge == 600
    (tmp_path / "config.yaml").write_text(
        "MODEL: {PIXEL_STD: [2, 3, 4]}\nINPUT: {MIN_SIZE_TEST: 60, MAX_SIZE_TEST: 90}\n"
    )
    image_processor = FasterRCNNImageProcessor.from_original(tmp_path)
    image_processor.save_pretrained(tmp_path / "saved")
    again = FasterRCNNImageProcessor.from_pretrained(tmp_path / "saved")
    for one in (image_processor, again):
        assert (one.shortest_edge, one.longest_edge, one.image_std) == (60, 90, [2, 3, 4])


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "expected at least one picture, got none"),
        ([np.zeros((4, 4))], r"images\[0\]: expected a picture of three channels, .* shape \(4, 4\)"),
        ("nowhere.png", r"images\[0\]: expected a picture, a path or a URL"),
        ([np.zeros((4, 4, 3)), 7], r"images\[1\]: .* got int"),
    ],
)
def test_bad_pictures(images, message):
    with pytest.raises(ValueError, match=message):
        FasterRCNNImageProcessor()(images)


def test_bad_settings():
    with pytest.raises(ValueError, match="got 90 and 60"):
        FasterRCNNImageProcessor(shortest_edge=90, longest_edge=60)
    with pytest.raises(ValueError, match="`image_mean` must have three values"):
        FasterRCNNImageProcessor(image_mean=[1.0])
