"""Datasets of product titles as a user makes them: which products are in which split, what is said of the others, and
what is left after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_convert_regions import KILLER, contents

import build_title_dataset as script
from processing import load_region_dataset
from processing.region_formats import create_regions

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TITLES = Path(__file__).resolve().parents[2] / "shared" / "data" / "titles_zh"
# By image: scores of the regions, or how many there are.
IMAGES = {
    "a.jpg": [0.3, 0.1, 0.9, 0.05, 0.5],  # 0.1 is not above 0.1
    "b": 20,
    "c": 1,
    "d": [0.1, 0.1],
    "e": 2,
    "f": 3,
    "g": 2,
    "h": 2,
    "nobody's": 2,
}
PRODUCTS = """product_id,title,image_id,category
1,红色连衣裙,a,裙
2,红色  连衣裙,a.jpg,裙
3,蓝色连衣裙,a,裙
4,红色连衣裙,b,裙
5,SK-II 230ml,b,裙
6,包邮 特价,b,裙
7,黑色长裤,c,裤
8,白色长裤,d,裤
9,灰色长裤,e,裤
10,红色连衣裙,f,裤
11,绿色短裤,g,裤
12,短裤短裙套装,g,裙
13,棕色皮鞋,h,鞋
14,紫色长裤,x,裤
15,黄色长裤,,裤
16,,h,裙
17,青色短裤,h,裤
"""
CATEGORIES = ["--pretrain_categories", "裙", "--finetune_categories", "裤", "鞋"]
ARGUMENTS = [*CATEGORIES, "--validation_size", "1", "--test_size", "2", "--seed", "3"]


def write_regions(path: Path, columns: tuple[str, ...] = ("class_scores",), images: dict = IMAGES) -> Path:
    rng = np.random.default_rng(0)
    with create_regions(path, "parquet") as writer:
        for image_id, scores in images.items():
            scores = np.linspace(0.9, 0.2, scores) if isinstance(scores, int) else scores
            record = {
                "image_id": image_id,
                "width": 10,
                "height": 10,
                "boxes": np.tile(np.array([1, 1, 5, 5], dtype=np.float32), (len(scores), 1)),
                "features": rng.random((len(scores), 4)).astype(np.float32),
                "class_scores": np.array(scores, dtype=np.float32),
            }
            writer.write({name: record[name] for name in record if name != "class_scores" or name in columns})
    return path


@pytest.fixture
def products(tmp_path) -> Path:
    (tmp_path / "products.csv").write_text(PRODUCTS, encoding="utf-8")
    return tmp_path / "products.csv"


@pytest.fixture
def regions(tmp_path) -> Path:
    return write_regions(tmp_path / "regions.parquet")


@pytest.fixture
def build(monkeypatch):
    """Runs the script in this process. Returns its report."""

    def run(*arguments) -> dict:
        monkeypatch.setattr(sys, "argv", ["build_title_dataset.py", *map(str, arguments)])
        script.main()
        return json.loads(Path(arguments[1], "report.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture
def refuse(build, capsys):
    """Runs the script, which must end with an error, and returns the error."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit_info:
            build(*arguments)
        assert exit_info.value.code not in (0, None)
        return capsys.readouterr().err

    return run


def rows_of(folder: Path, split: str) -> dict[str, list[str]]:
    """The titles of each image."""
    dataset = load_region_dataset(folder, split)
    return {dataset[row]["image_id"]: dataset.captions(row) for row in range(len(dataset))}


def write_products(path: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    """A table of product ids, titles, images and categories."""
    lines = ["product_id,title,image_id,category", *map(",".join, rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def images_of(folder: Path) -> dict[str, set[str]]:
    """The images of each split."""
    splits = json.loads((folder / "conversion_report.json").read_text(encoding="utf-8"))
    return {split: set(rows_of(folder, split)) for split in splits}


def dropped_rows(folder: Path) -> list[dict[str, str | None]]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]


def dropped_ids(report: dict) -> dict[str, list[str]]:
    return {
        reason: [example["product_id"] for example in group["examples"]] for reason, group in report["dropped"].items()
    }


def test_who_is_where(products, regions, tmp_path, build, capsys):
    built = tmp_path / "built"
    report = build(products, built, "--regions", regions, *ARGUMENTS)
    # Image d has no region that is certain.
    assert rows_of(built, "pretrain") == {"a.jpg": ["红色连衣裙", "蓝色连衣裙"], "b": ["红色连衣裙"]}
    assert rows_of(built, "train") | rows_of(built, "validation") | rows_of(built, "test") == {
        "c": ["黑色长裤"],
        "e": ["灰色长裤"],
        "f": ["红色连衣裙"],
        "g": ["绿色短裤"],
        "h": ["棕色皮鞋", "青色短裤"],
    }
    assert len(rows_of(built, "test")) == 2 and len(rows_of(built, "validation")) == 1
    assert "f" in rows_of(built, "train") and "d" not in rows_of(built, "train")

    pretrain = load_region_dataset(built, "pretrain")
    assert pretrain.captions(0, "product_ids") == ["1", "3"]
    assert pretrain.captions(0, "categories") == ["裙", "裙"]
    np.testing.assert_allclose(pretrain[0]["class_scores"], [0.9, 0.5, 0.3])
    assert len(pretrain[1]["boxes"]) == 16

    assert dropped_ids(report) == {
        "no title": ["16"],
        "no Chinese character": ["5"],
        "spam": ["6"],
        "duplicate": ["2"],
        "no regions": ["14", "15"],
        "image of finetuning": ["12"],
        "no region left": ["8"],
    }
    assert report["products"] == 17 and report["kept"]["products"] == 9 and report["cut"]["products"] == 0
    details = {reason: group["examples"][0].get("detail") for reason, group in report["dropped"].items()}
    assert details["duplicate"] == "as product 1" and details["spam"] == "包邮 特价" and details["no regions"] == "x"
    assert report["images_without_a_product"] == 1
    assert report["splits"]["pretrain"] == {
        "images": 2,
        "regions": 3 + 16,
        "texts": {"captions": 3, "product_ids": 3, "categories": 3},
    }
    assert sorted(path.name for path in built.iterdir()) == [
        "README.md",
        "conversion_report.json",
        "data",
        "dropped.jsonl",
        "report.json",
    ]
    row = {"product_id": "6", "image_id": "b", "title": "包邮 特价", "reason": "spam", "detail": "包邮 特价"}
    rows = dropped_rows(built)
    assert row in rows and [row["product_id"] for row in rows] == ["16", "5", "6", "2", "14", "15", "12", "8"]
    assert [row["image_id"] for row in rows if row["reason"] == "no regions"] == ["x", None]
    output = capsys.readouterr().out
    assert "dropped: without a Chinese character, 1 of 1:\n  5  SK-II 230ml\n" in output
    assert "Regions have a score above 0.1." in (built / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("product_id", "titles"),
    [
        ("{0}", ["{0}号红裙", "{0}号红裙！"]),
        ("{0}", ["{0}号红裙", "夏天的{0}号"]),
        ("{0}-{1}", ["{0}号红裙，大码", "{0}号 红裙（大码）"]),
        ("{0}-{1}", ["{0}号红裙", "{0}号红裙"]),
    ],
)
@pytest.mark.parametrize("categories", [[], ["裙", "裤"]])
def test_no_product_is_in_training_and_held_out(tmp_path, build, product_id, titles, categories):
    rows = [
        (product_id.format(number, place), title.format(number), f"{number}-{place}", "裙" if place else "裤")
        for number in range(20)
        for place, title in enumerate(titles)
    ]
    regions = write_regions(tmp_path / "regions.parquet", images={image_id: 2 for _, _, image_id, _ in rows})
    arguments = ["--regions", regions, "--validation_size", 2, "--test_size", 4]
    if categories:
        arguments += ["--pretrain_categories", "裙", "--finetune_categories", "裤"]
    report = build(write_products(tmp_path / "products.csv", rows), tmp_path / "built", *arguments)
    images = images_of(tmp_path / "built")
    numbers = {split: {image_id.split("-")[0] for image_id in image_ids} for split, image_ids in images.items()}
    training = [name for name in ("pretrain", "train") if name in images]
    assert training == (["pretrain", "train"] if categories else ["train"])
    assert (
        [len(images[split]) for split in ("validation", "test")]
        == [2, 4]
        == [len(numbers[split]) for split in ("validation", "test")]
    )
    assert numbers["test"].isdisjoint(numbers["validation"])
    assert all((numbers["test"] | numbers["validation"]).isdisjoint(numbers[split]) for split in training)
    # What is not like anything held out is all there.
    assert sum(len(images[split]) for split in training) == 2 * 14
    assert report["dropped"]["like a held-out image"]["products"] == 6
    held_out = {image_id: split for split in ("validation", "test") for image_id in images[split]}
    left_out = {row["image_id"]: row["detail"] for row in dropped_rows(tmp_path / "built")}
    assert len(left_out) == 6
    for image_id, detail in left_out.items():
        (like,) = [other for other in held_out if other.split("-")[0] == image_id.split("-")[0]]
        assert detail == f"as {like} of {held_out[like]}"

    shuffled = write_products(tmp_path / "shuffled.csv", rows[::-1])
    build(shuffled, tmp_path / "again", *arguments)
    assert images_of(tmp_path / "again") == images


def test_photographs_of_a_product_whose_title_was_dropped(tmp_path, build):
    # Photograph b is of product 1, too, which is dropped twice: without a title, and with the title of product 2.
    rows = [("1", "红裙", "a", ""), ("1", "", "b", ""), ("2", "蓝裙", "b", ""), ("3", "绿裙", "c", "")]
    rows += [("3", "白裙", "d", ""), ("4", "白裙", "d", ""), ("4", "灰裙", "e", ""), ("5", "黑裙", "f", "")]
    # Photograph x of products 6 and 7 has no regions.
    rows += [("6", "紫裙", "g", ""), ("6", "紫裙", "x.jpg", ""), ("7", "紫裤", "x", ""), ("7", "长裤", "h", "")]
    table = write_products(tmp_path / "products.csv", rows)
    regions = write_regions(tmp_path / "regions.parquet", images=dict.fromkeys("abcdefgh", 2))
    for seed in range(5):
        folder = tmp_path / str(seed)
        build(table, folder, "--regions", regions, "--validation_size", 0, "--test_size", 3, "--seed", seed)
        images = images_of(folder)
        for group in ({"a", "b"}, {"c", "d", "e"}, {"f"}, {"g", "h"}):
            assert len(group & images["test"]) == 1 and not group & images["train"] or group <= images["train"]


def test_a_seed_holds_the_same_images_out(products, regions, tmp_path, build):
    # No title of a pretraining image, which would be left out with it, is held out.
    products.write_text(PRODUCTS.replace("10,红色", "10,橙色"), encoding="utf-8")

    def held_out(name: str, *arguments) -> list[str]:
        build(products, tmp_path / name, "--regions", regions, *ARGUMENTS, *arguments)
        return [list(rows_of(tmp_path / name, split)) for split in ("test", "validation")]

    seeds = [held_out(f"seed-{seed}", "--seed", seed) for seed in range(6)]
    assert seeds[3] == held_out("again", "--max_regions", 1)
    assert len({str(images) for images in seeds}) > 1
    # A larger validation split leaves the test split as it is.
    assert held_out("larger", "--validation_size", 2)[0] == seeds[3][0]


def test_without_categories(products, regions, tmp_path, build):
    arguments = ["--regions", regions, "--validation_size", 0, "--test_size", 2, "--caption_column", "titles"]
    report = build(products, tmp_path / "built", *arguments)
    assert list(report["splits"]) == ["train", "test"] and "other category" not in report["dropped"]
    train = load_region_dataset(tmp_path / "built", "train")
    assert "titles" in train.column_names and "captions" not in train.column_names
    assert len(train) == 5  # a to h, without d and the two of test


def test_other_columns_and_categories(tmp_path, regions, build):
    table = tmp_path / "products.tsv"
    table.write_text("p1\tc\t红裙\t裙\np2\te\t蓝裙\t裙\np3\tf\t绿裤\t裤\np4\tg\t白帽\t帽\n", encoding="utf-8")
    arguments = ["--columns", "id", "picture", "title", "category", "--product_id_column", "id"]
    arguments += ["--image_id_column", "picture", "--validation_size", 0, "--test_size", 0]
    arguments += ["--pretrain_categories", "裤", "--finetune_categories", "裙"]
    report = build(table, tmp_path / "built", "--regions", regions, *arguments)
    assert rows_of(tmp_path / "built", "pretrain") == {"f": ["绿裤"]}
    assert rows_of(tmp_path / "built", "train") == {"c": ["红裙"], "e": ["蓝裙"]}
    (example,) = report["dropped"]["other category"]["examples"]
    assert example == {"product_id": "p4", "title": "白帽", "detail": "帽"}


def test_regions_without_scores(products, tmp_path, build, refuse):
    regions = write_regions(tmp_path / "bare.parquet", columns=())
    arguments = [products, tmp_path / "built", "--regions", regions, *ARGUMENTS]
    assert "--confidence_above needs regions with class_scores or class_probs, got image_id" in refuse(*arguments)
    assert not (tmp_path / "built").exists()
    report = build(*arguments, "--confidence_above", -1)
    assert "no region left" not in report["dropped"]


def test_invalid_regions(products, tmp_path, build, refuse):
    images = IMAGES | {"c": [0.9, np.nan]}
    regions = write_regions(tmp_path / "regions.parquet", images=images)
    arguments = [products, tmp_path / "built", "--regions", regions, *ARGUMENTS]
    assert "image_id c" in refuse(*arguments)
    report = build(*arguments, "--on_error", "skip")
    assert dropped_ids(report)["invalid"] == ["7"]
    assert len(rows_of(tmp_path / "built", "test")) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script is forked")
def test_killed(products, regions, tmp_path, build):
    arguments = ["--regions", str(regions), *ARGUMENTS, "--rows_per_shard", "1"]
    build(products, tmp_path / "undisturbed" / "built", *arguments)
    expected = contents(tmp_path / "undisturbed" / "built")
    assert len(expected) == 2 + 3 + 1 + 2 + 4  # shards of the splits, both reports, card, what was dropped
    killer = KILLER.replace("convert_regions", "build_title_dataset").replace("regions", "built")
    # At some steps; what is imported late is imported before all the forks.
    killer = f"import jieba\n{killer}".replace("last_step += 1", "last_step += 29")
    result = subprocess.run(
        [sys.executable, "-c", killer, str(products), str(tmp_path / "killed"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[-1]) >= 80
    for folder in (tmp_path / "killed").iterdir():
        assert contents(folder / "built") == expected, folder.name


def test_what_was_begun_with_other_arguments(products, regions, tmp_path, build, refuse):
    arguments = [products, tmp_path / "built", "--regions", regions, *ARGUMENTS]
    build(*arguments)
    before = contents(tmp_path / "built")
    build(*arguments)
    assert contents(tmp_path / "built") == before
    assert "--max_regions was 16, is 3" in refuse(*arguments, "--max_regions", 3)
    products.write_text(PRODUCTS.replace("黑色", "白色"), encoding="utf-8")
    assert "--products was products.csv (sha256" in refuse(*arguments)
    assert {name: digest for name, digest in contents(tmp_path / "built").items() if "lock" not in name} == before


def test_a_folder_keeps_to_its_categories(products, regions, tmp_path, build, refuse, monkeypatch):
    def unchanged(before: dict[str, str]) -> bool:
        return {name: digest for name, digest in contents(built).items() if "lock" not in name} == before

    built = tmp_path / "built"
    arguments = [products, built, "--regions", regions, *ARGUMENTS]
    sizes = ["--validation_size", "1", "--test_size", "2", "--seed", "3"]
    without = [products, built, "--regions", regions, *sizes]
    build(*without)
    before = contents(built)
    message = refuse(*arguments)
    assert "the split train was begun, got others: --pretrain_categories was None, is ['裙']" in message
    assert unchanged(before) and "pretrain" not in images_of(built)

    # Stopped behind the split pretrain, and in the middle of it.
    build(products, tmp_path / "undisturbed" / "built", "--regions", regions, *ARGUMENTS)
    expected = contents(tmp_path / "undisturbed" / "built")
    convert = script.convert_to_parquet
    for last, step in (("pretrain", "done"), ("pretrain", "begun")):
        built = tmp_path / step / "built"
        arguments[1] = without[1] = built

        def convert_until(args, plan, last=last, step=step):
            if step == "begun":
                monkeypatch.setattr(plan, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            elif args.split != last:
                raise KeyboardInterrupt
            return convert(args, plan)

        with monkeypatch.context() as patch:
            patch.setattr(script, "convert_to_parquet", convert_until)
            assert "Stopped." in refuse(*arguments)
        before = {name: digest for name, digest in contents(built).items() if "lock" not in name}
        assert len(list(built.glob("data/*"))) == (step == "done")
        assert "the split pretrain was begun, got others: --pretrain_categories was ['裙'], is None" in refuse(*without)
        assert unchanged(before)
        build(*arguments)
        assert contents(built) == expected


def test_a_folder_with_another_split(products, regions, tmp_path, build, refuse):
    arguments = [products, tmp_path / "built", "--regions", regions, *ARGUMENTS]
    build(*arguments)
    path = tmp_path / "built" / "conversion_report.json"
    reports = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(reports | {"extra": reports["train"]}), encoding="utf-8")
    before = contents(tmp_path / "built")
    message = refuse(*arguments)
    assert "expected a folder with no other splits than pretrain, train, validation, test, got extra" in message
    assert contents(tmp_path / "built") == before


def test_titles_only(products, tmp_path, build, refuse, capsys):
    arguments = [products, tmp_path / "titles", "--titles_only"]
    report = build(*arguments, "--max_characters", 4)
    before = contents(tmp_path / "titles")
    assert sorted(before) == ["dropped.jsonl", "report.json", "titles.jsonl"]
    rows = [
        json.loads(line) for line in (tmp_path / "titles" / "titles.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    # 红色 连衣裙: the second word ends behind 4 characters. So there are more duplicates.
    assert rows[0] == {"product_id": "1", "title": "红色连衣裙", "caption": "红色", "image_id": "a", "category": "裙"}
    assert rows[-1]["caption"] == "青色短裤"
    assert report["products"] == 17 and report["kept"]["products"] + report["cut"]["products"] == len(rows)
    assert dropped_ids(report)["duplicate"] == ["2"]
    assert len(dropped_rows(tmp_path / "titles")) + len(rows) == 17
    assert {"product_id": "3", "title": "蓝色连衣裙", "caption": "蓝色"} in report["cut"]["examples"]
    assert "3  蓝色连衣裙  ->  蓝色" in capsys.readouterr().out

    (tmp_path / "titles" / "report.json").unlink()  # as after a kill
    build(*arguments, "--max_characters", 4)
    assert contents(tmp_path / "titles") == before
    assert "cleaned with other settings" in refuse(*arguments)
    assert "expected a new or empty folder" in refuse(products, tmp_path, "--titles_only")
    assert contents(tmp_path / "titles") == before


def test_spam_filters(products, tmp_path, build, refuse, monkeypatch):
    def dropped(name: str, *arguments) -> list[str]:
        return dropped_ids(build(products, tmp_path / name, "--titles_only", *arguments))["spam"]

    (tmp_path / "words.txt").write_text("红色\n连衣裙\n\n长裤\n", encoding="utf-8")
    words = ["--spam_words", tmp_path / "words.txt"]
    assert dropped("words", *words) == ["1", "2", "4", "10"]  # all of it, and not most of a short title
    assert dropped("any", *words, "--max_spam_share", 0) == ["1", "2", "3", "4", "7", "8", "9", "10", "14", "15"]

    (tmp_path / "my_filter.py").write_text("def is_red(title):\n    return '红' in title\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert dropped("own", "--spam_filter", "my_filter:is_red") == ["1", "2", "4", "10"]
    report = build(products, tmp_path / "none", "--titles_only", "--no_spam_filter")
    assert "spam" not in report["dropped"] and report["settings"]["no_spam_filter"] is True
    arguments = [products, tmp_path / "refused", "--titles_only"]
    for other in (["--spam_filter", "my_filter:is_red"], words, ["--max_spam_share", "0"]):
        message = f"expected --no_spam_filter or {other[0]}, got both"
        assert message in refuse(*arguments, "--no_spam_filter", *other)
    assert "expected a function 'is_blue' in my_filter" in refuse(*arguments, "--spam_filter", "my_filter:is_blue")
    assert "expected module:function, No module named" in refuse(*arguments, "--spam_filter", "no_such_filter:f")
    assert "for the filter that is built in" in refuse(*arguments, "--spam_filter", "my_filter:is_red", *words)
    (tmp_path / "words.txt").write_text("\n", encoding="utf-8")
    assert "expected a word in each line, got none" in refuse(*arguments, *words)


def test_arguments_that_do_not_fit(products, regions, tmp_path, refuse, monkeypatch):
    built = tmp_path / "built"
    arguments = [products, built, "--regions", regions]
    assert "expected one of --regions and --titles_only, got neither" in refuse(products, built)
    assert "--seed goes with --regions, got --titles_only" in refuse(products, built, "--titles_only", "--seed", 0)
    assert "--max_regions: expected at least 1, got 0" in refuse(*arguments, "--max_regions", 0)
    assert "--test_size: expected at least 0, got -1" in refuse(*arguments, "--test_size", -1)
    assert "--caption_column: expected another name than" in refuse(*arguments, "--caption_column", "categories")
    assert "--max_characters: expected at least 1" in refuse(*arguments, "--max_characters", 0)
    assert "--max_spam_share: expected from 0 to 1, got 2.0" in refuse(*arguments, "--max_spam_share", 2)
    assert "go together, got only --pretrain_categories" in refuse(*arguments, "--pretrain_categories", "裙")
    both = ["--pretrain_categories", "裙", "--finetune_categories", "裤", "裙"]
    assert "got ['裙'] for both" in refuse(*arguments, *both)
    unknown = ["--pretrain_categories", "裙", "--finetune_categories", "帽"]
    assert "such as 裙, 裤, 鞋, got ['帽']" in refuse(*arguments, *unknown)
    assert "expected 2,000 products to hold out and others to train on, got 5 to hold out" in refuse(*arguments)
    one = ["--validation_size", 0, "--test_size", 1]
    same = write_regions(tmp_path / "same.parquet", images={"a": 2, "f": 2})
    assert "got 1 to hold out and 0 images of others" in refuse(products, built, "--regions", same, *one)
    # Image f is held out, as d has no region that is certain; image a has the same title.
    same = write_regions(tmp_path / "same_and_d.parquet", images={"a": 2, "f": 2, "d": [0.1]})
    assert "Expected images to pretrain on, got none" in refuse(products, built, "--regions", same, *one, *CATEGORIES)
    assert "expected a column 'picture', got" in refuse(*arguments, "--image_id_column", "picture")
    assert "There is no file or folder" in refuse(products, built, "--regions", "/nowhere")
    other = write_regions(tmp_path / "other.parquet", images={"z": 3})
    assert "No product is left that has a title and regions. Images of regions are such as ['z']" in refuse(
        products, built, "--regions", other
    )
    assert not built.exists()
    assert "expected a new or empty folder" in refuse(products, tmp_path, "--regions", regions)
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert 'jieba: pip install "interbert[chinese]"' in refuse(*arguments)


def test_titles_that_cannot_be_written(tmp_path, build):
    table = tmp_path / "products.jsonl"
    titles = ["红裙\\ud83d", "SK-II\\udc00", "\\ud83d"]
    table.write_text(
        "".join(f'{{"product_id": {number}, "title": "{title}"}}\n' for number, title in enumerate(titles)),
        encoding="utf-8",
    )
    report = build(table, tmp_path / "titles", "--titles_only")
    assert report["kept"]["examples"] == [{"product_id": "0", "title": "红裙", "caption": "红裙"}]
    assert dropped_ids(report) == {"no title": ["2"], "no Chinese character": ["1"]}


@pytest.mark.skipif(not TITLES.is_dir(), reason="there are no real titles")
def test_real_titles(tmp_path, build):
    arguments = ["--titles_only", "--columns", "product_id", "title", "parts"]
    report = build(TITLES / "product_titles.tsv", tmp_path / "titles", *arguments)
    assert report["products"] == 2673
    assert all(len(report[name]["examples"]) == 10 for name in ("kept", "cut"))
    lines = (tmp_path / "titles" / "titles.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == report["kept"]["products"] + report["cut"]["products"]
    assert all(0 < len(json.loads(line)["caption"]) <= 36 for line in lines)
    assert len(lines) + len(dropped_rows(tmp_path / "titles")) == 2673
