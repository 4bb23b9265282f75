import math
import re
from pathlib import Path

import pytest
import torch
from model_fixtures import (
    NO_DROPOUT,
    NUM_REGIONS,
    NUM_TOKENS,
    assert_close,
    tiny_config,
    tiny_inputs,
    tiny_labels,
    tiny_model,
    tiny_regions,
    tiny_text,
)
from torch import nn

import modeling_interbert.modeling_interbert as modeling_file
from configuration_interbert import InterBERTConfig
from modeling_interbert import InterBERTForPreTraining, InterBERTModel
from modeling_interbert.modeling_interbert import (
    InterBERTFusion,
    InterBERTImageEmbeddings,
    InterBERTTextEmbeddings,
    masked_language_modeling_loss,
    region_loss,
)

RECORDED = [
    f"{module}_{kind}" for module in ("interaction", "text", "image") for kind in ("hidden_states", "attentions")
]
OUTPUTS = ["text_last_hidden_state", "vision_last_hidden_state", "text_pooler_output", "vision_pooler_output"]


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def inputs_of(modalities):
    return {"text": tiny_text, "regions": tiny_regions, "both": tiny_inputs}[modalities]()


# --- Size and initial values ---


def test_paper_parameter_counts():
    """The paper's "173M parameters" leave out the text embeddings."""
    with torch.device("meta"):
        model = InterBERTForPreTraining(InterBERTConfig())
    assert num_parameters(model) == 199_548_797
    assert num_parameters(model.interbert) == 197_100_800
    assert num_parameters(model.interbert) - num_parameters(model.interbert.embeddings.text) == 173_263_616


def test_release_parameter_count():
    config = InterBERTConfig(num_hidden_layers=6, vision_num_attention_heads=8, vision_hidden_dropout_prob=0.2)
    with torch.device("meta"):
        model = InterBERTForPreTraining(config)
    assert num_parameters(model) == 157_021_565


@pytest.mark.parametrize("initializer_range", [0.02, 0.1])
def test_initialisation(initializer_range):
    config = tiny_config(
        vocab_size=200, hidden_size=64, region_feature_size=96, max_position_embeddings=80, pooler_size=80,
        intermediate_size=128, vision_intermediate_size=96, num_region_classes=70, region_embedding="mlp",
        pad_token_id=3, initializer_range=initializer_range,
    )  # fmt: skip
    num_matrices = 0
    for name, parameter in InterBERTForPreTraining(config).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "layer_norm" in name:
            assert (parameter == 1).all(), name
        elif "word_embeddings" in name:
            assert (parameter[3] == 0).all()
            assert parameter[4:].std().item() == pytest.approx(initializer_range, rel=0.06)
        elif parameter.numel() > 4000:
            num_matrices += 1
            # The standard deviation of 4,000 draws is off by 1.1 % (one sigma).
            assert parameter.std().item() == pytest.approx(initializer_range, rel=0.06), name
            assert abs(parameter.mean().item()) < initializer_range * 0.08, name
    assert num_matrices > 6 * (2 + 3 + 1)  # all matrices of every layer and more


# --- Embeddings, by hand ---


def recorded_input(module: nn.Module) -> list[torch.Tensor]:
    """Collects what is given to a module."""
    given = []
    module.register_forward_pre_hook(lambda module, arguments: given.append(arguments[0]))
    return given


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_position_0_is_the_mean_region_with_the_box_of_the_whole_image(masked, dtype, tolerance):
    embeddings = InterBERTImageEmbeddings(tiny_config(region_feature_size=2, **NO_DROPOUT))
    features, boxes = recorded_input(embeddings.feature_embeddings), recorded_input(embeddings.box_embeddings)
    output = embeddings(
        torch.tensor([[[1, 10], [3, 20], [8, 90]], [[2, 4], [500, 500], [-7, -7]]], dtype=dtype),
        torch.tensor([[[0.2, 0.4, 0.7, 0.8], [0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.9]]]).expand(2, 3, 4),
        torch.tensor([[1, 1, 1], [1, 0, 0]]) if masked else None,
    )
    second_mean = [2.0, 4.0] if masked else [165.0, 497 / 3]
    assert_close(features[0][:, 0].float(), torch.tensor([[4.0, 40.0], second_mean]), tolerance * 50)
    # Corners and area.
    expected_boxes = [
        [0.0, 0.0, 1.0, 1.0, 1.0],
        [0.2, 0.4, 0.7, 0.8, 0.2],
        [0.0, 0.5, 0.5, 1.0, 0.25],
        [0.5, 0.5, 0.5, 0.9, 0.0],
    ]
    assert_close(boxes[0], torch.tensor([expected_boxes] * 2), tolerance)
    expected = features[0] @ embeddings.feature_embeddings.weight.T + embeddings.feature_embeddings.bias
    expected += boxes[0] @ embeddings.box_embeddings.weight.T + embeddings.box_embeddings.bias
    assert_close(output, nn.functional.layer_norm(expected, (16,), eps=1e-12))


def test_text_embeddings():
    """Word, position and type tables added; the LayerNorm of (0, 2) is (−1, 1)."""
    config = tiny_config(hidden_size=2, num_attention_heads=1, vision_num_attention_heads=1, **NO_DROPOUT)
    embeddings = InterBERTTextEmbeddings(config)
    with torch.no_grad():
        for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.zero_()
        embeddings.word_embeddings.weight[5] = torch.tensor([0.0, 2.0])
        embeddings.position_embeddings.weight[1] = torch.tensor([0.0, 4.0])
        embeddings.token_type_embeddings.weight[1] = torch.tensor([9.0, 0.0])
    input_ids = torch.tensor([[5, 5, 5]])
    defaults = embeddings(input_ids, None, None, None)
    assert_close(defaults, torch.tensor([[[-1.0, 1.0]] * 3]))
    given = embeddings(input_ids, torch.tensor([[0, 0, 1]]), torch.tensor([[1, 0, 1]]), None)
    # (0, 6), (0, 2), (9, 6)
    assert_close(given, torch.tensor([[[-1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]]]))


def test_position_mlp_reads_the_position_as_a_share_of_the_longest_text():
    embeddings = InterBERTTextEmbeddings(tiny_config(text_position_embedding="mlp", max_position_embeddings=10))
    positions = recorded_input(embeddings.position_embeddings)
    embeddings(torch.tensor([[4, 5, 6], [7, 8, 9]]), None, None, None)
    embeddings(torch.tensor([[4, 5]]), None, torch.tensor([[3, 9]]), None)
    assert_close(positions[0], torch.tensor([[[0.0], [0.1], [0.2]]]))
    assert_close(positions[1], torch.tensor([[[0.3], [0.9]]]))
    assert [type(layer) for layer in embeddings.position_embeddings] == [
        nn.Linear,
        type(modeling_file.ACT2FN["gelu"]),
        nn.Linear,
    ]


def test_region_mlps():
    config = tiny_config(region_embedding="mlp")
    embeddings = InterBERTImageEmbeddings(config)
    shapes = {name: tuple(weight.shape) for name, weight in embeddings.named_parameters() if "embeddings" in name}
    assert shapes == {
        "feature_embeddings.0.weight": (16, 6),
        "feature_embeddings.0.bias": (16,),
        "feature_embeddings.2.weight": (16, 16),
        "feature_embeddings.2.bias": (16,),
        "box_embeddings.0.weight": (16, 5),
        "box_embeddings.0.bias": (16,),
        "box_embeddings.2.weight": (16, 16),
        "box_embeddings.2.bias": (16,),
    }


@torch.no_grad()
def test_image_positions_come_before_the_text():
    model = tiny_model(InterBERTModel)
    text = model(**tiny_text(), output_hidden_states=True).interaction_hidden_states[0]
    regions = model(**tiny_regions(), output_hidden_states=True).interaction_hidden_states[0]
    both = model(**tiny_inputs(), output_hidden_states=True).interaction_hidden_states[0]
    assert text.shape == (3, 7, 16)
    assert regions.shape == (3, 6, 16)
    assert torch.equal(both, torch.cat([regions, text], dim=1))


# --- Masks and modalities ---


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("modalities", ["text", "regions", "both"])
@torch.no_grad()
def test_padding_changes_nothing(modalities, attn_implementation):
    """Each sample alone, without padding and without masks, gives what it gives in the padded batch."""
    model = tiny_model(InterBERTModel, attn_implementation)
    inputs = inputs_of(modalities)
    padded = model(**inputs)
    for i, (num_tokens, num_regions) in enumerate(zip(NUM_TOKENS, NUM_REGIONS, strict=True)):
        sample = {
            name: tensor[i : i + 1, : num_regions if name.startswith("region") else num_tokens]
            for name, tensor in inputs.items()
            if not name.endswith("mask")
        }
        alone = model(**sample)
        for name in alone:
            expected = padded[name][i]
            if name == "text_last_hidden_state":
                expected = expected[:num_tokens]
            elif name == "vision_last_hidden_state":
                expected = expected[: num_regions + 1]
            assert_close(alone[name][0], expected)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(attn_implementation):
    model = tiny_model(InterBERTModel, attn_implementation)
    inputs = tiny_inputs()
    expected = model(**inputs)
    is_padding = inputs["region_attention_mask"] == 0
    inputs["region_features"][is_padding] = 1e6
    inputs["region_boxes"][is_padding] = -1e6
    inputs["input_ids"][inputs["attention_mask"] == 0] = 29
    inputs["token_type_ids"][inputs["attention_mask"] == 0] = 1
    outputs = model(**inputs)
    assert_close(outputs.text_pooler_output, expected.text_pooler_output)
    assert_close(outputs.vision_pooler_output, expected.vision_pooler_output)
    is_token = inputs["attention_mask"].bool()
    assert_close(outputs.text_last_hidden_state[is_token], expected.text_last_hidden_state[is_token])
    is_image_position = nn.functional.pad(~is_padding, (1, 0), value=True)
    assert_close(
        outputs.vision_last_hidden_state[is_image_position], expected.vision_last_hidden_state[is_image_position]
    )


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("missing", ["attention_mask", "region_attention_mask", "both"])
@torch.no_grad()
def test_a_missing_mask_is_a_mask_of_ones(missing, attn_implementation):
    model = tiny_model(InterBERTModel, attn_implementation)
    inputs = tiny_inputs()
    missing = ["attention_mask", "region_attention_mask"] if missing == "both" else [missing]
    expected = model(**inputs | {name: torch.ones_like(inputs[name]) for name in missing})
    outputs = model(**{name: tensor for name, tensor in inputs.items() if name not in missing})
    for name in OUTPUTS:
        assert_close(outputs[name], expected[name])


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
@torch.no_grad()
def test_masks_of_other_types(dtype, attn_implementation):
    model = tiny_model(InterBERTModel, attn_implementation)
    inputs = tiny_inputs()
    expected = model(**inputs)
    outputs = model(**{name: tensor.to(dtype) if "mask" in name else tensor for name, tensor in inputs.items()})
    for name in OUTPUTS:
        assert_close(outputs[name], expected[name])


@torch.no_grad()
def test_a_missing_text_is_a_text_that_nothing_attends_to():
    model = tiny_model(InterBERTModel)
    inputs = tiny_inputs()
    expected = model(**inputs | {"attention_mask": torch.zeros(3, 7)})
    outputs = model(**tiny_regions())
    assert_close(outputs.vision_last_hidden_state, expected.vision_last_hidden_state)
    assert_close(outputs.vision_pooler_output, expected.vision_pooler_output)


@pytest.mark.parametrize("modalities", ["text", "regions", "both"])
@torch.no_grad()
def test_outputs_of_the_given_modalities(modalities):
    inputs = inputs_of(modalities)
    outputs = tiny_model(InterBERTModel)(**inputs)
    expected = {}
    if modalities != "regions":
        expected |= {"text_last_hidden_state": (3, 7, 16), "text_pooler_output": (3, 8)}
    if modalities != "text":
        expected |= {"vision_last_hidden_state": (3, 6, 16), "vision_pooler_output": (3, 8)}
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == expected

    outputs = tiny_model(InterBERTForPreTraining)(**inputs)
    expected = {"text": ["mlm_logits"], "regions": ["region_logits"]}.get(
        modalities, ["mlm_logits", "region_logits", "itm_logits"]
    )
    assert list(outputs) == expected
    shapes = {"mlm_logits": (3, 7, 30), "region_logits": (3, 5, 5), "itm_logits": (3, 2)}
    assert all(outputs[name].shape == shapes[name] for name in expected)


@torch.no_grad()
def test_text_and_regions_read_each_other():
    model = tiny_model(InterBERTModel)
    inputs = tiny_inputs()
    expected = model(**inputs)
    other_regions = model(**inputs | {"region_features": inputs["region_features"].flip(0)})
    other_text = model(**inputs | {"input_ids": inputs["input_ids"].flip(0)})
    assert (other_regions.text_pooler_output - expected.text_pooler_output).abs().max() > 1e-3
    assert (other_text.vision_pooler_output - expected.vision_pooler_output).abs().max() > 1e-3


@torch.no_grad()
def test_inputs_embeds_stand_for_input_ids():
    model = tiny_model(InterBERTModel)
    inputs = tiny_inputs()
    expected = model(**inputs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    outputs = model(**inputs)
    for name in OUTPUTS:
        assert_close(outputs[name], expected[name])


@torch.no_grad()
def test_streams_without_layers_pass_on_the_interaction_module():
    """The paper's single-stream ablation."""
    model = tiny_model(InterBERTModel, num_text_layers=0, num_vision_layers=0)
    outputs = model(**tiny_inputs(), output_hidden_states=True)
    interaction = outputs.interaction_hidden_states[-1]
    assert torch.equal(outputs.vision_last_hidden_state, interaction[:, :6])
    assert torch.equal(outputs.text_last_hidden_state, interaction[:, 6:])
    assert not outputs.text_hidden_states and not outputs.image_hidden_states


@pytest.mark.parametrize(
    ("field", "modalities", "varies"),
    [
        ("hidden_dropout_prob", "text", True),
        ("attention_probs_dropout_prob", "text", True),
        ("vision_hidden_dropout_prob", "text", False),
        ("vision_attention_probs_dropout_prob", "text", False),
        ("vision_hidden_dropout_prob", "regions", True),
        ("vision_attention_probs_dropout_prob", "regions", True),
    ],
)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_dropout_only_where_it_belongs_and_only_in_training(field, modalities, varies, attn_implementation):
    model = tiny_model(InterBERTModel, attn_implementation, **NO_DROPOUT | {field: 0.5})
    output = "text_last_hidden_state" if modalities == "text" else "vision_last_hidden_state"
    inputs = inputs_of(modalities)
    assert torch.equal(model(**inputs)[output], model(**inputs)[output])
    model.train()
    assert torch.equal(model(**inputs)[output], model(**inputs)[output]) == (not varies)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "vision_hidden_dropout_prob"])
@torch.no_grad()
def test_each_embedding_has_the_dropout_of_its_modality(field):
    embeddings = InterBERTModel(tiny_config(**NO_DROPOUT | {field: 0.5})).embeddings
    text = embeddings.text(tiny_text()["input_ids"], None, None, None)
    image = embeddings.image(*tiny_regions().values())
    assert (text == 0).any() == (field == "hidden_dropout_prob")
    assert (image == 0).any() == (field == "vision_hidden_dropout_prob")


# --- Pretraining heads and losses ---


@pytest.mark.parametrize(("fusion", "expected"), [("mul", [3.0, -2.0, 0.0]), ("sum", [4.0, 1.0, 5.0])])
def test_fusion(fusion, expected):
    module = InterBERTFusion(tiny_config(fusion=fusion)).eval()
    fused = module(torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[3.0, -1.0, 0.0]]))
    assert fused.tolist() == [expected]


def test_match_logits_come_from_the_fused_poolers():
    model = tiny_model(InterBERTForPreTraining, fusion="sum")
    inputs = tiny_inputs()
    outputs = model.interbert(**inputs)
    expected = model.itm_head.classifier(outputs.text_pooler_output + outputs.vision_pooler_output)
    assert_close(model(**inputs).itm_logits, expected)


def test_word_loss_by_hand():
    # Softmax of (0, ln 3) is (1/4, 3/4).
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    loss = masked_language_modeling_loss(logits, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


@pytest.mark.parametrize(
    ("objective", "targets", "expected"),
    [
        # 1/2 ln((1/2) / (1/4)) + 1/2 ln((1/2) / (3/4)), and 0 for the target that equals the prediction.
        ("soft_class", [[0.5, 0.5], [0.25, 0.75]], (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2),
        ("soft_class", [[0.0, 1.0], [1.0, 0.0]], (math.log(4 / 3) + math.log(4)) / 2),
        ("hard_class", [1, 0], (math.log(4 / 3) + math.log(4)) / 2),
        # Squared errors: (1, (ln 3)^2) and (4, 0).
        ("feature", [[1.0, 0.0], [-2.0, math.log(3)]], (1 + math.log(3) ** 2 + 4) / 4),
    ],
)
def test_region_loss_by_hand(objective, targets, expected):
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    loss = region_loss(logits, torch.tensor(targets), objective)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_only_scored_positions_are_predicted_in_row_major_order():
    model = tiny_model(InterBERTForPreTraining)
    inputs, labels = tiny_inputs(), tiny_labels()
    full = model(**inputs)
    outputs = model(**inputs, **labels)
    assert_close(outputs.mlm_logits, full.mlm_logits[[0, 0, 1], [2, 5, 1]])
    assert_close(outputs.region_logits, full.region_logits[[0, 1, 2, 2], [4, 0, 1, 3]])
    assert_close(outputs.itm_logits, full.itm_logits)

    log_probs = full.mlm_logits.log_softmax(-1)
    mlm_loss = -(log_probs[0, 2, 11] + log_probs[0, 5, 4] + log_probs[1, 1, 29]) / 3
    assert_close(outputs.mlm_loss, mlm_loss)
    target = labels["region_targets"][[0, 1, 2, 2], [4, 0, 1, 3]]
    log_ratio = target.log() - full.region_logits[[0, 1, 2, 2], [4, 0, 1, 3]].log_softmax(-1)
    assert_close(outputs.region_loss, (target * log_ratio).sum() / 4)
    # 0 = the pair matches.
    log_probs = full.itm_logits.log_softmax(-1)
    assert_close(outputs.itm_loss, -(log_probs[0, 0] + log_probs[1, 1] + log_probs[2, 1]) / 3)
    assert_close(outputs.loss, outputs.mlm_loss + outputs.region_loss + outputs.itm_loss)


@pytest.mark.parametrize("objective", ["hard_class", "feature"])
@torch.no_grad()
def test_other_region_objectives(objective):
    model = tiny_model(InterBERTForPreTraining, region_objective=objective)
    inputs = tiny_regions()
    mask = tiny_labels()["region_target_mask"]
    full = model(**inputs).region_logits
    if objective == "hard_class":
        assert full.shape == (3, 5, 5)
        targets = torch.full((3, 5), -1)  # −1: no class, never scored
        targets[mask == 1] = torch.tensor([4, 0, 2, 3])
        log_probs = full.log_softmax(-1)
        expected = -(log_probs[0, 4, 4] + log_probs[1, 0, 0] + log_probs[2, 1, 2] + log_probs[2, 3, 3]) / 4
    else:
        assert full.shape == (3, 5, 6)
        targets = torch.randn(3, 5, 6)
        expected = sum((full[i, j] - targets[i, j]).square().mean() for i, j in [(0, 4), (1, 0), (2, 1), (2, 3)]) / 4
    outputs = model(**inputs, region_targets=targets, region_target_mask=mask)
    assert_close(outputs.region_loss, expected)
    assert outputs.loss == outputs.region_loss and outputs.mlm_loss is None and outputs.itm_loss is None


@pytest.mark.parametrize("objective", ["soft_class", "hard_class", "feature"])
def test_nothing_scored_is_a_loss_of_0(objective):
    model = tiny_model(InterBERTForPreTraining, region_objective=objective).train()
    targets = {
        "soft_class": torch.full((3, 5, 5), 0.2),
        "hard_class": torch.full((3, 5), -1),
        "feature": torch.ones(3, 5, 6),
    }
    outputs = model(
        **tiny_inputs(),
        labels=torch.full((3, 7), -100),
        region_targets=targets[objective],
        region_target_mask=torch.zeros(3, 5, dtype=torch.long),
    )
    assert outputs.loss.item() == outputs.mlm_loss.item() == outputs.region_loss.item() == 0.0
    assert outputs.mlm_logits.shape == (0, 30)
    assert outputs.region_logits.shape == (0, 6 if objective == "feature" else 5)
    outputs.loss.backward()
    # Gradients of 0 rather than none: in distributed training every process has one for every parameter of the heads.
    for head in (model.mlm_head, model.region_head):
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None and (parameter.grad == 0).all(), name


def test_a_few_steps_reduce_every_loss():
    model = InterBERTForPreTraining(tiny_config(**NO_DROPOUT))
    inputs, labels = tiny_inputs(), tiny_labels()
    labels["region_targets"] = nn.functional.one_hot(labels["region_targets"].argmax(-1), 5).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        outputs = model(**inputs, **labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack([outputs.mlm_loss, outputs.region_loss, outputs.itm_loss]))
    assert (losses[-1] < 0.5 * losses[0]).all()


# --- Attention implementations, recorded outputs, precision ---


@pytest.mark.parametrize("modalities", ["text", "regions", "both"])
@torch.no_grad()
def test_eager_and_sdpa_attention_agree(modalities):
    model = tiny_model(InterBERTModel, "eager")
    inputs = inputs_of(modalities)
    expected = model(**inputs)
    model.set_attn_implementation("sdpa")
    outputs = model(**inputs)
    assert list(outputs) == list(expected)
    for name in outputs:
        assert_close(outputs[name], expected[name])


def recorded_shapes(outputs):
    return {name: [tuple(state.shape) for state in outputs[name]] for name in RECORDED if outputs.get(name)}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_class", [InterBERTModel, InterBERTForPreTraining])
@torch.no_grad()
def test_recorded_outputs_are_labelled_by_module(model_class, attn_implementation):
    model = tiny_model(model_class, attn_implementation)
    expected = {
        # The embeddings, then every layer; 6 image positions and 7 tokens.
        "interaction_hidden_states": [(3, 13, 16)] * 3,
        "text_hidden_states": [(3, 7, 16)] * 3,
        "image_hidden_states": [(3, 6, 16)],
        "interaction_attentions": [(3, 2, 13, 13)] * 2,
        "text_attentions": [(3, 2, 7, 7)] * 3,
        "image_attentions": [(3, 4, 6, 6)],
    }
    outputs = model(**tiny_inputs(), output_hidden_states=True, output_attentions=True)
    assert recorded_shapes(outputs) == expected
    for kind in ("hidden_states", "attentions"):
        outputs = model(**tiny_inputs(), **{f"output_{kind}": True})
        assert recorded_shapes(outputs) == {name: shapes for name, shapes in expected.items() if kind in name}
    # Asking once changes nothing for the next pass.
    assert recorded_shapes(model(**tiny_inputs())) == {}
    assert model.config._attn_implementation == attn_implementation


@pytest.mark.parametrize("modalities", ["text", "regions"])
@torch.no_grad()
def test_recorded_outputs_of_one_modality(modalities):
    outputs = tiny_model(InterBERTModel)(**inputs_of(modalities), output_hidden_states=True, output_attentions=True)
    if modalities == "text":
        assert recorded_shapes(outputs) == {
            "interaction_hidden_states": [(3, 7, 16)] * 3,
            "text_hidden_states": [(3, 7, 16)] * 3,
            "interaction_attentions": [(3, 2, 7, 7)] * 2,
            "text_attentions": [(3, 2, 7, 7)] * 3,
        }
    else:
        assert recorded_shapes(outputs) == {
            "interaction_hidden_states": [(3, 6, 16)] * 3,
            "image_hidden_states": [(3, 6, 16)],
            "interaction_attentions": [(3, 2, 6, 6)] * 2,
            "image_attentions": [(3, 4, 6, 6)],
        }


@torch.no_grad()
def test_recorded_hidden_states_are_what_the_layers_read_and_wrote():
    model = tiny_model(InterBERTModel)
    first_text_input = recorded_input(model.text_layers[0])
    second_interaction_input = recorded_input(model.interaction_layers[1])
    outputs = model(**tiny_inputs(), output_hidden_states=True)
    assert torch.equal(outputs.interaction_hidden_states[1], second_interaction_input[0])
    assert torch.equal(outputs.interaction_hidden_states[-1][:, 6:], first_text_input[0])
    assert torch.equal(outputs.text_hidden_states[-1], outputs.text_last_hidden_state)
    assert torch.equal(outputs.image_hidden_states[-1], outputs.vision_last_hidden_state)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_probabilities(attn_implementation):
    model = tiny_model(InterBERTModel, attn_implementation)
    inputs = tiny_inputs()
    expected = model(**inputs)
    outputs = model(**inputs, output_attentions=True)
    for name in OUTPUTS:
        assert_close(outputs[name], expected[name])
    image_mask = nn.functional.pad(inputs["region_attention_mask"], (1, 0), value=1)
    masks = {
        "interaction_attentions": torch.cat([image_mask, inputs["attention_mask"]], dim=1),
        "text_attentions": inputs["attention_mask"],
        "image_attentions": image_mask,
    }
    for name, mask in masks.items():
        for probabilities in outputs[name]:
            assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
            is_padding = (mask == 0)[:, None, None].expand_as(probabilities)
            assert (probabilities[is_padding] == 0).all()
            assert (probabilities[~is_padding] > 0).all()


@torch.no_grad()
def test_recording_switched_on_in_the_config():
    model = tiny_model(InterBERTForPreTraining, output_hidden_states=True, output_attentions=True)
    assert sorted(recorded_shapes(model(**tiny_inputs()))) == sorted(RECORDED)
    outputs = model(**tiny_inputs(), output_hidden_states=False, output_attentions=False)
    assert recorded_shapes(outputs) == {}


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("model_class", [InterBERTModel, InterBERTForPreTraining])
@torch.no_grad()
def test_tuple_outputs(model_class, in_config):
    model = tiny_model(model_class)
    expected = model(**tiny_inputs(), output_hidden_states=True).to_tuple()
    if in_config:
        model.config.return_dict = False
        outputs = model(**tiny_inputs(), output_hidden_states=True)
    else:
        outputs = model(**tiny_inputs(), output_hidden_states=True, return_dict=False)
    assert isinstance(outputs, tuple) and len(outputs) == len(expected)
    for output, expected_output in zip(outputs, expected, strict=True):
        if isinstance(output, tuple):
            output, expected_output = output[-1], expected_output[-1]
        assert torch.equal(output, expected_output)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@torch.no_grad()
def test_half_precision(dtype, tolerance, attn_implementation):
    """Inputs stay in float32; the loss is computed in it."""
    model = tiny_model(InterBERTForPreTraining, attn_implementation)
    expected = model(**tiny_inputs(), **tiny_labels())
    outputs = model.to(dtype)(**tiny_inputs(), **tiny_labels())
    assert outputs.mlm_logits.dtype == outputs.region_logits.dtype == outputs.itm_logits.dtype == dtype
    for name in ("mlm_loss", "region_loss", "itm_loss"):
        assert outputs[name].dtype == torch.float32
        assert outputs[name].item() == pytest.approx(expected[name].item(), rel=tolerance)
    assert all(torch.isfinite(outputs[name]).all() for name in ("mlm_logits", "region_logits", "itm_logits"))


# --- A part of the outputs, or of the inputs ---


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("modalities", ["text", "regions", "both"])
@pytest.mark.parametrize("layers", [{}, {"num_text_layers": 0}, {"num_vision_layers": 2}])
@torch.no_grad()
def test_pooled_outputs_alone(layers, modalities, attn_implementation):
    model = tiny_model(InterBERTModel, attn_implementation, **layers)
    expected = model(**inputs_of(modalities), output_hidden_states=True)
    outputs = model(**inputs_of(modalities), pooled_only=True)
    assert list(outputs) == [name for name in expected if name.endswith("pooler_output")]
    for name, output in outputs.items():
        assert_close(output, expected[name])
    # Recorded states are those of all positions.
    recorded = model(**inputs_of(modalities), pooled_only=True, output_hidden_states=True)
    assert list(recorded) == [name for name in expected if not name.endswith("last_hidden_state")]
    assert recorded_shapes(recorded) == recorded_shapes(expected)


def test_pooled_outputs_alone_have_the_same_gradients():
    model = tiny_model(InterBERTModel, **NO_DROPOUT).train()
    gradients = []
    for pooled_only in (False, True):
        outputs = model(**tiny_inputs(), pooled_only=pooled_only)
        (outputs.text_pooler_output * outputs.vision_pooler_output).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_embedded_regions_stand_for_regions():
    model = tiny_model(InterBERTModel)
    inputs = tiny_inputs()
    expected = model(**inputs)
    region_embeds = model.embed_regions(**tiny_regions())
    assert region_embeds.shape == (3, 6, 16)
    outputs = model(**tiny_text(), region_embeds=region_embeds, region_attention_mask=inputs["region_attention_mask"])
    for name in OUTPUTS:
        assert_close(outputs[name], expected[name])
    model = tiny_model(InterBERTForPreTraining)
    embedded = {"region_embeds": model.interbert.embed_regions(**tiny_regions())}
    outputs = model(**tiny_text(), **embedded, region_attention_mask=inputs["region_attention_mask"])
    for name in ("mlm_logits", "region_logits", "itm_logits"):
        assert_close(outputs[name], model(**inputs)[name])


@pytest.mark.parametrize("modality", ["text", "image"])
@torch.no_grad()
def test_features_of_one_modality(modality):
    model = tiny_model(InterBERTModel)
    if modality == "text":
        inputs, get_features, prefix = tiny_text(), model.get_text_features, "text"
    else:
        inputs, get_features, prefix = tiny_regions(), model.get_image_features, "vision"
    expected = model(**inputs, output_hidden_states=True, output_attentions=True)
    features = get_features(**inputs)
    assert list(features) == ["last_hidden_state", "pooler_output"]
    assert_close(features.last_hidden_state, expected[f"{prefix}_last_hidden_state"])
    assert_close(features.pooler_output, expected[f"{prefix}_pooler_output"])
    assert torch.equal(get_features(**inputs, return_dict=False)[1], features.pooler_output)

    features = get_features(**inputs, output_hidden_states=True, output_attentions=True)
    hidden_states = expected.interaction_hidden_states + expected[f"{modality}_hidden_states"]
    attentions = expected.interaction_attentions + expected[f"{modality}_attentions"]
    for recorded, expected_states in ((features.hidden_states, hidden_states), (features.attentions, attentions)):
        for state, expected_state in zip(recorded, expected_states, strict=True):
            assert_close(state, expected_state)
    if modality == "image":
        embedded = model.embed_regions(**inputs)
        mask = inputs["region_attention_mask"]
        features = model.get_image_features(region_embeds=embedded, region_attention_mask=mask)
        assert_close(features.pooler_output, expected.vision_pooler_output)


# --- Saving, loading, tied weights ---


@pytest.mark.parametrize("model_class", [InterBERTModel, InterBERTForPreTraining])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_save_and_load(tmp_path, model_class, tied):
    model = tiny_model(model_class, tie_word_embeddings=tied, region_embedding="mlp", text_position_embedding="mlp")
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state_dict = loaded.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(state_dict[name], weight), name
    if model_class is InterBERTForPreTraining:
        embedding = loaded.interbert.embeddings.text.word_embeddings.weight
        assert (loaded.mlm_head.decoder.weight is embedding) == tied
    for output, expected in zip(loaded(**tiny_inputs()).to_tuple(), model(**tiny_inputs()).to_tuple(), strict=True):
        assert_close(output, expected)


def test_saving_writes_the_code_as_it_is(tmp_path):
    tiny_model(InterBERTForPreTraining).save_pretrained(tmp_path)
    packages = Path(modeling_file.__file__).parent.parent
    for name in ("modeling_interbert", "configuration_interbert"):
        assert (tmp_path / f"{name}.py").read_bytes() == (packages / name / f"{name}.py").read_bytes()


@torch.no_grad()
def test_a_pretraining_checkpoint_opens_as_the_bare_model(tmp_path):
    pretrained = tiny_model(InterBERTForPreTraining)
    pretrained.save_pretrained(tmp_path)
    model, info = InterBERTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert {name.split(".")[0] for name in info["unexpected_keys"]} == {"mlm_head", "region_head", "itm_head"}
    for name, weight in pretrained.interbert.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_heads_that_a_checkpoint_lacks_are_initialised(tmp_path):
    bare = tiny_model(InterBERTModel, num_region_classes=400)
    bare.save_pretrained(tmp_path)
    model, info = InterBERTForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"mlm_head", "region_head", "itm_head"}
    assert torch.equal(model.mlm_head.decoder.weight, bare.embeddings.text.word_embeddings.weight)
    assert (model.region_head.layer_norm.weight == 1).all() and (model.region_head.decoder.bias == 0).all()
    assert model.region_head.decoder.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_word_decoder_is_tied():
    tied, untied = (InterBERTForPreTraining(tiny_config(tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.mlm_head.decoder.weight is tied.interbert.embeddings.text.word_embeddings.weight
    assert num_parameters(untied) - num_parameters(tied) == 30 * 16


@pytest.mark.parametrize("num_tokens", [33, 28])
@torch.no_grad()
def test_resized_vocabulary(tmp_path, num_tokens):
    model = tiny_model(InterBERTForPreTraining)
    inputs = tiny_text()
    inputs["input_ids"] = inputs["input_ids"].clamp(max=27)
    expected = model(**inputs).mlm_logits
    model.resize_token_embeddings(num_tokens)
    perturbed_row = torch.arange(16.0)
    model.mlm_head.decoder.weight[20] += perturbed_row
    model.save_pretrained(tmp_path)
    loaded = InterBERTForPreTraining.from_pretrained(tmp_path)
    for resized in (model, loaded):
        assert resized.config.vocab_size == resized.interbert.config.vocab_size == num_tokens
        embedding = resized.get_input_embeddings().weight
        assert resized.mlm_head.decoder.weight is embedding and embedding.shape == (num_tokens, 16)
        assert resized.mlm_head.decoder.bias.shape == (num_tokens,)
        embedding[20] -= perturbed_row
        assert_close(resized(**inputs).mlm_logits[..., :28], expected[..., :28])


# --- Input that cannot be ---


def bad(remove=(), **changes):
    return remove, changes


BAD_INPUTS = [
    (bad(remove=list(tiny_inputs())), "Give `input_ids` (or `inputs_embeds`), `region_features`, or both; got neither"),
    (
        bad(input_ids=torch.ones(3, 0, dtype=torch.long), remove=["attention_mask", "token_type_ids"]),
        "A text must have at least one token, got shape (3, 0).",
    ),
    (bad(inputs_embeds=torch.zeros(3, 7, 16)), "Give either `input_ids` or `inputs_embeds`, not both."),
    (bad(attention_mask=torch.ones(3, 6)), "`attention_mask` must have shape (3, 7), got (3, 6)."),
    (
        bad(input_ids=torch.ones(3, 13, dtype=torch.long), remove=["attention_mask", "token_type_ids"]),
        "The text has 13 tokens, more than `max_position_embeddings` (12).",
    ),
    (
        bad(region_features=torch.zeros(3, 5, 7)),
        "`region_features` must have shape (batch, regions, region_feature_size=6), got (3, 5, 7).",
    ),
    (
        bad(region_features=torch.zeros(5, 6)),
        "`region_features` must have shape (batch, regions, region_feature_size=6), got (5, 6).",
    ),
    (bad(remove=["region_boxes"]), "`region_features` needs `region_boxes`, which is None."),
    (bad(region_boxes=torch.zeros(3, 5, 5)), "`region_boxes` must have shape (3, 5, 4), got (3, 5, 5)."),
    (bad(region_boxes=torch.zeros(3, 6, 4)), "`region_boxes` must have shape (3, 5, 4), got (3, 6, 4)."),
    (
        bad(region_attention_mask=torch.ones(3, 6)),
        "`region_attention_mask` must have shape (3, 5), got (3, 6).",
    ),
    (bad(remove=["region_features"]), "`region_boxes` needs `region_features`, which is None."),
    (bad(input_ids=torch.ones(7, dtype=torch.long)), "`input_ids` must have shape (batch, tokens), got (7,)."),
    (
        bad(remove=["input_ids"], inputs_embeds=torch.zeros(3, 7, 15)),
        "`inputs_embeds` must have shape (batch, tokens, hidden_size=16), got (3, 7, 15).",
    ),
    (
        bad(token_type_ids=torch.zeros(3, 6, dtype=torch.long)),
        "`token_type_ids` must have shape (3, 7), got (3, 6).",
    ),
    (bad(position_ids=torch.zeros(1, 6, dtype=torch.long)), "`position_ids` must have shape (1, 7), got (1, 6)."),
    (bad(remove=["input_ids"]), "`attention_mask` needs `input_ids` or `inputs_embeds`, which are None."),
    (bad(output_hidden_states=[1]), "`output_hidden_states` must be True or False, got [1]."),
    (
        bad(remove=["attention_mask", "token_type_ids"], input_ids=torch.ones(2, 7, dtype=torch.long)),
        "Text and regions must have the same batch size, or one of them a batch of 1, got 2 and 3.",
    ),
]


def apply(inputs, remove, changes):
    return {name: value for name, value in (inputs | changes).items() if name not in remove}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS, ids=range(len(BAD_INPUTS)))
@pytest.mark.parametrize("model_class", [InterBERTModel, InterBERTForPreTraining])
def test_inputs_that_cannot_be_are_refused(model_class, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model(model_class)(**apply(tiny_inputs(), *change))


BAD_LABELS = [
    (bad(labels=torch.zeros(3, 6, dtype=torch.long)), "`labels` must have shape (3, 7), got (3, 6)."),
    (bad(remove=list(tiny_text())), "`labels` needs `input_ids` or `inputs_embeds`, which are None."),
    (bad(remove=["region_target_mask"]), "`region_targets` and `region_target_mask` need each other"),
    (bad(remove=["region_targets"]), "`region_targets` and `region_target_mask` need each other"),
    (bad(remove=list(tiny_regions())), "`region_targets` needs `region_features` or `region_embeds`, which"),
    (bad(region_target_mask=torch.ones(3, 6)), "`region_target_mask` must have shape (3, 5), got (3, 6)."),
    (bad(region_targets=torch.ones(3, 6, 5)), "`region_targets` must have shape (3, 5, 5), got (3, 6, 5)."),
    (bad(region_targets=torch.ones(3, 5, 1)), "`region_targets` must have shape (3, 5, 5), got (3, 5, 1)."),
    (
        bad(region_targets=torch.zeros(3, 5, dtype=torch.long)),
        "`region_targets` must have shape (3, 5, 5), got (3, 5).",
    ),
    (
        bad(remove=[*tiny_regions(), "region_targets", "region_target_mask"]),
        "`itm_labels` needs a text and `region_features`, but one of them is None.",
    ),
    (
        bad(remove=[*tiny_text(), "labels"]),
        "`itm_labels` needs a text and `region_features`, but one of them is None.",
    ),
    (bad(itm_labels=torch.zeros(4, dtype=torch.long)), "`itm_labels` must have shape (3,), got (4,)."),
    (bad(itm_labels=torch.zeros(3, 2)), "`itm_labels` must have shape (3,), got (3, 2)."),
]


@pytest.mark.parametrize(("change", "message"), BAD_LABELS, ids=range(len(BAD_LABELS)))
def test_labels_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model(InterBERTForPreTraining)(**apply(tiny_inputs() | tiny_labels(), *change))


@pytest.mark.parametrize("one", ["text", "image"])
def test_losses_of_one_beside_many(one):
    """As if the one text, or the one image, had been repeated."""
    model = tiny_model(InterBERTForPreTraining)
    inputs = tiny_inputs()
    is_one = {name: name.startswith("region") == (one == "image") for name in inputs}
    repeated = {name: value[:1].expand_as(value) if is_one[name] else value for name, value in inputs.items()}
    single = {name: value[:1] if is_one[name] else value for name, value in inputs.items()}
    expected = model(**repeated, **tiny_labels())
    outputs = model(**single, **tiny_labels())
    for name in ("mlm_loss", "region_loss", "itm_loss"):
        assert_close(outputs[name], expected[name])


def test_class_ids_of_a_dataset_are_targets():
    """Datasets store them as int32, and probabilities are no ids."""
    model = tiny_model(InterBERTForPreTraining, region_objective="hard_class")
    mask = tiny_labels()["region_target_mask"]
    ids = torch.arange(15, dtype=torch.int32).reshape(3, 5) % 5
    loss = model(**tiny_regions(), region_targets=ids, region_target_mask=mask).loss
    assert_close(loss, model(**tiny_regions(), region_targets=ids.long(), region_target_mask=mask).loss)
    with pytest.raises(ValueError, match=re.escape("`region_targets` must have shape (3, 5), got (3, 5, 5).")):
        model(**tiny_regions(), region_targets=torch.full((3, 5, 5), 0.2), region_target_mask=mask)


def test_no_regions_at_all_are_finite():
    outputs = tiny_model(InterBERTModel)(region_features=torch.zeros(2, 0, 6), region_boxes=torch.zeros(2, 0, 4))
    assert outputs.vision_last_hidden_state.shape == (2, 1, 16)
    assert torch.isfinite(outputs.vision_last_hidden_state).all()


def test_pairs_without_label_are_not_scored():
    model = tiny_model(InterBERTForPreTraining)
    logits = model(**tiny_inputs()).itm_logits
    loss = model(**tiny_inputs(), itm_labels=torch.tensor([0, -100, 1])).itm_loss
    expected = -(logits[0].log_softmax(-1)[0] + logits[2].log_softmax(-1)[1]) / 2
    assert_close(loss, expected)
    assert model(**tiny_inputs(), itm_labels=torch.full((3,), -100)).itm_loss == 0


@pytest.mark.parametrize("given", ["labels", "region_targets", "itm_labels"])
def test_heads_without_labels_do_not_run_beside_those_with(given):
    labels = tiny_labels()
    chosen = {name: value for name, value in labels.items() if name.startswith(given.removesuffix("s"))}
    if given == "region_targets":
        chosen["region_target_mask"] = labels["region_target_mask"]
    outputs = tiny_model(InterBERTForPreTraining)(**tiny_inputs(), **chosen)
    logits = {"labels": "mlm_logits", "region_targets": "region_logits", "itm_labels": "itm_logits"}
    assert [name for name in logits.values() if outputs.get(name) is not None] == [logits[given]]


def test_half_precision_features_have_a_mean_of_full_precision():
    features = torch.full((1, 300, 6), 0.1, dtype=torch.bfloat16)
    embeddings = tiny_model(InterBERTModel).embeddings.image
    seen = []
    embeddings.feature_embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embeddings(features, torch.zeros(1, 300, 4), None)
    assert_close(seen[0][0, 0], features[0, 0].float(), tolerance=1e-6)
