"""Histories: a batch of users' items in order, jagged, with when and what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import _CHECK_CONTENT, _fail


@dataclass(frozen=True, eq=False)
class Histories:
    """Items of B users, oldest first, back to back.

    - `items`: int64 `[T]`; `seq_offsets`: int64 `[B + 1]`: user b has rows `seq_offsets[b]` to `seq_offsets[b + 1]`.
    - `timestamps`: int64 `[T]`, seconds, or None. `actions`: int64 `[T]`, what was done with the item, or None.

    Errors: TypeError or ValueError naming the argument, on CPU also for the content of seq_offsets.

        >>> histories = Histories.from_lists([[5, 2, 9], [7, 5]])
        >>> len(histories), histories.lengths
        (2, tensor([3, 2]))
    """

    items: Tensor
    seq_offsets: Tensor
    timestamps: Tensor | None = None
    actions: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("items", "seq_offsets"):
            if not isinstance(getattr(self, name), Tensor):
                _fail(name, "an int64 tensor", getattr(self, name), TypeError)
        if self.items.dim() != 1 or self.items.is_floating_point():
            _fail("items", "int64 [T]", self.items)
        total, offsets = len(self.items), self.seq_offsets
        if offsets.dim() != 1 or len(offsets) < 1:
            _fail("seq_offsets", "shape [B + 1]", offsets)
        for name in ("timestamps", "actions"):
            x = getattr(self, name)
            if x is not None and len(x) != total:
                _fail(name, f"{total} entries, one for each item", x)
        if not _content_is_checked(offsets):
            return
        if offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any():
            _fail("seq_offsets", f"numbers that rise from 0 to {total}, the number of items", offsets.tolist())

    @staticmethod
    def from_lists(
        items: Sequence[Sequence[int]],
        timestamps: Sequence[Sequence[int]] | None = None,
        actions: Sequence[Sequence[int]] | None = None,
    ) -> Histories:
        """From one list (or tensor) a user. ValueError where timestamps or actions have other lengths than items."""
        lengths = [len(x) for x in items]

        def flat(name: str, lists: Sequence[Sequence[int]] | None) -> Tensor | None:
            if lists is None:
                return None
            if [len(x) for x in lists] != lengths:
                _fail(name, f"lists of {lengths} numbers, one for each item", [len(x) for x in lists])
            return _cat(lists)

        offsets = torch.tensor([0, *lengths]).cumsum(0)
        return Histories(_cat(items), offsets, flat("timestamps", timestamps), flat("actions", actions))

    def __len__(self) -> int:
        return len(self.seq_offsets) - 1

    @property
    def lengths(self) -> Tensor:
        return self.seq_offsets.diff()

    @property
    def sequence(self) -> Tensor:
        """Which user each row belongs to: int64 `[T]`."""
        return _owners(self.seq_offsets[1:], len(self.items))

    def to(self, device: torch.device | str) -> Histories:
        columns = (self.items, self.seq_offsets, self.timestamps, self.actions)
        return Histories(*(None if x is None else x.to(device, non_blocking=True) for x in columns))

    def rows(self, rows: Tensor, lengths: Tensor) -> Histories:
        """The given rows `[T']` with new lengths `[B']`, such as those of `stochastic_length`."""
        offsets = torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))
        columns = (None if x is None else x[rows] for x in (self.timestamps, self.actions))
        return Histories(self.items[rows], offsets, *columns)

    def users(self, users: Tensor) -> Histories:
        """The histories of the given users, int64 `[B']`."""
        begin, lengths = self.seq_offsets[:-1][users], self.lengths[users]
        return self.rows(_ranges(begin, lengths, int(lengths.sum())), lengths)

    def recent(self, most: int) -> Histories:
        """The last `most` items of each user."""
        lengths = self.lengths.clamp(max=most)
        return self.rows(_ranges(self.seq_offsets[1:] - lengths, lengths, int(lengths.sum())), lengths)

    def split_last(self) -> tuple[Histories, Tensor]:
        """Histories without their last item, and for each of the rows left the row of `self` that comes next.

        Every user needs an item: ValueError if one has none (on other devices than the CPU, which are not waited for,
        with `HSTU_OPS_CHECK=1` alone).
        """
        lengths = self.lengths - 1
        if _content_is_checked(lengths) and (lengths < 0).any():
            _fail("histories", "an item of every user", f"none of user {int((lengths < 0).nonzero()[0])}")
        rows = _ranges(self.seq_offsets[:-1], lengths, max(len(self.items) - len(self), 0))
        rows = rows.clamp(0, max(len(self.items) - 2, 0))  # whatever the offsets are
        return self.rows(rows, lengths), rows + 1

    def append(self, candidates: Histories) -> Histories:
        """Each user's items followed by those of `candidates`, another batch of the same users."""
        a, b = self, candidates
        at_a = torch.arange(len(a.items), device=a.items.device) + b.seq_offsets[a.sequence]
        at_b = torch.arange(len(b.items), device=a.items.device) + a.seq_offsets[1:][b.sequence]

        def join(x: Tensor | None, y: Tensor | None) -> Tensor | None:
            if x is None or y is None:
                return None
            return x.new_empty(len(x) + len(y)).index_put((at_a,), x).index_put((at_b,), y)

        columns = (join(getattr(a, x), getattr(b, x)) for x in ("timestamps", "actions"))
        return Histories(join(a.items, b.items), a.seq_offsets + b.seq_offsets, *columns)


def _cat(lists: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.as_tensor(x, dtype=torch.int64) for x in lists)])


def _content_is_checked(x: Tensor) -> bool:
    return (x.is_cpu or _CHECK_CONTENT) and not torch.compiler.is_compiling()


def _owners(ends: Tensor, total: int) -> Tensor:
    """For each of `total` rows the first b whose `ends[b]` is behind it; no content leads outside of [0, B)."""
    rows = torch.arange(total, device=ends.device)
    return torch.searchsorted(ends.contiguous(), rows, right=True).clamp(max=max(len(ends) - 1, 0))


def _ranges(begin: Tensor, lengths: Tensor, total: int) -> Tensor:
    """`begin[b], begin[b] + 1, ...` for each b, `lengths[b]` of them, back to back; total is their number."""
    ends = lengths.cumsum(0)
    return (begin - ends + lengths)[_owners(ends, total)] + torch.arange(total, device=begin.device)
