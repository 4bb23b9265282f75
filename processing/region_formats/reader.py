"""What every reader and every writer of region features has in common."""

from __future__ import annotations

import base64
import math
import os
import reprlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

REQUIRED_COLUMNS = ("image_id", "width", "height", "boxes", "features")
CLASS_COLUMNS = ("class_ids", "class_scores", "class_probs")


class RegionFormatError(ValueError):
    """A source does not hold what its format says. The message names the file, the item, expected and given."""


def missing_extra(library: str, format_name: str) -> ImportError:
    """The error of a format whose optional library is not installed."""
    return ImportError(f'The format {format_name} needs {library}: pip install "interbert[formats]"')


class RegionReader(ABC):
    """
    Region records of one source, in the source's order. Opening a source reads its image ids and where they stand;
    images are read when they are asked for, one at a time (Parquet: one row group at a time).

    `for record in reader` gives all of them, `reader[image_id]` one. A record is a dict, as the processor and
    [`RegionDataset`] know it:

    - `image_id` (`str`), `width`, `height` (`int`, pixels; both 1 where the source does not say, the boxes then being
      shares of width and height),
    - `boxes`: float32 `(n, 4)`, x1, y1, x2, y2 in pixels,
    - `features`: float16 or float32 `(n, region_feature_size)`, as in the source,
    - where the source has them: `class_ids` int32 `(n,)` (without background, −1 = no class), `class_scores` float32
      `(n,)`, `class_probs` float16 or float32 `(n, classes + 1)` (background at 0), and columns of its own.

    Records are checked for their format only: [`check_record`] checks boxes, sizes and numbers. A reader can be
    pickled, and may be used in forked processes: each process opens the files for itself.

    Args:
        path (`str` or `os.PathLike`): File or folder of the source.
        image_sizes (`Mapping[str, tuple[int, int]]`, *optional*):
            `(width, height)` in pixels by image id, for sources that have no image sizes, or only normalized boxes.

    Attributes:
        image_ids (`list[str]`): All image ids in the order of the source, each of them once.
        duplicate_ids (`list[str]`): Those that the source has more than once. Its first record of an image counts.
        column_types (`Mapping[str, pyarrow.DataType | datasets feature]`):
            Types of the columns of its own that records may have.

    Raises:
        `RegionFormatError`: the list of images cannot be read.
        `ImportError`: the format needs a library of the extra `formats`.
    """

    format_name: ClassVar[str]
    description: ClassVar[str]  # what a source of this format looks like
    column_types: Mapping[str, Any] = {}

    def __init__(self, path: str | os.PathLike, image_sizes: Mapping[str, tuple[int, int]] | None = None):
        self.path = Path(path)
        self.image_sizes = image_sizes or {}
        self._opened, self._opened_by = None, None
        self._region_feature_size: int | None = None
        self._locations: dict[str, Any] = {}
        duplicates: dict[str, None] = {}
        for image_id, location in self._index():
            if image_id in self._locations:
                duplicates[image_id] = None
            else:
                self._locations[image_id] = location
        self.image_ids = list(self._locations)
        self.duplicate_ids = list(duplicates)

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """Whether a file or folder is of this format, told from its name and its first bytes."""

    @abstractmethod
    def _index(self) -> Iterable[tuple[str, Any]]:
        """Image ids and what `_read` needs to find their records, in the order of the source."""

    @abstractmethod
    def _read(self, image_id: str, location: Any) -> dict[str, Any]:
        """The record of one image."""

    def _open(self) -> Any:
        """What stays open between two images, with a method `close`; None where that is nothing."""
        return None

    @property
    def _source(self) -> Any:
        # A forked worker that went on with its parent's open file would share the position in it.
        if self._opened_by != os.getpid():
            self._opened, self._opened_by = self._open(), os.getpid()
        return self._opened

    def __getitem__(self, image_id: str) -> dict[str, Any]:
        """
        Raises:
            `KeyError`: there is no such image.
            `RegionFormatError`: what there is of it is damaged.
        """
        if image_id not in self._locations:
            raise KeyError(f"{self.path} ({self.format_name}) has no image {image_id!r}.")
        record = self._read(image_id, self._locations[image_id])
        width = record["features"].shape[1]
        # The width of most formats follows from the number of bytes, so that a cut record can look like a narrow one.
        if self._region_feature_size is None:
            self._region_feature_size = width
        elif width != self._region_feature_size:
            raise self.error(
                f"expected features of width {self._region_feature_size} as in the images before, got {width}", image_id
            )
        return record

    def __len__(self) -> int:
        return len(self.image_ids)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for image_id in self.image_ids:
            yield self[image_id]

    def close(self):
        """Closes the files, until an image is asked for again. A reader is a context manager, too."""
        if self._opened is not None and self._opened_by == os.getpid():
            self._opened.close()
        self._opened, self._opened_by = None, None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __getstate__(self):
        return {**self.__dict__, "_opened": None, "_opened_by": None}

    def error(self, message: str, image_id: str | None = None) -> RegionFormatError:
        """An error that names the source, and the image where one is to blame."""
        item = "" if image_id is None else f", image_id {image_id}"
        return RegionFormatError(f"{self.path} ({self.format_name}{item}): {message.removesuffix('.')}.")

    # What follows turns values of foreign files into those of a record. `name` is the file's own name for the value.

    def _in_pixels(self, boxes: np.ndarray, image_id: str) -> tuple[np.ndarray, int, int]:
        """Normalized boxes in pixels, with width and height; as they are, with sizes of 1, where those are unknown."""
        width, height = self.image_sizes.get(image_id, (1, 1))
        return boxes * np.array([width, height, width, height], dtype=np.float32), width, height

    def _integer(self, value: Any, name: str, image_id: str) -> int:
        """A whole number; also one in a string, as `csv` leaves it in the dicts that are pickled afterwards."""
        try:
            number = int(float(value))
            if number == float(value):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        raise self.error(f"expected `{name}` to be a whole number, got {reprlib.repr(value)}", image_id)

    def _num_boxes(self, value: Any, image_id: str) -> int:
        num_boxes = self._integer(value, "num_boxes", image_id)
        if num_boxes < 1:
            raise self.error(f"expected `num_boxes` to be at least 1, got {num_boxes}", image_id)
        return num_boxes

    def _base64(
        self, text: str | bytes, name: str, dtype: str, shape: tuple[int | None, ...], image_id: str
    ) -> np.ndarray:
        """Numbers in base64, of the given shape; where its second length is None, that follows from the bytes."""
        dtype = np.dtype(dtype).newbyteorder("<")
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise self.error(f"expected `{name}` in base64, got {reprlib.repr(text)} ({error})", image_id) from error
        num_bytes = math.prod(length or 1 for length in shape) * dtype.itemsize
        is_open = shape[-1] is None
        if not data or len(data) % num_bytes or not (is_open or len(data) == num_bytes):
            described = " x ".join(str(length or "width") for length in shape)
            raise self.error(
                f"expected `{name}` to hold {described} values of {dtype.name}, {'a multiple of ' if is_open else ''}"
                f"{num_bytes} bytes, got {len(data)} bytes",
                image_id,
            )
        return np.frombuffer(data, dtype).reshape(shape[0], *(length or -1 for length in shape[1:]))

    def _array(
        self, value: Any, name: str, kind: str, shape: tuple[int | None, ...], image_id: str, at_least: bool = False
    ) -> np.ndarray:
        """
        An array of floats (`kind` "f") or integers ("i") of the given shape, None being any length above 0; of the
        dtypes that records have. With `at_least`, rows beyond the shape are left out.
        """
        kinds = {"f": "f", "i": "iu"}[kind]
        if isinstance(value, np.ndarray) and value.ndim == len(shape) and value.dtype.kind in kinds:
            rows = value[: shape[0]] if at_least else value
            expected = tuple(rows.shape[axis] if length is None else length for axis, length in enumerate(shape))
            if rows.shape == expected and rows.size:
                return self._class_ids(rows, name, image_id) if kind == "i" else _float16_or_float32(rows)
        described = ", ".join("any" if length is None else str(length) for length in shape)
        got = f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else reprlib.repr(value)
        raise self.error(
            f"expected `{name}` to be an array of {'floats' if kind == 'f' else 'integers'} of shape "
            f"({'at least ' if at_least else ''}{described}), got {got}",
            image_id,
        )

    def _class_ids(self, ids: np.ndarray, name: str, image_id: str) -> np.ndarray:
        if ids.min() < -1 or ids.max() > np.iinfo(np.int32).max:
            raise self.error(f"expected `{name}` from -1 on, got {ids.min()} to {ids.max()}", image_id)
        return ids.astype(np.int32)


def _float16_or_float32(array: np.ndarray) -> np.ndarray:
    """In this machine's byte order; wider floats become float32."""
    return array.astype(np.float16 if array.dtype.itemsize == 2 else np.float32, copy=False)


class RegionWriter(ABC):
    """
    Writes region records to one file or folder. Nothing stands under the final name before [`~RegionWriter.finish`];
    leaving the context by an exception leaves nothing behind. What a killed process leaves is the hidden
    `.NAME.incomplete` beside it, which the next writer of that name removes.

    ```python
    >>> with create_regions("regions.tsv", "bottom_up_tsv") as writer:
    ...     for record in open_regions("regions.lmdb"):
    ...         writer.write(record)
    ```

    Args:
        path (`str` or `os.PathLike`): File or folder to write. What already stands there is not written over.

    Raises:
        `FileExistsError`: there is something at `path`.
        `ImportError`: the format needs a library of the extra `formats`.
    """

    format_name: ClassVar[str]
    # The columns of a record that the format has a place for; the others are left out. None: all.
    columns: ClassVar[tuple[str, ...] | None]

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists already.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._incomplete = self.path.with_name(f".{self.path.name}.incomplete")
        _remove(self._incomplete)
        self._image_ids: dict[str, None] = {}  # in order
        self._layout: dict[str, tuple[int, ...]] | None = None

    @abstractmethod
    def _write(self, record: Mapping[str, Any]):
        """Writes one record whose layout has been checked."""

    @abstractmethod
    def _close(self):
        """Closes the incomplete file, with or without all of its records."""

    def _complete(self):
        """Writes what is still to be written before the file is closed."""
        return

    def write(self, record: Mapping[str, Any]):
        """
        Args:
            record (`Mapping[str, Any]`):
                As a [`RegionReader`] gives it. Arrays are checked for their shapes only.

        Raises:
            `ValueError`: the format has no place for the record, its image has been written before, or it differs in
                its columns or in the width of its features from the records before.
        """
        missing = [name for name in REQUIRED_COLUMNS if name not in record]
        if missing:
            raise ValueError(f"{self.path}: expected a record with {REQUIRED_COLUMNS}, got {tuple(record)}.")
        image_id = record["image_id"]
        if not isinstance(image_id, str) or not image_id or image_id in self._image_ids:
            raise ValueError(f"{self.path}: expected an image_id that is new, got {image_id!r}.")
        layout = {}
        num_boxes = len(record["boxes"])
        for name in record:
            if self.columns is not None and name not in self.columns:
                continue
            layout[name] = ()
            if name in ("boxes", "features", *CLASS_COLUMNS):
                shape = np.shape(record[name])
                layout[name] = shape[1:]
                num_dimensions = 1 if name in ("class_ids", "class_scores") else 2
                if len(shape) != num_dimensions or shape[0] != num_boxes or (name == "boxes" and shape[1] != 4):
                    expected = {"boxes": ", 4", "features": ", any", "class_probs": ", any"}.get(name, ",")
                    raise self._error(record, f"expected {name} of shape ({num_boxes}{expected}), got {shape}")
        if self._layout not in (None, layout):
            raise self._error(
                record, f"expected columns and widths as before, {_described(self._layout)}, got {_described(layout)}"
            )
        self._write(record)
        self._layout = layout
        self._image_ids[image_id] = None

    def finish(self):
        """
        Completes the file and gives it its name.

        Raises:
            `ValueError`: nothing has been written.
        """
        if not self._image_ids:
            self.discard()
            raise ValueError(f"{self.path}: expected at least one record, none was written.")
        try:
            self._complete()
            self._close()
            self._rename()
        except BaseException:
            self.discard()
            raise

    def _rename(self):
        self._incomplete.rename(self.path)

    def discard(self):
        """Removes what has been written."""
        self._close()
        _remove(self._incomplete)

    def __enter__(self):
        return self

    def __exit__(self, exception_type, *exception):
        if exception_type is None:
            self.finish()
        else:
            self.discard()

    def _error(self, record: Mapping[str, Any], message: str) -> ValueError:
        return ValueError(f"{self.path} ({self.format_name}, image_id {record['image_id']}): {message}.")


def _remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _described(layout: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(name + "".join(f"[{width}]" for width in widths) for name, widths in layout.items())
