"""Models of sequences, from nothing but linear layers, embeddings and norms: each has its clipping rule.

Source: torch's ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and ``nn.TransformerEncoderLayer`` (equations and names);
Luong et al., arXiv 1508.04025 (attention by dot product); Mikolov et al., arXiv 1301.3781 (skip-gram). Rules:
as ``modules``; token 0 is padding and changes nothing; weights load into torch's own modules unrenamed.
"""

import math
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from common.contract import Contract, Series
from common.contract.sequences import PADDING
from common.methods import Recurrent, SequenceToSequence, SkipGram, Transformer
from common.tasks.fit import reads
from common.tasks.models.images import split
from common.tasks.models.shapes import GATES, target_places, vocabulary

# Added to the score of what is not there: its share underflows to zero, and no row is all infinite.
_ABSENT: Final = -1e9


class Cell(nn.Module):
    """One step of torch's ``nn.RNN`` (tanh), ``nn.GRU`` or ``nn.LSTM``, from two linear layers."""

    def __init__(self, cell: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell, self.hidden = cell, hidden
        self.ih = nn.Linear(inputs, GATES[cell] * hidden)
        self.hh = nn.Linear(hidden, GATES[cell] * hidden)

    def start(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before the first step: output and memory, [n, hidden] each."""
        zeros = torch.zeros((len(x), self.hidden), dtype=x.dtype)
        return zeros, zeros

    def forward(
        self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, inputs] and a state to the next state."""
        output, memory = state
        given, kept = self.ih(x), self.hh(output)
        if self.cell == "rnn":
            return torch.tanh(given + kept), memory
        if self.cell == "gru":
            (r, z, n), (hr, hz, hn) = given.chunk(3, 1), kept.chunk(3, 1)
            update = torch.sigmoid(z + hz)
            new = torch.tanh(n + torch.sigmoid(r + hr) * hn)
            return (1 - update) * new + update * output, memory
        i, f, g, o = (given + kept).chunk(4, 1)
        memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(memory), memory


class Recurrence(nn.Module):
    """``rnn`` over the steps of a series, its last output to ``head``."""

    def __init__(self, model: Recurrent, contract: Contract) -> None:
        super().__init__()
        self._reads = reads(model, contract)
        series = self._reads.main
        self._steps = series.steps if isinstance(series, Series) else 0
        self._inputs = inputs = 2 * len(series.channels) if isinstance(series, Series) else 0
        self.rnn = Cell(model.cell, inputs, model.hidden)
        self.head = nn.Linear(model.hidden + self._reads.rest_width, contract.label.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, width] to [n, outputs]."""
        series, rest = split(x, self._reads)
        state = self.rnn.start(series)
        for step in series.reshape(len(x), self._steps, self._inputs).unbind(1):
            state = self.rnn(step, state)
        found: torch.Tensor = self.head(torch.cat([state[0], rest], 1))
        return found


class _Attention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence with itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
        """[n, t, width] and the scores to add for keys [n, 1, 1, t]."""
        parts = (
            self.in_proj(x)
            .reshape(*x.shape[:2], 3, self.heads, x.shape[2] // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        query, key, value = parts.unbind(0)
        scores = query @ key.mT / math.sqrt(query.shape[-1]) + absent
        mixed = torch.softmax(scores, dim=-1) @ value
        found: torch.Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return found


class _Layer(nn.Module):
    """``nn.TransformerEncoderLayer`` with ``norm_first`` and relu, without dropout."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.self_attn = _Attention(model.width, model.heads)
        self.linear1 = nn.Linear(model.width, model.feedforward)
        self.linear2 = nn.Linear(model.feedforward, model.width)
        self.norm1, self.norm2 = nn.LayerNorm(model.width), nn.LayerNorm(model.width)

    def forward(self, x: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.norm1(x), absent)
        found: torch.Tensor = x + self.linear2(functional.relu(self.linear1(self.norm2(x))))
        return found


class _Layers(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(model) for _ in range(model.layers)])
        self.norm = nn.LayerNorm(model.width)

    def forward(self, x: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, absent)
        found: torch.Tensor = self.norm(x)
        return found


class Encoder(nn.Module):
    """``embedding`` of tokens plus ``time`` of each, ``encoder``, the mean of what is there to ``head``."""

    def __init__(self, model: Transformer, contract: Contract) -> None:
        super().__init__()
        self._reads = reads(model, contract)
        self.embedding = nn.Embedding(vocabulary(contract), model.width)
        if self._reads.times:
            self.time = nn.Linear(1, model.width)
        self.encoder = _Layers(model)
        self.head = nn.Linear(model.width + self._reads.rest_width, contract.label.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, width] to [n, outputs]."""
        own, rest = split(x, self._reads)
        beside = 2 if self._reads.times else 1
        pairs = own.reshape(len(x), own.shape[1] // beside, beside)
        tokens = pairs[:, :, 0].long()
        there = (tokens != PADDING).to(x.dtype)
        found = self.embedding(tokens)
        if self._reads.times:
            found = found + self.time(pairs[:, :, 1:])
        encoded = self.encoder(found, (1 - there)[:, None, None] * _ABSENT)
        mean = (encoded * there[:, :, None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
        outputs: torch.Tensor = self.head(torch.cat([mean, rest], 1))
        return outputs


class SkipGrams(nn.Module):
    """``embedding`` of a term, ``output`` to the scores of its neighbours."""

    def __init__(self, model: SkipGram, contract: Contract) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary(contract), model.width)
        self.output = nn.Linear(model.width, vocabulary(contract))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [n, t] to the scores of each one's neighbours [n, t, terms]."""
        scores: torch.Tensor = self.output(self.embedding(x.long()))
        return scores


def skip_gram_losses(module: nn.Module, x: torch.Tensor, y: torch.Tensor, *, window: int) -> torch.Tensor:
    """The mean cross-entropy of a row's pairs of neighbours, [n]; 0 for a row without any."""
    tokens = x.long()
    logs = torch.log_softmax(module(x), dim=2)
    total, pairs = torch.zeros(len(x), dtype=x.dtype), torch.zeros(len(x), dtype=x.dtype)
    for apart in range(1, min(window, tokens.shape[1] - 1) + 1):
        first, second = tokens[:, :-apart], tokens[:, apart:]
        both = ((first != PADDING) & (second != PADDING)).to(x.dtype)
        ahead = logs[:, :-apart].gather(2, second[:, :, None])[:, :, 0]
        behind = logs[:, apart:].gather(2, first[:, :, None])[:, :, 0]
        total = total - ((ahead + behind) * both).sum(1)
        pairs = pairs + 2 * both.sum(1)
    return total / pairs.clamp(min=1)


class Translator(nn.Module):
    """``encoder`` over the source, ``decoder`` over the target so far, attention, ``combine``, ``output``."""

    def __init__(self, model: SequenceToSequence, contract: Contract) -> None:
        super().__init__()
        self.places = target_places(model, contract)
        self._begin = vocabulary(contract, model.target)
        self.source = nn.Embedding(vocabulary(contract, model.source), model.hidden)
        self.target = nn.Embedding(self._begin + 1, model.hidden)
        self.encoder = Cell("gru", model.hidden, model.hidden)
        self.decoder = Cell("gru", model.hidden, model.hidden)
        self.combine = nn.Linear(2 * model.hidden, model.hidden)
        self.output = nn.Linear(model.hidden, self._begin)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, width] to the scores of each target token given those before it: [n, t, terms]."""
        target = x[:, self.places[1]].long()
        begin = torch.full((len(x), 1), self._begin, dtype=torch.int64)
        state, memory = self._encoded(x)
        found = []
        for token in self.target(torch.cat([begin, target[:, :-1]], 1)).unbind(1):
            state = self.decoder(token, state)
            found.append(self._scores(state[0], memory))
        return torch.stack(found, 1)

    def greedy(self, x: torch.Tensor) -> torch.Tensor:
        """The most likely tokens one after another, int64 [n, t]; padding once one has ended."""
        state, memory = self._encoded(x)
        token = torch.full((len(x),), self._begin, dtype=torch.int64)
        ended, found = torch.zeros(len(x), dtype=torch.bool), []
        for _ in range(self.places[1].stop - self.places[1].start):
            state = self.decoder(self.target(token), state)
            token = self._scores(state[0], memory).argmax(1).masked_fill(ended, PADDING)
            ended = ended | (token == PADDING)
            found.append(token)
        return torch.stack(found, 1)

    def _encoded(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], Any]:
        tokens = x[:, self.places[0]].long()
        there = (tokens != PADDING).to(x.dtype)
        steps = self.source(tokens)
        state, outputs = self.encoder.start(steps), []
        for step, now in zip(steps.unbind(1), there.unbind(1), strict=True):
            new, _ = self.encoder(step, state)
            state = new * now[:, None] + state[0] * (1 - now[:, None]), state[1]
            outputs.append(state[0])
        return state, (torch.stack(outputs, 1), (1 - there) * _ABSENT)

    def _scores(self, state: torch.Tensor, memory: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        outputs, absent = memory
        weights = torch.softmax((outputs @ state[:, :, None])[:, :, 0] + absent, dim=1)
        context = (weights[:, None] @ outputs)[:, 0]
        scores: torch.Tensor = self.output(torch.tanh(self.combine(torch.cat([context, state], 1))))
        return scores


def translation_losses(
    module: nn.Module, x: torch.Tensor, y: torch.Tensor, *, target_at: slice
) -> torch.Tensor:
    """The mean cross-entropy of a row's target tokens and of the end after them, [n]."""
    target = x[:, target_at].long()
    logs = torch.log_softmax(module(x), dim=2).gather(2, target[:, :, None])[:, :, 0]
    # The first padding is the end, which has to be learnt; what follows it is not there.
    before = functional.pad(target[:, :-1] != PADDING, (1, 0), value=True)
    there = before.to(x.dtype)
    return -(logs * there).sum(1) / there.sum(1).clamp(min=1)
