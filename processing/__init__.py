from .captioned_images import CaptionedImages
from .configuration_faster_rcnn import FasterRCNNConfig
from .hard_negatives import mine_hard_negatives
from .image_processing_faster_rcnn import FasterRCNNImageProcessor
from .modeling_faster_rcnn import FasterRCNNForRegionFeatures
from .pipelines_interbert import (
    FeatureExtractionPipeline,
    ImageTextMatchingPipeline,
    VisualMultipleChoicePipeline,
    VisualQuestionAnsweringPipeline,
)
from .pretraining import PretrainingCollator, PretrainingPairs
from .processing_interbert import InterBERTProcessor
from .region_dataset import RegionDataset, load_region_dataset
from .sampling import ShuffledBatchSampler
from .streaming import RegionStream, StreamedBatches

__all__ = [
    "CaptionedImages",
    "FasterRCNNConfig",
    "FasterRCNNForRegionFeatures",
    "FasterRCNNImageProcessor",
    "FeatureExtractionPipeline",
    "ImageTextMatchingPipeline",
    "InterBERTProcessor",
    "ShuffledBatchSampler",
    "PretrainingCollator",
    "PretrainingPairs",
    "RegionDataset",
    "RegionStream",
    "StreamedBatches",
    "VisualMultipleChoicePipeline",
    "VisualQuestionAnsweringPipeline",
    "load_region_dataset",
    "mine_hard_negatives",
]
