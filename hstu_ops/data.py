"""What `python -m hstu_ops train` trains on: the synthetic stream of the HSTU paper, or a MovieLens ratings file."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .histories import Histories


@dataclass(frozen=True, eq=False)
class Dataset:
    """Histories to train on and to test on; items are 0 to num_items - 1.

    - `stream`: True: `train` is in the order of time, to be read once, and every item of `test` is predicted. False:
      `train` is `test` without each user's last item, and that last item is predicted.
    - `item_ids`: the names of the items in the file, int64 `[num_items]`; None for generated items.
    - `best`: metrics on the test of a model that knows how the data was made; None if nobody knows.
    """

    name: str
    num_items: int
    train: Histories
    test: Histories
    stream: bool
    num_actions: int = 0
    item_ids: Tensor | None = None
    best: dict[str, float] | None = None

    def __str__(self) -> str:
        total = len(self.train.items) + (len(self.test.items) if self.stream else len(self.test))
        users = len(self.train) + (len(self.test) if self.stream else 0)
        return f"{self.name}: {users} {'records' if self.stream else 'users'}, {self.num_items} items, {total} events"


RECORD_LENGTH, MOST_CATEGORIES, INITIAL_SHARE, LARGEST_ALPHA = 128, 5, 0.4, 500.0


def synthetic_stream(
    scale: float = 1.0,
    *,
    num_records: int | None = None,
    num_items: int | None = None,
    num_categories: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The paper's synthetic stream: records of 128 items, whose categories are a Dirichlet process.

    At scale 1: 20,000 items, each of one of 100 categories, and 50,000 records (the paper does not give their number).
    Smaller scales shrink all three by the same factor, so that a category keeps its 200 items. 40 % of the items exist
    from the start, the others are released at equal intervals while the stream goes on. Each record has up to 5
    categories, a prior over them and `alpha ~ U(1, 500)`; its n-th item (n from 0) is of a category drawn from the
    prior with probability `alpha / (alpha + n)`, else of the category of one of the record's earlier items; within its
    category it is any item released so far. The last 10 % of the records are the test.

    Source: Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
    Recommendations", ICML 2024, section 4.1.1 and its appendix on synthetic data.
    """
    if not scale > 0:
        raise ValueError(f"hstu_ops: scale: expected a positive number, got {scale}")
    records = max(10, round(50_000 * scale)) if num_records is None else num_records
    items = max(50, round(20_000 * scale)) if num_items is None else num_items
    categories = max(1, min(items, round(100 * scale))) if num_categories is None else num_categories
    gen = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=gen)

    # Items are numbered in the order of their release; `members` lists those of each category in that order.
    category = torch.randperm(items, generator=gen) % categories
    members = [torch.nonzero(category == c)[:, 0] for c in range(categories)]
    member_table = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=items)
    released = (items * (INITIAL_SHARE + (1 - INITIAL_SHARE) * torch.arange(records) / records)).long()

    slots = min(MOST_CATEGORIES, categories)
    count = torch.randint(1, slots + 1, (records,), generator=gen)
    chosen = uniform(records, categories).topk(slots, dim=1).indices
    prior = uniform(records, slots) * (torch.arange(slots) < count[:, None])
    alpha = 1 + (LARGEST_ALPHA - 1) * uniform(records)
    members_before = torch.zeros(categories, items + 1, dtype=torch.int32)
    members_before[category, torch.arange(items) + 1] = 1
    available = members_before.cumsum(1)[chosen, released[:, None]]

    drawn = torch.empty(records, RECORD_LENGTH, dtype=torch.int64)
    every = torch.arange(records)
    prior_edges = (prior / prior.sum(1, keepdim=True)).cumsum(1)
    for n in range(RECORD_LENGTH):
        fresh = torch.searchsorted(prior_edges, uniform(records, 1))[:, 0].minimum(count - 1)
        if n > 0:
            earlier = drawn[every, (uniform(records) * n).long().clamp(max=n - 1)]
            fresh = torch.where(uniform(records) * (alpha + n) < alpha, fresh, earlier)
        drawn[:, n] = fresh
    row = (uniform(records, RECORD_LENGTH) * available.gather(1, drawn)).long()
    values = member_table[chosen.gather(1, drawn), row]

    histories = Histories(values.flatten(), torch.arange(records + 1) * RECORD_LENGTH)
    split = records - max(1, records // 10)
    train, test = histories.users(torch.arange(split)), histories.users(torch.arange(split, records))
    best = _best_possible(*(x[split:] for x in (prior / prior.sum(1, keepdim=True), alpha, available, drawn)))
    return Dataset(f"synthetic stream, scale {scale:g}", items, train, test, stream=True, best=best)


def _best_possible(prior: Tensor, alpha: Tensor, available: Tensor, drawn: Tensor) -> dict[str, float]:
    """Metrics over all items but the first of each record, of ranking items by their true probability: `[R, slots]`
    priors and released items a category, `[R]` alpha, `[R, n]` the categories drawn.
    """
    seen = torch.nn.functional.one_hot(drawn[:, :-1], prior.shape[1]).cumsum(1)  # before each predicted item
    alpha = alpha[:, None, None]
    share = (alpha * prior[:, None] + seen) / (alpha + torch.arange(1, drawn.shape[1])[:, None])
    size = available[:, None].expand_as(share).clamp(min=1)
    each, order = (share / size).sort(dim=2, descending=True)  # the probability of an item, best category first
    end = size.gather(2, order).cumsum(2)
    begin = end - size.gather(2, order)

    def mean(gain_until: Tensor) -> float:
        """gain_until[x]: the gain of the first x ranks together."""
        last = len(gain_until) - 1
        return ((gain_until[end.clamp(max=last)] - gain_until[begin.clamp(max=last)]) * each).sum(2).mean().item()

    discounted = torch.nn.functional.pad((1 / torch.log2(torch.arange(10) + 2.0)).cumsum(0), (1, 0))
    return {"HR@10": mean(torch.arange(11.0)), "HR@50": mean(torch.arange(51.0)), "NDCG@10": mean(discounted)}


class RatingsError(ValueError):
    """A line of a ratings file that cannot be read; the message has its number."""


def read_ratings(path: str | os.PathLike, *, min_items: int = 3) -> Dataset:
    """MovieLens ratings: each line has a user, an item, a rating and a time in seconds.

    `ratings.dat` (separated by "::"), `u.data` (by tabs) and `ratings.csv` (by commas, with or without a header) are
    told apart by their first line. A user's ratings are put in the order of their times (in that of the file where
    these are equal). Users with fewer than `min_items` are left out. Each distinct rating is an action.

    Errors: RatingsError (a ValueError) naming the first line that does not have the four numbers, or where the file has
    none; OSError.
    """
    users, items, ratings, times = [], [], [], []
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        separator = None
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line:
                continue
            if separator is None:
                separator = next((x for x in ("::", "\t", ",") if x in line), ",")
                if separator == "," and line.replace(" ", "").lower().startswith("userid,"):
                    continue
            fields = line.split(separator)
            try:
                user, item, rating, time = int(fields[0]), int(fields[1]), float(fields[2]), int(float(fields[3]))
                if len(fields) != 4 or not math.isfinite(rating) or not all(abs(x) < 2**63 for x in (user, item, time)):
                    raise ValueError
            except (ValueError, IndexError, OverflowError):
                expected = f"user, item, rating, time separated by {separator!r}"
                raise RatingsError(f"{path}, line {number}: expected {expected}, got {line[:80]!r}") from None
            users.append(user)
            items.append(item)
            ratings.append(rating)
            times.append(time)
    if not users:
        raise RatingsError(f"{path}: expected lines of user, item, rating, time, got none")
    user, item, time = (torch.tensor(x, dtype=torch.int64) for x in (users, items, times))
    rating = torch.tensor(ratings, dtype=torch.float64)

    order = time.argsort(stable=True)
    order = order[user[order].argsort(stable=True)]
    lengths = user.unique(return_counts=True)[1]
    kept = lengths >= max(min_items, 2)
    if not bool(kept.any()):
        raise RatingsError(
            f"{path}: expected a user with {max(min_items, 2)} ratings, got at most {int(lengths.max())}"
        )
    order = order[torch.repeat_interleave(kept, lengths)]
    item_ids, item = item[order].unique(return_inverse=True)
    values, action = rating[order].unique(return_inverse=True)
    offsets = torch.nn.functional.pad(lengths[kept].cumsum(0), (1, 0))
    test = Histories(item, offsets, time[order], action)
    return Dataset(Path(path).name, len(item_ids), test.split_last()[0], test, False, len(values), item_ids)
