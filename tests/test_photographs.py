"""From a photograph to an answer: processor, pipelines and handler find the regions with the checkpoint's detector."""

import base64
import functools
import http.server
import importlib.util
import io
import json
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hub_server import WITHOUT_PACKAGES, needs_hub, start_hub
from model_fixtures import save_tiny_detector, task_model, tiny_processor
from PIL import Image
from transformers import pipeline

from configuration_interbert import InterBERTConfig
from generate_scenes import write_scenes
from model_loading import ModelArguments, find_region_detector
from modeling_interbert import InterBERTForImageRetrieval, InterBERTForSequenceClassification, InterBERTForVQA
from processing import FasterRCNNForRegionFeatures, FasterRCNNImageProcessor, InterBERTProcessor, load_region_dataset
from processing.processing_interbert import _load_region_extractor
from processing.region_dataset import read_region_detector
from region_conversion import Converter

REPOSITORY = Path(__file__).resolve().parent.parent
FEATURE_SIZE = 32
QUESTION = "a red dog on the grass"
VQA = "visual-question-answering"
ANSWERS = ["yes", "no", "two", "red"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    return save_tiny_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def photographs(photograph, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    photograph.save(folder / "beach.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def checkpoint(detector, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, str(detector))
    return folder


def save_checkpoint(folder: Path, region_detector):
    labels = {"id2label": dict(enumerate(ANSWERS)), "label2id": {answer: i for i, answer in enumerate(ANSWERS)}}
    model = task_model(InterBERTForVQA, region_feature_size=FEATURE_SIZE, region_detector=region_detector, **labels)
    model.save_pretrained(folder)
    tiny_processor(FEATURE_SIZE, region_detector=region_detector).save_pretrained(folder)


@pytest.fixture(scope="module")
def expected(checkpoint, detector, photograph) -> dict[str, float]:
    """The scores of the answers, step by step."""
    with torch.inference_mode():
        inputs = FasterRCNNImageProcessor.from_pretrained(detector)(photograph)
        (regions,) = FasterRCNNForRegionFeatures.from_pretrained(detector)(**inputs).regions
        inputs = tiny_processor(FEATURE_SIZE)(text=QUESTION, regions=regions, return_tensors="pt")
        logits = InterBERTForVQA.from_pretrained(checkpoint)(**inputs).logits[0]
    return dict(zip(ANSWERS, logits.sigmoid().tolist(), strict=True))


def check_answers(answers: list[dict], expected: dict[str, float]):
    # Records keep features as float16.
    assert {item["answer"]: item["score"] for item in answers} == pytest.approx(expected, abs=1e-3)


def test_processor(checkpoint, detector, photograph, photographs):
    processor = InterBERTProcessor.from_pretrained(checkpoint)
    assert processor.region_detector == {"name_or_path": str(detector)}
    with torch.inference_mode():
        inputs = FasterRCNNImageProcessor.from_pretrained(detector)(photograph)
        (regions,) = FasterRCNNForRegionFeatures.from_pretrained(detector)(**inputs).regions
    found = processor(text=QUESTION, images=photograph, return_tensors="pt")
    expected = processor(text=QUESTION, regions=regions, return_tensors="pt")
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=2e-3, rtol=1e-3)
    # What is found in a picture does not depend on the others.
    other = Image.new("RGB", (30, 64))
    both = processor.detect_regions([photographs / "beach.png", other])
    (alone,) = processor.detect_regions(photograph)
    np.testing.assert_array_equal(both[0]["boxes"], alone["boxes"])
    assert (both[1]["width"], both[1]["height"]) == (30, 64)


def test_every_kind_of_picture(checkpoint, expected, photograph, photographs):
    run = pipeline(VQA, model=str(checkpoint), trust_remote_code=True, device="cpu")
    png = (photographs / "beach.png").read_bytes()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(photographs))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for image in (
            photograph,
            str(photographs / "beach.png"),
            photographs / "beach.png",
            f"http://127.0.0.1:{server.server_port}/beach.png",
            base64.b64encode(png).decode(),
            f"data:image/png;base64,{base64.b64encode(png).decode()}",
            np.array(photograph),
            torch.from_numpy(np.array(photograph)).permute(2, 0, 1),
        ):
            check_answers(run(image=image, question=QUESTION), expected)
    finally:
        server.shutdown()
        server.server_close()
    check_answers(run([photograph, {"image": photograph}], question=QUESTION)[1], expected)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_image_ids_come_before_paths(checkpoint, photograph, photographs, monkeypatch):
    record = tiny_record_of(photograph, "beach.png")
    monkeypatch.chdir(photographs)
    run = pipeline(VQA, model=str(checkpoint), trust_remote_code=True, device="cpu", region_dataset=[record])
    assert run(image="beach.png", question=QUESTION) == run(image=record, question=QUESTION)
    check_not_equal = run(image=str(photographs / "beach.png"), question=QUESTION)
    assert check_not_equal != run(image=record, question=QUESTION)


def tiny_record_of(photograph, image_id):
    rng = np.random.default_rng(1)
    boxes = np.array([[0, 0, 20, 20]], np.float32)
    features = rng.normal(size=(1, FEATURE_SIZE)).astype(np.float32)
    return {"image_id": image_id, "features": features, "boxes": boxes, "width": 60, "height": 50}


def load_handler():
    spec = importlib.util.spec_from_file_location("handler", REPOSITORY / "examples" / "endpoint" / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler


def test_handler_takes_pictures_but_no_files_of_the_server(checkpoint, expected, photographs):
    handler = load_handler()(str(checkpoint))
    path = photographs / "beach.png"
    picture = base64.b64encode(path.read_bytes()).decode()
    for image in (picture, f"data:image/png;base64,{picture}"):
        check_answers(handler({"inputs": {"image": image, "question": QUESTION}}), expected)
        check_answers(handler({"inputs": [image], "parameters": {"question": QUESTION}})[0], expected)
    # Whether the server has a file does not show, either.
    for image in (str(path), "/nowhere.png"):
        for inputs in (image, {"image": image}, [image], [{"image": image}]):
            with pytest.raises(ValueError, match="`image`: expected regions, a picture, .* got 'data:image/;base64,"):
                handler({"inputs": inputs, "parameters": {"question": QUESTION}})


def test_handler_of_a_text_classifier(tmp_path):
    task_model(InterBERTForSequenceClassification).save_pretrained(tmp_path)
    processor = tiny_processor()
    processor.tokenizer.model_max_length = 12
    processor.save_pretrained(tmp_path)
    handler = load_handler()(str(tmp_path))
    whole, cut = handler({"inputs": "the dog " * 300}), handler({"inputs": "the dog " * 5})
    assert whole == [cut[0] | {"score": pytest.approx(cut[0]["score"], abs=1e-6)}]
    with pytest.raises(ValueError, match="Expected `parameters` with names, got list"):
        handler({"inputs": "the dog", "parameters": ["text"]})


def test_handler_refuses_pictures_that_would_fill_the_memory(checkpoint):
    handler = load_handler()(str(checkpoint))
    file = io.BytesIO()
    Image.new("1", (8000, 8000)).save(file, "PNG")
    assert len(file.getvalue()) < 20_000
    with pytest.raises(ValueError, match="`image`: expected regions, a picture"):
        handler({"inputs": {"image": base64.b64encode(file.getvalue()).decode(), "question": QUESTION}})


@pytest.mark.parametrize(
    "images, message",
    [
        ("nowhere.png", r"images\[0\]: expected a picture, its path, URL or base64, got 'nowhere.png'"),
        ("notes.txt", r"images\[0\]: expected a picture"),
        ([Image.new("RGB", (9, 9)), 3], r"images\[1\]: expected a picture, .* got int"),
        (np.zeros((5, 5)), r"images\[0\]: expected a picture, .* got ndarray"),
        ([], "expected at least one picture, got none"),
        ("A" * 5000, r"images\[0\]: expected a picture.{50,130}$"),
        ("http://127.0.0.1:9/a.png", r"images\[0\]: expected a picture, .* got 'http://127.0.0.1:9/a.png'"),
        ("http://", r"images\[0\]: expected a picture"),
    ],
)
def test_what_is_no_picture(images, message, checkpoint, photographs, monkeypatch):
    monkeypatch.chdir(photographs)
    processor = InterBERTProcessor.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=message):
        processor(images=images)


def test_detectors_that_do_not_fit(checkpoint, detector, photograph, tmp_path):
    with pytest.raises(ValueError, match="names no detector .* expected `regions`, or `region_detector`"):
        tiny_processor()(images=photograph)
    with pytest.raises(ValueError, match="features of 6 numbers, got a detector of 32, "):
        tiny_processor(region_detector=str(detector))(images=photograph)
    with pytest.raises(ValueError, match="or a dict with a `name_or_path`, got {'revision': 'main'}"):
        tiny_processor(region_detector={"revision": "main"})
    with pytest.raises(ValueError, match="limits min_regions, max_regions, min_score, got best"):
        tiny_processor(FEATURE_SIZE, region_detector={"name_or_path": str(detector), "best": 3})(images=photograph)
    with pytest.raises(OSError, match="nowhere"):
        tiny_processor(FEATURE_SIZE, region_detector="./nowhere")(images=photograph)
    processor = InterBERTProcessor.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="`regions` or `images`, got both"):
        processor(images=photograph, regions=tiny_record_of(photograph, "a"))
    with pytest.raises(Exception, match="`region_detector` must have a `name_or_path`"):
        InterBERTConfig(region_detector={"revision": "main"})


def test_limits_are_those_of_the_training(detector, photograph):
    counts = []
    for limits in ({"max_regions": 1}, {"min_regions": 3, "max_regions": 3}):
        processor = tiny_processor(FEATURE_SIZE, region_detector={"name_or_path": str(detector), **limits})
        counts.append(processor(images=photograph)["region_features"].shape[1])
    assert counts == [1, 3]
    with pytest.raises(ValueError, match="Expected 0 <= `min_regions` <= `max_regions`, got 4 and 3"):
        processor.region_detector = {"name_or_path": str(detector), "min_regions": 4, "max_regions": 3}
        processor(images=photograph)


def test_a_detector_is_loaded_once_whatever_its_limits(detector, photograph, monkeypatch):
    load, calls = FasterRCNNForRegionFeatures.from_pretrained, []
    monkeypatch.setattr(
        FasterRCNNForRegionFeatures,
        "from_pretrained",
        lambda *args, **kwargs: calls.append(args) or load(*args, **kwargs),
    )
    _load_region_extractor.cache_clear()
    processors = [
        tiny_processor(FEATURE_SIZE, region_detector={"name_or_path": str(detector), "max_regions": count})
        for count in (1, 2)
    ]
    for processor in processors * 2:
        processor.detect_regions(photograph)
    assert len(calls) == 1


def test_pipelines_follow_the_configuration_of_the_model(detector, photograph, tmp_path):
    """Where only the configuration names the detector: it was set by hand, say."""
    model = task_model(InterBERTForImageRetrieval, region_feature_size=FEATURE_SIZE, region_detector=str(detector))
    model.save_pretrained(tmp_path)
    tiny_processor(FEATURE_SIZE).save_pretrained(tmp_path)
    own_processor = tiny_processor(FEATURE_SIZE)
    run = pipeline(
        "zero-shot-image-classification",
        model=str(tmp_path),
        processor=own_processor,
        trust_remote_code=True,
        device="cpu",
    )
    assert own_processor.region_detector is None
    found = {item["label"]: item["score"] for item in run(photograph, ["a red dog", "a cat"])}
    with torch.inference_mode():
        inputs = tiny_processor(FEATURE_SIZE, region_detector=str(detector))(
            text="a cat", images=photograph, return_tensors="pt"
        )
        assert found["a cat"] == pytest.approx(model(**inputs).match_scores.item(), abs=1e-6)


# Runs where the packages cannot be imported, against a Hub-compatible server.
CLIENT = (
    WITHOUT_PACKAGES
    + """
import json
from transformers import pipeline

answerer = pipeline("visual-question-answering", model="org/answers", trust_remote_code=True, device="cpu")
answers = answerer(image=sys.argv[1], question=sys.argv[2])
loaded = [name for name in sys.modules if name.startswith("transformers_modules.org")]
print(json.dumps([answers, loaded]))
"""
)


@needs_hub
def test_three_lines_from_the_hub_without_the_packages(detector, checkpoint, expected, photographs, tmp_path):
    """The detector is that of the revision that the configuration names; code of its repository is not run."""
    push = f"""
import json, sys
from huggingface_hub import HfApi
from modeling_interbert import InterBERTForVQA
from processing import FasterRCNNForRegionFeatures, FasterRCNNImageProcessor, InterBERTProcessor
for part in (FasterRCNNForRegionFeatures, FasterRCNNImageProcessor):
    part.from_pretrained({str(detector)!r}).push_to_hub("org/detector")
revision = HfApi().model_info("org/detector").sha
config = FasterRCNNForRegionFeatures.from_pretrained({str(detector)!r}).config
config.max_regions = config.min_regions = 1
config.push_to_hub("org/detector")  # who takes the newest one gets other regions
settings = {{"name_or_path": "org/detector", "revision": revision}}
model = InterBERTForVQA.from_pretrained({str(checkpoint)!r}, region_detector=settings)
model.push_to_hub("org/answers")
InterBERTProcessor.from_pretrained({str(checkpoint)!r}, region_detector=settings).push_to_hub("org/answers")
"""
    with start_hub(tmp_path / "hub") as hub:
        subprocess.run([sys.executable, "-c", push], check=True, cwd=REPOSITORY, env=hub.env(home=tmp_path / "pusher"))
        environment = hub.env(home=tmp_path / "client")
        client = subprocess.run(
            [sys.executable, "-c", CLIENT, str(photographs / "beach.png"), QUESTION],
            cwd=tmp_path,
            env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
        )
    assert client.returncode == 0, client.stderr[-4000:]
    answers, loaded = json.loads(client.stdout.splitlines()[-1])
    check_answers(answers, expected)
    assert any("answers" in name for name in loaded) and not any("detector." in name for name in loaded)


# ---------------------------------------------------------------- what training makes of it


def run_script(name: str, *arguments):
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as context:
        context.setenv("ACCELERATE_USE_CPU", "true")
        context.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module.main()


def test_a_model_trained_on_regions_takes_photographs(detector, tmp_path, capsys):
    write_scenes(tmp_path / "scenes", num_train=8, num_validation=4, num_test=4)
    limits = ["--min_regions", 2, "--max_regions", 4, "--min_score", 0.2]
    for split in ("train", "validation"):
        options = ["--split", split, "--columns", "captions", "--thumbnails", 32, "--device", "cpu"]
        run_script(
            "extract_regions", tmp_path / "scenes", tmp_path / "found", "--detector", detector, *options, *limits
        )
    # A folder of this machine is no name of a detector elsewhere; what else is known of it goes along.
    known = {"min_regions": 2, "max_regions": 4, "min_score": 0.2}
    assert read_region_detector(str(tmp_path / "found"), "train[:50%]+validation") == known
    regions = load_region_dataset(tmp_path / "found", "train")
    assert regions.region_detector == known
    scenes = load_region_dataset(tmp_path / "scenes", "train")
    assert regions.image_ids == scenes.image_ids and regions.captions(3) == scenes.captions(3)

    # It goes on with the scripts that make one dataset of another.
    run_script("convert_regions", tmp_path / "found", tmp_path / "fewer", "--source_split", "train", "--max_regions", 1)
    assert read_region_detector(str(tmp_path / "fewer"), "train") == known | {"min_regions": 1, "max_regions": 1}

    training = ["--dataset_name", tmp_path / "found", "--tokenizer_name", tmp_path / "scenes" / "tokenizer"]
    training += ["--objectives", "mlm,mom,itm", "--max_train_steps", 1, "--retrieval_eval_size", 0]
    training += ["--config_overrides", "hidden_size=16,num_attention_heads=2,vision_num_attention_heads=2,"]
    training[-1] += "num_hidden_layers=1,num_text_layers=1,num_vision_layers=1,intermediate_size=16"
    training[-1] += ",vision_intermediate_size=16"
    run_script("run_pretrain", *training, "--output_dir", tmp_path / "unnamed")
    assert InterBERTConfig.from_pretrained(tmp_path / "unnamed").region_detector is None
    run_script("run_pretrain", *training, "--output_dir", tmp_path / "named", "--region_detector", detector)
    settings = known | {"name_or_path": str(detector)}
    assert InterBERTConfig.from_pretrained(tmp_path / "named").region_detector == settings
    assert InterBERTProcessor.from_pretrained(tmp_path / "named").region_detector == settings

    processor = InterBERTProcessor.from_pretrained(tmp_path / "named")
    for row in range(8):
        (found,) = processor.detect_regions(scenes.dataset[row]["image"])
        assert found.keys() | {"image_id"} == regions[row].keys() | {"attribute_ids", "attribute_scores"}
        np.testing.assert_allclose(found["boxes"], regions[row]["boxes"], atol=1e-3)
        np.testing.assert_allclose(found["features"], regions[row]["features"], rtol=2e-3, atol=1e-2)

    # Others could not open it.
    with pytest.raises(ValueError, match="`--push_to_hub`: expected a `--region_detector` that is on the Hub"):
        run_script(
            "run_pretrain",
            *training,
            "--output_dir",
            tmp_path / "pushed",
            "--region_detector",
            detector,
            "--push_to_hub",
        )


def test_limits_are_tightened():
    found = {"name_or_path": "org/d", "min_regions": 10, "max_regions": 36, "min_score": 0.2}
    assert Converter(None).tighten(found) == found
    assert Converter(None, max_regions=50, min_confidence=0.1).tighten(found) == found | {"min_regions": 1}
    fewer = {"min_regions": 5, "max_regions": 5}
    assert Converter(None, max_regions=5).tighten(found) == found | fewer
    assert Converter(None, min_confidence=0.5).tighten(found) == found | {"min_regions": 1, "min_score": 0.5}
    windows = {"name_or_path": "windows", "backbone": "org/b", "grids": [2]}
    assert Converter(None, max_regions=5).tighten(windows) == windows


@pytest.mark.parametrize(
    "argument, of_dataset, of_checkpoint, expected",
    [
        (None, None, None, None),
        (None, {"max_regions": 9}, None, None),
        (None, {"name_or_path": "d", "max_regions": 9}, "c", {"name_or_path": "d", "max_regions": 9}),
        (None, None, "c", {"name_or_path": "c"}),
        # From pretraining to a task with more regions, by a copy of the detector.
        (
            None,
            {"max_regions": 100},
            {"name_or_path": "c", "revision": "r", "max_regions": 36},
            {"name_or_path": "c", "revision": "r", "max_regions": 100},
        ),
        ("a", {"name_or_path": "windows", "grids": [2], "backbone": "b"}, "c", {"name_or_path": "a"}),
        # The dataset's own, by its name.
        (
            "windows",
            {"name_or_path": "windows", "grids": [2], "backbone": "b", "backbone_revision": "r"},
            "c",
            {"name_or_path": "windows", "grids": [2], "backbone": "b", "backbone_revision": "r"},
        ),
        ("a", {"backbone": "b", "max_regions": 9}, None, {"name_or_path": "a", "backbone": "b", "max_regions": 9}),
    ],
)
def test_the_first_detector_that_is_named(argument, of_dataset, of_checkpoint, expected):
    args = ModelArguments(model_name_or_path="m", region_detector=argument)
    assert find_region_detector(args, [Mock(region_detector=of_dataset)], of_checkpoint) == expected
