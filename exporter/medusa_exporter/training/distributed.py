"""The processes that train together: one, or as many as `accelerate launch` has started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medusa_exporter.extras import import_extra


@dataclass(frozen=True)
class WorkerGroup:
    """This process among those that train together.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        accelerator: The `Accelerator` of accelerate, `None` for a single process.
    """

    rank: int = 0
    count: int = 1
    accelerator: Any = None

    @classmethod
    def join(cls, device: str) -> tuple[WorkerGroup, str]:
        """Return the group and the device of this process: `device`, or one GPU per process if there are several."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(), device
        accelerator = import_extra("accelerate", "export").Accelerator(cpu=device == "cpu")
        return cls(accelerator.process_index, accelerator.num_processes, accelerator), str(accelerator.device)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports and writes files."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of the tensors of all processes, which have one shape."""
        if self.accelerator is None:
            return tensor
        reduced: Tensor = self.accelerator.reduce(tensor, reduction="mean")
        return reduced

    def minimum(self, tensor: Tensor) -> Tensor:
        """Return the smallest of the one-element tensors of all processes."""
        if self.accelerator is None:
            return tensor
        gathered: Tensor = self.accelerator.gather(tensor.reshape(1))
        return gathered.min()
