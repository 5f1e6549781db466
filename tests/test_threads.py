"""Meter, ops and graph switches belong to a thread: several decode side by side, and each gets what it gets alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

import kvsieve
from kvsieve import graph, make_policy, ops, transfer
from tests.models import random_prompts, tiny_llama

POLICIES = [
    make_policy("dense"),
    make_policy("sparq", r=3, k=8, local=2),
    make_policy("h2o", budget=10, recent=3),
    make_policy("local_window", budget=10, sinks=2),
]


def measured(model, policy, seed):
    with transfer.measure() as meter:
        tokens = list(kvsieve.decode(model, random_prompts(24, 17, seed=seed), policy, max_new_tokens=12))
    return torch.stack(tokens), meter.by_kind, meter.written, meter.steps


def test_four_threads_with_a_meter_each_count_what_they_count_alone():
    model = tiny_llama()
    alone = [measured(model, policy, seed) for seed, policy in enumerate(POLICIES)]
    together = threading.Barrier(4)

    def work(seed):
        together.wait()
        return measured(model, POLICIES[seed], seed)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for (tokens, *counts), (wanted, *counted) in zip(found, alone, strict=True):
        assert torch.equal(tokens, wanted)
        assert counts == counted


def test_a_switch_in_one_thread_is_not_seen_by_another():
    cpu = torch.device("cpu")

    def seen():
        return ops.implementation(cpu).__name__, transfer.current(), graph._wanted.capture

    outside = seen()
    with ops.use("reference"), transfer.measure(), graph.capturing(False), ThreadPoolExecutor(1) as pool:
        assert seen() != outside
        assert pool.submit(seen).result() == outside
