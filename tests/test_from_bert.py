"""Starting from a BERT: every InterBERT hidden state of a text must be the BERT's own."""

import json
import re
import shutil

import pytest
import torch
from model_fixtures import assert_close, perturb, tiny_regions
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel, DistilBertConfig

from configuration_interbert import InterBERTConfig
from modeling_interbert import InterBERTForPreTraining, InterBERTModel

# Five layers: an odd number for the release layout. Activation and epsilon are not the defaults.
BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=5,
    num_attention_heads=4,
    intermediate_size=24,
    hidden_act="relu",
    max_position_embeddings=20,
    type_vocab_size=3,
    layer_norm_eps=1e-3,
)


def save_bert(model_class, folder):
    torch.manual_seed(0)
    bert = perturb(model_class(BERT)).eval()
    bert.save_pretrained(folder)
    return bert


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    """Class name -> (model, folder) of a BERT saved without heads, with all heads, and with the word head."""
    berts = {}
    for model_class in (BertModel, BertForPreTraining, BertForMaskedLM):
        folder = tmp_path_factory.mktemp(model_class.__name__)
        berts[model_class.__name__] = (save_bert(model_class, folder), folder)
    return berts


def text():
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 40, (2, 9), generator=generator),
        "token_type_ids": torch.randint(0, 3, (2, 9), generator=generator),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
    }


@pytest.mark.parametrize("interbert_class", [InterBERTModel, InterBERTForPreTraining])
@pytest.mark.parametrize("layout", ["paper", "release"])
@pytest.mark.parametrize("bert_class", ["BertModel", "BertForPreTraining", "BertForMaskedLM"])
@torch.no_grad()
def test_text_only_pass_equals_bert_layer_by_layer(berts, bert_class, layout, interbert_class):
    bert, folder = berts[bert_class]
    expected = bert.base_model(**text(), output_hidden_states=True).hidden_states

    model = interbert_class.from_bert(str(folder), layout=layout).eval()
    outputs = model(**text(), output_hidden_states=True)
    hidden_states = outputs.interaction_hidden_states
    if layout == "paper":
        assert len(hidden_states) == 6
    else:
        assert len(hidden_states) == 4
        hidden_states += outputs.text_hidden_states
    assert len(hidden_states) == len(expected) == 6
    for hidden_state, expected_hidden_state in zip(hidden_states, expected, strict=True):
        assert_close(hidden_state, expected_hidden_state)


@pytest.mark.parametrize("bert_class", [BertForMaskedLM, BertForPreTraining])
@torch.no_grad()
def test_word_head_equals_berts(berts, bert_class):
    bert, folder = berts[bert_class.__name__]
    outputs = bert(**text())
    expected = outputs.logits if bert_class is BertForMaskedLM else outputs.prediction_logits

    config = InterBERTConfig.from_bert_config(BERT, num_text_layers=0, region_feature_size=6)
    model = InterBERTForPreTraining.from_bert(str(folder), config=config).eval()
    assert_close(model(**text()).mlm_logits, expected)
    # The release layout's text stream is the second half of BERT, so that its word head fits as it is.
    model = InterBERTForPreTraining.from_bert(str(folder), layout="release").eval()
    assert_close(model(**text()).mlm_logits, expected)


@torch.no_grad()
def test_the_word_head_is_known_by_the_weights(berts, tmp_path):
    """Not by what the configuration says of them."""
    bert, folder = berts["BertForMaskedLM"]
    with_head, without_head = tmp_path / "with", tmp_path / "without"
    headless = berts["BertModel"][1]
    for source, target, architectures in ((folder, with_head, None), (headless, without_head, ["BertForMaskedLM"])):
        shutil.copytree(source, target)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    model = InterBERTForPreTraining.from_bert(str(with_head), layout="release")
    assert_close(model(**text()).mlm_logits, bert(**text()).logits)
    model = InterBERTForPreTraining.from_bert(str(without_head), layout="release")
    assert not [name for name in model.names_from_bert if name.startswith("mlm_head.")]
    assert not model.mlm_head.dense.bias.any()


@torch.no_grad()
def test_an_output_matrix_of_its_own_is_taken_over(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(**BERT.to_dict() | {"tie_word_embeddings": False})
    bert = perturb(BertForMaskedLM(config)).eval()
    bert.save_pretrained(tmp_path)
    model = InterBERTForPreTraining.from_bert(str(tmp_path), layout="release")
    assert not model.config.tie_word_embeddings
    assert_close(model(**text()).mlm_logits, bert(**text()).logits)
    tied = InterBERTConfig.from_bert_config(config, layout="release", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="`tie_word_embeddings` must be that of the BERT checkpoint, False, got True"):
        InterBERTForPreTraining.from_bert(str(tmp_path), config=tied, layout="release")


def test_how_the_new_model_is_held_is_not_said_to_bert(berts):
    with pytest.raises(ValueError, match="in float32 on the CPU: expected no attn_implementation, dtype"):
        InterBERTModel.from_bert(str(berts["BertModel"][1]), dtype=torch.bfloat16, attn_implementation="eager")


def test_the_rest_is_initialised_randomly(berts):
    """Every bias of the saved BERTs is away from 0; biases that are 0 did not come from there."""
    model = InterBERTForPreTraining.from_bert(str(berts["BertModel"][1]), layout="paper")
    fresh = ["text_layers", "vision_layers", "embeddings.image", "pooler", "mlm_head", "region_head", "itm_head"]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert bool((parameter == 0).all()) == any(part in name for part in fresh), name
    assert model.mlm_head.decoder.weight is model.interbert.embeddings.text.word_embeddings.weight


def test_a_given_config_may_use_fewer_layers_and_other_regions(berts):
    bert, folder = berts["BertForMaskedLM"]
    config = InterBERTConfig.from_bert_config(
        BERT, num_hidden_layers=2, num_text_layers=1, num_vision_layers=2, vision_num_attention_heads=2,
        vision_intermediate_size=12, region_feature_size=6,
    )  # fmt: skip
    model = InterBERTModel.from_bert(str(folder), config=config, layout="release").eval()
    bert_layers = bert.bert.encoder.layer
    assert torch.equal(model.interaction_layers[1].output.weight, bert_layers[1].output.dense.weight)
    assert torch.equal(model.text_layers[0].output.weight, bert_layers[2].output.dense.weight)
    outputs = model(**tiny_regions())
    assert outputs.vision_last_hidden_state.shape == (3, 6, 16)


def test_positions_by_mlp_need_no_table_of_the_same_length(berts):
    bert, folder = berts["BertModel"]
    config = InterBERTConfig.from_bert_config(BERT, text_position_embedding="mlp", max_position_embeddings=99)
    model = InterBERTModel.from_bert(str(folder), config=config)
    assert torch.equal(model.embeddings.text.word_embeddings.weight, bert.embeddings.word_embeddings.weight)
    assert torch.equal(model.embeddings.text.layer_norm.weight, bert.embeddings.LayerNorm.weight)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 41),
        ("hidden_size", 32),
        ("num_attention_heads", 2),
        ("intermediate_size", 28),
        ("type_vocab_size", 2),
        ("max_position_embeddings", 30),
    ],
)
def test_other_widths_are_refused(berts, name, value):
    config = InterBERTConfig.from_bert_config(BERT, **{name: value})
    message = f"`{name}` must be that of the BERT checkpoint, {getattr(BERT, name)}, got {value}."
    with pytest.raises(ValueError, match=re.escape(message)):
        InterBERTModel.from_bert(str(berts["BertModel"][1]), config=config)


@pytest.mark.parametrize(
    ("layout", "layers", "message"),
    [
        ("paper", (6, 1), "The paper layout takes 6 layers from BERT (6 interaction, 0 text), but .* has 5."),
        ("release", (3, 3), "The release layout takes 6 layers from BERT (3 interaction, 3 text), but .* has 5."),
    ],
)
def test_too_few_layers_are_refused(berts, layout, layers, message):
    config = InterBERTConfig.from_bert_config(BERT, num_hidden_layers=layers[0], num_text_layers=layers[1])
    message = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=message):
        InterBERTModel.from_bert(str(berts["BertModel"][1]), config=config, layout=layout)


@pytest.mark.parametrize("with_config", [False, True])
def test_other_layouts_are_refused(berts, with_config):
    config = InterBERTConfig.from_bert_config(BERT) if with_config else None
    with pytest.raises(ValueError, match='`layout` must be "paper" or "release", got \'papre\''):
        InterBERTModel.from_bert(str(berts["BertModel"][1]), config=config, layout="papre")


def test_other_architectures_are_refused(tmp_path):
    DistilBertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a checkpoint of BERT's architecture .* model_type 'distilbert'"):
        InterBERTModel.from_bert(str(tmp_path))
