"""Captions by image id, from the files in which the field keeps them:

- `.json` of Karpathy (`dataset_flickr8k.json`, `dataset_flickr30k.json`, `dataset_coco.json`): `images`, each with
  `filename`, `split`, and `sentences` with `raw`,
- `.json` of COCO (`captions_train2014.json`): `images` with `id`; `annotations` with `image_id` and `caption`,
- `.json` with `{image_id: caption or list of captions}`,
- `.json` (a list of objects), `.jsonl`, `.csv`, `.tsv`: `image_id`, `caption` or (not in tables) the list `captions`,
  optionally `split`,
- `.token` and `.txt` of Flickr (`results_20130124.token`): lines `1000092795.jpg#0<TAB>caption`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .files import Record, canonical_image_id, list_records, numbered_lines, read_json, read_records


@dataclass(frozen=True)
class ImageCaptions:
    """
    Args:
        image_id (`str`): as `canonical_image_id` has it.
        captions (`list[str]`): without white space around them.
        split (`str`, *optional*): Karpathy's `"train"`, `"restval"`, `"val"`, `"test"`, or what the file says.
    """

    image_id: str
    captions: list[str]
    split: str | None = None


def read_captions(path: str | os.PathLike, split: str | None = None) -> dict[str, list[str]]:
    """
    Reads the captions of a file of any of the formats above.

    Args:
        path (`str` or `os.PathLike`):
            The format is told from the extension, and from the keys of a `.json` file.
        split (`str`, *optional*):
            Only images of this split, or of several: `"train+restval"` is the training set that the field uses on
            COCO. All images by default.

    Returns:
        `dict[str, list[str]]`: captions by image id, in the order of the file. Ids are `canonical_image_id`s: look up
        the images of a region dataset by the same.

    Raises:
        ValueError: an unknown extension; a broken line or record, a missing field or an unknown image id, with its
            place; a split that the file does not have.
    """
    images = read_image_captions(path)
    if split is not None:
        wanted = split.split("+")
        known = {image.split for image in images}
        if not known.issuperset(wanted):
            names = sorted(name for name in known if name is not None)
            raise ValueError(f"{path}: expected one of the splits {names}, got {split!r}.")
        images = [image for image in images if image.split in wanted]
    return {image.image_id: image.captions for image in images}


def read_image_captions(path: str | os.PathLike) -> list[ImageCaptions]:
    """
    The captions of a file with their splits: each image once, in the order in which the file first names it. See
    [`read_captions`].
    """
    images: dict[str, ImageCaptions] = {}
    for where, new in _read_any(path):
        image = images.setdefault(new.image_id, ImageCaptions(new.image_id, [], new.split))
        if image.split != new.split:
            raise ValueError(
                f"{where}: expected image {image.image_id!r} in one split, got {image.split!r} and {new.split!r}."
            )
        image.captions.extend(caption.strip() for caption in new.captions)
    return list(images.values())


# Captions after their place in the file. One image may come in many parts.
_Parts = Iterator[tuple[str, ImageCaptions]]


def _read_any(path: str | os.PathLike) -> _Parts:
    extension = Path(path).suffix.lower()
    if extension in (".token", ".txt"):
        return _read_flickr(path)
    if extension != ".json":
        return _read_plain(read_records(path))
    content = read_json(path)
    if isinstance(content, list):
        return _read_plain(list_records(content, str(path)))
    content = Record(content, str(path))
    if "images" not in content:
        return _read_mapping(content)
    return _read_coco(content) if "annotations" in content else _read_karpathy(content)


def _read_karpathy(content: Record) -> _Parts:
    for image in content.records("images"):
        captions = [sentence.text("raw") for sentence in image.records("sentences")]
        yield image.where, ImageCaptions(canonical_image_id(image["filename"]), captions, image["split"])


def _read_coco(content: Record) -> _Parts:
    known = {image["id"] for image in content.records("images")}
    for annotation in content.records("annotations"):
        image_id = annotation["image_id"]
        if image_id not in known:
            raise annotation.error(f"expected the id of one of the file's {len(known)} images, got {image_id!r}.")
        yield annotation.where, ImageCaptions(canonical_image_id(image_id), [annotation.text("caption")])


def _read_mapping(content: Record) -> _Parts:
    for image_id, captions in content.items():
        captions = [captions] if isinstance(captions, str) else content.texts(image_id)
        yield content.where, ImageCaptions(canonical_image_id(image_id), captions)


def _read_plain(records: Iterator[Record]) -> _Parts:
    for record in records:
        captions = record.texts("captions") if "captions" in record else [record.text("caption")]
        yield record.where, ImageCaptions(canonical_image_id(record["image_id"]), captions, record.get("split"))


def _read_flickr(path: str | os.PathLike) -> _Parts:
    for where, line in numbered_lines(path):
        name, tab, caption = line.partition("\t")
        image_name, sharp, number = name.rpartition("#")
        if not (tab and sharp and number.isdigit()):
            raise ValueError(f"{where}: expected 'IMAGE.jpg#NUMBER<TAB>CAPTION', got {line[:80]!r}.")
        yield where, ImageCaptions(canonical_image_id(image_name), [caption])
