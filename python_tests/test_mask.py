"""The mask of the C++ core, which every kernel uses, against a predicate written from the table of the specification.

Every option in every combination for lengths up to 18. Options larger than the history behave like the history's length
plus one, which is the largest value tried.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from checks import keep

from hstu_ops import _core, reference

_LONGEST = 18
# Columns of the option arrays.
_TARGETS, _CONTEXT, _CAUSAL, _GROUP, _WINDOW, _MIN_FULL, _PREFIX = range(7)


def _every_option(length: int, targets: int, context: int) -> np.ndarray:
    """All windows, tails, prefixes and directions, int32 [K, 7]; group widths 1 to 5 in turn."""
    sizes = range(length - targets + 2)
    rows = [
        (targets, context, causal, 1 + index % 5, window, min_full, prefix)
        for index, (causal, window, min_full, prefix) in enumerate(itertools.product((0, 1), sizes, sizes, sizes))
    ]
    return np.array(rows, dtype=np.int32)


def _kept(length: int, options: np.ndarray) -> np.ndarray:
    """checks.keep for all pairs of many masks at once: bool [K, length, length]."""
    t, c, causal, group, window, min_full, prefix = (options[:, x, None, None] for x in range(7))
    i, j = np.arange(length)[None, :, None], np.arange(length)[None, None, :]
    h = length - t
    c = np.minimum(c, h)
    pos_i, pos_j = (np.maximum(np.minimum(x, h) - np.maximum(c - 1, 0), 0) for x in (i, j))
    in_window = (
        (window == 0) | (np.abs(pos_i - pos_j) <= window) | (j < prefix) | ((min_full > 0) & (i >= h - min_full))
    )
    of_history = (i < c) | (in_window & ((j <= i) | (causal == 0)))
    of_group = (i >= h) & (j <= i) & ((i - h) // group == (j - h) // group)
    return np.where(j < h, of_history, of_group)


def _random_options(count: int, rng: random.Random) -> list[tuple[int, np.ndarray]]:
    def draw() -> tuple[int, list[int]]:
        length = rng.randint(1, _LONGEST)
        targets = rng.randint(0, length)
        h = length - targets
        sizes = [rng.randint(0, h + 1) * rng.randint(0, 1) for _ in range(4)]
        return length, [targets, sizes[0], rng.randint(0, 1), rng.randint(1, 6), *sizes[1:]]

    return [(length, np.array([option], dtype=np.int32)) for length, option in (draw() for _ in range(count))]


def _keywords(option: np.ndarray) -> dict:
    names = ("num_targets", "contextual_seq_len", "causal", "target_group_size", "max_attn_len")
    values = dict(zip((*names, "min_full_attn_seq_len", "global_prefix_len"), option.tolist(), strict=True))
    return {**values, "causal": bool(values["causal"])}


@pytest.mark.parametrize("length", range(_LONGEST + 1))
def test_elements(length):
    for targets in range(length + 1):
        for context in range(length - targets + 2):
            options = _every_option(length, targets, context)
            got, want = _core.mask_matrices(length, options), _kept(length, options)
            if not np.array_equal(got, want):
                k, i, j = np.argwhere(got != want)[0]
                pytest.fail(f"length {length}, {_keywords(options[k])}: keep({i}, {j}) is {got[k, i, j]}")


@pytest.mark.parametrize("length", range(1, _LONGEST + 1))
def test_target_groups(length):
    """Every group width with every number of targets."""
    options = np.array(
        [
            (targets, context, 1, group, window, 0, 0)
            for targets in range(length + 1)
            for group in range(1, targets + 2)
            for context, window in ((0, 0), (2, 0), (0, 3), (3, 1))
        ],
        dtype=np.int32,
    )
    assert np.array_equal(_core.mask_matrices(length, options), _kept(length, options))


def test_the_vectorised_predicate_is_the_scalar_one():
    for length, options in _random_options(400, random.Random(1)):
        (option,) = options
        rules = {
            "causal": bool(option[_CAUSAL]),
            "group": option[_GROUP],
            "window": option[_WINDOW],
            "min_full": option[_MIN_FULL],
            "prefix": option[_PREFIX],
        }
        want = [
            [bool(keep(i, j, length, option[_TARGETS], option[_CONTEXT], **rules)) for j in range(length)]
            for i in range(length)
        ]
        assert _kept(length, options)[0].tolist() == want, _keywords(option)


def test_reference_mask():
    small = ((n, _every_option(n, t, c)) for n in range(4) for t in range(n + 1) for c in range(n - t + 2))
    for length, options in (*small, *_random_options(3000, random.Random(2))):
        for option, want in zip(options, _kept(length, options), strict=True):
            got = reference.attention_mask(length, **_keywords(option))
            assert torch.equal(got, torch.from_numpy(want)), _keywords(option)


def test_reference_mask_of_a_padded_batch():
    drawn = [x for x in _random_options(200, random.Random(3)) if x[0] > 1]
    for (n1, option), (n2, other) in itertools.pairwise(drawn):
        keywords = _keywords(option[0])
        per_sequence = [_keywords(x[0]) for x in (option, other)]
        for name in ("num_targets", "contextual_seq_len"):
            keywords[name] = torch.tensor([x[name] for x in per_sequence])
        got = reference.attention_mask(torch.tensor([n1, n2]), **keywords, size=20)
        for mask, n, mine in zip(got, (n1, n2), per_sequence, strict=True):
            alone = {**keywords, **{x: mine[x] for x in ("num_targets", "contextual_seq_len")}}
            assert torch.equal(mask[:n, :n], reference.attention_mask(n, **alone))
            assert not mask[n:].any() and not mask[:n, n:].any()


def _kind(options: np.ndarray, length: int, rows: np.ndarray) -> np.ndarray:
    """0: contextual, 1: history with a window, 2: history without, 3: target; for rows [R] int [K, R]."""
    t, c, window, min_full = (options[:, x, None] for x in (_TARGETS, _CONTEXT, _WINDOW, _MIN_FULL))
    h = length - t
    full_from = np.where(window == 0, 0, np.where(min_full == 0, length, h - min_full))
    return np.where(rows < np.minimum(c, h), 0, np.where(rows >= h, 3, np.where(rows >= full_from, 2, 1)))


def _check_tiles(length: int, options: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    """No kept pair is skipped, no masked pair is taken for kept; for rows of one kind, nothing is visited in vain.

    The tiles are all pairs of `rows` [R, 2] and `columns` [C, 2].
    """
    tiles = _core.mask_tiles(length, options, rows, columns)
    touches, covers = tiles & 1 != 0, tiles & 2 != 0
    sums = np.zeros((len(options), length + 1, length + 1), np.int16)
    np.cumsum(_kept(length, options), 1, np.int16, sums[:, 1:, 1:])
    sums = sums.cumsum(2, np.int16)
    of_rows = sums[:, rows[:, 1]] - sums[:, rows[:, 0]]
    kept = of_rows[:, :, columns[:, 1]] - of_rows[:, :, columns[:, 0]]
    some, full = kept > 0, kept == (rows[:, 1] - rows[:, 0])[:, None] * (columns[:, 1] - columns[:, 0])
    one_kind = (_kind(options, length, rows[:, 0]) == _kind(options, length, rows[:, 1] - 1))[:, :, None]
    plain = (columns[:, 1] <= length - options[:, _TARGETS, None])[:, None] & (options[:, _PREFIX, None, None] == 0)
    wrong = {
        "a kept pair is skipped": some & ~touches,
        "an empty tile of rows of one kind is visited": one_kind & ~some & touches,
        "a masked pair is taken for kept": covers & ~full,
        "a full tile of history columns and rows of one kind is masked": one_kind & plain & full & ~covers,
    }
    for what, where in wrong.items():
        if where.any():
            k, row, column = np.argwhere(where)[0]
            pytest.fail(
                f"{what}: length {length}, {_keywords(options[k])}, rows {rows[row]}, columns {columns[column]}"
            )


def _every_range(length: int) -> np.ndarray:
    return np.array(list(itertools.combinations(range(length + 1), 2)), dtype=np.int32)


def _grid(length: int, size: int) -> np.ndarray:
    return np.array([(x, min(x + size, length)) for x in range(0, length, size)], dtype=np.int32)


@pytest.mark.parametrize("length", range(1, _LONGEST + 1))
def test_tiles(length):
    """Every option: all tiles of short sequences, the tiles a kernel would cut of longer ones."""
    cuts = (
        [(_every_range(length),) * 2]
        if length <= 8
        else [(_grid(length, 4),) * 2, (_grid(length, 3), _grid(length, 7))]
    )
    for targets in range(length + 1):
        for context in range(length - targets + 2):
            options = _every_option(length, targets, context)
            for rows, columns in cuts:
                _check_tiles(length, options, rows, columns)


@pytest.mark.parametrize("block", range(10))
def test_all_tiles_of_longer_sequences(block):
    for length, options in _random_options(250, random.Random(100 + block)):
        _check_tiles(length, options, _every_range(length), _every_range(length))


def test_rows_intervals_and_pairs():
    """What kernels and benches read directly: a row's intervals, positions, number of kept pairs."""
    for length, options in _random_options(500, random.Random(4)):
        mask, kept = _core.Mask(length=length, **_keywords(options[0])), _kept(length, options)[0]
        for i in range(length):
            spans = mask.row(i)
            columns = [j for lo, hi in spans for j in range(lo, hi)]
            assert columns == sorted(set(columns)) == np.flatnonzero(kept[i]).tolist()
        assert mask.kept_pairs() == kept.sum()
        assert mask.kept_pairs(num_queries=length // 2) == kept[length - length // 2 :].sum()
        c, h = min(options[0, _CONTEXT], length - options[0, _TARGETS]), length - options[0, _TARGETS]
        assert (mask.history, mask.contextual) == (h, c)
        want = reference.logical_position(*(torch.tensor(int(x)) for x in (length, length - h, c)), size=length)
        assert [mask.position(i) for i in range(length)] == want.tolist()


def test_bucket_and_position_index():
    boundaries = [-5, 0, 0, 7, 2**62]
    for gap in (-(2**63), -6, -5, -1, 0, 1, 6, 7, 2**62 - 1, 2**62, 2**63 - 1):
        assert _core.bucket(gap, boundaries) == sum(x <= gap for x in boundaries)
    for positions in (1, 2, 5):
        got = [_core.position_index(i, j, positions) for i in range(8) for j in range(8)]
        assert got == [min(max(j - i + positions - 1, 0), 2 * positions - 2) for i in range(8) for j in range(8)]
