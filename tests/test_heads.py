"""The models for tasks: image retrieval, visual question answering, multiple choice, text classification."""

import re

import pytest
import torch
from model_fixtures import assert_close, example_inputs, task_model, tiny_inputs, tiny_regions, tiny_text

from modeling_interbert import (
    InterBERTForImageRetrieval,
    InterBERTForMultipleChoice,
    InterBERTForPreTraining,
    InterBERTForSequenceClassification,
    InterBERTForVQA,
)


def rows(inputs: dict[str, torch.Tensor], chosen) -> dict[str, torch.Tensor]:
    return {name: value[chosen] for name, value in inputs.items()}


# Image retrieval


def test_match_scores_are_the_probability_of_a_match():
    outputs = task_model(InterBERTForImageRetrieval)(**tiny_inputs())
    assert outputs.itm_logits.shape == (3, 2)
    exponentials = outputs.itm_logits.exp()
    assert_close(outputs.match_scores, exponentials[:, 0] / exponentials.sum(dim=1))


def test_a_pretraining_checkpoint_opens_for_zero_shot_retrieval(tmp_path):
    pretrained = task_model(InterBERTForPreTraining)
    pretrained.save_pretrained(tmp_path)
    model, info = InterBERTForImageRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_close(model(**tiny_inputs()).itm_logits, pretrained(**tiny_inputs()).itm_logits)


def test_match_scores_near_1_differ_in_half_precision():
    """As the log-odds that they come from do."""
    model = task_model(InterBERTForImageRetrieval, fusion="sum")
    with torch.no_grad():
        model.itm_head.classifier.weight.mul_(4)
        outputs = model.to(torch.bfloat16)(**tiny_inputs())
    assert outputs.match_scores.dtype == torch.float32
    assert_close(outputs.match_scores, (outputs.itm_logits[:, 0].float() - outputs.itm_logits[:, 1].float()).sigmoid())


def test_choices_without_a_right_one_are_not_scored():
    model = task_model(InterBERTForImageRetrieval)
    loss = model(**choices(tiny_inputs()), labels=torch.tensor([1, -100])).loss
    assert_close(loss, model(**rows(choices(tiny_inputs()), [0]), labels=torch.tensor([1])).loss)
    assert model(**choices(tiny_inputs()), labels=torch.tensor([-100, -100])).loss == 0


@pytest.mark.parametrize("one", ["text", "image"])
@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_one_goes_with_many(one, with_masks, attn_implementation):
    """As if it had been repeated."""
    text, regions = tiny_text(), tiny_regions()
    if not with_masks:
        text.pop("attention_mask"), regions.pop("region_attention_mask")
    model = task_model(InterBERTForImageRetrieval, attn_implementation=attn_implementation)
    embedded = {"image": [], "text": []}
    for modality, lengths in embedded.items():
        part = getattr(model.interbert.embeddings, modality)
        part.register_forward_hook(lambda module, args, output, lengths=lengths: lengths.append(len(output)))
    if one == "text":
        outputs = model(**rows(text, slice(1, 2)), **regions)
        expected = model(**rows(text, [1, 1, 1]), **regions)
    else:
        outputs = model(**text, **rows(regions, slice(1, 2)))
        expected = model(**text, **rows(regions, [1, 1, 1]))
    assert_close(outputs.itm_logits, expected.itm_logits)
    assert outputs.match_scores.shape == (3,)
    assert embedded == {"image": [3, 3], "text": [1, 3]} if one == "text" else {"image": [1, 3], "text": [3, 3]}


def test_images_that_meet_many_texts_are_embedded_once():
    """All texts with all images, from images that were embedded beforehand."""
    model = task_model(InterBERTForImageRetrieval)
    text, regions = tiny_text(), tiny_regions()
    embedded = {
        "region_embeds": model.interbert.embed_regions(**regions),
        "region_attention_mask": regions["region_attention_mask"],
    }
    model.interbert.embeddings.image.register_forward_hook(lambda *_: pytest.fail("embedded again"))
    for chosen in range(3):
        one = rows(text, slice(chosen, chosen + 1))
        scores = model(**one, **embedded).itm_logits
        assert_close(scores, model(**rows(text, [chosen] * 3), **embedded).itm_logits)
        assert_close(model(**one, **rows(embedded, slice(1, 2))).itm_logits, scores[1:2])
    model.interbert.embeddings.image._forward_hooks.clear()
    assert_close(scores, model(**one, **regions).itm_logits)


def choices(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two examples of two pairs: (0, 1) and (2, 0)."""
    return {name: value[torch.tensor([[0, 1], [2, 0]])] for name, value in inputs.items()}


def test_choices_are_scored_pair_by_pair_and_the_right_one_is_learned():
    model = task_model(InterBERTForImageRetrieval)
    pairs = model(**tiny_inputs()).itm_logits
    labels = torch.tensor([1, 0])
    outputs = model(**choices(tiny_inputs()), labels=labels)
    assert_close(outputs.itm_logits, pairs[torch.tensor([[0, 1], [2, 0]])])
    assert outputs.match_scores.shape == (2, 2)
    log_odds = pairs[:, 0] - pairs[:, 1]
    expected = -(torch.log_softmax(log_odds[[0, 1]], dim=0)[1] + torch.log_softmax(log_odds[[2, 0]], dim=0)[0])
    assert_close(outputs.loss, expected / 2)


def test_labels_of_pairs():
    model = task_model(InterBERTForImageRetrieval)
    pairs = model(**tiny_inputs()).itm_logits.log_softmax(dim=-1)
    outputs = model(**tiny_inputs(), itm_labels=torch.tensor([0, 1, 1]))
    assert_close(outputs.loss, -(pairs[0, 0] + pairs[1, 1] + pairs[2, 1]) / 3)
    outputs = model(**choices(tiny_inputs()), itm_labels=torch.tensor([[0, 1], [1, 1]]))
    assert_close(outputs.loss, -(pairs[0, 0] + pairs[1, 1] + pairs[2, 1] + pairs[0, 1]) / 4)


# Visual question answering


@pytest.mark.parametrize(("vqa_head", "shapes"), [("mlp", [(16, 8), (4, 16)]), ("linear", [(4, 8)])])
def test_answers_are_scored_from_the_fused_vector(vqa_head, shapes):
    model = task_model(InterBERTForVQA, vqa_head=vqa_head)
    matrices = [parameter for parameter in model.vqa_head.parameters() if parameter.dim() == 2]
    assert [tuple(matrix.shape) for matrix in matrices] == shapes
    encoded = model.interbert(**tiny_inputs())
    expected = model.vqa_head(encoded.text_pooler_output * encoded.vision_pooler_output)
    labels = torch.tensor([[1.0, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.6, 0.9, 1.0]])
    outputs = model(**tiny_inputs(), labels=labels)
    assert_close(outputs.logits, expected)
    probabilities = expected.sigmoid()
    entropy = -(labels * probabilities.log() + (1 - labels) * (1 - probabilities).log())
    assert_close(outputs.loss, entropy.sum(dim=1).mean())


# Multiple choice


def test_choices_of_texts_share_the_regions():
    model = task_model(InterBERTForMultipleChoice)
    text = {name: torch.stack([value, value.flip(0)], dim=1) for name, value in tiny_text().items()}
    labels = torch.tensor([0, 1, 1])
    outputs = model(**text, **tiny_regions(), labels=labels)
    assert outputs.logits.shape == (3, 2)
    for choice in range(2):
        encoded = model.interbert(**{name: value[:, choice] for name, value in text.items()}, **tiny_regions())
        fused = encoded.text_pooler_output * encoded.vision_pooler_output
        assert_close(outputs.logits[:, choice], model.choice_head(fused)[:, 0])
    assert_close(outputs.loss, -outputs.logits.log_softmax(dim=1)[range(3), labels].mean())


def test_the_regions_that_choices_share_are_embedded_once():
    model = task_model(InterBERTForMultipleChoice)
    embedded = []
    model.interbert.embeddings.image.register_forward_hook(lambda module, args, output: embedded.append(len(output)))
    model(**{name: torch.stack([value, value.flip(0)], dim=1) for name, value in tiny_text().items()}, **tiny_regions())
    assert embedded == [3]


@pytest.mark.parametrize("model_class", [InterBERTForImageRetrieval, InterBERTForVQA, InterBERTForMultipleChoice])
def test_embedded_regions_stand_for_regions(model_class):
    model = task_model(model_class)
    expected = model(**example_inputs(model_class))
    embedded = {
        "region_embeds": model.interbert.embed_regions(**tiny_regions()),
        "region_attention_mask": tiny_regions()["region_attention_mask"],
    }
    text = {name: value for name, value in example_inputs(model_class).items() if not name.startswith("region")}
    outputs = model(**text, **embedded)
    for name, output in expected.items():
        assert_close(outputs[name], output)


# Text classification


def test_text_classification_reads_the_text_alone():
    model = task_model(InterBERTForSequenceClassification)
    labels = torch.tensor([3, 0, 2])
    outputs = model(**tiny_text(), labels=labels)
    expected = model.classifier(model.interbert(**tiny_text()).text_pooler_output)
    assert_close(outputs.logits, expected)
    assert_close(outputs.loss, -expected.log_softmax(dim=1)[range(3), labels].mean())


def test_regression():
    model = task_model(InterBERTForSequenceClassification, num_labels=1)
    labels = torch.tensor([0.5, 4.0, -1.0])
    outputs = model(**tiny_text(), labels=labels)
    assert model.config.problem_type == "regression"
    assert_close(outputs.loss, ((outputs.logits[:, 0] - labels) ** 2).mean())


# Inputs that cannot be


BAD_INPUTS = [
    (InterBERTForImageRetrieval, tiny_text(), "needs a text and `region_features`"),
    (
        InterBERTForImageRetrieval,
        tiny_inputs() | {"labels": torch.zeros(3, dtype=torch.long)},
        "`labels` needs inputs of shape (batch, choices, ...), got pairs.",
    ),
    (
        InterBERTForImageRetrieval,
        choices(tiny_inputs()) | {"labels": torch.zeros(2), "itm_labels": torch.zeros(2, 2)},
        "Give either `labels` (of choices) or `itm_labels` (of pairs), not both.",
    ),
    (
        InterBERTForImageRetrieval,
        tiny_text() | choices(tiny_regions()),
        "`input_ids` must have shape (batch=2, choices=2, ...), got (3, 7).",
    ),
    (
        InterBERTForImageRetrieval,
        choices(tiny_inputs()) | {"attention_mask": torch.ones(1, 4, 7)},
        "`attention_mask` must have shape (batch=2, choices=2, ...), got (1, 4, 7).",
    ),
    (
        InterBERTForMultipleChoice,
        choices(tiny_text())
        | {name: value[:2] for name, value in tiny_regions().items()}
        | {"attention_mask": torch.ones(2, 7)},
        "`attention_mask` must have shape (batch=2, choices=2, ...), got (2, 7).",
    ),
    (
        InterBERTForImageRetrieval,
        choices(tiny_inputs()) | {"labels": torch.zeros(3, dtype=torch.long)},
        "`labels` must have shape (2,), got (3,).",
    ),
    (
        InterBERTForImageRetrieval,
        tiny_inputs() | {"itm_labels": torch.zeros(2, dtype=torch.long)},
        "`itm_labels` must have shape (3,), got (2,).",
    ),
    (
        InterBERTForImageRetrieval,
        tiny_inputs() | {"region_embeds": torch.zeros(3, 6, 16)},
        "Give either `region_features` and `region_boxes` or `region_embeds`, not both.",
    ),
    (
        InterBERTForImageRetrieval,
        tiny_text() | {"region_embeds": torch.zeros(3, 6, 8)},
        "`region_embeds` must have shape (batch, regions + 1, hidden_size=16), got (3, 6, 8).",
    ),
    (
        InterBERTForImageRetrieval,
        tiny_text() | {"region_embeds": torch.zeros(3, 6, 16), "region_attention_mask": torch.ones(3, 6)},
        "`region_attention_mask` must have shape (3, 5), got (3, 6).",
    ),
    (InterBERTForVQA, tiny_regions(), "needs a text and `region_features`"),
    (InterBERTForVQA, tiny_inputs() | {"labels": torch.zeros(3, 5)}, "`labels` must have shape (3, 4), got (3, 5)."),
    (InterBERTForMultipleChoice, tiny_inputs(), "The text must have shape (batch, choices, tokens), got (3, 7)."),
    (
        InterBERTForMultipleChoice,
        choices(tiny_text()) | tiny_regions(),
        "Text and regions must have the same batch size, got 2 and 3.",
    ),
    (
        InterBERTForMultipleChoice,
        choices(tiny_text())
        | {name: value[:2] for name, value in tiny_regions().items()}
        | {"region_embeds": torch.zeros(2, 6, 16)},
        "Give either `region_features` and `region_boxes` or `region_embeds`, not both.",
    ),
]


@pytest.mark.parametrize(("model_class", "inputs", "message"), BAD_INPUTS, ids=range(len(BAD_INPUTS)))
def test_inputs_that_cannot_be_are_refused(model_class, inputs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        task_model(model_class)(**inputs)
