import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from model_fixtures import tiny_model
from transformers import BertTokenizer

from modeling_interbert import InterBERTForMultipleChoice
from processing.processing_interbert import InterBERTProcessor
from processing.region_dataset import RegionDataset
from processing.tasks import (
    VCRCollator,
    VCRDataset,
    VCRExample,
    merge_annotated_boxes,
    multiple_choice,
    read_vcr,
    read_vcr_metadata,
)
from processing.tasks.vcr import UNISEX_NAMES

VCR = Path(__file__).parents[2] / "shared" / "data" / "vcr"
VOCABULARY = VCR.parent / "vocab" / "bert-base-uncased-vocab.txt"
needs_vcr = pytest.mark.skipif(not VCR.exists(), reason="needs the VCR sample")

RECORD = {
    "annot_id": "val-7",
    "img_id": "val-3",
    "img_fn": "movie/clip_00.01.46@0.jpg",
    "metadata_fn": "movie/clip_00.01.46@0.json",
    "objects": ["person", "person", "car", "person", "cellphone"],
    "question": ["Why", "is", [3], "near", [2], "?"],
    "answer_choices": [
        [[3], "is", "sad", "."],
        [[0, 3], "talk", "."],
        [[1], "has", "the", [4], "."],
        ["No", "reason", "."],
    ],
    "answer_label": 2,
    "rationale_choices": [[[1], "smiles", "."], [[0, 1, 2], "."], ["x"], ["y"]],
    "rationale_label": 1,
}


def write(folder, *records, name="val.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / name


def test_tags_become_names(tmp_path):
    (example,) = read_vcr(write(tmp_path, RECORD))
    # In the order of the first mention: object 3, then 0, then 1.
    assert UNISEX_NAMES[:3] == ["Casey", "Riley", "Jessie"]
    assert example == VCRExample(
        annot_id="val-7",
        image_id="val-3",
        question="Why is Casey near car ?",
        answers=["Casey is sad .", "Riley and Casey talk .", "Jessie has the cellphone .", "No reason ."],
        rationales=["Jessie smiles .", "Riley and Jessie and car .", "x", "y"],
        answer_label=2,
        rationale_label=1,
        metadata_path="movie/clip_00.01.46@0.json",
    )
    assert read_vcr(tmp_path / "val.jsonl", image_id="img_fn")[0].image_id == "clip_00.01.46@0"
    with pytest.raises(ValueError, match=r"`image_id` must be one of \['img_id', 'img_fn'\], got 'image'"):
        read_vcr(tmp_path / "val.jsonl", image_id="image")


def test_people_of_one_annotation_have_different_names(tmp_path):
    count = len(UNISEX_NAMES)
    assert len(set(UNISEX_NAMES)) == count
    people = {"objects": ["person"] * (count + 1), "question": [[i] for i in range(count)]}
    (example,) = read_vcr(write(tmp_path, RECORD | people | {"rationale_choices": [["x"]] * 4}))
    assert sorted(example.question.split()) == sorted(UNISEX_NAMES)
    assert example.answers[0] == f"{UNISEX_NAMES[3]} is sad ."


def test_a_test_split_has_no_labels(tmp_path):
    record = {name: value for name, value in RECORD.items() if not name.endswith("label")}
    (example,) = read_vcr(write(tmp_path, record))
    assert example.answer_label is None and example.rationale_label is None
    assert multiple_choice(example, "answer").label is None
    with pytest.raises(ValueError, match="'val-7' has no right answer: `given_answer` must say which to take"):
        multiple_choice(example, "rationale")
    given = multiple_choice(example, "rationale", given_answer=0)
    assert given == (["Why is Casey near car ?", "Casey is sad ."], example.rationales, None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": [[5]]}, "line 2: expected an object number below 5, got 5"),
        ({"question": [[-1]]}, "line 2: expected an object number below 5, got -1"),
        ({"question": ["a", 3]}, "line 2: expected a token or a list of object numbers, got 3"),
        ({"question": "why ?"}, "line 2: expected a text as a list of tokens, got 'why \\?'"),
        ({"answer_label": 4}, "line 2: expected 'answer_label' to be from 0 to 3, got 4"),
        ({"rationale_label": -1}, "line 2: expected 'rationale_label' to be from 0 to 3, got -1"),
        ({"answer_choices": [["a"]] * 3}, "line 2: expected 'answer_choices' to be a list of 4, got"),
        ({"objects": None}, "line 2: expected the field 'objects', got"),
        ({"annot_id": "val-0"}, "line 2: expected every annotation id once, got 'val-0' again"),
        (
            {"metadata_fn": "../../x.json"},
            "line 2: expected 'metadata_fn' to be a path inside the folder of images, got",
        ),
        ({"metadata_fn": 7}, "line 2: expected 'metadata_fn' to be a string, got 7"),
        ({"metadata_fn": "/x.json"}, "line 2: expected 'metadata_fn' to be a path inside the folder of images, got"),
    ],
)
def test_faulty_records(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"val\.jsonl, {message}"):
        read_vcr(write(tmp_path, RECORD | {"annot_id": "val-0"}, RECORD | change))


# Regions


def test_metadata(tmp_path):
    path = tmp_path / "x.json"
    content = {
        "boxes": [[0, 0, 10, 20, 0.9], [5, 5, 40, 20, 0.5]],
        "segms": [[], []],
        "names": ["person", "car"],
        "width": 100,
        "height": 50,
    }
    path.write_text(json.dumps(content))
    metadata = read_vcr_metadata(path)
    assert metadata["boxes"].tolist() == [[0, 0, 10, 20], [5, 5, 40, 20]]
    assert metadata["boxes"].dtype == np.float32
    np.testing.assert_allclose(metadata["scores"], [0.9, 0.5])
    assert (metadata["names"], metadata["width"], metadata["height"]) == (["person", "car"], 100, 50)
    for change in ({"names": ["person"]}, {"boxes": [[0, 0, 10, 20]] * 2}, {"boxes": [[0, 0], [1]]}, {"boxes": [{}]}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=r"x\.json: expected a box of five numbers for each of \d names"):
            read_vcr_metadata(path)
    path.write_text(json.dumps({name: content[name] for name in ("boxes", "names", "width")}))
    with pytest.raises(ValueError, match=r"x\.json: expected the field 'height', got \['boxes', 'names', 'width'\]"):
        read_vcr_metadata(path)
    path.write_text(json.dumps(content | {"boxes": [], "names": []}))
    assert read_vcr_metadata(path)["boxes"].shape == (0, 4)


def detected():
    return {
        "image_id": "val-3",
        "width": 100,
        "height": 50,
        "boxes": np.array([[0, 0, 20, 20], [50, 0, 100, 50], [0, 0, 12, 20]], dtype=np.float32),
        "features": np.array([[1, 1], [2, 2], [3, 3]], dtype=np.float16),
        "class_ids": np.array([0, 1, 2], dtype=np.int32),
    }


def test_annotated_boxes_come_first_with_the_feature_of_the_region_that_they_overlap_most():
    # IoU of the first with the regions: 200/400, 0, 200/240. The second overlaps region 1 only, the third none.
    boxes = np.array([[0, 0, 10, 20], [90, 40, 100, 50], [30, 0, 40, 10]], dtype=np.float32)
    merged = merge_annotated_boxes(detected(), {"boxes": boxes, "width": 100, "height": 50})
    assert merged["boxes"].tolist() == boxes[:2].tolist() + detected()["boxes"].tolist()
    assert merged["features"].tolist() == [[3, 3], [2, 2], [1, 1], [2, 2], [3, 3]]
    assert merged["features"].dtype == np.float16 and merged["boxes"].dtype == np.float32
    assert (merged["image_id"], merged["width"], merged["height"]) == ("val-3", 100, 50)
    # Of another size of the image: all boxes are in the pixels of the detector's.
    doubled = merge_annotated_boxes(detected(), {"boxes": boxes * [4, 2, 4, 2], "width": 400, "height": 100})
    assert doubled["boxes"].tolist() == merged["boxes"].tolist()
    assert doubled["features"].tolist() == merged["features"].tolist()
    empty = merge_annotated_boxes(detected(), {"boxes": boxes[:0], "width": 100, "height": 50})
    assert empty["boxes"].tolist() == detected()["boxes"].tolist()


def test_annotated_boxes_may_have_features_of_their_own():
    boxes = np.array([[30, 0, 40, 10]], dtype=np.float32)
    annotated = {"boxes": boxes, "width": 100, "height": 50, "features": np.array([[9, 8]], dtype=np.float16)}
    merged = merge_annotated_boxes(detected(), annotated)
    assert merged["boxes"].tolist() == boxes.tolist() + detected()["boxes"].tolist()
    assert merged["features"].tolist() == [[9, 8], [1, 1], [2, 2], [3, 3]]


WIDTH = 6  # of the tiny model's features


def make_regions(boxes, value, width=WIDTH):
    table = pa.table(
        {
            "image_id": ["val-3"],
            "width": pa.array([100], pa.int32()),
            "height": pa.array([50], pa.int32()),
            "boxes": pa.array([boxes], pa.list_(pa.list_(pa.float32(), 4))),
            "features": pa.array([[[value + i] * width for i in range(len(boxes))]], pa.list_(pa.list_(pa.float16()))),
        }
    )
    return RegionDataset(datasets.Dataset(table))


def test_the_dataset_merges_on_request(tmp_path):
    examples = read_vcr(write(tmp_path, RECORD))
    metadata = {"boxes": [[0, 0, 10, 20, 0.9]], "names": ["person"], "width": 100, "height": 50}
    (tmp_path / "movie").mkdir()
    (tmp_path / examples[0].metadata_path).write_text(json.dumps(metadata))
    regions, annotated = make_regions([[50, 0, 100, 50], [0, 0, 20, 20]], 1), make_regions([[0, 0, 5, 5]], 7)

    (plain,) = VCRDataset(examples, regions)
    assert plain["record"]["features"][:, 0].tolist() == [1, 2]
    (merged,) = VCRDataset(examples, regions, metadata_folder=tmp_path)
    assert merged["record"]["boxes"].tolist() == [[0, 0, 10, 20], [50, 0, 100, 50], [0, 0, 20, 20]]
    assert merged["record"]["features"][:, 0].tolist() == [2, 1, 2]
    (merged,) = VCRDataset(examples, regions, annotated_region_dataset=annotated)
    assert merged["record"]["boxes"].tolist() == [[0, 0, 5, 5], [50, 0, 100, 50], [0, 0, 20, 20]]
    assert merged["record"]["features"][:, 0].tolist() == [7, 1, 2]
    assert merged["example"] == examples[0]
    with pytest.raises(ValueError, match="either `metadata_folder` or `annotated_region_dataset`, not both"):
        VCRDataset(examples, regions, tmp_path, annotated)
    with pytest.raises(ValueError, match="features of size 6, as the detector's regions have, got 7"):
        VCRDataset(examples, regions, annotated_region_dataset=make_regions([[0, 0, 5, 5]], 7, width=7))
    with pytest.raises(ValueError, match=r"not among its 1 images \(such as 'val-3'\): \['val-4'\]"):
        VCRDataset(read_vcr(write(tmp_path, RECORD | {"img_id": "val-4"})), regions)


# Batches

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    return InterBERTProcessor(BertTokenizer(str(vocabulary)), region_feature_size=WIDTH)


def make_samples(*examples):
    regions = make_regions([[50, 0, 100, 50], [0, 0, 20, 20]], 1)
    return [{"example": example, "record": regions[0]} for example in examples]


def make_example(question, answers, rationales, answer_label=0, rationale_label=0):
    return VCRExample("val-0", "val-3", question, answers, rationales, answer_label, rationale_label, "x.json")


EXAMPLE = make_example("a b", ["c", "d e", "f", "g"], ["h", "i", "j", "a"], answer_label=1, rationale_label=3)


def test_batches_of_answers(processor):
    other = make_example("j", ["a", "b", "c", "d"], ["e", "f", "g", "h"], answer_label=2)
    batch = VCRCollator(processor, "answer", max_regions=1)(make_samples(EXAMPLE, other))
    assert batch["input_ids"].tolist()[0] == [
        [2, 5, 6, 3, 7, 3, 0],
        [2, 5, 6, 3, 8, 9, 3],
        [2, 5, 6, 3, 10, 3, 0],
        [2, 5, 6, 3, 11, 3, 0],
    ]
    assert batch["input_ids"][1, 3].tolist() == [2, 14, 3, 8, 3, 0, 0]
    assert batch["token_type_ids"][0, 1].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch["attention_mask"][1, 3].tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert batch["labels"].tolist() == [1, 2]
    assert batch["region_features"].shape == (2, 1, WIDTH)
    outputs = tiny_model(InterBERTForMultipleChoice)(**batch)
    assert outputs.logits.shape == (2, 4) and outputs.loss > 0


def test_batches_of_rationales(processor):
    batch = VCRCollator(processor, "rationale")(make_samples(EXAMPLE))
    # [CLS] question [SEP] right answer [SEP] rationale [SEP]
    assert batch["input_ids"].tolist() == [[[2, 5, 6, 3, 8, 9, 3, last, 3] for last in (12, 13, 14, 5)]]
    assert batch["token_type_ids"].tolist() == [[[0, 0, 0, 0, 0, 0, 0, 1, 1]] * 4]
    assert batch["labels"].tolist() == [3]
    given = VCRCollator(processor, "rationale", given_answer=3)(make_samples(EXAMPLE))
    assert given["input_ids"][0, 0].tolist() == [2, 5, 6, 3, 11, 3, 12, 3]


def test_a_batch_without_labels(processor):
    example = make_example("a", ["a", "b", "c", "d"], ["e", "f", "g", "h"], answer_label=None, rationale_label=None)
    batch = VCRCollator(processor, "answer")(make_samples(EXAMPLE, example))
    assert set(batch) == set(processor.model_input_names)
    with pytest.raises(ValueError, match="`given_answer` must say which"):
        VCRCollator(processor, "rationale")(make_samples(example))
    with pytest.raises(ValueError, match=r"one of \['answer', 'rationale'\], got 'qa'"):
        VCRCollator(processor, "qa")


@pytest.mark.parametrize("task, length", [("answer", 60), ("rationale", 80)])
def test_the_longer_side_is_cut_first(processor, task, length):
    long, short = " ".join("a" * 100), " ".join("b" * 10)
    example = make_example(short, [long] * 4, [long] * 4)
    ids = VCRCollator(processor, task)(make_samples(example))["input_ids"]
    assert ids.shape == (1, 4, length)
    if task == "answer":
        # 57 tokens beside three special ones: the question stays whole.
        assert ids[0, 0].tolist() == [2] + [6] * 10 + [3] + [5] * 47 + [3]
    else:
        # 77 tokens: both sides are longer than half of them, and end up with 39 and 38 in either order. The separator
        # between question and answer is one of the first side's.
        left = ids[0, 0].tolist()[1:-1]
        first, second = " ".join(map(str, left)).rsplit(" 3 ", 1)
        assert sorted([len(first.split()), len(second.split())]) == [38, 39]
        assert first.split()[:12] == ["6"] * 10 + ["3", "5"]


@needs_vcr
def test_the_real_record(tmp_path):
    (example,) = read_vcr(VCR / "vcr_val0_record.json")
    assert example.annot_id == example.image_id == "val-0"
    assert example.question == "how is person feeling ?"
    assert example.answers[example.answer_label] == "person is upset and disgusted ."
    assert example.rationales[example.rationale_label] == "person ' s expression is twisted in disgust ."
    # The same with its tags put back.
    record = json.loads((VCR / "vcr_val0_record.json").read_text())
    record["question"] = ["how", "is", [0], "feeling", "?"]
    record["answer_choices"][3] = [[0], "is", "uncomfortable", "with", [2], "."]
    (example,) = read_vcr(write(tmp_path, record))
    assert example.question == "how is Casey feeling ?"
    assert example.answers[3] == "Casey is uncomfortable with Riley ."


@needs_vcr
def test_names_are_frequent_unisex_names_of_one_word_piece():
    table = (VCR / "unisex_names_table.csv").read_text().splitlines()[1:]
    assert set(UNISEX_NAMES) <= {line.split(",")[1].strip('"') for line in table[:60]}
    assert {name.lower() for name in UNISEX_NAMES} <= set(VOCABULARY.read_text().splitlines())
    ids = BertTokenizer(str(VOCABULARY))(" ".join(UNISEX_NAMES), add_special_tokens=False)["input_ids"]
    assert len(torch.tensor(ids).unique()) == len(UNISEX_NAMES) == len(ids)
