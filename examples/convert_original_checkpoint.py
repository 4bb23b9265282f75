#!/usr/bin/env python
"""
Converts a checkpoint of the authors' release (GitHub black4321/InterBERT, 2020) to a folder for `from_pretrained`.

    python examples/convert_original_checkpoint.py pytorch_model_9.bin bert_base_6layer.json interbert-converted

The tests' small one:

    python examples/convert_original_checkpoint.py \\
        tests/fixtures/parity/released_layout/pretraining_checkpoint.bin \\
        tests/fixtures/parity/released_layout/original_config.json \\
        outputs/converted

With `--tokenizer_name bert-base-uncased` the processor is written too. A task model is written with all of its heads,
and opens under the class of each; `--model_class InterBERTForVQA` writes that class alone.
"""

import argparse

from transformers import AutoTokenizer

import modeling_interbert
from modeling_interbert.conversion import build_converted_model, read_original_checkpoint
from processing import InterBERTProcessor


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a checkpoint of the authors' InterBERT release.")
    parser.add_argument("checkpoint", help="The release's .bin file (pretraining or task model).")
    parser.add_argument("config", help="The release's JSON configuration of that model.")
    parser.add_argument("output_dir", help="Folder to write the converted model to.")
    parser.add_argument(
        "--model_class",
        choices=[
            "InterBERTModel",
            "InterBERTForPreTraining",
            "InterBERTForImageRetrieval",
            "InterBERTForVQA",
            "InterBERTForMultipleChoice",
        ],
        help="Class to convert to. By default everything that the checkpoint has, to open under any of them.",
    )
    parser.add_argument(
        "--tokenizer_name", help="Hub name or folder of the BERT tokenizer that the checkpoint was trained with."
    )
    return parser.parse_args()


def main():
    args = parse_args()
    config, weights = read_original_checkpoint(args.checkpoint, args.config)
    model_class = getattr(modeling_interbert, args.model_class or "InterBERTForPreTraining")
    model = build_converted_model(config, weights, model_class)
    if args.model_class is not None:
        weights = model.state_dict()
    # Without a class, all that the checkpoint has: the pretraining model, and beside it the heads of the tasks.
    weights.pop("mlm_head.decoder.weight", None)  # tied to the word embeddings
    num_parameters = sum(weight.numel() for weight in weights.values())
    model.save_pretrained(args.output_dir, state_dict=weights)  # empties the dict
    if args.tokenizer_name is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
        processor = InterBERTProcessor(tokenizer, region_feature_size=model.config.region_feature_size)
        processor.save_pretrained(args.output_dir)
    print(f"{num_parameters:,} parameters written to {args.output_dir}")


if __name__ == "__main__":
    main()
