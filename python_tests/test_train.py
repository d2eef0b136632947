"""python -m hstu_ops train: its data, its metrics, and that it learns, resumes and reports."""

import re
import subprocess
import sys

import pytest
import torch

from hstu_ops import Histories, HSTURecommender, train
from hstu_ops import __main__ as main
from hstu_ops.data import Dataset, RatingsError, read_ratings, synthetic_stream


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The models are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- data --------------------------------------------------------------------------------------------------------

_ROWS = [
    (7, 30, 4.0, 900),
    (3, 10, 5.0, 500),
    (7, 10, 1.0, 100),
    (7, 20, 4.0, 100),
    (3, 30, 1.0, 400),
    (3, 20, 5.0, 600),
]


@pytest.mark.parametrize(
    ("separator", "header"),
    [("::", ""), ("\t", ""), (",", "userId,movieId,rating,timestamp\n"), (",", "")],
    ids=["dat", "u.data", "csv", "csv-without-header"],
)
def test_ratings(separator, header, tmp_path):
    """Users apart, in the order of time, that of the file where times are equal; distinct ratings are actions."""
    path = tmp_path / "ratings"
    path.write_text(header + "".join(separator.join(map(str, row)) + "\n" for row in _ROWS) + "\n")
    data = read_ratings(path)
    assert data.item_ids.tolist() == [10, 20, 30] and data.num_items == 3 and not data.stream
    assert data.test.seq_offsets.tolist() == [0, 3, 6]
    assert data.item_ids[data.test.items].tolist() == [30, 10, 20, 10, 20, 30]
    assert data.test.timestamps.tolist() == [400, 500, 600, 100, 100, 900]
    assert data.num_actions == 3 and data.test.actions.tolist() == [0, 2, 2, 0, 1, 1]
    assert data.item_ids[data.train.items].tolist() == [30, 10, 10, 20]
    assert str(data) == "ratings: 2 users, 3 items, 6 events"


def test_short_histories_are_left_out(tmp_path):
    path = tmp_path / "u.data"
    path.write_text("1\t5\t3\t10\n1\t6\t3\t11\n2\t5\t3\t1\n2\t7\t3\t2\n2\t8\t3\t3\n")
    assert read_ratings(path).item_ids.tolist() == [5, 7, 8]
    assert read_ratings(path, min_items=2).test.lengths.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1::2::3::4\n1::2::three::4\n", 2),
        ("1\t2\t3\t4\n\n1\t2\t3\n", 3),
        ("userId,movieId,rating,timestamp\n1,2,3.5,4\n1,2,3.5,4,5\n", 3),
        ("1::2::nan::4\n", 1),
        ("1::2::3::inf\n", 1),
        ("1::2::3::4\n99999999999999999999::2::3::4\n", 2),
        ("1::2::3::1e30\n", 1),
        ("movie, user\n", 1),
    ],
)
def test_malformed_line_is_reported_with_its_number(text, line, tmp_path):
    path = tmp_path / "ratings.dat"
    path.write_text(text)
    with pytest.raises(RatingsError, match=f"line {line}: expected user, item, rating, time"):
        read_ratings(path)


@pytest.mark.parametrize("text", ["", "\n\n", "1::2::3::4\n"])
def test_nothing_to_train_on(text, tmp_path):
    path = tmp_path / "ratings.dat"
    path.write_text(text)
    with pytest.raises(RatingsError):
        read_ratings(path)


def test_synthetic_stream():
    data = synthetic_stream(0.1, num_records=2000, seed=3)
    assert data.num_items == 2000 and len(data.train) == 1800 and len(data.test) == 200 and data.stream
    assert (data.train.lengths == 128).all()
    records = torch.cat([data.train.items, data.test.items]).view(2000, 128)
    released = 2000 * (0.4 + 0.6 * torch.arange(2000) / 2000)
    assert (records < released[:, None]).all() and records.min() >= 0
    assert records[-100:].max() > 1950 and records[:100].max() > 780
    again, other = (synthetic_stream(0.1, num_records=2000, seed=x).train.items for x in (3, 4))
    assert torch.equal(again, data.train.items) and not torch.equal(other, again)

    # Items of a category occur together: with the categories known, no record has more than 5.
    category = torch.randperm(2000, generator=torch.Generator().manual_seed(3)) % 10
    kinds = torch.tensor([len(x.unique()) for x in category[records]])
    assert kinds.max() == 5 and kinds.min() == 1
    assert abs((kinds == 1).double().mean() - 0.2) < 0.05
    with pytest.raises(ValueError, match="scale"):
        synthetic_stream(0)


def test_best_possible():
    """With one category all items released are as likely; with more, a model with the true shares gets what is said."""
    data = synthetic_stream(num_records=100, num_items=500, num_categories=1)
    released = [int(500 * (0.4 + 0.6 * r / 100)) for r in range(90, 100)]
    assert data.best["HR@10"] == pytest.approx(sum(10 / x for x in released) / 10)
    assert data.best["HR@50"] == pytest.approx(sum(50 / x for x in released) / 10)
    data = synthetic_stream(num_records=4000, num_items=400, num_categories=4, seed=1)
    category = torch.randperm(400, generator=torch.Generator().manual_seed(1)) % 4
    items = data.test.items.view(-1, 128)
    kinds = torch.nn.functional.one_hot(category[items], 4)
    guess = (kinds.cumsum(1)[:, :-1] + 1e-3).argmax(2)  # of the category seen most so far
    hits = (guess == category[items[:, 1:]]).double().mean() * 10 / (100 * 0.97)
    assert 0.9 * data.best["HR@10"] < hits < 1.02 * data.best["HR@10"]
    assert data.best["HR@10"] / 10 < data.best["NDCG@10"] < data.best["HR@10"]


# ---- metrics -----------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    got = train.metrics_of(torch.tensor([0, 2, 9, 10, 49, 50]))
    assert got["HR@10"] == pytest.approx(3 / 6)
    assert got["HR@50"] == pytest.approx(5 / 6)
    assert got["NDCG@10"] == pytest.approx((1 + 1 / 2 + 0.2890649) / 6)


class _Fixed(torch.nn.Module):
    """A model whose logits are given: item i has score `scores[i]`."""

    max_seq_len = 10

    def __init__(self, scores):
        super().__init__()
        self.item_embedding = torch.nn.Embedding(len(scores), 1)
        self.scores = torch.tensor(scores)

    def forward(self, histories, request_timestamps=None):
        return torch.zeros(len(histories.items), 1)

    def item_logits(self, rows):
        return self.scores.repeat(len(rows), 1)


def test_ranks():
    """Of a stream every item counts; of ratings the last, without those seen; equal scores count as better."""
    scores = [float(-i) for i in range(100)]
    test = Histories.from_lists([[0, 1, 30], [9, 12]])
    stream = Dataset("", 100, test, test, stream=True)
    assert train.evaluate(_Fixed(scores), stream, 1)["HR@10"] == pytest.approx(1 / 3)  # ranks 1, 30, 12
    assert train.evaluate(_Fixed(scores), stream, 2)["HR@50"] == 1
    last = Dataset("", 100, test.split_last()[0], test, stream=False)
    assert train.evaluate(_Fixed(scores), last, 2)["HR@10"] == 0  # ranks 28, 11
    test = Histories.from_lists([[0, 1, 11], [9, 0, 5, 12]])
    last = Dataset("", 100, test.split_last()[0], test, stream=False)
    got = train.evaluate(_Fixed(scores), last, 2)  # ranks 9, 9
    assert got["HR@10"] == 1 and got["NDCG@10"] == pytest.approx(0.2890649)
    for same in (0.0, float("nan")):
        assert train.evaluate(_Fixed([same] * 100), last, 2)["HR@50"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_popularity(stream):
    """The same as a model whose scores are the counts."""
    gen = torch.Generator().manual_seed(0)
    rows = [torch.randint(80, (n,), generator=gen).clamp(max=60).tolist() for n in (9, 5, 7, 8)]
    test = Histories.from_lists(rows)
    data = Dataset("", 80, test if stream else test.split_last()[0], test, stream=stream)
    counts = torch.bincount(data.train.items, minlength=80).tolist()
    assert train.popularity(data) == pytest.approx(train.evaluate(_Fixed(list(map(float, counts))), data, 2))


# ---- the command -------------------------------------------------------------------------------------------------

_SMALL = ["--scale", "0.005", "--dim", "16", "--batch-size", "16", "--epochs", "3"]


def command(monkeypatch, capsys, *arguments, device="cpu"):
    """Exit status, stdout and stderr of `python -m hstu_ops train`."""
    monkeypatch.setattr(sys, "argv", ["hstu_ops", "train", "--device", device, *map(str, arguments)])
    status = main.main()
    return status, *capsys.readouterr()


def table(text):
    """The rows of the printed table without their times."""
    return [line.split()[:5] for line in text.splitlines() if re.match(r" +\d+ ", line)]


def ratings(path, users=60, first_item=0):
    """Each user's next item is 3 further on."""
    rows = [
        (u, first_item + (7 * u + 3 * i) % 50, 3 + u % 3, 1000 * u + i) for u in range(users) for i in range(4 + u % 9)
    ]
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def test_learns(device, tmp_path, monkeypatch, capsys):
    """Ratings with a pattern are learned, and the saved model recommends accordingly."""
    given = ["--ratings", ratings(tmp_path / "u.data"), "--epochs", 25, "--dim", 32, "--lr", 0.01, "--batch-size", 16]
    status, out, _ = command(monkeypatch, capsys, *given, "--actions", "--output", tmp_path / "run", device=device)
    assert status == 0
    rows = table(out)
    assert len(rows) == 25 and float(rows[-1][1]) < float(rows[0][1])
    assert float(rows[-1][2]) > 0.9 and float(rows[-1][4]) > 0.5
    model = HSTURecommender.load(tmp_path / "run" / "hstu.pt", device).eval()
    assert model.num_items == 50 and model.num_actions == 3


def test_resume_gives_the_same_bits(tmp_path, monkeypatch, capsys):
    """Killed after an epoch and resumed, or never killed: the same losses, metrics and weights."""
    data = ratings(tmp_path / "u.data")
    for given in (_SMALL, ["--ratings", data, "--dim", 16, "--epochs", 3, "--candidates", 3]):
        folders = [tmp_path / f"{name}-{len(given)}" for name in ("whole", "parts")]
        whole = command(monkeypatch, capsys, *given, "--output", folders[0])[1]

        epoch = train._epoch

        def killed(run, dataset, arguments, number, epochs, epoch=epoch):
            if number == 1:
                raise KeyboardInterrupt
            return epoch(run, dataset, arguments, number, epochs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "_epoch", killed)
            command(monkeypatch, capsys, *given, "--output", folders[1])
        capsys.readouterr()
        status, resumed, _ = command(monkeypatch, capsys, *given, "--output", folders[1], "--resume")
        assert status == 0 and "after epoch 1" in resumed
        assert table(resumed) == table(whole)
        a, b = (torch.load(x / "hstu.pt", weights_only=True) for x in folders)
        assert all(torch.equal(a["state"][x], b["state"][x]) for x in a["state"])
    status, _, err = command(monkeypatch, capsys, *given, "--lr", 0.5, "--output", folders[1], "--resume")
    assert status == 2 and "lr" in err
    ratings(data, first_item=7)
    status, _, err = command(monkeypatch, capsys, *given, "--output", folders[1], "--resume")
    assert status == 2 and "other items" in err
    (folders[1] / "hstu.pt").write_bytes(b"PK")
    status, _, err = command(monkeypatch, capsys, *given, "--output", folders[1], "--resume")
    assert status == 2 and "no checkpoint" in err


def test_seed_decides(tmp_path, monkeypatch, capsys):
    tables = [
        table(command(monkeypatch, capsys, *_SMALL, "--seed", seed, "--output", tmp_path)[1]) for seed in (1, 1, 2)
    ]
    assert tables[0] == tables[1] != tables[2]


def test_baselines(tmp_path, monkeypatch, capsys):
    status, out, _ = command(monkeypatch, capsys, *_SMALL, "--baseline", "--output", tmp_path)
    assert status == 0
    for name in ("popularity", "transformer", "softmax-hstu", "hstu"):
        assert re.search(rf"^{name} +0\.\d+ +0\.\d+ +0\.\d+", out, re.MULTILINE), name
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "hstu_ops[plot]" in out
    else:
        assert (tmp_path / "training.png").stat().st_size > 10_000


def test_user_errors(tmp_path, monkeypatch, capsys):
    broken = ratings(tmp_path / "u.data")
    broken.write_text(broken.read_text() + "what is this\n")
    lines = broken.read_text().count("\n")
    for given, words in (
        (["--ratings", broken], f"line {lines}: "),
        (["--ratings", tmp_path / "none"], "none"),
        (["--dim", 15, "--scale", 0.005], "dim_qk"),
        (["--scale", 0.002, "--epochs", 91], "--epochs: expected at most 90"),  # parts of the stream
    ):
        status, _, err = command(monkeypatch, capsys, *given, "--output", tmp_path)
        assert status == 2 and words in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "value"),
    [(x, -1) for x in ("--scale", "--epochs", "--batch-size", "--negatives", "--candidates", "--temperature")]
    + [("--epochs", 0), ("--max-seq-len", 0), ("--scale", "inf"), ("--scale", "nan"), ("--seed", 10**20)],
)
def test_numbers_out_of_range(name, value, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, capsys, name, value, "--output", tmp_path)
    assert f"argument {name}: expected at least" in capsys.readouterr().err


def test_best_possible_is_of_whole_records(tmp_path, monkeypatch, capsys):
    given = ["--scale", 0.002, "--epochs", 1, "--layers", 1, "--output", tmp_path]
    for read in (127, 128, None):  # the first item of 128 is not predicted
        _, out, _ = command(monkeypatch, capsys, *given, *(["--max-seq-len", read] if read else []))
        assert "figures below" not in out
    _, out, _ = command(monkeypatch, capsys, *given, "--max-seq-len", 20)
    assert "all 128 items of a record; of the last 20 are the figures below" in out


def test_sampled_softmax_and_other_encoders(tmp_path, monkeypatch, capsys):
    for given in (
        ["--negatives", 32],
        ["--encoder", "transformer"],
        ["--encoder", "reference", "--relative-bias", "position"],
    ):
        status, out, _ = command(monkeypatch, capsys, *_SMALL, "--epochs", 1, *given, "--output", tmp_path)
        assert status == 0 and len(table(out)) == 1


def test_progress(capsys, monkeypatch):
    assert list(train.progress(range(3), "epoch")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(train.progress("abcd", "epoch 1")) == list("abcd")
    assert "epoch 1 [" in (err := capsys.readouterr().err) and "3/4" in err


def test_help():
    result = subprocess.run([sys.executable, "-m", "hstu_ops", "--help"], capture_output=True, text=True, check=True)
    assert "check" in result.stdout and "train" in result.stdout
