"""Hard negatives against the definition of TF-IDF, computed caption by caption, and against cases done by hand."""

import math
import re
import sys
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from processing import hard_negatives, mine_hard_negatives
from processing.hard_negatives import find_hard_negatives, normalize_caption

WORDS = ["red", "blue", "green", "big", "dog", "cat", "bird", "house", "runs", "sits", "a", "of"]
CHARACTERS = "红色蓝圆形方星大小的"


def draw_captions(num_images, units, separator, seed):
    """Up to four captions of up to five units for each image; many are alike, some but for case and blanks."""
    rng = np.random.default_rng(seed)
    captions = []
    for _ in range(num_images):
        drawn = [separator.join(rng.choice(units, rng.integers(1, 6)).tolist()) for _ in range(rng.integers(0, 5))]
        captions.append([f" {text.upper()}" if rng.random() < 0.2 else text for text in drawn])
    return captions


def terms(text, analyzer):
    if analyzer == "word":
        return re.findall(r"\b\w\w+\b", text)
    return [*text, *(text[i : i + 2] for i in range(len(text) - 1))]


def tfidf_vectors(texts, analyzer):
    """As scikit-learn documents it: counts times ln((1 + texts) / (1 + texts with the term)) + 1, of length 1."""
    counts = [Counter(terms(text, analyzer)) for text in texts]
    frequencies = Counter(term for count in counts for term in count)
    vectors = []
    for count in counts:
        vector = {t: n * (math.log((1 + len(texts)) / (1 + frequencies[t])) + 1) for t, n in count.items()}
        length = math.sqrt(sum(value**2 for value in vector.values()))
        vectors.append({term: value / length for term, value in vector.items()})
    return vectors


def brute_force(captions, num_negatives, max_similarity, analyzer):
    first_captions = {}
    for own_captions in captions:
        for caption in own_captions:
            first_captions.setdefault(" ".join(caption.lower().split()), caption)
    texts = list(first_captions)
    vectors = dict(zip(texts, tfidf_vectors(texts, analyzer), strict=True))

    def similarity(text, other):
        return sum(value * vectors[other].get(term, 0) for term, value in vectors[text].items())

    found = []
    for own_captions in captions:
        own_texts = {" ".join(caption.lower().split()) for caption in own_captions}
        candidates = []
        for place, text in enumerate(texts):
            nearness = round(max((similarity(own, text) for own in own_texts), default=0), 6)
            if text not in own_texts and 0 < nearness <= max_similarity:
                candidates.append((-nearness, place))
        found.append([first_captions[texts[place]] for _, place in sorted(candidates)[:num_negatives]])
    return found


@pytest.mark.parametrize("block_size", [1, 700, 4_000_000])
@pytest.mark.parametrize("analyzer", ["word", "char"])
@pytest.mark.parametrize("num_negatives, max_similarity", [(3, 0.99), (7, 0.6), (500, 1.0)])
def test_against_brute_force(monkeypatch, block_size, analyzer, num_negatives, max_similarity):
    monkeypatch.setattr(hard_negatives, "BLOCK_SIZE", block_size)
    units, separator = (WORDS, " ") if analyzer == "word" else (list(CHARACTERS), "")
    captions = draw_captions(60, units, separator, seed=num_negatives)
    expected = brute_force(captions, num_negatives, max_similarity, analyzer)
    assert mine_hard_negatives(captions, num_negatives, max_similarity, analyzer) == expected
    assert sum(map(len, expected)) > 100
    assert [] in expected


def test_the_definition_of_tfidf_is_that_of_scikit_learn():
    texts = ["red dog red", "blue dog", "green bird of a house"]
    vectorizer = TfidfVectorizer()
    expected = vectorizer.fit_transform(texts).toarray()
    for row, vector in zip(expected, tfidf_vectors(texts, "word"), strict=True):
        np.testing.assert_allclose(row, [vector.get(term, 0) for term in vectorizer.get_feature_names_out()])


def test_similarities_by_hand():
    # idf among 4 texts: dog (in 3) ln(5/4) + 1 = 1.2231, runs and sleeps (in 2) ln(5/3) + 1 = 1.5108. "dog runs" and
    # "dog sleeps" have the squared length 1.2231² + 1.5108² = 3.7786 and share dog: 1.4961 / 3.7786 = 0.3959.
    captions = [["dog runs"], ["Runs dog"], ["dog sleeps"], ["cat sleeps"]]
    # The same words in another order are too similar; nothing in common is not near.
    assert mine_hard_negatives(captions)[0] == ["dog sleeps"]
    assert mine_hard_negatives(captions, max_similarity=1.0)[0] == ["Runs dog", "dog sleeps"]
    assert mine_hard_negatives(captions, max_similarity=0.396)[0] == ["dog sleeps"]
    assert mine_hard_negatives(captions, max_similarity=0.3958)[0] == []
    assert mine_hard_negatives(captions, num_negatives=1, max_similarity=1.0)[0] == ["Runs dog"]


def test_an_image_is_as_near_as_its_nearest_caption():
    captions = [["red dog", "blue bird"], ["blue house"], ["red tree"], ["green bird"]]
    # idf among 5 texts: red, blue, bird (in 2) ln(6/3) + 1 = 1.6931, the others (in 1) ln(6/2) + 1 = 2.0986.
    # "blue bird" with "blue house", and with "green bird": 1.6931² / (2.3944 · 2.6964) = 0.444;
    # "red dog" with "red tree": 1.6931² / 2.6964² = 0.394.
    assert mine_hard_negatives(captions)[0] == ["blue house", "green bird", "red tree"]
    # Of two that are equally near the first one comes first.
    assert mine_hard_negatives(captions[:1] + captions[:0:-1])[0] == ["green bird", "blue house", "red tree"]


def test_captions_that_say_the_same():
    captions = [["a red dog", "dog house"], ["A Red  dog", "red dog house"], ["a  red DOG"], ["Dog  House", "red cat"]]
    mined = mine_hard_negatives(captions, max_similarity=1.0)
    # Neither its own captions, nor those of others that say the same; and nothing twice.
    assert mined[0] == ["red dog house", "red cat"]
    # "dog house" is there twice: the first one is taken.
    assert mined[2] == ["red dog house", "dog house", "red cat"]


@pytest.mark.parametrize("captions", [[], [[]], [[], []], [["a"], [""], ["!"]], [["a dog"]], [["a dog", "dog"], []]])
def test_nothing_to_find(captions):
    assert mine_hard_negatives(captions) == [[] for _ in captions]


def test_numbers_of_captions():
    captions = [[], ["red dog", "RED dog"], ["dog house"], ["Dog  house", "red cat"]]
    progress = []
    found = find_hard_negatives(captions, num_negatives=3, advance=progress.append)
    assert found.dtype == np.int32
    # 0 and 1 are equal, 2 and 3 are: the first of them stands for both. "red dog" is as near to 2 as to 4.
    assert found.tolist() == [[-1, -1, -1], [2, 4, -1], [0, -1, -1], [0, -1, -1]]
    assert sum(progress) == 4


def test_normalization():
    assert normalize_caption("  A  Straße\n") == normalize_caption("a STRASSE.") == "astrasse"
    assert normalize_caption("Ｔ恤 【红色】") == normalize_caption("t恤红色！") == "t恤红色"


def test_blanks_say_nothing_between_chinese_words():
    captions = [["红色 连衣裙，女"], ["红色连衣裙女"], ["红色皮鞋"]]
    assert mine_hard_negatives(captions, analyzer="char")[0] == ["红色皮鞋"]
    # But they tell the words of the other analyzer apart.
    assert mine_hard_negatives([["红色 连衣裙"], ["红色 皮鞋"], ["红色皮鞋"]])[0] == ["红色 皮鞋"]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`num_negatives` must be at least 1, got 0"):
        mine_hard_negatives([["a dog"]], num_negatives=0)
    with pytest.raises(ValueError, match="`max_similarity` must be above 0 and at most 1, got 1.5"):
        mine_hard_negatives([["a dog"]], max_similarity=1.5)
    with pytest.raises(ValueError, match="`analyzer` must be 'word' or 'char', got 'words'"):
        mine_hard_negatives([["a dog"]], analyzer="words")


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ImportError, match=r'scikit-learn: pip install "interbert\[negatives\]"'):
        mine_hard_negatives([["a dog"]])
