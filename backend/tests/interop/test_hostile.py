"""不怀好意的文件夹：什么也不执行（标记文件不出现），是我们自己的错误，不占多少内存。"""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.data.tokenizers import train_bpe
from app.interop.equivalent import Weights
from app.interop.hf import write_hf
from app.interop.reading.foreign_tokenizer import read_hub_tokenizer
from app.interop.reading.importing import import_model
from app.interop.reading.pickles import load_pickle
from app.interop.tokens import tokenizer_files
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.weights.families import GPT2, OPT, read_config, write_config

from ..models.helpers import tiny_config, tiny_model

BPE = train_bpe(["the cat sat on the mat, and that was that. " * 9], 280)


class Run:
    """解开它就会建一个标记文件。"""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def as_zip(path: Path, data: bytes, extra: dict[str, bytes] | None = None, **options: Any) -> None:
    """torch.save 的布局，pickle 由我们写。"""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, content in (extra or {}).items():
            archive.writestr(name, content)


def _shared_list(path: Path, marker: Path) -> None:
    """四十层，每层引用下一层两次：照着走要 2^40 步。"""
    item: list[Any] = []
    for _ in range(40):
        item = [item, item]
    torch.save(item, path)


def _deep_list(path: Path, marker: Path) -> None:
    item: list[Any] = []
    for _ in range(200):
        item = [item]
    torch.save({"model": item}, path)


def _bomb(path: Path, marker: Path) -> None:
    """一个张量，压缩过：30 MB 的零压成 30 KB。"""
    torch.save({"transformer.wte.weight": torch.zeros(30 << 18)}, path)
    with zipfile.ZipFile(path) as source:
        files = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files.items():
            target.writestr(name, content)


def _stride(path: Path, marker: Path) -> None:
    torch.save({"transformer.wte.weight": torch.zeros(1).expand(10**6, 10**6)}, path)


def _sparse(path: Path, marker: Path) -> None:
    tensor = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), [1.0], (2 * 10**9,))
    torch.save({"transformer.wte.weight": tensor}, path)


def _overlap(path: Path, marker: Path) -> None:
    torch.save({"transformer.wte.weight": torch.zeros(1001).as_strided((500, 500), (1, 1))}, path)


PICKLES: dict[str, Callable[[Path, Path], None]] = {
    "os.system in a zip": lambda path, marker: as_zip(path, pickle.dumps(Run(marker), 2)),
    "os.system raw": lambda path, marker: path.write_bytes(pickle.dumps(Run(marker), 2)) and None,
    "shared lists": _shared_list,
    "deep lists": _deep_list,
    "zip bomb": _bomb,
    "stride 0": _stride,
    "sparse": _sparse,
    "overlapping": _overlap,
    "a huge pickle": lambda path, marker: as_zip(path, b"(" * (9 << 20)),
    "no zip": lambda path, marker: path.write_bytes(b"PK\x03\x04" + b"x" * 100) and None,
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(name: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "ckpt.pt"
    PICKLES[name](path, marker)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"ckpt\.pt"):
        import_model(str(path), allow_pickle=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6 and not marker.exists()


def test_a_bomb_costs_nothing_outside_python_either(tmp_path: Path) -> None:
    import resource

    _bomb(tmp_path / "ckpt.pt", tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="unpacks to"):
        load_pickle(tmp_path / "ckpt.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


def hub_folder(folder: Path) -> GPT2Model:
    model = tiny_model(torch.float32, norm="pre", vocab_size=BPE.vocab_size + 1)
    write_hf(Weights.of(model), "gpt2", BPE, folder)
    return model


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


EVIL = "import pathlib\npathlib.Path({marker!r}).write_text('x')\nclass Model: pass\n"


def _auto_map(folder: Path, marker: Path) -> None:
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})


def _trust(folder: Path, marker: Path) -> None:
    _auto_map(folder, marker)
    edit(folder / "config.json", trust_remote_code=True)


def _dcp(folder: Path, marker: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Run(marker), 2))


def _pt2(folder: Path, marker: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    as_zip(folder / "model.pt2", pickle.dumps(Run(marker), 2))


REFUSED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "auto_map": (_auto_map, "brings its own code, which is never run"),
    "auto_map and trust_remote_code": (_trust, "brings its own code, which is never run"),
    "a hostile .metadata": (_dcp, "has no model.safetensors"),
    "a .pt2": (_pt2, "has no model.safetensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    attack, message = REFUSED[name]
    hub_folder(tmp_path / "hub")
    attack(tmp_path / "hub", tmp_path / "marker")
    for allow in (False, True):
        with pytest.raises(ValueError, match=message):
            import_model(str(tmp_path / "hub"), allow_pickle=allow)
    assert not (tmp_path / "marker").exists()


def test_ignored(tmp_path: Path) -> None:
    """旁边的 pickle、指到外面的名字、聊天模板、自带代码的分词器：不看，所以不碍事。"""
    folder, marker = tmp_path / "hub", tmp_path / "marker"
    model = hub_folder(folder)
    as_zip(folder / "pytorch_model.bin", pickle.dumps(Run(marker), 2))
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    edit(folder / "config.json", _name_or_path="../../x", trust_remote_code=True)
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    edit(
        folder / "tokenizer_config.json",
        chat_template=template, auto_map={"AutoTokenizer": ["evil.Model", None]},
    )  # fmt: skip
    (folder / "chat_template.jinja").write_text(template)
    for allow in (False, True):
        found = import_model(str(folder), allow_pickle=allow)
        assert torch.equal(found.model.head_weight, model.head_weight)
        assert found.tokenizer is not None and found.tokenizer.encode("cat") == BPE.encode("cat")
    assert not marker.exists()


absurd = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=9), st.none(), st.booleans(),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip
OURS = tiny_config(norm="pre").to_dict()
THEIRS = [write_config(GPT2, tiny_config(norm="pre")), write_config(OPT, tiny_config(norm="post"))]


def survives(read: Callable[[], GPT2Config]) -> None:
    """合法就造得出来，否则是 ValueError；都不占内存。"""
    tracemalloc.start()
    try:
        assert isinstance(read(), GPT2Config)
    except ValueError as error:
        assert str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10e6


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(OURS)), absurd)
def test_absurd_configs_of_ours(key: str, value: Any) -> None:
    survives(lambda: GPT2Config.from_json(json.dumps({**OURS, key: value})))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), absurd)
def test_absurd_configs_of_theirs(data: st.DataObject, value: Any) -> None:
    raw = data.draw(st.sampled_from(THEIRS))
    key = data.draw(st.sampled_from([*sorted(raw), "word_embed_proj_dim", "trained_vocab_size"]))
    survives(lambda: read_config({**raw, key: value}, "config.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "expected|mapping|cannot be read"),
        (b"null", "mapping|cannot be read"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"model_type": "gpt2"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"model_type": "gpt2", "x": "' + b"a" * (2 << 20) + b'"}', "more than"),
    ],
    ids=["list", "null", "not utf-8", "cut", "deep", "large"],
)
def test_broken_config_files(content: bytes, message: str, tmp_path: Path) -> None:
    hub_folder(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        import_model(str(tmp_path / "hub"))


def _table(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        data = json.loads((folder / "tokenizer.json").read_text())
        change(data)
        (folder / "tokenizer.json").write_text(json.dumps(data))

    return attack


def _huge(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)


def _cut(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-200])


def _vocab(**changes: Any) -> Callable[[Path], None]:
    return _table(lambda data: data["model"]["vocab"].update(changes))


TOKENIZERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (_cut, "not valid JSON"),
    "1 GB": (_huge, "too large"),
    "id twice": (_vocab(a=5), "stands for both"),
    "id beyond the vocabulary": (_vocab(a=10**9), "has id 1000000000, outside"),
    "negative id": (_vocab(a=-1), "has id -1, outside"),
    "id as text": (_vocab(a="5"), "has id '5', outside"),
    "no merges": (_table(lambda d: d["model"].pop("merges")), "no model.merges"),
    "half the merges": (_table(lambda d: d["model"]["merges"].pop()), "no merge makes the token"),
    "merges of numbers": (_table(lambda d: d["model"].update(merges=[[1, 2]])), "pairs of texts"),
    "not an object": (lambda f: (f / "tokenizer.json").write_text("[]") and None, "no model.vocab"),
    "a normalizer": (_table(lambda d: d.update(normalizer={"type": "Lowercase"})), "normalizer is"),
    "words": (
        _table(lambda d: d.update(model={"type": "WordLevel", "vocab": {"the": 0}})),
        "only characters can be read",
    ),
    "another kind": (
        _table(lambda d: d["model"].update(type="Unigram")),
        "model.type is 'Unigram'",
    ),
    "nothing": (lambda f: (f / "tokenizer.json").unlink(), "has neither vocab.json"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_broken_tokenizers(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_files(BPE, 24)["tokenizer.json"])
    assert read_hub_tokenizer(tmp_path).encode("the cat") == BPE.encode("the cat")
    attack, message = TOKENIZERS[name]
    attack(tmp_path)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        read_hub_tokenizer(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    hub_folder(tmp_path / "hub")
    small = tiny_model(torch.float32, norm="pre", vocab_size=20)
    write_hf(Weights.of(small), "gpt2", None, tmp_path / "small")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "small" / name).write_bytes((tmp_path / "hub" / name).read_bytes())
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids but the model only"):
        import_model(str(tmp_path / "small"))
