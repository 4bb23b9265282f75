"""Model cards from typed data: what was measured goes in, what is unknown is left out."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent / "template.md"
# What a reader wants to see of the outputs, by auto class.
USES = {
    "AutoModelForPreTraining": "match_probability = model(**inputs).itm_logits.softmax(-1)[:, 0]",
    "AutoModelForZeroShotImageClassification": "match_probability = model(**inputs).match_scores",
    "AutoModelForVisualQuestionAnswering": "answer = model.config.id2label[model(**inputs).logits[0].argmax().item()]",
    "AutoModelForMultipleChoice": "choice = model(**inputs).logits.argmax(-1)",
    "AutoModelForSequenceClassification": "label = model.config.id2label[model(**inputs).logits[0].argmax().item()]",
}
# The same of a regression, whose only output is the score.
SCORE_USE = "score = model(**inputs).logits[0, 0].item()"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class TrainedCard:
    """
    What the card of a trained checkpoint says: of an InterBERT, or of a BERT that was trained to be compared with it.

    Args:
        repo_id: Repository of the checkpoint, or the folder that it is in.
        auto_class: Name of the auto class that the checkpoint is for.
        config: The model's configuration.
        num_parameters: Counted, not computed.
        dataset_name: What it was trained on: a Hub name, a folder, or another name.
        training_arguments: Name and value of what the training was started with.
        results: One row per epoch, as the training loop returns them.
        initialized_from: Checkpoint that the model started from, if any: a Hub name or a folder.
    """

    repo_id: str
    auto_class: str
    config: Any
    num_parameters: int
    dataset_name: str
    training_arguments: dict[str, Any]
    results: list[dict[str, float]]
    initialized_from: str | None = None

    def render(self) -> ModelCard:
        """The card with its metadata. Folders of this machine are no Hub names, and stay out of the metadata."""
        is_interbert = self.config.model_type == "interbert"
        metadata = ModelCardData(
            library_name="transformers",
            tags=["interbert", "custom_code", "vision-and-language", "image-text-matching"] if is_interbert else None,
            datasets=hub_name(self.dataset_name),
            base_model=hub_name(self.initialized_from),
        )
        return ModelCard.from_template(
            metadata,
            template_path=str(TEMPLATE),
            model_name=self.repo_id.rstrip("/").split("/")[-1],
            repo_id=self.repo_id,
            auto_class=self.auto_class,
            use=SCORE_USE if self.config.problem_type == "regression" else USES[self.auto_class],
            is_interbert=is_interbert,
            takes_regions=self.auto_class != "AutoModelForSequenceClassification",
            config=self.config,
            num_parameters=self.num_parameters,
            dataset_name=self.dataset_name,
            training_arguments=self.training_arguments,
            results=markdown_table(self.results),
            initialized_from=self.initialized_from,
        )


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
        cells = ["" if name not in row else f"{row[name]:.4g}" for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
