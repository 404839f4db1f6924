"""Several processes on this machine, joined by gloo, that never outlive a test."""

import os
import socket
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from tqdm.auto import tqdm

_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, in the server that the processes are copies of.
_CONTEXT.set_forkserver_preload(
    [
        "isoflat",
        "isoflat.geometry.canonical",
        "isoflat.linalg.eigen.hard_first",
        "scipy.integrate",
        "scipy.stats",
        "torch._dynamo",
        "torch.distributed.tensor",
        "torch.export._trace",
    ]
)


@dataclass(frozen=True)
class Answer:
    """What a process returned, or what it raised."""

    value: Any = None
    error: str = ""
    message: str = ""
    seconds: float = 0.0


def run(
    world: int, work, *arguments, timeout: float = 20.0, deadline: float = 90.0, lost=(), launched: bool = False
) -> list[Answer | None]:
    """`work(*arguments)` in every process of a group; None for those that gave no answer.

    Args:
        world: how many processes.
        work: a function that can be imported.
        *arguments: for it.
        timeout: of the group's collectives, in seconds.
        deadline: after so many seconds everything is killed.
        lost: processes whose answer is not waited for.
        launched: they are not joined yet, but have the variables that torchrun gives to each.
    """
    answers: list[Answer | None] = [None] * world
    with tempfile.TemporaryDirectory() as folder:
        meeting = _port() if launched else str(Path(folder, "store"))
        pipes, processes = [], []
        try:
            for rank in range(world):
                receiver, sender = _CONTEXT.Pipe(duplex=False)
                process = _CONTEXT.Process(target=_main, args=(sender, rank, world, meeting, timeout, work, arguments))
                process.start()
                sender.close()
                pipes.append(receiver)
                processes.append(process)
            end = time.monotonic() + deadline
            pending = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in lost}
            while pending and time.monotonic() < end:
                for pipe in wait(list(pending), timeout=1.0):
                    rank = pending.pop(pipe)
                    with suppress(EOFError):  # it has ended without an answer
                        answers[rank] = pipe.recv()
        finally:
            for rank, process in enumerate(processes):
                process.join(0 if rank in lost else 5)
                process.kill()
                process.join()
    return answers


def _port() -> int:
    """A port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(pipe, rank: int, world: int, meeting: str | int, timeout: float, work, arguments) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore of the system, which a killed process leaves behind
    if isinstance(meeting, int):
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": meeting,
        }
        os.environ.update({name: str(value) for name, value in told.items()})
    else:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
    answer = attempt(work, *arguments)
    pipe.send(answer)
    if answer.error:
        os._exit(0)  # a group that has lost a process may not come to an end
    if dist.is_initialized():
        dist.destroy_process_group()


def attempt(work, *arguments) -> Answer:
    """What a function returns, or raises."""
    started = time.monotonic()
    try:
        return Answer(value=work(*arguments))
    except Exception as error:  # noqa: BLE001 (whatever it is, a test looks at it)
        return Answer(error=type(error).__name__, message=str(error), seconds=time.monotonic() - started)
