"""
Every command and snippet of the README and of docs/, run as it stands in a folder where the names that they use are
tiny: checkpoints, datasets and a configuration of one CPU in the place of eight GPUs.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel

from configuration_interbert import InterBERTConfig
from generate_scenes import REGION_FEATURE_SIZE, write_scenes
from mine_hard_negatives import main as mine
from modeling_interbert import InterBERTForPreTraining, InterBERTForVQA
from processing import InterBERTProcessor

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
# A page goes on where others have ended.
READ_FIRST = {
    "docs/pretraining.md": ["docs/data.md"],
    "docs/finetuning.md": ["docs/data.md", "docs/pretraining.md"],
    "docs/recall.md": ["docs/data.md"],
}
# What takes long, serves a page or talks to the Hub is left out of a script; tests of their own run these parts.
LEFT_OUT = {
    "export_onnx.py": {
        "export": lambda model, path: path.with_name(f"{path.name}.data").touch() or path.touch(),
        "largest_difference": lambda model, path: 0.0,
    },
    "app.py": {"build_page": Mock()},
    "push_space.py": {"HfApi": Mock()},
}
# What makes the paper's runs short.
SHORT = {
    "run_pretrain.py": "--max_train_steps 2 --per_device_train_batch_size 2 --retrieval_eval_size 4",
    "run_image_retrieval.py": "--max_train_steps 2 --max_eval_samples 4",
    "run_vqa.py": "--max_train_steps 2 --max_eval_samples 4 --max_predict_samples 4",
    "run_vcr.py": "--max_train_steps 2 --max_eval_samples 4",
    "run_glue.py": "--max_train_steps 2 --max_eval_samples 4",
    "train_region_detector.py": "--max_train_steps 2 --max_eval_samples 4 --shortest_edge 64 --anchor_sizes 16",
}


def read_blocks(page: str) -> list[tuple[str, str]]:
    """Languages and texts of the blocks of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (REPOSITORY / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)


def read_commands(block: str) -> list[str]:
    """The commands of a shell block, without comments; a parenthesis that several lines share is one command."""
    text = re.sub(r"\s*\\\n\s*", " ", block)
    commands: list[str] = []
    for line in text.splitlines():
        line = re.sub(r"\s+#.*", "", line)
        if commands and commands[-1].count("(") > commands[-1].count(")"):
            commands[-1] += f"\n{line}"
        elif line.strip():
            commands.append(line)
    return commands


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """The folder where the commands run."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    scenes = folder / "outputs" / "quickstart" / "scenes"
    write_scenes(scenes, num_train=40, num_validation=8, num_test=8)
    tokenizer = AutoTokenizer.from_pretrained(scenes / "tokenizer")
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    BertModel(bert).save_pretrained(folder / "bert-base-uncased")
    tokenizer.save_pretrained(folder / "bert-base-uncased")
    config = InterBERTConfig.from_bert_config(
        bert, layout="release", region_feature_size=REGION_FEATURE_SIZE, num_region_classes=48
    )
    model = InterBERTForPreTraining(config)
    processor = InterBERTProcessor(tokenizer, region_feature_size=REGION_FEATURE_SIZE)
    for name in ("outputs/quickstart/model", "org/interbert-base"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    for split in ("train", "validation", "test"):
        with pytest.MonkeyPatch.context() as context:
            regions = str(folder / "org" / "my-regions")
            context.setattr(sys, "argv", ["mine", str(scenes), regions, "--num_negatives", "3", "--split", split])
            mine()
    (folder / "photographs").mkdir()
    names = ["beach", "kitchen", *(f"street-{number}" for number in range(8))]
    for name in names:
        Image.effect_noise((60, 48), 90).save(folder / "photographs" / f"{name}.png")
    (folder / "captions.json").write_text(json.dumps({name: [f"the {name}", f"a {name}"] for name in names}))
    parity = REPOSITORY / "tests" / "fixtures" / "parity"
    (folder / "frcnn-vg-finetuned").symlink_to(parity / "detector")
    config = InterBERTConfig.from_bert_config(bert, layout="release", region_feature_size=128, num_region_classes=13)
    InterBERTForPreTraining(config).save_pretrained(folder / "org" / "my-interbert")
    InterBERTProcessor(tokenizer, region_feature_size=128).save_pretrained(folder / "org" / "my-interbert")
    config.region_detector = {"name_or_path": "frcnn-vg-finetuned"}
    InterBERTForVQA(config).save_pretrained(folder / "org" / "interbert-base-vqa2")
    InterBERTProcessor(tokenizer, region_feature_size=128).save_pretrained(folder / "org" / "interbert-base-vqa2")
    (folder / "org" / "flickr30k-regions").symlink_to(folder / "org" / "my-regions")
    (folder / "CHECKPOINT.bin").symlink_to(parity / "released_layout" / "pretraining_checkpoint.bin")
    (folder / "CONFIG.json").symlink_to(parity / "released_layout" / "original_config.json")
    return folder


def run_script(words: list[str], capsys):
    """Runs a script in this process."""
    script = Path(words[0]).name
    module = importlib.import_module(script.removesuffix(".py"))
    words = [word for word in words if word != "--push_to_hub"] + shlex.split(SHORT.get(script, ""))
    with pytest.MonkeyPatch.context() as context:
        context.setenv("ACCELERATE_USE_CPU", "true")
        context.setattr(sys, "argv", words)
        for name, stand_in in LEFT_OUT.get(script, {}).items():
            context.setattr(module, name, stand_in)
        module.main()
    capsys.readouterr()


def run_command(command: str, capsys):
    if command.startswith("("):
        subprocess.run(["bash", "-c", command], check=True)
        return
    words = shlex.split(command)
    if words[0] == "make":
        read_make(words[1])
    elif words[:2] == ["accelerate", "launch"]:
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        if "--config_file" in words[:script]:
            assert "num_processes" in yaml.safe_load(Path(words[words.index("--config_file") + 1]).read_text())
        run_script(words[script:], capsys)
    else:
        assert words[0] == "python", command
        run_script(words[1:], capsys)


def read_make(target: str) -> list[str]:
    """The commands of a target, and of those that it needs."""
    command = ["make", "--dry-run", "--always-make", "--directory", str(REPOSITORY), target]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.replace("\\\n", "").splitlines()


def test_make_demo_trains_and_opens_what_it_names(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    (workplace / "outputs" / "quickstart" / "vqa_model").mkdir(exist_ok=True)
    scripts = [shlex.split(line) for line in read_make("demo") if "examples/" in line]
    scripts = [words[next(i for i, word in enumerate(words) if word.startswith("examples/")) :] for words in scripts]
    assert [words[0] for words in scripts] == ["examples/quickstart.py", "examples/run_vqa.py", "examples/app.py"]
    for words in scripts[1:]:  # the model and the scenes of the first are there
        run_script(words, capsys)


def run_page(page: str, capsys):
    for folder in Path().glob("interbert-*"):  # what another page has trained
        shutil.rmtree(folder)
    scope: dict = {}
    for language, block in read_blocks(page):
        if language == "bash":
            for command in read_commands(block):
                run_command(command, capsys)
        elif language == "python":
            exec(compile(block, page, "exec"), scope)


@pytest.fixture(scope="module")
def pages_run() -> set[str]:
    return set()


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_snippets_run(page, workplace, pages_run, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for one in [*READ_FIRST.get(page, []), page]:
        if one not in pages_run:
            run_page(one, capsys)
            pages_run.add(one)


def test_blocks_are_found():
    blocks = {page: [language for language, _ in read_blocks(page)] for page in PAGES}
    assert all("bash" in languages or "python" in languages for languages in blocks.values())
    assert {language for languages in blocks.values() for language in languages} <= {"bash", "python", "json", "bibtex"}
    assert read_commands("a b \\\n  c  # why\n\n(x;\n  y) > z\nd\n") == ["a b c", "(x;\n  y) > z", "d"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (REPOSITORY / page).read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (REPOSITORY / page).parent.joinpath(target).is_file(), target
    for name in re.findall(r"`examples/([\w/]+\.(?:py|yaml))`", text):
        assert (REPOSITORY / "examples" / name).is_file(), name


def test_readme_names_every_page():
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    assert all(f"]({page})" in readme for page in PAGES[1:])
