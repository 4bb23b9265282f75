"""Recall at k and median rank of image-text retrieval, in both directions, as a module of `evaluate`."""

import datasets
import evaluate

# Where the import fails, evaluate names what stands behind "From:" as what to install.
from processing.ranking import retrieval_recall  # From: the InterBERT repository

_DESCRIPTION = """
How often the image of a caption is among the k images of the highest scores, how often a caption of an image is among
the k captions of the highest scores, and the median rank of either. Of equal scores the wrong candidate's comes first;
a score that is not a number counts as the lowest for a right candidate and as the highest for a wrong one.
"""

_INPUTS = """
Args:
    scores: array of numbers (captions, images).
    references: for each caption the list of the columns of its images, at least one.
    ks: how many of the highest scores count, by default (1, 5, 10).

Returns:
    image_recall_at_k, text_recall_at_k: in [0, 1], for each k, of images by captions and of captions by images.
    image_median_rank, text_median_rank: 1 is the best.
"""


class RetrievalRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # The scores are an argument of `compute` rather than a feature: what is a feature is written to an Arrow file
        # and read back as lists of lists.
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"references": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, references, scores, ks=(1, 5, 10)):
        return retrieval_recall(scores, references, ks)
