"""Two processes against one on the joined batch: loss and every gradient."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast.training import join_processes

ITEMS, LEVELS, WORLD = 15, 3, 2
# Shared items across the halves, repeats within them, halves of unequal size.
IDS = torch.tensor([[0, 0, 3, 2, 5], [1, 4, 4, 5, 9], [0, 5, 1, 1, 2], [6, 2, 7, 3, 3], [0, 0, 0, 8, 1]])
SPLIT = 2


def make(loss):
    torch.manual_seed(3)
    config = CrossanConfig(
        [Modality("text", 12, LEVELS), Modality("image", 20, LEVELS)],
        bottleneck=4,
        embedding_dim=8,
        window=4,
        dropout=0.0,
        loss=loss,
        id_embedding=loss == "in_batch",
    )
    model = CrossanModel(config)
    model.set_popularity(torch.arange(ITEMS + 1))
    states = {m.name: torch.randn(ITEMS + 1, LEVELS, m.width) for m in config.modalities}
    for state in states.values():
        state[0] = 0
    return model, HiddenStateCache.from_tensors(states)


def worker(rank, port, loss, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_processes("cpu") as processes:  # it keeps the group, without which leaving may hang
        model, cache = make(loss)
        model.process_group = processes.group
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        out = wrapped(IDS[:SPLIT] if rank == 0 else IDS[SPLIT:], cache=cache)
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        total = processes.sum(out.loss.detach().clone())
        torch.save((total / WORLD, gradients), Path(folder) / f"{rank}.pt")


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss", ["in_batch", "full"])
def test_two_processes_equal_one_on_the_joined_batch(loss, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, loss, str(tmp_path)), nprocs=WORLD)
    model, cache = make(loss)
    out = model(IDS, cache=cache)
    out.loss.backward()
    for rank in range(WORLD):
        value, gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(value, out.loss.detach(), rtol=1e-6, atol=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
