"""Run a compiled pipeline with kfp.local: a process of its own, as kfp.local's settings are the process's.

``python run_compiled.py PIPELINE.yaml PARAMETERS.json FOLDER [RUNNER.json]``; RUNNER.json has DockerRunner's arguments.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import yaml
from kfp import components, local


def main(package: Path, parameters: Path, folder: Path, runner: Path | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)  # what comes from the cache
    document, *_ = yaml.safe_load_all(package.read_text())  # the second one is for clusters
    pipeline = components.load_component_from_text(yaml.safe_dump(document))
    local.init(
        local.DockerRunner(**json.loads(runner.read_text())) if runner else local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder / "artifacts"),
        enable_caching=True,
        cache_root=str(folder.parent / "cache"),
    )
    pipeline(**json.loads(parameters.read_text()))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
