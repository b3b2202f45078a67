"""Licences of a corpus's documents: a side file in the order of the documents, read along with them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ra3_megatron.config.errors import UserError

LICENSES_FILE = "licenses.jsonl"
"""In the folder of a prepared corpus: `[name, [licence, ...]]` per kept document; absent where none are known."""


def license_line(name: str, licenses: Iterable[str]) -> str:
    """One line of the file."""
    return json.dumps([name, list(licenses)]) + "\n"


class LicenseReader:
    """Licences by name, for names asked for in the order of the file; memory does not grow with the corpus."""

    def __init__(self, corpus: Path) -> None:
        path = corpus / LICENSES_FILE
        self._path = path
        self.known = path.is_file()
        """Whether the corpus says anything about licences."""
        self._lines: Iterator[str] = self._read(path) if self.known else iter(())
        self._name: str | None = None
        self._licenses: list[str] = []

    @staticmethod
    def _read(path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8") as file:
            yield from file

    def of(self, name: str) -> list[str]:
        """Licences of the document `name`. Raises UserError when it does not follow in the file."""
        while self._name != name:
            line = next(self._lines, None)
            if line is None:
                raise UserError(f"{self._path} has no line for {name}; prepare the corpus again")
            self._name, self._licenses = json.loads(line)
        return self._licenses
