"""主干与 transformers 的模型互换，登记到 Auto 类，连代码一起写进文件夹。"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_imports

import app.models.transformer as core_package
from app.models.transformer import GPT2Model
from app.quantization.model import QuantizedModel

from .configuration_workbench import WorkbenchConfig
from .modeling_workbench import WorkbenchForCausalLM, WorkbenchModel, is_tied
from .quantized import wrap_quantized

AUTO_MAP = {
    "AutoConfig": "configuration_workbench.WorkbenchConfig",
    "AutoModel": "modeling_workbench.WorkbenchModel",
    "AutoModelForCausalLM": "modeling_workbench.WorkbenchForCausalLM",
}
_HERE = Path(__file__).parent
_CORE = Path(core_package.__file__ or "").parent


def register() -> None:
    """让 AutoConfig、AutoModel、AutoModelForCausalLM 认得我们的 model_type；可重复调用。"""
    AutoConfig.register(WorkbenchConfig.model_type, WorkbenchConfig, exist_ok=True)
    AutoModel.register(WorkbenchConfig, WorkbenchModel, exist_ok=True)
    AutoModelForCausalLM.register(WorkbenchConfig, WorkbenchForCausalLM, exist_ok=True)


def wrap(model: GPT2Model, **options: Any) -> WorkbenchForCausalLM:
    """GPT2Model -> transformers 的模型；参数是同一些张量。量化的只能推理，见 quantized.py。

    Args:
        options: transformers 的配置项，如 eos_token_id、attn_implementation。
    """
    if isinstance(model, QuantizedModel):
        return wrap_quantized(model, **options)
    config = WorkbenchConfig(**model.config.to_dict(), **options)
    with torch.device("meta"):
        wrapped = WorkbenchForCausalLM(config)
    state = {
        name if name == "lm_head.weight" else f"model.{name}": p
        for name, p in model.state_dict(keep_vars=True).items()
    }
    if config.tie_weights:
        state["lm_head.weight"] = model.embed.wte.weight
    wrapped.load_state_dict(state, assign=True)
    wrapped.tie_weights()
    return wrapped.train(model.training)


def unwrap(model: WorkbenchForCausalLM) -> GPT2Model:
    """transformers 的模型 -> GPT2Model；参数是同一些张量，头是否共享也看张量而不看配置。

    Raises:
        ValueError: 有的层被适配器包着，张量不在原来的名字下。
    """
    config = model.config.core().replace(tie_weights=is_tied(model))
    with torch.device("meta"):
        core = GPT2Model(config)
    names = core.state_dict().keys()
    state = {name.removeprefix("model."): p for name, p in model.state_dict(keep_vars=True).items()}
    missing = sorted(names - state.keys())
    if missing:
        others = sorted(state.keys() - names)
        raise ValueError(
            f"{len(missing)} tensors are not under their names ({missing[0]}, but there is "
            f"{others[:2]}): merge adapters first, unwrap(peft_model.merge_and_unload())"
        )
    core.load_state_dict({name: state[name] for name in names}, assign=True)
    return core.train(model.training)


def save(
    model: GPT2Model | WorkbenchForCausalLM, folder: str | Path, tokenizer: Any = None
) -> None:
    """写一个文件夹，AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) 装得起。

    Args:
        tokenizer: 有 save_pretrained 的分词器（transformers 的），一并写入。

    Raises:
        ValueError: folder 是一个文件。
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder to save the model in")
    if isinstance(model, GPT2Model):
        ids = {} if tokenizer is None else _special_ids(tokenizer)
        model = wrap(model, **ids)
    model.config.auto_map = dict(AUTO_MAP)
    model.save_pretrained(folder)
    write_code(folder)
    _follow_umask(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _follow_umask(folder: Path) -> None:
    """safetensors 库写的文件总是只有主人可读；权限与同一个文件夹里别的文件一样。"""
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _special_ids(tokenizer: Any) -> dict[str, int | None]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name, None) for name in names}


def write_code(folder: Path) -> None:
    """模型的源文件摊平写进 folder：transformers 只会从同一个文件夹取相对导入的模块。

    主干的房间没有了，文件名就得各不相同（测试看着）。
    要哪些文件由它自己的规则（get_relative_imports）定，连 TYPE_CHECKING 里的也要。
    """
    sources = {path.stem: path for path in (*_CORE.rglob("*.py"), *_HERE.glob("*.py"))}
    done: set[str] = set()
    waiting = [entry.split(".")[0] for entry in AUTO_MAP.values()]
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        target = folder / f"{name}.py"
        target.write_text(flat(sources[name].read_text(encoding="utf-8")), encoding="utf-8")
        waiting.extend(get_relative_imports(target))


def flat(source: str) -> str:
    """主干之内的导入，不论写法与房间，都变成 from .文件名。"""
    return _IMPORT.sub(lambda found: f"{found['indent']}from .{found['name']} import", source)


_IMPORT = re.compile(
    r"^(?P<indent>[ ]*)from (?:app\.models\.transformer\.|\.+)(?:\w+\.)*(?P<name>\w+) import",
    re.MULTILINE,
)
