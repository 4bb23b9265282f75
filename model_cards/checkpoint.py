"""What is known of a checkpoint beside what is measured of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperResult:
    """
    A result that the paper reports of its own checkpoint (arXiv 2003.13198). It is printed as the paper's.

    Args:
        task: Benchmark and setting.
        metric: Its metrics, in the order of `value`.
        value: As printed, in per cent.
    """

    task: str
    metric: str
    value: str


@dataclass(frozen=True)
class Checkpoint:
    """
    The texts of a checkpoint's card.

    Args:
        name: Of the repository, without its owner.
        auto_class: Name of the auto class that it is for.
        summary: What the checkpoint does, in one paragraph.
        languages: ISO 639-1 codes.
        license: Identifier of the Hub.
        recipe: File in `examples/recipes/`, or script, that trains it.
        intended_data: What that recipe is made for. What a checkpoint was trained on in fact is measured.
        limits: Of this checkpoint, beside those of every InterBERT; one sentence or more each.
        paper_results: What the paper reports for the same recipe.
    """

    name: str
    auto_class: str
    summary: str
    languages: tuple[str, ...]
    license: str
    recipe: str
    intended_data: str
    limits: tuple[str, ...] = ()
    paper_results: tuple[PaperResult, ...] = ()
