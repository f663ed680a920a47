"""Items files: the three layouts, and a message for each way in which a file can be wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest

from crossan_fast.data import ItemTable, read_interactions, read_items

Write = Callable[..., Path]


def test_iisan_layout_has_no_header_and_no_quoting(write: Write) -> None:
    table = read_items(write('B1\t1/4" NPT &amp; seal\nB2\tsay "hi"\n'))
    assert table.names == ["B1", "B2"]
    assert table.columns == {"title": ['1/4" NPT & seal', 'say "hi"']}
    assert table.title_of("B2") == 'say "hi"'
    assert table.index_of("B2") == 1


def test_microlens_layout_is_csv_with_a_header(write: Write) -> None:
    table = read_items(write('id,title\n7,"Snow, ""at last"""\n3,&quot;x&quot;\n'))
    assert table.names == ["7", "3"]
    assert table.columns["title"] == ['Snow, "at last"', '"x"']


def test_microlens_layout_without_header(write: Write) -> None:
    assert read_items(write('1,"a, b"\n2,c\n')).columns == {"title": ["a, b", "c"]}


@pytest.mark.parametrize("separator", ["\t", ","])
def test_header_names_columns_in_any_order(tmp_path: Path, write: Write, separator: str) -> None:
    rows = [
        ["Image_Path", "item", "title"],
        ["img/a.png", "a", "one"],
        ["", "b", ""],
        ["/abs/c.png", "c", " "],
    ]
    table = read_items(write("\n".join(separator.join(row) for row in rows) + "\n"))
    assert table.names == ["a", "b", "c"]
    assert table.columns == {"image_path": ["img/a.png", None, "/abs/c.png"], "title": ["one", None, None]}
    assert table.paths("image_path") == [tmp_path / "img/a.png", None, Path("/abs/c.png")]
    assert table.title_of("b") is None


@pytest.mark.parametrize(
    "header", ["item,title,image path,Unit price ($),", "Item ID,Title,Image-Path,,100 %"]
)
def test_a_header_is_one_whatever_its_other_cells_hold(write: Write, header: str) -> None:
    table = read_items(write(header + "\na,one,img/a.png,,\n"))
    assert table.names == ["a"]
    assert table.columns["title"] == ["one"] and table.columns["image_path"] == ["img/a.png"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"ARROW1\x15\x04", "an Arrow file; expected .*to_parquet"),
        (b"PK\x03\x04\x14\x00\x06", "a zip archive or a spreadsheet; .*CSV UTF-8"),
        (b"\x28\xb5\x2f\xfd\x00", "a zstd file; .*unpack it first"),
        ("a\tx\n".encode("utf-16"), "in UTF-16; .*iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_files_of_other_formats_are_called_what_they_are(write: Write, content: bytes, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"items: .*items\.tsv is {kind}"):
        read_items(write(content))


def test_windows_line_ends_byte_order_mark_blank_lines_and_unicode_line_breaks(write: Write) -> None:
    data = "\ufeffa\tfirst\r\n\r\nb\tsecond\u2028still second\x85and here\r\n\n".encode()
    table = read_items(write(data))
    assert table.names == ["a", "b"]
    assert table.columns["title"] == ["first", "second\u2028still second\x85and here"]


def test_repeated_lines_are_dropped_with_a_count_or_an_error_with_strict(write: Write) -> None:
    path = write("a\tx\nb\ty\na\tx\na\tx\n")
    with pytest.warns(UserWarning, match=r"items: .*items\.tsv: 2 repeated lines dropped"):
        assert read_items(path).names == ["a", "b"]
    with pytest.raises(ValueError, match=r"line 3: item 'a' is already on line 1"):
        read_items(path, strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tx\na\ty\n", r"line 2: item 'a' is already on line 1"),
        (b"a\tx\nb\tcaf\xe9\n", r"line 2: byte 0xe9 is not UTF-8"),
        ("", r"items: .*items\.tsv is empty"),
        (" \n\n", r"items\.tsv is empty"),
        ("item\ttitle\n", r"has a header but no items"),
        ("item\ttitle\tTitle \n", r"line 1: expected different column names, got 'title' and 'Title '"),
        ("a\tx\nb\n", r"line 2: expected 2 tab-separated columns, got 1"),
        ("a\tx\n\nb\ty\tz\n", r"line 3: expected 2 tab-separated columns, got 3"),
        ('id,title\n1,"a\nb"\n2,c,d\n', r"line 4: expected 2 comma-separated columns, got 3"),
        ('id,title\n1,"a"b\n', r"line 2: not valid CSV"),
        ("a\tx\n \ty\n", r"line 2: the item's name is empty"),
        ("a\tx\timg.png\n", r"without a header expected 2 columns \(item, title\), got 3"),
    ],
)
def test_bad_files_are_named_with_their_line(write: Write, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_items(write(content))


@pytest.mark.parametrize(
    ("content", "title"),
    [
        ("1;A lamp, brass\n2;A rug\n", "A lamp, brass"),
        ("1,A lamp; brass\n2,A rug\n", "A lamp; brass"),
        ("1;A lamp, old, brass\n2;A rug\n", "A lamp, old, brass"),
        ('1,"A lamp; brass; old"\n2,"A; rug"\n', "A lamp; brass; old"),
        ('"1";"A lamp, brass"\n2;"A, rug"\n', "A lamp, brass"),
        ("id;title (a,b)\n1;A lamp, brass\n2;A, rug\n", "A lamp, brass"),
        ("title,a;b,id\nA lamp;x,,1\nA rug;,y,2\n", "A lamp;x"),
    ],
)
def test_what_separates_columns_does_so_in_every_line(write: Write, content: str, title: str) -> None:
    table = read_items(write(content))
    assert table.names == ["1", "2"] and title in [cells[0] for cells in table.columns.values()]


def test_one_column_in_quotes_is_one_column(write: Write) -> None:
    assert read_items(write('"item"\n"a, b; c"\n"d"\n')).names == ["a, b; c", "d"]


def test_commas_and_semicolons_alike_are_refused(write: Write) -> None:
    message = r"items: .*line 1: expected commas or semicolons between columns, got as many of one as of"
    with pytest.raises(ValueError, match=message):
        read_items(write("1;A lamp, brass\n2;A rug, wool\n"))
    table = read_items(write("id;title\n1;A lamp, brass\n2;A rug, wool\n"))
    assert table.columns == {"title": ["A lamp, brass", "A rug, wool"]}


def test_numbered_columns_are_of_files_without_a_header(write: Write) -> None:
    path = write("item\ttitle\na\tA lamp\n")
    with pytest.raises(
        ValueError, match=r"items: .*expected no header where columns are numbers, got .* 'item' in column 1"
    ):
        read_items(path, columns={"item": 1, "title": 2})
    with pytest.raises(ValueError, match=r"expected no header .* 'title' in column 2, for titles"):
        read_items(write("nr\ttitle\na\tA lamp\n"), columns={"item": 1, "title": 2})
    users = write("user\titem\tn\nu\ta\t1\n", "users.tsv")
    with pytest.raises(ValueError, match=r"users: .*expected no header .* 'user' in column 1, for users"):
        read_interactions(users, None, columns={"user": 1, "item": 2})


@pytest.mark.parametrize("header", ["", '"item"\t"title"\n'])
def test_a_file_in_quotes_holds_what_is_in_them(write: Write, header: str) -> None:
    """R's write.table, with its way of quotes and with pandas'."""
    table = read_items(write(header + '"a"\t"1/4\\" NPT"\n"b"\t"1/4"" NPT"\r\n"c"\t""\n'))
    assert table.names == ["a", "b", "c"]
    assert table.columns == {"title": ['1/4" NPT', '1/4" NPT', None]}


def test_quotes_stay_where_not_every_cell_has_them(write: Write) -> None:
    assert read_items(write('"a"\t"so"\nb\t"no"\n')).columns == {"title": ['"so"', '"no"']}
    numbers = read_items(write('"item"\t"title"\n1\t"A lamp"\n2\tNA\n'))
    assert numbers.names == ["1", "2"] and numbers.columns == {"title": ["A lamp", "NA"]}


def test_missing_path_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"items: no such file: .*nowhere\.tsv"):
        read_items(tmp_path / "nowhere.tsv")
    with pytest.raises(IsADirectoryError, match=r"items: expected a file, .* is a folder"):
        read_items(tmp_path)


def test_item_table_checks_what_it_is_made_of() -> None:
    with pytest.raises(ValueError, match=r"names: item 'a' occurs more than once"):
        ItemTable(["b", "a", "a"], {})
    with pytest.raises(ValueError, match=r"columns\['title'\]: expected 2 cells, one an item, got 1"):
        ItemTable(["a", "b"], {"title": ["x"]})
    with pytest.raises(KeyError, match=r"'c' is none of the 2 items"):
        ItemTable(["a", "b"], {}).index_of("c")
    with pytest.raises(KeyError, match=r"column: 'image_path' is not among \['title'\]"):
        ItemTable(["a"], {"title": ["x"]}).paths("image_path")


def test_scientific_items(scientific: Path) -> None:
    table = read_items(scientific / "items.tsv")
    assert len(table) == 20825
    assert table.title_of("B003GXF5XA") == (
        'Stainless Steel 316 Cast Pipe Fitting, 90 Degree Elbow, MSS SP-114, 1" NPT Female'
    )
    assert not any("&amp;" in (title or "") for title in table.columns["title"])
