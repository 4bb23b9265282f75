"""The pipelines, opened from a saved checkpoint by `transformers.pipeline`, against the plain model."""

import json
import os
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from model_fixtures import NUM_LABELS, TINY, task_model, tiny_processor, tiny_record
from transformers import AutoConfig, AutoModel, pipeline
from transformers.utils import PushToHubMixin

from modeling_interbert import (
    InterBERTForImageRetrieval,
    InterBERTForMultipleChoice,
    InterBERTForPreTraining,
    InterBERTForSequenceClassification,
    InterBERTForVQA,
    InterBERTModel,
)
from processing import RegionDataset

ANSWERS = ["yes", "no", "two", "red"]
TEXTS = ["a red dog", "the small blue bird on the grass", "cat", "a large green cat on grass"]
RECORDS = [tiny_record(f"image-{i}", 1 + i * 7 % 5, seed=i) for i in range(7)]
VQA = "visual-question-answering"
MATCHING = "zero-shot-image-classification"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of each class, and the model in it."""
    folders = {}
    for model_class in (
        InterBERTModel,
        InterBERTForPreTraining,
        InterBERTForImageRetrieval,
        InterBERTForVQA,
        InterBERTForMultipleChoice,
        InterBERTForSequenceClassification,
    ):
        model = task_model(
            model_class, id2label=dict(enumerate(ANSWERS)), label2id={a: i for i, a in enumerate(ANSWERS)}
        )
        folder = tmp_path_factory.mktemp(model_class.__name__)
        model.save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
        folders[model_class] = folder, model
    return folders


@pytest.fixture
def open_pipeline(checkpoints):
    def open_pipeline(model_class, task=None, **kwargs):
        folder, model = checkpoints[model_class]
        return pipeline(task, model=str(folder), trust_remote_code=True, device="cpu", **kwargs), model

    return open_pipeline


@torch.no_grad()
def run_plain(model, texts, record, text_pair=None):
    """The outputs of the plain model for each text with the image, one pair at a time."""
    return [
        model(**tiny_processor()(text=text, text_pair=text_pair, regions=record, return_tensors="pt")) for text in texts
    ]


def check_scores(result: list[dict], name: str, expected: dict[str, float]):
    """Every text with its score, the best first."""
    assert [item[name] for item in result] == sorted(expected, key=expected.get, reverse=True)
    for item in result:
        assert item["score"] == pytest.approx(expected[item[name]], abs=1e-6)


def test_checkpoints_name_their_pipeline(checkpoints):
    entries = {}
    for model_class, (folder, _) in checkpoints.items():
        config = json.loads((folder / "config.json").read_text())
        entries[model_class] = config["custom_pipelines"]
    assert entries == {
        InterBERTModel: {
            "feature-extraction": {"impl": "pipelines_interbert.FeatureExtractionPipeline", "pt": ["AutoModel"]}
        },
        InterBERTForPreTraining: entries[InterBERTForImageRetrieval],
        InterBERTForImageRetrieval: {
            MATCHING: {
                "impl": "pipelines_interbert.ImageTextMatchingPipeline",
                "pt": ["AutoModelForZeroShotImageClassification"],
            }
        },
        InterBERTForVQA: {
            VQA: {
                "impl": "pipelines_interbert.VisualQuestionAnsweringPipeline",
                "pt": ["AutoModelForVisualQuestionAnswering"],
            }
        },
        InterBERTForMultipleChoice: {
            VQA: {"impl": "pipelines_interbert.VisualMultipleChoicePipeline", "pt": ["AutoModelForMultipleChoice"]}
        },
        InterBERTForSequenceClassification: {},
    }


def test_a_checkpoint_that_a_pipeline_has_opened_is_saved_as_before(checkpoints, open_pipeline, tmp_path):
    # Opening puts classes into the configuration.
    answerer, _ = open_pipeline(InterBERTForVQA, VQA)
    answerer.save_pretrained(tmp_path)
    folder, _ = checkpoints[InterBERTForVQA]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    # Transformers itself notes in tokenizer_config.json how a tokenizer was loaded.
    again = pipeline(VQA, model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert again(RECORDS[0], TEXTS[0]) == answerer(RECORDS[0], TEXTS[0])
    for path in set(folder.iterdir()) - {folder / "tokenizer_config.json"}:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_pipelines_of_others_stay(checkpoints, tmp_path):
    folder, _ = checkpoints[InterBERTForVQA]
    model = InterBERTForVQA.from_pretrained(folder)
    model.config.custom_pipelines["their-task"] = {"impl": "theirs.Pipeline", "pt": (AutoModel,), "type": "text"}
    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
    assert list(entries) == ["their-task", VQA]
    assert entries["their-task"] == {"impl": "theirs.Pipeline", "pt": ["AutoModel"], "type": "text"}


def test_another_head_brings_another_pipeline(checkpoints, tmp_path):
    folder, _ = checkpoints[InterBERTForPreTraining]
    InterBERTForVQA.from_pretrained(folder, num_labels=3).save_pretrained(tmp_path)
    assert list(AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).custom_pipelines) == [VQA]


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_answers(open_pipeline, batch_size):
    answerer, model = open_pipeline(InterBERTForVQA, VQA)
    inputs = [{"image": record, "question": TEXTS[i % 4]} for i, record in enumerate(RECORDS)]
    options = {} if batch_size is None else {"batch_size": batch_size}
    results = answerer(inputs, top_k=10, **options)
    assert len(results) == len(inputs)
    for item, result in zip(inputs, results, strict=True):
        scores = run_plain(model, [item["question"]], item["image"])[0].logits[0].sigmoid().tolist()
        check_scores(result, "answer", dict(zip(ANSWERS, scores, strict=True)))
    assert answerer(**inputs[0], top_k=2) == [pytest.approx(item, abs=1e-6) for item in results[0][:2]]
    assert len(answerer(inputs[0])) == NUM_LABELS


@pytest.mark.parametrize("model_class", [InterBERTForPreTraining, InterBERTForImageRetrieval])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_matches(open_pipeline, model_class, batch_size):
    matcher, model = open_pipeline(model_class, MATCHING, batch_size=batch_size)
    results = matcher(RECORDS, candidate_labels=TEXTS)
    assert len(results) == len(RECORDS)
    for record, result in zip(RECORDS, results, strict=True):
        scores = [outputs.itm_logits.softmax(-1)[0, 0].item() for outputs in run_plain(model, TEXTS, record)]
        check_scores(result, "label", dict(zip(TEXTS, scores, strict=True)))
    # Other texts for every image, and other numbers of them.
    inputs = [{"image": record, "candidate_labels": TEXTS[: 1 + i % 3]} for i, record in enumerate(RECORDS)]
    for item, result, full in zip(inputs, matcher(inputs), results, strict=True):
        assert result == [pytest.approx(one, abs=1e-6) for one in full if one["label"] in item["candidate_labels"]]


def test_choices(open_pipeline):
    chooser, model = open_pipeline(InterBERTForMultipleChoice, VQA)
    inputs = [
        {"image": record, "question": "a dog", "choices": TEXTS[: 2 + i % 3]} for i, record in enumerate(RECORDS[:4])
    ]
    for item, result in zip(inputs, chooser(inputs), strict=True):
        processor = tiny_processor()
        texts = processor(text=["a dog"] * len(item["choices"]), text_pair=item["choices"], return_tensors="pt")
        with torch.no_grad():
            outputs = model(
                **{name: tensor[None] for name, tensor in texts.items()},
                **processor(regions=item["image"], return_tensors="pt"),
            )
        scores = outputs.logits[0].softmax(-1).tolist()
        check_scores(result, "answer", dict(zip(item["choices"], scores, strict=True)))
        assert chooser(**item) == [pytest.approx(one, abs=1e-6) for one in result]


def test_features(open_pipeline):
    extractor, model = open_pipeline(InterBERTModel, "feature-extraction")
    for record, result in zip(RECORDS, extractor(RECORDS, text=TEXTS[1]), strict=True):
        outputs = run_plain(model, [TEXTS[1]], record)[0]
        assert len(result["text"]) == len(result["image"]) == TINY["pooler_size"]
        np.testing.assert_allclose(result["text"], outputs.text_pooler_output[0], atol=1e-6)
        np.testing.assert_allclose(result["image"], outputs.vision_pooler_output[0], atol=1e-6)


def test_the_only_task_is_found(open_pipeline):
    matcher, _ = open_pipeline(InterBERTForPreTraining)
    assert matcher.task == MATCHING and type(matcher).__name__ == "ImageTextMatchingPipeline"


def test_text_classification_is_that_of_transformers(open_pipeline):
    classifier, model = open_pipeline(InterBERTForSequenceClassification, "text-classification")
    with torch.no_grad():
        scores = model(**tiny_processor()(text=TEXTS[0], return_tensors="pt")).logits[0].softmax(-1).tolist()
    check_scores(classifier(TEXTS[0], top_k=None), "label", dict(zip(ANSWERS, scores, strict=True)))


@pytest.mark.parametrize("kind", ["list", "dataset", "region_dataset"])
def test_images_by_their_ids(open_pipeline, kind):
    region_dataset = RECORDS
    if kind != "list":
        features = datasets.Features(
            {
                "image_id": datasets.Value("string"),
                "features": datasets.List(datasets.List(datasets.Value("float16"))),
                "boxes": datasets.List(datasets.List(datasets.Value("float32"))),
                "width": datasets.Value("int32"),
                "height": datasets.Value("int32"),
            }
        )
        region_dataset = datasets.Dataset.from_list(RECORDS, features=features)
    if kind == "region_dataset":
        region_dataset = RegionDataset(region_dataset)
    answerer, _ = open_pipeline(InterBERTForVQA, VQA, region_dataset=region_dataset)
    by_id = answerer(["image-3", "image-0"], question=TEXTS[0])
    assert by_id == [answerer(RECORDS[3], TEXTS[0]), answerer(region_dataset[0], TEXTS[0])]
    with pytest.raises(ValueError, match="`region_dataset`, which has 7 images, got 'image-9'"):
        answerer("image-9", question=TEXTS[0])


def test_generators_and_torch_datasets_are_read_as_they_go(open_pipeline):
    answerer, _ = open_pipeline(InterBERTForVQA, VQA, batch_size=2)
    inputs = [{"image": record, "question": TEXTS[0]} for record in RECORDS]
    read = []

    def draw():
        for item in inputs:
            read.append(item)
            yield item

    class Inputs(torch.utils.data.Dataset):
        def __len__(self):
            return len(inputs)

        def __getitem__(self, index):
            return inputs[index]

    results = answerer(draw())
    first = next(iter(results))
    assert len(read) < len(inputs)
    expected = answerer(inputs)
    assert first == expected[0]
    assert list(answerer(Inputs(), num_workers=0)) == expected


def test_nothing_and_parts_of_inputs(open_pipeline):
    answerer, _ = open_pipeline(InterBERTForVQA, VQA)
    assert answerer([]) == answerer([], question="a") == []
    inputs = [{"image": record} for record in RECORDS[:2]]
    assert answerer(inputs, question=TEXTS[0]) == answerer(RECORDS[:2], question=TEXTS[0])
    whole = [{"image": record, "question": TEXTS[0]} for record in RECORDS[:2]]
    assert answerer(tuple(whole)) == answerer(whole) == answerer(tuple(RECORDS[:2]), question=TEXTS[0])
    assert answerer(()) == []


def test_processor_and_code_are_pushed_with_the_model(open_pipeline, tmp_path, monkeypatch):
    pipe, _ = open_pipeline(InterBERTForVQA, VQA)
    uploaded = set()

    def upload(self, folder, *arguments, **options):
        uploaded.update(os.listdir(folder))

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: Mock(repo_id=repo_id))
    pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="org/saved")
    assert {"model.safetensors", "processor_config.json", "tokenizer.json", "pipelines_interbert.py"} <= uploaded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(open_pipeline, dtype):
    matcher, model = open_pipeline(InterBERTForImageRetrieval, MATCHING, dtype=dtype)
    assert matcher.dtype == dtype
    expected = {text: run_plain(model, [text], RECORDS[1])[0].match_scores.item() for text in TEXTS}
    for item in matcher(RECORDS[1], TEXTS):
        assert item["score"] == pytest.approx(expected[item["label"]], abs=0.05)


@pytest.mark.parametrize(
    "model_class, inputs, message",
    [
        (InterBERTForVQA, {"image": RECORDS[0], "question": "  "}, "`question`: expected a text, got '  '"),
        (InterBERTForVQA, {"image": RECORDS[0]}, r"Expected an input with image, question, got \['boxes', 'features'"),
        (
            InterBERTForVQA,
            {"image": "image-0", "question": "a"},
            "`region_dataset`, which has no images, got 'image-0'. The checkpoint names no detector",
        ),
        (InterBERTForVQA, {"image": 3, "question": "a"}, "dict with features, boxes, width and height, .* got 3"),
        (InterBERTForVQA, {"image": RECORDS[0], "question": "a", "top_k": 0}, "a number of at least 1, got 0"),
        (InterBERTForVQA, {"image": RECORDS[0], "question": "a", "top_k": "3"}, "a number of at least 1, got '3'"),
        (InterBERTForVQA, {"image": RECORDS[0], "question": "a", "temperature": 1}, r"arguments \['temperature'\]"),
        (
            InterBERTForVQA,
            {"image": tiny_record("bare", 0, seed=0), "question": "a"},
            r"\(image_id bare\): expected at least one region",
        ),
        (
            InterBERTForImageRetrieval,
            {"image": RECORDS[0], "candidate_labels": "a dog"},
            "`candidate_labels`: expected a list of at least one text, got 'a dog'",
        ),
        (InterBERTForImageRetrieval, {"image": RECORDS[0], "candidate_labels": []}, r"at least one text, got \[\]"),
        (
            InterBERTForImageRetrieval,
            {"image": RECORDS[0], "candidate_labels": ["a", 3]},
            r"`candidate_labels\[1\]`: expected a text, got 3",
        ),
        (
            InterBERTForMultipleChoice,
            {"image": RECORDS[0], "question": "a"},
            r"with image, question, choices, got \['image', 'question'\]",
        ),
    ],
)
def test_bad_input_gets_a_clear_error(open_pipeline, model_class, inputs, message):
    runner, _ = open_pipeline(model_class)
    with pytest.raises(ValueError, match=message):
        runner(**inputs)
    good = {"question": "a dog", "choices": TEXTS, "candidate_labels": TEXTS}
    runner(RECORDS[0], **{name: value for name, value in good.items() if name in runner.__call__.__code__.co_varnames})
