"""Chinese product titles: a table of products, its titles as captions, and which images are held out.

```python
clean = TitleCleaner(max_characters=36)
for product in read_products("products.csv"):
    try:
        caption = clean(product.title)
    except TitleDropped as dropped:
        print(product.product_id, dropped.reason, dropped.detail)
```

`examples/build_title_dataset.py` makes region datasets of them.
"""

import hashlib
import html
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.entities import html5
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import regex

from .hard_negatives import normalize_caption
from .tasks.files import Record, numbered_lines, read_records
from .words import import_jieba

# ---------------------------------------------------------------- text

# The blocks that BERT's tokenizer takes for Chinese.
CHINESE_CHARACTER = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)
# Full-width forms of ASCII, among them punctuation of Chinese texts. (Spaces are white space.)
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}

# Those of HTML, with their semicolon: "&copy" may also be the beginning of a name.
CHARACTER_REFERENCE = re.compile(r"&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|[a-zA-Z][a-zA-Z0-9]*);", re.ASCII)
# Control characters, and format characters such as the zero-width space.
INVISIBLE_CATEGORIES = ("Cc", "Cf")
REPLACEMENT_CHARACTER = "\ufffd"  # what is left of one that could not be read
# Unicode's categories of opening brackets, opening quotation marks, dashes and low lines, ...
JOINING_CATEGORIES = ("Ps", "Pi", "Pd", "Pc")
# ... and further characters that join to what comes next. The full-width forms of ASCII are meant as well.
JOINING_CHARACTERS = "&@#*/\\|~+=<^:;,.$·•・、×÷±￥¥"


def normalize_characters(text: str) -> str:
    """Characters instead of HTML's names of them, one blank for all white space between words, and no characters that
    cannot be seen or could not be read."""

    def unescape(reference: re.Match) -> str:
        if number := reference[1] or reference[2]:
            code = int(number, 10 if reference[1] else 16)
            # Pages write a character beyond U+FFFF also as its two halves, which html.unescape takes for broken ones.
            return chr(code) if 0xD800 <= code <= 0xDFFF else html.unescape(reference[0])
        # html.unescape also takes a name for the beginning of a longer one: "&copyright;".
        return html.unescape(reference[0]) if reference[0][1:] in html5 else reference[0]

    text = CHARACTER_REFERENCE.sub(unescape, text)
    # Two halves become one character; one alone goes.
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore").replace(REPLACEMENT_CHARACTER, "")
    # Tabs and ends of lines are control characters, but white space.
    visible = [
        character
        for character in text
        if character.isspace() or unicodedata.category(character) not in INVISIBLE_CATEGORIES
    ]
    return " ".join("".join(visible).split())


def cut_at_word(text: str, words: Sequence[str], max_characters: int) -> str:
    """
    As many words as fit.

    Args:
        text (`str`): The words, joined.
        words (`Sequence[str]`): Those of `text`, white space and punctuation included.
        max_characters (`int`): Length of the result, at most.

    Returns:
        `str`: without white space at its end and, if it is cut, without a connector, separator or opening bracket
        there, and without a part of what is seen as one character; empty if the first word is longer.
    """
    length = 0
    for word in words:
        if length + len(word) > max_characters:
            break
        length += len(word)
    # jieba takes a flag or a skin tone for several words.
    length = max((end for end in _character_ends(text) if end <= length), default=0)
    if length < len(text):
        while length and _joins_to_next(text[length - 1]):
            length -= 1
    return text[:length].rstrip()


def _character_ends(text: str) -> Iterator[int]:
    """Where there ends what is seen as one character (an extended grapheme cluster)."""
    return (found.end() for found in regex.finditer(r"\X", text))


def _joins_to_next(character: str) -> bool:
    return (
        character.isspace()
        or unicodedata.category(character) in JOINING_CATEGORIES
        or character.translate(HALF_WIDTH) in JOINING_CHARACTERS
    )


# ---------------------------------------------------------------- spam

# What sellers write of any product, whatever it is.
ADVERTISING_WORDS = (
    *("包邮", "免邮", "免运费", "邮费", "运费", "差价", "补差", "补拍", "专拍", "专用链接", "链接", "拍下", "下单"),
    *("请勿拍", "勿拍", "请不要拍", "不要拍", "断货", "测试", "联系客服", "咨询客服", "客服", "加微信", "微信"),
    *("特价", "特惠", "促销", "大促", "清仓", "甩卖", "亏本", "冲量", "秒杀", "抢购", "限时", "限量", "折扣", "打折"),
    *("优惠券", "优惠", "满减", "买一送一", "赠品", "返现", "刷单", "兼职", "好评", "推荐", "人气", "信誉", "直播间"),
    *("厂家直销", "厂家", "直销", "批发", "代理", "加盟", "一件代发", "代购", "货到付款", "预售", "定金", "现货"),
    *("正品", "专柜", "保证", "假一赔十", "假一罚十", "新款", "新品", "爆款", "热卖", "热销", "双十一", "聚划算"),
    *("淘宝", "天猫", "旗舰店", "官方"),
)
# What stands on a page of a shop that sells no product, but takes postage or a difference in price.
FEE_PHRASES = (
    # (Not 运费补: 免运费补水面膜 is a mask that moistens, 补水, free of postage.)
    *("补差价", "差价专用", "差价链接", "差价专拍", "补运费", "运费专用", "运费链接", "运费专拍"),
    *("补邮费", "邮费专用", "邮费链接", "邮费专拍"),
)
# Letters, digits and Chinese characters. In fewer, one advertising word may be most of a product's name.
SHORT_TITLE = 8


class WordListSpamFilter:
    """
    Finds titles that are no descriptions of a product, by two rules:

    1. One of `phrases` is in the title.
    2. Advertising words make up more than `max_share` of its letters, digits and Chinese characters. Most titles have
       such a word or two (free shipping, on sale, new) beside the product's name: these are kept. A title with fewer
       than 8 of these characters counts as one with 8, unless it has nothing but advertising words: 测试仪 (a tester)
       and 新款测试仪 (a new one) are products, 测试 (a test) is none.

    Args:
        words (`Sequence[str]`): Of the second rule. Upper and lower case are the same.
        phrases (`Sequence[str]`): Of the first rule, likewise.
        max_share (`float`): From 0 (any advertising word is too much) to 1 (none ever is).

    Raises:
        ValueError: `max_share` is out of range, or one of the words is blank.
    """

    def __init__(
        self,
        words: Sequence[str] = ADVERTISING_WORDS,
        phrases: Sequence[str] = FEE_PHRASES,
        max_share: float = 0.5,
    ):
        if not 0 <= max_share <= 1:
            raise ValueError(f"`max_share` must be from 0 to 1, got {max_share}.")
        if not all(word.strip() for word in (*words, *phrases)):
            raise ValueError(f"`words` and `phrases` must not be blank, got {[*words, *phrases]!r:.80}.")
        self.max_share = max_share
        self._words, self._phrases = _any_of(words), _any_of(phrases)

    def __call__(self, title: str) -> str | None:
        """What makes a title spam, or None."""
        if found := self._phrases.search(title):
            return found[1]
        covered: set[int] = set()
        words: dict[str, None] = {}
        for found in self._words.finditer(title):
            covered.update(range(*found.span(1)))
            words[found[1]] = None
        telling = [place for place, character in enumerate(title) if character.isalnum()]
        num_covered = sum(place in covered for place in telling)
        length = len(telling) if num_covered == len(telling) else max(len(telling), SHORT_TITLE)
        return " ".join(words) if num_covered > self.max_share * length else None


def _any_of(words: Sequence[str]) -> re.Pattern:
    # Matches are empty, so that those that overlap are found as well; of those at one place the longest.
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(f"(?=({'|'.join(map(re.escape, longest_first)) or '(?!)'}))", re.IGNORECASE)


# ---------------------------------------------------------------- cleaning


class TitleDropped(Exception):
    """
    A title that makes no caption.

    Attributes:
        reason (`str`): `"no title"`, `"no Chinese character"`, `"spam"`, `"no Chinese character left"`.
        detail (`str`): What the reason is about; empty where there is nothing to add.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class TitleCleaner:
    """
    Makes captions of titles, or drops them:

    1. White space becomes single blanks, `&amp;` and the like become characters, and those that cannot be seen are
       left out. Full-width and traditional characters stay as they are unless asked otherwise.
    2. Titles without a Chinese character are dropped, and so are those that are spam.
    3. Longer titles are cut behind the last word, as jieba finds words, that ends within `max_characters`. Those that
       have no Chinese character before it are dropped.

    Args:
        max_characters (`int`): White space and punctuation count.
        normalize_width (`bool`): Makes full-width letters, digits and punctuation half-width.
        to_simplified (`bool`): Makes traditional characters simplified.
        spam_filter (`Callable[[str], Any]`, *optional*):
            Is given a title after these changes, and before it is cut. What it returns is true for spam; a string tells
            why. None: nothing is spam.

    Raises:
        ImportError: jieba or OpenCC, of the extra `chinese`, is not installed.
        ValueError: `max_characters` is not positive.
    """

    def __init__(
        self,
        max_characters: int = 36,
        normalize_width: bool = False,
        to_simplified: bool = False,
        spam_filter: Callable[[str], Any] | None = None,
    ):
        if max_characters < 1:
            raise ValueError(f"`max_characters` must be at least 1, got {max_characters}.")
        self.max_characters = max_characters
        self.normalize_width = normalize_width
        self.spam_filter = spam_filter
        self._segment = import_jieba().lcut
        self._simplify = _import_opencc()("t2s").convert if to_simplified else None

    def __call__(self, title: str) -> str:
        """
        Returns:
            `str`: the caption.

        Raises:
            TitleDropped: there is none.
        """
        text = self.normalize(title)
        if not text:
            raise TitleDropped("no title")
        if not CHINESE_CHARACTER.search(text):
            raise TitleDropped("no Chinese character")
        verdict = self.spam_filter(text) if self.spam_filter is not None else None
        if verdict:
            raise TitleDropped("spam", verdict if isinstance(verdict, str) else "")
        if len(text) <= self.max_characters:
            return text
        caption = cut_at_word(text, self._segment(text), self.max_characters)
        if not CHINESE_CHARACTER.search(caption):
            raise TitleDropped("no Chinese character left")
        return caption

    def normalize(self, title: str) -> str:
        """A title before anything is dropped or cut."""
        text = normalize_characters(title)
        if self.normalize_width:
            text = text.translate(HALF_WIDTH)
        return text if self._simplify is None else self._simplify(text)


def _import_opencc():
    try:
        from opencc import OpenCC
    except ImportError as error:
        raise ImportError(
            'Simplified characters need opencc-python-reimplemented: pip install "interbert[chinese]"'
        ) from error
    return OpenCC


# ---------------------------------------------------------------- products

# Half of a character beyond U+FFFF. JSON can have it, and no file in UTF-8.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
PRODUCT_FIELDS = ("product_id", "title", "image_id", "category")


@dataclass(frozen=True, slots=True)
class Product:
    """
    A row of a table of products.

    Args:
        product_id (`str`): Not necessarily of this row alone: a product may have several images.
        title (`str`): Empty if the row has none.
        image_id (`str`, *optional*): The product's image.
        category (`str`, *optional*): The product's category.
    """

    product_id: str
    title: str
    image_id: str | None = None
    category: str | None = None


def read_products(
    path: str | os.PathLike,
    columns: Mapping[str, str] | None = None,
    header: Sequence[str] | None = None,
    required: Collection[str] = ("product_id", "title"),
) -> list[Product]:
    """
    Reads a table: `.csv`, `.tsv`, `.jsonl`, `.json` (a list of objects), `.parquet`, or `.txt` with a title in each
    line, whose number is the product id. Ids are strings or whole numbers. Half a character (a lone surrogate), which
    some titles end with that were cut elsewhere, is left out of a title.

    Args:
        path (`str` or `os.PathLike`): The file.
        columns (`Mapping[str, str]`, *optional*):
            Columns that go by another name than the field of [`Product`], by field.
        header (`Sequence[str]`, *optional*):
            Names of the columns of a `.tsv` whose first line is a row already.
        required (`Collection[str]`): Fields that the table must have a column for.

    Raises:
        ValueError: another extension, a broken row or one without a product id, a value of another type, with its
            place; a column that is missing; a table without any row.
    """
    columns = {field: field for field in PRODUCT_FIELDS} | dict(columns or {})
    products = []
    names: dict[str, None] = {}
    for record in _read_rows(path, columns, header):
        names |= dict.fromkeys(record)
        product_id = _identifier(record, columns["product_id"])
        if product_id is None:
            raise record.error(f"expected a product id in the column {columns['product_id']!r}, got {dict(record)}.")
        title = LONE_SURROGATE.sub("", record.text(columns["title"])) if columns["title"] in record else ""
        image_id, category = (_identifier(record, columns[field]) for field in ("image_id", "category"))
        products.append(Product(product_id, title, image_id, category))
    if not products:
        raise ValueError(f"{path}: expected products, got none.")
    for field in required:
        if columns[field] not in names:
            raise ValueError(f"{path}: expected a column {columns[field]!r}, got {list(names)}.")
    return products


def _read_rows(path: str | os.PathLike, columns: Mapping[str, str], header: Sequence[str] | None) -> Iterator[Record]:
    extension = Path(path).suffix.lower()
    if header is not None and extension != ".tsv":
        raise ValueError(f"{path}: expected a .tsv, as names of its columns are given, got {extension!r}.")
    if extension == ".parquet":
        yield from _read_parquet(path, [columns[field] for field in PRODUCT_FIELDS])
    elif extension == ".txt":
        for where, line in numbered_lines(path):
            yield Record({columns["product_id"]: where.rpartition(" ")[2], columns["title"]: line}, where)
    elif header is not None:
        for where, line in numbered_lines(path):
            values = line.split("\t")
            if len(values) != len(header):
                raise ValueError(f"{where}: expected {len(header)} columns, {list(header)}, got {len(values)}.")
            yield Record(dict(zip(header, values, strict=True)), where)
    else:
        yield from read_records(path)


def _read_parquet(path: str | os.PathLike, names: Sequence[str]) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            present = [name for name in names if name in file.schema_arrow.names]
            row = 0
            for batch in file.iter_batches(columns=present):
                for values in batch.to_pylist():
                    yield Record(values, f"{path}, row {row}")
                    row += 1
    except pa.ArrowException as error:
        raise ValueError(f"{path}: expected a Parquet file, {error}.") from error


def _identifier(record: Record, name: str) -> str | None:
    """A string or a whole number, as a string; None where there is none."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise record.error(f"expected {name!r} to be a string or a whole number, got {value!r:.80}.")
    if LONE_SURROGATE.search(str(value)):
        raise record.error(f"expected {name!r} to be of whole characters, got {value!r:.80}.")
    return str(value).strip() or None


# ---------------------------------------------------------------- splits


def group_images(
    product_ids: Mapping[str, Collection[str]], captions: Mapping[str, Collection[str]]
) -> list[list[str]]:
    """
    Groups images such that none has a product or a caption, up to [`normalize_caption`], in common with one of another
    group.

    Args:
        product_ids (`Mapping[str, Collection[str]]`): Of each image, the products that it is a photograph of.
        captions (`Mapping[str, Collection[str]]`): Of each image, or of some.

    Returns:
        `list[list[str]]`: every image in one group. Those of a group may have nothing in common but others of it.
    """
    keys = [(image_id, ("product", product_id)) for image_id, ids in product_ids.items() for product_id in ids]
    keys += [(image_id, ("title", normalize_caption(text))) for image_id, texts in captions.items() for text in texts]
    leaders = {image_id: image_id for image_id in (*product_ids, *captions)}

    def leader_of(image_id: str) -> str:
        while leaders[image_id] != image_id:
            leaders[image_id] = leaders[leaders[image_id]]  # a shorter way for the next time
            image_id = leaders[image_id]
        return image_id

    first_images: dict[tuple[str, str], str] = {}
    for image_id, key in keys:
        leaders[leader_of(image_id)] = leader_of(first_images.setdefault(key, image_id))
    groups: dict[str, list[str]] = {}
    for image_id in leaders:
        groups.setdefault(leader_of(image_id), []).append(image_id)
    return list(groups.values())


def draw_images(
    groups: Iterable[Collection[str]],
    number: int,
    seed: int,
    find_usable: Callable[[Sequence[str]], Collection[str]] = lambda image_ids: image_ids,
) -> list[str]:
    """
    Draws groups of images without repetition, and one image of each. Which are drawn depends on the ids and the seed,
    not on the order of the ids, and the first ones of a larger number are those of a smaller.

    Args:
        groups (`Iterable[Collection[str]]`): Those to choose from. None is empty, and no image is in two.
        number (`int`): So many are drawn.
        seed (`int`): Other images for another seed.
        find_usable (`Callable`): Those of some images that can be taken; called until there are enough.

    Returns:
        `list[str]`: fewer than `number` if no more groups have an image that can be taken.
    """

    def rank(image_id: str) -> bytes:
        return hashlib.sha256(f"{seed} {image_id}".encode()).digest()

    order = sorted((sorted(group, key=rank) for group in groups), key=lambda group: rank(min(group)))
    drawn: list[str] = []
    while order and len(drawn) < number:
        candidates, order = order[: number - len(drawn)], order[number - len(drawn) :]
        usable = set(find_usable([group[0] for group in candidates]))
        drawn += [group[0] for group in candidates if group[0] in usable]
        # Behind all others, as the first draws of a larger number would otherwise be different ones.
        order += [group[1:] for group in candidates if group[0] not in usable and len(group) > 1]
    return drawn


def draw_examples(items: Sequence[Any], number: int, name: Callable[[Any], str] = str) -> list[Any]:
    """Some of a list, always the same, in its order."""
    order = sorted(range(len(items)), key=lambda place: hashlib.sha256(name(items[place]).encode()).digest())
    return [items[place] for place in sorted(order[:number])]


def duplicates_of_earlier(pairs: Sequence[tuple[str, str]]) -> list[int | None]:
    """
    For each pair of an image and a caption the place of the first one that is the same but for case and white space of
    the caption; None where it is the first itself.
    """
    first_places: dict[tuple[str, str], int] = {}
    firsts = [
        first_places.setdefault((image, "".join(text.casefold().split())), place)
        for place, (image, text) in enumerate(pairs)
    ]
    return [None if first == place else first for place, first in enumerate(firsts)]
