"""Images with their captions, and what does not belong to them: captions and images that a pair is told apart from."""

from collections.abc import Set
from functools import cached_property

import numpy as np

from .hard_negatives import normalize_caption
from .region_dataset import RegionDataset

MAX_NEGATIVE_DRAWS = 100


class CaptionedImages:
    """
    The captions of a region dataset, numbered image by image, and draws of captions and images that do not match.

    Args:
        region_dataset (`RegionDataset`):
            Images without captions and images without regions are skipped; `num_skipped_images` counts them.
        caption_column (`str`): A column of strings or of lists of strings.
        hard_negative_column (`str`):
            A column of lists of strings, as `examples/mine_hard_negatives.py` writes it beside
            `{hard_negative_column}_image_ids`; both are only needed for hard negatives.
        max_regions (`int`, *optional*): Of each image, only so many regions count in `lengths`.

    Raises:
        ValueError: for a missing caption column, or a dataset without captions.
    """

    def __init__(
        self,
        region_dataset: RegionDataset,
        caption_column: str = "captions",
        hard_negative_column: str = "hard_negatives",
        max_regions: int | None = None,
    ):
        self.region_dataset = region_dataset
        self.caption_column = caption_column
        self.hard_negative_column = hard_negative_column
        self.max_regions = max_regions
        counts = region_dataset.caption_counts(caption_column)
        counts[region_dataset.region_counts() == 0] = 0
        # Captions of image i are numbered from `_first_captions[i]` up to, not including, `_first_captions[i + 1]`.
        self._first_captions = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        self.num_skipped_images = int((counts == 0).sum())
        if len(self) == 0:
            raise ValueError(f"None of {len(counts)} images has regions and captions in column {caption_column!r}.")

    def __len__(self) -> int:
        """Number of captions."""
        return int(self._first_captions[-1])

    @cached_property
    def usable_images(self) -> np.ndarray:
        """Rows of the images that have captions and regions, int64 `(images,)`."""
        return np.flatnonzero(np.diff(self._first_captions))

    def lengths(self) -> np.ndarray:
        """
        How long each caption with its image is, for [`ShuffledBatchSampler`]: number of regions, and characters.

        Returns:
            int64 array of shape `(len(self), 2)`.
        """
        caption_counts = self.region_dataset.caption_counts(self.caption_column)
        used_counts = np.diff(self._first_captions)
        is_used = np.repeat(used_counts > 0, caption_counts)
        caption_lengths = self.region_dataset.caption_lengths(self.caption_column)[is_used]
        region_counts = np.minimum(self.region_dataset.region_counts(), self.max_regions or np.inf).astype(np.int64)
        return np.stack([np.repeat(region_counts, used_counts), caption_lengths], axis=1)

    def locate(self, index: int) -> tuple[int, int]:
        """The image of a caption, as its row, and which of its captions it is."""
        image = int(self._first_captions.searchsorted(index, side="right")) - 1
        return image, index - int(self._first_captions[image])

    def captions(self, image: int) -> list[str]:
        """Captions of the image in this row."""
        return self.region_dataset.captions(image, self.caption_column)

    def normalized_captions(self, image: int) -> set[str]:
        """What else may not be said of other images, if it is to be told apart from them."""
        return {normalize_caption(caption) for caption in self.captions(image)}

    def check_hard_negatives(self, with_image_ids: bool = False) -> None:
        """
        Args:
            with_image_ids (`bool`, *optional*, defaults to `False`):
                Whether it must be known which images they are captions of.

        Raises:
            ValueError: the dataset has none.
        """
        columns = [self.hard_negative_column]
        if with_image_ids:
            columns.append(f"{self.hard_negative_column}_image_ids")
        missing = [name for name in columns if name not in self.region_dataset.column_names]
        if missing:
            is_old = self.hard_negative_column not in missing
            remedy = f" Mine them again, without the column {self.hard_negative_column!r}." if is_old else ""
            raise ValueError(
                f"Hard negatives need the column {missing[0]!r}, which examples/mine_hard_negatives.py adds, the "
                f"dataset has only {self.region_dataset.column_names}.{remedy}"
            )

    def draw_caption(self, image: int, unfit_captions: Set[str], rng: np.random.Generator) -> str:
        """A random caption that is none of the unfit ones, which are normalized."""
        for _ in range(MAX_NEGATIVE_DRAWS):
            other_image, number = self.locate(int(rng.integers(len(self))))
            candidate = self.captions(other_image)[number]
            if normalize_caption(candidate) not in unfit_captions:
                return candidate
        raise ValueError(
            f"Found no caption of another image that differs from the captions of row {image} in "
            f"{MAX_NEGATIVE_DRAWS} draws: {self.captions(image)}."
        )

    def draw_hard_caption(
        self, image: int, unfit_captions: Set[str], rng: np.random.Generator, is_from_here: bool = False
    ) -> str:
        """
        One of the hard negatives of an image, all equally likely; a random caption where it has none.

        Args:
            is_from_here (`bool`, *optional*, defaults to `False`):
                Only of images of this dataset. They were mined in a whole split, of which it may be a part.
        """
        captions = self.region_dataset.captions(image, self.hard_negative_column)
        if is_from_here:
            image_ids = self.region_dataset.captions(image, f"{self.hard_negative_column}_image_ids")
            captions = [caption for caption, other in zip(captions, image_ids, strict=True) if other in self._rows]
        candidates = [candidate for candidate in captions if normalize_caption(candidate) not in unfit_captions]
        if not candidates:
            return self.draw_caption(image, unfit_captions, rng)
        return candidates[int(rng.integers(len(candidates)))]

    def draw_images(
        self, caption: str, image: int, count: int, rng: np.random.Generator, num_hard: int = 0
    ) -> list[int]:
        """
        Rows of different images that do not have this caption.

        Args:
            caption (`str`): Of the image.
            image (`int`): Its row, which is not drawn.
            count (`int`): How many are drawn.
            num_hard (`int`):
                Of these, so many are images that the image's hard negatives are captions of, as far as there are any.
        """
        text = normalize_caption(caption)
        drawn: list[int] = []
        if num_hard:
            image_ids = dict.fromkeys(self.region_dataset.captions(image, f"{self.hard_negative_column}_image_ids"))
            candidates = [self._rows[image_id] for image_id in image_ids if image_id in self._rows]
            for candidate in rng.permutation(candidates).tolist() if candidates else []:
                if len(drawn) < num_hard and text not in self.normalized_captions(candidate):
                    drawn.append(candidate)
        for _ in range(MAX_NEGATIVE_DRAWS):
            if len(drawn) == count:
                return drawn
            candidate = int(self.usable_images[int(rng.integers(len(self.usable_images)))])
            if candidate != image and candidate not in drawn and text not in self.normalized_captions(candidate):
                drawn.append(candidate)
        raise ValueError(
            f"Found only {len(drawn)} of {count} images without the caption {caption!r} in {MAX_NEGATIVE_DRAWS} draws."
        )

    @cached_property
    def _rows(self) -> dict[str, int]:
        image_ids = self.region_dataset.image_ids
        return {image_ids[row]: row for row in self.usable_images.tolist()}
