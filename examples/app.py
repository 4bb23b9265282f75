#!/usr/bin/env python
"""
A demo in the browser: search images by text, ask questions about them, see which regions the words of a caption look
at, and fill in masked words. `make demo` opens it with the model of `make quickstart`, or:

    python examples/app.py --model_name_or_path outputs/quickstart/model --dataset_name outputs/quickstart/scenes

with a model that answers questions, and a region dataset whose pictures are in a folder:

    python examples/app.py --model_name_or_path org/interbert-base --vqa_model_name_or_path org/interbert-base-vqa2 \\
        --dataset_name org/my-regions --split validation --image_dir photographs --index_dir index

The embedded images are kept in `--index_dir`, if it is given, and need not be computed again at the next start. Where
the checkpoint names the detector of its regions, visitors may bring pictures of their own. examples/push_space.py makes
a Space of it on the Hub.
"""

import functools
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from arguments import parse_arguments
from image_index import update_index
from modeling_interbert import InterBERTForPreTraining, InterBERTForVQA, InterBERTRetriever
from pictures import UNREADABLE, Pictures, upright
from processing import InterBERTProcessor, VisualQuestionAnsweringPipeline, load_region_dataset
from region_drawing import set_fonts
from visualize_attention import draw_interaction

SPACE_SETTINGS = Path(__file__).resolve().parent / "space_settings.yaml"  # push_space.py writes it
NUM_ANSWERS = 5
NUM_WORDS = 5  # for each masked one
NUM_BOXES = 3  # that a word looks at most
NUM_LISTED_IMAGES = 200  # in the list to choose from; others may be typed
NUM_OWN_PICTURES = 64  # of visitors, that are kept in memory
LARGEST_SIDE = 1024  # of these, in pixels
# Pillow refuses pictures of twice as many pixels: a small file can be a picture that fills the memory.
Image.MAX_IMAGE_PIXELS = 25_000_000

ABOUT = """
# InterBERT

It reads a text together with the *regions* of a picture, the objects that a detector found in it.
"""


@dataclass
class DemoArguments:
    """What is shown, and where."""

    model_name_or_path: str = field(
        default="outputs/quickstart/model",
        metadata={"help": "Pretrained checkpoint with its processor, or one finetuned for image retrieval."},
    )
    vqa_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint that answers questions; without one nobody can ask any."},
    )
    dataset_name: str = field(
        default="outputs/quickstart/scenes",
        metadata={"help": "Region dataset: a local folder or a Hub name."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(
        default="test",
        metadata={"help": "Split that has the images; test[:1000] works, too."},
    )
    caption_column: str = field(default="captions", metadata={"help": "Column of captions, if there is one."})
    image_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of pictures that are named by their `image_id`. By default the pictures are those of the "
            "dataset's column `image`."
        },
    )
    index_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps the embedded images; by default they are kept in memory."}
    )
    device: str | None = field(default=None, metadata={"help": "Such as cuda; by default a GPU, if there is one."})
    host: str | None = field(
        default=None, metadata={"help": "Address to serve at: by default this machine alone; 0.0.0.0 for others, too."}
    )
    port: int | None = field(default=None, metadata={"help": "Port; by default the first free one from 7860 on."})

    def __post_init__(self):
        if self.image_dir is not None and not Path(self.image_dir).is_dir():
            raise ValueError(f"`--image_dir` must be a folder of pictures, got {self.image_dir}.")


@dataclass
class OwnPicture:
    """
    A picture that a visitor has brought.

    Args:
        picture: As it is shown.
        regions: What the model sees of it.
        regions_of_answerer: What the model that answers questions sees of it.
    """

    picture: Image.Image
    regions: dict[str, Any]
    regions_of_answerer: dict[str, Any]


class Demo:
    """
    What the page shows, without the page. Every method raises a `ValueError` with a message for the user where there is
    nothing to be shown.
    """

    def __init__(self, args: DemoArguments):
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = InterBERTProcessor.from_pretrained(args.model_name_or_path)
        self.model, info = InterBERTForPreTraining.from_pretrained(args.model_name_or_path, output_loading_info=True)
        if any(name.startswith("itm_head") for name in info["missing_keys"]):
            raise ValueError(
                f"`--model_name_or_path` must be a model with a match head, pretrained or finetuned for image "
                f"retrieval, got {args.model_name_or_path}."
            )
        self.fills_words = not any(name.startswith("mlm_head") for name in info["missing_keys"])
        self.regions = load_region_dataset(args.dataset_name, args.split, name=args.dataset_config_name)
        self.pictures = Pictures(self.regions, args.image_dir)
        if not self.pictures.are_at_hand:
            raise ValueError("The demo needs pictures: expected a column `image` or `--image_dir`, got neither.")
        self.caption_column = args.caption_column if args.caption_column in self.regions.column_names else None
        self.rows = {image_id: row for row, image_id in enumerate(self.regions.image_ids)}
        self.own_pictures: dict[str, OwnPicture] = {}  # the latest one last
        self.model.to(self.device)
        self.retriever = InterBERTRetriever(self.model, self.processor, folder=args.index_dir, progress_bar=tqdm)
        update_index(self.retriever, self.regions, f"`--dataset_name` {args.dataset_name}, `--split` {args.split}")
        self.answerer = None
        if args.vqa_model_name_or_path is not None:
            self.answerer = VisualQuestionAnsweringPipeline(
                InterBERTForVQA.from_pretrained(args.vqa_model_name_or_path),
                processor=InterBERTProcessor.from_pretrained(args.vqa_model_name_or_path),
                device=self.device,
            )
            if self.answerer.processor.region_feature_size != self.processor.region_feature_size:
                raise ValueError(
                    f"`--vqa_model_name_or_path` must read region features of {self.processor.region_feature_size} "
                    f"numbers, as the other model, got {self.answerer.processor.region_feature_size}."
                )

    # ---------------------------------------------------------------- what is given

    @property
    def takes_pictures(self) -> bool:
        """Whether there is a detector for pictures that visitors bring."""
        return self.processor.region_detector is not None

    def add_picture(self, path: str) -> str:
        """Finds the regions of a picture. Returns the image id that it has from now on."""
        try:
            with Image.open(path) as file:
                picture = upright(file)
        except UNREADABLE:
            raise ValueError(f"{Path(path).name} is no picture that can be read.") from None
        image_id = f"yours-{hashlib.sha256(str(picture.size).encode() + picture.tobytes()).hexdigest()[:12]}"
        if image_id not in self.own_pictures:
            (regions,) = regions_of_answerer = self.processor.detect_regions([picture], device=self.device)
            if self.answerer is not None and self.answerer.processor.region_detector is not None:
                # It may have learned from more regions of an image, say.
                regions_of_answerer = self.answerer.processor.detect_regions([picture], device=self.device)
            picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            self.own_pictures[image_id] = OwnPicture(picture, regions, regions_of_answerer[0])
            for oldest in list(self.own_pictures)[:-NUM_OWN_PICTURES]:
                del self.own_pictures[oldest]
        return image_id

    def row(self, image_id: str | None) -> int:
        if image_id not in self.rows:
            raise ValueError(f"There is no image {image_id!r}." if image_id else "Choose an image first.")
        return self.rows[image_id]

    def regions_of(self, image_id: str | None, are_of_answerer: bool = False) -> dict[str, Any]:
        if image_id in self.own_pictures:
            own = self.own_pictures[image_id]
            record = own.regions_of_answerer if are_of_answerer else own.regions
        else:
            record = self.regions[self.row(image_id)]
        if len(record["boxes"]) == 0:
            raise ValueError(f"The detector found nothing in image {image_id}: the model does not see it.")
        return record

    def picture(self, image_id: str | None) -> Image.Image:
        """The picture of an image; a blank one, where it has none that can be read."""
        if image_id in self.own_pictures:
            return self.own_pictures[image_id].picture
        row = self.row(image_id)
        record = self.regions[row]
        try:
            picture = self.pictures.open(row)
        except UNREADABLE:
            picture = None
        return picture or Image.new("RGB", (record["width"], record["height"]), "lightgrey")

    def caption(self, image_id: str | None) -> str:
        """The first caption of an image; empty where it has none."""
        if image_id in self.own_pictures or self.caption_column is None:
            return ""
        captions = self.regions.captions(self.row(image_id), self.caption_column)
        return captions[0] if captions else ""

    def check_text(self, text: str | None, what: str, model: PreTrainedModel, processor: InterBERTProcessor) -> str:
        """Neither empty nor longer than the model reads."""
        text = (text or "").strip()
        num_tokens = len(processor.tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if num_tokens <= processor.tokenizer.num_special_tokens_to_add():
            raise ValueError(f"Write a {what} first.")
        longest = min(model.config.max_position_embeddings, processor.tokenizer.model_max_length)
        if num_tokens > longest:
            raise ValueError(f"The {what} has {num_tokens:,} tokens, and the model reads {longest:,} at most.")
        return text

    # ---------------------------------------------------------------- what is shown

    def search(self, text: str | None, threshold: float, max_images: int) -> tuple[list[tuple[str, float]], int]:
        """
        Returns:
            Image ids with their scores, the best first, and the number of all images above the threshold.
        """
        matches = self.retriever.recall(self.check_text(text, "text", self.model, self.processor), threshold=threshold)
        return [(match.image_id, match.score) for match in matches[:max_images]], len(matches)

    def answer(self, image_id: str | None, question: str | None) -> dict[str, float]:
        """The best answers with their scores."""
        regions = self.regions_of(image_id, are_of_answerer=True)
        question = self.check_text(question, "question", self.answerer.model, self.answerer.processor)
        results = self.answerer(image=regions, question=question, top_k=NUM_ANSWERS)
        return {result["answer"]: result["score"] for result in results}

    @torch.inference_mode()
    def attention(self, image_id: str | None, caption: str | None) -> dict[str, Any]:
        """Words, boxes and attention, the mean over layers and heads, see `post_process_attention`."""
        caption = self.check_text(caption, "caption", self.model, self.processor)
        inputs = self.processor(text=caption, regions=self.regions_of(image_id), return_tensors="pt").to(self.device)
        outputs = self.model(**inputs, output_attentions=True)
        picture = self.picture(image_id)
        (attention,) = self.processor.post_process_attention(
            outputs, inputs, layer=None, target_sizes=[(picture.height, picture.width)]
        )
        # On the CPU, where figures are drawn.
        return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in attention.items()}

    def draw_attention(
        self, image_id: str | None, caption: str | None, word: str | None = None
    ) -> tuple[list[str], str, Figure]:
        """
        The regions that a word looks at most.

        Args:
            word: By default the first one.

        Returns:
            The words of the caption, numbered where one comes twice, the word, and the figure.
        """
        attention = self.attention(image_id, caption)
        words = _tell_apart(attention["words"])
        own_words = words[1:-1]  # without [CLS] and [SEP]
        if word is None:
            word = own_words[0]
        if word not in own_words:
            raise ValueError("Choose a word of the caption.")
        title = f"{caption}\nattention in %, mean over layers and heads"
        figure = draw_interaction(attention, [words.index(word)], self.picture(image_id), NUM_BOXES, title)
        return own_words, word, figure

    @torch.inference_mode()
    def fill(self, image_id: str | None, caption: str | None) -> list[list[Any]]:
        """For every masked word its number, and the likeliest words with their probabilities."""
        mask = self.processor.tokenizer.mask_token
        caption = self.check_text(caption, "caption", self.model, self.processor)
        if mask not in caption:
            raise ValueError(f"Put {mask} in the place of a word of the caption.")
        inputs = self.processor(text=caption, regions=self.regions_of(image_id), return_tensors="pt").to(self.device)
        logits = self.model(**inputs).mlm_logits[0]
        masked = logits[inputs["input_ids"][0] == self.processor.tokenizer.mask_token_id].softmax(dim=-1)
        rows = []
        for number, probabilities in enumerate(masked, start=1):
            best = probabilities.topk(min(NUM_WORDS, len(probabilities)))
            words = self.processor.tokenizer.convert_ids_to_tokens(best.indices.tolist())
            rows += [[number, word, round(value, 4)] for word, value in zip(words, best.values.tolist(), strict=True)]
        return rows


def _tell_apart(words: list[str]) -> list[str]:
    """Words that come more than once get numbers."""
    return [f"{word} ({words[:i].count(word) + 1})" if words.count(word) > 1 else word for i, word in enumerate(words)]


def _shown(function: Callable) -> Callable:
    """Shows the user what is wrong with an input, and nothing else changes on the page."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return call


def build_page(demo: Demo) -> gr.Blocks:
    """The page: an image to the left, and what can be done to the right."""
    image_ids = list(demo.rows)

    def select(image_id):
        """The picture and its caption; what was found out about another picture goes."""
        caption = demo.caption(image_id)
        return demo.picture(image_id), caption, caption, *[None] * len(about_image), gr.Radio([], value=None)

    def search(text, threshold, max_images):
        found, count = demo.search(text, threshold, max_images)
        noun = "image matches" if count == 1 else "images match"
        message = f"{count:,} of {len(demo.retriever):,} {noun} with a score above {threshold:g}."
        pictures = [(demo.picture(image_id), f"{score:.3f} · {image_id}") for image_id, score in found]
        return pictures, message, [image_id for image_id, _ in found]

    def choose_found(found, event: gr.SelectData):
        return found[event.index]

    def read(image_id, caption):
        words, word, figure = demo.draw_attention(image_id, caption)
        return gr.Radio(words, value=word, label="Word"), figure

    def look(image_id, caption, word):
        return demo.draw_attention(image_id, caption, word)[2]

    about_image = []  # parts of the page that say something of the chosen image
    with gr.Blocks(title="InterBERT", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        found = gr.State([])
        with gr.Row():
            with gr.Column(scale=1):
                image_id = gr.Dropdown(
                    image_ids[:NUM_LISTED_IMAGES], value=image_ids[0], label="Image", allow_custom_value=True
                )
                picture = gr.Image(demo.picture(image_ids[0]), show_label=False, interactive=False)
                if demo.takes_pictures:
                    upload_button = gr.UploadButton("A picture of your own", file_types=["image"])
                    upload_button.upload(_shown(demo.add_picture), upload_button, image_id)
            with gr.Column(scale=2):
                with gr.Tab("Search"):
                    text = gr.Textbox(label="Text", placeholder="What is in the picture?")
                    with gr.Row():
                        threshold = gr.Slider(0, 1, value=0.6, step=0.01, label="Match score above")
                        max_images = gr.Slider(1, 48, value=12, step=1, label="Images at most")
                    search_button = gr.Button("Search", variant="primary")
                    message = gr.Markdown()
                    gallery = gr.Gallery(
                        label="Images, the best match first", columns=4, object_fit="contain", allow_preview=False
                    )
                    searching = [text, threshold, max_images], [gallery, message, found]
                    gr.on([search_button.click, text.submit, threshold.release], _shown(search), *searching)
                    gallery.select(_shown(choose_found), found, image_id)
                if demo.answerer is not None:
                    with gr.Tab("Question"):
                        question = gr.Textbox(label="Question", placeholder="What colour is …?")
                        ask_button = gr.Button("Ask", variant="primary")
                        answers = gr.Label(label="Answers", num_top_classes=NUM_ANSWERS)
                        about_image.append(answers)
                        gr.on([ask_button.click, question.submit], _shown(demo.answer), [image_id, question], answers)
                with gr.Tab("Words and regions"):
                    caption = gr.Textbox(demo.caption(image_ids[0]), label="Caption")
                    read_button = gr.Button("Read", variant="primary")
                    word = gr.Radio([], label="Word")
                    attention = gr.Plot(show_label=False)
                    about_image.append(attention)
                    gr.on([read_button.click, caption.submit], _shown(read), [image_id, caption], [word, attention])
                    word.input(_shown(look), [image_id, caption, word], attention)
                masked = gr.State("")
                if demo.fills_words:
                    with gr.Tab("Masked words"):
                        masked = gr.Textbox(
                            demo.caption(image_ids[0]),
                            label="Caption",
                            info=f"Put {demo.processor.tokenizer.mask_token} in the place of a word.",
                        )
                        fill_button = gr.Button("Fill", variant="primary")
                        words = gr.Dataframe(headers=["mask", "word", "probability"], interactive=False)
                        about_image.append(words)
                        gr.on([fill_button.click, masked.submit], _shown(demo.fill), [image_id, masked], words)
        image_id.change(_shown(select), image_id, [picture, caption, masked, *about_image, word])
    return page


def main():
    # In a Space nobody gives arguments.
    arguments = ["--recipe", str(SPACE_SETTINGS), *sys.argv[1:]] if SPACE_SETTINGS.is_file() else None
    (args,) = parse_arguments((DemoArguments,), "Show an InterBERT in the browser.", arguments)
    set_fonts()
    build_page(Demo(args)).launch(server_name=args.host, server_port=args.port)


if __name__ == "__main__":
    main()
