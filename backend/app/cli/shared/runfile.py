"""运行文件：YAML -> 带类型的配置；命令行的设置盖在它上面。"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from app.models.transformer.config import GPT2Config
from app.training.config import TrainConfig
from app.training.saving.home import at_home, home_lines

_SUFFIX = ".yaml"
_LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RunArgs(TrainConfig):
    """训练配置，外加它从哪个文件来：train 与 plan 的共同部分。"""

    config: Annotated[
        str | None, Doc("run file: a path, or the name of one in recipes/; flags override it")
    ] = None

    def train_config(self) -> TrainConfig:
        return TrainConfig(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)}
        )


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


def load_config(name: str) -> tuple[TrainConfig, bool]:
    """(配置, 文件里是否写明了词表大小)；训练文件夹里的运行文件，out 就是那个文件夹。

    Raises:
        ValueError: 找不到、读不懂、未知的键或坏值；信息里有文件名。
    """
    path = find_run_file(name)
    data = read_run_file(path)
    try:
        config = TrainConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return at_home(path, config), "vocab_size" in (data.get("model") or {})


def where_lines(name: str, config: TrainConfig) -> list[str]:
    """按命令行盖过之后的 config 训练会在哪里：与运行文件里写的不同就说。"""
    path = find_run_file(name)
    return home_lines(path, TrainConfig.from_dict(read_run_file(path)), config)


def load_model_config(name: str) -> tuple[TrainConfig, bool]:
    """同 load_config，但也接受模型文件夹里的 config.json（词表大小总是写明的）。

    Raises:
        ValueError: 找不到、读不懂、未知的键或坏值；信息里有文件名。
    """
    path = Path(name)
    if path.suffix != ".json":
        return load_config(name)
    return TrainConfig(model=GPT2Config.from_file(path)), True


def config_name(argv: Sequence[str]) -> str | None:
    """命令行里 --config 的值；它的内容是其余选项的默认值，所以要先读。"""
    for index, word in enumerate(argv):
        if word == "--config" and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


def fit_vocabulary(config: TrainConfig) -> TrainConfig:
    """没有写明词表大小时，取数据集的；数据集还不存在就原样返回，由打开数据时报错。"""
    meta = Path(config.data.folder) / "train" / "meta.json"
    if not meta.is_file():
        return config
    try:
        size = json.loads(meta.read_bytes())["tokenizer"]["vocab_size"]
    except (ValueError, KeyError, TypeError, RecursionError):
        # 坏的 meta.json 由 TokenDataset.open 点名拒绝。
        return config
    return config.replace(model=config.model.replace(vocab_size=size))


def names_vocabulary(argv: Sequence[str]) -> bool:
    """命令行是否写明了词表大小。"""
    flags = (word.split("=")[0].replace("_", "-") for word in argv)
    return "--model.vocab-size" in flags
