from .checkpoint import Checkpoint, PaperResult

CHECKPOINT = Checkpoint(
    name="interbert-base-vqa2",
    auto_class="AutoModelForVisualQuestionAnswering",
    summary="Answers questions about images with one of the most frequent answers of VQA 2.0.",
    languages=("en",),
    license="apache-2.0",
    recipe="examples/recipes/vqa2.yaml",
    intended_data="VQA 2.0: 443K questions about 83K images of COCO, and their 3,129 most frequent answers.",
    limits=(
        "It answers every question, also those that an image cannot answer, and knows no answer outside its list.",
        "Questions of VQA 2.0 can often be answered without looking: `examples/compare_on_vqa.py` measures how much "
        "of the score the regions account for.",
    ),
    paper_results=(PaperResult("VQA 2.0, test-dev / test-std", "VQA score", "70.3 / 70.6"),),
)
