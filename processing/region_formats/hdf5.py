"""
The HDF5 files of BUTD-VQA, BAN and VOLTA.

Written by `tools/detection_features_converter.py` of hengyuan-hu/bottom-up-attention-vqa, in float32:

- `image_features` `(images, n, F)`,
- `image_bb` `(images, n, 4)`: boxes in pixels,
- `spatial_features` `(images, n, 6)`: x1, y1, x2, y2, width, height in [0, 1] of the image.

BAN's version, for numbers of boxes that differ, has all boxes one after the other, `(boxes, ·)`, and `pos_boxes`
`(images, 2)`, the first row of an image and the one after its last. Beside `NAME.hdf5` lies `NAME_imgid2idx.pkl`, a
pickled dict from image id to row. Either kind of boxes may be missing; the size of an image follows from both.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .reader import RegionFormatError, RegionReader, RegionWriter, missing_extra
from .safe_pickle import safe_loads

MAGIC = b"\x89HDF\r\n\x1a\n"
BOX_DATASETS = ("image_bb", "spatial_features")


def import_h5py():
    try:
        import h5py
    except ImportError as error:
        raise missing_extra("h5py", "hdf5") from error
    return h5py


def index_path(path: Path) -> Path:
    """The index of image ids that belongs to an HDF5 file."""
    return path.with_name(f"{path.stem}_imgid2idx.pkl")


class HDF5Reader(RegionReader):
    format_name = "hdf5"
    description = "an HDF5 file (.hdf5 or .h5) with NAME_imgid2idx.pkl beside it"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return path.suffix in (".hdf5", ".h5") or file.read(len(MAGIC)) == MAGIC

    def _open(self):
        try:
            return import_h5py().File(self.path, "r")
        except OSError as error:
            raise self.error(f"expected an HDF5 file, {error}") from error

    @contextmanager
    def _reading(self, image_id: str | None = None) -> Iterator[None]:
        try:
            yield
        except RegionFormatError:
            raise
        # What h5py makes of damage, depending on where it is.
        except (OSError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise self.error(f"damaged HDF5, {type(error).__name__}: {error}", image_id) from error

    def _dataset(self, name: str):
        """A dataset that lies in this file; None where there is none of this name."""
        h5py = import_h5py()
        if name not in self._source:
            return None
        dataset = self._source[name]
        link = self._source.get(name, getlink=True)
        # HDF5 can refer to any other file of this machine.
        if not isinstance(link, h5py.HardLink) or not isinstance(dataset, h5py.Dataset):
            raise self.error(f"expected `{name}` to be a dataset of this file, got {link}")
        if dataset.external or dataset.is_virtual:
            raise self.error(f"expected `{name}` to be stored in this file, got one in another file")
        return dataset

    def _index(self) -> Iterator[tuple[str, int]]:
        with self._reading():
            num_images = self._check_datasets()
        path = index_path(self.path)
        try:
            index = safe_loads(path.read_bytes())
        except (OSError, pickle.UnpicklingError) as error:
            raise self.error(f"expected a pickled dict of image ids in {path}: {error}") from error
        if not isinstance(index, dict):
            raise self.error(f"expected a pickled dict of image ids in {path}, got {type(index).__name__}")
        for image_id, row in index.items():
            right = isinstance(image_id, str | int | np.integer) and isinstance(row, int | np.integer)
            if not right or not 0 <= row < num_images:
                raise self.error(
                    f"{path.name}: expected image ids with rows from 0 to {num_images - 1}, got {image_id!r}: {row!r}"
                )
        # Row by row, the file is read from front to back.
        for image_id, row in sorted(index.items(), key=lambda item: item[1]):
            yield str(image_id), int(row)

    def _check_datasets(self) -> int:
        """The number of images, after a look at the shapes of all datasets."""
        datasets = {name: self._dataset(name) for name in ("image_features", *BOX_DATASETS, "pos_boxes")}
        datasets = {name: dataset for name, dataset in datasets.items() if dataset is not None}
        if "image_features" not in datasets or not set(BOX_DATASETS) & set(datasets):
            raise self.error(
                f"expected the datasets image_features and image_bb or spatial_features, got {', '.join(self._source)}"
            )
        pos_boxes = datasets.pop("pos_boxes", None)
        shape = datasets["image_features"].shape
        for name, dataset in datasets.items():
            right = dataset.dtype.kind == "f" and len(dataset.shape) == (3 if pos_boxes is None else 2)
            if not right or dataset.shape[:-1] != shape[:-1] or dataset.shape[-1] < (4 if name in BOX_DATASETS else 1):
                leading = "(images, boxes, ·)" if pos_boxes is None else "(boxes, ·), as there is pos_boxes,"
                raise self.error(
                    f"expected `{name}` to hold floats of shape {leading} with the same number of all, got "
                    f"{dataset.dtype} of shape {dataset.shape} beside image_features of shape {shape}"
                )
        if pos_boxes is None:
            return shape[0]
        if pos_boxes.dtype.kind not in "iu" or len(pos_boxes.shape) != 2 or pos_boxes.shape[1] != 2:
            raise self.error(
                f"expected `pos_boxes` to hold integers of shape (images, 2), got {pos_boxes.dtype} of shape "
                f"{pos_boxes.shape}"
            )
        return len(pos_boxes)

    def _read(self, image_id: str, location: int) -> dict[str, Any]:
        with self._reading(image_id):
            rows = location
            if "pos_boxes" in self._source:
                start, stop = (int(row) for row in self._source["pos_boxes"][location])
                num_boxes = len(self._source["image_features"])
                if not 0 <= start < stop <= num_boxes:
                    raise self.error(
                        f"expected `pos_boxes` to be two increasing rows up to {num_boxes}, got {start}, {stop}",
                        image_id,
                    )
                rows = slice(start, stop)
            arrays = {
                name: self._source[name][rows] for name in ("image_features", *BOX_DATASETS) if name in self._source
            }
        num_boxes = len(arrays["image_features"])
        features = self._array(arrays["image_features"], "image_features", "f", (num_boxes, None), image_id)
        pixels, normalized = (
            arrays[name][:, :4].astype(np.float32) if name in arrays else None for name in BOX_DATASETS
        )
        if pixels is None:
            boxes, width, height = self._in_pixels(normalized, image_id)
        else:
            boxes, (width, height) = pixels, self._size(pixels, normalized, image_id)
        return {"image_id": image_id, "width": width, "height": height, "boxes": boxes, "features": features}

    def _size(self, pixels: np.ndarray, normalized: np.ndarray | None, image_id: str) -> tuple[int, int]:
        """Width and height of an image."""
        if normalized is None:
            if image_id not in self.image_sizes:
                raise self.error("expected `spatial_features` or an image size beside `image_bb`, got none", image_id)
            return self.image_sizes[image_id]
        sizes = []
        for column in (2, 3):
            # The largest coordinate is the most exact one.
            box = normalized[:, column].argmax()
            with np.errstate(all="ignore"):
                size = pixels[box, column] / normalized[box, column]
            if not np.isfinite(size) or round(float(size)) < 1:
                raise self.error(
                    f"expected boxes from which the size follows, got {pixels[box].tolist()} in pixels and "
                    f"{normalized[box].tolist()} in `spatial_features`",
                    image_id,
                )
            sizes.append(round(float(size)))
        width, height = sizes
        difference = np.abs(pixels / np.array([width, height, width, height], dtype=np.float32) - normalized).max()
        if not difference < 1e-3:
            raise self.error(
                f"expected `image_bb` and `spatial_features` to be the same boxes, got a difference of {difference} of "
                f"an image of {width} x {height} pixels",
                image_id,
            )
        return width, height


class HDF5Writer(RegionWriter):
    """
    Args:
        path (`str` or `os.PathLike`): The HDF5 file; the index is written beside it.
        regions_per_image (`int`, *optional*):
            Writes the layout for a fixed number of boxes, which every image must have then. By default BAN's layout,
            for numbers that differ.
    """

    format_name = "hdf5"
    columns = ("image_id", "width", "height", "boxes", "features")

    def __init__(self, path, regions_per_image: int | None = None):
        h5py = import_h5py()
        super().__init__(path)
        # Without a file of data it is the leftover of a writer that was killed between two names.
        has_data = any(path.stem == self.path.stem for path in self.path.parent.iterdir())
        if has_data and index_path(self.path).exists():
            raise FileExistsError(f"{index_path(self.path)} exists already.")
        self._incomplete_index = self._incomplete.with_name(self._incomplete.name + ".pkl")
        self._regions_per_image = regions_per_image
        self._rows: dict[int | str, int] = {}
        self._file = h5py.File(self._incomplete, "w")

    def _write(self, record: Mapping[str, Any]):
        boxes = np.asarray(record["boxes"], dtype=np.float32)
        if self._regions_per_image not in (None, len(boxes)):
            raise self._error(record, f"expected {self._regions_per_image} regions, got {len(boxes)}")
        size = np.array([record["width"], record["height"]], dtype=np.float32)
        if not (boxes[:, 2:].max(axis=0) > 0).all():
            raise self._error(record, "expected a box from which the size of the image follows, got x2 or y2 of 0 only")
        normalized = np.concatenate([boxes / np.tile(size, 2), (boxes[:, 2:] - boxes[:, :2]) / size], axis=1)
        arrays = {
            "image_features": np.asarray(record["features"], dtype=np.float32),
            "image_bb": boxes,
            "spatial_features": normalized,
        }
        for name, array in arrays.items():
            start, stop = self._append(name, array if self._regions_per_image is None else array[None])
        if self._regions_per_image is None:
            self._append("pos_boxes", np.array([[start, stop]], dtype=np.int32))
        image_id = record["image_id"]
        # The original index has integers. An id such as 007 would not survive that.
        is_number = image_id.isascii() and image_id.isdigit() and str(int(image_id)) == image_id
        self._rows[int(image_id) if is_number else image_id] = len(self._rows)

    def _append(self, name: str, rows: np.ndarray) -> tuple[int, int]:
        """Adds rows to a dataset, and gives the numbers of the first one and of the one after the last."""
        if name not in self._file:
            self._file.create_dataset(name, data=rows, maxshape=(None, *rows.shape[1:]), chunks=True)
            return 0, len(rows)
        dataset = self._file[name]
        start = len(dataset)
        dataset.resize(start + len(rows), axis=0)
        dataset[start:] = rows
        return start, len(dataset)

    def _complete(self):
        self._incomplete_index.write_bytes(pickle.dumps(self._rows, protocol=4))

    def _close(self):
        self._file.close()

    def _rename(self):
        # The index first: a file under its final name is complete.
        self._incomplete_index.replace(index_path(self.path))
        super()._rename()

    def discard(self):
        super().discard()
        self._incomplete_index.unlink(missing_ok=True)
