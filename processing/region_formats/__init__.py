"""
Region features in the formats of the field: [`open_regions`] reads any of them, [`create_regions`] writes some.

| format | read | write | who wrote it |
|---|---|---|---|
| `parquet` | yes | yes | this project, see [`RegionDataset`] |
| `vilbert_lmdb` | yes | yes | ViLBERT, VOLTA, InterBERT's release (tasks) |
| `tensorpack_lmdb` | yes | | ViLBERT, InterBERT's release (pretraining) |
| `bottom_up_tsv` | yes | yes | bottom-up-attention (BUTD) |
| `lxmert_tsv` | yes | yes | LXMERT |
| `npz` | yes | | UNITER |
| `npy` | yes | | MMF |
| `hdf5` | yes | yes | BUTD-VQA, BAN |

LMDB, HDF5 and msgpack need the libraries of the extra `formats`: `pip install "interbert[formats]"`.
"""

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from .bottom_up_tsv import BottomUpTSVReader, BottomUpTSVWriter
from .checking import check_record
from .hdf5 import HDF5Reader, HDF5Writer
from .lxmert_tsv import LXMERTTSVReader, LXMERTTSVWriter
from .npy import NpyReader
from .npz import NpzReader
from .parquet import ParquetReader, ParquetWriter
from .reader import RegionFormatError, RegionReader, RegionWriter
from .tensorpack_lmdb import TensorpackLMDBReader
from .vilbert_lmdb import ViLBERTLMDBReader, ViLBERTLMDBWriter

_READERS = (
    ParquetReader,
    ViLBERTLMDBReader,
    TensorpackLMDBReader,
    BottomUpTSVReader,
    LXMERTTSVReader,
    NpzReader,
    NpyReader,
    HDF5Reader,
)
_WRITERS = (ParquetWriter, ViLBERTLMDBWriter, BottomUpTSVWriter, LXMERTTSVWriter, HDF5Writer)
READERS: dict[str, type[RegionReader]] = {reader.format_name: reader for reader in _READERS}
WRITERS: dict[str, type[RegionWriter]] = {writer.format_name: writer for writer in _WRITERS}

__all__ = [
    "READERS",
    "WRITERS",
    "RegionFormatError",
    "RegionReader",
    "RegionWriter",
    "check_record",
    "create_regions",
    "open_regions",
]


def open_regions(path: str | os.PathLike, image_sizes: Mapping[str, tuple[int, int]] | None = None) -> RegionReader:
    """
    Opens a source of region features, whatever its format.

    Args:
        path (`str` or `os.PathLike`):
            File or folder. The Parquet files of a folder are read as one source, those of all splits together;
            `processing.load_region_dataset` reads one split.
        image_sizes (`Mapping[str, tuple[int, int]]`, *optional*):
            `(width, height)` in pixels by image id, for formats that have none: `npz`, and `hdf5` with one kind of
            boxes.

    Raises:
        `FileNotFoundError`: there is nothing at `path`.
        `RegionFormatError`: the format is none of the known ones, or the list of images is damaged.
        `ImportError`: the format needs a library of the extra `formats`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    for reader in _READERS:
        if reader.recognizes(path):
            return reader(path, image_sizes)
    expected = "".join(f"\n- {reader.format_name}: {reader.description}" for reader in _READERS)
    raise RegionFormatError(f"{path}: expected one of these formats, got {_describe(path)}:{expected}")


def _describe(path: Path) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in islice(os.scandir(path), 1000))
        return f"a folder with {', '.join(names[:5]) or 'nothing'}{', …' if len(names) > 5 else ''}"
    with open(path, "rb") as file:
        return f"a file of {path.stat().st_size} bytes that begins with {file.read(40)!r}"


def create_regions(path: str | os.PathLike, format: str, **options) -> RegionWriter:
    """
    Starts a file or folder of region features.

    Args:
        path (`str` or `os.PathLike`): File or folder to write, which must not exist.
        format (`str`): A name from `WRITERS`.
        **options: Of the format's writer: `feature_dtype`, `column_types` (Parquet), `regions_per_image` (HDF5).

    Raises:
        `ValueError`: the format is unknown or can only be read.
        `FileExistsError`: there is something at `path`.
        `ImportError`: the format needs a library of the extra `formats`.
    """
    if format not in WRITERS:
        raise ValueError(f"`format`: expected one of {', '.join(WRITERS)}, got {format!r}.")
    return WRITERS[format](path, **options)
