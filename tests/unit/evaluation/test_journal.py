"""Records of an evaluation: appended, torn, damaged, written by several."""

import threading
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluation.journal import Journal, read_journals


def test_a_torn_last_line_is_cut(tmp_path: Path) -> None:
    """A kill in the middle of a line made the next record unreadable too."""
    with Journal(tmp_path, "answers", "00000") as journal:
        journal.add("a", {"value": 1})
    with open(journal.path, "ab") as file:
        file.write(b'{"key": "b", "val')
    assert list(read_journals(tmp_path, "answers")) == ["a"]
    with Journal(tmp_path, "answers", "00000") as journal:
        journal.add("c", {"value": 3})
    assert read_journals(tmp_path, "answers") == {"a": {"key": "a", "value": 1}, "c": {"key": "c", "value": 3}}


def test_damage_anywhere_else_is_named(tmp_path: Path) -> None:
    """A damaged file was read as if it were shorter."""
    with Journal(tmp_path, "answers", "00000") as journal:
        journal.add("a", {})
    journal.path.write_bytes(b"nonsense\n" + journal.path.read_bytes())
    with pytest.raises(UserError, match="line 1 is no record"):
        read_journals(tmp_path, "answers")


def test_all_writers_are_read_and_threads_do_not_mix(tmp_path: Path) -> None:
    """Verdicts come from the judge's threads: two halves of lines stood in one."""
    with Journal(tmp_path, "verdicts", "00000") as one, Journal(tmp_path, "verdicts", "00001") as other:
        pairs = [(journal, n) for journal in (one, other) for n in range(4)]

        def write(journal: Journal, part: int) -> None:
            for i in range(50):
                journal.add(f"{journal.path.name}/{part}/{i}", {"text": "x" * 500})

        threads = [threading.Thread(target=write, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_journals(tmp_path, "verdicts")) == 8 * 50
