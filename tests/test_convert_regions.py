"""Region features converted as a user converts them: between formats, filtered, with texts, and after a kill."""

import base64
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hub_server import needs_hub, start_hub
from PIL import Image

import convert_regions
import inspect_regions
import visualize_attention
from pictures import Pictures
from processing import RegionStream, load_region_dataset
from processing.region_formats import create_regions, open_regions
from processing.tasks import questions_of_dataset
from region_conversion import Counts, select_regions, type_name
from region_sources import open_source

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = str(EXAMPLES / "convert_regions.py")
BOTTOM_UP = Path(__file__).resolve().parents[2] / "shared" / "data" / "bottom_up"

WRITABLE = ["parquet", "vilbert_lmdb", "bottom_up_tsv", "lxmert_tsv", "hdf5"]


def make_record(number: int, num_regions: int = 3, width: int = 8) -> dict:
    """An image with classes, scores and attributes; its highest score comes last."""
    rng = np.random.default_rng(number)
    corners = rng.uniform(0, 100, (num_regions, 2, 2)).astype(np.float32)
    return {
        "image_id": f"image-{number}",
        "width": 100 + number,
        "height": 120,
        "boxes": np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1),
        "features": rng.standard_normal((num_regions, width)).astype(np.float32),
        "class_ids": rng.integers(0, 50, num_regions).astype(np.int32),
        "class_scores": (np.arange(1, num_regions + 1) / (num_regions + 1)).astype(np.float32),
        "attribute_ids": np.arange(num_regions, dtype=np.int32),
        "attribute_scores": rng.random(num_regions).astype(np.float32),
    }


def write(path: Path, records: list[dict], to: str = "lxmert_tsv") -> Path:
    with create_regions(path, to) as writer:
        for record in records:
            writer.write(record)
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    """Ten images in LXMERT's TSV, image-0 to image-9."""
    return write(tmp_path / "source.tsv", [make_record(number) for number in range(10)])


@pytest.fixture
def convert(monkeypatch, tmp_path):
    """Runs the script in this process. Returns what it says of the split; a path is relative to `tmp_path`."""

    def run(*arguments) -> dict:
        monkeypatch.setattr(sys, "argv", ["convert_regions.py", *map(str, arguments)])
        convert_regions.main()
        destination = Path(arguments[1])
        if not (destination / "conversion_report.json").exists():
            return json.loads(destination.with_name(f"{destination.name}.conversion_report.json").read_text())
        split = arguments[arguments.index("--split") + 1] if "--split" in arguments else "train"
        return json.loads((destination / "conversion_report.json").read_text())[split]

    return run


@pytest.fixture
def refuse(convert, capsys):
    """Runs the script, which must end with an error, and returns the error."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit_info:
            convert(*arguments)
        assert exit_info.value.code not in (0, None)
        return capsys.readouterr().err

    return run


def assert_same_records(first: dict, second: dict):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == second[name].dtype, name
            np.testing.assert_array_equal(value, second[name], err_msg=name)
        else:
            assert value == second[name], name


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all files of a folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damage(path: Path, lines: dict[int, int]):
    """Cuts the features of some lines of a TSV by so many characters of base64."""
    content = path.read_text().splitlines(keepends=True)
    for line, number in lines.items():
        content[line] = content[line].rstrip("\n")[:-number] + "\n"
    path.write_text("".join(content))


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("to", WRITABLE)
def test_there_and_back(to, tmp_path, convert):
    source = write(tmp_path / "source", [make_record(number, num_regions=2 + number) for number in range(5)], to)
    records = list(open_regions(source))
    report = convert(source, tmp_path / "regions", "--rows_per_shard", 2)
    assert (report["images_in"], report["images_out"], report["missing"]) == (5, 5, {})
    assert report["regions"] == 2 + 3 + 4 + 5 + 6
    files = sorted(path.name for path in (tmp_path / "regions" / "data").iterdir())
    assert files == [f"train-0000{number}-of-00003.parquet" for number in range(3)]

    for record, expected in zip(open_regions(tmp_path / "regions"), records, strict=True):
        assert_same_records(record, expected)
    convert(tmp_path / "regions", tmp_path / "again", "--to", to)
    for record, expected in zip(open_regions(tmp_path / "again"), records, strict=True):
        assert_same_records(record, expected)
    if to in ("bottom_up_tsv", "lxmert_tsv"):
        assert (tmp_path / "again").read_bytes() == source.read_bytes()


def test_the_dataset_is_one_for_every_reader(source, tmp_path, convert):
    convert(source, tmp_path / "regions", "--rows_per_shard", 4)
    regions = load_region_dataset(tmp_path / "regions", "train")
    assert [regions[i]["image_id"] for i in range(10)] == [f"image-{number}" for number in range(10)]
    assert len(list(RegionStream.open(tmp_path / "regions", "train"))) == 10
    assert sorted(path.name for path in (tmp_path / "regions").iterdir()) == [
        "README.md",
        "conversion_report.json",
        "data",
    ]


def test_pictures_stay_pictures(tmp_path, convert):
    """A column of pictures is one in the converted dataset, too, where the scripts that draw find it."""
    pictures = [Image.new("RGB", (20, 10), (50 * number, 0, 0)) for number in range(5)]
    rows = [make_record(number) | {"image": picture} for number, picture in enumerate(pictures)]
    rows[4]["class_scores"][:] = 0  # so that the last shard is empty
    (tmp_path / "source").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "source" / "train.parquet")

    options = ("--rows_per_shard", 2, "--dtype", "float16", "--min_confidence", 0.1)
    convert(tmp_path / "source", tmp_path / "regions", *options)
    regions = load_region_dataset(tmp_path / "regions", "train")
    assert regions.dataset.features["image"] == datasets.Image()
    record = open_source([str(tmp_path / "regions")])["image-3"]
    for picture in (visualize_attention.load_picture(Pictures(regions), 3), inspect_regions.picture_of(record, None)):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(pictures[3]))
    convert(tmp_path / "source", tmp_path / "again", *options, "--num_proc", 2)
    for path in (tmp_path / "regions" / "data").iterdir():
        assert datasets.Features.from_arrow_schema(pq.read_schema(path)) == regions.dataset.features
        assert (tmp_path / "again" / "data" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name, to", [("a.lmdb", "vilbert_lmdb"), ("a.h5", "hdf5"), ("a.hdf5", "hdf5")])
def test_the_extension_tells_the_format(source, tmp_path, convert, capsys, name, to):
    report = convert(source, tmp_path / name)
    assert open_regions(tmp_path / name).format_name == report["settings"]["to"] == to
    if to == "hdf5":
        assert "The format hdf5 has no place for class_ids" in capsys.readouterr().out


def test_texts_that_are_not_written_are_not_counted(source, tmp_path, convert):
    convert(source, tmp_path / "regions", "--captions", write_captions(tmp_path, "a.json"))
    report = convert(tmp_path / "regions", tmp_path / "a.lmdb")
    assert report["texts"] == {} and report["notes"] == ["The format vilbert_lmdb has no place for captions."]


def test_extensions_that_leave_a_question(source, tmp_path, refuse):
    assert "--to bottom_up_tsv or --to lxmert_tsv" in refuse(source, tmp_path / "a.tsv")
    assert "expected a folder" in refuse(source, tmp_path / "a.parquet")


def test_several_sources_are_one(tmp_path, convert, capsys, monkeypatch):
    for name, numbers in (("a", [0, 1]), ("b", [1, 2])):
        write(tmp_path / f"{name}.tsv", [make_record(number) for number in numbers])
    arguments = [tmp_path / "a.tsv", tmp_path / "b.tsv", tmp_path / "regions"]
    monkeypatch.setattr(sys, "argv", ["convert_regions.py", *map(str, arguments)])
    convert_regions.main()
    assert open_regions(tmp_path / "regions").image_ids == ["image-0", "image-1", "image-2"]
    assert "the first record counts: 1 image (image-1)" in capsys.readouterr().out
    report = json.loads((tmp_path / "regions" / "conversion_report.json").read_text())["train"]
    assert report["settings"]["source"] == ["a.tsv", "b.tsv"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files cannot be counted here")
def test_files_of_a_source_are_not_open_at_once(source, tmp_path, convert):
    convert(source, tmp_path / "regions", "--rows_per_shard", 1)
    before = len(os.listdir("/proc/self/fd"))
    regions = open_source([str(tmp_path / "regions")])
    assert len(regions.readers) == 10
    for image_id in regions.image_ids:
        assert regions[image_id]["image_id"] == image_id
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_dtype(source, tmp_path, convert):
    convert(source, tmp_path / "half", "--dtype", "float16")
    for number, record in enumerate(open_regions(tmp_path / "half")):
        assert record["features"].dtype == np.float16
        np.testing.assert_array_equal(record["features"], make_record(number)["features"].astype(np.float16))
        np.testing.assert_array_equal(record["boxes"], make_record(number)["boxes"])
    # As in the source, unless another is asked for.
    convert(tmp_path / "half", tmp_path / "same")
    assert open_regions(tmp_path / "same")["image-0"]["features"].dtype == np.float16
    convert(tmp_path / "half", tmp_path / "single", "--dtype", "float32")
    assert open_regions(tmp_path / "single")["image-0"]["features"].dtype == np.float32


def test_float16_does_not_overflow(tmp_path, convert, refuse):
    records = [make_record(number) for number in range(3)]
    records[1]["features"][0, 0] = 1e6
    source = write(tmp_path / "source.tsv", records)
    error = refuse(source, tmp_path / "a", "--dtype", "float16")
    assert "image_id image-1): expected features" in error and "got 1000000.0, which float16 cannot hold" in error
    report = convert(source, tmp_path / "b", "--dtype", "float16", "--on_error", "skip")
    assert report["images_out"] == 2
    assert list(report["missing"]["invalid"]) == ["image-1"]
    assert str(tmp_path) not in json.dumps(report)


# ---------------------------------------------------------------- which regions


def test_min_confidence_and_max_regions(tmp_path, convert):
    source = write(tmp_path / "source.tsv", [make_record(number, num_regions=4) for number in range(2)])
    # scores 0.2, 0.4, 0.6, 0.8
    convert(source, tmp_path / "confident", "--min_confidence", 0.4)
    convert(source, tmp_path / "few", "--max_regions", 3)
    convert(source, tmp_path / "both", "--max_regions", 3, "--min_confidence", 0.5)
    for name, rows in (("confident", [1, 2, 3]), ("few", [3, 2, 1]), ("both", [3, 2])):
        for number, record in enumerate(open_regions(tmp_path / name)):
            whole = make_record(number, num_regions=4)
            expected = {key: value[rows] if isinstance(value, np.ndarray) else value for key, value in whole.items()}
            assert_same_records(record, expected)


def test_equal_scores_keep_their_order():
    record = make_record(0, num_regions=4) | {"class_scores": np.array([0.5, 0.9, 0.5, 0.9], dtype=np.float32)}
    assert select_regions(record, 3, None)["attribute_ids"].tolist() == [1, 3, 0]


def test_scores_of_class_probs(tmp_path, convert):
    # The background, at 0, is no class to be certain of.
    probs = np.array([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.1, 0.7, 0.2]], dtype=np.float32)
    record = make_record(0) | {"class_probs": probs}
    source = write(tmp_path / "source.tsv", [record], "bottom_up_tsv")
    convert(source, tmp_path / "regions", "--max_regions", 2, "--min_confidence", 0.4)
    np.testing.assert_array_equal(open_regions(tmp_path / "regions")["image-0"]["class_probs"], probs[[2, 1]])


def test_images_without_a_region_left(tmp_path, convert, capsys):
    records = [make_record(number) for number in range(3)]
    records[1]["class_scores"] /= 10
    report = convert(write(tmp_path / "source.tsv", records), tmp_path / "regions", "--min_confidence", 0.2)
    assert report["missing"] == {"no region left": {"image-1": "the highest score is 0.0750"}}
    assert "without a region of --min_confidence              1" in capsys.readouterr().out


def test_sources_without_scores(tmp_path, convert, refuse, capsys):
    source = write(tmp_path / "source.tsv", [make_record(0)], "bottom_up_tsv")
    assert "--min_confidence` needs a source with class_scores" in refuse(
        source, tmp_path / "a", "--min_confidence", 0.1
    )
    convert(source, tmp_path / "b", "--max_regions", 2)
    np.testing.assert_array_equal(open_regions(tmp_path / "b")["image-0"]["boxes"], make_record(0)["boxes"][:2])
    note = "The source has no scores: of each image the first 2 regions are kept."
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "b" / "README.md").read_text()


def test_empty_shards_load(tmp_path, convert):
    records = [make_record(number) for number in range(6)]
    for number in (0, 1, 4, 5):
        records[number]["class_scores"][:] = 0
    source = write(tmp_path / "source.tsv", records)
    report = convert(source, tmp_path / "regions", "--min_confidence", 0.1, "--rows_per_shard", 2)
    assert [file["images"] for file in report["files"].values()] == [0, 2, 0]
    assert (report["fewest_regions"], report["most_regions"]) == (3, 3)
    schemas = [pq.read_schema(path) for path in sorted((tmp_path / "regions" / "data").iterdir())]
    assert schemas[0] == schemas[1] == schemas[2]
    regions = load_region_dataset(tmp_path / "regions", "train")
    assert [regions[i]["image_id"] for i in range(2)] == ["image-2", "image-3"]
    assert len(list(RegionStream.open(tmp_path / "regions", "train"))) == 2
    assert open_regions(tmp_path / "regions").image_ids == ["image-2", "image-3"]


def test_nothing_left_is_an_error(source, tmp_path, refuse):
    assert "No image of 10 is left: 10 without a region" in refuse(source, tmp_path / "a", "--min_confidence", 2)
    (tmp_path / "captions.json").write_text('{"another": "a dog"}')
    error = refuse(source, tmp_path / "b", "--captions", tmp_path / "captions.json")
    assert "10 without a caption" in error and "image-0" in error and "another" in error


# ---------------------------------------------------------------- which images, with which texts


def test_excluded_images(source, tmp_path, convert, capsys):
    (tmp_path / "lines.txt").write_text("image-3.jpg\n\nimage-7\nimage-99\n")
    (tmp_path / "list.json").write_text('["image-0"]')
    report = convert(source, tmp_path / "regions", "--exclude_images", tmp_path / "lines.txt", tmp_path / "list.json")
    assert report["missing"] == {"excluded": ["image-0", "image-3", "image-7"]}
    assert report["not_in_source"] == {"exclude_images": ["image-99"]}
    assert open_regions(tmp_path / "regions").image_ids == [f"image-{number}" for number in (1, 2, 4, 5, 6, 8, 9)]
    output = capsys.readouterr().out
    assert "In --exclude_images, but not in the source: 1 image (image-99)." in output
    assert "  in --exclude_images" in output


KARPATHY = {
    "dataset": "flickr30k",
    "images": [
        {"filename": "image-1.jpg", "split": "train", "sentences": [{"raw": "A dog."}, {"raw": "It runs."}]},
        {"filename": "image-2.jpg", "split": "test", "sentences": [{"raw": "A cat."}]},
        {"filename": "image-3.jpg", "split": "restval", "sentences": [{"raw": "A cow."}]},
        {"filename": "image-77.jpg", "split": "train", "sentences": [{"raw": "Nothing."}]},
    ],
}
CAPTIONS = {"image-1": ["A dog.", "It runs."], "image-2": ["A cat."], "image-3": ["A cow."]}


def write_captions(folder: Path, name: str) -> Path:
    path = folder / name
    lines = [(image_id, caption) for image_id, captions in CAPTIONS.items() for caption in captions]
    if name == "dataset_flickr30k.json":
        path.write_text(json.dumps(KARPATHY))
    elif name.endswith(".json"):
        path.write_text(json.dumps(CAPTIONS))
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps({"image_id": i, "caption": c}) + "\n" for i, c in lines))
    elif name.endswith(".csv"):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("image_id", "caption"), *lines])
    else:
        numbers = {image_id: iter(range(5)) for image_id in CAPTIONS}
        path.write_text("".join(f"{i}.jpg#{next(numbers[i])}\t{c}\n" for i, c in lines))
    return path


@pytest.mark.parametrize("name", ["dataset_flickr30k.json", "a.json", "a.jsonl", "a.csv", "a.token"])
def test_captions(source, tmp_path, convert, name):
    path = write_captions(tmp_path, name)
    report = convert(source, tmp_path / "regions", "--captions", path, "--rows_per_shard", 2)
    regions = load_region_dataset(tmp_path / "regions", "train")
    assert {regions[i]["image_id"]: regions.captions(i) for i in range(len(regions))} == CAPTIONS
    assert report["texts"] == {"captions": 4}
    assert report["missing"] == {"no caption": [f"image-{number}" for number in (0, 4, 5, 6, 7, 8, 9)]}
    assert report["not_in_source"]["captions"] == (["image-77"] if "flickr" in name else [])


def test_captions_of_a_split(source, tmp_path, convert):
    path = write_captions(tmp_path, "dataset_flickr30k.json")
    arguments = ["--captions", path, "--captions_split", "train+restval", "--caption_column", "sentences"]
    convert(source, tmp_path / "regions", *arguments)
    regions = load_region_dataset(tmp_path / "regions", "train")
    assert [regions[i]["image_id"] for i in range(len(regions))] == ["image-1", "image-3"]
    assert regions.captions(0, "sentences") == ["A dog.", "It runs."]


def test_images_without_text_can_be_kept(source, tmp_path, convert):
    path = write_captions(tmp_path, "a.json")
    report = convert(source, tmp_path / "regions", "--captions", path, "--keep_images_without_text")
    regions = load_region_dataset(tmp_path / "regions", "train")
    assert [regions.captions(i) for i in range(3)] == [[], CAPTIONS["image-1"], CAPTIONS["image-2"]]
    assert (report["images_out"], report["missing"]) == (10, {})


def test_captions_of_several_files_and_coco_ids(tmp_path, convert):
    records = [make_record(0) | {"image_id": "COCO_train2014_000000000009"}, make_record(1) | {"image_id": "25"}]
    source = write(tmp_path / "source.tsv", records)
    (tmp_path / "a.json").write_text(
        json.dumps({"images": [{"id": 9}], "annotations": [{"image_id": 9, "caption": "one"}]})
    )
    (tmp_path / "b.jsonl").write_text(
        '{"image_id": "000000000025.jpg", "caption": "two"}\n{"image_id": 9, "caption": "three"}\n'
    )
    convert(source, tmp_path / "regions", "--captions", tmp_path / "a.json", tmp_path / "b.jsonl")
    regions = load_region_dataset(tmp_path / "regions", "train")
    assert [regions.captions(i) for i in range(2)] == [["one", "three"], ["two"]]


def test_a_column_is_not_replaced(tmp_path, convert, refuse):
    source = write(tmp_path / "source.tsv", [make_record(number) for number in range(4)])
    captions = write_captions(tmp_path, "a.json")
    convert(source, tmp_path / "regions", "--captions", captions)
    error = refuse(tmp_path / "regions", tmp_path / "again", "--captions", captions)
    assert "has a column 'captions' of its own" in error
    report = convert(tmp_path / "regions", tmp_path / "b", "--captions", captions, "--caption_column", "other")
    assert report["texts"] == {"captions": 4, "other": 4}


def test_questions_with_annotations(source, tmp_path, convert):
    questions = [{"question_id": 10 * i, "image_id": f"image-{i}", "question": f"what is {i}?"} for i in (4, 2)]
    answers = [{"answer": "yes", "answer_id": i} for i in range(10)]
    annotations = [
        {
            "question_id": question["question_id"],
            "image_id": question["image_id"],
            "question_type": "what is",
            "answer_type": "other",
            "multiple_choice_answer": "yes",
            "answers": answers,
        }
        for question in questions
    ]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
    files = ["--questions", tmp_path / "q.json", "--annotations", tmp_path / "a.json"]
    report = convert(source, tmp_path / "regions", *files, "--split", "validation")
    assert report["texts"] == {"questions": 2} and len(report["missing"]["no question"]) == 8
    (first, second) = questions_of_dataset(load_region_dataset(tmp_path / "regions", "validation"))
    assert (first.question_id, first.image_id, first.question, first.answers) == (
        20,
        "image-2",
        "what is 2?",
        ["yes"] * 10,
    )
    assert (second.question_id, second.question_type, second.answer_type) == (40, "what is", "other")

    # A test split has no answers, and the same columns.
    convert(source, tmp_path / "regions", "--questions", tmp_path / "q.json", "--split", "test")
    (example, _) = questions_of_dataset(load_region_dataset(tmp_path / "regions", "test"))
    assert (example.question, example.answers) == ("what is 2?", None)


def test_arguments_that_do_not_fit(source, tmp_path, refuse):
    regions = tmp_path / "regions"
    assert "--captions is for Parquet" in refuse(source, tmp_path / "a.lmdb", "--captions", "a.json")
    assert "--num_proc is for Parquet" in refuse(source, tmp_path / "a.lmdb", "--num_proc", 2)
    assert "--captions_split goes with" in refuse(source, regions, "--captions_split", "train")
    assert "got 2 for 1" in refuse(source, regions, "--questions", "q.json", "--annotations", "a.json", "b.json")
    assert "--split: expected letters" in refuse(source, regions, "--split", "../train")
    assert "at least 1, got 0" in refuse(source, regions, "--rows_per_shard", 0)
    assert "There is no file or folder /nowhere" in refuse("/nowhere", regions)
    assert not regions.exists()


# ---------------------------------------------------------------- sizes


def write_npz(folder: Path, image_ids: list[str]) -> Path:
    folder.mkdir()
    for number, image_id in enumerate(image_ids):
        boxes = np.array([[0, 0, 0.5, 0.5, 0.5, 0.5], [0.25, 0.5, 1, 1, 0.75, 0.5]], dtype=np.float16)
        features = np.full((2, 4), number, dtype=np.float16)
        conf = np.array([0.5, 0.25], dtype=np.float16)
        np.savez(folder / f"{image_id}.npz", features=features, norm_bb=boxes, conf=conf)
    return folder


def write_sizes(folder: Path, kind: str) -> Path:
    path = folder / f"sizes.{'csv' if kind == 'csv' else 'json'}"
    if kind == "csv":
        path.write_text("image_id,width,height\n9,640,480\n25,320,240\n")
    elif kind == "json":
        path.write_text('{"000000000009.jpg": [640, 480], "25": [320, 240]}')
    else:
        images = [
            {"id": 9, "width": 640, "height": 480, "file_name": "COCO_train2014_000000000009.jpg"},
            {"id": 25, "width": 320, "height": 240, "file_name": "000000000025.jpg"},
        ]
        path.write_text(json.dumps({"images": images, "annotations": []}))
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "coco"])
def test_image_sizes(tmp_path, convert, kind):
    source = write_npz(tmp_path / "npz", ["coco_train2014_000000000009", "coco_train2014_000000000025"])
    convert(source, tmp_path / "regions", "--image_sizes", write_sizes(tmp_path, kind))
    first, second = open_regions(tmp_path / "regions")
    assert (first["width"], first["height"], second["width"], second["height"]) == (640, 480, 320, 240)
    assert first["boxes"].tolist() == [[0, 0, 320, 240], [160, 240, 640, 480]]
    assert first["features"].dtype == np.float16


def test_images_without_a_size(tmp_path, convert, refuse, capsys):
    source = write_npz(tmp_path / "npz", ["9", "25", "30"])
    sizes = write_sizes(tmp_path, "csv")
    assert "image_id 30: expected its size" in refuse(source, tmp_path / "a", "--image_sizes", sizes)
    report = convert(source, tmp_path / "b", "--image_sizes", sizes, "--on_error", "skip")
    assert list(report["missing"]["invalid"]) == ["30"]
    convert(source, tmp_path / "c")
    assert "width and height are 1, and boxes are shares of them" in capsys.readouterr().out
    assert open_regions(tmp_path / "c")["30"]["boxes"].max() == 1
    (tmp_path / "bad.csv").write_text("image_id,width,height\n9,640,0\n")
    assert "bad.csv, line 2: expected width and height of image 9" in refuse(
        source, tmp_path / "d", "--image_sizes", tmp_path / "bad.csv"
    )


# ---------------------------------------------------------------- errors


@pytest.fixture
def faulty_source(tmp_path) -> Path:
    """Of eight images the first is damaged, 2 has a box outside, 3 is damaged, 5 has fewer features."""
    records = [make_record(number) for number in range(8)]
    records[2]["boxes"][1] = [0, 0, 300, 10]
    source = write(tmp_path / "faulty.tsv", records)
    damage(source, {0: 4, 3: 5, 5: 128})
    return source


def test_errors_stop_the_conversion(faulty_source, tmp_path, refuse):
    error = refuse(faulty_source, tmp_path / "regions")
    assert "faulty.tsv (lxmert_tsv, image_id image-0): expected" in error and "--on_error skip" in error
    assert not (tmp_path / "regions" / "data").exists()


def test_errors_are_skipped_and_counted(faulty_source, tmp_path, convert, capsys):
    report = convert(faulty_source, tmp_path / "regions", "--on_error", "skip", "--rows_per_shard", 3)
    assert (report["images_in"], report["images_out"]) == (8, 4)
    assert list(report["missing"]["damaged"]) == ["image-0", "image-3", "image-5"]
    assert list(report["missing"]["invalid"]) == ["image-2"]
    assert "region 1: expected a box" in report["missing"]["invalid"]["image-2"]
    assert report["missing"]["damaged"]["image-0"].startswith("faulty.tsv (lxmert_tsv, image_id image-0): expected")
    assert open_regions(tmp_path / "regions").image_ids == [f"image-{number}" for number in (1, 4, 6, 7)]
    output = capsys.readouterr().out
    for line in ("images in the source  ", "  damaged  ", "images written  ", "damaged: faulty.tsv (lxmert_tsv"):
        assert line in output
    assert "Of 8 images 4 are missing: 3 damaged, 1 invalid." in (tmp_path / "regions" / "README.md").read_text()
    # The same into a single file.
    report = convert(faulty_source, tmp_path / "again.lmdb", "--on_error", "skip")
    assert len(report["missing"]["damaged"]) == 3
    assert open_regions(tmp_path / "again.lmdb").image_ids == [f"image-{number}" for number in (1, 4, 6, 7)]


def test_skipping_goes_on_after_an_error_and_stopping_does_not(tmp_path, convert, refuse):
    source = write(tmp_path / "source.tsv", [make_record(number) for number in range(6)])
    damage(source, {4: 5})
    arguments = [source, tmp_path / "regions", "--rows_per_shard", 2]
    refuse(*arguments)
    first_shard = tmp_path / "regions" / ".conversion" / "train" / "00000"
    written = first_shard.stat().st_mtime_ns
    (tmp_path / "regions" / ".conversion" / "train" / "00001.json").unlink()
    report = convert(*arguments, "--on_error", "skip")
    assert list(report["missing"]["damaged"]) == ["image-4"]
    moved = tmp_path / "regions" / "data" / "train-00000-of-00003.parquet"
    assert moved.stat().st_mtime_ns == written  # was not written again


def test_an_error_that_was_skipped_stops_when_it_is_not_to_be(tmp_path, convert, refuse, monkeypatch):
    source = write(tmp_path / "source.tsv", [make_record(number) for number in range(4)])
    damage(source, {1: 5})
    arguments = [source, tmp_path / "regions", "--rows_per_shard", 2]
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Counts, "total", lambda parts: {}["stopped here"])
        convert(*arguments, "--on_error", "skip")
    assert "(lxmert_tsv, image_id image-1)" in refuse(*arguments)


def test_images_with_other_columns(tmp_path, convert):
    source = write_npz(tmp_path / "npz", ["1", "2", "3"])
    with np.load(source / "2.npz") as arrays:
        np.savez(source / "2.npz", **{name: arrays[name] for name in ("features", "norm_bb")})
    with np.load(source / "3.npz") as arrays:
        np.savez(source / "3.npz", **dict(arrays) | {"features": arrays["features"].astype(np.float32)})
    report = convert(source, tmp_path / "regions", "--on_error", "skip")
    messages = report["missing"]["invalid"]
    assert "class_scores, as in 1, got image_id" in messages["2"]
    assert (
        "features float16[4]" in messages["3"]
        and "got image_id, width, height, boxes, features float32[4]" in messages["3"]
    )
    # A dtype that is asked for is that of all.
    report = convert(source, tmp_path / "half", "--on_error", "skip", "--dtype", "float16")
    assert list(report["missing"]["invalid"]) == ["2"]


def test_nothing_can_be_read(tmp_path, refuse):
    source = write(tmp_path / "source.tsv", [make_record(number) for number in range(2)])
    damage(source, {0: 5, 1: 5})
    assert "None of 2 images can be read. The last one: " in refuse(source, tmp_path / "a", "--on_error", "skip")


# ---------------------------------------------------------------- splits, settings, folders


def test_splits_beside_one_another(source, tmp_path, convert, refuse):
    folder = tmp_path / "regions"
    convert(source, folder)
    other = write(tmp_path / "other.tsv", [make_record(number) for number in range(20, 23)])
    convert(other, folder, "--split", "validation")
    assert len(load_region_dataset(folder, "train")) == 10
    assert len(load_region_dataset(folder, "validation")) == 3
    card = (folder / "README.md").read_text()
    assert "| train | 10 | 30 | 3 to 3 |\n| validation | 3 | 9 | 3 to 3 |" in card

    third = write(tmp_path / "third.tsv", [make_record(0, width=9)])
    error = refuse(third, folder, "--split", "test")
    assert "expected the columns of the split train" in error and "float32[9]" in error

    # As a source, a dataset of several splits has to be asked for one.
    error = refuse(folder, tmp_path / "again.lmdb")
    assert "expected one of its splits, train, validation, got None" in error
    convert(folder, tmp_path / "again.lmdb", "--source_split", "validation")
    assert open_regions(tmp_path / "again.lmdb").image_ids == ["image-20", "image-21", "image-22"]
    assert "has no splits to choose 'train' from" in refuse(source, tmp_path / "x", "--source_split", "train")


def test_an_edited_card_is_left(source, tmp_path, convert, capsys):
    folder = tmp_path / "regions"
    convert(source, folder)
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nThe license is a long story.\n")
    convert(source, folder, "--split", "validation")
    assert card.read_text().endswith("long story.\n")
    assert "README.md has been edited" in capsys.readouterr().out


def test_the_card_changes_with_the_data(tmp_path, convert):
    digests = []
    for number in range(2):
        convert(write(tmp_path / f"{number}.tsv", [make_record(number)]), tmp_path / str(number) / "regions")
        digests.append((tmp_path / str(number) / "regions" / "README.md").read_text().split("sha256")[1][:80])
    assert digests[0] != digests[1]


def test_the_same_command_again_does_nothing(source, tmp_path, convert):
    convert(source, tmp_path / "regions")
    before = contents(tmp_path / "regions")
    written = (tmp_path / "regions" / "data" / "train-00000-of-00001.parquet").stat().st_mtime_ns
    convert(source, tmp_path / "regions")
    assert contents(tmp_path / "regions") == before
    assert (tmp_path / "regions" / "data" / "train-00000-of-00001.parquet").stat().st_mtime_ns == written


def test_other_settings_are_refused(source, tmp_path, convert, refuse, monkeypatch):
    folder = tmp_path / "regions"
    arguments = [source, folder, "--rows_per_shard", 2]
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Counts, "total", lambda parts: {}["stopped here"])
        convert(*arguments, "--max_regions", 2)
    error = refuse(*arguments, "--dtype", "float16")
    assert "--max_regions was 2, is None; --dtype was None, is float16" in error
    assert f"remove {folder / '.conversion' / 'train'} to start over" in error
    convert(*arguments, "--max_regions", 2)
    assert "--rows_per_shard was 2, is 5" in refuse(source, folder, "--max_regions", 2, "--rows_per_shard", 5)
    (tmp_path / "excluded.txt").write_text("image-1")
    error = refuse(*arguments, "--max_regions", 2, "--exclude_images", tmp_path / "excluded.txt")
    assert "--exclude_images was None, is ['excluded.txt (sha256" in error
    os.utime(source, ns=(1, 1))
    error = refuse(*arguments, "--max_regions", 2)
    assert "got others: the files of the source have changed. " in error and "choose another folder" in error


def test_folders_of_others_are_refused(source, tmp_path, convert, refuse):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("Mine.")
    assert "expected a new or empty folder" in refuse(source, tmp_path / "mine")
    assert contents(tmp_path / "mine").keys() == {"README.md"}
    assert "exists, and is no folder" in refuse(source, source, "--to", "parquet")
    convert(source, tmp_path / "regions")
    (tmp_path / "regions" / "data" / "test-0.parquet").write_text("")
    assert "has files of the split test already" in refuse(source, tmp_path / "regions", "--split", "test")
    convert(source, tmp_path / "a.lmdb")
    assert "exists already" in refuse(source, tmp_path / "a.lmdb")


def test_two_conversions_do_not_meet(source, tmp_path, convert, refuse):
    folder = tmp_path / "regions"
    (folder / ".conversion").mkdir(parents=True)
    with FileLock(folder / ".conversion" / "lock"):
        assert "Another process is converting to" in refuse(source, folder)
    convert(source, folder)


def test_total_of_counts():
    parts = [
        Counts(
            images=2,
            regions=7,
            fewest_regions=3,
            most_regions=4,
            texts={"captions": 2},
            missing={"invalid": {"a": "x"}},
        ),
        Counts(missing={"invalid": {"b": "y"}, "damaged": {"c": "z"}}),
        Counts(images=1, regions=9, fewest_regions=9, most_regions=9, texts={"captions": 3}),
    ]
    total = Counts.total(parts)
    assert (total.images, total.regions, total.fewest_regions, total.most_regions) == (3, 16, 3, 9)
    assert total.texts == {"captions": 5}
    assert total.missing == {"invalid": {"a": "x", "b": "y"}, "damaged": {"c": "z"}}


def test_type_names():
    assert (
        type_name(convert_regions.pa.list_(convert_regions.pa.list_(convert_regions.pa.float16(), 4)))
        == "list<float16[4]>"
    )


# ---------------------------------------------------------------- kills

# Forks for every conversion, so that the libraries are imported once. A conversion is killed at its n-th step: the n-th
# time that it opens, makes, renames or removes a file of the destination.
KILLER = """
import os, signal, sys
import convert_regions

def convert(arguments, last_step):
    process = os.fork()
    if process == 0:
        steps = 0

        def count(event, parameters):
            nonlocal steps
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (
                event == "open" and str(parameters[0]).startswith(arguments[1])
            ):
                steps += 1
                if steps == last_step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        sys.argv = ["convert_regions.py", *arguments]
        try:
            convert_regions.main()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True

source, folder, *arguments = sys.argv[1:]
last_step = 1
while convert([source, f"{folder}/{last_step}/regions", *arguments], last_step):
    assert not convert([source, f"{folder}/{last_step}/regions", *arguments], None)
    last_step += 1
# Five times in a row, each a little further on.
kills = [convert([source, f"{folder}/five/regions", *arguments], step) for step in (5, 8, 11, 14, 17)]
assert kills == [True] * 5 and not convert([source, f"{folder}/five/regions", *arguments], None)
print(last_step - 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the conversions are forked")
def test_killed_at_every_step(source, tmp_path, convert):
    damage(source, {3: 5})
    arguments = ["--rows_per_shard", "4", "--on_error", "skip"]
    convert(source, tmp_path / "undisturbed" / "regions", *arguments)
    expected = contents(tmp_path / "undisturbed" / "regions")
    assert len(expected) == 3 + 2  # shards, report, card
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(tmp_path / "killed"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    num_steps = int(result.stdout.split()[-1])
    assert num_steps >= 30
    for folder in (tmp_path / "killed").iterdir():
        assert contents(folder / "regions") == expected, folder.name


@pytest.mark.slow
def test_killed_five_times_at_random(tmp_path):
    """Two processes; every other time the first of them alone is killed, and the other one has to end by itself."""
    rng = random.Random(0)
    source = write(tmp_path / "source.tsv", [make_record(number, 36, 2048) for number in range(400)], "bottom_up_tsv")
    command = [sys.executable, SCRIPT, str(source)]
    settings = ["--rows_per_shard", "10", "--num_proc", "2", "--dtype", "float16"]
    subprocess.run([*command, str(tmp_path / "undisturbed" / "regions"), *settings], check=True, capture_output=True)

    folder = tmp_path / "killed" / "regions"
    work_dir = folder / ".conversion" / "train"
    numbers = []
    for kill in range(5):
        before = len(list(work_dir.glob("*.json")))
        process = subprocess.Popen(
            [*command, str(folder), *settings], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while len(list(work_dir.glob("*.json"))) <= before + 1:
            assert process.poll() is None, process.stdout.read().decode()[-2000:]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        assert process.poll() is None
        (os.killpg if kill % 2 == 0 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.read()  # ends when the last process that has it open ends
        numbers.append(len(list(work_dir.glob("*.json"))))
    assert numbers == sorted(numbers) and numbers[-1] < 41, numbers
    subprocess.run([*command, str(folder), *settings], check=True, capture_output=True)
    assert contents(folder) == contents(tmp_path / "undisturbed" / "regions")


def test_several_processes_write_what_one_does(source, tmp_path, convert):
    arguments = ["--rows_per_shard", "3", "--captions", str(write_captions(tmp_path, "a.json"))]
    arguments += ["--keep_images_without_text", "--max_regions", "2"]
    convert(source, tmp_path / "one" / "regions", *arguments)
    result = subprocess.run(
        [sys.executable, SCRIPT, source, tmp_path / "two" / "regions", *arguments, "--num_proc", "2"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f"Next: python examples/inspect_regions.py {tmp_path}/two/regions --split train" in result.stdout
    assert contents(tmp_path / "two" / "regions") == contents(tmp_path / "one" / "regions")


# ---------------------------------------------------------------- real files, and the Hub


@pytest.mark.skipif(not BOTTOM_UP.is_dir(), reason="there are no real bottom-up-attention features")
@pytest.mark.parametrize(
    "name, to",
    [("lxmert_train2014_obj36.tsv", "lxmert_tsv"), ("trainval_resnet101_faster_rcnn_genome_36.tsv", "bottom_up_tsv")],
)
def test_real_features_there_and_back(tmp_path, convert, name, to):
    report = convert(BOTTOM_UP / name, tmp_path / "regions")
    assert report["images_out"] == (10 if to == "lxmert_tsv" else 1)
    convert(tmp_path / "regions", tmp_path / "again.tsv", "--to", to)
    for original, record in zip(open_regions(BOTTOM_UP / name), open_regions(tmp_path / "again.tsv"), strict=True):
        assert_same_records(record, original)

    def numbers(path: Path) -> list[list[bytes]]:
        fields = [line.split(b"\t") for line in path.read_bytes().splitlines()]
        return [[base64.b64decode(value) if len(value) > 100 else value for value in line] for line in fields]

    assert numbers(tmp_path / "again.tsv") == numbers(BOTTOM_UP / name)


@needs_hub
def test_push_and_convert_from_the_hub(source, tmp_path):
    with start_hub(tmp_path / "hub") as hub:

        def run(*arguments, home: str) -> str:
            result = subprocess.run(
                [sys.executable, SCRIPT, *map(str, arguments)],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env=hub.env(home=tmp_path / home),
            )
            assert result.returncode == 0, result.stderr[-3000:]
            return result.stdout

        arguments = ["--rows_per_shard", 4, "--push_to_hub", "--hub_dataset_id", "org/tiny-regions"]
        output = run(source, tmp_path / "regions", *arguments, home="pusher")
        assert "Uploaded: http" in output and "/datasets/org/tiny-regions/" in output
        run("org/tiny-regions", tmp_path / "again.tsv", "--to", "lxmert_tsv", home="client")
    assert (tmp_path / "again.tsv").read_bytes() == source.read_bytes()
