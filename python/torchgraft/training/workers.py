"""The processes of a run that torchrun starts. A single process is a group of one."""

import os
from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor

from ..errors import GraftError


class Workers:
    """This process among the processes that train together. It is alone if torch.distributed has no process group.

    Attributes:
        rank: the number of this process. Process 0 writes files and reports.
        size: the number of processes.
        device: the device on which this process computes.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if together else 0
        self.size = torch.distributed.get_world_size() if together else 1

    @classmethod
    def started_by_torchrun(cls, device: str | None = None) -> "Workers":
        """Joins the process group whose address torchrun has put into the environment. Without torchrun, stays alone.

        Args:
            device: the device of this process. "cuda": this process's GPU. None: this process's GPU if torch sees GPUs,
                else the CPU. GPUs use nccl, CPUs gloo.

        Raises:
            GraftError: torch does not know or see the device.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            chosen = torch.device(device)
            if chosen.type == "cuda" and chosen.index is None:
                chosen = torch.device("cuda", local_rank)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise GraftError(f"device '{device}': {str(error).splitlines()[0]}") from error
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(chosen)

    def close(self) -> None:
        """Leaves the process group."""
        if self.size > 1 or (torch.distributed.is_available() and torch.distributed.is_initialized()):
            torch.distributed.destroy_process_group()

    def part(self) -> slice:
        """Returns which rows of a batch this process takes. Parts may differ in size; the part of a small batch may be
        empty."""
        return slice(self.rank, None, self.size)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor, in every process, by its sum over all processes. All tensors travel in one message."""
        if self.size == 1:
            return
        # float64 holds counts exactly, and gradients without loss. It takes twice the time to send; adapters are small.
        flat = torch.cat([tensor.detach().reshape(-1).to(self.device, torch.float64) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, value in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(value.view(tensor.shape))

    def take_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor, in every process, by the tensor of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), 0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns the tensors of all ranks, in every process, on the CPU. `tensor` has the same shape in all
        processes."""
        if self.size == 1:
            return [tensor]
        mine = tensor.to(self.device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(all_of_them, mine)
        return [one.cpu() for one in all_of_them]
