"""What a finetuning script leaves on the Hub: cards, pipelines and a handler that run without the packages."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from hub_server import WITHOUT_PACKAGES, needs_hub, start_hub
from huggingface_hub import ModelCard
from model_fixtures import task_model, tiny_processor
from PIL import Image, UnidentifiedImageError
from transformers import AutoTokenizer

from configuration_interbert import InterBERTConfig
from configuration_interbert.configuration_interbert import AUTO_MAP, PIPELINES
from generate_scenes import write_scenes
from model_cards import CHECKPOINTS, TrainedCard
from modeling_interbert import InterBERTForImageRetrieval, InterBERTForVQA
from pictures import Pictures
from processing import InterBERTProcessor, load_region_dataset
from publishing import WidgetInputs, _pictured, match_inputs, run_widget

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = (
    "hidden_size=32,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=64,vision_intermediate_size=64,"
    "num_hidden_layers=1,num_text_layers=1,num_vision_layers=1,pooler_size=16"
)
SCRIPTS = {
    "org/answers": ("run_vqa.py", "interbert-base-vqa2"),
    "org/matches": ("run_image_retrieval.py", "interbert-base-flickr30k"),
}
QUESTION, CAPTIONS = "what colour is the large circle", ["a large red circle", "two stars", "a ring"]

# Runs where the packages cannot be imported, against a Hub-compatible server.
CLIENT = (
    WITHOUT_PACKAGES
    + """
import json
import re
from huggingface_hub import HfApi, ModelCard, snapshot_download
from transformers import pipeline

record, question, captions = json.loads(sys.argv[1])
inputs = {
    "org/answers": {"image": record, "question": question},
    "org/matches": {"image": record, "candidate_labels": captions},
}
report = {}
for name, task in (("org/answers", "visual-question-answering"), ("org/matches", "zero-shot-image-classification")):
    run = pipeline(task, model=name, trust_remote_code=True, device="cpu")
    folder = snapshot_download(name)
    sys.path.insert(0, folder)
    sys.modules.pop("handler", None)
    from handler import EndpointHandler
    sys.path.remove(folder)
    handler = EndpointHandler(folder)
    card = ModelCard.load(name)
    card.validate()
    scope = {}
    for snippet in re.findall(r"```python\\n(.*?)```", card.text, re.DOTALL):
        exec(snippet, scope)
    report[name] = {
        "pipeline": run(**inputs[name]),
        "handler": handler({"inputs": inputs[name]}),
        "batch": handler({"inputs": [inputs[name]] * 2, "parameters": {"batch_size": 2}}),
        "card": card.data.to_dict(),
        "files": HfApi().list_repo_files(name),
        "snippets": sorted(scope.keys() & {"run", "answer", "match_probability"}),
    }
    try:
        handler({"question": question})
    except ValueError as error:
        report[name]["error"] = str(error)
print(json.dumps(report))
"""
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=60, num_validation=10, num_test=4)
    return folder


@pytest.fixture(scope="module")
def published(scenes, tmp_path_factory):
    """What the scripts wrote, by repository, and what a process without the packages finds on the Hub."""
    folder = tmp_path_factory.mktemp("published")
    outputs = {name: folder / name.split("/")[1] for name in SCRIPTS}
    record = read_record(scenes)
    with start_hub(folder / "hub") as hub:
        environment = hub.env(home=folder / "home") | {"ACCELERATE_USE_CPU": "true"}
        for name, (script, card) in SCRIPTS.items():
            command = [sys.executable, str(REPOSITORY / "examples" / script), "--do_train", "--do_eval"]
            command += ["--dataset_name", str(scenes), "--tokenizer_name", str(scenes / "tokenizer")]
            command += ["--config_overrides", TINY, "--max_train_steps", "3", "--ema_decay", "0.9"]
            command += ["--widget_pictures", "--max_seq_length", "12", "--max_regions", "2"]
            command += [
                "--output_dir",
                str(outputs[name]),
                "--push_to_hub",
                "--hub_model_id",
                name,
                "--model_card",
                card,
            ]
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-4000:]
        client = subprocess.run(
            [sys.executable, "-c", CLIENT, json.dumps([record, QUESTION, CAPTIONS])],
            cwd=folder,
            env={name: value for name, value in hub.env(home=folder / "client").items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
        )
    assert client.returncode == 0, client.stderr[-4000:]
    return outputs, json.loads(client.stdout.splitlines()[-1])


def read_record(scenes: Path) -> dict:
    record = load_region_dataset(scenes, "test")[1]
    return {name: record[name].tolist() for name in ("features", "boxes")} | {
        name: record[name] for name in ("width", "height")
    }


@torch.no_grad()
def run_plain(model, processor, text, record):
    return model.eval()(**processor(text=text, regions=record, return_tensors="pt"))


@needs_hub
def test_answers_from_the_hub_are_those_of_the_trained_model(published, scenes):
    outputs, report = published
    folder, found = outputs["org/answers"], report["org/answers"]
    model, processor = InterBERTForVQA.from_pretrained(folder), InterBERTProcessor.from_pretrained(folder)
    logits = run_plain(model, processor, QUESTION, read_record(scenes)).logits[0]
    scores, labels = logits.sigmoid().topk(5)
    answers = [model.config.id2label[label] for label in labels.tolist()]
    for result in (found["pipeline"], found["handler"], *found["batch"]):
        assert [item["answer"] for item in result] == answers
        assert [item["score"] for item in result] == pytest.approx(scores.tolist(), abs=1e-6)
    assert found["snippets"] == ["answer", "run"]
    assert found["error"] == "Expected `inputs`, got ['question']."
    # Predictions have texts of the dataset.
    assert (folder / "eval_predictions.jsonl").exists()
    assert "eval_predictions.jsonl" not in found["files"] and "eval_results.json" in found["files"]


@needs_hub
def test_matches_from_the_hub_are_those_of_the_trained_model(published, scenes):
    outputs, report = published
    folder, found = outputs["org/matches"], report["org/matches"]
    model, processor = InterBERTForImageRetrieval.from_pretrained(folder), InterBERTProcessor.from_pretrained(folder)
    record = read_record(scenes)
    scores = {text: run_plain(model, processor, text, record).match_scores.item() for text in CAPTIONS}
    for result in (found["pipeline"], found["handler"], *found["batch"]):
        assert [item["label"] for item in result] == sorted(scores, key=scores.get, reverse=True)
        assert {item["label"]: item["score"] for item in result} == pytest.approx(scores, abs=1e-6)
    assert found["snippets"] == ["match_probability", "run"]


@needs_hub
def test_cards_say_what_was_measured(published, scenes):
    outputs, report = published
    for name, folder in outputs.items():
        measured = json.loads((folder / "eval_results.json").read_text())
        data = report[name]["card"]
        assert (data["license"], data["language"], data["library_name"]) == ("apache-2.0", ["en"], "transformers")
        (entry,) = data["model-index"]
        assert entry["name"] == name.split("/")[1]
        (result,) = entry["results"]
        assert result["task"]["type"] == data["pipeline_tag"]
        assert result["dataset"] == {"name": "scenes", "type": "scenes", "split": "validation"}
        found = {metric["name"]: metric["value"] for metric in result["metrics"]}
        expected = {
            "org/answers": {"accuracy": "eval_accuracy"},
            "org/matches": {"P@5": "eval_precision_at_5"}
            | {
                f"{direction} retrieval R@{k}": f"eval_{direction}_recall_at_{k}"
                for direction in ("image", "text")
                for k in (1, 5, 10)
            },
        }[name]
        assert found == {shown: pytest.approx(measured[key], abs=1e-4) for shown, key in expected.items()}
        assert str(folder) not in (folder / "README.md").read_text().split("---")[1]


@needs_hub
def test_cards_of_all_checkpoints_are_valid(tmp_path):
    classes = {reference.split(".")[1]: auto_class for auto_class, reference in AUTO_MAP.items()}
    for number, (name, class_name) in enumerate(product(CHECKPOINTS, PIPELINES)):
        card = TrainedCard(
            repo_id=f"org/{name}",
            auto_class=classes[class_name],
            pipeline_tag=PIPELINES[class_name][0],
            config=InterBERTConfig(),
            num_parameters=1,
            dataset_name="org/regions",
            training_arguments={"learning_rate": 1e-4},
            results=[{"eval_accuracy": 0.5, "eval_image_recall_at_1": 0.25}],
            initialized_from="bert-base-uncased",
            checkpoint=CHECKPOINTS[name],
        )
        card.render().save(tmp_path / f"{number}.md")
    code = (
        "import sys; from huggingface_hub import ModelCard; [ModelCard.load(path).validate() for path in sys.argv[1:]]"
    )
    with start_hub(tmp_path / "hub") as hub:
        command = [sys.executable, "-c", code, *map(str, tmp_path.glob("*.md"))]
        result = subprocess.run(command, env=hub.env(home=tmp_path / "home"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@needs_hub
def test_widgets_show_what_the_pipeline_gave(published, scenes):
    outputs, _ = published
    regions = load_region_dataset(scenes, "validation")
    for name, folder in outputs.items():
        card = ModelCard.load(folder / "README.md")
        assert len(card.data.widget) == 3
        assert {path.name for path in folder.glob("*.png")} == {"architecture.png"} | {
            example["src"] for example in card.data.widget
        }
        processor = InterBERTProcessor.from_pretrained(folder)
        for example in card.data.widget:
            picture = Image.open(folder / example["src"])
            (row,) = [row for row in range(len(regions)) if Pictures(regions).open(row).tobytes() == picture.tobytes()]
            if name == "org/answers":
                model = InterBERTForVQA.from_pretrained(folder)
                logits = run_plain(model, processor, example["text"], regions[row]).logits[0]
                assert example["output"]["score"] == pytest.approx(logits.sigmoid().max().item(), abs=1e-4)
                assert example["output"]["answer"] == model.config.id2label[logits.argmax().item()]
            else:
                model = InterBERTForImageRetrieval.from_pretrained(folder)
                texts = [item["label"] for item in example["output"]]
                assert example["candidate_labels"].split(", ") == sorted(texts, key=example["candidate_labels"].index)
                for item in example["output"]:
                    score = run_plain(model, processor, item["label"], regions[row]).match_scores.item()
                    assert item["score"] == pytest.approx(score, abs=1e-4)
                assert set(texts) & set(regions.captions(row))


@needs_hub
def test_texts_and_regions_are_cut_as_in_training(published, scenes):
    outputs, _ = published
    record = read_record(scenes)
    assert len(record["boxes"]) > 2
    for folder in outputs.values():
        processor = InterBERTProcessor.from_pretrained(folder)
        inputs = processor(text="circle " * 40, regions=record, return_tensors="pt")
        assert inputs["input_ids"].shape == (1, 12) and inputs["region_boxes"].shape == (1, 2, 4)


def test_images_are_matched_with_their_own_caption_and_two_others():
    pairs = [("a", "one"), ("a", "two"), ("b", "three"), ("c", "four, five"), ("d", "six"), ("e", "seven")]
    assert list(match_inputs(pairs)) == [
        {"image": "d", "candidate_labels": ["six", "one", "three"]},
        {"image": "e", "candidate_labels": ["seven", "three", "six"]},
    ]


def test_without_pictures_there_is_no_widget(scenes, tmp_path):
    regions = load_region_dataset(scenes, "validation")
    regions = type(regions)(regions.dataset.remove_columns("image"))
    inputs = [{"image": regions[0]["image_id"], "candidate_labels": CAPTIONS}]
    model = task_model(InterBERTForImageRetrieval)
    assert run_widget(model, tiny_processor(), WidgetInputs(regions, inputs), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_questions_name_images_in_their_own_way(scenes):
    regions = load_region_dataset(scenes, "validation")
    rows = regions.dataset.remove_columns("image_id")
    ids = [f"COCO_val2014_{number:012d}.jpg" for number in range(len(rows))]
    widget = WidgetInputs(type(regions)(rows.add_column("image_id", ids)), [{"image": "1", "question": "what?"}])
    ((picture, inputs),) = _pictured(widget)
    assert inputs["image"]["image_id"] == ids[1] and inputs["question"] == "what?"
    assert picture.tobytes() == Pictures(regions).open(1).tobytes()


def test_pictures_that_cannot_be_read_are_passed_over(scenes, tmp_path, monkeypatch):
    regions = load_region_dataset(scenes, "validation")
    open_picture = Pictures.open

    def open_most(self, row):
        if row == 0:
            raise UnidentifiedImageError("damaged")
        return None if row == 1 else open_picture(self, row)

    monkeypatch.setattr(Pictures, "open", open_most)
    tokenizer = AutoTokenizer.from_pretrained(scenes / "tokenizer")
    model = task_model(
        InterBERTForImageRetrieval, vocab_size=len(tokenizer), region_feature_size=208, max_position_embeddings=64
    )
    processor = InterBERTProcessor(tokenizer, region_feature_size=208)
    inputs = ({"image": image_id, "candidate_labels": CAPTIONS} for image_id in regions.image_ids)
    examples = run_widget(model, processor, WidgetInputs(regions, inputs), tmp_path)
    assert [example.src for example in examples] == ["widget-0.png", "widget-1.png", "widget-2.png"]
    picture = Image.open(tmp_path / "widget-0.png")
    assert picture.tobytes() == open_picture(Pictures(regions), 2).tobytes()
