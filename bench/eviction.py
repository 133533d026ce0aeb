"""What a prefix cache makes of ShareGPT conversations."""

from __future__ import annotations

import argparse
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

from anchortp.bench.sharegpt import conversations
from anchortp.engine.api import EngineRequest, SampledToken, SamplingParams
from anchortp.engine.blocks import BlockPool, extend_block_hashes
from anchortp.engine.scheduler import Scheduler


def eviction(
    folder: Path,
    options: argparse.Namespace,
    num_conversations: int = 120,
    max_tokens: int = 2000,
    block_size: int = 16,
) -> dict[str, Any]:
    """Turns of many conversations interleaved at random, each with its whole history as the prompt, through the
    real scheduler and block pool with half the blocks that all of them need."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = random.Random(0)
    sessions = []
    for turns in conversations():
        ids = [tokenizer.encode(turn).ids for turn in turns]
        if sum(map(len, ids)) <= max_tokens and len(ids) >= 4:
            sessions.append(ids)
        if len(sessions) == num_conversations:
            break
    prompts = interleaved(sessions, rng)
    working_set = sum(-(-sum(map(len, ids)) // block_size) for ids in sessions)
    num_blocks = working_set // 2
    pool = BlockPool(num_blocks, block_size)
    scheduler = Scheduler(pool, max_num_seqs=1, max_batch_tokens=512, max_model_len=max_tokens + 2, max_waiting=1)
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        scheduler.add(EngineRequest(request_id=str(index), prompt_token_ids=tuple(prompt), params=params))
        while (batch := scheduler.schedule()) is not None:
            sampled = {seq.request_id: SampledToken(token_id=1) for seq in batch.seqs if seq.sample}
            scheduler.postprocess(batch, sampled, ())
    asked = sum(map(len, prompts))
    return {
        "num_conversations": len(sessions),
        "num_turns": len(prompts),
        "working_set_blocks": working_set,
        "num_blocks": num_blocks,
        "evicted_blocks": pool.num_evicted_blocks,
        "hit_rate": pool.num_hit_tokens / asked,
        "ideal_hit_rate": ideal_hits(prompts, num_blocks, block_size) / asked,
    }


def interleaved(sessions: list[list[list[int]]], rng: random.Random) -> list[list[int]]:
    """One prompt per human turn: all tokens of the conversation up to it. Which session speaks next is random."""
    left = {index: 1 for index in range(len(sessions))}
    prompts = []
    while left:
        index = rng.choice(list(left))
        turns = sessions[index]
        prompts.append([token for turn in turns[: left[index]] for token in turn])
        left[index] += 2
        if left[index] > len(turns):
            del left[index]
    return prompts


def ideal_hits(prompts: list[list[int]], num_blocks: int, block_size: int) -> int:
    """Tokens found by an ideal LRU cache of blocks: a plain ordered dictionary of contents.

    The last token of a prompt is always computed. While a prompt is computed its own blocks cannot go; when it
    is done its first block counts as used last, so that the beginning of a prefix outlives its end. The last,
    unfinished block takes a place too.
    """
    cache: OrderedDict[bytes, None] = OrderedDict()
    hits = 0
    for prompt in prompts:
        hashes: list[bytes] = []
        extend_block_hashes(hashes, prompt, block_size)
        found = 0
        while found < len(hashes) and (found + 1) * block_size < len(prompt) and hashes[found] in cache:
            found += 1
        hits += found * block_size
        needed = -(-len(prompt) // block_size) - found
        own = set(hashes[:found])
        while len(cache) + needed > num_blocks:
            cache.pop(next(key for key in cache if key not in own))
        for key in reversed(hashes):
            cache[key] = None
            cache.move_to_end(key)
    return hits
