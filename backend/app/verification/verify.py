"""核验：逐项运行检查，一项一行，带量到的数；一项出错不妨碍其余。"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from app.models.transformer import GPT2Config, MoEConfig
from app.verification.subject import Subject

from . import checks, structure

Result = tuple[bool, str]
Check = tuple[str, Callable[[], Result]]
Say = Callable[[str], object]

STRUCTURE: tuple[tuple[str, Callable[[], Result]], ...] = (
    ("文件结构", structure.check_files),
    ("组件", structure.check_components),
    ("配置", structure.check_config),
    ("工厂与参数量", structure.check_factories),
)

BEHAVIOUR: tuple[tuple[str, Callable[[Subject], Result]], ...] = (
    ("参数量等于公式", checks.check_parameters),
    ("前向与初始损失", checks.check_forward),
    ("权重共享", checks.check_tying),
    ("因果性", checks.check_causality),
    ("缓存等于不用缓存", checks.check_cache),
    ("批量解码等于逐行", checks.check_rows_cached),
    ("填充不影响结果", checks.check_padding),
    ("打包的文档互不可见", checks.check_packing),
    ("成批等于单独", checks.check_batch),
    ("评估时没有 dropout", checks.check_eval_mode),
    ("SDPA 等于参考实现", checks.check_backends),
    ("专家的分派等于参考实现", checks.check_dispatch),
    ("分块损失等于整体", checks.check_loss),
    ("梯度到达每个参数", checks.check_gradients),
    ("存取逐位相同", checks.check_saving),
)


def verify_implementation(say: Say = print) -> bool:
    """结构，加上默认配置的形状（缩小）在四种归一化位置与几种选项下的行为。"""
    base = GPT2Config(vocab_size=211, context_size=64, n_layer=4, n_head=4, n_embed=64)
    variants = (
        base,
        base.replace(norm="pre"),
        base.replace(norm="deepnorm", bias=False),
        base.replace(norm="keel", n_kv_head=2, qk_norm=True, activation="swiglu"),
        base.replace(tie_weights=False, norm_type="rmsnorm", position="none"),
        base.replace(moe_num_experts=4, moe=MoEConfig(router="sigmoid", shared_experts=1, every=2)),
    )
    subjects = [Subject.of(config) for config in variants]
    behaviour = [(title, partial(_worst, check, subjects)) for title, check in BEHAVIOUR]
    return run_checks([*STRUCTURE, *behaviour], say)


def verify_config(config: GPT2Config, say: Say = print) -> bool:
    """同样的检查，用在一份配置上。"""
    subject = Subject.of(config)
    say(f"核验的配置：{_describe(config)}")
    if subject.shrunk:
        say(f"双精度下太大，标〔缩小〕的几项改用：{subject.shrunk}；其余字段照原样")
    mark = "〔缩小〕" if subject.shrunk else ""
    behaviour = [
        (title + ("" if check is checks.check_parameters else mark), partial(check, subject))
        for title, check in BEHAVIOUR
    ]
    return run_checks(behaviour, say)


def run_checks(all_checks: Sequence[Check], say: Say) -> bool:
    """返回是否全部通过。检查里的任何异常都是这一项的失败，写明类型与信息。"""
    start, failed, threads = time.perf_counter(), 0, torch.get_num_threads()
    # 矩阵都小：多线程只会互相等，机器忙时尤其如此。
    torch.set_num_threads(1)
    try:
        for title, check in all_checks:
            passed, figure = _attempt(check)
            failed += not passed
            say(f"{'✅' if passed else '❌'} {title}：{figure}")
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start
    verdict = "全部通过" if not failed else f"{failed} 项未通过"
    say(f"共 {len(all_checks)} 项，{verdict}，用时 {seconds:.1f} 秒")
    return not failed


def _attempt(check: Callable[[], Result]) -> Result:
    try:
        return check()
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def _worst(check: Callable[[Subject], Result], subjects: Sequence[Subject]) -> Result:
    """在每个配置上都查；报第一个失败的，否则报第一个配置的数与通过的个数。"""
    figures = []
    for subject in subjects:
        passed, figure = check(subject)
        if not passed:
            return False, f"norm={subject.config.norm}：{figure}"
        figures.append(figure)
    return True, f"{figures[0]}；{len(figures)} 种配置都通过"


def _describe(config: GPT2Config) -> str:
    default = GPT2Config()
    data = config.to_dict()
    shape = ("vocab_size", "context_size", "n_layer", "n_head", "n_embed", "norm")
    rest = [n for n, v in data.items() if n not in shape and v != default.to_dict().get(n)]
    return "、".join(f"{name}={data[name]}" for name in [*shape, *rest])
