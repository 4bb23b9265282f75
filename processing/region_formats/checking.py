"""Whether a region record is fit for a model: the processor's rules, and those for what the processor does not see."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from processing.processing_interbert import pad_regions


def check_record(record: Mapping[str, Any], region_feature_size: int | None = None):
    """
    Checks one region record, as a [`RegionReader`] or a [`RegionDataset`] gives it.

    Args:
        record (`Mapping[str, Any]`):
            With `image_id`, `width`, `height` (pixels; both 1 for normalized boxes), `boxes` `(n, 4)` and `features`
            `(n, region_feature_size)`; `class_ids`, `class_scores` and `class_probs` where it has them.
        region_feature_size (`int`, *optional*):
            Expected width of the features. By default any.

    Raises:
        `ValueError`: as in [`pad_regions`]; also if `class_ids`, `class_scores` or `class_probs` differ in number from
        the boxes, if class ids are no integers from −1 on, or if scores or probabilities are not finite. The message
        names the image, the region, what was expected and what was found.
    """
    image_id = record.get("image_id")
    if not isinstance(image_id, str) or not image_id:
        raise ValueError(f"expected an image_id, got {image_id!r}.")
    features_shape = np.shape(record.get("features"))
    if region_feature_size is None:
        region_feature_size = features_shape[-1] if len(features_shape) == 2 else "any"
    try:
        pad_regions([record], region_feature_size)
    except ValueError as error:
        # The processor counts the images of its batch, which is this one alone.
        raise ValueError(str(error).replace(f"regions[0] (image_id {image_id})", f"image_id {image_id}", 1)) from error

    num_boxes = len(record["boxes"])
    for name, num_dimensions in (("class_ids", 1), ("class_scores", 1), ("class_probs", 2)):
        if name not in record:
            continue
        values = np.asarray(record[name])
        if values.ndim != num_dimensions or len(values) != num_boxes:
            expected = f"({num_boxes},)" if num_dimensions == 1 else f"({num_boxes}, classes + 1)"
            raise ValueError(f"image_id {image_id}: expected {name} of shape {expected}, got {values.shape}.")
        if name == "class_ids":
            expected, right = "an integer from -1 on", (values >= -1) & (values.dtype.kind in "iu")
        else:
            expected, right = "finite numbers", np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not right.all():
            region = np.argmin(right)
            raise ValueError(
                f"image_id {image_id}, region {region}: expected {name} to be {expected}, got {values[region]}."
            )
