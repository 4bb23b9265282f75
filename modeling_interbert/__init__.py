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

__all__ = [
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
]
