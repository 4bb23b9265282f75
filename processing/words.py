"""Words of a text in terms of its tokens, and words that are like them, for masking."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

MaskingUnit = Literal["token", "word", "jieba"]
MASKING_UNITS = ("token", "word", "jieba")
# Texts whose words are remembered: more than the paper's 3.1 million titles. Each takes about 330 bytes.
REMEMBERED_TEXTS = 2**22


def import_jieba():
    """
    Raises:
        ImportError: jieba, of the extra `chinese`, is not installed.
    """
    try:
        import jieba
    except ImportError as error:
        raise ImportError('Chinese words need jieba: pip install "interbert[chinese]"') from error
    jieba.setLogLevel("WARNING")
    return jieba


def find_word_starts(texts: Sequence[str], encoding: BatchEncoding, unit: MaskingUnit) -> np.ndarray:
    """
    Which tokens are the first of a word.

    Args:
        texts (`Sequence[str]`): What was tokenized, in a batch.
        encoding (`BatchEncoding`):
            Padded; for words of several tokens of a fast tokenizer, and for jieba with `return_offsets_mapping=True`.
        unit (`"token"`, `"word"` or `"jieba"`):
            Words are the tokens; what stands between white space and punctuation, with each Chinese character by
            itself; or what jieba takes for one, and nothing less than the words before.

    Returns:
        bool `(batch, tokens)`, true also for special tokens and padding.

    Raises:
        ImportError: jieba is needed and not installed.
    """
    if unit == "token":
        return np.ones((len(texts), len(encoding["input_ids"][0])), dtype=bool)
    if unit == "word":
        words = [[-1 if word is None else word for word in encoding.word_ids(i)] for i in range(len(texts))]
        return _starts(words)
    words = [_jieba_words(text, offsets) for text, offsets in zip(texts, encoding["offset_mapping"], strict=True)]
    # jieba divides what it has no words of, such as full-width letters, into characters.
    return _starts(words) & find_word_starts(texts, encoding, "word")


def _starts(words: Sequence[Sequence[int]]) -> np.ndarray:
    """Where numbers of words change, or are −1."""
    numbers = np.array(words, dtype=np.int64)
    starts = np.ones(numbers.shape, dtype=bool)
    starts[:, 1:] = (numbers[:, 1:] != numbers[:, :-1]) | (numbers[:, 1:] < 0)
    return starts


def _jieba_words(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The word of each token, −1 for special tokens, which no characters belong to."""
    word_of_character = np.frombuffer(_jieba_starts(text), dtype=np.uint8).cumsum().tolist()
    return [word_of_character[start] if stop > start else -1 for start, stop in offsets]


# A text comes again in every epoch, and jieba takes several times as long as the tokenizer. (Worker processes of a data
# loader, which start anew in every epoch, remember nothing from one to the next.)
@functools.lru_cache(maxsize=REMEMBERED_TEXTS)
def _jieba_starts(text: str) -> bytes:
    """For each character 1 if it is the first of a word, else 0."""
    return b"".join(b"\1" + bytes(len(word) - 1) for word in import_jieba().cut(text))


def read_similar_words(
    path: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, unit: MaskingUnit = "token"
) -> dict[tuple[int, ...], np.ndarray]:
    """
    Reads which words are like which, for masking as correction.

    Args:
        path (`str` or `os.PathLike`): JSON `{word: [similar word, …]}`, as `examples/find_similar_words.py` writes it.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.
        unit (`"token"`, `"word"` or `"jieba"`): What is masked as a whole, see [`find_word_starts`].

    Returns:
        By the ids of a word, those of the similar words that have as many tokens, int64 `(words, tokens)`. Words
        without any are left out, and so are those with unknown tokens.

    Raises:
        ValueError: the file holds something else, or no such words; or most of them are several words to `unit`, which
            never looks them up.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, {error}") from error
    is_table = isinstance(table, dict) and all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in table.values()
    )
    if not is_table or not table:
        raise ValueError(f"{path}: expected an object of lists of words, got {table!r:.80}.")

    words = list(dict.fromkeys(chain(table, *table.values())))
    # At once, which takes a tenth of the time.
    encoding = tokenizer(words, add_special_tokens=False)
    ids_of = {word: tuple(ids) for word, ids in zip(words, encoding["input_ids"], strict=True)}
    similar_words = {}
    findable = set()
    for number, (word, others) in enumerate(table.items()):  # the first of `words`
        ids = ids_of[word]
        fitting = [other for other in map(ids_of.get, others) if len(other) == len(ids) and other != ids]
        fitting = [other for other in fitting if tokenizer.unk_token_id not in other]
        if ids and tokenizer.unk_token_id not in ids and fitting:
            similar_words[ids] = np.array(fitting, dtype=np.int64)
            if _is_one_word(encoding, number, unit):
                findable.add(ids)
    if not similar_words:
        raise ValueError(f"{path}: expected words with similar ones of as many tokens, got none among {len(table):,}.")
    if 2 * len(findable) < len(similar_words):
        raise ValueError(
            f"{path}: by the masking unit {unit!r}, only {len(findable):,} of {len(similar_words):,} words are masked "
            "as a whole, and the others never looked up: expected 'word', or 'jieba' for Chinese words."
        )
    return similar_words


def _is_one_word(encoding: BatchEncoding, number: int, unit: MaskingUnit) -> bool:
    """Whether a text of an encoding, without special tokens, may be masked as a whole."""
    if unit == "word":
        return len(set(encoding.word_ids(number))) == 1
    # What jieba takes for a word depends on the text around it.
    return unit == "jieba" or len(encoding["input_ids"][number]) == 1


def share_with_similar_words(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    unit: MaskingUnit,
    similar_words: Mapping[tuple[int, ...], np.ndarray],
) -> float:
    """
    How many words have similar ones.

    Args:
        texts (`Sequence[str]`): Some of those that will be masked.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.
        unit (`"token"`, `"word"` or `"jieba"`): What is masked as a whole, see [`find_word_starts`].
        similar_words (mapping): As [`read_similar_words`] returns them.

    Returns:
        `float`: their share of all words of the texts; 0 where there are none.

    Raises:
        ImportError: jieba is needed and not installed.
    """
    encoding = tokenizer(list(texts), add_special_tokens=False, padding=True, return_offsets_mapping=unit == "jieba")
    is_text = np.array(encoding["attention_mask"], dtype=bool)
    token_ids = np.array(encoding["input_ids"], dtype=np.int64)[is_text]  # of all texts, one behind the other
    starts = find_word_starts(texts, encoding, unit)[is_text]
    words = np.split(token_ids, np.flatnonzero(starts)[1:])
    return sum(tuple(word.tolist()) in similar_words for word in words) / len(words)
