"""The score of VQA 2.0, overall, by type of answer and by type of question, as a module of `evaluate`."""

from collections import defaultdict

import datasets
import evaluate

# Where the import fails, evaluate names what stands behind "From:" as what to install.
from processing.tasks.vqa import vqa_score  # From: the InterBERT repository

_DESCRIPTION = """
Of the ten sets of nine annotators, the mean of min(1, annotators who gave the predicted answer / 3): an answer of 1, 2,
3, 4 or more of the ten scores 0.3, 0.6, 0.9, 1. As in the official evaluation of VQA 2.0, answers are compared as
written where all ten annotators wrote the same, else in normalized form.
"""

_INPUTS = """
Args:
    predictions: list of answers.
    references: for each question the list of the answers of its ten annotators, as written.
    answer_types, question_types: lists of the type of every question, None where it has none; optional.

Returns:
    vqa_score: in [0, 1].
    by_answer_type, by_question_type: where the types are given, the score of each.
"""

_CITATION = """
@inproceedings{goyal2017making,
  title={Making the V in VQA Matter: Elevating the Role of Image Understanding in Visual Question Answering},
  author={Goyal, Yash and Khot, Tejas and Summers-Stay, Douglas and Batra, Dhruv and Parikh, Devi},
  booktitle={CVPR},
  year={2017}
}
"""


class VQAScore(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=["https://visualqa.org/evaluation.html"],
        )

    def _compute(self, predictions, references, answer_types=None, question_types=None):
        if len(predictions) == 0:
            raise ValueError("Expected the answers to at least one question, got none.")
        scores = [_score(*answers) for answers in zip(predictions, references, strict=True)]
        results = {"vqa_score": _mean(scores)}
        if answer_types is not None:
            results["by_answer_type"] = _means_by_type("answer_types", answer_types, scores)
        if question_types is not None:
            results["by_question_type"] = _means_by_type("question_types", question_types, scores)
        return results


def _score(prediction: str | None, answers: list[str | None]) -> float:
    if None in (prediction, *answers):
        raise ValueError(f"Expected answers that are texts, got {prediction!r} for {answers}.")
    return vqa_score(prediction, answers)


def _means_by_type(name: str, types: list[str | None], scores: list[float]) -> dict[str, float]:
    if len(types) != len(scores):
        raise ValueError(f"`{name}` must have one item for each of {len(scores)} questions, got {len(types)}.")
    by_type = defaultdict(list)
    for type_name, score in zip(types, scores, strict=True):
        if type_name is not None:
            by_type[type_name].append(score)
    return {type_name: _mean(of_type) for type_name, of_type in sorted(by_type.items())}


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)
