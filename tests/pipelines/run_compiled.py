"""Run a compiled pipeline with kfp.local: a process of its own, as kfp.local's settings are the process's.

``python run_compiled.py PIPELINE.yaml PARAMETERS.json FOLDER [docker]``
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import yaml
from kfp import components, local

from pipelines.containers import Containers
from svip.config import load_config


def main(package: str, parameters: str, folder: str, runner: str = "subprocess") -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)  # what comes from the cache
    document, *_ = yaml.safe_load_all(Path(package).read_text())  # the second one is for clusters
    pipeline = components.load_component_from_text(yaml.safe_dump(document))
    values, home = json.loads(Path(parameters).read_text()), Path(folder)

    def run(by: local.SubprocessRunner | local.DockerRunner) -> None:
        cache = str(home.parent / "cache")
        local.init(by, str(home / "artifacts"), workspace_root="", enable_caching=True, cache_root=cache)
        pipeline(**values)

    if runner == "docker":
        containers = Containers(load_config(values["preset"], values["overrides"]), values["preset"], home)
        with containers.in_place_of_kfps():
            run(containers.runner)
    else:
        run(local.SubprocessRunner(use_venv=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
