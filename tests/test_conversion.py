"""Checkpoints of the authors' release: `fixtures/parity` holds two small ones with what the release computes."""

import json
import os
import pickle
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from model_fixtures import assert_close
from safetensors.torch import load_file

from modeling_interbert import (
    InterBERTForImageRetrieval,
    InterBERTForMultipleChoice,
    InterBERTForPreTraining,
    InterBERTForVQA,
    InterBERTModel,
)
from modeling_interbert.conversion import (
    convert_original_checkpoint,
    convert_original_config,
    convert_original_state_dict,
)

PARITY = Path(__file__).parent / "fixtures" / "parity"
SCRIPT = Path(__file__).parent.parent / "examples" / "convert_original_checkpoint.py"
LAYOUTS = ["released_layout", "paper_layout"]


def checkpoint_files(layout):
    return PARITY / layout / "pretraining_checkpoint.bin", PARITY / layout / "original_config.json"


def original_state_dict(layout):
    return torch.load(checkpoint_files(layout)[0], weights_only=True)


def original_config(layout):
    return json.loads(checkpoint_files(layout)[1].read_text())


def parity_data(layout):
    """The model's inputs, its labels for all pairs, and what the release computes."""
    data = load_file(PARITY / layout / "io.safetensors")
    inputs = {
        name: data[name]
        for name in ("input_ids", "token_type_ids", "attention_mask", "region_features", "region_boxes")
    }
    inputs["region_attention_mask"] = data["region_mask"]
    labels = {
        "labels": data["mlm_labels"],
        "region_targets": data["region_targets"],
        # Regions of mismatched pairs are not scored, by the paper and by the release.
        "region_target_mask": data["region_labels_mask"] * (data["itm_labels"] == 0)[:, None],
        "itm_labels": data["itm_labels"],
    }
    expected = {name.removeprefix("expected."): tensor for name, tensor in data.items() if "expected." in name}
    return inputs, labels, expected


@pytest.fixture(scope="module")
def converted():
    return {layout: convert_original_checkpoint(*checkpoint_files(layout)) for layout in LAYOUTS}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_outputs_are_those_of_the_release(converted, layout, attn_implementation):
    inputs, _, expected = parity_data(layout)
    model = converted[layout]
    model.set_attn_implementation(attn_implementation)
    is_token, is_region = inputs["attention_mask"].bool(), inputs["region_attention_mask"].bool()
    is_image_position = torch.nn.functional.pad(is_region, (1, 0), value=True)

    outputs = model.interbert(**inputs)
    assert_close(outputs.text_last_hidden_state[is_token], expected["text_last_hidden_state"][is_token])
    assert_close(
        outputs.vision_last_hidden_state[is_image_position],
        expected["vision_last_hidden_state"][is_image_position],
    )
    assert_close(outputs.text_pooler_output, expected["text_pooled"])
    assert_close(outputs.vision_pooler_output, expected["vision_pooled"])

    outputs = model(**inputs)
    assert_close(outputs.mlm_logits[is_token], expected["mlm_logits"][is_token])
    # The release also scores the whole image, at position 0.
    assert_close(outputs.region_logits[is_region], expected["region_logits"][:, 1:][is_region])
    assert_close(outputs.itm_logits, expected["itm_logits"])


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_losses_are_those_of_the_release(converted, layout, attn_implementation):
    inputs, labels, expected = parity_data(layout)
    model = converted[layout]
    model.set_attn_implementation(attn_implementation)

    outputs = model(**inputs, **labels)
    assert_close(outputs.mlm_loss, expected["loss_text_all_pairs"][0])
    assert_close(outputs.region_loss, expected["loss_region"][0])
    assert_close(outputs.itm_loss, expected["loss_itm"][0])
    total = expected["loss_text_all_pairs"] + expected["loss_region"] + expected["loss_itm"]
    assert_close(outputs.loss, total[0])
    assert_close(outputs.mlm_logits, expected["mlm_logits"][labels["labels"] != -100])
    assert_close(outputs.region_logits, expected["region_logits"][:, 1:][labels["region_target_mask"] == 1])

    matched = (labels["itm_labels"] == 0)[:, None]
    outputs = model(**inputs, labels=labels["labels"].where(matched, -100))
    assert_close(outputs.mlm_loss, expected["loss_text_matched_pairs"][0])
    # Else this would be the same number twice.
    assert not torch.allclose(expected["loss_text_matched_pairs"], expected["loss_text_all_pairs"], atol=1e-3)


def test_every_weight_comes_from_the_checkpoint():
    config = convert_original_config(original_config("released_layout"))
    with torch.device("meta"):
        model = InterBERTForPreTraining(config)
    state_dict = convert_original_state_dict(original_state_dict("released_layout"), config)
    shapes = {name: weight.shape for name, weight in state_dict.items()}
    assert shapes == {name: weight.shape for name, weight in model.state_dict().items()}


def test_names_behind_module():
    """Runs on several GPUs write `module.` before every name; heads that no task uses are left out."""
    config = convert_original_config(original_config("paper_layout"))
    original = original_state_dict("paper_layout")
    expected = convert_original_state_dict(original, config)
    parallel = {f"module.{name}": weight for name, weight in original.items()}
    parallel["module.vision_logit.weight"] = torch.zeros(1, 48)
    parallel["module.linguisic_logit.bias"] = torch.zeros(1)
    state_dict = convert_original_state_dict(parallel, config)
    assert state_dict.keys() == expected.keys()
    assert all(torch.equal(state_dict[name], expected[name]) for name in expected)


def test_missing_config_keys_have_the_releases_defaults():
    config = convert_original_config({})
    assert (config.num_hidden_layers, config.num_text_layers, config.num_vision_layers) == (6, 6, 6)
    assert (config.num_attention_heads, config.vision_num_attention_heads) == (12, 8)
    assert (config.hidden_dropout_prob, config.vision_hidden_dropout_prob) == (0.1, 0.2)
    assert (config.attention_probs_dropout_prob, config.vision_attention_probs_dropout_prob) == (0.1, 0.1)
    assert (config.fusion, config.region_objective) == ("mul", "soft_class")
    with torch.device("meta"):
        model = InterBERTForPreTraining(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 157_021_565


def test_config_keys():
    config = convert_original_config(
        {
            "num_hidden_layers": 3,
            "t_num_hidden_layers": 1,
            "v_num_hidden_layers": 2,
            "v_feature_size": 32,
            "v_target_size": 11,
            "bi_hidden_size": 40,
            "v_intermediate_size": 64,
            "fusion_method": "sum",
            "pooling_method": "mul",
            "predict_feature": True,
        }
    )
    assert (config.num_hidden_layers, config.num_text_layers, config.num_vision_layers) == (3, 1, 2)
    assert (config.region_feature_size, config.num_region_classes, config.pooler_size) == (32, 11, 40)
    assert (config.intermediate_size, config.vision_intermediate_size) == (3072, 64)
    assert (config.fusion, config.region_objective) == ("sum", "feature")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"v_hidden_size": 1024}, "`v_hidden_size` must equal `hidden_size`, .* got 1024 and 768."),
        ({"v_hidden_act": "relu"}, "`v_hidden_act` must equal `hidden_act`, .* got 'relu' and 'gelu'."),
    ],
)
def test_streams_that_do_not_fit_together_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        convert_original_config(values)


def without_a_layer_norm(state_dict, config):
    del state_dict["bert.v_embeddings.LayerNorm.bias"]


def with_a_stranger(state_dict, config):
    state_dict["bert.encoder.c_layer.0.weight"] = torch.zeros(2)


def with_one_vision_layer_more_in_the_config(state_dict, config):
    config["v_num_hidden_layers"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_layer_norm, "Missing parameters: bert.v_embeddings.LayerNorm.bias. Unknown parameters: none."),
        (with_a_stranger, "Missing parameters: none. Unknown parameters: bert.encoder.c_layer.0.weight."),
        (with_one_vision_layer_more_in_the_config, "Missing parameters: bert.encoder.v_layer.1.attention.output.Lay"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change, message):
    state_dict, config = original_state_dict("released_layout"), original_config("released_layout")
    change(state_dict, config)
    with pytest.raises(ValueError, match=re.escape(f"does not fit its configuration. {message}")):
        convert_original_state_dict(state_dict, convert_original_config(config))


class Payload:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"bert.embeddings": Payload(str(tmp_path / "executed"))}, tmp_path / "checkpoint.bin")
    with pytest.raises(pickle.UnpicklingError):
        convert_original_checkpoint(tmp_path / "checkpoint.bin", checkpoint_files("paper_layout")[1])
    assert not (tmp_path / "executed").exists()


@torch.no_grad()
def test_script(tmp_path, monkeypatch, capsys):
    checkpoint, config = checkpoint_files("released_layout")
    parallel = {f"module.{name}": weight for name, weight in original_state_dict("released_layout").items()}
    torch.save(parallel, tmp_path / "pytorch_model_9.bin")
    output_dir = tmp_path / "converted"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "pytorch_model_9.bin"), str(config), str(output_dir)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    num_parameters = sum(weight.numel() for name, weight in parallel.items() if "predictions.decoder" not in name)
    assert f"{num_parameters:,} parameters written to {output_dir}" in capsys.readouterr().out

    model, info = InterBERTForPreTraining.from_pretrained(output_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs, labels, expected = parity_data("released_layout")
    outputs = model(**inputs, **labels)
    assert_close(outputs.itm_logits, expected["itm_logits"])
    assert_close(outputs.mlm_loss, expected["loss_text_all_pairs"][0])
    assert_close(outputs.region_loss, expected["loss_region"][0])


def test_weights_of_other_shapes_are_refused(tmp_path):
    folder = PARITY / "paper_layout"
    config = json.loads((folder / "original_config.json").read_text()) | {"bi_hidden_size": 33}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = r"`interbert.text_pooler.dense.weight` must have shape \(33, 48\), got \(32, 48\)"
    with pytest.raises(ValueError, match=message):
        convert_original_checkpoint(folder / "pretraining_checkpoint.bin", tmp_path / "config.json")


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    torch.save([1], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="must hold a state dict, got list"):
        convert_original_checkpoint(tmp_path / "list.bin", PARITY / "paper_layout" / "original_config.json")


TASK_CLASSES = {
    "vqa_logits": InterBERTForVQA,
    "itm_logits": InterBERTForImageRetrieval,
    "choice_logit": InterBERTForMultipleChoice,
}


def task_outputs(model, key, layout):
    inputs = parity_data(layout)[0]
    if key == "choice_logit":  # one choice per pair
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            inputs[name] = inputs[name][:, None]
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.itm_logits if key == "itm_logits" else outputs.logits


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("key", TASK_CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_task_model_reproduces_the_release(layout, key, attn_implementation):
    checkpoint = PARITY / layout / "vl_tasks_checkpoint.bin"
    model = convert_original_checkpoint(checkpoint, checkpoint_files(layout)[1], TASK_CLASSES[key])
    model.set_attn_implementation(attn_implementation)
    assert_close(task_outputs(model, key, layout), parity_data(layout)[2][f"vl.{key}"])


def test_a_pretraining_checkpoint_has_no_task_heads():
    with pytest.raises(ValueError, match="no weights for InterBERTForMultipleChoice's choice_head.weight"):
        convert_original_checkpoint(*checkpoint_files("paper_layout"), InterBERTForMultipleChoice)


def test_script_writes_every_head_into_one_checkpoint(tmp_path, monkeypatch):
    checkpoint = PARITY / "paper_layout" / "vl_tasks_checkpoint.bin"
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), str(checkpoint), str(checkpoint_files("paper_layout")[1]), str(tmp_path)]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    for model_class in (InterBERTModel, InterBERTForPreTraining):
        assert not model_class.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"]
    for key, model_class in TASK_CLASSES.items():
        model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert_close(task_outputs(model, key, "paper_layout"), parity_data("paper_layout")[2][f"vl.{key}"])
    assert model.config.num_labels == 5 and model.config.vqa_head == "linear"


def test_script_writes_one_class(tmp_path, monkeypatch):
    checkpoint, config = PARITY / "released_layout" / "vl_tasks_checkpoint.bin", checkpoint_files("released_layout")[1]
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), str(checkpoint), str(config), str(tmp_path), "--model_class", "InterBERTForVQA"]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    _, info = InterBERTForVQA.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
