#!/usr/bin/env python
"""
Exports a model to ONNX, for any batch size, number of tokens and number of regions, and checks it with onnxruntime.

    python examples/export_onnx.py outputs/quickstart/model outputs/quickstart/model.onnx

Weights that are trained for another task, such as answers to questions:

    python examples/export_onnx.py org/interbert-base-vqa2 vqa.onnx --task visual-question-answering

The file takes what the processor returns for as many texts as images, and gives `itm_logits` and `match_scores`, or
`logits`. Weights are written beside it, as `NAME.onnx.data`. Needs `pip install "interbert[onnx]"`.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.export import Dim
from transformers import PreTrainedModel

from configuration_interbert import InterBERTConfig
from modeling_interbert import InterBERTForImageRetrieval, InterBERTForVQA

MODEL_CLASSES = {
    "image-retrieval": InterBERTForImageRetrieval,
    "visual-question-answering": InterBERTForVQA,
}
TRACED_SIZE = (2, 8, 10)
CHECKED_SIZES = [(1, 4, 36), (5, 12, 10), (3, 1, 1)]  # (batch, tokens, regions)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export an InterBERT model to ONNX and check the result.")
    parser.add_argument("model_name_or_path", help="Hub name or folder of the model.")
    parser.add_argument("output_file", type=Path, help="ONNX file to write.")
    parser.add_argument(
        "--task", choices=list(MODEL_CLASSES), default="image-retrieval", help="What the file computes."
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="Largest difference from PyTorch's outputs; nothing is written where it is exceeded.",
    )
    return parser.parse_args()


def random_inputs(
    config: InterBERTConfig, batch_size: int, num_tokens: int, num_regions: int
) -> dict[str, torch.Tensor]:
    """Inputs of a model, the last token and the last region of the last pair being padding."""
    corners = torch.rand(batch_size, num_regions, 2, 2).sort(dim=2).values  # (batch, regions, corner, axis)
    inputs = {
        "input_ids": torch.randint(config.vocab_size, (batch_size, num_tokens)),
        "attention_mask": torch.ones(batch_size, num_tokens, dtype=torch.long),
        "token_type_ids": torch.zeros(batch_size, num_tokens, dtype=torch.long),
        "region_features": torch.randn(batch_size, num_regions, config.region_feature_size),
        "region_boxes": corners.flatten(2),
        "region_attention_mask": torch.ones(batch_size, num_regions, dtype=torch.long),
    }
    if num_tokens > 1:
        inputs["attention_mask"][-1, -1] = 0
    if num_regions > 1:
        inputs["region_attention_mask"][-1, -1] = 0
    return inputs


def export(model: PreTrainedModel, path: Path):
    """Writes the ONNX file, and its weights as `path` + ".data"."""
    batch = Dim("batch", min=1)
    tokens = Dim("tokens", min=1, max=model.config.max_position_embeddings)
    regions = Dim("regions")
    inputs = random_inputs(model.config, *TRACED_SIZE)
    with torch.no_grad():
        output_names = list(model(**inputs))
    torch.onnx.export(
        model,
        (),
        path,
        kwargs=inputs,
        input_names=list(inputs),
        output_names=output_names,
        dynamic_shapes={name: {0: batch, 1: regions if name.startswith("region") else tokens} for name in inputs},
        dynamo=True,
        verbose=False,
    )


def largest_difference(model: PreTrainedModel, path: Path) -> float:
    """Largest absolute difference between onnxruntime's and PyTorch's outputs, over sizes other than the traced one."""
    import onnxruntime  # of the extra `onnx`

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences = []
    for batch_size, num_tokens, num_regions in CHECKED_SIZES:
        num_tokens = min(num_tokens, model.config.max_position_embeddings)
        inputs = random_inputs(model.config, batch_size, num_tokens, num_regions)
        with torch.no_grad():
            expected = model(**inputs)
        outputs = session.run(list(expected), {name: tensor.numpy() for name, tensor in inputs.items()})
        for output, name in zip(outputs, expected, strict=True):
            if output.shape != expected[name].shape:
                raise ValueError(
                    f"`{name}` has shape {output.shape} in ONNX, {tuple(expected[name].shape)} in PyTorch."
                )
            differences.append(np.abs(output - expected[name].numpy()).max())
    return float(np.max(differences))  # not a number where any of them is none


def main():
    args = parse_args()
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f'The export needs {package}: pip install "interbert[onnx]"')
    torch.manual_seed(0)
    model, loading_info = MODEL_CLASSES[args.task].from_pretrained(
        args.model_name_or_path, dtype=torch.float32, output_loading_info=True
    )
    if loading_info["missing_keys"]:
        missing = ", ".join(sorted(loading_info["missing_keys"]))
        raise SystemExit(f"{args.model_name_or_path} has no weights for --task {args.task}: {missing} are missing.")
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_file.parent) as folder:
        unchecked = Path(folder) / args.output_file.name  # of the same name, since the file names that of its weights
        export(model, unchecked)
        difference = largest_difference(model, unchecked)
        if not difference <= args.tolerance:
            raise SystemExit(
                f"onnxruntime's outputs differ from PyTorch's by up to {difference:.1e}, more than --tolerance "
                f"{args.tolerance:.1e}: nothing was written."
            )
        weights = f"{args.output_file.name}.data"
        (Path(folder) / weights).replace(args.output_file.with_name(weights))
        unchecked.replace(args.output_file)
    print(f"Written to {args.output_file}. Largest difference from PyTorch over {CHECKED_SIZES}: {difference:.1e}")


if __name__ == "__main__":
    main()
