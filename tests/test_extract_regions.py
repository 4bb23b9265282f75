"""From pictures to a region dataset as a user runs it, with a tiny random detector."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hub_server import needs_hub, start_hub
from model_fixtures import save_tiny_detector
from PIL import Image
from transformers import ResNetBackbone, ResNetConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import extract_regions
from generate_scenes import write_scenes
from processing import FasterRCNNForRegionFeatures, FasterRCNNImageProcessor, load_region_dataset
from processing.region_dataset import read_region_detector

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "examples" / "extract_regions.py"


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    return save_tiny_detector(tmp_path_factory.mktemp("detector"))


def draw(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (rng.integers(30, 60), rng.integers(30, 60), 3), dtype=np.uint8))


def write_pictures(folder: Path, count: int) -> Path:
    for number in range(count):
        path = folder / f"{number % 3}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(number).save(path)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "photographs", 13)


def extract(*arguments, monkeypatch=None):
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", ["extract_regions.py", *map(str, arguments), "--device", "cpu"])
        extract_regions.main()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_of_pictures(photographs, detector, tmp_path, capsys):
    options = ["--rows_per_shard", 5, "--batch_size", 2, "--thumbnails", 20, "--class_probs"]
    extract(photographs, tmp_path / "out", "--detector", detector, *options)
    assert "images written" in capsys.readouterr().out
    regions = load_region_dataset(tmp_path / "out", "train")
    assert regions.image_ids == sorted(f"{number % 3}/{number:03d}" for number in range(13))
    model = FasterRCNNForRegionFeatures.from_pretrained(detector)
    image_processor = FasterRCNNImageProcessor.from_pretrained(detector)
    for row in (0, 7, 12):
        number = int(regions.image_ids[row].split("/")[1])
        picture = draw(number)
        with torch.inference_mode():
            (expected,) = model(**image_processor(picture), output_class_probs=True).regions
        record = regions[row]
        assert (record["width"], record["height"]) == picture.size
        # Only pictures of one size share a batch: what is found does not depend on the others.
        np.testing.assert_allclose(record["boxes"], expected["boxes"], atol=1e-3)
        assert record["class_probs"].shape == (len(expected["boxes"]), 8)
        thumbnail = regions.dataset[row]["image"]
        assert max(thumbnail.size) == 20
    assert regions.dataset.features["attribute_ids"] == datasets.List(datasets.Value("int32"))
    assert len(list((tmp_path / "out" / "data").iterdir())) == 3
    # One by one, there is no padding.
    extract(photographs, tmp_path / "single", "--detector", detector, "--batch_size", 1)
    regions = load_region_dataset(tmp_path / "single", "train")
    for row in range(13):
        with torch.inference_mode():
            (expected,) = model(**image_processor(draw(int(regions.image_ids[row].split("/")[1])))).regions
        np.testing.assert_allclose(regions[row]["boxes"], expected["boxes"], atol=1e-3)
        np.testing.assert_allclose(regions[row]["features"], expected["features"], rtol=2e-3, atol=1e-2)


def test_pictures_that_cannot_be_read_are_reported(photographs, detector, tmp_path, capsys):
    folder = write_pictures(tmp_path / "photographs", 4)
    (folder / "0" / "000.png").write_bytes(b"no picture")
    (folder / "1" / "001.png").write_bytes((folder / "1" / "001.png").read_bytes()[:100])
    (folder / "notes.doc").write_text("not looked at")
    extract(folder, tmp_path / "out", "--detector", detector)
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())["train"]
    assert set(report["missing"]["damaged"]) == {"0/000", "1/001"}
    assert all(str(tmp_path) not in message for message in report["missing"]["damaged"].values())
    assert load_region_dataset(tmp_path / "out", "train").image_ids == ["0/003", "2/002"]
    with pytest.raises(SystemExit):
        extract(folder, tmp_path / "strict", "--detector", detector, "--on_error", "raise")
    assert "image_id 0/000: expected a picture" in capsys.readouterr().err


def test_lists_and_datasets_of_pictures(photographs, detector, tmp_path):
    (tmp_path / "list.txt").write_text(
        f"{photographs / '1' / '001.png'}\n\n{photographs / '0' / '003.png'}\nnowhere.png\n"
    )
    extract(tmp_path / "list.txt", tmp_path / "listed", "--detector", detector)
    listed = load_region_dataset(tmp_path / "listed", "train")
    assert listed.image_ids == ["001", "003"]
    report = json.loads((tmp_path / "listed" / "conversion_report.json").read_text())["train"]
    assert set(report["missing"]["damaged"]) == {"nowhere"}
    assert report["settings"]["detector"] == detector.name
    assert str(tmp_path) not in json.dumps(report)
    rows = [{"photograph": draw(number), "name": f"n{number}"} for number in (1, 3)]
    features = datasets.Features({"photograph": datasets.Image(), "name": datasets.Value("string")})
    (tmp_path / "dataset").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "dataset" / "validation.parquet")
    options = ["--image_column", "photograph", "--split", "validation", "--detector", detector]
    extract(tmp_path / "dataset", tmp_path / "named", *options, "--image_id_column", "name")
    extract(tmp_path / "dataset", tmp_path / "numbered", *options)
    named = load_region_dataset(tmp_path / "named", "validation")
    assert named.image_ids == ["n1", "n3"]
    assert load_region_dataset(tmp_path / "numbered", "validation").image_ids == ["000000000", "000000001"]
    for row in range(2):
        np.testing.assert_allclose(named[row]["boxes"], listed[row]["boxes"], atol=1e-3)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """A dataset of nine pictures in two files, of three row groups in all; one row has no picture."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = [{"photograph": draw(number), "name": number, "captions": [f"a {number}", "b"]} for number in range(9)]
    rows[4]["photograph"] = None
    features = datasets.Features(
        {
            "photograph": datasets.Image(),
            "name": datasets.Value("int64"),
            "captions": datasets.List(datasets.Value("string")),
        }
    )
    for number, part in enumerate((rows[:6], rows[6:])):
        dataset = datasets.Dataset.from_list(part, features=features)
        dataset.to_parquet(folder / f"train-{number:05d}-of-00002.parquet", batch_size=3)
    return folder


STREAMED = ["--image_column", "photograph", "--image_id_column", "name", "--columns", "captions"]
STREAMED += ["--rows_per_shard", "4", "--batch_size", "2", "--streaming"]


def check_streamed(folder: Path, expected: Path):
    streamed, downloaded = load_region_dataset(folder, "train"), load_region_dataset(expected, "train")
    assert streamed.image_ids == downloaded.image_ids == [str(number) for number in range(9) if number != 4]
    assert streamed.captions(4) == ["a 5", "b"]
    for row in range(8):
        np.testing.assert_array_equal(streamed[row]["features"], downloaded[row]["features"])
    report = json.loads((folder / "conversion_report.json").read_text())["train"]
    assert report["missing"]["damaged"] == {"4": "image_id 4: expected a picture, got no picture."}


def test_a_dataset_is_read_where_it_is(captioned, detector, tmp_path):
    extract(captioned, tmp_path / "streamed", "--detector", detector, *STREAMED)
    extract(captioned, tmp_path / "downloaded", "--detector", detector, *STREAMED[:-1])
    check_streamed(tmp_path / "streamed", tmp_path / "downloaded")


@needs_hub
def test_a_dataset_on_the_hub_is_read_where_it_is(captioned, detector, tmp_path):
    push = f"""
from huggingface_hub import HfApi
from processing import FasterRCNNForRegionFeatures, FasterRCNNImageProcessor
HfApi().create_repo("org/pictures", repo_type="dataset")
HfApi().upload_folder(repo_id="org/pictures", repo_type="dataset", folder_path={str(captioned)!r})
for part in (FasterRCNNForRegionFeatures, FasterRCNNImageProcessor):
    part.from_pretrained({str(detector)!r}).push_to_hub("org/detector")
"""
    command = [sys.executable, str(SCRIPT), "org/pictures", str(tmp_path / "streamed"), "--detector", "org/detector"]
    with start_hub(tmp_path / "hub") as hub:
        environment = hub.env(home=tmp_path / "home") | {"ACCELERATE_USE_CPU": "true"}
        subprocess.run([sys.executable, "-c", push], check=True, env=environment, cwd=REPOSITORY)
        result = subprocess.run([*command, *STREAMED], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
    extract(captioned, tmp_path / "downloaded", "--detector", detector, *STREAMED[:-1])
    check_streamed(tmp_path / "streamed", tmp_path / "downloaded")
    # The detector of the Hub is known by its commit, wherever the dataset goes.
    known = read_region_detector(str(tmp_path / "streamed"), "train")
    assert known["name_or_path"] == "org/detector" and len(known["revision"]) == 40
    assert not list((tmp_path / "home").rglob("*.arrow"))


def test_windows(photographs, tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ResNetBackbone(config).save_pretrained(tmp_path / "backbone")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "backbone")
    options = ["--detector", "windows", "--backbone", tmp_path / "backbone", "--grids", 1, 3]
    extract(photographs, tmp_path / "out", *options)
    record = load_region_dataset(tmp_path / "out", "train")[4]
    assert record["features"].shape == (10, 8) and "class_ids" not in record


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "--detector", "DETECTOR"], "There is no file, folder or dataset nowhere"),
        (
            ["PICTURES", "--detector", "windows"],
            "`backbone`: expected a checkpoint for the features of windows, got none",
        ),
        (["PICTURES", "--detector", "DETECTOR", "--backbone", "b"], "gives features itself, got b"),
        (["EMPTY", "--detector", "DETECTOR"], "No pictures (.bmp, .gif"),
        (["PICTURES", "--detector", "DETECTOR", "--grids", "2"], "finds regions itself, got [2]"),
        (["PICTURES", "--detector", "DETECTOR", "--streaming"], "--streaming: expected one dataset of pictures"),
        (["CAPTIONED", "--detector", "DETECTOR"], "--image_column: expected a column of pictures, got image"),
        (
            ["CAPTIONED", "--detector", "DETECTOR", "--image_column", "photograph", "--columns", "titles"],
            "--columns: expected some of name, captions, got titles",
        ),
        (["SCENES", "--detector", "DETECTOR", "--columns", "captions", "boxes"], "--columns: expected some of"),
        (
            ["CAPTIONED", "--detector", "DETECTOR", "--image_column", "photograph", "--image_id_column", "id"],
            "--image_id_column: expected one of photograph, name, captions, got id",
        ),
        (
            ["CAPTIONED", "--detector", "DETECTOR", "--streaming", "--split", "test"],
            "has no split 'test', got ['train']",
        ),
        (["PICTURES", "--detector", "DETECTOR", "--num_proc", "2"], "expected `accelerate launch`"),
    ],
)
def test_bad_arguments(arguments, message, photographs, captioned, detector, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"PICTURES": photographs, "CAPTIONED": captioned, "DETECTOR": detector, "EMPTY": tmp_path / "empty"}
    if "SCENES" in arguments:
        write_scenes(tmp_path / "scenes", num_train=2, num_validation=2, num_test=2)
        places["SCENES"] = tmp_path / "scenes"
    source, *options = [places.get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        extract(source, tmp_path / "out", *options)
    assert ended.value.code != 0 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_processes_share_the_pictures(photographs, detector, tmp_path):
    options = ["--detector", str(detector), "--rows_per_shard", "2", "--batch_size", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(SCRIPT), str(photographs)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(tmp_path / "two"), *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "2 process(es)" in result.stdout
    extract(photographs, tmp_path / "two", *options)  # there is nothing to do
    extract(photographs, tmp_path / "one", *options)
    two, one = (load_region_dataset(tmp_path / name, "train") for name in ("two", "one"))
    assert two.image_ids == one.image_ids
    for row in range(13):
        np.testing.assert_allclose(two[row]["features"], one[row]["features"], rtol=2e-3, atol=1e-2)


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_dataset(detector, tmp_path):
    folder = write_pictures(tmp_path / "photographs", 200)
    options = ["--detector", str(detector), "--rows_per_shard", "20", "--batch_size", "4", "--device", "cpu"]
    subprocess.run([sys.executable, str(SCRIPT), str(folder), str(tmp_path / "out"), *options], check=True)
    destination = tmp_path / "killed" / "out"
    for num_shards in (1, 4, 8, None):  # of ten: what is complete when it is killed
        process = subprocess.Popen([sys.executable, str(SCRIPT), str(folder), str(destination), *options])
        while process.poll() is None:
            if num_shards is not None and len(list(destination.glob(".conversion/train/0*.json"))) >= num_shards:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        assert process.returncode == (0 if num_shards is None else -signal.SIGKILL)
    assert contents(tmp_path / "killed" / "out") == contents(tmp_path / "out")
