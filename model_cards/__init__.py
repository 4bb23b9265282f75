from .model_card import PretrainedCard

__all__ = ["PretrainedCard"]
