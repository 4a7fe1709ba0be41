"""能写成哪些格式：一张登记表，一行一种。不导入 torch：--help 与 plan 都能问。

添一种：写一个 Write 形状的函数，在 TARGETS 里登记它。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from app.models.transformer.config import GPT2Config
from app.models.transformer.weights.families import GPT2, MIXTRAL, OPENAI_GPT, OPT, why_not

if TYPE_CHECKING:
    from app.interop.compare import Exported
    from app.interop.job import Job


@dataclass(frozen=True)
class Row:
    """登记表的一行。

    Attributes:
        why_not: 这种配置去不了的原因；None = 去得了。
        writer: "模块:函数"，用到才导入；函数是 (Job) -> Exported。
        quantize: 它认得的 --quantize。
        codes: 收得下量化的模型的码；否则写浮点的一份。
        chats: 自己写对话模板（Job.template）。
    """

    why_not: Callable[[GPT2Config], str | None]
    writer: str
    quantize: tuple[str, ...] = ()
    codes: bool = False
    chats: bool = False

    def write(self, job: Job) -> Exported:
        """
        Raises:
            ValueError: 写不成；点名原因。
            ImportError: 这种格式要的库没有装；点名 extra。
        """
        module, name = self.writer.split(":")
        found: Exported = getattr(import_module(module), name)(job)
        return found


def family_name(config: GPT2Config) -> str | None:
    """hf 格式里的哪一种模型：pre 是 GPT-2，post 与 deepnorm 是 OPT，有专家的是 Mixtral。

    None = 自带代码的那种。
    """
    reasons = {"gpt2": _gpt2(config), "opt": _opt(config), "mixtral": _mixtral(config)}
    return next((name for name, reason in reasons.items() if reason is None), None)


def _folded(config: GPT2Config) -> GPT2Config:
    """deepnorm 先折成 post（见 equivalent.as_post），再问。"""
    return config.replace(norm="post") if config.norm == "deepnorm" else config


def _gpt2(config: GPT2Config) -> str | None:
    return why_not(GPT2, config)


def _opt(config: GPT2Config) -> str | None:
    return why_not(OPT, _folded(config))


def _openai_gpt(config: GPT2Config) -> str | None:
    if (reason := why_not(OPENAI_GPT, _folded(config))) is not None:
        return reason
    return None if config.tie_weights else "tie_weights=False but GPT-1's head is always tied"


def _mixtral(config: GPT2Config) -> str | None:
    return why_not(MIXTRAL, config)


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


_HF = "app.interop.hf_targets"
TARGETS: dict[str, Row] = {
    # 没有现成的模型认得的，写成自带代码的一种，所以什么都去得了。
    "hf": Row(lambda config: None, f"{_HF}:export_hf"),
    "opt": Row(_opt, f"{_HF}:export_opt"),
    "openai-gpt": Row(_openai_gpt, f"{_HF}:export_openai_gpt"),
    "mixtral": Row(_mixtral, f"{_HF}:export_mixtral"),
    "gguf": Row(
        _gguf, "app.interop.gguf_file:export_gguf", quantize=("q8_0",), codes=True, chats=True
    ),
    "onnx": Row(_onnx, "app.interop.onnx_graph:export_onnx"),
}
if TYPE_CHECKING:
    Target = str
else:
    # 命令行的选项从表里来：登记了就有。
    Target = Literal[tuple(TARGETS)]


def reason_against(target: Target, config: GPT2Config) -> str | None:
    """去不了的原因；None = 去得了。"""
    return TARGETS[target].why_not(config)


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
