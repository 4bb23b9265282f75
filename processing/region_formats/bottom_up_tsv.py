"""
The TSV of bottom-up-attention (BUTD).

Written by `tools/generate_tsv.py` of peteanderson80/bottom-up-attention, without a header: `image_id, image_w, image_h,
num_boxes, boxes, features`, the last two as base64 of float32, boxes in pixels. ViLBERT's copy of that tool adds
`cls_prob`, float32 with the background at 0.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .tsv import TSVReader, TSVWriter, first_fields

FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features", "cls_prob")


class BottomUpTSVReader(TSVReader):
    format_name = "bottom_up_tsv"
    description = "a file of lines " + ", ".join(FIELDS[:-1]) + ", separated by tabs"
    fields = FIELDS
    num_optional_fields = 1

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        fields = first_fields(path)
        return len(fields) >= 5 and all(field.isdigit() for field in fields[1:4])

    def _read(self, image_id: str, location: int) -> dict[str, Any]:
        fields = self._read_fields(image_id, location)
        num_boxes = self._num_boxes(fields["num_boxes"], image_id)
        record = {
            "image_id": image_id,
            "width": self._integer(fields["image_w"], "image_w", image_id),
            "height": self._integer(fields["image_h"], "image_h", image_id),
            "boxes": self._base64(fields["boxes"], "boxes", "float32", (num_boxes, 4), image_id),
            "features": self._base64(fields["features"], "features", "float32", (num_boxes, None), image_id),
        }
        if "cls_prob" in fields:
            record["class_probs"] = self._base64(fields["cls_prob"], "cls_prob", "float32", (num_boxes, None), image_id)
        return record


class BottomUpTSVWriter(TSVWriter):
    format_name = "bottom_up_tsv"
    columns = ("image_id", "width", "height", "boxes", "features", "class_probs")

    def _write(self, record: Mapping[str, Any]):
        numbers = [np.asarray(record[name], dtype="<f4") for name in self.columns[3:] if name in record]
        sizes = [int(record["width"]), int(record["height"]), len(record["boxes"])]
        self._write_fields([self._checked_id(record), *sizes, *numbers])
