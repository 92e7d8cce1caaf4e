"""optuna-dashboard on a study, where it is installed."""

from __future__ import annotations

from pathlib import Path

from svip.tuning.storage import TuningError, open_storage
from svip.tuning.study import open_study

LOCAL = "127.0.0.1"


def show_dashboard(name: str, address: str, out: Path, heartbeat: int, port: int) -> None:
    """Serve it on this machine until it is interrupted; TuningError where the package is not there."""
    open_study(name, address, out, heartbeat)
    try:
        from optuna_dashboard import run_server
    except ImportError:
        raise TuningError("optuna-dashboard is not installed: pip install 'svip[dashboard]'") from None
    storage, _ = open_storage(address, out, heartbeat)
    print(f"study {name}: http://{LOCAL}:{port} (Ctrl-C ends it)", flush=True)
    run_server(storage, host=LOCAL, port=port)
