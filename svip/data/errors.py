"""The error of data that can't be used; on its own here, so that raising it loads no library."""

from __future__ import annotations


class DataError(ValueError):
    """Data that can't be used; the message names the file, what was expected and what to do."""
