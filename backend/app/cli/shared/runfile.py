"""运行文件：YAML -> 带类型的配置；命令行的设置盖在它上面。"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from typing_extensions import Doc

from app.cli.shared.command_line import Usage, parse_options
from app.common.tell import to_stderr
from app.training.config import TrainConfig
from app.training.saving.home import at_home, home_lines, is_run

_SUFFIX = ".yaml"
_LIMIT = 1 << 20


@dataclass(frozen=True)
class RunFile:
    """一个运行文件说的。

    Attributes:
        config: 训练文件夹里的，out 与 data.folder 是此刻真正的地方；别处的照原话。
        names_vocabulary: 它写明了词表大小。
        shape: 它写明了 model 的哪些键。
        path, written: 哪个文件，与里面的原话；模型的 config.json 没有。
    """

    config: TrainConfig
    names_vocabulary: bool
    path: Path | None = None
    written: TrainConfig | None = None
    shape: frozenset[str] = frozenset()

    def lines(self, config: TrainConfig) -> list[str]:
        """按选项盖过之后的 config 训练会在哪里：与文件里写的不同就说。"""
        if self.path is None or self.written is None:
            return []
        return home_lines(self.path, self.written, config)


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """训练配置（选项不带前缀），外加它从哪个文件来：train、plan、sweep 的共同部分。

    Attributes:
        file: 读到的文件，还没有被选项盖过。
    """

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    config: Annotated[
        str | None, Doc("run file: a path, or the name of one in recipes/; flags override it")
    ] = None
    file: tyro.conf.Suppress[tyro.conf.Fixed[RunFile | None]] = None


A = TypeVar("A", bound=RunArgs)


def parse_run(
    kind: type[A],
    argv: Sequence[str],
    usage: Usage,
    load: Callable[[str], RunFile] | None = None,
    **changes: Any,
) -> A:
    """先读 --config 的文件作默认值（只读这一次），再解析其余。

    Args:
        load: 怎样读；默认 load_config。
        changes: 这个命令自己的默认值，盖过文件的。

    Raises:
        ValueError: 文件找不到或读不懂。
    """
    name = config_name(argv)
    file = None if name is None else (load or load_config)(name)
    base = TrainConfig() if file is None else file.config
    if changes:
        base = base.replace(**changes)
    base = _one_length(base, argv)
    return parse_options(kind, argv, usage, kind(train=base, config=name, file=file))


def _one_length(base: TrainConfig, argv: Sequence[str]) -> TrainConfig:
    """命令行的 --steps 盖过文件里的 epochs；两个都在命令行就不知听谁的。"""
    flags = {word.split("=")[0] for word in argv}
    if "--steps" not in flags:
        return base
    if "--epochs" in flags:
        raise ValueError("--steps and --epochs both say how long: give one")
    return base if base.epochs is None else base.replace(epochs=None)


def fit_model(args: A, argv: Sequence[str]) -> A:
    """没有写明的形状：有 init_from 时取自那里；否则只有词表大小，取数据集的。

    Raises:
        ValueError: 见 start_shape。
    """
    if args.train.init_from is not None:
        return start_shape(args, argv)
    return args if names_vocabulary(args, argv) else fit_vocabulary(args)


def names_vocabulary(args: RunArgs, argv: Sequence[str]) -> bool:
    """运行文件或命令行是否写明了词表大小。"""
    flags = (word.split("=")[0].replace("_", "-") for word in argv)
    return "--model.vocab-size" in flags or (args.file is not None and args.file.names_vocabulary)


def fit_vocabulary(args: A) -> A:
    """词表大小取数据集的；数据集还不存在就原样返回，由打开数据时报错。"""
    config = args.train
    size = data_vocabulary(config)
    if size is None:
        return args
    fitted = config.replace(model=config.model.replace(vocab_size=size))
    return dataclasses.replace(args, train=fitted)


def data_vocabulary(config: TrainConfig) -> int | None:
    """数据集的词表大小；还没有数据集则 None。"""
    meta = Path(config.data.folder) / "train" / "meta.json"
    if not meta.is_file():
        return None
    try:
        size = json.loads(meta.read_bytes())["tokenizer"]["vocab_size"]
    except (ValueError, KeyError, TypeError, RecursionError):
        # 坏的 meta.json 由 TokenDataset.open 点名拒绝。
        return None
    return size if isinstance(size, int) else None


def start_shape(args: A, argv: Sequence[str]) -> A:
    """新的训练有 init_from 时，没有写明的形状取自那里；词表长到装得下数据的。

    写明的照写明的：与权重不合的，开训时点名两个值拒绝。

    Raises:
        ValueError: 那里没有模型，或要的上下文比它的长。
    """
    from app.adapters.fit import shrunk
    from app.adapters.rows import grown_config
    from app.models.transformer.weights.recognise import config_from_file
    from app.training.saving.checkpoint import resolve_checkpoint

    config = args.train
    # 续训的形状在 run.yaml 里写全了，那里的权重也许已经不在。
    if config.init_from is None or is_run(Path(config.out)):
        return args
    found = resolve_checkpoint(config.init_from, to_stderr)
    if not (found / "config.json").is_file():
        return args
    shape = config_from_file(found / "config.json")
    words = [word.split("=")[0].replace("-", "_") for word in argv]
    flags = [word.split(".")[1] for word in words if word.startswith("__model.")]
    fields = config.model.to_dict()
    given = {flag if flag in fields else flag.removeprefix("no_") for flag in flags}
    given |= args.file.shape if args.file is not None else set()
    # 模型文件夹记下的版本号，不是形状。
    given.discard("schema_version")
    if "context_size" in given:
        shape = shrunk(shape, config.model.context_size, f"init_from={found}")
    if "vocab_size" not in given and (size := data_vocabulary(config)) is not None:
        shape = grown_config(shape, size)
    wanted = {name: getattr(config.model, name) for name in given}
    return dataclasses.replace(args, train=config.replace(model=shape.replace(**wanted)))


def recipe_folders() -> list[Path]:
    """按次序：当前文件夹、上一层、源码树。"""
    tree = Path(__file__).resolve().parents[4]
    return [Path("recipes"), Path("..", "recipes"), tree / "recipes"]


def find_run_file(name: str) -> Path:
    """路径，或 recipes/ 里的名字（可省 .yaml）。

    Raises:
        ValueError: 找不到；给出最近的名字。
    """
    path = Path(name)
    if path.is_file():
        return path
    folders = [folder for folder in recipe_folders() if folder.is_dir()]
    if path.name == name:
        for folder in folders:
            found = folder / (name if name.endswith(_SUFFIX) else name + _SUFFIX)
            if found.is_file():
                return found
    known = sorted({file.stem for folder in folders for file in folder.glob("*" + _SUFFIX)})
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known recipes: {', '.join(known)}"
    raise ValueError(f"config={name} is neither a file nor a recipe: {hint}")


def read_run_file(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: 太大、不是文字、不是 YAML、同一个键出现两次，或不是映射。
    """
    import yaml

    if path.stat().st_size > _LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: a run file is at most {_LIMIT}")

    class Loader(yaml.SafeLoader):
        """SafeLoader，但重复的键是错误：后一个悄悄盖住前一个最难查。"""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    raise ValueError(f"{path}: {key!r} is given twice")
            return super().construct_mapping(node, deep)

    try:
        data = Loader(path.read_text(encoding="utf-8")).get_single_data()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of options, got {type(data).__name__}")
    return data


def load_config(name: str) -> RunFile:
    """
    Raises:
        ValueError: 找不到、读不懂、未知的键或坏值；信息里有文件名。
    """
    path = find_run_file(name)
    data = read_run_file(path)
    try:
        config = TrainConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shape = frozenset(data.get("model") or {})
    return RunFile(at_home(path, config), "vocab_size" in shape, path, config, shape)


def load_model_config(name: str) -> RunFile:
    """同 load_config，但也接受模型文件夹里的 config.json（词表大小总是写明的）。

    Raises:
        ValueError: 找不到、读不懂、未知的键或坏值；信息里有文件名。
    """
    path = Path(name)
    if path.suffix != ".json":
        return load_config(name)
    from app.models.transformer.weights.recognise import config_from_file

    return RunFile(TrainConfig(model=config_from_file(path)), True)


def config_name(argv: Sequence[str]) -> str | None:
    """命令行里 --config 的值；它的内容是其余选项的默认值，所以要先读。"""
    for index, word in enumerate(argv):
        if word == "--config" and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None
