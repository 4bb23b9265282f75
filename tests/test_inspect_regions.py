"""What inspect_regions.py says of region features, with numbers worked out by hand, and what it draws."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inspect_regions
from generate_scenes import CLASS_NAMES, REGION_FEATURE_SIZE, write_scenes
from inspect_regions import draw_regions, format_bars, format_histogram, region_table
from pictures import open_picture
from processing.region_formats import create_regions
from visualize_attention import CANVAS

SCRIPT = str(Path(__file__).resolve().parent.parent / "examples" / "inspect_regions.py")
BOTTOM_UP = Path(__file__).resolve().parents[2] / "shared" / "data" / "bottom_up"

RECORDS = [
    {
        "image_id": "first",
        "width": 100,
        "height": 50,
        "boxes": np.array([[0, 0, 100, 50], [10, 20, 30, 40]], dtype=np.float32),
        "features": np.array([[3, 4], [0, 0]], dtype=np.float32),
        "class_ids": np.array([1, -1], dtype=np.int32),
        "class_scores": np.array([0.25, 0.75], dtype=np.float32),
        "captions": ["a dog", "a dog runs"],
    },
    {
        "image_id": "second",
        "width": 200,
        "height": 100,
        "boxes": np.array([[0, 0, 100, 100], [0, 0, 20, 20], [0, 0, 200, 50]], dtype=np.float32),
        "features": np.array([[0, 5], [6, 8], [0, -10]], dtype=np.float32),
        "class_ids": np.array([1, 1, 0], dtype=np.int32),
        "class_scores": np.array([1, 0.3, 0.15], dtype=np.float32),
        "captions": [],
    },
    {
        "image_id": "outside",
        "width": 10,
        "height": 10,
        "boxes": np.array([[0, 0, 100, 5]], dtype=np.float32),
        "features": np.array([[1e9, 0]], dtype=np.float32),
        "class_ids": np.array([7], dtype=np.int32),
        "class_scores": np.array([0.5], dtype=np.float32),
        "captions": ["a bad row"],
    },
]


def write(path: Path, records: list[dict] = RECORDS, to: str = "parquet") -> Path:
    with create_regions(path, to) as writer:
        for record in records:
            writer.write(record)
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "regions.parquet")


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    path = tmp_path / "objects_vocab.txt"
    path.write_text("cat,kitten\ndog,puppy,hound\n")
    return path


@pytest.fixture
def inspect(monkeypatch, capsys):
    """Runs the script in this process, and returns what it prints."""

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["inspect_regions.py", *map(str, arguments)])
        inspect_regions.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refuse(inspect, capsys):
    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit_info:
            inspect(*arguments)
        assert exit_info.value.code not in (0, None)
        return capsys.readouterr().err

    return run


def test_what_is_said(source, vocabulary, inspect):
    output = inspect(source, "--objects_vocab", vocabulary)
    for line in (
        "regions.parquet (parquet): 3 images",
        "  image_id      string",
        "  features      list<float32[2]>",
        "  captions      list<string>\n",
        "Image sizes: 100 x 50 to 200 x 100 pixels, 150 x 75 on average",
        "Regions per image: 5 in all, 2.5 on average",
        f"  2            1   50.0%  {'█' * 40}",
        f"  3            1   50.0%  {'█' * 40}",
        # areas 1, 0.08, 0.5, 0.02, 0.5
        "Boxes: x from 0.00 to 200.00, y from 0.00 to 100.00; area, as a share of the image, 0.420 on average",
        f"  0.0 to 0.1            2   40.0%  {'█' * 40}",
        f"  0.5 to 0.6            2   40.0%  {'█' * 40}",
        f"  0.9 to 1.0            1   20.0%  {'█' * 20}",
        # 3, 4, 0, 0, 0, 5, 6, 8, 0, -10: sum 16, squares 250; norms 5, 0, 5, 10, 10
        "Features: mean 1.6000, standard deviation 4.7371, from -10.0000 to 8.0000, 40.0% zeros, norm of a vector 6.00",
        "captions: 2 in all, 1.0 per image (0 to 2), none for 1 of 2 images",
        "Scores: 0.490 on average",
        "Classes: 2 of 2",
        f"       dog            3   60.0%  {'█' * 40}",
        f"  no class            1   20.0%  {'█' * 13}",
        f"       cat            1   20.0%  {'█' * 13}",
        "Bad rows: 1, of which nothing above is counted",
        "  outside: image_id outside, region 0: expected a box",
    ):
        assert line in output, output


def test_limits_and_formats(tmp_path, inspect, vocabulary):
    source = write(tmp_path / "regions.tsv", RECORDS, "bottom_up_tsv")
    output = inspect(source, "--num_images", 1)
    assert "(bottom_up_tsv): 3 images, read are the first 1" in output
    assert "Bad rows: 0" in output and "Classes" not in output and "Scores" not in output


def test_bad_rows_are_listed_up_to_ten(tmp_path, inspect):
    records = [RECORDS[2] | {"image_id": f"bad-{number:02d}"} for number in range(12)]
    output = inspect(write(tmp_path / "regions.parquet", [RECORDS[0], *records]))
    assert "Bad rows: 12" in output and "bad-09" in output and "bad-10" not in output and "… and 2 more" in output
    # With bad rows alone there is nothing else to say.
    assert "Bad rows: 12" in inspect(write(tmp_path / "bad.parquet", records))


def test_damaged_images_are_bad_rows(tmp_path, inspect):
    source = write(tmp_path / "regions.tsv", RECORDS[:2], "bottom_up_tsv")
    source.write_text(source.read_text()[:-5] + "\n")
    output = inspect(source)
    assert "Bad rows: 1" in output
    assert "  second: regions.tsv (bottom_up_tsv, image_id second): expected" in output


def test_a_vocabulary_of_other_classes(tmp_path, inspect):
    (tmp_path / "vocab.txt").write_text("cat\n")
    output = inspect(write(tmp_path / "regions.parquet"), "--objects_vocab", tmp_path / "vocab.txt")
    assert "There are ids up to 1: the names are those of other classes." in output
    assert "class 1" in output


def test_classes_and_scores_of_probabilities(tmp_path, inspect):
    probs = np.array([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]], dtype=np.float32)
    record = {name: RECORDS[0][name] for name in ("image_id", "width", "height", "boxes", "features")}
    record["class_probs"] = probs
    output = inspect(write(tmp_path / "regions.parquet", [record]))
    assert "Scores: 0.300 on average" in output
    assert "class 0            1   50.0%" in output and "class 1            1   50.0%" in output


def test_histograms():
    assert format_bars(["a", "bb"], [0, 1200]) == f"   a            0    0.0%\n  bb        1,200  100.0%  {'█' * 40}"
    lines = format_histogram([10] * 3 + [36]).splitlines()
    # 27 numbers in 9 ranges of 3
    assert len(lines) == 9
    assert lines[0].split()[:5] == ["10", "to", "12", "3", "75.0%"]
    assert lines[-1].split()[:4] == ["34", "to", "36", "1"]
    assert format_histogram([1, 14]).splitlines()[-1].split()[:4] == ["13", "to", "14", "1"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=4, num_validation=4, num_test=2)
    return folder


def test_a_dataset_with_splits(scenes, inspect, refuse):
    output = inspect(scenes, "--split", "validation", "--objects_vocab", scenes / "objects_vocab.txt")
    assert "(parquet): 4 images" in output and f"list<float16[{REGION_FEATURE_SIZE}]>" in output
    assert any(name in output for name in CLASS_NAMES)
    assert "captions: 20 in all, 5.0 per image (5 to 5)" in output
    error = refuse(scenes)
    assert "expected one of its splits, train, validation, test, got None" in error
    assert "got dev" in refuse(scenes, "--split", "dev")


# ---------------------------------------------------------------- drawing


def test_draw_on_a_blank_canvas(source, tmp_path, vocabulary, inspect):
    output = inspect(source, "--draw", "first.jpg", "--objects_vocab", vocabulary, "--output", tmp_path / "a" / "b.png")
    lines = [line.split() for line in output.splitlines()]
    assert lines[0] == ["region", "class", "score", "x1", "y1", "x2", "y2"]
    # the highest score first
    assert lines[2] == ["1", "no", "class", "0.750", "10.000", "20.000", "30.000", "40.000"]
    assert lines[3] == ["0", "dog", "0.250", "0.000", "0.000", "100.000", "50.000"]
    picture = Image.open(tmp_path / "a" / "b.png").convert("RGB")
    assert picture.size == (1500, 750)
    grey = tuple(int(CANVAS[i : i + 2], 16) for i in (1, 3, 5))
    assert picture.getpixel((900, 600)) == grey
    # The edges of the box from (10, 20) to (30, 40), 15 pixels to each of the image.
    assert picture.getpixel((150, 450)) != grey and picture.getpixel((300, 600)) != grey


def test_draw_on_a_photograph(source, tmp_path, inspect, refuse):
    (tmp_path / "photographs").mkdir()
    # Half as large as the detector saw it.
    Image.new("RGB", (50, 25), (0, 0, 255)).save(tmp_path / "photographs" / "first.png")
    inspect(source, "--draw", "first", "--image_dir", tmp_path / "photographs", "--output", tmp_path / "b.png")
    picture = Image.open(tmp_path / "b.png").convert("RGB")
    assert picture.getpixel((900, 600)) == (0, 0, 255)
    assert picture.getpixel((150, 450)) != (0, 0, 255)
    # A camera that was held upright says so beside the pixels.
    exif = Image.Exif()
    exif[274] = 6
    turned = Image.new("RGB", (25, 50), (0, 0, 255))
    turned.paste((255, 0, 0), (0, 0, 25, 25))
    turned.save(tmp_path / "photographs" / "turned.png", exif=exif)
    upright = open_picture(str(tmp_path / "photographs"), "turned")
    assert upright.size == (50, 25)
    assert (upright.getpixel((10, 12)), upright.getpixel((40, 12))) == ((0, 0, 255), (255, 0, 0))
    second = (source, "--draw", "second", "--image_dir", tmp_path / "photographs")
    assert "must hold a picture named second" in refuse(*second)
    (tmp_path / "photographs" / "second.jpg").write_text("no picture")
    assert "cannot identify image file" in refuse(*second)


def test_draw_on_the_picture_of_the_dataset(scenes, tmp_path, inspect):
    inspect(scenes, "--split", "test", "--draw", "test-000001", "--output", tmp_path / "b.png")
    drawn = np.asarray(Image.open(tmp_path / "b.png").convert("RGB").resize((128, 128))).astype(int)
    scene = np.asarray(inspect_regions.picture_of(record_of(scenes, "test", "test-000001"), None)).astype(int)
    assert np.median(np.abs(drawn - scene)) <= 2


def record_of(folder: Path, split: str, image_id: str) -> dict:
    return inspect_regions.open_source([str(folder)], split)[image_id]


def test_normalized_boxes_are_drawn_on_a_square():
    record = {"width": 1, "height": 1, "boxes": np.array([[0, 0, 0.5, 1]], dtype=np.float32)}
    rows = region_table(record, [])
    assert rows == [{"region": 0, "x1": 0.0, "y1": 0.0, "x2": 0.5, "y2": 1.0}]
    picture = inspect_regions.picture_of(record, None)
    (patch,) = draw_regions(record, rows, picture).axes[0].patches
    assert patch.get_bbox().bounds == (0, 0, 320, 640)


def test_what_cannot_be_drawn(source, refuse):
    assert "expected one of 3 images, such as first, second, outside; got third" in refuse(source, "--draw", "third")
    assert "region 0: expected a box" in refuse(source, "--draw", "outside")
    assert "at least 1, got 0" in refuse(source, "--num_images", 0)
    assert "There is no file or folder ./nothing" in refuse("./nothing")


@pytest.mark.skipif(not BOTTOM_UP.is_dir(), reason="there are no real bottom-up-attention features")
def test_real_features(tmp_path):
    command = [sys.executable, SCRIPT, str(BOTTOM_UP / "lxmert_train2014_obj36.tsv")]
    command += ["--objects_vocab", str(BOTTOM_UP / "objects_vocab.txt")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "(lxmert_tsv): 10 images" in result.stdout and "Regions per image: 360 in all" in result.stdout
    assert "Classes: 117 of 1,600" in result.stdout and "      tree           21    5.8%" in result.stdout
    assert "Bad rows: 0" in result.stdout
