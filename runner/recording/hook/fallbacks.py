"""Notice what a server falls back to, from what it logs: a rehearsal must not hide it."""

from __future__ import annotations

import logging
import re

from .recorder import Recorder

_SAYS_SO = re.compile(r"fall(s|ing)?[ -]?back", re.IGNORECASE)
_MAY_SAY_SO = re.compile(
    r"disabl|unavailable|not (available|supported|installed|found)|skipping|cannot|failed",
    re.IGNORECASE,
)
_SHOWN_CHARACTERS = 200


def note_fallbacks(recorder: Recorder) -> None:
    """Count log messages that tell of a fallback, whichever logger they come from."""
    handle = logging.Logger.handle

    def handle_and_note(logger: logging.Logger, record: logging.LogRecord) -> None:
        recorder.safely(lambda: _note(recorder, record))
        handle(logger, record)

    logging.Logger.handle = handle_and_note  # type: ignore[method-assign, assignment]


def _note(recorder: Recorder, record: logging.LogRecord) -> None:
    if record.levelno < logging.INFO:
        return
    text = (record.getMessage().strip().splitlines() or [""])[0]
    warned = record.levelno >= logging.WARNING and _MAY_SAY_SO.search(text)
    if warned or _SAYS_SO.search(text):
        recorder.count("fallback", text[:_SHOWN_CHARACTERS])
