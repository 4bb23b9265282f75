from .model_card import TrainedCard

__all__ = ["TrainedCard"]
