"""Batches of a training: a pure function of seed and step, so that a resumed run needs no state for them."""
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.checkpoint import TrainError
from lib.numerics import generator


class Shuffled:
    """Batches of `size` drawn without replacement, reshuffled every epoch, the incomplete last one dropped.

    Batches are a pure function of (seed, t), so a resumed run needs no state. data [N, ...] stays where it is.
    """

    def __init__(self, data: Tensor, size: int, seed: int):
        if not 1 <= size <= len(data):
            raise TrainError(f"batch size must be between 1 and the {len(data)} training items, got {size}")
        self.data, self.size, self.seed = data, size, seed
        self.per_epoch = len(data) // size
        self._epoch, self._order = -1, None

    def indices(self, first: int, count: int) -> Tensor:
        """Which items the steps first .. first + count - 1 see: [count, size], on the data's device."""
        parts = []
        while count:
            epoch, i = divmod(first, self.per_epoch)
            n = min(count, self.per_epoch - i)
            parts.append(self._permutation(epoch)[i * self.size:(i + n) * self.size].view(n, self.size))
            first, count = first + n, count - n
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:                  # drawn on the CPU, so alike for all devices; the copy does not wait
            order = torch.randperm(len(self.data), generator=generator(self.seed, use=f"epoch {epoch}"),
                                   pin_memory=self.data.is_cuda)
            self._epoch, self._order = epoch, order.to(self.data.device, non_blocking=True)
        return self._order

    def at(self, index: Tensor) -> Tensor:
        """The batch [size, ...] of one row of `indices`."""
        return self.data[index]

    def batch(self, t: int) -> Tensor:
        """Step t's batch [size, ...]."""
        return self.at(self.indices(t, 1)[0])


class Items(Shuffled):
    """As Shuffled of the item numbers 0 .. n-1, but the incomplete last batch is kept, filled up with -1.

    There is one batch of all of them if size > n.
    """

    def __init__(self, n: int, size: int, seed: int | str, device: torch.device):
        super().__init__(torch.arange(n, device=device), min(size, n), seed)
        self.per_epoch = -(-n // self.size)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._order = F.pad(super()._permutation(epoch), (0, self.per_epoch * self.size - len(self.data)), value=-1)
        return self._order

    def at(self, index: Tensor) -> Tensor:
        """The numbers themselves."""
        return index


class Whole:
    """Every batch is all of the data (full-batch training)."""

    def __init__(self, data: Tensor):
        self.data = data

    def indices(self, first: int, count: int) -> Tensor:
        """Nothing to choose: [count, 0], on the data's device."""
        return torch.empty(count, 0, dtype=torch.long, device=self.data.device)

    def at(self, index: Tensor) -> Tensor:
        """The whole data, whatever the index."""
        return self.data

    def batch(self, t: int) -> Tensor:
        """The whole data, whatever t."""
        return self.data
