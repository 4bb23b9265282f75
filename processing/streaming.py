"""Region datasets that are read from one end to the other: larger than the disk, or on the Hub.

```python
stream = RegionStream.open("org/my-regions", "train")
batches = StreamedBatches(stream, lambda window, seed: PretrainingPairs(window, seed=seed), batch_size=64)
loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=collator, num_workers=4)
```

What is read at a time is a *window*: some row groups of the Parquet files, drawn at random, as a [`RegionDataset`] in
memory. Samples are shuffled, negatives drawn and lengths grouped within it. The order of windows and samples is a
function of the seed, and of how many processes and workers read.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch

from .region_dataset import (
    NUMBER_COLUMNS,
    REQUIRED_COLUMNS,
    VECTOR_COLUMNS,
    RegionDataset,
    base_splits,
    read_region_detector,
)
from .sampling import shuffle_by_length

NUM_FOOTER_READERS = 16  # threads, for files on the Hub; each of them waits for the network
NUM_ROW_GROUP_READERS = 2  # threads; each of them decodes


class RowGroup(NamedTuple):
    """A part of a Parquet file that is read as a whole."""

    file: str
    number: int
    num_rows: int
    num_values: dict[str, int]  # by column; in lists, of all their items together
    maxima: dict[str, Any]  # by column, where the file says them


def find_parquet_files(
    name_or_path: str | os.PathLike, split: str, **kwargs
) -> tuple[list[str], datasets.Features | None]:
    """
    The files of a split as `datasets.load_dataset` finds them, and the features of the dataset if it states them.

    Args:
        name_or_path: A local folder of Parquet files, or the name of a dataset on the Hub.
        split: Name of a split.
        kwargs: Further arguments of `datasets.load_dataset_builder`, such as `name`, `revision` or `token`.

    Raises:
        ValueError: there is no such folder or dataset, no such split (the message names those there are), or it does
            not consist of Parquet files.
    """
    path = os.path.expanduser(os.fspath(name_or_path))
    try:
        builder = datasets.load_dataset_builder(path, **kwargs)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(f"Could not open the dataset {path!r}: {error}") from error
    splits = builder.config.data_files or {}
    if split not in splits:
        raise ValueError(f"{name_or_path} has no split {split!r}, got {sorted(map(str, splits))}.")
    files = list(splits[split])
    other = [file for file in files if not file.endswith(".parquet")]
    if other:
        raise ValueError(f"Only Parquet files can be streamed, got {other[0]}.")
    return files, builder.info.features


def load_split_alone(name_or_path: str | os.PathLike, split: str, **kwargs) -> RegionDataset:
    """
    A split as [`load_region_dataset`] loads it, but without the files of the others, which `datasets` would download
    and prepare with it: for a dataset of which another split is streamed.

    Args:
        name_or_path: A local folder of Parquet files, or the name of a dataset on the Hub.
        split: A split, a slice of one, or a sum of some.
        kwargs: As [`find_parquet_files`] takes them.

    Raises:
        ValueError: there is no such dataset or split, or it does not consist of Parquet files.
    """
    path = os.path.expanduser(os.fspath(name_or_path))
    found = {base: find_parquet_files(path, base, **kwargs) for base in base_splits(split)}
    data_files = {base: files for base, (files, _) in found.items()}
    (_, features), *_ = found.values()
    hub_options = {name: kwargs[name] for name in ("revision", "token") if name in kwargs}
    try:
        dataset = datasets.load_dataset(
            "parquet", data_files=data_files, split=split, features=features, token=kwargs.get("token")
        )
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(f"Could not load split {split!r} of the dataset {path!r}: {error}") from error
    return RegionDataset(dataset, read_region_detector(path, split, **hub_options))


class RegionStream:
    """
    The row groups of a split, gathered to windows.

    Args:
        files (`Sequence[str]`):
            Parquet files: paths, or URLs of any file system that fsspec knows, such as `hf://datasets/...`.
        rows_per_window (`int`, *optional*, defaults to 2048):
            A window is completed once it has so many images. One is in memory while the next is being read: 1,000
            images with 36 regions of 2048 float16 numbers take 150 MB. A single row group may be larger: then it is the
            window.
        region_detector (`dict[str, Any]`, *optional*):
            What found the regions, see [`read_region_detector`].
        token (`str` or `bool`, *optional*):
            For files on the Hub. By default that of the login.
        columns (`Sequence[str]`, *optional*):
            What is read beside the columns of region datasets, as far as it is there. By default everything, pictures
            as well.
    """

    def __init__(
        self,
        files: Sequence[str],
        rows_per_window: int = 2048,
        region_detector: dict[str, Any] | None = None,
        token: str | bool | None = None,
        columns: Sequence[str] | None = None,
    ):
        if not files:
            raise ValueError("`files`: expected at least one Parquet file, got none.")
        if rows_per_window < 1:
            raise ValueError(f"`rows_per_window` must be at least 1, got {rows_per_window}.")
        self.rows_per_window = rows_per_window
        self.region_detector = region_detector
        self.token = token
        self.columns = None if columns is None else [*REQUIRED_COLUMNS, *VECTOR_COLUMNS, *NUMBER_COLUMNS, *columns]
        self.row_groups = read_row_groups(files, token)

    @classmethod
    def open(
        cls,
        name_or_path: str | os.PathLike,
        split: str,
        rows_per_window: int = 2048,
        columns: Sequence[str] | None = None,
        **kwargs,
    ) -> "RegionStream":
        """
        Finds the files of a split as `datasets.load_dataset` does, without reading them.

        Args:
            name_or_path (`str` or `os.PathLike`): A local folder of Parquet files, or the name of a dataset on the Hub.
            split (`str`): Name of a split.
            rows_per_window (`int`), columns (`Sequence[str]`, *optional*): As [`RegionStream`] takes them.
            **kwargs: Further arguments of `datasets.load_dataset_builder`, such as `name`, `revision` or `token`.

        Raises:
            ValueError: there is no such folder or dataset, no such split (the message names those there are), or it
                does not consist of Parquet files.
        """
        files, _ = find_parquet_files(name_or_path, split, **kwargs)
        path = os.path.expanduser(os.fspath(name_or_path))
        hub_options = {name: kwargs[name] for name in ("revision", "token") if name in kwargs}
        detector = read_region_detector(path, split, **hub_options)
        return cls(files, rows_per_window, detector, kwargs.get("token"), columns)

    @property
    def num_rows(self) -> int:
        """Number of images."""
        return sum(group.num_rows for group in self.row_groups)

    def num_values(self, column: str) -> int:
        """
        Number of values of a column, such as the captions of all images. It stands in the files' footers: nothing else
        is read.

        Raises:
            ValueError: a file has no such column.
        """
        for group in self.row_groups:
            if column not in group.num_values:
                raise ValueError(f"{group.file} has no column {column!r}, got {list(group.num_values)}.")
        return sum(group.num_values[column] for group in self.row_groups)

    @cached_property
    def _first_records(self) -> RegionDataset:
        group = self.row_groups[0]
        return RegionDataset(datasets.Dataset(self._read_row_group(group), fingerprint="first"))

    @property
    def column_names(self) -> list[str]:
        """Names of the columns that are read."""
        return self._first_records.column_names

    @property
    def region_feature_size(self) -> int:
        """Width of the region features."""
        return self._first_records.region_feature_size

    def num_region_classes(self, region_objective: str) -> int:
        """
        Width that a region head needs, as [`RegionDataset.num_region_classes`] says it.

        Raises:
            ValueError: there are no classes, or a file does not say its largest class id.
        """
        if region_objective == "soft_class" or "class_ids" not in self.column_names:
            return self._first_records.num_region_classes(region_objective)
        largest = [group.maxima.get("class_ids") for group in self.row_groups]
        if None in largest:
            file = self.row_groups[largest.index(None)].file
            raise ValueError(f"{file} was written without statistics of 'class_ids', which streaming needs.")
        if max(largest) < 0:
            raise ValueError("hard_class needs regions with a class, but every entry of 'class_ids' is -1.")
        return max(largest) + 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records, in the order of the files."""
        for records in self.read_ahead(self._gather(self.row_groups)):
            for index in range(len(records)):
                yield records[index]

    def windows(self, rng: np.random.Generator, share: int = 0, num_shares: int = 1) -> list[list[RowGroup]]:
        """
        The windows of one pass, as lists of row groups.

        Args:
            rng (`np.random.Generator`): Draws the order of the row groups.
            share, num_shares (`int`): Which of so many shares of the row groups, no two of which have one in common.

        Raises:
            ValueError: there are fewer row groups than shares.
        """
        if len(self.row_groups) < num_shares:
            raise ValueError(
                f"{num_shares} readers (processes times workers) need at least as many row groups, got "
                f"{len(self.row_groups)}: write the dataset with smaller row groups, or use fewer readers."
            )
        order = rng.permutation(len(self.row_groups))
        return self._gather([self.row_groups[index] for index in order[share::num_shares]])

    def _gather(self, row_groups: Sequence[RowGroup]) -> list[list[RowGroup]]:
        windows, num_rows = [[]], 0
        for group in row_groups:
            if num_rows >= self.rows_per_window:
                windows.append([])
                num_rows = 0
            windows[-1].append(group)
            num_rows += group.num_rows
        # A few rows have too little among them to be shuffled, or told apart.
        if len(windows) > 1 and num_rows < self.rows_per_window / 2:
            last = windows.pop()
            windows[-1] += last
        return windows

    def _read_row_group(self, group: RowGroup) -> datasets.table.Table:
        with open_parquet(group.file, self.token) as parquet:
            # Columns that are not there are passed over.
            table = parquet.read_row_group(group.number, columns=self.columns, use_threads=False)
            return datasets.table.InMemoryTable(table)

    def read_ahead(self, windows: Sequence[Sequence[RowGroup]]) -> Iterator[RegionDataset]:
        """Reads windows into memory, each while the one before it is in use."""
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(NUM_ROW_GROUP_READERS) as row_group_readers:

            def read(window: Sequence[RowGroup]) -> RegionDataset:
                table = datasets.table.concat_tables(list(row_group_readers.map(self._read_row_group, window)))
                # A fingerprint of its contents, which takes as long as reading them, would be of no use.
                return RegionDataset(datasets.Dataset(table, fingerprint="window"))

            following = None
            for window in windows:
                current, following = following, reader.submit(read, window)
                if current is not None:
                    yield current.result()
            if following is not None:
                yield following.result()


def read_row_groups(files: Sequence[str], token: str | bool | None = None) -> list[RowGroup]:
    """
    The row groups of Parquet files, from their footers.

    Args:
        files: Paths, or URLs of any file system that fsspec knows.
        token: Of the Hub.
    """
    with ThreadPoolExecutor(NUM_FOOTER_READERS) as readers:
        groups_by_file = readers.map(lambda file: _row_groups(file, token), files)
        return [group for groups in groups_by_file for group in groups]


@contextlib.contextmanager
def open_parquet(path: str, token: str | bool | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file that is read where it is. The arguments are those of [`read_row_groups`]."""
    options = {"token": token} if path.startswith("hf://") else {}
    with fsspec.open(path, "rb", **options) as file, pq.ParquetFile(file) as parquet:
        yield parquet


def _row_groups(path: str, token: str | None) -> list[RowGroup]:
    with open_parquet(path, token) as parquet:
        metadata = parquet.metadata
        return [_row_group(path, number, metadata.row_group(number)) for number in range(metadata.num_row_groups)]


def _row_group(path: str, number: int, metadata: pq.RowGroupMetaData) -> RowGroup:
    num_values, maxima = {}, {}
    for index in range(metadata.num_columns):
        chunk = metadata.column(index)
        name = chunk.path_in_schema.split(".")[0]
        statistics = chunk.statistics
        # Without statistics, an empty list counts as one value.
        num_values[name] = chunk.num_values if statistics is None else statistics.num_values
        if statistics is not None and statistics.has_min_max:
            maxima[name] = statistics.max
    return RowGroup(path, number, metadata.num_rows, num_values, maxima)


class StreamedBatches(torch.utils.data.IterableDataset):
    """
    Batches of samples from a stream, pass after pass without an end, for `DataLoader(..., batch_size=None)`.

    Row groups are divided among processes and their workers, without overlap within a pass; every reader begins its
    next pass by itself, in another order. An item is the list of a batch's samples, which the loader's `collate_fn`
    makes a batch of. Batches are full: what is left over at the end of a window is left out of that pass.

    To go on where a run stopped, the position is saved and restored by `state_dict` and `load_state_dict`: those of
    torchdata's `StatefulDataLoader` cover all workers. The batches that follow are the same as if it had not stopped.

    Args:
        stream ([`RegionStream`]): The images.
        make_samples (`Callable[[RegionDataset, int], torch.utils.data.Dataset]`):
            From a window, and a seed of its own, to its samples, such as [`PretrainingPairs`]. With `group_by_length`
            they have the method `lengths`. If they have the method `set_epoch`, it is told the number of the pass.
        batch_size (`int`): Batch size of each process.
        group_by_length (`bool`, *optional*, defaults to `False`):
            Batches hold samples of similar lengths, as those of [`shuffle_by_length`].
        seed (`int`, *optional*, defaults to 0): Not negative.
        process_index, num_processes (`int`): Which of so many processes this is.
    """

    def __init__(
        self,
        stream: RegionStream,
        make_samples: Callable[[RegionDataset, int], torch.utils.data.Dataset],
        batch_size: int,
        group_by_length: bool = False,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.stream = stream
        self.make_samples = make_samples
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self._position = (0, 0, 0)  # pass, window, batch: the next one to be given

    def state_dict(self) -> dict[str, Any]:
        """Where this process, or this worker of it, stands."""
        return {"position": list(self._position), "readers": self._readers()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the position is that of another reader, or of another number of them.
        """
        if list(state_dict["readers"]) != self._readers():
            raise ValueError(
                "The position is that of reader {} of {}, and this is reader {} of {}: go on with as many processes "
                "and workers.".format(*state_dict["readers"], *self._readers())
            )
        self._position = tuple(state_dict["position"])

    def _readers(self) -> list[int]:
        """Which of how many readers this is, over all processes and their workers."""
        worker = torch.utils.data.get_worker_info()
        index, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return [self.process_index * num_workers + index, self.num_processes * num_workers]

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        while True:
            number, first_window, first_batch = self._position
            # All readers draw the same order, of which each takes its share.
            windows = self.stream.windows(np.random.default_rng([self.seed, number]), *self._readers())
            is_empty = first_window == first_batch == 0
            read_windows = self.stream.read_ahead(windows[first_window:])
            for window_number, window in enumerate(read_windows, start=first_window):
                # Every window of every reader has an order, and draws, of its own.
                rng = np.random.default_rng([self.seed, number, window_number, self._readers()[0]])
                samples = self.make_samples(window, int(rng.integers(2**32)))
                if hasattr(samples, "set_epoch"):
                    samples.set_epoch(number)
                order = self._order(samples, rng)
                num_batches = len(order) // self.batch_size
                for batch in range(first_batch, num_batches):
                    chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                    self._position = (number, window_number, batch + 1)
                    is_empty = False
                    yield [samples[index] for index in chosen.tolist()]
                first_batch = 0
            if is_empty:
                raise ValueError(f"No window has a batch of {self.batch_size} samples: make windows larger.")
            self._position = (number + 1, 0, 0)

    def _order(self, samples, rng: np.random.Generator) -> np.ndarray:
        if self.group_by_length:
            return shuffle_by_length(samples.lengths(), self.batch_size, rng)
        return rng.permutation(len(samples))
