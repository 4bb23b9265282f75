"""Damaged and malicious sources of region features: a clear error each, nothing executed, nothing half-read."""

import collections
import functools
import io
import os
import pickle
import shutil
import struct
import time
import zipfile

import foreign_regions
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_regions import make_records

from processing.region_formats import RegionFormatError, check_record, create_regions, open_regions
from processing.region_formats.safe_pickle import read_npy, safe_loads
from processing.region_formats.tensorpack_lmdb import skip_object


class MakesFolder:
    """Unpickled without care, this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# `os` is called by the name of the module that implements it.
REFUSED = r"got (posix|nt)\.mkdir, which was not run"


def test_the_malicious_pickle_works_where_it_is_not_refused(tmp_path):
    pickle.loads(pickle.dumps(MakesFolder(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


# ---------------------------------------------------------------- the unpickler


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        {"image_id": "a", 5: None, "sizes": (1, 2.5, True), "bytes": b"\x00\xff", "nested": [[{}]]},
        [b"1", b"2"],
        collections.OrderedDict([("b", 1), ("a", 2)]),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        np.arange(24, dtype=np.float16).reshape(2, 3, 4).transpose(1, 0, 2),
        np.arange(3, dtype=">f4"),
        np.array(["a", "bc"]),
        np.array([b"a", b"bc"]),
        np.array([True, False]),
        np.array(7, dtype=np.uint8),
        np.float32(2.5),
        np.int64(-3),
        np.bool_(True),
        np.str_("ab"),
        {"boxes": np.ones((1, 4)), "again": [np.float64(1), (np.ones(2),)]},
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_what_formats_need_is_unpickled(value, protocol):
    def assert_same(got, expected):
        if isinstance(expected, np.ndarray | np.generic):
            assert type(got) is type(expected) and got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)
        elif isinstance(expected, dict):
            assert list(got) == list(expected)
            for key in expected:
                assert_same(got[key], expected[key])
        elif isinstance(expected, list | tuple):
            assert type(got) is type(expected) and len(got) == len(expected)
            for pair in zip(got, expected, strict=True):
                assert_same(*pair)
        else:
            assert got == expected and type(got) is type(expected)

    assert_same(safe_loads(pickle.dumps(value, protocol)), value)


def test_one_array_in_two_places_is_unpickled():
    array = np.arange(3.0)
    got = safe_loads(pickle.dumps({"a": array, "b": [array, array]}, 2))
    for copy in (got["a"], *got["b"]):
        np.testing.assert_array_equal(copy, array)


def test_pickles_of_python_2_and_numpy_1():
    """As cPickle and numpy 1.16 of Python 2 wrote {"a": numpy.array([1, 2], "f4"), 12: 3L, "id": "abc"}, protocol 2."""
    data = (
        b"\x80\x02}q\x01(U\x01aq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02f4K\x00K\x01\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff"
        b"\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00@tbK\x0c\x8a\x01\x03U\x02idq\x08U\x03abcq\tu."
    )
    got = safe_loads(data)
    assert got["a"].dtype == np.float32 and got["a"].tolist() == [1, 2]
    assert (got[12], got["id"]) == (3, "abc")
    # Protocol 0, of integers by name: BUTD-VQA's index.
    assert safe_loads(b"(dp1\nI458752\nI0\ns.") == {458752: 0}


GLOBALS = [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("__builtin__", "eval"),
    ("builtins", "bytearray"),
    ("builtins", "__import__"),
    ("subprocess", "Popen"),
    ("functools", "partial"),
    ("numpy", "load"),
    ("numpy", "fromfile"),
    ("numpy.core.multiarray", "fromfile"),
    ("numpy.core.multiarray", "scalar.__class__"),
    ("numpy.core", "multiarray._reconstruct"),
    ("numpy._core.multiarray", "array"),
    ("numpy.testing._private.utils", "runstring"),
    ("collections", "defaultdict"),
    ("_codecs", "decode"),
    ("torch", "load"),
    ("pathlib", "Path"),
    ("processing.region_formats.safe_pickle", "safe_loads"),
]


@pytest.mark.parametrize(("module", "name"), GLOBALS)
def test_every_other_name_is_refused_unlooked_up(module, name):
    old = b"c" + module.encode() + b"\n" + name.encode() + b"\n(S'1'\ntR."
    new = pickle.PROTO + b"\x04"
    for text in (module, name):
        new += pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
    new += pickle.STACK_GLOBAL + b"(S'1'\ntR."
    for data in (old, new):
        with pytest.raises(pickle.UnpicklingError, match=f"got {module}.{name}, which was not run"):
            safe_loads(data)
    # INST, the way of protocol 0
    with pytest.raises(pickle.UnpicklingError, match="which was not run"):
        safe_loads(b"(S'1'\ni" + module.encode() + b"\n" + name.encode() + b"\n.")


def test_nothing_is_imported_for_a_refused_name(tmp_path, monkeypatch):
    (tmp_path / "imported_by_a_pickle.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'made')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="imported_by_a_pickle.f, which was not run"):
        safe_loads(b"cimported_by_a_pickle\nf\n.")
    assert not (tmp_path / "made").exists()


ADMITTED = [
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
]


@pytest.mark.parametrize(("module", "name"), ADMITTED)
def test_what_is_admitted_cannot_be_changed(module, name):
    """BUILD sets attributes of what is on the stack, those of a class or a function for everyone."""
    head = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    for attribute in (b"__defaults__", b"__code__", b"__setstate__", b"__class__", b"__init__", b"new"):
        # state (None, {attribute: (1,)}), which is set with `setattr`, and {attribute: (1,)}, for `__dict__`
        for state in (b"(N(dS'" + attribute + b"'\nI1\n\x85st", b"(dS'" + attribute + b"'\nI1\n\x85s"):
            with pytest.raises(pickle.UnpicklingError):
                safe_loads(head + state + b"b.")
    value = {"a": np.arange(3, dtype=np.float32), "b": collections.OrderedDict(x=1), "c": np.float16(2)}
    for protocol in (2, 5):
        got = safe_loads(pickle.dumps(value, protocol))
        assert got["a"].tolist() == [0, 1, 2] and got["b"] == {"x": 1} and got["c"] == 2


def object_array(*objects):
    array = np.empty(len(objects), dtype=object)
    array[:] = objects
    return array


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object_array(1, "a"), "expected arrays of numbers or strings, got one of dtype 'O8'"),
        (np.zeros(2, dtype=[("a", "f4")]), "got one of dtype 'V4'"),
        (np.zeros(2, dtype="M8[s]"), "got one of dtype 'M8'"),
        (np.zeros(2, dtype=complex), "got one of dtype 'c16'"),
        (np.float32, "got numpy.float32, which was not run"),
        (np.dtype("f4"), "expected plain containers, .*, got <.*_Dtype object"),
        (collections.OrderedDict, "expected plain containers, .*, got <class 'dict'>"),
        ({1, 2}, "expected plain containers, .*, got ({1, 2}|__builtin__.set)"),
        (collections.Counter("ab"), "got collections.Counter, which was not run"),
        (functools.partial(print), "got functools.partial, which was not run"),
    ],
)
def test_other_types_are_refused(value, message):
    for protocol in (2, 5):
        with pytest.raises(pickle.UnpicklingError, match=message):
            safe_loads(pickle.dumps(value, protocol))


def test_arrays_that_lie_about_themselves_are_refused():
    good = pickle.dumps(np.arange(4, dtype=np.float32), 2)
    assert safe_loads(good).shape == (4,)
    for old, new in (
        (b"K\x04\x85", b"K\x05\x85"),  # a longer shape
        (b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00O8"),
        (b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00f8"),
        (b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00i3"),
        (b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00?"),
    ):
        assert old in good
        with pytest.raises(pickle.UnpicklingError):
            safe_loads(good.replace(old, new))
    # An object in the place of an array's dtype, and an array without its content
    with pytest.raises(pickle.UnpicklingError, match="damaged pickle"):
        safe_loads(b"cnumpy.core.multiarray\nscalar\n(S'f4'\nS'aaaa'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match="damaged pickle"):
        safe_loads(b"cnumpy.core.multiarray\n_reconstruct\n(I1\nI1\nI1\ntR.")


def test_pickles_that_never_end_are_refused():
    itself = []
    itself.append(itself)
    with pytest.raises(pickle.UnpicklingError, match="contains itself"):
        safe_loads(pickle.dumps(itself))
    many = []
    for _ in range(100):
        many = [many] * 100
    start = time.monotonic()
    safe_loads(pickle.dumps(many))
    assert time.monotonic() - start < 5
    with pytest.raises(pickle.UnpicklingError, match="RecursionError"):
        safe_loads(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


def test_damaged_pickles_are_named_as_such():
    data = pickle.dumps({"a": np.arange(100.0), "b": "text", "c": [1, 2, b"3"]}, 4)
    for length in range(len(data)):
        with pytest.raises(pickle.UnpicklingError):
            safe_loads(data[:length])
    generator = np.random.default_rng(0)
    for _ in range(2000):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[generator.integers(len(data), size=3)] = generator.integers(256, size=3)
        try:
            safe_loads(damaged.tobytes())
        except pickle.UnpicklingError:
            pass


def npy_bytes(value, **kwargs):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(value), **kwargs)
    return file.getvalue()


def test_read_npy(tmp_path):
    for array in (
        np.arange(6, dtype=np.float16).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.array(2.5),
        np.zeros((0, 4)),
    ):
        for version in ((1, 0), (2, 0)):
            data = npy_bytes(array, version=version)
            got = read_npy(io.BytesIO(data), len(data))
            assert got.dtype == array.dtype
            np.testing.assert_array_equal(got, array)
            with pytest.raises(ValueError, match="expected .* bytes|damaged .npy header"):
                read_npy(io.BytesIO(data + b"1"), len(data) + 1)
            for length in range(len(data)):
                with pytest.raises(ValueError):
                    read_npy(io.BytesIO(data[:length]), length)
    info = {"bbox": np.ones((1, 4)), "width": 5}
    data = npy_bytes(np.array(info, dtype=object))
    got = read_npy(io.BytesIO(data), len(data))
    assert set(got) == set(info) and got["bbox"].tolist() == [[1, 1, 1, 1]]
    data = npy_bytes(object_array(b"a", {"b": 1}))
    assert read_npy(io.BytesIO(data), len(data)) == [b"a", {"b": 1}]

    data = npy_bytes(object_array(MakesFolder(tmp_path / "made")))
    with pytest.raises(pickle.UnpicklingError, match=REFUSED):
        read_npy(io.BytesIO(data), len(data))
    assert not (tmp_path / "made").exists()

    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n"
    lie = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"1234"
    with pytest.raises(ValueError, match="expected 4000000000000 bytes for float32 of shape .*, got 4"):
        read_npy(io.BytesIO(lie), len(lie))


# ---------------------------------------------------------------- pickles in sources


def read_all(path):
    """Opens a source, and reads what can be read of it."""
    with open_regions(path) as reader:
        errors = []
        for image_id in reader.image_ids:
            try:
                check_record(reader[image_id])
            except RegionFormatError as error:
                errors.append(error)
        if errors:
            raise errors[0]


def malicious_lmdb_value(folder, payload):
    records = make_records()
    values = foreign_regions.vilbert_values(records, foreign_regions.bottom_up_item)
    values[b"999"] = pickle.dumps({**foreign_regions.bottom_up_item(records[1]), "features": payload})
    foreign_regions.write_lmdb(folder / "a", values)
    return folder / "a", "image_id 999"


def malicious_lmdb_keys(folder, payload):
    values = foreign_regions.vilbert_values(make_records(), foreign_regions.bottom_up_item)
    values[b"keys"] = pickle.dumps([b"1000", payload])
    foreign_regions.write_lmdb(folder / "a", values)
    return folder / "a", "key 'keys'"


def malicious_hdf5_index(folder, payload):
    foreign_regions.write_hdf5(folder / "a.hdf5", make_records())
    (folder / "a_imgid2idx.pkl").write_bytes(pickle.dumps({1000: 0, 999: payload}))
    return folder / "a.hdf5", "a_imgid2idx.pkl"


def malicious_npy_info(folder, payload):
    records = make_records()
    foreign_regions.write_npy(folder / "a", records)
    np.save(folder / "a" / "999_info.npy", {**foreign_regions.npy_info(records[1]), "bbox": payload})
    return folder / "a", "image_id 999.*999_info.npy"


def malicious_npy_features(folder, payload):
    foreign_regions.write_npy(folder / "a", make_records())
    np.save(folder / "a" / "999.npy", object_array(payload))
    return folder / "a", "image_id 999.*999.npy"


def malicious_npz(folder, payload):
    foreign_regions.write_npz(folder / "a", make_records())
    np.savez(folder / "a" / "999.npz", features=object_array(payload), norm_bb=np.zeros((1, 6)))
    return folder / "a", "image_id 999.*999.npz"


@pytest.mark.parametrize(
    "write",
    [
        malicious_lmdb_value,
        malicious_lmdb_keys,
        malicious_hdf5_index,
        malicious_npy_info,
        malicious_npy_features,
        malicious_npz,
    ],
)
def test_malicious_pickles_in_sources_are_not_run(tmp_path, write):
    path, item = write(tmp_path, MakesFolder(tmp_path / "made"))
    with pytest.raises(RegionFormatError, match=f"(?s){path}.*{item}.*{REFUSED}"):
        read_all(path)
    assert not (tmp_path / "made").exists()
    if "999" in item:  # The other images can be read.
        check_record(open_regions(path)["1000"])


@pytest.mark.parametrize("kind", [b"", b"O"])
def test_malicious_arrays_in_tensorpack_are_not_run(tmp_path, kind):
    records = make_records()
    rows = [foreign_regions.tensorpack_row(record) for record in records]
    rows[1][2] = object_array(MakesFolder(tmp_path / "made"))
    if kind == b"":
        rows[1][2] = {b"nd": True, b"type": "|O", b"kind": b"", b"shape": [1], b"data": rows[1][2].dumps()}
    foreign_regions.write_lmdb(tmp_path / "a", foreign_regions.tensorpack_values(rows))
    with pytest.raises(RegionFormatError, match=r"image_id 999.*got one of type '\|O', which was not read"):
        read_all(tmp_path / "a")
    assert not (tmp_path / "made").exists()
    check_record(open_regions(tmp_path / "a")["1000"])

    # In the place of an image id, which is read when the source is opened
    rows[1][6] = rows[1][2]
    foreign_regions.write_lmdb(tmp_path / "b", foreign_regions.tensorpack_values(rows))
    with pytest.raises(RegionFormatError, match=r"key b'00000001', image_id: .*type '\|O', which was not read"):
        open_regions(tmp_path / "b")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("image_id", ["../secret", "../../etc/passwd", "/etc/passwd", "a/b", "..", ""])
@pytest.mark.parametrize("format_name", ["npz", "npy"])
def test_ids_are_never_made_into_paths(tmp_path, format_name, image_id):
    """Where image ids are file names, only files that the folder lists are opened."""
    records = make_records()
    write = {"npz": foreign_regions.write_npz, "npy": foreign_regions.write_npy}[format_name]
    write(tmp_path / "a", records)
    shutil.copytree(tmp_path / "a", tmp_path / "secret_folder")
    for file in (tmp_path / "secret_folder").iterdir():
        shutil.copy(file, tmp_path / file.name.replace("1000", "secret"))
    with pytest.raises(KeyError, match="has no image"):
        open_regions(tmp_path / "a")[image_id]


@pytest.mark.parametrize("format_name", ["parquet", "vilbert_lmdb", "bottom_up_tsv", "hdf5"])
def test_ids_with_slashes_are_ids_elsewhere(tmp_path, format_name):
    """VCR's image ids are paths. None of these formats opens them."""
    record = {**make_records()[0], "image_id": "../lsmdc/a.jpg"}
    with create_regions(tmp_path / "a", format_name) as writer:
        writer.write(record)
    assert open_regions(tmp_path / "a").image_ids == ["../lsmdc/a.jpg"]
    check_record(open_regions(tmp_path / "a")["../lsmdc/a.jpg"])


# ---------------------------------------------------------------- cut files


def write_parquet(path, records):
    with create_regions(path, "parquet") as writer:
        for record in records:
            writer.write(record)


CUT = {
    "a.tsv": (foreign_regions.write_bottom_up_tsv, "a.tsv"),
    "b.tsv": (foreign_regions.write_lxmert_tsv, "b.tsv"),
    "folder_lmdb": (foreign_regions.write_vilbert_lmdb, "folder_lmdb/data.mdb"),
    "a.lmdb": (foreign_regions.write_tensorpack_lmdb, "a.lmdb"),
    "npz": (foreign_regions.write_npz, "npz/1000.npz"),
    "npy": (foreign_regions.write_npy, "npy/1000.npy"),
    "npy_info": (foreign_regions.write_npy, "npy_info/1000_info.npy"),
    "a.hdf5": (foreign_regions.write_hdf5, "a.hdf5"),
    "index.hdf5": (foreign_regions.write_hdf5, "index_imgid2idx.pkl"),
    "a.parquet": (write_parquet, "a.parquet"),
}


@pytest.mark.parametrize("name", CUT)
def test_cut_files_are_errors(tmp_path, name):
    write, file = CUT[name]
    write(tmp_path / name, make_records(feature_size=300))
    read_all(tmp_path / name)
    data = (tmp_path / file).read_bytes()
    lengths = {0, 1, 10, 100, len(data) - 3, *(len(data) * part // 16 for part in range(1, 16))}
    for length in sorted(length for length in lengths if length < len(data)):
        (tmp_path / file).write_bytes(data[:length])
        # An empty file, or one of a few bytes, can have lost what it is recognized by. The file is named all the same.
        with pytest.raises(RegionFormatError, match=f"(?s){tmp_path / name}.*expected|{file.split('/')[-1]}"):
            read_all(tmp_path / name)
    (tmp_path / file).write_bytes(data)
    read_all(tmp_path / name)


def test_a_cut_tsv_loses_its_last_image_only(tmp_path):
    records = make_records()
    foreign_regions.write_lxmert_tsv(tmp_path / "a.tsv", records)
    data = (tmp_path / "a.tsv").read_bytes()
    # Cut so that the base64 is whole, and looks like a narrower feature vector for each of the two regions.
    (tmp_path / "a.tsv").write_bytes(data[: data.rindex(b"\t") + 1 + 64])
    reader = open_regions(tmp_path / "a.tsv")
    for image_id in reader.image_ids[:3]:
        check_record(reader[image_id])
    with pytest.raises(RegionFormatError, match="image_id 997.*expected features of width 8 as .* before, got 6"):
        reader["997"]


def test_files_with_flipped_bytes_are_errors_or_read(tmp_path):
    """No damage ends in another error than this one. LMDB is left out: it trusts its pages."""
    generator = np.random.default_rng(0)
    for name in ("a.tsv", "b.tsv", "npz", "npy", "npy_info", "a.hdf5", "index.hdf5", "a.parquet"):
        write, file = CUT[name]
        write(tmp_path / name, make_records())
        data = (tmp_path / file).read_bytes()
        for _ in range(40):
            damaged = np.frombuffer(data, np.uint8).copy()
            # The first and the last bytes hold the structure of most files.
            places = np.concatenate(
                [generator.integers(len(data), size=2), generator.integers(min(500, len(data)), size=1)]
            )
            damaged[places] = generator.integers(256, size=3)
            (tmp_path / file).write_bytes(damaged)
            try:
                with open_regions(tmp_path / name) as reader:
                    for image_id in reader.image_ids:
                        try:
                            reader[image_id]
                        except RegionFormatError:
                            pass
            except RegionFormatError:
                pass


# ---------------------------------------------------------------- wrong values


def tsv_with(folder, **changes):
    """BUTD's TSV of two images, the second of which has other fields."""
    items = [foreign_regions.bottom_up_item(record) for record in make_records((3, 2))]
    foreign_regions.write_tsv(folder / "a.tsv", [items[0], {**items[1], **changes}])
    return folder / "a.tsv"


def lmdb_with(folder, make_item=foreign_regions.bottom_up_item, **changes):
    records = make_records((3, 2))
    values = foreign_regions.vilbert_values(records, make_item)
    item = {**make_item(records[1]), **changes}
    values[b"999"] = pickle.dumps({name: value for name, value in item.items() if value is not None})
    foreign_regions.write_lmdb(folder / "a", values)
    return folder / "a"


def array_lmdb_with(folder, **changes):
    return lmdb_with(folder, foreign_regions.array_item, **changes)


def tensorpack_with(folder, **changes):
    rows = [foreign_regions.tensorpack_row(record) for record in make_records((3, 2))]
    fields = ["features", "class_probs", "boxes", "num_boxes", "height", "width", "image_id", "caption"]
    for name, value in changes.items():
        rows[1][fields.index(name)] = value
    foreign_regions.write_lmdb(folder / "a", foreign_regions.tensorpack_values(rows))
    return folder / "a"


def npz_with(folder, **changes):
    records = make_records((3, 2))
    foreign_regions.write_npz(folder / "a", records)
    arrays = {**foreign_regions.npz_arrays(records[1]), **changes}
    np.savez(folder / "a" / "999.npz", **{name: value for name, value in arrays.items() if value is not None})
    return folder / "a"


def npy_with(folder, **changes):
    records = make_records((3, 2))
    foreign_regions.write_npy(folder / "a", records)
    if "features" in changes:
        np.save(folder / "a" / "999.npy", changes.pop("features"))
    info = {**foreign_regions.npy_info(records[1]), **changes}
    np.save(folder / "a" / "999_info.npy", {name: value for name, value in info.items() if value is not None})
    return folder / "a"


NAN = float("nan")
FEATURES = foreign_regions.encode(np.zeros((2, 8)))
WRONG_VALUES = [
    # A number of boxes that is not that of the boxes
    (tsv_with, {"num_boxes": 3}, "`boxes` to hold 3 x 4 values of float32, 48 bytes, got 32 bytes"),
    (tsv_with, {"num_boxes": 1}, "`boxes` to hold 1 x 4 values of float32, 16 bytes, got 32 bytes"),
    (tsv_with, {"num_boxes": 0}, "`num_boxes` to be at least 1, got 0"),
    (tsv_with, {"num_boxes": -2}, "`num_boxes` to be at least 1, got -2"),
    (tsv_with, {"num_boxes": "many"}, "`num_boxes` to be a whole number, got b'many'"),
    (tsv_with, {"num_boxes": 10**12}, "got 32 bytes"),
    (lmdb_with, {"num_boxes": 3}, "48 bytes, got 32 bytes"),
    (lmdb_with, {"num_boxes": 2.5}, "`num_boxes` to be a whole number, got 2.5"),
    (array_lmdb_with, {"num_boxes": 5}, r"array of floats of shape \(at least 5, 4\), got float32 of shape \(4, 4\)"),
    (tensorpack_with, {"num_boxes": "3"}, r"`boxes` .* of shape \(3, 4\), got float32 of shape \(2, 4\)"),
    (tensorpack_with, {"num_boxes": "1"}, r"`boxes` .* of shape \(1, 4\), got float32 of shape \(2, 4\)"),
    (npy_with, {"num_boxes": 5}, r"`bbox` .* of shape \(at least 5, 4\), got float32 of shape \(4, 4\)"),
    (npy_with, {"num_boxes": 0}, "`num_boxes` to be at least 1, got 0"),
    # Base64 of a wrong length, or no base64
    (tsv_with, {"features": FEATURES[:-8]}, "`features` to hold 2 x width .* a multiple of 8 bytes, got 60 bytes"),
    (tsv_with, {"features": FEATURES[:-1]}, "expected `features` in base64, got b'AAAA"),
    (tsv_with, {"features": "*" + FEATURES[1:]}, "expected `features` in base64"),
    (tsv_with, {"features": ""}, "`features` to hold 2 x width values .* got 0 bytes"),
    (tsv_with, {"boxes": foreign_regions.encode(np.zeros((2, 5)))}, "32 bytes, got 40 bytes"),
    (lmdb_with, {"features": "ä"}, "expected `features` in base64, got 'ä'"),
    (lmdb_with, {"boxes": FEATURES[:-4]}, "32 bytes, got 63 bytes"),
    # Columns and keys that are missing
    (tsv_with, {"image_w": "640\t480"}, "expected features of width 8|expected `cls_prob`|columns|whole number"),
    (lmdb_with, {"boxes": None}, "a dict with image_h, image_w, num_boxes, boxes, features, got image_id, image_w"),
    (npz_with, {"norm_bb": None}, "the arrays features and norm_bb, got features, conf, soft_labels"),
    (npy_with, {"bbox": None}, "a dict with bbox, num_boxes, image_width, image_height, got num_boxes, objects"),
    # Wrong types and shapes
    (array_lmdb_with, {"boxes": np.zeros((2, 4), int)}, "array of floats .* got int64 of shape"),
    (array_lmdb_with, {"features": np.zeros(16)}, r"floats of shape \(at least 2, any\), got float64 of shape \(16,\)"),
    (array_lmdb_with, {"features": [1.0]}, r"array of floats .* got \[1.0\]"),
    (lmdb_with, {"features": 5}, "array of floats .* got 5"),
    (lmdb_with, {"objects_id": foreign_regions.encode([0, -2], np.int64)}, "`objects_id` from -1 on, got -2 to 0"),
    (lmdb_with, {"objects_id": foreign_regions.encode([2**40, 0], np.int64)}, "from -1 on, got 0 to 1099511627776"),
    (tensorpack_with, {"boxes": np.zeros((2, 5), np.float32)}, r"of shape \(2, 4\), got float32 of shape \(2, 5\)"),
    (tensorpack_with, {"boxes": [[0.0]]}, r"array of floats .* got \[\[0.0\]\]"),
    (
        tensorpack_with,
        {"class_probs": np.zeros((2, 0), np.float32)},
        r"shape \(2, any\), got float32 of shape \(2, 0\)",
    ),
    (tensorpack_with, {"boxes": np.zeros(2, "M8[s]")}, r"got one of type '<M8\[s\]', which was not read"),
    (tensorpack_with, {"caption": 5}, "`caption` to be text, got 5"),
    (npz_with, {"norm_bb": np.zeros((2, 3))}, r"`norm_bb` of shape \(regions, 6\), got \(2, 3\)"),
    (npz_with, {"features": np.zeros((3, 8))}, r"shape \(2, any\), got float64 of shape \(3, 8\)"),
    (npz_with, {"features": np.zeros((2, 8), int)}, "array of floats .* got int64"),
    (npz_with, {"conf": np.zeros((2, 1))}, r"floats of shape \(2\), got float64 of shape \(2, 1\)"),
    (npy_with, {"objects": np.zeros(4)}, "array of integers .* got float64"),
    (npy_with, {"features": np.zeros((1, 8))}, r"at least 2, any\), got float64 of shape \(1, 8\)"),
    (npy_with, {"features": {"a": 1}}, "array of floats .* got {'a': 1}"),
    # Sizes
    (tsv_with, {"image_w": "nan"}, "`image_w` to be a whole number, got b'nan'"),
    (tsv_with, {"image_h": "480.5"}, "`image_h` to be a whole number, got b'480.5'"),
    (lmdb_with, {"image_w": NAN}, "`image_w` to be a whole number, got nan"),
    (lmdb_with, {"image_h": float("inf")}, "`image_h` to be a whole number, got inf"),
    (lmdb_with, {"image_h": [480]}, r"`image_h` to be a whole number, got \[480\]"),
    (tensorpack_with, {"width": NAN}, "`width` to be a whole number, got nan"),
    (npy_with, {"image_width": np.float32(NAN)}, "`image_width` to be a whole number, got .*nan"),
]


@pytest.mark.parametrize(("write", "changes", "message"), WRONG_VALUES)
def test_wrong_values_are_errors(tmp_path, write, changes, message):
    path = write(tmp_path, **changes)
    reader = open_regions(path)
    check_record(reader["1000"]) if write is not npz_with else reader["1000"]
    with pytest.raises(RegionFormatError, match=f"(?s){path}.*image_id 999.*{message}"):
        reader["999"]


def test_a_column_too_many_or_too_few_is_an_error(tmp_path):
    for columns in (slice(0, 5), slice(0, 9)):
        items = [{**foreign_regions.lxmert_item(record), "more": 1} for record in make_records()]
        for item in items[1:]:
            for name in list(item)[columns.stop :]:
                del item[name]
        with open(tmp_path / "a.tsv", "w") as file:
            file.writelines("\t".join(map(str, item.values())) + "\n" for item in items)
        reader = open_regions(tmp_path / "a.tsv")
        with pytest.raises(
            RegionFormatError, match="image_id 1000.*expected the 10 columns img_id, .*, got 11 columns"
        ):
            reader["1000"]
        with pytest.raises(RegionFormatError, match=f"image_id 999.*, got {columns.stop} columns"):
            reader["999"]


def test_lists_of_images_that_are_none(tmp_path):
    values = foreign_regions.vilbert_values(make_records(), foreign_regions.bottom_up_item)
    for number, (keys, message) in enumerate(
        [
            ({"a": 1}, "expected a list of image ids, got dict"),
            ([5], "expected image ids in UTF-8, got 5"),
            ([b"\xff"], "UTF-8"),
        ]
    ):
        foreign_regions.write_lmdb(tmp_path / str(number), {**values, b"keys": pickle.dumps(keys)})
        with pytest.raises(RegionFormatError, match=f"key 'keys': .*{message}"):
            open_regions(tmp_path / str(number))

    del values[b"999"]
    foreign_regions.write_lmdb(tmp_path / "gap", values)
    with pytest.raises(RegionFormatError, match="image_id 999.*expected a value, as `keys` lists the image, got none"):
        open_regions(tmp_path / "gap")["999"]
    values[b"999"] = pickle.dumps([1, 2])
    foreign_regions.write_lmdb(tmp_path / "list", values)
    with pytest.raises(RegionFormatError, match="image_id 999.*expected a pickled dict, got list"):
        open_regions(tmp_path / "list")["999"]

    foreign_regions.write_lmdb(tmp_path / "other_lmdb", {b"a": b"b"})
    with pytest.raises(
        RegionFormatError, match="other_lmdb: expected one of these formats, got a folder with data.mdb"
    ):
        open_regions(tmp_path / "other_lmdb")

    (tmp_path / "a.tsv").write_bytes(b"a\t1\t2\t3\tAAAA\tAAAA\n\xff\t1\n")
    with pytest.raises(RegionFormatError, match="a.tsv .*line 2: expected an image id in UTF-8"):
        open_regions(tmp_path / "a.tsv")
    (tmp_path / "a.tsv").write_bytes(b"a\t1\t2\t3\tAAAA\tAAAA\n\n\nno tab\n")
    with pytest.raises(
        RegionFormatError, match="line 4: expected an image id and a tab, got a line of 7 bytes .*'no tab"
    ):
        open_regions(tmp_path / "a.tsv")


def test_tensorpack_values_that_are_no_lists(tmp_path):
    record = make_records()[0]
    row = foreign_regions.tensorpack_row(record)
    good = foreign_regions.tensorpack_values([row])
    for number, (value, message) in enumerate(
        [
            (b"", "got b''"),
            (foreign_regions.pack(row[:7]), "expected a msgpack list of features, .*caption, got b'.+97"),
            (pickle.dumps(row), "expected a msgpack list"),
            (
                good[b"00000000"][:200],
                "key b'00000000': expected a msgpack list of .*, (index out of|expected 2.* bytes)",
            ),
            (good[b"00000000"][:-1], "unpack"),
            (good[b"00000000"] + b"1", "extra"),
            (foreign_regions.pack([*row[:6], 1.5, row[7]]), "expected an image_id, got 1.5"),
        ]
    ):
        path = tmp_path / str(number)
        foreign_regions.write_lmdb(path, {**good, b"00000000": value})
        with pytest.raises(RegionFormatError, match=f"(?i)(?s){path}.*{message}"):
            read_all(path)
    for number, keys in enumerate([{"a": 1}, ["00000000"], b""]):
        path = tmp_path / f"keys-{number}"
        foreign_regions.write_lmdb(path, {**good, b"__keys__": foreign_regions.pack(keys)})
        with pytest.raises(RegionFormatError, match="key '__keys__': expected a list of keys in bytes"):
            open_regions(path)


def test_skip_object_finds_the_end_of_everything_that_msgpack_writes():
    values = [None, True, 0, 127, 128, -1, -32, -33, 2**16, 2**32, 2**64 - 1, -(2**63), 1.5, "", "a" * 31, "a" * 32]
    values += ["a" * 256, "a" * 2**16, b"", b"a" * 255, b"a" * 256, b"a" * 2**16, [], [1] * 15, [1, "a"] * 8]
    values += [
        [None] * 2**16,
        {},
        {"a": [1, {"b": b"c"}]},
        {str(n): n for n in range(16)},
        {n: [] for n in range(2**16)},
    ]
    values += [foreign_regions.msgpack.ExtType(5, b"a" * length) for length in (1, 2, 4, 8, 16, 3, 300, 2**16)]
    for value in values:
        data = foreign_regions.msgpack.packb(value, use_bin_type=True)
        assert skip_object(memoryview(b"12" + data + b"34"), 2) == 2 + len(data), repr(value)[:40]
        if value is not None and len(data) > 1:
            with pytest.raises(IndexError):
                skip_object(memoryview(data[:-1]), 0)
    single = foreign_regions.msgpack.packb(1.5, use_single_float=True)
    assert skip_object(memoryview(single), 0) == 5


def hdf5_with(path, index=None, **changes):
    """The four images, with other datasets, and with another index; None leaves a dataset out."""
    arrays = {**foreign_regions.hdf5_arrays(make_records()), **changes}
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
    rows = {1000: 0, 999: 1, 998: 2, 997: 3} if index is None else index
    path.with_name(f"{path.stem}_imgid2idx.pkl").write_bytes(pickle.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_features": None}, "datasets image_features and image_bb or spatial_features, got image_bb, pos_boxes"),
        ({"image_bb": None, "spatial_features": None}, "image_bb or spatial_features, got image_features, pos_boxes"),
        (
            {"image_features": np.zeros((10, 8), int)},
            r"`image_features` to hold floats .* got int64 of shape \(10, 8\)",
        ),
        ({"image_features": np.zeros((9, 8))}, r"`image_bb` .* got float32 of shape \(10, 4\) beside .* \(9, 8\)"),
        ({"image_bb": np.zeros((10, 3))}, r"`image_bb` to hold floats .* got float64 of shape \(10, 3\)"),
        ({"pos_boxes": None}, r"`image_features` to hold floats of shape \(images, boxes, ·\)"),
        ({"pos_boxes": np.zeros((4, 3), int)}, r"`pos_boxes` .* shape \(images, 2\), got int64 of shape \(4, 3\)"),
        ({"pos_boxes": np.zeros((4, 2))}, "`pos_boxes` to hold integers .* got float64"),
        ({"index": [1, 2]}, "a pickled dict of image ids in .*a_imgid2idx.pkl, got list"),
        ({"index": {1000: 4}}, "image ids with rows from 0 to 3, got 1000: 4"),
        ({"index": {1000: -1}}, "image ids with rows from 0 to 3, got 1000: -1"),
        ({"index": {1000: "0"}}, "got 1000: '0'"),
        ({"index": {None: 0}}, "got None: 0"),
    ],
)
def test_wrong_hdf5_files_are_not_opened(tmp_path, changes, message):
    path = hdf5_with(tmp_path / "a.hdf5", **changes)
    with pytest.raises(RegionFormatError, match=f"(?s){path}.*{message}"):
        open_regions(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_boxes": np.array([[0, 3], [3, 11], [4, 8], [8, 10]])}, "two increasing rows up to 10, got 3, 11"),
        ({"pos_boxes": np.array([[0, 3], [3, 3], [4, 8], [8, 10]])}, "two increasing rows up to 10, got 3, 3"),
        ({"pos_boxes": np.array([[0, 3], [-2, 3], [4, 8], [8, 10]])}, "two increasing rows up to 10, got -2, 3"),
        ({"image_bb": np.full((10, 4), NAN)}, "boxes from which the size follows, got .*nan"),
        ({"image_bb": np.zeros((10, 4))}, r"boxes from which the size follows, got \[0.0, 0.0, 0.0, 0.0\] in pixels"),
        ({"spatial_features": np.zeros((10, 6))}, "boxes from which the size follows"),
        ({"image_bb": np.arange(40.0).reshape(10, 4) + 1}, "to be the same boxes, got a difference of"),
    ],
)
def test_wrong_rows_of_hdf5_files_are_errors(tmp_path, changes, message):
    reader = open_regions(hdf5_with(tmp_path / "a.hdf5", **changes))
    with pytest.raises(RegionFormatError, match=f"image_id 999.*{message}"):
        reader["999"]


def test_hdf5_files_do_not_lead_to_other_files(tmp_path):
    hdf5_with(tmp_path / "secret.hdf5")
    (tmp_path / "secret.bin").write_bytes(bytes(10 * 8 * 4))
    for number, other in enumerate(
        [
            h5py.ExternalLink("secret.hdf5", "image_features"),
            h5py.SoftLink("/image_bb"),
        ]
    ):
        path = hdf5_with(tmp_path / f"{number}.hdf5", image_features=other)
        with pytest.raises(RegionFormatError, match="`image_features` to be a dataset of this file, got <"):
            open_regions(path)
    path = hdf5_with(tmp_path / "raw.hdf5", image_features=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("image_features", (10, 8), "f4", external=[(str(tmp_path / "secret.bin"), 0, 320)])
    with pytest.raises(RegionFormatError, match="`image_features` to be stored in this file, got one in another file"):
        open_regions(path)
    path = hdf5_with(tmp_path / "virtual.hdf5", image_features=None)
    with h5py.File(path, "a") as file:
        layout = h5py.VirtualLayout((10, 8), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.hdf5"), "image_features", (10, 8))
        file.create_virtual_dataset("image_features", layout)
    with pytest.raises(RegionFormatError, match="stored in this file"):
        open_regions(path)


def test_an_hdf5_file_without_its_index(tmp_path):
    path = hdf5_with(tmp_path / "a.hdf5")
    (tmp_path / "a_imgid2idx.pkl").unlink()
    with pytest.raises(RegionFormatError, match="a pickled dict of image ids in .*a_imgid2idx.pkl: .*No such file"):
        open_regions(path)


def test_wrong_parquet_files(tmp_path):
    write_parquet(tmp_path / "a.parquet", make_records())
    table = pq.read_table(tmp_path / "a.parquet")
    for change, message in (
        (table.drop_columns(["boxes", "width"]), "expected the columns width, boxes, got image_id, height"),
        (table.set_column(0, "image_id", pa.array([1, 2, 3, 4])), "expected strings in the column image_id, got int64"),
        (table.set_column(0, "image_id", pa.array(["a", None, "c", "d"])), "row group 0: expected image ids, got null"),
    ):
        pq.write_table(change, tmp_path / "b.parquet")
        with pytest.raises(RegionFormatError, match=f"b.parquet: .*{message}|b.parquet, {message}"):
            open_regions(tmp_path / "b.parquet")

    # One wrong row is one wrong row, not a wrong row group.
    for name, values, message in (
        ("height", pa.array([1, None, 3, 4], pa.int32()), "'height' is null"),
        ("class_ids", pa.array([[1, 2, 3], [], [1] * 4, [1, 2]], pa.list_(pa.int32())), "'class_ids' has 0 items"),
    ):
        pq.write_table(table.set_column(table.column_names.index(name), name, values), tmp_path / "b.parquet")
        reader = open_regions(tmp_path / "b.parquet")
        with pytest.raises(RegionFormatError, match=f"b.parquet, row group 0: .*{message}"):
            reader["999"]
        assert [len(reader[image_id]["boxes"]) for image_id in ("1000", "998", "997")] == [3, 4, 2]


@pytest.mark.parametrize(
    "description",
    [
        b"{",
        b"\xff",
        b"null",
        b'{"info": 3}',
        b'{"info": {"features": [1]}}',
        b'{"info": {"features": {"image": {"_type": "Value"}}}}',
        b'{"info": {"features": {"image": {"_type": "Value", "dtype": "os.system"}}}}',
        b'{"info": {"features": {"image": {"_type": "Nothing"}}}}',
    ],
)
def test_wrong_descriptions_of_columns(tmp_path, description):
    """Those that `datasets` adds to the files it writes."""
    write_parquet(tmp_path / "a.parquet", make_records())
    table = pq.read_table(tmp_path / "a.parquet").replace_schema_metadata({"huggingface": description})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(RegionFormatError, match="b.parquet: expected columns that `datasets` can load"):
        open_regions(tmp_path / "b.parquet")


def test_descriptions_that_describe_nothing_do_not_matter(tmp_path):
    write_parquet(tmp_path / "a.parquet", make_records())
    table = pq.read_table(tmp_path / "a.parquet")
    for description in ("[]", "{}", '{"info": {}}'):
        pq.write_table(table.replace_schema_metadata({"huggingface": description}), tmp_path / "b.parquet")
        assert len(list(open_regions(tmp_path / "b.parquet"))) == 4


def test_damaged_zip_archives_name_file_and_image(tmp_path):
    foreign_regions.write_npz(tmp_path / "a", make_records())
    with zipfile.ZipFile(tmp_path / "a" / "999.npz", "w") as archive:
        archive.writestr("features.npy", b"no array")
        archive.writestr("norm_bb.npy", npy_bytes(np.zeros((1, 6))))
    with pytest.raises(RegionFormatError, match=r"a \(npz, image_id 999\): 999.npz: ValueError: damaged .npy header"):
        open_regions(tmp_path / "a")["999"]
    (tmp_path / "a" / "998.npz").write_bytes(b"no archive")
    with pytest.raises(RegionFormatError, match="998.npz: BadZipFile: File is not a zip file"):
        open_regions(tmp_path / "a")["998"]
    check_record(open_regions(tmp_path / "a")["1000"])


def test_an_mmf_folder_without_features(tmp_path):
    foreign_regions.write_npy(tmp_path / "a", make_records())
    (tmp_path / "a" / "999.npy").unlink()
    with pytest.raises(RegionFormatError, match="image_id 999.*999.npy: .*No such file"):
        open_regions(tmp_path / "a")["999"]
    np.save(tmp_path / "a" / "998_info.npy", np.zeros(3))
    with pytest.raises(RegionFormatError, match="998_info.npy: expected a dict with bbox, .*, got ndarray"):
        open_regions(tmp_path / "a")["998"]
