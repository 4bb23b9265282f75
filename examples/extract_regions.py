#!/usr/bin/env python
"""
Finds the regions of pictures and writes them as a region dataset: a folder of pictures, lists of paths, or a dataset of
images, local or on the Hub.

    python examples/extract_regions.py photographs outputs/my_regions --detector org/bottom-up-attention

The detector is a Faster R-CNN as `FasterRCNNForRegionFeatures` saves it, or a folder with the published checkpoint
(pytorch_model.bin and config.yaml). Or any detector of Transformers, with the features of any backbone; or windows,
where there is no detector:

    python examples/extract_regions.py photographs outputs/my_regions --detector PekingU/rtdetr_r50vd \\
        --backbone microsoft/resnet-50
    python examples/extract_regions.py photographs outputs/my_regions --detector windows --grids 2 4 \\
        --backbone microsoft/resnet-50

Regions as VQA has them, and for the `soft_class` objective of pretraining, on several GPUs that share the pictures:

    accelerate launch --multi_gpu examples/extract_regions.py org/my-photographs outputs/my_regions --split train \\
        --detector org/bottom-up-attention --min_regions 10 --max_regions 100 --min_score 0.2 --class_probs \\
        --mixed_precision bf16 --batch_size 8 --push_to_hub

A dataset that is larger than the disk, read where it is:

    python examples/extract_regions.py org/my-photographs outputs/my_regions --split train --streaming \
        --columns captions --detector org/bottom-up-attention

The id of a picture is its path below the folder, or as it stands in a list, without extension; of a dataset what
`--image_id_column` says. Pictures that cannot be read are left out, and `conversion_report.json` says why. An
extraction that was stopped goes on where it was when the same command is given again, and ends with the same rows, each
picture once. A model that is trained on the regions names the detector in its configuration, and takes photographs.
"""

import argparse
import bisect
import contextlib
import hashlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import CONFIG_NAME

from convert_regions import Plan, add_output_arguments, check_output_args, check_positive, run
from pictures import UNREADABLE, encode_thumbnail, upright
from processing.region_extractors import RegionExtractor, load_region_extractor
from processing.region_formats import RegionFormatError
from processing.streaming import find_parquet_files, open_parquet, read_row_groups
from region_conversion import REGION_COLUMNS, Converter, DatasetFolder, Shard, write_shards
from retrieval_evaluation import AUTOCAST_DTYPES

# An extraction that was stopped has lost at most so many pictures of each process.
ROWS_PER_SHARD = 500
# Pictures that are read ahead, in batches: those of one size go together.
BATCHES_AHEAD = 8
# Those that are written of every picture, and no column of a dataset may take the place of.
WRITTEN_COLUMNS = ("image_id", "width", "height", *REGION_COLUMNS, "image")
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


# ---------------------------------------------------------------- arguments


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Find the regions of pictures.")
    parser.add_argument(
        "source", nargs="+", help="Folders of pictures, pictures, .txt files with a path in each line, or one dataset."
    )
    parser.add_argument("destination", help="Folder for the region dataset.")
    parser.add_argument("--source_split", help="Split of a dataset of images. By default that of --split.")
    parser.add_argument("--dataset_config_name", help="Configuration of a dataset of images.")
    parser.add_argument("--image_column", default="image", help="Column of pictures of a dataset.")
    parser.add_argument(
        "--image_id_column", help="Column of a dataset that names the pictures. By default image_id, or their numbers."
    )
    parser.add_argument("--columns", nargs="+", default=[], help="Columns of a dataset to keep, such as captions.")
    parser.add_argument(
        "--streaming", action="store_true", help="Reads a dataset of Parquet files where it is, without a download."
    )

    regions = parser.add_argument_group("regions")
    regions.add_argument(
        "--detector", required=True, help="Checkpoint of a detector, folder or Hub name; or 'windows' for none."
    )
    regions.add_argument("--detector_revision", default="main", help="Branch, tag or commit of it on the Hub.")
    regions.add_argument("--backbone", help="Checkpoint of a backbone, whose features regions get.")
    regions.add_argument("--grids", type=int, nargs="+", help="Cells of each side, for windows. By default 2 4.")
    regions.add_argument("--min_regions", type=int, help="Of a picture; by default as the detector has it, or 10.")
    regions.add_argument("--max_regions", type=int, help="Of a picture; by default as the detector has it, or 36.")
    regions.add_argument(
        "--min_score", type=float, help="Regions up to this score are left out, unless --min_regions calls for them."
    )
    regions.add_argument("--class_probs", action="store_true", help="Also writes the probabilities of all classes.")
    regions.add_argument(
        "--thumbnails", type=int, help="Also writes the pictures, at most so many pixels high and wide, as JPEG."
    )

    output = parser.add_argument_group("output")
    output.add_argument("--split", help="Split to write, beside those that are there. By default train.")
    output.add_argument("--batch_size", type=int, default=4, help="Pictures that the detector sees at a time.")
    output.add_argument("--device", help="Such as cuda:1 or cpu; by default that of the process.")
    output.add_argument("--mixed_precision", choices=list(AUTOCAST_DTYPES), default="no", help="Of the detector.")
    output.add_argument(
        "--on_error",
        choices=["raise", "skip"],
        default="skip",
        help="Leaves out pictures that cannot be read and reports them, or stops at the first one.",
    )
    add_output_arguments(output)
    parser.set_defaults(to="parquet")
    args = parser.parse_args()
    if args.rows_per_shard is None:
        args.rows_per_shard = ROWS_PER_SHARD
    try:
        check_output_args(args)
        check_positive(args, "batch_size", "max_regions", "thumbnails")
        if args.num_proc != 1:
            raise ValueError("--num_proc: expected `accelerate launch` for several processes, got --num_proc")
    except ValueError as error:
        parser.error(str(error))
    return parser, args


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True, slots=True)
class Picture:
    """
    Where a picture is.

    Args:
        image_id: What it is called.
        place: A path, or the row of a dataset.
        stamp: Changes with the picture.
    """

    image_id: str
    place: str | int
    stamp: str


class PictureSource:
    """
    Records of pictures, found when they are asked for; as [`RegionSource`] gives those of files.

    Args:
        pictures: In order. Of several with the same id the first one counts.
        rows: What the places are rows of, if they are; all their other columns become columns of the records.
        extractor: Finds the regions.
        region_detector: Says what the extractor is, see [`read_region_detector`].
        batch_size: Of the extractor.
        autocast_dtype: Of the extractor, if not that of its weights.
        thumbnail_size: Records have a picture of at most this size, in pixels; None: they have none.
    """

    format_name = "pictures"

    def __init__(
        self,
        pictures: Sequence[Picture],
        rows: "PictureRows | None",
        extractor: RegionExtractor,
        region_detector: dict[str, Any],
        batch_size: int,
        autocast_dtype: torch.dtype | None,
        thumbnail_size: int | None,
    ):
        self.rows = rows
        self.extractor = extractor
        self.region_detector = region_detector
        self.batch_size = batch_size
        self.autocast_dtype = autocast_dtype
        self.thumbnail_size = thumbnail_size
        self._pictures: dict[str, Picture] = {}
        duplicates: dict[str, None] = {}
        for picture in pictures:
            if self._pictures.setdefault(picture.image_id, picture) is not picture:
                duplicates[picture.image_id] = None
        self.image_ids = list(self._pictures)
        self.duplicate_ids = list(duplicates)
        self._expected: list[str] = []
        self._found: dict[str, dict[str, Any] | RegionFormatError] = {}

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def column_types(self) -> dict[str, Any]:
        numbers = {
            "attribute_ids": datasets.List(datasets.Value("int32")),
            "attribute_scores": datasets.List(datasets.Value("float32")),
        }
        kept = {} if self.rows is None else self.rows.kept_features
        return numbers | kept | ({} if self.thumbnail_size is None else {"image": datasets.Image()})

    def fingerprint(self) -> str:
        """Changes with the ids, and with the size or the time of any file."""
        digest = hashlib.sha256()
        for picture in self._pictures.values():
            digest.update(f"{picture.image_id}\t{picture.stamp}\n".encode())
        return digest.hexdigest()

    def without_paths(self, message: str) -> str:
        return message

    def expect(self, image_ids: Sequence[str]):
        """Says which images will be read next, in this order: those ahead are found in batches."""
        self._expected = list(image_ids)
        self._found = {}

    def __getitem__(self, image_id: str) -> dict[str, Any]:
        """
        Raises:
            RegionFormatError: the picture cannot be read.
        """
        if image_id not in self._found:
            start = self._expected.index(image_id) if image_id in self._expected else None
            ahead = [image_id] if start is None else self._expected[start : start + BATCHES_AHEAD * self.batch_size]
            self._found = dict(self._find(ahead))
        found = self._found.pop(image_id)
        if isinstance(found, RegionFormatError):
            raise found
        return found

    def _find(self, image_ids: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | RegionFormatError]]:
        opened, kept = {}, {}
        for image_id in image_ids:
            try:
                opened[image_id], kept[image_id] = self._open(self._pictures[image_id])
            except UNREADABLE as error:
                yield image_id, RegionFormatError(f"image_id {image_id}: expected a picture, got {_reason(error)}.")
        for batch in self._batches(opened):
            with self._autocast():
                records = self.extractor([opened[image_id] for image_id in batch])
            for image_id, record in zip(batch, records, strict=True):
                record = {"image_id": image_id, **record, **kept[image_id]}
                if self.thumbnail_size is not None:
                    thumbnail = encode_thumbnail(opened[image_id], self.thumbnail_size)
                    record["image"] = {"bytes": thumbnail, "path": f"{Path(image_id).name}.jpg"}
                yield image_id, record

    def _batches(self, opened: Mapping[str, Image.Image]) -> Iterator[list[str]]:
        """Pictures of one size: the padding of a batch would change what is found near it."""
        by_size: dict[tuple[int, int], list[str]] = {}
        for image_id, picture in opened.items():
            by_size.setdefault(picture.size, []).append(image_id)
        for image_ids in by_size.values():
            for start in range(0, len(image_ids), self.batch_size):
                yield image_ids[start : start + self.batch_size]

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.extractor.device.type, dtype=self.autocast_dtype)

    def _open(self, picture: Picture) -> tuple[Image.Image, dict[str, Any]]:
        """The picture, and the other columns of its row."""
        file, kept = picture.place, {}
        if self.rows is not None:
            value, kept = self.rows.read(picture.place)
            if value is None:
                raise ValueError("no picture")
            file = value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])
        with Image.open(file) as image:
            return upright(image), kept


def _reason(error: Exception) -> str:
    """An error in words, without the name of a file in memory or of a place on this machine."""
    if isinstance(error, FileNotFoundError):
        return "no file"
    return type(error).__name__ if "cannot identify" in str(error) else str(error)


def list_pictures(names: Sequence[str]) -> list[Picture]:
    """
    The pictures of folders, of lists of paths, and those that are named themselves.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is no picture.
    """
    pictures = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
            pictures += [_picture(file, file.relative_to(path)) for file in files]
        elif path.suffix == ".txt" and path.is_file():
            lines = [Path(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            # Where a picture lies on this machine is no part of its name.
            pictures += [
                _picture(path.parent / line, Path(line.name) if line.is_absolute() else line) for line in lines
            ]
        elif path.is_file():
            pictures.append(_picture(path, Path(path.name)))
        else:
            raise FileNotFoundError(f"There is no file, folder or dataset {name}.")
    if not pictures:
        raise ValueError(f"No pictures ({', '.join(sorted(EXTENSIONS))}) in {', '.join(names)}.")
    return pictures


def _picture(path: Path, name: Path) -> Picture:
    return Picture(name.with_suffix("").as_posix(), str(path), _stamp(path))


def _stamp(path: Path) -> str:
    """Changes with the file."""
    return f"{path.stat().st_size} {path.stat().st_mtime_ns}" if path.is_file() else "missing"


class PictureRows:
    """
    The pictures of a dataset, encoded, with some of its other columns.

    Args:
        dataset: Its columns are read by name, and its rows by number.
        image_column: Column of the pictures.
        columns: Others to keep.

    Raises:
        ValueError: there is no such column, or the first one is not of pictures.
    """

    def __init__(self, dataset: "datasets.Dataset | ParquetRows", image_column: str, columns: Sequence[str]):
        if not isinstance(dataset.features.get(image_column), datasets.Image):
            raise ValueError(
                f"--image_column: expected a column of pictures, got {image_column}; the dataset has "
                f"{', '.join(dataset.features)}."
            )
        others = [name for name in dataset.features if name not in (image_column, *WRITTEN_COLUMNS)]
        for column in columns:
            if column not in others:
                raise ValueError(f"--columns: expected some of {', '.join(others)}, got {column}.")
        self.image_column = image_column
        self.kept_features = {column: dataset.features[column] for column in columns}
        self.dataset = dataset.select_columns([image_column, *columns])
        if isinstance(self.dataset, datasets.Dataset):
            self.dataset = self.dataset.cast_column(image_column, datasets.Image(decode=False))

    def read(self, row: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The picture's bytes or path, None where it has none; and the columns that are kept."""
        kept = self.dataset[row]
        return kept.pop(self.image_column), kept


class ParquetRows:
    """
    The rows of Parquet files that are read where they are, a row group at a time: for datasets that are larger than the
    disk. It has what is needed here of [`datasets.Dataset`].

    Args:
        files: Paths, or URLs of any file system that fsspec knows.
        features: Of the dataset, if they are known; else those of the files.
        token: Of the Hub.
    """

    def __init__(self, files: Sequence[str], features: datasets.Features | None = None, token: str | None = None):
        self.files = list(files)
        self.token = token
        if features is None:
            with open_parquet(self.files[0], token) as parquet:
                features = datasets.Features.from_arrow_schema(parquet.schema_arrow)
        self.features = features
        self.columns: list[str] | None = None  # all
        self._groups = read_row_groups(self.files, token)
        self._first_rows = [0, *itertools.accumulate(group.num_rows for group in self._groups)]
        self._loaded: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return self._first_rows[-1]

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    @property
    def _fingerprint(self) -> str:
        """On the Hub, names of files have the commit; others change with their size or time."""
        return hashlib.sha256("\n".join(f"{file} {_stamp(Path(file))}" for file in self.files).encode()).hexdigest()

    def select_columns(self, columns: Sequence[str]) -> "ParquetRows":
        self.columns = list(columns)
        return self

    def __getitem__(self, key: int | str) -> Any:
        """A row, or all values of a column, of which nothing else is read."""
        if isinstance(key, str):
            values = []
            for file in self.files:
                with open_parquet(file, self.token) as parquet:
                    values += parquet.read([key]).column(key).to_pylist()
            return values
        index = bisect.bisect_right(self._first_rows, key) - 1
        if self._loaded is None or self._loaded[0] != index:
            group = self._groups[index]
            with open_parquet(group.file, self.token) as parquet:
                self._loaded = index, parquet.read_row_group(group.number, columns=self.columns)
        return self._loaded[1].slice(key - self._first_rows[index], 1).to_pylist()[0]


def load_pictures(args: argparse.Namespace) -> tuple[list[Picture], PictureRows | None]:
    """The pictures of the arguments, and the rows that they are in, if they are."""
    path = Path(args.source[0]).expanduser()
    holds_dataset = path.is_dir() and any(path.rglob("*.parquet"))
    if len(args.source) > 1 or (path.exists() and not holds_dataset):
        if args.columns or args.streaming:
            name = "columns" if args.columns else "streaming"
            raise ValueError(f"--{name}: expected one dataset of pictures, got {', '.join(args.source)}.")
        return list_pictures(args.source), None
    dataset = load_dataset(args, str(path), args.source_split or args.split)
    column = args.image_id_column or ("image_id" if "image_id" in dataset.column_names else None)
    if column is not None and column not in dataset.column_names:
        raise ValueError(f"--image_id_column: expected one of {', '.join(dataset.column_names)}, got {column}.")
    ids = [f"{row:09d}" for row in range(len(dataset))] if column is None else map(str, dataset[column])
    stamp = dataset._fingerprint
    pictures = [Picture(image_id, row, stamp) for row, image_id in enumerate(ids)]
    return pictures, PictureRows(dataset, args.image_column, args.columns)


def load_dataset(args: argparse.Namespace, path: str, split: str) -> datasets.Dataset | ParquetRows:
    """
    Raises:
        FileNotFoundError, ValueError: there is no such dataset or split, or it cannot be streamed.
    """
    options = {"name": args.dataset_config_name, "token": args.hub_token}
    if args.streaming:
        files, features = find_parquet_files(path, split, **options)
        return ParquetRows(files, features, args.hub_token)
    try:
        return datasets.load_dataset(path, split=split, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"There is no file, folder or dataset {args.source[0]} ({error}).") from error


# ---------------------------------------------------------------- the detector


def extractor_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `load_region_extractor` is given beside the detector, as far as the user has said it."""
    names = ("backbone", "grids", "min_regions", "max_regions", "min_score")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def describe_detector(args: argparse.Namespace, limits: dict[str, Any]) -> dict[str, Any]:
    """The detector as a model's configuration has it. What is a folder here is nothing elsewhere, and stays unnamed."""
    described: dict[str, Any] = {}
    if args.backbone is not None and not Path(args.backbone).is_dir():
        described |= {"backbone": args.backbone, "backbone_revision": commit_of(args.backbone, "main")}
    if args.backbone is None or described:
        if args.detector == "windows":
            described |= {"name_or_path": args.detector} | ({} if args.grids is None else {"grids": args.grids})
        elif not Path(args.detector).is_dir():
            described |= {"name_or_path": args.detector, "revision": commit_of(args.detector, args.detector_revision)}
    return described | limits


def commit_of(name: str, revision: str) -> str:
    """What a branch of the Hub, which may go on, is now: the name of the folder that its files are kept in."""
    return Path(hf_hub_download(name, CONFIG_NAME, revision=revision)).parent.name


# ---------------------------------------------------------------- extraction


@dataclass
class ExtractionPlan(Plan):
    """All pictures, divided among the processes of Accelerate shard by shard."""

    script = "extract_regions.py"
    has_told_others: bool = False

    def write_shards(self, shards: Sequence[Shard], on_error: str, num_proc: int, advance: Callable[[int], Any]):
        self.tell_others([str(shard.work_path) for shard in shards])
        self._write_own(shards, on_error, advance)

    def tell_others(self, paths: list[str] | None):
        """Which shards there are to write; None: there is nothing to do."""
        if not self.has_told_others:
            broadcast_object_list([paths])
        self.has_told_others = True

    def help_writing(self, args: argparse.Namespace):
        """What all processes but the main one do."""
        paths: list[list[str] | None] = [None]
        broadcast_object_list(paths)
        if paths[0] is None:
            return
        self.converter.begin(self.image_ids, "parquet", args.on_error)
        shards = DatasetFolder(Path(args.destination), args.split).shards(self.image_ids, args.rows_per_shard, {})
        by_path = {str(shard.work_path): shard for shard in shards}
        self._write_own([by_path[path] for path in paths[0]], args.on_error, lambda num_images: None)

    def _write_own(self, shards: Sequence[Shard], on_error: str, advance: Callable[[int], Any]):
        state = PartialState()
        own = shards[state.process_index :: state.num_processes]
        num_left = sum(len(shard.image_ids) for shard in shards)

        def advance_all(num_images: int):
            """The others are about as fast."""
            nonlocal num_left
            num_shown = min(num_images * state.num_processes, num_left)
            num_left -= num_shown
            advance(num_shown)

        error = None
        try:
            write_shards(own, self.converter, on_error, 1, advance_all)
        except (ValueError, OSError) as raised:
            error = str(raised)
        errors = [message for message in gather_object([error]) if message is not None]
        if errors:
            raise ValueError(errors[0])


def make_plan(args: argparse.Namespace) -> ExtractionPlan:
    pictures, rows = load_pictures(args)
    extractor = load_region_extractor(
        args.detector,
        revision=args.detector_revision,
        class_probs=args.class_probs,
        device=torch.device(args.device) if args.device else PartialState().device,
        **extractor_settings(args),
    )
    source = PictureSource(
        pictures,
        rows,
        extractor,
        describe_detector(args, extractor.limits),
        args.batch_size,
        AUTOCAST_DTYPES[args.mixed_precision],
        args.thumbnails,
    )
    settings = {
        "source": [Path(name).resolve().name for name in args.source],
        "source_format": source.format_name,
        "source_fingerprint": source.fingerprint(),
    }
    names = ("source_split", "dataset_config_name", "image_column", "image_id_column", "columns", "streaming")
    names += ("detector", "detector_revision", "class_probs", "thumbnails", "batch_size", "mixed_precision")
    names += ("rows_per_shard",)
    settings |= {name: getattr(args, name) for name in names if getattr(args, name) not in (None, False, [])}
    settings |= extractor_settings(args)
    for name in ("detector", "backbone"):
        if name in settings and Path(settings[name]).is_dir():
            settings[name] = Path(settings[name]).resolve().name
    return ExtractionPlan(
        source=source,
        converter=Converter(source),
        image_ids=source.image_ids,
        missing={},
        texts={},
        not_in_source={},
        settings=settings,
    )


def main():
    parser, args = parse_args()
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=1))  # for the one whose pictures take longest
    accelerator = Accelerator(cpu=args.device == "cpu", kwargs_handlers=[waiting])
    accelerator.print(f"{accelerator.num_processes} process(es).")
    if not accelerator.is_main_process:
        make_plan(args).help_writing(args)
        return
    try:
        plan = make_plan(args)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    try:
        run(parser, args, lambda args: plan)
    finally:
        plan.tell_others(None)


if __name__ == "__main__":
    main()
