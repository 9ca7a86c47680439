"""Output that cannot end a run: a full disk, a closed pipe or an alphabet without β only cost what is not shown."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Forgiving:
    """
    A text stream whose writes never raise.

    Args:
        stream (text file, *optional*):
            Written to, until that fails; `None` where the process was started without it.
    """

    def __init__(self, stream: Any):
        self._stream = _nowhere() if stream is None else stream

    def write(self, text: str) -> int:
        """Write `text`, in the characters that the stream has."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        failed, self._stream = self._stream, _nowhere()
        # What it still holds is flushed once more when the interpreter ends
        with suppress(OSError, ValueError):
            os.dup2(self._stream.fileno(), failed.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Standard output and standard error are [`Forgiving`] while the context lasts."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = kept
