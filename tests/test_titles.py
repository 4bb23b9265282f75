"""Chinese product titles: what is cut and dropped, tables of products, held-out images."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from processing.titles import (
    Product,
    TitleCleaner,
    TitleDropped,
    WordListSpamFilter,
    cut_at_word,
    draw_examples,
    draw_images,
    duplicates_of_earlier,
    images_with_own_captions,
    normalize_characters,
    read_products,
)

TITLES = Path(__file__).resolve().parents[2] / "shared" / "data" / "titles_zh"


def dropped(cleaner: TitleCleaner, title: str) -> tuple[str, str]:
    with pytest.raises(TitleDropped) as error:
        cleaner(title)
    return error.value.reason, error.value.detail


def test_characters():
    assert normalize_characters("  红色\u3000连衣裙 \t 女\n") == "红色 连衣裙 女"
    assert normalize_characters("红\u200b色\ufeff裙\x00") == "红色裙"
    assert normalize_characters("LANC&Ocirc;ME &amp;&#22899;") == "LANCÔME &女"
    assert normalize_characters("AT&T &copy女") == "AT&T &copy女"


def test_width_and_simplified_characters_only_when_asked():
    title = "ＡＢ１２，（繁體）連衣裙\u3000女"
    assert TitleCleaner()(title) == "ＡＢ１２，（繁體）連衣裙 女"
    assert TitleCleaner(normalize_width=True)(title) == "AB12,(繁體)連衣裙 女"
    assert TitleCleaner(to_simplified=True)(title) == "ＡＢ１２，（繁体）连衣裙 女"


def test_cut_at_word():
    words = ["红色", " ", "连衣裙", " ", "女"]
    text = "".join(words)  # 8 characters
    cuts = [cut_at_word(text, words, length) for length in range(1, 9)]
    # White space at the end counts, and is left out.
    assert cuts == ["", "红色", "红色", "红色", "红色", "红色 连衣裙", "红色 连衣裙", "红色 连衣裙 女"]


def test_titles_are_cut_as_jieba_finds_words():
    # 我 来到 北京 清华大学: the last word ends at 9 characters.
    title = "我来到北京清华大学"
    assert TitleCleaner(max_characters=9)(title) == title
    assert TitleCleaner(max_characters=8)(title) == "我来到北京"
    assert TitleCleaner(max_characters=4)(title) == "我来到"
    assert TitleCleaner()("裙" * 36) == "裙" * 36
    assert len(TitleCleaner()("连衣裙" * 13)) == 36


def test_dropped_titles():
    cleaner = TitleCleaner(max_characters=8, spam_filter=lambda title: "广告" in title and "an advertisement")
    assert dropped(cleaner, " \u3000 ") == ("no title", "")
    assert dropped(cleaner, "SK-II 230ml ＡＢ。ーか") == ("no Chinese character", "")
    assert dropped(cleaner, "红色连衣裙很长的标题广告") == ("spam", "an advertisement")
    assert dropped(cleaner, "ABCDEFGHIJ 连衣裙") == ("no Chinese character left", "")
    assert dropped(cleaner, "ABCDEF 连衣裙") == ("no Chinese character left", "")
    assert dropped(TitleCleaner(spam_filter=lambda title: 1), "红色") == ("spam", "")
    assert cleaner("㐀") == "㐀"  # of a rarer block


def test_spam():
    is_spam = WordListSpamFilter()
    assert is_spam("【包邮】红色连衣裙女") is None
    # 4 of 8 characters are no more than half, 4 of 7 are.
    assert is_spam("包邮 特价！红色裙子") is None
    assert is_spam("包邮 特价！红裙子") == "包邮 特价"
    # Blanks and punctuation do not count.
    assert is_spam("包邮！！！ 裙") == "包邮"
    # A fee, whatever else there is.
    assert is_spam("牛杂酱料世家红色连衣裙女装 差价专用") == "差价专用"
    assert is_spam("红色连衣裙女") is None
    # Words that overlap: all five characters.
    assert WordListSpamFilter(["红黄蓝", "蓝白黑"], max_share=0.7)("红黄蓝白黑 AB") == "红黄蓝 蓝白黑"
    assert WordListSpamFilter(["红黄蓝", "蓝白黑"], max_share=0.72)("红黄蓝白黑 AB") is None
    assert WordListSpamFilter(["VIP"], max_share=0)("红色连衣裙 vip专享") == "vip"
    assert WordListSpamFilter(["VIP"], max_share=1)("vip") is None
    assert WordListSpamFilter([], [])("包邮") is None
    with pytest.raises(ValueError, match="from 0 to 1, got 1.5"):
        WordListSpamFilter(max_share=1.5)
    with pytest.raises(ValueError, match="must not be blank"):
        WordListSpamFilter(["包邮", " "])


def test_cleaner_arguments(monkeypatch):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TitleCleaner(max_characters=0)
    monkeypatch.setitem(sys.modules, "opencc", None)
    with pytest.raises(ImportError, match=r'opencc.*pip install "interbert\[chinese\]"'):
        TitleCleaner(to_simplified=True)
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match=r'jieba.*pip install "interbert\[chinese\]"'):
        TitleCleaner()


PRODUCTS = [Product("7", "红裙", "a.jpg", "裙"), Product("8", '12" 屏幕', None, None)]


def write_tables(folder: Path) -> dict[str, Path]:
    """The same products in every format."""
    rows = [
        {"product_id": 7, "title": "红裙", "image_id": "a.jpg", "category": "裙"},
        {"product_id": 8, "title": '12" 屏幕', "image_id": None, "category": None},
    ]
    texts = {
        "csv": '\ufeffproduct_id,title,image_id,category,price\n7,红裙,a.jpg,裙,1\n8,"12"" 屏幕",,,2\n',
        "tsv": 'product_id\ttitle\timage_id\tcategory\n7\t红裙\ta.jpg\t裙\n8\t12" 屏幕\t\t\n',
        "jsonl": "".join(f"{json.dumps(row)}\n" for row in rows),
        "json": json.dumps(rows),
    }
    paths = {extension: folder / f"products.{extension}" for extension in (*texts, "parquet")}
    for extension, text in texts.items():
        paths[extension].write_text(text, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), paths["parquet"])
    return paths


def test_tables(tmp_path):
    for path in write_tables(tmp_path).values():
        assert read_products(path) == PRODUCTS, path.name
    path = tmp_path / "bare.tsv"
    path.write_text("7\tx\t红裙\n8\ty\t蓝裙\n", encoding="utf-8")
    columns = {"product_id": "id", "title": "name"}
    assert read_products(path, columns, ["id", "other", "name"]) == [Product("7", "红裙"), Product("8", "蓝裙")]
    path = tmp_path / "titles.txt"
    path.write_text("红裙\n\n蓝裙\n", encoding="utf-8")
    assert read_products(path) == [Product("1", "红裙"), Product("3", "蓝裙")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "product_id,title\n1,红\n2\n", "a.csv, line 3: expected 2 columns"),
        ("a.csv", "product_id,title\n1,红\n,蓝\n", "a.csv, line 3: expected a product id in the column 'product_id'"),
        (
            "a.csv",
            "id,title\n1,红\n",
            "a.csv, line 2: expected a product id in the column 'product_id', got {'id': '1'",
        ),
        ("a.csv", "product_id,name\n1,红\n", r"a.csv: expected a column 'title', got \['product_id', 'name'\]"),
        ("a.csv", "product_id,title\n", "a.csv: expected products, got none"),
        ("a.jsonl", '{"product_id": 1, "title": 5}\n', "a.jsonl, line 1: expected 'title' to be a string, got 5"),
        ("a.jsonl", '{"product_id": 1.5, "title": "红"}\n', "'product_id' to be a string or a whole number, got 1.5"),
        ("a.jsonl", '{"product_id": 1, "title": "红"\n', "a.jsonl, line 1, column 31: expected JSON"),
        ("a.xlsx", "", "expected one of the extensions"),
        ("a.parquet", "PAR1", "a.parquet: expected a Parquet file"),
    ],
)
def test_broken_tables(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_products(tmp_path / name)


def test_columns_that_are_missing(tmp_path):
    paths = write_tables(tmp_path)
    with pytest.raises(ValueError, match="products.csv: expected a column 'picture', got"):
        read_products(paths["csv"], {"image_id": "picture"}, required=["image_id"])
    with pytest.raises(ValueError, match="expected a .tsv, as names of its columns are given, got '.csv'"):
        read_products(paths["csv"], header=["product_id", "title"])
    with pytest.raises(ValueError, match=r"products.tsv, line 1: expected 2 columns, \['product_id', 'title'\], got 4"):
        read_products(paths["tsv"], header=["product_id", "title"])
    with pytest.raises(ValueError, match="products.parquet: expected a column 'price'"):
        read_products(paths["parquet"], {"title": "price"})


def test_duplicates():
    pairs = [("a", "红 Dog"), ("b", "红 Dog"), ("a", "红dog"), ("a", "蓝"), ("a", "红 Dog"), ("b", "红  dog")]
    assert duplicates_of_earlier(pairs) == [None, None, 0, None, 0, 1]


def test_images_with_own_captions():
    captions = {"a": ["红裙", "红 裙"], "b": ["蓝裙", "Dog 裙"], "c": ["dog裙"], "d": ["dog 裙", "绿裙"], "e": []}
    assert images_with_own_captions(captions) == ["a", "e"]


def test_draws():
    images = [f"image-{number}" for number in range(20)]
    drawn = draw_images(images, 6, seed=0)
    assert len(set(drawn)) == 6 and set(drawn) <= set(images)
    assert draw_images(images[::-1], 6, seed=0) == drawn
    assert draw_images(images, 9, seed=0)[:6] == drawn
    assert draw_images(images, 6, seed=1) != drawn
    assert sorted(draw_images(images, 30, seed=0)) == sorted(images)

    calls = []

    def find_usable(candidates):
        calls.append(len(candidates))
        return [image for image in candidates if image not in drawn[:2]]

    # The two that cannot be used are made up for, and the others stay in order.
    assert draw_images(images, 6, 0, find_usable) == draw_images(images, 8, seed=0)[2:]
    assert calls == [6, 2]
    assert draw_images(images, 30, 0, lambda candidates: []) == []


def test_examples():
    items = list(range(100))
    examples = draw_examples(items, 10)
    assert len(examples) == 10 and examples == sorted(examples) != items[:10]
    assert draw_examples(items, 10) == examples and draw_examples(items[:3], 10) == items[:3]


@pytest.mark.skipif(not TITLES.is_dir(), reason="there are no real titles")
def test_real_titles():
    products = read_products(TITLES / "product_titles.tsv", header=["product_id", "title", "parts"])
    products += read_products(TITLES / "ecommerce_titles.txt")
    assert len(products) == 2673 + 500
    cleaner = TitleCleaner(spam_filter=WordListSpamFilter())
    reasons: dict[str, int] = {}
    for product in products:
        try:
            caption = cleaner(product.title)
        except TitleDropped as error:
            reasons[error.reason] = reasons.get(error.reason, 0) + 1
            continue
        text = cleaner.normalize(product.title)
        assert 0 < len(caption) <= 36 and text.startswith(caption)
        assert caption == text or len(text) > 36
    # Names of brands and numbers alone; most titles have an advertising word, and are kept.
    assert reasons["no Chinese character"] < 20 and reasons["spam"] < 10
