"""Scenes in VCR's file format: what the annotations say is true, and nothing tells the right choice but the image."""

from collections import Counter
from pathlib import Path

import pytest

from generate_scenes import KINDS, write_scenes
from generate_vcr import annotate, write_vcr
from processing import load_region_dataset
from processing.tasks import VCRDataset, multiple_choice, read_vcr, read_vcr_metadata


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "scenes", num_train=120, num_validation=6, num_test=4)
    write_vcr(folder / "scenes", folder / "vcr")
    return folder


def kinds_of(data: Path, split: str) -> dict[str, list[tuple[str, str]]]:
    regions = load_region_dataset(data / "scenes", split)
    records = [regions[number] for number in range(len(regions))]
    return {record["image_id"]: [KINDS[class_id] for class_id in record["class_ids"]] for record in records}


def test_the_right_choice_alone_is_true(data):
    kinds = kinds_of(data, "train")
    examples = read_vcr(data / "vcr" / "train.jsonl")
    assert len(examples) > 100
    for example in examples:
        present = kinds[example.image_id]
        for task in ("answer", "rationale"):
            for number, choice in enumerate(multiple_choice(example, task).choices):
                # "circle is red .", "circle is red and star is blue ."
                said = [part.split(" is ") for part in choice.removesuffix(" .").split(" and ")]
                is_true = all((colour, shape) in present for shape, colour in said)
                assert is_true == (number == getattr(example, f"{task}_label")), (choice, present)
        shape = example.question.split()[3]
        assert example.question == f"what colour is {shape} ?"
        assert all(answer.startswith(f"{shape} is ") for answer in example.answers)


def test_labels_are_spread_evenly(data):
    examples = read_vcr(data / "vcr" / "train.jsonl")
    for task in ("answer", "rationale"):
        counts = Counter(getattr(example, f"{task}_label") for example in examples)
        assert set(counts) == {0, 1, 2, 3} and max(counts.values()) < 0.4 * len(examples)


def test_metadata_are_the_objects_of_the_scene(data):
    examples = read_vcr(data / "vcr" / "val.jsonl")
    regions = load_region_dataset(data / "scenes", "validation")
    shapes = {image_id: [shape for _, shape in kinds] for image_id, kinds in kinds_of(data, "validation").items()}
    samples = VCRDataset(examples, regions, data / "vcr" / "vcr1images")
    for plain, sample in zip(VCRDataset(examples, regions), samples, strict=True):
        example = sample["example"]
        metadata = read_vcr_metadata(data / "vcr" / "vcr1images" / example.metadata_path)
        assert metadata["names"] == shapes[example.image_id]
        # Annotated boxes first, each with the features of its own region, then the regions.
        boxes, features = (plain["record"][name].tolist() for name in ("boxes", "features"))
        assert sample["record"]["boxes"].tolist() == boxes + boxes
        assert sample["record"]["features"].tolist() == features + features


def test_the_test_split_has_no_labels(data):
    examples = read_vcr(data / "vcr" / "test.jsonl")
    assert [example.annot_id for example in examples] == ["test-0", "test-1", "test-2", "test-3"]
    assert {(example.answer_label, example.rationale_label) for example in examples} == {(None, None)}


def test_the_same_scenes_give_the_same_bytes(data, tmp_path):
    write_vcr(data / "scenes", tmp_path / "vcr")
    paths = sorted(path.relative_to(data / "vcr") for path in (data / "vcr").rglob("*.json*"))
    assert {path.name for path in paths} >= {"train.jsonl", "val.jsonl", "test.jsonl"}
    assert len(paths) == 3 + len(list((tmp_path / "vcr" / "vcr1images").rglob("*.json"))) > 100
    for path in paths:
        assert (tmp_path / "vcr" / path).read_bytes() == (data / "vcr" / path).read_bytes()


def test_an_object_is_told_apart_by_its_shape():
    import random

    kinds = [("red", "circle"), ("blue", "circle"), ("green", "star"), ("black", "circle"), ("white", "circle")]
    for seed in range(50):
        annotation = annotate(random.Random(seed), kinds, first=0, second=2)
        colours = [tokens[2] for tokens in annotation["answer_choices"]]
        assert colours[annotation["answer_label"]] == "red" and len(set(colours)) == 4
        assert not set(colours) & {"blue", "black", "white"}
        assert annotation["rationale_choices"][annotation["rationale_label"]] == [
            *([0], "is", "red", "and", [2], "is", "green", ".")
        ]
