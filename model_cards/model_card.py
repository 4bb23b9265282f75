"""Model cards from typed data: what was measured goes in, what is unknown is left out."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .checkpoint import Checkpoint

TEMPLATE = Path(__file__).parent / "template.md"
ARCHITECTURE_PICTURE = "architecture.png"
TAGS = ["interbert", "custom_code", "vision-and-language", "image-text-matching"]
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

# What of the results goes into the metadata: its metric on the Hub, and its name there.
METRICS = {
    **{f"eval_image_recall_at_{k}": ("recall", f"image retrieval R@{k}") for k in (1, 5, 10)},
    **{f"eval_text_recall_at_{k}": ("recall", f"text retrieval R@{k}") for k in (1, 5, 10)},
    "eval_precision_at_5": ("precision", "P@5"),
    "eval_vqa_score": ("accuracy", "VQA score"),
    "eval_accuracy": ("accuracy", "accuracy"),
    "eval_answer_accuracy": ("accuracy", "Q→A accuracy"),
    "eval_rationale_accuracy": ("accuracy", "QA→R accuracy"),
    "eval_answer_and_rationale_accuracy": ("accuracy", "Q→AR accuracy"),
    "eval_matthews_correlation": ("matthews_correlation", "Matthews correlation"),
    "eval_pearson": ("pearsonr", "Pearson correlation"),
    "eval_spearmanr": ("spearmanr", "Spearman correlation"),
}


# Arguments of the training scripts by which less than the whole split is evaluated, or other texts than its own.
LIMITS = ("max_eval_samples", "retrieval_eval_size", "validation_fraction", "captions_per_image", "queries")


@dataclass(frozen=True)
class WidgetExample:
    """
    An example for the page of the checkpoint, and what the checkpoint's pipeline gave for it.

    Args:
        src: The picture: a file of the repository.
        output: As the widget of the task takes it.
        text: A question.
        candidate_labels: Texts to be matched, separated by commas.
    """

    src: str
    output: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    text: str | None = None
    candidate_labels: str | None = None

    def to_metadata(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class TrainedCard:
    """
    What the card of a trained checkpoint says: of an InterBERT, or of a BERT that was trained to be compared with it.

    Args:
        repo_id: Repository of the checkpoint, or the folder that it is in.
        auto_class: Name of the auto class that the checkpoint is for.
        pipeline_tag: Task that `transformers.pipeline` and the Hub know it by.
        config: The model's configuration.
        num_parameters: Counted, not computed.
        dataset_name: What it was trained on: a Hub name, a folder, or another name.
        training_arguments: Name and value of what the training was started with.
        results: One row per epoch, as the training loop returns them.
        initialized_from: Checkpoint that the model started from, if any: a Hub name or a folder.
        checkpoint: What else is known of it, if it is one of those with a data file of their own.
        widget: Examples with their outputs.
    """

    repo_id: str
    auto_class: str
    pipeline_tag: str
    config: Any
    num_parameters: int
    dataset_name: str
    training_arguments: dict[str, Any]
    results: list[dict[str, float]]
    initialized_from: str | None = None
    checkpoint: Checkpoint | None = None
    widget: Sequence[WidgetExample] = ()

    @property
    def name(self) -> str:
        return self.repo_id.rstrip("/").split("/")[-1]

    def render(self) -> ModelCard:
        """The card with its metadata. Folders of this machine are no Hub names, and stay out of the metadata."""
        is_interbert = self.config.model_type == "interbert"
        evaluation = self._evaluation()
        metadata = ModelCardData(
            model_name=self.name if evaluation else None,
            language=list(self.checkpoint.languages) if self.checkpoint else None,
            license=self.checkpoint.license if self.checkpoint else None,
            library_name="transformers",
            pipeline_tag=self.pipeline_tag,
            tags=TAGS if is_interbert else None,
            datasets=hub_name(self.dataset_name),
            base_model=hub_name(self.initialized_from),
            metrics=list(dict.fromkeys(result.metric_type for result in evaluation)) or None,
            eval_results=evaluation or None,
            widget=[example.to_metadata() for example in self.widget] or None,
        )
        return ModelCard.from_template(
            metadata,
            template_path=str(TEMPLATE),
            card=self,
            is_interbert=is_interbert,
            architecture_picture=ARCHITECTURE_PICTURE,
            region_detector=self._region_detector(),
            is_evaluated=any(name.startswith("eval_") for row in self.results for name in row),
            is_averaged=self.training_arguments.get("ema_decay") not in (None, "None"),
            results=markdown_table(self.results),
        )

    def _region_detector(self) -> str | None:
        """Its name on the Hub, if the configuration has one."""
        detector = getattr(self.config, "region_detector", None)
        return hub_name(detector["name_or_path"] if isinstance(detector, dict) else detector)

    def _evaluation(self) -> list[EvalResult]:
        """The last results, as the metadata has them."""
        dataset = hub_name(self.dataset_name) or Path(self.dataset_name).name
        last = self.results[-1] if self.results else {}
        limits = {name: self.training_arguments.get(name) for name in LIMITS}
        limits = {name: value for name, value in limits.items() if value not in (None, "None")}
        # A fraction is held out of the training split.
        split = None if "validation_fraction" in limits else self.training_arguments.get("validation_split")
        return [
            EvalResult(
                task_type=self.pipeline_tag,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=split,
                dataset_args=limits or None,
                metric_type=metric,
                metric_name=name,
                metric_value=round(last[result], 4),
            )
            for result, (metric, name) in METRICS.items()
            if result in last and not math.isnan(last[result])
        ]


def hub_name(name: str | None) -> str | None:
    """The name if it can be one on the Hub and is no folder here, else None."""
    if name is None or Path(name).exists() or not HUB_NAME.fullmatch(name):
        return None
    return name


def markdown_table(rows: list[dict[str, float]]) -> str:
    """A table with a column for every name that occurs in a row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        values = [row.get(name, "") for name in names]
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
