import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from matplotlib.image import imread
from model_fixtures import task_model, tiny_processor
from transformers import BertConfig

from configuration_interbert import InterBERTConfig
from configuration_interbert.configuration_interbert import AUTO_MAP, PIPELINES
from draw_architecture import draw_architecture, save_architecture
from model_cards import CHECKPOINTS, TrainedCard, WidgetExample
from model_cards.model_card import hub_name, markdown_table
from modeling_interbert import modeling_interbert
from training import OutputArguments

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def card() -> TrainedCard:
    return TrainedCard(
        repo_id="org/interbert-tiny",
        auto_class="AutoModelForPreTraining",
        pipeline_tag="zero-shot-image-classification",
        config=InterBERTConfig(num_hidden_layers=3, hidden_size=384, region_feature_size=1280),
        num_parameters=1234567,
        dataset_name="org/regions",
        training_arguments={"learning_rate": 0.0001, "objectives": "mlm,mom,itm", "validation_split": "dev"},
        results=[
            {"epoch": 1, "eval_itm_accuracy": 0.51},
            {"epoch": 2, "eval_itm_accuracy": 0.75, "eval_image_recall_at_1": 0.123456},
        ],
        initialized_from="bert-base-uncased",
    )


def test_card_says_what_it_was_given_and_loads_again(card, tmp_path):
    example = WidgetExample("a.png", [{"label": "a dog", "score": 0.5}], candidate_labels="a dog, a cat")
    card.widget = [example]
    card.render().save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.library_name == "transformers"
    assert loaded.data.pipeline_tag == "zero-shot-image-classification"
    assert "custom_code" in loaded.data.tags
    assert (loaded.data.datasets, loaded.data.base_model) == ("org/regions", "bert-base-uncased")
    assert loaded.data.metrics == ["recall"]
    (result,) = loaded.data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_split) == ("image retrieval R@1", 0.1235, "dev")
    assert loaded.data.widget == [
        {"src": "a.png", "candidate_labels": "a dog, a cat", "output": [{"label": "a dog", "score": 0.5}]}
    ]
    text = loaded.text
    assert text.lstrip().startswith("# interbert-tiny\n")
    assert "1,234,567 parameters:\n3 interaction, 6 text and 6 vision\nlayers of width 384." in text
    assert 'AutoProcessor.from_pretrained("org/interbert-tiny", trust_remote_code=True)' in text
    assert "| `learning_rate` | 0.0001 |\n| `objectives` | mlm,mom,itm |\n" in text
    assert "It was started from `bert-base-uncased`." in text
    assert "| 1 | 0.51 |  |\n| 2 | 0.75 | 0.1235 |" in text
    assert "\n\n\n" not in text


def test_unknown_facts_are_left_out(card, tmp_path):
    card.initialized_from = None
    card.dataset_name = str(tmp_path)
    card.results = [{"epoch": 1}]
    rendered = card.render()
    assert "started from" not in rendered.text and "The paper reports" not in rendered.text
    metadata = yaml.safe_load(rendered.content.split("---")[1])
    assert metadata.keys() == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_have_cards(card, name, tmp_path):
    card.checkpoint = checkpoint = CHECKPOINTS[name]
    card.render().save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert (loaded.data.license, loaded.data.language) == (checkpoint.license, list(checkpoint.languages))
    assert checkpoint.name == name
    assert (REPOSITORY / checkpoint.recipe).is_file()
    for text in (checkpoint.summary, checkpoint.intended_data, checkpoint.recipe, *checkpoint.limits):
        assert text in loaded.text
    for result in checkpoint.paper_results:
        assert f"| {result.task} | {result.metric} | {result.value} |" in loaded.text
    # What the paper reports is never in the metadata, which are ours.
    assert [result.metric_value for result in loaded.data.eval_results] == [0.1235]
    OutputArguments("out", model_card=name).check_model_card(checkpoint.auto_class)
    with pytest.raises(ValueError, match=f"`--model_card`: expected one of .* for this task, got {name}"):
        OutputArguments("out", model_card=name).check_model_card("AutoModelForSequenceClassification")


def test_what_was_not_evaluated_is_not_called_so(card):
    assert "`eval_*` were measured, after the epochs below," in card.render().text
    assert "moving average" not in card.render().text
    card.training_arguments["ema_decay"] = 0.99
    assert "moving average" in card.render().text
    card.results = [{"epoch": 1, "train_loss": 2.5}]
    text = card.render().text
    assert "It was not evaluated while it was trained." in text and "moving average" not in text


def test_results_that_are_no_numbers_are_not_in_the_metadata(card):
    card.results = [{"epoch": 1, "eval_pearson": math.nan, "eval_spearmanr": 0.25}]
    rendered = card.render()
    assert [result.metric_name for result in rendered.data.eval_results] == ["Spearman correlation"]
    assert "| 1 | nan | 0.25 |" in rendered.text


def test_parts_of_a_split_are_called_so(card):
    card.training_arguments |= {"retrieval_eval_size": 400, "max_eval_samples": "None"}
    (result,) = card.render().data.eval_results
    assert (result.dataset_split, result.dataset_args) == ("dev", {"retrieval_eval_size": 400})
    card.training_arguments["validation_fraction"] = 0.2  # of the training split
    (result,) = card.render().data.eval_results
    assert result.dataset_split is None


CLASSES = {
    reference.split(".")[1]: auto_class for auto_class, reference in AUTO_MAP.items() if "AutoConfig" != auto_class
}


@pytest.mark.parametrize(
    "class_name, problem_type",
    [*((name, None) for name in CLASSES), ("InterBERTForSequenceClassification", "regression")],
)
def test_snippets_run(card, class_name, problem_type, tmp_path):
    model = task_model(
        getattr(modeling_interbert, class_name), problem_type=problem_type, num_labels=1 if problem_type else 4
    )
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    card.repo_id, card.config, card.auto_class = str(tmp_path), model.config, CLASSES[class_name]
    card.pipeline_tag = PIPELINES.get(class_name, ("text-classification",))[0]
    snippets = re.findall(r"```python\n(.*?)```", card.render().text, re.DOTALL)
    assert len(snippets) == 2
    scope: dict = {}
    for snippet in snippets:
        exec(snippet, scope)
    outputs = {
        "InterBERTModel": ("features", torch.Tensor),
        "InterBERTForPreTraining": ("match_probability", float),
        "InterBERTForImageRetrieval": ("match_probability", float),
        "InterBERTForVQA": ("answer", str),
        "InterBERTForMultipleChoice": ("choice", int),
        "InterBERTForSequenceClassification": ("score", float) if problem_type else ("label", str),
    }
    name, kind = outputs[class_name]
    assert isinstance(scope[name], kind)


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert hub_name("org/name") == "org/name" and hub_name("bert-base-uncased") == "bert-base-uncased"
    assert hub_name("folder") is None and hub_name("../some/folder") is None and hub_name(None) is None


def test_table_has_every_column():
    lines = markdown_table([{"a": 90621}, {"b": 0.123456}]).splitlines()
    assert lines == ["| a | b |", "|---|---|", "| 90621 |  |", "|  | 0.1235 |"]


def test_a_text_classifier_takes_no_regions(card):
    card.auto_class = "AutoModelForSequenceClassification"
    text = card.render().text
    assert 'inputs = processor(text="a sentence", return_tensors="pt")\nlabel = model.config.id2label[' in text
    assert "regions=" not in text and "`regions`" not in text


def test_a_bert_that_interbert_is_compared_with_is_called_one(card):
    card.auto_class, card.config = (
        "AutoModelForSequenceClassification",
        BertConfig(num_hidden_layers=2, hidden_size=384),
    )
    rendered = card.render()
    assert rendered.data.tags is None
    assert "A BERT of 2 layers of width 384 with\n1,234,567 parameters" in rendered.text
    assert 'processor = AutoTokenizer.from_pretrained("org/interbert-tiny")\n' in rendered.text
    for absent in ("trust_remote_code", "This checkpoint has", "architecture.png", "Limits"):
        assert absent not in rendered.text


def test_the_picture_has_the_sizes_of_the_configuration(tmp_path):
    config = InterBERTConfig(
        num_hidden_layers=3, num_text_layers=0, hidden_size=96, num_attention_heads=12, fusion="sum"
    )
    labels = " ".join(text.get_text() for text in draw_architecture(config).axes[0].texts)
    for words in ("3 layers of width 96", "no text stream", "vision stream: 6 layers", "pooled vectors: sum"):
        assert words in labels
    save_architecture(config, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[2] == 4
