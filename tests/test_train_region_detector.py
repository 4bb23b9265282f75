"""The training of a region detector on tiny generated scenes, and what becomes of it."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

import extract_regions
import train_region_detector
from generate_scenes import write_scenes
from processing import FasterRCNNForRegionFeatures, FasterRCNNImageProcessor, load_region_dataset
from train_region_detector import LabelledPictures, measure_regions

TINY = ("--config_overrides", "stem_channels=4,res2_channels=8,width_per_group=2,rpn_channels=8,min_score=0.0")
TRAINING = ("--do_train", *TINY, "--shortest_edge", "64", "--per_device_train_batch_size", "6", "--seed", "1")
EVAL_NAMES = ["eval_recall", "eval_class_accuracy", "eval_precision", "eval_regions_per_image"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=24, num_validation=6, num_test=4)
    return folder


def run(scenes: Path, folder: Path, *arguments: str) -> Path:
    """Runs the script in this process."""
    command = ["train_region_detector.py", "--dataset_name", str(scenes), "--output_dir", str(folder), *arguments]
    with pytest.MonkeyPatch.context() as context:
        context.setenv("ACCELERATE_USE_CPU", "true")
        context.setattr(sys, "argv", command)
        train_region_detector.main()
    return folder


def read_json(path: Path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    arguments = ("--do_eval", "--learning_rate", "5e-3", "--num_train_epochs", "3", "--checkpointing_steps", "6")
    return run(scenes, folder, *TRAINING, *arguments)


def test_it_is_trained_evaluated_and_saved(trained):
    epochs = read_json(trained / "all_results.json")
    assert [epoch["step"] for epoch in epochs] == [4, 8, 12]
    assert epochs[2]["train_loss"] < 0.7 * epochs[0]["train_loss"]
    parts = ("objectness_loss", "proposal_box_loss", "class_loss", "box_loss")
    for epoch in epochs:
        assert epoch["train_loss"] == pytest.approx(sum(epoch[f"train_{name}"] for name in parts))
    results = read_json(trained / "eval_results.json")
    assert {name: results[name] for name in EVAL_NAMES} == {name: epochs[2][name] for name in EVAL_NAMES}
    detector = FasterRCNNForRegionFeatures.from_pretrained(trained)
    assert (detector.config.num_classes, detector.config.region_feature_size) == (48, 64)
    assert FasterRCNNImageProcessor.from_pretrained(trained).shortest_edge == 64
    card = (trained / "README.md").read_text()
    assert "48 classes" in card and f"- recall: {results['eval_recall']:.4f}" in card


def test_the_same_is_measured_alone(scenes, trained, tmp_path):
    run(scenes, tmp_path, "--do_eval", "--model_name_or_path", str(trained))
    alone, expected = (read_json(folder / "eval_results.json") for folder in (tmp_path, trained))
    assert "do_eval: true" in (tmp_path / "eval_recipe.yaml").read_text()
    assert alone == pytest.approx({name: expected[name] for name in EVAL_NAMES}, abs=1e-6)


def test_a_resumed_training_ends_the_same(scenes, trained, tmp_path):
    arguments = ("--do_eval", "--learning_rate", "5e-3", "--num_train_epochs", "3")
    run(scenes, tmp_path, *TRAINING, *arguments, "--resume_from_checkpoint", str(trained / "checkpoint-6"))
    expected = load_file(trained / "model.safetensors")
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_its_regions_are_extracted(scenes, trained, tmp_path, monkeypatch):
    command = ["extract_regions.py", str(scenes), str(tmp_path / "regions"), "--detector", str(trained)]
    monkeypatch.setattr(sys, "argv", [*command, "--split", "test", "--device", "cpu"])
    extract_regions.main()
    regions = load_region_dataset(tmp_path / "regions", "test")
    assert len(regions) == 4 and regions.region_feature_size == 64
    config = FasterRCNNForRegionFeatures.from_pretrained(trained).config
    for number in range(4):
        assert config.min_regions <= len(regions[number]["boxes"]) <= config.max_regions


def test_a_checkpoint_is_trained_on(scenes, trained, tmp_path, caplog):
    arguments = ("--do_train", "--max_train_steps", "1", "--per_device_train_batch_size", "2", "--learning_rate", "0")
    run(scenes, tmp_path / "on", *arguments, "--model_name_or_path", str(trained))
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "on"))
    assert all(
        torch.equal(after[name], before[name]) for name in before if not name.endswith(("mean", "var", "tracked"))
    )
    assert FasterRCNNImageProcessor.from_pretrained(tmp_path / "on").shortest_edge == 64
    # With more classes the head of classes is new, and nothing else is.
    arguments += ("--config_overrides", "num_classes=60")
    run(scenes, tmp_path / "more", *arguments, "--model_name_or_path", str(trained))
    assert (
        "These weights are new, and not those of the checkpoint: roi_heads.box_predictor.cls_score.bias" in caplog.text
    )
    after = load_file(tmp_path / "more" / "model.safetensors")
    assert after["roi_heads.box_predictor.cls_score.weight"].shape == (61, 64)
    name = "roi_heads.box_predictor.bbox_pred.weight"
    assert torch.equal(after[name], before[name])


def test_a_detector_of_attributes_is_trained_on(scenes, tmp_path):
    """The dataset has none: what predicts them stays as it was."""
    arguments = (*TRAINING[:-2], "--max_train_steps", "1", "--learning_rate", "1e-3", "--max_train_samples", "6")
    first = f"{TINY[1]},num_attributes=5"
    run(scenes, tmp_path / "first", *arguments, "--config_overrides", first, "--learning_rate", "0")
    arguments = [value for value in arguments if value not in TINY]
    run(scenes, tmp_path / "on", *arguments, "--model_name_or_path", str(tmp_path / "first"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "on"))
    attributes = {name for name in before if "attr" in name or "cls_embedding" in name}
    assert len(attributes) == 5
    for name in attributes:
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["backbone.stem.conv1.weight"], after["backbone.stem.conv1.weight"])


def test_measures_by_hand():
    labels = [
        {
            "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]]),
            "class_ids": torch.tensor([1, 2, 3]),
        },
        {"boxes": torch.zeros(0, 4), "class_ids": torch.zeros(0, dtype=torch.long)},
        {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "class_ids": torch.tensor([0])},
    ]
    found = [
        {
            # The first true box has two regions, of which the better one has the wrong class; the second one has half
            # a region; the third one a region that overlaps it by less.
            "boxes": torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 8], [20, 0, 30, 5], [50, 50, 60, 54]]),
            "class_ids": torch.tensor([0, 1, 2, 3]),
        },
        {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "class_ids": torch.tensor([0])},
        {"boxes": torch.zeros(0, 4), "class_ids": torch.zeros(0, dtype=torch.long)},
    ]
    assert measure_regions(found, labels) == {
        "eval_recall": 2 / 4,
        "eval_class_accuracy": 1 / 2,
        "eval_precision": 3 / 5,
        "eval_regions_per_image": 5 / 3,
    }


def make_pictures(scenes: Path, **columns) -> LabelledPictures:
    dataset = datasets.load_dataset(str(scenes), split="test").select(range(2))
    for name, values in columns.items():
        dataset = dataset.remove_columns(name).add_column(name, values)
    return LabelledPictures(dataset, "image")


def test_pictures_with_their_labels(scenes):
    pictures = make_pictures(scenes, boxes=[[[1.0, 2, 3, 4]], []], class_ids=[[7], []])
    assert pictures[0]["image"].size == (128, 128) and pictures[0]["image_id"] == "test-000000"
    assert pictures[0]["labels"]["boxes"].tolist() == [[1, 2, 3, 4]]
    assert pictures[1]["labels"]["boxes"].shape == (0, 4)
    for number, labels in enumerate(pictures.labels):
        assert {name: values.tolist() for name, values in labels.items()} == {
            name: values.tolist() for name, values in pictures[number]["labels"].items()
        }
    assert pictures.num_classes == 8
    assert pictures.shapes().tolist() == [100, 100]


BOX = [1.0, 2, 3, 4]


def test_bad_datasets(scenes):
    with pytest.raises(ValueError, match=r"^image_id test-000001: expected a class for each of 1 boxes, got \[-1\]"):
        make_pictures(scenes, boxes=[[BOX], [BOX]], class_ids=[[7], [-1]])
    with pytest.raises(ValueError, match="image_id test-000001: expected a class for each of 2 boxes"):
        make_pictures(scenes, boxes=[[BOX], [BOX, BOX]], class_ids=[[7], [7]])
    for box in ([1.0, 2, 1, 4], [1.0, 2, 140, 4], [-3.0, 2, 5, 4], [float("nan"), 2, 5, 4]):
        with pytest.raises(ValueError, match="image_id test-000001: expected boxes .* of 128 x 128 pixels, got "):
            make_pictures(scenes, boxes=[[BOX], [BOX, box]], class_ids=[[7], [7, 7]])
    with pytest.raises(ValueError, match="Column 'boxes' must have boxes, got none."):
        make_pictures(scenes, boxes=[[], []], class_ids=[[], []])
    # Thumbnails, say, whose boxes are those of larger pictures.
    with pytest.raises(ValueError, match="image_id test-000000: expected a picture of 256 x 128 .* one of 128 x 128"):
        make_pictures(scenes, width=[256, 128])[0]
    dataset = datasets.load_dataset(str(scenes), split="test")
    with pytest.raises(ValueError, match=r"needs the columns \['boxes', 'picture'\]"):
        LabelledPictures(dataset.remove_columns("boxes"), "picture")
    with pytest.raises(ValueError, match="Column 'captions' must hold pictures"):
        LabelledPictures(dataset, "captions")
    with pytest.raises(ValueError, match="at least one picture"):
        LabelledPictures(dataset.select([]), "image")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--do_predict",), "extract_regions.py writes the regions"),
        (("--do_train", "--do_eval", "--validation_split", "train"), "needs pictures that are not trained on"),
        ((*TRAINING, "--config_overrides", "num_classes=9"), "must have the dataset's 48 classes, got 9"),
        (("--do_eval",), "Without `--do_train` there must be a trained detector"),
        (("--do_train", "--widget_pictures"), "`--widget_pictures`"),
        (("--do_train", "--model_card", "interbert-base"), "`--model_card`"),
    ],
)
def test_bad_arguments(scenes, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(scenes, tmp_path, *arguments)
    assert not (tmp_path / "config.json").exists()


def test_a_checkpoint_has_its_own_anchors(scenes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(scenes, tmp_path, "--do_train", "--model_name_or_path", "somewhere", "--anchor_sizes", "8")
    assert "`--anchor_sizes` is for a new detector" in capsys.readouterr().err
