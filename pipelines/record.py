"""What the output folder of a pipeline on this machine holds, by its file ``pipeline.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.catalog import RESULTS, PipelineError
from svip.changes import CHANGE_NOTHING, NOT_OF_TRAINING
from svip.config import Config, flatten
from svip.tuning.space import find_space

NAME = "pipeline.json"
CONTENT = "content of "
HASHED = 256 << 20
"""Bytes of the largest file that is told by its content; a larger one by its size and the time of its change."""


def asked_for(pipeline: str, preset: str, config: Config, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide its results, however they are given; ``parameters``: all that the pipeline has."""
    asked = {key: parameters[key] for key in ("variants", "seeds", "trials") if key in parameters}
    if "space" in parameters:
        asked["space"] = find_space(parameters["space"], preset).read_text(encoding="utf-8")
    asked |= {key: value for key, value in flatten(config).items() if key not in CHANGE_NOTHING}
    asked |= {f"{CONTENT}{path}": _told_by(path) for path in _files(config)}
    return dict(json.loads(json.dumps({"pipeline": pipeline, **asked})))


def is_finished(out: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the results of what is asked for are in ``out``.

    PipelineError where it holds those of something else, or the training of something else that would be lost.
    """
    results, before = RESULTS[asked["pipeline"]], _read(out)
    if before is None:
        if strange := _present(out, results):
            raise PipelineError(f"{out} holds {', '.join(strange)} of no known pipeline; use another --out")
        return False
    changed = _changes(before["asked"], asked)
    # a rerun for a result that was removed has not finished, but the others are there
    if changed and (before["finished"] or any(_present(out, names) for names in RESULTS.values())):
        raise PipelineError(f"{out} holds the results of other settings ({'; '.join(changed)}); use another --out")
    changed = _changes(before["asked"], asked, besides=NOT_OF_TRAINING)
    if changed and training_begun(out):
        raise PipelineError(
            f"{out} was begun with other settings ({'; '.join(changed)}); use the same to go on, or another --out"
        )
    return before["finished"] and _present(out, results) == list(results)


def begin(out: Path, asked: Mapping[str, Any]) -> str:
    """Note what is asked for; the jobs of earlier runs of the same training that did not succeed, the last first.

    Whatever ended a run, it left its note, with the jobs before it, and the log, with its own.
    """
    before, log, jobs = _read(out), out / "pipeline.log", []
    if before and not before["finished"] and not _changes(before["asked"], asked, besides=NOT_OF_TRAINING):
        last = re.search(r'^ *"job": "(\w+)"', log.read_text(), re.MULTILINE) if log.exists() else None
        jobs = [*({last[1]} - set(before["jobs"]) if last else ()), *before["jobs"]]
    _write(out, {"asked": asked, "jobs": jobs, "finished": False})
    return " ".join(jobs)


def finish(out: Path, asked: Mapping[str, Any]) -> None:
    """Note that the results are there."""
    _write(out, {"asked": asked, "jobs": [], "finished": True})


def training_begun(out: Path) -> bool:
    """Whether there is a training or a study to go on with: one that failed before its first checkpoint is none."""
    kept = ("state.pt", "*.safetensors", "study.journal")
    return any(True for name in kept for _ in (out / "work").rglob(name))


def _files(config: Config) -> list[Path]:
    """Files of this machine that the results depend on."""
    data, semantics = config.data, config.semantics
    vectors = (semantics.vectors or "").partition("::")[0]  # FILE.zip::MEMBER
    named = (data.images, data.attributes, vectors, semantics.phrases, config.model.weights)
    return [Path(name) for name in named if name and Path(name).is_file()]


def _told_by(path: Path) -> str:
    state = path.stat()
    if state.st_size > HASHED:
        return f"{state.st_size} bytes of {state.st_mtime_ns}"
    with path.open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _present(out: Path, results: Iterable[str]) -> list[str]:
    return [name for name in results if (out / name).exists()]


def _read(out: Path) -> dict[str, Any] | None:
    try:
        note = json.loads((out / NAME).read_text(encoding="utf-8"))
        return {key: note[key] for key in ("asked", "jobs", "finished")}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise PipelineError(
            f"{out / NAME} is damaged, so what {out} holds is not known ({error!r}); restore it, or use another --out"
        ) from error


def _write(out: Path, note: Mapping[str, Any]) -> None:
    part = out / f".{NAME}.part"
    part.write_text(json.dumps(note, indent=2) + "\n")
    part.replace(out / NAME)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], besides: tuple[str, ...] = ()) -> list[str]:
    """``key: before -> now`` of what both know (another version may have other keys); of a file's content the key.

    ``besides``: beginnings of keys that may have changed.
    """
    changed = [key for key in now if key in before and before[key] != now[key] and not key.startswith(besides)]
    contents = ("space", CONTENT)
    return [key if key.startswith(contents) else f"{key}: {before[key]} -> {now[key]}" for key in changed]
