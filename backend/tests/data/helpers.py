"""准备数据的测试共用的：语料、跑一遍、读回来。"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from app.data.journal import LOCK_FILE
from app.data.prepare import Summary, TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.data.shards import TokenDataset


def run(source: Path, out: Path, kind: Any = "bytes", **options: Any) -> Summary:
    spec = TokenizerSpec(kind, options.pop("vocab_size", None))
    return prepare(Sources([source]), out, spec, say=lambda _: None, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != LOCK_FILE
    }


def write_corpus(folder: Path, documents: int = 400) -> Path:
    folder.mkdir()
    words = random.Random(0)
    lines = []
    for i in range(documents):
        size = words.randrange(30, 300)
        text = " ".join(words.choice(["é", "data", "中文", "model\n", "a"]) for _ in range(size))
        lines.append(json.dumps({"text": f"{i} {text}"}))
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "b.txt").write_text("plain text, no line end " * 500, encoding="utf-8")
    return folder


def documents_of(dataset: TokenDataset) -> list[str]:
    tokenizer = dataset.tokenizer()
    borders = [*dataset.document_starts.tolist(), dataset.n_tokens]
    texts = []
    for start, end in zip(borders, borders[1:], strict=False):
        ids = dataset.read(start, end - start).tolist()
        assert ids[-1] == tokenizer.document_separator
        texts.append(tokenizer.decode(ids[:-1]))
    return texts
