from .pretraining import PretrainingCollator, PretrainingPairs
from .processing_interbert import InterBERTProcessor
from .region_dataset import RegionDataset, load_region_dataset

__all__ = [
    "InterBERTProcessor",
    "PretrainingCollator",
    "PretrainingPairs",
    "RegionDataset",
    "load_region_dataset",
]
