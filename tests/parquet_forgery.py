"""Parquet files whose footer and page headers say whatever a test wants: Thrift's compact protocol, both ways.

A struct is {field id: (type, value)}; a list is (type of its items, [values]). It shares no code with the package.
"""

import struct
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 12

Fields = dict[int, tuple[int, Any]]


class _Source:
    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        self.place += count
        return self.data[self.place - count : self.place]

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    def signed(self) -> int:
        number = self.varint()
        return number // 2 if number % 2 == 0 else -(number + 1) // 2

    def value(self, kind: int) -> Any:
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind in (I16, I32, I64):
            return self.signed()
        if kind in (BYTE, DOUBLE, BINARY):
            return self.take({BYTE: 1, DOUBLE: 8}.get(kind) or self.varint())
        if kind == LIST:
            head = self.take(1)[0]
            count = head >> 4 if head >> 4 < 15 else self.varint()
            items = head & 15
            return items, [self.take(1)[0] == TRUE if items <= FALSE else self.value(items) for _ in range(count)]
        return self.fields()

    def fields(self) -> Fields:
        found: Fields = {}
        number = 0
        while head := self.take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self.signed()
            found[number] = (head & 15, self.value(head & 15))
        return found


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _signed(number: int) -> bytes:
    return _varint(2 * number if number >= 0 else -2 * number - 1)


def _value(kind: int, value: Any) -> bytes:
    if kind in (TRUE, FALSE):
        return b""
    if kind in (BYTE, DOUBLE):
        return bytes(value)
    if kind in (I16, I32, I64):
        return _signed(value)
    if kind == BINARY:
        return _varint(len(value)) + value
    if kind == LIST:
        items, values = value
        head = bytes([len(values) << 4 | items]) if len(values) < 15 else bytes([0xF0 | items]) + _varint(len(values))
        return head + b"".join(
            bytes([TRUE if item else FALSE]) if items <= FALSE else _value(items, item) for item in values
        )
    return encode(value)


def encode(fields: Fields) -> bytes:
    """The bytes of a struct."""
    out, last = b"", 0
    for number, (given, value) in sorted(fields.items()):
        kind = (TRUE if value else FALSE) if given in (TRUE, FALSE) else given
        step = number - last
        out += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + _signed(number)
        out += _value(kind, value)
        last = number
    return out + b"\0"


def read_footer(data: bytes) -> Fields:
    """The file's `FileMetaData`."""
    length = struct.unpack("<I", data[-8:-4])[0]
    return _Source(data[-8 - length : -8]).fields()


def read_pages(data: bytes, column: Fields) -> list[tuple[Fields, bytes]]:
    """Header and stored bytes of every page of a `ColumnMetaData`."""
    start = column.get(11, column[9])[1]
    stop = start + column[7][1]
    pages = []
    while start < stop:
        source = _Source(data[start:])
        header = source.fields()
        start += source.place + header[3][1]
        pages.append((header, source.take(header[3][1])))
    return pages


def columns_of(footer: Fields) -> list[Fields]:
    """The `ColumnMetaData` of every column of the first row group."""
    return [chunk[3][1] for chunk in footer[4][1][1][0][1][1][1]]


def write(pages_of: list[list[tuple[Fields, bytes]]], footer: Fields) -> bytes:
    """A file of these pages of each column, whose footer is ``footer`` with the places put right."""
    data = b"PAR1"
    for column, pages in zip(columns_of(footer), pages_of, strict=True):
        start = len(data)
        is_dictionary = [header[1][1] == 2 for header, _ in pages]
        for (header, stored), dictionary in zip(pages, is_dictionary, strict=True):
            column[11 if dictionary else 9] = (I64, len(data))
            data += encode({**header, 3: (I32, len(stored))}) + stored
        column[7] = (I64, len(data) - start)
    body = encode(footer)
    return data + body + struct.pack("<I", len(body)) + b"PAR1"
