"""Region features in the formats of the field: what is read is what was written, by other tools and by our own."""

import io
import multiprocessing
import pickle
import sys
import tracemalloc
from pathlib import Path

import datasets
import foreign_regions
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_regions import make_records
from killing import Killed
from PIL import Image

from processing import load_region_dataset
from processing.region_formats import READERS, WRITERS, RegionFormatError, check_record, create_regions, open_regions

BOTTOM_UP = Path(__file__).resolve().parents[2] / "shared" / "data" / "bottom_up"

BASIC = ("image_id", "width", "height", "boxes", "features")
CLASSES = ("class_ids", "class_scores")
ATTRIBUTES = ("attribute_ids", "attribute_scores")
IDS_OF_ROWS = ["1000", "999", "998", "997"]
SORTED_IDS = ["1000", "997", "998", "999"]


def write_voltas_lmdb(path, records):
    """LXMERT's fields, all of them strings, as `csv` gave them to `pickle`."""

    def make_item(record):
        return {name: str(value) for name, value in foreign_regions.lxmert_item(record).items()}

    foreign_regions.write_vilbert_lmdb(path, records, make_item, protocol=2, str_ids=True)


def write_lmdb_of_arrays(path, records):
    foreign_regions.write_vilbert_lmdb(path, records, foreign_regions.array_item, protocol=5)


def write_lmdb_without_classes(path, records):
    foreign_regions.write_vilbert_lmdb(path, records, foreign_regions.bottom_up_item)


def write_vilberts_tsv(path, records):
    foreign_regions.write_bottom_up_tsv(path, records, class_probs=True)


def write_npy_with_background(path, records):
    foreign_regions.write_npy(path, records, background=True)


# name of the file or folder: (format, who writes it, columns of a record)
SOURCES = {
    "butd.tsv": ("bottom_up_tsv", foreign_regions.write_bottom_up_tsv, BASIC),
    "vilbert.tsv": ("bottom_up_tsv", write_vilberts_tsv, (*BASIC, "class_probs")),
    "lxmert.tsv": ("lxmert_tsv", foreign_regions.write_lxmert_tsv, (*BASIC, *CLASSES, *ATTRIBUTES)),
    "task_lmdb": ("vilbert_lmdb", foreign_regions.write_vilbert_lmdb, (*BASIC, "class_probs")),
    "small_lmdb": ("vilbert_lmdb", write_lmdb_without_classes, BASIC),
    "arrays.lmdb": ("vilbert_lmdb", write_lmdb_of_arrays, (*BASIC, "class_probs")),
    "volta_lmdb": ("vilbert_lmdb", write_voltas_lmdb, (*BASIC, *CLASSES, *ATTRIBUTES)),
    "training.lmdb": ("tensorpack_lmdb", foreign_regions.write_tensorpack_lmdb, (*BASIC, "class_probs", "captions")),
    "npz": ("npz", foreign_regions.write_npz, (*BASIC, "class_scores", "class_probs")),
    "npy": ("npy", foreign_regions.write_npy, (*BASIC, "class_ids", "class_probs")),
    "npy_background": ("npy", write_npy_with_background, (*BASIC, "class_ids", "class_probs")),
    "adaptive.hdf5": ("hdf5", foreign_regions.write_hdf5, BASIC),
}


def write_source(folder, name, records):
    path = folder / name
    SOURCES[name][1](path, records)
    return path


def sizes_of(records):
    return {record["image_id"]: (record["width"], record["height"]) for record in records}


def assert_records_equal(read, written, columns, rtol=0.0, atol=0.0):
    assert set(read) == set(columns)
    for name in columns:
        if isinstance(written[name], np.ndarray):
            np.testing.assert_allclose(read[name], written[name], rtol=rtol, atol=atol, err_msg=name)
        else:
            assert read[name] == written[name], name
    assert read["boxes"].dtype == np.float32
    assert read["features"].dtype in (np.float16, np.float32)
    for name, dtype in (("class_ids", np.int32), ("class_scores", np.float32)):
        assert name not in read or read[name].dtype == dtype


@pytest.mark.parametrize("name", SOURCES)
def test_files_of_other_tools_are_read(tmp_path, name):
    format_name, _, columns = SOURCES[name]
    written = {record["image_id"]: record for record in make_records()}
    path = write_source(tmp_path, name, list(written.values()))
    # UNITER's arrays are float16; what MMF leaves out of the class probabilities is what is missing to 1.
    tolerances = {"npz": (1e-3, 0.2), "npy": (1e-5, 1e-6)}.get(format_name, (0, 0))
    if format_name == "tensorpack_lmdb":
        for record in written.values():
            record["captions"] = record["captions"][:1]

    with open_regions(path, image_sizes=sizes_of(written.values())) as reader:
        assert reader.format_name == format_name
        assert reader.image_ids == (SORTED_IDS if format_name.startswith("np") else IDS_OF_ROWS)
        assert len(reader) == 4
        assert reader.duplicate_ids == []
        records = list(reader)
        assert [record["image_id"] for record in records] == reader.image_ids
        for record in records:
            assert_records_equal(record, written[record["image_id"]], columns, *tolerances)
            check_record(record, region_feature_size=8)
        # In another order, one of them again.
        for image_id in ("998", "1000", "998"):
            assert_records_equal(reader[image_id], written[image_id], columns, *tolerances)
        with pytest.raises(KeyError, match="has no image '12'"):
            reader["12"]


def test_every_format_has_a_source_of_another_tool():
    assert {format_name for format_name, _, _ in SOURCES.values()} == set(READERS) - {"parquet"}


@pytest.mark.parametrize("format_name", WRITERS)
@pytest.mark.parametrize("name", SOURCES)
def test_round_trip(tmp_path, name, format_name):
    """From each source to each format: what the format has a place for comes back bit for bit."""
    written = make_records()
    source = open_regions(write_source(tmp_path, name, written), image_sizes=sizes_of(written))
    columns = SOURCES[name][2]
    if format_name == "lxmert_tsv" and not set(CLASSES) <= set(columns):
        with pytest.raises(ValueError, match="expected class_ids and class_scores, got image_id, width"):
            with create_regions(tmp_path / "copy", format_name) as writer:
                writer.write(source["1000"])
        return

    with create_regions(tmp_path / "copy", format_name) as writer:
        for record in source:
            writer.write(record)
    if writer.columns is not None:
        columns = [column for column in columns if column in writer.columns]
    with open_regions(tmp_path / "copy") as copy:
        assert copy.format_name == format_name
        assert copy.image_ids == source.image_ids
        for image_id in source.image_ids:
            assert_records_equal(copy[image_id], source[image_id], columns)
            # The other formats have float32 only, which holds every float16.
            kept = source[image_id]["features"].dtype if format_name == "parquet" else np.float32
            assert copy[image_id]["features"].dtype == kept


def test_hdf5_with_a_fixed_number_of_boxes(tmp_path):
    records = make_records(region_counts=(3, 3, 3))
    foreign_regions.write_hdf5(tmp_path / "train36.hdf5", records, adaptive=False)
    with create_regions(tmp_path / "copy.h5", "hdf5", regions_per_image=3) as writer:
        for record in open_regions(tmp_path / "train36.hdf5"):
            writer.write(record)
    with h5py.File(tmp_path / "train36.hdf5") as original, h5py.File(tmp_path / "copy.h5") as copy:
        assert set(copy) == set(original) == {"image_features", "image_bb", "spatial_features"}
        for name in copy:
            assert copy[name].dtype == np.float32
            np.testing.assert_allclose(copy[name], original[name], rtol=1e-6)
    index = pickle.loads((tmp_path / "copy_imgid2idx.pkl").read_bytes())
    assert index == pickle.loads((tmp_path / "train36_imgid2idx.pkl").read_bytes()) == {1000: 0, 999: 1, 998: 2}
    for read, written in zip(open_regions(tmp_path / "copy.h5"), records, strict=True):
        assert_records_equal(read, written, BASIC)
    with pytest.raises(ValueError, match="expected 3 regions, got 2"):
        with create_regions(tmp_path / "other.h5", "hdf5", regions_per_image=3) as writer:
            writer.write(make_records(region_counts=(2,))[0])


def test_hdf5_with_one_kind_of_boxes(tmp_path):
    records = make_records()
    foreign_regions.write_hdf5(tmp_path / "pixels.hdf5", records, without=["spatial_features"])
    foreign_regions.write_hdf5(tmp_path / "normalized.hdf5", records, without=["image_bb"])
    for name in ("pixels.hdf5", "normalized.hdf5"):
        for read, written in zip(open_regions(tmp_path / name, sizes_of(records)), records, strict=True):
            assert_records_equal(read, written, BASIC, rtol=1e-6)

    read = open_regions(tmp_path / "normalized.hdf5")["1000"]
    assert read["width"] == read["height"] == 1
    np.testing.assert_array_equal(read["boxes"], foreign_regions.normalized_boxes(records[0])[:, :4])
    check_record(read)
    with pytest.raises(RegionFormatError, match="image_id 1000.*expected `spatial_features` or an image size"):
        open_regions(tmp_path / "pixels.hdf5")["1000"]


def test_ids_that_are_no_plain_numbers_survive_hdf5(tmp_path):
    records = make_records()
    for record, image_id in zip(records, ("007", "12", "COCO_val2014_12", "²"), strict=True):
        record["image_id"] = image_id
    with create_regions(tmp_path / "a.hdf5", "hdf5") as writer:
        for record in records:
            writer.write(record)
    assert open_regions(tmp_path / "a.hdf5").image_ids == ["007", "12", "COCO_val2014_12", "²"]
    assert pickle.loads((tmp_path / "a_imgid2idx.pkl").read_bytes()) == {"007": 0, 12: 1, "COCO_val2014_12": 2, "²": 3}


def test_normalized_boxes_without_sizes(tmp_path):
    records = make_records()
    foreign_regions.write_npz(tmp_path / "npz", records)
    for record, written in zip(open_regions(tmp_path / "npz", {"1000": (320, 200)}), records[:1], strict=False):
        assert (record["width"], record["height"]) == (320, 200)
        np.testing.assert_allclose(record["boxes"], written["boxes"], atol=0.2)
    record = open_regions(tmp_path / "npz")["1000"]
    assert (record["width"], record["height"]) == (1, 1)
    assert record["features"].dtype == record["class_probs"].dtype == np.float16
    check_record(record)


def test_npz_may_hold_the_area_and_lack_the_classes(tmp_path):
    record = make_records()[0]
    arrays = foreign_regions.npz_arrays(record)
    boxes = np.concatenate([arrays["norm_bb"], arrays["norm_bb"][:, 4:5] * arrays["norm_bb"][:, 5:]], axis=1)
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "a.npz", features=record["features"], norm_bb=boxes.astype(np.float64))
    read = open_regions(tmp_path / "npz")["a"]
    assert set(read) == set(BASIC)
    np.testing.assert_array_equal(read["boxes"], arrays["norm_bb"][:, :4].astype(np.float32))
    np.testing.assert_array_equal(read["features"], record["features"])


def test_the_first_of_several_records_of_an_image_counts(tmp_path):
    records = make_records()
    again = {**records[3], "image_id": "1000"}
    foreign_regions.write_bottom_up_tsv(tmp_path / "a.tsv", [*records, again, again, records[1]])
    values = foreign_regions.tensorpack_values(
        [foreign_regions.tensorpack_row(r) for r in (*records, again, records[1])]
    )
    foreign_regions.write_lmdb(tmp_path / "a.lmdb", values)
    for name in ("a.tsv", "a.lmdb"):
        reader = open_regions(tmp_path / name)
        assert reader.image_ids == IDS_OF_ROWS
        assert len(reader) == len(list(reader)) == 4
        assert reader.duplicate_ids == ["1000", "999"]
        np.testing.assert_array_equal(reader["1000"]["boxes"], records[0]["boxes"])


def test_formats_are_recognized_by_their_content(tmp_path):
    records = make_records()
    foreign_regions.write_lxmert_tsv(tmp_path / "features", records)
    assert open_regions(tmp_path / "features").format_name == "lxmert_tsv"
    with create_regions(tmp_path / "table", "parquet") as writer:
        writer.write(records[0])
    assert open_regions(tmp_path / "table").format_name == "parquet"

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(
        RegionFormatError, match=r"(?s)photos: expected one of .* got a folder with a.jpg:.*- npz: a folder"
    ):
        open_regions(tmp_path / "photos")
    (tmp_path / "notes.txt").write_text("some notes\n")
    with pytest.raises(RegionFormatError, match="got a file of 11 bytes that begins with b'some notes"):
        open_regions(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="no file or folder .*nowhere"):
        open_regions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected one of parquet, .*hdf5, got 'npz'"):
        create_regions(tmp_path / "a", "npz")


@pytest.mark.parametrize(
    ("library", "name"), [("lmdb", "task_lmdb"), ("h5py", "adaptive.hdf5"), ("msgpack", "training.lmdb")]
)
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, library, name):
    path = write_source(tmp_path, name, make_records())
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'needs {library}: pip install "interbert\[formats\]"'):
        open_regions(path)
    if library != "msgpack":
        with pytest.raises(ImportError, match=f"needs {library}"):
            create_regions(tmp_path / "copy", SOURCES[name][0])
    foreign_regions.write_bottom_up_tsv(tmp_path / "a.tsv", make_records())
    assert len(open_regions(tmp_path / "a.tsv")) == 4


# ---------------------------------------------------------------- writers


def test_parquet_loads_as_a_region_dataset(tmp_path):
    records = make_records()
    (tmp_path / "regions").mkdir()
    with create_regions(
        tmp_path / "regions" / "train-00000-of-00001.parquet", "parquet", feature_dtype="float16"
    ) as writer:
        for record in records:
            writer.write({**record, "question_id": 7, "title": "a", "hits": [{"x": 1, "names": ["b"]}]})

    dataset = load_region_dataset(tmp_path / "regions", "train")
    for index, record in enumerate(records):
        row = dataset[index]
        for name in ("image_id", "width", "height"):
            assert row[name] == record[name]
        for name in ("boxes", "class_ids", "class_scores"):
            np.testing.assert_array_equal(row[name], record[name])
        for name in ("features", "class_probs"):
            assert row[name].dtype == np.float16
            np.testing.assert_array_equal(row[name], record[name].astype(np.float16))
        assert dataset.captions(index) == record["captions"]

    plain = datasets.load_dataset(str(tmp_path / "regions"), split="train")
    assert plain.features["features"] == datasets.List(datasets.List(datasets.Value("float16"), length=8))
    assert plain.features["boxes"] == datasets.List(datasets.List(datasets.Value("float32"), length=4))
    assert plain.features["class_probs"] == datasets.List(datasets.List(datasets.Value("float16"), length=7))
    assert plain.features["width"] == plain.features["height"] == datasets.Value("int32")
    assert plain.features["captions"] == datasets.List(datasets.Value("string"))
    assert plain[0]["question_id"] == 7 and plain[0]["title"] == "a" and plain[0]["hits"] == [{"x": 1, "names": ["b"]}]
    streamed = datasets.load_dataset(str(tmp_path / "regions"), split="train", streaming=True)
    assert [row["image_id"] for row in streamed] == IDS_OF_ROWS

    reader = open_regions(tmp_path / "regions")
    assert set(reader.column_types) == {"attribute_ids", "attribute_scores", "captions", "question_id", "title", "hits"}
    record = reader["999"]
    assert record["hits"] == [{"x": 1, "names": ["b"]}]
    np.testing.assert_array_equal(record["attribute_ids"], records[1]["attribute_ids"])


def test_the_same_records_give_the_same_parquet_file(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        with create_regions(tmp_path / name, "parquet") as writer:
            for record in make_records():
                writer.write(record)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_row_groups_are_bounded(tmp_path, monkeypatch):
    records = make_records(region_counts=(5,) * 9)
    bytes_of_two = 2 * sum(np.asarray(records[0][name]).nbytes for name in ("boxes", "features", "class_probs"))
    for limit, value, expected in (
        ("ROW_GROUP_BYTES", bytes_of_two, [2, 2, 2, 2, 1]),
        ("ROWS_PER_GROUP", 4, [4, 4, 1]),
    ):
        monkeypatch.setattr(f"processing.region_formats.parquet.{limit}", value)
        path = tmp_path / limit / "a.parquet"
        with create_regions(path, "parquet") as writer:
            for record in records:
                writer.write(record)
        monkeypatch.undo()
        metadata = pq.ParquetFile(path).metadata
        assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == expected
        with open_regions(path) as reader:
            for image_id in (records[8]["image_id"], records[0]["image_id"], records[5]["image_id"]):
                written = next(record for record in records if record["image_id"] == image_id)
                np.testing.assert_array_equal(reader[image_id]["features"], written["features"])


def test_parquet_of_several_files_and_of_other_writers(tmp_path):
    """A folder with splits, plain lists instead of fixed sizes, and captions of which some are null."""
    records = make_records()
    for split, part in (("validation", records[2:]), ("train", records[:2])):
        columns = {name: [np.asarray(record[name]).tolist() for record in part] for name in (*BASIC, *CLASSES)}
        columns["captions"] = [record["captions"] if len(record["captions"]) > 1 else None for record in part]
        (tmp_path / "regions" / split).mkdir(parents=True)
        schema = pa.schema(
            [("image_id", pa.string()), ("width", pa.int64()), ("height", pa.int64())]
            + [(name, pa.list_(pa.list_(pa.float32()))) for name in ("boxes", "features")]
            + [("class_ids", pa.list_(pa.int64())), ("class_scores", pa.list_(pa.float64()))]
            + [("captions", pa.list_(pa.string()))]
        )
        pq.write_table(pa.table(columns, schema=schema), tmp_path / "regions" / split / "a.parquet", row_group_size=1)
    reader = open_regions(tmp_path / "regions")
    assert reader.image_ids == IDS_OF_ROWS
    for read, written in zip(reader, records, strict=True):
        written["captions"] = written["captions"] if len(written["captions"]) > 1 else None
        assert_records_equal(read, written, (*BASIC, *CLASSES, "captions"))


def test_types_of_further_columns(tmp_path):
    record = make_records()[0]
    for options, expected in (
        ({}, pa.list_(pa.string())),
        ({"column_types": {"answers": pa.list_(pa.int16())}}, pa.list_(pa.int16())),
    ):
        path = tmp_path / f"{len(options)}.parquet"
        with create_regions(path, "parquet", **options) as writer:
            writer.write({**record, "answers": [], "note": None})
        schema = pq.read_schema(path)
        assert schema.field("answers").type == expected
        assert schema.field("note").type == pa.string()
        assert open_regions(path)["1000"]["note"] is None
    with pytest.raises(ValueError, match="image_id 999.*expected captions as list<item: string>"):
        with create_regions(tmp_path / "a.parquet", "parquet") as writer:
            writer.write(record)
            writer.write({**record, "image_id": "999", "captions": [1]})
    with pytest.raises(ValueError, match="`feature_dtype`: expected float16, float32 or None, got 'float64'"):
        create_regions(tmp_path / "a.parquet", "parquet", feature_dtype="float64")
    for dtype in (np.float32, np.float64):
        large = {**record, "features": np.full((3, 8), 1e5, dtype=dtype)}
        with pytest.raises(ValueError, match="image_id 1000.*expected features as .*halffloat.* got 100000.0"):
            with create_regions(tmp_path / "a.parquet", "parquet", feature_dtype="float16") as writer:
                writer.write(large)


def test_pictures_and_names_of_classes_stay_what_they_are(tmp_path):
    """What `datasets` says of columns beyond their Arrow types goes from file to file."""
    picture = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(picture, "png")
    records = [
        {**record, "image": {"bytes": picture.getvalue(), "path": None}, "scene": number % 2}
        for number, record in enumerate(make_records())
    ]
    features = {"image": datasets.Image(), "scene": datasets.ClassLabel(names=["indoors", "outdoors"])}

    def write(name, records, column_types):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "train-00000-of-00001.parquet"
        with create_regions(path, "parquet", column_types=column_types) as writer:
            for record in records:
                writer.write(record)
        return path

    first = write("first", records, features)
    reader = open_regions(first)
    assert {name: reader.column_types[name] for name in features} == features
    assert reader["999"]["image"] == {"bytes": picture.getvalue(), "path": None}
    second = write("second", reader, reader.column_types)
    assert second.read_bytes() == first.read_bytes()

    dataset = datasets.load_dataset(str(tmp_path / "second"), split="train")
    assert {name: dataset.features[name] for name in features} == features
    assert dataset[0]["image"].size == (3, 2)
    # Files whose Arrow types say it all have no description besides.
    plain = write("plain", make_records(), {"captions": datasets.List(datasets.Value("string"))})
    assert pq.read_schema(plain).metadata is None


@pytest.mark.parametrize("format_name", WRITERS)
def test_nothing_unfinished_stands_under_the_final_name(tmp_path, format_name):
    records = make_records()
    path = tmp_path / "new" / "regions"
    with pytest.raises(RuntimeError, match="stop"):
        with create_regions(path, format_name) as writer:
            writer.write(records[0])
            assert not path.exists()
            raise RuntimeError("stop")
    assert list((tmp_path / "new").iterdir()) == []

    # What a killed process leaves behind is written over.
    (tmp_path / "new" / ".regions.incomplete").write_bytes(b"a part")
    with create_regions(path, format_name) as writer:
        for record in records:
            writer.write(record)
    assert {entry.name for entry in (tmp_path / "new").iterdir()} <= {"regions", "regions_imgid2idx.pkl"}
    assert len(open_regions(path)) == 4
    with pytest.raises(FileExistsError, match="regions exists already"):
        create_regions(path, format_name)

    with pytest.raises(ValueError, match="expected at least one record, none was written"):
        with create_regions(tmp_path / "empty", format_name):
            pass
    assert not any(entry.name.startswith((".empty", "empty")) for entry in tmp_path.iterdir())


def test_an_index_of_another_hdf5_file_is_not_written_over(tmp_path):
    (tmp_path / "a_imgid2idx.pkl").write_bytes(b"other")
    (tmp_path / "a.h5").touch()
    with pytest.raises(FileExistsError, match="a_imgid2idx.pkl exists already"):
        create_regions(tmp_path / "a.hdf5", "hdf5")


def test_an_index_without_its_hdf5_file_is_a_leftover(tmp_path, monkeypatch):
    """Of a writer that was killed between the names of the two."""
    path, (record, *_) = tmp_path / "a.hdf5", make_records()
    rename = Path.rename

    def die(path, target):
        if Path(target).suffix == ".hdf5":
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(Killed):
        with create_regions(path, "hdf5") as writer:
            writer.write(record)
    monkeypatch.undo()
    assert (tmp_path / "a_imgid2idx.pkl").exists() and not path.exists()
    with create_regions(path, "hdf5") as writer:
        writer.write(record)
    assert [found["image_id"] for found in open_regions(path)] == [record["image_id"]]


@pytest.mark.parametrize("format_name", WRITERS)
def test_writers_refuse_what_they_have_no_place_for(tmp_path, format_name):
    first, second = make_records()[:2]
    cases = [
        ({"image_id": "1000"}, "expected an image_id that is new, got '1000'"),
        ({"image_id": 5}, "expected an image_id that is new, got 5"),
        ({"boxes": second["boxes"][:, :3]}, r"expected boxes of shape \(1, 4\), got \(1, 3\)"),
        ({"features": first["features"]}, r"expected features of shape \(1, any\), got \(3, 8\)"),
        (
            {"features": second["features"][:, :6]},
            r"expected columns and widths as before, .*features\[8\].*features\[6\]",
        ),
    ]
    if format_name.endswith("tsv"):
        cases += [({"image_id": image_id}, "without tabs") for image_id in ("a\tb", "a\nb", 'a"b')]
    if format_name == "vilbert_lmdb":
        cases += [({"image_id": image_id}, "at most 511 bytes, other than 'keys'") for image_id in ("a" * 512, "keys")]
    if format_name == "hdf5":
        cases.append(({"boxes": np.zeros((1, 4), np.float32)}, "expected a box from which the size .* follows"))
    if format_name in ("lxmert_tsv", "vilbert_lmdb", "parquet"):
        cases.append(({"class_ids": np.zeros(2, np.int32)}, r"expected class_ids of shape \(1,\), got \(2,\)"))
    if format_name == "lxmert_tsv":
        cases.append(({"attribute_ids": np.zeros(2)}, r"expected attributes of shape \(1,\), got \(2,\) and \(1,\)"))
    with create_regions(tmp_path / "a", format_name) as writer:
        writer.write(first)
        for change, message in cases:
            with pytest.raises(ValueError, match=message):
                writer.write({**second, **change})
        with pytest.raises(ValueError, match=r"expected a record with \('image_id', .*'features'\), got \('image_id',"):
            writer.write({name: value for name, value in second.items() if name != "features"})
        writer.write(second)
    assert open_regions(tmp_path / "a").image_ids == ["1000", "999"]


def test_lxmert_tsv_without_attributes(tmp_path):
    record = {name: value for name, value in make_records()[0].items() if name not in ATTRIBUTES}
    with create_regions(tmp_path / "a.tsv", "lxmert_tsv") as writer:
        writer.write(record)
    read = open_regions(tmp_path / "a.tsv")["1000"]
    assert read["attribute_ids"].tolist() == [-1] * 3
    assert read["attribute_scores"].tolist() == [0] * 3


def test_large_lmdbs_are_written_in_several_transactions(tmp_path, monkeypatch):
    monkeypatch.setattr("processing.region_formats.vilbert_lmdb.TRANSACTION_BYTES", 2**16)
    records = make_records(region_counts=(3,) * 200, feature_size=64)
    with create_regions(tmp_path / "a", "vilbert_lmdb") as writer:
        for record in records:
            writer.write(record)
        assert len(writer._pending) < 100
    reader = open_regions(tmp_path / "a")
    assert reader.image_ids == [record["image_id"] for record in records]
    for record in records:
        np.testing.assert_array_equal(reader[record["image_id"]]["features"], record["features"])


# ---------------------------------------------------------------- processes and memory


def open_everything(folder):
    """A reader of every source and one of Parquet, and the records that they give."""
    records = make_records()
    readers = [open_regions(write_source(folder, name, records), sizes_of(records)) for name in SOURCES]
    with create_regions(folder / "a.parquet", "parquet") as writer:
        for record in records:
            writer.write(record)
    readers.append(open_regions(folder / "a.parquet"))
    return readers, [reader["998"] for reader in readers]


def read_in_a_process(readers, image_id, results):
    results.put([reader[image_id] for reader in readers])


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_readers_work_in_other_processes(tmp_path, start_method):
    """Forked while their files are open, and pickled."""
    readers, expected = open_everything(tmp_path)
    context = multiprocessing.get_context(start_method)
    results = context.Queue()
    process = context.Process(target=read_in_a_process, args=(readers, "998", results))
    process.start()
    try:
        records = results.get(timeout=120)
        for reader in readers:
            reader["1000"]
    finally:
        process.join()
    for record, before in zip(records, expected, strict=True):
        assert_records_equal(record, before, set(before))


def test_readers_can_be_pickled_closed_and_opened_twice(tmp_path):
    readers, expected = open_everything(tmp_path)
    for reader, before in zip(readers, expected, strict=True):
        copy = pickle.loads(pickle.dumps(reader))
        assert copy.image_ids == reader.image_ids
        assert_records_equal(copy["998"], before, set(before))
        second = open_regions(reader.path, reader.image_sizes)
        reader.close()
        assert_records_equal(second["998"], before, set(before))
        second.close()
        assert_records_equal(reader["998"], before, set(before))


@pytest.fixture(scope="module")
def large_records():
    """120 images, 52 MB in TSV."""
    features = np.random.default_rng(0).normal(size=(40, 2000)).astype(np.float32)
    (record,) = make_records(region_counts=(40,), feature_size=2000)
    return [{**record, "image_id": str(10000 + number), "features": np.roll(features, number)} for number in range(120)]


@pytest.mark.parametrize("name", ["butd.tsv", "task_lmdb", "training.lmdb", "npz", "npy", "adaptive.hdf5"])
def test_one_image_is_in_memory_at_a_time(tmp_path, large_records, name):
    path = write_source(tmp_path, name, large_records)
    image_bytes = large_records[0]["features"].nbytes
    open_regions(path)["10000"]  # imports what it needs
    tracemalloc.start()
    try:
        with open_regions(path) as reader:
            after_opening = tracemalloc.get_traced_memory()[1]
            for _ in reader:
                pass
            for image_id in reversed(reader.image_ids):
                reader[image_id]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A line of text is four thirds of its bytes; where the image ids are apart, no image is read for them at all.
    assert after_opening < (5 if name == "butd.tsv" else 0.5) * image_bytes
    # Of one image: the text, its columns, their bytes, and the record before it.
    assert peak < 8 * image_bytes
    assert 8 * image_bytes < sum(record["features"].nbytes for record in large_records) / 10


def test_one_row_group_is_in_memory_at_a_time(tmp_path, large_records, monkeypatch):
    monkeypatch.setattr("processing.region_formats.parquet.ROW_GROUP_BYTES", 2**21)
    with create_regions(tmp_path / "a.parquet", "parquet") as writer:
        for record in large_records:
            writer.write(record)
    before = pa.total_allocated_bytes()
    reader = open_regions(tmp_path / "a.parquet")
    assert pa.total_allocated_bytes() - before < 2**20
    largest = 0
    for _ in reader:
        largest = max(largest, pa.total_allocated_bytes() - before)
    assert 2**20 < largest < 2**23


# ---------------------------------------------------------------- check_record


def test_check_record_admits_what_readers_give():
    for record in make_records():
        check_record(record)
        check_record(record, region_feature_size=8)
    normalized = {**record, "width": 1, "height": 1, "boxes": np.array([[-0.009, 0, 1.009, 1], [0, 0, 1, 1]])}
    check_record(normalized)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 1000}, "expected an image_id, got 1000"),
        ({"image_id": None}, "expected an image_id, got None"),
        ({"width": float("nan")}, "^image_id 1000: expected a width > 0 in pixels, got nan"),
        ({"height": 0}, "^image_id 1000: expected a height > 0 in pixels, got 0"),
        ({"features": np.zeros((3, 8, 1))}, r"^image_id 1000: expected features of shape \(regions, any\)"),
        ({"features": np.zeros((2, 8))}, "got 2 feature vectors and 3 boxes"),
        ({"features": np.full((3, 8), np.nan)}, "^image_id 1000, region 0: expected finite features"),
        ({"boxes": np.zeros((3, 5))}, r"expected boxes of shape \(regions, 4\)"),
        ({"boxes": np.full((3, 4), np.nan)}, "^image_id 1000, region 0: expected a finite box"),
        (
            {"boxes": np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 322, 1]])},
            "^image_id 1000, region 2: .*within the image",
        ),
        ({"boxes": np.array([[5, 0, 1, 1]] * 3)}, "region 0: expected a box .* x1 <= x2"),
        (
            {"boxes": np.array([[0, 0, 1, 1], [0, 0, 1.02, 1], [0, 0, 1, 1]]), "width": 1, "height": 1},
            r"^image_id 1000, region 1: .* within \[0, 1\], as width and height are 1 \(at most 0.01 outside\), got",
        ),
        ({"class_ids": np.zeros(2, np.int32)}, r"expected class_ids of shape \(3,\), got \(2,\)"),
        ({"class_ids": np.array([0, -2, 0])}, "region 1: expected class_ids to be an integer from -1 on, got -2"),
        ({"class_ids": np.zeros(3)}, "region 0: expected class_ids to be an integer"),
        ({"class_scores": np.zeros((3, 1))}, r"expected class_scores of shape \(3,\), got \(3, 1\)"),
        ({"class_scores": np.array([0, 1, np.inf])}, "region 2: expected class_scores to be finite numbers, got inf"),
        ({"class_probs": np.zeros(3)}, r"expected class_probs of shape \(3, classes \+ 1\), got \(3,\)"),
        ({"class_probs": np.full((3, 7), np.nan)}, "region 0: expected class_probs to be finite numbers"),
    ],
)
def test_check_record_finds(change, message):
    with pytest.raises(ValueError, match=message):
        check_record({**make_records()[0], **change})


def test_check_record_finds_what_is_missing_or_too_wide():
    record = make_records()[0]
    with pytest.raises(ValueError, match=r"expected features of shape \(regions, 2048\), got \(3, 8\)"):
        check_record(record, region_feature_size=2048)
    with pytest.raises(ValueError, match="image_id 1000: expected the keys .*: boxes missing"):
        check_record({name: value for name, value in record.items() if name != "boxes"})


# ---------------------------------------------------------------- real files


@pytest.mark.skipif(
    not BOTTOM_UP.is_dir(), reason="the real bottom-up-attention features are not beside the repository"
)
@pytest.mark.parametrize(
    ("file", "format_name", "num_images"),
    [
        ("lxmert_train2014_obj36.tsv", "lxmert_tsv", 10),
        ("trainval_resnet101_faster_rcnn_genome_36.tsv", "bottom_up_tsv", 1),
    ],
)
def test_real_bottom_up_features(tmp_path, file, format_name, num_images):
    reader = open_regions(BOTTOM_UP / file)
    assert reader.format_name == format_name
    assert len(reader) == num_images
    objects = (BOTTOM_UP / "objects_vocab.txt").read_text().split("\n")
    attributes = (BOTTOM_UP / "attributes_vocab.txt").read_text().split("\n")
    for record in reader:
        check_record(record, region_feature_size=2048)
        boxes, features = record["boxes"], record["features"]
        report = (
            f"{record['image_id']} ({record['width']} x {record['height']}): features {features.mean():.3f} on average"
        )
        report += f", {features.min():g} to {features.max():.1f}, boxes {boxes.min():g} to {boxes[:, 2:].max(axis=0)}"
        assert features.dtype == np.float32 and features.shape == (36, 2048)
        # The pooled output of a ReLU.
        assert features.min() == 0 and 0.4 < features.mean() < 0.9 and 20 < features.max() < 40
        # Some proposal touches each side, and none covers nothing.
        assert boxes.min() == 0
        np.testing.assert_allclose(boxes[:, 2:].max(axis=0), [record["width"], record["height"]], atol=1.1)
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        if format_name == "lxmert_tsv":
            assert record["class_ids"].min() >= 0 and record["class_ids"].max() < len(objects) == 1600
            assert record["attribute_ids"].max() < len(attributes) == 400
            best = np.argsort(-record["class_scores"])[:5]
            names = [(attributes[record["attribute_ids"][i]], objects[record["class_ids"][i]]) for i in best]
            report += f", {'; '.join(' '.join(pair) for pair in names)}"
            expected = {
                "COCO_train2014_000000084002": [("wooden", "bed"), ("white", "pillow")],
                "COCO_train2014_000000201446": [("orange", "carrot"), ("wooden", "cutting board")],
                "COCO_train2014_000000131486": [("blue", "sky"), ("white", "helmet")],
            }
            assert set(expected.get(record["image_id"], [])) <= set(names)
        print(report)

    with create_regions(tmp_path / "a.parquet", "parquet") as writer:
        for record in reader:
            writer.write(record)
    parquet = open_regions(tmp_path / "a.parquet")
    for record in reader:
        copy = parquet[record["image_id"]]
        assert list(copy) == list(record)
        for name, values in record.items():
            if isinstance(values, np.ndarray):
                assert copy[name].dtype == values.dtype
                assert copy[name].tobytes() == values.tobytes()
            else:
                assert copy[name] == values
    with create_regions(tmp_path / "a.tsv", format_name) as writer:
        for record in parquet:
            writer.write(record)
    assert (tmp_path / "a.tsv").read_bytes() == (BOTTOM_UP / file).read_bytes()
