"""Which model is trained, and what it starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from configuration_interbert import InterBERTConfig
from processing import InterBERTProcessor, RegionDataset, RegionStream
from processing.region_extractors import LIMITS, detector_settings


@dataclass
class ModelArguments:
    """Which model is trained, and what it starts from: an InterBERT, a BERT, or nothing."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "InterBERT checkpoint to go on from, with its processor."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of `--model_name_or_path` on the Hub."}
    )
    bert_name_or_path: str | None = field(
        default=None, metadata={"help": "BERT checkpoint to start from, with its tokenizer."}
    )
    layout: str = field(
        default="paper",
        metadata={
            "help": "How the layers of `--bert_name_or_path` are used: all as interaction layers (paper), or the "
            "first half as interaction layers and the second as text stream (release).",
            "choices": ["paper", "release"],
        },
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a model from scratch: a folder, a file or a Hub name."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Values of the configuration, such as hidden_size=128,num_text_layers=2."}
    )
    region_detector: str | None = field(
        default=None,
        metadata={
            "help": "Detector that found the dataset's regions, a Hub name or a folder: the checkpoint names it, and "
            "takes photographs. By default that of the dataset, or of `--model_name_or_path`."
        },
    )
    region_detector_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `--region_detector` on the Hub."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "BERT tokenizer, if not that of the checkpoint."}
    )
    bert_learning_rate_scale: float = field(
        default=1.0, metadata={"help": "The learning rate of parameters from BERT is multiplied by it (release: 0.1)."}
    )

    def __post_init__(self):
        if self.model_name_or_path is not None and self.bert_name_or_path is not None:
            raise ValueError("Give either `--model_name_or_path` or `--bert_name_or_path`, not both.")
        if self.model_name_or_path is not None and (self.config_name or self.config_overrides or self.tokenizer_name):
            raise ValueError(
                "`--config_name`, `--config_overrides` and `--tokenizer_name` are for new models: the checkpoint of "
                "`--model_name_or_path` has its own."
            )
        if self.model_name_or_path is None and self.bert_name_or_path is None and self.tokenizer_name is None:
            raise ValueError("A model from scratch needs `--tokenizer_name`.")
        if self.region_detector_revision is not None and self.region_detector is None:
            raise ValueError("`--region_detector_revision` goes with `--region_detector`.")
        if self.bert_learning_rate_scale != 1 and self.bert_name_or_path is None:
            raise ValueError(
                "`--bert_learning_rate_scale` goes with `--bert_name_or_path`: in other checkpoints it is not known "
                "which parameters came from BERT."
            )
        if self.bert_learning_rate_scale < 0:
            raise ValueError(f"`--bert_learning_rate_scale` must not be negative, got {self.bert_learning_rate_scale}.")


def load_model(
    model_class: type[PreTrainedModel],
    args: ModelArguments,
    splits: Sequence[RegionDataset | RegionStream] = (),
    task_values: Mapping[str, Any] | None = None,
    new_values: Mapping[str, Any] | None = None,
    must_be_trained: bool = False,
    ignore_mismatched_sizes: bool = False,
    max_length: int | None = None,
    max_regions: int | None = None,
) -> tuple[PreTrainedModel, InterBERTProcessor]:
    """
    The model and its processor.

    Args:
        splits: Region datasets that the model is to read, of features of one width.
        task_values: Values of the configuration that the task decides on, such as `label2id`.
        new_values: Values of a new configuration; a checkpoint has its own.
        must_be_trained: The model is used as it is: all of its weights must come from a checkpoint.
        ignore_mismatched_sizes: Weights of other shapes than those of the checkpoint are new.
        max_length: Tokens of a text that the model is trained on, which its processor will cut texts to, too; by
            default the processor is left as it is.
        max_regions: Likewise the regions of an image.

    Raises:
        ValueError: model, tokenizer and datasets do not fit together, or weights are missing.
    """
    values = dict(task_values or {})
    region_feature_size = splits[0].region_feature_size if splits else None
    if any(regions.region_feature_size != region_feature_size for regions in splits):
        raise ValueError(f"All splits must have features as wide as the first, {region_feature_size}.")
    if args.model_name_or_path is not None:
        model_type = InterBERTConfig.get_config_dict(args.model_name_or_path, revision=args.model_revision)[0].get(
            "model_type"
        )
        if model_type != InterBERTConfig.model_type:
            raise ValueError(
                f"`--model_name_or_path` must be an InterBERT checkpoint, got {args.model_name_or_path} of model_type "
                f"{model_type!r}. `--bert_name_or_path` starts from a BERT."
            )
        model, info = model_class.from_pretrained(
            args.model_name_or_path,
            revision=args.model_revision,
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            # Whatever it was saved in: half precision is for `--mixed_precision`, as small steps would be lost in it.
            dtype=torch.float32,
            **values,
        )
        if must_be_trained and info["missing_keys"]:
            raise ValueError(
                f"Without `--do_train`, `--model_name_or_path` must have all weights of {model_class.__name__}, got "
                f"{args.model_name_or_path} without {', '.join(sorted(info['missing_keys']))}."
            )
        processor = InterBERTProcessor.from_pretrained(args.model_name_or_path, revision=args.model_revision)
        if region_feature_size not in (None, model.config.region_feature_size):
            raise ValueError(
                f"The dataset's region features must be as wide as the model's, {model.config.region_feature_size}, "
                f"got {region_feature_size}."
            )
    elif must_be_trained:
        raise ValueError(
            "Without `--do_train` there must be a trained model: expected `--model_name_or_path`, got none."
        )
    else:
        values |= new_values or {}
        if region_feature_size is not None:
            values["region_feature_size"] = region_feature_size
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.bert_name_or_path)
        if args.config_name is not None:
            config = InterBERTConfig.from_pretrained(args.config_name, **values)
        elif args.bert_name_or_path is not None:
            bert_config = AutoConfig.from_pretrained(args.bert_name_or_path)
            config = InterBERTConfig.from_bert_config(bert_config, layout=args.layout, **values)
        else:
            config = InterBERTConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **values)
        if args.config_overrides is not None:
            config.update_from_string(args.config_overrides)
            config.validate()  # setting values checks each of them, but not whether they fit together
        processor = InterBERTProcessor(tokenizer, region_feature_size=config.region_feature_size)
        if args.bert_name_or_path is not None:
            model = model_class.from_bert(args.bert_name_or_path, config=config, layout=args.layout)
        else:
            model = model_class(config)
    if len(processor.tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The model's vocabulary must hold the tokenizer's {len(processor.tokenizer)} tokens, got "
            f"{model.config.vocab_size}."
        )
    # Whoever opens the checkpoint gets what was measured.
    of_checkpoint = processor.region_detector or model.config.region_detector
    model.config.region_detector = find_region_detector(args, splits, of_checkpoint)
    processor.region_detector = model.config.region_detector
    if max_length is not None:
        processor.tokenizer.model_max_length = max_length
    if max_regions is not None:
        processor.max_regions = max_regions
    return model, processor


def find_region_detector(
    args: ModelArguments,
    splits: Sequence[RegionDataset | RegionStream],
    of_checkpoint: str | dict[str, Any] | None,
) -> dict[str, Any] | None:
    """
    What found the regions: the detector of the arguments, of the dataset, or of the checkpoint, the first of them that
    there is; with the dataset's limits, where it knows them. None if none is named.
    """
    of_dataset = dict(splits[0].region_detector or {}) if splits else {}
    limits = {name: of_dataset[name] for name in LIMITS if name in of_dataset}
    if args.region_detector is not None:
        is_of_dataset = of_dataset.get("name_or_path") == args.region_detector
        detector = of_dataset if is_of_dataset else {"name_or_path": args.region_detector}
        if args.region_detector_revision is not None:
            detector["revision"] = args.region_detector_revision
        # Of a detector that was a folder the dataset knows the backbone.
        backbone = {} if "name_or_path" in of_dataset else {n: v for n, v in of_dataset.items() if "backbone" in n}
        return detector | backbone | limits
    if "name_or_path" in of_dataset:
        return of_dataset
    if of_checkpoint is None:
        return None
    return detector_settings(of_checkpoint) | limits


def learning_rate_scales(model: PreTrainedModel, args: ModelArguments) -> dict[str, float]:
    """Of the parameters from BERT, as `training.make_optimizer` takes them."""
    if args.bert_learning_rate_scale == 1:
        return {}
    return dict.fromkeys(model.names_from_bert, args.bert_learning_rate_scale)
