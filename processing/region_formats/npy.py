"""
Two `.npy` files per image, as MMF (and Pythia) keep them.

`ID.npy` holds the features `(n, F)`, `ID_info.npy` a pickled dict: `bbox` `(n, 4)` in pixels, `image_width`,
`image_height`, `num_boxes`, `objects` `(n,)`, class ids without background, and `cls_prob` `(n, classes)`.

The first `num_boxes` rows count: the extractor always keeps 100 boxes, and says in `num_boxes` how many of them
non-maximum suppression left a score. It leaves the background out of `cls_prob`, which ViLBERT's version of it does
not: where `objects` are the largest entries of `cls_prob` as it stands, the background's probability, the rest to 1, is
put before them. (Where all objects are of class 0, this can be so with a background, too; its rows then sum to 1.)
"""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .reader import RegionReader
from .safe_pickle import read_npy

SUFFIX, INFO_SUFFIX = ".npy", "_info.npy"


class NpyReader(RegionReader):
    format_name = "npy"
    description = "a folder of ID.npy and ID_info.npy files"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return path.is_dir() and any(entry.name.endswith(INFO_SUFFIX) for entry in os.scandir(path))

    def _index(self) -> Iterator[tuple[str, str]]:
        for name in sorted(entry.name for entry in os.scandir(self.path) if entry.name.endswith(INFO_SUFFIX)):
            yield name.removesuffix(INFO_SUFFIX), name

    def _read_file(self, name: str, image_id: str) -> Any:
        path = self.path / name
        try:
            with open(path, "rb") as file:
                return read_npy(file, path.stat().st_size)
        except (OSError, ValueError, pickle.UnpicklingError) as error:
            raise self.error(f"{name}: {error}", image_id) from error

    def _read(self, image_id: str, location: str) -> dict[str, Any]:
        info = self._read_file(location, image_id)
        names = ("bbox", "num_boxes", "image_width", "image_height")
        if not isinstance(info, dict) or any(name not in info for name in names):
            got = ", ".join(map(str, info)) if isinstance(info, dict) else type(info).__name__
            raise self.error(f"{location}: expected a dict with {', '.join(names)}, got {got}", image_id)
        features = self._read_file(image_id + SUFFIX, image_id)

        num_boxes = self._num_boxes(info["num_boxes"], image_id)
        boxes = self._array(info["bbox"], "bbox", "f", (num_boxes, 4), image_id, at_least=True)
        record = {
            "image_id": image_id,
            "width": self._integer(info["image_width"], "image_width", image_id),
            "height": self._integer(info["image_height"], "image_height", image_id),
            "boxes": boxes.astype(np.float32),
            "features": self._array(features, "features", "f", (num_boxes, None), image_id, at_least=True),
        }
        if "objects" in info:
            class_ids = self._array(info["objects"], "objects", "i", (num_boxes,), image_id, at_least=True)
            record["class_ids"] = class_ids
            if "cls_prob" in info:
                probs = self._array(info["cls_prob"], "cls_prob", "f", (num_boxes, None), image_id, at_least=True)
                fits_without = (probs.argmax(axis=1) == class_ids).all()
                fits_with = (probs[:, 1:].argmax(axis=1) == class_ids).all()
                if fits_without and not (fits_with and np.allclose(probs.sum(axis=1, dtype=np.float32), 1, atol=1e-3)):
                    background = np.maximum(1 - probs.sum(axis=1, keepdims=True, dtype=np.float32), 0)
                    probs = np.concatenate([background.astype(probs.dtype), probs], axis=1)
                record["class_probs"] = probs
        return record
