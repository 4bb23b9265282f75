"""Pictures as the bottom-up-attention Faster R-CNN takes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_pil_image, load_image

from .modeling_faster_rcnn import read_original_config

# In pixels, of the resized picture: two cells of the detector's map, whatever the shape.
SHORTEST_SIDE = 32


class FasterRCNNImageProcessor(BaseImageProcessor):
    r"""
    Resizes pictures, puts their channels in the order blue, green, red, subtracts the mean, and pads a batch with 0.

    Args:
        shortest_edge (`int`, *optional*, defaults to 800):
            Pixels of the shorter side, after resizing.
        longest_edge (`int`, *optional*, defaults to 1333):
            Pixels of the longer side, at most.
        image_mean (`Sequence[float]`, *optional*, defaults to `[102.9801, 115.9465, 122.7717]`):
            Of blue, green and red, which are from 0 to 255.
        image_std (`Sequence[float]`, *optional*, defaults to `[1.0, 1.0, 1.0]`):
            What the channels are divided by then.

    Raises:
        `ValueError`: a length is smaller than 1, or the mean or the deviation are not of three channels.
    """

    model_input_names = ["pixel_values", "image_sizes", "original_sizes"]

    def __init__(
        self,
        shortest_edge: int = 800,
        longest_edge: int = 1333,
        image_mean: Sequence[float] = (102.9801, 115.9465, 122.7717),
        image_std: Sequence[float] = (1.0, 1.0, 1.0),
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not 1 <= shortest_edge <= longest_edge:
            raise ValueError(
                f"Expected 1 <= `shortest_edge` <= `longest_edge`, got {shortest_edge} and {longest_edge}."
            )
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != 3:
                raise ValueError(f"`{name}` must have three values, of blue, green and red, got {list(values)}.")
        self.shortest_edge = shortest_edge
        self.longest_edge = longest_edge
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", timeout: float | None = None) -> BatchFeature:
        """
        Args:
            images (`PIL.Image.Image`, `str`, `np.ndarray`, `torch.Tensor`, or a list of them):
                Pictures: PIL's, paths, URLs, or arrays of red, green and blue from 0 to 255, `(height, width, 3)` or
                `(3, height, width)`. The EXIF orientation of files is applied.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `"pt"` for torch tensors, `"np"` for numpy arrays.
            timeout (`float`, *optional*):
                Seconds to wait for a URL.

        Returns:
            [`BatchFeature`] with the inputs of the detector:

            - `pixel_values`: float32 of shape `(images, 3, height, width)`, those of the largest picture.
            - `image_sizes`: int64 of shape `(images, 2)`, height and width of each picture in `pixel_values`.
            - `original_sizes`: int64 of shape `(images, 2)`, height and width of each picture as it was given.

        Raises:
            `ValueError`: there is no picture, or one cannot be read. The message says which.
        """
        if not isinstance(images, (list, tuple)):
            images = [images]
        if len(images) == 0:
            raise ValueError("`images`: expected at least one picture, got none.")
        pictures = [self._read(index, image, timeout) for index, image in enumerate(images)]
        resized = [self._resize(picture) for picture in pictures]
        image_sizes = torch.tensor([picture.shape[1:] for picture in resized])
        pixel_values = torch.zeros(len(resized), 3, *image_sizes.amax(dim=0).tolist())
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        for row, picture in zip(pixel_values, resized, strict=True):
            row[:, : picture.shape[1], : picture.shape[2]] = (picture - mean) / std
        data = {
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "original_sizes": torch.tensor([picture.shape[1:] for picture in pictures]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _read(self, index: int, image: Any, timeout: float | None) -> torch.Tensor:
        """A picture as float32 `(3, height, width)`: blue, green, red from 0 to 255."""
        if isinstance(image, os.PathLike):
            image = os.fspath(image)
        if isinstance(image, str) or is_pil_image(image):
            try:
                image = np.asarray(load_image(image, timeout=timeout).convert("RGB"))
            except (OSError, ValueError, SyntaxError) as error:  # the last of damaged PNG and EXIF
                raise ValueError(f"images[{index}]: expected a picture, a path or a URL ({error}).") from error
        elif isinstance(image, torch.Tensor):
            image = image.detach().cpu().numpy()
        if not isinstance(image, np.ndarray) or image.ndim != 3 or 0 in image.shape:
            given = f"an array of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"images[{index}]: expected a picture of three channels, a path or a URL, got {given}.")
        channels_first = infer_channel_dimension_format(image, num_channels=3) == ChannelDimension.FIRST
        array = image if channels_first else image.transpose(2, 0, 1)
        return torch.from_numpy(array[::-1].astype(np.float32))

    def _resize(self, picture: torch.Tensor) -> torch.Tensor:
        height, width = picture.shape[1:]
        scale = self.shortest_edge / min(height, width)
        if scale * max(height, width) > self.longest_edge:
            scale = self.longest_edge / max(height, width)
        size = [max(SHORTEST_SIDE, int(scale * length + 0.5)) for length in (height, width)]
        return torch.nn.functional.interpolate(picture[None], size=size, mode="bilinear", align_corners=False)[0]

    @classmethod
    def from_original(cls, folder: str | os.PathLike, **kwargs) -> FasterRCNNImageProcessor:
        """
        Reads the settings of the published checkpoint's format, `config.yaml` or `config.json`.

        Args:
            kwargs: Values that take precedence.
        """
        values = read_original_config(Path(folder))
        model, sizes = values.get("model", {}), values.get("input", {})
        names = {"pixel_mean": "image_mean", "pixel_std": "image_std"}
        fields = {ours: model[name] for name, ours in names.items() if name in model}
        names = {"min_size_test": "shortest_edge", "max_size_test": "longest_edge"}
        fields |= {ours: sizes[name] for name, ours in names.items() if name in sizes}
        return cls(**(fields | kwargs))


FasterRCNNImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["FasterRCNNImageProcessor"]
