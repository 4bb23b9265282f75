from .checkpoint import Checkpoint, PaperResult

CHECKPOINT = Checkpoint(
    name="interbert-base-chinese",
    auto_class="AutoModelForPreTraining",
    summary=(
        "The pretrained base model for Chinese, for images of products with their titles: it finds the products that a "
        "text describes, and all those that match a topic."
    ),
    languages=("zh",),
    license="apache-2.0",
    recipe="examples/recipes/pretrain_chinese.yaml",
    intended_data="Images of products with titles of at most 36 characters, from bert-base-chinese.",
    limits=(
        "Titles of products are advertising: they name brands, occasions and virtues that no image shows, and it is "
        "at home with photographs of single products on plain ground.",
        "The paper counts an image as a match of a topic from a score of 0.6 on. The threshold belongs to the paper's "
        "checkpoint: choose your own on data of yours.",
    ),
    paper_results=(
        PaperResult(
            "Product retrieval, finetuned on 10K / 100K / 200K pairs", "gain in P@5 by pretraining", "12.0 / 2.7 / 0.9"
        ),
    ),
)
