"""The pictures that regions were found in, for the scripts that show them."""

import glob
import io
from pathlib import Path

import datasets
from PIL import Image, ImageOps

from processing import RegionDataset

# What opening a picture raises, if there is none or it is damaged.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def open_picture(image_dir: str, image_id: str) -> Image.Image:
    """
    The picture of an image in RGB: the file of a folder that is named by the image id, with or without an extension.

    Raises:
        ValueError: there is none, or the id leads out of the folder.
    """
    if Path(image_id).is_absolute() or ".." in Path(image_id).parts:
        raise ValueError(f"`--image_dir`: expected an image id that names a file in the folder, got {image_id}.")
    paths = [Path(image_dir, image_id), *sorted(Path(image_dir).glob(glob.escape(image_id) + ".*"))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(f"`--image_dir` must hold a picture named {image_id} or {image_id}.*, got {image_dir}.")
    return upright(Image.open(paths[0]))


def upright(picture: Image.Image) -> Image.Image:
    """In RGB, turned as its EXIF data says: so are the pictures that boxes are of."""
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    picture.info.pop("exif", None)  # done with; where it is damaged, it would fail the next reader
    return picture


def encode_thumbnail(picture: Image.Image, size: int) -> bytes:
    """A JPEG file of the picture, at most `size` pixels high and wide."""
    picture = picture.copy()
    picture.thumbnail((size, size))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=85)
    return file.getvalue()


class Pictures:
    """
    The pictures of a region dataset.

    Args:
        regions: The dataset.
        image_dir: Folder of pictures that are named by their `image_id`. By default they are those of the dataset's
            column `image`, if it has one.
    """

    def __init__(self, regions: RegionDataset, image_dir: str | None = None):
        self.regions = regions
        self.image_dir = image_dir
        has_column = isinstance(regions.dataset.features.get("image"), datasets.Image)
        self.column = regions.dataset.select_columns("image") if has_column else None

    @property
    def are_at_hand(self) -> bool:
        """Whether there is a place where pictures would be."""
        return self.image_dir is not None or self.column is not None

    def open(self, row: int) -> Image.Image | None:
        """
        The picture of a row in RGB, or None where the dataset has none.

        Raises:
            ValueError: the folder has no picture of this name.
        """
        if self.image_dir is not None:
            return open_picture(self.image_dir, self.regions[row]["image_id"])
        picture = None if self.column is None else self.column[row]["image"]
        return None if picture is None else picture.convert("RGB")
