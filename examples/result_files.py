"""Result files in the formats that evaluation servers take, complete or absent."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from files import write_json, write_text
from processing.tasks import GLUE_TASKS
from processing.tasks.vcr import NUM_CHOICES

# With texts and image ids of the dataset.
PREDICTION_FILES = [
    "eval_predictions.*",
    "test_predictions.*",
    "retrieval_scores.npy",
    "retrieval_ids.json",
    *(f"{task.title}.tsv" for task in GLUE_TASKS.values()),
]
# What the scripts write of the latest weights. (`all_results.json` is of all epochs.)
RESULT_FILES = ["eval_results.json", "eval_recipe.yaml", *PREDICTION_FILES]
# As in the example file of https://visualcommonsense.com/leaderboard/: the probabilities of the four answers, and of
# the four rationales if answer 0, 1, 2, 3 were the right one.
VCR_COLUMNS = [
    "annot_id",
    *(f"answer_{choice}" for choice in range(NUM_CHOICES)),
    *(f"rationale_conditioned_on_a{answer}_{choice}" for answer in range(NUM_CHOICES) for choice in range(NUM_CHOICES)),
]


def write_vqa_answers(path: Path, question_ids: Sequence[int], answers: Sequence[str]):
    """
    Writes what the server of VQA 2.0 takes: `[{"question_id": int, "answer": str}, …]`.

    Args:
        path: The `.json` file.
        question_ids: Every question once.
        answers: As many.

    Raises:
        ValueError: there are not as many answers as questions, an id is no integer or comes twice, or an answer is no
            text.
    """
    check_ids("question_ids", question_ids)
    if len(answers) != len(question_ids):
        raise ValueError(f"Expected an answer to each of {len(question_ids)} questions, got {len(answers)}.")
    rows = []
    for question_id, answer in zip(question_ids, answers, strict=True):
        if not isinstance(question_id, int | np.integer) or isinstance(question_id, bool):
            raise ValueError(f"Expected question ids that are integers, as in VQA 2.0, got {question_id!r}.")
        if not isinstance(answer, str):
            raise ValueError(f"Expected answers that are texts, got {answer!r} to question {question_id}.")
        rows.append({"question_id": int(question_id), "answer": answer})
    write_json(path, rows)


def write_vcr_probabilities(
    path: Path, annot_ids: Sequence[str], answer_probabilities: np.ndarray, rationale_probabilities: np.ndarray
):
    """
    Writes what the leaderboard of VCR takes: a csv file with the columns `annot_id`, `answer_0` to `answer_3` and, for
    the answers 0 to 3, `rationale_conditioned_on_a0_0` to `rationale_conditioned_on_a3_3`. The leaderboard itself knows
    which answer is right.

    Args:
        path: The `.csv` file.
        annot_ids: Such as `"test-0"`, every annotation once.
        answer_probabilities: Float `(annotations, 4)`.
        rationale_probabilities: Float `(annotations, 4, 4)`: of the four rationales (last dimension) if the answer of
            the dimension before it were the right one.

    Raises:
        ValueError: a shape is another, an id comes twice, or probabilities are not within [0, 1].
    """
    check_ids("annot_ids", annot_ids)
    shape = (len(annot_ids), NUM_CHOICES)
    answers = _check_probabilities("answer_probabilities", answer_probabilities, shape)
    rationales = _check_probabilities("rationale_probabilities", rationale_probabilities, (*shape, NUM_CHOICES))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(VCR_COLUMNS)
    for annot_id, row in zip(annot_ids, np.concatenate([answers, rationales.reshape(shape[0], -1)], 1), strict=True):
        # `str` of numpy's numbers has as many digits as tell them apart.
        writer.writerow([annot_id, *map(str, row)])
    write_text(path, text.getvalue())


def write_glue_answers(path: Path, answers: Sequence[str]):
    """
    Writes what GLUE's server takes: the columns `index` and `prediction`, separated by tabs.

    Args:
        path: The `.tsv` file.
        answers: To every example of the test data, in their order: classes by number (of RTE by name), or scores.
    """
    rows = ["index\tprediction", *(f"{number}\t{answer}" for number, answer in enumerate(answers))]
    write_text(path, "".join(f"{row}\n" for row in rows))


def write_retrieval_scores(
    folder: Path,
    scores: np.ndarray,
    captions: Sequence[str],
    image_of_caption: Sequence[int] | np.ndarray,
    image_ids: Sequence[str],
):
    """
    Writes a matrix of log-odds of a match (whose sigmoid is the match score) as `retrieval_scores.npy`, and beside it
    what its rows and columns are as `retrieval_ids.json`: `{"scores": "log-odds", "captions": [{"caption_id": str,
    "image_id": str, "caption": str}, …], "image_ids": [str, …]}`. The captions of an image are numbered, as in
    Flickr30K: `"1000092795#0"`.

    Args:
        folder: Where the two files go.
        scores: Numbers `(captions, images)`.
        captions: The rows.
        image_of_caption: Integers `(captions,)`, the column of the image that each caption is of.
        image_ids: The columns, every image once.

    Raises:
        ValueError: the shape of the scores is another, an image comes twice, or a caption is of none.
    """
    check_ids("image_ids", image_ids)
    if scores.shape != (len(captions), len(image_ids)):
        raise ValueError(
            f"`scores` must have the shape (captions, images), {(len(captions), len(image_ids))}, got {scores.shape}."
        )
    image_of_caption = np.asarray(image_of_caption)
    is_integer = np.issubdtype(image_of_caption.dtype, np.integer)
    is_column = is_integer & (image_of_caption >= 0) & (image_of_caption < len(image_ids))
    if image_of_caption.shape != (len(captions),) or not is_column.all():
        raise ValueError(
            f"`image_of_caption` must be {len(captions)} integers from 0 to {len(image_ids) - 1}, got "
            f"{image_of_caption!r:.200}."
        )
    num_captions: Counter[str] = Counter()
    rows = []
    for caption, image in zip(captions, image_of_caption, strict=True):
        image_id = image_ids[image]
        rows.append({"caption_id": f"{image_id}#{num_captions[image_id]}", "image_id": image_id, "caption": caption})
        num_captions[image_id] += 1
    folder.mkdir(parents=True, exist_ok=True)
    # The ids are there only once the scores are, and never beside scores of other captions.
    (folder / "retrieval_ids.json").unlink(missing_ok=True)
    unfinished = folder / "retrieval_scores.npy.unfinished"
    with open(unfinished, "wb") as file:
        np.save(file, scores)
    unfinished.replace(folder / "retrieval_scores.npy")
    ids = {"scores": "log-odds", "captions": rows, "image_ids": list(image_ids)}
    write_json(folder / "retrieval_ids.json", ids)


def check_ids(name: str, ids: Sequence[int | str]):
    """
    Raises:
        ValueError: an id comes more than once.
    """
    if len(set(ids)) < len(ids):
        repeated = [value for value, count in Counter(ids).items() if count > 1]
        raise ValueError(f"`{name}` must hold every id once, got these more often: {repeated[:5]}.")


def _check_probabilities(name: str, probabilities: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    probabilities = np.asarray(probabilities)
    if probabilities.shape != shape:
        raise ValueError(f"`{name}` must have the shape {shape}, got {probabilities.shape}.")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():  # NaN is neither
        raise ValueError(
            f"`{name}` must be within [0, 1], got values from {probabilities.min()} to {probabilities.max()}."
        )
    return probabilities
