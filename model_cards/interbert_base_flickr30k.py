from .checkpoint import Checkpoint, PaperResult

CHECKPOINT = Checkpoint(
    name="interbert-base-flickr30k",
    auto_class="AutoModelForZeroShotImageClassification",
    summary="Finds the images that a caption describes, and the captions that describe an image, by scoring each pair.",
    languages=("en",),
    license="apache-2.0",
    recipe="examples/recipes/flickr30k_retrieval.yaml",
    intended_data="Flickr30K: 29K images with five captions each, from interbert-base.",
    limits=(
        "The captions of Flickr30K are of everyday scenes with people, written by workers who were paid for it: they "
        "guess at relations, occupations and ethnicity that no picture shows, and the scores follow them.",
        "Every pair is a pass through the model: search among millions of images needs a faster first stage.",
    ),
    paper_results=(
        PaperResult("Flickr30K image retrieval", "R@1 / R@5 / R@10", "61.9 / 87.1 / 92.7"),
        PaperResult("the same without pretraining", "R@1 / R@5 / R@10", "53.1 / 80.6 / 87.9"),
    ),
)
