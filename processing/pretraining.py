"""Image-text pairs and batches for pretraining: masked words, masked regions, matching.

```python
pairs = PretrainingPairs(load_region_dataset("data/scenes", "train"), objectives=("mlm", "mom", "itm"))
collator = PretrainingCollator(processor, objectives=("mlm", "mom", "itm"))
loader = torch.utils.data.DataLoader(pairs, batch_size=64, shuffle=True, collate_fn=collator)
for epoch in range(epochs):
    pairs.set_epoch(epoch)
    ...
```

The second stage of the two-stage schedule calls `set_objectives(("msm", "mrm", "itm"))` on both. Whatever is set on the
two takes effect with the next iteration over the loader, whose workers have copies of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from .captioned_images import CaptionedImages
from .hard_negatives import normalize_caption
from .masking import (
    IGNORED_LABEL,
    MaskingVocabulary,
    mask_overlapping_regions,
    mask_regions_independently,
    mask_segments,
    mask_tokens,
)
from .processing_interbert import pad_regions
from .region_dataset import RegionDataset
from .words import MASKING_UNITS, MaskingUnit, find_word_starts, import_jieba

TEXT_OBJECTIVES = ("mlm", "msm")
REGION_OBJECTIVES = ("mom", "mrm")
# Column of the dataset that holds what is predicted for a masked region, by the model's `region_objective`.
REGION_TARGET_COLUMNS = {"hard_class": "class_ids", "soft_class": "class_probs", "feature": "features"}


@dataclass(frozen=True)
class PretrainingObjectives:
    """
    The objectives of one stage of pretraining.

    Args:
        text (`"mlm"`, `"msm"` or `None`): masked language or masked segment modeling.
        regions (`"mom"`, `"mrm"` or `None`): masked object or masked region modeling.
        matching (`bool`): image-text matching, `"itm"`.
    """

    text: Literal["mlm", "msm"] | None
    regions: Literal["mom", "mrm"] | None
    matching: bool

    @classmethod
    def parse(cls, objectives: "str | Sequence[str] | PretrainingObjectives") -> "PretrainingObjectives":
        """
        Reads `("mlm", "mom", "itm")` or `"mlm,mom,itm"`, in any order.

        Raises:
            ValueError: for an unknown name, none at all, or two that exclude each other.
        """
        if isinstance(objectives, cls):
            return objectives
        names = [name.strip() for name in objectives.split(",")] if isinstance(objectives, str) else list(objectives)
        known = (*TEXT_OBJECTIVES, *REGION_OBJECTIVES, "itm")
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ValueError(f"Objectives must be some of {list(known)}, got {unknown or names}.")
        for group in (TEXT_OBJECTIVES, REGION_OBJECTIVES, ("itm",)):
            if sum(name in group for name in names) > 1:
                raise ValueError(f"Only one of the objectives {list(group)} can be used at a time, got {names}.")
        text = next((name for name in names if name in TEXT_OBJECTIVES), None)
        regions = next((name for name in names if name in REGION_OBJECTIVES), None)
        return cls(text, regions, "itm" in names)


class PretrainingPairs(torch.utils.data.Dataset):
    """
    One sample per (image, caption). With the objective `"itm"`, a share of the samples are negatives: the caption is
    replaced by one of another image, never by one whose text is also a caption of this image. Of the negatives

    - a share are hard: a caption from the image's list in the column `hard_negatives`, all equally likely; a random
      one where that list is empty,
    - a share are in-batch: the caption of another sample of the batch, which [`PretrainingCollator`] puts in; here such
      a sample still matches,
    - the others are random: any caption of the dataset.

    A sample is a dict for [`PretrainingCollator`]:

    - `index` and `epoch` (`int`), `record` (the region record of the image),
    - `caption` (`str`), `itm_label` (0 = the pair matches, 1 = it does not, `None` without `"itm"`),
    - `own_caption` (`str`): the caption that the sample has where it matches,
    - `unfit_captions` (set of `str`, or `None`): of a sample that is to become an in-batch negative, the captions of
      its image, normalized,
    - `rng`: the generator that the collator goes on drawing from.

    All draws of a sample come from `np.random.default_rng([seed, epoch, index])`: but for the captions of in-batch
    negatives, they depend neither on the order of samples, nor on the batch, the worker or the process.

    Args:
        region_dataset (`RegionDataset`):
            Images without captions and images without regions are skipped; `num_skipped_images` counts them.
        caption_column (`str`):
            A column of strings or of lists of strings.
        seed (`int`):
            Not negative.
        negative_probability (`float`):
            Share of negatives while `"itm"` is among the objectives.
        objectives (`str` or sequence of `str`):
            The objectives of the current stage, the same as the collator's.
        fixed_epoch (`int`, optional):
            For validation: samples are those of this epoch, whatever `set_epoch` says. (Loaders prepared by Accelerate
            call `set_epoch` by themselves, with the number of times that they were iterated.)
        hard_negative_share, in_batch_negative_share (`float`):
            Of the negatives, together at most 1.
        hard_negative_column (`str`):
            A column of lists of strings, as `examples/mine_hard_negatives.py` writes it; only needed for hard
            negatives.
        max_regions (`int`, optional):
            Of each image, only so many regions count in `lengths`: those that the collator keeps.

    Raises:
        ValueError: for a missing column, a dataset without captions, captions of fewer than two images where negatives
            are wanted, or shares that are none.
    """

    def __init__(
        self,
        region_dataset: RegionDataset,
        caption_column: str = "captions",
        seed: int = 0,
        negative_probability: float = 0.5,
        objectives: str | Sequence[str] | PretrainingObjectives = ("mlm", "mom", "itm"),
        fixed_epoch: int | None = None,
        hard_negative_share: float = 0.0,
        in_batch_negative_share: float = 0.0,
        hard_negative_column: str = "hard_negatives",
        max_regions: int | None = None,
    ):
        if seed < 0:
            raise ValueError(f"`seed` must not be negative, got {seed}.")
        if not 0 <= negative_probability <= 1:
            raise ValueError(f"`negative_probability` must be between 0 and 1, got {negative_probability}.")
        self.images = CaptionedImages(region_dataset, caption_column, hard_negative_column, max_regions)
        self.seed = seed
        self.negative_probability = negative_probability
        self.fixed_epoch = fixed_epoch
        self.epoch = 0 if fixed_epoch is None else fixed_epoch
        self.set_objectives(objectives)
        self.set_negative_shares(hard_negative_share, in_batch_negative_share)

    def set_epoch(self, epoch: int) -> None:
        """Other negatives and masks are drawn in every epoch."""
        if self.fixed_epoch is None:
            self.epoch = epoch

    def set_objectives(self, objectives: str | Sequence[str] | PretrainingObjectives) -> None:
        """Begins another stage: whether negatives are drawn depends on the objectives."""
        self.objectives = PretrainingObjectives.parse(objectives)
        num_images = len(self.usable_images())
        if self.objectives.matching and self.negative_probability > 0 and num_images < 2:
            raise ValueError(f"Negatives need captions of at least 2 images, got {num_images}.")

    def set_negative_shares(self, hard_negative_share: float = 0.0, in_batch_negative_share: float = 0.0) -> None:
        """How many of the negatives are hard and how many in-batch, from now on."""
        for name, share in (
            ("hard_negative_share", hard_negative_share),
            ("in_batch_negative_share", in_batch_negative_share),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {share}.")
        if hard_negative_share + in_batch_negative_share > 1:
            raise ValueError(
                "`hard_negative_share` and `in_batch_negative_share` must add up to at most 1, got "
                f"{hard_negative_share} and {in_batch_negative_share}."
            )
        if hard_negative_share > 0:
            self.images.check_hard_negatives()
        self.hard_negative_share = hard_negative_share
        self.in_batch_negative_share = in_batch_negative_share

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_skipped_images(self) -> int:
        """Number of images without captions or regions."""
        return self.images.num_skipped_images

    def usable_images(self) -> np.ndarray:
        """Rows of the images that have captions and regions, int64 `(images,)`."""
        return self.images.usable_images

    def lengths(self) -> np.ndarray:
        """
        How long each sample is, for [`ShuffledBatchSampler`]: number of regions, and characters of its own caption.

        Returns:
            int64 array of shape `(len(self), 2)`.
        """
        return self.images.lengths()

    def sample_captions(self, number: int) -> list[str]:
        """At most so many captions, spread evenly over the dataset."""
        places = [self.images.locate(index) for index in range(0, len(self), -(-len(self) // number))]
        return [self.images.captions(image)[caption_number] for image, caption_number in places]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Index {index} is out of range for {len(self)} pairs.")
        index = int(index) % len(self)
        image, caption_number = self.images.locate(index)
        captions = self.images.captions(image)
        rng = np.random.default_rng([self.seed, self.epoch, index])
        sample = {
            "index": index,
            "epoch": self.epoch,
            "record": self.images.region_dataset[image],
            "caption": captions[caption_number],
            "itm_label": 0 if self.objectives.matching else None,
            "own_caption": captions[caption_number],
            "unfit_captions": None,
            "rng": rng,
        }
        if self.objectives.matching and rng.random() < self.negative_probability:
            # Keeps out the image's own captions, and those of other images that say the same.
            unfit_captions = self.images.normalized_captions(image)
            kind = self._draw_kind_of_negative(rng)
            if kind == "in_batch":
                sample["unfit_captions"] = unfit_captions
            else:
                draw = self.images.draw_hard_caption if kind == "hard" else self.images.draw_caption
                sample["caption"] = draw(image, unfit_captions, rng)
                sample["itm_label"] = 1
        return sample

    def _draw_kind_of_negative(self, rng: np.random.Generator) -> Literal["hard", "in_batch", "random"]:
        if self.hard_negative_share == self.in_batch_negative_share == 0:
            return "random"  # without a draw
        draw = rng.random()
        if draw < self.hard_negative_share:
            return "hard"
        return "in_batch" if draw < self.hard_negative_share + self.in_batch_negative_share else "random"


class PretrainingCollator:
    """
    Turns samples of [`PretrainingPairs`] into a batch of the model's arguments:

    - `input_ids`, `attention_mask`, `token_type_ids`: int64 `(batch, tokens)`,
    - `region_features` float32 `(batch, regions, region_feature_size)`, zeros where a region is masked,
      `region_boxes` float32 `(batch, regions, 4)` in [0, 1], `region_attention_mask` int64 `(batch, regions)`,
    - with a text objective, `labels` int64 `(batch, tokens)`: the original id of masked tokens, −100 elsewhere,
    - with a region objective, `region_targets`: int64 `(batch, regions)` class ids, float32
      `(batch, regions, classes)` probabilities or float32 `(batch, regions, region_feature_size)` original features;
      and `region_target_mask` int64 `(batch, regions)`: 1 = masked and scored,
    - with `"itm"`, `itm_labels` int64 `(batch,)`: 0 = the pair matches, 1 = it does not.

    Negative pairs are masked like positive ones, or masks would give their label away, but nothing masked in them is
    scored.

    A sample that is to become an in-batch negative takes the own caption of another sample of the batch, all equally
    likely that do not say the same as a caption of its image. Where there is none, it goes on matching.

    Args:
        processor (`InterBERTProcessor`):
            Its tokenizer and `region_feature_size` are used.
        objectives (`str` or sequence of `str`):
            At most one of `"mlm"`, `"msm"`, at most one of `"mom"`, `"mrm"`, and `"itm"`.
        region_objective (`"hard_class"`, `"soft_class"` or `"feature"`):
            What masked regions are scored against: `class_ids` (−1 is not scored), `class_probs` or `features` of the
            dataset.
        conditional_masking (`bool`):
            With a text and a region objective, masks only one modality of a sample, so that a masked word is never to
            be read off a masked region. The modality alternates by sample and by epoch.
        text_mask_probability (`float`, optional):
            Share of tokens that are masked (MLM) or begin a masked segment (MSM); by default the paper's 0.15 and 0.10.
        masking_unit (`"token"`, `"word"` or `"jieba"`):
            What is masked as a whole: tokens, words between white space and punctuation, or Chinese words.
        similar_words (mapping, *optional*):
            With it, words become similar ones in place of `[MASK]`, see [`read_similar_words`]; those that
            `masking_unit` divides are never looked up.
        region_mask_probability (`float`):
            Share of regions that are masked (MOM) or masked together with what overlaps them (MRM).
        max_length (`int`):
            Longest text in tokens, special tokens included.
        max_regions (`int`, optional):
            The first regions of an image up to this number are kept; `None` keeps all.
    """

    def __init__(
        self,
        processor,
        objectives: str | Sequence[str] | PretrainingObjectives = ("mlm", "mom", "itm"),
        region_objective: Literal["hard_class", "soft_class", "feature"] = "hard_class",
        conditional_masking: bool = True,
        text_mask_probability: float | None = None,
        region_mask_probability: float = 0.15,
        max_length: int = 36,
        max_regions: int | None = 36,
        masking_unit: MaskingUnit = "token",
        similar_words: Mapping[tuple[int, ...], np.ndarray] | None = None,
    ):
        if masking_unit not in MASKING_UNITS:
            raise ValueError(f"`masking_unit` must be one of {list(MASKING_UNITS)}, got {masking_unit!r}.")
        if masking_unit != "token" and not processor.tokenizer.is_fast:
            raise ValueError(
                f"`masking_unit={masking_unit!r}` needs a fast tokenizer, got {type(processor.tokenizer)}."
            )
        if processor.tokenizer.padding_side != "right":
            raise ValueError(
                "The model reads texts from position 0: expected a tokenizer with `padding_side` 'right', got "
                f"{processor.tokenizer.padding_side!r}."
            )
        if region_objective not in REGION_TARGET_COLUMNS:
            raise ValueError(
                f"`region_objective` must be one of {list(REGION_TARGET_COLUMNS)}, got {region_objective!r}."
            )
        if not 0 <= region_mask_probability <= 1:
            raise ValueError(f"`region_mask_probability` must be between 0 and 1, got {region_mask_probability}.")
        if max_length < 3:
            raise ValueError(f"`max_length` must be at least 3, a token between two special ones, got {max_length}.")
        if max_regions is not None and max_regions < 1:
            raise ValueError(f"`max_regions` must be at least 1, got {max_regions}.")
        self.processor = processor
        self.region_objective = region_objective
        self.conditional_masking = conditional_masking
        self.region_mask_probability = region_mask_probability
        self.max_length = max_length
        self.max_regions = max_regions
        self.masking_unit = masking_unit
        self.vocabulary = MaskingVocabulary.from_tokenizer(processor.tokenizer, similar_words)
        # A lookup by id also finds special tokens that stand in the text itself, such as [UNK].
        special_ids = processor.tokenizer.all_special_ids
        self._is_special = np.zeros(max(*special_ids, self.vocabulary.replacement_token_ids[-1]) + 1, dtype=bool)
        self._is_special[special_ids] = True
        if masking_unit == "jieba":
            # Workers, which are started anew in every epoch, come with the dictionary that takes seconds to read.
            import_jieba().initialize()
        self.set_objectives(objectives)
        self.set_text_mask_probability(text_mask_probability)

    def set_objectives(self, objectives: str | Sequence[str] | PretrainingObjectives) -> None:
        """Begins another stage, such as the second of the two-stage schedule."""
        self.objectives = PretrainingObjectives.parse(objectives)

    def set_text_mask_probability(self, text_mask_probability: float | None) -> None:
        """Another rate from now on, for a schedule; `None` is the paper's for the objective."""
        if text_mask_probability is not None and not 0 <= text_mask_probability <= 1:
            raise ValueError(f"`text_mask_probability` must be between 0 and 1, got {text_mask_probability}.")
        self.text_mask_probability = text_mask_probability

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if any((sample["itm_label"] is not None) != self.objectives.matching for sample in samples):
            raise ValueError(
                f"Pairs and collator must have the same objectives; the collator has {self.objectives}, the pairs come "
                f"with {'no ' if self.objectives.matching else ''}matching labels."
            )
        samples = self._with_in_batch_negatives(samples)
        records = [sample["record"] for sample in samples]
        batch = self.tokenize([sample["caption"] for sample in samples])
        word_starts = batch.pop("word_starts", None)
        batch.update(pad_regions(records, self.processor.region_feature_size, self.max_regions))
        if self.objectives.text is not None:
            batch["labels"] = self.mask_text(batch, samples, word_starts)
        if self.objectives.regions is not None:
            batch["region_targets"], batch["region_target_mask"] = self.mask_regions(batch, samples)
        if self.objectives.matching:
            batch["itm_labels"] = np.array([sample["itm_label"] for sample in samples], dtype=np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    @staticmethod
    def _with_in_batch_negatives(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The samples, of which those with `unfit_captions` are replaced by negatives."""
        if all(sample["unfit_captions"] is None for sample in samples):
            return samples
        normalized = [normalize_caption(sample["own_caption"]) for sample in samples]
        replaced = []
        for sample in samples:
            if sample["unfit_captions"] is not None:
                # One draw in any case: the masks that are drawn next must not depend on the batch.
                draw = sample["rng"].random()
                # Samples of the same image have captions of the same image, and do not fit either.
                fitting = [i for i, caption in enumerate(normalized) if caption not in sample["unfit_captions"]]
                if fitting:
                    chosen = samples[fitting[int(draw * len(fitting))]]
                    sample = sample | {"caption": chosen["own_caption"], "itm_label": 1}
            replaced.append(sample)
        return replaced

    def tokenize(self, captions: list[str]) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask` and `token_type_ids` of a list of captions, int64 `(batch, tokens)`, and
        `word_starts` where words are masked as a whole, bool `(batch, tokens)`."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        encoding = self.processor.tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_token_type_ids=True,
            return_offsets_mapping=self.masking_unit == "jieba",
        )
        # Faster here than `return_tensors="np"`.
        batch = {name: np.array(encoding[name], dtype=np.int64) for name in names}
        if self.masking_unit != "token" and self.objectives.text is not None:
            batch["word_starts"] = find_word_starts(captions, encoding, self.masking_unit)
        return batch

    def _is_masked(self, sample: dict[str, Any], modality: Literal["text", "regions"]) -> bool:
        objectives = self.objectives
        if not self.conditional_masking or objectives.text is None or objectives.regions is None:
            return True
        return modality == ("text", "regions")[(sample["index"] + sample["epoch"]) % 2]

    def mask_text(
        self, batch: dict[str, np.ndarray], samples: list[dict[str, Any]], word_starts: np.ndarray | None = None
    ) -> np.ndarray:
        """Masks `input_ids` of the batch in place. Returns `labels`, int64 `(batch, tokens)`."""
        mask = mask_tokens if self.objectives.text == "mlm" else mask_segments
        rate = {} if self.text_mask_probability is None else {"probability": self.text_mask_probability}
        input_ids = batch["input_ids"]
        labels = np.full_like(input_ids, IGNORED_LABEL)
        is_special = self._is_special[input_ids]
        # Without the padding: the draws of a sample must not depend on the longest text of its batch.
        lengths = batch["attention_mask"].sum(axis=1)
        for i, sample in enumerate(samples):
            if not self._is_masked(sample, "text"):
                continue
            text = slice(lengths[i])
            input_ids[i, text], text_labels = mask(
                input_ids[i, text],
                is_special[i, text],
                self.vocabulary,
                sample["rng"],
                word_starts=None if word_starts is None else word_starts[i, text],
                **rate,
            )
            if sample["itm_label"] != 1:
                labels[i, text] = text_labels
        return labels

    def mask_regions(
        self, batch: dict[str, np.ndarray], samples: list[dict[str, Any]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks `region_features` of the batch in place. Returns `region_targets`, by `region_objective`, and
        `region_target_mask`, int64 `(batch, regions)`."""
        targets = self._region_targets(batch, samples)
        masked = np.zeros(batch["region_attention_mask"].shape, dtype=bool)
        is_scored = np.zeros_like(masked)
        for i, sample in enumerate(samples):
            if not self._is_masked(sample, "regions"):
                continue
            boxes = sample["record"]["boxes"][: self.max_regions]
            probability = self.region_mask_probability
            if self.objectives.regions == "mom":
                masked[i, : len(boxes)] = mask_regions_independently(len(boxes), sample["rng"], probability)
            else:
                masked[i, : len(boxes)] = mask_overlapping_regions(boxes, sample["rng"], probability)
            if sample["itm_label"] != 1:
                is_scored[i] = masked[i]
        batch["region_features"][masked] = 0
        if self.region_objective == "hard_class":
            is_scored &= targets >= 0
        return targets, is_scored.astype(np.int64)

    def _region_targets(self, batch: dict[str, np.ndarray], samples: list[dict[str, Any]]) -> np.ndarray:
        if self.region_objective == "feature":
            return batch["region_features"].copy()
        column = REGION_TARGET_COLUMNS[self.region_objective]
        for sample in samples:
            if column not in sample["record"]:
                raise ValueError(
                    f"`region_objective={self.region_objective!r}` needs the column {column!r}, the dataset has only "
                    f"{list(sample['record'])}."
                )
        shape = batch["region_attention_mask"].shape
        if self.region_objective == "hard_class":
            targets = np.full(shape, -1, dtype=np.int64)
        else:
            targets = np.zeros((*shape, samples[0]["record"][column].shape[1]), dtype=np.float32)
        for i, sample in enumerate(samples):
            values = sample["record"][column][: self.max_regions]
            targets[i, : len(values)] = values
        return targets
