"""Hard negatives for image-text matching: the captions of other images that are most like those of an image.

```python
regions = load_region_dataset("data/scenes", "train")
captions = [regions.captions(row) for row in range(len(regions))]
hard_negatives = mine_hard_negatives(captions, num_negatives=20)
```

`examples/mine_hard_negatives.py` adds them to a region dataset as a column, from which [`PretrainingPairs`] draws.
"""

import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np

# Similarities count in these steps: the last bits of one depend on the order in which it was added up.
SIMILARITY_STEPS = 1_000_000
# Similarities that are in memory at a time, in a handful of arrays of 8 bytes each.
BLOCK_SIZE = 4_000_000


def normalize_caption(caption: str) -> str:
    """One text for all captions that differ only in case, width, white space, punctuation and symbols: they describe an
    image equally well."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", caption).casefold()))


def _import_vectorizer():
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError('Mining hard negatives needs scikit-learn: pip install "interbert[negatives]"') from error
    return TfidfVectorizer


def find_hard_negatives(
    captions: Sequence[Sequence[str]],
    num_negatives: int = 20,
    max_similarity: float = 0.99,
    analyzer: Literal["word", "char"] = "word",
    advance: Callable[[int], Any] = lambda num_images: None,
) -> np.ndarray:
    """
    The same as [`mine_hard_negatives`], as numbers of captions.

    Args:
        advance (`Callable[[int], Any]`, *optional*): Called with the number of images that are done since its last
            call.

    Returns:
        int32 `(images, num_negatives)`: places in the list of the captions of all images, nearest first, −1 behind the
        last one of an image. Of captions that are equal after normalization, it is the place of the first.
    """
    if num_negatives < 1:
        raise ValueError(f"`num_negatives` must be at least 1, got {num_negatives}.")
    if not 0 < max_similarity <= 1:
        raise ValueError(f"`max_similarity` must be above 0 and at most 1, got {max_similarity}.")
    if analyzer not in ("word", "char"):
        raise ValueError(f"`analyzer` must be 'word' or 'char', got {analyzer!r}.")
    vectorizer = _import_vectorizer()(
        analyzer=analyzer,
        lowercase=False,  # done already
        ngram_range=(1, 1) if analyzer == "word" else (1, 2),
    )
    found = np.full((len(captions), num_negatives), -1, dtype=np.int32)
    texts, first_places, text_of_caption = _distinct_texts(captions)
    analyze = vectorizer.build_analyzer()
    if not any(analyze(text) for text in texts):
        advance(len(captions))
        return found
    vectors = vectorizer.fit_transform(texts)  # (texts, terms)
    vectors_by_term = vectors.T.tocsr()  # (terms, texts)
    num_found = min(num_negatives, len(texts))
    # Of texts that are equally near, the one that comes first has the largest key.
    places = np.arange(len(texts))[::-1]

    counts = np.array([len(own_captions) for own_captions in captions])
    images = np.flatnonzero(counts)
    advance(len(captions) - len(images))
    starts = np.concatenate([[0], np.cumsum(counts[images])])  # of the captions of each image
    start = 0
    while start < len(images):
        # As many images as have so many captions, but at least one.
        last = starts[start] + BLOCK_SIZE // len(texts)
        stop = max(start + 1, int(starts.searchsorted(last, side="right")) - 1)
        own_texts = text_of_caption[starts[start] : starts[stop]]
        similarities = (vectors[own_texts] @ vectors_by_term).toarray()  # (captions, texts)
        similarities = np.maximum.reduceat(similarities, starts[start:stop] - starts[start])  # (images, texts)
        steps = np.rint(similarities * SIMILARITY_STEPS).astype(np.int64)
        steps[steps > round(max_similarity * SIMILARITY_STEPS)] = 0
        steps[np.repeat(np.arange(stop - start), np.diff(starts[start : stop + 1])), own_texts] = 0
        keys = steps * len(texts) + places
        nearest = np.sort(np.partition(keys, -num_found)[:, -num_found:])[:, ::-1]
        nearest_places = first_places[len(texts) - 1 - nearest % len(texts)]
        found[images[start:stop], :num_found] = np.where(nearest >= len(texts), nearest_places, -1)
        advance(stop - start)
        start = stop
    return found


def _distinct_texts(captions: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The captions without repetition, in lower case and with single blanks, for each of them the place of its first
    caption, int32 `(texts,)`, and for each caption the number of its text, int64 `(captions,)`."""
    flat_captions = list(chain.from_iterable(captions))
    numbers: dict[str, int] = {}
    text_of_caption = [numbers.setdefault(normalize_caption(caption), len(numbers)) for caption in flat_captions]
    text_of_caption = np.array(text_of_caption, dtype=np.int64)
    _, first_places = np.unique(text_of_caption, return_index=True)
    texts = [" ".join(flat_captions[place].casefold().split()) for place in first_places]
    return texts, first_places.astype(np.int32), text_of_caption


def mine_hard_negatives(
    captions: Sequence[Sequence[str]],
    num_negatives: int = 20,
    max_similarity: float = 0.99,
    analyzer: Literal["word", "char"] = "word",
) -> list[list[str]]:
    """
    For each image the captions of other images that are nearest to its own by the cosine of TF-IDF vectors.

    The similarity of an image and a caption is the largest over the captions of the image. Inverse document frequencies
    are those among the distinct captions. Captions without a term of the image's are left out, and so are those that
    differ from one of the image's only in case, white space, punctuation and the like. Similarities that agree to six
    decimals are ties: the caption that comes first in `captions` is the nearer one.

    Args:
        captions (`Sequence[Sequence[str]]`): Those of each image.
        num_negatives (`int`): At most so many for each image, no two of which are the same.
        max_similarity (`float`): Above 0. What is more similar is left out: the same words in another order, which may
            well describe the image.
        analyzer (`"word"` or `"char"`): Terms are words of at least two letters, or single characters and pairs of
            neighbors, for languages that do not separate words by blanks.

    Returns:
        `list[list[str]]`: for each image, nearest first; empty for an image without captions.

    Raises:
        ImportError: scikit-learn, of the extra `negatives`, is not installed.
        ValueError: for arguments out of range.
    """
    found = find_hard_negatives(captions, num_negatives, max_similarity, analyzer)
    flat_captions = list(chain.from_iterable(captions))
    return [[flat_captions[place] for place in places[places >= 0]] for places in found]
