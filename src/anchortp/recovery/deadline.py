"""When is a step late enough to call its slowest worker hung? Learned from the steps that were observed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class StepDeadline:
    """A deadline in seconds for a step of so many tokens.

    A step costs something however small it is, and something per token. Both rates are bounded from above by
    the slowest of the last `window` steps: `base` the slowest step of at most `small` tokens, `per_token` the
    slowest seconds per token of larger ones. The deadline is `factor` times what they predict, never under
    `floor_s` (a machine that swaps or compiles for a moment is not hung) and `first_s` until a step was seen.
    """

    floor_s: float = 2.0
    first_s: float = 60.0
    factor: float = 8.0
    small: int = 32
    window: int = 256
    _base: deque[float] = field(default_factory=deque)
    _per_token: deque[float] = field(default_factory=deque)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` was answered after `seconds`."""
        rates, value = self._base, seconds
        if num_tokens > self.small:
            rates, value = self._per_token, seconds / num_tokens
        rates.append(value)
        if len(rates) > self.window:
            rates.popleft()

    def for_step(self, num_tokens: int) -> float:
        """Seconds after which a step of `num_tokens` counts as hung."""
        if not self._base and not self._per_token:
            return self.first_s
        base = max(self._base, default=0.0)
        # Without a large step seen, a small one's cost per token is an upper bound for a large one's.
        per_token = max(self._per_token, default=base)
        predicted = base + (num_tokens * per_token if num_tokens > self.small else 0.0)
        return max(self.floor_s, self.factor * predicted)
