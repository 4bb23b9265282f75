"""Reading the files that task annotations come in, with errors that say where in a file the fault is."""

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IMAGE_EXTENSION = re.compile(r"\.(jpe?g|png)$", re.IGNORECASE)
COCO_FILE_NAME = re.compile(r"(?:COCO_\w+_)?(\d{12})", re.IGNORECASE)


def canonical_image_id(image_id: int | str) -> str:
    """
    The one name of an image that goes by several: its file name without `.jpg`, `.jpeg` or `.png`, and for COCO images
    the number, which is unique over all of COCO's splits and years.

    >>> canonical_image_id("1000092795.jpg")
    '1000092795'
    >>> canonical_image_id("COCO_val2014_000000391895.jpg")
    '391895'
    """
    name = IMAGE_EXTENSION.sub("", str(image_id))
    coco_name = COCO_FILE_NAME.fullmatch(name)
    return name if coco_name is None else str(int(coco_name[1]))


class Record(dict[str, Any]):
    """
    A record of a file that knows its place there.

    Args:
        content (`Mapping`): field names and values; a null is a missing field. To ask for one that is missing, other
            than by `get`, is a `ValueError`.
        where (`str`): the place, which begins every error message: `"questions.jsonl, line 3"`.

    Raises:
        ValueError: `content` is not a mapping.
    """

    def __init__(self, content: Mapping[str, Any], where: str):
        self.where = where
        if not isinstance(content, Mapping):
            raise self.error(f"expected an object, got {content!r:.80}.")
        super().__init__({name: value for name, value in content.items() if value is not None})

    def __missing__(self, name: str):
        raise self.error(f"expected the field {name!r}, got {list(self)}.")

    def error(self, message: str) -> ValueError:
        """An error to raise, with the place of the record."""
        return ValueError(f"{self.where}: {message}")

    def records(self, name: str) -> Iterator["Record"]:
        """The objects of a field that is a list of objects."""
        return list_records(self[name], f"{self.where}, {name}")

    def text(self, name: str) -> str:
        """A field that is a string."""
        text = self[name]
        if not isinstance(text, str):
            raise self.error(f"expected {name!r} to be a string, got {text!r:.80}.")
        return text

    def texts(self, name: str) -> list[str]:
        """A field that is a list of strings."""
        texts = self[name]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self.error(f"expected {name!r} to be a list of strings, got {texts!r:.80}.")
        return texts


def list_records(items: Any, where: str) -> Iterator[Record]:
    """
    The objects of a list in a JSON file.

    Raises:
        ValueError: `items` is not a list, or an item is not an object.
    """
    if not isinstance(items, list):
        raise ValueError(f"{where}: expected a list of objects, got {items!r:.80}.")
    for number, item in enumerate(items):
        yield Record(item, f"{where}[{number}]")


@contextmanager
def _expecting_utf8(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, {error}.") from error


def read_json(path: str | os.PathLike) -> Any:
    """
    Raises:
        ValueError: the file is not JSON.
    """
    with _expecting_utf8(path):
        text = Path(path).read_text("utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: expected JSON, got {error.msg}."
        ) from error


def numbered_lines(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """
    Lines that are not empty, each after its place: `("captions.token, line 3", "...")`.

    Raises:
        ValueError: the file is not in UTF-8.
    """
    # Only a line feed ends a line: a lone carriage return, or another separator of Unicode, can be part of a sentence.
    with open(path, encoding="utf-8-sig", newline="\n") as file, _expecting_utf8(path):
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line.rstrip("\r\n")


def read_records(path: str | os.PathLike) -> Iterator[Record]:
    """
    Records of a file, by its extension: `.jsonl` (one object a line), `.json` (a list of objects, or a single one),
    `.csv` and `.tsv` (both with a header; their values are strings).

    Raises:
        ValueError: another extension, or a line or record that is broken; the message names it.
    """
    readers = {".json": _read_json_list, ".jsonl": _read_json_lines, ".csv": _read_csv, ".tsv": read_tsv}
    extension = Path(path).suffix.lower()
    if extension not in readers:
        raise ValueError(f"{path}: expected one of the extensions {list(readers)}, got {extension!r}.")
    return readers[extension](path)


def _read_json_list(path: str | os.PathLike) -> Iterator[Record]:
    content = read_json(path)
    return list_records([content] if isinstance(content, dict) else content, str(path))


def _read_json_lines(path: str | os.PathLike) -> Iterator[Record]:
    for where, line in numbered_lines(path):
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}, column {error.colno}: expected JSON, got {error.msg}: {line[:80]!r}."
            ) from error
        yield Record(content, where)


def _read_csv(path: str | os.PathLike) -> Iterator[Record]:
    with open(path, encoding="utf-8-sig", newline="") as file, _expecting_utf8(path):
        # Strict: a quotation mark that is never closed would make one text of all lines after it.
        reader = csv.reader(file, strict=True)
        try:
            columns = next(reader, [])
            for values in reader:
                if values:  # not an empty line
                    yield _row(columns, values, f"{path}, line {reader.line_num}")
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: expected CSV, got {error}.") from error


def read_tsv(path: str | os.PathLike) -> Iterator[Record]:
    """
    Rows of a tab-separated file with a header and without quoting: quotation marks are part of the text.

    Raises:
        ValueError: a row has another number of columns than the header.
    """
    lines = numbered_lines(path)
    columns = next(lines, ("", ""))[1].split("\t")
    for where, line in lines:
        yield _row(columns, line.split("\t"), where)


def _row(columns: Sequence[str], values: Sequence[str], where: str) -> Record:
    if len(values) != len(columns):
        raise ValueError(f"{where}: expected {len(columns)} columns, {list(columns)}, got {len(values)}: {values}.")
    return Record(dict(zip(columns, values, strict=True)), where)
