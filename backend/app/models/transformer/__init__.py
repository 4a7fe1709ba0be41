"""GPT-2 主干。这里只列公开的名字；读代码从 model.py 开始。

名字在第一次取用时才加载：只要 GPT2Config 的程序（命令行的 --help）不必等 torch。
图样写成文字即可；要对象的人从 atoms 取，自己用 FlexAttention 的人从 flex 取。
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.kv_cache import KVCache as KVCache
    from .config import GPT2Config as GPT2Config
    from .factory import create_gpt2_large as create_gpt2_large
    from .factory import create_gpt2_medium as create_gpt2_medium
    from .factory import create_gpt2_model as create_gpt2_model
    from .factory import create_gpt2_small as create_gpt2_small
    from .factory import create_gpt2_xl as create_gpt2_xl
    from .model import GPT2Model as GPT2Model
    from .settings.moe_config import MoEConfig as MoEConfig
    from .settings.rope_config import RoPEConfig as RoPEConfig
    from .visibility.positions import Positions as Positions

_HOME = {
    "GPT2Config": "config",
    "GPT2Model": "model",
    "KVCache": "cache.kv_cache",
    "MoEConfig": "settings.moe_config",
    "Positions": "visibility.positions",
    "RoPEConfig": "settings.rope_config",
    "create_gpt2_model": "factory",
    "create_gpt2_small": "factory",
    "create_gpt2_medium": "factory",
    "create_gpt2_large": "factory",
    "create_gpt2_xl": "factory",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
