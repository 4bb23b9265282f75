"""Words of a text in terms of its tokens, and words that are like them, for masking."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

MaskingUnit = Literal["token", "word", "jieba"]
MASKING_UNITS = ("token", "word", "jieba")


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


def find_word_starts(texts: Sequence[str], encoding: BatchEncoding, unit: Literal["word", "jieba"]) -> np.ndarray:
    """
    Which tokens are the first of a word.

    Args:
        texts (`Sequence[str]`): What was tokenized, in a batch.
        encoding (`BatchEncoding`): Of a fast tokenizer, padded; for jieba with `return_offsets_mapping=True`.
        unit (`"word"` or `"jieba"`):
            Words are what stands between white space and punctuation, with each Chinese character by itself; or what
            jieba takes for one.

    Returns:
        bool `(batch, tokens)`, true also for special tokens and padding.

    Raises:
        ImportError: jieba is needed and not installed.
    """
    if unit == "word":
        words = [[-1 if word is None else word for word in encoding.word_ids(i)] for i in range(len(texts))]
    else:
        words = [_jieba_words(text, offsets) for text, offsets in zip(texts, encoding["offset_mapping"], strict=True)]
    numbers = np.array(words, dtype=np.int64)
    starts = np.ones(numbers.shape, dtype=bool)
    starts[:, 1:] = (numbers[:, 1:] != numbers[:, :-1]) | (numbers[:, 1:] < 0)
    return starts


def _jieba_words(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The word of each token, −1 for special tokens, which no characters belong to."""
    word_of_character = np.empty(len(text), dtype=np.int64)
    for number, (_, start, stop) in enumerate(import_jieba().tokenize(text)):
        word_of_character[start:stop] = number
    return [int(word_of_character[start]) if stop > start else -1 for start, stop in offsets]


def read_similar_words(
    path: str | os.PathLike, tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[int, ...], np.ndarray]:
    """
    Reads which words are like which, for masking as correction.

    Args:
        path (`str` or `os.PathLike`): JSON `{word: [similar word, …]}`, as `examples/find_similar_words.py` writes it.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.

    Returns:
        By the ids of a word, those of the similar words that have as many tokens, int64 `(words, tokens)`. Words
        without any are left out, and so are those with unknown tokens.

    Raises:
        ValueError: the file holds something else, or no such words.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, {error}") from error
    is_table = isinstance(table, dict) and all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in table.values()
    )
    if not is_table:
        raise ValueError(f"{path}: expected an object of lists of words, got {table!r:.80}.")

    def ids_of(word: str) -> tuple[int, ...]:
        return tuple(tokenizer(word, add_special_tokens=False)["input_ids"])

    similar_words = {}
    for word, others in table.items():
        ids = ids_of(word)
        fitting = [other for other in map(ids_of, others) if len(other) == len(ids) and other != ids]
        fitting = [other for other in fitting if tokenizer.unk_token_id not in other]
        if ids and tokenizer.unk_token_id not in ids and fitting:
            similar_words[ids] = np.array(fitting, dtype=np.int64)
    if not similar_words:
        raise ValueError(f"{path}: expected words with similar ones of as many tokens, got none among {len(table):,}.")
    return similar_words
