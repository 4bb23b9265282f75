"""
Region datasets in Parquet, as [`RegionDataset`] documents them: one row per image, vectors as lists of fixed size.

Files in float16 or float32 that [`ParquetWriter`] wrote load through `load_region_dataset` and `datasets.load_dataset`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from processing.region_dataset import RegionDataset

from .reader import CLASS_COLUMNS, REQUIRED_COLUMNS, RegionReader, RegionWriter

MAGIC = b"PAR1"
# A row group is what a reader holds in memory, and what is read of a streamed file before its first row is given.
ROW_GROUP_BYTES = 32 * 2**20
ROWS_PER_GROUP = 1000


class _LastRowGroup:
    """The row group that was read last."""

    def __init__(self):
        self.close()

    def read(self, path: Path, group: int) -> tuple[pa.Table, RegionDataset]:
        if self._name != (path, group):
            self.close()
            with pq.ParquetFile(path) as file:
                self._table = file.read_row_group(group)
            self._dataset = _to_region_dataset(self._table)
            self._name = (path, group)
        return self._table, self._dataset

    def close(self):
        self._name = self._table = self._dataset = None


def _to_region_dataset(table: pa.Table) -> RegionDataset:
    # The description of the columns by `datasets` has been read with the schema, and no record depends on it. A
    # fingerprint of its own saves `datasets` from hashing the whole table.
    return RegionDataset(datasets.Dataset(table.replace_schema_metadata(), fingerprint="row_group"))


def _to_value(scalar: pa.Scalar) -> Any:
    """Lists of numbers as arrays, everything else in Python's types."""
    if pa.types.is_list(scalar.type) and scalar.is_valid and not scalar.values.null_count:
        value_type = scalar.type.value_type
        if pa.types.is_integer(value_type) or pa.types.is_floating(value_type):
            return scalar.values.to_numpy()
    return scalar.as_py()


class ParquetReader(RegionReader):
    """
    One Parquet file, or all those below a folder in the order of their paths, whatever split of a dataset they belong
    to: `load_region_dataset` reads a single split. Further columns (captions, questions) are given as they are, lists
    of numbers as arrays, pictures as dicts of `bytes` and `path`.
    """

    format_name = "parquet"
    description = "a Parquet file, or a folder with some (also in folders below it)"

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        if path.is_dir():
            return any(path.rglob("*.parquet"))
        with open(path, "rb") as file:
            return path.suffix == ".parquet" or file.read(len(MAGIC)) == MAGIC

    def _open(self) -> _LastRowGroup:
        return _LastRowGroup()

    def _index(self) -> Iterator[tuple[str, int]]:
        self._groups: list[tuple[Path, int]] = []
        self._first_rows = [0]  # of each row group, and the number of all rows
        self.column_types: dict[str, Any] = {}
        for path in sorted(self.path.rglob("*.parquet")) if self.path.is_dir() else [self.path]:
            try:
                with pq.ParquetFile(path) as file:
                    self._check_schema(path, file.schema_arrow)
                    for group in range(file.num_row_groups):
                        image_ids = file.read_row_group(group, columns=["image_id"]).column("image_id").to_pylist()
                        if None in image_ids:
                            raise self.error(f"{path.name}, row group {group}: expected image ids, got null")
                        for row, image_id in enumerate(image_ids):
                            yield image_id, self._first_rows[-1] + row
                        self._groups.append((path, group))
                        self._first_rows.append(self._first_rows[-1] + len(image_ids))
            # UnicodeDecodeError: names of columns and image ids
            except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
                raise self.error(f"{path.name}: expected a Parquet file, {error}") from error

    def _check_schema(self, path: Path, schema: pa.Schema):
        missing = [name for name in REQUIRED_COLUMNS if name not in schema.names]
        if missing:
            raise self.error(f"{path.name}: expected the columns {', '.join(missing)}, got {', '.join(schema.names)}")
        id_type = schema.field("image_id").type
        if not pa.types.is_string(id_type) and not pa.types.is_large_string(id_type):
            raise self.error(f"{path.name}: expected strings in the column image_id, got {id_type}")
        try:
            features = datasets.Features.from_arrow_schema(schema)
        # Beside types that `datasets` does not know: its own description of the columns, which may be damaged.
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self.error(f"{path.name}: expected columns that `datasets` can load, {error}") from error
        for name, feature in features.items():
            if name not in (*REQUIRED_COLUMNS, *CLASS_COLUMNS):
                self.column_types.setdefault(name, feature)

    def _read(self, image_id: str, location: int) -> dict[str, Any]:
        index = bisect_right(self._first_rows, location) - 1
        path, group = self._groups[index]
        row = location - self._first_rows[index]
        try:
            table, dataset = self._source.read(path, group)
            try:
                record = dataset[row]
            except ValueError:
                # Some row of the group is damaged; alone, the others can be read.
                record = _to_region_dataset(table.slice(row, 1))[0]
            for name in table.column_names:
                if name not in record:
                    record[name] = _to_value(table.column(name)[row])
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self.error(f"{path.name}, row group {group}: {error}", image_id) from error
        return record


class ParquetWriter(RegionWriter):
    """
    Writes one file. The first record decides on the columns and their types; the same records give the same bytes.

    Args:
        path (`str` or `os.PathLike`): The file.
        feature_dtype (`"float16"` or `"float32"`, *optional*):
            Of `features` and `class_probs`. By default as in the first record.
        column_types (`Mapping[str, pyarrow.DataType | datasets feature]`, *optional*):
            Types of further columns; `datasets.Image()` or `datasets.ClassLabel(...)` is what `datasets` then loads. By
            default strings, numbers, dicts, or lists of them by the value of the first record (integers and floats of
            Python have 64 bits), and strings where that is None or an empty list. Files of one dataset must agree in
            them: pass the `column_types` of the source.

    Attributes:
        schema (`pyarrow.Schema`, *optional*): Of the file; `None` before the first record.
    """

    format_name = "parquet"
    columns = None

    def __init__(self, path, feature_dtype: str | None = None, column_types: Mapping[str, Any] | None = None):
        if feature_dtype not in (None, "float16", "float32"):
            raise ValueError(f"`feature_dtype`: expected float16, float32 or None, got {feature_dtype!r}.")
        super().__init__(path)
        self._feature_dtype = feature_dtype
        self._column_types = dict(column_types or {})
        self._writer: pq.ParquetWriter | None = None
        self.schema: pa.Schema | None = None
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0

    def _write(self, record: Mapping[str, Any]):
        if self.schema is None:
            self.schema = self._make_schema(record)
            self._writer = pq.ParquetWriter(self._incomplete, self.schema, use_dictionary=False, compression="zstd")
        row = {field.name: self._to_arrow(record, field) for field in self.schema}
        self._pending.append(row)
        self._pending_bytes += sum(value.nbytes for value in row.values())
        if self._pending_bytes >= ROW_GROUP_BYTES or len(self._pending) == ROWS_PER_GROUP:
            self._write_group()

    def _make_schema(self, record: Mapping[str, Any]) -> pa.Schema:
        fields = [("image_id", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
        for name in ("boxes", "features", *CLASS_COLUMNS):
            if name not in record:
                continue
            values = np.asarray(record[name])
            if name == "class_ids":
                column_type = pa.int32()
            elif name in ("boxes", "class_scores"):
                column_type = pa.float32()
            else:
                dtype = self._feature_dtype or ("float16" if values.dtype == np.float16 else "float32")
                column_type = pa.from_numpy_dtype(dtype)
            if values.ndim == 2:
                column_type = pa.list_(column_type, values.shape[1])
            fields.append((name, pa.list_(column_type)))
        further: dict[str, Any] = {}  # features of `datasets`
        for name, value in record.items():
            if name in (*REQUIRED_COLUMNS, *CLASS_COLUMNS):
                continue
            column_type = self._column_types[name] if name in self._column_types else _infer_type(value)
            if not isinstance(column_type, pa.DataType):
                further[name] = column_type
                column_type = datasets.Features({name: column_type}).arrow_schema.field(name).type
            fields.append((name, column_type))
        schema = pa.schema(fields)
        features = datasets.Features.from_arrow_schema(schema)
        if features | further == features:
            return schema
        # Only where Arrow's types do not say it all: the description is in the words of this version of `datasets`.
        return schema.with_metadata(datasets.Features(features | further).arrow_schema.metadata)

    def _to_arrow(self, record: Mapping[str, Any], field: pa.Field) -> pa.Array:
        """One value of a column, as an array of length 1."""
        value = record[field.name]
        try:
            if field.name not in ("boxes", "features", *CLASS_COLUMNS):
                return pa.array([value], type=field.type)
            value_type = field.type.value_type
            dtype = (value_type.value_type if pa.types.is_fixed_size_list(value_type) else value_type).to_pandas_dtype()
            values = np.asarray(value)
            if dtype == np.float16 and values.dtype == np.float32:
                # numpy takes eight times as long.
                numbers = torch.from_numpy(values.copy()).half().numpy()
            else:
                with np.errstate(over="ignore"):
                    numbers = values.astype(dtype)
            if np.issubdtype(dtype, np.floating) and np.isinf(numbers).any() and not np.isinf(values).any():
                raise ValueError(f"got {np.abs(values).max()}, which {np.dtype(dtype)} cannot hold")
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            raise self._error(record, f"expected {field.name} as {field.type}, {error}") from error
        items = pa.array(numbers.reshape(-1))
        if numbers.ndim == 2:
            items = pa.FixedSizeListArray.from_arrays(items, numbers.shape[1])
        return pa.ListArray.from_arrays(pa.array([0, len(numbers)], type=pa.int32()), items)

    def _write_group(self):
        columns = [pa.concat_arrays([row[field.name] for row in self._pending]) for field in self.schema]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self.schema))
        self._pending.clear()
        self._pending_bytes = 0

    def _complete(self):
        if self._pending:
            self._write_group()

    def _close(self):
        if self._writer is not None:
            self._writer.close()


def _infer_type(value: Any) -> pa.DataType:
    if isinstance(value, np.ndarray):
        return pa.list_(pa.from_numpy_dtype(value.dtype))
    inferred = pa.infer_type([value])
    if pa.types.is_null(inferred):
        return pa.string()
    if pa.types.is_list(inferred) and pa.types.is_null(inferred.value_type):
        return pa.list_(pa.string())
    return inferred
