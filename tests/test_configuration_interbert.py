import json
import re
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig

import configuration_interbert.configuration_interbert as configuration_file
from configuration_interbert import InterBERTConfig

AUTO_MAP = {
    "AutoConfig": "configuration_interbert.InterBERTConfig",
    "AutoModel": "modeling_interbert.InterBERTModel",
    "AutoModelForPreTraining": "modeling_interbert.InterBERTForPreTraining",
    "AutoModelForZeroShotImageClassification": "modeling_interbert.InterBERTForImageRetrieval",
    "AutoModelForVisualQuestionAnswering": "modeling_interbert.InterBERTForVQA",
    "AutoModelForMultipleChoice": "modeling_interbert.InterBERTForMultipleChoice",
    "AutoModelForSequenceClassification": "modeling_interbert.InterBERTForSequenceClassification",
}

PAPER = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_text_layers": 6,
    "num_vision_layers": 6,
    "num_attention_heads": 12,
    "vision_num_attention_heads": 12,
    "intermediate_size": 3072,
    "vision_intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "vision_hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "vision_attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "region_feature_size": 2048,
    "num_region_classes": 1601,
    "pooler_size": 1024,
    "fusion": "mul",
    "text_position_embedding": "learned",
    "region_embedding": "linear",
    "region_objective": "soft_class",
    "vqa_head": "mlp",
    "tie_word_embeddings": True,
}

# Every field away from its default.
OTHER = {
    "vocab_size": 21128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_text_layers": 0,
    "num_vision_layers": 1,
    "num_attention_heads": 4,
    "vision_num_attention_heads": 8,
    "intermediate_size": 48,
    "vision_intermediate_size": 40,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0,
    "vision_hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.3,
    "vision_attention_probs_dropout_prob": 0.4,
    "max_position_embeddings": 40,
    "type_vocab_size": 3,
    "initializer_range": 0.05,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 7,
    "region_feature_size": 16,
    "num_region_classes": 33,
    "pooler_size": 24,
    "fusion": "sum",
    "text_position_embedding": "mlp",
    "region_embedding": "mlp",
    "region_objective": "hard_class",
    "vqa_head": "linear",
    "tie_word_embeddings": False,
}


def test_defaults_are_the_papers_base_model():
    config = InterBERTConfig().to_dict()
    assert {name: config[name] for name in PAPER} == PAPER
    assert config["model_type"] == "interbert"


def test_round_trip_keeps_every_field_and_writes_the_code(tmp_path):
    assert OTHER.keys() == PAPER.keys() and all(OTHER[name] != PAPER[name] for name in PAPER)
    InterBERTConfig(**OTHER).save_pretrained(tmp_path)
    loaded = InterBERTConfig.from_pretrained(tmp_path).to_dict()
    assert {name: loaded[name] for name in OTHER} == OTHER
    saved_code = tmp_path / "configuration_interbert.py"
    assert saved_code.read_bytes() == Path(configuration_file.__file__).read_bytes()


def test_every_config_opens_under_every_auto_class(tmp_path):
    InterBERTConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert InterBERTConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP


def test_a_given_auto_map_takes_precedence():
    given = {"AutoModel": "user/repo--modeling_interbert.InterBERTModel"}
    assert InterBERTConfig(auto_map=given).auto_map == AUTO_MAP | given


def test_unknown_arguments_are_kept(tmp_path):
    InterBERTConfig(detector="bottom-up-attention").save_pretrained(tmp_path)
    assert InterBERTConfig.from_pretrained(tmp_path).detector == "bottom-up-attention"


POSITIVE = (
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
)
DROPOUTS = (
    "hidden_dropout_prob",
    "vision_hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "vision_attention_probs_dropout_prob",
)
REFUSED = [
    *[({name: value}, f"`{name}` must be positive, got {value}") for name in POSITIVE for value in (0, -1)],
    ({"num_text_layers": -1}, "`num_text_layers` must not be negative, got -1"),
    ({"num_vision_layers": -2}, "`num_vision_layers` must not be negative, got -2"),
    ({"initializer_range": 0}, "`initializer_range` must be positive, got 0"),
    (
        {"hidden_size": 770, "num_attention_heads": 11},
        "`hidden_size` must be a multiple of `vision_num_attention_heads`, got 770 and 12",
    ),
    ({"num_attention_heads": 7}, "`hidden_size` must be a multiple of `num_attention_heads`, got 768 and 7"),
    *[({name: 1}, f"`{name}` must be at least 0 and below 1, got 1") for name in DROPOUTS],
    ({"hidden_dropout_prob": -0.1}, "`hidden_dropout_prob` must be at least 0 and below 1, got -0.1"),
    ({"hidden_dropout_prob": float("nan")}, "`hidden_dropout_prob` must be at least 0 and below 1, got nan"),
    ({"hidden_act": "gelo"}, "got 'gelo'"),
    ({"pad_token_id": 30522}, "`pad_token_id` must be a token of the vocabulary (0 to 30521), got 30522"),
    ({"pad_token_id": -1}, "`pad_token_id` must be a token of the vocabulary (0 to 30521), got -1"),
    ({"fusion": "cat"}, "'fusion' expected one of ('mul', 'sum'), got cat"),
    ({"text_position_embedding": "sine"}, "expected one of ('learned', 'mlp'), got sine"),
    ({"region_embedding": "conv"}, "expected one of ('linear', 'mlp'), got conv"),
    ({"region_objective": "class"}, "expected one of ('soft_class', 'hard_class', 'feature'), got class"),
    ({"vqa_head": "none"}, "expected one of ('mlp', 'linear'), got none"),
    ({"hidden_size": "768"}, "'hidden_size' expected int, got str (value: '768')"),
    ({"hidden_size": 768.0}, "'hidden_size' expected int, got float (value: 768.0)"),
    ({"pad_token_id": None}, "'pad_token_id' expected int, got NoneType (value: None)"),
    ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' expected bool, got str (value: 'yes')"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_values_that_cannot_work_are_refused(values, message):
    with pytest.raises(StrictDataclassError, match=re.escape(message)):
        InterBERTConfig(**values)


def test_the_message_lists_the_activations():
    with pytest.raises(StrictDataclassError, match=r"`hidden_act` must be one of \[.*'gelu'.*'relu'.*\], got 'gelo'"):
        InterBERTConfig(hidden_act="gelo")


def test_a_config_made_invalid_is_refused_when_saved(tmp_path):
    config = InterBERTConfig()
    config.hidden_size = 770
    with pytest.raises(StrictDataclassError, match="got 770 and 12"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


BERT = {
    "vocab_size": 500,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 44,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.25,
    "attention_probs_dropout_prob": 0.15,
    "max_position_embeddings": 77,
    "type_vocab_size": 4,
    "initializer_range": 0.03,
    "layer_norm_eps": 1e-6,
    "pad_token_id": 5,
}


def test_from_bert_config_takes_over_the_sizes_for_both_streams():
    config = InterBERTConfig.from_bert_config(BertConfig(num_hidden_layers=4, **BERT))
    assert {name: getattr(config, name) for name in BERT} == BERT
    assert config.vision_num_attention_heads == 3
    assert config.vision_intermediate_size == 44
    assert config.vision_hidden_dropout_prob == 0.25
    assert config.vision_attention_probs_dropout_prob == 0.15
    assert config.region_feature_size == 2048  # BERT says nothing about regions


@pytest.mark.parametrize(
    ("layout", "bert_layers", "expected"),
    [
        ("paper", 12, (12, 6, 6)),
        ("paper", 5, (5, 6, 6)),
        ("release", 12, (6, 6, 6)),
        ("release", 6, (3, 3, 3)),
        ("release", 5, (3, 2, 2)),
        ("release", 1, (1, 0, 0)),
    ],
)
def test_from_bert_config_layers(layout, bert_layers, expected):
    config = InterBERTConfig.from_bert_config(BertConfig(num_hidden_layers=bert_layers), layout=layout)
    assert (config.num_hidden_layers, config.num_text_layers, config.num_vision_layers) == expected


def test_from_bert_config_arguments_take_precedence():
    config = InterBERTConfig.from_bert_config(
        BertConfig(num_hidden_layers=4), layout="release", region_feature_size=16, num_vision_layers=5
    )
    assert (config.region_feature_size, config.num_vision_layers, config.num_text_layers) == (16, 5, 2)


def test_from_bert_config_refuses_other_layouts():
    with pytest.raises(ValueError, match='`layout` must be "paper" or "release", got \'bert\''):
        InterBERTConfig.from_bert_config(BertConfig(), layout="bert")
