"""How a sequence is cut into chunks, and how one sweep over them ended."""

import math
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from lfm.kernels.recording import is_recording, judge_later

SATURATED_BELOW = 0.0975
"""Gain 1 - tanh^2 below which |tanh| > 0.95."""


ROW_COUNTS = (16, 64, 128, 256)
"""Rows, B*C, up to which the kernel of a step takes the same tiles; the last count stands for all above it too."""


@dataclass(frozen=True)
class ChunkPlan:
    """How to cut T positions, and when to believe the result."""

    chunk_length: int
    warmup: int
    tolerance: float
    """Largest boundary residual at which the result is used."""
    max_repair_passes: int
    """Repairs to try before the exact sequential path runs."""

    def sequential(self, num_positions: int) -> "ChunkPlan":
        return replace(self, chunk_length=num_positions, warmup=0)

    def unguarded(self) -> "ChunkPlan":
        """One pass that waits for nothing; whoever asks for it judges the residual."""
        return replace(self, tolerance=math.inf, max_repair_passes=0)

    def accepts(self, residual: Tensor) -> bool:
        """A NaN is not within the tolerance: what cannot be shown right is not used.  Waits for the device, but for a
        step that is recorded, which says so at its end."""
        if self.tolerance == math.inf:
            return True
        if is_recording():
            judge_later(residual.max() <= self.tolerance)
            return True
        return float(residual.max()) <= self.tolerance


@dataclass(frozen=True)
class Outcome:
    """How one sweep over time ended."""

    final: Tensor
    """Carried state past the last position, `[R, B, N]`, compute dtype."""
    residual: Tensor
    """fp32 `[R]`, of the first pass: what the warm-up alone achieved.  0 where nothing was cut."""
    repair_passes: int | Tensor
    """A number where the host decided on repairs, int32 `[]` where the device did."""
    fell_back: bool | Tensor
    """The repairs did not suffice and the exact sequential path ran.  bool `[]` where the device decided."""


class ChunkGrid:
    """Where the chunks of one sweep lie.

    Steps are counted within a chunk: -warmup .. -1 warm up, 0 .. length - 1 are the chunk's own.  Forward, chunks
    align with the first position and the chain of chunks runs up in time; in reverse they align with the last
    position and both steps and chain run down.  So it is always the end of the chain that may be padded.
    """

    def __init__(self, num_positions: int, plan: ChunkPlan, *, reverse: bool):
        self.num_positions = num_positions
        self.reverse = reverse
        self.length = min(plan.chunk_length, num_positions)
        self.num_chunks = math.ceil(num_positions / self.length)
        self.padding = self.num_chunks * self.length - num_positions
        # From here on, every chunk's warm-up would begin at or before the start of the chain: exact already.
        self.warmup = min(plan.warmup, (self.num_chunks - 1) * self.length)

    def chain(self, position: int) -> int:
        """Column of the chunk at this position of the chain (0: starts from the given state; -1: ends it)."""
        column = position % self.num_chunks
        return self.num_chunks - 1 - column if self.reverse else column

    def windows(self, x: Tensor) -> Tensor:
        """View `[B, T, R, N]` (zeros beyond its ends) as `[warmup + length, R, B, C, N]`; `index` finds a step."""
        front, back = (self.padding, self.warmup) if self.reverse else (self.warmup, self.padding)
        if front or back:
            x = F.pad(x, (0, 0, 0, 0, front, back))
        return x.unfold(1, self.warmup + self.length, self.length).permute(4, 2, 0, 1, 3)

    def index(self, step: int) -> int:
        return self.length - 1 - step if self.reverse else self.warmup + step

    def new_output(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """An unwritten `[B, T, R, N]`, and its slots `[length, R, B, C, N]` (padding included) by `slot`."""
        batch, _, num_reservoirs, num_units = like.shape
        padded = like.new_empty(batch, self.num_chunks * self.length, num_reservoirs, num_units)
        front = self.padding if self.reverse else 0
        slots = padded.unflatten(1, (self.num_chunks, self.length)).permute(2, 3, 0, 1, 4)
        return padded[:, front : front + self.num_positions], slots

    def slot(self, step: int) -> int:
        return self.length - 1 - step if self.reverse else step

    def handed_over(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """At each of the C - 1 boundaries: the state one chunk started from, and the one its predecessor ended in."""
        if self.reverse:
            return start[:, :, :-1], end[:, :, 1:]
        return start[:, :, 1:], end[:, :, :-1]

    def boundary_is_cut(self, reset_windows: Tensor) -> Tensor:
        """bool `[1, B, C - 1]`: the later side of the boundary starts a document."""
        first_position = 0 if self.reverse else self.warmup
        return reset_windows[first_position][:, :, 1:, 0]


def row_count(num_rows: int) -> int:
    """That of ROW_COUNTS whose tiles so many rows take."""
    return min((count for count in ROW_COUNTS if num_rows <= count), default=ROW_COUNTS[-1])
