import json
from pathlib import Path

import pytest

from processing.region_dataset import load_region_dataset
from processing.tasks import ImageCaptions, canonical_image_id, read_captions, read_image_captions

FLICKR8K = Path(__file__).parents[2] / "shared" / "data" / "flickr8k"


def karpathy_image(split, captions, **names):
    sentences = [{"tokens": caption.split(), "raw": caption, "sentid": i} for i, caption in enumerate(captions)]
    return {"split": split, "sentences": sentences, "imgid": 0, "sentids": []} | names


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def test_karpathy_splits_of_flickr30k(tmp_path):
    images = [
        karpathy_image("train", ["Two dogs. ", "A dog ."], filename="1000092795.jpg"),
        karpathy_image("test", ["A car ."], filename="10002456.jpg"),
        karpathy_image("val", ["A cat ."], filename="36979.jpg"),
    ]
    path = write_json(tmp_path / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    assert read_captions(path, "train") == {"1000092795": ["Two dogs.", "A dog ."]}
    assert read_captions(path, "test") == {"10002456": ["A car ."]}
    assert list(read_captions(path)) == ["1000092795", "10002456", "36979"]
    assert read_image_captions(path)[2] == ImageCaptions("36979", ["A cat ."], "val")
    with pytest.raises(ValueError, match=r"expected one of the splits \['test', 'train', 'val'\], got 'validation'"):
        read_captions(path, "validation")
    with pytest.raises(ValueError, match="got 'train.restval'"):
        read_captions(path, "train+restval")


def test_restval_joins_train_on_request_and_coco_images_go_by_number(tmp_path):
    images = [
        karpathy_image("train", ["a"], filename="COCO_train2014_000000000009.jpg", filepath="train2014", cocoid=9),
        karpathy_image("restval", ["b"], filename="COCO_val2014_000000000042.jpg", filepath="val2014", cocoid=42),
        karpathy_image("val", ["c"], filename="COCO_val2014_000000000073.jpg", filepath="val2014", cocoid=73),
    ]
    path = write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    assert read_captions(path, "train") == {"9": ["a"]}
    assert read_captions(path, "train+restval") == {"9": ["a"], "42": ["b"]}
    assert read_captions(path, "val")[canonical_image_id("COCO_val2014_000000000073")] == ["c"]


def test_coco_captions(tmp_path):
    content = {
        "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}, {"id": 25}, {"id": 30}],
        "annotations": [
            {"image_id": 25, "id": 1, "caption": "A giraffe.\n"},
            {"image_id": 9, "id": 2, "caption": "Food."},
            {"image_id": 25, "id": 3, "caption": "Two giraffes."},
        ],
    }
    path = write_json(tmp_path / "captions_train2014.json", content)
    assert read_captions(path) == {"25": ["A giraffe.", "Two giraffes."], "9": ["Food."]}
    with pytest.raises(ValueError, match=r"expected one of the splits \[\], got 'train'"):
        read_captions(path, "train")

    content["annotations"].append({"image_id": 31, "id": 4, "caption": "?"})
    with pytest.raises(ValueError, match=r"annotations\[3\]: expected the id of one of the file's 3 images, got 31"):
        read_captions(write_json(path, content))
    content["annotations"][3] = {"image_id": 30, "id": 4}
    with pytest.raises(ValueError, match=r"annotations\[3\]: expected the field 'caption', got \['image_id', 'id'\]"):
        read_captions(write_json(path, content))


def test_flickr_tokens(tmp_path):
    path = tmp_path / "results_20130124.token"
    path.write_text(
        "1000092795.jpg#0\tTwo young guys #1 look at hands .\n"
        "1000092795.jpg#1\tTwo men\twith a tab .\n"
        "10002456.jpg#0\tSeveral men .\n"
        "a#b.jpg#0\tA car .\n"
    )
    assert read_captions(path) == {
        "1000092795": ["Two young guys #1 look at hands .", "Two men\twith a tab ."],
        "10002456": ["Several men ."],
        "a#b": ["A car ."],
    }
    with path.open("a") as file:
        file.write("10002456.jpg\tno number\n")
    with pytest.raises(
        ValueError, match=r"results_20130124.token, line 5: expected 'IMAGE.jpg#NUMBER<TAB>CAPTION', got"
    ):
        read_captions(path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("x.json", '{"7": ["a", "b"], "x.jpg": "c"}'),
        ("x.json", '[{"image_id": 7, "captions": ["a", "b"]}, {"image_id": "x", "caption": "c"}]'),
        (
            "x.jsonl",
            '{"image_id": 7, "caption": "a"}\n{"image_id": "x", "caption": "c"}\n{"image_id": 7, "caption": "b"}',
        ),
        ("x.csv", "image_id,caption\n7,a\n7,b\nx.jpg,c\n"),
        ("x.tsv", "caption\timage_id\na\t7\nb\t7\nc\tx.jpg\n"),
    ],
)
def test_plain_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_captions(tmp_path / name) == {"7": ["a", "b"], "x": ["c"]}


def test_plain_files_with_splits(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("image_id,caption,split\n1,a,train\n2,b,test\n1,c,train\n")
    assert read_captions(path, "train") == {"1": ["a", "c"]}
    with path.open("a") as file:
        file.write("2,d,train\n")
    with pytest.raises(ValueError, match="line 5: expected image '2' in one split, got 'test' and 'train'"):
        read_captions(path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.jsonl", '{"image_id": 1}', r"x\.jsonl, line 1: expected the field 'caption', got \['image_id'\]"),
        ("x.jsonl", '{"caption": "a"}', r"x\.jsonl, line 1: expected the field 'image_id'"),
        ("x.csv", "id,caption\n1,a\n", r"x\.csv, line 2: expected the field 'image_id', got \['id', 'caption'\]"),
        ("x.jsonl", '{"image_id": 1, "captions": "a"}', "line 1: expected 'captions' to be a list of strings, got 'a'"),
        ("x.json", '{"1": [1]}', r"x\.json: expected '1' to be a list of strings, got \[1\]"),
        ("x.json", '{"images": [{"filename": "a.jpg"}]}', r"images\[0\]: expected the field 'sentences'"),
        ("x.json", '{"images": [{"filename": "a.jpg", "sentences": []}]}', r"images\[0\]: expected the field 'split'"),
        ("x.xml", "", r"expected one of the extensions .*, got '\.xml'"),
    ],
)
def test_faulty_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


@pytest.mark.skipif(not FLICKR8K.exists(), reason="needs the Flickr8k sample")
def test_captions_of_flickr8k_survive_every_format(tmp_path):
    validation = load_region_dataset(FLICKR8K, "validation")
    image_ids = validation.dataset["image_id"][:200]
    captions = {image_id: validation.captions(i) for i, image_id in enumerate(image_ids)}
    assert {len(texts) for texts in captions.values()} == {5}
    lines = [f"{name}.jpg#{i}\t{text}\n" for name, texts in captions.items() for i, text in enumerate(texts)]
    (tmp_path / "Flickr8k.token.txt").write_text("".join(lines))
    images = [karpathy_image("val", texts, filename=f"{name}.jpg") for name, texts in captions.items()]
    write_json(tmp_path / "dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"})
    expected = {name: [text.strip() for text in texts] for name, texts in captions.items()}
    assert read_captions(tmp_path / "Flickr8k.token.txt") == expected
    assert read_captions(tmp_path / "dataset_flickr8k.json", "val") == expected
