"""What the scripts for region features read: one or more files or folders in any format of the field, as one source."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import snapshot_download

from processing.region_dataset import read_region_detector
from processing.region_formats import RegionReader, open_regions
from processing.tasks import canonical_image_id
from processing.tasks.files import Record, read_json, read_records

Size = tuple[int, int]  # width, height in pixels


class RegionSource:
    """
    Several readers, one after the other, as if they were one.

    Attributes:
        image_ids (`list[str]`): All image ids, each of them once.
        duplicate_ids (`list[str]`): Those that there are more than once. The first record of an image counts.
        region_detector (`dict[str, Any]`, *optional*): What found all regions, see [`read_region_detector`].
    """

    def __init__(self, readers: Sequence[RegionReader], region_detector: dict[str, Any] | None = None):
        self.readers = list(readers)
        self.region_detector = region_detector
        self._readers_by_id: dict[str, int] = {}
        self._last_reader = 0
        duplicates: dict[str, None] = {}
        for number, reader in enumerate(self.readers):
            duplicates |= dict.fromkeys(reader.duplicate_ids)
            for image_id in reader.image_ids:
                if self._readers_by_id.setdefault(image_id, number) != number:
                    duplicates[image_id] = None
        self.image_ids = list(self._readers_by_id)
        self.duplicate_ids = list(duplicates)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, image_id: str) -> dict[str, Any]:
        number = self._readers_by_id[image_id]
        if number != self._last_reader:
            # A dataset may have more files than a process may have open.
            self.readers[self._last_reader].close()
            self._last_reader = number
        return self.readers[number][image_id]

    def expect(self, image_ids: Sequence[str]):
        """Says which images will be read next, in this order."""

    @property
    def format_name(self) -> str:
        return ", ".join(dict.fromkeys(reader.format_name for reader in self.readers))

    @property
    def column_types(self) -> dict[str, Any]:
        """Types of columns that only this source has, as far as it knows them; see [`RegionReader`]."""
        types: dict[str, Any] = {}
        for reader in self.readers:
            types = {**reader.column_types, **types}
        return types

    def fingerprint(self) -> str:
        """Changes with the image ids, and with the name, the size or the time of any file."""
        digest = hashlib.sha256("\n".join(self.image_ids).encode())
        for reader in self.readers:
            for name, path in _files(reader.path):
                status = os.stat(path)
                digest.update(f"\n{name}\t{status.st_size}\t{status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def without_paths(self, message: str) -> str:
        """An error message that names a file by its name alone, as where it lay on this machine is of no interest."""
        for reader in self.readers:
            message = message.replace(str(reader.path), reader.path.name)
        return message


def _files(path: Path) -> Iterator[tuple[str, str]]:
    """Relative name and path of a file, or of all files of a folder."""
    if not path.is_dir():
        yield path.name, str(path)
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            if name != "lock.mdb":  # which programs that only read an LMDB touch as well
                yield os.path.relpath(os.path.join(folder, name), path), os.path.join(folder, name)


def open_source(
    names: Sequence[str],
    split: str | None = None,
    dataset_config_name: str | None = None,
    image_sizes: Mapping[str, Size] | None = None,
    token: str | None = None,
) -> RegionSource:
    """
    Opens files and folders of any format, and region datasets, local or on the Hub.

    Args:
        names: Paths, or names of datasets on the Hub.
        split: Split of a region dataset; not needed where it has only one.
        dataset_config_name: Configuration of a region dataset.
        image_sizes: For formats without image sizes, see [`open_regions`].
        token: Of the Hub.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset.
        ValueError: the format is unknown, or there is no such split.
    """
    readers, detectors = [], []
    for name in names:
        path = Path(name).expanduser()
        is_dataset = any(path.rglob("*.parquet")) if path.is_dir() else not path.exists()
        paths, detector = [path], None
        if is_dataset:
            paths, own_split = _dataset_files(name, path, split, dataset_config_name, token)
            detector = read_region_detector(str(path), own_split, token=token)
        elif split is not None:
            raise ValueError(f"{name} has no splits to choose {split!r} from: it is no folder of Parquet files.")
        detectors.append(detector)
        for path in paths:
            readers.append(open_regions(path, image_sizes))
            readers[-1].close()  # until it is read from
    return RegionSource(readers, detectors[0] if all(detector == detectors[0] for detector in detectors) else None)


def _dataset_files(
    name: str, path: Path, split: str | None, config_name: str | None, token: str | None
) -> tuple[list[Path], str]:
    """The Parquet files of one split of a region dataset, and its name; those on the Hub are downloaded."""
    # Names on the Hub have at most one slash, and begin with neither a slash nor a dot.
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise FileNotFoundError(f"There is no file or folder {name}.")
    try:
        builder = datasets.load_dataset_builder(str(path), name=config_name, token=token)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"There is no file or folder {name}, and no dataset of that name: {error}") from error
    splits = {str(key): list(files) for key, files in (builder.config.data_files or {}).items()}
    if split not in splits and not (split is None and len(splits) == 1):
        raise ValueError(f"{name}: expected one of its splits, {', '.join(splits)}, got {split}.")
    split = split if split in splits else next(iter(splits))
    files = splits[split]
    other = [file for file in files if not file.endswith(".parquet")]
    if other:
        raise ValueError(f"{name}: expected a dataset of Parquet files, got {other[0]}.")
    if path.exists():
        return [Path(file) for file in files], split
    # hf://datasets/NAMESPACE/NAME@REVISION/FILE
    places = [file.removeprefix(f"hf://datasets/{name}@").partition("/") for file in files]
    patterns = [file for _, _, file in places]
    folder = snapshot_download(name, repo_type="dataset", revision=places[0][0], allow_patterns=patterns, token=token)
    return [Path(folder, file) for file in patterns], split


class ByImage(Mapping):
    """Values by image id, whichever of its names an image is looked up by."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = {canonical_image_id(image_id): value for image_id, value in values.items()}

    def __getitem__(self, image_id: str) -> Any:
        return self._values[canonical_image_id(image_id)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def read_image_sizes(path: str | os.PathLike) -> ByImage:
    """
    Width and height of images in pixels, from JSON `{image_id: [width, height]}`, from COCO's JSON with `images`, or
    from a table (CSV, TSV, JSONL) with the columns `image_id`, `width` and `height`.

    Raises:
        ValueError: a broken file, or a size that is not two positive whole numbers.
    """
    sizes: dict[str, Size] = {}
    for record, image_id, size in _image_sizes(path):
        try:
            width, height = (int(number) for number in size)
        except (TypeError, ValueError):
            width, height = 0, 0
        if width < 1 or height < 1:
            raise record.error(f"expected width and height of image {image_id} in pixels, got {size!r:.80}.")
        sizes[str(image_id)] = width, height
    return ByImage(sizes)


def _image_sizes(path: str | os.PathLike) -> Iterator[tuple[Record, int | str, Any]]:
    """The records of a file, each with a name of an image and its size."""
    if Path(path).suffix.lower() != ".json":
        for record in read_records(path):
            yield record, record["image_id"], (record["width"], record["height"])
        return
    content = Record(read_json(path), str(path))
    if "images" not in content:
        for image_id, size in content.items():
            yield content, image_id, size
        return
    for image in content.records("images"):
        # Features of COCO's images go by its numbers, those of other images mostly by the names of their files.
        for name in ("id", "file_name"):
            if name in image:
                yield image, image[name], (image["width"], image["height"])
