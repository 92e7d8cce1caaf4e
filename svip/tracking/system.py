"""How busy the machine is while a run lasts: MLflow's system metrics."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from svip.tracking.runs import Tracker

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

log = logging.getLogger(__name__)

INTERVAL = 10.0
"""Seconds between two samples; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL may say another."""


@contextlib.contextmanager
def system_metrics(tracker: Tracker) -> Iterator[None]:
    """While it lasts, log ``system/...`` every few seconds: CPU, memory, disk, network and NVIDIA GPUs.

    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false turns it off. What can't be measured or logged stops it, nothing else.
    """
    wanted = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("true", "1")
    if not (tracker.run_id and wanted):
        yield
        return
    over = threading.Event()
    sampler = threading.Thread(target=_sample, args=(tracker, _monitors(), over), name="system-metrics", daemon=True)
    sampler.start()
    try:
        yield
    finally:
        over.set()
        sampler.join()


def _monitors() -> list[BaseMetricsMonitor]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # no NVIDIA GPU
        monitors.append(GPUMonitor())
    for monitor in monitors:  # the first look at the CPU is the beginning of what the next one measures
        monitor.collect_metrics()
        monitor.clear_metrics()
    return monitors


def _sample(tracker: Tracker, monitors: list[BaseMetricsMonitor], over: threading.Event) -> None:
    """Until it is over, and once more at the end, so that a short run has its numbers too."""
    # MLflow's own thread would ask the server after each sample, and end when an answer fails to come.
    interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or INTERVAL)
    step, ended = 0, False
    while not ended:
        ended = over.wait(interval)
        step += 1  # from 1: those of step 0 MLflow takes for results of the model that is logged
        try:
            sample: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                sample |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            tracker.log_metrics({f"system/{name}": value for name, value in sample.items()}, step)
        except Exception as error:  # of psutil, NVML and MLflow: nothing of them may end a training
            log.warning("no system metrics from here on: %s", error)
            return
