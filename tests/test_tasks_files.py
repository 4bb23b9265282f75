import json

import pytest

from processing.tasks.files import Record, canonical_image_id, numbered_lines, read_json, read_records, read_tsv


@pytest.mark.parametrize(
    "name, expected",
    [
        (391895, "391895"),
        ("391895", "391895"),
        ("COCO_val2014_000000391895", "391895"),
        ("COCO_val2014_000000391895.jpg", "391895"),
        ("coco_train2014_000000000009", "9"),
        ("000000391895.jpg", "391895"),
        ("1000092795.jpg", "1000092795"),
        ("1000268201_693b08cb0e.JPG", "1000268201_693b08cb0e"),
        # Names of other data sets stay as they are, zeros and dots included.
        ("0001", "0001"),
        ("image3", "image3"),
        ("val-0", "val-0"),
        ("clip_00.01.46.736-00.01.50.168@0", "clip_00.01.46.736-00.01.50.168@0"),
        ("flickr30k_000000391895", "flickr30k_000000391895"),
    ],
)
def test_canonical_image_ids(name, expected):
    assert canonical_image_id(name) == expected


def test_records_of_every_extension(tmp_path):
    rows = [{"image_id": "a", "caption": 'one "two", three'}, {"image_id": "b", "caption": "é"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.jsonl").write_text("\ufeff" + "\r\n\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    (tmp_path / "x.csv").write_text('image_id,caption\na,"one ""two"", three"\n\nb,é\n', "utf-8")
    (tmp_path / "x.tsv").write_text('image_id\tcaption\r\na\tone "two", three\r\nb\té', "utf-8")
    for extension in ("json", "jsonl", "csv", "tsv"):
        assert list(read_records(tmp_path / f"x.{extension}")) == rows, extension
    (tmp_path / "one.json").write_text(json.dumps(rows[0]))
    assert list(read_records(tmp_path / "one.json")) == rows[:1]
    with pytest.raises(ValueError, match=r"x\.xml: expected one of the extensions \['.json', .*\], got '.xml'"):
        read_records(tmp_path / "x.xml")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.json", '[{"a": 1},\n {"a": }]', r"x\.json, line 2, column 8: expected JSON"),
        ("x.json", "[1]", r"x\.json\[0\]: expected an object, got 1\."),
        ("x.json", '"text"', r"x\.json: expected a list of objects, got 'text'"),
        ("x.jsonl", '{"a": 1}\n\n{"a": 1\n', r"x\.jsonl, line 3, column 8: expected JSON, got .*: '{\"a\": 1'"),
        ("x.jsonl", "{}\n[]\n", r"x\.jsonl, line 2: expected an object, got \[\]"),
        ("x.csv", "a,b\n1,2\n3\n", r"x\.csv, line 3: expected 2 columns, \['a', 'b'\], got 1: \['3'\]"),
        ("x.csv", "a,b\n1,2,3\n", r"x\.csv, line 2: expected 2 columns, \['a', 'b'\], got 3"),
        ("x.csv", 'a,b\n1,"2\n3,4\n', r"x\.csv, line 3: expected CSV, got unexpected end of data"),
        ("x.csv", 'a,b\n1,"2" 3\n', r"x\.csv, line 2: expected CSV, got ',' expected after '\"'"),
        ("x.csv", "a,b\n1," + "2" * 200_000, r"x\.csv, line 2: expected CSV, got field larger than field limit"),
        ("x.tsv", "a\tb\n1\n", r"x\.tsv, line 2: expected 2 columns, \['a', 'b'\], got 1"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_records(tmp_path / name))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.tsv"])
def test_files_of_another_encoding_are_named(tmp_path, name):
    (tmp_path / name).write_bytes('[{"a": "é"}]'.encode("latin1"))
    with pytest.raises(ValueError, match=rf"{name}: expected text in UTF-8, 'utf-8' codec can't decode byte 0xe9"):
        list(read_records(tmp_path / name))


def test_empty_files_have_no_records(tmp_path):
    for name in ("x.jsonl", "x.csv", "x.tsv"):
        (tmp_path / name).touch()
        assert list(read_records(tmp_path / name)) == []
    (tmp_path / "x.json").touch()
    with pytest.raises(ValueError, match=r"x\.json, line 1, column 1: expected JSON"):
        read_json(tmp_path / "x.json")


def test_records_say_what_they_lack():
    record = Record({"image_id": 3, "split": None, "texts": ["a", 1], "items": [{"x": 1}, 2]}, "file, line 7")
    assert record["image_id"] == 3
    # A null is a missing field.
    assert "split" not in record and record.get("split") is None
    with pytest.raises(
        ValueError, match=r"file, line 7: expected the field 'split', got \['image_id', 'texts', 'items'"
    ):
        record["split"]
    with pytest.raises(ValueError, match="file, line 7: expected 'image_id' to be a string, got 3"):
        record.text("image_id")
    with pytest.raises(ValueError, match=r"file, line 7: expected 'texts' to be a list of strings, got \['a', 1\]"):
        record.texts("texts")
    items = record.records("items")
    assert next(items) == {"x": 1}
    with pytest.raises(ValueError, match=r"file, line 7, items\[1\]: expected an object, got 2"):
        next(items)


def test_only_a_line_feed_ends_a_line(tmp_path):
    (tmp_path / "x.tsv").write_bytes("a\tb\n1\rone\t2\u2028two\r\n3\t4\n".encode())
    assert list(read_tsv(tmp_path / "x.tsv")) == [{"a": "1\rone", "b": "2\u2028two"}, {"a": "3", "b": "4"}]
    assert [where.split(", ")[-1] for where, _ in numbered_lines(tmp_path / "x.tsv")] == ["line 1", "line 2", "line 3"]
