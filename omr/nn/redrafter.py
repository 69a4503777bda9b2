"""ReDrafter (Zhang et al., arXiv 2403.09919): a recurrent draft head on a frozen language model.

    legend   B batch   H hidden size of the base   E exit_dim (2H unless set)   V vocabulary   D draft vocabulary (V
             unless reduced)   n num_draft_layers

    c    base's last hidden state after its final norm, at the token that predicted the newest token y_0
    s_0  = 0
    s_k  = silu(W emb(y_{k-1}) + U s_{k-1} + b)       rnn=True          emb = the base's own input embedding, frozen
    s_k  = emb(y_{k-1}) + s_{k-1}                     rnn=False
    x    = [c ; s_k]                                  c is constant during one draft
    x    = P x + p                                    only when E != 2H
    x    = x + silu(A_i x + a_i)                      n times
    q(y_k | ...) = softmax(head(x))                   no bias

The parameters are named and the config is keyed as in Apple's `recurrent-drafting` checkpoints: rnn_w, rnn_u,
input_proj, lm_head.{i}.linear for the n blocks, lm_head.{n} for the output. What omr adds (other heads, a reduced draft
vocabulary, the trained length, the fingerprint of the base) lives in keys of its own, absent when the drafter is plain,
so a plain drafter is readable by Apple's code and by TensorRT-LLM's converter.

Two departures from the reference: training goes through `input_proj` as well (the reference trains E = 2H only), and
nothing is cut to the 50 best logits outside the beam search, which keeps that rule for parity.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omr.errors import ConfigError, InputError
from omr.nn.argmax import argmax
from omr.nn.draft_head import HEADS, BaseHead, DraftHead, FullHead, LowRankHead, Pack, PackedHead, make_head

MODEL_TYPE = "recurrent_drafting_drafter"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_ADDED = ("head", "head_rank", "draft_vocab_size", "predict_n", "base")


@dataclass(frozen=True, kw_only=True)
class RedrafterConfig:
    """Shape of a drafter. The first five are Apple's keys."""

    vocab_size: int
    hidden_size: int
    exit_dim: int
    num_draft_layers: int
    rnn: bool = False
    head: str = "full"
    """full (E x D matrix), low_rank (E x r, r x D) or base (E x H, then the base's own lm_head)."""
    head_rank: int = 0
    draft_vocab_size: int = 0
    """Tokens that can be drafted; 0 is the whole vocabulary."""
    predict_n: int = 0
    """Draft length it was trained for; 0 when unknown (a checkpoint from elsewhere)."""
    base: str = ""
    """Fingerprint of the base's embedding table; empty when unknown."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "exit_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"drafter {name} must be >= 1, got {getattr(self, name)}")
        if self.num_draft_layers < 0:
            raise ConfigError(f"drafter num_draft_layers must be >= 0, got {self.num_draft_layers}")
        if self.draft_vocab_size > self.vocab_size:
            raise ConfigError(f"draft vocabulary of {self.draft_vocab_size} exceeds the vocabulary ({self.vocab_size})")
        if self.head not in HEADS:
            raise ConfigError(f"drafter head must be one of {', '.join(HEADS)}, got {self.head!r}")
        if (self.head == "low_rank") != (self.head_rank > 0):
            raise ConfigError(f"head_rank is for head=low_rank and must be >= 1 there, got {self.head_rank}")

    @property
    def num_draft_words(self) -> int:
        return self.draft_vocab_size or self.vocab_size

    @property
    def plain(self) -> bool:
        """Whether Apple's code can read it."""
        return self.head == "full" and not self.draft_vocab_size

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        for name in _ADDED:
            if data[name] == RedrafterConfig.__dataclass_fields__[name].default:
                del data[name]
        return {"architectures": ["Drafter"], "model_type": MODEL_TYPE, "num_lookback_tokens": -1, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> RedrafterConfig:
        """Read a config.json of ours or Apple's; transformers' bookkeeping keys are ignored."""
        if data.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise InputError(f"{where} is a {data['model_type']!r} model, not a drafter ({MODEL_TYPE!r})")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        known = {k: v for k, v in data.items() if k in fields}
        for name in ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers"):
            if name not in known:
                raise InputError(f"{where} has no {name!r}; a drafter's config needs it")
        kinds = {"int": int, "bool": bool, "str": str}
        for name, value in known.items():
            if type(value) is not kinds[str(fields[name].type)]:
                raise InputError(f"{where}: {name} must be {fields[name].type}, got {value!r}")
        try:
            return cls(**known)
        except ConfigError as error:
            raise InputError(f"{where}: {error}") from None


def parameter_count(config: RedrafterConfig) -> int:
    """Trained parameters, computed from the shape alone."""
    h, e, d = config.hidden_size, config.exit_dim, config.num_draft_words
    head = {"full": e * d, "low_rank": config.head_rank * (e + d), "base": e * h}[config.head]
    blocks = config.num_draft_layers * (e * e + e)
    return head + blocks + (2 * h * h + h) * config.rnn + (2 * h * e + e) * (e != 2 * h)


class ResidualBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Redrafter(nn.Module):
    """The drafter's parameters and its four steps: `advance`, `features`, the head, and `draft_chain` over them.

    Weights are torch's default initialisation of Linear. With head=base the base's output matrix must be given by
    `attach` before the head is used: it is not part of the drafter's own parameters.
    """

    def __init__(self, config: RedrafterConfig) -> None:
        super().__init__()
        self.config = config
        h, e = config.hidden_size, config.exit_dim
        self.rnn_w = nn.Linear(h, h, bias=False) if config.rnn else None
        self.rnn_u = nn.Linear(h, h) if config.rnn else None
        self.input_proj = nn.Linear(2 * h, e) if e != 2 * h else None
        head = make_head(config.head, e, h, config.num_draft_words, config.head_rank)
        self.lm_head = nn.ModuleList([*(ResidualBlock(e) for _ in range(config.num_draft_layers)), head])
        if config.draft_vocab_size:  # draft row i is token i + d2t[i]; rows are in token order
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @property
    def head(self) -> DraftHead:
        return self.lm_head[-1]

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers between [c ; s] and the head in order, `input_proj` first if there is one."""
        blocks = [block.linear for block in self.lm_head[:-1]]
        return blocks if self.input_proj is None else [self.input_proj, *blocks]

    @property
    def draft_tokens(self) -> Tensor | None:
        """(D,) int64 token id of each draft row; None when every token can be drafted."""
        if not self.config.draft_vocab_size:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def set_draft_tokens(self, tokens: Tensor) -> None:
        """Choose which tokens can be drafted: (D,) distinct ids, any order; kept sorted."""
        tokens = tokens.unique().to(self.d2t.device)
        assert len(tokens) == self.config.draft_vocab_size, (len(tokens), self.config.draft_vocab_size)
        self.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
        self.t2d.zero_()
        self.t2d[tokens] = True

    def attach(self, output_matrix: Tensor) -> None:
        """Give head=base the base's (V, H) output matrix. It is shared, not copied, unless the vocabulary is cut."""
        tokens = self.draft_tokens
        self.head.attach(output_matrix if tokens is None else output_matrix[tokens])

    @torch.no_grad()
    def start_from(self, embedding: Tensor, output_matrix: Tensor) -> None:
        """Replace parts of the random initialisation by what the base knows, so that less text is needed.

        `rnn_w` is scaled so that embeddings, which are small in many models, enter the state at order 1; the output
        starts as the base's own, read from the state half of x (Medusa's initialisation, arXiv 2401.10774; the context
        half, from which the base predicts the token that is already known, starts at 0). Where x or the head is too
        narrow for that, they start as the base's output of that rank which is nearest in squares. Tensors (V, H).
        """
        h, e = self.config.hidden_size, self.config.exit_dim
        if self.rnn_w is not None:
            self.rnn_w.weight.div_(embedding.float().std())
        tokens = self.draft_tokens
        matrix = output_matrix.float() if tokens is None else output_matrix[tokens].float()  # (D, H)
        kept = torch.eye(h)  # (k, H): what the last k of the E features read of the state
        if self.input_proj is not None:
            if e < h:
                kept = _main_directions(matrix, e)
            rows = slice(e - len(kept), e)
            self.input_proj.weight[rows] = torch.cat([torch.zeros_like(kept), kept], 1)
            self.input_proj.bias[rows] = 0
        wanted = matrix @ kept.T  # (D, k)
        first = e - len(kept)
        if isinstance(self.head, FullHead):
            self.head.weight[:, :first] = 0
            self.head.weight[:, first:] = wanted
        elif isinstance(self.head, BaseHead):
            self.head.proj.weight.zero_()
            self.head.proj.weight[:, first:] = kept.T
        elif isinstance(self.head, LowRankHead):
            directions = _main_directions(wanted, self.config.head_rank)  # (r', k)
            self.head.down.weight[: len(directions)] = 0
            self.head.down.weight[: len(directions), first:] = directions
            self.head.up.weight[:, : len(directions)] = wanted @ directions.T
            self.head.up.weight[:, len(directions) :] = 0

    @torch.no_grad()
    def to_plain(self) -> Redrafter:
        """The same drafter with a full head, for programs that know no other: its thin matrices multiplied out.

        Raises InputError for a reduced draft vocabulary, which a full head without bias cannot express.
        """
        if self.config.draft_vocab_size:
            raise InputError(
                f"the drafter drafts {self.config.draft_vocab_size} of {self.config.vocab_size} tokens, which Apple's "
                "layout cannot say; train with drafter.draft_vocab_size=0 to export it"
            )
        c = self.config
        config = RedrafterConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            exit_dim=c.exit_dim,
            num_draft_layers=c.num_draft_layers,
            rnn=c.rnn,
        )
        matrix = functools.reduce(lambda left, right: right @ left, (part.float() for part in self.head.parts))
        tensors = {k: v for k, v in self.state_dict().items() if not k.startswith(f"lm_head.{c.num_draft_layers}.")}
        with torch.device("meta"):
            plain = Redrafter(config)
        weight = matrix.to(self.head.parts[0].dtype)
        plain.load_state_dict({**tensors, f"lm_head.{c.num_draft_layers}.weight": weight}, assign=True)
        return plain.requires_grad_(False).eval()

    def repack(self, pack: Pack) -> None:
        """Replace input_proj, blocks and output matrix by the layers that `pack` makes of a weight and a bias.

        For drafting: faster or smaller, perhaps rounded; such a head is not saved or trained.
        """
        if self.input_proj is not None:
            self.input_proj = pack(self.input_proj.weight, self.input_proj.bias)
        for block in self.lm_head[:-1]:
            block.linear = pack(block.linear.weight, block.linear.bias)
        self.lm_head[-1] = PackedHead(self.head, pack)

    def first_state(self, context: Tensor) -> Tensor:
        """s_0 for contexts (..., H)."""
        return torch.zeros_like(context)

    def embed_term(self, embedding: Tensor) -> Tensor:
        """What a token adds to the state: W emb, or emb itself without rnn. It depends on the token alone."""
        return embedding if self.rnn_w is None else self.rnn_w(embedding)

    def advance(self, state: Tensor, embed_term: Tensor) -> Tensor:
        """s_{k-1} (..., H) and the newest token's term (..., H) -> s_k (..., H)."""
        if self.rnn_u is None:
            return state + embed_term
        return F.silu(embed_term + self.rnn_u(state))

    def features(self, context: Tensor, state: Tensor) -> Tensor:
        """c (..., H), s_k (..., H) -> what the head reads (..., E)."""
        x = torch.cat([context, state], dim=-1)
        if self.input_proj is not None:
            x = self.input_proj(x)
        for block in self.lm_head[:-1]:
            x = block(x)
        return x

    def logits(self, context: Tensor, state: Tensor) -> Tensor:
        """(..., D) raw draft logits."""
        return self.head(self.features(context, state))

    def draft_chain(
        self,
        context: Tensor,
        tokens: Tensor,
        embedding: Tensor,
        num_draft_tok: int,
        choose: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Chain: (B, H) context, (B,) newest tokens, (V, H) embedding table -> (B, num_draft_tok) int64.

        Greedy unless `choose(step, logits (B, D))` gives the token ids (B,); greedy is beam search with one beam.
        Static shapes, no host synchronisation: fit for a CUDA graph.
        """
        state, newest = self.first_state(context), tokens
        table, drafts = self.draft_tokens, []
        for step in range(num_draft_tok):
            term = self.embed_term(F.embedding(newest, embedding).to(state.dtype))
            state = self.advance(state, term)
            logits = self.logits(context, state)
            if choose is not None:
                newest = choose(step, logits)
            else:
                newest = argmax(logits) if table is None else table[argmax(logits)]
            drafts.append(newest)
        return torch.stack(drafts, dim=1)

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write model.safetensors and config.json, floating tensors in `dtype` if given."""
        tensors = {
            name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().cpu().contiguous()
            for name, t in self.state_dict().items()
        }
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(self.config.to_json(), indent=2, sort_keys=True) + "\n")


def _main_directions(matrix: Tensor, count: int) -> Tensor:
    """(at most count, K): orthonormal rows R for which matrix R^T R (N, K) is nearest to the matrix in squares."""
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors  # of the smallest eigenvalue first
    return vectors[:, -min(count, matrix.shape[1]) :].T.contiguous()


def load_redrafter(folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Redrafter:
    """Read a drafter folder of ours or Apple's, in eval mode and without gradients.

    Raises InputError for a missing or truncated file, and for missing, unexpected or wrongly shaped tensors.
    """
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path, device=str(device))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; is {folder} a drafter folder?") from None
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or not a safetensors file ({error}); fetch or train it again") from None
    with torch.device("meta"):
        drafter = Redrafter(config)
    expected = drafter.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InputError(f"{path} lacks {missing[0]!r} ({len(missing)} tensors missing) that its config.json implies")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{path} has {unexpected[0]!r}, which its config.json does not imply")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{path}: {name!r} has shape {list(tensor.shape)}, config.json implies {list(expected[name].shape)}"
            )
        if tensor.is_floating_point() and dtype is not None:
            tensors[name] = tensor.to(dtype)
    drafter.load_state_dict(tensors, assign=True)
    tokens = drafter.draft_tokens
    if tokens is not None:
        ids = torch.full((1,), -1, device=tokens.device)
        if (tokens.diff(prepend=ids) < 1).any() or tokens[-1] >= config.vocab_size or not drafter.t2d[tokens].all():
            raise InputError(f"{path}: d2t and t2d do not describe {len(tokens)} of {config.vocab_size} token ids")
    return drafter.requires_grad_(False).eval()


def _read_config(path: Path) -> RedrafterConfig:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; a drafter is a folder with {CONFIG} and {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold one JSON object, got {type(data).__name__}")
    return RedrafterConfig.from_json(data, str(path))


def fingerprint(embedding: Tensor) -> str:
    """Digest of a base's (V, H) embedding table: which vocabulary and which model a drafter belongs to.

    Taken over at most 4096 evenly spaced rows rounded to bfloat16, so that it is the same for every quantised
    checkpoint of a base (quantisers leave embeddings alone) and whatever dtype it was loaded in.
    """
    rows = embedding.detach()[:: max(1, len(embedding) // 4096)].to(torch.bfloat16).cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(embedding.shape)}".encode())
    digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
