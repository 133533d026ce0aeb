"""From logits to tokens. Runs in the process that holds the assembled logits (a worker), on their device.

Nothing is remembered between calls: the random number of a token is a pure function of its request's seed and
its position. A request therefore goes on with the tokens it would have had, whatever process, batch or
tensor-parallel degree samples them after a fault.

The distribution, for one row of logits x
1. w = exp((x - max x) / temperature), so that the likeliest token has weight 1
2. min_p keeps the tokens with w >= min_p; top_k the k heaviest of these; top_p the fewest of these that
   carry the share top_p of their weight (Holtzman et al., 2020, section 3.1). Ties go to the lowest token id,
   so each filter keeps a prefix of one total order, and the filters of a row come down to one number: how
   many tokens are kept.
3. inverse CDF: the first token, in order of id, at which the running sum of kept weights exceeds u times the
   whole sum. In order of id, not of weight: noise in the logits (another degree sums in another order) then
   moves the borders a little, where a swap in the ranking would move them a lot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from anchortp.engine.api import SampledToken

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 256  # columns summed at once by the inverse CDF


class Draw(Protocol):
    """What the sampler must know of one row; `ScheduledSeq` is one. Meanings as in `SamplingParams`."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def logprobs(self) -> int | None: ...


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of the token at `position`: a multiple of 2**-53.

    SplitMix64 (Steele, Lea, Flood, 2014) as a counter-based generator: output number `position` of the stream
    whose state is the mixed seed. Plain integers: the same on every machine and device.
    """
    state = _mix((seed + _GOLDEN) & _MASK)
    return (_mix((state + (position + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """`num_candidates`: how many of the heaviest tokens top_k and top_p look at first.

    Where these do not decide it, 16 times as many are looked at, and so on: a matter of speed alone.
    """

    num_candidates: int = 256

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
        """One token per row. `logits`: [len(draws), vocab], any float type, the vocabulary in order of id.

        A token of logit -inf is never drawn. `temperature == 0` takes the likeliest token, the lowest id
        among equals. Log-probabilities are those of the logits as given, before temperature and filters.
        """
        assert logits.ndim == 2 and logits.shape[0] == len(draws), (logits.shape, len(draws))
        if not draws:
            return []
        logits = logits.float()
        row_max, token_ids = _largest(logits)
        assert bool(row_max.isfinite().all()), "logits are not numbers: the weights or the KV cache are damaged"
        rows = [i for i, draw in enumerate(draws) if draw.temperature > 0]
        if rows:
            shifted = _pick(logits, rows) - _pick(row_max, rows)[:, None]
            token_ids[rows] = self._draw(shifted, [draws[i] for i in rows])
        return _with_logprobs(logits, token_ids, draws)

    def _draw(self, shifted: Tensor, draws: list[Draw]) -> Tensor:
        """Token ids [rows] of rows with a temperature. `shifted`: [rows, vocab] float32, 0 at the maximum."""
        vocab_size = shifted.shape[1]
        # A temperature that float32 takes for 0 would make 0 / 0 of the maximum.
        smallest = torch.finfo(torch.float32).tiny
        weights = (shifted / _column(shifted, [max(draw.temperature, smallest) for draw in draws])).exp_()
        if any(draw.min_p > 0 for draw in draws):
            weights.masked_fill_(weights < _column(shifted, [draw.min_p for draw in draws]), 0)
        u = torch.tensor([uniform(d.seed, d.position) for d in draws], dtype=torch.float64, device=shifted.device)
        filtered = [i for i, d in enumerate(draws) if 0 < d.top_k < vocab_size or d.top_p < 1]
        if not filtered:
            return _inverse_cdf(weights, u)
        token_ids = torch.empty(len(draws), dtype=torch.int64, device=shifted.device)
        plain = sorted(set(range(len(draws))) - set(filtered))
        if plain:
            token_ids[plain] = _inverse_cdf(weights[plain], u[plain])
        weights, u = _pick(weights, filtered), _pick(u, filtered)
        filters = _Filters.of([draws[i] for i in filtered], weights)
        token_ids[filtered] = _draw_filtered(weights, u, filters, self._width(draws, vocab_size))
        return token_ids

    def _width(self, draws: list[Draw], vocab_size: int) -> int:
        """Candidates to look at first: enough for every top_k."""
        return max(self.num_candidates, *(d.top_k for d in draws if d.top_k < vocab_size), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filters:
    """top_k and top_p of some rows, as tensors [rows]."""

    limit: Tensor  # int64: tokens that pass min_p and top_k, at least 1
    total: Tensor  # float64: weight of all tokens that pass min_p
    top_p: Tensor  # float64
    has_top_k: Tensor  # bool: top_k is what limits

    @classmethod
    def of(cls, draws: list[Draw], weights: Tensor) -> _Filters:
        num_passing = (weights > 0).sum(dim=-1)
        top_k = torch.tensor([d.top_k if d.top_k > 0 else weights.shape[1] for d in draws], device=weights.device)
        return cls(
            limit=torch.minimum(num_passing, top_k),
            total=_blocks(weights)[1].sum(dim=-1),
            top_p=torch.tensor([d.top_p for d in draws], dtype=torch.float64, device=weights.device),
            has_top_k=top_k < num_passing,
        )

    def __getitem__(self, rows: Tensor) -> _Filters:
        return _Filters(
            limit=self.limit[rows],
            total=self.total[rows],
            top_p=self.top_p[rows],
            has_top_k=self.has_top_k[rows],
        )


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row and the lowest column that has it; NaN where there is one.

    By blocks: torch finds a maximum ten times as fast where it need not say where it is.
    """
    num_columns = logits.shape[1]
    if num_columns % _BLOCK:
        logits = torch.nn.functional.pad(logits, (0, -num_columns % _BLOCK), value=-math.inf)
    blocks = logits.unflatten(1, (-1, _BLOCK))
    row_max, block = blocks.amax(dim=-1).max(dim=-1)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block]
    return row_max, block * _BLOCK + inside.argmax(dim=-1)


def _draw_filtered(weights: Tensor, u: Tensor, filters: _Filters, width: int) -> Tensor:
    """Token ids [rows], from the `width` heaviest tokens, or from more in rows where these do not decide."""
    width = min(width, weights.shape[1])
    heaviest, candidates = _ranked(weights, width)
    running = heaviest.cumsum(dim=-1, dtype=torch.float64)
    last_allowed = (filters.limit - 1).clamp(max=width - 1)[:, None]
    total = torch.where(filters.has_top_k, running.gather(1, last_allowed)[:, 0], filters.total)
    target = torch.where(filters.top_p < 1, filters.top_p * total, math.inf)
    # Tokens are kept up to the first that reaches the target.
    num_kept = torch.minimum((running < target[:, None]).sum(dim=-1) + 1, filters.limit).clamp(max=width)
    is_kept = torch.arange(width, device=weights.device) < num_kept[:, None]
    by_id, order = candidates.sort(dim=-1)
    token_ids = by_id.gather(1, _inverse_cdf((heaviest * is_kept).gather(1, order), u)[:, None])[:, 0]
    # Tokens that were not looked at may belong to the kept ones, or come before the last of them by id.
    last_kept = heaviest.gather(1, num_kept[:, None] - 1)[:, 0]
    is_open = last_kept <= heaviest[:, -1]
    if width < weights.shape[1] and bool(is_open.any()):
        token_ids[is_open] = _draw_filtered(weights[is_open], u[is_open], filters[is_open], width * 16)
    return token_ids


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The column [rows] at which the running sum of `weights` [rows, columns] first exceeds u x their sum.

    Never a column of weight 0. In two steps, the block of columns and then the column in it, since a running
    sum over all columns costs many times a plain sum.
    """
    blocks, sums = _blocks(weights)
    after = sums.cumsum(dim=-1)
    target = (u * after[:, -1])[:, None]
    block = torch.searchsorted(after, target, right=True)
    before = torch.where(block > 0, after.gather(1, (block - 1).clamp(min=0)), 0)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]]
    running = before + inside.cumsum(dim=-1, dtype=torch.float64)
    column = torch.searchsorted(running, target, right=True)
    # The two sums round differently: at the very end of a block the second may never exceed the target.
    last = ((inside > 0) * torch.arange(_BLOCK, device=blocks.device)).amax(dim=-1, keepdim=True)
    return (block * _BLOCK + torch.minimum(column, last))[:, 0]


def _blocks(weights: Tensor) -> tuple[Tensor, Tensor]:
    """`weights` [rows, columns] cut into [rows, blocks, _BLOCK], and each block's sum as float64.

    A block is summed in float32, which rounds no worse than the weights themselves are rounded, and without a
    float64 copy of the whole.
    """
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    return blocks, blocks.sum(dim=-1).double()


def _ranked(values: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` largest values of each row and their columns, [rows, num] each. `values`: [rows, columns].

    Descending, equal ones by column. Which of those equal to the last are in is left open, as in `topk`.
    """
    columns = values.topk(num, dim=-1, sorted=False).indices.sort(dim=-1).values
    largest, order = values.gather(1, columns).sort(dim=-1, descending=True, stable=True)
    return largest, columns.gather(1, order)


def _top(values: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """As `_ranked`, with nothing left open: equal ones are taken in order of column."""
    width = num + 64
    while width < values.shape[1]:
        largest, columns = _ranked(values, width)
        if bool((largest[:, num - 1] > largest[:, -1]).all()):
            return largest[:, :num], columns[:, :num]
        width *= 16
    largest, columns = values.sort(dim=-1, descending=True, stable=True)
    return largest[:, :num], columns[:, :num]


def _with_logprobs(logits: Tensor, token_ids: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
    chosen = token_ids.tolist()
    tokens = [SampledToken(token_id=token_id) for token_id in chosen]
    rows = [i for i, draw in enumerate(draws) if draw.logprobs is not None]
    if not rows:
        return tokens
    logprobs = _pick(logits, rows).log_softmax(dim=-1)
    of_chosen = logprobs.gather(1, token_ids[rows, None])[:, 0].tolist()
    top, top_ids = _top(logprobs, max(1, *(draws[i].logprobs or 0 for i in rows)))
    for row, value, values, ids in zip(rows, of_chosen, top.tolist(), top_ids.tolist(), strict=True):
        num = draws[row].logprobs
        tokens[row] = SampledToken(
            token_id=chosen[row], logprob=value, top_logprobs=tuple(zip(ids[:num], values[:num], strict=True))
        )
    return tokens


def _pick(rows_of: Tensor, rows: list[int]) -> Tensor:
    """Some rows, in ascending order; without a copy where these are all."""
    return rows_of if len(rows) == len(rows_of) else rows_of[rows]


def _column(like: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
