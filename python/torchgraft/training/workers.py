"""The processes of a run that torchrun starts; one process is a group of one."""

import os
from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor

from ..errors import GraftError


class Workers:
    """This process among those that train together. Without a process group of torch.distributed: alone.

    Attributes:
        rank: of this process; 0 writes files and reports.
        size: how many processes there are.
        device: where this process computes.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if together else 0
        self.size = torch.distributed.get_world_size() if together else 1

    @classmethod
    def started_by_torchrun(cls, device: str | None = None) -> "Workers":
        """Joins the process group whose address torchrun has put into the environment, if it has.

        Args:
            device: None: this process's GPU if torch sees GPUs, else the CPU. "cuda": this process's GPU. The backend
                is nccl or gloo accordingly.

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
        """Which rows of a batch this process takes. Uneven, or none, where there are too few."""
        return slice(self.rank, None, self.size)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor, on every process, by the sum of what all processes have; in one message."""
        if self.size == 1:
            return
        # float64 holds counts and float32 gradients exactly enough; half as fast to send, and adapters are small.
        flat = torch.cat([tensor.detach().reshape(-1).to(self.device, torch.float64) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, value in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(value.view(tensor.shape))

    def take_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by that of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), 0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, on every process. They have one shape, and are on the CPU."""
        if self.size == 1:
            return [tensor]
        mine = tensor.to(self.device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(all_of_them, mine)
        return [one.cpu() for one in all_of_them]
