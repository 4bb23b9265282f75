"""Pretraining as a user runs it: the script in processes of its own, on a few generated scenes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from hub_server import needs_hub, start_hub
from killing import assert_same_weights, killed_at
from model_fixtures import task_model, tiny_processor
from safetensors.torch import load_file
from test_hub import HUB_FILES
from transformers import BertConfig, BertModel

import run_pretrain
from configuration_interbert import InterBERTConfig
from generate_scenes import write_scenes
from model_loading import ModelArguments, load_model
from modeling_interbert import InterBERTForPreTraining
from processing import (
    InterBERTProcessor,
    PretrainingCollator,
    PretrainingPairs,
    RegionDataset,
    load_region_dataset,
)
from processing.ranking import retrieval_recall
from retrieval_evaluation import score_captions_against_images
from run_pretrain import ObjectiveArguments, build_model, choose_region_objective, count_epochs, evaluate_objectives
from training import TrainingArguments

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = str(REPOSITORY / "examples" / "run_pretrain.py")
TINY = (
    "hidden_size=32,num_attention_heads=2,vision_num_attention_heads=2,intermediate_size=64,vision_intermediate_size=64,"
    "num_hidden_layers=1,num_text_layers=1,num_vision_layers=1,pooler_size=16"
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, num_train=24, num_validation=8, num_test=4)
    return folder


@pytest.fixture(scope="module")
def model_and_processor(scenes):
    torch.manual_seed(0)
    args = ModelArguments(tokenizer_name=str(scenes / "tokenizer"), config_overrides=TINY)
    return build_model(args, [load_region_dataset(scenes, "train")], None, has_masked_regions=True)


def pretrain(scenes: Path, output_dir: Path, *arguments: str, launch=(), environment=None):
    command = [sys.executable, *launch, SCRIPT, "--dataset_name", str(scenes), "--output_dir", str(output_dir)]
    command += ["--per_device_train_batch_size", "16", "--retrieval_eval_size", "6", *arguments]
    environment = environment or dict(os.environ) | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def from_scratch(scenes: Path) -> list[str]:
    return ["--tokenizer_name", str(scenes / "tokenizer"), "--config_overrides", TINY]


def test_two_stages_on_one_process(scenes, tmp_path):
    output = pretrain(
        scenes,
        tmp_path / "out",
        *from_scratch(scenes),
        *("--objectives", "mlm,mom,itm", "msm,mrm,itm", "--stage_epochs", "1", "2", "--checkpointing_steps", "epoch"),
        "--group_by_length",
        launch=("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
    )
    assert "24 images with 120 captions to train on, 40 captions to evaluate on; 1 process(es)." in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert [(result["epoch"], result["step"]) for result in results] == [(1, 8), (2, 16), (3, 24)]
    for result in results:
        losses = [result[f"train_{name}_loss"] for name in ("mlm", "region", "itm")]
        # The parts are means over all that was scored; in the mean over the batches those without any count as 0.
        assert 0 < result["train_loss"] < 1.01 * sum(losses)
        assert {"eval_mlm_accuracy", "eval_region_accuracy", "eval_itm_accuracy"} <= result.keys()
        assert 0 <= result["eval_image_recall_at_1"] <= result["eval_image_recall_at_5"] <= 1
    for name in ("checkpoint-8", "checkpoint-16", "checkpoint-24", "."):
        folder = tmp_path / "out" / name
        model, info = InterBERTForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.config.region_feature_size == 208 and model.config.region_objective == "hard_class"
        assert InterBERTProcessor.from_pretrained(folder).region_feature_size == 208
        assert (folder / "modeling_interbert.py").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `objectives` | ['mlm,mom,itm', 'msm,mrm,itm'] |" in card
    assert f"| 3 | 24 | {results[2]['train_loss']:.4g} |" in card
    assert not list((tmp_path / "out").glob("*unfinished*"))


def test_two_processes_without_masked_regions(scenes, tmp_path):
    """A head that has no part in the loss must not stop several processes."""
    output = pretrain(
        scenes,
        tmp_path / "out",
        *from_scratch(scenes),
        *("--max_train_steps", "3", "--objectives", "mlm,itm", "--retrieval_eval_size", "0"),
        launch=("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
    )
    assert "2 process(es)." in output
    (result,) = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert result["step"] == 3
    assert result.keys() >= {"eval_mlm_loss", "eval_itm_loss"} and "eval_region_loss" not in result


def test_two_processes_train_one_model(scenes, tmp_path):
    output = pretrain(
        scenes,
        tmp_path / "out",
        *from_scratch(scenes),
        *("--max_train_steps", "3"),
        launch=("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
    )
    assert "2 process(es)." in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results[-1]["step"] == 3

    # What two processes measured together is what one process measures alone.
    model = InterBERTForPreTraining.from_pretrained(tmp_path / "out")
    processor = InterBERTProcessor.from_pretrained(tmp_path / "out")
    regions = load_region_dataset(scenes, "validation")
    accelerator = Accelerator(cpu=True)
    pairs = PretrainingPairs(regions, seed=42, fixed_epoch=0)
    measured = evaluate_objectives(accelerator, model, pairs, PretrainingCollator(processor), batch_size=7)
    scores = score_captions_against_images(
        accelerator, model, processor, [regions.captions(i)[0] for i in range(6)], [regions[i] for i in range(6)]
    )
    measured |= {
        f"eval_{name}": value for name, value in retrieval_recall(scores, np.arange(len(scores))[:, None]).items()
    }
    for name, value in measured.items():
        assert results[-1][name] == pytest.approx(value, rel=1e-4), name


def test_bf16_from_bert_with_accumulation_and_tracking(scenes, tmp_path, model_and_processor):
    _, processor = model_and_processor
    torch.manual_seed(0)
    bert_config = BertConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    BertModel(bert_config).save_pretrained(tmp_path / "bert")
    processor.tokenizer.save_pretrained(tmp_path / "bert")
    pretrain(
        scenes,
        tmp_path / "out",
        *("--bert_name_or_path", str(tmp_path / "bert"), "--layout", "release", "--mixed_precision", "bf16"),
        *("--objectives", "msm,mrm,itm", "--gradient_accumulation_steps", "2", "--gradient_checkpointing"),
        *("--learning_rate", "0", "--retrieval_eval_size", "0", "--conditional_masking", "false"),
        *("--with_tracking", "--report_to", "tensorboard", "--logging_steps", "2"),
    )
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results[-1]["step"] == 4  # 120 pairs in batches of 16, two batches a step
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))
    model = InterBERTForPreTraining.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    layers = model.config.num_hidden_layers, model.config.num_text_layers, model.config.num_vision_layers
    assert layers == (2, 1, 1)
    # With a learning rate of 0, BERT's weights stay what they were: layers 0, 1 below, layer 2 in the text stream.
    bert = load_file(tmp_path / "bert" / "model.safetensors")
    for layer, number in ((model.interbert.interaction_layers[1], 1), (model.interbert.text_layers[0], 2)):
        assert torch.equal(layer.intermediate.weight, bert[f"encoder.layer.{number}.intermediate.dense.weight"])


@needs_hub
def test_push_to_hub(scenes, tmp_path):
    """The model in one commit on main, checkpoints on a branch of their own; both open from the Hub."""
    code = """
import json
from huggingface_hub import HfApi
from transformers import AutoModelForPreTraining
api = HfApi()
found = {}
for revision in ("main", "checkpoints"):
    model = AutoModelForPreTraining.from_pretrained("org/tiny", revision=revision, trust_remote_code=True)
    found[revision] = {
        "files": sorted(api.list_repo_files("org/tiny", revision=revision)),
        "commits": [commit.title for commit in api.list_repo_commits("org/tiny", revision=revision)],
        "weight": model.itm_head.classifier.weight.sum().item(),
    }
print(json.dumps(found))
"""
    with start_hub(tmp_path / "hub") as hub:
        environment = hub.env(home=tmp_path / "home")
        output = pretrain(
            scenes,
            tmp_path / "out",
            *from_scratch(scenes),
            *("--max_train_steps", "3", "--checkpointing_steps", "1", "--retrieval_eval_size", "0"),
            *("--push_to_hub", "--hub_model_id", "org/tiny", "--push_checkpoints", "--save_total_limit", "1"),
            "--widget_pictures",
            environment=environment,
        )
        assert "org/tiny/commit/" in output
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        found = json.loads(result.stdout.splitlines()[-1])
    model_files = {"config.json", "model.safetensors", "processor_config.json", *HUB_FILES}
    model_files |= {"tokenizer.json", "tokenizer_config.json"}
    more = {"README.md", "all_results.json", "eval_results.json", "recipe.yaml", "handler.py", "requirements.txt"}
    more |= {"architecture.png", *(f"widget-{number}.png" for number in range(3))}
    assert set(found["main"]["files"]) - {".gitattributes"} == model_files | more
    assert set(found["checkpoints"]["files"]) - {".gitattributes"} == model_files
    assert found["main"]["commits"] == ["End of training", "initial commit"]
    # A checkpoint is not uploaded while another one still is.
    assert found["checkpoints"]["commits"][-2:] == ["Step 1", "initial commit"]
    assert set(found["checkpoints"]["commits"][:-2]) <= {"Step 2", "Step 3"}
    weights = load_file(tmp_path / "out" / "model.safetensors")["itm_head.classifier.weight"]
    assert found["main"]["weight"] == pytest.approx(weights.sum().item(), abs=1e-6)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_training_goes_on_from_a_checkpoint(scenes, tmp_path, model_and_processor):
    for part in model_and_processor:
        part.save_pretrained(tmp_path / "first")
    args = ModelArguments(model_name_or_path=str(tmp_path / "first"))
    model, _ = build_model(args, [load_region_dataset(scenes, "train")], None, has_masked_regions=True)
    for name, value in model_and_processor[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    "changes, region_objective, message",
    [
        ({"region_feature_size": 7}, None, "as wide as the model's, 7, got 208"),
        ({"vocab_size": 50}, None, r"must hold the tokenizer's 218 tokens, got 50"),
        ({"num_region_classes": 3}, None, r"must have the dataset's \d+ classes, got 3"),
        ({}, "feature", "must be that of the checkpoint, hard_class, got feature"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    scenes, tmp_path, model_and_processor, changes, region_objective, message
):
    config = InterBERTConfig.from_dict(model_and_processor[0].config.to_dict() | changes)
    InterBERTForPreTraining(config).save_pretrained(tmp_path / "first")
    model_and_processor[1].save_pretrained(tmp_path / "first")
    splits = [load_region_dataset(scenes, split) for split in ("train", "validation")]
    with pytest.raises(ValueError, match=message):
        build_model(ModelArguments(model_name_or_path=str(tmp_path / "first")), splits, region_objective, True)


def test_region_objective_follows_the_dataset(scenes):
    Accelerator(cpu=True)  # accelerate's loggers need one
    regions = load_region_dataset(scenes, "train")
    assert choose_region_objective(None, regions) == "hard_class"
    assert choose_region_objective("soft_class", regions) == "hard_class"  # no class_probs in the scenes
    assert choose_region_objective("feature", regions) == "feature"
    assert regions.num_region_classes("hard_class") <= 48
    unclassified = RegionDataset(regions.dataset.remove_columns("class_ids"))
    assert choose_region_objective(None, unclassified) == "feature"
    with pytest.raises(ValueError, match="class_probs"):
        regions.num_region_classes("soft_class")


def test_classes_are_asked_for_where_they_are_scored(scenes, tmp_path, model_and_processor):
    for part in model_and_processor:
        part.save_pretrained(tmp_path)
    unclassified = [RegionDataset(load_region_dataset(scenes, "train").dataset.remove_columns("class_ids"))]
    args = ModelArguments(model_name_or_path=str(tmp_path))
    assert build_model(args, unclassified, None, has_masked_regions=False)[0].config.region_objective == "hard_class"
    with pytest.raises(ValueError, match="hard_class needs the column 'class_ids'"):
        build_model(args, unclassified, None, has_masked_regions=True)


def test_objectives_are_read_alike():
    args = ObjectiveArguments(objectives=["mlm, mom, itm", "msm, itm"], stage_epochs=[1, 1])
    assert args.has_matching and args.has_masked_regions and args.leaves_out_a_head
    assert not ObjectiveArguments(objectives=["mlm, mom ,itm"]).leaves_out_a_head
    args = ObjectiveArguments(objectives=["mlm"])
    assert not args.has_matching and not args.has_masked_regions


def test_stages():
    args = ObjectiveArguments(objectives=["mlm,mom,itm", "msm,mrm,itm"], stage_epochs=[2, 3])
    assert [args.objectives_of(epoch) for epoch in range(5)] == ["mlm,mom,itm"] * 2 + ["msm,mrm,itm"] * 3
    assert ObjectiveArguments(objectives=["mlm,itm"]).objectives_of(7) == "mlm,itm"
    with pytest.raises(ValueError, match="need as many `--stage_epochs`, got none"):
        ObjectiveArguments(objectives=["mlm", "msm"])
    with pytest.raises(ValueError, match=r"one number per stage of `--objectives` \(1\), got 2"):
        ObjectiveArguments(objectives=["mlm"], stage_epochs=[1, 2])


@pytest.fixture
def run_main(scenes, tmp_path, monkeypatch):
    """Runs the script in this process. Returns what was measured after each epoch."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(*arguments: str, folder: str = "out") -> list[dict]:
        command = ["run_pretrain.py", "--dataset_name", str(scenes), "--output_dir", str(tmp_path / folder)]
        command += ["--per_device_train_batch_size", "16", "--retrieval_eval_size", "0", *from_scratch(scenes)]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        run_pretrain.main()
        return json.loads((tmp_path / folder / "all_results.json").read_text())

    return run


@pytest.mark.parametrize("lasting", [("--max_train_steps", "17"), ("--num_train_epochs", "3")])
def test_masking_schedule(run_main, monkeypatch, lasting):
    """Of 120 pairs in 8 batches an epoch, 17 steps are three epochs, the last one of a single step."""
    rates = []
    set_rate = PretrainingCollator.set_text_mask_probability
    monkeypatch.setattr(
        PretrainingCollator,
        "set_text_mask_probability",
        lambda collator, rate: rates.append(rate) or set_rate(collator, rate),
    )
    results = run_main("--text_mask_probability", "0.5", "0.1", *lasting, "--learning_rate", "0")
    assert [result["epoch"] for result in results] == [1, 2, 3]
    assert rates[1:] == pytest.approx([0.5, 0.3, 0.1])  # without that of the constructor
    # Weights that do not change have one loss.
    assert len({result["eval_mlm_loss"] for result in results}) == 1


def test_a_killed_run_goes_on_with_its_masking_schedule(run_main, tmp_path):
    arguments = ["--text_mask_probability", "0.9", "0.1", "--max_train_steps", "17", "--learning_rate", "1e-3"]
    expected = run_main(*arguments, folder="undisturbed")
    with killed_at(10):
        run_main(*arguments, "--checkpointing_steps", "3")
    results = run_main(*arguments, "--resume_from_checkpoint", "latest")
    assert [result["step"] for result in results] == [8, 16, 17]
    assert results == [pytest.approx(result, rel=1e-5) for result in expected]
    assert_same_weights(tmp_path / "out", tmp_path / "undisturbed")


def test_a_masking_schedule_needs_two_epochs(run_main):
    with pytest.raises(ValueError, match="of the first and of the last epoch: expected at least 2 epochs, got 1"):
        run_main("--text_mask_probability", "0.3", "0.15")
    with pytest.raises(ValueError, match="got 1"):
        run_main("--text_mask_probability", "0.3", "0.15", "--num_train_epochs", "5", "--max_train_steps", "8")


def test_masking_rates_of_epochs():
    schedule = ObjectiveArguments(text_mask_probability=[0.3, 0.15])
    assert [schedule.text_mask_probability_of(epoch, 4) for epoch in range(4)] == pytest.approx([0.3, 0.25, 0.2, 0.15])
    assert schedule.has_masking_schedule and schedule.last_text_mask_probability == 0.15
    constant = ObjectiveArguments(text_mask_probability=[0.2])
    assert [constant.text_mask_probability_of(epoch, 3) for epoch in range(3)] == [0.2] * 3
    assert not constant.has_masking_schedule and constant.last_text_mask_probability == 0.2
    assert ObjectiveArguments().text_mask_probability_of(2, 3) is None
    stages = {"stage_epochs": [1, 1], "text_mask_probability": [0.3, 0.15]}
    with pytest.raises(
        ValueError, match="in mlm, and of the words that begin a segment in msm: .* got .'mlm,itm', 'msm"
    ):
        ObjectiveArguments(objectives=["mlm,itm", "msm,mrm,itm"], **stages)
    ObjectiveArguments(objectives=["msm,itm", "mrm,itm"], **stages)
    ObjectiveArguments(objectives=["mlm,itm", "msm,itm"], **stages | {"text_mask_probability": [0.3]})


def test_epochs_that_are_trained():
    def count(**arguments):
        return count_epochs(TrainingArguments(num_train_epochs=5, gradient_accumulation_steps=2, **arguments), 20)

    assert [count(max_train_steps=steps) for steps in (1, 10, 11, 70)] == [1, 1, 2, 7]
    assert count() == 5


def test_similar_words(run_main, tmp_path, capsys):
    path = tmp_path / "similar_words.json"
    path.write_text(json.dumps({"red": ["blue"], "blue": ["red"], "红色": ["蓝色"]}), encoding="utf-8")
    arguments = ["--similar_words", str(path), "--max_train_steps", "1"]
    run_main(*arguments)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "have similar ones" in line]
    share, rest = line.split("%")
    assert 2 < float(share) < 20
    assert rest == " of the words in 120 captions have similar ones; masked ones without any become random words."
    with pytest.raises(ValueError, match="expected words of the dataset, got none of those in 120 captions, such as '"):
        run_main(*arguments, "--caption_column", "captions_zh", "--overwrite_output_dir")
    path.write_text(json.dumps({"红色": ["蓝色"]}), encoding="utf-8")
    with pytest.raises(ValueError, match="by the masking unit 'token', only 0 of 1 words are masked as a whole"):
        run_main(*arguments, "--caption_column", "captions_zh", "--overwrite_output_dir")
    chinese = ["--caption_column", "captions_zh", "--masking_unit", "jieba"]
    run_main(*arguments, *chinese, "--overwrite_output_dir")
    assert "of the words in 120 captions have similar ones" in capsys.readouterr().out


def test_chinese_recipes_read_what_the_dataset_builder_writes():
    recipes = REPOSITORY / "examples" / "recipes"
    recipe = yaml.safe_load((recipes / "pretrain_chinese.yaml").read_text("utf-8"))
    assert recipe["train_split"] == "pretrain"
    for variant in ("pretrain_chinese_wwm", "pretrain_chinese_macbert", "chinese_masking_schedule"):
        assert "train_split" not in yaml.safe_load((recipes / f"{variant}.yaml").read_text("utf-8"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "needs `--tokenizer_name`"),
        ({"model_name_or_path": "a", "bert_name_or_path": "b"}, "not both"),
        ({"model_name_or_path": "a", "config_overrides": "hidden_size=3"}, "are for new models"),
        ({"model_name_or_path": "a", "tokenizer_name": "b"}, "are for new models"),
    ],
)
def test_bad_model_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**arguments)


def test_another_model_is_not_taken_for_an_interbert(tmp_path):
    """All of its weights would be new."""
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an InterBERT checkpoint, got .* of model_type 'bert'. `--bert_name_or"):
        load_model(InterBERTForPreTraining, ModelArguments(model_name_or_path=str(tmp_path)), [])


def test_a_detector_that_the_processor_alone_names_stays(tmp_path):
    task_model(InterBERTForPreTraining).save_pretrained(tmp_path)
    processor = tiny_processor()
    processor.region_detector = {"name_or_path": "org/detector"}
    processor.save_pretrained(tmp_path)
    model, processor = load_model(InterBERTForPreTraining, ModelArguments(model_name_or_path=str(tmp_path)), [])
    assert model.config.region_detector == processor.region_detector == {"name_or_path": "org/detector"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_of_half_precision_are_trained_in_full(tmp_path, dtype):
    """A step of a small learning rate, or of a moving average, would change nothing in so few digits."""
    saved = task_model(InterBERTForPreTraining).to(dtype)
    saved.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    model, _ = load_model(InterBERTForPreTraining, ModelArguments(model_name_or_path=str(tmp_path)), [])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name).float())
    model.save_pretrained(tmp_path / "again")
    assert {value.dtype for value in load_file(tmp_path / "again" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--validation_split", "train[:3]"], "needs images that are not trained on, got 3 that are: .*train-000000"),
        (["--retrieval_eval_size", "-1"], "`--retrieval_eval_size` must not be negative, got -1"),
    ],
)
def test_bad_data_arguments(scenes, tmp_path, monkeypatch, capsys, arguments, message):
    command = ["run_pretrain.py", "--dataset_name", str(scenes), "--output_dir", str(tmp_path / "out"), *arguments]
    command += ["--tokenizer_name", str(scenes / "tokenizer"), "--config_overrides", TINY]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises((ValueError, SystemExit)) as error:
        run_pretrain.main()
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


def test_recall_counts_the_rank_of_the_right_one():
    scores = np.array(
        [
            [0.9, 0.1, 0.2, 0.3],  # image 0 comes first for caption 0,
            [0.8, 0.7, 0.1, 0.0],  # image 1 second,
            [0.5, 0.6, 0.4, 0.3],  # image 2 third,
            [0.9, 0.8, 0.7, 0.1],  # image 3 last
        ]
    )
    results = retrieval_recall(scores, np.arange(4)[:, None], ks=(1, 2, 3, 4))
    assert [results[f"image_recall_at_{k}"] for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    # Image 0 has 0.9 for its caption and, tied, for caption 3: rank 2. The others have ranks 2, 2 and 3 (tie at 0.3).
    assert [results[f"text_recall_at_{k}"] for k in (1, 2, 3, 4)] == [0.0, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_ties_never_count_in_our_favour(value):
    results = retrieval_recall(np.full((12, 12), value), np.arange(12)[:, None])
    assert {recall for name, recall in results.items() if "recall" in name} == {0.0}


def test_the_images_that_are_retrieved_have_captions_and_regions(scenes):
    regions = load_region_dataset(scenes, "validation")
    captions = [regions.captions(i) if i not in (0, 3) else [] for i in range(8)]
    dataset = regions.dataset.remove_columns("captions").add_column("captions", captions)
    assert PretrainingPairs(RegionDataset(dataset)).usable_images().tolist() == [1, 2, 4, 5, 6, 7]


def test_block_scores_are_those_of_single_pairs(scenes, model_and_processor):
    model, processor = model_and_processor
    with torch.no_grad():  # weights large enough for the scores to differ
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    regions = load_region_dataset(scenes, "validation")
    captions = [regions.captions(i)[0] for i in range(5)]
    scores = score_captions_against_images(
        Accelerator(cpu=True), model, processor, captions, [regions[i] for i in range(7)], batch_size=6, max_regions=4
    )
    assert scores.shape == (5, 7)
    for i, caption in enumerate(captions):
        for j in range(7):
            record = regions[j]
            cut = record | {"features": record["features"][:4], "boxes": record["boxes"][:4]}
            with torch.no_grad():
                logits = model.eval()(**processor(text=caption, regions=cut, return_tensors="pt")).itm_logits[0]
            assert scores[i, j] == pytest.approx((logits[0] - logits[1]).item(), abs=1e-4)
    assert np.std(scores) > 1e-2
