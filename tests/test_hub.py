"""A saved checkpoint opens with transformers alone: from a folder, and over HTTP from a Hub-compatible server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import needs_hub, start_hub
from safetensors.torch import load_file
from transformers import BertTokenizer

from configuration_interbert import InterBERTConfig
from modeling_interbert import InterBERTForPreTraining
from processing import InterBERTProcessor

REPOSITORY = Path(__file__).resolve().parent.parent
PROCESSING_FILES = ("processing_interbert", "pipelines_interbert", "region_extractors", "region_operators")
PROCESSING_FILES += tuple(f"{name}_faster_rcnn" for name in ("configuration", "modeling", "losses", "image_processing"))
HUB_FILES = {
    f"{name}.py": REPOSITORY / name / f"{name}.py" for name in ("configuration_interbert", "modeling_interbert")
}
HUB_FILES |= {f"{name}.py": REPOSITORY / "processing" / f"{name}.py" for name in PROCESSING_FILES}

REGIONS = [
    {"features": [[1.0, 2.0, 3.0], [0.5, 0.0, 1.0]], "boxes": [[0, 0, 5, 5], [1, 2, 9, 8]], "width": 9, "height": 9},
    {"features": [[-1.0, 0.0, 3.0]], "boxes": [[0, 0, 10, 20]], "width": 10, "height": 20},
]

# Runs where the three packages cannot be imported: opens the checkpoint under every auto class, saves outputs and
# everything else that the test looks at, and saves the checkpoint again.
CLIENT = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("configuration_interbert", "modeling_interbert", "processing"):
            raise ModuleNotFoundError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import save_file
import transformers
from transformers import AutoConfig, AutoProcessor

checkpoint, output_dir = sys.argv[1:3]
config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
inputs = processor(text=["a red dog", "dog"], regions=json.loads(sys.argv[3]), return_tensors="pt")
report, outputs = {"config": config.to_dict()}, {}
models = {}
for name in config.auto_map.keys() - {"AutoConfig"}:
    auto_class = getattr(transformers, name)
    model, loading_info = auto_class.from_pretrained(checkpoint, trust_remote_code=True, output_loading_info=True)
    models[name] = model
    report[name] = {"class": type(model).__name__, "missing": sorted(loading_info["missing_keys"])}
    if not loading_info["missing_keys"]:
        with torch.no_grad():
            values = model.eval()(**inputs)
        outputs |= {f"{name}.{field}": value.contiguous() for field, value in values.items()}
model = models["AutoModelForPreTraining"]
model.save_pretrained(f"{output_dir}/again")
processor.save_pretrained(f"{output_dir}/again")
save_file(outputs, f"{output_dir}/outputs.safetensors")
with open(f"{output_dir}/report.json", "w") as file:
    json.dump(report, file)
"""


@pytest.fixture
def checkpoint(tmp_path) -> tuple[InterBERTForPreTraining, InterBERTProcessor]:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog"]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)})
    config = InterBERTConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_text_layers=1,
        num_vision_layers=1,
        num_attention_heads=2,
        vision_num_attention_heads=2,
        intermediate_size=24,
        vision_intermediate_size=24,
        max_position_embeddings=12,
        region_feature_size=3,
        num_region_classes=5,
        pooler_size=8,
    )
    model = InterBERTForPreTraining(config).eval()
    # Untrained LayerNorms and biases are all alike: a weight that is lost on the way would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, InterBERTProcessor(tokenizer, region_feature_size=3)


def run_client(checkpoint: str, output_dir: Path, environment: dict[str, str]) -> tuple[dict, dict[str, torch.Tensor]]:
    output_dir.mkdir()
    # The packages are installed in this environment: the client blocks them by name.
    subprocess.run(
        [sys.executable, "-c", CLIENT, checkpoint, str(output_dir), json.dumps(REGIONS)],
        check=True,
        cwd=output_dir,
        env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
    )
    return json.loads((output_dir / "report.json").read_text()), load_file(output_dir / "outputs.safetensors")


def check_client(model, processor, report: dict, outputs: dict[str, torch.Tensor], saved_again: Path):
    inputs = processor(text=["a red dog", "dog"], regions=REGIONS, return_tensors="pt")
    with torch.no_grad():
        expected = {f"AutoModel.{name}": value for name, value in model.interbert(**inputs).items()}
        expected |= {f"AutoModelForPreTraining.{name}": value for name, value in model(**inputs).items()}
        itm_logits = expected["AutoModelForPreTraining.itm_logits"]
    expected["AutoModelForZeroShotImageClassification.itm_logits"] = itm_logits
    expected["AutoModelForZeroShotImageClassification.match_scores"] = itm_logits.softmax(dim=-1)[:, 0]
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, atol=1e-6, rtol=1e-5)

    # A pretraining checkpoint has all of the first three; the others get a new head, and say so.
    missing = {
        "AutoModel": [],
        "AutoModelForPreTraining": [],
        "AutoModelForZeroShotImageClassification": [],
        "AutoModelForVisualQuestionAnswering": [f"vqa_head.{i}.{kind}" for i in (0, 3) for kind in ("bias", "weight")],
        "AutoModelForMultipleChoice": ["choice_head.bias", "choice_head.weight"],
        "AutoModelForSequenceClassification": ["classifier.bias", "classifier.weight"],
    }
    for name, weights in missing.items():
        class_name = model.config.auto_map[name].split(".")[-1]
        assert report[name] == {"class": class_name, "missing": weights}
    for name in ("hidden_size", "region_feature_size", "num_text_layers", "auto_map"):
        assert report["config"][name] == getattr(model.config, name)
    for name, source in HUB_FILES.items():
        assert (saved_again / name).read_bytes() == source.read_bytes(), name
    weights = load_file(saved_again / "model.safetensors")
    for name, value in model.state_dict().items():
        if name in weights:
            assert torch.equal(weights[name], value), name
    assert len(weights) == len(model.state_dict()) - 1  # the tied decoder is written once


@pytest.mark.parametrize("processor_last", [True, False])
def test_saved_folder_holds_the_code_of_the_repository(checkpoint, tmp_path, processor_last):
    model, processor = checkpoint
    for part in (model, processor) if processor_last else (processor, model):
        part.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == set(HUB_FILES)
    for name, source in HUB_FILES.items():
        assert (tmp_path / "saved" / name).read_bytes() == source.read_bytes(), name
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map == InterBERTConfig().auto_map


def test_saved_folder_opens_without_the_packages(checkpoint, tmp_path):
    model, processor = checkpoint
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    environment = dict(os.environ) | {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
    report, outputs = run_client(str(tmp_path / "saved"), tmp_path / "client", environment)
    check_client(model, processor, report, outputs, tmp_path / "client" / "again")


@needs_hub
def test_pushed_checkpoint_opens_over_http_without_the_packages(checkpoint, tmp_path):
    model, processor = checkpoint
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    push = f"""
from modeling_interbert import InterBERTForPreTraining
from processing import InterBERTProcessor
InterBERTForPreTraining.from_pretrained({str(tmp_path / "saved")!r}).push_to_hub("org/tiny")
InterBERTProcessor.from_pretrained({str(tmp_path / "saved")!r}).push_to_hub("org/tiny")
"""
    with start_hub(tmp_path / "hub") as hub:
        subprocess.run(
            [sys.executable, "-c", push], check=True, cwd=REPOSITORY, env=hub.env(home=tmp_path / "pusher_home")
        )
        report, outputs = run_client("org/tiny", tmp_path / "client", hub.env(home=tmp_path / "client_home"))
    check_client(model, processor, report, outputs, tmp_path / "client" / "again")


def test_the_client_is_really_without_the_packages(tmp_path):
    """Guards the tests above: their blocker blocks."""
    code = CLIENT.split("import torch")[0] + "import modeling_interbert"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0 and "must not be needed" in result.stderr
