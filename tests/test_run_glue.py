"""Finetuning and evaluation of GLUE's tasks on generated sentences."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

import run_glue
from arguments import parse_arguments
from finetuning import TaskArguments
from generate_glue import write_glue
from model_loading import ModelArguments
from modeling_interbert import InterBERTForSequenceClassification
from processing import InterBERTProcessor
from processing.tasks import GLUE_TASKS, read_glue
from run_glue import GLUEArguments, answer_texts, load_splits, measure
from training import OutputArguments, TrainingArguments

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = REPOSITORY / "examples" / "recipes"
TRAINING = ("--per_device_train_batch_size", "16", "--learning_rate", "1e-3", "--num_warmup_steps", "10")


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "glue"
    write_glue(folder, num_train=600, num_validation=100, num_test=12)
    return folder


def run(glue: Path, task: str, folder: Path, *arguments: str) -> dict[str, float]:
    """Runs the script in this process, and returns what it measured last."""
    command = ["run_glue.py", "--task_name", task, "--output_dir", str(folder), *arguments]
    if "--dataset_name" not in arguments:
        command += ["--data_dir", str(glue)]
    with pytest.MonkeyPatch.context() as context:
        context.setenv("ACCELERATE_USE_CPU", "true")
        context.setattr(sys, "argv", command)
        run_glue.main()
    return json.loads((folder / "eval_results.json").read_text())


def from_bert(glue: Path, *arguments: str) -> list[str]:
    """An InterBERT with 2 interaction layers and 1 text layer of the BERT, and 1 vision layer."""
    return ["--do_train", "--do_eval", "--bert_name_or_path", str(glue / "bert"), "--layout", "release", *TRAINING]


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "task, epochs, metric, chance, reached, answers",
    [
        ("cola", "2", "matthews_correlation", 0, 0.8, {"0", "1"}),
        ("sst2", "2", "accuracy", 0.6, 0.9, {"0", "1"}),
        ("stsb", "5", "pearson", 0, 0.5, None),
        ("rte", "3", "accuracy", 0.6, 0.9, {"entailment", "not_entailment"}),
    ],
)
def test_every_task_is_learned_evaluated_and_predicted(glue, tmp_path, task, epochs, metric, chance, reached, answers):
    fraction = ("--validation_fraction", "0.2") if task == "sst2" else ()  # which has no dev.tsv
    trained = run(
        glue, task, tmp_path / "out", *from_bert(glue), "--do_predict", "--num_train_epochs", epochs, *fraction
    )
    assert trained[f"eval_{metric}"] > reached, trained
    assert chance == 0 or trained["majority_accuracy"] < chance
    model = InterBERTForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.num_hidden_layers, model.config.num_text_layers) == (2, 1)
    assert model.config.id2label == dict(enumerate(GLUE_TASKS[task].label_names or ["score"]))

    # The trained model alone gives the same numbers, as measured and as predicted.
    checkpoint = ("--model_name_or_path", str(tmp_path / "out"))
    alone = run(glue, task, tmp_path / "alone", "--do_eval", "--do_predict", *checkpoint, *fraction)
    assert alone == pytest.approx({name: value for name, value in trained.items() if name in alone}, rel=1e-5)
    file_name = f"{GLUE_TASKS[task].title}.tsv"
    assert rows_of(tmp_path / "alone" / file_name) == rows_of(tmp_path / "out" / file_name)

    header, *rows = rows_of(tmp_path / "out" / file_name)
    assert header == ["index", "prediction"]
    assert [index for index, _ in rows] == [str(number) for number in range(12)]
    if answers is not None:
        assert {answer for _, answer in rows} == answers
    else:
        assert all(0 <= float(answer) <= 5 and len(answer) == 5 for _, answer in rows)
    # One of them by hand.
    example = read_glue(glue / GLUE_TASKS[task].title / "test.tsv", task)[7]
    inputs = InterBERTProcessor.from_pretrained(tmp_path / "out")(
        text=example.sentence1, text_pair=example.sentence2, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0]
    expected = f"{min(max(logits.item(), 0), 5):.3f}" if answers is None else logits.argmax().item()
    assert rows[7][1] == (model.config.id2label[expected] if task == "rte" else str(expected))


@pytest.fixture(scope="module")
def bert_on_rte(glue, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "trained"
    results = run(
        glue,
        "rte",
        folder,
        *("--do_train", "--do_eval", "--architecture", "bert", "--bert_name_or_path", str(glue / "bert"), *TRAINING),
        *("--num_train_epochs", "3", "--ema_decay", "0.9", "--group_by_length"),
    )
    assert results["eval_accuracy"] > 0.9 and results["eval_raw_accuracy"] > 0.9
    return folder


def test_a_bert_is_finetuned_alike(glue, bert_on_rte, tmp_path):
    # A plain BERT, without our code; the saved weights are the averaged ones.
    model = AutoModelForSequenceClassification.from_pretrained(bert_on_rte)
    assert type(model) is BertForSequenceClassification
    tokens = AutoTokenizer.from_pretrained(bert_on_rte)(["There is"], padding=False)["input_ids"]
    assert len(tokens[0]) == 4
    assert not list(bert_on_rte.glob("*.py"))
    text = (bert_on_rte / "README.md").read_text()
    assert "A BERT of 3 layers of width 64" in text and "trust_remote_code" not in text
    alone = run(glue, "rte", tmp_path, "--do_eval", "--architecture", "bert", "--bert_name_or_path", str(bert_on_rte))
    trained = json.loads((bert_on_rte / "eval_results.json").read_text())
    assert alone == pytest.approx({name: trained[name] for name in alone}, rel=1e-5)


def test_the_single_stream_variant(glue, tmp_path):
    overrides = ("--config_overrides", "num_text_layers=0,num_vision_layers=0")
    run(glue, "cola", tmp_path, *from_bert(glue), "--layout", "paper", *overrides, "--max_train_samples", "32")
    config = InterBERTForSequenceClassification.from_pretrained(tmp_path).config
    assert (config.num_hidden_layers, config.num_text_layers, config.num_vision_layers) == (3, 0, 0)
    card = (tmp_path / "README.md").read_text()
    assert "from transformers import AutoModelForSequenceClassification" in card and "regions=" not in card


def test_two_processes_train_and_evaluate_together(glue, tmp_path):
    """The vision layers, which have no part in the loss, must not stop them."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(REPOSITORY / "examples" / "run_glue.py"), *from_bert(glue)]
    command += ["--task_name", "rte", "--data_dir", str(glue), "--output_dir", str(tmp_path / "out")]
    environment = dict(os.environ) | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*command, "--max_train_steps", "3"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "2 process(es)." in result.stdout
    together = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    alone = run(glue, "rte", tmp_path / "alone", "--do_eval", "--model_name_or_path", str(tmp_path / "out"))
    assert alone == pytest.approx({name: together[name] for name in alone}, rel=1e-4)


def task_arguments(**values: bool) -> TaskArguments:
    return TaskArguments(**values)


def test_a_dataset_is_read_like_files(glue, tmp_path):
    """Columns and labels of nyu-mll/glue, with a configuration for each task; −1 is no label."""
    names = {"rte": "RTE", "cola": "CoLA"}
    card = "---\nconfigs:\n"
    for task, title in names.items():
        card += f"- config_name: {task}\n  data_files:\n"
        for split, file in (("train", "train"), ("validation", "dev"), ("test", "test")):
            examples = read_glue(glue / title / f"{file}.tsv", task)
            columns = {"sentence": [example.sentence1 for example in examples]}
            if task == "rte":
                columns = {f"sentence{n}": [getattr(example, f"sentence{n}") for example in examples] for n in (1, 2)}
            columns["label"] = [-1 if example.label is None else example.label for example in examples]
            datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "dataset" / task / f"{split}.parquet")
            card += f"  - split: {split}\n    path: {task}/{split}.parquet\n"
    (tmp_path / "dataset" / "README.md").write_text(f"{card}---\n")
    everything = task_arguments(do_train=True, do_eval=True, do_predict=True)
    for task in names:
        splits = load_splits(everything, GLUEArguments(task, dataset_name=str(tmp_path / "dataset")))
        assert splits == load_splits(everything, GLUEArguments(task, data_dir=str(glue)))
    with pytest.raises(ValueError, match="no training data: expected a split 'first'"):
        load_splits(everything, GLUEArguments("rte", dataset_name=str(tmp_path / "dataset"), train_split="first"))
    with pytest.raises(ValueError, match="row 0: expected the field 'sentence1', got"):
        load_splits(
            everything, GLUEArguments("rte", dataset_name=str(tmp_path / "dataset"), dataset_config_name="cola")
        )
    with pytest.raises(ValueError, match="Could not load split 'validation' of the dataset '/no/such/dataset'"):
        load_splits(everything, GLUEArguments("rte", dataset_name="/no/such/dataset"))


def test_a_part_is_held_out(glue):
    both = task_arguments(do_train=True, do_eval=True)
    splits = load_splits(both, GLUEArguments("sst2", data_dir=str(glue / "SST-2"), validation_fraction=0.1))
    assert (len(splits["train"]), len(splits["validation"])) == (540, 60)
    alone = load_splits(
        task_arguments(do_eval=True), GLUEArguments("sst2", data_dir=str(glue), validation_fraction=0.1)
    )
    assert alone == {"validation": splits["validation"]}
    # Also where there are validation data.
    few = task_arguments(do_train=True, do_eval=True, max_train_samples=9, max_eval_samples=7)
    splits = load_splits(few, GLUEArguments("cola", data_dir=str(glue), validation_fraction=0.1))
    assert (len(splits["train"]), len(splits["validation"])) == (9, 7)
    train = load_splits(task_arguments(do_train=True), GLUEArguments("cola", data_dir=str(glue)))["train"]
    assert all(example in train for example in splits["validation"])


def test_errors_of_the_data(glue, tmp_path):
    both = task_arguments(do_train=True, do_eval=True)
    with pytest.raises(
        ValueError, match=r"no validation data: expected dev.tsv there or in its folder SST-2\. .*_frac"
    ):
        load_splits(both, GLUEArguments("sst2", data_dir=str(glue)))
    with pytest.raises(ValueError, match="folder .*none of `--data_dir` does not exist"):
        load_splits(both, GLUEArguments("sst2", data_dir=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="no training data: expected train.tsv or sts-train.csv"):
        load_splits(both, GLUEArguments("stsb", data_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="nothing to predict for: expected test.tsv"):
        load_splits(task_arguments(do_predict=True), GLUEArguments("rte", data_dir=str(tmp_path)))
    # The files of another task, and those without labels.
    with pytest.raises(ValueError, match=r"dev.tsv, line 2: expected the field 'sentence', got \['index', 'sentence1'"):
        load_splits(both, GLUEArguments("sst2", data_dir=str(glue / "RTE")))
    (tmp_path / "dev.tsv").write_text((glue / "RTE" / "test.tsv").read_text())
    with pytest.raises(ValueError, match="validation data of .* must have labels, got 12 of 12 examples without"):
        load_splits(task_arguments(do_eval=True), GLUEArguments("rte", data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--task_name", "mnli", "--data_dir", "d"), "invalid choice: 'mnli' (choose from"),
        (("--task_name", "rte"), "Give either `--data_dir` or `--dataset_name`."),
        (
            ("--task_name", "rte", "--data_dir", "d", "--validation_fraction", "1.5"),
            "`--validation_fraction` must be between 0 and 1, got 1.5.",
        ),
        (("--task_name", "rte", "--data_dir", "d", "--max_seq_length", "0"), "`--max_seq_length` must be at least 1"),
        (
            ("--task_name", "rte", "--data_dir", "d", "--validation_split", "test"),
            "`--validation_split` is for `--dataset_name`; `--data_dir` has a file for each split.",
        ),
    ],
)
def test_errors_of_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments((TaskArguments, GLUEArguments), "GLUE.", ["--do_eval", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--do_eval"], "Without `--do_train` there must be a trained model"),
        (["--do_train", "--architecture", "bert", "--layout", "release"], r"alone, got .*`--layout`"),
        (["--do_eval", "--architecture", "bert"], r"for rte, with the labels \['entailment', .* got .*bert"),
    ],
)
def test_errors_of_models(glue, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(glue, "rte", tmp_path, "--bert_name_or_path", str(glue / "bert"), *arguments)


def test_sentences_to_train_on_run_out(tmp_path):
    with pytest.raises(ValueError, match="CoLA has too few sentences .* 5,000 validation examples"):
        write_glue(tmp_path, num_train=10, num_validation=5000)


def test_sentences_that_are_trained_on_are_not_evaluated(glue, tmp_path):
    sentences = [example.sentence1 for example in read_glue(glue / "CoLA" / "train.tsv", "cola")][:40]
    dataset = datasets.Dataset.from_dict({"sentence": sentences, "label": [0, 1] * 20})
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    dataset.select(range(10)).to_parquet(tmp_path / "data" / "validation.parquet")
    both = TaskArguments(do_train=True, do_eval=True)
    for train, validation, message in (
        ("train", "train", "got train and train, which share 40"),
        ("train", "train[:10]", r"got train and train\[:10\], which share 10"),
        ("train[:80%]", "train[75%:]", "which share 2"),
        ("train[:50%]+train[60%:]", "train[40%:60%]", "which share 4"),
        ("train[:90%]+validation", "validation", "which share 10"),
    ):
        splits = {"train_split": train, "validation_split": validation}
        with pytest.raises(ValueError, match=message):
            load_splits(both, GLUEArguments("cola", dataset_name=str(tmp_path), **splits))
    for train, validation in (("train[:75%]", "train[75%:]"), ("train[:40%]+train[60%:]", "train[40%:60%]")):
        apart = {"train_split": train, "validation_split": validation}
        splits = load_splits(both, GLUEArguments("cola", dataset_name=str(tmp_path), **apart))
        assert sorted(example.sentence1 for own in splits.values() for example in own) == sorted(sentences)
    missing = {"train_split": "train[:75%]+other", "validation_split": "train[75%:]"}
    with pytest.raises(ValueError, match=r"no training data: expected a split 'train\[:75%\]\+other'"):
        load_splits(both, GLUEArguments("cola", dataset_name=str(tmp_path), **missing))


def test_a_model_of_another_task_or_architecture_is_refused(glue, bert_on_rte, tmp_path):
    bert = ("--architecture", "bert", "--bert_name_or_path")
    with pytest.raises(ValueError, match=r"for cola, with the labels \['unacceptable', .* got .* \['entailment'"):
        run(glue, "cola", tmp_path, "--do_eval", *bert, str(bert_on_rte))
    config = json.loads((bert_on_rte / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "interbert"}))
    with pytest.raises(ValueError, match="needs a BERT, of model_type 'bert', got .*other of 'interbert'"):
        run(glue, "rte", tmp_path / "out", "--do_train", *bert, str(tmp_path / "other"))


def test_measures_by_hand():
    # Answers 1, 0, 1, 1 for 1, 0, 0, 1: one false positive.
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    results = measure(logits, [1, 0, 0, 1], "rte")
    losses = [math.log(1 + math.exp(-margin)) for margin in (1, 2, -3, 1)]
    assert results == pytest.approx(
        {"eval_loss": sum(losses) / 4, "eval_accuracy": 0.75, "majority_accuracy": 0.5}, rel=1e-5
    )
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = 2 / sqrt(3 * 2 * 2 * 1)
    assert measure(logits, [1, 0, 0, 1], "cola")["eval_matthews_correlation"] == pytest.approx(2 / math.sqrt(12))
    # Pearson: sum of products of the deviations (-1.5, -0.5, 2) and (-2, 0, 2), 7, over sqrt(6.5 * 8).
    results = measure(torch.tensor([[1.0], [2.0], [4.5]]), [0.0, 2.0, 4.0], "stsb")
    assert results == pytest.approx(
        {"eval_loss": (1 + 0 + 0.25) / 3, "eval_pearson": 7 / math.sqrt(52), "eval_spearmanr": 1}, rel=1e-5
    )


def test_answers_as_the_server_takes_them():
    assert answer_texts([0, 1], "rte") == ["entailment", "not_entailment"]
    assert answer_texts([0, 1], "cola") == answer_texts([0, 1], "sst2") == ["0", "1"]
    assert answer_texts([-0.25, 2.34567, 5.5], "stsb") == ["0.000", "2.346", "5.000"]


def test_recipes():
    types = (TaskArguments, ModelArguments, GLUEArguments, TrainingArguments, OutputArguments)
    command = ["--do_train", "--task_name", "rte", "--data_dir", "d", "--model_name_or_path", "m", "--output_dir", "o"]

    def parse(*names: str):
        recipes = [str(RECIPES / f"{name}.yaml") for name in names]
        _, _, args, training, _ = parse_arguments(types, "GLUE.", [*command, "--recipe", *recipes])
        return args.max_seq_length, *(
            getattr(training, name)
            for name in ("learning_rate", "per_device_train_batch_size", "num_train_epochs", "ema_decay")
        )

    assert parse("glue") == (128, 2e-5, 128, 3, 0.9999)
    assert parse("glue", "glue_small") == (128, 5e-5, 16, 2, 0.9999)
