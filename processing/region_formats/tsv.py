"""What the two formats of tab-separated lines with base64 columns have in common."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from .reader import RegionReader, RegionWriter

# The first fields of a line are short; those that tell the formats apart end well before this many bytes.
NUM_BYTES_OF_FIRST_FIELDS = 4096


def first_fields(path: Path) -> list[bytes]:
    """The beginning of a file's first line, cut at tabs; no fields of a folder."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        return file.read(NUM_BYTES_OF_FIRST_FIELDS).split(b"\n")[0].split(b"\t")


class TSVReader(RegionReader):
    """One line per image, without a header. Opening reads the file once, for the offsets of its lines."""

    fields: ClassVar[tuple[str, ...]]
    num_optional_fields: ClassVar[int] = 0  # the last ones

    def _index(self) -> Iterator[tuple[str, int]]:
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    end = line.find(b"\t")
                    try:
                        image_id = line[: max(end, 0)].decode("utf-8")
                    except UnicodeDecodeError as error:
                        raise self.error(f"line {number}: expected an image id in UTF-8, {error}") from error
                    if not image_id:
                        raise self.error(
                            f"line {number}: expected an image id and a tab, got a line of {len(line)} bytes that "
                            f"begins with {line[:20]!r}"
                        )
                    yield image_id, offset
                offset += len(line)

    def _open(self):
        return open(self.path, "rb")

    def _read_fields(self, image_id: str, offset: int) -> dict[str, bytes]:
        self._source.seek(offset)
        values = self._source.readline().rstrip(b"\r\n").split(b"\t")
        num_fields = len(self.fields)
        if not num_fields - self.num_optional_fields <= len(values) <= num_fields:
            raise self.error(
                f"expected the {num_fields} columns {', '.join(self.fields)}, got {len(values)} columns", image_id
            )
        return dict(zip(self.fields, values, strict=False))


class TSVWriter(RegionWriter):
    """Lines end in CR LF, as those of the `csv` module do; numbers are little-endian."""

    def __init__(self, path):
        super().__init__(path)
        self._file = open(self._incomplete, "wb")

    def _write_fields(self, values: Sequence[str | int | np.ndarray]):
        fields = [base64.b64encode(v.tobytes()) if isinstance(v, np.ndarray) else str(v).encode() for v in values]
        self._file.write(b"\t".join(fields) + b"\r\n")

    def _checked_id(self, record) -> str:
        image_id = record["image_id"]
        # A quotation mark would open a quoted field for the `csv` module, with which these files are read elsewhere.
        if any(character in image_id for character in '\t\r\n"') or image_id.isspace():
            raise self._error(record, "expected an image_id without tabs, line breaks and quotation marks")
        return image_id

    def _close(self):
        self._file.close()
