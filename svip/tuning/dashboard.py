"""optuna-dashboard on a study, where it is installed."""

from __future__ import annotations

from svip.tuning.storage import TuningError
from svip.tuning.study import Study

LOCAL = "127.0.0.1"


def show_dashboard(study: Study, port: int) -> None:
    """Serve it on this machine until it is interrupted; TuningError where the package is not there."""
    try:
        from optuna_dashboard import run_server
    except ImportError:
        raise TuningError("optuna-dashboard is not installed: pip install 'svip[dashboard]'") from None
    print(f"study {study.name}: http://{LOCAL}:{port} (Ctrl-C ends it)", flush=True)
    run_server(study.storage, host=LOCAL, port=port)
