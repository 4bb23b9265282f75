"""Hard negatives mined as a user mines them: a dataset with one column more, in pools, and after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import needs_hub, start_hub
from test_convert_regions import KILLER, contents

import mine_hard_negatives as script
from processing import PretrainingPairs, load_region_dataset, mine_hard_negatives

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = str(EXAMPLES / "mine_hard_negatives.py")
CAPTIONS = [
    ["a red dog runs", "a dog"],
    ["a red cat runs"],
    [],
    ["the blue dog sits", "a blue house"],
    ["A  Red dog runs", "a green bird sits"],
    None,
    ["a green house", "the bird runs"],
    ["the red house", "a dog sits"],
    ["the blue cat sits"],
    ["a bird"],
]
TITLES = ["红色的狗", "蓝色的狗", "红色的鸟", "绿色的房子", "", "蓝色的房子", "大房子", "小狗", None, "小鸟"]


def write_dataset(folder: Path, num_images: int = 10, **columns) -> Path:
    """Images in two files of one split, with the columns of a region dataset, and of other tasks."""
    rng = np.random.default_rng(0)
    texts = {
        "captions": pa.array(CAPTIONS[:num_images], pa.list_(pa.string())),
        "title": pa.array(TITLES[:num_images], pa.string()),
    }
    regions = [rng.random((2 + number % 3, 4)).astype(np.float32) for number in range(num_images)]
    boxes = [np.concatenate([values[:, :2], values[:, :2] + 1], axis=1).tolist() for values in regions]
    table = pa.table(
        {
            "image_id": [f"image-{number}" for number in range(num_images)],
            "width": pa.array([10] * num_images, pa.int32()),
            "height": pa.array([10] * num_images, pa.int32()),
            "boxes": pa.array(boxes, pa.list_(pa.list_(pa.float32(), 4))),
            "features": pa.array([v.astype(np.float16).tolist() for v in regions], pa.list_(pa.list_(pa.float16(), 4))),
        }
        | texts
        | columns
    )
    (folder / "data").mkdir(parents=True)
    middle = num_images // 2
    pq.write_table(table.slice(0, middle), folder / "data" / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(middle), folder / "data" / "train-00001-of-00002.parquet")
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    return write_dataset(tmp_path / "source")


@pytest.fixture
def mine(monkeypatch):
    """Runs the script in this process. Returns what it says of the split."""

    def run(*arguments) -> dict:
        monkeypatch.setattr(sys, "argv", ["mine_hard_negatives.py", *map(str, arguments)])
        script.main()
        return json.loads(Path(arguments[1], "conversion_report.json").read_text())["train"]

    return run


@pytest.fixture
def refuse(mine, capsys):
    """Runs the script, which must end with an error, and returns the error."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit_info:
            mine(*arguments)
        assert exit_info.value.code not in (0, None)
        return capsys.readouterr().err

    return run


def hard_negatives(folder: Path) -> list[list[str]]:
    regions = load_region_dataset(folder, "train")
    return [regions.captions(row, "hard_negatives") for row in range(len(regions))]


def test_a_column_more(source, tmp_path, mine, capsys):
    report = mine(source, tmp_path / "mined", "--rows_per_shard", 4)
    expected = mine_hard_negatives([captions or [] for captions in CAPTIONS])
    assert hard_negatives(tmp_path / "mined") == expected
    assert "a red cat runs" in expected[0] and expected[2] == expected[5] == []

    before, after = load_region_dataset(source, "train"), load_region_dataset(tmp_path / "mined", "train")
    assert after.column_names == [*before.column_names, "hard_negatives", "hard_negatives_image_ids"]
    # Each negative is a caption of the image that stands at its place.
    captions_of = {after[row]["image_id"]: after.captions(row) for row in range(len(after))}
    for row in range(len(after)):
        image_ids = after.captions(row, "hard_negatives_image_ids")
        assert len(image_ids) == len(after.captions(row, "hard_negatives"))
        for text, image_id in zip(after.captions(row, "hard_negatives"), image_ids, strict=True):
            assert text in captions_of[image_id] and image_id != after[row]["image_id"]
    mined = ["hard_negatives", "hard_negatives_image_ids"]
    assert after.dataset.remove_columns(mined).to_list() == before.dataset.to_list()
    assert sorted(path.name for path in (tmp_path / "mined").iterdir()) == [
        "README.md",
        "conversion_report.json",
        "data",
    ]
    assert len(list((tmp_path / "mined" / "data").iterdir())) == 3

    assert report["texts"]["hard_negatives"] == sum(map(len, expected))
    (note,) = report["notes"]
    assert "at most 20 captions" in note and "`captions`, searched in one pool. 2 of 10 images have none." in note
    assert note in capsys.readouterr().out
    card = (tmp_path / "mined" / "README.md").read_text()
    assert note in card and "Written by `examples/mine_hard_negatives.py`" in card

    # What they are for.
    pairs = PretrainingPairs(after, negative_probability=1.0, hard_negative_share=1.0)
    assert {pairs[0]["caption"] for pairs.epoch in range(50)} <= set(expected[0])


def test_pools(source, tmp_path, mine):
    # 10 images make 3 pools of at most 4: 3, 3 and 4.
    arguments = ["--images_per_pool", 4, "--num_negatives", 2, "--max_similarity", 0.5]
    report = mine(source, tmp_path / "mined", *arguments)
    captions = [values or [] for values in CAPTIONS]
    expected = [mine_hard_negatives(pool, 2, 0.5) for pool in (captions[:3], captions[3:6], captions[6:])]
    assert hard_negatives(tmp_path / "mined") == sum(expected, [])
    num_without = sum(not texts for pool in expected for texts in pool)
    assert f"searched in 3 pools of at most 4 images. {num_without} of 10 images" in report["notes"][0]


def test_single_captions_and_characters(source, tmp_path, mine):
    mine(source, tmp_path / "mined", "--caption_column", "title", "--analyzer", "char")
    expected = mine_hard_negatives([[] if title is None else [title] for title in TITLES], analyzer="char")
    assert hard_negatives(tmp_path / "mined") == expected
    assert expected[7][0] == "小鸟"


def test_chinese_captions_are_no_words(tmp_path, mine, refuse):
    titles = ["红色连衣裙女", "韩国ahc蜗牛水乳", "包邮iPhone手机壳", "皮鞋", "a red dress", "AHC 24K"]
    undivided = write_dataset(tmp_path / "undivided", 5, captions=pa.array(titles[:5]))
    error = refuse(undivided, tmp_path / "mined")
    assert "--analyzer word: expected captions with blanks between words, but 3 of 5 have Chinese ones" in error
    assert "give --analyzer char" in error and not (tmp_path / "mined").exists()
    mine(undivided, tmp_path / "mined", "--analyzer", "char")
    # Words of jieba with blanks between them, and a few among others.
    divided = ["红色 连衣裙 女", "韩国 ahc 蜗牛 水乳", *titles[2:]]
    mine(write_dataset(tmp_path / "divided", 6, captions=pa.array(divided)), tmp_path / "mined_words")


def test_of_an_image_that_is_there_twice_the_first_counts(tmp_path, mine, capsys):
    ids = pa.array(["a", "b", "c", "a"])
    captions = pa.array([["red dog"], ["red cat"], ["blue dog"], ["blue cat"]], pa.list_(pa.string()))
    source = write_dataset(tmp_path / "source", 4, image_id=ids, captions=captions)
    mine(source, tmp_path / "mined")
    assert hard_negatives(tmp_path / "mined") == mine_hard_negatives([["red dog"], ["red cat"], ["blue dog"]])
    assert "the first record counts: 1 image (a)" in capsys.readouterr().out


def test_several_processes_write_what_one_does(source, tmp_path, mine):
    arguments = ["--images_per_pool", "4", "--rows_per_shard", "3"]
    mine(source, tmp_path / "one" / "mined", *arguments)
    result = subprocess.run(
        [sys.executable, SCRIPT, source, tmp_path / "two" / "mined", *arguments, "--num_proc", "2"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "two" / "mined") == contents(tmp_path / "one" / "mined")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script is forked")
def test_killed_at_every_step(source, tmp_path, mine):
    arguments = ["--images_per_pool", "5", "--rows_per_shard", "5"]
    mine(source, tmp_path / "undisturbed" / "mined", *arguments)
    expected = contents(tmp_path / "undisturbed" / "mined")
    assert len(expected) == 2 + 2  # shards, report, card
    killer = KILLER.replace("convert_regions", "mine_hard_negatives").replace("regions", "mined")
    # Imported once, before all the forks.
    killer = f"import sklearn.feature_extraction.text\n{killer}"
    result = subprocess.run(
        [sys.executable, "-c", killer, str(source), str(tmp_path / "killed"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[-1]) >= 30
    for folder in (tmp_path / "killed").iterdir():
        assert contents(folder / "mined") == expected, folder.name


def test_what_was_mined_is_not_mined_again(source, tmp_path, mine, monkeypatch, refuse):
    def stop(*arguments, **options):
        raise ValueError("stopped here")

    arguments = [source, tmp_path / "mined", "--images_per_pool", 5]
    with monkeypatch.context() as patch:
        patch.setattr(script.MiningPlan, "make_texts", lambda plan, *rest: stop(MAKE_TEXTS(plan, *rest)))
        assert "stopped here" in refuse(*arguments)
    assert "--num_negatives was 20, is 5" in refuse(*arguments, "--num_negatives", 5)
    with monkeypatch.context() as patch:
        patch.setattr(script, "find_hard_negatives", stop)
        mine(*arguments)
    captions = [values or [] for values in CAPTIONS]
    assert hard_negatives(tmp_path / "mined") == mine_hard_negatives(captions[:5]) + mine_hard_negatives(captions[5:])


MAKE_TEXTS = script.MiningPlan.make_texts


def test_arguments_that_do_not_fit(source, tmp_path, refuse, monkeypatch):
    mined = tmp_path / "mined"
    assert "--num_negatives: expected at least 1, got 0" in refuse(source, mined, "--num_negatives", 0)
    assert "--images_per_pool: expected at least 1, got -3" in refuse(source, mined, "--images_per_pool", -3)
    assert "--num_proc: expected at least 1, got 0" in refuse(source, mined, "--num_proc", 0)
    assert "--max_similarity: expected above 0 and at most 1" in refuse(source, mined, "--max_similarity", 1.5)
    assert "--split: expected letters" in refuse(source, mined, "--split", "../train")
    assert "got validation" in refuse(source, mined, "--split", "validation")
    assert "There is no file or folder /nowhere" in refuse("/nowhere", mined)
    assert "got image_id, width, height, boxes" in refuse(source, mined, "--caption_column", "sentences")
    assert "expected captions in column 'width', got 10" in refuse(source, mined, "--caption_column", "width")
    (tmp_path / "regions.tsv").write_text("a\tb\n")
    assert "it is no folder of Parquet files" in refuse(tmp_path / "regions.tsv", mined)
    empty = write_dataset(tmp_path / "empty", 4, captions=pa.array([[], None, [], []], pa.list_(pa.string())))
    assert "None of 4 images has a caption in column 'captions'" in refuse(empty, mined)
    nulls = write_dataset(tmp_path / "nulls", 2, captions=pa.array([["a"], [None]], pa.list_(pa.string())))
    assert "image_id image-1: expected captions in column 'captions', got [None]" in refuse(nulls, mined)
    again = write_dataset(tmp_path / "again", 2, hard_negatives=pa.array([[], []], pa.list_(pa.string())))
    assert "has a column 'hard_negatives' already" in refuse(again, mined)
    assert not mined.exists()
    assert "expected a new or empty folder" in refuse(source, source)
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    assert 'needs scikit-learn: pip install "interbert[negatives]"' in refuse(source, mined)


@needs_hub
def test_push_and_mine_from_the_hub(source, tmp_path):
    with start_hub(tmp_path / "hub") as hub:
        arguments = [source, tmp_path / "mined", "--push_to_hub", "--hub_dataset_id", "org/tiny-negatives"]
        result = subprocess.run(
            [sys.executable, SCRIPT, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=hub.env(home=tmp_path / "home"),
        )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Uploaded: http" in result.stdout and "/datasets/org/tiny-negatives/" in result.stdout
