"""`gpt2` 程序的入口：按第一个词找到子命令，只导入那一个模块。

每个子命令是一个模块，有三样东西：英文的 SUMMARY 与 EXAMPLES，一个带类型的数据类 Args，
一个 run(args)。模块本身不导入 torch（在 run 里才导入），所以 --help 立刻有回答。
"""

from __future__ import annotations

import difflib
import os
import sys
from importlib import import_module
from typing import Any, Protocol, cast

from app.cli.shared.command_line import Usage, parse_options
from app.common.console import forget_reader, tolerant_output

COMMANDS = {
    "prepare": "turn text files, folders, json, csv or ready tokens into token shards",
    "train": "train a model, with exact resume",
    "finetune": "tune a trained model on your own text, answers, conversations or preferences",
    "sweep": "train the same data and seeds with one switch changed",
    "compare": "draw runs over tokens and time, with a table and the seeds' spread",
    "generate": "continue prompts with a trained model",
    "chat": "talk to a model that was tuned on conversations",
    "serve": "serve trained models over HTTP, for OpenAI clients, lm-eval and curl",
    "eval": "perplexity, bits per byte and jsonl tasks of a trained model",
    "import": "turn weights from Hugging Face or nanoGPT into a model folder",
    "merge": "add an adapter to its base: one model folder, with nothing left to look up",
    "quantize": "store a model's matrices in 16, 8 or 4 bits: smaller, and faster to decode",
    "export": "write a trained model for transformers, llama.cpp, ONNX or CTranslate2",
    "plan": "what will run: parameters, memory, attention backends and why",
    "show": "draw attention maps, attention patterns and expert routing",
    "upcycle": "turn a dense model into experts that compute the same, to train on",
    "experts": "average a model's experts into a dense one, or prune those little used",
    "verify": "check a configuration: causality, cache, padding, counts, save and load",
}
# 不与命令同名的模块：模块不能叫 import；由模型造模型的另有一间。
_MODULES = {
    "import": "import_weights",
    **{name: f"models.{name}" for name in ("finetune", "upcycle", "experts", "merge")},
}


class Command(Protocol):
    """子命令模块的形状。

    还可以有 RENAMED：{旧选项: 新选项}，旧的再认一个版本，并提醒。
    """

    SUMMARY: str
    EXAMPLES: str
    Args: type

    @staticmethod
    def run(args: Any) -> int | None: ...


def main(argv: list[str] | None = None) -> int:
    """返回退出码：0 成功，1 检查未过，2 用法或输入有错，130 被中断，141 读的一方走了。"""
    tolerant_output()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "run `gpt2 --help` for the list"
        print(f"error: unknown command {name!r}: {hint}", file=sys.stderr)
        return 2
    command = find_command(name)
    try:
        code = command.run(parse_command(name, rest)) or 0
        # 盘满时缓冲里的输出到退出才报错，那时已经说过成功了。
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        forget_reader()
        # 续写除了输出没有别的事，读够了就是做完了；别的命令没有做完，照 shell 的惯例报 SIGPIPE。
        return 0 if name == "generate" else 128 + 13
    except (ValueError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("GPT2_TRACEBACK"):
            raise
        if getattr(error, "said_by_another_rank", False):
            return 2
        text = str(error) or type(error).__name__
        print(f"error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def find_command(name: str) -> Command:
    """name 在 COMMANDS 里；只导入它那一个模块。"""
    return cast(Command, import_module(f"app.cli.commands.{_MODULES.get(name, name)}"))


def parse_command(name: str, argv: list[str]) -> Any:
    """有 parse 的模块（训练：YAML 之上再覆盖）自己解析，其余按 Args 解析。"""
    command = find_command(name)
    argv = _renamed(argv, getattr(command, "RENAMED", {}))
    parse = getattr(command, "parse", None)
    if parse is not None:
        return parse(argv)
    return parse_options(command.Args, argv, Usage(name, command.SUMMARY, command.EXAMPLES))


def _renamed(argv: list[str], renamed: dict[str, str]) -> list[str]:
    """旧选项换成新的；与 tyro 一样，_ 与 - 不分。"""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        new = renamed.get(flag.replace("_", "-"))
        if new is not None:
            print(f"note: {flag} is now called {new}; the old name goes away", file=sys.stderr)
            word = new + equals + value
        words.append(word)
    return words


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gpt2 COMMAND [OPTIONS]",
            "",
            "commands:",
            *lines,
            "",
            "gpt2 COMMAND --help   (GPT2_TRACEBACK=1 shows stack traces)",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
