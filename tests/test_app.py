"""The demo: what it shows, and the page in a real browser (Debian's Chromium), which skips where there is none."""

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hub_server import needs_hub, start_hub
from huggingface_hub import SpaceCard
from model_fixtures import perturb, save_tiny_detector
from PIL import Image, UnidentifiedImageError
from transformers import AutoTokenizer

import app
from app import Demo, DemoArguments
from configuration_interbert import InterBERTConfig
from generate_scenes import REGION_FEATURE_SIZE, write_scenes
from modeling_interbert import InterBERTForImageRetrieval, InterBERTForPreTraining, InterBERTForVQA
from processing import InterBERTProcessor, RegionDataset, load_region_dataset
from push_space import write_space

REPOSITORY = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ANSWERS = ["red", "blue", "circle", "star", "two", "yes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes, and tiny models with random weights."""
    folder = tmp_path_factory.mktemp("demo")
    write_scenes(folder / "scenes", num_train=2, num_validation=2, num_test=12)
    detector = save_tiny_detector(folder / "detector", REGION_FEATURE_SIZE)
    processor = InterBERTProcessor(
        AutoTokenizer.from_pretrained(folder / "scenes" / "tokenizer"),
        region_feature_size=REGION_FEATURE_SIZE,
    )
    torch.manual_seed(0)
    config = InterBERTConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_text_layers=1,
        num_vision_layers=1,
        num_attention_heads=2,
        vision_num_attention_heads=2,
        intermediate_size=32,
        vision_intermediate_size=32,
        max_position_embeddings=64,
        region_feature_size=REGION_FEATURE_SIZE,
        num_region_classes=48,
        pooler_size=16,
        id2label=dict(enumerate(ANSWERS)),
        label2id={answer: label for label, answer in enumerate(ANSWERS)},
    )
    for name, model_class in (
        ("model", InterBERTForPreTraining),
        ("vqa_model", InterBERTForVQA),
        ("retrieval_model", InterBERTForImageRetrieval),
    ):
        perturb(model_class(config)).save_pretrained(folder / name)
        max_regions = 1 if name == "vqa_model" else 5
        processor.region_detector = {"name_or_path": str(detector), "max_regions": max_regions}
        processor.save_pretrained(folder / name)
    return folder


def make_arguments(folder: Path, **values) -> DemoArguments:
    models = {"model_name_or_path": str(folder / "model"), "vqa_model_name_or_path": str(folder / "vqa_model")}
    return DemoArguments(**(models | {"dataset_name": str(folder / "scenes")} | values))


@pytest.fixture(scope="module")
def demo(folder) -> Demo:
    return Demo(make_arguments(folder))


@pytest.fixture
def image_id(demo) -> str:
    return demo.regions[3]["image_id"]


@torch.no_grad()
def run_model(folder, model_class, name, text, record):
    processor = InterBERTProcessor.from_pretrained(folder / name)
    inputs = processor(text=text, regions=record, return_tensors="pt")
    return inputs, model_class.from_pretrained(folder / name)(**inputs)


def test_search_gives_what_matches(demo, folder):
    scores = {}
    for record in (demo.regions[row] for row in range(12)):
        _, outputs = run_model(folder, InterBERTForPreTraining, "model", "a red circle", record)
        scores[record["image_id"]] = outputs.itm_logits.softmax(-1)[0, 0].item()
    threshold = float(np.median(list(scores.values())))
    found, count = demo.search("a red circle", threshold, max_images=4)
    assert count == sum(score > threshold for score in scores.values()) == 6
    assert [name for name, _ in found] == sorted(scores, key=scores.get, reverse=True)[:4]
    assert [score for _, score in found] == pytest.approx([scores[name] for name, _ in found], abs=1e-6)


def test_an_index_that_is_kept_follows_the_split(folder, tmp_path):
    options = {"index_dir": str(tmp_path / "index")}
    assert len(Demo(make_arguments(folder, split="test", **options)).retriever) == 12
    first = Demo(make_arguments(folder, split="test[:5]", **options))
    matches, count = first.search("a circle", 0.0, 12)
    assert count == 5 and all(image_id in first.rows for image_id, _ in matches)
    with pytest.raises(ValueError, match=r"index of 5 images, of which .* `--split` validation has none"):
        Demo(make_arguments(folder, split="validation", **options))


def test_answers_are_those_of_the_model(demo, folder, image_id):
    answers = demo.answer(image_id, "what colour is the circle")
    _, outputs = run_model(folder, InterBERTForVQA, "vqa_model", "what colour is the circle", demo.regions[3])
    expected = dict(zip(ANSWERS, outputs.logits[0].sigmoid().tolist(), strict=True))
    assert list(answers) == sorted(expected, key=expected.get, reverse=True)[:5]
    assert answers == pytest.approx({name: expected[name] for name in answers}, abs=1e-6)


def test_masked_words_are_filled(demo, folder, image_id):
    caption = "a [MASK] circle and a [MASK]"
    inputs, outputs = run_model(folder, InterBERTForPreTraining, "model", caption, demo.regions[3])
    positions = (inputs["input_ids"][0] == demo.processor.tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    rows = demo.fill(image_id, caption)
    assert [number for number, _, _ in rows] == [1] * 5 + [2] * 5
    for number, position in enumerate(positions):
        best = outputs.mlm_logits[0, position].softmax(-1).topk(5)
        words = demo.processor.tokenizer.convert_ids_to_tokens(best.indices.tolist())
        assert [word for _, word, _ in rows[5 * number : 5 * number + 5]] == words
        assert [value for _, _, value in rows[5 * number : 5 * number + 5]] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )


def test_words_look_at_regions(demo, image_id):
    caption = "a red circle and a star"
    words, word, figure = demo.draw_attention(image_id, caption, "star")
    assert words == ["a (1)", "red", "circle", "and", "a (2)", "star"] and word == "star"
    attention = demo.attention(image_id, caption)
    weights = attention["text_to_image"][attention["words"].index("star")]
    labels = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert f"{100 * weights[1:].max():.1f}" in labels
    assert demo.draw_attention(image_id, caption)[1] == "a (1)"


def save_noise(path: Path, size: tuple[int, int]) -> str:
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return str(path)


def test_pictures_of_visitors(demo, folder, tmp_path, monkeypatch):
    path = save_noise(tmp_path / "own.png", (300, 2000))
    image_id = demo.add_picture(path)
    assert demo.add_picture(path) == image_id
    black = []
    for size in ((20, 30), (30, 20)):
        Image.new("RGB", size).save(tmp_path / "black.png")
        black.append(demo.add_picture(str(tmp_path / "black.png")))
    assert black[0] != black[1]
    assert demo.picture(image_id).size == (154, 1024) and demo.caption(image_id) == ""
    # Found in the picture as it is, not in what is shown of it; and by each model as it has learned it.
    record = demo.regions_of(image_id)
    (expected,) = demo.processor.detect_regions(path)
    np.testing.assert_array_equal(record["boxes"], expected["boxes"])
    assert (record["width"], record["height"]) == (300, 2000) and len(record["boxes"]) > 1
    record = demo.regions_of(image_id, are_of_answerer=True)
    assert len(record["boxes"]) == 1
    _, outputs = run_model(folder, InterBERTForVQA, "vqa_model", "what colour is the circle", record)
    scores = dict(zip(ANSWERS, outputs.logits[0].sigmoid().tolist(), strict=True))
    answers = demo.answer(image_id, "what colour is the circle")
    assert answers == pytest.approx({name: scores[name] for name in answers}, abs=1e-6)
    assert demo.draw_attention(image_id, "a star")[0] == ["a", "star"]
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(ValueError, match="^notes.png is no picture that can be read.$"):
        demo.add_picture(str(tmp_path / "notes.png"))
    monkeypatch.setattr(app, "NUM_OWN_PICTURES", 2)
    others = [demo.add_picture(save_noise(tmp_path / f"{number}.png", (20, 20))) for number in range(2)]
    assert list(demo.own_pictures) == others
    with pytest.raises(ValueError, match=f"There is no image '{image_id}'."):
        demo.answer(image_id, "what")


def test_captions_and_pictures_of_images(demo, image_id, monkeypatch):
    assert demo.caption(image_id) == demo.regions.captions(3)[0]
    assert demo.picture(image_id).size == (128, 128)
    for error in (UnidentifiedImageError("damaged"), ValueError("missing")):
        monkeypatch.setattr(demo.pictures, "open", Mock(side_effect=error))
        assert demo.picture(image_id).getextrema() == ((211, 211),) * 3  # blank


@pytest.mark.parametrize(
    "method, arguments, message",
    [
        ("search", ("  ", 0.5, 3), "Write a text first."),
        ("search", (None, 0.5, 3), "Write a text first."),
        ("answer", ("ID", ""), "Write a question first."),
        ("answer", ("ID", "what " * 1000), "The question has 1,002 tokens, and the model reads 64 at most."),
        ("answer", ("nowhere", "what"), "There is no image 'nowhere'."),
        ("answer", (None, "what"), "Choose an image first."),
        ("draw_attention", ("ID", " "), "Write a caption first."),
        ("draw_attention", ("ID", "\u200b"), "Write a caption first."),  # nothing that the tokenizer knows of
        ("draw_attention", ("ID", "a circle", "star"), "Choose a word of the caption."),
        ("fill", ("ID", "a circle"), r"Put \[MASK\] in the place of a word of the caption."),
    ],
)
def test_bad_input_gets_a_message(demo, image_id, method, arguments, message):
    arguments = [image_id if argument == "ID" else argument for argument in arguments]
    with pytest.raises(ValueError, match=message):
        getattr(demo, method)(*arguments)


def test_an_image_without_regions_gets_a_message(demo, folder, monkeypatch):
    rows = demo.regions.dataset.to_list()
    for name in ("boxes", "features", "class_ids", "class_scores"):
        rows[0][name] = []
    bare = RegionDataset(type(demo.regions.dataset).from_list(rows, features=demo.regions.dataset.features))
    monkeypatch.setattr(app, "load_region_dataset", lambda *args, **kwargs: bare)
    demo = Demo(make_arguments(folder))
    assert len(demo.retriever) == 11
    app.build_page(demo)  # it is the first, and shown at the start
    for method, text in ((demo.answer, "what"), (demo.draw_attention, "a star"), (demo.fill, "a [MASK]")):
        with pytest.raises(ValueError, match="The detector found nothing in image test-000000"):
            method(rows[0]["image_id"], text)
    assert len(demo.search("a star", 0, 48)[0]) == 11


def test_models_of_other_features_are_refused(folder, tmp_path):
    processor = InterBERTProcessor.from_pretrained(folder / "vqa_model", region_feature_size=7)
    config = InterBERTConfig.from_pretrained(folder / "vqa_model", region_feature_size=7)
    InterBERTForVQA(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must read region features of 208 numbers, as the other model, got 7"):
        Demo(make_arguments(folder, vqa_model_name_or_path=str(tmp_path)))


def test_a_retrieval_model_fills_no_words(folder):
    demo = Demo(make_arguments(folder, model_name_or_path=str(folder / "retrieval_model"), vqa_model_name_or_path=None))
    assert not demo.fills_words and demo.answerer is None
    with pytest.raises(ValueError, match="must be a model with a match head"):
        Demo(make_arguments(folder, model_name_or_path=str(folder / "vqa_model")))


# ---------------------------------------------------------------- the page


def wait_for(address: tuple[str, int], process: subprocess.Popen, log: Path, seconds: float = 120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"The app ended with status {process.returncode}:\n{log.read_text()[-4000:]}")
        with socket.socket() as client:
            if client.connect_ex(address) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"Nothing answers at {address}.")


@pytest.fixture(scope="module")
def bare_scenes(folder) -> Path:
    """The scenes, the last of them without regions."""
    dataset = load_region_dataset(folder / "scenes", "test").dataset
    rows = dataset.to_list()
    for name in ("boxes", "features", "class_ids", "class_scores"):
        rows[-1][name] = []
    (folder / "bare").mkdir()
    type(dataset).from_list(rows, features=dataset.features).to_parquet(folder / "bare" / "test.parquet")
    return folder / "bare"


@pytest.fixture(scope="module")
def page_of(folder, bare_scenes):
    """Serves the app from a script, and opens it in a browser."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's package chromium")
    from playwright.sync_api import sync_playwright

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    arguments = make_arguments(folder, dataset_name=str(bare_scenes), port=port)
    command = [sys.executable, str(REPOSITORY / "examples" / "app.py")]
    command += [
        word for name, value in vars(arguments).items() if value is not None for word in (f"--{name}", str(value))
    ]
    log = folder / "app.log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(("127.0.0.1", port), process, log)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(60_000)
            page.goto(f"http://127.0.0.1:{port}")
            page.get_by_role("tab", name="Search").wait_for()
            yield page
            browser.close()
    finally:
        process.terminate()
        process.wait()


def open_tab(page, name: str):
    page.get_by_role("tab", name=name).click()


def press(page, name: str):
    page.get_by_role("button", name=name, exact=True).click()


@contextlib.contextmanager
def another_picture(page):
    """Waits until the page shows another picture than before; until then, answers may still be cleared."""
    before = page.evaluate("document.querySelector('img').src")
    yield
    page.wait_for_function("src => document.querySelector('img').src !== src", arg=before)


def check_message(page, message: str):
    """A message is shown, and goes away."""
    toast = page.get_by_text(message)
    toast.wait_for()
    page.get_by_test_id("toast-close").first.click()
    toast.wait_for(state="detached")


def test_page_in_a_browser(page_of, folder, bare_scenes, tmp_path, request):
    page, demo = page_of, Demo(make_arguments(folder, dataset_name=str(bare_scenes)))
    screenshots = Path(request.config.getoption("--basetemp") or tmp_path)

    page.get_by_label("Text").fill("a red circle")
    page.get_by_label("number input for Match score above").fill("0")
    press(page, "Search")
    page.get_by_text("11 of 11 images match with a score above 0").wait_for()
    pictures = page.locator(".grid-container button")
    assert pictures.count() == 11
    best = demo.search("a red circle", 0, 12)[0]
    assert best[1][0] in pictures.nth(1).inner_text()
    pictures.nth(1).click()  # chooses it
    page.wait_for_function("id => document.querySelector('[aria-label=Image]').value === id", arg=best[1][0])
    page.screenshot(path=screenshots / "search.png")

    open_tab(page, "Question")
    page.get_by_label("Question").last.fill("what colour is the circle")
    press(page, "Ask")
    expected = demo.answer(best[1][0], "what colour is the circle")
    answers = page.get_by_test_id("label-output-value")
    answers.wait_for()
    assert answers.inner_text().strip() == next(iter(expected))
    page.screenshot(path=screenshots / "question.png")

    # Bad input shows a message, and the page lives on.
    page.get_by_label("Question").last.fill("what " * 1000)
    press(page, "Ask")
    check_message(page, "The question has 1,002 tokens, and the model reads 64 at most.")
    page.get_by_label("Question").last.fill("")
    press(page, "Ask")
    check_message(page, "Write a question first.")
    assert answers.inner_text().strip() == next(iter(expected))

    open_tab(page, "Words and regions")
    press(page, "Read")
    words = demo.draw_attention(best[1][0], demo.caption(best[1][0]))[0]
    figure = page.get_by_test_id("matplotlib").locator("img")
    figure.wait_for()
    first_word = figure.get_attribute("src")
    page.get_by_role("radio", name=words[-1], exact=True).click()
    page.wait_for_function("src => document.querySelector('[data-testid=matplotlib] img').src !== src", arg=first_word)
    page.screenshot(path=screenshots / "attention.png")

    open_tab(page, "Masked words")
    page.get_by_label("Caption").last.fill("a [MASK] circle")
    press(page, "Fill")
    first = demo.fill(best[1][0], "a [MASK] circle")[0][1]
    page.get_by_text(first, exact=True).locator("visible=true").first.wait_for()
    page.screenshot(path=screenshots / "masked.png")

    # What was said of one image is not left beside another.
    open_tab(page, "Search")
    pictures.nth(2).click()
    page.wait_for_function("id => document.querySelector('[aria-label=Image]').value === id", arg=best[2][0])
    open_tab(page, "Question")
    answers.wait_for(state="detached")
    open_tab(page, "Words and regions")
    figure.wait_for(state="detached")
    assert page.get_by_label("Caption").first.input_value() == demo.caption(best[2][0])

    # An image that the detector found nothing in.
    image = page.get_by_label("Image", exact=True).first
    with another_picture(page):
        image.fill("test-000011")
        image.press("Enter")
    open_tab(page, "Question")
    page.get_by_label("Question").last.fill("what colour is the circle")
    press(page, "Ask")
    check_message(page, "The detector found nothing in image test-000011")
    with another_picture(page):
        image.fill(best[1][0])
        image.press("Enter")
    press(page, "Ask")
    answers.wait_for()
    assert answers.inner_text().strip() == next(iter(expected))

    # A picture of one's own.
    own_picture = save_noise(tmp_path / "own.png", (300, 200))
    image_id = demo.add_picture(own_picture)
    with another_picture(page):
        page.locator("input[type=file][accept='image/*']").set_input_files(own_picture)
    page.wait_for_function("id => document.querySelector('[aria-label=Image]').value === id", arg=image_id)
    answers.wait_for(state="detached")
    press(page, "Ask")
    answers.wait_for()
    assert answers.inner_text().strip() == next(iter(demo.answer(image_id, "what colour is the circle")))
    page.screenshot(path=screenshots / "own_picture.png")


# ---------------------------------------------------------------- the Space


def test_a_space_runs_by_itself(folder, tmp_path):
    write_space(tmp_path, str(folder / "model"), None, str(folder / "scenes"), "test[:5]")
    card = SpaceCard.load(tmp_path / "README.md")
    assert (card.data.sdk, card.data.app_file) == ("gradio", "app.py")
    assert (card.data.models, card.data.datasets) == ([str(folder / "model")], [str(folder / "scenes")])
    # Without the installed packages, whose code is that of the Space; and without serving the page.
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "interbert" not in getattr(finder, "__module__", "")]
import app, gradio, processing
gradio.Blocks.launch = lambda page, **kwargs: print("launched")
app.main()
print(processing.__file__)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-2:] == ["launched", str(tmp_path / "processing" / "__init__.py")]


@needs_hub
def test_a_space_is_pushed_and_written_anew(tmp_path):
    code = """
import sys
import push_space
from huggingface_hub import HfApi, hf_hub_download
for arguments in (["--vqa_model", "org/answers", "--private"], ["--split", "test"]):
    sys.argv = ["push_space.py", "org/demo", "--model", "org/model", "--dataset", "org/scenes", *arguments]
    push_space.main()
    path = hf_hub_download("org/demo", "space_settings.yaml", repo_type="space")
    print(open(path).read().replace("\\n", "; "))
print(sorted(HfApi().list_repo_files("org/demo", repo_type="space")))
"""
    with start_hub(tmp_path / "hub") as hub:
        environment = hub.env(home=tmp_path / "home") | {"PYTHONPATH": str(REPOSITORY / "examples")}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    settings = [line for line in result.stdout.splitlines() if line.startswith("dataset_name")]
    first = "dataset_name: org/scenes; model_name_or_path: org/model; split: validation; "
    assert settings == [
        f"{first}vqa_model_name_or_path: org/answers; ",
        "dataset_name: org/scenes; model_name_or_path: org/model; split: test; ",
    ]
    for name in ("app.py", "requirements.txt", "README.md", "processing/pipelines_interbert.py"):
        assert f"'{name}'" in result.stdout
