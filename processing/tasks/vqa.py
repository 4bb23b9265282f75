"""Visual question answering: question files, the VQA evaluation's answer normalization and scores, answer vocabularies,
batches.

```python
examples = read_questions("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json")
label2id = build_answer_vocabulary(examples)
dataset = ExamplesWithRegions(examples, load_region_dataset("data/coco", "train"))
loader = torch.utils.data.DataLoader(dataset, batch_size=256, collate_fn=VQACollator(processor, label2id))
```
"""

import functools
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from processing.region_dataset import RegionDataset

from .files import Record, canonical_image_id, numbered_lines, read_json, read_records
from .region_examples import region_tensors

NUM_ANNOTATORS = 10

AnswerScoring = Literal["leave_one_out", "count", "listed"]


@dataclass(frozen=True)
class VQAExample:
    """
    Args:
        question_id (`int` or `str`): as in the file.
        image_id (`str`): as `canonical_image_id` has it.
        question (`str`): the text.
        answers (`list[str]`, *optional*):
            As written: VQA's ten, one of each annotator, or the right answers of a list. `None` in a test split.
        multiple_choice_answer (`str`, *optional*): VQA's most frequent answer.
        question_type, answer_type (`str`, *optional*): VQA's "what color is the", "number" and the like.
    """

    question_id: int | str
    image_id: str
    question: str
    answers: list[str] | None = None
    multiple_choice_answer: str | None = None
    question_type: str | None = None
    answer_type: str | None = None


# Questions


def read_questions(path: str | os.PathLike, annotations_path: str | os.PathLike | None = None) -> list[VQAExample]:
    """
    Reads questions, in the order of the file.

    Args:
        path (`str` or `os.PathLike`):
            Either VQA's official `.json` with `questions`: `question_id`, `image_id`, `question`. Or a list, `.json`,
            `.jsonl`, `.csv` or `.tsv`, of the same fields with the answers beside them: `answers` (a list) or else
            `answer` (a string); optionally `question_type` and `answer_type`.
        annotations_path (`str` or `os.PathLike`, *optional*):
            VQA's official `.json` with `annotations`. A test split has none.

    Raises:
        ValueError: a broken line or record or a missing field, with its place; two questions of one id; an annotation
            without its question, of another image, or twice; a question without its annotation.
    """
    content = read_json(path) if Path(path).suffix.lower() == ".json" else None
    is_official = isinstance(content, dict)
    records = Record(content, str(path)).records("questions") if is_official else read_records(path)
    questions: dict[int | str, VQAExample] = {}
    for record in records:
        question_id = record["question_id"]
        if question_id in questions:
            raise record.error(f"expected every question id once, got {question_id!r} again.")
        questions[question_id] = _example(record, question_id, record["image_id"])
    if annotations_path is None:
        return list(questions.values())
    if not is_official:
        raise ValueError(f"{path}: expected VQA's official questions beside `annotations_path`, got a list.")
    return _annotated(questions, annotations_path)


def questions_of_dataset(region_dataset: RegionDataset, column: str = "questions") -> list[VQAExample]:
    """
    Questions that stand in a region dataset, image by image.

    Args:
        region_dataset (`RegionDataset`): one row per image.
        column (`str`):
            A column of lists of `{"question", "answer" or "answers"}`, optionally with `question_id` (by default the
            image id and a number), `multiple_choice_answer`, `question_type` or `type`, and `answer_type`.

    Raises:
        ValueError: there is no such column, or a question in it has no text.
    """
    if column not in region_dataset.column_names:
        raise ValueError(f"The dataset has no column {column!r}, got {region_dataset.column_names}.")
    examples = []
    rows = zip(region_dataset.dataset["image_id"], region_dataset.dataset[column], strict=True)
    for row, (image_id, records) in enumerate(rows):
        for number, record in enumerate(records or []):
            record = Record(record, f"row {row}, {column}[{number}]")
            examples.append(_example(record, record.get("question_id", f"{image_id}-{number}"), image_id))
    return examples


def _example(record: Record, question_id: int | str, image_id: int | str) -> VQAExample:
    answers = None
    if "answers" in record:
        answers = record.texts("answers")
    elif "answer" in record:
        answers = [record.text("answer")]
    return VQAExample(
        question_id=question_id,
        image_id=canonical_image_id(image_id),
        question=record.text("question"),
        answers=answers,
        multiple_choice_answer=record.get("multiple_choice_answer"),
        question_type=record.get("question_type", record.get("type")),
        answer_type=record.get("answer_type"),
    )


def _annotated(questions: dict[int | str, VQAExample], path: str | os.PathLike) -> list[VQAExample]:
    annotated: dict[int | str, VQAExample] = {}
    for record in Record(read_json(path), str(path)).records("annotations"):
        question_id, image_id = record["question_id"], canonical_image_id(record["image_id"])
        if question_id not in questions:
            raise record.error(f"expected the id of one of {len(questions)} questions, got {question_id!r}.")
        if question_id in annotated:
            raise record.error(f"expected one annotation for each question, got question {question_id!r} again.")
        question = questions[question_id]
        if image_id != question.image_id:
            raise record.error(
                f"expected image {question.image_id!r} as in question {question_id!r}, got {image_id!r}."
            )
        annotated[question_id] = replace(
            question,
            answers=[answer.text("answer") for answer in record.records("answers")],
            multiple_choice_answer=record["multiple_choice_answer"],
            question_type=record.get("question_type"),
            answer_type=record.get("answer_type"),
        )
    missing = [question_id for question_id in questions if question_id not in annotated]
    if missing:
        raise ValueError(
            f"{path}: expected an annotation for each of {len(questions)} questions, got none for {len(missing)}: "
            f"{missing[:5]}."
        )
    return [annotated[question_id] for question_id in questions]


# Answers

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Not the one in "3.5" or ".5".
PERIOD = re.compile(r"\.(?!\d)")
ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBER_WORDS["none"] = "0"
# The evaluation restores a contraction that lacks one of its apostrophes, and these contractions only. (It also lists
# some with a capital I, which never meet the lowercased words.)
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    contraction[:i] + contraction[i + 1 :]: contraction
    for contraction in _CONTRACTIONS
    for i, character in enumerate(contraction)
    if character == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round, but so do all published scores have it


@functools.lru_cache(maxsize=100_000)
def normalize_answer(answer: str) -> str:
    """
    Normalizes an answer as the official VQA evaluation does before it compares two of them:

    1. marks of `PUNCTUATION` go: one that touches a space anywhere in the answer is removed wherever it stands, any
       other becomes a space; if a comma stands between two digits, all are removed,
    2. periods go, unless a digit follows,
    3. lower case, number words up to ten as digits ("none" as 0), no articles,
    4. contractions get the apostrophe that they lack.

    >>> normalize_answer("The T-shirt isnt 1,000 dollars.")
    "tshirt isn't 1000 dollars"
    """
    answer = _on_one_line(answer)
    text = answer
    for mark in PUNCTUATION:
        is_removed = f"{mark} " in answer or f" {mark}" in answer or COMMA_IN_NUMBER.search(answer)
        text = text.replace(mark, "" if is_removed else " ")
    words = [NUMBER_WORDS.get(word, word) for word in PERIOD.sub("", text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """
    The official score of a prediction, as the evaluation script of VQA 2.0 goes about it: where all ten annotators
    wrote the same, the prediction must be that, as written (white space at the ends apart); else it and their answers
    are compared in normalized form. (Earlier versions took only punctuation out of the annotators' answers.)

    Args:
        prediction (`str`): an answer.
        answers (sequence of `str`): those of the ten annotators, as written.

    Returns:
        `float`: min(c / 3, 1), averaged over the ten sets of nine annotators, where c of the nine gave the answer.

    Raises:
        ValueError: there are not ten answers.
    """
    if len(answers) != NUM_ANNOTATORS:
        raise ValueError(
            f"Expected the answers of {NUM_ANNOTATORS} annotators to every question, got {len(answers)}: {answers}."
        )
    answers = [_on_one_line(answer) for answer in answers]
    prediction = _on_one_line(prediction)
    if len(set(answers)) > 1:
        answers = [normalize_answer(answer) for answer in answers]
        prediction = normalize_answer(prediction)
    return _leave_one_out_score(answers.count(prediction))


def _leave_one_out_score(count: int) -> float:
    """Mean of min(c / 3, 1) over the ten sets of nine annotators, of an answer that `count` of the ten gave."""
    # Of the ten sets, `count` lack one of those who gave the answer.
    return (count * min(count - 1, 3) + (NUM_ANNOTATORS - count) * min(count, 3)) / (3 * NUM_ANNOTATORS)


def soft_scores(answers: Sequence[str], scoring: AnswerScoring = "leave_one_out") -> dict[str, float]:
    """
    How right each answer to a question is, for training. Any other answer scores 0.

    Args:
        answers (sequence of `str`):
            As written; they are always compared in normalized form, so that one label stands for all spellings of an
            answer. ([`vqa_score`] measures, and differs where all ten annotators wrote the same.)
        scoring (`"leave_one_out"`, `"count"` or `"listed"`):
            For an answer that c of the ten annotators gave:

            - `"leave_one_out"`, as the official score: min(c'/3, 1), averaged over the ten sets of nine annotators,
              where c' of the nine gave it. 1, 2, 3, 4 annotators: 0.3, 0.6, 0.9, 1.
            - `"count"`: min(c/3, 1).

            `"listed"`: 1 for every answer of a list of right answers, as DAQUAR's.

    Returns:
        `dict[str, float]`: score in (0, 1] by normalized answer.

    Raises:
        ValueError: another scoring, or one of ten annotators for another number of answers.
    """
    if scoring not in get_args(AnswerScoring):
        raise ValueError(f"`scoring` must be one of {list(get_args(AnswerScoring))}, got {scoring!r}.")
    counts = Counter(normalize_answer(answer) for answer in answers)
    if scoring == "listed":
        return dict.fromkeys(counts, 1.0)
    if len(answers) != NUM_ANNOTATORS:
        raise ValueError(
            f"`scoring={scoring!r}` needs the answers of {NUM_ANNOTATORS} annotators, got {len(answers)}: choose "
            "'listed' for lists of right answers."
        )
    if scoring == "count":
        return {answer: min(count / 3, 1.0) for answer, count in counts.items()}
    return {answer: _leave_one_out_score(count) for answer, count in counts.items()}


def build_answer_vocabulary(examples: Sequence[VQAExample], min_occurrences: int = 9) -> dict[str, int]:
    """
    The answers that a model chooses from: those that enough questions have. The field's rule, which gives 3,129 answers
    on VQA 2.0's training and validation questions (bottom-up-attention VQA's `compute_softscore`), counts the
    normalized `multiple_choice_answer` of each question. Where a question has none, each of its answers counts once.

    Args:
        examples (sequence of `VQAExample`): with answers.
        min_occurrences (`int`): the number of questions that are enough.

    Returns:
        `dict[str, int]`: labels from 0 by normalized answer, the most frequent answer first, equally frequent ones in
        alphabetical order.

    Raises:
        ValueError: an example has no answers, or no answer is frequent enough.
    """
    counts: Counter[str] = Counter()
    for example in examples:
        if example.answers is None:
            raise ValueError(f"A vocabulary needs questions with answers, got none for {example.question_id!r}.")
        given = example.answers if example.multiple_choice_answer is None else [example.multiple_choice_answer]
        counts.update({normalize_answer(answer) for answer in given})
    frequent = [answer for answer, count in counts.items() if count >= min_occurrences]
    if not frequent:
        raise ValueError(
            f"Expected answers of at least {min_occurrences} questions, got none in {len(examples)} questions; most "
            f"frequent are {counts.most_common(3)}."
        )
    frequent.sort(key=lambda answer: (-counts[answer], answer))
    return {answer: label for label, answer in enumerate(frequent)}


def read_answer_vocabulary(path: str | os.PathLike) -> dict[str, int]:
    """
    Reads labels by answer: a `.json` object `{answer: label}` (LXMERT's `trainval_ans2label.json`) or list of answers
    (`trainval_label2ans.json`), or a `.txt` file with one answer a line.

    Raises:
        ValueError: the labels are not 0, 1, 2 … each once, an answer stands there twice, or the file holds something
            else.
    """
    if Path(path).suffix.lower() == ".txt":
        answers = [line for _, line in numbered_lines(path)]
    else:
        answers = read_json(path)
    if isinstance(answers, dict):
        return _checked_labels(answers, f"{path}: expected")
    answers = Record({"answers": answers}, str(path)).texts("answers")
    vocabulary = {answer: label for label, answer in enumerate(answers)}
    if len(vocabulary) < len(answers):
        repeated = [answer for answer, count in Counter(answers).items() if count > 1]
        raise ValueError(f"{path}: expected every answer once, got these more often: {repeated[:5]}.")
    return vocabulary


def _checked_labels(label2id: Mapping[str, int], expected: str = "Expected") -> Mapping[str, int]:
    faults = set(label2id.values()) ^ set(range(len(label2id)))
    if faults:
        raise ValueError(
            f"{expected} the labels 0 to {len(label2id) - 1}, each once, got others at {sorted(faults, key=repr)[:5]}."
        )
    return label2id


# Batches


class VQACollator:
    """
    Turns samples of [`ExamplesWithRegions`] with `VQAExample`s into a batch of the model's arguments:

    - `input_ids`, `attention_mask`, `token_type_ids`: int64 `(batch, tokens)`,
    - `region_features` float32 `(batch, regions, region_feature_size)`, `region_boxes` float32 `(batch, regions, 4)` in
      [0, 1], `region_attention_mask` int64 `(batch, regions)`,
    - `labels`, where all questions have answers: float32 `(batch, num_labels)`, the soft score of every answer of the
      vocabulary. Answers outside of it have no place: a question may have no positive label.

    Args:
        processor (`InterBERTProcessor`):
            Its tokenizer and `region_feature_size` are used.
        label2id (`Mapping[str, int]`):
            Labels 0 to `num_labels - 1` by answer, as in the model's configuration. Answers are compared in normalized
            form.
        scoring (`"leave_one_out"`, `"count"` or `"listed"`):
            See [`soft_scores`].
        max_length (`int`):
            Longest question in tokens, special tokens included; by default as in pretraining.
        max_regions (`int`, *optional*):
            The first regions of an image up to this number are kept; `None` keeps all.

    Raises:
        ValueError: labels that are not 0 to `num_labels - 1`, or two answers that are the same when normalized.
    """

    def __init__(
        self,
        processor,
        label2id: Mapping[str, int],
        scoring: AnswerScoring = "leave_one_out",
        max_length: int = 36,
        max_regions: int | None = 100,
    ):
        self.processor = processor
        self.scoring = scoring
        self.max_length = max_length
        self.max_regions = max_regions
        self.labels: dict[str, int] = {}
        for answer, label in _checked_labels(label2id).items():
            if self.labels.setdefault(normalize_answer(answer), label) != label:
                raise ValueError(f"Expected answers that differ when normalized, got {answer!r} and another like it.")

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        examples: list[VQAExample] = [sample["example"] for sample in samples]
        batch = dict(
            self.processor(
                text=[example.question for example in examples], max_length=self.max_length, return_tensors="pt"
            )
        )
        records = [sample["record"] for sample in samples]
        batch |= region_tensors(records, self.processor.region_feature_size, self.max_regions)
        if all(example.answers is not None for example in examples):
            batch["labels"] = self.soft_labels(examples)
        return batch

    def soft_labels(self, examples: Sequence[VQAExample]) -> torch.Tensor:
        """Float32 `(len(examples), num_labels)`."""
        labels = torch.zeros(len(examples), len(self.labels))
        for i, example in enumerate(examples):
            for answer, score in soft_scores(example.answers, self.scoring).items():
                if answer in self.labels:
                    labels[i, self.labels[answer]] = score
        return labels
