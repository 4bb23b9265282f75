from .pretraining import PretrainingCollator, PretrainingPairs
from .processing_interbert import InterBERTProcessor
from .region_dataset import RegionDataset, load_region_dataset
from .sampling import LengthGroupedSampler
from .streaming import RegionStream, StreamedBatches

__all__ = [
    "InterBERTProcessor",
    "LengthGroupedSampler",
    "PretrainingCollator",
    "PretrainingPairs",
    "RegionDataset",
    "RegionStream",
    "StreamedBatches",
    "load_region_dataset",
]
