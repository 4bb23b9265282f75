"""What holds for every model class, after the common model tests of transformers."""

import pytest
import torch
from model_fixtures import (
    MODEL_CLASSES,
    NO_DROPOUT,
    NUM_LABELS,
    NUM_REGIONS,
    NUM_TOKENS,
    assert_close,
    example_inputs,
    example_labels,
    scalar,
    task_model,
    tiny_config,
)

from modeling_interbert import (
    InterBERTForImageRetrieval,
    InterBERTForMultipleChoice,
    InterBERTForPreTraining,
    InterBERTForSequenceClassification,
    InterBERTModel,
)

pytestmark = pytest.mark.parametrize("model_class", MODEL_CLASSES, ids=lambda model_class: model_class.__name__)
attention = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])


def forward(model):
    return model(**example_inputs(type(model)), **example_labels(type(model)))


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    scalar(forward(model)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_save_and_load(model_class, tmp_path):
    model = task_model(model_class)
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for output, expected in zip(forward(loaded).to_tuple(), forward(model).to_tuple(), strict=True):
        assert_close(output, expected)


def test_any_checkpoint_opens_with_a_new_head(model_class, tmp_path):
    """The encoder's, here; heads that it does not have are new, and said to be."""
    base = task_model(InterBERTModel)
    base.save_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True, num_labels=NUM_LABELS)
    heads = {name for name in model.state_dict() if not name.startswith("interbert.")}
    if model_class is InterBERTModel:
        heads = set()
    if model_class is InterBERTForPreTraining:
        heads.remove("mlm_head.decoder.weight")  # tied to the word embeddings, which the checkpoint has
    assert set(info["missing_keys"]) == heads
    for name, value in base.state_dict().items():
        assert torch.equal(model.base_model.state_dict()[name], value), name


def test_the_initial_values_are_those_of_the_configuration(model_class):
    config = tiny_config(hidden_size=96, pooler_size=80, num_labels=60, pad_token_id=3, initializer_range=0.05)
    for name, parameter in model_class(config).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "layer_norm" in name:
            assert (parameter == 1).all(), name
        else:
            if "word_embeddings" in name:
                assert (parameter[3] == 0).all()
                parameter = torch.cat([parameter[:3], parameter[4:]])
            # The standard deviation of n draws is off by 1/sqrt(2n) of it (one sigma), their mean by 1/sqrt(n).
            tolerance = 5 * parameter.numel() ** -0.5
            assert parameter.std().item() == pytest.approx(0.05, rel=tolerance), name
            assert abs(parameter.mean().item()) < 0.05 * tolerance, name


def test_the_same_inputs_give_the_same_outputs(model_class):
    model = task_model(model_class)
    with torch.no_grad():
        for output, again in zip(forward(model).to_tuple(), forward(model).to_tuple(), strict=True):
            assert torch.equal(output, again)


def test_the_same_seed_gives_the_same_model_and_dropout(model_class):
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        model = model_class(tiny_config(num_labels=NUM_LABELS)).train()
        results.append(gradients(model))
    assert all(torch.equal(results[1][name], gradient) for name, gradient in results[0].items())
    assert not all(torch.equal(results[2][name], gradient) for name, gradient in results[0].items())


@attention
@torch.no_grad()
def test_a_sample_alone_gives_what_it_gives_in_a_padded_batch(model_class, attn_implementation):
    model = task_model(model_class, attn_implementation)
    inputs = example_inputs(model_class)
    together = model(**inputs)
    for i in range(3):
        num_tokens, num_regions = NUM_TOKENS[i], NUM_REGIONS[i]
        if model_class is InterBERTForMultipleChoice:
            num_tokens = max(NUM_TOKENS[i], NUM_TOKENS[2 - i])  # its two texts
        alone = {}
        for name, tensor in inputs.items():
            if name.startswith("region"):
                alone[name] = tensor[i : i + 1, :num_regions]
            else:
                alone[name] = tensor[i : i + 1, ..., :num_tokens]
        if model_class is not InterBERTForMultipleChoice:  # where the shorter of the two texts is padded still
            del alone["attention_mask"]
        alone.pop("region_attention_mask", None)
        lengths = {
            "text_last_hidden_state": num_tokens,
            "vision_last_hidden_state": num_regions + 1,
            "mlm_logits": num_tokens,
            "region_logits": num_regions,
        }
        for name, output in model(**alone).items():
            expected = together[name][i : i + 1]
            assert_close(output, expected[:, : lengths[name]] if name in lengths else expected)


def test_recorded_outputs(model_class):
    outputs = task_model(model_class)(**example_inputs(model_class), output_attentions=True, output_hidden_states=True)
    num_images = 0 if model_class is InterBERTForSequenceClassification else 6
    batch_size = 6 if model_class is InterBERTForMultipleChoice else 3
    shapes = {
        "interaction_hidden_states": [(batch_size, num_images + 7, 16)] * 3,
        "text_hidden_states": [(batch_size, 7, 16)] * 3,
        "image_hidden_states": [(batch_size, 6, 16)] if num_images else [],
        "interaction_attentions": [(batch_size, 2, num_images + 7, num_images + 7)] * 2,
        "text_attentions": [(batch_size, 2, 7, 7)] * 3,
        "image_attentions": [(batch_size, 4, 6, 6)] if num_images else [],
    }
    for name, expected in shapes.items():
        assert [tuple(recorded.shape) for recorded in outputs[name]] == expected, name
    plain = task_model(model_class)(**example_inputs(model_class))
    assert not any(name in plain for name in shapes)
    for name, output in plain.items():
        assert_close(outputs[name], output)


def test_tuples(model_class):
    model = task_model(model_class)
    inputs = example_inputs(model_class) | example_labels(model_class)
    for output, expected in zip(model(**inputs, return_dict=False), model(**inputs).to_tuple(), strict=True):
        assert torch.equal(output, expected)


@attention
def test_gradient_checkpointing_changes_no_gradient(model_class, attn_implementation):
    model = task_model(model_class, attn_implementation, **NO_DROPOUT).train()
    layers = [module for module in model.modules() if type(module).__name__ == "InterBERTLayer"]
    passes = []
    for layer in layers:
        layer.intermediate.register_forward_hook(lambda *_: passes.append(1))
    expected = gradients(model)
    num_passes = len(passes)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model)
    assert len(passes) == 3 * num_passes  # one without checkpointing; with it, each layer runs again on the way back
    assert set(checkpointed) == set(expected)
    for name, gradient in expected.items():
        assert_close(checkpointed[name], gradient)


def test_training_reduces_the_loss(model_class):
    model = task_model(model_class, **NO_DROPOUT).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = scalar(forward(model))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    image_parts = ("interbert.embeddings.image.", "interbert.vision_")
    assert all(name.startswith(image_parts) for name in unused)
    assert bool(unused) == (model_class is InterBERTForSequenceClassification)


@attention
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(model_class, dtype, attn_implementation):
    model = task_model(model_class, attn_implementation)
    expected = scalar(forward(model)).item()
    outputs = forward(model.to(dtype))
    assert scalar(outputs).item() == pytest.approx(expected, rel=0.1)
    for name, output in outputs.items():  # losses and probabilities are computed in float32
        assert output.dtype == (torch.float32 if "loss" in name or name == "match_scores" else dtype), name


@pytest.mark.parametrize("num_tokens", [33, 28])
@torch.no_grad()
def test_resized_vocabulary(model_class, num_tokens, tmp_path):
    model = task_model(model_class)
    inputs = example_inputs(model_class)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=27)
    expected = model(**inputs)
    model.resize_token_embeddings(num_tokens)
    model.save_pretrained(tmp_path)
    for resized in (model, model_class.from_pretrained(tmp_path)):
        assert resized.config.vocab_size == num_tokens
        assert resized.get_input_embeddings().weight.shape == (num_tokens, 16)
        for name, output in resized(**inputs).items():
            if name == "mlm_logits":
                assert output.shape[-1] == num_tokens
            assert_close(output[..., :28], expected[name][..., :28])
    inputs["input_ids"][..., 0] = num_tokens - 1
    model(**inputs)
    inputs["input_ids"][..., 0] = num_tokens
    with pytest.raises(IndexError):
        model(**inputs)


@torch.no_grad()
def test_only_what_the_poolers_need_is_computed(model_class):
    """In the last layer of each stream: position 0, where nothing but the pooled outputs is asked for."""
    model = task_model(model_class)
    rows = {}

    def count(name):
        def hook(module, args, output):
            rows[name] = args[0].shape[1]

        return hook

    encoder = model.base_model
    for stream in ("text_layers", "vision_layers"):
        for i, layer in enumerate(getattr(encoder, stream)):
            layer.intermediate.register_forward_hook(count((stream, i)))
    forward(model)
    needs_all = model_class in (InterBERTModel, InterBERTForPreTraining)
    expected = {("text_layers", 0): 7, ("text_layers", 1): 7, ("text_layers", 2): 7 if needs_all else 1}
    if model_class is not InterBERTForSequenceClassification:
        expected["vision_layers", 0] = 6 if needs_all else 1
    assert rows == expected


@torch.no_grad()
def test_no_head_of_the_pretraining_runs_for_a_match_score(model_class):
    heads = {type(module).__name__ for module in task_model(model_class).modules()}
    assert ("InterBERTPredictionHead" in heads) == (model_class is InterBERTForPreTraining)
    assert ("InterBERTMatchHead" in heads) == (model_class in (InterBERTForPreTraining, InterBERTForImageRetrieval))
