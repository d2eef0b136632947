"""HSTURecommender: items in, the next item out. Embeddings, an HSTU stack, training losses, retrieval and ranking."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .attention import _fail
from .baselines import SoftmaxHSTU, Transformer
from .bias import RelativeAttentionBias, TimeBuckets
from .histories import Histories, _content_is_checked
from .layer import HSTU, HSTULayer

ENCODERS = {"hstu": HSTU, "reference": reference.HSTU, "softmax-hstu": SoftmaxHSTU, "transformer": Transformer}
RELATIVE_BIASES = ("none", "position", "time", "position+time")


class HSTURecommender(nn.Module):
    """Sequential recommender: a user's items (and when, and what was done with them) in order, the next item predicted.

        >>> model = HSTURecommender(num_items=1000, max_seq_len=50)
        >>> model.next_item_loss(Histories.from_lists([[17, 4, 256], [4, 9]])).backward()
        >>> best, scores = model.eval().recommend([17, 4, 256], k=10)

    A row of the encoder's input is the embedding of an item times `sqrt(embedding_dim)`, plus that of its position,
    plus that of its action. Its output row is compared with item embeddings, by cosine over `temperature` or by inner
    product: how likely each item is the next one.

    Candidates can also be ranked as targets: appended to the history, each sees all of it and itself but no other
    candidate, and a linear head scores its output row (`score`; trained by `ranking_loss`).

    Arguments:
        num_items: items are 0 to num_items - 1.
        max_seq_len: the longest history. Of longer ones the rows beyond share the last position (`recommend` cuts).
        embedding_dim, num_layers, num_heads, dim_qk, dim_v: of the encoder.
        num_actions: actions are 0 to num_actions - 1; 0: there are none.
        relative_bias: "none", "position", "time" or "position+time" (each layer has its own tables, time in `log`
            buckets of seconds). With time the query time of a row is that of the next item, as published.
        dropout: of the embeddings and within layers.
        temperature: None: inner products instead of cosines over it.
        encoder: "hstu", "reference" (the same in plain PyTorch, with the same state dict), "softmax-hstu" or
            "transformer" (see `hstu_ops.baselines`).
        layer_options: more arguments of the encoder, such as `alpha`, `concat` or `recompute`; uvqk_bias is True.

    Batches are `Histories`, on the device of the model.
    """

    def __init__(
        self,
        num_items: int,
        *,
        max_seq_len: int = 200,
        embedding_dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        dim_qk: int | None = None,
        dim_v: int | None = None,
        num_actions: int = 0,
        relative_bias: str = "position",
        dropout: float = 0.2,
        temperature: float | None = 0.05,
        encoder: str = "hstu",
        **layer_options: object,
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            _fail("encoder", f"one of {', '.join(ENCODERS)}", encoder)
        if relative_bias not in RELATIVE_BIASES:
            _fail("relative_bias", f"one of {', '.join(RELATIVE_BIASES)}", relative_bias)
        config = dict(
            num_items=num_items,
            max_seq_len=max_seq_len,
            embedding_dim=embedding_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            dim_qk=dim_qk,
            dim_v=dim_v,
            num_actions=num_actions,
            relative_bias=relative_bias,
            dropout=dropout,
            temperature=temperature,
            encoder=encoder,
            **layer_options,
        )
        # Numbers of numpy would be refused when a saved model is loaded.
        self.config = {name: x.item() if hasattr(x, "item") else x for name, x in config.items()}
        self.num_items, self.max_seq_len, self.num_actions = num_items, max_seq_len, num_actions
        self.temperature = temperature
        self.uses_time = "time" in relative_bias

        def make_bias() -> RelativeAttentionBias:
            buckets = TimeBuckets.log() if self.uses_time else None
            return RelativeAttentionBias(max_seq_len + 1, buckets, position="position" in relative_bias)

        self.item_embedding = nn.Embedding(num_items, embedding_dim)
        self.position_embedding = nn.Embedding(max_seq_len + 1, embedding_dim)  # the targets' position is the last
        self.action_embedding = nn.Embedding(num_actions, embedding_dim) if num_actions else None
        self.dropout = nn.Dropout(dropout)
        if encoder != "transformer":
            layer_options.setdefault("uvqk_bias", True)
        self.encoder = ENCODERS[encoder](
            num_layers,
            embedding_dim,
            num_heads,
            dim_qk,
            dim_v,
            max_seq_len=max_seq_len,
            relative_bias=None if relative_bias == "none" else make_bias,
            dropout=dropout,
            **layer_options,
        )
        self.candidate_head = nn.Linear(embedding_dim, 1)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        """Beside embeddings, what differs from the layers' own: gates start open (u near silu(1)) and position tables
        at 1, so that a layer starts as the mean of what a row sees, as with softmax. From near 0 it learns slowly.
        """
        for table in (self.item_embedding, self.position_embedding, self.action_embedding):
            if table is not None:
                nn.init.trunc_normal_(table.weight, std=0.02)
        for layer in self.encoder.layers:
            if isinstance(layer, HSTULayer):
                if layer.uvqk.bias is not None:
                    layer.uvqk.bias[: layer.num_heads * layer.dim_v].fill_(1)
                if layer.relative_bias is not None and layer.relative_bias.position_weight is not None:
                    layer.relative_bias.position_weight.fill_(1)

    # ---- encoding --------------------------------------------------------------------------------------------

    def forward(
        self, histories: Histories, *, num_targets: Tensor | None = None, request_timestamps: Tensor | None = None
    ) -> Tensor:
        """The encoder's output, `[T, embedding_dim]`.

        Arguments:
            histories: with actions if num_actions > 0 (those of targets are not read), and with timestamps for a time
                bias (those of targets are the time of the request). Items that the model does not have are a
                ValueError on CPU and, with `HSTU_OPS_CHECK=1`, elsewhere.
            num_targets: int64 `[B]`: the last rows of each sequence are candidates.
            request_timestamps: int64 `[B]`, when the next item is asked for. Default: the time of the last row.
        """
        if self.num_actions > 0 and histories.actions is None:
            _fail("histories.actions", f"a tensor, as num_actions is {self.num_actions}", None)
        if self.uses_time and histories.timestamps is None:
            _fail("histories.timestamps", "a tensor, as there is a time bias", None)
        items, sequence, lengths = histories.items, histories.sequence, histories.lengths
        if _content_is_checked(items):
            self._check_items("histories.items", items)
        row = torch.arange(len(items), device=items.device) - histories.seq_offsets[sequence]
        past = (lengths if num_targets is None else lengths - num_targets)[sequence]
        is_target = row >= past

        x = self.item_embedding(items) * self.item_embedding.embedding_dim**0.5
        x = x + self.position_embedding(torch.minimum(row, past).clamp(max=self.max_seq_len))
        if self.num_actions > 0:
            action = self.action_embedding(histories.actions.masked_fill(is_target, 0))
            x = x + action.masked_fill(is_target[:, None], 0)
        options = {} if num_targets is None else dict(num_targets=num_targets)
        if self.uses_time:
            times = histories.timestamps
            asked = torch.cat([times[1:], times[-1:]])  # when the next item came
            last = row == lengths[sequence] - 1
            asked = torch.where(last, times if request_timestamps is None else request_timestamps[sequence], asked)
            options.update(timestamps=times, query_timestamps=torch.where(is_target, times, asked))
        return self.encoder(self.dropout(x), histories.seq_offsets, **options)

    def _check_items(self, name: str, items: Tensor) -> None:
        unknown = items[(items < 0) | (items >= self.num_items)]
        if len(unknown) > 0:
            _fail(name, f"items from 0 to {self.num_items - 1}", unknown.unique()[:10].tolist())

    def item_logits(self, rows: Tensor, items: Tensor | None = None) -> Tensor:
        """How well items (int64 `[n]`; default: all) follow encoded rows `[m, embedding_dim]`: float32 `[m, n]`."""
        table = self.item_embedding.weight if items is None else self.item_embedding(items)
        rows, table = self._comparable(rows), self._comparable(table)
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ table.T

    def _comparable(self, x: Tensor) -> Tensor:
        """Rows of encodings or of embeddings, such that products of two are logits."""
        x = x.float() if x.dtype != torch.float64 else x
        return x if self.temperature is None else F.normalize(x, dim=1) * self.temperature**-0.5

    # ---- training --------------------------------------------------------------------------------------------

    def next_item_loss(self, histories: Histories, *, num_negatives: int | None = None) -> Tensor:
        """Mean cross-entropy of each item given those before it; every history needs an item.

        num_negatives: None: softmax over all items. Otherwise sampled softmax: this many negatives, uniform and shared
        by the batch, stand for all items but the right one. `log((num_items - 1) / num_negatives)` is added to their
        logits, so that the loss estimates the full one; those that are the right item do not count.
        """
        inputs, following = histories.split_last()
        rows = self(inputs, request_timestamps=_last(histories.timestamps, histories))
        if len(rows) == 0:
            return rows.sum()  # nobody has a second item: 0, and gradients of 0
        right = histories.items[following]
        if num_negatives is None:
            return F.cross_entropy(self.item_logits(rows), right)
        negatives = torch.randint(self.num_items, (num_negatives,), device=right.device)
        logits = self.item_logits(rows, negatives) + math.log((self.num_items - 1) / num_negatives)
        logits = logits.masked_fill(negatives == right[:, None], -torch.inf)
        right_logits = (self._comparable(rows) * self._comparable(self.item_embedding(right))).sum(1, keepdim=True)
        return (torch.cat([right_logits, logits], dim=1).logsumexp(1) - right_logits[:, 0]).mean()

    def ranking_loss(self, histories: Histories, *, num_negatives: int = 8) -> Tensor:
        """Mean cross-entropy of each history's last item among itself and uniform negatives, all scored as targets in
        one pass; every history needs an item.
        """
        inputs, _ = histories.split_last()
        right = _last(histories.items, histories)
        negatives = torch.randint(self.num_items, (len(right), num_negatives), device=right.device)
        candidates = torch.cat([right[:, None], negatives], dim=1)
        scores = self.score(inputs, candidates, request_timestamps=_last(histories.timestamps, histories))
        return F.cross_entropy(scores, torch.zeros_like(right))

    # ---- use -------------------------------------------------------------------------------------------------

    def score(
        self, histories: Histories, candidates: Histories | Tensor, *, request_timestamps: Tensor | None = None
    ) -> Tensor:
        """How well candidates follow the histories, by the head that `ranking_loss` trains: all in one pass.

        candidates: int64 `[B, n]`, or `Histories` with any number for each user (only its items are read). The result
        is float32, `[B, n]` or one for each row of the candidates; a score does not depend on the other candidates.
        request_timestamps: int64 `[B]`; default: the time of the last item.
        """
        if isinstance(candidates, Tensor):
            if candidates.dim() != 2 or len(candidates) != len(histories):
                _fail("candidates", f"int64 [{len(histories)}, n]", candidates)
            batch, count = candidates.shape
            offsets = torch.arange(batch + 1, device=candidates.device) * count
            return self.score(
                histories, Histories(candidates.flatten(), offsets), request_timestamps=request_timestamps
            ).view(batch, count)
        if not isinstance(candidates, Histories):
            _fail("candidates", "int64 [B, n] or Histories", candidates, TypeError)
        if len(candidates) != len(histories):
            _fail("candidates", f"those of {len(histories)} users", f"those of {len(candidates)}")
        user = candidates.sequence
        if self.uses_time:
            asked = _last(histories.timestamps, histories) if request_timestamps is None else request_timestamps
            candidates = replace(candidates, timestamps=asked[user])
        if self.num_actions > 0:
            candidates = replace(candidates, actions=torch.zeros_like(candidates.items))
        rows = self(histories.append(candidates), num_targets=candidates.lengths)
        at = torch.arange(len(user), device=user.device) + histories.seq_offsets[1:][user]
        return self.candidate_head(rows[at])[:, 0].float()

    @torch.no_grad()
    def recommend(
        self,
        history: Histories | Sequence[int] | Tensor,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        request_timestamps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k items most likely to come next, best first, and their scores (logits of the softmax over all items).

        history: one user's items, oldest first (a list or int64 `[n]`): the results are `[k]`. Or `Histories`, which
        may have timestamps and actions: `[B, k]`. Of longer histories the last max_seq_len items are read. With
        exclude_seen no item of the history is recommended (while there are others). Call `model.eval()` before.
        """
        single = not isinstance(history, Histories)
        histories = Histories.from_lists([history]) if single else history
        if not 1 <= k <= self.num_items:
            _fail("k", f"1 to {self.num_items}, the number of items", k)
        if bool((histories.lengths < 1).any()):
            _fail("history", "at least one item a user", histories.lengths.tolist())
        self._check_items("history", histories.items)
        histories = histories.to(self.item_embedding.weight.device)
        recent = histories.recent(self.max_seq_len)
        logits = self.item_logits(self(recent, request_timestamps=request_timestamps)[recent.seq_offsets[1:] - 1])
        if exclude_seen:
            logits[histories.sequence, histories.items] = -torch.inf
        best = logits.topk(k, dim=1)
        return (best.indices[0], best.values[0]) if single else (best.indices, best.values)

    def save(self, path: str | os.PathLike) -> None:
        """Writes arguments and weights to a file."""
        torch.save({"config": self.config, "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu", **changes: object) -> HSTURecommender:
        """What `save` wrote, on `device`; `changes` replace arguments, such as encoder="reference"."""
        saved = torch.load(path, map_location=device, weights_only=True)
        model = cls(**{**saved["config"], **changes}).to(device)
        model.load_state_dict(saved["state"])
        return model


def _last(column: Tensor | None, histories: Histories) -> Tensor | None:
    """Of each user the last of a column."""
    return None if column is None else column[histories.seq_offsets[1:] - 1]
