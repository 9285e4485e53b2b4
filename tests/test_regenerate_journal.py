"""The journal keeps every whole line through any tear, and what is published is a function of it."""

import json
import tracemalloc
from pathlib import Path

import pytest

from full_disk import limited_file_size
from stages.regenerate import journal as journal_module
from stages.regenerate import publish as publishing
from stages.regenerate.dialogue import Outcome
from stages.regenerate.journal import Journal
from stages.regenerate.publish import is_published, prepare_folder, publish
from stages.regeneration_record import (
    RegenerationError,
    RegenerationIdentity,
    RegenerationManifest,
    find_manifests,
    parse_manifest,
)
from storage.files import crc32c_hex


def make_outcome(row: int, kind: str = "answered", text: str = "yes", reason: str | None = None) -> Outcome:
    messages = [{"role": "user", "content": f"q{row}"}, {"role": "assistant", "content": text}]
    return Outcome(
        row=row,
        kind=kind,
        messages=messages if kind == "answered" else [],
        tools=None,
        reason=reason,
        source="file row 1",
        num_turns=1,
        num_tokens=2,
        num_truncated=0,
        num_mismatches=0,
    )


def make_manifest(**changes: object) -> RegenerationManifest:
    fields = {
        "backend": "local",
        "prompts_digest": "p",
        "num_prompts": 3,
        "turns": "all",
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": None,
        "max_length": 512,
        "truncated": "drop",
        "seed": 0,
        "chat_template_kwargs": {"enable_thinking": False},
        "target_config_digest": "c",
        "tokenizer_digest": "t",
        "chat_template_digest": "j",
    }
    return RegenerationManifest(identity=RegenerationIdentity(**{**fields, **changes}), provenance={})


OUTCOMES = [make_outcome(row, text="zwölf\n\ud800" * row) for row in (4, 0, 2)] + [make_outcome(9, "dropped")]


def test_a_line_that_is_nested_too_deeply_is_a_damaged_one(tmp_path: Path) -> None:
    """However right its checksum: cut off at the end, named before it."""
    file = tmp_path / "log"
    with Journal(file) as journal:
        journal.append(OUTCOMES[:2])
    whole = file.read_bytes()
    body = b"[" * 200_000 + b"]" * 200_000
    deep = crc32c_hex(body).encode() + b" " + body + b"\n"
    file.write_bytes(whole + deep)
    with Journal(file) as journal:
        assert journal.num_known == 2
    assert file.read_bytes() == whole
    file.write_bytes(deep + whole)
    with pytest.raises(RegenerationError, match="line 1 is damaged, though not the last"):
        Journal(file)


def test_a_line_without_an_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "log"
    with Journal(file) as journal:
        journal.append(OUTCOMES[:2])
    whole = file.read_bytes()
    with file.open("ab") as stream:  # what a power cut leaves of a file that grew
        stream.truncate(1 << 30)
    tracemalloc.start()
    with Journal(file) as journal:
        assert journal.num_known == 2
    assert tracemalloc.get_traced_memory()[1] < 1 << 29, "the file has twice as many"
    tracemalloc.stop()
    assert file.read_bytes() == whole
    monkeypatch.setattr(journal_module, "MAX_LINE_BYTES", 2000)
    with Journal(file) as journal, pytest.raises(RegenerationError, match=r"row 7 has .* bytes, expected 2,000"):
        journal.append([make_outcome(7, text="x" * 3000)])
    (tmp_path / "pipe").mkdir()
    with pytest.raises(RegenerationError, match="not a plain file"):
        Journal(tmp_path / "pipe")


def test_a_manifest_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "answers-00000.jsonl").write_text("{}\n")
    with (tmp_path / "regeneration.json").open("wb") as stream:
        stream.truncate(40 << 30)
    with pytest.raises(RegenerationError, match="42,949,672,960 bytes, expected 33,554,432"):
        publishing.read_manifest(tmp_path)
    with pytest.raises(RegenerationError, match="42,949,672,960 bytes, expected 33,554,432"):
        find_manifests([str(tmp_path / "answers-00000.jsonl")])


def test_a_torn_journal_keeps_its_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with Journal(file) as journal:
        journal.append(OUTCOMES[:2])
        journal.append(OUTCOMES[2:])
    whole = file.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 4
    near = {end + shift for end in (0, *ends) for shift in range(-3, 12)}  # newlines, checksums
    for cut in sorted(near & set(range(len(whole) + 1)) | set(range(0, len(whole), 11))):
        file.write_bytes(whole[:cut])
        kept = OUTCOMES[: sum(end <= cut for end in ends)]
        with Journal(file) as journal:
            assert list(journal.outcomes()) == sorted(kept, key=lambda outcome: outcome.row)
            journal.append(OUTCOMES[len(kept) :])
            assert [outcome.row for outcome in journal.outcomes()] == [0, 2, 4, 9]
        assert file.read_bytes() == whole


@pytest.mark.parametrize("garbage", [b"\0" * 5000, b"\0" * 10 + b"\n" + b"\0" * 10, b"{}\n", b"00000000 {}\n", b"\n"])
def test_what_a_power_cut_leaves_behind_the_end_is_cut_off(tmp_path: Path, garbage: bytes) -> None:
    file = tmp_path / "log"
    with Journal(file) as journal:
        journal.append(OUTCOMES)
    whole = file.read_bytes()
    file.write_bytes(whole + garbage)
    with Journal(file) as journal:
        assert journal.num_known == 4
    assert file.read_bytes() == whole


def test_damage_before_the_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with Journal(file) as journal:
        journal.append(OUTCOMES)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(RegenerationError, match=r"line \d is damaged, though not the last"):
        Journal(file)
    assert file.read_bytes() == data


def test_the_last_line_of_a_row_counts(tmp_path: Path) -> None:
    with Journal(tmp_path / "log") as journal:
        journal.append([make_outcome(1, "failed", reason="status 500: x"), make_outcome(2)])
        assert (journal.is_finished(1), journal.is_finished(2), journal.is_finished(3)) == (False, True, False)
        journal.append([make_outcome(1)])
    with Journal(tmp_path / "log") as journal:
        assert journal.is_finished(1)
        assert [outcome.kind for outcome in journal.outcomes()] == ["answered", "answered"]
        assert (journal.num_finished, journal.num_known) == (2, 2)


def test_a_journal_of_an_earlier_version_is_continued_as_text(tmp_path: Path) -> None:
    fields = make_outcome(1).model_dump(exclude={"num_unfinished", "rows", "has_text"})
    body = json.dumps(fields).encode()
    (tmp_path / "log").write_bytes(f"{crc32c_hex(body)} ".encode() + body + b"\n")
    with Journal(tmp_path / "log") as journal:
        prepare_folder(tmp_path / "out", make_manifest())
        counts = publish(tmp_path / "out", journal.outcomes(), manifest=make_manifest()).counts
    assert counts is not None
    assert (counts.num_text, counts.num_id_rows) == (1, 0)
    line = (tmp_path / "out" / "conversations-00000.jsonl").read_text()
    assert json.loads(line) == {"row": 1, "messages": fields["messages"]}


def test_a_manifest_of_an_earlier_version_is_read() -> None:
    counts = {"num_answered": 1, "num_turns": 1, "num_tokens": 2, "num_truncated": 0, "num_cut": 0}
    counts |= {"num_prompt_mismatches": 0, "dropped": {}, "failed": {}}
    fields = make_manifest().model_dump(mode="json") | {"counts": counts, "files": {"a": 1}}
    manifest = parse_manifest(json.dumps(fields).encode(), where="")
    assert (manifest.has_ids, manifest.is_all_ids) == (False, False)


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    with Journal(tmp_path / "log"), pytest.raises(RegenerationError, match="another process"):
        Journal(tmp_path / "log")


def read_rows(file: Path) -> list[int]:
    return [json.loads(line)["row"] for line in file.read_text().splitlines()]


def test_published_files_are_in_the_order_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "ROWS_A_FILE", 4)
    kinds = {1: "dropped", 4: "failed", 5: "dropped", 6: "failed", 7: "failed", 9: "failed"}
    outcomes = [make_outcome(row, kinds.get(row, "answered"), reason="status 500: x") for row in range(13)]
    prepare_folder(tmp_path, make_manifest())
    manifest = publish(tmp_path, outcomes, manifest=make_manifest())
    assert sorted(manifest.files) == [f"conversations-0000{number}.jsonl" for number in (0, 2, 3)]
    assert [read_rows(tmp_path / name) for name in sorted(manifest.files)] == [[0, 2, 3], [8, 10, 11], [12]]
    assert read_rows(tmp_path / "work" / "failures.jsonl") == [1, 4, 5, 6, 7, 9]
    assert manifest.counts is not None
    assert manifest.counts.failed == {"status 500": 4}
    assert is_published(tmp_path, manifest)
    assert parse_manifest((tmp_path / "regeneration.json").read_bytes(), where="x") == manifest
    assert not list(tmp_path.rglob("*.tmp*"))


def test_other_settings_are_refused_field_by_field(tmp_path: Path) -> None:
    prepare_folder(tmp_path, make_manifest())
    prepare_folder(tmp_path, make_manifest())
    with pytest.raises(
        RegenerationError, match=r"seed: the folder has 0, this run has 1\n.*top_p: .*0\.9|top_p"
    ) as caught:
        prepare_folder(tmp_path, make_manifest(seed=1, top_p=0.9))
    assert "temperature" not in str(caught.value)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(RegenerationError, match=r"holds thesis\.txt, but no regeneration\.json"):
        prepare_folder(tmp_path, make_manifest())


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"format": "dspark-regeneration", "format_version": 2}', b"\xff"])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, damage: bytes) -> None:
    prepare_folder(tmp_path, make_manifest())
    (tmp_path / "regeneration.json").write_bytes(damage)
    with pytest.raises(RegenerationError, match=r"regeneration\.json: .*version 1"):
        prepare_folder(tmp_path, make_manifest())


def test_files_are_found_to_be_regenerated_and_unchanged(tmp_path: Path) -> None:
    prepare_folder(tmp_path, make_manifest())
    manifest = publish(tmp_path, [make_outcome(0)], manifest=make_manifest())
    file, other = tmp_path / "conversations-00000.jsonl", tmp_path / "mine.jsonl"
    other.write_text("{}\n")
    assert find_manifests([str(file), str(other)]) == {str(file): manifest}
    assert find_manifests([f"file://{file}"]) == {f"file://{file}": manifest}
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(RegenerationError, match=r"conversations-00000\.jsonl: has [\d,]+ bytes, but"):
        find_manifests([str(file)])


def record(file: Path, rows: range) -> None:
    with Journal(file) as journal:
        for row in rows:
            journal.append([make_outcome(row)])


def test_a_full_disk_is_named_and_the_same_command_continues(tmp_path: Path) -> None:
    manifest = make_manifest()
    advice = r"cannot write: File too large; .*run the same command again: it continues"
    with limited_file_size(100), pytest.raises(RegenerationError, match=rf"regeneration\.json: {advice}"):
        prepare_folder(tmp_path, manifest)
    prepare_folder(tmp_path, manifest)
    file = tmp_path / "work" / "outcomes.log"
    with limited_file_size(1000), pytest.raises(RegenerationError, match=rf"outcomes\.log: {advice}"):
        record(file, range(10))
    assert file.stat().st_size == 1000, "torn"
    with Journal(file) as journal:
        num_kept = journal.num_known
    assert 0 < num_kept < 10
    record(file, range(num_kept, 10))
    with Journal(file) as journal:
        with limited_file_size(500), pytest.raises(RegenerationError, match=rf"conversations-00000\.jsonl: {advice}"):
            publish(tmp_path, journal.outcomes(), manifest=manifest)
        assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["outcomes.log", "regeneration.json", "work"]
        assert publish(tmp_path, journal.outcomes(), manifest=manifest).files.keys() == {"conversations-00000.jsonl"}
