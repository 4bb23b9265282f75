"""Queries with pools, of texts of a region dataset: worked out by hand, and of generated scenes."""

import json
import shlex
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

import build_queries
from generate_scenes import write_scenes
from processing import RegionDataset, load_region_dataset
from processing.hard_negatives import normalize_caption
from processing.tasks import read_queries
from run_image_retrieval import Queries

TEXTS = {
    "a": ["Red shoes"],
    "b": ["RED  SHOES!", "boots"],  # as a, but for case, white space and punctuation
    "c": ["Boots"],
    "d": ["红色 商品"],
    "e": ["红色商品", "…"],
    "f": [],
}


def queries_of(texts: dict, pool_size: int, **arguments) -> dict[str, tuple[list[str], list[str]]]:
    queries, _, _ = build_queries.build_queries(texts, pool_size, **arguments)
    return {query.text: (query.relevant, query.pool) for query in queries}


def test_relevant_images_and_pools_by_hand():
    queries = queries_of(TEXTS, pool_size=4)
    assert {text: relevant for text, (relevant, _) in queries.items()} == {
        "Red shoes": ["a", "b"],
        "boots": ["b", "c"],
        "红色 商品": ["d", "e"],
    }
    for relevant, pool in queries.values():
        assert pool[:2] == relevant and len(set(pool)) == 4
    # A pool cannot have more images than there are.
    assert sorted(queries_of(TEXTS, pool_size=100)["boots"][1]) == list("abcdef")


def test_no_image_of_a_pool_has_the_text_without_being_relevant():
    for seed in range(30):
        for text, (relevant, pool) in queries_of(TEXTS, pool_size=4, seed=seed).items():
            having = {i for i, own in TEXTS.items() if normalize_caption(text) in map(normalize_caption, own)}
            assert having == set(relevant) and having <= set(pool)


def test_what_is_drawn_depends_on_texts_ids_and_seed_alone():
    texts = {f"image-{number}": [f"text {number % 20}"] for number in range(200)}
    queries = queries_of(texts, pool_size=30)
    assert len(queries) == 20 and all(len(pool) == 30 for _, pool in queries.values())
    turned = queries_of(dict(reversed(texts.items())), pool_size=30)
    for text, (relevant, pool) in queries.items():
        assert turned[text][0] == relevant[::-1] and turned[text][1][10:] == pool[10:]
    # Other images for each text, and for another seed.
    others = {text: set(pool) - set(relevant) for text, (relevant, pool) in queries.items()}
    assert len(set.union(*others.values())) > 150
    assert queries_of(texts, pool_size=30, seed=1) != queries


def test_texts_of_all_or_too_few_images_are_left_out():
    texts = {"a": ["all", "two", "one"], "b": ["all", "two"], "c": ["all"]}
    queries, too_rare, too_frequent = build_queries.build_queries(texts, pool_size=3, min_relevant=2)
    assert [query.text for query in queries] == ["two"] and too_rare == ["one"] and too_frequent == ["all"]
    assert build_queries.build_queries(texts, pool_size=9)[2] == ["all"]


def test_of_frequent_texts_relevant_images_are_drawn():
    """Such as categories of products, of which there are few: as many relevant ones as others."""
    texts = {f"image-{number:03}": ["shoe" if number % 20 else "hat"] for number in range(200)}
    queries = queries_of(texts, pool_size=50)
    assert queries["hat"][0] == [f"image-{number:03}" for number in range(0, 200, 20)] and len(queries["hat"][1]) == 50
    relevant, pool = queries["shoe"]
    assert len(relevant) == 25 and pool[:25] == relevant == sorted(relevant)
    # There are ten others, all of which are found; nothing that has the text is taken for one of them.
    assert sorted(pool[25:]) == queries["hat"][0]
    assert [len(pool) for _, pool in queries_of(TEXTS, pool_size=2).values()] == [2, 2, 2]


def make_regions(counts: list[int], captions: list) -> RegionDataset:
    features = pa.list_(pa.list_(pa.float32(), 2))
    columns = {
        "image_id": [f"i{number}" for number in range(len(counts))],
        "width": pa.array([10] * len(counts), pa.int32()),
        "height": pa.array([10] * len(counts), pa.int32()),
        "boxes": pa.array([[[0, 0, 5, 5]] * count for count in counts], pa.list_(pa.list_(pa.float32(), 4))),
        "features": pa.array([[[0.0, 1.0]] * count for count in counts], features),
        "name": captions,
    }
    return RegionDataset(datasets.Dataset(pa.table(columns)))


def test_images_without_regions_do_not_count(tmp_path, monkeypatch, capsys):
    regions = make_regions([1, 0, 2, 1, 1], ["shoe", "hat", "boot", "shoe", None])
    assert build_queries.read_texts(regions, "name") == (
        {"i0": ["shoe"], "i2": ["boot"], "i3": ["shoe"], "i4": []},
        ["hat"],
    )
    monkeypatch.setattr(build_queries, "load_region_dataset", lambda *arguments, **options: regions)
    command = ["build_queries.py", "source", str(tmp_path / "queries.jsonl"), "--text_column", "name"]
    monkeypatch.setattr(sys, "argv", [*command, "--pool_size", "2"])
    build_queries.main()
    output = capsys.readouterr().out
    assert "Left out, without an image that has regions: 1 texts, such as hat" in output
    assert "fewer than" not in output and "all images" not in output
    # One image is relevant: at most one of five.
    assert "2 texts with their pools among 4 images" in output and "precision at 5 of 20.0 %" in output
    assert [query.text for query in read_queries(tmp_path / "queries.jsonl")] == ["shoe", "boot"]

    regions = make_regions([1, 1, 1], ["shoe", "shoe", "boot"])
    monkeypatch.setattr(sys, "argv", [*command, "--min_relevant", "2", "--pool_size", "3"])
    build_queries.main()
    assert "Left out, of fewer than 2 images: 1 texts, such as boot" in capsys.readouterr().out
    regions = make_regions([1, 1], ["shoe", "shoe"])
    with pytest.raises(ValueError, match="at least 2 .* and not all of 2 images with regions have, got 1 others"):
        build_queries.main()


def test_the_documented_command_writes_what_the_evaluation_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scenes("outputs/tiny_scenes", num_train=4, num_validation=50, num_test=4)
    (command,) = [
        shlex.split(block.replace("\\\n", " "))
        for block in build_queries.__doc__.split("    python ")
        if block.startswith("examples/build_queries.py outputs/tiny_scenes")
    ]
    command = command[: command.index("--pool_size") + 2]
    monkeypatch.setattr(sys, "argv", command)
    build_queries.main()
    path = Path("outputs/tiny_queries.jsonl")
    first = path.read_bytes()
    build_queries.main()
    assert path.read_bytes() == first
    assert all(json.loads(line).keys() == {"text", "relevant", "pool"} for line in first.decode().splitlines())

    regions = load_region_dataset("outputs/tiny_scenes", "validation")
    queries = Queries.of_file(str(path), regions)
    assert len(queries.texts) > 50 and max(len(right) for right in queries.right_images) > 1
    captions = [{normalize_caption(caption) for caption in regions.captions(row)} for row in range(50)]
    for text, right, pool in zip(queries.texts, queries.right_images, queries.pools, strict=True):
        assert {row for row in pool if normalize_caption(text) in captions[row]} == set(right)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["out.json", "--text_column", "t"], "destination: expected a .jsonl file, got out.json"),
        (["out.jsonl", "--text_column", "t", "--pool_size", "1"], "--pool_size: expected at least 2, got 1"),
        (
            ["out.jsonl", "--text_column", "t", "--min_relevant", "0"],
            "--min_relevant: expected at least 1 and less than",
        ),
        (["out.jsonl", "--text_column", "t", "--min_relevant", "100"], "less than --pool_size, got 100"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["build_queries.py", "source", *arguments])
    with pytest.raises(SystemExit):
        build_queries.main()
    assert message in capsys.readouterr().err
