"""What several processes cost and gain: a training step with and without DistributedDataParallel, in images a second.

``python -m benchmarks.ddp`` on a machine that has nothing else to do. On the CPU, where two processes of one thread
share the cores with one process of two threads; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import arguments, markdown, publish
from svip.config import Config, load_config
from svip.models.svip import SVIP
from svip.training import distributed
from svip.training.loop import train_step
from svip.training.optim import build_optimizer

CLASSES, ATTRIBUTES, WORD_SIZE = 50, 35, 50


def step_seconds(config: Config, threads: int, steps: int, wrapped: bool) -> float:
    """Median seconds of a training step on this process's share of random images."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = SVIP(config.model, config.data.image_size, torch.randn(ATTRIBUTES, WORD_SIZE))
    model.train()
    optimizer = build_optimizer(model, config.optim)
    count, size = config.optim.batch_size // distributed.world(), config.data.image_size
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    targets, seen = torch.randint(0, CLASSES, (count,)), torch.rand(CLASSES, ATTRIBUTES)
    forward = DistributedDataParallel(model) if wrapped else model
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        train_step(model, optimizer, config, images, targets, seen, (), False, forward, count / config.optim.batch_size)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[steps // 4 :])[len(seconds[steps // 4 :]) // 2]


def work(rank: int, world: int, config: Config, threads: int, steps: int, wrapped: bool, answer: Any) -> None:
    if wrapped:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["SVIP_PORT"]}
        dist.init_process_group("gloo")
    seconds = step_seconds(config, threads, steps, wrapped)
    if rank == 0:
        answer.put(seconds)
    if wrapped:
        dist.barrier()
        dist.destroy_process_group()


def measured(config: Config, world: int, threads: int, steps: int, wrapped: bool, port: int) -> float:
    """Images a second of all processes together."""
    os.environ["SVIP_PORT"] = str(port)
    answer = mp.get_context("spawn").SimpleQueue()
    mp.start_processes(work, (world, config, threads, steps, wrapped, answer), nprocs=world, start_method="spawn")
    return config.optim.batch_size / float(answer.get())


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__ or "")
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = load_config(options.preset, ["train.device=cpu", "model.weights=none"])
    ways = {
        "one process, one thread": (1, 1, False),
        "the same, wrapped by DistributedDataParallel": (1, 1, True),
        "one process, two threads": (1, 2, False),
        "two processes, one thread each": (2, 1, True),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds):
        for place, (name, (world, threads, wrapped)) in enumerate(ways.items()):
            port = 29600 + 10 * number + place
            rates[name].append(measured(config, world, threads, options.steps, wrapped, port))
    best = {name: max(found) for name, found in rates.items()}
    first = next(iter(best.values()))
    rows = [[name, f"{rate:.1f}", f"{rate / first:.3f}"] for name, rate in best.items()]
    title = f"{options.preset}: batches of {config.optim.batch_size} images, best of {options.rounds} rounds\n\n"
    publish(title + markdown(["", "images a second", "ratio"], rows), options.out)


if __name__ == "__main__":
    main()
