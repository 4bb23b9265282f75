from .checkpoint import Checkpoint

CHECKPOINT = Checkpoint(
    name="interbert-tiny-scenes",
    auto_class="AutoModelForPreTraining",
    summary=(
        "A very small model, pretrained in minutes on drawn scenes of coloured shapes: made by `make quickstart`, to "
        "try out code and to learn how the parts work together."
    ),
    languages=("en",),
    license="apache-2.0",
    recipe="examples/quickstart.py",
    intended_data="12,000 scenes of `examples/generate_scenes.py`: 3 to 6 shapes of 8 colours, 2 sizes, and captions.",
    limits=(
        "It knows the words of its scenes alone, and its region features are the pixels of a box: it understands no "
        "photograph.",
    ),
)
