"""Words in terms of tokens, masking by words, and words that are like one another."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

import find_similar_words
from processing import InterBERTProcessor, PretrainingCollator, words
from processing.masking import IGNORED_LABEL, MaskingVocabulary, mask_segments, mask_tokens
from processing.words import find_word_starts, read_similar_words, share_with_similar_words

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["play", "##ing", "##s", "dog", "a", ".", *"红蓝色的连衣裙子女人穿着大小"]
MASK = SPECIAL.index("[MASK]")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(SPECIAL + WORDS) + "\n", encoding="utf-8")
    return BertTokenizer(str(path))


def ids(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def starts_of(tokenizer, texts: list[str], unit: str) -> list[list[int]]:
    encoding = tokenizer(texts, padding=True, return_offsets_mapping=True)
    return find_word_starts(texts, encoding, unit).astype(int).tolist()


def test_words_between_white_space_and_punctuation(tokenizer):
    texts = ["a dog playing.", "plays 红色"]
    # [CLS] a dog play ##ing . [SEP] and [CLS] play ##s 红 色 [SEP] [PAD]
    assert starts_of(tokenizer, texts, "word") == [[1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1]]


def test_chinese_words(tokenizer):
    # jieba: 红色 / 的 / 连衣裙, and 女人 / 穿着 / 裙子
    texts = ["红色的连衣裙", "女人穿着裙子"]
    assert starts_of(tokenizer, texts, "jieba") == [[1, 1, 0, 1, 1, 0, 0, 1], [1, 1, 0, 1, 0, 1, 0, 1]]
    # Offsets count characters of the text as it was, with its white space.
    assert starts_of(tokenizer, ["  红色 DOG playing 裙子"], "jieba") == [[1, 1, 0, 1, 1, 0, 1, 0, 1]]
    assert starts_of(tokenizer, ["", "红色"], "jieba") == [[1, 1, 1, 1], [1, 1, 0, 1]]


def test_jieba_divides_no_word_of_the_tokenizer(tmp_path):
    """It knows words of ASCII's letters alone, and divides others into characters."""
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "ｓ", "##ｔ", "裙", "子"]), encoding="utf-8")
    assert list(words.import_jieba().cut("ｓｔ裙子")) == ["ｓ", "ｔ", "裙子"]
    assert starts_of(BertTokenizer(str(tmp_path / "vocab.txt")), ["ｓｔ裙子"], "jieba") == [[1, 1, 0, 1, 0, 1]]


def test_tokens_as_words(tokenizer):
    assert starts_of(tokenizer, ["plays 红色", "a"], "token") == [[1] * 6] * 2


def test_jieba_reads_a_text_once(tokenizer, monkeypatch):
    words._jieba_starts.cache_clear()
    texts = ["红色的连衣裙", "女人穿着裙子", "红色的连衣裙"]
    first = starts_of(tokenizer, texts, "jieba")
    monkeypatch.setattr(words, "import_jieba", None)  # no longer needed
    assert starts_of(tokenizer, texts, "jieba") == first


VOCABULARY = MaskingVocabulary(mask_token_id=MASK, replacement_token_ids=np.arange(10, 20))


def make_words(num_words: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids from 100 up: words of 1, 2 and 3 tokens, then a special token, and again."""
    lengths = np.tile([1, 2, 3, 1], num_words // 4)
    starts = np.zeros(lengths.sum(), dtype=bool)
    starts[np.cumsum(lengths) - lengths] = True
    special = np.repeat(np.arange(len(lengths)) % 4 == 3, lengths)
    return np.arange(100, 100 + starts.size), starts, special


def find_selected_words(labels: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Which words are selected, of whose tokens all or none must be."""
    numbers = np.cumsum(starts) - 1
    shares = np.bincount(numbers, labels != IGNORED_LABEL) / np.bincount(numbers)
    assert set(shares) <= {0.0, 1.0}
    return shares.astype(bool)


def test_whole_words_are_masked():
    input_ids, starts, special = make_words(100_000)
    masked, labels = mask_tokens(
        input_ids, special, VOCABULARY, np.random.default_rng(0), probability=0.3, word_starts=starts
    )
    selected = find_selected_words(labels, starts)
    assert not selected[special[starts]].any()
    for length in (1, 2, 3):  # each with the same probability
        assert selected[length - 1 :: 4].mean() == pytest.approx(0.3, abs=0.01)
    now, before = masked[labels != IGNORED_LABEL], input_ids[labels != IGNORED_LABEL]
    assert np.mean(now == MASK) == pytest.approx(0.8, abs=0.006)
    assert np.mean(now == before) == pytest.approx(0.1, abs=0.005)


def test_segments_are_of_whole_words():
    input_ids, starts, special = make_words(400_000)
    _, labels = mask_segments(
        input_ids, special, VOCABULARY, np.random.default_rng(1), probability=0.01, word_starts=starts
    )
    selected = find_selected_words(labels, starts)
    assert not selected[special[starts]].any()
    # Words 0, 1 and 2 stand between special ones. Word 2 is masked as an anchor, or behind word 1 with probability
    # 2/3, or behind word 0 with probability 1/3: anchors being rare, twice as often as word 0.
    shares = [selected[i::4].mean() for i in range(3)]
    assert shares == pytest.approx([0.01, 0.01 * 5 / 3, 0.02], rel=0.1)


def test_words_that_are_single_tokens_change_nothing():
    input_ids, special = np.arange(100, 200), np.arange(100) % 7 == 0
    for mask in (mask_tokens, mask_segments):
        plain, by_words = (
            mask(input_ids, special, VOCABULARY, np.random.default_rng(2), word_starts=starts)
            for starts in (None, np.ones(100, dtype=bool))
        )
        np.testing.assert_array_equal(plain, by_words)


def test_bad_word_starts():
    with pytest.raises(ValueError, match=r"`word_starts` must have the shape \(3,\), got \(2,\)"):
        mask_tokens(np.arange(3), np.zeros(3, bool), VOCABULARY, np.random.default_rng(0), word_starts=np.ones(2, bool))


def test_words_become_similar_ones():
    """Words 100 and 200 201 have similar ones, 300 has none; [MASK] never occurs."""
    similar_words = {(100,): np.array([[110], [111], [112]]), (200, 201): np.array([[210, 211]])}
    vocabulary = MaskingVocabulary(MASK, np.arange(10, 20), similar_words)
    input_ids = np.tile([100, 200, 201, 300], 5_000)
    starts = np.tile([True, True, False, True], 5_000)
    replaced, labels = mask_tokens(
        input_ids, np.zeros(20_000, bool), vocabulary, np.random.default_rng(3), probability=0.5, word_starts=starts
    )
    is_selected = labels != IGNORED_LABEL
    assert not (replaced == MASK).any()
    np.testing.assert_array_equal(labels[is_selected], input_ids[is_selected])
    np.testing.assert_array_equal(replaced[~is_selected], input_ids[~is_selected])

    selected, words = find_selected_words(labels, starts).reshape(-1, 3), replaced.reshape(-1, 4)
    one = words[selected[:, 0], 0]
    assert np.mean(one == 100) == pytest.approx(0.1, abs=0.03)
    assert np.mean((one >= 10) & (one < 20)) == pytest.approx(0.1, abs=0.03)
    for similar in (110, 111, 112):
        assert np.mean(one == similar) == pytest.approx(0.8 / 3, abs=0.04)
    two = words[selected[:, 1], 1:3]
    assert np.mean((two == [210, 211]).all(axis=1)) == pytest.approx(0.8, abs=0.03)
    assert np.mean((two == [200, 201]).all(axis=1)) == pytest.approx(0.1, abs=0.03)
    none = words[selected[:, 2], 3]
    assert np.mean((none >= 10) & (none < 20)) == pytest.approx(0.9, abs=0.03)


def test_similar_words_of_a_table(tokenizer, tmp_path):
    table = {
        "红色": ["蓝色", "红", "大小", "绿色", "红色"],  # one of another length, one unknown, one the same
        "dog": ["cat"],
        "playing": ["plays"],
        "绿": ["红"],
    }
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    similar_words = read_similar_words(path, tokenizer, "jieba")
    assert similar_words.keys() == {ids(tokenizer, "红色"), ids(tokenizer, "playing")}
    similar = [tuple(row) for row in similar_words[ids(tokenizer, "红色")].tolist()]
    assert similar == [ids(tokenizer, "蓝色"), ids(tokenizer, "大小")]


@pytest.mark.parametrize(
    "table, found, is_read",
    [
        # Tokens, words and words of jieba among those of the table:
        ({"红色": ["蓝色"], "裙子": ["女人"], "红": ["蓝"]}, "1 of 3", {"token": False, "word": False, "jieba": True}),
        ({"playing": ["plays"], "大": ["小"], "Playing": ["plays"]}, "", {"token": True, "word": True, "jieba": True}),
        ({"playing": ["plays"], "plays": ["playing"]}, "0 of 2", {"token": False, "word": True, "jieba": True}),
        ({"红": ["蓝"], "红色": ["蓝色"]}, "", {"token": True, "word": True, "jieba": True}),
    ],
)
def test_a_table_of_words_that_are_never_looked_up(tokenizer, tmp_path, table, found, is_read):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    for unit, expected in is_read.items():
        if expected:
            read_similar_words(path, tokenizer, unit)
        else:
            with pytest.raises(ValueError, match=f"by the masking unit '{unit}', only {found} words .* 'jieba' for Ch"):
                read_similar_words(path, tokenizer, unit)


def test_share_of_words_with_similar_ones(tokenizer):
    similar_words = {ids(tokenizer, word): np.array([ids(tokenizer, word)]) for word in ("红色", "a", "playing", "大")}
    texts = ["红色的连衣裙", "a dog playing.", ""]
    shares = {unit: share_with_similar_words(texts, tokenizer, unit, similar_words) for unit in words.MASKING_UNITS}
    # Of 11 tokens a; of a, dog, playing, "." and 6 characters a and playing; of 红色, 的, 连衣裙 and the four 红色 too.
    assert shares == {"token": 1 / 11, "word": 2 / 10, "jieba": 3 / 7}
    assert share_with_similar_words([""], tokenizer, "word", similar_words) == 0
    left_padded = tokenizer.__class__(vocab=tokenizer.get_vocab(), padding_side="left")
    assert share_with_similar_words(texts, left_padded, "jieba", similar_words) == 3 / 7


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2]", "expected an object of lists of words"),
        ("{}", "expected an object of lists of words, got {}"),
        ("{", "expected JSON"),
        ('{"dog": []}', "got none among 1"),
    ],
)
def test_bad_tables(tokenizer, tmp_path, text, message):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_similar_words(tmp_path / "table.json", tokenizer)


def make_sample(caption: str, index: int) -> dict:
    record = {
        "image_id": str(index),
        "width": 10,
        "height": 10,
        "boxes": np.array([[0, 0, 5, 5]], dtype=np.float32),
        "features": np.ones((1, 4), dtype=np.float32),
    }
    sample = {"caption": caption, "own_caption": caption, "unfit_captions": None, "record": record, "index": index}
    return sample | {"epoch": 0, "itm_label": None, "rng": np.random.default_rng(index)}


@pytest.mark.parametrize("objective", ["mlm", "msm"])
def test_collator_masks_chinese_words_as_a_whole(tokenizer, objective):
    processor = InterBERTProcessor(tokenizer, region_feature_size=4)
    collator = PretrainingCollator(processor, [objective], masking_unit="jieba", text_mask_probability=0.3)
    batch = collator([make_sample("女人穿着红色的连衣裙", index) for index in range(300)])
    assert "word_starts" not in batch
    is_masked = (batch["labels"] != IGNORED_LABEL).numpy()
    # [CLS] 女人 / 穿着 / 红色 / 的 / 连衣裙 [SEP]
    words = [(1, 3), (3, 5), (5, 7), (7, 8), (8, 11)]
    masked = np.stack([is_masked[:, start:stop].all(axis=1) for start, stop in words], axis=1)
    untouched = np.stack([~is_masked[:, start:stop].any(axis=1) for start, stop in words], axis=1)
    assert (masked | untouched).all() and masked.any(axis=0).all() and untouched.any(axis=0).all()
    assert not is_masked[:, [0, 11]].any()


def test_collator_corrects(tokenizer):
    processor = InterBERTProcessor(tokenizer, region_feature_size=4)
    similar_words = {ids(tokenizer, "红"): np.array([ids(tokenizer, "蓝")])}
    collator = PretrainingCollator(processor, ["mlm"], text_mask_probability=1.0, similar_words=similar_words)
    batch = collator([make_sample("红", index) for index in range(400)])
    assert (batch["labels"][:, 1] == ids(tokenizer, "红")[0]).all()
    assert (batch["input_ids"] != MASK).all()
    assert (batch["input_ids"][:, 1] == ids(tokenizer, "蓝")[0]).float().mean() == pytest.approx(0.8, abs=0.06)


def test_segments_are_replaced_word_by_word(tokenizer):
    """As MacBERT does: each word of a segment by one that is like it, not the segment by a phrase."""
    processor = InterBERTProcessor(tokenizer, region_feature_size=4)
    similar_words = {ids(tokenizer, a): np.array([ids(tokenizer, b)]) for a, b in (("红色", "蓝色"), ("裙子", "女人"))}
    options = {"masking_unit": "jieba", "similar_words": similar_words, "text_mask_probability": 1.0}
    batch = PretrainingCollator(processor, ["msm"], **options)([make_sample("红色裙子", i) for i in range(400)])
    for start, similar in ((1, "蓝色"), (3, "女人")):
        is_similar = batch["input_ids"][:, start : start + 2] == torch.tensor(ids(tokenizer, similar))
        assert is_similar.all(dim=1).float().mean() == pytest.approx(0.8, abs=0.06)


def test_bad_masking_unit(tokenizer):
    processor = InterBERTProcessor(tokenizer, region_feature_size=4)
    with pytest.raises(ValueError, match="must be one of .*'jieba'.*, got 'syllable'"):
        PretrainingCollator(processor, ["mlm"], masking_unit="syllable")


def test_similar_words_by_their_vectors(tmp_path, monkeypatch, capsys):
    lines = ["6 2", "红色 1 0", "蓝色 0.9 0.1", "狗 0 1", "猫 0.1 0.9", "裙子 0 2", "连衣裙 0 1"]
    paths = [tmp_path / "vectors.txt", tmp_path / "out.json"]
    paths[0].write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["find_similar_words.py", *map(str, paths)])
    find_similar_words.main()
    # 裙子 is like neither of the other words of two characters, and the one of three has none beside it.
    found = json.loads(paths[1].read_text(encoding="utf-8"))
    assert found == {"红色": ["蓝色"], "蓝色": ["红色"], "狗": ["猫"], "猫": ["狗"]}
    assert "4 of 6 words" in capsys.readouterr().out


def test_the_nearest_words_against_a_full_sort():
    rng = np.random.default_rng(0)
    for size in (1, 3, 400):
        for cosines in (rng.random(size), rng.integers(0, 5, size) / 4):  # the latter with many ties
            for num_similar, min_similarity in ((1, 0.5), (10, 0.0), (10, 0.9), (10, 2.0), (400, 0.5)):
                order = sorted(range(size), key=lambda place, values=cosines: (-values[place], place))
                expected = [place for place in order if cosines[place] >= min_similarity][:num_similar]
                assert find_similar_words.find_nearest(cosines, num_similar, min_similarity).tolist() == expected


@pytest.mark.parametrize(
    "text, arguments, status, message",
    [
        (None, [], 1, "No such file or directory: '.*vectors.txt'"),
        (b"a 1 2\nb 1\n", [], 1, "vectors.txt, line 2: expected a word and 2 numbers, got 'b 1"),
        (b"a 1 x\n", [], 1, "line 1: expected a word and numbers"),
        (b"a 1 2\n\xff 1 2\n", [], 1, "vectors.txt, line 2: expected UTF-8"),
        (b"", [], 1, "expected word vectors, got none"),
        (b"a 1 2\n", ["--num_similar", "0"], 2, "--num_similar: expected at least 1, got 0"),
        (b"a 1 2\n", ["--max_words", "0"], 2, "--max_words: expected at least 1, got 0"),
    ],
)
def test_bad_vectors(tmp_path, monkeypatch, capsys, text, arguments, status, message):
    path = tmp_path / "vectors.txt"
    if text is not None:
        path.write_bytes(text)
    monkeypatch.setattr(sys, "argv", ["find_similar_words.py", str(path), str(tmp_path / "out.json"), *arguments])
    with pytest.raises(SystemExit) as exit_info:
        find_similar_words.main()
    assert exit_info.value.code == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("find_similar_words.py: ") and re.search(message, error), error
    assert not (tmp_path / "out.json").exists()
