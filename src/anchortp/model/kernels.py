"""What lies between a step's collectives, one operation at a time, as torch computes it [worker]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anchortp.model import panels
from anchortp.model.panels import Matrix, Panels
from anchortp.model.rope import RopeTables


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the rows of a step stand in their sequences and in the cache."""

    positions: Tensor  # int64 [rows]
    cache_slots: Tensor  # int64 [rows]: the row of the cache's planes that keys and values go to
    cos: Tensor  # what turns heads by these positions: `TorchKernels.rotation`
    sin: Tensor


class TorchKernels:
    """On any device. `anchortp.model.native` has others for CPUs, `anchortp.model.fused` for GPUs."""

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

    def rotation(self, rope: RopeTables, positions: Tensor, num_q: int, num_kv: int) -> tuple[Tensor, Tensor]:
        """Once a step, for `rotate_store`: cos and sin `[rows, num_q + 2 * num_kv, head_dim]`; the values' rows do not
        rotate."""
        angles = positions.unsqueeze(1).repeat(1, num_q + 2 * num_kv)
        angles[:, num_q + 1 :: 2] = rope.identity
        shape = (*angles.shape, rope.cos.shape[1])
        cos, sin = (table.index_select(0, angles.flatten()).view(shape) for table in (rope.cos, rope.sin))
        return cos, sin

    def rotate_store(
        self,
        q: Tensor,
        kv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        places: Places,
        cache: Tensor,
        pick: Tensor,
    ) -> Tensor:
        """Heads that were just projected: their norms, rotation, and way to where attention finds them.

        `q` `[rows, num_q * head_dim]`; `kv` `[rows, num_kv * 2 * head_dim]`, per head k, then v. `norms`: weights
        `[head_dim]` for q and for k. Keys and values go to the rows `places.cache_slots` of `cache`, `[2 * num_kv,
        tokens, head_dim]`. Returns the q heads `pick` (int64 `[picked]`): `[rows, picked, head_dim]`.
        """
        hd = cache.shape[2]
        num_rows, num_q = q.shape[0], q.shape[1] // hd
        heads = torch.cat((q, kv), dim=1).view(num_rows, -1, hd)
        if norms is not None:
            heads[:, :num_q] = self.norm(q.view(num_rows, -1, hd), norms[0], eps)
            keys = heads[:, num_q::2]
            keys.copy_(self.norm(keys, norms[1], eps))
        turned = (heads * places.cos).addcmul_(heads.roll(hd // 2, -1), places.sin)
        cache.index_copy_(1, places.cache_slots, turned[:, num_q:].transpose(0, 1))
        return turned.index_select(1, pick)
