"""
The TSV of LXMERT.

Written by LXMERT's own bottom-up-attention script, without a header: `img_id, img_h, img_w, objects_id, objects_conf,
attrs_id, attrs_conf, num_boxes, boxes, features`; ids as base64 of int64, the rest of float32, boxes in pixels. Ids
count without background. Attributes become the columns `attribute_ids` and `attribute_scores`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .tsv import TSVReader, TSVWriter, first_fields

# field: (column of a record, dtype)
REGION_FIELDS = {
    "objects_id": ("class_ids", "int64"),
    "objects_conf": ("class_scores", "float32"),
    "attrs_id": ("attribute_ids", "int64"),
    "attrs_conf": ("attribute_scores", "float32"),
}
ATTRIBUTE_TYPES = {"attribute_ids": pa.list_(pa.int32()), "attribute_scores": pa.list_(pa.float32())}
FIELDS = ("img_id", "img_h", "img_w", *REGION_FIELDS, "num_boxes", "boxes", "features")


class LXMERTTSVReader(TSVReader):
    format_name = "lxmert_tsv"
    description = "a file of lines " + ", ".join(FIELDS) + ", separated by tabs"
    fields = FIELDS
    column_types = ATTRIBUTE_TYPES

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        fields = first_fields(path)
        return len(fields) >= 5 and fields[1].isdigit() and fields[2].isdigit() and not fields[3].isdigit()

    def _read(self, image_id: str, location: int) -> dict[str, Any]:
        fields = self._read_fields(image_id, location)
        num_boxes = self._num_boxes(fields["num_boxes"], image_id)
        record = {
            "image_id": image_id,
            "width": self._integer(fields["img_w"], "img_w", image_id),
            "height": self._integer(fields["img_h"], "img_h", image_id),
            "boxes": self._base64(fields["boxes"], "boxes", "float32", (num_boxes, 4), image_id),
            "features": self._base64(fields["features"], "features", "float32", (num_boxes, None), image_id),
        }
        for name, (column, dtype) in REGION_FIELDS.items():
            values = self._base64(fields[name], name, dtype, (num_boxes,), image_id)
            record[column] = self._class_ids(values, name, image_id) if dtype == "int64" else values
        return record


class LXMERTTSVWriter(TSVWriter):
    """Records need `class_ids` and `class_scores`. Without attributes, their ids are −1 and their scores 0, which
    LXMERT's losses leave out."""

    format_name = "lxmert_tsv"
    columns = ("image_id", "width", "height", "boxes", "features", *(column for column, _ in REGION_FIELDS.values()))

    def _write(self, record: Mapping[str, Any]):
        if "class_ids" not in record or "class_scores" not in record:
            raise self._error(record, f"expected class_ids and class_scores, got {', '.join(record)}")
        num_boxes = len(record["boxes"])
        filled = {"attribute_ids": np.full(num_boxes, -1), "attribute_scores": np.zeros(num_boxes), **record}
        regions = [np.asarray(filled[column], dtype=dtype) for column, dtype in REGION_FIELDS.values()]
        if any(values.shape != (num_boxes,) for values in regions):
            shapes = " and ".join(str(values.shape) for values in regions[2:])
            raise self._error(record, f"expected attributes of shape ({num_boxes},), got {shapes}")
        vectors = [np.asarray(record[name], dtype="float32") for name in ("boxes", "features")]
        sizes = [int(record["height"]), int(record["width"])]
        self._write_fields([self._checked_id(record), *sizes, *regions, num_boxes, *vectors])
