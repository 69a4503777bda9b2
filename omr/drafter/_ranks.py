"""Training in several processes. One process is rank 0 of 1.

Ranks find each other through torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT): NCCL
between GPUs, gloo between CPU processes. They are started here rather than by torchrun, because a killed torchrun
leaves its ranks behind, and a child of `omr.process` dies with its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from omr.drafter._training_state import resume_of
from omr.errors import ChildError, ConfigError
from omr.option import fields_of
from omr.process import free_port, manner_of_death, rebuild_error, spawn

if TYPE_CHECKING:
    from omr.drafter.redrafter import Redrafter as Option

POLL_S = 0.1


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @classmethod
    @contextlib.contextmanager
    def join(cls, device: str) -> Iterator[Ranks]:
        """Meet the other ranks, if there are any, and part in the end."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            yield cls(0, 1, torch.device(device))
            return
        local = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), world, local)
        finally:
            dist.destroy_process_group()

    def from_first(self, value: float) -> float:
        """Rank 0's value, so that all ranks decide alike."""
        if self.world > 1:
            shared = torch.tensor([value], dtype=torch.float64, device=self.device)
            dist.broadcast(shared, 0)
            return float(shared.item())
        return value

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.world > 1:
            dist.barrier()

    def sum_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> None:
        """Add up gradients (missing ones are zero) and the loss over all ranks, in place."""
        if self.world == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([*(p.grad.reshape(-1) for p in parameters if p.grad is not None), loss.reshape(1)])
        dist.all_reduce(flat)
        at = 0
        for p in parameters:
            assert p.grad is not None
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()
        loss.copy_(flat[at])


def fit_in_ranks(option: Option, base: Path, text: Path, out: Path, device: str) -> dict[str, float]:
    """`option.fit` in `num_processes` processes of this host; rank 0's answer. The first that fails ends all."""
    world = option.num_processes
    if device == "cuda" and world > torch.cuda.device_count():
        raise ConfigError(f"drafter.num_processes={world}, this machine shows {torch.cuda.device_count()} GPUs")
    folder = resume_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"base": base, "text": text, "out": out}
    call = {
        "group": option.option_group,
        "name": option.option_name,
        "fields": fields_of(replace(option, num_processes=1)),
        "verb": "fit",
        "kwargs": {"device": device, **{name: {"path": str(path)} for name, path in paths.items()}},
    }
    (folder / "call.json").write_text(json.dumps(call))
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    answers = [folder / f"rank{rank}.json" for rank in range(world)]
    with contextlib.ExitStack() as stack:
        children = []
        for rank, answer in enumerate(answers):
            answer.unlink(missing_ok=True)
            env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            argv = [sys.executable, "-m", "omr.worker", str(folder / "call.json"), str(answer)]
            children.append(stack.enter_context(spawn(argv, log=folder / f"rank{rank}.log", env=env, echo=rank == 0)))
        waiting = set(range(world))
        while waiting:
            time.sleep(POLL_S)
            ended = [rank for rank in waiting if children[rank].poll() is not None]
            for rank in sorted(ended, key=lambda rank: children[rank].wait() >= 0):  # who was killed, not who lost it
                waiting.discard(rank)
                if not answers[rank].exists():
                    child = children[rank]
                    raise ChildError(
                        f"drafter training, rank {rank} of {world}, {manner_of_death(child.wait())} (its log is "
                        f"{child.log})",
                        child.log_tail(),
                    )
                answer = json.loads(answers[rank].read_text())
                if "error" in answer:
                    raise rebuild_error(answer["error"], answer["message"])
    metrics: dict[str, float] = json.loads(answers[0].read_text())["value"]
    return metrics
