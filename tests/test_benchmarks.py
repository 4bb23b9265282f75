"""Every benchmark runs at a tiny size and prints its table; those that compare results fail where results differ."""

import argparse
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts import one another by plain name

import benchmark_against_other_models  # noqa: E402
import benchmark_attention  # noqa: E402
import benchmark_matmul_peak  # noqa: E402
import benchmark_pretraining_step  # noqa: E402
import benchmark_region_detector  # noqa: E402
import benchmark_scoring  # noqa: E402
import drawn_inputs  # noqa: E402
import measuring  # noqa: E402

SCRIPTS = sorted(BENCHMARKS.glob("benchmark_*.py"))
SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_text_layers": 1,
    "num_vision_layers": 1,
    "num_attention_heads": 2,
    "vision_num_attention_heads": 2,
    "intermediate_size": 16,
    "vision_intermediate_size": 16,
    "pooler_size": 8,
    "region_feature_size": 6,
    "num_region_classes": 5,
}
TINY = ["--config_overrides", ",".join(f"{name}={value}" for name, value in SIZES.items()), "--rounds", "1"]
SCORING = [*TINY, "--num_captions", "3", "--num_images", "4", "--batch_size", "4", "--latency_rounds", "1"]
PRETRAINING = [*TINY, "--batch_size", "4", "--num_batches", "2"]
CPU = torch.device("cpu")


def tables(output: str) -> list[list[list[str]]]:
    """The cells of the body of every Markdown table."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", output, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        assert len({len(line) for line in block.splitlines()}) == 1, "columns are aligned"
        assert len({len(row) for row in rows}) == 1
        found.append(rows[2:])
    return found


def first_cells(table: list[list[str]]) -> list[str]:
    return [row[0] for row in table]


@pytest.fixture
def region_dataset(tmp_path) -> list[str]:
    """Arguments that name a region dataset on disk with its tokenizer."""
    config = drawn_inputs.build_config(TINY[1])
    tokenizer = drawn_inputs.build_tokenizer(config.vocab_size)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    regions = drawn_inputs.draw_region_dataset(np.random.default_rng(0), tokenizer, 8, config)
    (tmp_path / "data").mkdir()
    regions.dataset.to_parquet(tmp_path / "data" / "train.parquet")
    folders = {"--dataset_name": "data", "--tokenizer_name": "tokenizer", "--cache_dir": "cache"}
    return [argument for name, folder in folders.items() for argument in (name, str(tmp_path / folder))]


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    assert "usage: " in capsys.readouterr().out
    first_block = re.search(r"```bash\n(.*?)```", script.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert first_block.group(1).startswith(f"python benchmarks/{script.name}")


def test_region_detector(capsys):
    sizes = "depth=50,stem_channels=4,res2_channels=8,width_per_group=2,rpn_channels=4,num_classes=5,num_attributes=2"
    benchmark_region_detector.main(
        ["--config_overrides", sizes, "--rounds", "1", "--height", "64", "--width", "96", "--square_sizes", "16"]
    )
    output = capsys.readouterr().out
    (rows,) = tables(output)
    assert first_cells(rows)[0] == "picture to regions, float32" and first_cells(rows)[-1] == "16 x 16 times 16 x 16"
    assert all(float(row[2].replace(",", "")) > 0 and row[-1].endswith(" %") for row in rows)
    assert "bfloat16: skipped" in output or "picture to regions, bfloat16" in first_cells(rows)
    assert int(re.search(r"^(\d+) proposals$", output, re.MULTILINE)[1]) > 0
    assert "MiB of the process" in output


def test_scoring(capsys):
    benchmark_scoring.main([*SCORING, "--bf16"])
    output = capsys.readouterr().out
    (rows,) = tables(output)
    names = [path.name for path in benchmark_scoring.PATHS]
    assert first_cells(rows) == [*names, benchmark_scoring.SHIPPED, benchmark_scoring.SHIPPED_BF16]
    assert {row[-1] for row in rows[:-1]} == {"100.00 %"}
    assert max(float(row[-2]) for row in rows[:-1]) < benchmark_scoring.TIE_MARGIN
    assert float(rows[-1][-2]) > 0, "bf16 rounds"
    assert "float32" in output.splitlines()[1]


def test_scoring_of_a_dataset(region_dataset, capsys):
    benchmark_scoring.main([*SCORING, *region_dataset, "--no-bf16", "--max_length", "12"])
    output = capsys.readouterr().out
    assert len(tables(output)[0]) == len(benchmark_scoring.PATHS) + 1
    assert int(re.search(r"Tokens of the captions: \d+ to (\d+)", output).group(1)) <= 12
    assert "bf16 skipped: --no-bf16" in output


def test_scoring_fails_where_a_path_orders_images_otherwise(monkeypatch):
    def reverse_images(*args, **kwargs):
        return scorer(*args, **kwargs)[:, ::-1]

    scorer = benchmark_scoring.score_captions_against_images
    monkeypatch.setattr(benchmark_scoring, "score_captions_against_images", reverse_images)
    with pytest.raises(SystemExit, match="unlike the plain path.*as shipped"):
        benchmark_scoring.main([*SCORING, "--no-bf16"])


def test_rankings_by_hand():
    reference = np.array([[3.0, 2.0, 1.0], [0.0, 0.0005, 5.0]])
    # 3 > 2, 3 > 1, 2 > 1 and twice 5 > 0; the two scores near 0 are a tie.
    assert benchmark_scoring.compare_rankings(reference, reference) == (0, 5)
    assert benchmark_scoring.compare_rankings(reference, np.array([[2.0, 3.0, 1.0], [1.0, 0.0, 5.0]])) == (1, 5)
    assert benchmark_scoring.compare_rankings(reference, np.array([[2.0, 2.0, 1.0], [0.0, 6.0, 5.0]])) == (2, 5)
    assert benchmark_scoring.compare_rankings(reference, np.full((2, 3), np.nan)) == (5, 5)


def test_pretraining_step(capsys):
    benchmark_pretraining_step.main([*PRETRAINING, "--bf16"])
    (rows,) = tables(capsys.readouterr().out)
    assert first_cells(rows) == [path.name for path in benchmark_pretraining_step.PATHS]
    padding = [int(row[1].removesuffix(" %")) for row in rows]
    assert padding[0] == padding[1] == padding[2] > padding[3] > padding[4] == padding[5]


def test_pretraining_step_of_a_dataset(region_dataset, capsys):
    benchmark_pretraining_step.main([*PRETRAINING, *region_dataset, "--no-bf16"])
    output = capsys.readouterr().out
    assert len(tables(output)[0]) == len(benchmark_pretraining_step.PATHS) - 1
    assert f"Lengths: {region_dataset[1]}, split train" in output


def test_pretraining_step_fails_where_a_path_has_another_loss(monkeypatch):
    loss = benchmark_pretraining_step.loss_with_heads_everywhere
    monkeypatch.setattr(
        benchmark_pretraining_step, "loss_with_heads_everywhere", lambda model, batch: 1.001 * loss(model, batch)
    )
    with pytest.raises(SystemExit, match="different losses"):
        benchmark_pretraining_step.main([*PRETRAINING, "--no-bf16"])


def test_attention(capsys):
    # flex_attention would be compiled, for about a minute.
    benchmark_attention.main(
        [*TINY, "--batch_size", "2", "--lengths", "5x3", "2x4", "--implementations", "eager", "sdpa", "no_such"]
    )
    output = capsys.readouterr().out
    (rows,) = tables(output)
    assert [row[:2] for row in rows] == [
        [name, length] for length in ("5x3", "2x4") for name in ("eager", "sdpa", "no_such")
    ]
    assert rows[0][3] == "1.00 (1.00–1.00)"
    assert rows[2][2:] == ["–"] * 4
    assert "skipped: no_such, inference: " in output and "skipped: no_such, training: " in output


def test_against_other_models(capsys):
    benchmark_against_other_models.main(
        [*TINY, "--batch_size", "3", "--num_tokens", "5", "--num_regions", "4", "--latency_rounds", "1"]
    )
    inference, training = tables(capsys.readouterr().out)
    assert first_cells(training) == ["InterBERT", "InterBERT, eager", "LXMERT", "VisualBERT"]
    assert first_cells(inference) == [*training_names(training), "LXMERT", "VisualBERT"]
    # 5 words and 5 image positions pass 2 layers each; for a match score 4 + 4 of the last ones are left out.
    assert [row[2] for row in inference] == ["20", "20", "12", "18", "18"]


def training_names(training: list[list[str]]) -> list[str]:
    return [*first_cells(training)[:2], "InterBERT, match scores"]


def test_other_models_have_the_depth_and_width_of_interbert():
    args = argparse.Namespace(num_tokens=5, num_regions=4)
    config = drawn_inputs.build_config(None, hidden_size=24, intermediate_size=32, vocab_size=50)
    with torch.device("meta"):
        lxmert = benchmark_against_other_models.make_lxmert(config, args)
        visual_bert = benchmark_against_other_models.make_visual_bert(config, args)
    assert lxmert.layer_positions == visual_bert.layer_positions == 12 * 9
    for contestant in (lxmert, visual_bert):
        assert contestant.model.config.hidden_size == 24
    assert len(visual_bert.model.visual_bert.encoder.layer) == 12
    encoder = lxmert.model.lxmert.encoder
    assert [len(layers) for layers in (encoder.layer, encoder.r_layers, encoder.x_layers)] == [6, 6, 6]


def test_matmul_peak(capsys):
    benchmark_matmul_peak.main([*PRETRAINING, "--square_sizes", "32", "64"])
    (rows,) = tables(capsys.readouterr().out)
    assert first_cells(rows)[:3] == [
        "32 x 32 times 32 x 32",
        "64 x 64 times 64 x 64",
        f"{4 * 73} x 16 times 16 x 16",
    ]
    parts = ("match scores", "forward and backward", "whole step")
    assert first_cells(rows)[-6:] == [f"{part}, {kind}" for kind in ("padded", "trimmed") for part in parts]
    assert max(int(row[4].removesuffix(" %")) for row in rows[:-6]) == 100


def test_flops_are_counted_by_hand():
    left, right = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    assert measuring.count_flops(lambda: left @ right) == 2 * 3 * 4 * 5
    assert measuring.count_flops(lambda: (left @ right).sum().backward()) == 3 * 2 * 3 * 4 * 5


def test_measure_takes_turns():
    runs = []
    seconds = measuring.measure({name: lambda name=name: runs.append(name) for name in "abc"}, 4, CPU)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 4)
    rounds = [runs[start : start + 3] for start in range(0, len(runs), 3)]
    assert len(rounds) == 5 and all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_speed_ratio_by_hand():
    # Ratios of the rounds: 2, 1.5 and 4.
    assert measuring.speed_ratio([2.0, 3.0, 4.0], [1.0, 2.0, 1.0]) == "2.00 (1.50–4.00)"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
    ],
)
def test_bf16_instructions(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert measuring.has_bf16_instructions(CPU) is expected
    assert measuring.has_bf16_instructions(torch.device("cuda"))


def test_bf16_is_skipped_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_scoring, "has_bf16_instructions", lambda device: False)
    benchmark_scoring.main(SCORING)
    assert "bf16 skipped: this CPU has no bf16 instructions" in capsys.readouterr().out


def test_drawn_captions_have_as_many_tokens_as_words_and_special_tokens():
    tokenizer = drawn_inputs.build_tokenizer(60)
    captions = drawn_inputs.draw_captions(np.random.default_rng(0), tokenizer, 200, max_tokens=16)
    counts = [len(ids) for ids in tokenizer(captions).input_ids]
    assert counts == [len(caption.split()) + 2 for caption in captions]
    assert min(counts) >= 5 and max(counts) == 16
    with pytest.raises(ValueError, match="at least 5.*got 4"):
        drawn_inputs.draw_captions(np.random.default_rng(0), tokenizer, 1, max_tokens=4)


def test_dataset_and_tokenizer_need_each_other():
    with pytest.raises(ValueError, match="need each other"):
        benchmark_scoring.main([*SCORING, "--dataset_name", "somewhere"])
    with pytest.raises(ValueError, match="need each other"):
        benchmark_pretraining_step.main([*PRETRAINING, "--tokenizer_name", "somewhere"])
