"""Tokens: requests, blocks, scheduler, sampler, worker, controller."""
