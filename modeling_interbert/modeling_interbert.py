"""InterBERT in PyTorch (paper: arXiv 2003.13198).

A single-stream *interaction module* encodes `[image regions ; text tokens]` together; a two-stream *independence
module* then encodes the text positions and the image positions each on their own, so that every modality keeps a
representation of its own (paper, section 3).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, BertForMaskedLM, BertModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_interbert import InterBERTConfig

MODULES = ("interaction", "text", "image")
# Fields of every output, filled on request.
RECORDED_OUTPUTS = [f"{module}_{kind}" for module in MODULES for kind in ("hidden_states", "attentions")]


@dataclass
class InterBERTModelOutput(ModelOutput):
    """
    Output of [`InterBERTModel`]. Of a modality that was not given, the first four fields are None and the recorded ones
    are empty.

    Args:
        text_last_hidden_state (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`):
            Output of the text stream.
        vision_last_hidden_state (`torch.FloatTensor` of shape `(batch, regions + 1, hidden_size)`):
            Output of the vision stream; position 0 is the whole image.
        text_pooler_output, vision_pooler_output (`torch.FloatTensor` of shape `(batch, pooler_size)`):
            Position 0 of each stream through its pooler: linear layer and ReLU.
        interaction_hidden_states (`tuple(torch.FloatTensor)`, with `output_hidden_states=True`):
            `(batch, regions + 1 + tokens, hidden_size)`, image positions first: the embeddings, then the output of
            every interaction layer.
        text_hidden_states, image_hidden_states (`tuple(torch.FloatTensor)`, with `output_hidden_states=True`):
            Output of every layer of the stream; the first one read its part of `interaction_hidden_states[-1]`.
        interaction_attentions, text_attentions, image_attentions (`tuple(torch.FloatTensor)`, with
            `output_attentions=True`): Attention probabilities `(batch, heads, positions, positions)` of every layer.
    """

    text_last_hidden_state: torch.FloatTensor | None = None
    vision_last_hidden_state: torch.FloatTensor | None = None
    text_pooler_output: torch.FloatTensor | None = None
    vision_pooler_output: torch.FloatTensor | None = None
    interaction_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    interaction_attentions: tuple[torch.FloatTensor, ...] | None = None
    text_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class InterBERTForPreTrainingOutput(ModelOutput):
    """
    Output of [`InterBERTForPreTraining`]. The recorded outputs are those of [`InterBERTModelOutput`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, with any labels): Sum of the losses below.
        mlm_loss (`torch.FloatTensor` of shape `()`, with `labels`): Cross-entropy of the scored tokens.
        region_loss (`torch.FloatTensor` of shape `()`, with `region_targets`): Loss of the scored regions.
        itm_loss (`torch.FloatTensor` of shape `()`, with `itm_labels`): Cross-entropy of matched against mismatched.
        mlm_logits (`torch.FloatTensor`):
            `(batch, tokens, vocab_size)`; with `labels` only the scored tokens in row-major order,
            `(scored, vocab_size)`.
        region_logits (`torch.FloatTensor`):
            `(batch, regions, num_region_classes)`, without the whole-image position; with `region_targets` only the
            scored regions in row-major order, `(scored, num_region_classes)`. The last dimension is
            `region_feature_size` where `config.region_objective` is "feature".
        itm_logits (`torch.FloatTensor` of shape `(batch, 2)`): Column 0: text and image match; 1: they do not.
    """

    loss: torch.FloatTensor | None = None
    mlm_loss: torch.FloatTensor | None = None
    region_loss: torch.FloatTensor | None = None
    itm_loss: torch.FloatTensor | None = None
    mlm_logits: torch.FloatTensor | None = None
    region_logits: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None
    interaction_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    interaction_attentions: tuple[torch.FloatTensor, ...] | None = None
    text_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class InterBERTForImageRetrievalOutput(ModelOutput):
    """
    Output of [`InterBERTForImageRetrieval`]. The recorded outputs are those of [`InterBERTModelOutput`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, with `itm_labels` or `labels`): Cross-entropy.
        itm_logits (`torch.FloatTensor` of shape `(batch, 2)` or `(batch, choices, 2)`):
            Column 0: text and image match; 1: they do not.
        match_scores (float32 `torch.FloatTensor` of shape `(batch,)` or `(batch, choices)`): Probability of a match.
    """

    loss: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None
    match_scores: torch.FloatTensor | None = None
    interaction_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    interaction_attentions: tuple[torch.FloatTensor, ...] | None = None
    text_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class InterBERTClassifierOutput(ModelOutput):
    """
    Output of the classifiers: [`InterBERTForVQA`], [`InterBERTForMultipleChoice`] and
    [`InterBERTForSequenceClassification`]. The recorded outputs are those of [`InterBERTModelOutput`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, with `labels`): The loss of the class.
        logits (`torch.FloatTensor` of shape `(batch, num_labels)` or `(batch, choices)`): Scores before the softmax.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    interaction_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    interaction_attentions: tuple[torch.FloatTensor, ...] | None = None
    text_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_attentions: tuple[torch.FloatTensor, ...] | None = None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the one implementation that returns the attention probabilities."""
    attention_scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attention_scores = attention_scores + attention_mask
    attention_probs = nn.functional.softmax(attention_scores, dim=-1, dtype=torch.float32).to(query.dtype)
    attention_probs = nn.functional.dropout(attention_probs, p=dropout, training=module.training)
    return torch.matmul(attention_probs, value).transpose(1, 2).contiguous(), attention_probs


class InterBERTAttention(nn.Module):
    """Multi-head self-attention through transformers' attention interface."""

    def __init__(self, config: InterBERTConfig, num_heads: int, dropout: float):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // num_heads
        self.scaling = self.head_size**-0.5
        self.attention_dropout = dropout
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch, positions, hidden_size)` to `(batch, heads, positions, head_size)`."""
        return states.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_implementation: str,
        num_queries: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.split_heads(self.query(hidden_states[:, :num_queries]))
        key = self.split_heads(self.key(hidden_states))
        value = self.split_heads(self.value(hidden_states))

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            attn_implementation, eager_attention_forward
        )
        attention_output, attention_probs = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return self.output(attention_output.flatten(2)), attention_probs


class InterBERTLayer(GradientCheckpointingLayer):
    """
    Transformer layer with the LayerNorm after each residual connection, as in BERT. With `num_queries`, only the output
    of so many first positions is computed, `(batch, num_queries, hidden_size)`; they read all positions nevertheless.
    """

    def __init__(
        self,
        config: InterBERTConfig,
        num_heads: int,
        intermediate_size: int,
        hidden_dropout: float,
        attention_dropout: float,
    ):
        super().__init__()
        self.attention = InterBERTAttention(config, num_heads, attention_dropout)
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(intermediate_size, config.hidden_size)
        self.output_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_implementation: str,
        num_queries: int | None = None,
    ) -> torch.Tensor:
        attention_output, _ = self.attention(hidden_states, attention_mask, attn_implementation, num_queries)
        hidden_states = self.attention_layer_norm(hidden_states[:, :num_queries] + self.dropout(attention_output))
        layer_output = self.output(self.activation(self.intermediate(hidden_states)))
        return self.output_layer_norm(hidden_states + self.dropout(layer_output))


def mlp(input_size: int, output_size: int, activation: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(input_size, output_size), ACT2FN[activation], nn.Linear(output_size, output_size))


class InterBERTTextEmbeddings(nn.Module):
    """Sum of word, position and token type embeddings, LayerNorm, dropout."""

    def __init__(self, config: InterBERTConfig):
        super().__init__()
        self.max_position_embeddings = config.max_position_embeddings
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        if config.text_position_embedding == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.position_embeddings = mlp(1, config.hidden_size, config.hidden_act)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.LongTensor | None,
        token_type_ids: torch.LongTensor | None,
        position_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        num_tokens = inputs_embeds.shape[1]
        if num_tokens > self.max_position_embeddings:
            raise ValueError(
                f"The text has {num_tokens} tokens, more than `max_position_embeddings` "
                f"({self.max_position_embeddings})."
            )
        if position_ids is None:
            position_ids = torch.arange(num_tokens, device=inputs_embeds.device)[None]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        if isinstance(self.position_embeddings, nn.Embedding):
            position_embeddings = self.position_embeddings(position_ids)
        else:
            # Positions as a share of the longest text, so that the MLP's input stays of order 1.
            positions = position_ids[..., None].to(inputs_embeds.dtype) / self.max_position_embeddings
            position_embeddings = self.position_embeddings(positions)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids) + position_embeddings
        return self.dropout(self.layer_norm(embeddings))


class InterBERTImageEmbeddings(nn.Module):
    """
    Embeds the regions of an image, and before them the whole image: position 0 has the mean of the region features
    and the box (0, 0, 1, 1). Feature and box (corners and area) are embedded apart and added; LayerNorm, dropout.
    """

    def __init__(self, config: InterBERTConfig):
        super().__init__()
        if config.region_embedding == "linear":
            self.feature_embeddings = nn.Linear(config.region_feature_size, config.hidden_size)
            self.box_embeddings = nn.Linear(5, config.hidden_size)
        else:
            self.feature_embeddings = mlp(config.region_feature_size, config.hidden_size, config.hidden_act)
            self.box_embeddings = mlp(5, config.hidden_size, config.hidden_act)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.vision_hidden_dropout_prob)

    def forward(
        self,
        region_features: torch.FloatTensor,
        region_boxes: torch.FloatTensor,
        region_attention_mask: torch.LongTensor | None,
    ) -> torch.Tensor:
        batch_size = region_features.shape[0]
        region_features = region_features.float()  # a mean of half-precision features would lose precision
        if region_attention_mask is None:
            mean_feature = region_features.sum(dim=1, keepdim=True) / max(region_features.shape[1], 1)
        else:
            is_region = region_attention_mask[..., None].float()
            num_regions = is_region.sum(dim=1, keepdim=True).clamp(min=1)
            mean_feature = (region_features * is_region).sum(dim=1, keepdim=True) / num_regions
        image_box = region_boxes.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(batch_size, 1, 4)
        features = torch.cat([mean_feature, region_features], dim=1)  # (batch, regions + 1, region_feature_size)
        boxes = torch.cat([image_box, region_boxes], dim=1)
        areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        boxes = torch.cat([boxes, areas[..., None]], dim=-1)  # (batch, regions + 1, 5)

        dtype = self.layer_norm.weight.dtype
        embeddings = self.feature_embeddings(features.to(dtype)) + self.box_embeddings(boxes.to(dtype))
        return self.dropout(self.layer_norm(embeddings))


class InterBERTEmbeddings(nn.Module):
    """Joint sequence of the interaction module: image positions first, then text positions."""

    def __init__(self, config: InterBERTConfig):
        super().__init__()
        self.text = InterBERTTextEmbeddings(config)
        self.image = InterBERTImageEmbeddings(config)

    def forward(
        self,
        input_ids: torch.LongTensor | None,
        token_type_ids: torch.LongTensor | None,
        position_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        region_features: torch.FloatTensor | None,
        region_boxes: torch.FloatTensor | None,
        region_attention_mask: torch.LongTensor | None,
        region_embeds: torch.FloatTensor | None,
    ) -> torch.Tensor:
        if region_features is not None:
            region_embeds = self.image(region_features, region_boxes, region_attention_mask)
        if input_ids is None and inputs_embeds is None:
            return region_embeds
        text_embeds = self.text(input_ids, token_type_ids, position_ids, inputs_embeds)
        if region_embeds is None:
            return text_embeds
        if region_embeds.shape[0] != text_embeds.shape[0]:  # one of them stands beside many, and was embedded once
            batch_size = max(region_embeds.shape[0], text_embeds.shape[0])
            region_embeds = region_embeds.expand(batch_size, -1, -1)
            text_embeds = text_embeds.expand(batch_size, -1, -1)
        return torch.cat([region_embeds, text_embeds], dim=1)


class InterBERTPooler(nn.Module):
    """A stream's first position through a linear layer and ReLU."""

    def __init__(self, config: InterBERTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(self.dense(hidden_states[:, 0]))


class InterBERTFusion(nn.Module):
    """The two pooled vectors made one, by product or sum; dropout."""

    def __init__(self, config: InterBERTConfig):
        super().__init__()
        self.fusion = config.fusion
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, text_pooler_output: torch.Tensor, vision_pooler_output: torch.Tensor) -> torch.Tensor:
        if self.fusion == "mul":
            return self.dropout(text_pooler_output * vision_pooler_output)
        return self.dropout(text_pooler_output + vision_pooler_output)


class InterBERTMatchHead(nn.Module):
    """Whether text and image belong together: logits `(batch, 2)`, column 0 for a match."""

    def __init__(self, config: InterBERTConfig):
        super().__init__()
        self.fusion = InterBERTFusion(config)
        self.classifier = nn.Linear(config.pooler_size, 2)

    def forward(self, text_pooler_output: torch.Tensor, vision_pooler_output: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.fusion(text_pooler_output, vision_pooler_output))


class InterBERTPredictionHead(nn.Module):
    """What a masked position holds: linear layer, activation, LayerNorm, then a linear decoder (as BERT's MLM head)."""

    def __init__(self, config: InterBERTConfig, output_size: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, output_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.layer_norm(self.activation(self.dense(hidden_states))))


class InterBERTPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading, and starting from a BERT: what all InterBERT models share."""

    config_class = InterBERTConfig
    base_model_prefix = "interbert"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["InterBERTLayer", "InterBERTEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "interaction_hidden_states": [
            OutputRecorder(InterBERTEmbeddings),
            OutputRecorder(InterBERTLayer, layer_name="interaction_layers"),
        ],
        "text_hidden_states": OutputRecorder(InterBERTLayer, layer_name="text_layers"),
        "image_hidden_states": OutputRecorder(InterBERTLayer, layer_name="vision_layers"),
        "interaction_attentions": OutputRecorder(InterBERTAttention, index=1, layer_name="interaction_layers"),
        "text_attentions": OutputRecorder(InterBERTAttention, index=1, layer_name="text_layers"),
        "image_attentions": OutputRecorder(InterBERTAttention, index=1, layer_name="vision_layers"),
    }

    @classmethod
    def from_bert(
        cls,
        pretrained_model_name_or_path: str,
        config: InterBERTConfig | None = None,
        layout: Literal["paper", "release"] = "paper",
        **kwargs,
    ) -> "InterBERTPreTrainedModel":
        """
        A new model, in evaluation mode, that starts from a BERT checkpoint: bert-base-uncased, bert-base-chinese,
        Chinese-BERT-wwm, MacBERT, MiniLM or any other of BERT's architecture. What BERT does not have is initialised
        randomly.

        Args:
            pretrained_model_name_or_path (`str`):
                Hub name or folder of the BERT checkpoint.
            config (`InterBERTConfig`, *optional*):
                By default the widths of the BERT, with the layers of `layout`
                ([`InterBERTConfig.from_bert_config`]).
            layout (`"paper"` or `"release"`, *optional*, defaults to `"paper"`):
                `"paper"`: BERT's first layers become the interaction module, the streams start from scratch.
                `"release"`: the first layers become the interaction module, the following ones the text stream.
                The word head takes BERT's, where this model has one and the checkpoint has it too.
            kwargs: Where and how BERT is found: `revision`, `cache_dir`, `token` and the like of `from_pretrained`.
                Not how the new model is held: move it, or call `set_attn_implementation`.

        Returns:
            The model. Its attribute `names_from_bert` lists the parameters that were taken from BERT, for a learning
            rate of their own; it is not saved.

        Raises:
            `ValueError`: the checkpoint is no BERT, has too few layers, or differs in what both must share; `dtype`,
                `attn_implementation` or `device_map` is given.
        """
        ours = {"dtype", "attn_implementation", "device_map"} & kwargs.keys()
        if ours:
            raise ValueError(f"`from_bert` makes a model in float32 on the CPU: expected no {', '.join(sorted(ours))}.")
        bert_config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if bert_config.model_type != "bert":
            raise ValueError(
                f"`from_bert` needs a checkpoint of BERT's architecture (model_type 'bert'), but "
                f"{pretrained_model_name_or_path} has model_type {bert_config.model_type!r}."
            )
        if config is None:
            config = cls.config_class.from_bert_config(bert_config, layout=layout)
        names = bert_weight_names(config, bert_config, layout)
        model = cls(config)
        if hasattr(model, "mlm_head"):
            bert, info = BertForMaskedLM.from_pretrained(
                pretrained_model_name_or_path, output_loading_info=True, **kwargs
            )
            bert_weights = bert.state_dict()
            # What the checkpoint lacks is random there. An output matrix alone, tied to the embeddings, is no head.
            has_head = not any(name.startswith("cls.predictions.transform.") for name in info["missing_keys"])
            if not has_head:
                bert_weights = {name: weight for name, weight in bert_weights.items() if name.startswith("bert.")}
            elif config.tie_word_embeddings and not bert_config.tie_word_embeddings:
                raise ValueError("`tie_word_embeddings` must be that of the BERT checkpoint, False, got True.")
        else:
            bert = BertModel.from_pretrained(pretrained_model_name_or_path, **kwargs)
            bert_weights = {f"bert.{name}": weight for name, weight in bert.state_dict().items()}

        model.names_from_bert = []
        model_weights = model.state_dict()
        prefix = "" if model.base_model is model else f"{cls.base_model_prefix}."
        if config.tie_word_embeddings:
            del names["cls.predictions.decoder.weight"]
        for bert_name, name in names.items():
            name = name if name.startswith("mlm_head.") else prefix + name
            if bert_name in bert_weights and name in model_weights:
                model_weights[name].copy_(bert_weights[bert_name])
                model.names_from_bert.append(name)
        return model.eval()


# BERT's parameter names within one layer, and ours. The release kept BERT's names.
BERT_LAYER_NAMES = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_layer_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_layer_norm",
}
BERT_TEXT_EMBEDDING_NAMES = {
    "word_embeddings": "word_embeddings",
    "token_type_embeddings": "token_type_embeddings",
    "position_embeddings": "position_embeddings",
    "LayerNorm": "layer_norm",
}


def bert_layer_names(bert_layer: str, layer: str) -> dict[str, str]:
    """Maps the 16 parameters of a layer in BERT's naming, under `bert_layer`, to ours, under `layer`."""
    return {
        f"{bert_layer}.{bert_name}.{kind}": f"{layer}.{name}.{kind}"
        for bert_name, name in BERT_LAYER_NAMES.items()
        for kind in ("weight", "bias")
    }


def bert_text_embedding_names(config: InterBERTConfig) -> dict[str, str]:
    """Maps BERT's text embedding parameters to ours, without the positions where those are an MLP."""
    names = {
        f"bert.embeddings.{bert_name}.weight": f"embeddings.text.{name}.weight"
        for bert_name, name in BERT_TEXT_EMBEDDING_NAMES.items()
        if bert_name != "position_embeddings" or config.text_position_embedding == "learned"
    }
    return names | {"bert.embeddings.LayerNorm.bias": "embeddings.text.layer_norm.bias"}


def bert_weight_names(config: InterBERTConfig, bert_config, layout: str) -> dict[str, str]:
    """Maps the parameters of a `BertForMaskedLM` to those of an InterBERT, after checking that the two fit."""
    if layout not in ("paper", "release"):
        raise ValueError(f'`layout` must be "paper" or "release", got {layout!r}.')
    text_layers = config.num_text_layers if layout == "release" else 0
    needed = config.num_hidden_layers + text_layers
    if needed > bert_config.num_hidden_layers:
        raise ValueError(
            f"The {layout} layout takes {needed} layers from BERT ({config.num_hidden_layers} interaction, "
            f"{text_layers} text), but the checkpoint has {bert_config.num_hidden_layers}."
        )
    shared = ["vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "type_vocab_size"]
    shared += ["hidden_act", "layer_norm_eps"]
    if config.text_position_embedding == "learned":
        shared.append("max_position_embeddings")
    for name in shared:
        if getattr(config, name) != getattr(bert_config, name):
            raise ValueError(
                f"`{name}` must be that of the BERT checkpoint, {getattr(bert_config, name)}, got "
                f"{getattr(config, name)}."
            )

    names = bert_text_embedding_names(config)
    for i in range(config.num_hidden_layers):
        names |= bert_layer_names(f"bert.encoder.layer.{i}", f"interaction_layers.{i}")
    for i in range(text_layers):
        names |= bert_layer_names(f"bert.encoder.layer.{config.num_hidden_layers + i}", f"text_layers.{i}")
    return names | {
        "cls.predictions.transform.dense.weight": "mlm_head.dense.weight",
        "cls.predictions.transform.dense.bias": "mlm_head.dense.bias",
        "cls.predictions.transform.LayerNorm.weight": "mlm_head.layer_norm.weight",
        "cls.predictions.transform.LayerNorm.bias": "mlm_head.layer_norm.bias",
        "cls.predictions.decoder.weight": "mlm_head.decoder.weight",
        "cls.predictions.decoder.bias": "mlm_head.decoder.bias",
    }


def check_shape(name: str, tensor: torch.Tensor | None, expected: tuple[int, ...]):
    """Raises a `ValueError` unless the tensor is None or has the expected shape."""
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"`{name}` must have shape {tuple(expected)}, got {tuple(tensor.shape)}.")


def check_text(
    config: InterBERTConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
):
    """Raises a `ValueError` that names the input of a text, the expected and the given shape."""
    if input_ids is not None and inputs_embeds is not None:
        raise ValueError("Give either `input_ids` or `inputs_embeds`, not both.")
    text = input_ids if input_ids is not None else inputs_embeds
    if input_ids is not None and input_ids.dim() != 2:
        raise ValueError(f"`input_ids` must have shape (batch, tokens), got {tuple(input_ids.shape)}.")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != config.hidden_size):
        raise ValueError(
            f"`inputs_embeds` must have shape (batch, tokens, hidden_size={config.hidden_size}), got "
            f"{tuple(inputs_embeds.shape)}."
        )
    if text is not None and text.shape[1] == 0:
        raise ValueError(f"A text must have at least one token, got shape {tuple(text.shape)}.")
    for name, tensor in (
        ("attention_mask", attention_mask),
        ("token_type_ids", token_type_ids),
        ("position_ids", position_ids),
    ):
        if tensor is None:
            continue
        if text is None:
            raise ValueError(f"`{name}` needs `input_ids` or `inputs_embeds`, which are None.")
        if name == "position_ids" and tensor.shape[0] == 1:  # the same positions for the whole batch
            check_shape(name, tensor, (1, text.shape[1]))
        else:
            check_shape(name, tensor, text.shape[:2])


def check_regions(
    config: InterBERTConfig,
    region_features: torch.Tensor | None,
    region_boxes: torch.Tensor | None,
    region_attention_mask: torch.Tensor | None,
    region_embeds: torch.Tensor | None,
):
    """Raises a `ValueError` that names the input of the regions, the expected and the given shape."""
    if region_embeds is not None:
        if region_features is not None or region_boxes is not None:
            raise ValueError("Give either `region_features` and `region_boxes` or `region_embeds`, not both.")
        if region_embeds.dim() != 3 or region_embeds.shape[-1] != config.hidden_size:
            raise ValueError(
                f"`region_embeds` must have shape (batch, regions + 1, hidden_size={config.hidden_size}), got "
                f"{tuple(region_embeds.shape)}."
            )
        num_images, num_positions = region_embeds.shape[:2]
        check_shape("region_attention_mask", region_attention_mask, (num_images, num_positions - 1))
        return
    for name, tensor in (("region_boxes", region_boxes), ("region_attention_mask", region_attention_mask)):
        if tensor is not None and region_features is None:
            raise ValueError(f"`{name}` needs `region_features`, which is None.")
    if region_features is None:
        return
    if region_features.dim() != 3 or region_features.shape[-1] != config.region_feature_size:
        raise ValueError(
            f"`region_features` must have shape (batch, regions, region_feature_size={config.region_feature_size}), "
            f"got {tuple(region_features.shape)}."
        )
    if region_boxes is None:
        raise ValueError("`region_features` needs `region_boxes`, which is None.")
    check_shape("region_boxes", region_boxes, (*region_features.shape[:2], 4))
    check_shape("region_attention_mask", region_attention_mask, region_features.shape[:2])


def join_recorded(first: tuple | None, second: tuple | None) -> tuple | None:
    """What two modules recorded, in their order; None where nothing was."""
    return None if first is None else first + second


class InterBERTModel(InterBERTPreTrainedModel):
    """The encoder without heads: interaction module, text stream, vision stream and their poolers."""

    def __init__(self, config: InterBERTConfig):
        super().__init__(config)
        text_layer = (
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_dropout_prob,
            config.attention_probs_dropout_prob,
        )
        vision_layer = (
            config.vision_num_attention_heads,
            config.vision_intermediate_size,
            config.vision_hidden_dropout_prob,
            config.vision_attention_probs_dropout_prob,
        )
        self.embeddings = InterBERTEmbeddings(config)
        self.interaction_layers = nn.ModuleList(
            InterBERTLayer(config, *text_layer) for _ in range(config.num_hidden_layers)
        )
        self.text_layers = nn.ModuleList(InterBERTLayer(config, *text_layer) for _ in range(config.num_text_layers))
        self.vision_layers = nn.ModuleList(
            InterBERTLayer(config, *vision_layer) for _ in range(config.num_vision_layers)
        )
        self.text_pooler = InterBERTPooler(config)
        self.vision_pooler = InterBERTPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.text.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings.text.word_embeddings = value

    def embed_regions(
        self,
        region_features: torch.FloatTensor,
        region_boxes: torch.FloatTensor,
        region_attention_mask: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """
        The part of the encoder that no text has a say in: for images that meet many texts, and are embedded once.

        Args:
            region_features, region_boxes, region_attention_mask: As in [`~InterBERTModel.forward`].

        Returns:
            `torch.FloatTensor` of shape `(batch, regions + 1, hidden_size)`, the whole image first: `region_embeds` of
            the forward pass, which goes on needing `region_attention_mask`. In training mode dropout is applied.
        """
        check_regions(self.config, region_features, region_boxes, region_attention_mask, region_embeds=None)
        # Not by `self.embeddings.image`: FSDP gathers the weights of the modules that are called.
        return self.embeddings(None, None, None, None, region_features, region_boxes, region_attention_mask, None)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        r"""
        What the encoder makes of a text without an image: features for a classifier or regressor to be trained on, as
        BERT's. They are not embeddings for nearest-neighbour search: InterBERT is pretrained to match a text with an
        image that it reads together with it, and nothing draws the features of texts and images that were read apart
        towards each other. [`InterBERTForImageRetrieval`] scores pairs.

        The inputs are those of a text in [`~InterBERTModel.forward`].

        Returns:
            [`BaseModelOutputWithPooling`]: `last_hidden_state` `(batch, tokens, hidden_size)`, `pooler_output`
            `(batch, pooler_size)`; on request `hidden_states` and `attentions` of the interaction layers, followed by
            those of the text layers.
        """
        outputs = self(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.text_last_hidden_state,
            pooler_output=outputs.text_pooler_output,
            hidden_states=join_recorded(outputs.interaction_hidden_states, outputs.text_hidden_states),
            attentions=join_recorded(outputs.interaction_attentions, outputs.text_attentions),
        )

    @can_return_tuple
    def get_image_features(
        self,
        region_features: torch.FloatTensor | None = None,
        region_boxes: torch.FloatTensor | None = None,
        region_attention_mask: torch.LongTensor | None = None,
        region_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        r"""
        What the encoder makes of an image without a text. What [`~InterBERTModel.get_text_features`] says of the use
        of its features holds for these too.

        The inputs are those of an image in [`~InterBERTModel.forward`].

        Returns:
            [`BaseModelOutputWithPooling`]: `last_hidden_state` `(batch, regions + 1, hidden_size)`, the whole image
            first, `pooler_output` `(batch, pooler_size)`; on request `hidden_states` and `attentions` of the
            interaction layers, followed by those of the vision layers.
        """
        outputs = self(
            region_features=region_features,
            region_boxes=region_boxes,
            region_attention_mask=region_attention_mask,
            region_embeds=region_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.vision_last_hidden_state,
            pooler_output=outputs.vision_pooler_output,
            hidden_states=join_recorded(outputs.interaction_hidden_states, outputs.image_hidden_states),
            attentions=join_recorded(outputs.interaction_attentions, outputs.image_attentions),
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        region_features: torch.FloatTensor | None = None,
        region_boxes: torch.FloatTensor | None = None,
        region_attention_mask: torch.LongTensor | None = None,
        region_embeds: torch.FloatTensor | None = None,
        pooled_only: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> InterBERTModelOutput | tuple:
        r"""
        Either modality may be left out: then its outputs are None, and a text-only pass has no image positions at all.
        A batch of 1 on either side goes with every item of the other: one text with many images, or one image with
        many texts.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                WordPiece tokens, `[CLS]` first.
            attention_mask (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                1 for tokens, 0 for padding; at least one token in each text. By default all are tokens.
            token_type_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                0 for the first text, 1 for the second. By default 0.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                By default 0, 1, 2, ...
            inputs_embeds (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`, *optional*):
                Word embeddings in place of `input_ids`.
            region_features (`torch.FloatTensor` of shape `(batch, regions, region_feature_size)`, *optional*):
                The detector's feature vector of each region. The model puts the whole image before them.
            region_boxes (`torch.FloatTensor` of shape `(batch, regions, 4)`, needed with `region_features`):
                Left, top, right and bottom edge as shares of the image's width and height, in [0, 1].
            region_attention_mask (`torch.LongTensor` of shape `(batch, regions)`, *optional*):
                1 for regions, 0 for padding. By default all are regions.
            region_embeds (`torch.FloatTensor` of shape `(batch, regions + 1, hidden_size)`, *optional*):
                Embedded regions, as [`~InterBERTModel.embed_regions`] returns them, in place of `region_features` and
                `region_boxes`.
            pooled_only (`bool`, *optional*, defaults to `False`):
                Returns the pooler outputs alone. The last layer of each stream then computes position 0 alone, unless
                hidden states or attentions are recorded, which are always those of all positions.
            output_attentions (`bool`, *optional*):
                Returns the attention probabilities of all layers. This pass then uses eager attention.
            output_hidden_states (`bool`, *optional*):
                Returns the hidden states of all layers.
            return_dict (`bool`, *optional*):
                False returns a tuple of the fields that are not None.
        """
        check_text(self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        check_regions(self.config, region_features, region_boxes, region_attention_mask, region_embeds)
        text = input_ids if input_ids is not None else inputs_embeds
        regions = region_features if region_features is not None else region_embeds
        if text is None and regions is None:
            raise ValueError("Give `input_ids` (or `inputs_embeds`), `region_features`, or both; got neither.")
        if text is not None and regions is not None:
            batch_sizes = (text.shape[0], regions.shape[0])
            if batch_sizes[0] != batch_sizes[1] and 1 not in batch_sizes:
                raise ValueError(
                    "Text and regions must have the same batch size, or one of them a batch of 1, got "
                    f"{batch_sizes[0]} and {batch_sizes[1]}."
                )
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not isinstance(output_hidden_states, bool):
            raise ValueError(f"`output_hidden_states` must be True or False, got {output_hidden_states!r}.")
        recorded = {f"output_{module}_attentions": output_attentions for module in MODULES}
        recorded |= {f"output_{module}_hidden_states": output_hidden_states for module in MODULES}
        return self._encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            region_features,
            region_boxes,
            region_attention_mask,
            region_embeds,
            pooled_only,
            # Only eager attention has probabilities to return.
            attn_implementation="eager" if output_attentions else self.config._attn_implementation,
            return_dict=self.config.return_dict if return_dict is None else return_dict,
            **recorded,
        )

    @capture_outputs
    def _encode(
        self,
        input_ids,
        attention_mask,
        token_type_ids,
        position_ids,
        inputs_embeds,
        region_features,
        region_boxes,
        region_attention_mask,
        region_embeds,
        pooled_only,
        attn_implementation,
        **recorded,
    ) -> InterBERTModelOutput:
        hidden_states = self.embeddings(
            input_ids,
            token_type_ids,
            position_ids,
            inputs_embeds,
            region_features,
            region_boxes,
            region_attention_mask,
            region_embeds,
        )
        has_text = input_ids is not None or inputs_embeds is not None
        has_image = region_features is not None or region_embeds is not None
        num_image_positions = 0
        if has_image:
            num_image_positions = region_features.shape[1] + 1 if region_embeds is None else region_embeds.shape[1]

        # The whole image, at position 0, is never padding.
        image_mask = None
        if region_attention_mask is not None:
            image_mask = nn.functional.pad(region_attention_mask, (1, 0), value=1)
        text_mask = attention_mask
        joint_mask = None
        if image_mask is not None or text_mask is not None:
            joint_mask = torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
            if image_mask is not None:
                joint_mask[:, :num_image_positions] = image_mask
            if text_mask is not None:
                joint_mask[:, num_image_positions:] = text_mask

        hidden_states = self._run(self.interaction_layers, hidden_states, joint_mask, attn_implementation)
        vision_hidden_states, text_hidden_states = hidden_states.split(
            [num_image_positions, hidden_states.shape[1] - num_image_positions], dim=1
        )
        first_only = pooled_only and not any(recorded.values())
        text_pooler_output = vision_pooler_output = None
        if has_text:
            text_hidden_states = self._run(
                self.text_layers, text_hidden_states, text_mask, attn_implementation, first_only
            )
            text_pooler_output = self.text_pooler(text_hidden_states)
        if has_image:
            vision_hidden_states = self._run(
                self.vision_layers, vision_hidden_states, image_mask, attn_implementation, first_only
            )
            vision_pooler_output = self.vision_pooler(vision_hidden_states)
        return InterBERTModelOutput(
            text_last_hidden_state=text_hidden_states if has_text and not pooled_only else None,
            vision_last_hidden_state=vision_hidden_states if has_image and not pooled_only else None,
            text_pooler_output=text_pooler_output,
            vision_pooler_output=vision_pooler_output,
        )

    def _run(
        self,
        layers: nn.ModuleList,
        hidden_states: torch.Tensor,
        mask: torch.LongTensor | None,
        attn_implementation: str,
        first_only: bool = False,
    ) -> torch.Tensor:
        """
        Runs a stack of layers over `(batch, positions, hidden_size)` with a `(batch, positions)` mask. With
        `first_only`, the last layer computes position 0 alone.
        """
        config = self.config
        if attn_implementation != config._attn_implementation:
            config = copy.copy(config)
            config._attn_implementation = attn_implementation
        if mask is not None:
            mask = mask.expand(hidden_states.shape[:2])

        def attention_mask_of(queries):
            return create_bidirectional_mask(
                config=config, inputs_embeds=queries, attention_mask=mask, encoder_hidden_states=hidden_states
            )

        num_full_layers = len(layers) - 1 if first_only else len(layers)
        attention_mask = attention_mask_of(hidden_states)
        for layer in layers[:num_full_layers]:
            hidden_states = layer(hidden_states, attention_mask, attn_implementation)
        for layer in layers[num_full_layers:]:
            attention_mask = attention_mask_of(hidden_states[:, :1])
            hidden_states = layer(hidden_states, attention_mask, attn_implementation, num_queries=1)
        return hidden_states


def masked_language_modeling_loss(logits: torch.FloatTensor, labels: torch.LongTensor) -> torch.FloatTensor:
    """Cross-entropy, averaged over the scored tokens. logits `(scored, vocab_size)`, labels `(scored,)`."""
    loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss / max(labels.shape[0], 1)


def region_loss(logits: torch.FloatTensor, targets: torch.Tensor, objective: str) -> torch.FloatTensor:
    """
    Averaged over the scored regions. logits `(scored, classes)` or, for "feature", `(scored, region_feature_size)`.

    Args:
        objective:
            "soft_class": KL divergence from the detector's class probabilities, targets `(scored, classes)`.
            "hard_class": cross-entropy, targets `(scored,)` class ids.
            "feature": mean squared error, targets `(scored, region_feature_size)`.
    """
    logits = logits.float()
    if objective == "soft_class":
        loss = nn.functional.kl_div(logits.log_softmax(dim=-1), targets.float(), reduction="sum")
    elif objective == "hard_class":
        loss = nn.functional.cross_entropy(logits, targets.long(), reduction="sum")
    else:
        loss = nn.functional.mse_loss(logits, targets.float(), reduction="sum") / logits.shape[-1]
    return loss / max(logits.shape[0], 1)


def mean_cross_entropy(logits: torch.FloatTensor, labels: torch.LongTensor) -> torch.FloatTensor:
    """Cross-entropy, averaged over the rows with a label; 0 if none has. logits `(batch, classes)`, labels `(batch,)`,
    −100 = no label."""
    loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss / (labels != -100).sum().clamp(min=1)


class InterBERTForPreTraining(InterBERTPreTrainedModel):
    """InterBERT with the heads of its pretraining: masked words, masked regions, image-text matching."""

    _tied_weights_keys = {"mlm_head.decoder.weight": "interbert.embeddings.text.word_embeddings.weight"}

    def __init__(self, config: InterBERTConfig):
        super().__init__(config)
        predicts_features = config.region_objective == "feature"
        self.interbert = InterBERTModel(config)
        self.mlm_head = InterBERTPredictionHead(config, config.vocab_size)
        self.region_head = InterBERTPredictionHead(
            config, config.region_feature_size if predicts_features else config.num_region_classes
        )
        self.itm_head = InterBERTMatchHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.mlm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.mlm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        region_features: torch.FloatTensor | None = None,
        region_boxes: torch.FloatTensor | None = None,
        region_attention_mask: torch.LongTensor | None = None,
        region_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        region_targets: torch.Tensor | None = None,
        region_target_mask: torch.LongTensor | None = None,
        itm_labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> InterBERTForPreTrainingOutput | tuple:
        r"""
        The inputs are those of [`InterBERTModel`]. The model scores exactly what the labels say: leaving out
        mismatched pairs is up to the caller. Where nothing is scored, the loss is 0. Once any labels are given, only
        the heads that have labels run; the others' logits are None.

        Args:
            labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                The words at the masked positions; −100 where nothing is scored.
            region_targets (*optional*, together with `region_target_mask`):
                By `config.region_objective`: class probabilities `(batch, regions, num_region_classes)`, class ids
                `(batch, regions)` or features `(batch, regions, region_feature_size)`.
            region_target_mask (`torch.LongTensor` of shape `(batch, regions)`, *optional*):
                1 for regions that are scored.
            itm_labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                0: text and image match; 1: they do not; −100: not scored.

        Raises:
            `ValueError`: an input is missing or has another shape than the inputs it belongs to.
        """
        outputs = self.interbert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            region_features=region_features,
            region_boxes=region_boxes,
            region_attention_mask=region_attention_mask,
            region_embeds=region_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        text_states = outputs.text_last_hidden_state
        vision_states = outputs.vision_last_hidden_state

        has_labels = labels is not None or region_targets is not None or itm_labels is not None
        mlm_logits = mlm_loss = None
        if labels is not None:
            if text_states is None:
                raise ValueError("`labels` needs `input_ids` or `inputs_embeds`, which are None.")
            check_shape("labels", labels, text_states.shape[:2])
            scored = labels != -100
            mlm_logits = self.mlm_head(text_states[scored])
            mlm_loss = masked_language_modeling_loss(mlm_logits, labels[scored])
        elif text_states is not None and not has_labels:
            mlm_logits = self.mlm_head(text_states)

        if (region_targets is None) != (region_target_mask is None):
            raise ValueError("`region_targets` and `region_target_mask` need each other, but one of them is None.")
        region_logits = masked_region_loss = None
        if region_targets is not None:
            if vision_states is None:
                raise ValueError("`region_targets` needs `region_features` or `region_embeds`, which are None.")
            objective, output_size = self.config.region_objective, self.region_head.decoder.out_features
            per_region = () if objective == "hard_class" else (output_size,)
            num_regions = (vision_states.shape[0], vision_states.shape[1] - 1)  # of each pair, a repeated image's too
            check_shape("region_targets", region_targets, (*num_regions, *per_region))
            check_shape("region_target_mask", region_target_mask, num_regions)
            scored = region_target_mask.bool()
            region_logits = self.region_head(vision_states[:, 1:][scored])
            masked_region_loss = region_loss(region_logits, region_targets[scored], objective)
        elif vision_states is not None and not has_labels:
            region_logits = self.region_head(vision_states[:, 1:])

        itm_logits = itm_loss = None
        has_both = text_states is not None and vision_states is not None
        if itm_labels is not None and not has_both:
            raise ValueError("`itm_labels` needs a text and `region_features`, but one of them is None.")
        if has_both and (itm_labels is not None or not has_labels):
            itm_logits = self.itm_head(outputs.text_pooler_output, outputs.vision_pooler_output)
        if itm_labels is not None:
            check_shape("itm_labels", itm_labels, itm_logits.shape[:1])
            itm_loss = mean_cross_entropy(itm_logits, itm_labels)

        losses = [loss for loss in (mlm_loss, masked_region_loss, itm_loss) if loss is not None]
        return InterBERTForPreTrainingOutput(
            loss=sum(losses) if losses else None,
            mlm_loss=mlm_loss,
            region_loss=masked_region_loss,
            itm_loss=itm_loss,
            mlm_logits=mlm_logits,
            region_logits=region_logits,
            itm_logits=itm_logits,
            **{recorded: outputs.get(recorded) for recorded in RECORDED_OUTPUTS},
        )


def flatten_choices(inputs: dict[str, torch.Tensor | None], choices: tuple[int, int]) -> dict[str, torch.Tensor | None]:
    """`(batch, choices, ...)` to `(batch * choices, ...)`, after a check that all inputs have the same of both."""
    for name, tensor in inputs.items():
        if tensor is not None and tuple(tensor.shape[:2]) != tuple(choices):
            raise ValueError(
                f"`{name}` must have shape (batch={choices[0]}, choices={choices[1]}, ...), got {tuple(tensor.shape)}."
            )
    return {name: None if tensor is None else tensor.flatten(0, 1) for name, tensor in inputs.items()}


class InterBERTForImageRetrieval(InterBERTPreTrainedModel):
    """
    InterBERT with the match head of its pretraining: how well a text and an image go together. A pretraining checkpoint
    opens without a missing weight, for zero-shot retrieval.
    """

    def __init__(self, config: InterBERTConfig):
        super().__init__(config)
        self.interbert = InterBERTModel(config)
        self.itm_head = InterBERTMatchHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        region_features: torch.FloatTensor | None = None,
        region_boxes: torch.FloatTensor | None = None,
        region_attention_mask: torch.LongTensor | None = None,
        region_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        itm_labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> InterBERTForImageRetrievalOutput | tuple:
        r"""
        The inputs are those of [`InterBERTModel`]: pairs, one text with many images, or one image with many texts. Or
        all of them have a dimension of choices after the batch, `(batch, choices, ...)`: the pairs that one example
        chooses from.

        Args:
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Which of the choices is right. The loss is the cross-entropy over the log-odds of a match (paper,
                section 4: 4-way, with 3 negative images).
            itm_labels (`torch.LongTensor` of shape `(batch,)` or `(batch, choices)`, *optional*):
                For every pair 0: text and image match; 1: they do not. The loss is the cross-entropy of each pair
                (release).

        Raises:
            `ValueError`: text or regions are missing, an input has another shape than the others call for, or both
            kinds of labels are given.
        """
        text = input_ids if input_ids is not None else inputs_embeds
        regions = region_features if region_features is not None else region_embeds
        if text is None or regions is None:
            raise ValueError("Image retrieval needs a text and `region_features`, but one of them is None.")
        if labels is not None and itm_labels is not None:
            raise ValueError("Give either `labels` (of choices) or `itm_labels` (of pairs), not both.")
        has_choices = regions.dim() == 4
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "region_features": region_features,
            "region_boxes": region_boxes,
            "region_attention_mask": region_attention_mask,
            "region_embeds": region_embeds,
        }
        if has_choices:
            inputs = flatten_choices(inputs, regions.shape[:2])
        outputs = self.interbert(
            **inputs,
            pooled_only=True,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        itm_logits = self.itm_head(outputs.text_pooler_output, outputs.vision_pooler_output)
        if has_choices:
            itm_logits = itm_logits.view(*regions.shape[:2], 2)

        loss = None
        if labels is not None:
            if not has_choices:
                raise ValueError("`labels` needs inputs of shape (batch, choices, ...), got pairs.")
            check_shape("labels", labels, itm_logits.shape[:1])
            log_odds = itm_logits[..., 0] - itm_logits[..., 1]  # (batch, choices)
            loss = mean_cross_entropy(log_odds, labels)
        elif itm_labels is not None:
            check_shape("itm_labels", itm_labels, itm_logits.shape[:-1])
            loss = mean_cross_entropy(itm_logits.view(-1, 2), itm_labels.reshape(-1))
        return InterBERTForImageRetrievalOutput(
            loss=loss,
            itm_logits=itm_logits,
            # In half precision most scores near 1 would be equal.
            match_scores=itm_logits.float().softmax(dim=-1)[..., 0],
            **{recorded: outputs.get(recorded) for recorded in RECORDED_OUTPUTS},
        )


class InterBERTForVQA(InterBERTPreTrainedModel):
    """
    InterBERT that answers questions about an image: scores the answers of `config.id2label` from the fused vector, by
    an MLP (paper) or one linear layer (release).
    """

    def __init__(self, config: InterBERTConfig):
        super().__init__(config)
        self.interbert = InterBERTModel(config)
        self.fusion = InterBERTFusion(config)
        if config.vqa_head == "mlp":
            self.vqa_head = nn.Sequential(
                nn.Linear(config.pooler_size, 2 * config.pooler_size),
                nn.ReLU(),
                nn.Dropout(config.hidden_dropout_prob),
                nn.Linear(2 * config.pooler_size, config.num_labels),
            )
        else:
            self.vqa_head = nn.Linear(config.pooler_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        region_features: torch.FloatTensor | None = None,
        region_boxes: torch.FloatTensor | None = None,
        region_attention_mask: torch.LongTensor | None = None,
        region_embeds: torch.FloatTensor | None = None,
        labels: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> InterBERTClassifierOutput | tuple:
        r"""
        The inputs are those of [`InterBERTModel`], both modalities.

        Args:
            labels (`torch.FloatTensor` of shape `(batch, num_labels)`, *optional*):
                Soft score of every answer, in [0, 1]. The loss is the binary cross-entropy, summed over the answers and
                averaged over the batch.
        """
        if (region_features is None and region_embeds is None) or (input_ids is None and inputs_embeds is None):
            raise ValueError("Visual question answering needs a text and `region_features`, but one of them is None.")
        outputs = self.interbert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            region_features=region_features,
            region_boxes=region_boxes,
            region_attention_mask=region_attention_mask,
            region_embeds=region_embeds,
            pooled_only=True,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.vqa_head(self.fusion(outputs.text_pooler_output, outputs.vision_pooler_output))
        loss = None
        if labels is not None:
            check_shape("labels", labels, logits.shape)
            loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
            loss = loss / logits.shape[0]
        return InterBERTClassifierOutput(
            loss=loss, logits=logits, **{recorded: outputs.get(recorded) for recorded in RECORDED_OUTPUTS}
        )


class InterBERTForMultipleChoice(InterBERTPreTrainedModel):
    """InterBERT that chooses one of several texts for an image, as in visual commonsense reasoning (VCR)."""

    def __init__(self, config: InterBERTConfig):
        super().__init__(config)
        self.interbert = InterBERTModel(config)
        self.fusion = InterBERTFusion(config)
        self.choice_head = nn.Linear(config.pooler_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        region_features: torch.FloatTensor | None = None,
        region_boxes: torch.FloatTensor | None = None,
        region_attention_mask: torch.LongTensor | None = None,
        region_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> InterBERTClassifierOutput | tuple:
        r"""
        The inputs are those of [`InterBERTModel`], where those of the text are `(batch, choices, tokens)` (and
        `inputs_embeds` `(batch, choices, tokens, hidden_size)`). The regions, `(batch, regions, ...)`, are shared by
        the choices.

        Args:
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Which of the choices is right.
        """
        text = input_ids if input_ids is not None else inputs_embeds
        regions = region_features if region_features is not None else region_embeds
        if text is None or regions is None:
            raise ValueError("Multiple choice needs a text and `region_features`, but one of them is None.")
        if text.dim() != (3 if input_ids is not None else 4):
            raise ValueError(f"The text must have shape (batch, choices, tokens), got {tuple(text.shape)}.")
        if text.shape[0] != regions.shape[0]:
            raise ValueError(
                f"Text and regions must have the same batch size, got {text.shape[0]} and {regions.shape[0]}."
            )
        check_regions(self.config, region_features, region_boxes, region_attention_mask, region_embeds)
        num_choices = text.shape[1]

        def share(tensor):
            return None if tensor is None else tensor.repeat_interleave(num_choices, dim=0)

        if region_embeds is None:
            region_embeds = self.interbert.embed_regions(region_features, region_boxes, region_attention_mask)
        text_inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        outputs = self.interbert(
            **flatten_choices(text_inputs, text.shape[:2]),
            region_attention_mask=share(region_attention_mask),
            region_embeds=share(region_embeds),
            pooled_only=True,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.choice_head(self.fusion(outputs.text_pooler_output, outputs.vision_pooler_output))
        logits = logits.view(text.shape[0], num_choices)
        loss = None
        if labels is not None:
            check_shape("labels", labels, logits.shape[:1])
            loss = mean_cross_entropy(logits, labels)
        return InterBERTClassifierOutput(
            loss=loss, logits=logits, **{recorded: outputs.get(recorded) for recorded in RECORDED_OUTPUTS}
        )


class InterBERTForSequenceClassification(InterBERTPreTrainedModel):
    """InterBERT that classifies a text, or a pair of texts, without an image: GLUE (paper, section 4)."""

    def __init__(self, config: InterBERTConfig):
        super().__init__(config)
        self.interbert = InterBERTModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.pooler_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> InterBERTClassifierOutput | tuple:
        r"""
        The inputs are those of the text in [`InterBERTModel`].

        Args:
            labels (`torch.Tensor`, *optional*):
                As `config.problem_type` says, which is found from them where it is None: class ids `(batch,)`, for
                `num_labels == 1` numbers `(batch,)` (regression, mean squared error), or scores `(batch, num_labels)`.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("Give `input_ids` or `inputs_embeds`, got neither.")
        outputs = self.interbert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pooled_only=True,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(outputs.text_pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits.float(), config=self.config)
        return InterBERTClassifierOutput(
            loss=loss, logits=logits, **{recorded: outputs.get(recorded) for recorded in RECORDED_OUTPUTS}
        )


InterBERTModel.register_for_auto_class("AutoModel")
InterBERTForPreTraining.register_for_auto_class("AutoModelForPreTraining")
InterBERTForImageRetrieval.register_for_auto_class("AutoModelForZeroShotImageClassification")
InterBERTForVQA.register_for_auto_class("AutoModelForVisualQuestionAnswering")
InterBERTForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")
InterBERTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "InterBERTClassifierOutput",
    "InterBERTForImageRetrieval",
    "InterBERTForImageRetrievalOutput",
    "InterBERTForMultipleChoice",
    "InterBERTForPreTraining",
    "InterBERTForPreTrainingOutput",
    "InterBERTForSequenceClassification",
    "InterBERTForVQA",
    "InterBERTModel",
    "InterBERTModelOutput",
    "InterBERTPreTrainedModel",
]
