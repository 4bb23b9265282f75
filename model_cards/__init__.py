from . import (
    interbert_base,
    interbert_base_chinese,
    interbert_base_flickr30k,
    interbert_base_vcr,
    interbert_base_vqa2,
    interbert_tiny_scenes,
)
from .checkpoint import Checkpoint, PaperResult
from .model_card import TrainedCard, WidgetExample

CHECKPOINTS = {
    module.CHECKPOINT.name: module.CHECKPOINT
    for module in (
        interbert_base,
        interbert_base_flickr30k,
        interbert_base_vqa2,
        interbert_base_vcr,
        interbert_base_chinese,
        interbert_tiny_scenes,
    )
}

__all__ = ["CHECKPOINTS", "Checkpoint", "PaperResult", "TrainedCard", "WidgetExample"]
