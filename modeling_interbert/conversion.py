"""Reads checkpoints of the authors' release (GitHub black4321/InterBERT, August 2020)."""

import json
import os
from pathlib import Path

import torch

from .configuration_interbert import InterBERTConfig
from .modeling_interbert import (
    InterBERTForPreTraining,
    InterBERTPreTrainedModel,
    bert_layer_names,
    bert_text_embedding_names,
)

# Keys of the release's configuration, with the values that the release takes where a key is missing.
ORIGINAL_CONFIG_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "t_num_hidden_layers": 6,
    "v_num_hidden_layers": 6,
    "num_attention_heads": 12,
    "v_num_attention_heads": 8,
    "intermediate_size": 3072,
    "v_intermediate_size": 3072,
    "hidden_act": "gelu",
    "v_hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "v_hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.1,
    "v_attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "v_hidden_size": 768,
    "v_feature_size": 2048,
    "v_target_size": 1601,
    "bi_hidden_size": 1024,
    "fusion_method": "mul",
    "predict_feature": False,
}

# Heads of the release's task model, and ours.
TASK_HEADS = {"vil_prediction": "vqa_head", "vil_logit": "choice_head"}
# Heads of the task model that no task of the release uses.
UNUSED_HEADS = ("vision_logit.", "linguisic_logit.")


def convert_original_config(original_config: dict) -> InterBERTConfig:
    """
    Args:
        original_config (`dict`): Content of the release's JSON configuration; other keys (`pooling_method`, ...) are
            without effect in the release, and ignored.

    Raises:
        `ValueError`: the two streams differ in what InterBERT shares: width or activation.
    """
    original = ORIGINAL_CONFIG_DEFAULTS | original_config
    for name, vision_name in (("hidden_size", "v_hidden_size"), ("hidden_act", "v_hidden_act")):
        if original[name] != original[vision_name]:
            raise ValueError(
                f"`{vision_name}` must equal `{name}`, since both streams continue the interaction module: got "
                f"{original[vision_name]!r} and {original[name]!r}."
            )
    return InterBERTConfig(
        vocab_size=original["vocab_size"],
        hidden_size=original["hidden_size"],
        num_hidden_layers=original["num_hidden_layers"],
        num_text_layers=original["t_num_hidden_layers"],
        num_vision_layers=original["v_num_hidden_layers"],
        num_attention_heads=original["num_attention_heads"],
        vision_num_attention_heads=original["v_num_attention_heads"],
        intermediate_size=original["intermediate_size"],
        vision_intermediate_size=original["v_intermediate_size"],
        hidden_act=original["hidden_act"],
        hidden_dropout_prob=original["hidden_dropout_prob"],
        vision_hidden_dropout_prob=original["v_hidden_dropout_prob"],
        attention_probs_dropout_prob=original["attention_probs_dropout_prob"],
        vision_attention_probs_dropout_prob=original["v_attention_probs_dropout_prob"],
        max_position_embeddings=original["max_position_embeddings"],
        type_vocab_size=original["type_vocab_size"],
        initializer_range=original["initializer_range"],
        region_feature_size=original["v_feature_size"],
        num_region_classes=original["v_target_size"],
        pooler_size=original["bi_hidden_size"],
        fusion=original["fusion_method"],
        region_objective="feature" if original["predict_feature"] else "soft_class",
    )


def original_weight_names(config: InterBERTConfig, with_task_heads: bool) -> dict[str, str]:
    """Maps the release's parameter names to ours: of the pretraining model, and of the task model's heads."""
    names = bert_text_embedding_names(config)
    # In the release, the text stream continues the numbering of the interaction module.
    for i in range(config.num_hidden_layers):
        names |= bert_layer_names(f"bert.encoder.layer.{i}", f"interaction_layers.{i}")
    for i in range(config.num_text_layers):
        names |= bert_layer_names(f"bert.encoder.layer.{config.num_hidden_layers + i}", f"text_layers.{i}")
    for i in range(config.num_vision_layers):
        names |= bert_layer_names(f"bert.encoder.v_layer.{i}", f"vision_layers.{i}")
    for kind in ("weight", "bias"):
        names[f"bert.v_embeddings.image_embeddings.{kind}"] = f"embeddings.image.feature_embeddings.{kind}"
        names[f"bert.v_embeddings.image_location_embeddings.{kind}"] = f"embeddings.image.box_embeddings.{kind}"
        names[f"bert.v_embeddings.LayerNorm.{kind}"] = f"embeddings.image.layer_norm.{kind}"
        names[f"bert.t_pooler.dense.{kind}"] = f"text_pooler.dense.{kind}"
        names[f"bert.v_pooler.dense.{kind}"] = f"vision_pooler.dense.{kind}"
    names = {original: f"interbert.{name}" for original, name in names.items()}

    for original_head, head in (("predictions", "mlm_head"), ("imagePredictions", "region_head")):
        for kind in ("weight", "bias"):
            names[f"cls.{original_head}.transform.dense.{kind}"] = f"{head}.dense.{kind}"
            names[f"cls.{original_head}.transform.LayerNorm.{kind}"] = f"{head}.layer_norm.{kind}"
    names["cls.predictions.decoder.weight"] = "mlm_head.decoder.weight"
    names["cls.predictions.bias"] = "mlm_head.decoder.bias"
    for kind in ("weight", "bias"):
        names[f"cls.imagePredictions.decoder.{kind}"] = f"region_head.decoder.{kind}"
        names[f"cls.bi_seq_relationship.{kind}"] = f"itm_head.classifier.{kind}"
        if with_task_heads:
            names |= {f"{original}.{kind}": f"{head}.{kind}" for original, head in TASK_HEADS.items()}
    return names


def convert_original_state_dict(
    original_state_dict: dict[str, torch.Tensor], config: InterBERTConfig
) -> dict[str, torch.Tensor]:
    """
    The release's parameters under our names: those of [`InterBERTForPreTraining`] and, of a task model, `vqa_head` and
    `choice_head` as well.

    Args:
        original_state_dict: The release's state dict, with or without a leading `module.`.
        config: The converted configuration.

    Raises:
        `ValueError`: parameters are missing or unknown; the message names them.
    """
    state_dict = {name.removeprefix("module."): weight for name, weight in original_state_dict.items()}
    state_dict = {name: weight for name, weight in state_dict.items() if not name.startswith(UNUSED_HEADS)}
    names = original_weight_names(config, with_task_heads="vil_prediction.weight" in state_dict)
    missing, unknown = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            "The checkpoint does not fit its configuration. Missing parameters: "
            f"{', '.join(missing) or 'none'}. Unknown parameters: {', '.join(unknown) or 'none'}."
        )
    return {names[name]: weight for name, weight in state_dict.items()}


def convert_original_checkpoint(
    checkpoint_path: str | os.PathLike,
    config_path: str | os.PathLike,
    model_class: type[InterBERTPreTrainedModel] = InterBERTForPreTraining,
) -> InterBERTPreTrainedModel:
    """
    Reads a checkpoint of the release: of its pretraining model, or of its task model.

    Args:
        checkpoint_path: The release's `.bin` file; read with `weights_only=True`, so nothing in it is executed.
        config_path: The release's JSON configuration.
        model_class: The model to make of it. VQA and multiple choice need the heads of a task model.

    Raises:
        `ValueError`: the checkpoint does not fit its configuration, or lacks the head of `model_class`.
    """
    return build_converted_model(*read_original_checkpoint(checkpoint_path, config_path), model_class)


def build_converted_model(
    config: InterBERTConfig, state_dict: dict[str, torch.Tensor], model_class: type[InterBERTPreTrainedModel]
) -> InterBERTPreTrainedModel:
    """A model of `model_class`, in evaluation mode, from what [`read_original_checkpoint`] returns."""
    model = model_class(config)
    # The base model is a part of every other.
    prefix = f"{model_class.base_model_prefix}." if model.base_model is model else ""
    expected = model.state_dict()
    missing = [name for name in expected if prefix + name not in state_dict]
    if missing:
        raise ValueError(f"The checkpoint has no weights for {model_class.__name__}'s {', '.join(missing)}.")
    for name, weight in expected.items():
        if weight.shape != state_dict[prefix + name].shape:
            raise ValueError(
                f"The checkpoint does not fit its configuration: `{name}` must have shape {tuple(weight.shape)}, got "
                f"{tuple(state_dict[prefix + name].shape)}."
            )
    model.load_state_dict({name: state_dict[prefix + name] for name in expected})
    return model.eval()


def read_original_checkpoint(
    checkpoint_path: str | os.PathLike, config_path: str | os.PathLike
) -> tuple[InterBERTConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of a checkpoint of the release, under our names, with all the heads that it has."""
    config = convert_original_config(json.loads(Path(config_path).read_text(encoding="utf-8")))
    original_state_dict = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    if not isinstance(original_state_dict, dict):
        raise ValueError(f"{checkpoint_path} must hold a state dict, got {type(original_state_dict).__name__}.")
    state_dict = convert_original_state_dict(original_state_dict, config)
    if "vqa_head.weight" in state_dict:
        config.vqa_head = "linear"
        config.num_labels = state_dict["vqa_head.weight"].shape[0]
    return config, state_dict
