"""GLUE's CoLA, SST-2, STS-B and RTE: files and datasets, batches of texts.

```python
train_examples = read_glue("glue/RTE/train.tsv", "rte")
collator = GLUECollator(processor, "rte")
loader = torch.utils.data.DataLoader(train_examples, batch_size=128, shuffle=True, collate_fn=collator)
```
"""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import torch

from .files import Record, numbered_lines, read_tsv


@dataclass(frozen=True)
class GLUETask:
    """
    Args:
        title (`str`): its name in GLUE, which its folder and its file of predictions have.
        sentence_columns (`tuple[str, ...]`): one sentence or two.
        label_names (`tuple[str, ...]`, *optional*): classes by label; `None`: a score, which is regressed.
        headerless_layouts (`tuple[tuple[str, ...], ...]`): columns of its files that have no header.
    """

    title: str
    sentence_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    headerless_layouts: tuple[tuple[str, ...], ...] = ()

    @property
    def num_labels(self) -> int:
        """Outputs of a model: 1 for regression."""
        return 1 if self.label_names is None else len(self.label_names)


_STS_BENCHMARK = ("genre", "filename", "year", "index", "score", "sentence1", "sentence2")
GLUE_TASKS = {
    "cola": GLUETask("CoLA", ("sentence",), ("unacceptable", "acceptable"), (("source", "label", "note", "sentence"),)),
    "sst2": GLUETask("SST-2", ("sentence",), ("negative", "positive")),
    # The STS benchmark's own files; some of their rows also name where the sentences are from.
    "stsb": GLUETask(
        "STS-B", ("sentence1", "sentence2"), None, (_STS_BENCHMARK, (*_STS_BENCHMARK, "source1", "source2"))
    ),
    "rte": GLUETask("RTE", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
}
STS_SCORES = (0.0, 5.0)  # from no to full equivalence of meaning
# Phrases of fewer words, such as "a good film", may come in sentences that have nothing to do with each other.
SHARED_WORDS = 4


@dataclass(frozen=True)
class GLUEExample:
    """
    Args:
        sentence1 (`str`): the only sentence, or the first of two.
        sentence2 (`str`, *optional*): the second.
        label (`int` or `float`, *optional*): class, from 0, or score from 0 to 5. `None` in a test split.
    """

    sentence1: str
    sentence2: str | None = None
    label: int | float | None = None


def read_glue(path: str | os.PathLike, task: str) -> list[GLUEExample]:
    """
    Reads a tab-separated file in GLUE's layout: with a header, but for CoLA's training and development files; for STS-B
    also the STS benchmark's own files (`sts-train.csv`), which have none.

    Args:
        path (`str` or `os.PathLike`): the file.
        task (`"cola"`, `"sst2"`, `"stsb"` or `"rte"`): decides on columns and labels.

    Returns:
        `list[GLUEExample]`, in the order of the file. A file without a column `label` or `score` is a test split.

    Raises:
        ValueError: another task, a missing column, a row with another number of columns, a label that the task does not
            have; with file and line.
    """
    return _examples(_read_rows(path, _task(task)), _task(task))


def read_glue_dataset(dataset: datasets.Dataset, task: str) -> list[GLUEExample]:
    """
    The same from a `datasets.Dataset` such as `load_dataset("nyu-mll/glue", "rte", split="train")`: columns `sentence`,
    or `sentence1` and `sentence2`, and `label`, −1 where it is not known.
    """
    return _examples((Record(row, f"row {number}") for number, row in enumerate(dataset)), _task(task))


def _task(name: str) -> GLUETask:
    if name not in GLUE_TASKS:
        raise ValueError(f"`task` must be one of {list(GLUE_TASKS)}, got {name!r}.")
    return GLUE_TASKS[name]


def _read_rows(path: str | os.PathLike, task: GLUETask) -> Iterator[Record]:
    first_line = next(numbered_lines(path), ("", ""))[1].split("\t")
    if not task.headerless_layouts or set(task.sentence_columns) <= set(first_line):
        yield from read_tsv(path)
        return
    layouts = {len(columns): columns for columns in task.headerless_layouts}
    for where, line in numbered_lines(path):
        values = line.split("\t")
        if len(values) not in layouts:
            raise ValueError(
                f"{where}: expected the {' or '.join(map(str, layouts))} columns {task.headerless_layouts[-1]}, got "
                f"{len(values)}: {values}."
            )
        yield Record(dict(zip(layouts[len(values)], values, strict=True)), where)


def _examples(rows: Iterator[Record], task: GLUETask) -> list[GLUEExample]:
    return [
        GLUEExample(*[row[column] for column in task.sentence_columns], label=_read_label(row, task)) for row in rows
    ]


def _read_label(row: Record, task: GLUETask) -> int | float | None:
    label = row.get("label", row.get("score"))
    if label is None or label == -1:
        return None
    if task.label_names is None:
        low, high = STS_SCORES
        try:
            score = float(label)
        except ValueError:
            score = math.nan
        if not low <= score <= high:
            raise row.error(f"expected a score from {low:g} to {high:g}, got {label!r}.")
        return score
    # Files write the classes of RTE by name, those of the others by number.
    labels = {name: number for number, name in enumerate(task.label_names)}
    labels |= {str(number): number for number in labels.values()}
    if str(label) not in labels:
        raise row.error(f"expected one of the labels {list(labels)}, got {label!r}.")
    return labels[str(label)]


def split_glue(examples: Sequence[GLUEExample], fraction: float) -> tuple[list[GLUEExample], list[GLUEExample]]:
    """
    Holds out a part of the training data, where a task has no development data. The same examples, in any order, are
    always divided alike.

    Examples stay together if they have a sentence in common, or if a sentence of one, of four words or more, is part of
    one of the other: SST-2's training data are phrases, of which nearly all are part of others.

    Args:
        examples (`Sequence[GLUEExample]`): the training data.
        fraction (`float`): share of the examples that is held out, between 0 and 1.

    Returns:
        What is left and what is held out, each in the order of `examples`.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or nothing can be held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` must be between 0 and 1, got {fraction}.")
    groups: dict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(_groups_of_shared_sentences(examples)):
        groups[group].append(number)

    def digest(numbers: list[int]) -> str:
        return min(hashlib.sha256(repr(_normalized(examples[number])).encode()).hexdigest() for number in numbers)

    wanted = round(fraction * len(examples))
    held_out: set[int] = set()
    for numbers in sorted(groups.values(), key=digest):
        if len(held_out) + len(numbers) <= wanted:
            held_out.update(numbers)
    if not held_out:
        raise ValueError(
            f"No group of examples that have sentences in common is as small as {fraction:g} of all, {wanted} of "
            f"{len(examples)}."
        )
    return (
        [example for number, example in enumerate(examples) if number not in held_out],
        [example for number, example in enumerate(examples) if number in held_out],
    )


def _normalized(example: GLUEExample) -> list[tuple[str, ...]]:
    """The words of its sentences, in lower case."""
    sentences = (example.sentence1, example.sentence2)
    return [tuple(sentence.lower().split()) for sentence in sentences if sentence is not None]


def _groups_of_shared_sentences(examples: Sequence[GLUEExample]) -> list[int]:
    """For every example the number of its group, which is that of one of its members."""
    parents = list(range(len(examples)))

    def group_of(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    sentences = [_normalized(example) for example in examples]
    # sentence -> the first example that has it
    owners: dict[tuple[str, ...], int] = {}
    for number, own in enumerate(sentences):
        for words in own:
            parents[group_of(number)] = group_of(owners.setdefault(words, number))
    # first words -> lengths of the sentences that begin with them
    lengths: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for words in owners:
        if len(words) >= SHARED_WORDS:
            lengths[words[:SHARED_WORDS]].add(len(words))
    for words, number in owners.items():
        for start in range(len(words) - SHARED_WORDS + 1):
            for length in lengths.get(words[start : start + SHARED_WORDS], ()):
                part = words[start : start + length]
                if part in owners:
                    parents[group_of(number)] = group_of(owners[part])
    return [group_of(number) for number in range(len(examples))]


class GLUECollator:
    """
    Turns `GLUEExample`s into a batch of the arguments of a sequence classification model:

    - `input_ids`, `attention_mask`, `token_type_ids`: int64 `(batch, tokens)`; type 1 for the second sentence,
    - `labels`, where all are known: int64 `(batch,)` classes or float32 `(batch,)` scores.

    Args:
        processor (`InterBERTProcessor`):
            Its tokenizer is used.
        task (`"cola"`, `"sst2"`, `"stsb"` or `"rte"`):
            What the examples are of.
        max_length (`int`):
            Longest text in tokens, special tokens included; the longer of two sentences loses tokens first.
    """

    def __init__(self, processor, task: str, max_length: int = 128):
        self.processor = processor
        self.task = _task(task)
        self.max_length = max_length

    def __call__(self, examples: Sequence[GLUEExample]) -> dict[str, torch.Tensor]:
        is_pair = len(self.task.sentence_columns) == 2
        batch = dict(
            self.processor(
                text=[example.sentence1 for example in examples],
                text_pair=[example.sentence2 for example in examples] if is_pair else None,
                max_length=self.max_length,
                return_tensors="pt",
            )
        )
        labels = [example.label for example in examples]
        if None not in labels:
            dtype = torch.float32 if self.task.label_names is None else torch.int64
            batch["labels"] = torch.tensor(labels, dtype=dtype)
        return batch
