"""看到的 -> JSON。只有要了的才在里面。

T 词元数、N 层数、H 查询头数、V 词表、E 专家数、k 每个词元的专家数、L 点名的层数。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.inspection.attention import as_bytes
from app.inspection.heads import Heads
from app.inspection.lens import TOP, Lens
from app.inspection.look import Look, Norms
from app.inspection.patterns import words
from app.serving.api.answers import token_text
from app.serving.api.inside.packed import pack, packed_bytes
from app.serving.served import Served

FOLDER = "backend/app/inspection/"
_SOURCES = {
    "attention": "attention.py", "lens": "lens.py", "norms": "walk.py", "routing": "walk.py",
    "patterns": "patterns.py", "head_scores": "heads.py", "next_logits": "walk.py",
    "next": "walk.py",
}  # fmt: skip
# lens 的一个词在 JSON 里大约多少字节。
_WORD = 16


@dataclass(frozen=True)
class Inspection:
    """查过的请求：看哪个模型的哪些词元，要哪几样；空 = 不要。"""

    served: Served
    ids: tuple[int, ...]
    top: int
    attention: tuple[int, ...] = ()
    patterns: tuple[int, ...] = ()
    routing: tuple[int, ...] = ()
    lens: bool = False
    norms: bool = False
    next_logits: bool = False
    heads: bool = False

    def bytes(self) -> dict[str, int]:
        """各字段使回答多出几字节；在算之前就知道。"""
        config, width, n = self.served.engine.model.config, self.served.engine.width, len(self.ids)
        square, rows = n * n, (config.n_layer + 1) * n
        each = {
            "attention": packed_bytes(len(self.attention) * (config.n_head + 1) * square, 1),
            "patterns": packed_bytes(len(self.patterns) * square, 1),
            "routing": packed_bytes(len(self.routing) * n * config.moe_top_k, 6),
            "lens": packed_bytes(rows * (2 * TOP + 3), 4) + rows * TOP * _WORD,
            "norms": packed_bytes(3 * rows, 4),
            "next_logits": packed_bytes(width, 4),
            "heads": packed_bytes(3 * config.n_layer * config.n_head, 4),
        }
        return {name: size for name, size in each.items() if getattr(self, name)}


def write(asked: Inspection, look: Look) -> dict[str, Any]:
    served, config = asked.served, asked.served.engine.model.config
    answer: dict[str, Any] = {
        "model": served.name,
        "tokens": token_cards(served, asked.ids),
        "context": served.context,
        "final_norm": config.has_final_norm,
        "layers": config.n_layer,
        "heads": config.n_head,
    }
    parts: dict[str, Any] = {}

    def cells(layers: Sequence[int]) -> dict[str, Any]:
        return pack(np.stack([look.hidden[layer] for layer in layers]), "uint8")

    if asked.top and look.next_logits is not None:
        parts["next"] = _likeliest(served, look.next_logits, asked.top)
    if asked.next_logits:
        parts["next_logits"] = pack(look.next_logits, "float32")
    if asked.attention:
        parts["attention"] = {
            "layers": list(asked.attention),
            "scale": "sqrt",
            "weights": pack(
                np.stack([as_bytes(look.attention[layer]) for layer in asked.attention]), "uint8"
            ),
            "hidden": cells(asked.attention),
        }
    if asked.patterns:
        parts["patterns"] = {
            "layers": list(asked.patterns),
            "text": [words(config.patterns[layer]) for layer in asked.patterns],
            "hidden": cells(asked.patterns),
        }
    if asked.routing:
        parts["routing"] = _routing(asked, look)
    if look.lens is not None:
        parts["lens"] = _lens(served, look.lens)
    if look.norms is not None:
        parts["norms"] = _norms(look.norms)
    if look.heads is not None:
        parts["head_scores"] = head_scores(look.heads)
    return answer | parts | {"source": {name: FOLDER + _SOURCES[name] for name in parts}}


def token_cards(served: Served, ids: Sequence[int]) -> list[dict[str, Any]]:
    tokenizer = served.tokenizer
    return [
        {"id": i, "text": token_text(tokenizer, i), "bytes": list(tokenizer.token_bytes(i))}
        for i in ids
    ]


def head_scores(scores: Heads) -> dict[str, Any]:
    return {
        "induction": pack(scores.induction, "float32"),
        "previous": pack(scores.previous, "float32"),
        "first": pack(scores.first, "float32"),
        "length": scores.length,
    }


def _likeliest(served: Served, logits: np.ndarray, top: int) -> list[dict[str, Any]]:
    wide = logits.astype(np.float64)
    logs = wide - wide.max()
    logs -= np.log(np.exp(logs).sum())
    best = np.argsort(-logs, kind="stable")[:top]
    cards = token_cards(served, best.tolist())
    return [card | {"logprob": float(logs[card["id"]])} for card in cards]


def _routing(asked: Inspection, look: Look) -> dict[str, Any]:
    config = asked.served.engine.model.config
    chosen = [look.routing[layer] for layer in asked.routing]
    kind = "uint8" if config.moe_num_experts < 256 else "uint16"
    return {
        "layers": list(asked.routing),
        "experts": config.moe_num_experts,
        "top_k": config.moe_top_k,
        "expert": pack(np.stack([expert for expert, _ in chosen]), kind),
        "weight": pack(np.stack([weight for _, weight in chosen]), "float32"),
    }


def _lens(served: Served, lens: Lens) -> dict[str, Any]:
    names = {i: token_text(served.tokenizer, i) for i in np.unique(lens.top_id).tolist()}
    return {
        "top_id": pack(lens.top_id, "uint32"),
        "top_p": pack(lens.top_p, "float32"),
        "top_text": [[[names[i] for i in one] for one in row] for row in lens.top_id.tolist()],
        "rank": pack(lens.rank, "uint32"),
        "kl": pack(lens.kl, "float32"),
        "entropy": pack(lens.entropy, "float32"),
    }


def _norms(norms: Norms) -> dict[str, Any]:
    return {
        "stream": pack(norms.stream, "float32"),
        "attention": pack(norms.attention, "float32"),
        "mlp": pack(norms.mlp, "float32"),
        "additive": norms.additive,
    }
