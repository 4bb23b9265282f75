"""The metrics of GLUE's CoLA, SST-2, STS-B and RTE, as a module of `evaluate` with a configuration for each."""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef

_DESCRIPTION = """
Of CoLA (`cola`) Matthews' correlation, of SST-2 (`sst2`) and RTE (`rte`) the accuracy, of STS-B (`stsb`) Pearson's and
Spearman's correlation.
"""

_INPUTS = """
Args:
    predictions, references: lists of classes, 0 or 1; of scores for stsb.

Returns:
    cola: matthews_correlation, in [-1, 1]; 0 where all predictions are one class.
    sst2, rte: accuracy, in [0, 1].
    stsb: pearson, spearmanr, in [-1, 1]; not a number where one side does not vary or is not a number somewhere.
"""

_CITATION = """
@inproceedings{wang2019glue,
  title={GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel R.},
  booktitle={ICLR},
  year={2019}
}
"""

_TASKS = ("cola", "sst2", "stsb", "rte")


class GLUEMetrics(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _TASKS:
            raise ValueError(f"The configuration must be one of {list(_TASKS)}, got {self.config_name!r}.")
        # Class labels refuse what is above 1 and what is no whole number; integers would be cut off silently.
        value = datasets.Value("float64") if self.config_name == "stsb" else datasets.ClassLabel(num_classes=2)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
            reference_urls=["https://gluebenchmark.com/"],
        )

    def _compute(self, predictions, references):
        if self.config_name == "stsb":
            return _correlations(predictions, references)
        for name, classes in (("predictions", predictions), ("references", references)):
            # Class labels may be missing, None or -1.
            if len(classes) == 0 or not set(classes) <= {0, 1}:
                raise ValueError(f"Expected `{name}` of 0 and 1, got {sorted(set(classes), key=str)}.")
        if self.config_name == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        return {"accuracy": float(accuracy_score(references, predictions))}


def _correlations(predictions: list[float | None], references: list[float | None]) -> dict[str, float]:
    if None in predictions or None in references:
        raise ValueError("Expected a score for every example, got None.")
    if len(predictions) < 2:
        raise ValueError(f"A correlation needs at least 2 pairs of scores, got {len(predictions)}.")
    pairs = np.array([predictions, references], dtype=np.float64)
    if np.isnan(pairs).any() or (pairs == pairs[:, :1]).all(axis=1).any():
        return {"pearson": float("nan"), "spearmanr": float("nan")}
    return {"pearson": float(pearsonr(*pairs)[0]), "spearmanr": float(spearmanr(*pairs)[0])}
