"""Parquet files of a cache: written with every option that could vary fixed, and bounded before they are decoded.

A Parquet file can say anything about itself, and its footer need not agree with its pages: a page of a few bytes
unfolds to gigabytes (a run of one value, a dictionary of zeros, a long string that every row repeats). So whoever reads
one says how many rows and values the plan has, and footer and page headers are held against that first. Strings stay
a dictionary and codes, so that no row repeats one.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import CacheFormatError
from storage.page_headers import PageError, PageHeader, read_pages

INDEX_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("token_offset", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("num_supervised", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("source_file", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("input_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("loss_mask", pa.list_(pa.field("element", pa.uint8(), nullable=False)), nullable=False),
    ]
)

ROW_GROUP_ROWS = 1 << 20
# A row's id is another in each row, so it cannot vanish: the least was 1.4 bytes a row in an index of three million
# rows that are all alike in everything else (measured).
MAX_ROWS_PER_BYTE = 2
MAX_TEXT_BYTES = 1 << 28  # of a column of strings; assumption: names of a shard's files come nowhere near
_TEXT_BYTES = 4096 + 8  # of one string: the longest path that Linux takes
_SLACK_BYTES = 1 << 16  # footer, headers, and what any small file has
_FOOTER_BYTES = 1 << 13  # of one row group: six columns with their statistics
_MAX_ELEMENTS = 10_000  # of a list in the footer
_TAIL_BYTES = 8  # length of the footer, and the magic number


@dataclass(frozen=True, kw_only=True)
class TableSize:
    """What a table must hold: its rows, and in each of its columns of lists so many values."""

    num_rows: int
    num_values: int = 0

    @property
    def num_row_groups(self) -> int:
        """Row groups that the writer makes of so many rows."""
        return -(-self.num_rows // ROW_GROUP_ROWS)

    @property
    def footer_bytes(self) -> int:
        """What the footer cannot exceed."""
        return _SLACK_BYTES + _FOOTER_BYTES * self.num_row_groups

    def values_of(self, field: pa.Field) -> int:
        """Values of a column."""
        return self.num_values if pa.types.is_list(field.type) else self.num_rows

    def column_bytes(self, field: pa.Field) -> int:
        """What the pages of a column cannot exceed when they are decompressed."""
        values = self.values_of(field)
        if pa.types.is_string(field.type):
            return min(values * _TEXT_BYTES, MAX_TEXT_BYTES) + _SLACK_BYTES
        width = int((field.type.value_type if pa.types.is_list(field.type) else field.type).bit_width)
        # As a dictionary and as codes of at most as many bytes, with levels; Parquet has no integer below 4 bytes.
        return 2 * values * (max(width // 8, 4) + 1) + _SLACK_BYTES

    def file_bytes(self, schema: pa.Schema) -> int:
        """What the file cannot exceed: compression does not make pages larger by more than the slack."""
        return self.footer_bytes + sum(self.column_bytes(field) + _SLACK_BYTES for field in schema)

    def find_misfit(self, num_bytes: int, schema: pa.Schema) -> str | None:
        """What is wrong with a file of ``num_bytes``: too large for its rows, or too small for rows that all differ."""
        if num_bytes > self.file_bytes(schema):
            return f"{num_bytes} bytes, {self.num_rows} rows take {self.file_bytes(schema)} at most"
        if self.num_rows > num_bytes * MAX_ROWS_PER_BYTE:
            return f"{num_bytes} bytes cannot hold {self.num_rows} rows"
        return None


def render_table(table: pa.Table) -> bytes:
    """Parquet bytes with every option that could vary fixed."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, version="2.6", compression="zstd", row_group_size=ROW_GROUP_ROWS)
    return buffer.getvalue()


def read_table(data: bytes, schema: pa.Schema, size: TableSize, *, where: str) -> pa.Table:
    """Parse Parquet bytes that must have exactly this schema and size, and no nulls; strings come as dictionaries.

    Raises CacheFormatError before anything is decoded that the size does not account for.
    """
    if problem := size.find_misfit(len(data), schema):
        raise CacheFormatError(f"{where}: {problem}")
    try:
        with _open(data, size, where) as file:
            if not file.schema_arrow.equals(schema):
                raise CacheFormatError(f"{where}: expected columns {_names(schema)}, got {_names(file.schema_arrow)}")
            _check_pages(data, file.metadata, schema, size, where)
        strings = [field.name for field in schema if pa.types.is_string(field.type)]
        with _open(data, size, where, read_dictionary=strings) as file:
            table = file.read(use_threads=False)
        table.validate(full=True)  # strings are of any bytes until then
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, CacheFormatError):
            raise
        raise CacheFormatError(f"{where}: is not a readable Parquet file: {error}") from error
    if any(column.null_count for column in table.columns):
        raise CacheFormatError(f"{where}: expected columns without nulls {_names(schema)}")
    return table


def read_codes(column: pa.ChunkedArray) -> list[tuple[npt.NDArray[np.int32], list[str]]]:
    """A column of strings, piece by piece: a code for each row, and the strings that the codes stand for."""
    return [(piece.indices.to_numpy(), piece.dictionary.to_pylist()) for piece in column.chunks]


def _open(data: bytes, size: TableSize, where: str, read_dictionary: list[str] | None = None) -> pq.ParquetFile:
    footer_bytes = int.from_bytes(data[-_TAIL_BYTES:-4], "little")
    if footer_bytes > size.footer_bytes:
        raise CacheFormatError(
            f"{where}: has a footer of {footer_bytes} bytes; {size.num_rows} rows take {size.footer_bytes} at most"
        )
    return pq.ParquetFile(
        pa.BufferReader(data),
        read_dictionary=read_dictionary,
        thrift_string_size_limit=size.footer_bytes,
        thrift_container_size_limit=_MAX_ELEMENTS,
    )


def _check_pages(data: bytes, metadata: pq.FileMetaData, schema: pa.Schema, size: TableSize, where: str) -> None:
    """Hold what footer and page headers say of the rows, values and bytes to come against the size."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    found = (metadata.num_rows, sum(group.num_rows for group in groups), metadata.num_columns, len(groups))
    expected = (size.num_rows, size.num_rows, len(schema), size.num_row_groups)
    if found != expected:
        raise CacheFormatError(
            f"{where}: has {found[0]} rows (by row groups {found[1]}) of {found[2]} columns in {found[3]} row groups, "
            f"the plan has {expected[0]} of {expected[2]} in {expected[3]}"
        )
    for place, field in enumerate(schema):
        try:
            pages = [page for group in groups for page in read_pages(data, group.column(place))]
        except PageError as error:
            raise CacheFormatError(f"{where}: column {field.name}: {error}") from error
        _check_column(pages, field, size, f"{where}: column {field.name}")


def _check_column(pages: list[PageHeader], field: pa.Field, size: TableSize, where: str) -> None:
    expected, limit = size.values_of(field), size.column_bytes(field)
    num_values = sum(page.num_values for page in pages if not page.is_dictionary)
    num_entries = sum(page.num_values for page in pages if page.is_dictionary)
    num_bytes = sum(page.num_bytes for page in pages)
    if num_values != expected or num_entries > expected:
        raise CacheFormatError(
            f"{where}: its pages hold {num_values} values and dictionaries of {num_entries}, the plan has {expected}"
        )
    if num_bytes > limit:
        raise CacheFormatError(
            f"{where}: its pages unfold to {num_bytes} bytes; {expected} values take {limit} at most"
        )


def _names(schema: pa.Schema) -> str:
    return ", ".join(f"{item.name} {item.type}" for item in schema)[:500]
