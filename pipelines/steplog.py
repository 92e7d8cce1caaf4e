"""What kfp.local prints, made readable: the steps and their own output, without kfp's chatter."""

from __future__ import annotations

import io
import re
from collections import deque
from typing import TextIO

TAIL = 12
"""Lines of a failed step's log that are shown once more at the end."""


class StepLog(io.TextIOBase):
    """Takes all that kfp.local prints: to a file as it is, to the terminal without kfp's own chatter.

    ``step`` and ``tail`` are the step that runs and the last lines of its output; ``failed`` and ``failure`` those of
    the first one that failed.
    """

    STARTS = re.compile(r"Executing task '([^']+)'")
    FAILS = re.compile(r"Task '([^']+)' finished with status FAILURE")
    ENDS = re.compile(r"Task '[^']+' finished with status SUCCESS")  # its outputs follow
    INDENT = "    "
    LOGGER = re.compile(r"^ *\[KFP Executor [^\]]*\]: ")
    CHATTER = ("Looking for component", "Loading KFP component", "Wrote executor output file")
    EMPTY_BAR = re.compile(r": +0%\|")
    COLOUR = re.compile(r"\x1b\[\d+m")

    def __init__(self, terminal: TextIO, file: TextIO) -> None:
        self.step = self.failed = ""
        self.failure: list[str] = []
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._terminal, self._file = terminal, file
        self._line = ""
        self._skips_until = ""
        self._running = False

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._take(self.COLOUR.sub("", line))
        return len(text)

    def _take(self, line: str) -> None:
        self._file.write(f"{line}\n")  # not print(), which kfp has replaced by one that indents
        if started := self.STARTS.search(line):
            self.step, self._running = started[1], True
            self.tail.clear()
            self._show(f"== {self.step}")
        elif (failed := self.FAILS.search(line)) and not self.failed:
            self.failed, self.failure = failed[1], list(self.tail)
        elif self._skips_until:
            if line == self._skips_until:
                self._skips_until = ""
        elif line.endswith("Got executor_input:"):
            # a page of JSON; where steps run side by side, kfp indents their lines twice or thrice
            self._skips_until = f"{line[: len(line) - len(line.lstrip())]}}}"
        elif line.startswith(self.INDENT) and line.strip() and self._running:
            said = self.LOGGER.sub("", line.removeprefix(self.INDENT))
            if not said.lstrip().startswith(self.CHATTER) and not self.EMPTY_BAR.search(said):
                self.tail.append(said)
                self._show(f"   {said}")
        elif self.ENDS.search(line):
            self._running = False

    def _show(self, line: str) -> None:
        self._terminal.write(f"{line}\n")
        self._terminal.flush()
