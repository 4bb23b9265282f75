"""Finetuning and evaluation of image retrieval on generated scenes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from killing import Killed, assert_same_weights, killed_at
from transformers import AutoTokenizer

import mine_hard_negatives
import retrieval_evaluation
import run_image_retrieval
from arguments import parse_arguments
from configuration_interbert import InterBERTConfig
from finetuning import TaskArguments
from generate_scenes import write_scenes
from modeling_interbert import InterBERTForImageRetrieval, InterBERTForVQA
from processing import InterBERTProcessor, load_region_dataset
from retrieval_evaluation import score_captions_against_images
from run_image_retrieval import ARGUMENT_CLASSES, Queries, RetrievalArguments, choose_training_images, is_chosen

TINY = (
    "hidden_size=64,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=128,"
    "vision_intermediate_size=128,num_hidden_layers=2,num_text_layers=1,num_vision_layers=1,pooler_size=64,"
    "initializer_range=0.05,hidden_dropout_prob=0,vision_hidden_dropout_prob=0,attention_probs_dropout_prob=0,"
    "vision_attention_probs_dropout_prob=0"
)
EVALUATION = ("--max_eval_samples", "40", "--captions_per_image", "1")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=600, num_validation=40, num_test=12)
    return folder


def run(*arguments: str):
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setenv("ACCELERATE_USE_CPU", "true")
        context.setattr(sys, "argv", ["run_image_retrieval.py", *arguments])
        run_image_retrieval.main()


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    """A model trained from scratch on 600 scenes."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run(
        *("--do_train", "--do_eval", "--dataset_name", str(scenes), "--tokenizer_name", str(scenes / "tokenizer")),
        *("--config_overrides", TINY, "--output_dir", str(folder), *EVALUATION),
        *("--num_train_epochs", "4", "--per_device_train_batch_size", "16", "--learning_rate", "1e-3"),
        *("--num_warmup_steps", "50", "--ema_decay", "0.99", "--no_eval_every_epoch"),
    )
    return folder


def results_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "eval_results.json").read_text())


def test_finetuning_learns_to_retrieve(trained):
    results = results_of(trained)
    chance = 5 / 40
    for name in ("eval_image_recall_at_5", "eval_raw_image_recall_at_5"):
        assert results[name] > 2.5 * chance, results
    assert {f"eval_text_recall_at_{k}" for k in (1, 5, 10)} <= results.keys()
    card = (trained / "README.md").read_text()
    assert "from transformers import AutoModelForZeroShotImageClassification" in card


def test_the_saved_model_is_the_averaged_one(trained, scenes, tmp_path):
    run(
        *("--do_eval", "--zero_shot", "--model_name_or_path", str(trained), "--dataset_name", str(scenes)),
        *("--output_dir", str(tmp_path), *EVALUATION),
    )
    results, expected = results_of(tmp_path), results_of(trained)
    for name, value in results.items():
        assert value == pytest.approx(expected[name], abs=1e-6), name


def test_predictions_are_the_scores_of_the_model(trained, scenes, tmp_path):
    run(
        *("--do_predict", "--model_name_or_path", str(trained), "--dataset_name", str(scenes)),
        *("--output_dir", str(tmp_path), "--captions_per_image", "2"),
    )
    scores = np.load(tmp_path / "retrieval_scores.npy")
    ids = json.loads((tmp_path / "retrieval_ids.json").read_text())
    regions = load_region_dataset(scenes, "test")
    assert scores.shape == (24, 12) and len(ids["image_ids"]) == 12
    model = InterBERTForImageRetrieval.from_pretrained(trained).eval()
    processor = InterBERTProcessor.from_pretrained(trained)
    inputs = processor(text=regions.captions(3)[1], regions=regions[5], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).itm_logits[0]
    assert scores[7, 5] == pytest.approx((logits[0] - logits[1]).item(), abs=1e-4)
    assert not (tmp_path / "scores.unfinished").exists()


def test_scoring_goes_on_where_it_was(trained, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval_evaluation, "IMAGES_PER_BLOCK", 3)
    regions = load_region_dataset(scenes, "test")
    captions, records = [regions.captions(i)[0] for i in range(12)], [regions[i] for i in range(12)]
    model = InterBERTForImageRetrieval.from_pretrained(trained)
    processor = InterBERTProcessor.from_pretrained(trained)
    score_block, calls = retrieval_evaluation._score_block, []

    def score_or_die(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_block(*arguments)

    def score(model=model):
        return score_captions_against_images(
            Accelerator(cpu=True), model, processor, captions, records, cache_dir=tmp_path / "cache"
        )

    monkeypatch.setattr(retrieval_evaluation, "_score_block", score_or_die)
    with pytest.raises(KeyboardInterrupt):
        score()
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 2
    resumed = score()
    assert len(calls) == 3 + 2  # two of the four blocks were there
    plain = score_captions_against_images(Accelerator(cpu=True), model, processor, captions, records)
    np.testing.assert_array_equal(resumed, plain)

    # What was scored with other weights does not count,
    with torch.no_grad():
        model.itm_head.classifier.weight[0].add_(1.0)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        score()
    assert np.abs(score() - plain).max() > 1e-2
    assert len(calls) == 3 + 2

    # nor what was scored of other regions of the same images.
    records[0] = records[0] | {"features": 2 * records[0]["features"]}
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        score()
    assert len(calls) == 3


@pytest.mark.parametrize("options", [[], ["--checkpointing_steps", "epoch"]], ids=["from_the_beginning", "checkpoint"])
def test_an_evaluation_that_is_killed_within_a_training_goes_on_where_it_was(scenes, tmp_path, monkeypatch, options):
    """Where what is trained again ends with the same weights, bit by bit."""
    monkeypatch.setattr(retrieval_evaluation, "IMAGES_PER_BLOCK", 10)
    score_block, calls, caches = retrieval_evaluation._score_block, [], []
    command = [
        *("--do_train", "--do_eval", "--dataset_name", str(scenes), "--tokenizer_name", str(scenes / "tokenizer")),
        *("--config_overrides", TINY, "--train_split", "train[:8]", "--num_train_epochs", "3", "--ema_decay", "0.9"),
        *("--per_device_train_batch_size", "20", "--learning_rate", "1e-3", *EVALUATION, "--output_dir", str(tmp_path)),
        *("--resume_from_checkpoint", "latest", *options),
    ]

    def score_or_die(*arguments):
        calls.append(1)
        caches.append(len(list((tmp_path / "scores.unfinished").iterdir())))
        if len(calls) == 7:
            raise Killed
        return score_block(*arguments)

    # Of the 40 images 4 blocks are scored by the raw weights, and 2 by the averaged ones.
    monkeypatch.setattr(retrieval_evaluation, "_score_block", score_or_die)
    with pytest.raises(Killed):
        run(*command)
    run(*command)
    assert len(calls) == 7 + 3 * 8 - 6
    # The scores of other weights are kept until these are complete, and no longer.
    assert max(caches) == 2
    assert not (tmp_path / "scores.unfinished").exists()


@pytest.mark.parametrize("batch_size, num_images", [(5, 5), (40, 16)])
def test_no_more_pairs_are_scored_at_a_time_than_the_batch_size(
    trained, scenes, tmp_path, monkeypatch, batch_size, num_images
):
    sizes = set()
    match_log_odds = retrieval_evaluation.match_log_odds

    def count_pairs(model, text_inputs, region_embeds, *arguments):
        sizes.add((len(text_inputs["input_ids"]), len(region_embeds)))
        return match_log_odds(model, text_inputs, region_embeds, *arguments)

    monkeypatch.setattr(retrieval_evaluation, "match_log_odds", count_pairs)
    run(
        *("--do_eval", "--model_name_or_path", str(trained), "--dataset_name", str(scenes)),
        *("--output_dir", str(tmp_path), "--per_device_eval_batch_size", str(batch_size), *EVALUATION),
    )
    assert max(texts * images for texts, images in sizes) == batch_size // num_images * num_images
    results, expected = results_of(tmp_path), results_of(trained)
    assert results["eval_image_recall_at_5"] == expected["eval_image_recall_at_5"]


def training_images(scenes: Path, num_images: int, **arguments) -> list[str]:
    args = RetrievalArguments(dataset_name=str(scenes), num_train_images=num_images, **arguments)
    regions = choose_training_images(args.load_regions("train"), TaskArguments(do_train=True), args)
    return regions.image_ids


def test_images_to_train_on_are_drawn(scenes):
    all_ids = load_region_dataset(scenes, "train").image_ids
    assert training_images(scenes, 600) == all_ids
    small, large = training_images(scenes, 60), training_images(scenes, 300)
    assert (len(small), len(large)) == (60, 300) and set(small) < set(large)
    # From everywhere, as a dataset may be sorted: of each tenth of it, about a tenth.
    tenths = np.bincount([all_ids.index(image_id) // 60 for image_id in large], minlength=10)
    assert large == sorted(large, key=all_ids.index) and 18 <= min(tenths) and max(tenths) <= 42
    # Of another order of the images they are the same.
    assert set(training_images(scenes, 60, train_split="train[300:]+train[:300]")) == set(small)
    with pytest.raises(ValueError, match="601 needs as many images with regions and captions in .*, train, got 600"):
        training_images(scenes, 601)


@pytest.fixture(scope="module")
def mined(scenes, tmp_path_factory) -> Path:
    """The scenes to train on, with hard negatives."""
    folder = tmp_path_factory.mktemp("mined") / "scenes"
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", ["mine_hard_negatives.py", str(scenes), str(folder), "--split", "train"])
        mine_hard_negatives.main()
    return folder


@pytest.mark.parametrize(
    "negatives",
    [("--negatives", "images", "--hard_negative_share", "0.5"), ("--negatives", "pairs", "--loss", "pairs")],
    ids=["paper", "release"],
)
def test_a_killed_finetuning_ends_with_the_same_weights(mined, scenes, tmp_path, negatives):
    command = [
        *("--do_train", "--dataset_name", str(mined), "--tokenizer_name", str(scenes / "tokenizer")),
        *("--config_overrides", TINY, "--train_split", "train[:40]", "--per_device_train_batch_size", "25"),
        *("--learning_rate", "1e-3", "--ema_decay", "0.9", "--resume_from_checkpoint", "latest", *negatives),
    ]
    run(*command, "--output_dir", str(tmp_path / "undisturbed"))
    command += ["--output_dir", str(tmp_path / "killed"), "--checkpointing_steps", "3"]
    with killed_at(5):
        run(*command)
    # Not as what it was not begun as.
    with pytest.raises(ValueError, match="is of another run: num_negatives was 3, is 2"):
        run(*command, "--num_negatives", "2")
    run(*command)
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("killed", "undisturbed")]
    assert results[0][-1] == pytest.approx(results[1][-1]) and results[0][-1]["step"] == 8
    assert_same_weights(tmp_path / "killed", tmp_path / "undisturbed")


def test_two_processes_score_like_one(trained, scenes, tmp_path):
    options = ("--do_eval", "--do_predict", "--model_name_or_path", str(trained), "--dataset_name", str(scenes))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", run_image_retrieval.__file__, *options, *EVALUATION]
    environment = dict(os.environ) | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "2 process(es)." in result.stdout
    run(*options, *EVALUATION, "--output_dir", str(tmp_path / "one"))
    assert results_of(tmp_path / "two") == results_of(tmp_path / "one")
    scores = [np.load(tmp_path / name / "retrieval_scores.npy") for name in ("two", "one")]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_texts_with_pools(scenes, tmp_path):
    regions = load_region_dataset(scenes, "test")
    ids = list(regions.dataset["image_id"])
    queries = [
        {"text": "one", "relevant": [ids[0], ids[3]]},
        {"text": "two", "relevant": [ids[1]], "pool": [ids[1], ids[2], ids[5], ids[6], ids[7], ids[8]]},
    ]
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(query) + "\n" for query in queries))
    found = Queries.of_file(str(path), regions)
    assert (len(found.records), found.texts, found.right_images) == (12, ["one", "two"], [[0, 3], [1]])
    # Images 4, 3, 0, … are found by the first text, 2, 1, … by the second.
    assert found.pools == [None, [1, 2, 5, 6, 7, 8]]
    scores = np.zeros((2, 12), dtype=np.float32)
    scores[0, [4, 3, 0]] = [9, 8, 7]
    scores[1, [2, 1]] = [3, 2]
    scores[1, [0, 3, 4, 9, 10, 11]] = -np.inf
    measured = found.measure(scores)
    assert measured["image_recall_at_1"] == 0 and measured["image_recall_at_5"] == 1
    assert measured["image_median_rank"] == 2
    assert measured["precision_at_5"] == pytest.approx((2 / 5 + 1 / 5) / 2)
    # Texts are not searched for among those that happen to have an image in their pool.
    assert not [name for name in measured if name.startswith("text_")]
    assert "text_recall_at_1" in replace(found, pools=[None, None]).measure(scores)


def test_texts_with_pools_are_scored_against_these_alone(trained, scenes, tmp_path, monkeypatch):
    regions = load_region_dataset(scenes, "test")
    texts, records = [regions.captions(i)[0] for i in range(12)], [regions[i] for i in range(12)]
    pools = [[0, 5], [5], None, *([11, n] for n in range(3, 11)), []]
    model = InterBERTForImageRetrieval.from_pretrained(trained)
    processor = InterBERTProcessor.from_pretrained(trained)
    match_log_odds, num_scored = retrieval_evaluation.match_log_odds, []

    def count_pairs(*arguments):
        log_odds = match_log_odds(*arguments)
        num_scored.append(log_odds.numel())
        return log_odds

    def score(**options):
        num_scored.clear()
        return score_captions_against_images(Accelerator(cpu=True), model, processor, texts, records, **options)

    monkeypatch.setattr(retrieval_evaluation, "match_log_odds", count_pairs)
    expected = score()
    scores = score(pools=pools, cache_dir=tmp_path)
    assert sum(num_scored) == 2 + 1 + 12 + 8 * 2
    for row, pool, expected_row in zip(scores, pools, expected, strict=True):
        inside = list(range(12)) if pool is None else pool
        np.testing.assert_allclose(row[inside], expected_row[inside], atol=1e-5)
        assert np.isneginf(np.delete(row, inside)).all()
    # They are found again, but not where other pairs are asked for.
    np.testing.assert_array_equal(score(pools=pools, cache_dir=tmp_path), scores)
    assert not num_scored
    assert np.isfinite(score(pools=[None, *pools[1:]], cache_dir=tmp_path)[0]).all()
    np.testing.assert_array_equal(score(pools=[None] * 12), expected)


@pytest.mark.parametrize(
    "query, message",
    [
        ({"text": "", "relevant": ["a"]}, "line 1: expected a text and ids of relevant images"),
        ({"text": "x", "relevant": []}, "line 1: expected a text and ids of relevant images"),
        ({"text": "x", "relevant": ["a"], "pool": ["b"]}, r"expected the relevant images to be in the pool, .*\['a'\]"),
        ({"text": "x", "relevant": ["nosuch"]}, "expected ids of images with regions, got 'nosuch'"),
    ],
)
def test_bad_queries(scenes, tmp_path, query, message):
    (tmp_path / "queries.jsonl").write_text(json.dumps(query))
    with pytest.raises(ValueError, match=message):
        Queries.of_file(str(tmp_path / "queries.jsonl"), load_region_dataset(scenes, "test"))


def test_the_first_pair_is_chosen_only_if_it_is_above_all_others():
    log_odds = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    assert is_chosen(log_odds).tolist() == [True, False, False, False]


def test_a_head_that_was_not_trained_is_not_evaluated(scenes, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(scenes / "tokenizer")
    config = InterBERTConfig(vocab_size=len(tokenizer), region_feature_size=208)
    config.update_from_string(TINY)
    InterBERTForVQA(config).save_pretrained(tmp_path / "vqa")
    InterBERTProcessor(tokenizer, region_feature_size=208).save_pretrained(tmp_path / "vqa")
    command = ("--do_eval", "--model_name_or_path", str(tmp_path / "vqa"), "--dataset_name", str(scenes))
    with pytest.raises(
        ValueError, match="must have all weights of InterBERTForImageRetrieval, got .*vqa without itm_head"
    ):
        run(*command, "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_images_that_are_trained_on_are_not_evaluated(scenes, tmp_path):
    options = "--do_train --do_eval --validation_split train[:5]".split()
    model = ("--config_overrides", TINY, "--tokenizer_name", str(scenes / "tokenizer"))
    with pytest.raises(ValueError, match="needs images that are not trained on, got 5 that are"):
        run(*options, *model, "--dataset_name", str(scenes), "--output_dir", str(tmp_path))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--do_train", "--zero_shot", "--tokenizer_name", "t"], "does not go with `--do_train`"),
        (["--do_eval", "--zero_shot", "--tokenizer_name", "t"], "needs a pretrained model, `--model_name_or_path`"),
        (
            ["--do_eval", "--model_name_or_path", "m", "--queries", "q.jsonl", "--max_eval_samples", "9"],
            "`--max_eval_samples` is for captions: `--queries` are evaluated as they are",
        ),
        (
            ["--do_predict", "--model_name_or_path", "m", "--queries", "q.jsonl"],
            "`--queries` are evaluated, `--do_eval`: predictions are of captions",
        ),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*arguments, "--dataset_name", "none", "--output_dir", str(tmp_path))


def test_nothing_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--tokenizer_name", "t", "--dataset_name", "none", "--output_dir", str(tmp_path))
    assert "Nothing to do: give `--do_train`, `--do_eval` or `--do_predict`." in capsys.readouterr().err


def test_queries_are_not_captions_of_images(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(
            *("--do_eval", "--model_name_or_path", "m", "--dataset_name", "none", "--output_dir", str(tmp_path)),
            *("--queries", "q.jsonl", "--captions_per_image", "1"),
        )
    assert "`--captions_per_image` is for captions, in whose place `--queries`" in capsys.readouterr().err


def test_recipes():
    recipes = Path(__file__).resolve().parent.parent / "examples" / "recipes"
    names = ("flickr30k_retrieval", "finetuning_release", "flickr30k_retrieval_release")
    paths = [str(recipes / f"{name}.yaml") for name in names]
    groups = ARGUMENT_CLASSES
    command = ["--do_train", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]

    _, _, retrieval, training, _ = parse_arguments(groups, "Retrieve.", [*command, "--recipe", paths[0]])
    assert (training.learning_rate, 8 * training.per_device_train_batch_size, training.num_train_epochs) == (
        4e-5,
        32,
        20,
    )
    assert (training.num_warmup_steps, training.lr_scheduler_type, training.ema_decay) == (10000, "linear", 0.9999)
    assert (retrieval.negatives, retrieval.num_negatives, retrieval.loss) == ("images", 3, "choice")
    assert (retrieval.max_seq_length, retrieval.max_regions) == (30, 100)

    _, _, retrieval, training, _ = parse_arguments(groups, "Retrieve.", [*command, "--recipe", *paths])
    assert (training.num_warmup_steps, training.lr_decay_epochs) == (0.1, [12, 16, 20])
    assert (retrieval.negatives, retrieval.loss, training.learning_rate) == ("pairs", "pairs", 4e-5)

    small = str(recipes / "flickr8k_retrieval.yaml")
    task, _, retrieval, training, _ = parse_arguments(groups, "Retrieve.", [*command, "--recipe", small])
    assert (training.max_train_steps, retrieval.hard_negative_share, task.max_eval_samples) == (600, 0.33, 400)

    # For comparisons by the amount of data: epochs, and negatives of which there are enough within every part.
    by_data = str(recipes / "flickr8k_retrieval_by_data.yaml")
    other_task, _, other, epochs, _ = parse_arguments(groups, "Retrieve.", [*command, "--recipe", by_data])
    assert (epochs.max_train_steps, epochs.num_train_epochs, epochs.num_warmup_steps) == (None, 3, 0.1)
    assert other == replace(retrieval, hard_negative_share=0.0) and other_task == task
    changed = {"max_train_steps": None, "num_train_epochs": 3, "num_warmup_steps": 0.1}
    assert epochs == replace(training, **changed)
