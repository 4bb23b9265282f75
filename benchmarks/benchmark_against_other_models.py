"""
Measures InterBERT against LXMERT and VisualBERT of transformers, of equal width and depth: inference and a training
step, a batch and one pair alone (batch 1).

```bash
python benchmarks/benchmark_against_other_models.py
```

Equal depth: InterBERT has the layers of the authors' release, 6 interaction layers and 6 in each stream, so that every
word and every region passes 12 layers. VisualBERT gets 12 layers. LXMERT gets 6 language, 6 vision and 6 cross-modality
layers: again 12 for every word and every region, but a cross-modality layer has a cross-attention on top. A
layer-position is one position that passes one layer. InterBERT's match scores compute less than its encoder: no score
needs the last layers' output at all positions.

All have the same inputs, without padding: captions of 16 tokens, images of 36 regions. Inference is the encoder with
its pooled output. Training is forward pass, backward pass, gradient clipping and AdamW: masked words (15 %) and
matching for all, masked regions (15 %, by class) for InterBERT and LXMERT; VisualBERT has no such head. LXMERT's
question answering, attributes and feature regression are switched off. LXMERT and VisualBERT have no other attention
than eager.

On a CPU, keep the C library from returning the memory of each step to the system:

```bash
GOMP_SPINCOUNT=10000 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \\
    python benchmarks/benchmark_against_other_models.py
```
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from drawn_inputs import build_config
from measuring import (
    DTYPES,
    add_measuring_arguments,
    count_flops,
    describe_machine,
    measure,
    milliseconds,
    per_second,
    print_table,
    speed_ratio,
)
from transformers import (
    LxmertConfig,
    LxmertForPreTraining,
    PreTrainedModel,
    VisualBertConfig,
    VisualBertForPreTraining,
)

from configuration_interbert import InterBERTConfig
from modeling_interbert import InterBERTForPreTraining
from training import TrainingArguments, make_optimizer

MASK_PROBABILITY = 0.15


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure InterBERT against LXMERT and VisualBERT.")
    add_measuring_arguments(parser, rounds=3)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_tokens", type=int, default=16)
    parser.add_argument("--num_regions", type=int, default=36)
    parser.add_argument("--latency_rounds", type=int, default=20, help="Rounds of the measurement at batch 1.")
    return parser.parse_args(arguments)


@dataclass
class Contestant:
    """A model with what it takes to run it."""

    model: PreTrainedModel
    attn_implementation: str
    layer_positions: int  # of one pair
    encode: Callable[[dict], object]
    compute_loss: Callable[[dict], torch.Tensor] | None


def draw_batch(
    config: InterBERTConfig, batch_size: int, args: argparse.Namespace, device: torch.device
) -> dict[str, torch.Tensor]:
    """InterBERT's inputs and labels; those of the others are made from them."""
    text, regions = (batch_size, args.num_tokens), (batch_size, args.num_regions)
    input_ids = torch.randint(config.vocab_size, text)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones(text, dtype=torch.long),
        "region_features": torch.rand(*regions, config.region_feature_size),
        "region_boxes": torch.rand(*regions, 2, 2).sort(dim=2).values.flatten(2),
        "region_attention_mask": torch.ones(regions, dtype=torch.long),
        "labels": input_ids.where(torch.rand(text) < MASK_PROBABILITY, -100),
        "region_targets": torch.randint(config.num_region_classes, regions),
        "region_target_mask": (torch.rand(regions) < MASK_PROBABILITY).long(),
        "itm_labels": torch.randint(2, (batch_size,)),
    }
    # A batch without a masked word or region has no gradient for the heads, and LXMERT's loss of it is not a number.
    batch["labels"][0, 0], batch["region_target_mask"][0, 0] = input_ids[0, 0], 1
    return {name: tensor.to(device) for name, tensor in batch.items()}


def text_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def interbert_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ("region_features", "region_boxes", "region_attention_mask")
    return text_inputs(batch) | {name: batch[name] for name in names}


def make_interbert(config: InterBERTConfig, args: argparse.Namespace) -> dict[str, Contestant]:
    model = InterBERTForPreTraining(config)
    image_positions = args.num_regions + 1  # the whole image is one
    layer_positions = config.num_hidden_layers * (args.num_tokens + image_positions)
    layer_positions += config.num_text_layers * args.num_tokens + config.num_vision_layers * image_positions
    scored_layer_positions = layer_positions
    if config.num_text_layers:
        scored_layer_positions -= args.num_tokens - 1
    if config.num_vision_layers:
        scored_layer_positions -= image_positions - 1

    def encode(batch):
        return model.interbert(**interbert_inputs(batch))

    def match(batch):
        outputs = model.interbert(**interbert_inputs(batch), pooled_only=True)
        return model.itm_head(outputs.text_pooler_output, outputs.vision_pooler_output)

    def compute_loss(batch):
        return model(**batch).loss

    return {
        "InterBERT": Contestant(model, "sdpa", layer_positions, encode, compute_loss),
        "InterBERT, eager": Contestant(model, "eager", layer_positions, encode, compute_loss),
        "InterBERT, match scores": Contestant(model, "sdpa", scored_layer_positions, match, None),
    }


def make_lxmert(config: InterBERTConfig, args: argparse.Namespace) -> Contestant:
    lxmert_config = LxmertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        l_layers=config.num_text_layers,
        r_layers=config.num_vision_layers,
        x_layers=config.num_hidden_layers,
        visual_feat_dim=config.region_feature_size,
        num_object_labels=config.num_region_classes,
        task_qa=False,
        visual_attr_loss=False,
        visual_feat_loss=False,
    )
    model = LxmertForPreTraining(lxmert_config)
    layer_positions = lxmert_config.l_layers * args.num_tokens + lxmert_config.r_layers * args.num_regions
    layer_positions += lxmert_config.x_layers * (args.num_tokens + args.num_regions)

    def inputs_of(batch):
        return text_inputs(batch) | {
            "visual_feats": batch["region_features"],
            "visual_pos": batch["region_boxes"],
            "visual_attention_mask": batch["region_attention_mask"],
        }

    def encode(batch):
        return model.lxmert(**inputs_of(batch))

    def compute_loss(batch):
        region_weights = batch["region_target_mask"].to(model.dtype)
        labels = {"obj_labels": {"obj": (batch["region_targets"], region_weights)}, "labels": batch["labels"]}
        return model(**inputs_of(batch), **labels, matched_label=1 - batch["itm_labels"]).loss

    return Contestant(model, "eager", layer_positions, encode, compute_loss)


def make_visual_bert(config: InterBERTConfig, args: argparse.Namespace) -> Contestant:
    visual_bert_config = VisualBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers + config.num_text_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        visual_embedding_dim=config.region_feature_size,
        pad_token_id=config.pad_token_id,
    )
    model = VisualBertForPreTraining(visual_bert_config)
    layer_positions = visual_bert_config.num_hidden_layers * (args.num_tokens + args.num_regions)

    def inputs_of(batch):
        return text_inputs(batch) | {
            "visual_embeds": batch["region_features"],
            "visual_attention_mask": batch["region_attention_mask"],
        }

    def encode(batch):
        return model.visual_bert(**inputs_of(batch))

    def compute_loss(batch):
        labels = torch.nn.functional.pad(batch["labels"], (0, args.num_regions), value=-100)
        return model(**inputs_of(batch), labels=labels, sentence_image_labels=batch["itm_labels"]).loss

    return Contestant(model, "eager", layer_positions, encode, compute_loss)


def training_step(contestant: Contestant, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    contestant.model.set_attn_implementation(contestant.attn_implementation)
    contestant.model.train()
    contestant.compute_loss(batch).backward()
    torch.nn.utils.clip_grad_norm_(contestant.model.parameters(), TrainingArguments.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


@torch.inference_mode()
def infer(contestant: Contestant, batch: dict[str, torch.Tensor]) -> None:
    contestant.model.set_attn_implementation(contestant.attn_implementation)
    contestant.model.eval()
    contestant.encode(batch)


def make_rows(
    contestants: dict[str, Contestant],
    run: Callable[[Contestant, dict], None],
    batch: dict[str, torch.Tensor],
    pair: dict[str, torch.Tensor],
    args: argparse.Namespace,
) -> list[dict[str, str]]:
    """Times `run` of every model on the batch and on the single pair."""
    device, batch_size = pair["input_ids"].device, len(batch["input_ids"])

    def measure_on(inputs, rounds):
        return measure({name: lambda c=c: run(c, inputs) for name, c in contestants.items()}, rounds, device, args.seed)

    seconds, latencies = measure_on(batch, args.rounds), measure_on(pair, args.latency_rounds)
    first = next(iter(contestants))
    rows = []
    for name, contestant in contestants.items():
        eager = replace(contestant, attn_implementation="eager")  # whose products are all counted
        gigaflops = count_flops(lambda eager=eager: run(eager, pair)) / 1e9
        rows.append(
            {
                "model": name,
                "parameters": f"{contestant.model.num_parameters() / 1e6:.1f}M",
                "layer-positions": f"{contestant.layer_positions:,}",
                "GFLOP a pair": f"{gigaflops:.2f}",
                "pairs/s": per_second(batch_size, seconds[name]),
                f"speed (median, range of {args.rounds})": speed_ratio(seconds[first], seconds[name]),
                "batch 1: ms": milliseconds(latencies[name]),
                "batch 1: speed": speed_ratio(latencies[first], latencies[name]),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    torch.manual_seed(args.seed)
    # As many heads in both streams: the other models have one number for all layers.
    config = build_config(args.config_overrides, region_objective="hard_class", vision_num_attention_heads=12)
    contestants = make_interbert(config, args)
    contestants |= {"LXMERT": make_lxmert(config, args), "VisualBERT": make_visual_bert(config, args)}
    for contestant in contestants.values():
        contestant.model.to(device, dtype)
    batch, pair = (draw_batch(config, size, args, device) for size in (args.batch_size, 1))
    for inputs in (batch, pair):
        inputs["region_features"] = inputs["region_features"].to(dtype)
        inputs["region_boxes"] = inputs["region_boxes"].to(dtype)
    print(f"{args.num_tokens} tokens, {args.num_regions} regions, width {config.hidden_size}, batch {args.batch_size}")
    print(describe_machine(device, args.dtype))

    print("\nInference")
    print_table(make_rows(contestants, infer, batch, pair, args))

    trained = {name: contestant for name, contestant in contestants.items() if contestant.compute_loss is not None}
    optimizers = {id(c.model): make_optimizer(c.model, TrainingArguments()) for c in trained.values()}

    def train(contestant, inputs):
        training_step(contestant, optimizers[id(contestant.model)], inputs)

    print("Training step")
    print_table(make_rows(trained, train, batch, pair, args))


if __name__ == "__main__":
    main()
