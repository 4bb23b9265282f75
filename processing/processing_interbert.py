"""InterBERT processor: BERT's WordPiece tokenizer for the text, padding and box normalization for the regions."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import TextKwargs

# What this file imports relatively is saved beside it: so the pipelines are part of every checkpoint with a processor.
from .pipelines_interbert import RegionPipeline  # noqa: F401
from .region_extractors import LIMITS, RegionExtractor, detector_settings, load_region_extractor, read_pictures

# The length of BERT's position table; tokenizers that were built from a vocabulary alone know no limit of their own.
MAX_TEXT_LENGTH = 512

# Detectors round and regress past the border: boxes up to this many pixels outside the image are clipped to it.
BOX_TOLERANCE = 1.0
# The same of normalized boxes, as a share of the image's width or height: a pixel would be the whole image there.
NORMALIZED_BOX_TOLERANCE = 0.01

REGION_KEYS = ("features", "boxes", "width", "height")

# Whose positions each module of the model attends over, in their order.
MODULE_MODALITIES = {"interaction": ("image", "text"), "text": ("text",), "image": ("image",)}


def _label(index: int, item: Mapping[str, Any]) -> str:
    image_id = item.get("image_id")
    return f"regions[{index}]" if image_id is None else f"regions[{index}] (image_id {image_id})"


def _to_float_array(value: Any, key: str, index: int, item: Mapping[str, Any]) -> np.ndarray:
    """`value` as a numpy array of a float dtype. Float arrays are passed on as they are, without a copy."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().float().numpy()
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{_label(index, item)}: expected `{key}` to hold numbers in a regular array, got {type(value).__name__} "
            f"({error})."
        ) from error


def _read_regions(
    index: int, item: Mapping[str, Any], region_feature_size: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The features, boxes, width and height of one image, with their shapes checked."""
    if not isinstance(item, Mapping):
        raise ValueError(f"regions[{index}]: expected a dict with the keys {REGION_KEYS}, got {type(item).__name__}.")
    missing = [key for key in REGION_KEYS if key not in item]
    if missing:
        raise ValueError(
            f"{_label(index, item)}: expected the keys {REGION_KEYS}, got {tuple(item)}: {', '.join(missing)} missing."
        )

    features = _to_float_array(item["features"], "features", index, item)
    boxes = _to_float_array(item["boxes"], "boxes", index, item)
    if features.shape[:1] == (0,) or boxes.shape[:1] == (0,):
        raise ValueError(
            f"{_label(index, item)}: expected at least one region, got features of shape {features.shape} and boxes "
            f"of shape {boxes.shape}."
        )
    if features.ndim != 2 or features.shape[1] != region_feature_size:
        raise ValueError(
            f"{_label(index, item)}: expected features of shape (regions, {region_feature_size}), got {features.shape}."
        )
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{_label(index, item)}: expected boxes of shape (regions, 4), got {boxes.shape}.")
    if len(features) != len(boxes):
        raise ValueError(
            f"{_label(index, item)}: expected one box for each feature vector, got {len(features)} feature vectors "
            f"and {len(boxes)} boxes."
        )

    sizes = []
    for key in ("width", "height"):
        size = _to_float_array(item[key], key, index, item)
        if size.ndim != 0 or not 0 < size < math.inf:
            raise ValueError(f"{_label(index, item)}: expected a {key} > 0 in pixels, got {item[key]}.")
        sizes.append(float(size))
    return features, boxes, *sizes


def pad_regions(
    regions: Sequence[Mapping[str, Any]], region_feature_size: int, max_regions: int | None = None
) -> dict[str, np.ndarray]:
    """
    Checks the regions of a batch of images, brings their boxes from pixels to [0, 1] and pads them to the largest
    number of regions in the batch.

    Args:
        regions (`Sequence[Mapping[str, Any]]`):
            One dict for each image; values are numpy arrays, CPU or GPU tensors or lists, and other keys are ignored:

            - `features`: float of shape `(num_regions, region_feature_size)`.
            - `boxes`: float of shape `(num_regions, 4)`, `x1, y1, x2, y2` in pixels with `x1 <= x2` and `y1 <= y2`.
              Boxes up to 1 pixel outside the image are clipped to it.
            - `width`, `height`: size of the image in pixels. Where both are 1, boxes are taken for normalized ones, in
              [0, 1] of the image, and may lie 0.01 outside.
            - `image_id` (optional): named in error messages.
        region_feature_size (`int`):
            Width of every feature vector.
        max_regions (`int`, *optional*):
            Keeps the first `max_regions` regions of each image (region datasets store the highest score first); the
            values of the others are not checked. All regions are kept by default.

    Returns:
        `dict[str, np.ndarray]`, zero in the padding:

        - `region_features`: float32 of shape `(batch_size, num_regions, region_feature_size)`.
        - `region_boxes`: float32 of shape `(batch_size, num_regions, 4)`, `x1, y1, x2, y2` in [0, 1] of the image.
        - `region_attention_mask`: int64 of shape `(batch_size, num_regions)`, 1 = real region, 0 = padding.

    Raises:
        `ValueError`: if the batch is empty; if an image has a key missing, no regions, a width or height that is not
        positive, or features and boxes of the wrong shape or of different number; if a feature or a box is NaN or
        infinite; if a box has `x2 < x1` or `y2 < y1` or lies further outside the image than is clipped. The message
        names the image, the region, what was expected and what was found.
    """
    if len(regions) == 0:
        raise ValueError("`regions`: expected at least one image, got an empty batch.")
    if max_regions is not None and max_regions < 1:
        raise ValueError(f"`max_regions`: expected at least 1 or None, got {max_regions}.")

    features_by_image, boxes_by_image, sizes = [], [], []
    for index, item in enumerate(regions):
        features, boxes, width, height = _read_regions(index, item, region_feature_size)
        features_by_image.append(features[:max_regions])
        boxes_by_image.append(boxes[:max_regions])
        sizes.append((width, height, width, height))

    counts = np.array([len(boxes) for boxes in boxes_by_image])
    mask = np.arange(counts.max()) < counts[:, None]  # (batch_size, num_regions)
    # Row i of the boxes below is region region_index[i] of image image_index[i].
    image_index, region_index = np.nonzero(mask)
    boxes = np.concatenate(boxes_by_image, dtype=np.float32, casting="same_kind")
    limits = np.array(sizes, dtype=np.float32)[image_index]

    def region_label(row: int) -> str:
        index = image_index[row]
        return f"{_label(index, regions[index])}, region {region_index[row]}"

    finite = np.isfinite(boxes).all(axis=1)
    if not finite.all():
        row = np.argmin(finite)
        raise ValueError(f"{region_label(row)}: expected a finite box, got {boxes[row].tolist()}.")
    ordered = (boxes[:, :2] <= boxes[:, 2:]).all(axis=1)
    if not ordered.all():
        row = np.argmin(ordered)
        raise ValueError(
            f"{region_label(row)}: expected a box (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, got "
            f"{boxes[row].tolist()}."
        )
    normalized = (limits == 1).all(axis=1)
    tolerance = np.where(normalized, NORMALIZED_BOX_TOLERANCE, BOX_TOLERANCE)[:, None]
    inside = ((boxes >= -tolerance) & (boxes <= limits + tolerance)).all(axis=1)
    if not inside.all():
        row = np.argmin(inside)
        expected = (
            f"within [0, 1], as width and height are 1 (at most {NORMALIZED_BOX_TOLERANCE:g} outside)"
            if normalized[row]
            else f"within the image of {limits[row, 0]:g} x {limits[row, 1]:g} pixels (at most {BOX_TOLERANCE:g} pixel "
            "outside)"
        )
        raise ValueError(f"{region_label(row)}: expected a box (x1, y1, x2, y2) {expected}, got {boxes[row].tolist()}.")

    # Image by image: temporaries of the size of the batch would cost more than all the arithmetic.
    region_features = np.zeros((*mask.shape, region_feature_size), dtype=np.float32)
    for index, features in enumerate(features_by_image):
        if features.dtype == np.float16:
            # torch widens float16 about twenty times as fast as numpy. It warns of read-only memory, hence the copy.
            features = torch.from_numpy(features.copy()).float().numpy()
        region_features[index, : len(features)] = features
        finite = np.isfinite(region_features[index])
        if not finite.all():
            region, column = np.argwhere(~finite)[0]
            raise ValueError(
                f"{_label(index, regions[index])}, region {region}: expected finite features, got "
                f"{features[region, column]} at position {column}."
            )
    region_boxes = np.zeros((*mask.shape, 4), dtype=np.float32)
    region_boxes[mask] = np.clip(boxes, 0.0, limits) / limits
    return {
        "region_features": region_features,
        "region_boxes": region_boxes,
        "region_attention_mask": mask.astype(np.int64),
    }


def _to_texts(value: str | Sequence[str], name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence):
        raise ValueError(f"`{name}`: expected a string or a list of strings, got {type(value).__name__}.")
    if len(texts) == 0:
        raise ValueError(f"`{name}`: expected at least one string, got an empty list.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`{name}[{index}]`: expected a string, got {type(text).__name__}.")
    return list(texts)


def _select_attention(
    attentions: Sequence[torch.Tensor], module: str, layer: int | None, head: int | None
) -> torch.Tensor:
    """One layer or the mean over all of them, one head or the mean: float32 `(batch, positions, positions)`."""
    for name, index, count in (("layer", layer, len(attentions)), ("head", head, attentions[0].shape[1])):
        if index is not None and not -count <= index < count:
            raise ValueError(
                f"`{name}`: expected None or an index from {-count} to {count - 1} of the {module} module, got {index}."
            )
    attention = torch.stack(tuple(attentions)).float().mean(dim=0) if layer is None else attentions[layer].float()
    return attention.mean(dim=1) if head is None else attention[:, head]


def _read_with_mask(
    inputs: Mapping[str, Any], name: str, mask_name: str, num_dimensions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """An input of the model, and its mask over the first two dimensions; without one, nothing is padding."""
    tensor = torch.as_tensor(inputs[name])
    mask = torch.as_tensor(inputs.get(mask_name, torch.ones(tensor.shape[:2])))
    if tensor.dim() != num_dimensions or mask.shape != tensor.shape[:2]:
        raise ValueError(
            f"`{name}` and `{mask_name}`: expected {num_dimensions} dimensions, and the first two of them for the "
            f"mask, got the shapes {tuple(tensor.shape)} and {tuple(mask.shape)}."
        )
    return tensor, mask


def _merge_word_pieces(tokens: Sequence[str], special_tokens: Sequence[str]) -> tuple[list[str], list[int]]:
    """The words that WordPiece tokens make, and for each token the index of its word. Special tokens stay alone."""
    words, word_indices, after_special_token = [], [], True
    for token in tokens:
        if token.startswith("##") and not after_special_token:
            words[-1] += token.removeprefix("##")
        else:
            words.append(token)
        word_indices.append(len(words) - 1)
        after_special_token = token in special_tokens
    return words, word_indices


def _read_words(
    tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[list[str], torch.Tensor]:
    """The words of one text, and the positions of each: `(words, sequence_length)`, 1 = is a piece of the word."""
    positions = attention_mask.nonzero()[:, 0].tolist()
    tokens = tokenizer.convert_ids_to_tokens(input_ids[positions].tolist())
    words, word_indices = _merge_word_pieces(tokens, tokenizer.all_special_tokens)
    membership = torch.zeros(len(words), len(input_ids))
    membership[word_indices, positions] = 1
    return words, membership


def _read_boxes(region_boxes: torch.Tensor, region_attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The boxes of one image, the whole image first, and the position of each: `(regions + 1, num_regions + 1)`."""
    boxes = torch.cat([region_boxes.new_tensor([[0, 0, 1, 1]]), region_boxes]).float()
    is_box = torch.nn.functional.pad(region_attention_mask, (1, 0), value=1).bool()
    return boxes[is_box], torch.eye(len(boxes))[is_box.cpu()]


def _merge_positions(attention: torch.Tensor, memberships: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Attention among words and boxes: they receive the sum of what their positions receive, and pay the mean of what
    these pay, so that rows which sum to 1 still do.

    Args:
        attention (`torch.Tensor` of shape `(positions, positions)`): From row to column.
        memberships (`dict[str, torch.Tensor]`):
            For each modality, in the order of its positions, which of them make a word or a box: `(words, its
            positions)`, 1 = belongs to it, 0 = does not. Padding belongs to none.

    Returns:
        `dict[str, torch.Tensor]`: from each modality to each, such as `text_to_image` of shape `(words, boxes)`.
    """
    membership = torch.block_diag(*memberships.values()).to(attention.device)
    merged = membership @ attention @ membership.T / membership.sum(dim=1, keepdim=True)
    sizes = [len(membership) for membership in memberships.values()]
    return {
        f"{source}_to_{target}": block
        for source, rows in zip(memberships, merged.split(sizes), strict=True)
        for target, block in zip(memberships, rows.split(sizes, dim=1), strict=True)
    }


@functools.lru_cache(maxsize=2)
def _load_region_extractor(settings: str, device: str) -> RegionExtractor:
    # Kept for all processors of this process: those of checkpoints for search and for questions share one, whatever
    # their limits, and none of them takes weights along to its workers.
    return load_region_extractor(**json.loads(settings), device=device)


class InterBERTProcessor(ProcessorMixin):
    r"""
    Prepares texts and detected regions for InterBERT: a BERT WordPiece tokenizer for the text, padding and box
    normalization for the regions. Pictures become regions first, where a detector is named.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            A BERT tokenizer, as [`BertTokenizer`] or [`AutoTokenizer`] load it.
        region_feature_size (`int`, *optional*, defaults to 2048):
            Width of the region features; the model's `config.region_feature_size`.
        max_regions (`int`, *optional*):
            Keeps the first `max_regions` regions of each image. All regions are kept by default.
        region_detector (`str` or `dict[str, Any]`, *optional*):
            What finds the regions of pictures: the checkpoint of a detector, or the arguments of
            [`load_region_extractor`], `{"name_or_path": ..., "revision": ...}`; the model's `config.region_detector`.

    Raises:
        `ValueError`: if `region_feature_size` or `max_regions` is smaller than 1, or `region_detector` names none.

    Example:

    ```python
    >>> processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    >>> regions = {"features": features, "boxes": boxes, "width": 640, "height": 480}
    >>> inputs = processor(text="two dogs on a beach", regions=regions, return_tensors="pt")
    >>> outputs = model(**inputs)
    >>> outputs = model(**processor(text="two dogs on a beach", images="beach.jpg", return_tensors="pt"))
    ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        region_feature_size: int = 2048,
        max_regions: int | None = None,
        region_detector: str | os.PathLike | dict[str, Any] | None = None,
    ):
        if region_feature_size < 1:
            raise ValueError(f"`region_feature_size`: expected at least 1, got {region_feature_size}.")
        if max_regions is not None and max_regions < 1:
            raise ValueError(f"`max_regions`: expected at least 1 or None, got {max_regions}.")
        self.region_feature_size = region_feature_size
        self.max_regions = max_regions
        self.region_detector = None if region_detector is None else detector_settings(region_detector)
        super().__init__(tokenizer)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        regions: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        text_pair: str | Sequence[str] | None = None,
        images: Any = None,
        padding: bool | str = True,
        truncation: bool | str = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
        device: str | torch.device = "cpu",
        **tokenizer_kwargs,
    ) -> BatchFeature:
        """
        Tokenizes texts, pads regions, or both. Item i of `text` goes with item i of `regions` or `images`. Every output
        has a batch axis, also for a single text or image.

        Args:
            text (`str` or `Sequence[str]`, *optional*):
                One text, or one for each item of the batch.
            regions (`Mapping[str, Any]` or `Sequence[Mapping[str, Any]]`, *optional*):
                The regions of one image, or of one image for each item of the batch: dicts `{"features":
                (num_regions, region_feature_size), "boxes": (num_regions, 4) in pixels, "width": w, "height": h}`,
                see [`pad_regions`]. A single image does not broadcast to several texts, nor the other way round.
            text_pair (`str` or `Sequence[str]`, *optional*):
                Second segments (token type 1), one for each item of `text`.
            images (*optional*):
                Pictures in the place of `regions`, one or a list: see [`detect_regions`].
            padding (`bool` or `str`, *optional*, defaults to `True`):
                Padding of the texts, as in the tokenizer: `True` pads to the longest of the batch. Regions are always
                padded to the largest number in the batch.
            truncation (`bool` or `str`, *optional*, defaults to `True`):
                Truncation of the texts to `max_length`, as in the tokenizer: `True` shortens the longer text of a
                pair first.
            max_length (`int`, *optional*):
                Largest number of tokens, special tokens included. By default the tokenizer's own limit, and 512 if
                that is larger or unknown.
            return_tensors (`str`, *optional*):
                `"pt"` for torch tensors, `"np"` for numpy arrays. By default token lists and numpy region arrays.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where the detector sees `images`. All outputs are on the CPU.
            tokenizer_kwargs (*optional*):
                Passed on to the tokenizer, such as `pad_to_multiple_of` or `return_special_tokens_mask`: those of
                [`~transformers.processing_utils.TextKwargs`], and no others.

        Returns:
            [`BatchFeature`] with the inputs of the model. With `text`:

            - `input_ids`: int64 of shape `(batch_size, sequence_length)`.
            - `token_type_ids`: int64 of shape `(batch_size, sequence_length)`, 1 = token of `text_pair`, 0 = others.
            - `attention_mask`: int64 of shape `(batch_size, sequence_length)`, 1 = token, 0 = padding.

            With `regions` or `images`:

            - `region_features`: float32 of shape `(batch_size, num_regions, region_feature_size)`.
            - `region_boxes`: float32 of shape `(batch_size, num_regions, 4)`, `x1, y1, x2, y2` in [0, 1].
            - `region_attention_mask`: int64 of shape `(batch_size, num_regions)`, 1 = real region, 0 = padding.

        Raises:
            `ValueError`: if neither `text` nor `regions` nor `images` is given, or both `regions` and `images`; if
            `text`, `text_pair` and images differ in number; if a text is not a string; for an argument that there is
            not, a `max_length` that leaves nothing of a text, or padding on the left, which the model does not know;
            for faulty regions as in [`pad_regions`], and for pictures as in [`detect_regions`].
        """
        unknown = [name for name in tokenizer_kwargs if name not in TextKwargs.__annotations__]
        if unknown:
            raise ValueError(f"Expected arguments of the processor or of its tokenizer, got {', '.join(unknown)}.")
        if regions is not None and images is not None:
            raise ValueError("Expected `regions` or `images`, got both.")
        if images is not None:
            regions = self.detect_regions(images, device)
        if text is None and regions is None:
            raise ValueError("Expected `text`, `regions` or both, got neither.")
        if text is None and text_pair is not None:
            raise ValueError("Expected `text` to go with `text_pair`, got `text_pair` alone.")

        data = {}
        if text is not None:
            texts = _to_texts(text, "text")
            pairs = None if text_pair is None else _to_texts(text_pair, "text_pair")
            if pairs is not None and len(texts) != len(pairs):
                raise ValueError(
                    f"Expected one item of `text_pair` for each item of `text`, got {len(texts)} of `text` and "
                    f"{len(pairs)} of `text_pair`."
                )
            if max_length is None and (truncation or padding == "max_length"):
                max_length = min(self.tokenizer.model_max_length, MAX_TEXT_LENGTH)
            self._check_tokenization(truncation, max_length, pairs is not None, tokenizer_kwargs)
            data.update(
                self.tokenizer(
                    texts,
                    pairs,
                    padding=padding,
                    truncation=truncation,
                    max_length=max_length,
                    return_tensors=return_tensors,
                    **{"return_token_type_ids": True, "return_attention_mask": True, **tokenizer_kwargs},
                )
            )
        if regions is not None:
            items = [regions] if isinstance(regions, Mapping) else regions
            if not isinstance(items, Sequence):
                raise ValueError(f"`regions`: expected a dict or a list of dicts, got {type(regions).__name__}.")
            # Counted in tokenized rows, which options such as return_overflowing_tokens multiply.
            if text is not None and len(data["input_ids"]) != len(items):
                raise ValueError(
                    f"Expected one item of `regions` for each text, got {len(data['input_ids'])} texts and "
                    f"{len(items)} items of `regions` (a single one does not broadcast)."
                )
            data.update(pad_regions(items, self.region_feature_size, self.max_regions))
        return BatchFeature(data, tensor_type=return_tensors)

    def _check_tokenization(
        self, truncation: bool | str, max_length: int | None, has_pairs: bool, kwargs: dict[str, Any]
    ):
        side = kwargs.get("padding_side") or self.tokenizer.padding_side
        if side != "right":
            raise ValueError(f"The model reads texts from position 0: expected `padding_side` 'right', got {side!r}.")
        num_special = 0
        if kwargs.get("add_special_tokens", True):
            num_special = self.tokenizer.num_special_tokens_to_add(has_pairs)
        if truncation and max_length is not None and max_length <= num_special:
            raise ValueError(f"`max_length`: expected more than the {num_special} special tokens, got {max_length}.")

    def detect_regions(self, images: Any, device: str | torch.device = "cpu") -> list[dict[str, Any]]:
        """
        The regions of pictures, by the detector that `region_detector` names. It is loaded at the first call; no code
        of its repository is run.

        Args:
            images (`PIL.Image.Image`, `str`, `os.PathLike`, `np.ndarray`, `torch.Tensor`, or a list of them):
                Pictures: PIL's, paths, URLs, base64, or arrays of red, green and blue from 0 to 255, `(height, width,
                3)` or `(3, height, width)`.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where the detector runs.

        Returns:
            `list[dict[str, Any]]`: for each picture what `regions` takes, the highest score first, with `class_ids` and
            `class_scores` where the detector has classes.

        Raises:
            `ValueError`: if there is no picture or one cannot be read; if no detector is named, or its features are not
            of `region_feature_size`.
            `OSError`: if there is no such detector.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if len(images) == 0:
            raise ValueError("`images`: expected at least one picture, got none.")
        if self.region_detector is None:
            raise ValueError(
                "This processor names no detector to find the regions of pictures: expected `regions`, or "
                "`region_detector` where the processor is loaded, got pictures."
            )
        pictures = read_pictures(images)
        settings = detector_settings(self.region_detector)
        limits = {name: settings.pop(name) for name in LIMITS if name in settings}
        extractor = _load_region_extractor(json.dumps(settings, sort_keys=True), str(device)).limited(**limits)
        if extractor.region_feature_size != self.region_feature_size:
            raise ValueError(
                f"`region_detector`: expected features of {self.region_feature_size} numbers, got a detector of "
                f"{extractor.region_feature_size}, {settings['name_or_path']}."
            )
        # One by one: the padding of a batch would make what is found in a picture depend on the others.
        return [extractor([picture])[0] for picture in pictures]

    @torch.no_grad()
    def post_process_attention(
        self,
        outputs: Any,
        inputs: Mapping[str, Any],
        module: str = "interaction",
        layer: int | None = -1,
        head: int | None = None,
        target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """
        Maps the attention of one module back to the words and the boxes of each (text, image) pair.

        Pieces of one word are merged: the attention that a word receives is the sum over its pieces, the attention that
        it pays is their mean. So a row, over all positions of the module, still sums to 1.

        Args:
            outputs ([`ModelOutput`]):
                What any InterBERT model in evaluation mode returned for `inputs` with `output_attentions=True`. Of
                choices those of [`InterBERTForMultipleChoice`] with its texts as `(batch_size * choices,
                sequence_length)` and each image once for every choice.
            inputs (`Mapping[str, Any]`):
                What the processor returned. Text or regions may be missing; a batch of 1 on either side goes with every
                item of the other. Read are:

                - `input_ids`: int64 of shape `(batch_size, sequence_length)`.
                - `attention_mask` (optional): int64 of that shape, 1 = token, 0 = padding. By default all are tokens.
                - `region_boxes`: float of shape `(batch_size, num_regions, 4)`, `x1, y1, x2, y2` in [0, 1].
                - `region_attention_mask` (optional): int64 of shape `(batch_size, num_regions)`, 1 = real region, 0 =
                  padding. By default all are real.
            module (`str`, *optional*, defaults to `"interaction"`):
                `"interaction"` (among all regions and words), `"text"` or `"image"` (the stream of one modality).
            layer (`int` or `None`, *optional*, defaults to -1):
                Index of the module's layer; `None` for the mean over its layers.
            head (`int` or `None`, *optional*):
                Index of the attention head; `None` for the mean over the heads.
            target_sizes (`torch.Tensor` or `Sequence[tuple[int, int]]`, *optional*):
                Height and width of each image in pixels, shape `(batch_size, 2)`; one image beside many texts needs
                only one. By default boxes are shares of width and height.

        Returns:
            `list[dict]`, one for each pair, without padding:

            - `words` (with text): `list[str]`. Special tokens such as `[CLS]` are words of their own.
            - `boxes` (with regions): float32 of shape `(num_regions + 1, 4)`, `x1, y1, x2, y2` in pixels or in [0, 1].
              The first is the whole image, which the model puts before the regions.
            - `text_to_text`, `text_to_image`, `image_to_text`, `image_to_image` (as far as the module has them):
              float32 of shape `(from, to)` in the order of `words` and `boxes`: the share of its attention that the
              row's word or region pays to the column's.

        Raises:
            `ValueError`: if the module is unknown or its attentions are not recorded; if the layer or the head is out
            of range; if the shapes of `outputs` and `inputs` do not fit; if `target_sizes` has another shape.

        Example:

        ```python
        >>> outputs = model(**inputs, output_attentions=True)
        >>> attention = processor.post_process_attention(outputs, inputs, target_sizes=[(480, 640)])[0]
        >>> dogs = attention["text_to_image"][attention["words"].index("dogs")]
        >>> box = attention["boxes"][dogs.argmax()]
        ```
        """
        if module not in MODULE_MODALITIES:
            raise ValueError(f"`module`: expected one of {tuple(MODULE_MODALITIES)}, got {module!r}.")
        attentions = getattr(outputs, f"{module}_attentions", None)
        if not attentions:
            raise ValueError(
                f"`outputs`: expected `{module}_attentions` of at least one layer, recorded with "
                f"`output_attentions=True`, got {attentions}."
            )
        attention = _select_attention(attentions, module, layer, head)

        texts, images, num_positions = [], [], {"text": 0, "image": 0}
        if "input_ids" in inputs:
            input_ids, mask = _read_with_mask(inputs, "input_ids", "attention_mask", num_dimensions=2)
            texts = [_read_words(self.tokenizer, *text) for text in zip(input_ids, mask, strict=True)]
            num_positions["text"] = input_ids.shape[1]
        if "region_boxes" in inputs:
            region_boxes, mask = _read_with_mask(inputs, "region_boxes", "region_attention_mask", num_dimensions=3)
            images = [_read_boxes(*image) for image in zip(region_boxes, mask, strict=True)]
            num_positions["image"] = region_boxes.shape[1] + 1

        batch_size = max(len(texts), len(images))
        expected_positions = sum(num_positions[modality] for modality in MODULE_MODALITIES[module])
        expected_shape = (batch_size, expected_positions, expected_positions)
        if attention.shape != expected_shape or not {len(texts), len(images)} <= {0, 1, batch_size}:
            raise ValueError(
                f"`outputs` and `inputs` do not fit: expected `{module}_attentions` of shape ({batch_size}, heads, "
                f"{expected_positions}, {expected_positions}) for {len(texts)} texts of {num_positions['text']} tokens "
                f"and {len(images)} images of {num_positions['image']} positions, got {tuple(attentions[0].shape)}."
            )
        if target_sizes is not None:
            target_sizes = torch.as_tensor(target_sizes)
            if target_sizes.shape not in ((batch_size, 2), (len(images), 2)):
                raise ValueError(
                    f"`target_sizes`: expected one (height, width) for each image, shape ({batch_size}, 2), got shape "
                    f"{tuple(target_sizes.shape)}."
                )

        results = []
        for index in range(batch_size):
            # Of a side with a single item, index % 1 is that item.
            result, memberships = {}, {}
            if texts:
                result["words"], memberships["text"] = texts[index % len(texts)]
            if images:
                result["boxes"], memberships["image"] = images[index % len(images)]
                if target_sizes is not None:
                    height, width = target_sizes[index % len(target_sizes)].tolist()
                    result["boxes"] = result["boxes"] * result["boxes"].new_tensor([width, height, width, height])
            memberships = {name: memberships[name] for name in MODULE_MODALITIES[module] if name in memberships}
            results.append(result | _merge_positions(attention[index], memberships))
        return results

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "token_type_ids",
            "attention_mask",
            "region_features",
            "region_boxes",
            "region_attention_mask",
        ]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        Saves the processor, its tokenizer and this file, so that `AutoProcessor.from_pretrained(save_directory,
        trust_remote_code=True)` loads them. See [`ProcessorMixin.save_pretrained`] for the arguments.
        """
        # The tokenizer keeps the padding and truncation of its last call, and would write them to tokenizer.json.
        if self.tokenizer.is_fast:
            self.tokenizer.backend_tokenizer.no_padding()
            self.tokenizer.backend_tokenizer.no_truncation()
        # It also keeps every argument of `from_pretrained`, and would write ours to tokenizer_config.json.
        for name in ("region_feature_size", "max_regions", "region_detector"):
            self.tokenizer.init_kwargs.pop(name, None)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, trust_remote_code: bool | None = None, **kwargs):
        """
        Loads a saved processor, or starts one from any BERT tokenizer:
        `InterBERTProcessor.from_pretrained("bert-base-uncased", region_feature_size=1280)`. Arguments of the processor
        replace the saved ones; see [`ProcessorMixin.from_pretrained`] for the others.
        """
        # Undecided, the tokenizer's loader asks on the terminal whether to run the model's code, which it never needs.
        trust_remote_code = bool(trust_remote_code)
        return super().from_pretrained(pretrained_model_name_or_path, trust_remote_code=trust_remote_code, **kwargs)


InterBERTProcessor.register_for_auto_class()
