"""
The pretraining LMDB of ViLBERT and InterBERT's release, written with tensorpack's `LMDBSerializer`.

Under the key `__keys__` a list of keys, which are running numbers, not image ids; under each of them a list
`[features, class_probs, boxes, num_boxes, height, width, image_id, caption]`, arrays in float32, boxes in pixels,
probabilities with the background at 0. Both in msgpack, with arrays as msgpack_numpy writes them: dicts of the bytes
keys `nd`, `type`, `kind`, `shape` and `data`. They are decoded here, as msgpack_numpy unpickles arrays of objects.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .lmdb_file import LMDBFile, is_lmdb, open_lmdb
from .reader import RegionReader, missing_extra

KEYS = b"__keys__"
FIELDS = ("features", "class_probs", "boxes", "num_boxes", "height", "width", "image_id", "caption")
_NUMBER_TYPE = re.compile(r"[<>|=][biuf][1248]")

# First byte of a msgpack object: (bytes of the number that follows, what it counts, and bytes beyond it).
_LENGTHS = {
    **{first: (1 << (first - 0xC4), "bytes", 0) for first in (0xC4, 0xC5, 0xC6)},  # binary
    **{first: (1 << (first - 0xC7), "bytes", 1) for first in (0xC7, 0xC8, 0xC9)},  # extension: its type, too
    **{first: (1 << (first - 0xD9), "bytes", 0) for first in (0xD9, 0xDA, 0xDB)},  # text
    **{first: (2 << (first - 0xDC), "objects", 0) for first in (0xDC, 0xDD)},  # list
    **{first: (2 << (first - 0xDE), "pairs", 0) for first in (0xDE, 0xDF)},  # dict
}
# Numbers, and extensions of fixed length: bytes after the first one.
_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_FIXED |= {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}


def skip_object(data: memoryview, start: int) -> int:
    """
    Where the msgpack object that begins at `start` ends. Looks at the heads of objects only, so that in mapped memory
    the arrays of an image are not read from the disk.

    Raises:
        `IndexError`: it ends after the data.
    """
    num_objects = 1
    while num_objects:
        num_objects -= 1
        first = data[start]
        start += 1
        if first in _LENGTHS:
            width, counted, extra = _LENGTHS[first]
            length = int.from_bytes(data[start : start + width], "big")
            start += width
            if counted == "bytes":
                start += length + extra
            else:
                num_objects += length * (2 if counted == "pairs" else 1)
        elif 0x80 <= first <= 0x8F:
            num_objects += 2 * (first & 0x0F)
        elif 0x90 <= first <= 0x9F:
            num_objects += first & 0x0F
        elif 0xA0 <= first <= 0xBF:
            start += first & 0x1F
        else:
            start += _FIXED.get(first, 0)
    if start > len(data):
        raise IndexError(f"expected {start} bytes, got {len(data)}")
    return start


def _decode_array(item: dict) -> Any:
    """A numpy array or scalar, where a decoded dict is msgpack_numpy's form of one."""
    if b"nd" not in item:
        return item
    type_name = item[b"type"]
    if not isinstance(type_name, str) or not _NUMBER_TYPE.fullmatch(type_name) or item.get(b"kind") == b"O":
        raise ValueError(f"expected arrays of numbers, got one of type {reprlib.repr(type_name)}, which was not read")
    array = np.frombuffer(item[b"data"], type_name)
    return array.reshape(item[b"shape"]) if item[b"nd"] else array[0]


class TensorpackLMDBReader(RegionReader):
    """Opening looks into the value of each image for its id. Captions become the column `captions`, `list[str]`."""

    format_name = "tensorpack_lmdb"
    description = "an LMDB (folder with data.mdb, or a file) with the key `__keys__`"
    column_types = {"captions": pa.list_(pa.string())}

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return is_lmdb(path) and open_lmdb(path).get(KEYS) is not None

    def _open(self) -> LMDBFile:
        return open_lmdb(self.path)

    def _unpack(self, data: bytes | memoryview, item: str) -> Any:
        try:
            import msgpack
        except ImportError as error:
            raise missing_extra("msgpack", self.format_name) from error
        try:
            return msgpack.unpackb(data, object_hook=_decode_array, raw=False)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise self.error(f"{item}: expected msgpack, {type(error).__name__}: {error}") from error

    def _index(self) -> Iterator[tuple[str, bytes]]:
        keys = self._unpack(self._source.get(KEYS) or b"", "key '__keys__'")
        if not isinstance(keys, list) or not all(isinstance(key, bytes) for key in keys):
            raise self.error(f"key '__keys__': expected a list of keys in bytes, got {reprlib.repr(keys)}")
        for key in keys:
            with self._source.view(key) as value:
                image_id = self._image_id(value, key)
            yield image_id, key

    def _image_id(self, value: memoryview | None, key: bytes) -> str:
        # 0x90 is the head of a short list, its length in the last four bits.
        if not value or value[0] != 0x90 + len(FIELDS):
            got = "nothing" if value is None else repr(bytes(value[:8]))
            raise self.error(f"key {key!r}: expected a msgpack list of {', '.join(FIELDS)}, got {got}")
        try:
            start = 1
            for _ in FIELDS[: FIELDS.index("image_id")]:
                start = skip_object(value, start)
            image_id = self._unpack(value[start : skip_object(value, start)], f"key {key!r}, image_id")
        except IndexError as error:
            raise self.error(f"key {key!r}: expected a msgpack list of {', '.join(FIELDS)}, {error}") from error
        if not isinstance(image_id, str | int):
            raise self.error(f"key {key!r}: expected an image_id, got {reprlib.repr(image_id)}")
        return str(image_id)

    def _read(self, image_id: str, location: bytes) -> dict[str, Any]:
        values = self._unpack(self._source.get(location), f"key {location!r}, image_id {image_id}")
        fields = dict(zip(FIELDS, values, strict=True))
        num_boxes = self._num_boxes(fields["num_boxes"], image_id)
        record = {
            "image_id": image_id,
            "width": self._integer(fields["width"], "width", image_id),
            "height": self._integer(fields["height"], "height", image_id),
            "boxes": self._array(fields["boxes"], "boxes", "f", (num_boxes, 4), image_id).astype(np.float32),
            "features": self._array(fields["features"], "features", "f", (num_boxes, None), image_id),
            "class_probs": self._array(fields["class_probs"], "class_probs", "f", (num_boxes, None), image_id),
        }
        captions = [fields["caption"]] if isinstance(fields["caption"], str) else fields["caption"]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise self.error(f"expected `caption` to be text, got {reprlib.repr(captions)}", image_id)
        return {**record, "captions": captions}
