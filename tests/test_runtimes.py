"""Attention backends, torch.compile and torch.export: the same outputs as eager PyTorch, at any size."""

import inspect
import shutil

import pytest
import torch
from model_fixtures import (
    MODEL_CLASSES,
    NO_DROPOUT,
    assert_close,
    example_inputs,
    example_labels,
    scalar,
    task_model,
    tiny_inputs,
    tiny_regions,
    tiny_text,
)
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from transformers import modeling_flash_attention_utils
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from modeling_interbert import InterBERTForImageRetrieval, InterBERTForMultipleChoice, InterBERTForPreTraining

# What takes long: the classes share their encoder, and two of them stand for the others in the quick tests.
QUICK = (InterBERTForPreTraining, InterBERTForImageRetrieval)
traced_class = pytest.mark.parametrize(
    "model_class",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow, id=each.__name__) for each in MODEL_CLASSES],
)
every_class = pytest.mark.parametrize("model_class", MODEL_CLASSES, ids=lambda model_class: model_class.__name__)

# (batch, tokens, regions): none of them the size of `example_inputs`.
SIZES = [(5, 9, 7), (2, 3, 12), (4, 12, 2)]


def inputs_of_size(model_class, batch_size: int, num_tokens: int, num_regions: int) -> dict[str, torch.Tensor]:
    """Random inputs of a class, the last token and region of the first sample being padding."""
    generator = torch.Generator().manual_seed(batch_size)
    inputs = {}
    for name, example in example_inputs(model_class).items():
        if name.startswith("region"):
            shape = (batch_size, num_regions, *example.shape[2:])
        elif model_class is InterBERTForMultipleChoice:
            shape = (batch_size, 3, num_tokens)
        else:
            shape = (batch_size, num_tokens)
        if example.is_floating_point():
            inputs[name] = torch.rand(shape, generator=generator)
        elif name.endswith("mask"):
            inputs[name] = torch.ones(shape, dtype=torch.long)
            inputs[name][0, ..., -1] = 0
        else:
            inputs[name] = torch.randint(0, 2, shape, generator=generator)
    return inputs


def assert_same_outputs(outputs, expected, tolerance: float = 1e-5):
    assert list(outputs) == list(expected)
    for name, output in expected.items():
        assert_close(outputs[name], output, tolerance)


# --- Attention backends ---

backend_models = pytest.mark.parametrize(
    ("model_class", "inputs"),
    [
        (InterBERTForPreTraining, tiny_inputs()),
        (InterBERTForPreTraining, tiny_text()),
        (InterBERTForPreTraining, tiny_regions()),
        (InterBERTForPreTraining, {name: tensor for name, tensor in tiny_inputs().items() if "mask" not in name}),
        (InterBERTForImageRetrieval, tiny_inputs()),  # position 0 alone in the last layers
    ],
    ids=["both", "text", "regions", "no masks", "pooled"],
)


def is_not_padding(name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What padding positions hold is up to the backend: flash attention leaves zeros."""
    if name == "mlm_logits" and "attention_mask" in inputs:
        return inputs["attention_mask"].bool()
    if name == "region_logits" and "region_attention_mask" in inputs:
        return inputs["region_attention_mask"].bool()
    return torch.tensor(True)


def assert_backend_agrees(model, inputs, attn_implementation: str):
    model.set_attn_implementation("eager")
    expected = model(**inputs)
    model.config._attn_implementation = attn_implementation  # without the check whether the backend is installed
    outputs = model(**inputs)
    assert list(outputs) == list(expected)
    for name, output in expected.items():
        counts = is_not_padding(name, inputs)
        assert_close(outputs[name][counts], output[counts])
    recorded = model(**inputs, output_attentions=True)
    assert all(probabilities is not None for probabilities in recorded.interaction_attentions)


@backend_models
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention(model_class, inputs):
    """Uncompiled, since its compilation takes most of a minute. What it is given is the same."""
    with torch.compiler.set_stance("force_eager"):
        assert_backend_agrees(task_model(model_class), inputs, "flex_attention")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_compiled_flex_attention():
    assert_backend_agrees(task_model(InterBERTForPreTraining), tiny_inputs(), "flex_attention")


def reference_flash_attention(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """flash-attn's function for batches without padding: `(batch, positions, heads, head_size)`."""
    assert not causal
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


def reference_flash_attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """flash-attn's function for sequences laid end to end, `(positions, heads, head_size)`."""
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    parts = []
    for i in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        own = slice(cu_seqlens_k[i], cu_seqlens_k[i + 1])
        parts.append(
            reference_flash_attention(queries[None], k[None, own], v[None, own], dropout_p, softmax_scale, causal)[0]
        )
    return torch.cat(parts)


@pytest.mark.parametrize("attn_implementation", ["flash_attention_2", "flash_attention_3"])
@backend_models
@torch.no_grad()
def test_what_flash_attention_is_given(model_class, inputs, attn_implementation, monkeypatch):
    """Its kernels need a GPU; functions of the same signature, written out, stand in for them."""
    calls = []

    def record(function):
        def recorded(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        recorded.__signature__ = inspect.signature(function)
        return recorded

    functions = (
        record(reference_flash_attention),
        record(reference_flash_attention_varlen),
        None,
        modeling_flash_attention_utils._pad_input,
        modeling_flash_attention_utils._unpad_input,
    )
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    assert_backend_agrees(task_model(model_class), inputs, attn_implementation)
    padded = any("mask" in name for name in inputs)
    assert set(calls) == {reference_flash_attention_varlen if padded else reference_flash_attention}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attn_implementation", ["flash_attention_2", "flash_attention_3"])
@every_class
@torch.no_grad()
def test_flash_attention(model_class, attn_implementation):
    installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if not installed[attn_implementation]():
        pytest.skip(f"{attn_implementation} is not installed")
    model = task_model(model_class).to("cuda", torch.bfloat16)
    inputs = {name: tensor.to("cuda") for name, tensor in example_inputs(model_class).items()}
    expected = model(**inputs)
    model.set_attn_implementation(attn_implementation)
    for name, output in model(**inputs).items():
        counts = is_not_padding(name, inputs)
        assert_close(output[counts], expected[name][counts], tolerance=0.1)


# --- torch.compile ---

traced_attention = pytest.mark.parametrize(
    "attn_implementation", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)]
)


@traced_class
@traced_attention
@torch.no_grad()
def test_compiled_as_one_graph_for_all_sizes(model_class, attn_implementation):
    model = task_model(model_class, attn_implementation)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in SIZES:
        inputs = inputs_of_size(model_class, *size)
        assert_same_outputs(compiled(**inputs), model(**inputs))
    assert counter.frame_count == 1


@traced_class
def test_compiled_training_step(model_class):
    """Forward and backward as one graph each, with labels: of the scored positions, too, whose number varies."""
    model = task_model(model_class, **NO_DROPOUT).train()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for function in (model, compiled):
        outputs = function(**example_inputs(model_class), **example_labels(model_class))
        loss = scalar(outputs)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
        model.zero_grad()
    assert_close(results[1][0], results[0][0])
    assert set(results[1][1]) == set(results[0][1])
    for name, gradient in results[0][1].items():
        assert_close(results[1][1][name], gradient)


@torch.no_grad()
def test_compiled_recorded_outputs():
    """As with every model of transformers, after a first pass that is not compiled, which installs the recorders."""
    model = task_model(InterBERTForImageRetrieval)
    expected = model(**tiny_inputs(), output_attentions=True, output_hidden_states=True)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outputs = compiled(**tiny_inputs(), output_attentions=True, output_hidden_states=True)
    for recorded in ("text_attentions", "interaction_hidden_states"):
        for state, expected_state in zip(outputs[recorded], expected[recorded], strict=True):
            assert_close(state, expected_state)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@every_class
@torch.no_grad()
def test_compiled_by_inductor(model_class):
    model = task_model(model_class)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in SIZES:
        inputs = inputs_of_size(model_class, *size)
        assert_same_outputs(compiled(**inputs), model(**inputs))


# --- torch.export ---


def dynamic_shapes(inputs: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Every dimension but the size of features and boxes. `Dim.DYNAMIC` raises where the model would fix one."""
    fixed_dimensions = {"region_features": 1, "region_boxes": 1, "region_embeds": 1}
    return {
        name: dict.fromkeys(range(tensor.dim() - fixed_dimensions.get(name, 0)), Dim.DYNAMIC)
        for name, tensor in inputs.items()
    }


@traced_class
@traced_attention
@torch.no_grad()
def test_exported_for_all_sizes(model_class, attn_implementation, tmp_path):
    model = task_model(model_class, attn_implementation)
    inputs = example_inputs(model_class)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes(inputs))
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for size in [*SIZES, (1, 4, 3), (1, 1, 1)]:
        inputs = inputs_of_size(model_class, *size)
        if min(size) == 1:  # nothing but padding, otherwise
            inputs = {name: torch.ones_like(value) if "mask" in name else value for name, value in inputs.items()}
        assert_same_outputs(exported(**inputs), model(**inputs))


@pytest.mark.parametrize("one", ["text", "image"])
@torch.no_grad()
def test_exported_for_one_beside_many(one):
    model = task_model(InterBERTForImageRetrieval)

    def one_of(inputs):
        is_one = {name: name.startswith("region") == (one == "image") for name in inputs}
        return {name: tensor[:1] if is_one[name] else tensor for name, tensor in inputs.items()}

    inputs = one_of(tiny_inputs())
    shapes = dynamic_shapes(inputs)
    for name, dimensions in shapes.items():
        if inputs[name].shape[0] == 1:
            del dimensions[0]
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for size in SIZES:
        inputs = one_of(inputs_of_size(InterBERTForImageRetrieval, *size))
        assert_same_outputs(exported(**inputs), model(**inputs))
