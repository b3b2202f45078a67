"""Plain Python values as bytes and back. Standard library only: `reference_guest` loads this file alone.

They are pickles, which keep tuples, sets, complex and huge numbers and are small; reading one can make nothing but
plain values, since no other name is looked up.
"""

import io
import pickle
from typing import Any

KINDS = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
"""Types whose values are plain data, with None."""


class _Writer(pickle.Pickler):
    """Subclasses of plain types become their plain type; everything else is refused."""

    def reducer_override(self, value: Any) -> Any:  # called for what is not exactly of a plain type
        if isinstance(value, type) and value in KINDS:
            return NotImplemented
        if type(value) is complex:
            return complex, (value.real, value.imag)
        for kind in KINDS:
            if isinstance(value, kind):
                return kind, (kind(value),)  # type: ignore[arg-type]
        raise ValueError(f"a value of type {type(value).__name__} is no plain data; tests compare plain data only")


class _Reader(pickle.Unpickler):
    """A pickle can name any function to be called; this one knows the plain types alone."""

    def find_class(self, module: str, name: str) -> Any:
        found = {kind.__name__: kind for kind in KINDS}.get(name) if module == "builtins" else None
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and may hold plain data only")
        return found


def dumps(value: Any) -> bytes:
    """Plain data as bytes; a subclass (Counter, named tuple) becomes its plain type. Raises ValueError for others."""
    buffer = io.BytesIO()
    _Writer(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def loads(content: bytes) -> Any:
    """Inverse of `dumps`; also for pickles of others. Raises pickle.UnpicklingError for what is no plain data."""
    return _Reader(io.BytesIO(content)).load()
