"""打开一次训练要读的：训练集与它的读法、各个验证集；凡是与配置不合的都在这里拒绝。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.common.tell import Tell
from app.data.feed import Feed, open_feed
from app.data.shards import TokenDataset

from .config import TrainConfig
from .objectives.reference import with_reference
from .saving.initial import new_tokens
from .settings.data import OWN
from .watch.plateau import unigram_entropy
from .watch.validation import Held, Spread, Taken

# 核对更多的数据要几秒以上，先说一声。
_SAY_BYTES = 2e9
# 这么小的验证集就整个量：几窗的误差比省下的时间贵。
SMALL = 1 << 16


@dataclass(frozen=True)
class Data:
    """
    Attributes:
        val: {名字: 验证集}，第一个决定 best 与 patience；可以没有。
        feed: 训练集怎样读。
        reference: {数据集的指纹: 参考模型给各例的对数概率 (N,)}；只有 DPO 有。
        reference_key: 哪个参考。
    """

    train: TokenDataset
    val: dict[str, TokenDataset]
    feed: Feed
    reference: Mapping[str, np.ndarray] = field(default_factory=dict)
    reference_key: str | None = None

    def compared(self, reference: Mapping[str, np.ndarray], key: str) -> Data:
        feed = with_reference(self.feed, reference[self.train.fingerprint])
        return replace(self, feed=feed, reference=reference, reference_key=key)

    @property
    def entropy(self) -> float | None:
        """一元熵；只有每个词元都计分的文本，损失才能与它比。"""
        return unigram_entropy(self.train) if self.train.kind == "text" else None

    @property
    def fingerprints(self) -> tuple[str, str]:
        """训练集的，与各验证集的；没有验证集的为空。"""
        return self.train.fingerprint, " ".join(part.fingerprint for part in self.val.values())


def open_data(config: TrainConfig, tell: Tell) -> Data:
    """
    Raises:
        ValueError: 没有数据集，数据损坏，词表大于模型的，几部分不是同一个分词器写的，或与目标不合。
    """
    folder, verify = Path(config.data.folder), config.data.verify
    places = [folder, *map(Path, config.data.val.values())]
    size = sum(path.stat().st_size for place in places for path in place.glob("**/tokens-*.bin"))
    if verify == "sha256" and size > _SAY_BYTES:
        tell(
            f"note: reading {size / 1e9:.1f} GB of data once to check it; "
            "--data.verify size skips that"
        )
    train = TokenDataset.open(folder / "train", verify)
    if train.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the data in {folder} has a vocabulary of {train.vocab_size} but "
            f"model.vocab_size={config.model.vocab_size}: use model.vocab_size={train.vocab_size} "
            "or more"
        )
    _check_kind(train, config)
    val = dict(_validation_sets(config))
    if not val:
        if config.patience:
            raise ValueError(
                f"patience={config.patience} watches the validation loss but {folder} has no "
                "validation part: prepare one, or leave --patience out"
            )
        tell(f"note: {folder} has no validation part: no validation loss will be measured")
    for part in val.values():
        _check_tokenizer(part, train)
        _check_kind(part, config)
    return Data(train, val, feed_of(train, config, config.batch_size, config.seed, tell))


def with_steps(config: TrainConfig, feed: Feed) -> TrainConfig:
    """epochs 换成步数；从此只有步数，run.yaml 里也是。"""
    if config.epochs is None:
        return config
    return config.replace(steps=feed.steps_of(config.epochs), epochs=None)


def feed_of(
    data: TokenDataset, config: TrainConfig, rows: int, seed: int, tell: Tell = lambda text: None
) -> Feed:
    """一次 rows 行；训练集与验证集同样的读法。"""
    text = data.kind == "text"
    # 验证集可以是另一种数据：文本没有回答，也不必装箱。
    own = data.folder.parent == Path(config.data.folder)
    return open_feed(
        data,
        config.model.context_size,
        rows,
        seed,
        score=config.objective.score if own or not text else "all",
        pack=config.data.pack if own or not text else False,
        documents=config.data.documents,
        say=tell,
    )


def held_rows(name: str, opened: Data, config: TrainConfig) -> Held:
    """验证时读哪些行：自己的文本照旧是铺开的窗口；别的小的就整个。"""
    data = opened.val[name]
    windows = config.eval_batches * config.batch_size
    text = data.kind == "text"
    if data.n_tokens <= SMALL and not (text and name == OWN):
        windows = 0
    if text and config.data.documents == "joined":
        return Spread(data, config.model.context_size, windows, config.rows_at_once)
    feed = feed_of(data, config, config.rows_at_once, 0)
    scored = "all" if text or config.objective.score == "all" else "answers"
    how: dict[str, Any] = {"scored": scored}
    if data.fingerprint in opened.reference:
        feed = with_reference(feed, opened.reference[data.fingerprint])
        # 别的 β、别的参考就是别的损失。
        how |= {name: getattr(config.objective, name) for name in ("dpo_beta", "dpo_sft")}
        how["reference"] = opened.reference_key
    return Taken(feed, data, windows, how)


def _validation_sets(config: TrainConfig) -> Iterator[tuple[str, TokenDataset]]:
    """点名的在前；最后是数据集自己的验证部分，有的话，而且还没有点过名。"""
    seen: set[Path] = set()
    for name, place in config.data.val.items():
        found = [path for path in (Path(place) / "val", Path(place)) if path.is_dir()]
        if not found:
            raise ValueError(
                f"data.val.{name}={place} is no folder: give a dataset folder of `gpt2 prepare`, "
                "or one part of it"
            )
        seen.add(found[0].resolve())
        yield name, TokenDataset.open(found[0], config.data.verify)
    own = Path(config.data.folder) / "val"
    if own.is_dir() and own.resolve() not in seen:
        yield OWN, TokenDataset.open(own, config.data.verify)


def _check_tokenizer(part: TokenDataset, train: TokenDataset) -> None:
    """训练集的可以是验证集的加上特殊词元：同样的号仍是同样的词元（微调前的数据就是这样）。"""
    written, used = (one.meta["tokenizer"]["fingerprint"] for one in (part, train))
    if written == used:
        return
    try:
        new_tokens(part.tokenizer(), train.tokenizer(), str(part.folder))
    except ValueError:
        raise ValueError(
            f"{part.folder} was written with the tokenizer {written[:12]} but "
            f"{train.folder} with {used[:12]}: their losses "
            "have nothing to do with each other; prepare both parts together into a new folder"
        ) from None


def _check_kind(data: TokenDataset, config: TrainConfig) -> None:
    kind, pairs = config.objective.kind, data.kind == "preference"
    if data.folder.parent == Path(config.data.folder) and kind == "dpo" and not pairs:
        raise ValueError(
            f"objective.kind=dpo compares chosen with rejected answers but {data.folder} holds "
            f"{data.kind}: prepare preference data, or use objective.kind=lm"
        )
    if pairs and kind != "dpo":
        raise ValueError(
            f"{data.folder} holds preference pairs but objective.kind={kind} does not compare: "
            "use objective.kind=dpo, or data of another kind"
        )
    if data.kind != "text" and config.data.pack and config.model.moe.capacity_factor is not None:
        raise ValueError(
            f"data.pack=true with model.moe.capacity_factor={config.model.moe.capacity_factor}: "
            "a full expert drops tokens of one example because of another; use capacity_factor "
            "None, or data.pack=false"
        )
