"""Recall of generated scenes for topics: against the plain model, through kills, in two processes."""

import base64
import csv
import functools
import html
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from model_fixtures import perturb
from PIL import Image
from transformers import AutoTokenizer

import files
import recall
from configuration_interbert import InterBERTConfig
from generate_scenes import write_scenes
from modeling_interbert import InterBERTForImageRetrieval, InterBERTForVQA, InterBERTRetriever, retriever
from processing import InterBERTProcessor, load_region_dataset
from processing.tasks.files import read_records

NUM_IMAGES = 30
TOPICS = ["a large red circle", "two stars", "there is a ring in the picture"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=4, num_validation=NUM_IMAGES, num_test=4)
    return folder


def save_model(model_class, scenes: Path, folder: Path) -> Path:
    """A random model whose match scores spread on both sides of 0.6."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(scenes / "tokenizer")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vision_intermediate_size", "pooler_size"), 32)
    layers = {"num_hidden_layers": 2, "num_text_layers": 1, "num_vision_layers": 1}
    heads = {"num_attention_heads": 2, "vision_num_attention_heads": 2}
    config = InterBERTConfig(vocab_size=len(tokenizer), region_feature_size=208, **sizes, **layers, **heads)
    perturb(model_class(config)).save_pretrained(folder)
    InterBERTProcessor(tokenizer, region_feature_size=208).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(scenes, tmp_path_factory) -> Path:
    folder = save_model(InterBERTForImageRetrieval, scenes, tmp_path_factory.mktemp("models") / "retrieval")
    model = InterBERTForImageRetrieval.from_pretrained(folder)
    log_odds = torch.tensor(list(plain_scores(model, folder, scenes).values())).double().logit()
    with torch.no_grad():
        model.itm_head.classifier.bias[0] -= log_odds.median().item()
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_scores(model, folder: Path, scenes: Path) -> dict[tuple[str, str], float]:
    """Match scores by topic and image id, one pair at a time."""
    processor = InterBERTProcessor.from_pretrained(folder)
    return {
        (topic, record["image_id"]): model(
            **processor(text=topic, regions=record, return_tensors="pt")
        ).match_scores.item()
        for record in load_region_dataset(scenes, "validation")
        for topic in TOPICS
    }


def run(*arguments: str | Path):
    with pytest.MonkeyPatch.context() as context:
        context.setenv("ACCELERATE_USE_CPU", "true")
        context.setattr(sys, "argv", ["recall.py", *map(str, arguments)])
        recall.main()


@pytest.fixture
def command(scenes, model_dir) -> list[str | Path]:
    return ["--model_name_or_path", model_dir, "--dataset_name", scenes, "--split", "validation", "--topic", *TOPICS]


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [dict(record) for record in read_records(path)]
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with open(path, encoding="utf-8", newline="") as file:
        types = {"topic": str, "rank": int, "image_id": str, "score": float}
        return [{name: types[name](value) for name, value in row.items()} for row in csv.DictReader(file)]


def scores_of(path: Path) -> dict[tuple[str, str], float]:
    return {(row["topic"], row["image_id"]): row["score"] for row in read_rows(path)}


def test_script_class_and_plain_model_agree(command, scenes, model_dir, tmp_path, capsys):
    run(*command, "--output_file", tmp_path / "a.jsonl", "--batch_size", "7")
    rows = read_rows(tmp_path / "a.jsonl")
    model = InterBERTForImageRetrieval.from_pretrained(model_dir)
    expected = {pair: score for pair, score in plain_scores(model, model_dir, scenes).items() if score > 0.6}
    assert 0 < len(expected) < len(TOPICS) * NUM_IMAGES
    assert scores_of(tmp_path / "a.jsonl") == pytest.approx(expected, abs=1e-4)
    for topic in TOPICS:
        own = [row for row in rows if row["topic"] == topic]
        assert [row["rank"] for row in own] == list(range(1, len(own) + 1))
        assert [row["score"] for row in own] == sorted((row["score"] for row in own), reverse=True)
    output = capsys.readouterr().out
    assert f"{NUM_IMAGES} images in the index" in output and f"{NUM_IMAGES} new" in output and "1 process(es)" in output

    own = InterBERTRetriever.load(tmp_path / "a.index", model, InterBERTProcessor.from_pretrained(model_dir))
    for topic, matches in zip(TOPICS, own.recall(TOPICS), strict=True):
        found = {row["image_id"]: row["score"] for row in rows if row["topic"] == topic}
        assert dict(matches) == pytest.approx(found, abs=1e-4)


def test_long_topics_and_the_names_of_the_arguments(scenes, model_dir, tmp_path):
    """Topics are cut where the processor of the checkpoint cuts them, not at a number of the script's."""
    topic = " ".join(["a large red circle beside a small blue star"] * 5)
    command = ["--model", model_dir, "--images", scenes, "--topic", topic, "--threshold", "0"]
    run(*command, "--output_file", tmp_path / "a.jsonl")
    run(*command, "--output_file", tmp_path / "b.jsonl", "--max_seq_length", "36")
    model, processor = (
        InterBERTForImageRetrieval.from_pretrained(model_dir),
        InterBERTProcessor.from_pretrained(model_dir),
    )
    scores = {pair: score for pair, score in scores_of(tmp_path / "a.jsonl").items()}
    with torch.no_grad():
        expected = {
            (topic, record["image_id"]): model(
                **processor(text=topic, regions=record, return_tensors="pt")
            ).match_scores.item()
            for record in load_region_dataset(scenes, "validation")
        }
    assert scores == pytest.approx(expected, abs=1e-4)
    assert scores_of(tmp_path / "b.jsonl") != pytest.approx(expected, abs=1e-4)


def test_an_index_of_other_images_is_left_alone(command, scenes, tmp_path):
    options = ("--index_dir", tmp_path / "index", "--output_file", tmp_path / "a.jsonl")
    run(*command, *options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    command[command.index("--split") + 1] = "train"
    with pytest.raises(ValueError, match=f"index of {NUM_IMAGES} images, of which .* `--split` train has none: give"):
        run(*command, *options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()} == before


def test_every_format_has_the_same_rows(command, tmp_path):
    options = ("--index_dir", tmp_path / "index", "--threshold", "0.3", "--top_k", "5")
    for extension in recall.WRITERS:
        run(*command, *options, "--output_file", tmp_path / f"new/rows{extension}")
    rows = [read_rows(tmp_path / f"new/rows{extension}") for extension in recall.WRITERS]
    assert rows[0] == rows[1] == rows[2]
    assert [row["topic"] for row in rows[0]] == [topic for topic in TOPICS for _ in range(5)]
    assert list(rows[0][0]) == ["topic", "rank", "image_id", "score"]


def test_nothing_recalled_is_an_empty_table(command, tmp_path):
    for extension in recall.WRITERS:
        run(*command, "--threshold", "1", "--index_dir", tmp_path / "i", "--output_file", tmp_path / f"a{extension}")
        assert read_rows(tmp_path / f"a{extension}") == []


def test_topics_of_a_file(command, tmp_path):
    (tmp_path / "topics.txt").write_text("红色\u2028<圆形>\r\n a ring \n\na ring\n", encoding="utf-8-sig")
    command = [*command[: command.index("--topic")], "--topics", tmp_path / "topics.txt", "--threshold", "0"]
    run(*command, "--output_file", tmp_path / "a.jsonl")
    rows = read_rows(tmp_path / "a.jsonl")
    assert [row["topic"] for row in rows] == ["红色\u2028<圆形>"] * NUM_IMAGES + ["a ring"] * NUM_IMAGES


def test_contact_sheet(command, scenes, tmp_path, capsys):
    nasty = "<script>alert('a ring & \"more\"')</script>"
    command = [*command[: command.index("--topic")], "--topic", nasty, "--threshold", "0"]
    run(*command, "--output_file", tmp_path / "a.jsonl", "--html", tmp_path / "a.html", "--html_top_k", "7")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script>" not in page and nasty in html.unescape(page)
    thumbnails = re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="([^"]+)"', page)
    rows = read_rows(tmp_path / "a.jsonl")
    assert [image_id for _, image_id in thumbnails] == [row["image_id"] for row in rows[:7]]
    assert f"{rows[6]['score']:.4f}" in page and f"{NUM_IMAGES} images" in page
    regions = load_region_dataset(scenes, "validation")
    original = regions.dataset[list(regions.dataset["image_id"]).index(rows[0]["image_id"])]["image"].convert("RGB")
    thumbnail = Image.open(io.BytesIO(base64.b64decode(thumbnails[0][0]))).resize(original.size)
    assert np.abs(np.asarray(thumbnail, float) - np.asarray(original, float)).mean() < 10
    assert "images without a picture: 0" in capsys.readouterr().out

    # Of a folder, where one picture is missing and one is none.
    (tmp_path / "pictures").mkdir()
    for row in rows[1:7]:
        Image.new("L", (900, 300)).save(tmp_path / "pictures" / f"{row['image_id']}.png")
    (tmp_path / "pictures" / f"{rows[3]['image_id']}.png").write_text("no picture")
    options = ("--html", tmp_path / "b.html", "--html_top_k", "7", "--image_dir", tmp_path / "pictures")
    run(*command, "--output_file", tmp_path / "a.jsonl", *options)
    page = (tmp_path / "b.html").read_text(encoding="utf-8")
    thumbnails = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(thumbnails) == 5 and page.count("no picture") == 2
    assert Image.open(io.BytesIO(base64.b64decode(thumbnails[0]))).size == (160, 53)
    assert "images without a picture: 2" in capsys.readouterr().out


class Killed(BaseException):
    pass


def test_a_killed_index_goes_on_and_ends_with_the_same_output(command, tmp_path, monkeypatch, capsys):
    # The index of the script is of shards of 256 images: smaller ones, for more than one of them.
    monkeypatch.setattr(recall, "InterBERTRetriever", functools.partial(InterBERTRetriever, images_per_shard=8))
    run(*command, "--output_file", tmp_path / "whole.jsonl")
    embed_regions = count_embedded(monkeypatch)
    write = retriever._write
    for number, num_shards in enumerate((0, 0, 0, 1, 1, 2, 2), start=1):
        calls = []

        def write_or_die(path, data, number=number, calls=calls):
            calls.append(path)
            if len(calls) == number:
                path.parent.mkdir(exist_ok=True)
                path.with_name(f"{path.name}.unfinished").write_bytes(data[:100])
                raise Killed
            write(path, data)

        output_file = tmp_path / f"killed-{number}.jsonl"
        with monkeypatch.context() as context:
            context.setattr(retriever, "_write", write_or_die)
            with pytest.raises(Killed):
                run(*command, "--output_file", output_file)
        assert not output_file.exists()
        embed_regions.clear()
        run(*command, "--output_file", output_file)
        assert scores_of(output_file) == pytest.approx(scores_of(tmp_path / "whole.jsonl"), abs=1e-5)
        # The first manifest, then a shard and a manifest in turn: what counted is not embedded again.
        assert sum(embed_regions) == NUM_IMAGES - 8 * num_shards


def count_embedded(monkeypatch) -> list[int]:
    """A list that the number of images is added to whenever some are embedded."""
    counts, embed = [], InterBERTRetriever._embed

    def embed_and_count(self, records, digests):
        counts.append(len(records))
        return embed(self, records, digests)

    monkeypatch.setattr(InterBERTRetriever, "_embed", embed_and_count)
    return counts


def test_the_index_follows_the_dataset(command, tmp_path, monkeypatch, capsys):
    counts = count_embedded(monkeypatch)
    options = ("--index_dir", tmp_path / "index", "--output_file", tmp_path / "a.csv", "--threshold", "0")
    command = [str(word) for word in command]
    for split, expected in (
        ("validation[:20]", "20 images in the index after .*: 20 new, 0 with other regions, 0 as before; 0 removed"),
        ("validation[:20]", "20 images in the index after .*: 0 new, 0 with other regions, 20 as before; 0 removed"),
        ("validation[5:]", "25 images in the index after .*: 10 new, 0 with other regions, 15 as before; 5 removed"),
    ):
        command[command.index("--split") + 1] = split
        run(*command, *options)
        assert re.search(expected, capsys.readouterr().out)
    assert counts == [20, 10]
    run(*command, "--output_file", tmp_path / "b.csv", "--threshold", "0")
    assert scores_of(tmp_path / "a.csv") == pytest.approx(scores_of(tmp_path / "b.csv"), abs=1e-5)


def test_a_kill_while_the_output_is_written_leaves_no_half_of_it(command, tmp_path, monkeypatch):
    def replace_or_die(self, target):
        if Path(target).suffix in recall.WRITERS:
            raise Killed
        return replace(self, target)

    replace = Path.replace
    for extension in recall.WRITERS:
        output_file = tmp_path / f"a{extension}"
        with monkeypatch.context() as context:
            context.setattr(files.Path, "replace", replace_or_die)
            with pytest.raises(Killed):
                run(*command, "--index_dir", tmp_path / "index", "--output_file", output_file)
        assert not output_file.exists()


def test_two_processes_recall_like_one(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "launch.py").write_text(
        "import functools, sys\n"
        f"sys.path.insert(0, {str(Path(recall.__file__).parent)!r})\n"
        "import recall\n"
        "recall.InterBERTRetriever = functools.partial(recall.InterBERTRetriever, images_per_shard=4)\n"
        "recall.main()\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", str(tmp_path / "launch.py"), *map(str, command), "--top_k", "20"]
    launch += ["--index_dir", str(tmp_path / "two"), "--output_file", str(tmp_path / "two.jsonl")]
    environment = dict(os.environ) | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "2 process(es)." in result.stdout and f"{NUM_IMAGES} new" in result.stdout
    # One process, with an index of its own and with that of two.
    monkeypatch.setattr(recall, "InterBERTRetriever", functools.partial(InterBERTRetriever, images_per_shard=4))
    run(*command, "--top_k", "20", "--index_dir", tmp_path / "one", "--output_file", tmp_path / "one.jsonl")
    run(*command, "--top_k", "20", "--index_dir", tmp_path / "two", "--output_file", tmp_path / "again.jsonl")
    assert f"{NUM_IMAGES} as before" in capsys.readouterr().out
    expected = scores_of(tmp_path / "one.jsonl")
    assert scores_of(tmp_path / "two.jsonl") == pytest.approx(expected, abs=1e-5)
    assert scores_of(tmp_path / "again.jsonl") == pytest.approx(expected, abs=1e-5)
    for folder in ("one", "two"):
        assert len(list((tmp_path / folder).glob("shard-*"))) == 8


def test_an_index_of_another_model_and_a_damaged_one_are_refused(command, model_dir, scenes, tmp_path):
    options = ("--index_dir", tmp_path / "index", "--output_file", tmp_path / "a.jsonl")
    run(*command, *options)
    model = InterBERTForImageRetrieval.from_pretrained(model_dir)
    perturb(model).save_pretrained(tmp_path / "other")
    InterBERTProcessor.from_pretrained(model_dir).save_pretrained(tmp_path / "other")
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds an index of another model"):
        run("--model_name_or_path", tmp_path / "other", *command[2:], *options)
    (shard,) = (tmp_path / "index").glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is missing or damaged"):
        run(*command, *options)
    assert (tmp_path / "a.jsonl").read_bytes() == before


def write_changed(scenes: Path, folder: Path, change) -> Path:
    """The validation scenes, their rows changed."""
    dataset = load_region_dataset(scenes, "validation").dataset
    (folder / "data").mkdir(parents=True)
    rows = change(dataset.data.table.to_pylist())
    table = type(dataset.data.table).from_pylist(rows, schema=dataset.data.table.schema)
    pq.write_table(table.replace_schema_metadata(None).drop_columns("image"), folder / "data" / "validation-0.parquet")
    return folder


def test_images_without_regions_are_counted_and_ids_come_once(command, scenes, tmp_path, capsys):
    def empty_two(rows):
        for row in rows[3:5]:
            row.update({name: [] for name, value in row.items() if name in ("boxes", "features", "class_ids")})
            row.update({name: [] for name in ("class_scores", "class_probs") if name in row})
        return rows

    command[3] = write_changed(scenes, tmp_path / "empty", empty_two)
    run(*command, "--output_file", tmp_path / "a.jsonl", "--threshold", "0")
    assert "left out for lack of regions: 2;" in " ".join(capsys.readouterr().out.split())
    assert len(read_rows(tmp_path / "a.jsonl")) == len(TOPICS) * (NUM_IMAGES - 2)
    with pytest.raises(ValueError, match="`--html` needs pictures: expected a column `image` or `--image_dir`"):
        run(*command, "--output_file", tmp_path / "a.jsonl", "--html", tmp_path / "a.html")

    command[3] = write_changed(scenes, tmp_path / "twice", lambda rows: [*rows, rows[7]])
    with pytest.raises(ValueError, match="every `image_id` once, got 1 that come more often: validation-000007"):
        run(*command, "--output_file", tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()


def test_a_head_that_was_not_trained_is_refused(command, scenes, tmp_path):
    command[1] = save_model(InterBERTForVQA, scenes, tmp_path / "vqa")
    with pytest.raises(ValueError, match="must have all weights of InterBERTForImageRetrieval, got .*without itm_head"):
        run(*command, "--output_file", tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Give topics by either `--topic` or `--topics`."),
        (["--topic", "a", "--topics", "b"], "Give topics by either `--topic` or `--topics`."),
        (["--topic", "a", "--threshold", "1.5"], "`--threshold` must be within [0, 1], got 1.5."),
        (["--topic", "a", "--threshold", "nan"], "`--threshold` must be within [0, 1], got nan."),
        (["--topic", "a", "--top_k", "0"], "`--top_k` must be at least 1, got 0."),
        (["--topic", "a", "--output_file", "a.txt"], "`--output_file` must end in .jsonl, .csv, .parquet, got a.txt."),
        (["--topic", "a", "--image_dir", "."], "`--image_dir` is for the contact sheet, `--html`."),
        (["--topic", "a", "--html", "a.html", "--image_dir", "none"], "`--image_dir` must be a folder of pictures"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run("--model_name_or_path", "m", "--dataset_name", "d", *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("\n \n", "expected at least one topic, got none"),
        ("", "expected at least one topic, got none"),
        (None, "expected a text file"),
        (b"\xff\xfe\xff", "topics.txt: expected text in UTF-8"),
    ],
)
def test_bad_topics(tmp_path, text, message):
    if text is not None:
        (tmp_path / "topics.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        run("--model_name_or_path", "m", "--dataset_name", "d", "--topics", tmp_path / "topics.txt")
    with pytest.raises(ValueError, match="`--topic`: expected topics that are not empty, number 1 is"):
        run("--model_name_or_path", "m", "--dataset_name", "d", "--topic", " ", "a")
