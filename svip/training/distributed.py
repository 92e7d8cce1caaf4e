"""Processes that train one model together: which of them this one is, and how they agree.

They are started by torchrun, or by ``launch``. A process alone needs nothing of this: every function is then trivial.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

log = logging.getLogger(__name__)
T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long the others wait for a process that is silent, but whose connection stands. A process that ends is noticed at
once; this has to cover what one does while the others wait, such as the download of a bundle."""
WORKER = "SVIP_WORKER"
"""Set in the environment of processes whose results and errors are shown by the one that started them."""
FAILED = "svip/failed"
"""Key of the store under which the first process that fails puts its rank."""
REASON = "svip/reason"
"""Key of the store under which it then puts its error."""
_store: dist.Store | None = None
"""What the processes that have joined share."""


class PeerFailed(RuntimeError):
    """Another process of this training has failed; it is that one which says why."""


def started_by_torchrun() -> bool:
    """Whether this process is one that torchrun has started, be it the only one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def rank() -> int:
    """The number of this process among all of the training."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that logs, writes and tracks."""
    return rank() == 0


def speaks() -> bool:
    """Whether this process is the one to print results, also before it has joined the others and after."""
    return os.environ.get("RANK", "0") == "0" and WORKER not in os.environ


def local_rank() -> int:
    """The number of this process among those of its machine, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def joined() -> Iterator[None]:
    """Within it this process is one of those that torchrun has started; alone, it changes nothing.

    What fails in one process fails in all. The first one raises its error, and the others PeerFailed.
    """
    if not started_by_torchrun() or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        yield
        return
    global _store
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    _store = store
    # tensors on the GPU by nccl, all else (and all objects) by gloo, which notices a connection that is closed
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    if number:
        logging.getLogger().setLevel(max(logging.WARNING, logging.getLogger().level))
    try:
        yield
    except PeerFailed:
        raise
    except BaseException as error:
        # nothing is torn down: that would wait for processes which may be gone, and this one is about to end
        if caused_by_a_peer(error):
            raise PeerFailed(_said()) from error
        if not _first_to_fail(store):
            raise PeerFailed(f"another process failed before this one did with {error!r}") from error
        with suppress(RuntimeError):  # of a store that is gone
            store.set(REASON, repr(error))
        raise
    else:
        dist.barrier()  # a process that leaves early takes the connections of the others with it
        dist.destroy_process_group()


@contextmanager
def naming_the_failure() -> Iterator[None]:
    """Within it a connection that another process broke is PeerFailed, with what that one says: for who records it."""
    try:
        yield
    except Exception as error:
        if not caused_by_a_peer(error):
            raise
        raise PeerFailed(_said()) from error


def _said() -> str:
    """What became of the process that failed first."""
    with suppress(RuntimeError):  # of a store that is gone
        if _store is not None and _store.check([REASON]):
            return f"another process failed with {_store.get(REASON).decode()}"
    return "another process of this training has ended, or its machine can't be reached"


def caused_by_a_peer(error: BaseException) -> bool:
    """Whether the error is that of a broken connection between the processes."""
    # gloo raises RuntimeError, and names its source file
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def _first_to_fail(store: dist.Store) -> bool:
    try:
        return bool(store.compare_set(FAILED, "", str(rank())) == str(rank()).encode())
    except (RuntimeError, dist.DistError):  # who kept the store is gone, and so has failed before
        return False


def broadcast(value: T) -> T:
    """What rank 0 gives, in every process; anything that pickles."""
    if world() == 1:
        return value
    values = [value if is_main() else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def on_main(function: Callable[[], T]) -> T:
    """Run the function in rank 0 alone; its result in every process. Where it fails, all fail (with PeerFailed)."""
    if world() == 1:
        return function()
    if not is_main():
        failed, value = broadcast((False, None))
        if failed:
            raise PeerFailed(f"rank 0: {value}")
        return value  # type: ignore[return-value]
    try:
        result = function()
    except BaseException as error:
        broadcast((True, repr(error)))
        raise
    broadcast((False, result))
    return result


def all_gather(value: T) -> list[T]:
    """What each process gives, in order of the ranks, in every process; anything that pickles."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def share(count: int) -> range:
    """This process's part of 0..count-1: every world-th, so that parts differ by one at most.

    A process for which nothing is left gets the first one again, for all have to take part; ``merge`` drops it.
    """
    own = range(rank(), count, world())
    return own if len(own) or not count else range(1)


def merge(parts: Sequence[Sequence[Any]], count: int) -> np.ndarray[Any, Any]:
    """All processes' results of their ``share``, each an array [n, ...], in the order of 0..count-1."""
    if len(parts) == 1:
        return np.asarray(parts[0])
    merged = np.empty((count, *np.shape(parts[0])[1:]), np.asarray(parts[0]).dtype)
    for number, part in enumerate(parts):
        own = merged[number :: len(parts)]
        own[:] = part[: len(own)]
    return merged


def mean(values: Mapping[str, float], weight: float) -> dict[str, float]:
    """Each number's mean over the processes, with weights that sum to 1; not finite where one of them is not."""
    if world() == 1:
        return dict(values)
    sums = torch.tensor([value * weight for value in values.values()], dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def parallel(model: nn.Module) -> nn.Module:
    """The module to run forward: the model itself or, among several processes, one that averages their gradients.

    It settles at its making which parameters have gradients, and after its first step how they are bundled, and so in
    which order they are summed: make a new one when others are to be trained, and after every checkpoint.
    """
    if world() == 1:
        return model
    # all buffers are constant, and every process has made the same ones
    return DistributedDataParallel(model, forward_sync_buffers=False)


def rng_state() -> dict[str, torch.Tensor]:
    """The state of the generators that dropout draws from in this process."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_dropout(seed: int) -> None:
    """After the model is made, from the same seed everywhere: masks of its own for every process but the first."""
    if rank():
        torch.manual_seed(int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0]))
