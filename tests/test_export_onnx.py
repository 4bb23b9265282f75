import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from model_fixtures import assert_close, task_model, tiny_inputs

from modeling_interbert import InterBERTForImageRetrieval, InterBERTForPreTraining, InterBERTForVQA

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "export_onnx.py"


def run_script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("task", "saved_class", "model_class"),
    [
        ("image-retrieval", InterBERTForPreTraining, InterBERTForImageRetrieval),
        ("visual-question-answering", InterBERTForVQA, InterBERTForVQA),
    ],
)
def test_exported_models_agree_with_pytorch(task, saved_class, model_class, tmp_path):
    saved = task_model(saved_class)
    saved.save_pretrained(tmp_path / "model")
    result = run_script(tmp_path / "model", tmp_path / "onnx" / "model.onnx", "--task", task)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    model = model_class.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model(**tiny_inputs())
    assert [output.name for output in session.get_outputs()] == list(expected)
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in tiny_inputs().items()})
    for output, name in zip(outputs, expected, strict=True):
        assert_close(torch.from_numpy(output), expected[name])


def test_a_head_without_weights_is_not_exported(tmp_path):
    task_model(InterBERTForPreTraining).save_pretrained(tmp_path / "model")
    result = run_script(tmp_path / "model", tmp_path / "model.onnx", "--task", "visual-question-answering")
    assert result.returncode == 1 and not (tmp_path / "model.onnx").exists()
    assert "has no weights for --task visual-question-answering: vqa_head.0.bias" in result.stderr


def test_nothing_is_written_where_the_outputs_differ(tmp_path):
    task_model(InterBERTForImageRetrieval).save_pretrained(tmp_path / "model")
    result = run_script(tmp_path / "model", tmp_path / "onnx" / "model.onnx", "--tolerance", 0)
    assert result.returncode == 1
    assert "more than --tolerance 0.0e+00: nothing was written." in result.stderr
    assert not list((tmp_path / "onnx").iterdir())
