"""What tracking costs a training on a slow server: ``python -m benchmarks.tracking``.

A real MLflow server stands behind a proxy that makes each request 200 ms later. A loop that only waits takes the place
of the training, so that the time spent in the tracker's calls is all that is added to it. MLflow's own client, called
directly, does the same beside it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.mlflowserver import Proxy, Server

EPOCHS, SECONDS, METRICS, DELAY = 30, 1.0, 20, 0.2


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as server:
        server.start()
        proxy = Proxy(server.port)
        proxy.delay = DELAY
        os.environ |= {"MLFLOW_TRACKING_URI": proxy.uri, "SVIP_OUTBOX": str(Path(folder) / "outbox")}
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        from svip.tracking import open_tracker

        print("| | in the epochs | share of the training | the end of the run |")
        print("|---|--:|--:|--:|")
        with open_tracker("svip/benchmark", "outbox") as tracker:
            spent = train(tracker.log_metrics)
            ended = time.perf_counter()
        show("svip's tracker", spent, time.perf_counter() - ended)

        client = MlflowClient(proxy.uri)
        experiment = client.get_experiment_by_name("svip/benchmark")
        assert experiment is not None
        run_id = client.create_run(experiment.experiment_id).info.run_id

        def log(metrics: dict[str, float], step: int) -> None:
            now = int(time.time() * 1000)
            client.log_batch(run_id, [Metric(key, value, now, step) for key, value in metrics.items()])

        spent = train(log)
        ended = time.perf_counter()
        client.set_terminated(run_id)
        show("MLflow's client, log_batch", spent, time.perf_counter() - ended)
        proxy.close()


def train(log: Callable[[dict[str, float], int], None]) -> float:
    """Seconds in the calls."""
    spent = 0.0
    for epoch in range(1, EPOCHS + 1):
        time.sleep(SECONDS)
        started = time.perf_counter()
        log({f"metric{number}": 1 / epoch for number in range(METRICS)}, epoch)
        spent += time.perf_counter() - started
    return spent


def show(name: str, spent: float, end: float) -> None:
    print(f"| {name} | {spent * 1000:.1f} ms | {spent / (EPOCHS * SECONDS):.2%} | {end:.2f} s |")


if __name__ == "__main__":
    main()
