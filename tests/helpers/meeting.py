"""Processes of one run as threads that add up their tensors."""

import threading

import torch

from endwise.common.processes import World


class Meeting:
    """So many processes; `sums` counts how often they have added up."""

    def __init__(self, size):
        self.barrier, self.held, self.size, self.sums = threading.Barrier(size), [None] * size, size, 0

    def add(self, rank, tensors):
        self.held[rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait(20)
        totals = [torch.stack(each).sum(0) for each in zip(*self.held, strict=True)]
        self.sums += rank == 0
        self.barrier.wait(20)
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total)

    def run(self, task):
        """Results of the task in each, called with its world."""
        found, errors = [None] * self.size, []

        def one(rank):
            world = World(rank, self.size)
            object.__setattr__(world, "add", lambda tensors: self.add(rank, tensors))
            try:
                found[rank] = task(world)
            except Exception as error:  # noqa: BLE001  Whatever it is, it is reported below.
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        return found


def of_process(world, n):
    """A process's share of n rows."""
    return slice(n * world.rank // world.size, n * (world.rank + 1) // world.size)
