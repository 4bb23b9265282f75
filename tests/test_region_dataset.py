import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from processing.region_dataset import RegionDataset, load_region_dataset

WIDTH = 3
REGION_COUNTS = [2, 1, 3, 0, 2, 4]


def make_rows():
    """Six images; feature and box values count up, so that every number belongs to one region only."""
    rows, first = [], 0
    for i, n in enumerate(REGION_COUNTS):
        numbers = np.arange(first, first + n)
        rows.append(
            {
                "image_id": f"image-{i}",
                "width": 100 + i,
                "height": 50 + i,
                "boxes": (numbers[:, None] + np.array([0.0, 0.25, 0.5, 0.75])).astype(np.float32),
                "features": (numbers[:, None] + np.array([0.0, 0.125, 0.5])).astype(np.float16),
                "class_ids": (numbers - 1).astype(np.int32),
                "class_scores": (numbers / 64).astype(np.float32),
                "class_probs": np.stack([numbers, -numbers], axis=1).astype(np.float16),
                "captions": [f"caption {i} {j}" for j in range(i % 3)],
            }
        )
        first += n
    return rows


def vectors(arrays, width, value_type, fixed):
    inner = pa.list_(value_type, width) if fixed else pa.list_(value_type)
    return pa.array([list(array) for array in arrays], type=pa.list_(inner))


def make_table(rows, fixed=True, feature_type=None, rows_per_chunk=4):
    feature_type = feature_type or pa.float16()
    tables = []
    for start in range(0, len(rows), rows_per_chunk):
        part = rows[start : start + rows_per_chunk]
        columns = {name: [row[name] for row in part] for name in rows[0]}
        tables.append(
            pa.table(
                {
                    "image_id": columns["image_id"],
                    "width": pa.array(columns["width"], pa.int32()),
                    "height": pa.array(columns["height"], pa.int32()),
                    "boxes": vectors(columns["boxes"], 4, pa.float32(), fixed),
                    "features": vectors(columns["features"], WIDTH, feature_type, fixed),
                    "class_ids": pa.array([list(ids) for ids in columns["class_ids"]], pa.list_(pa.int32())),
                    "class_scores": pa.array([list(s) for s in columns["class_scores"]], pa.list_(pa.float32())),
                    "class_probs": vectors(columns["class_probs"], 2, pa.float16(), fixed),
                    "captions": pa.array(columns["captions"], pa.list_(pa.string())),
                }
            )
        )
    return pa.concat_tables(tables)


def assert_records_equal(record, row, feature_dtype=np.float16):
    assert (record["image_id"], record["width"], record["height"]) == (row["image_id"], row["width"], row["height"])
    dtypes = {
        "boxes": np.float32,
        "features": feature_dtype,
        "class_ids": np.int32,
        "class_scores": np.float32,
        "class_probs": np.float16,
    }
    for name, dtype in dtypes.items():
        assert record[name].dtype == dtype
        assert record[name].shape == row[name].shape
        np.testing.assert_array_equal(record[name], row[name])


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("feature_type", [pa.float16(), pa.float32()])
def test_records_equal_the_rows_of_every_layout(fixed, feature_type):
    rows = make_rows()
    dataset = RegionDataset(datasets.Dataset(make_table(rows, fixed, feature_type)))
    assert len(dataset) == 6
    assert dataset.region_feature_size == WIDTH
    assert "captions" in dataset.column_names
    for i, row in enumerate(rows):
        assert_records_equal(dataset[i], row, feature_type.to_pandas_dtype())
        assert dataset.captions(i) == row["captions"]
    assert_records_equal(dataset[-1], rows[-1], feature_type.to_pandas_dtype())
    with pytest.raises(IndexError, match="6 is out of range for 6"):
        dataset[6]


@pytest.mark.parametrize("fixed", [True, False])
def test_sliced_tables_are_read_from_their_own_rows(fixed):
    rows = make_rows()
    dataset = RegionDataset(datasets.Dataset(make_table(rows, fixed).slice(1, 4)))
    assert len(dataset) == 4
    for i in range(4):
        assert_records_equal(dataset[i], rows[i + 1])
        assert dataset.captions(i) == rows[i + 1]["captions"]
    assert dataset.caption_counts().tolist() == [1, 2, 0, 1]
    assert dataset.region_counts().tolist() == [1, 3, 0, 2]


def test_selected_rows_are_read_through_their_indices():
    rows = make_rows()
    selected = datasets.Dataset(make_table(rows)).select([5, 0, 2])
    assert selected._indices is not None
    dataset = RegionDataset(selected)
    for i, row in enumerate([5, 0, 2]):
        assert_records_equal(dataset[i], rows[row])
        assert dataset.captions(i) == rows[row]["captions"]
    assert dataset.caption_counts().tolist() == [2, 0, 2]
    assert dataset.region_counts().tolist() == [4, 2, 3]


@pytest.mark.parametrize("fixed", [True, False])
def test_arrays_are_views_on_arrow_memory(fixed):
    table = make_table(make_rows(), fixed)
    dataset = RegionDataset(datasets.Dataset(table))
    for i in (0, 5):
        for name in ("boxes", "features", "class_ids", "class_scores", "class_probs"):
            values = dataset.dataset.data.column(name).chunk(i // 4)
            while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
                values = values.values
            buffer = values.buffers()[1]
            array = dataset[i][name]
            address = array.__array_interface__["data"][0]
            assert buffer.address <= address
            assert address + array.nbytes <= buffer.address + buffer.size
            assert not array.flags.writeable


def test_columns_of_64_bits_become_the_types_of_a_record():
    table = make_table(make_rows())
    for name, arrow_type in (("boxes", pa.list_(pa.list_(pa.float64()))), ("class_ids", pa.list_(pa.int64()))):
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, pa.array(table.column(name).to_pylist(), arrow_type))
    assert_records_equal(RegionDataset(datasets.Dataset(table))[5], make_rows()[5])


def test_pickled_dataset_gives_the_same_records():
    dataset = RegionDataset(datasets.Dataset(make_table(make_rows())).select([4, 2]))
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert_records_equal(copy[0], make_rows()[4])
    assert_records_equal(copy[1], make_rows()[2])


def test_optional_columns_may_be_missing_and_required_ones_not():
    table = make_table(make_rows())
    dataset = RegionDataset(datasets.Dataset(table.drop_columns(["class_ids", "class_scores", "class_probs"])))
    assert set(dataset[0]) == {"image_id", "width", "height", "boxes", "features"}
    with pytest.raises(ValueError, match=r"needs the columns \['width', 'boxes'\], got \['image_id', 'height'"):
        RegionDataset(datasets.Dataset(table.drop_columns(["width", "boxes"])))


def test_wrong_types_are_refused():
    table = make_table(make_rows())
    doubles = pa.array([list(row["features"].astype(float)) for row in make_rows()], pa.list_(pa.list_(pa.float64())))
    with pytest.raises(ValueError, match="'features' must be a list of float16 or float32 vectors, got .*double"):
        RegionDataset(datasets.Dataset(table.set_column(4, "features", doubles)))
    with pytest.raises(ValueError, match="'boxes' must hold vectors of width 4, got 3"):
        RegionDataset(datasets.Dataset(table.set_column(3, "boxes", table.column("features"))))
    with pytest.raises(ValueError, match="'width' must be an integer, got string"):
        RegionDataset(datasets.Dataset(table.set_column(1, "width", pa.array(["a"] * 6))))
    with pytest.raises(ValueError, match="one split, a `datasets.Dataset`, got DatasetDict"):
        RegionDataset(datasets.DatasetDict())
    dataset = RegionDataset(datasets.Dataset(table))
    with pytest.raises(ValueError, match="no column 'titles', got .*'captions'"):
        dataset.captions(0, "titles")
    with pytest.raises(ValueError, match="'class_ids' must be a string or a list of strings, got list"):
        dataset.caption_counts("class_ids")


def test_missing_captions_name_their_image():
    rows = make_rows()
    rows[4]["captions"] = ["a", None]
    table = pa.concat_tables([make_table(make_rows()[:3]), make_table(rows[3:])])
    for part in (table, table.slice(1)):
        dataset = RegionDataset(datasets.Dataset(part))
        with pytest.raises(ValueError, match="'captions' must have strings, got null among those of image image-4"):
            dataset.caption_counts("captions")


def test_vectors_of_unequal_width_name_their_row():
    rows = make_rows()
    rows[5]["features"] = [[0.0] * 3, [0.0] * 3, [0.0] * 2, [0.0] * 3]
    dataset = RegionDataset(datasets.Dataset(make_table(rows, fixed=False)))
    with pytest.raises(ValueError, match=r"'features' must hold .* width 3, got 2 in row 5 \(image_id 'image-5'\)"):
        dataset[4]


def test_columns_of_unequal_length_name_their_row():
    rows = make_rows()
    rows[2]["class_ids"] = [1, 2]
    dataset = RegionDataset(datasets.Dataset(make_table(rows)))
    with pytest.raises(ValueError, match="'class_ids' has 2 items in row 2 .*expected 3 as in column 'boxes'"):
        dataset[0]


def test_null_values_are_refused():
    rows = make_rows()
    table = make_table(rows)
    heights = pa.array([50, None, 50, 50, 50, 50], pa.int32())
    with pytest.raises(ValueError, match="'height' is null in row 1 "):
        RegionDataset(datasets.Dataset(table.set_column(2, "height", heights)))[0]
    scores = pa.array([[0.5, None], [0.5], [0.5] * 3, [], [0.5] * 2, [0.5] * 4], pa.list_(pa.float32()))
    with pytest.raises(ValueError, match="'class_scores' has null items in rows 0 to 3"):
        RegionDataset(datasets.Dataset(table.set_column(6, "class_scores", scores)))[0]


def test_captions_may_be_single_strings_or_missing():
    table = make_table(make_rows()).append_column("title", pa.array(["a", None, "c", "d", "e", "f"]))
    dataset = RegionDataset(datasets.Dataset(table))
    assert dataset.captions(0, "title") == ["a"]
    assert dataset.captions(1, "title") == []
    assert dataset.caption_counts("title").tolist() == [1, 0, 1, 1, 1, 1]
    assert dataset.caption_counts().tolist() == [0, 1, 2, 0, 1, 2]


def test_load_region_dataset_from_a_folder(tmp_path):
    rows, folder = make_rows(), tmp_path / "scenes"
    (folder / "data").mkdir(parents=True)
    pq.write_table(make_table(rows[:4]), folder / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(make_table(rows[4:]), folder / "data" / "validation-00000-of-00001.parquet")
    cache_dir = str(tmp_path / "cache")

    dataset = load_region_dataset(folder, "train", cache_dir=cache_dir)
    assert len(dataset) == 4
    for i in range(4):
        assert_records_equal(dataset[i], rows[i])
    assert_records_equal(load_region_dataset(str(folder), "validation", cache_dir=cache_dir)[1], rows[5])
    assert len(load_region_dataset(folder, "train[:3]", cache_dir=cache_dir)) == 3

    with pytest.raises(ValueError, match="split 'test' of the folder .*scenes.*train.*validation"):
        load_region_dataset(folder, "test", cache_dir=cache_dir)
    with pytest.raises(ValueError, match="folder .*nowhere' does not exist"):
        load_region_dataset(tmp_path / "nowhere", "train", cache_dir=cache_dir)
    with pytest.raises(ValueError, match=r"of the Hub dataset \(there is no such folder\) 'data/nowhere': "):
        load_region_dataset("data/nowhere", "train", cache_dir=cache_dir)
    with pytest.raises(ValueError, match="drop `streaming`"):
        load_region_dataset(folder, "train", streaming=True)


def test_replaced_files_are_read_anew(tmp_path):
    """Also where the folder has a card, by which `datasets` caches it."""
    rows = make_rows()
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.parquet\n---\n"
    (tmp_path / "README.md").write_text(card)
    for scale in (1.0, 2.0):
        rows[0]["features"] = np.full((2, WIDTH), scale, dtype=np.float16)
        pq.write_table(make_table(rows), tmp_path / "train.parquet")
        assert load_region_dataset(tmp_path, "train")[0]["features"][0, 0] == scale
