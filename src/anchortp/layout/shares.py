"""Who computes which tokens of an expert that several devices hold."""

from __future__ import annotations

Part = tuple[float, float]  # of an expert's tokens, half-open, within [0, 1]


def part_of(num_tokens: int, part: Part, phase: float = 0.5) -> tuple[int, int]:
    """Which of an expert's `num_tokens` tokens of a step, `[start, stop)` in their order, one holder computes.

    The holders' ranges meet and cover all tokens whatever `phase` in [0, 1) is, if it is the same for all of them. Let
    it run through [0, 1) from step to step: then few tokens are shared out fairly too (each holder's mean is exact).
    """
    start, stop = (min(int(at * num_tokens + phase), num_tokens) for at in part)
    return start, stop
