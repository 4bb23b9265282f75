"""
One `.npz` file per image, as UNITER keeps them.

The file name without `.npz` is the image id. Arrays: `features` `(n, F)`, `norm_bb` `(n, 6)`, x1, y1, x2, y2, width,
height in [0, 1] of the image (the area as a seventh in some), `conf` `(n,)`, the score of the best class, and
`soft_labels` `(n, 1601)`, probabilities with the background at 0; all in float16, the last two optional. The image's
size is not among them.
"""

import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reader import RegionReader
from .safe_pickle import read_npy

ARRAYS = ("features", "norm_bb", "conf", "soft_labels")
SUFFIX = ".npz"


class NpzReader(RegionReader):
    format_name = "npz"
    description = "a folder of .npz files"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return path.is_dir() and any(entry.name.endswith(SUFFIX) for entry in os.scandir(path))

    def _index(self) -> Iterator[tuple[str, str]]:
        for name in sorted(entry.name for entry in os.scandir(self.path) if entry.name.endswith(SUFFIX)):
            yield name.removesuffix(SUFFIX), name

    def _read_arrays(self, image_id: str, name: str) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(self.path / name) as archive:
                arrays = {}
                for member in archive.infolist():
                    array_name = member.filename.removesuffix(".npy")
                    if array_name in ARRAYS:
                        with archive.open(member) as file:
                            arrays[array_name] = read_npy(file, member.file_size)
                return arrays
        # RuntimeError: encrypted, or of an unknown compression
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise self.error(f"{name}: {type(error).__name__}: {error}", image_id) from error
        except pickle.UnpicklingError as error:
            raise self.error(f"{name}: {error}", image_id) from error

    def _read(self, image_id: str, location: str) -> dict[str, Any]:
        arrays = self._read_arrays(image_id, location)
        if "features" not in arrays or "norm_bb" not in arrays:
            raise self.error(
                f"{location}: expected the arrays features and norm_bb, got {', '.join(arrays) or 'none of them'}",
                image_id,
            )
        normalized_boxes = self._array(arrays["norm_bb"], "norm_bb", "f", (None, None), image_id)
        num_boxes, width_of_boxes = normalized_boxes.shape
        if width_of_boxes < 4:
            raise self.error(f"expected `norm_bb` of shape (regions, 6), got {normalized_boxes.shape}", image_id)
        boxes, width, height = self._in_pixels(normalized_boxes[:, :4].astype("float32"), image_id)
        record = {
            "image_id": image_id,
            "width": width,
            "height": height,
            "boxes": boxes,
            "features": self._array(arrays["features"], "features", "f", (num_boxes, None), image_id),
        }
        if "conf" in arrays:
            scores = self._array(arrays["conf"], "conf", "f", (num_boxes,), image_id)
            record["class_scores"] = scores.astype("float32")
        if "soft_labels" in arrays:
            record["class_probs"] = self._array(arrays["soft_labels"], "soft_labels", "f", (num_boxes, None), image_id)
        return record
