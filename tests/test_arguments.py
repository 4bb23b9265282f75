"""Arguments from recipes and from the command line."""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
from transformers import SchedulerType

from arguments import parse_arguments, to_recipe
from configuration_interbert import InterBERTConfig
from model_loading import ModelArguments
from run_image_retrieval import ARGUMENT_CLASSES as RETRIEVAL
from run_pretrain import DataArguments, ObjectiveArguments
from training import OutputArguments, TrainingArguments

RECIPES = Path(__file__).resolve().parent.parent / "examples" / "recipes"
PRETRAINING = (ModelArguments, DataArguments, ObjectiveArguments, TrainingArguments, OutputArguments)


@dataclass
class Numbers:
    count: int = field(metadata={"help": "How many."})
    rate: float = 0.5
    names: list[str] = field(default_factory=lambda: ["a"])
    flag: bool = False
    choice: str = field(default="x", metadata={"choices": ["x", "y"]})
    scheduler: SchedulerType = SchedulerType.LINEAR

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"`--count` must not be negative, got {self.count}.")


def parse(*arguments: str) -> Numbers:
    return parse_arguments((Numbers,), "Numbers.", arguments)[0]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_command_line_wins_over_recipes_and_the_later_recipe_over_the_earlier(tmp_path):
    first = write(tmp_path / "first.yaml", "count: 3\nrate: 1e-4\nnames: [b, 'c,d']\nflag: true\n")
    second = write(tmp_path / "second.yaml", "# a comment\ncount: 4\nscheduler: cosine\nchoice: null\n")
    args = parse("--recipe", first, second, "--names", "e", "--choice", "y")
    assert args == Numbers(count=4, rate=1e-4, names=["e"], flag=True, choice="y", scheduler=SchedulerType.COSINE)
    assert parse("--recipe", second, first).names == ["b", "c,d"]
    repeated = parse("--recipe", second, "--choice", "y", "--recipe", first)
    assert (repeated.count, repeated.scheduler, repeated.choice) == (3, SchedulerType.COSINE, "y")
    assert parse("--count", "1") == Numbers(count=1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("count: 1\ncuont: 2\n", "expected arguments of this script, got cuont"),
        ("- count\n", "expected names and values of arguments, got ['count']"),
        ("count: [\n", "expected a YAML file"),
        ("count: many\n", "argument --count: invalid int value: 'many'"),
        ("count: 1\nchoice: z\n", "argument --choice: invalid choice: 'z'"),
        ("count: -1\n", "`--count` must not be negative, got -1."),
        ("rate: 1\n", "the following arguments are required: --count"),
    ],
)
def test_bad_recipes(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit):
        parse("--recipe", write(tmp_path / "recipe.yaml", text))
    assert message in capsys.readouterr().err


def test_a_missing_recipe(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--recipe", str(tmp_path / "none.yaml"))
    assert "none.yaml: expected a YAML file" in capsys.readouterr().err


def pretraining_arguments(*recipes: Path):
    paths = [str(path) for path in recipes]
    command = ["--recipe", *paths, "--dataset_name", "data", "--output_dir", "out"]
    if not any("\nbert_name_or_path:" in path.read_text() for path in recipes):
        command += ["--bert_name_or_path", "bert"]
    return parse_arguments(PRETRAINING, "Pretrain.", command)


def test_the_paper_s_recipe():
    model, data, objectives, training, _ = pretraining_arguments(RECIPES / "pretrain_base.yaml")
    assert (model.bert_name_or_path, model.layout) == ("bert-base-uncased", "paper")
    assert (training.learning_rate, training.num_warmup_steps, training.weight_decay) == (1e-4, 10000, 0.01)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-6)
    assert 8 * training.per_device_train_batch_size == 512
    assert (data.max_seq_length, data.max_regions) == (36, 36)
    assert sum(objectives.stage_epochs) == 20
    assert [objectives.objectives_of(epoch) for epoch in (0, 6, 7, 19)] == ["mlm,mom,itm"] * 2 + ["msm,mrm,itm"] * 2
    assert objectives.negative_shares_of(6)["hard_negative_share"] == 0
    assert objectives.negative_shares_of(7)["hard_negative_share"] == 0.5


@pytest.mark.parametrize(
    "name, epochs",
    [("pretrain_release", 20), ("one_stage_mlm_mom", 15), ("one_stage_msm_mrm", 15), ("two_stage", 15)],
)
def test_variants_of_the_paper_s_recipe(name, epochs):
    model, _, objectives, *_ = pretraining_arguments(RECIPES / "pretrain_base.yaml", RECIPES / f"{name}.yaml")
    assert sum(objectives.stage_epochs) == epochs
    assert model.layout == ("release" if name == "pretrain_release" else "paper")


@pytest.mark.parametrize("name", ["pretrain_chinese_wwm", "pretrain_chinese_macbert", "chinese_masking_schedule"])
def test_chinese_recipes(name):
    recipes = [RECIPES / f"{recipe}.yaml" for recipe in ("pretrain_base", "pretrain_chinese", name)]
    model, data, objectives, training, _ = pretraining_arguments(*recipes)
    assert "chinese" in model.bert_name_or_path and model.layout == "paper"
    assert (data.max_seq_length, data.max_regions, objectives.masking_unit) == (38, 16, "jieba")
    assert sum(objectives.stage_epochs) == 20 and training.learning_rate == 1e-4
    if name == "chinese_masking_schedule":
        assert [objectives.text_mask_probability_of(epoch, 20) for epoch in (0, 19)] == [0.30, 0.15]


def test_chinese_recipes_at_a_size_for_one_cpu():
    folder = RECIPES / "flickr8k_chinese"
    from_scratch = RECIPES / "flickr8k_from_scratch" / "pretrain.yaml"
    model, data, objectives, *_ = pretraining_arguments(from_scratch, folder / "pretrain.yaml")
    config = InterBERTConfig()
    config.update_from_string(model.config_overrides)
    assert (config.hidden_size, config.num_hidden_layers, config.vision_hidden_dropout_prob) == (256, 1, 0)
    assert [objectives.objectives_of(epoch) for epoch in (5, 6)] == ["mlm,mom,itm", "msm,mrm,itm"]
    command = ["--recipe", str(folder / "retrieval.yaml"), "--do_train", "--model_name_or_path", "model"]
    command += ["--dataset_name", "data", "--output_dir", "out"]
    _, _, retrieval, training, _ = parse_arguments(RETRIEVAL, "Retrieve.", command)
    assert (retrieval.negatives, retrieval.num_negatives, training.ema_decay) == ("images", 3, 0.9999)
    for name in ("caption_column", "max_seq_length", "max_regions"):
        assert getattr(retrieval, name) == getattr(data, name)
    # Finetuned on images that were not pretrained on.
    parts = [
        datasets.ReadInstruction.from_spec(split).to_absolute({"train": 6000})[0]
        for split in (data.train_split, retrieval.train_split)
    ]
    assert [(part.from_, part.to) for part in parts] == [(0, 4500), (4500, 6000)]


def test_recipes_to_be_compared_differ_in_the_objectives_alone():
    base = RECIPES / "flickr8k" / "pretrain.yaml"
    paths = [path for path in sorted((RECIPES / "flickr8k").glob("*.yaml")) if path != base]
    assert len(paths) == 4
    parsed = [pretraining_arguments(base, path) for path in paths]
    for model, data, objectives, training, output in parsed:
        assert (model, data, training, output) == (*parsed[0][:2], *parsed[0][3:])
        assert sum(objectives.stage_epochs) == 2
    assert len({str(objectives) for _, _, objectives, *_ in parsed}) == 4


def test_a_written_recipe_repeats_the_run(tmp_path):
    arguments = pretraining_arguments(RECIPES / "pretrain_base.yaml", RECIPES / "pretrain_release.yaml")
    recipe = write(tmp_path / "recipe.yaml", to_recipe(*arguments[:-1]))
    again = parse_arguments(PRETRAINING, "Pretrain.", ["--recipe", recipe, "--output_dir", "out"])
    assert again[:-1] == arguments[:-1]
