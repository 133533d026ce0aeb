"""The sampler against a slow reference in plain Python, and against distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.engine.sampler import Sampler, uniform


@dataclass(frozen=True, kw_only=True)
class Draw:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    logprobs: int | None = None


def kept_weights(logits, draw):
    """Weight by token id of the tokens that may be drawn, from the definitions, one token after another."""
    largest = max(logits)
    weights = {i: math.exp((x - largest) / draw.temperature) for i, x in enumerate(logits)}
    ranking = sorted(weights, key=lambda i: (-logits[i], i))
    ranking = [i for i in ranking if weights[i] >= draw.min_p and weights[i] > 0]
    if draw.top_k > 0:
        ranking = ranking[: draw.top_k]
    if draw.top_p < 1:
        total, running, kept = sum(weights[i] for i in ranking), 0.0, []
        for i in ranking:
            if not kept or running < draw.top_p * total:
                kept.append(i)
            running += weights[i]
        ranking = kept
    return {i: weights[i] for i in sorted(ranking)}


def reference(logits, draw, u):
    if draw.temperature == 0:
        return logits.index(max(logits))
    weights = kept_weights(logits, draw)
    target, running = u * sum(weights.values()), 0.0
    for i, weight in weights.items():
        running += weight
        if running > target:
            return i
    return i


def draw_ids(logits, draws, **options):
    return [token.token_id for token in Sampler(**options).sample(logits, draws)]


draws = st.builds(
    Draw,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 17, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.0, 0.21, 0.5, 0.93, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.0101, 0.203, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 100_000),
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(draws, min_size=1, max_size=6),
    vocab_size=st.sampled_from([1, 2, 7, 300, 1000]),
    num_candidates=st.sampled_from([1, 4, 64, 256]),
    num_levels=st.sampled_from([2, 5, 10**6]),  # few levels: most logits are tied
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_equals_the_slow_reference(rows, vocab_size, num_candidates, num_levels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, num_levels, (len(rows), vocab_size), generator=generator) / num_levels * 8
    got = draw_ids(logits, rows, num_candidates=num_candidates)
    for row, draw, token_id in zip(logits.tolist(), rows, got, strict=True):
        u = uniform(draw.seed, draw.position)
        # float32 moves borders by about 1e-7, so a number that close to one may fall on either side.
        allowed = set()
        for nudge in (-1e-6, 0.0, 1e-6):
            nudged = replace(draw, top_p=draw.top_p + nudge if draw.top_p < 1 else 1.0)
            allowed |= {reference(row, nudged, min(max(u + shift, 0.0), 1.0)) for shift in (-1e-6, 0, 1e-6)}
        assert token_id in allowed
        assert len(allowed) <= 3


@pytest.mark.parametrize(
    "draw",
    [
        Draw(),
        Draw(temperature=0.5),
        Draw(top_k=5),
        Draw(top_p=0.8),
        Draw(min_p=0.1),
        Draw(temperature=1.7, top_k=9, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(draw):
    """Chi-square over 20,000 positions of one seed; chance exceeds the bound once in a million times."""
    num_draws, vocab_size = 20_000, 12
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 1.5
    rows = [replace(draw, seed=77, position=position) for position in range(num_draws)]
    counts = torch.tensor(draw_ids(logits.expand(num_draws, -1), rows)).bincount(minlength=vocab_size).tolist()
    weights = kept_weights(logits.tolist(), draw)
    total = sum(weights.values())
    assert all(count == 0 for i, count in enumerate(counts) if i not in weights)
    expected = {i: num_draws * weight / total for i, weight in weights.items()}
    statistic = sum((counts[i] - e) ** 2 / e for i, e in expected.items())
    freedom = len(weights) - 1
    # Wilson-Hilferty: the cube root of chi-square / freedom is close to normal; 4.75 sigma is 1e-6.
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 4.75 * spread**0.5) ** 3


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_uniform_numbers_are_uniform_and_uncorrelated(vary):
    numbers = torch.tensor(
        [uniform(i, 5) if vary == "seed" else uniform(5, i) for i in range(50_000)], dtype=torch.float64
    )
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = (numbers * 100).long().bincount(minlength=100)
    assert ((counts - 500) ** 2 / 500).sum() < 181  # chi-square, 99 degrees of freedom, 1e-6
    centred = numbers - 0.5
    for lag in (1, 2, 7):
        correlation = (centred[lag:] * centred[:-lag]).mean() * 12
        assert abs(correlation) < 5 / 50_000**0.5


def test_uniform_numbers_are_the_same_everywhere():
    # Literals: a request must go on with the same tokens in another process, release or machine.
    assert [uniform(*args) for args in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 12345))] == [
        0.6524484863740322,
        0.7012121095215252,
        0.36818951565166946,
        0.1450707396536649,
    ]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(draws, min_size=2, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    num_candidates=st.sampled_from([1, 16, 256]),
)
def test_a_row_is_drawn_alike_in_every_batch(rows, seed, num_candidates):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(rows), 515, generator=generator) * 3).bfloat16()
    together = draw_ids(logits, rows)
    alone = [draw_ids(logits[i : i + 1], [row], num_candidates=num_candidates)[0] for i, row in enumerate(rows)]
    assert together == alone
    assert together == draw_ids(logits.flip(0), rows[::-1])[::-1]


def test_seed_and_position_both_matter():
    logits = torch.zeros(1, 1000).expand(100, -1)
    by_position = draw_ids(logits, [Draw(seed=1, position=i) for i in range(100)])
    by_seed = draw_ids(logits, [Draw(seed=i, position=1) for i in range(100)])
    assert len(set(by_position)) > 80 and len(set(by_seed)) > 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_id_of_the_likeliest(dtype):
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [7.0, 1.0, 7.0, 7.0]], dtype=dtype)
    assert draw_ids(logits, [Draw(temperature=0.0)] * 2) == [1, 0]
    # ... and so does every filter that leaves one token.
    for draw in (Draw(top_k=1), Draw(top_p=0.0), Draw(top_k=1, top_p=0.5, temperature=3.0)):
        assert draw_ids(logits, [draw] * 2) == [1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-50])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)) * 5
    rows = [Draw(temperature=temperature, seed=i) for i in range(4)]
    assert draw_ids(logits, rows) == logits.argmax(dim=-1).tolist()


def test_tokens_of_no_probability_are_never_drawn():
    logits = torch.full((200, 700), -math.inf)
    logits[:, 300:303] = 0.0
    for filters in ({}, {"top_k": 100}, {"top_p": 0.999}, {"min_p": 0.5}):
        rows = [Draw(position=i, **filters) for i in range(200)]
        assert set(draw_ids(logits, rows)) == {300, 301, 302}


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("vocab_size", [3, 256, 257, 49152])
def test_the_ends_of_the_unit_interval(monkeypatch, u, vocab_size):
    """The extremes select the first and the last token that has any probability, whatever the rounding."""
    monkeypatch.setattr("anchortp.engine.sampler.uniform", lambda seed, position: u)
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(1))
    logits[:, 0] = logits[:, -1] = -math.inf
    logits[:, 1] = logits[:, -2] = 3.0
    wanted = 1 if u == 0 else vocab_size - 2
    assert draw_ids(logits, [Draw(), Draw(top_k=vocab_size - 1), Draw(min_p=1e-6)]) == [wanted] * 3


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_damaged_logits_are_noticed(damage):
    logits = torch.zeros(2, 10)
    logits[1, 4] = damage
    with pytest.raises(AssertionError, match="damaged"):
        draw_ids(logits, [Draw(temperature=0.0)] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_unmodified_logits(dtype):
    logits = (torch.randn(5, 400, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    rows = [
        Draw(logprobs=None),
        Draw(logprobs=0, temperature=0.0),
        Draw(logprobs=3, temperature=0.5, top_k=4),
        Draw(logprobs=20, top_p=0.5),
        Draw(logprobs=1000),
    ]
    expected = torch.log_softmax(logits.float(), dim=-1)
    tokens = Sampler().sample(logits, rows)
    assert tokens[0].logprob is None and tokens[0].top_logprobs == ()
    for i in range(1, 5):
        assert tokens[i].logprob == pytest.approx(expected[i, tokens[i].token_id].item(), abs=1e-5)
        ranking = sorted(range(400), key=lambda j, row=expected[i]: (-row[j].item(), j))
        wanted = ranking[: rows[i].logprobs]
        assert [token_id for token_id, _ in tokens[i].top_logprobs] == wanted
        values = [value for _, value in tokens[i].top_logprobs]
        assert values == pytest.approx([expected[i, j].item() for j in wanted], abs=1e-5)


@pytest.mark.parametrize("num_above", [1, 66])
def test_tied_top_logprobs_go_by_token_id_however_many_are_tied(num_above):
    above = list(range(20_000 - num_above, 20_000))
    logits = torch.zeros(1, 20_000)
    logits[0, above] = 1.0
    (token,) = Sampler().sample(logits, [Draw(temperature=0.0, logprobs=num_above + 3)])
    assert [token_id for token_id, _ in token.top_logprobs] == [*above, 0, 1, 2]


@pytest.mark.parametrize("u, token_id", [(0.0, 0), (0.25, 128), (0.5, 256), (0.5 - 2.0**-53, 255)])
def test_a_number_on_a_border_belongs_to_the_token_after_it(monkeypatch, u, token_id):
    monkeypatch.setattr("anchortp.engine.sampler.uniform", lambda seed, position: u)
    assert draw_ids(torch.zeros(1, 512), [Draw()]) == [token_id]


def test_top_p_stops_at_the_token_that_reaches_it():
    rows = [Draw(top_p=0.5, position=i) for i in range(100)]
    assert set(draw_ids(torch.zeros(100, 4), rows)) == {0, 1}


def test_the_callers_logits_are_left_as_they_were():
    logits = torch.randn(3, 50)
    before = logits.clone()
    Sampler().sample(logits, [Draw(), Draw(top_p=0.5), Draw(min_p=0.3, logprobs=2)])
    assert torch.equal(logits, before)


def test_no_rows():
    assert Sampler().sample(torch.empty(0, 50), []) == []
