from .checkpoint import Checkpoint, PaperResult

CHECKPOINT = Checkpoint(
    name="interbert-base-vcr",
    auto_class="AutoModelForMultipleChoice",
    summary=(
        "Visual commonsense reasoning: chooses one of four answers to a question about a scene of a film (Q→A, trained "
        "with `--task answer`) or one of four reasons for an answer (QA→R, trained with `--task rationale`)."
    ),
    languages=("en",),
    license="apache-2.0",
    recipe="examples/recipes/vcr_answer.yaml",
    intended_data=(
        "VCR: 213K questions about 80K images, with boxes and tags of the objects that they speak of. Rationales have "
        "a recipe of their own, `vcr_rationale.yaml` beside it."
    ),
    limits=(
        "Questions of VCR refer to annotated boxes, which take part as regions: without them it does not know who is "
        "meant.",
        "People are called by unisex names in the texts. What it infers of their intentions and feelings are the "
        "guesses that annotators made about films, not facts about anybody.",
    ),
    paper_results=(
        PaperResult("VCR, Q→A / QA→R / Q→AR", "accuracy", "73.1 / 74.8 / 54.9"),
        PaperResult("the same without pretraining", "accuracy", "63.6 / 63.1 / 40.3"),
    ),
)
