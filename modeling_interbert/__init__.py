from .modeling_interbert import (
    InterBERTClassifierOutput,
    InterBERTForImageRetrieval,
    InterBERTForImageRetrievalOutput,
    InterBERTForMultipleChoice,
    InterBERTForPreTraining,
    InterBERTForPreTrainingOutput,
    InterBERTForSequenceClassification,
    InterBERTForVQA,
    InterBERTModel,
    InterBERTModelOutput,
    InterBERTPreTrainedModel,
)
from .retriever import ImageMatch, IndexReport, InterBERTRetriever, match_log_odds

__all__ = [
    "ImageMatch",
    "IndexReport",
    "InterBERTClassifierOutput",
    "InterBERTForImageRetrieval",
    "InterBERTForImageRetrievalOutput",
    "InterBERTForMultipleChoice",
    "InterBERTForPreTraining",
    "InterBERTForPreTrainingOutput",
    "InterBERTForSequenceClassification",
    "InterBERTForVQA",
    "InterBERTModel",
    "InterBERTModelOutput",
    "InterBERTPreTrainedModel",
    "InterBERTRetriever",
    "match_log_odds",
]
