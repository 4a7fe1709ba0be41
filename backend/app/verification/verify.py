"""核验：逐项运行检查，一项一行，带量到的数；一项出错不妨碍其余。"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from app.models.transformer import GPT2Config, MoEConfig
from app.verification.said import Language, Result, Said
from app.verification.subject import Subject

from . import checks, structure

Check = tuple[Said, Callable[[], Result]]
Say = Callable[[str], object]

STRUCTURE: tuple[tuple[Said, Callable[[], Result]], ...] = (
    (Said("files", "文件结构"), structure.check_files),
    (Said("components", "组件"), structure.check_components),
    (Said("configuration", "配置"), structure.check_config),
    (Said("factories and parameter counts", "工厂与参数量"), structure.check_factories),
)

BEHAVIOUR: tuple[tuple[Said, Callable[[Subject], Result]], ...] = (
    (Said("parameters equal the formula", "参数量等于公式"), checks.check_parameters),
    (Said("forward and initial loss", "前向与初始损失"), checks.check_forward),
    (Said("tied weights", "权重共享"), checks.check_tying),
    (Said("causality", "因果性"), checks.check_causality),
    (Said("cached equals uncached", "缓存等于不用缓存"), checks.check_cache),
    (Said("batched decoding equals row by row", "批量解码等于逐行"), checks.check_rows_cached),
    (Said("padding changes nothing", "填充不影响结果"), checks.check_padding),
    (Said("packed documents do not see each other", "打包的文档互不可见"), checks.check_packing),
    (Said("a batch equals each alone", "成批等于单独"), checks.check_batch),
    (Said("no dropout in evaluation", "评估时没有 dropout"), checks.check_eval_mode),
    (Said("SDPA equals the reference", "SDPA 等于参考实现"), checks.check_backends),
    (
        Said("dispatch of experts equals the reference", "专家的分派等于参考实现"),
        checks.check_dispatch,
    ),
    (Said("loss in chunks equals the whole", "分块损失等于整体"), checks.check_loss),
    (Said("gradients reach every parameter", "梯度到达每个参数"), checks.check_gradients),
    (Said("save and load to the bit", "存取逐位相同"), checks.check_saving),
)


def verify_implementation(language: Language, say: Say = print) -> bool:
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
    return run_checks([*STRUCTURE, *behaviour], language, say)


def verify_config(config: GPT2Config, language: Language, say: Say = print) -> bool:
    """同样的检查，用在一份配置上。"""
    subject = Subject.of(config)
    fields = _describe(config)
    say(Said(f"configuration: {fields}", f"核验的配置：{fields}").to(language))
    mark = Said("", "")
    if subject.shrunk:
        mark = Said(" [smaller]", "〔缩小〕")
        why = Said(
            f"too large for double precision: the checks marked{mark.english} use "
            f"{subject.shrunk}; all else as given",
            f"双精度下太大，标{mark.chinese}的几项改用：{subject.shrunk}；其余字段照原样",
        )
        say(why.to(language))
    behaviour = [
        (
            # 参数量按原样的配置数，没有缩小。
            title
            if check is checks.check_parameters
            else Said(title.english + mark.english, title.chinese + mark.chinese),
            partial(check, subject),
        )
        for title, check in BEHAVIOUR
    ]
    return run_checks(behaviour, language, say)


def run_checks(all_checks: Sequence[Check], language: Language, say: Say) -> bool:
    """返回是否全部通过。检查里的任何异常都是这一项的失败，写明类型与信息。"""
    start, failed, threads = time.perf_counter(), 0, torch.get_num_threads()
    colon = Said(": ", "：").to(language)
    # 矩阵都小：多线程只会互相等，机器忙时尤其如此。
    torch.set_num_threads(1)
    try:
        for title, check in all_checks:
            passed, figure = _attempt(check)
            failed += not passed
            mark = "✅" if passed else "❌"
            say(f"{mark} {title.to(language)}{colon}{figure.to(language)}")
    finally:
        torch.set_num_threads(threads)
    seconds, count = time.perf_counter() - start, len(all_checks)
    verdict = Said("all passed", "全部通过")
    if failed:
        verdict = Said(f"{failed} failed", f"{failed} 项未通过")
    total = Said(
        f"{count} checks, {verdict.english}, {seconds:.1f} s",
        f"共 {count} 项，{verdict.chinese}，用时 {seconds:.1f} 秒",
    )
    say(total.to(language))
    return not failed


def _attempt(check: Callable[[], Result]) -> Result:
    try:
        return check()
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        return False, Said(what, what)


def _worst(check: Callable[[Subject], Result], subjects: Sequence[Subject]) -> Result:
    """在每个配置上都查；报第一个失败的，否则报第一个配置的数与通过的个数。"""
    figures = []
    for subject in subjects:
        passed, figure = check(subject)
        if not passed:
            norm = f"norm={subject.config.norm}"
            return False, Said(f"{norm}: {figure.english}", f"{norm}：{figure.chinese}")
        figures.append(figure)
    count = len(figures)
    return True, figures[0].join(Said(f"all {count} configurations pass", f"{count} 种配置都通过"))


def _describe(config: GPT2Config) -> str:
    default = GPT2Config()
    data = config.to_dict()
    shape = ("vocab_size", "context_size", "n_layer", "n_head", "n_embed", "norm")
    rest = [n for n, v in data.items() if n not in shape and v != default.to_dict().get(n)]
    return ", ".join(f"{name}={data[name]}" for name in [*shape, *rest])
