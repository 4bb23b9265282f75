from .captions import ImageCaptions, read_captions, read_image_captions
from .files import canonical_image_id
from .glue import GLUE_TASKS, STS_SCORES, GLUECollator, GLUEExample, GLUETask, read_glue, read_glue_dataset, split_glue
from .region_examples import ExamplesWithRegions
from .retrieval import RetrievalCollator, RetrievalExamples, RetrievalQuery, read_queries
from .vcr import (
    VCRCollator,
    VCRDataset,
    VCRExample,
    merge_annotated_boxes,
    multiple_choice,
    read_vcr,
    read_vcr_metadata,
)
from .vqa import (
    VQACollator,
    VQAExample,
    build_answer_vocabulary,
    normalize_answer,
    questions_of_dataset,
    read_answer_vocabulary,
    read_questions,
    soft_scores,
)

__all__ = [
    "GLUE_TASKS",
    "STS_SCORES",
    "ExamplesWithRegions",
    "GLUECollator",
    "GLUEExample",
    "GLUETask",
    "ImageCaptions",
    "RetrievalCollator",
    "RetrievalExamples",
    "RetrievalQuery",
    "VCRCollator",
    "VCRDataset",
    "VCRExample",
    "VQACollator",
    "VQAExample",
    "build_answer_vocabulary",
    "canonical_image_id",
    "merge_annotated_boxes",
    "multiple_choice",
    "normalize_answer",
    "questions_of_dataset",
    "read_answer_vocabulary",
    "read_captions",
    "read_glue",
    "read_glue_dataset",
    "read_image_captions",
    "read_queries",
    "read_questions",
    "read_vcr",
    "read_vcr_metadata",
    "soft_scores",
    "split_glue",
]
