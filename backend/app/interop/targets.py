"""哪种配置能去哪种格式，去不了的为什么，还能去哪里。不导入 torch：--help 与 plan 都能问。"""

from __future__ import annotations

from typing import Literal, get_args

from app.models.transformer.config import GPT2Config
from app.models.transformer.weights.families import GPT2, MIXTRAL, OPENAI_GPT, OPT, why_not

Target = Literal["hf", "opt", "openai-gpt", "mixtral", "gguf", "onnx"]
TARGETS: tuple[Target, ...] = get_args(Target)


def family_name(config: GPT2Config) -> str | None:
    """hf 格式里的哪一种模型：pre 是 GPT-2，post 与 deepnorm 是 OPT，有专家的是 Mixtral。

    None = 自带代码的那种。
    """
    reasons = {
        "gpt2": _gpt2(config), "opt": _opt(config), "mixtral": why_not(MIXTRAL, config),
    }  # fmt: skip
    for name, reason in reasons.items():
        if reason is None:
            return name
    return None


def reason_against(target: Target, config: GPT2Config) -> str | None:
    """去不了的原因；None = 去得了。"""
    match target:
        case "hf":
            # 没有现成的模型认得的，写成自带代码的一种。
            return None
        case "opt":
            return _opt(config)
        case "openai-gpt":
            return why_not(OPENAI_GPT, _folded(config)) or _tied(config)
        case "mixtral":
            return why_not(MIXTRAL, config)
        case "gguf":
            return _gguf(config)
        case "onnx":
            return _onnx(config)


def check_target(target: Target, config: GPT2Config) -> None:
    """
    Raises:
        ValueError: 去不了；点名原因与去得了的格式。
    """
    reason = reason_against(target, config)
    if reason is None:
        return
    others = [t for t in TARGETS if t != target and reason_against(t, config) is None]
    raise ValueError(
        f"this model cannot become {target}: {reason}. Targets that take it: "
        f"{', '.join(f'--to {t}' for t in others)}"
    )


def _folded(config: GPT2Config) -> GPT2Config:
    """deepnorm 先折成 post（见 equivalent.as_post），再问。"""
    return config.replace(norm="post") if config.norm == "deepnorm" else config


def _gpt2(config: GPT2Config) -> str | None:
    return why_not(GPT2, config)


def _opt(config: GPT2Config) -> str | None:
    return why_not(OPT, _folded(config))


def _tied(config: GPT2Config) -> str | None:
    return None if config.tie_weights else "tie_weights=False but GPT-1's head is always tied"


def _gguf(config: GPT2Config) -> str | None:
    """llama.cpp 的 gpt2：Pre-LN、学得的位置、tanh 近似的 GELU，别的都写死了。"""
    reason = why_not(GPT2, config)
    if reason is not None:
        return reason.replace("gpt2", "llama.cpp's gpt2")
    if config.activation != "gelu_tanh":
        return f"activation={config.activation!r} but llama.cpp's gpt2 has only 'gelu_tanh'"
    return None


def _onnx(config: GPT2Config) -> str | None:
    """图里的掩码由位置算出，稀疏图样也是；MoE 的分派随数据而变，导不出静态的图。"""
    if config.moe_num_experts:
        return f"moe_num_experts={config.moe_num_experts}: routing tokens is no static graph"
    return None
