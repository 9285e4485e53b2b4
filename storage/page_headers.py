"""Headers of a Parquet file's pages: how many values each holds, and what it unfolds to.

They are the Thrift struct `PageHeader` in its compact protocol (parquet.thrift of parquet-format). Only what the writer
of this package makes is taken: data pages of version 1 and dictionaries, plainly encoded; the encodings that build a
value from the one before unfold without bound.
"""

from dataclasses import dataclass
from typing import Any

_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8
_ENCODINGS = (_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY)
_COMPRESSIONS = ("ZSTD", "UNCOMPRESSED")
_TRUE, _FALSE, _I32, _I64, _BINARY, _STRUCT = 1, 2, 5, 6, 8, 12  # Thrift's compact types
_MAX_VARINT_BYTES = 10
_MAX_DEPTH = 4

_Struct = dict[int, Any]  # field id to an integer, a bool, a struct, or None for bytes


class PageError(ValueError):
    """The pages of a column are not what this package writes."""


@dataclass(frozen=True, kw_only=True)
class PageHeader:
    """One page: its values (of a dictionary its entries) and its bytes once it is decompressed."""

    is_dictionary: bool
    num_values: int
    num_bytes: int


def read_pages(data: bytes, column: Any) -> list[PageHeader]:
    """The headers of a column chunk, given the footer's `ColumnChunkMetaData` of it. Raises PageError."""
    if column.compression not in _COMPRESSIONS:
        raise PageError(f"is compressed by {column.compression}, expected one of {_COMPRESSIONS}")
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    stop = start + column.total_compressed_size
    if not 4 <= start < stop <= len(data):
        raise PageError(f"its pages from byte {start} to {stop} are not in a file of {len(data)} bytes")
    pages = []
    while start < stop:
        reader = _Reader(data, start, stop)
        page, page_bytes = _parse(reader.read_struct())
        start = reader.place + page_bytes
        pages.append(page)
    if start != stop or any(page.is_dictionary for page in pages[1:]):
        raise PageError("its pages do not end where the footer says, or its dictionary is not the first")
    num_values = sum(page.num_values for page in pages if not page.is_dictionary)
    if num_values != column.num_values:  # memory is reserved for what the footer says
        raise PageError(f"its pages hold {num_values} values, the footer says {column.num_values}")
    return pages


def _parse(fields: _Struct) -> tuple[PageHeader, int]:
    """The page of a header, and how many bytes it takes in the file."""
    kind = fields.get(1)
    body = fields.get(5 if kind == _DATA_PAGE else 7)
    if kind not in (_DATA_PAGE, _DICTIONARY_PAGE) or not isinstance(body, dict) or 8 in fields:
        raise PageError(f"has a page of kind {kind!r:.20}; only data pages of version 1 and dictionaries are written")
    numbers = (fields.get(2), fields.get(3), body.get(1))
    if any(not isinstance(number, int) or not 0 <= number < 1 << 31 for number in numbers):
        raise PageError(f"has a page of sizes {numbers!r:.80}")
    if body.get(2) not in _ENCODINGS:
        raise PageError(f"has a page of encoding {body.get(2)!r:.20}, expected one of {_ENCODINGS}")
    page = PageHeader(is_dictionary=kind == _DICTIONARY_PAGE, num_values=body[1], num_bytes=fields[2])
    return page, int(fields[3])


class _Reader:
    """Reads structs of Thrift's compact protocol, of the types that page headers have; fields ascend."""

    def __init__(self, data: bytes, place: int, stop: int) -> None:
        self._data = data
        self._stop = stop
        self.place = place

    def read_struct(self, depth: int = 0) -> _Struct:
        """The fields of the struct that begins here."""
        if depth > _MAX_DEPTH:
            raise PageError("has a page header that is nested too deeply")
        fields: _Struct = {}
        field = 0
        while byte := self._byte():
            step, kind = byte >> 4, byte & 15
            if not step:  # the long form, for ids that lie apart by more than 15: no header has any
                raise PageError("has a page header with a field that this package does not write")
            field += step
            fields[field] = self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in (_I32, _I64):
            number = self._varint()
            return number >> 1 ^ -(number & 1)
        if kind == _BINARY:
            length = self._varint()  # before the place is read: it moves it
            self.place += length
            return None
        if kind == _STRUCT:
            return self.read_struct(depth + 1)
        raise PageError(f"has a page header with a value of type {kind}")

    def _varint(self) -> int:
        number = 0
        for place in range(_MAX_VARINT_BYTES):
            byte = self._byte()
            number |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return number
        raise PageError("has a page header with a number that does not end")

    def _byte(self) -> int:
        if not 0 <= self.place < self._stop:
            raise PageError("has a page header that does not end")
        self.place += 1
        return self._data[self.place - 1]
