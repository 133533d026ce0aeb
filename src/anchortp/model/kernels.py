"""What lies between a step's collectives, one operation at a time, as torch computes it [worker]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anchortp.model import panels
from anchortp.model.panels import Matrix, Panels


class TorchKernels:
    """On any device. `anchortp.model.native` has others for CPUs."""

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """`x @ weight.T`."""
        return panels.linear(x, weight)

    def times(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x @ weight`."""
        out = x.new_empty(x.shape[0], weight.shape[1])
        self.times_into(out, x, weight)
        return out

    def linear_into(self, out: Tensor, x: Tensor, weight: Matrix) -> None:
        """As `linear`, written into `out` (contiguous)."""
        if isinstance(weight, Panels):
            out.copy_(self.linear(x, weight))
        else:
            torch.mm(x, weight.t(), out=out)

    def times_into(self, out: Tensor, x: Tensor, weight: Tensor) -> None:
        """As `times`, written into `out` (contiguous)."""
        torch.mm(x, weight, out=out)

    def gate(self, both: Tensor, block: int) -> Tensor:
        """`[rows, 2 * columns]`, `block` columns of gate, then as many of up, and so on -> `silu(gate) * up`, `[rows,
        columns]`."""
        blocks = both.view(both.shape[0], -1, 2, block)
        return F.silu(blocks[:, :, 0]).mul_(blocks[:, :, 1]).view(both.shape[0], -1)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The root mean square norm of each row."""
        # Without a weight torch computes in float32 and rounds once; the weight is then applied in the model's
        # dtype. That is transformers' order, bit for bit; passing the weight in rounds differently.
        return F.rms_norm(x, weight.shape, None, eps).mul_(weight)

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Adds `more` to the residual stream `x`, in place -> its norm."""
        return self.norm(x if more is None else x.add_(more), weight, eps)
