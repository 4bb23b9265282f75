"""Visual commonsense reasoning (VCR): annotations, metadata, batches of four choices.

```python
examples = read_vcr("vcr1annots/train.jsonl")
dataset = VCRDataset(examples, load_region_dataset("data/vcr", "train"), metadata_folder="vcr1images")
loader = torch.utils.data.DataLoader(dataset, batch_size=32, collate_fn=VCRCollator(processor, task="answer"))
```

Question → answer (`task="answer"`) chooses one of four answers; question and right answer → rationale
(`task="rationale"`) one of four rationales. Answers with their rationales (Q→AR) are right where both are.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from processing.masking import pairwise_iou
from processing.region_dataset import RegionDataset

from .files import Record, canonical_image_id, read_json, read_records
from .region_examples import ExamplesWithRegions, region_tensors

NUM_CHOICES = 4
# Longest text of each task in tokens, special tokens included.
MAX_LENGTHS = {"answer": 60, "rationale": 80}

# Frequent unisex names (FiveThirtyEight's table) that are one word of BERT's uncased vocabulary.
UNISEX_NAMES = """
    Casey Riley Jessie Jackie Avery Jaime Peyton Kerry Jody Kendall Frankie Pat Quinn Harley Reese Robbie Kris Carey
    Blair Emery Stevie Rowan Ollie Shea
""".split()


@dataclass(frozen=True)
class VCRExample:
    """
    One annotation, with objects by name.

    Args:
        annot_id (`str`): such as `"val-0"`; the leaderboard's key.
        image_id (`str`): see `read_vcr`.
        question (`str`): the text.
        answers, rationales (`list[str]`): four each.
        answer_label, rationale_label (`int`, *optional*): 0 to 3. `None` in the test split.
        metadata_path (`str`): path of the image's metadata in the folder of images.
    """

    annot_id: str
    image_id: str
    question: str
    answers: list[str]
    rationales: list[str]
    answer_label: int | None
    rationale_label: int | None
    metadata_path: str


def read_vcr(path: str | os.PathLike, image_id: Literal["img_id", "img_fn"] = "img_id") -> list[VCRExample]:
    """
    Reads annotations.

    A token that is a list of object numbers becomes their names, joined by "and". People get the unisex names in the
    order in which the annotation first mentions them (question, answers, rationales), so that a person has one name
    throughout and two people have two; other objects are called by their class. Tokens are joined by spaces, which
    WordPiece does not mind.

    Args:
        path (`str` or `os.PathLike`):
            `train.jsonl`, `val.jsonl`, `test.jsonl`; or one record as `.json`.
        image_id (`"img_id"` or `"img_fn"`):
            What the region dataset calls an image: `"val-0"`, or the name of its file without folder and extension.

    Raises:
        ValueError: a broken line, a missing field, an object number or a label out of range, other than four choices,
            an annotation id twice; with file and line. Another `image_id`.
    """
    if image_id not in ("img_id", "img_fn"):
        raise ValueError(f"`image_id` must be one of ['img_id', 'img_fn'], got {image_id!r}.")
    examples, annot_ids = [], set()
    for record in read_records(path):
        if record["annot_id"] in annot_ids:
            raise record.error(f"expected every annotation id once, got {record['annot_id']!r} again.")
        annot_ids.add(record["annot_id"])
        writer = _TextWriter(record)
        question = writer.write(record["question"])
        answers = [writer.write(tokens) for tokens in _choices(record, "answer_choices")]
        rationales = [writer.write(tokens) for tokens in _choices(record, "rationale_choices")]
        image_name = PurePosixPath(record.text("img_fn")).name if image_id == "img_fn" else record["img_id"]
        examples.append(
            VCRExample(
                annot_id=record["annot_id"],
                image_id=canonical_image_id(image_name),
                question=question,
                answers=answers,
                rationales=rationales,
                answer_label=_label(record, "answer_label"),
                rationale_label=_label(record, "rationale_label"),
                metadata_path=_path_inside(record, "metadata_fn"),
            )
        )
    return examples


class _TextWriter:
    """Writes out the tokens of one annotation, with a name for every person."""

    def __init__(self, record: Record):
        self.record = record
        self.objects = record.texts("objects")
        self.names: dict[int, str] = {}

    def write(self, tokens: list[str | list[int]]) -> str:
        if not isinstance(tokens, list):
            raise self.record.error(f"expected a text as a list of tokens, got {tokens!r:.80}.")
        return " ".join(token if isinstance(token, str) else self._join_names(token) for token in tokens)

    def _join_names(self, numbers: list[int]) -> str:
        if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
            raise self.record.error(f"expected a token or a list of object numbers, got {numbers!r:.80}.")
        return " and ".join(self._name(number) for number in numbers)

    def _name(self, number: int) -> str:
        if not 0 <= number < len(self.objects):
            raise self.record.error(f"expected an object number below {len(self.objects)}, got {number}.")
        if self.objects[number] != "person":
            return self.objects[number]
        return self.names.setdefault(number, UNISEX_NAMES[len(self.names) % len(UNISEX_NAMES)])


def _choices(record: Record, name: str) -> list[Any]:
    choices = record[name]
    if not isinstance(choices, list) or len(choices) != NUM_CHOICES:
        raise record.error(f"expected {name!r} to be a list of {NUM_CHOICES}, got {choices!r:.80}.")
    return choices


def _label(record: Record, name: str) -> int | None:
    label = record.get(name)
    if label is not None and label not in range(NUM_CHOICES):
        raise record.error(f"expected {name!r} to be from 0 to {NUM_CHOICES - 1}, got {label!r}.")
    return label


def _path_inside(record: Record, name: str) -> str:
    path = PurePosixPath(record.text(name))
    if path.is_absolute() or ".." in path.parts:
        raise record.error(f"expected {name!r} to be a path inside the folder of images, got {record[name]!r}.")
    return record[name]


# Regions


def read_vcr_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """
    Reads what VCR's annotators were shown of an image. Its outlines (`segms`) are not kept.

    Returns:
        `dict`: `boxes` float32 `(n, 4)`, x1, y1, x2, y2 in pixels; `scores` float32 `(n,)`, VCR's detector's; `names`
        (`list[str]`), the class of each; `width` and `height` of the image in pixels.

    Raises:
        ValueError: a missing field, or boxes that are not five numbers for each name.
    """
    content = Record(read_json(path), str(path))
    names = content.texts("names")
    try:
        boxes = np.array(content["boxes"], dtype=np.float32).reshape(len(names), 5)
    except (TypeError, ValueError) as error:
        raise content.error(f"expected a box of five numbers for each of {len(names)} names ({error}).") from error
    return {
        "boxes": boxes[:, :4],
        "scores": boxes[:, 4],
        "names": names,
        "width": content["width"],
        "height": content["height"],
    }


def merge_annotated_boxes(record: Mapping[str, Any], annotated: Mapping[str, Any]) -> dict[str, Any]:
    """
    Puts the annotated boxes of an image before the regions that the detector found. First, because they are what the
    text speaks of, and `max_regions` keeps the first.

    Args:
        record (`Mapping`): region record of the detector.
        annotated (`Mapping`):
            `boxes`, `width` and `height`, as from [`read_vcr_metadata`], of the same image at any size. With
            `features`, float `(n, region_feature_size)`, these are the boxes' features; without, each box gets the
            feature of the detector's region with the largest intersection over union, and boxes that no region overlaps
            are left out.

    Returns:
        `dict`: `image_id`, `width`, `height` of `record`; `boxes` float32 `(m, 4)` in its pixels; `features` `(m,
        region_feature_size)`.
    """
    size = np.array([record["width"], record["height"]] * 2, dtype=np.float32)
    boxes = annotated["boxes"] * (size / np.array([annotated["width"], annotated["height"]] * 2, dtype=np.float32))
    features = annotated.get("features")
    if features is None:
        overlaps = pairwise_iou(boxes, record["boxes"])  # (annotated boxes, regions)
        is_overlapped = overlaps.max(axis=1) > 0
        boxes, features = boxes[is_overlapped], record["features"][overlaps.argmax(axis=1)[is_overlapped]]
    return {
        "image_id": record["image_id"],
        "width": record["width"],
        "height": record["height"],
        "boxes": np.concatenate([boxes, record["boxes"]]),
        "features": np.concatenate([features, record["features"]]),
    }


class VCRDataset(ExamplesWithRegions):
    """
    `VCRExample`s with the regions of their images, and before these the annotated boxes if a source of them is given.

    Args:
        examples (sequence of `VCRExample`):
            From [`read_vcr`].
        region_dataset (`RegionDataset`):
            The detector's regions; `lengths` counts these.
        metadata_folder (`str` or `os.PathLike`, *optional*):
            VCR's folder of images, `vcr1images`: annotated boxes of the metadata, with features of overlapping regions.
        annotated_region_dataset (`RegionDataset`, *optional*):
            Annotated boxes with features of their own.

    Raises:
        ValueError: both sources of annotated boxes are given, the features of theirs are not as wide as the detector's,
            or an image is not in a region dataset.
    """

    def __init__(
        self,
        examples: Sequence[VCRExample],
        region_dataset: RegionDataset,
        metadata_folder: str | os.PathLike | None = None,
        annotated_region_dataset: RegionDataset | None = None,
    ):
        super().__init__(examples, region_dataset)
        if metadata_folder is not None and annotated_region_dataset is not None:
            raise ValueError("Give either `metadata_folder` or `annotated_region_dataset`, not both.")
        self.metadata_folder = metadata_folder
        self.annotated = None
        if annotated_region_dataset is not None:
            sizes = [regions.region_feature_size for regions in (region_dataset, annotated_region_dataset)]
            if len(set(sizes)) > 1:
                raise ValueError(
                    f"Expected annotated boxes with features of size {sizes[0]}, as the detector's regions have, got "
                    f"{sizes[1]}."
                )
            self.annotated = ExamplesWithRegions(examples, annotated_region_dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if self.metadata_folder is not None:
            annotated = read_vcr_metadata(Path(self.metadata_folder, sample["example"].metadata_path))
        elif self.annotated is not None:
            annotated = self.annotated[index]["record"]
        else:
            return sample
        return sample | {"record": merge_annotated_boxes(sample["record"], annotated)}


# Batches


class MultipleChoice(NamedTuple):
    """What the choices follow, one or two texts; four choices; which one is right, where it is known."""

    context: list[str]
    choices: list[str]
    label: int | None


def multiple_choice(
    example: VCRExample, task: Literal["answer", "rationale"], given_answer: int | None = None
) -> MultipleChoice:
    """
    One of the two tasks of an annotation.

    Args:
        example (`VCRExample`): the annotation.
        task (`"answer"` or `"rationale"`): what is chosen.
        given_answer (`int`, *optional*):
            The answer that rationales are chosen for, by default the right one. The leaderboard wants scores for all
            four.

    Raises:
        ValueError: rationales of a test split, where the right answer is not known, without `given_answer`.
    """
    if task == "answer":
        return MultipleChoice([example.question], example.answers, example.answer_label)
    number = example.answer_label if given_answer is None else given_answer
    if number is None:
        raise ValueError(f"Annotation {example.annot_id!r} has no right answer: `given_answer` must say which to take.")
    return MultipleChoice([example.question, example.answers[number]], example.rationales, example.rationale_label)


class VCRCollator:
    """
    Turns samples of [`VCRDataset`] into a batch of the arguments of a multiple choice model:

    - `input_ids`, `attention_mask`, `token_type_ids`: int64 `(batch, 4, tokens)`, `[CLS] question [SEP] answer [SEP]`
      or `[CLS] question [SEP] right answer [SEP] rationale [SEP]`; type 1 for the choice and its `[SEP]`,
    - `region_features` float32 `(batch, regions, region_feature_size)`, `region_boxes` float32 `(batch, regions, 4)` in
      [0, 1], `region_attention_mask` int64 `(batch, regions)`: the choices of an image share its regions,
    - `labels`, where all are known: int64 `(batch,)`.

    A text that is too long loses tokens at the end of its longer side (what comes before the choice, or the choice),
    until both sides are equally long, then of both.

    Args:
        processor (`InterBERTProcessor`):
            Its tokenizer and `region_feature_size` are used.
        task (`"answer"` or `"rationale"`):
            What is chosen.
        max_length (`int`, *optional*):
            Longest text in tokens, special tokens included; by default 60 for answers, 80 for rationales.
        max_regions (`int`, *optional*):
            The first regions of an image up to this number are kept; `None` keeps all.
        given_answer (`int`, *optional*):
            See [`multiple_choice`].
    """

    def __init__(
        self,
        processor,
        task: Literal["answer", "rationale"],
        max_length: int | None = None,
        max_regions: int | None = 100,
        given_answer: int | None = None,
    ):
        if task not in MAX_LENGTHS:
            raise ValueError(f"`task` must be one of {list(MAX_LENGTHS)}, got {task!r}.")
        self.processor = processor
        self.task = task
        self.max_length = MAX_LENGTHS[task] if max_length is None else max_length
        self.max_regions = max_regions
        self.given_answer = given_answer

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        items = [multiple_choice(sample["example"], self.task, self.given_answer) for sample in samples]
        # Tokenizers read the separator in a text as the token.
        separator = f" {self.processor.tokenizer.sep_token} "
        text = self.processor(
            text=[separator.join(item.context) for item in items for _ in item.choices],
            text_pair=[choice for item in items for choice in item.choices],
            max_length=self.max_length,
            return_tensors="pt",
        )
        batch = {name: tensor.unflatten(0, (-1, NUM_CHOICES)) for name, tensor in text.items()}
        records = [sample["record"] for sample in samples]
        batch |= region_tensors(records, self.processor.region_feature_size, self.max_regions)
        if all(item.label is not None for item in items):
            batch["labels"] = torch.tensor([item.label for item in items])
        return batch
