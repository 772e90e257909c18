"""What is kept of a log over its cap."""

from __future__ import annotations

import logging
import re

import pytest

from batchctl.batch.output import OutputCap, cut
from batchctl.config import Size, parse_size

CAP = 10_000


def numbered(first, last):
    return b"".join(b"line %06d\n" % number for number in range(first, last))


def notice(content):
    found = re.findall(rb"\[batchctl: (\d+) bytes were cut here\]", content)
    assert len(found) == 1, found
    return int(found[0])


def test_head_and_tail_stay_and_the_count_is_exact(tmp_path):
    log = tmp_path / "31.log"
    original = numbered(0, 5000)
    log.write_bytes(original)
    assert cut(log, CAP, CAP)
    kept = log.read_bytes()
    head, _, rest = kept.partition(b"[batchctl")
    tail = rest.partition(b"]\n")[2]
    assert len(kept) <= CAP
    assert len(head) > CAP // 2 - 20
    assert len(tail) > CAP // 2 - 200
    assert original.startswith(head)
    assert original.endswith(tail)
    assert tail.startswith(b"line ")
    assert len(head) + notice(kept) + len(tail) == len(original)


def test_repeated_cuts_add_up(tmp_path):
    log = tmp_path / "31.log"
    written = 0
    for number in range(0, 50_000, 1000):
        content = numbered(number, number + 1000)
        written += len(content)
        with log.open("ab") as file:
            file.write(content)
        cut(log, CAP, CAP // 4)
    kept = log.read_bytes()
    head, _, rest = kept.partition(b"[batchctl")
    tail = rest.partition(b"]\n")[2]
    assert len(head) + notice(kept) + len(tail) == written
    assert kept.startswith(b"line 000000\n")
    assert kept.endswith(b"line 049999\n")
    assert len(kept) <= CAP


def test_bytes_without_lines_and_without_meaning(tmp_path):
    original = (bytes(range(256)) * 400).replace(b"\n", b"\xff")
    log = tmp_path / "31.log"
    log.write_bytes(original)
    assert cut(log, CAP, CAP)
    kept = log.read_bytes()
    assert kept.startswith(original[: CAP // 2] + b"\n[batchctl: ")
    tail = kept.rpartition(b" bytes were cut here]\n")[2]
    assert original.endswith(tail)
    assert CAP // 2 + notice(kept) + len(tail) == len(original)
    # Once more, with the same head.
    with log.open("ab") as file:
        file.write(original)
    assert cut(log, CAP, CAP // 4)
    kept = log.read_bytes()
    tail = kept.rpartition(b" bytes were cut here]\n")[2]
    assert CAP // 2 + notice(kept) + len(tail) == 2 * len(original)


@pytest.mark.parametrize("size", [0, 1, CAP - 1, CAP])
def test_what_is_not_over_the_cap_stays_as_it_is(tmp_path, size):
    log = tmp_path / "31.log"
    log.write_bytes(b"x" * size)
    assert not cut(log, CAP, CAP)
    assert log.read_bytes() == b"x" * size


@pytest.mark.parametrize("cap", [1000, 1001, 5000])
def test_every_size_just_over_a_small_cap_ends_below_it(tmp_path, cap):
    log = tmp_path / "31.log"
    for size in range(cap + 1, cap + 300, 7):
        log.write_bytes(b"0123456\n" * (size // 8) + b"x" * (size % 8))
        cut(log, cap, cap)
        assert log.stat().st_size <= cap
        notice(log.read_bytes())


def test_only_what_is_registered_and_over_is_cut(tmp_path):
    output = OutputCap(Size(CAP), logging.getLogger("test"))
    logs = [tmp_path / name for name in ("a", "b", "c")]
    for log in logs:
        log.write_bytes(numbered(0, 3000))
    output.register(logs[0])
    output.register(logs[1])
    output.check()
    assert [log.stat().st_size <= CAP for log in logs] == [True, True, False]
    with logs[0].open("ab") as file:
        file.write(numbered(0, 3000))
    output.finish(logs[0])
    output.finish(logs[2])
    assert logs[0].stat().st_size <= CAP < logs[2].stat().st_size
    logs[1].unlink()
    output.check()


def test_without_a_cap_nothing_is_cut(tmp_path):
    log = tmp_path / "a"
    log.write_bytes(numbered(0, 3000))
    output = OutputCap(parse_size(""), logging.getLogger("test"))
    output.register(log)
    output.check()
    output.finish(log)
    assert log.read_bytes() == numbered(0, 3000)


@pytest.mark.parametrize(("text", "size"), [("1kB", 1000), ("64MB", 64_000_000), ("2GB", 2_000_000_000), ("", 0)])
def test_sizes(text, size):
    assert parse_size(text) == size
    assert str(parse_size(text)) == text


@pytest.mark.parametrize("text", ["0", "64", "64 MB", "1.5GB", "64mb", "0kB", "1TB", "1kB\n", "-1kB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_size(text)


def test_a_log_that_was_removed_is_over_nothing_and_one_that_cannot_be_cut_is_named(tmp_path, caplog):
    cap = OutputCap(parse_size("10kB"), logging.getLogger("test"))
    removed, other = tmp_path / "31.log", tmp_path / "32.log"
    for path in (removed, other):
        cap.register(path)
    with caplog.at_level(logging.WARNING):
        cap.check()
        cap.finish(removed)
    assert caplog.records == []
    target = tmp_path / "target"
    target.write_bytes(b"x" * 2 * CAP)
    other.symlink_to(target)
    with caplog.at_level(logging.WARNING):
        cap.finish(other)
    assert [record.message for record in caplog.records] == [
        f"{other} is over output_cap and cannot be cut: Too many levels of symbolic links"
    ]
