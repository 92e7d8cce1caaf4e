"""Run the steps of a pipeline in processes of this machine, by kfp's SubprocessRunner."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from kfp import local
from kfp.local import subprocess_task_handler


class Processes:
    """The processes of one run: ``runner`` for kfp, and ``stop``."""

    def __init__(self) -> None:
        self.runner = local.SubprocessRunner(use_venv=False)
        self._stopped = threading.Event()
        self._running: list[subprocess.Popen[str]] = []

    @contextlib.contextmanager
    def in_place_of_kfps(self) -> Iterator[None]:
        """kfp's own can't be stopped: a loop goes on with what it has not begun."""
        theirs = subprocess_task_handler.run_local_subprocess
        subprocess_task_handler.run_local_subprocess = self._run
        try:
            yield
        finally:
            subprocess_task_handler.run_local_subprocess = theirs

    def stop(self) -> None:
        """Send SIGTERM to the steps that run; none is started any more."""
        self._stopped.set()
        for process in self._running.copy():
            process.terminate()

    def _run(self, full_command: Sequence[str], env_vars: Mapping[str, str] | None = None) -> int:
        """Run one step and print its log; its exit code. KeyboardInterrupt where that is raised, once it has ended."""
        with ThreadPoolExecutor(1) as thread:  # a signal interrupts only the main one, which may be in this method
            return thread.submit(self._run_in_thread, directly(full_command), env_vars or {}).result()

    def _run_in_thread(self, command: Sequence[str], variables: Mapping[str, str]) -> int:
        if self._stopped.is_set():
            return 1
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **variables},
            process_group=0,  # Ctrl-C on a terminal reaches it by `stop`, once, as whatever else stops the pipeline
        )
        self._running.append(process)
        if self._stopped.is_set():  # meanwhile
            process.terminate()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
        code = process.wait()
        self._running.remove(process)
        return code


def directly(command: Sequence[str]) -> list[str]:
    """kfp's command for a step, but that the step takes the place of its shell, which would pass on no signal."""
    return [part.replace("_KFP_RUNTIME=true python3", "export _KFP_RUNTIME=true; exec python3") for part in command]
