"""The work of convert_regions.py: from records of a source to shards of a region dataset, or to one file."""

import functools
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from files import file_digest, write_json
from processing.region_formats import WRITERS, RegionFormatError, RegionWriter, check_record, create_regions
from region_sources import RegionSource

# Columns with one item per region; all others are of the image.
REGION_COLUMNS = ("boxes", "features", "class_ids", "class_scores", "class_probs", "attribute_ids", "attribute_scores")

SKIP_HINT = "`--on_error skip` leaves out such images, and reports them."

# ---------------------------------------------------------------- records


class NoRegionLeft(Exception):
    """No region of an image is certain enough."""


def region_scores(record: Mapping[str, Any]) -> np.ndarray | None:
    """How certain the detector was of each region: its score, or else the probability of its likeliest class."""
    if "class_scores" in record:
        return record["class_scores"]
    if "class_probs" in record:
        return record["class_probs"][:, 1:].max(axis=1)
    return None


def select_regions(record: dict[str, Any], max_regions: int | None, min_confidence: float | None) -> dict[str, Any]:
    """
    The regions whose score is at least `min_confidence`; with `max_regions` the best so many of them, the best one
    first, or in the order of the source where there are no scores.

    Raises:
        NoRegionLeft: all scores are lower.
    """
    if max_regions is None and min_confidence is None:
        return record
    scores = region_scores(record)
    kept = np.arange(len(record["boxes"]))
    if min_confidence is not None:
        kept = kept[scores >= min_confidence]
        if not len(kept):
            raise NoRegionLeft(f"the highest score is {scores.max():.4f}")
    if max_regions is not None:
        if scores is not None:
            kept = kept[np.argsort(-scores[kept], kind="stable")]
        kept = kept[:max_regions]
    return {name: value[kept] if name in REGION_COLUMNS else value for name, value in record.items()}


def type_name(arrow_type: pa.DataType) -> str:
    """An Arrow type in numpy's words, such as `list<float32[4]>`."""
    if pa.types.is_fixed_size_list(arrow_type):
        return f"{type_name(arrow_type.value_type)}[{arrow_type.list_size}]"
    if pa.types.is_list(arrow_type):
        return f"list<{type_name(arrow_type.value_type)}>"
    if pa.types.is_struct(arrow_type):
        return "{" + ", ".join(f"{child.name}: {type_name(child.type)}" for child in arrow_type) + "}"
    return {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(arrow_type), str(arrow_type))


class Converter:
    """
    Reads images of a source as they are to be written. Every worker has a copy.

    Args:
        source: With all images.
        max_regions, min_confidence: See [`select_regions`].
        dtype: Of `features` and `class_probs` in Parquet; None: as in the source.
        expects_sizes: Whether an image without a size is invalid.
        text_types: Arrow types of columns that are joined to those of the source.
    """

    def __init__(
        self,
        source: RegionSource,
        max_regions: int | None = None,
        min_confidence: float | None = None,
        dtype: str | None = None,
        expects_sizes: bool = False,
        text_types: Mapping[str, pa.DataType] | None = None,
    ):
        self.source = source
        self.max_regions = max_regions
        self.min_confidence = min_confidence
        self.dtype = dtype
        self.expects_sizes = expects_sizes
        self.text_types = dict(text_types or {})
        self.first_image: str | None = None
        self.layout: dict[str, str] = {}  # of the first image: columns, with dtype and width of some
        self.schema: pa.Schema | None = None  # of Parquet

    def tighten(self, region_detector: Mapping[str, Any]) -> dict[str, Any]:
        """What is known of the detector, with limits such that it finds no other regions than those that are kept."""
        detector = dict(region_detector)
        if "max_regions" not in detector:  # windows have no limits
            return detector
        if self.max_regions is not None:
            detector["max_regions"] = min(detector["max_regions"], self.max_regions)
        if self.min_confidence is not None:
            detector["min_score"] = max(detector["min_score"], self.min_confidence)
            detector["min_regions"] = 1
        return detector | {"min_regions": min(detector["min_regions"], detector["max_regions"])}

    def begin(self, image_ids: Sequence[str], to: str, on_error: str) -> list[str]:
        """
        Looks at the first image that can be read, whose columns all others must have.

        Args:
            image_ids: Those to convert.
            to: Format of the destination.
            on_error: "raise": the first image must be one that can be read.

        Returns:
            What the user ought to know.

        Raises:
            ValueError: no image can be read, or the source has not what the arguments ask for.
        """
        for image_id in image_ids:
            try:
                record = self._read_checked(image_id)
                if to == "parquet":
                    self.schema = self._make_schema(record)
                break
            except ValueError as error:
                if on_error == "raise":
                    raise ValueError(f"{error} {SKIP_HINT}") from error
                if image_id == image_ids[-1]:
                    raise ValueError(f"None of {len(image_ids):,} images can be read. The last one: {error}") from error
        self.first_image, self.layout = image_id, self._layout_of(record)

        repeated = [name for name in self.text_types if name in record]
        if repeated:
            raise ValueError(f"The source has a column {repeated[0]!r} of its own: choose another name for the texts.")
        scores = region_scores(record)
        if scores is None and self.min_confidence is not None:
            raise ValueError(
                f"`--min_confidence` needs a source with class_scores or class_probs, this one has {', '.join(record)}."
            )
        notes = []
        if scores is None and self.max_regions is not None:
            notes.append(f"The source has no scores: of each image the first {self.max_regions} regions are kept.")
        if record["width"] == record["height"] == 1:
            notes.append("The source has no image sizes: width and height are 1, and boxes are shares of them.")
        columns = WRITERS[to].columns
        left_out = [name for name in record if columns is not None and name not in columns]
        if left_out:
            notes.append(f"The format {to} has no place for {', '.join(left_out)}.")
        return notes

    def _make_schema(self, record: Mapping[str, Any]) -> pa.Schema:
        """The schema of a file that begins with this record. Every shard has it, also one without any record."""
        texts = dict.fromkeys(self.text_types, [])
        with tempfile.TemporaryDirectory() as folder:
            with self.create_shard(Path(folder, "first")) as writer:
                writer.write({**record, **texts})
            return writer.schema

    def create_shard(self, path: Path) -> RegionWriter:
        types = self.source.column_types | self.text_types
        if self.schema is not None:
            types = datasets.Features.from_arrow_schema(self.schema)
        return create_regions(path, "parquet", feature_dtype=self.dtype, column_types=types)

    def _read_checked(self, image_id: str) -> dict[str, Any]:
        record = self.source[image_id]
        check_record(record)
        if self.expects_sizes and record["width"] == record["height"] == 1:
            raise ValueError(f"image_id {image_id}: expected its size in `--image_sizes`, got none.")
        return record

    def _layout_of(self, record: Mapping[str, Any]) -> dict[str, str]:
        layout = dict.fromkeys(record, "")
        for name in ("features", "class_probs"):
            if name in record:
                layout[name] = f" {self.dtype or record[name].dtype}[{record[name].shape[1]}]"
        return layout

    def __getitem__(self, image_id: str) -> dict[str, Any]:
        """
        Raises:
            RegionFormatError: the image is damaged.
            ValueError: it is invalid, or has other columns than the first one.
            NoRegionLeft: no region is certain enough.
        """
        record = self._read_checked(image_id)
        layout = self._layout_of(record)
        if layout != self.layout:
            expected, got = (", ".join(map("".join, columns.items())) for columns in (self.layout, layout))
            raise ValueError(f"image_id {image_id}: expected {expected}, as in {self.first_image}, got {got}.")
        return select_regions({name: record[name] for name in self.layout}, self.max_regions, self.min_confidence)


# ---------------------------------------------------------------- counting


@dataclass
class Counts:
    """
    What has become of some images.

    Args:
        images, regions: Numbers of those that were written.
        fewest_regions, most_regions: Of an image that was written; None without any.
        texts: For each column of lists the number of its items.
        missing: By reason, for each image that was not written an explanation.
        num_bytes, sha256: Of the file with those that were written.
    """

    images: int = 0
    regions: int = 0
    fewest_regions: int = 0
    most_regions: int = 0
    texts: dict[str, int] = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)
    num_bytes: int = 0
    sha256: str = ""

    def add(self, record: Mapping[str, Any]):
        num_regions = len(record["boxes"])
        self.fewest_regions = min(num_regions, self.fewest_regions) if self.images else num_regions
        self.most_regions = max(num_regions, self.most_regions)
        self.images += 1
        self.regions += num_regions
        for name, value in record.items():
            if isinstance(value, list):
                self.texts[name] = self.texts.get(name, 0) + len(value)

    @classmethod
    def total(cls, parts: Sequence["Counts"]) -> "Counts":
        total = cls(
            images=sum(part.images for part in parts),
            regions=sum(part.regions for part in parts),
            fewest_regions=min((part.fewest_regions for part in parts if part.images), default=0),
            most_regions=max((part.most_regions for part in parts), default=0),
            num_bytes=sum(part.num_bytes for part in parts),
        )
        for part in parts:
            for name, number in part.texts.items():
                total.texts[name] = total.texts.get(name, 0) + number
            for reason, images in part.missing.items():
                total.missing.setdefault(reason, {}).update(images)
        return total


def write_images(
    writer: RegionWriter,
    converter: Converter,
    image_ids: Sequence[str],
    texts: Mapping[str, Mapping[str, list]],
    on_error: str,
    advance: Callable[[], Any],
) -> Counts:
    """
    Writes images, and says what has become of each.

    Args:
        texts: Further columns, by image; images without any get an empty list.
        on_error: "raise", or "skip" to leave out images that are damaged or invalid.
        advance: Called after every image.

    Raises:
        ValueError: an image is damaged or invalid, and `on_error` is "raise".
    """
    counts = Counts()
    converter.source.expect(image_ids)
    for image_id in image_ids:
        reason = None
        try:
            record = converter[image_id] | {name: values.get(image_id, []) for name, values in texts.items()}
            record = {name: record[name] for name in record if writer.columns is None or name in writer.columns}
            writer.write(record)
            counts.add(record)
        except NoRegionLeft as error:
            reason, message = "no region left", str(error)
        except ValueError as error:
            # The file that is being written has a name of no interest.
            reason, message = "invalid", str(error).replace(f"{writer.path} ", "")
            if on_error == "raise":
                raise ValueError(f"{message} {SKIP_HINT}") from error
            if isinstance(error, RegionFormatError):
                reason = "damaged"
        if reason is not None:
            counts.missing.setdefault(reason, {})[image_id] = converter.source.without_paths(message)
        advance()
    return counts


def write_file(
    path: Path, to: str, converter: Converter, image_ids: Sequence[str], on_error: str, advance: Callable[[], Any]
) -> Counts:
    """
    Writes one file (or LMDB folder), which gets its name when it is complete.

    Raises:
        ValueError: as in [`write_images`]; or no image could be written.
    """
    with create_regions(path, to) as writer:
        return write_images(writer, converter, image_ids, {}, on_error, advance)


# ---------------------------------------------------------------- shards


@dataclass(frozen=True)
class Shard:
    """
    A file of a region dataset.

    Args:
        work_path: Where it is written.
        path: Where it belongs once all shards are complete.
        image_ids: Those of the source that it is made from.
        texts: As in [`write_images`].
    """

    work_path: Path
    path: Path
    image_ids: Sequence[str]
    texts: Mapping[str, Mapping[str, list]]

    @property
    def counts_path(self) -> Path:
        return self.work_path.with_name(self.work_path.name + ".json")

    def finished_counts(self) -> Counts | None:
        """What was counted when it was written; None if it was not, or not to its end."""
        if not self.counts_path.exists():
            return None
        counts = Counts(**json.loads(self.counts_path.read_text(encoding="utf-8")))
        paths = [path for path in (self.work_path, self.path) if path.exists()]
        return counts if paths and paths[0].stat().st_size == counts.num_bytes else None

    def write(self, converter: Converter, on_error: str, advance: Callable[[], Any]) -> Counts:
        # What was counted comes last: where it is missing, the file may be of a process that was killed.
        self.work_path.unlink(missing_ok=True)
        writer = converter.create_shard(self.work_path)
        try:
            counts = write_images(writer, converter, self.image_ids, self.texts, on_error, advance)
        except BaseException:
            writer.discard()
            raise
        if counts.images:
            writer.finish()
        else:
            writer.discard()
            pq.ParquetWriter(self.work_path, converter.schema).close()
        counts.num_bytes, counts.sha256 = self.work_path.stat().st_size, file_digest(self.work_path)
        write_json(self.counts_path, asdict(counts))
        return counts


def write_shards(
    shards: Sequence[Shard], converter: Converter, on_error: str, num_proc: int, advance: Callable[[int], Any]
):
    """
    Writes shards, in this process or in several others.

    Args:
        advance: Called with the number of images since its last call.

    Raises:
        ValueError: as in [`write_images`]. Shards that were complete by then are kept.
        RuntimeError: a process was killed.
    """
    run_tasks(functools.partial(_write_shard, converter, on_error), shards, num_proc, advance)


def _write_shard(converter: Converter, on_error: str, shard: Shard, advance: Callable[[int], Any]):
    shard.write(converter, on_error, lambda: advance(1))


# ---------------------------------------------------------------- processes

# Of a worker process: what `_start_worker` was given.
_worker: tuple[Callable[[Any, Callable[[int], Any]], Any], Any] | None = None


def run_tasks(
    run: Callable[[Any, Callable[[int], Any]], Any], tasks: Sequence[Any], num_proc: int, advance: Callable[[int], Any]
):
    """
    Runs tasks, in this process or in several others.

    Args:
        run: Is called with a task, and with a function to call with the number of images since its last call. It goes
            to the other processes once, and every task to one of them.
        advance: Called with the number of images since its last call.

    Raises:
        RuntimeError: a process was killed.
    """
    if num_proc == 1 or len(tasks) <= 1:
        for task in tasks:
            run(task, advance)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(
        min(num_proc, len(tasks)), context, initializer=_start_worker, initargs=(run, counter)
    ) as executor:
        try:
            pending = {executor.submit(_run_in_worker, task) for task in tasks}
            num_shown = 0
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                num_images = counter.value
                if num_images > num_shown:
                    advance(num_images - num_shown)
                num_shown = num_images
                for future in done:
                    future.result()
        except BaseException as error:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise RuntimeError(
                    "A process has ended unexpectedly, perhaps for want of memory (fewer with --num_proc). The same "
                    "command goes on where it was."
                ) from error
            raise


def _start_worker(run: Callable[[Any, Callable[[int], Any]], Any], counter: Any):
    global _worker
    _worker = run, counter
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
    # A worker does not notice by itself that its parent was killed, and would write into what a new conversion does.
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_worker(task: Any):
    run, counter = _worker

    def advance(num_images: int):
        with counter.get_lock():
            counter.value += num_images

    run(task, advance)


# ---------------------------------------------------------------- the folder


class DatasetFolder:
    """
    One split of a region dataset that is being converted, and what stands beside it.

    | path | |
    |---|---|
    | `data/SPLIT-00000-of-00012.parquet` | present when all shards of the split are complete |
    | `conversion_report.json` | by split: an account of its conversion; written after the files of the split |
    | `README.md` | the card, made from the reports |
    | `.conversion/SPLIT/` | of a conversion that is not complete: settings, shards, and what was counted in each |

    Args:
        path: The folder.
        split: Name of the split.

    Raises:
        FileExistsError: there is something else at `path`.
    """

    def __init__(self, path: Path, split: str):
        self.path = path
        self.split = split
        self._all_work_dir = path / ".conversion"
        self.work_dir = self._all_work_dir / split
        self._settings_path = self.work_dir / "settings.json"
        self._report_path = path / "conversion_report.json"
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path} exists, and is no folder.")
        is_ours = self._all_work_dir.exists() or self._report_path.exists()
        if path.exists() and any(path.iterdir()) and not is_ours:
            raise FileExistsError(f"{path}: expected a new or empty folder, or one that was converted to, got another.")
        if any(path.glob(f"data/{split}-*")) and not self._settings_path.exists() and split not in self.reports():
            raise FileExistsError(f"{path} has files of the split {split} already, which were not converted to there.")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Raises:
            FileExistsError: another process is converting to this folder.
        """
        self._all_work_dir.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._all_work_dir / "lock", timeout=0):
                yield
        except Timeout as error:
            raise FileExistsError(f"Another process is converting to {self.path}.") from error

    def reports(self) -> dict[str, dict[str, Any]]:
        """The reports of all splits that are complete."""
        if not self._report_path.exists():
            return {}
        return json.loads(self._report_path.read_text(encoding="utf-8"))

    def is_complete(self, settings: Mapping[str, Any]) -> bool:
        """
        Whether the split has been converted with these settings.

        Raises:
            ValueError: it has, or was about to be, with other settings.
        """
        report = self.reports().get(self.split)
        if report is not None:
            self._compare(report["settings"], settings)
        elif self._settings_path.exists():
            self._compare(json.loads(self._settings_path.read_text(encoding="utf-8")), settings)
        return report is not None

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]):
        differences = [
            f"--{name} was {before.get(name)}, is {now.get(name)}"
            for name in {**before, **now}
            if name != "source_fingerprint" and before.get(name) != now.get(name)
        ]
        if before["source_fingerprint"] != now["source_fingerprint"]:
            differences.append("the files of the source have changed")
        if differences:
            other = f"remove {self.work_dir} to start over" if self._settings_path.exists() else "choose another folder"
            raise ValueError(
                f"{self.path}: expected the settings with which the split {self.split} was begun, got others: "
                f"{'; '.join(differences)}. Give the same ones, or {other}."
            )

    def begin(self, settings: Mapping[str, Any], columns: Mapping[str, str]):
        """
        Args:
            settings: All that decides on the split.
            columns: Names and types.

        Raises:
            ValueError: other splits have other columns.
        """
        for split, report in self.reports().items():
            if split != self.split and report["columns"] != columns:
                raise ValueError(
                    f"{self.path}: expected the columns of the split {split}, {report['columns']}, got {columns}. "
                    "Choose another folder."
                )
        write_json(self._settings_path, settings)

    def shards(
        self, image_ids: Sequence[str], rows_per_shard: int, texts: Mapping[str, Mapping[str, list]]
    ) -> list[Shard]:
        """The files that images are to be divided among."""
        num_shards = -(-len(image_ids) // rows_per_shard)
        shards = []
        for number in range(num_shards):
            ids = image_ids[number * rows_per_shard : (number + 1) * rows_per_shard]
            # Without the extension, nobody takes the files for those of a dataset before all of them are complete.
            work_path = self.work_dir / f"{number:05d}"
            path = self.path / "data" / f"{self.split}-{number:05d}-of-{num_shards:05d}.parquet"
            texts_of_shard = {name: {i: values[i] for i in ids if i in values} for name, values in texts.items()}
            shards.append(Shard(work_path, path, ids, texts_of_shard))
        return shards

    def finish(self, shards: Sequence[Shard], report: Mapping[str, Any]):
        """Gives the shards their names, and then the split its report."""
        (self.path / "data").mkdir(exist_ok=True)
        for shard in shards:
            if shard.work_path.exists():
                shard.work_path.replace(shard.path)
        write_json(self._report_path, {**self.reports(), self.split: report})

    def write_card(self, make_card: Callable[[Mapping[str, Any]], str]) -> bool:
        """Writes README.md from all reports. Leaves it as it is, and returns False, where it has been edited."""
        path = self.path / "README.md"
        reports = self.reports()
        if path.exists():
            # The card is that of all reports, or, of the split that was added last, does not know yet.
            others = {split: report for split, report in reports.items() if split != self.split}
            if path.read_text(encoding="utf-8") not in (make_card(reports), make_card(others)):
                return False
        unfinished = self.work_dir / "README.md"
        unfinished.parent.mkdir(exist_ok=True)
        unfinished.write_text(make_card(reports), encoding="utf-8")
        unfinished.replace(path)
        return True

    def remove_work(self):
        shutil.rmtree(self.work_dir, ignore_errors=True)
        if {entry.name for entry in self._all_work_dir.iterdir()} <= {"lock"}:
            shutil.rmtree(self._all_work_dir)
