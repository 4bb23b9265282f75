"""The three accuracies of visual commonsense reasoning (VCR), as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Accuracy of the chosen answers (Q→A), of the rationales that are chosen for the right answers (QA→R), and of both
together (Q→AR): there, an annotation is right where its answer and its rationale are.
"""

_INPUTS = """
Args:
    predictions: for each annotation {"answer": int, "rationale": int}, the choices, from 0 to 3.
    references: for each annotation {"answer": int, "rationale": int}, the right choices.

Returns:
    answer_accuracy, rationale_accuracy, answer_and_rationale_accuracy: in [0, 1].
"""

_CITATION = """
@inproceedings{zellers2019from,
  title={From Recognition to Cognition: Visual Commonsense Reasoning},
  author={Zellers, Rowan and Bisk, Yonatan and Farhadi, Ali and Choi, Yejin},
  booktitle={CVPR},
  year={2019}
}
"""

_NUM_CHOICES = 4


class VCRAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # Class labels refuse what is above 3 and what is no whole number; integers would be cut off silently.
        choice = datasets.ClassLabel(num_classes=_NUM_CHOICES)
        choices = {"answer": choice, "rationale": choice}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": choices, "references": choices}),
            reference_urls=["https://visualcommonsense.com/leaderboard/"],
        )

    def _compute(self, predictions, references):
        is_right = _choices("predictions", predictions) == _choices("references", references)  # (annotations, 2)
        answer_accuracy, rationale_accuracy = is_right.mean(axis=0)
        return {
            "answer_accuracy": float(answer_accuracy),
            "rationale_accuracy": float(rationale_accuracy),
            "answer_and_rationale_accuracy": float(is_right.all(axis=1).mean()),
        }


def _choices(name: str, annotations: list[dict[str, int | None]]) -> np.ndarray:
    """Integers `(annotations, 2)`."""
    if len(annotations) == 0:
        raise ValueError(f"Expected `{name}` of at least one annotation, got none.")
    for annotation in annotations:
        # Class labels may be missing, None or -1.
        if any(choice is None or choice < 0 for choice in annotation.values()):
            raise ValueError(f"Expected `{name}` from 0 to {_NUM_CHOICES - 1}, got {annotation}.")
    return np.array([[annotation["answer"], annotation["rationale"]] for annotation in annotations])
