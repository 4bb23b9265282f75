"""Small configurations, models and inputs that the tests of the model share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertTokenizer

from configuration_interbert import InterBERTConfig
from modeling_interbert import (
    InterBERTForImageRetrieval,
    InterBERTForMultipleChoice,
    InterBERTForPreTraining,
    InterBERTForSequenceClassification,
    InterBERTForVQA,
    InterBERTModel,
)
from processing import FasterRCNNConfig, FasterRCNNForRegionFeatures, FasterRCNNImageProcessor, InterBERTProcessor

MODEL_CLASSES = [
    InterBERTModel,
    InterBERTForPreTraining,
    InterBERTForImageRetrieval,
    InterBERTForVQA,
    InterBERTForMultipleChoice,
    InterBERTForSequenceClassification,
]

NUM_TOKENS = (7, 5, 3)
NUM_REGIONS = (5, 2, 4)
NUM_LABELS = 4
WORDS = "a red blue green small large dog cat bird on the grass".split()

# The numbers of layers differ, so that no module can stand in for another; so do the widths.
TINY = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_text_layers": 3,
    "num_vision_layers": 1,
    "num_attention_heads": 2,
    "vision_num_attention_heads": 4,
    "intermediate_size": 24,
    "vision_intermediate_size": 20,
    "max_position_embeddings": 12,
    "region_feature_size": 6,
    "num_region_classes": 5,
    "pooler_size": 8,
}

NO_DROPOUT = {
    "hidden_dropout_prob": 0,
    "vision_hidden_dropout_prob": 0,
    "attention_probs_dropout_prob": 0,
    "vision_attention_probs_dropout_prob": 0,
}


def tiny_config(**overrides) -> InterBERTConfig:
    return InterBERTConfig(**(TINY | overrides))


@torch.no_grad()
def perturb(model: torch.nn.Module, scale: float = 0.2) -> torch.nn.Module:
    """Moves every parameter away from its initial value: at 0.02 attention is flat, and biases are all 0."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * scale)
    return model


def tiny_model(model_class, attn_implementation: str = "sdpa", **overrides):
    """A perturbed model in evaluation mode."""
    model = perturb(model_class(tiny_config(**overrides))).eval()
    model.set_attn_implementation(attn_implementation)
    return model


def task_model(model_class, attn_implementation: str = "sdpa", **overrides):
    """A perturbed model in evaluation mode, the same every time, with classes to tell apart."""
    torch.manual_seed(1)
    return tiny_model(model_class, attn_implementation, **{"num_labels": NUM_LABELS} | overrides)


def prefix_mask(lengths: tuple[int, ...]) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def tiny_text() -> dict[str, torch.Tensor]:
    """Three texts of 7, 5 and 3 tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(NUM_TOKENS), max(NUM_TOKENS))
    return {
        "input_ids": torch.randint(1, TINY["vocab_size"], shape, generator=generator),
        "attention_mask": prefix_mask(NUM_TOKENS),
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
    }


def tiny_regions() -> dict[str, torch.Tensor]:
    """Three images of 5, 2 and 4 regions."""
    generator = torch.Generator().manual_seed(2)
    shape = (len(NUM_REGIONS), max(NUM_REGIONS))
    corners = torch.rand(*shape, 2, 2, generator=generator).sort(dim=2).values  # (batch, regions, corner, axis)
    return {
        "region_features": torch.randn(*shape, TINY["region_feature_size"], generator=generator),
        "region_boxes": corners.flatten(2),
        "region_attention_mask": prefix_mask(NUM_REGIONS),
    }


def tiny_inputs() -> dict[str, torch.Tensor]:
    return tiny_text() | tiny_regions()


def tiny_labels() -> dict[str, torch.Tensor]:
    """Scores 3 words of the first two texts, 4 regions, and all pairs."""
    labels = torch.full((3, 7), -100)
    labels[0, 2], labels[0, 5], labels[1, 1] = 11, 4, 29
    region_target_mask = torch.zeros(3, 5, dtype=torch.long)
    region_target_mask[0, 4] = region_target_mask[1, 0] = region_target_mask[2, 1] = region_target_mask[2, 3] = 1
    generator = torch.Generator().manual_seed(3)
    return {
        "labels": labels,
        "region_targets": torch.rand(3, 5, TINY["num_region_classes"], generator=generator).softmax(dim=-1),
        "region_target_mask": region_target_mask,
        "itm_labels": torch.tensor([0, 1, 1]),
    }


def save_tiny_detector(folder: Path, region_feature_size: int = 32) -> Path:
    """A random detector that finds 2 to 5 regions."""
    torch.manual_seed(0)
    config = FasterRCNNConfig(
        depth=50,
        stem_channels=4,
        res2_channels=region_feature_size // 8,
        width_per_group=2,
        rpn_channels=4,
        num_classes=7,
        num_attributes=3,
        min_regions=2,
        max_regions=5,
        post_nms_top_k=10,
        pooler_size=4,
    )
    FasterRCNNForRegionFeatures(config).save_pretrained(folder)
    FasterRCNNImageProcessor(shortest_edge=48, longest_edge=64).save_pretrained(folder)
    return folder


def tiny_processor(region_feature_size: int = TINY["region_feature_size"], **kwargs) -> InterBERTProcessor:
    """The processor of a tiny model, whose vocabulary is `WORDS`."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, model_max_length=TINY["max_position_embeddings"]
    )
    return InterBERTProcessor(tokenizer, region_feature_size=region_feature_size, **kwargs)


def tiny_record(image_id: str, num_regions: int, seed: int) -> dict[str, Any]:
    """A region record of an image of 100 x 100 pixels."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 100, (num_regions, 2, 2)), axis=1)
    return {
        "image_id": image_id,
        "features": rng.normal(size=(num_regions, TINY["region_feature_size"])).astype(np.float16),
        "boxes": corners.reshape(num_regions, 4).astype(np.float32),
        "width": 100,
        "height": 100,
    }


def example_inputs(model_class) -> dict[str, torch.Tensor]:
    """What a class takes: three pairs, three texts, or three images with two texts each."""
    if model_class is InterBERTForSequenceClassification:
        return tiny_text()
    if model_class is InterBERTForMultipleChoice:
        return {
            name: torch.stack([value, value.flip(0)], dim=1) for name, value in tiny_text().items()
        } | tiny_regions()
    return tiny_inputs()


def example_labels(model_class) -> dict[str, torch.Tensor]:
    """Labels of `example_inputs`; none for the encoder."""
    if model_class is InterBERTModel:
        return {}
    if model_class is InterBERTForPreTraining:
        return tiny_labels()
    if model_class is InterBERTForImageRetrieval:
        return {"itm_labels": torch.tensor([0, 1, 1])}
    if model_class is InterBERTForVQA:
        scores = torch.rand(3, NUM_LABELS, generator=torch.Generator().manual_seed(4))
        return {"labels": (scores > 0.5).float()}
    if model_class is InterBERTForMultipleChoice:
        return {"labels": torch.tensor([0, 1, 0])}
    return {"labels": torch.tensor([3, 0, 2])}


def scalar(outputs) -> torch.Tensor:
    """The loss, or for the encoder, which has none, a number that every output has a part in."""
    if "loss" in outputs:
        return outputs.loss
    return sum(output.square().mean() for output in outputs.values())


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
