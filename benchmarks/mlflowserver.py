"""A real MLflow server for tests and benchmarks, and a proxy before it that can be slow, silent or lossy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import requests

from benchmarks.ports import free_port

MORTAL = ["setpriv", "--pdeathsig=TERM"] if shutil.which("setpriv") else []
"""How a command begins that is to end with this process, however that ends; a server of MLflow ends its own then."""


class Server:
    """``mlflow server`` on loopback, with its SQLite file and artifacts in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, again too, and wait until it answers; TimeoutError with its log when it does not."""
        command = [*MORTAL, sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
            )
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            try:
                if requests.get(f"{self.uri}/health", timeout=5).ok:
                    return
            except (requests.ConnectionError, requests.Timeout):
                assert self._process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)
        raise TimeoutError((self.folder / "server.log").read_text())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill it, as a failing machine would."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()


class Proxy:
    """Passes bytes on to a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.delay = 0.0
        """Seconds by which each request comes later."""
        self.silent = False
        """Closes what it has, and each new connection at once."""
        self.loses = 0
        """Answers that it still swallows: the server has done its work, and the client doesn't learn of it."""
        self.connections = 0
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self) -> None:
        self.silent = True
        for end in self._open:
            _shut(end)

    def close(self) -> None:
        self.fall_silent()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            self.connections += 1
            if self.silent:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.port))
            self._open += [client, server]
            threading.Thread(target=self._pass_on, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, True), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        try:
            while data := source.recv(2**20):
                if answers and self.loses:
                    self.loses -= 1
                    break
                if not answers and self.delay:
                    time.sleep(self.delay)
                target.sendall(data)
        except OSError:  # the other end is closed
            return
        finally:
            _shut(source)
            _shut(target)


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is already
        end.close()
