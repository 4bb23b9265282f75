from .checkpoint import Checkpoint, PaperResult

CHECKPOINT = Checkpoint(
    name="interbert-base",
    auto_class="AutoModelForPreTraining",
    summary=(
        "The pretrained base model for English: it masks and restores words and objects, and says whether a text and "
        "an image match. Use it to score texts and images as it is, or finetune it."
    ),
    languages=("en",),
    license="apache-2.0",
    recipe="examples/recipes/pretrain_base.yaml",
    intended_data=(
        "Conceptual Captions (3.3M images), SBU Captions (890K) and COCO captions (587K pairs), without the images of "
        "the downstream datasets, from BERT-base."
    ),
    limits=(
        "Conceptual Captions and SBU are alt texts and captions of the web, filtered by rules: they carry its "
        "stereotypes, over-represent the English-speaking countries, and often say what a picture does not show.",
    ),
    paper_results=(
        PaperResult("Flickr30K image retrieval, zero-shot", "R@1 / R@5 / R@10", "49.2 / 77.6 / 86.0"),
        PaperResult(
            "GLUE, text only: CoLA / SST-2 / STS-B / RTE",
            "Matthews / accuracy / correlation / accuracy",
            "57.3 / 91.7 / 88.9 / 64.3",
        ),
    ),
)
