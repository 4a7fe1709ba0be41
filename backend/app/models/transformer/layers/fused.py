"""哪些矩阵是几个拼成的：唯一知道的地方。不需要 torch。

    c_attn          q、k、v
    有门的 c_fc     gate、up

都沿输出的那一维（行）相接。按部分办事的都来问：初始化、Muon、读写别家的权重，以后还有量化与张量并行。
H 查询头数、G 键值头数、D 头宽、h 前馈的宽度。
"""

from __future__ import annotations

from ..config import GPT2Config


def attention_parts(config: GPT2Config) -> dict[str, int]:
    """{部分: 行数}：q 是 H·D，k 与 v 各 G·D。"""
    keys = config.kv_heads * config.head_dim
    return {"q": config.n_head * config.head_dim, "k": keys, "v": keys}


def feed_forward_parts(config: GPT2Config, hidden: int) -> dict[str, int]:
    """{部分: 行数}，前馈（或一个专家）的 c_fc；hidden 是 h。"""
    return {"gate": hidden, "up": hidden} if config.is_gated else {"up": hidden}


def parts_of(name: str, rows: int, config: GPT2Config) -> dict[str, int]:
    """一个模块或参数里的 {部分: 行数}，按存放的次序；不是拼成的就只有一个，名字是它自己的。

    Args:
        name: 如 "h.0.attn.c_attn"，可以带 ".weight" 或 ".bias"。
        rows: 输出的那一维有多长；叠起来的专家是一个专家的。
    """
    leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if leaf == "c_attn":
        return attention_parts(config)
    if leaf == "c_fc" and config.is_gated:
        return feed_forward_parts(config, rows // 2)
    return {leaf: rows}
