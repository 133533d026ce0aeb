"""How often the routers chose each expert lately. A value with a pure update."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anchortp.errors import ConfigError


def _nothing() -> NDArray[np.float64]:
    return np.zeros((0, 0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadWindow:
    """Choices per layer and expert, older ones counting less: half as much for every `half_life_steps` steps.

    Counts are of the routers' choices, one for each token and expert chosen, whoever computes them. So they do not
    depend on the placement, and stay good when it changes or a device is lost. (Under tensor parallelism every device
    sees all of them; one of them reports.)

    `counts`: float64 `[num_layers, num_experts]`, read-only, empty before the first report. `num_steps`: the steps
    they stand for, decayed alike.
    """

    half_life_steps: float = 512.0
    counts: NDArray[np.float64] = field(default_factory=_nothing)
    num_steps: float = 0.0

    def __post_init__(self) -> None:
        if not self.half_life_steps > 0:
            raise ConfigError(f"half_life_steps is {self.half_life_steps}; it must be greater than 0.")

    def observe(self, counts: ArrayLike, num_steps: int = 1) -> LoadWindow:
        """The window after one report: `counts` `[num_layers, num_experts]` of the last `num_steps` steps together."""
        new = np.asarray(counts, dtype=np.float64)
        assert new.ndim == 2 and num_steps > 0 and (new >= 0).all(), "a report is [layers, experts], 0 or more each"
        assert not self.counts.size or new.shape == self.counts.shape, f"{new.shape} after {self.counts.shape}"
        keep = 0.5 ** (num_steps / self.half_life_steps)
        total = new + self.counts * keep if self.counts.size else new.copy()
        total.setflags(write=False)
        return replace(self, counts=total, num_steps=num_steps + self.num_steps * keep)

    @property
    def loads(self) -> NDArray[np.float64]:
        """Choices per step, `[num_layers, num_experts]`."""
        return self.counts / max(self.num_steps, 1e-300)
