"""Delimited text files, read as rows with line numbers so that every complaint can name its line."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from crossan_fast.data._table import CHUNK, Chunk, Table
from crossan_fast.data.columns import alike, normal, untyped

# From so many characters on pyarrow is asked; and what it splits at once.
_WORTH_IT, _BLOCK = 1 << 20, 4 << 20
# A cell of its own in quotes, for RFC 4180; and so many characters tell what separates columns.
_IN_QUOTES, _SAMPLE = re.compile(r'(?:(?<=[,;\n])|(?<![^\n]))"(?:[^"]|"")*"'), 1 << 16
_SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon"}


class Delimited(Table):
    """One delimited text: a `header` where its first line is one, and `rows()` with their line numbers.

    Tab-separated where the first line holds a tab; else by commas or semicolons: the one that it holds, of
    both the one that stands as often in every line, else the more frequent. Tabs separate plainly, with no
    quoting (titles hold inches: `1/4" NPT`) but for a cell that a CSV writer quoted for the quotes in it
    (`"1/4"" NPT"`), and for a file whose every cell, or whose whole header, is in quotes, as R writes them;
    the others follow RFC 4180. The first line is a header if one of its cells is in `key_names`, or all are
    typed as RecBole's. Blank lines are passed over.

    Raises ValueError for two columns of one name and for a row of another width than the first, each naming
    the argument, the path and the line.
    """

    def __init__(self, text: str, argument: str, source: str, key_names: Collection[str]) -> None:
        self._text = text
        first_line = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")
        self.argument, self.source = argument, source
        self.delimiter = "\t" if "\t" in first_line else self._comma_or_semicolon(key_names)
        self._quoted = self.delimiter == "\t" and self._is_quoted(first_line, key_names)
        line, cells = next(self._cells())
        typed = untyped(cells)
        names = [normal(cell) for cell in (typed[0] if typed else cells)]
        is_header = typed is not None or any(name in key_names for name in names)
        if is_header and (wrong := alike(cells, names)):
            raise self.error(line, wrong)
        self.header, self.first = names if is_header else None, names
        self.types = typed[1] if typed else None
        self._header_line = line if is_header else 0
        self.width = len(cells)
        self.kind = "a RecBole atomic file" if typed else f"{self.separator}-separated text"

    @property
    def separator(self) -> str:
        return _SEPARATORS[self.delimiter]

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Each row after the header as `(line number from 1, cells)`."""
        for line, cells in self._cells():
            if line == self._header_line:
                continue
            if len(cells) != self.width:
                raise self.error(
                    line, f"expected {self.width} {self.separator}-separated columns, got {len(cells)}"
                )
            yield line, cells

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        if self._is_plain():
            yield from self._plain_chunks(wanted)
            return
        rows = self.rows()
        while batch := list(islice(rows, CHUNK)):
            yield Chunk([line for line, _ in batch], [[cells[j] for _, cells in batch] for j in wanted])

    def _is_plain(self) -> bool:
        """Whether pyarrow, where it is installed, splits the text as `rows` does; five times faster.

        Without quotes and blank lines there is one way to read it. What has two columns is mostly users'
        sequences, which are split again here.
        """
        text = self._text
        if len(text) < _WORTH_IT or self.width < 3 or '"' in text or "\r\r" in text:
            return False
        if any(blank in text for blank in ("\n\n", "\n\r\n", "\n ")) or not text[:1].strip():
            return False
        return importlib.util.find_spec("pyarrow") is not None

    def _plain_chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        import pyarrow
        from pyarrow import csv as arrow_csv

        names = [str(place) for place in range(self.width)]
        chosen = [names[place] for place in wanted]
        done = self._header_line
        try:
            reader = arrow_csv.open_csv(
                pyarrow.BufferReader(self._text.encode()),
                read_options=arrow_csv.ReadOptions(
                    column_names=names, skip_rows=self._header_line, block_size=_BLOCK
                ),
                parse_options=arrow_csv.ParseOptions(delimiter=self.delimiter, quote_char=False),
                convert_options=arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(chosen, pyarrow.string()), include_columns=chosen
                ),
            )
            for batch in reader:
                yield Chunk(range(done + 1, done + 1 + batch.num_rows), list(batch.columns))
                done += batch.num_rows
        except pyarrow.ArrowInvalid as error:
            for _ in self.rows():  # a row of another width: said with its line
                pass
            raise ValueError(f"{self.where}: {error}") from error

    def _comma_or_semicolon(self, key_names: Collection[str]) -> str:
        """Raises ValueError for a text that either would split alike."""
        sample = _IN_QUOTES.sub('""', self._text[:_SAMPLE])
        lines = [line for line in io.StringIO(sample, newline=None) if line.strip()]
        if len(self._text) > _SAMPLE:
            lines = lines[:-1] or lines  # the last may be cut
        commas, semicolons = ([line.count(separator) for line in lines] for separator in ",;")
        if not (commas[0] and semicolons[0]):
            return ";" if semicolons[0] else ","
        by_comma, by_semicolon = (len(set(counts)) == 1 for counts in (commas, semicolons))
        if by_comma != by_semicolon:
            return "," if by_comma else ";"
        if commas[0] != semicolons[0]:
            return ";" if semicolons[0] > commas[0] else ","
        for separator in ",;":
            if any(normal(cell) in key_names for cell in lines[0].split(separator)):
                return separator
        raise self.error(
            1,
            "expected commas or semicolons between columns, got as many of one as of the other; put cells "
            "that hold one in quotes, or begin with a line that names the columns (item,title)",
        )

    def _is_quoted(self, first_line: str, key_names: Collection[str]) -> bool:
        """Whether quotes stand around the cells of a tab-separated text, and are none of theirs."""
        first = first_line.rstrip("\r\n").split("\t")
        if not all(map(_in_quotes, first)):
            return False
        names = [_inner(cell) for cell in first]
        if untyped(names) or any(normal(name) in key_names for name in names):
            return True
        lines = (line.rstrip("\r\n") for line in io.StringIO(self._text, newline="\n") if line.strip())
        return all(_in_quotes(cell) for line in lines for cell in line.split("\t"))

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        if self.delimiter == "\t":
            # Only "\n" ends a line: a title may hold the other characters that str.splitlines breaks at.
            for number, text in enumerate(io.StringIO(self._text, newline="\n"), start=1):
                if text.strip():
                    cells = text.rstrip("\r\n").split("\t")
                    if self._quoted:
                        cells = [_inner(cell) if _in_quotes(cell) else cell for cell in cells]
                    elif '""' in text:
                        cells = [_unquoted(cell) for cell in cells]
                    yield number, cells
            return
        reader = csv.reader(io.StringIO(self._text, newline=""), delimiter=self.delimiter, strict=True)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise self.error(reader.line_num, f"not valid CSV ({error})") from error
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells


def _in_quotes(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def _inner(cell: str) -> str:
    """What is in the quotes; those within are doubled, or escaped as R does it."""
    return cell[1:-1].replace('""', '"').replace('\\"', '"')


def _unquoted(cell: str) -> str:
    """What a CSV writer quoted for its quotes: `"1/4"" NPT"`. A cell in quotes of its own stays."""
    inner = cell[1:-1]
    plain = inner.replace('""', "")
    if cell[:1] == cell[-1:] == '"' and len(plain) < len(inner) and '"' not in plain:
        return inner.replace('""', '"')
    return cell
