"""The processes that train together: one, or as many as `accelerate launch` has started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medusa_exporter.extras import import_extra


@dataclass(frozen=True)
class WorkerGroup:
    """This process's place among `count`, and accelerate's Accelerator where there are several."""

    rank: int = 0
    count: int = 1
    accelerator: Any = None

    @classmethod
    def join(cls, device: str) -> tuple[WorkerGroup, str]:
        """Return the workers and the device of this one: `device`, or with several processes on GPUs one each."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(), device
        accelerator = import_extra("accelerate", "export").Accelerator(cpu=device == "cpu")
        return cls(accelerator.process_index, accelerator.num_processes, accelerator), str(accelerator.device)

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of all workers' tensors of one shape."""
        if self.accelerator is None:
            return tensor
        reduced: Tensor = self.accelerator.reduce(tensor, reduction="mean")
        return reduced

    def least(self, tensor: Tensor) -> Tensor:
        """The least of all workers' one-element tensors."""
        if self.accelerator is None:
            return tensor
        gathered: Tensor = self.accelerator.gather(tensor.reshape(1))
        return gathered.min()
