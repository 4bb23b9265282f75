import shutil
import subprocess
import sys
from collections import Counter

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import REPOSITORY, needs_hub, start_hub
from torchdata.stateful_dataloader import StatefulDataLoader

from processing import PretrainingPairs, RegionStream, StreamedBatches
from processing.streaming import load_split_alone

NUM_ROWS, ROWS_PER_GROUP, NUM_FILES = 60, 4, 3  # 15 row groups


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 images in three files; image i has 1 + i % 5 regions, two captions, and i as its first feature."""
    folder = tmp_path_factory.mktemp("regions")
    counts = [1 + i % 5 for i in range(NUM_ROWS)]
    table = pa.table(
        {
            "image_id": [f"image-{i}" for i in range(NUM_ROWS)],
            "width": pa.array([100] * NUM_ROWS, pa.int32()),
            "height": pa.array([80] * NUM_ROWS, pa.int32()),
            "boxes": pa.array([[[0, 0, 10, 10]] * n for n in counts], pa.list_(pa.list_(pa.float32(), 4))),
            "features": pa.array(
                [[np.array([i, 0, 1], np.float16)] * n for i, n in enumerate(counts)],
                pa.list_(pa.list_(pa.float16(), 3)),
            ),
            "captions": [[f"caption {i}", f"another caption {i}"] for i in range(NUM_ROWS)],
        }
    )
    for number in range(NUM_FILES):
        rows = NUM_ROWS // NUM_FILES
        path = folder / f"train-{number:05d}-of-{NUM_FILES:05d}.parquet"
        pq.write_table(table.slice(number * rows, rows), path, row_group_size=ROWS_PER_GROUP)
    return folder


class Rows(torch.utils.data.Dataset):
    """Samples that are the rows of a window: image id, number of regions and the seed that was given."""

    def __init__(self, window, seed):
        self.window = window
        self.seed = seed

    def __len__(self):
        return len(self.window)

    def __getitem__(self, index):
        record = self.window[index]
        assert record["features"][0, 0] == int(record["image_id"].removeprefix("image-"))
        return record["image_id"], len(record["boxes"]), self.seed

    def lengths(self):
        return self.window.region_counts()


def make_batches(folder, batch_size=4, rows_per_window=8, make_samples=Rows, **kwargs):
    stream = RegionStream.open(folder, "train", rows_per_window=rows_per_window)
    return StreamedBatches(stream, make_samples, batch_size, **kwargs)


def take(batches, count):
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def identity(batch):
    return batch


def ids(batches):
    return [image_id for batch in batches for image_id, _, _ in batch]


def test_all_records_in_the_order_of_the_files(folder):
    stream = RegionStream.open(folder, "train")
    assert stream.num_rows == NUM_ROWS and len(stream.row_groups) == 15
    records = list(stream)
    assert [record["image_id"] for record in records] == [f"image-{i}" for i in range(NUM_ROWS)]
    assert [record["features"][0, 0] for record in records] == list(range(NUM_ROWS))


def test_windows_hold_all_row_groups_and_no_more_rows_than_they_need(folder):
    stream = RegionStream.open(folder, "train", rows_per_window=10)
    windows = stream.windows(np.random.default_rng(0))
    assert [sum(group.num_rows for group in window) for window in windows] == [12] * 5
    assert sorted(group for window in windows for group in window) == sorted(stream.row_groups)


def test_a_pass_has_every_image_once_and_the_next_another_order(folder):
    batches = take(make_batches(folder), 30)
    first, second = ids(batches[:15]), ids(batches[15:])
    assert sorted(first) == sorted(second) == sorted(f"image-{i}" for i in range(NUM_ROWS))
    assert first != second
    assert first != sorted(first)
    assert first == ids(take(make_batches(folder), 15))
    assert first != ids(take(make_batches(folder, seed=1), 15))
    assert len({seed for batch in batches for _, _, seed in batch}) == 16  # 8 windows in each pass


def test_processes_share_the_images_without_overlap(folder):
    seen = Counter()
    for process in range(3):
        batches = make_batches(folder, process_index=process, num_processes=3)
        own = ids(take(batches, 5))  # 5 row groups of 4 images
        assert len(set(own)) == 20
        seen.update(own)
    assert set(seen.values()) == {1} and len(seen) == NUM_ROWS


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_share_the_images_without_overlap(folder, num_workers):
    batches = make_batches(folder, batch_size=2, process_index=1, num_processes=2)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=identity, num_workers=num_workers)
    own = ids(take(loader, 12))
    other = ids(take(make_batches(folder, batch_size=2, process_index=0, num_processes=2), 16))
    assert len(set(own)) == 24 and len(set(other)) == 32
    if num_workers == 1:
        assert not set(own) & set(other)


def test_batches_of_similar_lengths(folder):
    def spread(batches):
        return np.mean([np.ptp([count for _, count, _ in batch]) for batch in take(batches, 15)])

    assert spread(make_batches(folder, rows_per_window=60, group_by_length=True)) < 1
    assert spread(make_batches(folder, rows_per_window=60)) > 2


@pytest.mark.parametrize("stop", range(32))
def test_going_on_where_it_stopped(folder, stop):
    expected = take(make_batches(folder), 40)
    stopped = make_batches(folder)
    take(stopped, stop)
    state = stopped.state_dict()
    resumed = make_batches(folder)
    resumed.load_state_dict(state)
    assert take(resumed, 40 - stop) == expected[stop:]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 3, 9])
def test_going_on_with_workers(folder, num_workers, stop):
    def loader():
        return StatefulDataLoader(
            make_batches(folder, batch_size=2), batch_size=None, collate_fn=identity, num_workers=num_workers
        )

    expected = take(loader(), 16)
    stopped = loader()
    if stop:
        assert take(stopped, stop) == expected[:stop]
    state = stopped.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert take(resumed, 16 - stop) == expected[stop:]


def test_pretraining_pairs_of_a_window(folder):
    batches = make_batches(
        folder,
        batch_size=8,
        make_samples=lambda window, seed: PretrainingPairs(window, seed=seed),
        group_by_length=True,
    )
    captions, labels, draws = set(), [], set()
    for batch in take(batches, 15):
        for sample in batch:
            number = sample["record"]["image_id"].removeprefix("image-")
            matches = sample["caption"] in (f"caption {number}", f"another caption {number}")
            assert matches == (sample["itm_label"] == 0)
            labels.append(sample["itm_label"])
            draws.add(sample["rng"].random())
            if matches:
                captions.add(sample["caption"])
    assert 40 < sum(labels) < 80  # half of 120, give or take 3.6 sigma
    assert len(captions) == 120 - sum(labels)
    assert len(draws) == 120  # no two samples draw the same masks


def test_only_the_columns_that_are_asked_for(folder):
    stream = RegionStream.open(folder, "train", columns=["captions", "hard_negatives"])
    assert stream.column_names == ["image_id", "width", "height", "boxes", "features", "captions"]
    stream = RegionStream.open(folder, "train", columns=[])
    assert "captions" not in stream.column_names and stream.num_values("captions") == 2 * NUM_ROWS
    assert len(list(stream)) == NUM_ROWS


def test_a_split_is_prepared_without_the_others(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(folder, tmp_path / "regions")
    file = folder / f"train-00000-of-{NUM_FILES:05d}.parquet"
    shutil.copy(file, tmp_path / "regions" / "validation-00000-of-00001.parquet")
    for split, ids in (("validation", range(20)), ("validation[:25%]", range(5))):
        regions = load_split_alone(tmp_path / "regions", split)
        assert regions.image_ids == [f"image-{i}" for i in ids]
        assert regions.captions(1) == ["caption 1", "another caption 1"]
    prepared = [path.name for path in (tmp_path / "cache").rglob("*.arrow")]
    assert prepared and not any("train" in name for name in prepared)
    with pytest.raises(ValueError, match=r"has no split 'test', got \['train', 'validation'\]"):
        load_split_alone(tmp_path / "regions", "test")


def test_errors(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no split 'test', got \['train'\]"):
        RegionStream.open(folder, "test")
    with pytest.raises(ValueError, match="expected at least one Parquet file"):
        RegionStream([])
    with pytest.raises(ValueError, match="16 readers .* at least as many row groups, got 15"):
        take(make_batches(folder, num_processes=16), 1)
    with pytest.raises(ValueError, match="No window has a batch of 100 samples"):
        take(make_batches(folder, batch_size=100), 1)
    state = make_batches(folder, num_processes=2).state_dict()
    with pytest.raises(ValueError, match="reader 0 of 2, and this is reader 0 of 1"):
        make_batches(folder).load_state_dict(state)
    (tmp_path / "train.csv").write_text("image_id\n1\n")
    with pytest.raises(ValueError, match="Only Parquet files can be streamed, got .*train.csv"):
        RegionStream.open(tmp_path, "train")


def test_files_of_a_private_dataset_are_read_with_the_token(folder, monkeypatch):
    given, open_file = [], fsspec.open

    def open_locally(path, mode, **options):
        given.append(options)
        return open_file(path.removeprefix("hf://"), mode)

    monkeypatch.setattr(fsspec, "open", open_locally)
    stream = RegionStream([f"hf://{path}" for path in sorted(folder.glob("*.parquet"))], token="secret")
    assert len(list(stream)) == NUM_ROWS
    assert len(given) > NUM_FILES and all(options == {"token": "secret"} for options in given)


@needs_hub
def test_streaming_from_the_hub(folder, tmp_path):
    client = f"""
from huggingface_hub import HfApi
from processing import RegionStream
from processing.streaming import load_split_alone
HfApi().create_repo("org/regions", repo_type="dataset")
HfApi().upload_folder(repo_id="org/regions", repo_type="dataset", folder_path={str(folder)!r})
stream = RegionStream.open("org/regions", "train", rows_per_window=8)
assert all(group.file.startswith("hf://datasets/org/regions@") for group in stream.row_groups)
print(*[record["image_id"] for record in stream])
print(*load_split_alone("org/regions", "train[:2]").image_ids)
"""
    with start_hub(tmp_path / "hub") as hub:
        result = subprocess.run(
            [sys.executable, "-c", client],
            cwd=REPOSITORY,
            env=hub.env(home=tmp_path / "home"),
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [f"image-{i}" for i in (*range(NUM_ROWS), 0, 1)]


def test_what_is_masked_of_a_pair_changes_from_pass_to_pass(folder):
    """Conditional masking takes turns by the number of the pair and of the epoch."""
    batches = make_batches(folder, make_samples=lambda window, seed: PretrainingPairs(window, seed=seed))
    sampled = take(batches, 60)  # 120 pairs are 30 batches
    first, second = ({sample["epoch"] for batch in part for sample in batch} for part in (sampled[:30], sampled[30:]))
    assert (first, second) == ({0}, {1})


def test_few_rows_that_are_left_over_join_the_window_before(folder):
    stream = RegionStream.open(folder, "train", rows_per_window=13)  # of 16 rows each, in groups of 4
    windows = stream.windows(np.random.default_rng(0))
    assert [sum(group.num_rows for group in window) for window in windows] == [16, 16, 16, 12]
    stream = RegionStream.open(folder, "train", rows_per_window=25)  # of 28 rows: 4 are left over
    windows = stream.windows(np.random.default_rng(0))
    assert [sum(group.num_rows for group in window) for window in windows] == [28, 32]
