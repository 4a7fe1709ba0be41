"""这样训练合不合常理：每步的词元数，总的词元数。只提醒，不拦。"""

from __future__ import annotations

from ..config import TrainConfig

# GPT-3（arXiv:2005.14165 表 2.1）的 (参数量, 每步词元数)。
_GPT3 = ((125e6, 5e5), (1.3e9, 1e6), (6.7e9, 2e6), (175e9, 3.2e6))
# 比第一行还小这么多的模型，表里没有可比的。
_COMPARABLE = 0.8
_FAR = 8
# Hoffmann et al. 2022, arXiv:2203.15556：给定运算量时约 20 个词元一个参数最好。
_CHINCHILLA = 20


def token_notes(config: TrainConfig, parameters: int, preset: TrainConfig | None) -> list[str]:
    """英文的提醒，可以没有；preset 是运行文件原来的设置。"""
    warning = small_step(config, parameters, preset)
    notes = [] if warning is None else [warning]
    ratio = config.steps * config.tokens_per_step / parameters
    if ratio * _FAR <= _CHINCHILLA:
        notes.append(
            f"note: {ratio:.2g} tokens per parameter in this run; about {_CHINCHILLA} use the "
            "compute best (arXiv:2203.15556), fewer are fine for a trial"
        )
    return notes


def small_step(config: TrainConfig, parameters: int, preset: TrainConfig | None) -> str | None:
    """每步的词元远少于运行文件的（或 GPT-3 同样大小的）就是一句提醒。"""
    mine = config.tokens_per_step
    if preset is not None and mine * _FAR <= preset.tokens_per_step:
        return _small_step(mine, preset.tokens_per_step, "the run file")
    if (usual := _usual(parameters)) is not None and mine * _FAR <= usual:
        return _small_step(mine, usual, f"GPT-3 models near {parameters / 1e6:,.0f}M")
    return None


def _usual(parameters: int) -> float | None:
    rows = [tokens for size, tokens in _GPT3 if parameters >= _COMPARABLE * size]
    return rows[-1] if rows else None


def _small_step(mine: int, usual: float, whose: str) -> str:
    return (
        f"warning: {mine:,} tokens a step, far under the {usual:,.0f} of {whose}: gradients will "
        "be noisy and its learning rate too high; raise --batch-size (--micro-batch keeps the "
        "memory) or lower --optim.lr"
    )
