"""写出的文件夹：没有本包的进程装得起；没有 trust_remote_code 就什么也不执行。"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from app.data.tokenizers import BPETokenizer, train_bpe
from app.generation.config import SamplingConfig
from app.interop.transformers import (
    WorkbenchForCausalLM,
    convert,
    register,
    save,
    unwrap,
    wrap,
)
from app.models.transformer import GPT2Config, GPT2Model
from tests.generation.helpers import new_tokens

from .variants import VARIANTS, model, tokens

TEXT = "the cat sat on the mat and the dog sat on the log, as dogs do when cats are at home"


def hub_tokenizer(ours: BPETokenizer) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(json.dumps(ours.to_json()))
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end)


def outside(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    """在一个导入不了 app 的进程里运行；动态模块的缓存放在 home。"""
    blocked = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'app': raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", blocked + code],
        capture_output=True, text=True, cwd=home, env=env, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_flattened_files_keep_their_names_apart() -> None:
    """导出时房间摊平：主干与 interop/transformers 的文件名各不相同，否则后写的盖住先写的。"""
    names = Counter(
        path.name
        for folder in (convert._CORE, convert._HERE)
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_a_process_without_this_package_loads_the_folder(tmp_path: Path) -> None:
    """每个开关一个文件夹，一个进程全装：逻辑值、生成、再存一次、再装一次都相同。"""
    expected = {}
    for number, name in enumerate(VARIANTS):
        core = model(name)
        folder = tmp_path / f"model-{number}"
        save(core, folder)
        ids = tokens(1, 9)
        expected[folder.name] = {
            "ids": ids.tolist(),
            "logits": core(ids)["logits"].tolist(),
            "text": new_tokens(
                core, ids.tolist(), max_new_tokens=6, sampling=SamplingConfig(temperature=0)
            ),
            "tied": core.config.tie_weights,
        }
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    done = outside(
        """
import json, pathlib, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
root = pathlib.Path.cwd()
for name, want in json.loads((root / "expected.json").read_text()).items():
    ids = torch.tensor(want["ids"])
    def check(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        off = (model(ids).logits - torch.tensor(want["logits"], dtype=torch.float64)).abs().max()
        assert off <= 1e-12, (name, off)
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        assert tied == want["tied"], name
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert out[:, 9:].tolist() == want["text"], name
        return model
    model = check(root / name)
    base = AutoModel.from_pretrained(root / name, trust_remote_code=True)
    hidden = model.model(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, hidden), name
    config = AutoConfig.from_pretrained(root / name, trust_remote_code=True)
    assert config.core().n_layer == 2
    if name in ("model-0", "model-6"):
        model.save_pretrained(root / ("again-" + name))
        check(root / ("again-" + name))
assert "app" not in sys.modules
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_nothing_runs_without_the_flag(tmp_path: Path) -> None:
    """config.json 里的 auto_map、trust_remote_code 都是别人写的：只有调用者的旗子算数。"""
    save(model("post"), tmp_path / "evil")
    marker = tmp_path / "ran"
    for name in ("configuration_workbench", "modeling_workbench"):
        path = tmp_path / "evil" / f"{name}.py"
        path.write_text(f"open({str(marker)!r}, 'w').close()\n" + path.read_text())
    path = tmp_path / "evil" / "config.json"
    config = json.loads(path.read_text())
    config |= {"trust_remote_code": True, "_name_or_path": "../../x"}
    path.write_text(json.dumps(config))
    done = outside(
        """
from transformers import AutoConfig, AutoModelForCausalLM
for load in (AutoConfig, AutoModelForCausalLM):
    for flag in ({}, {"trust_remote_code": False}):
        try:
            load.from_pretrained("evil", **flag)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise SystemExit(f"{load.__name__} loaded it")
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not marker.exists()
    # 装了本包并登记过：用本包的代码，文件夹里的一行也不执行。
    register()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "evil")) is WorkbenchForCausalLM
    assert not marker.exists()
    # 主干自己的装入只读配置与权重。
    GPT2Model.from_pretrained(tmp_path / "evil")
    assert not marker.exists()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_backbone_reads_the_folder_back(name: str, tmp_path: Path) -> None:
    core = model(name)
    save(core, tmp_path / "out")
    back = GPT2Model.from_pretrained(tmp_path / "out", norm=core.config.norm)
    assert back.config == core.config
    for (key, a), (_, b) in zip(core.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


def test_the_folder_holds_each_tensor_once_and_only_safe_files(tmp_path: Path) -> None:
    core = model("post")
    save(core, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {f"model.{name}" for name in core.state_dict()}
    kinds = {path.suffix for path in tmp_path.iterdir()}
    assert kinds == {".json", ".safetensors", ".py"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for path in tmp_path.glob("*.py"):
        assert "app.models" not in path.read_text(encoding="utf-8"), path.name
    with pytest.raises(ValueError, match="is a file: give a folder"):
        save(core, tmp_path / "config.json")


def test_a_pipeline_runs_on_the_folder(tmp_path: Path) -> None:
    ours = train_bpe([TEXT] * 3, 300)
    core = GPT2Model(
        GPT2Config(vocab_size=ours.vocab_size, context_size=32, n_layer=2, n_head=2, n_embed=16)
    ).eval()
    save(core, tmp_path, hub_tokenizer(ours))
    register()
    run = pipeline("text-generation", str(tmp_path))
    assert run.model.generation_config.eos_token_id == ours.document_separator
    prompt = "the cat sat"
    out = run(prompt, max_new_tokens=8, do_sample=False, return_full_text=False)
    ids = new_tokens(
        core, [ours.encode(prompt)], max_new_tokens=8, sampling=SamplingConfig(temperature=0),
        stop_ids=(ours.document_separator,),
    )  # fmt: skip
    assert out[0]["generated_text"] == ours.decode(ids[0])


def test_half_precision_and_sharded_files(tmp_path: Path) -> None:
    core = model("pre")
    wrapped = wrap(core).to(torch.bfloat16)
    wrapped.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    register()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(tokens(1, 9)).logits, wrapped(tokens(1, 9)).logits)
    wide = unwrap(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert wide.embed.wte.weight.dtype == torch.float32
