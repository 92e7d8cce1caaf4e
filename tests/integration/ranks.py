"""Processes that train together, for tests: forked from this one, as torchrun would have started them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ports import free_port
from svip.training import distributed


def together(world: int, folder: Path, function: Callable[[], Any], join: bool = True) -> list[Any]:
    """What the function returns, or the exception that it raises, in each of so many processes.

    ``folder`` takes the answers. A process that dies without one answers with its exit code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            if join:
                with distributed.joined():
                    answer = function()
            else:
                answer = function()
        except BaseException as error:
            traceback.print_exc()
            answer = error
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(answer))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
    answers = [folder / f"{rank}.pickle" for rank in range(world)]
    return [
        pickle.loads(answer.read_bytes()) if answer.exists() else process.exitcode
        for answer, process in zip(answers, processes, strict=True)
    ]
