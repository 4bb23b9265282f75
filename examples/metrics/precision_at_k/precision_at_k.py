"""Precision at k, such as the P@5 of product retrieval, as a module of `evaluate`."""

import datasets
import evaluate

# Where the import fails, evaluate names what stands behind "From:" as what to install.
from processing.ranking import precision_at_k  # From: the InterBERT repository

_DESCRIPTION = """
The number of relevant candidates among the k of the highest scores, divided by k; the mean over the queries. Of equal
scores the irrelevant candidate's comes first; a score that is not a number counts as the lowest for a relevant
candidate and as the highest for another.
"""

_INPUTS = """
Args:
    scores: array of numbers (queries, candidates).
    references: for each query the list of the columns of its relevant candidates; it may be empty.
    ks: how many of the highest scores count, by default (5,).

Returns:
    precision_at_k: in [0, 1], for each k.
"""


class PrecisionAtK(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # The scores are an argument of `compute` rather than a feature: what is a feature is written to an Arrow file
        # and read back as lists of lists.
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"references": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, references, scores, ks=(5,)):
        return precision_at_k(scores, references, ks)
