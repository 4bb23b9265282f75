"""InterBERT configuration (paper: arXiv 2003.13198)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

# The class that each auto class opens. Written into every config.json, so that any InterBERT checkpoint opens under
# every auto class: saving alone would only record the class that was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_interbert.InterBERTConfig",
    "AutoModel": "modeling_interbert.InterBERTModel",
    "AutoModelForPreTraining": "modeling_interbert.InterBERTForPreTraining",
    # Image retrieval scores texts against an image, as zero-shot classification does.
    "AutoModelForZeroShotImageClassification": "modeling_interbert.InterBERTForImageRetrieval",
    "AutoModelForVisualQuestionAnswering": "modeling_interbert.InterBERTForVQA",
    "AutoModelForMultipleChoice": "modeling_interbert.InterBERTForMultipleChoice",
    "AutoModelForSequenceClassification": "modeling_interbert.InterBERTForSequenceClassification",
}

# What a checkpoint of each class does: the task that `transformers.pipeline` and the Hub know it by (its
# `pipeline_tag`), the class in pipelines_interbert.py, and the auto class that opens the checkpoint for it.
# Classification of texts has a pipeline in Transformers.
PIPELINES = {
    "InterBERTModel": ("feature-extraction", "FeatureExtractionPipeline", "AutoModel"),
    "InterBERTForPreTraining": (
        "zero-shot-image-classification",
        "ImageTextMatchingPipeline",
        "AutoModelForZeroShotImageClassification",
    ),
    "InterBERTForImageRetrieval": (
        "zero-shot-image-classification",
        "ImageTextMatchingPipeline",
        "AutoModelForZeroShotImageClassification",
    ),
    "InterBERTForVQA": (
        "visual-question-answering",
        "VisualQuestionAnsweringPipeline",
        "AutoModelForVisualQuestionAnswering",
    ),
    "InterBERTForMultipleChoice": (
        "visual-question-answering",
        "VisualMultipleChoicePipeline",
        "AutoModelForMultipleChoice",
    ),
}

# What an InterBERT takes over from the BERT that it starts from.
BERT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "tie_word_embeddings",
)

DROPOUTS = (
    "hidden_dropout_prob",
    "vision_hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "vision_attention_probs_dropout_prob",
)


@strict
class InterBERTConfig(PreTrainedConfig):
    r"""
    Configuration of an InterBERT model. The defaults are the paper's base model: 12 interaction layers over
    `[image regions ; text tokens]`, then 6 layers over the text and 6 over the image. The authors' release has
    6 / 6 / 6 layers, 8 vision heads and a dropout of 0.2 of the hidden states of the vision stream.

    Args:
        vocab_size (`int`, *optional*, defaults to 30522):
            Number of WordPiece tokens.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of every layer of the three modules.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Layers of the single-stream interaction module.
        num_text_layers (`int`, *optional*, defaults to 6):
            Layers of the independence module's text stream; 0 leaves the stream out (the paper's single-stream
            ablation).
        num_vision_layers (`int`, *optional*, defaults to 6):
            Layers of the independence module's vision stream; 0 leaves the stream out.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Attention heads of the interaction and text layers.
        vision_num_attention_heads (`int`, *optional*, defaults to 12):
            Attention heads of the vision layers.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the feed-forward part of the interaction and text layers.
        vision_intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the feed-forward part of the vision layers.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward parts and of the word and region heads.
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout of the interaction and text layers: of hidden states and of attention probabilities.
        vision_hidden_dropout_prob, vision_attention_probs_dropout_prob (`float`, *optional*, defaults to 0.1):
            The same of the image embeddings and the vision layers.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Longest text, in tokens.
        type_vocab_size (`int`, *optional*, defaults to 2):
            Number of token types.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution that weights are drawn from.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12):
            Epsilon of every LayerNorm.
        pad_token_id (`int`, *optional*, defaults to 0):
            Padding token, whose word embedding is zero.
        region_feature_size (`int`, *optional*, defaults to 2048):
            Length of a region's feature vector.
        num_region_classes (`int`, *optional*, defaults to 1601):
            Width of the region head. With `region_objective="soft_class"` the background counts, at 0: 1601 for
            the 1600 classes of the bottom-up-attention detector.
        pooler_size (`int`, *optional*, defaults to 1024):
            Length of the two pooled vectors.
        fusion (`"mul"` or `"sum"`, *optional*, defaults to `"mul"`):
            How the two pooled vectors become one.
        text_position_embedding (`"learned"` or `"mlp"`, *optional*, defaults to `"learned"`):
            BERT's table of positions, or the paper's MLP on the position (paper, section 3.1).
        region_embedding (`"linear"` or `"mlp"`, *optional*, defaults to `"linear"`):
            Whether a region's feature and its box each go through one linear layer (release) or an MLP (paper).
        region_objective (`"soft_class"`, `"hard_class"` or `"feature"`, *optional*, defaults to `"soft_class"`):
            What the region head predicts for a masked region: the detector's class probabilities (KL divergence), its
            class (cross-entropy) or the feature vector (mean squared error).
        vqa_head (`"mlp"` or `"linear"`, *optional*, defaults to `"mlp"`):
            Answer classifier on the fused vector: an MLP (paper) or one linear layer (the release's task checkpoint).
        region_detector (`str` or `dict[str, Any]`, *optional*):
            Where the regions that the model was trained on come from, so that photographs become such regions: the
            checkpoint of a detector, or `{"name_or_path": ..., "revision": ...}` and what else `load_region_extractor`
            of the processor's files takes, such as `min_regions`, `max_regions` and `min_score`.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the word head's output matrix is the word embedding matrix.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a value of the wrong type, out of range, or a combination that
            cannot work; the message gives the expected and the given value.
    """

    model_type = "interbert"
    keys_to_ignore_at_inference = ["mlm_loss", "region_loss", "itm_loss"]

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_text_layers: int = 6
    num_vision_layers: int = 6
    num_attention_heads: int = 12
    vision_num_attention_heads: int = 12
    intermediate_size: int = 3072
    vision_intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    vision_hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    vision_attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    pad_token_id: int = 0
    region_feature_size: int = 2048
    num_region_classes: int = 1601
    pooler_size: int = 1024
    fusion: Literal["mul", "sum"] = "mul"
    text_position_embedding: Literal["learned", "mlp"] = "learned"
    region_embedding: Literal["linear", "mlp"] = "linear"
    region_objective: Literal["soft_class", "hard_class", "feature"] = "soft_class"
    vqa_head: Literal["mlp", "linear"] = "mlp"
    region_detector: str | dict[str, Any] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        for name in DROPOUTS:  # 0 is a dropout too, and `update_from_string` goes by the type of the present value
            setattr(self, name, float(getattr(self, name)))
        kwargs["auto_map"] = AUTO_MAP | (kwargs.get("auto_map") or {})
        kwargs["custom_pipelines"] = kwargs.get("custom_pipelines") or {}
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON has it, with the pipeline of the class that the checkpoint was saved from."""
        # Of ours, not what was read: the model may be another one by now. Those of others stay, but for the classes
        # that `transformers.pipeline` puts in the place of their names.
        custom_pipelines = {
            task: info | {"pt": [name if isinstance(name, str) else name.__name__ for name in info.get("pt", ())]}
            for task, info in self.custom_pipelines.items()
            if not info["impl"].startswith("pipelines_interbert.")
        }
        for architecture in self.architectures or ():
            if architecture in PIPELINES:
                task, pipeline_class, auto_class = PIPELINES[architecture]
                custom_pipelines[task] = {"impl": f"pipelines_interbert.{pipeline_class}", "pt": [auto_class]}
        return super().to_dict() | {"custom_pipelines": custom_pipelines}

    @classmethod
    def from_bert_config(
        cls, bert_config: PreTrainedConfig, layout: Literal["paper", "release"] = "paper", **kwargs
    ) -> "InterBERTConfig":
        """
        Configuration of an InterBERT that starts from a BERT of L layers.

        Args:
            bert_config (`PreTrainedConfig`):
                The BERT's configuration: its widths, dropouts and vocabulary are taken over, for both streams.
            layout (`"paper"` or `"release"`, *optional*, defaults to `"paper"`):
                `"paper"`: L interaction layers, 6 text and 6 vision layers. `"release"`: ⌈L/2⌉ interaction layers, the
                other layers become the text stream, and the vision stream has as many.
            kwargs: Values that take precedence, such as `region_feature_size`.
        """
        if layout not in ("paper", "release"):
            raise ValueError(f'`layout` must be "paper" or "release", got {layout!r}.')
        fields = {name: getattr(bert_config, name) for name in BERT_FIELDS}
        fields["vision_num_attention_heads"] = bert_config.num_attention_heads
        fields["vision_intermediate_size"] = bert_config.intermediate_size
        fields["vision_hidden_dropout_prob"] = bert_config.hidden_dropout_prob
        fields["vision_attention_probs_dropout_prob"] = bert_config.attention_probs_dropout_prob
        if layout == "paper":
            fields["num_hidden_layers"] = bert_config.num_hidden_layers
        else:
            fields["num_hidden_layers"] = (bert_config.num_hidden_layers + 1) // 2
            stream_layers = bert_config.num_hidden_layers - fields["num_hidden_layers"]
            fields["num_text_layers"] = fields["num_vision_layers"] = stream_layers
        return cls(**(fields | kwargs))

    def validate_architecture(self):
        """Refuses values and combinations that cannot work (called at construction and when saving)."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vision_num_attention_heads",
            "intermediate_size",
            "vision_intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "region_feature_size",
            "num_region_classes",
            "pooler_size",
            "layer_norm_eps",
            "initializer_range",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("num_text_layers", "num_vision_layers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("num_attention_heads", "vision_num_attention_heads"):
            if self.hidden_size % getattr(self, name) != 0:
                raise ValueError(
                    f"`hidden_size` must be a multiple of `{name}`, got {self.hidden_size} and {getattr(self, name)}."
                )
        for name in DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, got {getattr(self, name)}.")
        if isinstance(self.region_detector, dict) and "name_or_path" not in self.region_detector:
            raise ValueError(f"`region_detector` must have a `name_or_path`, got {self.region_detector}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be a token of the vocabulary (0 to {self.vocab_size - 1}), "
                f"got {self.pad_token_id}."
            )


InterBERTConfig.register_for_auto_class()

__all__ = ["InterBERTConfig"]
