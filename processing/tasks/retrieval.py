"""Image-text retrieval: captions with their images, and what they are told apart from (paper, section 4.3)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from processing.captioned_images import CaptionedImages

from .files import read_records
from .region_examples import region_tensors

NEGATIVES = ("images", "pairs")


@dataclass(frozen=True)
class RetrievalQuery:
    """
    A text and the images that it is to find.

    Args:
        text (`str`): What is searched for.
        relevant (`list[str]`): Ids of the images that are right, at least one.
        pool (`list[str]`, *optional*): Ids of the images that it is searched among; all images by default.
    """

    text: str
    relevant: list[str]
    pool: list[str] | None = None


def read_queries(path: str | os.PathLike) -> list[RetrievalQuery]:
    """
    Reads texts with their pools, as the recall of products is measured by.

    Args:
        path (`str` or `os.PathLike`): JSON or JSON lines of `{"text": str, "relevant": [id, …], "pool": [id, …]}`, the
            last of which may be left out.

    Raises:
        ValueError: there are none; a text is empty, has no relevant images, or has one that is not in its pool.
    """
    queries = []
    for record in read_records(path):
        query = RetrievalQuery(
            record.text("text"), record.texts("relevant"), record.texts("pool") if "pool" in record else None
        )
        if not query.text.strip() or not query.relevant:
            raise record.error(f"expected a text and ids of relevant images, got {dict(record)!r:.200}.")
        outside = set(query.relevant) - set(query.relevant if query.pool is None else query.pool)
        if outside:
            raise record.error(f"expected the relevant images to be in the pool, got others: {sorted(outside)[:5]}.")
        queries.append(query)
    if not queries:
        raise ValueError(f"{path}: expected queries, got none.")
    return queries


class RetrievalExamples(torch.utils.data.Dataset):
    """
    One sample per caption, for [`RetrievalCollator`]: a dict of `captions` (list of `str`) and `records` (list of
    region records), the pairs of the sample, of which the first one matches.

    With `negatives="images"` (the paper) the caption comes with its own image and with three others; with `"pairs"`
    (the authors' release) there are four pairs: the caption with its image, a random caption with the image, the
    caption with a random image, and a hard caption with the image. All draws of a sample come from
    `np.random.default_rng([seed, epoch, index])`.

    Args:
        images ([`CaptionedImages`]): Their captions are the samples.
        negatives (`"images"` or `"pairs"`, *optional*, defaults to `"images"`): What a caption is told apart from.
        num_negatives (`int`, *optional*, defaults to 3): Number of other images, with `negatives="images"`.
        hard_negative_share (`float`, *optional*, defaults to 0):
            Probability of another image to be a hard one, with `negatives="images"`.
        seed (`int`, *optional*, defaults to 0): Not negative.

    Raises:
        ValueError: arguments are out of range, or hard negatives are needed and the dataset has none.
    """

    def __init__(
        self,
        images: CaptionedImages,
        negatives: Literal["images", "pairs"] = "images",
        num_negatives: int = 3,
        hard_negative_share: float = 0.0,
        seed: int = 0,
    ):
        if negatives not in NEGATIVES:
            raise ValueError(f"`negatives` must be one of {list(NEGATIVES)}, got {negatives!r}.")
        if num_negatives < 1:
            raise ValueError(f"`num_negatives` must be at least 1, got {num_negatives}.")
        if not 0 <= hard_negative_share <= 1:
            raise ValueError(f"`hard_negative_share` must be between 0 and 1, got {hard_negative_share}.")
        num_others = num_negatives if negatives == "images" else 1
        if len(images.usable_images) <= num_others:
            raise ValueError(
                f"{num_others} other images for each need {num_others + 1} images with captions, got "
                f"{len(images.usable_images)}."
            )
        if negatives == "pairs" or hard_negative_share > 0:
            images.check_hard_negatives(with_image_ids=True)
        self.images = images
        self.negatives = negatives
        self.num_negatives = num_negatives
        self.hard_negative_share = hard_negative_share
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Other negatives are drawn in every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def lengths(self) -> np.ndarray:
        """As [`CaptionedImages.lengths`]."""
        return self.images.lengths()

    def __getitem__(self, index: int) -> dict[str, Any]:
        images = self.images
        image, number = images.locate(index)
        caption = images.captions(image)[number]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        if self.negatives == "images":
            num_hard = int(rng.binomial(self.num_negatives, self.hard_negative_share))
            rows = [image, *images.draw_images(caption, image, self.num_negatives, rng, num_hard)]
            captions = [caption] * len(rows)
        else:
            unfit_captions = images.normalized_captions(image)
            random_caption = images.draw_caption(image, unfit_captions, rng)
            hard_caption = images.draw_hard_caption(image, unfit_captions, rng, is_from_here=True)
            rows = [image, image, *images.draw_images(caption, image, 1, rng), image]
            captions = [caption, random_caption, caption, hard_caption]
        return {"captions": captions, "records": [images.region_dataset[row] for row in rows]}


class RetrievalCollator:
    """
    Turns samples of [`RetrievalExamples`] into a batch of the arguments of an image retrieval model, `pairs` being the
    number of pairs of a sample:

    - `input_ids`, `attention_mask`, `token_type_ids`: int64 `(batch, pairs, tokens)`,
    - `region_features` float32 `(batch, pairs, regions, region_feature_size)`, `region_boxes` float32
      `(batch, pairs, regions, 4)` in [0, 1], `region_attention_mask` int64 `(batch, pairs, regions)`,
    - with `loss="choice"`, `labels` int64 `(batch,)`: all 0, the right one of the pairs; with `loss="pairs"` the first
      two dimensions of everything are one, and `itm_labels` int64 `(batch · pairs,)` is 0 for the first pair of a
      sample and 1 for the others.

    Args:
        processor (`InterBERTProcessor`): Its tokenizer and `region_feature_size` are used.
        loss (`"choice"` or `"pairs"`, *optional*, defaults to `"choice"`):
            Whether the right pair is chosen among those of its sample (paper), or each pair is classified by itself
            (release).
        max_length (`int`, *optional*, defaults to 30): Longest text in tokens, special tokens included.
        max_regions (`int`, *optional*, defaults to 100): The first regions of an image that are used.
    """

    def __init__(
        self,
        processor,
        loss: Literal["choice", "pairs"] = "choice",
        max_length: int = 30,
        max_regions: int | None = 100,
    ):
        if loss not in ("choice", "pairs"):
            raise ValueError(f"`loss` must be 'choice' or 'pairs', got {loss!r}.")
        self.processor = processor
        self.loss = loss
        self.max_length = max_length
        self.max_regions = max_regions

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        num_pairs = len(samples[0]["captions"])
        captions = [caption for sample in samples for caption in sample["captions"]]
        records = [record for sample in samples for record in sample["records"]]
        batch = dict(self.processor(text=captions, truncation=True, max_length=self.max_length, return_tensors="pt"))
        batch |= region_tensors(records, self.processor.region_feature_size, self.max_regions)
        if self.loss == "pairs":
            return batch | {"itm_labels": (torch.arange(len(captions)) % num_pairs != 0).long()}
        batch = {name: tensor.unflatten(0, (-1, num_pairs)) for name, tensor in batch.items()}
        return batch | {"labels": torch.zeros(len(samples), dtype=torch.long)}
