"""Where a training is kept: in a folder, or at an s3:// address of which a folder of this machine is the copy."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from functools import partial
from pathlib import Path

from svip.changes import NOT_OF_TRAINING
from svip.config import Config, flatten, variant
from svip.data import s3
from svip.data.sources import Interrupted
from svip.data.transfer import cache_folder, read_bytes
from svip.training.checkpoint import write_atomically

log = logging.getLogger(__name__)


class Place:
    """Where a training is kept; ``folder`` is where it works.

    Every file of a training is whole at any moment, and written in such an order that what is there can be gone on
    from. Files reach the address in that order, each of them whole or not at all, so the same holds there.
    """

    def __init__(self, address: str | Path) -> None:
        self.address = str(address).rstrip("/")
        self.remote = self.address.startswith("s3://")
        self.folder = _copy_of(self.address) if self.remote else Path(address)
        self._known: dict[str, tuple[int, int, int]] | None = None
        """The files that are the same here and there, as ``_files`` tells; None before either was looked at."""

    def fetch(self) -> None:
        """Make the folder what the address holds, be it nothing; DataError when that can't be had."""
        if not self.remote:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in s3.names(self.address):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            s3.fetch(f"{self.address}/{name}", self.folder / name)
        self._known = self._files()

    def save(self, finished: bool = False) -> None:
        """Make the address what the folder holds.

        Where it can't be reached, training goes on and the next one makes up for it; not when it has ``finished``.
        """
        if not self.remote:
            return
        known, files = self._known or {}, self._files()
        try:
            for name, state in sorted(files.items(), key=lambda file: file[1]):  # the oldest first
                if known.get(name) != state:
                    s3.upload(self.folder / name, f"{self.address}/{name}")
                    known[name] = state
            for name in known.keys() - files.keys():
                s3.remove(f"{self.address}/{name}")
                del known[name]
        except Interrupted as error:
            if finished:
                raise
            log.warning("%s; training goes on, and the next checkpoint is tried again", error)
        self._known = known

    def finished(self) -> bool:
        """Whether a finished training is there."""
        try:
            return bool(self.read("model.json"))
        except (FileNotFoundError, s3.Missing):
            return False

    def read(self, name: str) -> str:
        """A small file of the training."""
        if self.remote:
            return read_bytes(f"{self.address}/{name}").decode()
        return (self.folder / name).read_text(encoding="utf-8")

    def hand_over(self, out: Path, keep: bool = False) -> None:
        """Copy the finished training to ``out``, then remove it here, unless it is to be kept."""
        if self._known is None:
            self.fetch()
        files = sorted(self._files(), key=lambda name: name == "model.json")  # which says that all is there
        for name in files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out / name, partial(shutil.copyfile, self.folder / name))
        if keep:
            return
        if self.remote:
            for name in reversed(files):
                s3.remove(f"{self.address}/{name}")
        else:
            # not half a training that looks like a whole one, wherever this ends
            (self.folder / "model.json").unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Remove the folder of this machine, whatever the address holds."""
        shutil.rmtree(self.folder, ignore_errors=True)  # processes of this machine may have, at their end

    def _files(self) -> dict[str, tuple[int, int, int]]:
        """Name -> time of change, size and inode of what is there (temporary files begin with a dot)."""
        found = {}
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                state = path.stat()
                found[str(path.relative_to(self.folder))] = (state.st_mtime_ns, state.st_size, state.st_ino)
        return found


def workplace(work: str, out: str, parent_run_id: str, run: str, config: Config) -> str:
    """The place below ``work`` of this training of a pipeline's run, the same each time that its step is tried, be it
    on another device or with another evaluation to follow.

    Without a parent run it belongs to ``out``.
    """
    settings = {key: value for key, value in flatten(config).items() if not key.startswith(NOT_OF_TRAINING)}
    of = "\n".join([parent_run_id or str(Path(out).resolve()), run, json.dumps(settings)])
    name = re.sub(r"\W", "-", run or variant(config))
    return f"{work.rstrip('/')}/{name}-{hashlib.sha256(of.encode()).hexdigest()[:16]}"


def _copy_of(address: str) -> Path:
    return cache_folder() / "training" / hashlib.sha256(address.encode()).hexdigest()[:16]
