"""The retriever against the plain model and brute force, and its index through kills."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import Killed
from model_fixtures import TINY, perturb, task_model, tiny_processor, tiny_record

from modeling_interbert import (
    ImageMatch,
    IndexReport,
    InterBERTForImageRetrieval,
    InterBERTForPreTraining,
    InterBERTForVQA,
    InterBERTRetriever,
    match_log_odds,
    retriever,
)
from processing import InterBERTProcessor

TEXTS = ["a red dog", "the small blue bird on the grass", "cat", "a large green cat on grass"]
MAX_TOKENS = TINY["max_position_embeddings"]
NUM_IMAGES = 23


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def make_model(model_class=InterBERTForImageRetrieval):
    """A model whose match scores spread on both sides of 0.6."""
    model = task_model(model_class)
    with torch.no_grad():
        model.itm_head.classifier.weight *= 10
        model.itm_head.classifier.bias.mul_(10)[0] += 4.9
    return model


@pytest.fixture
def model():
    return make_model()


def make_records(num_images: int = NUM_IMAGES) -> list[dict]:
    return [tiny_record(f"image-{i:02d}", 1 + i * 7 % 5, seed=i) for i in range(num_images)]


def make_retriever(model, processor, folder=None, **kwargs) -> InterBERTRetriever:
    return InterBERTRetriever(model, processor, folder, **({"images_per_shard": 4, "batch_size": 6} | kwargs))


def files_of(folder: Path) -> set[str]:
    """Names of all files but that of the lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


@torch.no_grad()
def plain_scores(model, processor, texts, records) -> dict[str, dict[str, float]]:
    """Match scores by text and image id, one pair at a time."""
    return {
        text: {
            record["image_id"]: model(**processor(text=text, regions=record, return_tensors="pt")).match_scores.item()
            for record in records
        }
        for text in texts
    }


def assert_same_matches(matches: list[ImageMatch], expected: dict[str, float]):
    assert [match.image_id for match in matches] == sorted(expected, key=lambda image_id: -expected[image_id])
    for match in matches:
        assert match.score == pytest.approx(expected[match.image_id], abs=1e-5)


def assert_same_results(one: InterBERTRetriever, other: InterBERTRetriever):
    for matches, expected in zip(one.search(TEXTS, 100), other.search(TEXTS, 100), strict=True):
        assert dict(matches) == pytest.approx(dict(expected), abs=1e-6)


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
@pytest.mark.parametrize("batch_size", [5, 256])
def test_scores_and_order_are_those_of_the_plain_model(model, processor, tmp_path, in_folder, batch_size):
    records = make_records()
    expected = plain_scores(model, processor, TEXTS, records)
    own = make_retriever(model.train(), processor, tmp_path if in_folder else None, batch_size=batch_size)
    assert own.index(records) == IndexReport(NUM_IMAGES, 0, 0, 0)
    assert len(own) == NUM_IMAGES and "image-03" in own and sorted(own.image_ids) == [r["image_id"] for r in records]

    for text, matches in zip(TEXTS, own.search(TEXTS, top_k=NUM_IMAGES + 1), strict=True):
        assert_same_matches(matches, expected[text])
    for text, matches in zip(TEXTS, own.recall(TEXTS, threshold=0.6), strict=True):
        assert_same_matches(matches, {name: score for name, score in expected[text].items() if score > 0.6})
    for text in TEXTS[:2]:
        everything = own.search(text, top_k=NUM_IMAGES)
        assert own.search(text, top_k=3) == everything[:3]
        assert own.recall(text, threshold=0) == everything
        assert own.recall(text, threshold=0.6, top_k=2) == own.recall(text, threshold=0.6)[:2]
        assert own.recall(text, threshold=1) == []
    assert 0 < sum(map(len, own.recall(TEXTS))) < len(TEXTS) * NUM_IMAGES


def test_a_pretraining_model_retrieves_and_other_models_are_refused(processor):
    model = make_model(InterBERTForPreTraining)
    records = make_records(5)
    own = make_retriever(model, processor)
    own.index(records)
    with torch.no_grad():
        logits = model(**processor(text=TEXTS[0], regions=records[3], return_tensors="pt")).itm_logits[0]
    scores = dict(own.search(TEXTS[0]))
    assert scores["image-03"] == pytest.approx(logits.softmax(0)[0].item(), abs=1e-5)
    with pytest.raises(ValueError, match="needs a model with a match head, .*, got InterBERTForVQA"):
        InterBERTRetriever(task_model(InterBERTForVQA), processor)


def test_scores_near_one_are_told_apart(model, processor):
    with torch.no_grad():
        model.itm_head.classifier.bias[0] += 25  # float32 scores are all 1 then
    records = make_records()
    own = make_retriever(model, processor)
    own.index(records)
    inputs = [processor(text=TEXTS[0], regions=record, return_tensors="pt") for record in records]
    with torch.no_grad():
        logits = torch.cat([model(**pair).itm_logits for pair in inputs])
    assert logits.softmax(dim=-1)[:, 0].unique().numel() == 1
    order = (logits[:, 1] - logits[:, 0]).argsort().tolist()
    assert [match.image_id for match in own.search(TEXTS[0], top_k=30)] == [records[row]["image_id"] for row in order]


def test_ties_are_in_the_order_of_the_ids(model, processor):
    with torch.no_grad():
        model.itm_head.classifier.weight.zero_()
    own = make_retriever(model, processor, images_per_shard=2)
    own.index([tiny_record(image_id, 3, seed=1) for image_id in "dbeac"])
    assert [match.image_id for match in own.search(TEXTS[0])] == list("abcde")
    assert [match.image_id for match in own.search(TEXTS[0], top_k=2)] == list("ab")


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
def test_adding_removing_and_replacing_equal_a_new_index(model, processor, tmp_path, in_folder):
    own = make_retriever(model, processor, tmp_path / "a" if in_folder else None)
    records = make_records()
    own.index(records[:10])
    for record in records[10:]:
        assert own.add(record) == IndexReport(1, 0, 0, 0)
    removed = ["image-01", "image-08", "image-09", "image-15"]
    own.remove(removed)
    own.remove("image-22")
    records[3] = tiny_record("image-03", 5, seed=100)
    records[4] = tiny_record("image-04", 0, seed=100)
    records = [record for record in records if record["image_id"] not in [*removed, "image-22"]]
    new = tiny_record("new", 2, seed=101)
    assert own.index([*records, new]) == IndexReport(1, 1, len(records) - 2, 1)

    fresh = make_retriever(model, processor)
    assert fresh.index([*records, new]) == IndexReport(len(records), 0, 0, 1)
    assert_same_results(own, fresh)
    # Images that came one by one are kept together.
    assert len(own._shards) <= 8
    if in_folder:
        assert files_of(tmp_path / "a") == {"index.json", *(shard.file_name for shard in own._shards)}
        reopened = InterBERTRetriever.load(tmp_path / "a", model, processor)
        assert_same_results(reopened, own)


def test_an_empty_index_finds_nothing(model, processor, tmp_path):
    own = make_retriever(model, processor, tmp_path)
    assert own.search(TEXTS) == [[]] * len(TEXTS) and own.recall(TEXTS[0]) == []
    own.index(make_records(2))
    own.remove(own.image_ids)
    assert own.search(TEXTS[0]) == [] and len(own) == 0
    assert own.index([tiny_record("a", 0, 1)]) == IndexReport(0, 0, 0, 1)
    assert files_of(tmp_path) == {"index.json"}


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
def test_saving_and_loading(model, processor, tmp_path, in_folder):
    own = make_retriever(model, processor, tmp_path / "own" if in_folder else None)
    own.index(make_records())
    own.save(tmp_path / "saved")
    loaded = InterBERTRetriever.load(tmp_path / "saved", model, processor)
    assert_same_results(loaded, own)
    own.remove("image-00")
    assert len(loaded) == len(InterBERTRetriever.load(tmp_path / "saved", model, processor)) == NUM_IMAGES
    own.save(tmp_path / "saved")
    assert "image-00" not in InterBERTRetriever.load(tmp_path / "saved", model, processor)
    if in_folder:
        before = sorted(path.name for path in (tmp_path / "own").iterdir())
        own.save(tmp_path / "own")
        assert sorted(path.name for path in (tmp_path / "own").iterdir()) == before


def test_embedded_images_are_read_shard_by_shard_and_embedded_once(model, processor, tmp_path, monkeypatch):
    own = make_retriever(model, processor, tmp_path)
    num_embedded = []
    embed_regions = model.interbert.embed_regions

    def count(region_features, **inputs):
        num_embedded.append(len(region_features))
        return embed_regions(region_features, **inputs)

    monkeypatch.setattr(model.interbert, "embed_regions", count)
    own.index(make_records())
    assert own.index(make_records()) == IndexReport(0, 0, NUM_IMAGES, 0)
    own.search(TEXTS)
    assert sum(num_embedded) == NUM_IMAGES
    assert [len(shard.images) for shard in own._shards] == [4, 4, 4, 4, 4, 3]
    assert all(shard.region_embeds is None for shard in own._shards)


def test_limits_of_tokens_and_regions(model, processor, tmp_path):
    records = make_records(6)
    own = make_retriever(model, processor, tmp_path, max_length=4, max_regions=2)
    own.index(records)
    cut = [record | {name: record[name][:2] for name in ("features", "boxes")} for record in records]
    expected = plain_scores(model, processor, ["a large"], cut)["a large"]
    assert_same_matches(own.search("a large green cat"), expected)
    with pytest.raises(ValueError, match="an index of another `max_regions`: expected `max_regions` None, got 2"):
        make_retriever(model, processor, tmp_path)
    processor = InterBERTProcessor(processor.tokenizer, region_feature_size=6, max_regions=2)
    assert make_retriever(model, processor, tmp_path).index(records).num_unchanged == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(processor, tmp_path, dtype):
    """Autocast, of which the head and the index are left out, and a model in half precision."""
    model = make_model().to(dtype)
    records = make_records()
    own = make_retriever(model, processor, tmp_path, autocast_dtype=torch.bfloat16 if dtype == torch.float32 else None)
    own.index(records)
    assert own._region_embeds(own._shards[0]).dtype == dtype
    expected = plain_scores(model, processor, TEXTS, records)
    for text, matches in zip(TEXTS, own.search(TEXTS, 100), strict=True):
        assert dict(matches) == pytest.approx(expected[text], abs=0.05)
    if dtype == torch.float32:
        # Of another precision by no more than rounding, and yet not one score equals another.
        assert len({score for _, score in own.search(TEXTS[0], 100)}) == NUM_IMAGES
        assert dict(own.search(TEXTS[0], 100)) != pytest.approx(expected[TEXTS[0]], abs=1e-6)
        plain = make_retriever(model, processor, tmp_path)  # the index does not depend on it
        assert_same_matches(plain.search(TEXTS[0], 100), expected[TEXTS[0]])


def test_match_log_odds(model, processor):
    records = make_records(3)
    images = processor(regions=records, return_tensors="pt")
    region_embeds = model.interbert.embed_regions(**images)
    texts = processor(text=TEXTS, return_tensors="pt")
    log_odds = match_log_odds(model, texts, region_embeds, images["region_attention_mask"])
    assert log_odds.shape == (4, 3) and log_odds.dtype == torch.float32
    expected = plain_scores(model, processor, TEXTS, records)
    np.testing.assert_allclose(log_odds.sigmoid(), [list(expected[text].values()) for text in TEXTS], atol=1e-5)


# ---------------------------------------------------------------- kills and damage


def kill_at(monkeypatch, number: int, moment: str):
    """Stops the program at a write: before anything is there, in the middle, or after the file has its name."""
    write, calls = retriever._write, []

    def write_or_die(path, data):
        calls.append(path)
        if len(calls) == number:
            if moment == "middle":
                path.parent.mkdir(exist_ok=True)
                path.with_name(f"{path.name}.unfinished").write_bytes(data[: len(data) // 2])
            elif moment == "after":
                write(path, data)
            raise Killed
        write(path, data)

    monkeypatch.setattr(retriever, "_write", write_or_die)


CHANGES = {
    "index": lambda own: own.index(make_records(12)),
    "replace": lambda own: own.index([r | {"features": -r["features"]} for r in make_records(12)]),
    "remove": lambda own: own.remove(["image-00", "image-02", "image-05"]),
}


@pytest.mark.parametrize("moment", ["before", "middle", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_at_any_write_leaves_an_index_to_go_on_with(model, processor, tmp_path, monkeypatch, change, moment):
    start, whole = tmp_path / "start", tmp_path / "whole"
    make_retriever(model, processor, start).index(make_records(6))
    shutil.copytree(start, whole)
    undisturbed = make_retriever(model, processor, whole)
    CHANGES[change](undisturbed)

    number, was_killed = 0, True
    while was_killed:
        number += 1
        folder = tmp_path / f"killed-{number}"
        shutil.copytree(start, folder)
        with monkeypatch.context() as context:
            own = make_retriever(model, processor, folder)
            kill_at(context, number, moment)
            try:
                CHANGES[change](own)
                was_killed = False
            except Killed:
                pass
        resumed = InterBERTRetriever.load(folder, model, processor, images_per_shard=4)
        assert len(resumed.image_ids) == len({image.image_id for shard in resumed._shards for image in shard.images})
        assert sum(len(shard.images) for shard in resumed._shards) == len(resumed)
        resumed.search(TEXTS)  # all of its files are there
        if change == "remove":  # all of them are gone, or none
            assert len(resumed) in (3, 6)
        if change != "remove" or len(resumed) == 6:
            CHANGES[change](resumed)
        assert_same_results(resumed, undisturbed)
        if was_killed and change == "index":  # what a kill left over is gone
            names = {path.name for path in folder.glob("shard-*")}
            assert names == {shard.file_name for shard in resumed._shards}
    assert number > {"index": 5, "replace": 6, "remove": 3}[change]


def test_a_kill_while_an_index_is_begun_or_saved(model, processor, tmp_path, monkeypatch):
    own = make_retriever(model, processor)
    own.index(make_records())
    for number in range(1, 8):
        with monkeypatch.context() as context:
            kill_at(context, number, "middle")
            with pytest.raises(Killed):
                own.save(tmp_path / "saved")
        with pytest.raises(ValueError, match="Expected an index in .*saved, got a folder without index.json"):
            InterBERTRetriever.load(tmp_path / "saved", model, processor)
    own.save(tmp_path / "saved")
    other_model = perturb(make_model())
    other = make_retriever(other_model, processor)
    other.index(make_records())
    for number in range(1, 8):  # until the manifest is there, the index is the former one
        with monkeypatch.context() as context:
            kill_at(context, number, "middle")
            with pytest.raises(Killed):
                other.save(tmp_path / "saved")
        loaded = InterBERTRetriever.load(tmp_path / "saved", model, processor)
        assert_same_results(loaded, own)
    other.save(tmp_path / "saved")
    loaded = InterBERTRetriever.load(tmp_path / "saved", other_model, processor)
    assert_same_results(loaded, other)


def test_an_index_of_another_model_is_refused(model, processor, tmp_path):
    make_retriever(model, processor, tmp_path).index(make_records(3))
    with torch.no_grad():
        model.itm_head.classifier.weight[0] += 1  # has no say in what is kept
    expected = plain_scores(model, processor, TEXTS[:1], make_records(3))
    assert_same_matches(make_retriever(model, processor, tmp_path).search(TEXTS[0]), expected[TEXTS[0]])
    with torch.no_grad():
        model.interbert.embeddings.image.box_embeddings.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="an index of another model: expected `fingerprint` .*, got .* remove this"):
        make_retriever(model, processor, tmp_path)
    with pytest.raises(ValueError, match="an index of another model"):
        InterBERTRetriever.load(tmp_path, model.to(torch.bfloat16), processor)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no tensors"])
def test_a_damaged_shard_is_named(model, processor, tmp_path, damage):
    make_retriever(model, processor, tmp_path).index(make_records(6))
    path = sorted(tmp_path.glob("shard-*"))[0]
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{path.name} is missing or damaged .* Remove its folder to index anew"):
        InterBERTRetriever.load(tmp_path, model, processor).search(TEXTS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1', '{"shards": 3}'])
def test_a_damaged_manifest_is_named(model, processor, tmp_path, text):
    make_retriever(model, processor, tmp_path).index(make_records(2))
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json is missing or damaged"):
        make_retriever(model, processor, tmp_path)


def test_an_index_of_another_format_is_refused(model, processor, tmp_path):
    make_retriever(model, processor, tmp_path)
    manifest = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match="another `format`: expected `format` 1, got 2"):
        make_retriever(model, processor, tmp_path)


# ---------------------------------------------------------------- other files, other programs


def test_files_that_are_not_of_an_index_are_left_alone(model, processor, tmp_path):
    foreign = {"shard-00000.tar", "shard-00001.parquet", "notes.txt", f"shard-{'0' * 32}.parquet"}
    for name in foreign:
        (tmp_path / name).write_text("mine")
    memory = make_retriever(model, processor)
    memory.index(make_records(2))
    for begin in (lambda: make_retriever(model, processor, tmp_path), lambda: memory.save(tmp_path)):
        with pytest.raises(
            ValueError, match="expected an index, or an empty folder, got one with notes.txt, shard-0000"
        ):
            begin()
    assert files_of(tmp_path) == foreign
    # What came later beside an index.
    own = make_retriever(model, processor, tmp_path / "index")
    (tmp_path / "index" / "shard-00000.tar").write_text("mine")
    (tmp_path / "index" / f"shard-{'0' * 32}.safetensors.unfinished").write_text("left over")
    own.index(make_records(2))
    memory.save(tmp_path / "index")
    assert files_of(tmp_path / "index") == {"index.json", "shard-00000.tar", own._shards[0].file_name}


def test_programs_that_have_the_same_index_open(model, processor, tmp_path):
    """Whoever searches finds what others have changed, and changes go by what is there, not by what was."""
    one, other = (make_retriever(model, processor, tmp_path) for _ in range(2))
    records = make_records()
    one.index(records[:10])
    assert_same_results(other, one)
    other.add(records[10:])
    one.remove("image-01")
    other.index([tiny_record("image-02", 5, seed=100)])
    with pytest.raises(ValueError, match="that are not in the index, got 1 that are: image-12"):
        one.add([records[12]])
    with pytest.raises(ValueError, match="that are in the index, got 1 that are not: image-01"):
        other.remove("image-01")
    fresh = make_retriever(model, processor)
    fresh.index([records[0], tiny_record("image-02", 5, seed=100), *records[3:]])
    for retriever_of_program in (one, other):
        assert_same_results(retriever_of_program, fresh)
    assert sorted(one.image_ids) == sorted(other.image_ids) == sorted(fresh.image_ids)


def test_what_another_program_has_removed_is_not_saved(model, processor, tmp_path):
    one, other = (make_retriever(model, processor, tmp_path / "own") for _ in range(2))
    one.index(make_records())
    other.search(TEXTS[0])
    one.remove(["image-01", "image-02"])
    other.save(tmp_path / "saved")
    assert_same_results(InterBERTRetriever.load(tmp_path / "saved", model, processor), one)


def test_images_that_are_no_more_go_by_what_is_there(model, processor, tmp_path):
    one, other = (make_retriever(model, processor, tmp_path) for _ in range(2))
    records = make_records(12)
    one.index(records)
    assert other.index(records[3:], remove_others=True) == IndexReport(0, 0, 9, 0, num_removed=3)
    assert one.index(records[3:], remove_others=True) == IndexReport(0, 0, 9, 0, num_removed=0)
    assert one.index([*records[:2], tiny_record("image-05", 0, 1)], remove_others=True) == IndexReport(2, 0, 0, 1, 8)
    assert sorted(one.image_ids) == ["image-00", "image-01"]


def test_the_same_regions_as_other_numbers_are_not_embedded_again(model, processor, tmp_path):
    own = make_retriever(model, processor, tmp_path)
    record = tiny_record("a", 3, seed=1)
    record["features"] = record["features"].astype(np.float16)
    own.index(record)
    as_lists = record | {name: record[name].astype(float).tolist() for name in ("features", "boxes")}
    assert own.index(as_lists | {"width": float(record["width"])}).num_unchanged == 1
    assert own.index(record | {"features": torch.from_numpy(record["features"])}).num_unchanged == 1


def test_an_index_that_is_changed_during_a_search(model, processor, tmp_path, monkeypatch):
    own, other = (make_retriever(model, processor, tmp_path) for _ in range(2))
    own.index(make_records())
    read = own._folder.read_region_embeds

    def change_and_read(shard):
        if len(other) == NUM_IMAGES:
            other.remove(other.image_ids[:9])
        return read(shard)

    monkeypatch.setattr(own._folder, "read_region_embeds", change_and_read)
    other.search(TEXTS[0])
    with pytest.raises(ValueError, match="Another program has changed the index in .*: try again"):
        own.search(TEXTS[0])
    assert len(own.search(TEXTS[0], top_k=100)) == NUM_IMAGES - 9


def test_an_index_that_is_changed_while_it_is_opened(model, processor, tmp_path, monkeypatch):
    own, other = (make_retriever(model, processor, tmp_path) for _ in range(2))
    own.index(make_records(3))
    reader = make_retriever(model, processor, tmp_path)
    reader._shards = []  # as if it had read none
    read_header, changes = reader._folder._read_header, []

    def change_and_read(file_name):
        if not changes:
            changes.append(file_name)
            other.add(make_records()[3:4])  # into the shard that is about to be read
            assert not (tmp_path / file_name).exists()
        return read_header(file_name)

    monkeypatch.setattr(reader._folder, "_read_header", change_and_read)
    assert len(reader.search(TEXTS[0], top_k=100)) == 4 and changes


def test_a_change_waits_for_that_of_another_program(model, processor, tmp_path, monkeypatch):
    own, other = (make_retriever(model, processor, tmp_path) for _ in range(2))
    warnings, waits = [], threading.Event()
    monkeypatch.setattr(retriever.logger, "warning", lambda message: (warnings.append(message), waits.set()))
    with own._folder.lock():
        thread = threading.Thread(target=other.index, args=[make_records(3)])
        thread.start()
        assert waits.wait(timeout=60)
        assert len(own) == 0 and len(make_retriever(model, processor, tmp_path)) == 0  # opening does not wait
    thread.join(timeout=60)
    assert warnings == [f"Another program is changing the index in {tmp_path}: waiting until it is done."]
    assert sorted(match.image_id for match in own.search(TEXTS[0])) == ["image-00", "image-01", "image-02"]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "image_ids, message",
    [
        (["a", "b", "a"], "Expected every `image_id` once, got 1 that come more often: a."),
        (["a", None], r"records\[1\]: expected an `image_id` that is a text, got None"),
        (["a", 3], r"records\[1\]: expected an `image_id` that is a text, got 3"),
        (["", "a"], r"records\[0\]: expected an `image_id` that is a text, got ''"),
    ],
)
def test_bad_ids_are_refused_before_anything_is_embedded(model, processor, tmp_path, image_ids, message):
    own = make_retriever(model, processor, tmp_path, images_per_shard=1)
    records = [tiny_record("x", 2, seed=1) | {"image_id": image_id} for image_id in image_ids]
    with pytest.raises(ValueError, match=message):
        own.index(records)
    assert len(own) == 0 and files_of(tmp_path) == {"index.json"}


def test_bad_regions_leave_what_was_there(model, processor, tmp_path):
    own = make_retriever(model, processor, tmp_path)
    own.index(make_records(3))
    bad = tiny_record("bad", 2, seed=1)
    with pytest.raises(ValueError, match="image_id bad.*expected features of shape"):
        own.index([tiny_record("good", 2, seed=1), bad | {"features": np.zeros((2, 5), np.float32)}])
    with pytest.raises(ValueError, match="image_id bad: expected features, boxes, width, height, got no boxes"):
        own.index([{name: value for name, value in bad.items() if name != "boxes"}])
    for name, value in (("features", None), ("features", [[1.0], [1.0, 2.0]]), ("boxes", [1, 2]), ("width", "wide")):
        with pytest.raises(ValueError, match=f"image_id bad: expected {name} that are numbers of . dimensions, got "):
            own.index([bad | {name: value}])
    with pytest.raises(ValueError, match="Expected images that are not in the index, got 2 that are: image-00, image-"):
        own.add([tiny_record("good", 2, seed=1), *make_records(2)])
    with pytest.raises(ValueError, match="Expected images that are in the index, got 1 that are not: unknown"):
        own.remove(["image-00", "unknown"])
    assert sorted(own.image_ids) == ["image-00", "image-01", "image-02"]
    assert len(InterBERTRetriever.load(tmp_path, model, processor)) == 3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda own: own.search(""), "texts that are not empty, got '' as number 1"),
        (lambda own: own.recall(["a dog", " "]), "texts that are not empty, got ' ' as number 2"),
        (lambda own: own.search([]), "at least one text, got none"),
        (lambda own: own.search(None), "Expected a text or a list of texts, got None"),
        (lambda own: own.index(iter([])), "a region record, a list of them, or a dataset .*, got list_iterator"),
        (lambda own: own.add(3), "a region record, a list of them, or a dataset .*, got int"),
        (lambda own: own.search("a dog", top_k=0), "`top_k` must be at least 1, got 0"),
        (lambda own: own.recall("a dog", threshold=1.5), r"`threshold` must be within \[0, 1\], got 1.5"),
        (lambda own: own.recall("a dog", threshold=float("nan")), r"`threshold` must be within \[0, 1\], got nan"),
    ],
)
def test_bad_questions(model, processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(make_retriever(model, processor))


def test_scores_that_are_not_finite_are_no_result(model, processor):
    own = make_retriever(model, processor)
    own.index(make_records(2))
    with torch.no_grad():
        model.itm_head.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match="Expected finite match scores, got others for image image-0"):
        own.recall(TEXTS)


@pytest.mark.parametrize("name", ["batch_size", "max_length", "max_regions", "images_per_shard"])
def test_bad_arguments(model, processor, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        InterBERTRetriever(model, processor, **{name: 0})
    with pytest.raises(ValueError, match="share an index in a `folder`, which is None"):
        InterBERTRetriever(model, processor, process_group=object())


def test_progress_is_counted(model, processor):
    bars = []

    class Bar:
        def __init__(self, total, desc, unit):
            self.total, self.done = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def update(self, amount):
            self.done += amount

    own = make_retriever(model, processor, progress_bar=Bar)
    own.index(make_records())
    own.search(TEXTS)
    assert [(bar.total, bar.done) for bar in bars] == [(NUM_IMAGES,) * 2, (NUM_IMAGES * len(TEXTS),) * 2]
