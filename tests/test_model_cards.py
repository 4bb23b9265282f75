import pytest
from huggingface_hub import ModelCard
from transformers import BertConfig

from configuration_interbert import InterBERTConfig
from model_cards import TrainedCard
from model_cards.model_card import hub_name, markdown_table


@pytest.fixture
def card() -> TrainedCard:
    return TrainedCard(
        repo_id="org/interbert-tiny",
        auto_class="AutoModelForPreTraining",
        config=InterBERTConfig(num_hidden_layers=3, hidden_size=384, region_feature_size=1280),
        num_parameters=1234567,
        dataset_name="org/regions",
        training_arguments={"learning_rate": 0.0001, "objectives": "mlm,mom,itm"},
        results=[{"epoch": 1, "eval_itm_accuracy": 0.51}, {"epoch": 2, "eval_itm_accuracy": 0.75, "recall": 0.123456}],
        initialized_from="bert-base-uncased",
    )


def test_card_says_what_it_was_given_and_loads_again(card, tmp_path):
    card.render().save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.library_name == "transformers"
    assert "custom_code" in loaded.data.tags
    assert (loaded.data.datasets, loaded.data.base_model) == ("org/regions", "bert-base-uncased")
    text = loaded.text
    assert text.lstrip().startswith("# interbert-tiny\n")
    assert "1,234,567 parameters:\n3 interaction layers, 6 text layers and\n6 vision layers of width 384." in text
    assert 'AutoProcessor.from_pretrained("org/interbert-tiny", trust_remote_code=True)' in text
    assert "| `learning_rate` | 0.0001 |\n| `objectives` | mlm,mom,itm |\n" in text
    assert "It was started from `bert-base-uncased`." in text
    assert "| 1 | 0.51 |  |\n| 2 | 0.75 | 0.1235 |" in text


def test_unknown_facts_are_left_out(card, tmp_path):
    card.initialized_from = None
    card.dataset_name = str(tmp_path)
    rendered = card.render()
    assert "started from" not in rendered.text
    assert rendered.data.base_model is None and rendered.data.datasets is None
    assert "license" not in rendered.data.to_dict()


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert hub_name("org/name") == "org/name" and hub_name("bert-base-uncased") == "bert-base-uncased"
    assert hub_name("folder") is None and hub_name("../some/folder") is None and hub_name(None) is None


def test_table_has_every_column():
    assert markdown_table([{"a": 1}, {"b": 0.25}]).splitlines() == ["| a | b |", "|---|---|", "| 1 |  |", "|  | 0.25 |"]


def test_a_text_classifier_takes_no_regions(card):
    card.auto_class = "AutoModelForSequenceClassification"
    text = card.render().text
    assert 'inputs = processor(text="a sentence", return_tensors="pt")\nlabel = model.config.id2label[' in text
    assert "regions=" not in text
    card.config.problem_type = "regression"
    assert "\nscore = model(**inputs).logits[0, 0].item()\n```" in card.render().text


def test_a_bert_that_interbert_is_compared_with_is_called_one(card):
    card.auto_class, card.config = (
        "AutoModelForSequenceClassification",
        BertConfig(num_hidden_layers=2, hidden_size=384),
    )
    rendered = card.render()
    assert rendered.data.tags is None
    assert "A BERT of 2 layers of width 384 with\n1,234,567 parameters" in rendered.text
    assert 'processor = AutoTokenizer.from_pretrained("org/interbert-tiny")\n' in rendered.text
    assert "trust_remote_code" not in rendered.text and "This checkpoint has" not in rendered.text
