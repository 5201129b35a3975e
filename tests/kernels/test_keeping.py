"""Pairs in slots against a slow definition, and the room that there is for them from step to step."""

import pytest
import torch

from endwise.kernels import Pairs, Rooms
from endwise.kernels.interface import Found, HeldPairs
from endwise.kernels.keeping import kept_of, largest_of_rows
from endwise.kernels.scan import kept_per_row

N, F = 9, 12


def every_place(values):
    places = torch.arange(values.numel())
    return Pairs(places // F, places % F, torch.arange(len(values)) * F, F), values.view(-1)


def some_values(seed=0):
    values = torch.randn(N, F, generator=torch.Generator().manual_seed(seed))
    values[[0, 4, N - 1]] = -1.0  # rows without any
    return values


@pytest.mark.parametrize("spare", [0, 1, 5, 40])
def test_kept_pairs_lie_in_order_with_pads_dealt_out_behind_those_of_each_row(spare):
    values = some_values()
    wanted = values > 0
    room = int(wanted.sum()) + spare
    found = kept_of(*every_place(values), wanted.view(-1), room)
    pairs, real = found.pairs, ~found.pairs.pads
    assert torch.equal(torch.stack([pairs.rows[real], pairs.features[real]]), wanted.nonzero().T)
    assert torch.equal(found.values[real], values[wanted]) and not found.values[~real].any()
    assert len(pairs.rows) == len(pairs.features) == len(found.values) == room and int((~real).sum()) == spare
    places = pairs.rows * F + pairs.features
    assert torch.equal(places, places.sort().values)  # as all who go through the pairs of a row rely on
    assert pairs.row_starts.tolist() == [int((pairs.rows < row).sum()) for row in range(N)]
    of_rows = torch.bincount(pairs.rows[~real], minlength=N)
    assert of_rows.max() - of_rows.min() <= 1
    order, rows, starts = pairs.by_feature
    assert torch.equal(rows, pairs.rows[order])
    ends = [*starts.tolist()[1:], room]
    for feature, (start, end) in enumerate(zip(starts.tolist(), ends, strict=True)):
        own = order[start:end]
        assert set(pairs.features[own][real[own]].tolist()) <= {feature}
    dealt = torch.tensor([int((~real[order[start:end]]).sum()) for start, end in zip(starts, ends, strict=True)])
    assert dealt.max() - dealt.min() <= 1


@pytest.mark.parametrize("room", [0, 1, 7])
def test_what_has_no_room_is_missing_and_nothing_else_is_there(room):
    values = some_values()
    found = kept_of(*every_place(values), (values > 0).view(-1), room)
    pairs, real = found.pairs, ~found.pairs.pads
    assert len(found.values) == room and pairs.row_starts.max() <= room
    assert torch.equal(found.values[real], values[pairs.rows[real], pairs.features[real]])


def test_largest_of_rows_are_those_of_each_row():
    values = some_values()
    values[1, :6] = 0.7  # of equal ones the first
    values[2, 3] = torch.nan
    values[3, [2, 5, 7, 8]] = torch.nan
    for k in (1, 3, F):
        expected = kept_per_row(values, k) & ((values > 0) | values.isnan())
        assert torch.equal(largest_of_rows(*every_place(values), k).view(N, F), expected)


def test_room_follows_what_was_needed():
    none = Found(*every_place(torch.zeros(0, F)))

    class Plain(Rooms):
        head, least = 1.5, 10

    rooms, given = Plain(), []

    def step(*passes, missing=False):
        """Candidates and pairs of each pass."""
        found = []
        for candidates, pairs in passes:

            def held(room, needed=(candidates, pairs)):
                given.append(room)
                return HeldPairs(none, torch.tensor([needed[0], min(needed[1], room.candidates)]))

            found.append(rooms.find(1000, held) is not None)
            if found[-1]:
                rooms.note_missing(torch.tensor(missing))
        return found, rooms.settle(), given[-1]

    assert step((400, 100)) == ([True], False, (610, 160))
    assert given == [(0, 0), (400, 0), (610, 160)]  # of a first pass candidates are counted, then pairs
    assert step((300, 160), (400, 120)) == ([True, True], False, (610, 160))  # the greatest of the passes
    assert step((400, 251)) == ([True], True, (610, 250))
    assert step((400, 251)) == ([True], False, (610, 386))
    assert step((611, 100)) == ([True], True, (610, 386))
    assert step((611, 100)) == ([True], False, (926, 1000))  # how many of them are pairs was not known
    assert step((2001, 100)) == ([True], True, (926, 160))
    assert step((2001, 100)) == ([False], False, (0, 0))  # too many candidates
    assert step((900, 100)) == ([False], False, (0, 0))
    assert step((900, 1001)) == ([True], True, (1360, 1000))
    assert step((900, 1001)) == ([False], False, (0, 0))  # too many pairs
    assert step((900, 100)) == ([True], False, (1360, 1000))
    assert step((900, 100), missing=True) == ([True], True, (1360, 160))  # the step is dense
    assert step((900, 100), missing=True) == ([False], False, (0, 0))
    assert step((900, 100)) == ([True], False, (1360, 1000))
    assert rooms.find(1000, lambda room: None) is None
    many = HeldPairs(none, torch.tensor([201, 5]))
    assert rooms.find(100, lambda room: many) is None and not rooms.settle()  # passes of another size
    assert step((900, 100)) == ([True], False, (1360, 160))
