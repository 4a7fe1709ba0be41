"""对一份配置的检查：每个函数返回 (通过, 量到的数)，不打印，不改模型。

双精度是有意的：舍入约 1e-15，而错位一格、忘了偏移之类的错误在 1e-3 以上，界线放在 1e-12。
字母：B 行数，T 词元数，V 词表。
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.transformer import GPT2Model
from app.models.transformer.layers.init import base_std
from app.models.transformer.layers.norm import NORMS
from app.verification.said import Result, Said, error, tally
from app.verification.subject import Subject

EXACT, SINGLE = 1e-12, 1e-5
_TRIALS = 6


def relative(got: Tensor, wanted: Tensor) -> float:
    """最大绝对误差 / 最大绝对值。"""
    return gap(got / wanted.abs().max(), wanted / wanted.abs().max())


def gap(got: Tensor, wanted: Tensor) -> float:
    """最大绝对误差；有 NaN 即为 inf，因为 max(0, NaN) 是 0，会把坏结果放过去。"""
    worst = float((got - wanted).abs().max())
    return math.inf if math.isnan(worst) else worst


@torch.no_grad()
def logits(model: GPT2Model, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options)["logits"]


def check_forward(subject: Subject) -> Result:
    """形状与初始损失。嵌入的标准差 s 使 logits 的方差约为 s²·d，损失约 ln V + s²·d/2。

    共享权重时输入词元自己的 logit 天生偏高，词表小而宽度大时会盖过一切，所以除去它再比。
    """
    config, ids = subject.config, subject.ids(8, subject.length(64), 0)
    out = logits(subject.model, ids)
    shape = (*ids.shape, config.vocab_size)
    if tuple(out.shape) != shape or config.vocab_size < 3:
        got = tuple(out.shape)
        return got == shape, Said(f"logits {got}, wanted {shape}", f"logits {got}，应为 {shape}")
    targets = subject.ids_like(ids, 1)
    targets = torch.where(targets == ids, (ids + 1) % config.vocab_size, targets)
    plain = float(F.cross_entropy(out.flatten(0, 1), targets.flatten()))
    others = out.scatter(-1, ids[..., None], -math.inf)
    loss = float(F.cross_entropy(others.flatten(0, 1), targets.flatten()))
    size = math.log(config.vocab_size - 1)
    expected = size + base_std(config) ** 2 * config.n_embed / 2
    figure = Said(
        f"logits {shape}, initial loss {plain:.3f}, without the input token itself {loss:.3f} "
        f"(ln(V-1) = {size:.3f}, expected {expected:.3f}±0.15)",
        f"logits {shape}，初始损失 {plain:.3f}，除去输入词元自己 {loss:.3f}"
        f"（ln(V-1) = {size:.3f}，预期 {expected:.3f}±0.15）",
    )
    return abs(loss - expected) < 0.15, figure


def check_parameters(subject: Subject) -> Result:
    """用户的配置原样在 meta 设备上造出来，与公式比。"""
    config = subject.asked
    with torch.device("meta"):
        got = GPT2Model(config).num_parameters()
    wanted = expected_parameters(subject)
    return got == wanted, Said(f"{got:,} (formula {wanted:,})", f"{got:,}（公式 {wanted:,}）")


def expected_parameters(subject: Subject) -> int:
    """V·d + C·d + 各层 + 各归一化；默认 pre 时即 V·d + C·d + L·(12d² + 13d) + 2d。"""
    c = subject.asked
    d, bias = c.n_embed, int(c.bias)
    qkv = (c.n_head + 2 * c.kv_heads) * c.head_dim
    products = (d * qkv + bias * qkv) + (d * d + bias * d) + (2 * c.head_dim if c.qk_norm else 0)

    def mlp(hidden: int) -> int:
        up = hidden * (2 if c.is_gated else 1)
        return (d * up + bias * up) + (hidden * d + bias * d)

    mixed = len(c.moe_layers)
    feeds = (c.n_layer - mixed) * mlp(c.mlp_hidden)
    feeds += mixed * c.moe_num_experts * (mlp(c.expert_hidden) + d)
    feeds += mixed * (mlp(c.shared_hidden) if c.moe.shared_experts else 0)
    norm = d * (1 + bias * NORMS[c.norm_type].biased)
    norms = {"post": 2 * c.n_layer, "deepnorm": 2 * c.n_layer, "pre": 2 * c.n_layer + 1}
    norms["keel"] = 4 * c.n_layer - 1  # 每个子层内外两个，第一个注意力没有外面的
    tables = c.vocab_size * (1 if c.tie_weights else 2)
    tables += c.context_size if c.position == "learned" else 0
    return tables * d + c.n_layer * products + feeds + norms[c.norm] * norm


def check_tying(subject: Subject) -> Result:
    """共享时：输出头就是嵌入的那块内存，没有第二份；存盘再读之后仍然如此。"""
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        loaded = GPT2Model.from_pretrained(folder)
    wanted, states = subject.config.tie_weights, []
    for model in (subject.model, loaded):
        embedding = model.embed.wte.weight
        copies = sum(
            p is not embedding and p.shape == embedding.shape and torch.equal(p, embedding)
            for p in model.parameters()
        )
        same = model.head_weight.data_ptr() == embedding.data_ptr()
        states.append((same, _head_follows(model), copies))
    ok = all(state == (wanted, wanted, 0) for state in states)
    here, read = (
        Said(
            f"{'one memory' if same else 'two memories'}, {copies} copies",
            f"{'共享同一块内存' if same else '不共享'}、{copies} 份复制",
        )
        for same, _, copies in states
    )
    return ok, Said(
        f"tie_weights={wanted}: {here.english}; after save and load: {read.english}",
        f"配置要求{'共享' if wanted else '不共享'}：{here.chinese}；存取之后：{read.chinese}",
    )


def _head_follows(model: GPT2Model) -> bool:
    """把嵌入的一行置零，看那个词元的 logit 是否跟着成为零；之后改回。"""
    ids, row = torch.zeros(1, 1, dtype=torch.long), model.config.vocab_size - 1
    weight = model.embed.wte.weight.detach()
    saved = weight[row].clone()
    weight[row] = 0.0
    after = logits(model, ids)[0, 0, row]
    weight[row] = saved
    return bool(after == 0.0)


def check_causality(subject: Subject) -> Result:
    """从第 t 个起换掉全部词元：t 之前的输出一位也不变，t 及之后的确实变。"""
    length, leak, felt = subject.length(40), 0.0, math.inf
    for trial in range(_TRIALS):
        ids, other = subject.ids(2, length, trial), subject.ids(2, length, 100 + trial)
        cut = int(torch.randint(length, (), generator=torch.Generator().manual_seed(trial)))
        changed = torch.where(torch.arange(length) >= cut, other, ids)
        before, after = (logits(subject.steady, x) for x in (ids, changed))
        if cut:
            leak = max(leak, gap(before[:, :cut], after[:, :cut]))
        if not torch.equal(ids, changed):
            felt = min(felt, gap(before[:, cut:], after[:, cut:]))
    return leak == 0.0 and felt > 0.0, Said(
        f"influence of later tokens {leak:g} (must be exactly 0, {_TRIALS} trials)",
        f"未来词元的影响 {leak:g}（要求恰为 0，{_TRIALS} 次扰动）",
    )


def check_cache(subject: Subject) -> Result:
    """随机分块喂入缓存，途中随机回滚重喂，与一次算完相同；双精度与单精度各一个界。"""
    double = max(_cached(subject, subject.model, trial) for trial in range(_TRIALS))
    single = max(_cached(subject, subject.fresh().float(), trial) for trial in range(2))
    ok = double <= EXACT and single <= SINGLE
    return ok, Said(
        f"relative error: double {double:.1e} (limit 1e-12), single {single:.1e} (limit 1e-5)",
        f"相对误差 双精度 {double:.1e}（限 1e-12），单精度 {single:.1e}（限 1e-5）",
    )


@torch.no_grad()
def _cached(subject: Subject, model: GPT2Model, seed: int) -> float:
    ids = subject.ids(3, subject.length(40), seed)
    wanted, length = logits(model, ids), ids.shape[1]
    generator = torch.Generator().manual_seed(seed)
    cache, at, worst = model.new_cache(ids.shape[0]), 0, 0.0
    while at < length:
        size = 1 + int(torch.randint(min(7, length - at), (), generator=generator))
        got = logits(model, ids[:, at : at + size], cache=cache, use_cache=True)
        worst = max(worst, relative(got, wanted[:, at : at + size]))
        at += size
        if int(torch.randint(3, (), generator=generator)) == 0 and at < length:
            at -= int(torch.randint(size + 1, (), generator=generator))
            cache.truncate(at)
    return worst


def check_rows_cached(subject: Subject) -> Result:
    """左填充的一批预填之后逐个解码，途中换行：每行与它单独、不用缓存时相同。"""
    length = subject.length(18)
    lengths = [max(1, length // 2), max(1, length // 4), 1]
    steps = min(6, length - lengths[0])
    if steps < 1:
        size = f"context_size={subject.config.context_size}"
        return True, Said(f"not applicable: {size} is too short", f"不适用：{size} 放不下续写")
    rows = [subject.ids(1, n + steps, i)[0] for i, n in enumerate(lengths)]
    wanted = [logits(subject.model, row[None])[0] for row in rows]
    cache = subject.model.new_cache(len(rows))
    ids, mask = _left([row[:n] for row, n in zip(rows, lengths, strict=True)])
    got = logits(subject.model, ids, attention_mask=mask, cache=cache, use_cache=True)[:, -1]
    order, worst = [0, 1, 2], 0.0
    for step in range(steps):
        for i, row in enumerate(order):
            worst = max(worst, relative(got[i], wanted[row][lengths[row] + step - 1]))
        if step == 2:
            order = [2, 0]
            cache.reorder(torch.tensor(order))
        column = torch.stack([rows[row][lengths[row] + step] for row in order])[:, None]
        got = logits(subject.model, column, cache=cache, use_cache=True)[:, -1]
    return worst <= EXACT, error(worst)


def check_padding(subject: Subject) -> Result:
    """左右填充：真词元处与单独时相同；填充处写什么号，一位也不影响。"""
    lengths = [subject.length(21), subject.length(8), 1]
    rows = [subject.ids(1, n, i)[0] for i, n in enumerate(lengths)]
    alone = [logits(subject.steady, row[None])[0] for row in rows]
    worst, leak = 0.0, 0.0
    for side in (_left, _right):
        ids, mask = side(rows)
        got = logits(subject.steady, ids, attention_mask=mask)
        for i, wanted in enumerate(alone):
            worst = max(worst, relative(got[i][mask[i] == 1], wanted))
        junk = torch.where(mask == 1, ids, subject.ids_like(ids, 9))
        other = logits(subject.steady, junk, attention_mask=mask)
        leak = max(leak, gap(got[mask == 1], other[mask == 1]))
    ok = worst <= EXACT and leak == 0.0
    return ok, Said(
        f"relative error, padded left and right, {worst:.1e} (limit 1e-12); influence of what "
        f"the padding holds {leak:g} (must be exactly 0)",
        f"左右填充的相对误差 {worst:.1e}（限 1e-12），填充内容的影响 {leak:g}（要求恰为 0）",
    )


def check_packing(subject: Subject) -> Result:
    """打包：换掉前一个文档，后一个一位也不变；每个文档与它单独时相同。"""
    half = max(1, subject.length(30) // 2)
    if subject.config.context_size < 2:
        return True, Said(
            "not applicable: context_size=1 has no room for two documents",
            "不适用：context_size=1 放不下两个文档",
        )
    first, second = subject.ids(2, half, 0), subject.ids(2, half, 1)
    segments = torch.tensor([[0] * half + [1] * half] * 2)
    got = logits(subject.steady, torch.cat([first, second], 1), segment_ids=segments)
    other = torch.cat([subject.ids(2, half, 2), second], 1)
    changed = logits(subject.steady, other, segment_ids=segments)
    leak = gap(got[:, half:], changed[:, half:])
    parts = [logits(subject.steady, part) for part in (first, second)]
    worst = relative(got, torch.cat(parts, 1))
    ok = leak == 0.0 and worst <= EXACT
    return ok, Said(
        f"influence of the document before {leak:g} (must be exactly 0); relative error against "
        f"each alone {worst:.1e} (limit 1e-12)",
        f"前一文档的影响 {leak:g}（要求恰为 0），与单独算的相对误差 {worst:.1e}（限 1e-12）",
    )


def check_batch(subject: Subject) -> Result:
    ids = subject.ids(5, subject.length(24), 3)
    alone = torch.cat([logits(subject.model, row[None]) for row in ids])
    worst = relative(logits(subject.model, ids), alone)
    return worst <= EXACT, Said(
        f"relative error of 5 rows at once against one by one {worst:.1e} (limit 1e-12)",
        f"5 行同算与逐行算的相对误差 {worst:.1e}（限 1e-12）",
    )


def check_eval_mode(subject: Subject) -> Result:
    """eval 下没有随机性；train 下有 dropout。"""
    ids, model = subject.ids(2, subject.length(24), 4), subject.fresh()
    torch.manual_seed(1)
    still = torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    moving = not torch.equal(logits(model, ids), logits(model, ids))
    dropout = subject.config.dropout
    return still and moving, Said(
        f"two runs in eval {'equal to the bit' if still else 'differ'}, two in train "
        f"{'differ' if moving else 'are equal'} (checked with dropout={dropout})",
        f"eval 两次{'逐位相同' if still else '不同'}，train 两次{'不同' if moving else '相同'}"
        f"（以 dropout={dropout} 查）",
    )


def check_backends(subject: Subject) -> Result:
    """SDPA 与十行的参考实现；因果、填充、打包三种掩码。"""
    fast, slow = (subject.fresh(attention_backend=name) for name in ("sdpa", "reference"))
    length = subject.length(24)
    ids, mask = subject.ids(2, length, 5), torch.ones(2, length, dtype=torch.long)
    mask[1, : length // 2] = 0
    segments = (torch.arange(length) * 2 // length).expand(2, -1).contiguous()
    worst = 0.0
    for options in ({}, {"attention_mask": mask}, {"segment_ids": segments}):
        real = mask == 1 if "attention_mask" in options else torch.ones_like(mask) == 1
        got, wanted = (logits(model, ids, **options)[real] for model in (fast, slow))
        worst = max(worst, relative(got, wanted))
    return worst <= EXACT, Said(
        f"relative error {worst:.1e} (limit 1e-12; causal, padded, packed)",
        f"相对误差 {worst:.1e}（限 1e-12；因果、填充、打包）",
    )


def check_dispatch(subject: Subject) -> Result:
    """各专家只算自己的词元，与每个专家算每个词元的参考相同：输出、负载与梯度。"""
    config = subject.config
    if not config.moe_layers:
        return True, Said("not applicable: there are no experts", "不适用：没有专家")
    ids, results = subject.ids(2, subject.length(24), 11), []
    mask = torch.ones_like(ids)
    mask[1, : ids.shape[1] // 2] = 0
    for dispatch in ("sorted", "reference"):
        model = subject.fresh(moe=replace(config.moe, dispatch=dispatch))
        out = model(ids, targets=subject.ids_like(ids, 12), attention_mask=mask)
        (out["loss"] + out["aux_loss"]).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((out["loss"].detach(), out["expert_load"], grads))
    (loss, load, slope), (wanted, true_load, true_slope) = results
    worst = max(relative(loss, wanted), relative(slope, true_slope))
    ok = worst <= EXACT and torch.equal(load, true_load)
    share = float((load.double() / load.sum(1, keepdim=True)).max())
    return ok, Said(
        f"relative error of loss and gradients {worst:.1e} (limit 1e-12); the busiest expert "
        f"has {share:.0%}",
        f"损失与梯度的相对误差 {worst:.1e}（限 1e-12），最忙的专家占 {share:.0%}",
    )


def check_loss(subject: Subject) -> Result:
    """分块的损失与整张 logits 上的交叉熵；-100 不计；两边的梯度也相同。"""
    ids, targets = (subject.ids(3, subject.length(20), i) for i in (6, 7))
    targets[0, ::2] = -100
    losses, gradients = [], []
    for whole in (False, True):
        model = subject.fresh()
        if whole:
            out = model(ids)["logits"].flatten(0, 1)
            loss = F.cross_entropy(out, targets.flatten(), ignore_index=-100)
        else:
            loss = model(ids, targets=targets)["loss"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.embed.wte.weight.grad)
    worst = relative(losses[0], losses[1])
    slope = relative(*gradients)  # type: ignore[arg-type]
    ok = worst <= EXACT and slope <= EXACT
    return ok, Said(
        f"relative error of the loss {worst:.1e}, of the embedding's gradient {slope:.1e} "
        "(limit 1e-12)",
        f"损失相对误差 {worst:.1e}，嵌入梯度 {slope:.1e}（限 1e-12）",
    )


def check_gradients(subject: Subject) -> Result:
    """每个参数都收到有限且非零的梯度。"""
    model = subject.fresh()
    ids = subject.ids(2, subject.length(24), 8)
    model(ids, targets=subject.ids_like(ids, 9))["loss"].backward()
    dead = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    total = len(list(model.parameters()))
    return not dead, tally(total, dead, Said("parameters have a gradient", "个参数有梯度"))


def check_saving(subject: Subject) -> Result:
    """存成 safetensors 再读：每个张量逐位相同，配置相同，没有别的格式的文件。"""
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        loaded = GPT2Model.from_pretrained(folder)
        files = sorted(path.name for path in Path(folder).iterdir())
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    before, after = subject.model.state_dict(), loaded.state_dict()
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    ids = subject.ids(1, subject.length(16), 10)
    # 权重逐位相同，输出只到舍入：内存对齐不同，矩阵乘的累加次序就可能不同。
    close = relative(logits(loaded, ids), logits(subject.model, ids)) <= EXACT
    ok = same and close and loaded.config == subject.config
    ok = ok and files == ["config.json", "model.safetensors"]
    count, names = len(before), ", ".join(files)
    return ok, Said(
        f"{count} tensors {'equal to the bit' if same else 'with differences'}, "
        f"{size / 1e6:.1f} MB; files: {names}",
        f"{count} 个张量{'逐位相同' if same else '有不同'}，{size / 1e6:.1f} MB；文件：{names}",
    )


def _left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


def _right(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    ids, mask = _left([row.flip(0) for row in rows])
    return ids.flip(1), mask.flip(1)
