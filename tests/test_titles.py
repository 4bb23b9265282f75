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
    group_images,
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
    # What cannot be seen is gone before white space is counted, and white space is not what cannot be seen.
    assert normalize_characters("红 \u200b 裙&#8203;\x1f\u2060女 \ufeff") == "红 裙 女"
    # Only names that there are, as they stand: no part of one.
    assert normalize_characters("&copy女; &copyright; &#x5973; &#22899女; &nbsp;&hearts;") == (
        "&copy女; &copyright; 女 &#22899女; ♥"
    )
    # Half of an emoji, in a title that was cut behind 16 bits.
    assert normalize_characters("红裙 \ud83d") == "红裙"
    # Both halves, as some pages write them; one of them; what was not read on the way here; and no character at all.
    assert normalize_characters("红&#55357;&#56832;裙&#xD83D;&#xde00;") == "红\U0001f600裙\U0001f600"
    assert normalize_characters("红&#55357;裙&#56832;&#56832;女&#55357;") == "红裙女"
    assert normalize_characters("宏基宏\ufffdacer &#9999999;&#0;") == "宏基宏acer"


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


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ("保湿乳50ml", ["*", "2"]),
        ("helloOkitty", ["/", "布丁狗"]),
        ("连衣裙", [" ", "【", "（", "“", "大码"]),
        ("送手套", ["＋", "帽子"]),
        ("SK", ["-", "II"]),
        ("红色", ["、", "蓝色"]),
        ("红色", ["，", "￥", "99"]),
        ("【红色】", ["连衣裙"]),
        ("纯棉100%", ["连衣裙"]),
        ("好看！", ["连衣裙"]),
    ],
)
def test_nothing_dangles_behind_a_cut(kept, words):
    text = kept + "".join(words)
    assert cut_at_word(text, [kept, *words], len(text) - len(words[-1])) == kept
    assert cut_at_word(text, [kept, *words], len(text)) == text
    # What was not cut off by us stays.
    assert cut_at_word(kept + "/", [kept, "/"], 36) == kept + "/"


@pytest.mark.parametrize(
    "last", ["\U0001f1e8\U0001f1f3", "\U0001f44d\U0001f3fd", "e\u0301"], ids=["flag", "tone", "accent"]
)
def test_no_character_is_cut_in_two(last):
    """jieba takes what is seen as one character for several words."""
    title = "裙" * 35 + last + "连衣裙"
    assert TitleCleaner()(title) == "裙" * 35
    assert TitleCleaner(max_characters=37)(title) == "裙" * 35 + last


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
    # 6 of 12 characters are no more than half, 6 of 11 are. Blanks and punctuation do not count.
    assert is_spam("包邮 特价 现货！！！红色连衣裙子") is None
    assert is_spam("包邮 特价 现货！！！红色连衣裙") == "包邮 特价 现货"
    # In a short title one word may be most of it, but not all of it: a tester, a clip for coupons, a test.
    assert [is_spam(title) for title in ("测试仪", "新款测试仪", "优惠券夹", "包邮 裙")] == [None] * 4
    assert is_spam("测试！") == "测试" and is_spam("包邮 特价") == "包邮 特价"
    assert is_spam("包邮 特价 现货 裙") == "包邮 特价 现货"
    assert WordListSpamFilter(max_share=0)("测试仪") == "测试"
    # No fee: masks that moisten (补水), and so on, free of postage.
    titles = ("玻尿酸面膜10片免运费补水保湿美白", "全国免运费补血阿胶膏", "免邮费补光灯直播美颜灯")
    assert [is_spam(title) for title in titles] == [None] * 3
    # A fee, whatever else there is.
    assert is_spam("牛杂酱料世家红色连衣裙女装 差价专用") == "差价专用"
    assert is_spam("红色连衣裙女") is None
    # Words that overlap: all five characters.
    assert WordListSpamFilter(["红黄蓝", "蓝白黑"], max_share=0.62)("红黄蓝白黑 ABC") == "红黄蓝 蓝白黑"
    assert WordListSpamFilter(["红黄蓝", "蓝白黑"], max_share=0.63)("红黄蓝白黑 ABC") is None
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
        (
            "a.jsonl",
            '{"product_id": 1, "title": "红", "category": "裙\\ud83d"}\n',
            r"a.jsonl, line 1: expected 'category' to be of whole characters, got '裙\\ud83d'",
        ),
        ("a.xlsx", "", "expected one of the extensions"),
        ("a.parquet", "PAR1", "a.parquet: expected a Parquet file"),
    ],
)
def test_broken_tables(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_products(tmp_path / name)


def test_titles_that_were_cut_within_a_character(tmp_path):
    path = tmp_path / "products.jsonl"
    path.write_text('{"product_id": 1, "title": "红裙\\ud83d"}\n{"product_id": 2, "title": "\\ud83d\\ude00"}\n')
    assert read_products(path) == [Product("1", "红裙"), Product("2", "😀")]


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


def test_groups():
    product_ids = {"a": ["1"], "b": ["2"], "c": ["2", "3"], "d": ["4"], "e": ["3"], "f": ["红裙"], "g": ["5"]}
    captions = {
        "a": ["红裙，女"],
        "b": ["蓝裙"],
        "c": ["绿裙"],
        "d": ["白裙", "红 裙 女！"],
        "f": ["Ｄog裙"],
        "g": ["红裙"],
    }
    # b and e are photographs of other products, which c shows together. A product id is no title.
    groups = [["a", "d"], ["b", "c", "e"], ["f"], ["g"]]
    assert sorted(map(sorted, group_images(product_ids, captions))) == groups
    assert group_images(product_ids, captions | {"h": ["dog(裙)"]})[-2:] == [["f", "h"], ["g"]]
    backwards = [dict(reversed(values.items())) for values in (product_ids, captions)]
    assert sorted(map(sorted, group_images(*backwards))) == groups


def test_draws():
    images = [[f"image-{number}"] for number in range(20)]
    drawn = draw_images(images, 6, seed=0)
    assert len(set(drawn)) == 6 and {image for (image,) in images} >= set(drawn)
    assert draw_images(images[::-1], 6, seed=0) == drawn
    assert draw_images(images, 9, seed=0)[:6] == drawn
    assert draw_images(images, 6, seed=1) != drawn
    assert sorted(draw_images(images, 30, seed=0)) == sorted(image for (image,) in images)

    calls = []

    def find_usable(candidates):
        calls.append(len(candidates))
        return [image for image in candidates if image not in drawn[:2]]

    # The two that cannot be used are made up for, and the others stay in order.
    assert draw_images(images, 6, 0, find_usable) == draw_images(images, 8, seed=0)[2:]
    assert calls == [6, 2]
    assert draw_images(images, 30, 0, lambda candidates: []) == []


def test_draws_from_groups():
    groups = [[f"{group}-{number}" for number in range(1 + group % 3)] for group in range(12)]
    drawn = draw_images(groups, 12, seed=0)
    assert sorted(int(image.split("-")[0]) for image in drawn) == list(range(12))
    assert {image.split("-")[1] for image in drawn} == {"0", "1", "2"}
    assert draw_images([group[::-1] for group in groups[::-1]], 5, seed=0) == drawn[:5]

    # Where the image that was chosen cannot be used there is another one of the group, once all groups had their turn.
    unusable = [image for image in drawn[:6] if not image.startswith(("0", "3", "6", "9"))][:2]
    usable = [draw_images(groups, n, 0, lambda images: [i for i in images if i not in unusable]) for n in range(13)]
    assert usable[12][:10] == [image for image in drawn if image not in unusable]
    assert [image.split("-")[0] for image in usable[12][10:]] == [image.split("-")[0] for image in unusable]
    assert all(images == usable[12][:number] for number, images in enumerate(usable))


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
