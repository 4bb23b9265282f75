"""Examples of a task brought together with the regions of their images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from processing.processing_interbert import pad_regions
from processing.region_dataset import RegionDataset

from .files import canonical_image_id


def rows_of_images(region_dataset: RegionDataset) -> dict[str, int]:
    """
    The row of every image by its `canonical_image_id`.

    Raises:
        ValueError: two rows are of the same image.
    """
    rows: dict[str, int] = {}
    for row, image_id in enumerate(region_dataset.dataset["image_id"]):
        first = rows.setdefault(canonical_image_id(image_id), row)
        if first != row:
            raise ValueError(f"Rows {first} and {row} of the region dataset are of the same image, {image_id!r}.")
    return rows


class ExamplesWithRegions(torch.utils.data.Dataset):
    """
    A sample is a dict of `example`, as it was given, and `record`, the region record of its image.

    Args:
        examples (sequence):
            Anything with an `image_id`, such as `VQAExample`.
        region_dataset (`RegionDataset`):
            Ids are compared as `canonical_image_id`s; further images do not matter.

    Raises:
        ValueError: an image is not in the region dataset, is there twice, or has no regions.
    """

    def __init__(self, examples: Sequence[Any], region_dataset: RegionDataset):
        self.examples = examples
        self.region_dataset = region_dataset
        rows = rows_of_images(region_dataset)
        image_ids = [canonical_image_id(example.image_id) for example in examples]
        unknown = list(dict.fromkeys(image_id for image_id in image_ids if image_id not in rows))
        if unknown:
            raise ValueError(
                f"Expected the images of all examples in the region dataset, got {len(unknown)} that are not among its "
                f"{len(rows)} images (such as {next(iter(rows), None)!r}): {unknown[:5]}."
            )
        self.rows = np.array([rows[image_id] for image_id in image_ids], dtype=np.int64)
        self._region_counts = region_dataset.region_counts()[self.rows]
        if not self._region_counts.all():
            empty = image_ids[int(self._region_counts.argmin())]
            raise ValueError(f"Expected at least one region for every example, got none for image {empty!r}.")

    def __len__(self) -> int:
        return len(self.examples)

    def lengths(self) -> np.ndarray:
        """Number of regions of every example, int64 `(len(self),)`, for [`ShuffledBatchSampler`]."""
        return self._region_counts

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"example": self.examples[index], "record": self.region_dataset[int(self.rows[index])]}


def region_tensors(
    records: Sequence[Mapping[str, Any]], region_feature_size: int, max_regions: int | None
) -> dict[str, torch.Tensor]:
    """`pad_regions` as tensors: `region_features`, `region_boxes` and `region_attention_mask` of the model."""
    return {
        name: torch.from_numpy(array) for name, array in pad_regions(records, region_feature_size, max_regions).items()
    }
