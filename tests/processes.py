"""Processes that begin with what this one has imported: a fresh interpreter takes seconds for torch and diffusers."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState


def begun(target: Callable[..., None], *args: Any, log: Path, **env: str) -> BaseProcess:
    """A process that calls the function; what it says goes to `log`. Keywords are environment variables."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401  here, and not in each of them

    # a CUDA context does not survive a fork, nor do the threads that autograd keeps for a GPU
    method = "spawn" if torch.cuda.is_available() else "fork"
    process = multiprocessing.get_context(method).Process(target=_enter, args=(target, args, log, env))
    process.start()
    return process


def group(target: Callable[..., None], *args: Any, log: Path, size: int = 2) -> list[BaseProcess]:
    """Processes on CPUs that find each other by the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    env = {k: str(v) for k, v in env.items()} | {"ACCELERATE_USE_CPU": "true"}
    return [begun(target, *args, log=log, **env, RANK=str(i), LOCAL_RANK=str(i)) for i in range(size)]


def ended(processes: Sequence[BaseProcess], log: Path) -> None:
    """Wait for them, which must end well. When one fails the others are ended: they may be waiting for it."""
    while running := [p for p in processes if p.is_alive()]:
        if any(p.exitcode for p in processes):
            for process in running:
                process.terminate()
        connection.wait([p.sentinel for p in running])
    assert not any(p.exitcode for p in processes), log.read_text()


def _enter(target: Callable[..., None], args: tuple[Any, ...], log: Path, env: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    # pytest's own streams write elsewhere
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ |= env
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork either
    AcceleratorState._reset_state(reset_partial_state=True)  # which says that there is one process
    GradientState._reset_state()
    target(*args)
