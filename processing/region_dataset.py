"""Region datasets: one row per image, read from Arrow memory into numpy without copying.

A region dataset is any `datasets.Dataset` with these columns (a local folder of Parquet files or a dataset on the
Hub):

| column | Arrow type |
|---|---|
| `image_id` | string |
| `width`, `height` | integer, pixels |
| `boxes` | list of float vectors of width 4: x1, y1, x2, y2 in pixels |
| `features` | list of float16 or float32 vectors of one width |
| `class_ids` (optional) | list of integers, −1 = no class |
| `class_scores` (optional) | list of floats |
| `class_probs` (optional) | list of float vectors of one width, background at 0 |

Further columns, such as lists of captions, are read per row and by name.
"""

import hashlib
import json
import os
from bisect import bisect_right
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

REQUIRED_COLUMNS = ("image_id", "width", "height", "boxes", "features")
# Columns with one vector per region, and columns with one number per region.
VECTOR_COLUMNS = ("boxes", "features", "class_probs")
NUMBER_COLUMNS = ("class_ids", "class_scores")

# Beside the data, an account of how each split was made, by the scripts that write region datasets.
REPORT_NAME = "conversion_report.json"


def _is_list(arrow_type: pa.DataType) -> bool:
    return pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type)


def _is_text(arrow_type: pa.DataType) -> bool:
    return pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type)


def _is_list_of_vectors(arrow_type: pa.DataType) -> bool:
    if not _is_list(arrow_type):
        return False
    inner = arrow_type.value_type
    return (_is_list(inner) or pa.types.is_fixed_size_list(inner)) and pa.types.is_floating(inner.value_type)


def _check_column_type(name: str, arrow_type: pa.DataType) -> None:
    if name == "image_id":
        expected, right = "string", _is_text(arrow_type)
    elif name in ("width", "height"):
        expected, right = "an integer", pa.types.is_integer(arrow_type)
    elif name == "features":
        expected = "a list of float16 or float32 vectors"
        right = _is_list_of_vectors(arrow_type) and not pa.types.is_float64(arrow_type.value_type.value_type)
    elif name in VECTOR_COLUMNS:
        expected, right = "a list of float vectors", _is_list_of_vectors(arrow_type)
    elif name == "class_ids":
        expected, right = "a list of integers", _is_list(arrow_type) and pa.types.is_integer(arrow_type.value_type)
    else:
        expected, right = "a list of floats", _is_list(arrow_type) and pa.types.is_floating(arrow_type.value_type)
    if not right:
        raise ValueError(f"Column {name!r} must be {expected}, got {arrow_type}.")
    if name == "boxes" and pa.types.is_fixed_size_list(arrow_type.value_type) and arrow_type.value_type.list_size != 4:
        raise ValueError(f"Column 'boxes' must hold vectors of width 4, got {arrow_type.value_type.list_size}.")


class _Chunk:
    """Numpy views on the columns of one record batch. All list columns of a row have the same length, so one array of
    offsets serves them all."""

    __slots__ = ("image_ids", "widths", "heights", "offsets", "values")

    def __init__(self, batch: pa.RecordBatch, first_row: int, list_columns: list[str], vector_widths: dict[str, int]):
        for name in [*REQUIRED_COLUMNS, *list_columns]:
            column = batch.column(name)
            if column.null_count:
                row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
                raise ValueError(f"Column {name!r} is null in {_row_name(batch, row, first_row)}.")
        self.image_ids = batch.column("image_id")
        self.widths = batch.column("width").to_numpy()
        self.heights = batch.column("height").to_numpy()
        self.offsets: np.ndarray | None = None
        self.values: dict[str, np.ndarray] = {}
        for name in list_columns:
            array = batch.column(name)
            # `offsets` respects the slice that the batch may be, and counts in `values`, which ignores it.
            offsets = array.offsets.to_numpy()
            child = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
            offsets = offsets - offsets[0]
            if self.offsets is None:
                self.offsets = offsets
            elif not np.array_equal(offsets, self.offsets):
                row = int(np.flatnonzero(np.diff(offsets) != np.diff(self.offsets))[0])
                raise ValueError(
                    f"Column {name!r} has {offsets[row + 1] - offsets[row]} items in "
                    f"{_row_name(batch, row, first_row)}, expected {self.offsets[row + 1] - self.offsets[row]} as in "
                    f"column {list_columns[0]!r}."
                )
            width = vector_widths.get(name)
            if child.null_count or (width is not None and child.flatten().null_count):
                raise ValueError(f"Column {name!r} has null items in rows {first_row} to {first_row + len(batch) - 1}.")
            if width is None:
                self.values[name] = child.to_numpy()
                continue
            if not pa.types.is_fixed_size_list(child.type):
                widths = np.diff(child.offsets.to_numpy())
                wrong = np.flatnonzero(widths != width)
                if wrong.size:
                    row = int(np.searchsorted(offsets, wrong[0], side="right")) - 1
                    raise ValueError(
                        f"Column {name!r} must hold vectors of width {width}, got {widths[wrong[0]]} in "
                        f"{_row_name(batch, row, first_row)}."
                    )
            self.values[name] = child.flatten().to_numpy().reshape(-1, width)


def _row_name(batch: pa.RecordBatch, row: int, first_row: int) -> str:
    return f"row {first_row + row} (image_id {batch.column('image_id')[row].as_py()!r})"


class RegionDataset(torch.utils.data.Dataset):
    """
    Region records of a `datasets.Dataset`, as numpy views on its Arrow memory.

    `dataset[i]` is a dict of:

    - `image_id` (`str`), `width`, `height` (`int`, pixels),
    - `boxes`: float32 `(n, 4)`, x1, y1, x2, y2 in pixels,
    - `features`: float16 or float32 `(n, region_feature_size)`,
    - where the dataset has the column: `class_ids` int32 `(n,)` (−1 = no class), `class_scores` float32 `(n,)`,
      `class_probs` float16 or float32 `(n, classes + 1)` (background at 0).

    The arrays are read-only. Selected, shuffled and sharded datasets are read through their indices. The object can be
    pickled, so `torch.utils.data.DataLoader` may use it in several workers.

    Args:
        dataset (`datasets.Dataset`):
            One split, not streaming.
        region_detector (`dict[str, Any]`, *optional*):
            What found the regions, see [`read_region_detector`].

    Raises:
        ValueError: if a required column is missing or has another type. Rows whose columns differ in length, null
            values and vectors of unequal width are reported, with their row in the underlying table, when the rows
            around them are read first.
    """

    def __init__(self, dataset: datasets.Dataset, region_detector: dict[str, Any] | None = None):
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"`dataset` must be one split, a `datasets.Dataset`, got {type(dataset).__name__}.")
        missing = [name for name in REQUIRED_COLUMNS if name not in dataset.column_names]
        if missing:
            raise ValueError(f"A region dataset needs the columns {missing}, got {dataset.column_names}.")
        self.dataset = dataset
        self.region_detector = region_detector
        table = dataset.data.table
        self._list_columns = [name for name in (*VECTOR_COLUMNS, *NUMBER_COLUMNS) if name in table.column_names]
        for name in (*REQUIRED_COLUMNS, *self._list_columns):
            _check_column_type(name, table.schema.field(name).type)

        # Batches are slices in which every column is one contiguous array; making them copies nothing.
        self._batches = [batch for batch in table.to_batches() if len(batch)]
        self._first_rows = np.cumsum([0] + [len(batch) for batch in self._batches]).tolist()
        self._indices = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
        self._vector_widths = {name: self._vector_width(name) for name in self._list_columns if name in VECTOR_COLUMNS}
        self._chunks: list[_Chunk | None] = [None] * len(self._batches)
        self._caption_columns: set[str] = set()  # those whose type has been checked

    def __reduce__(self):
        # The views cannot travel to another process; the dataset can, and memory-maps the same files there.
        return type(self), (self.dataset, self.region_detector)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def column_names(self) -> list[str]:
        """Names of all columns, those of other tasks included."""
        return self.dataset.column_names

    @property
    def image_ids(self) -> list[str]:
        """Of all rows, in their order."""
        values = self.dataset.data.column("image_id")
        return (values if self._indices is None else values.take(pa.array(self._indices))).to_pylist()

    @property
    def region_feature_size(self) -> int:
        """Width of the region features."""
        return self._vector_widths["features"]

    def _vector_width(self, name: str) -> int:
        if name == "boxes":
            return 4
        inner = self.dataset.data.schema.field(name).type.value_type
        if pa.types.is_fixed_size_list(inner):
            return inner.list_size
        # A plain list does not state its width: the first region does.
        for batch in self._batches:
            vectors = batch.column(name).flatten()
            if len(vectors):
                return len(vectors[0])
        raise ValueError(f"The width of column {name!r} is unknown: the dataset has no region.")

    def _locate(self, index: int) -> tuple[int, int]:
        """Number of the batch that holds an item of the dataset, and its row there."""
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"Index {index} is out of range for {length} rows.")
        row = index % length
        if self._indices is not None:
            row = int(self._indices[row])
        batch = bisect_right(self._first_rows, row) - 1
        return batch, row - self._first_rows[batch]

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, row = self._locate(index)
        chunk = self._chunks[batch]
        if chunk is None:
            chunk = _Chunk(self._batches[batch], self._first_rows[batch], self._list_columns, self._vector_widths)
            self._chunks[batch] = chunk
        start, stop = chunk.offsets[row], chunk.offsets[row + 1]
        record = {
            "image_id": chunk.image_ids[row].as_py(),
            "width": int(chunk.widths[row]),
            "height": int(chunk.heights[row]),
        }
        for name, values in chunk.values.items():
            record[name] = values[start:stop]
        # Views stay views where the dataset has the usual types; 64-bit columns are converted row by row.
        record["boxes"] = record["boxes"].astype(np.float32, copy=False)
        if "class_ids" in record:
            record["class_ids"] = record["class_ids"].astype(np.int32, copy=False)
        if "class_scores" in record:
            record["class_scores"] = record["class_scores"].astype(np.float32, copy=False)
        return record

    def captions(self, index: int, column: str = "captions") -> list[str]:
        """
        Captions of one image.

        Args:
            index (`int`): row of the dataset.
            column (`str`): a column of strings or of lists of strings.

        Returns:
            `list[str]`: empty where the image has none.
        """
        self._check_captions(column)
        batch, row = self._locate(index)
        value = self._batches[batch].column(column)[row].as_py()
        if value is None:
            return []
        return [value] if isinstance(value, str) else value

    def caption_counts(self, column: str = "captions") -> np.ndarray:
        """
        Number of captions of every image, from the lengths of the Arrow lists: no caption is read.

        Returns:
            int64 array of shape `(len(self),)`.
        """
        self._check_captions(column)
        values = self.dataset.data.column(column)
        lengths = pc.is_valid(values) if _is_text(values.type) else pc.fill_null(pc.list_value_length(values), 0)
        return self._in_dataset_order(lengths)

    def caption_lengths(self, column: str = "captions") -> np.ndarray:
        """
        Number of characters of every caption, image by image.

        Returns:
            int64 array of shape `(self.caption_counts(column).sum(),)`.
        """
        self._check_captions(column)
        values = self.dataset.data.column(column)
        if self._indices is not None:
            values = values.take(pa.array(self._indices))
        captions = values.drop_null() if _is_text(values.type) else pc.list_flatten(values)
        return pc.fill_null(pc.utf8_length(captions), 0).to_numpy().astype(np.int64)

    def region_counts(self) -> np.ndarray:
        """
        Number of regions of every image.

        Returns:
            int64 array of shape `(len(self),)`.
        """
        return self._in_dataset_order(pc.list_value_length(self.dataset.data.column("boxes")))

    def num_region_classes(self, region_objective: str) -> int:
        """
        Width that a region head needs for this dataset.

        Args:
            region_objective (`str`): `"soft_class"`: the width of `class_probs`; `"hard_class"`: the largest class id
                plus 1, since class ids count from 0 without a background.
        """
        column = {"soft_class": "class_probs", "hard_class": "class_ids"}[region_objective]
        if column not in self._list_columns:
            raise ValueError(f"{region_objective} needs the column {column!r}, the dataset has {self.column_names}.")
        if region_objective == "soft_class":
            return self._vector_widths[column]
        largest = pc.max(pc.list_flatten(self.dataset.data.column(column))).as_py()
        if largest is None or largest < 0:
            raise ValueError("hard_class needs regions with a class, but every entry of 'class_ids' is -1.")
        return largest + 1

    def _check_captions(self, column: str) -> None:
        if column in self._caption_columns:
            return
        if column not in self.column_names:
            raise ValueError(f"The dataset has no column {column!r}, got {self.column_names}.")
        arrow_type = self.dataset.data.schema.field(column).type
        if not (_is_text(arrow_type) or (_is_list(arrow_type) and _is_text(arrow_type.value_type))):
            raise ValueError(f"Column {column!r} must be a string or a list of strings, got {arrow_type}.")
        if _is_list(arrow_type):
            for batch in self._batches:
                captions = batch.column(column)
                if captions.flatten().null_count:
                    first = pc.index(captions.flatten().is_null(), True).as_py()
                    image_id = batch.column("image_id")[pc.list_parent_indices(captions)[first].as_py()]
                    raise ValueError(f"Column {column!r} must have strings, got null among those of image {image_id}.")
        self._caption_columns.add(column)

    def _in_dataset_order(self, counts: pa.ChunkedArray) -> np.ndarray:
        counts = counts.to_numpy().astype(np.int64)
        return counts if self._indices is None else counts[self._indices]


def _fingerprint(folder: str) -> str:
    """Changes with the name, the size and the time of any Parquet file of a folder."""
    files = sorted(Path(folder).rglob("*.parquet"))
    facts = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def base_splits(split: str) -> list[str]:
    """The splits that one is made of: train and validation of `"train[:90%]+validation"`."""
    return [part.split("[")[0] for part in split.split("+")]


def read_region_detector(name_or_path: str, split: str, **hub_options) -> dict[str, Any] | None:
    """
    What found the regions of a dataset, as `InterBERTConfig.region_detector` has it, from the account of
    examples/extract_regions.py and the scripts that go on from there. A detector that was a local folder has no
    `name_or_path`.

    Args:
        name_or_path: A folder, or the name of a dataset on the Hub.
        split: A split, a slice or a sum of some: the first counts.
        hub_options: `revision` and `token` of the dataset.

    Returns:
        None where nothing is said of it.
    """
    if os.path.isdir(name_or_path):
        report = os.path.join(name_or_path, REPORT_NAME)
        if not os.path.isfile(report):
            return None
    else:
        try:
            report = hf_hub_download(name_or_path, REPORT_NAME, repo_type="dataset", **hub_options)
        except (EntryNotFoundError, RepositoryNotFoundError):  # a dataset of other files, or one read from the cache
            return None
    with open(report, encoding="utf-8") as file:
        return json.load(file).get(base_splits(split)[0], {}).get("region_detector")


def load_region_dataset(name_or_path: str | os.PathLike, split: str, **kwargs) -> RegionDataset:
    """
    Loads one split of a region dataset, memory-mapped, through `datasets.load_dataset`.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A local folder of Parquet files, or the name of a dataset on the Hub (`name` or `namespace/name`).
        split (`str`):
            A split, or a slice of one such as `"train[:95%]"`.
        **kwargs:
            Further arguments of `datasets.load_dataset`, such as `name`, `revision` or `cache_dir`.

    Raises:
        ValueError: if the folder or the dataset does not exist, if it has no such split (the message names those
            there are), or if its columns are not those of a region dataset.
    """
    path = os.path.expanduser(os.fspath(name_or_path))
    is_folder = os.path.isdir(path)
    # Names on the Hub have at most one slash and begin with neither a slash nor a dot.
    if not is_folder and (os.path.isabs(path) or path.startswith(".") or path.count("/") > 1):
        raise ValueError(f"The dataset folder {path!r} does not exist.")
    if kwargs.get("streaming"):
        raise ValueError("A `RegionDataset` reads rows by number, which a streamed dataset cannot: drop `streaming`.")
    if is_folder and kwargs.get("cache_dir") is None:
        # `datasets` caches a folder that has a card by the card, and would go on serving files that have been replaced.
        kwargs["cache_dir"] = os.path.join(datasets.config.HF_DATASETS_CACHE, "region_datasets", _fingerprint(path))
    try:
        dataset = datasets.load_dataset(path, split=split, **kwargs)
        hub_options = {name: kwargs[name] for name in ("revision", "token") if name in kwargs}
        return RegionDataset(dataset, read_region_detector(path, split, **hub_options))
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        kind = "the folder" if is_folder else "the Hub dataset (there is no such folder)"
        raise ValueError(f"Could not load split {split!r} of {kind} {path!r}: {error}") from error
