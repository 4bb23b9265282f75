from .modeling_interbert import (
    InterBERTForPreTraining,
    InterBERTForPreTrainingOutput,
    InterBERTModel,
    InterBERTModelOutput,
    InterBERTPreTrainedModel,
)

__all__ = [
    "InterBERTForPreTraining",
    "InterBERTForPreTrainingOutput",
    "InterBERTModel",
    "InterBERTModelOutput",
    "InterBERTPreTrainedModel",
]
