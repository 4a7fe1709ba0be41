"""主干作为 transformers 的模型：generate、Trainer、PEFT、pipeline 都用得上。

register()                                  让 Auto 类认得 model_type "gpt2-workbench"
wrap(model)                                 GPT2Model -> WorkbenchForCausalLM，权重共用
unwrap(model)                               反过来
save(model, folder, tokenizer)              连代码一起写，没有本包的机器也装得起
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "app.interop.transformers needs transformers: pip install 'gpt2-workbench[hf]'"
    ) from error

from .cache_workbench import WorkbenchCache
from .configuration_workbench import WorkbenchConfig
from .convert import register, save, unwrap, wrap
from .modeling_workbench import WorkbenchForCausalLM, WorkbenchModel

__all__ = [
    "WorkbenchCache",
    "WorkbenchConfig",
    "WorkbenchForCausalLM",
    "WorkbenchModel",
    "register",
    "save",
    "unwrap",
    "wrap",
]
