"""What several processes cost and gain in a training step: a DistributedDataParallel beside none, two beside one.

``python -m benchmarks.ddp``, on the CPU. What wrapping costs is measured in CPU time, and also on a busy machine;
``--scaling`` measures images a second by the clock, and wants a machine that has nothing else to do.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import arguments, markdown, publish
from benchmarks.ports import free_port
from svip.config import Config, load_config
from svip.models.svip import SVIP
from svip.training import distributed
from svip.training.loop import train_step
from svip.training.optim import build_optimizer

CLASSES, ATTRIBUTES, WORD_SIZE = 50, 35, 50


def stepper(config: Config, wrap: Callable[[SVIP], nn.Module]) -> Callable[[], object]:
    """A training step of this process's share of a batch of random images."""
    torch.manual_seed(0)
    model = SVIP(config.model, config.data.image_size, torch.randn(ATTRIBUTES, WORD_SIZE))
    model.train()
    optimizer, forward = build_optimizer(model, config.optim), wrap(model)
    count, size = config.optim.batch_size // distributed.world(), config.data.image_size
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    targets, seen = torch.randint(0, CLASSES, (count,)), torch.rand(CLASSES, ATTRIBUTES)
    share = count / config.optim.batch_size
    return lambda: train_step(model, optimizer, config, images, targets, seen, (), False, forward, share)


def join(rank: int, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")


def overhead(rank: int, config: Config, steps: int, port: int, answer: Any) -> None:
    """CPU seconds of a step of one process on one thread, without the wrapper and with it, in turns."""
    torch.set_num_threads(1)
    join(rank, 1, port)
    ways = (stepper(config, lambda model: model), stepper(config, DistributedDataParallel))
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(steps + 3):  # the first ones warm up
        for found, step in zip(seconds, ways, strict=True):
            start = time.process_time()
            step()
            found.extend([time.process_time() - start] if number >= 3 else [])
    answer.put(tuple(map(statistics.median, seconds)))
    dist.destroy_process_group()


def by_the_clock(rank: int, world: int, threads: int, config: Config, steps: int, port: int, answer: Any) -> None:
    """Seconds of a step of all processes together."""
    torch.set_num_threads(threads)
    join(rank, world, port)
    step = stepper(config, distributed.parallel)
    seconds = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        answer.put(statistics.median(seconds[3:]))
    dist.barrier()
    dist.destroy_process_group()


def run(work: Callable[..., None], processes: int, *settings: Any) -> Any:
    """What ``work`` answers, in so many new processes."""
    answer = mp.get_context("spawn").SimpleQueue()
    mp.start_processes(work, (*settings, free_port(), answer), nprocs=processes, start_method="spawn")
    return answer.get()


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scaling", action="store_true", help="two processes beside one, by the clock")
    options = parser.parse_args()
    config = load_config(options.preset, ["train.device=cpu", "model.weights=none"])
    plain, wrapped = run(overhead, 1, config, options.steps)
    rows = [
        ["no wrapper", f"{plain:.3f}", "1"],
        ["DistributedDataParallel", f"{wrapped:.3f}", f"{wrapped / plain:.3f}"],
    ]
    text = f"{options.preset}, {config.optim.batch_size} images a step, one process on one thread\n\n"
    text += markdown(["", "CPU seconds", "ratio"], rows)
    if options.scaling:
        ways = {
            "one process, one thread": (1, 1),
            "one process, two threads": (1, 2),
            "two processes, one thread each": (2, 1),
        }
        rates = {
            name: config.optim.batch_size / run(by_the_clock, world, world, threads, config, options.steps)
            for name, (world, threads) in ways.items()
        }
        first = next(iter(rates.values()))
        table = [[name, f"{rate:.1f}", f"{rate / first:.2f}"] for name, rate in rates.items()]
        text += "\n" + markdown(["", "images a second", "ratio"], table)
    publish(text, options.out)


if __name__ == "__main__":
    main()
