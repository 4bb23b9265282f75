"""
The task LMDB of ViLBERT, VOLTA and InterBERT's release.

Written by `convert_to_lmdb` scripts: under the key `keys` a pickled list of image ids (bytes or `str`), under each id a
pickled dict `image_id, image_h, image_w, num_boxes, boxes, features`, sometimes `cls_prob` (background at 0). VOLTA's
dicts have the fields of LXMERT's TSV: `img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, …`. Arrays
are base64 of float32 and int64 (ids), or pickled numpy arrays; numbers may be strings. Boxes are in pixels.

Of numpy arrays the first `num_boxes` rows count: the extractor of ViLBERT's second version always keeps 100, and says
in `num_boxes` how many of them non-maximum suppression left a score. Base64 must hold exactly `num_boxes` rows.
"""

import base64
import pickle
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .lmdb_file import LMDBFile, import_lmdb, is_lmdb, open_lmdb
from .lxmert_tsv import ATTRIBUTE_TYPES, REGION_FIELDS
from .reader import RegionReader, RegionWriter
from .safe_pickle import safe_loads

KEYS = b"keys"
# LMDB's own limit on keys.
MAX_ID_BYTES = 511
# A transaction is held in memory.
TRANSACTION_BYTES = 32 * 2**20


class ViLBERTLMDBReader(RegionReader):
    format_name = "vilbert_lmdb"
    description = "an LMDB (folder with data.mdb, or a file) with the key `keys`"
    column_types = ATTRIBUTE_TYPES

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return is_lmdb(path) and open_lmdb(path).get(KEYS) is not None

    def _open(self) -> LMDBFile:
        return open_lmdb(self.path)

    def _unpickle(self, data: bytes, image_id: str | None) -> Any:
        try:
            return safe_loads(data)
        except pickle.UnpicklingError as error:
            raise self.error(f"key {image_id or 'keys'!r}: {error}", image_id) from error

    def _index(self) -> Iterator[tuple[str, bytes]]:
        keys = self._unpickle(self._source.get(KEYS) or b"", None)
        if not isinstance(keys, list):
            raise self.error(f"key 'keys': expected a list of image ids, got {type(keys).__name__}")
        for key in keys:
            try:
                # Python 2 bytes are `str` of latin1 here, which for ids in ASCII is the same.
                yield (key, key.encode("utf-8")) if isinstance(key, str) else (key.decode("utf-8"), key)
            except (AttributeError, UnicodeError) as error:
                raise self.error(f"key 'keys': expected image ids in UTF-8, got {reprlib.repr(key)}") from error

    def _read(self, image_id: str, location: bytes) -> dict[str, Any]:
        data = self._source.get(location)
        if data is None:
            raise self.error("expected a value, as `keys` lists the image, got none", image_id)
        item = self._unpickle(data, image_id)
        if not isinstance(item, dict):
            raise self.error(f"expected a pickled dict, got {type(item).__name__}", image_id)
        prefix = "img" if "img_h" in item else "image"
        names = [f"{prefix}_h", f"{prefix}_w", "num_boxes", "boxes", "features"]
        if any(name not in item for name in names):
            raise self.error(f"expected a dict with {', '.join(names)}, got {', '.join(map(str, item))}", image_id)

        num_boxes = self._num_boxes(item["num_boxes"], image_id)
        record = {
            "image_id": image_id,
            "width": self._integer(item[f"{prefix}_w"], f"{prefix}_w", image_id),
            "height": self._integer(item[f"{prefix}_h"], f"{prefix}_h", image_id),
            "boxes": self._numbers(item, "boxes", "float32", (num_boxes, 4), image_id).astype(np.float32),
            "features": self._numbers(item, "features", "float32", (num_boxes, None), image_id),
        }
        for name, (column, dtype) in REGION_FIELDS.items():
            if name in item:
                record[column] = self._numbers(item, name, dtype, (num_boxes,), image_id)
        if "cls_prob" in item:
            record["class_probs"] = self._numbers(item, "cls_prob", "float32", (num_boxes, None), image_id)
        return record

    def _numbers(self, item: Mapping[str, Any], name: str, dtype: str, shape: tuple, image_id: str) -> np.ndarray:
        value = item[name]
        if isinstance(value, str | bytes):
            values = self._base64(value, name, dtype, shape, image_id)
            return self._class_ids(values, name, image_id) if dtype == "int64" else values
        return self._array(value, name, "i" if dtype == "int64" else "f", shape, image_id, at_least=True)


class ViLBERTLMDBWriter(RegionWriter):
    """Writes a folder, arrays in base64. Classes and attributes go into the fields that VOLTA uses for them."""

    format_name = "vilbert_lmdb"
    columns = (
        "image_id",
        "width",
        "height",
        "boxes",
        "features",
        *(column for column, _ in REGION_FIELDS.values()),
        "class_probs",
    )

    def __init__(self, path):
        self._lmdb = import_lmdb()
        super().__init__(path)
        self._environment = self._lmdb.open(str(self._incomplete), map_size=TRANSACTION_BYTES, lock=False, sync=False)
        self._map_size = TRANSACTION_BYTES
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0

    def _write(self, record: Mapping[str, Any]):
        key = record["image_id"].encode("utf-8")
        if len(key) > MAX_ID_BYTES or key == KEYS:
            raise self._error(record, f"expected an image_id of at most {MAX_ID_BYTES} bytes, other than 'keys'")
        item = {
            "image_id": record["image_id"],
            "image_h": int(record["height"]),
            "image_w": int(record["width"]),
            "num_boxes": len(record["boxes"]),
        }
        fields = {"boxes": ("boxes", "float32"), "features": ("features", "float32"), **REGION_FIELDS}
        fields["cls_prob"] = ("class_probs", "float32")
        for name, (column, dtype) in fields.items():
            if column in record:
                item[name] = base64.b64encode(np.asarray(record[column], np.dtype(dtype).newbyteorder("<")).tobytes())
        self._put(key, pickle.dumps(item, protocol=4))

    def _put(self, key: bytes, value: bytes):
        self._pending.append((key, value))
        self._pending_bytes += len(value)
        if self._pending_bytes >= TRANSACTION_BYTES:
            self._commit()

    def _commit(self):
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._pending:
                        transaction.put(key, value)
                break
            except self._lmdb.MapFullError:
                self._map_size *= 2
                self._environment.set_mapsize(self._map_size)
        self._pending.clear()
        self._pending_bytes = 0

    def _complete(self):
        self._put(KEYS, pickle.dumps([image_id.encode("utf-8") for image_id in self._image_ids], protocol=4))
        self._commit()
        self._environment.sync(True)

    def _close(self):
        self._environment.close()
