"""ONNX exports that compute what PyTorch does, or are not written."""

import shutil
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from model_fixtures import assert_close, task_model, tiny_inputs

import export_onnx
from modeling_interbert import InterBERTForImageRetrieval, InterBERTForPreTraining, InterBERTForVQA


def run_script(*arguments):
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", ["export_onnx.py", *map(str, arguments)])
        export_onnx.main()


def assert_agrees(folder: Path, model_class: type):
    """The model in `folder / "model"` and its export, `folder / "onnx" / "model.onnx"`."""
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    model = model_class.from_pretrained(folder / "model")
    with torch.no_grad():
        expected = model(**tiny_inputs())
    assert [output.name for output in session.get_outputs()] == list(expected)
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in tiny_inputs().items()})
    for output, name in zip(outputs, expected, strict=True):
        assert_close(torch.from_numpy(output), expected[name])


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A pretrained model that is exported for retrieval."""
    folder = tmp_path_factory.mktemp("exported")
    task_model(InterBERTForPreTraining).save_pretrained(folder / "model")
    run_script(folder / "model", folder / "onnx" / "model.onnx")
    return folder


def test_retrieval_agrees_with_pytorch(exported):
    assert_agrees(exported, InterBERTForImageRetrieval)


def test_vqa_agrees_with_pytorch(tmp_path):
    task_model(InterBERTForVQA).save_pretrained(tmp_path / "model")
    run_script(tmp_path / "model", tmp_path / "onnx" / "model.onnx", "--task", "visual-question-answering")
    assert_agrees(tmp_path, InterBERTForVQA)


def test_a_head_without_weights_is_not_exported(exported, tmp_path):
    with pytest.raises(SystemExit, match="no weights for --task visual-question-answering: vqa_head.0.bias"):
        run_script(exported / "model", tmp_path / "model.onnx", "--task", "visual-question-answering")
    assert not (tmp_path / "model.onnx").exists()


def test_nothing_is_written_where_the_outputs_differ(exported, tmp_path, monkeypatch):
    def copy_export(model, path):
        for file in (exported / "onnx").iterdir():
            shutil.copy(file, path.parent)

    monkeypatch.setattr(export_onnx, "export", copy_export)
    with pytest.raises(SystemExit, match=r"more than --tolerance 0\.0e\+00: nothing was written\."):
        run_script(exported / "model", tmp_path / "onnx" / "model.onnx", "--tolerance", 0)
    assert not list((tmp_path / "onnx").iterdir())
