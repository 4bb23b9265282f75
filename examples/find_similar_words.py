#!/usr/bin/env python
"""
Finds words that are like one another by their vectors, for masking as correction (`run_pretrain.py --similar_words`):

    python examples/find_similar_words.py vectors.txt outputs/similar_words.json

The vectors are in the text format of word2vec, with or without its first line of two counts: a word and its numbers in
each line, most frequent words first. Only words of as many characters count as similar, since one takes the place of
the other token by token.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from files import write_json


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Find similar words by their vectors.")
    parser.add_argument("vectors", type=Path, help="Text file of word vectors.")
    parser.add_argument("output", type=Path, help="JSON file to write: {word: [similar words, nearest first]}.")
    parser.add_argument("--num_similar", type=int, default=10, help="Most similar words that are kept of each word.")
    parser.add_argument("--min_similarity", type=float, default=0.5, help="Lowest cosine that counts as similar.")
    parser.add_argument("--max_words", type=int, default=200_000, help="So many words of the file are read.")
    args = parser.parse_args()
    for name in ("num_similar", "max_words"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    return parser, args


def read_vectors(path: Path, max_words: int) -> dict[str, np.ndarray]:
    """
    Reads word vectors.

    Returns:
        By word, a float32 vector of length 1.

    Raises:
        ValueError: a line holds something else than a word and as many numbers as the first one, or is not UTF-8.
        OSError: there is no such file.
    """
    vectors: dict[str, np.ndarray] = {}
    with open(path, "rb") as file:
        for number, encoded_line in enumerate(file, start=1):
            try:
                line = encoded_line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected UTF-8, {error}") from error
            word, *values = line.rstrip().split(" ")
            if number == 1 and len(values) == 1:
                continue  # counts of words and dimensions
            if len(vectors) == max_words:
                break
            try:
                vector = np.array(values, dtype=np.float32)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: expected a word and numbers, got {line!r:.80}") from error
            width = len(next(iter(vectors.values()), vector))
            if len(vector) != width or width == 0 or not np.isfinite(vector).all():
                raise ValueError(f"{path}, line {number}: expected a word and {width} numbers, got {line!r:.80}")
            length = np.linalg.norm(vector)
            if length > 0:
                vectors.setdefault(word, vector / length)
    if not vectors:
        raise ValueError(f"{path}: expected word vectors, got none.")
    return vectors


def find_similar_words(
    vectors: dict[str, np.ndarray], num_similar: int, min_similarity: float, block_size: int = 1_000
) -> dict[str, list[str]]:
    """For each word those of its length with the highest cosines, nearest first; words without any are left out."""
    by_length: defaultdict[int, list[str]] = defaultdict(list)
    for word in vectors:
        by_length[len(word)].append(word)
    similar_words = {}
    progress_bar = tqdm(total=len(vectors), desc="Comparing", unit="words", leave=False)
    for words in by_length.values():
        matrix = np.stack([vectors[word] for word in words])
        for start in range(0, len(words), block_size):
            block = words[start : start + block_size]
            cosines = matrix[start : start + len(block)] @ matrix.T
            cosines[np.arange(len(block)), np.arange(start, start + len(block))] = -np.inf  # the word itself
            for word, row in zip(block, cosines, strict=True):
                nearest = find_nearest(row, num_similar, min_similarity)
                if nearest.size:
                    similar_words[word] = [words[other] for other in nearest]
            progress_bar.update(len(block))
    progress_bar.close()
    return {word: similar_words[word] for word in vectors if word in similar_words}


def find_nearest(cosines: np.ndarray, num_similar: int, min_similarity: float) -> np.ndarray:
    """Places of the highest cosines of float `(words,)`, highest first and of equal ones the first first, int64
    `(at most num_similar,)`."""
    places = np.flatnonzero(cosines >= min_similarity)
    if len(places) > num_similar:
        lowest = np.partition(cosines[places], -num_similar)[-num_similar]
        places = places[cosines[places] >= lowest]  # more than so many where several are equal to it
    return places[np.argsort(-cosines[places], kind="stable")][:num_similar]


def main():
    parser, args = parse_args()
    try:
        vectors = read_vectors(args.vectors, args.max_words)
        similar_words = find_similar_words(vectors, args.num_similar, args.min_similarity)
        write_json(args.output, similar_words)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{len(similar_words):,} of {len(vectors):,} words have similar ones of their length: {args.output}")


if __name__ == "__main__":
    main()
