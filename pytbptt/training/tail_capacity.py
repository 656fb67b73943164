"""How much room the adaptive softmax's tails get, where it has to be known before the device has seen the targets."""

from torch import Tensor

from pytbptt.nn.adaptive import AdaptiveSoftmax


class TailCapacity:
    """For each tail, as many targets as a chunk has had in it, and a quarter more.

    Counted on the host, where chunks come from, so nobody waits for the device, and no target is left out. It grows
    now and then, and never shrinks: shapes, and a CUDA graph of them, last. How many rows a product has may change its
    last bits, so a checkpoint holds this too.
    """

    def __init__(self, softmax: AdaptiveSoftmax) -> None:
        self._softmax = softmax
        self.rooms = [0] * len(softmax.sizes[1:])
        """For each tail."""

    def of(self, chunks: list[Tensor]) -> tuple[int, ...]:
        """Room enough for each of these chunks' targets, int64 (B, T) on the CPU."""
        for targets in chunks:
            counts = self._softmax.count(targets)
            self.rooms = [
                room if count <= room else min(count + count // 4 + 64, targets.numel())
                for room, count in zip(self.rooms, counts, strict=True)
            ]
        return tuple(self.rooms)
