"""用重组之前的代码写下 fixtures/：文件夹各打成一个 tar.xz，量出的数记在 recorded.json。

只该由提交 3225a70 的代码来写，所以从它的检出里运行（它的 app 在先，本文件只带来 records）：

    git worktree add ../old 3225a70
    cd ../old/backend && PYTHONPATH=. python THIS/backend/tests/compat/write_fixtures.py

别的提交会被拒绝：用新代码重写这些文件夹，就再也试不出旧文件夹能不能用。文本也由这里写出。
打成一包而不是散开的文件：源码不会被格式化，换行不会被改写，清单里的 sha256 才一直成立。
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from records import arithmetic, greedy, logits_hex, measure

import app
from app.cli.main import main
from app.models.transformer import GPT2Config, GPT2Model

COMMIT = "3225a70"
FIXTURES = Path(__file__).with_name("fixtures")
STOP, STEPS = 10, 30
PROMPT = "The square of 12 is "
# 续训用不着的：每次都会重画、重写。
LEFT_OUT = {"report.html", "loss.png", "facts.json"}
SHAPE = {"context_size": 32, "n_layer": 2, "n_head": 2, "n_embed": 16}
TRAINING: dict[str, Any] = {
    "data": {"folder": "data"},
    "steps": STEPS,
    "batch_size": 4,
    "micro_batch": 2,
    "schedule": {"warmup_steps": 3},
    "seed": 7,
    "device": "cpu",
    "precision": "float32",
    "compile": "off",
    "eval_every": STOP,
    "eval_batches": 2,
    "sample_every": 0,
    "sample_prompt": "The ",
    "sample_tokens": 12,
    "save_every": 0,
    "keep_last": 1,
}
RUNS: dict[str, dict[str, Any]] = {
    "dense": {
        "model": {**SHAPE, "norm": "pre", "dropout": 0.1},
        "optim": {"lr": 3e-2, "grad_clip": 0.5},
    },
    "moe": {
        "model": {
            **SHAPE, "norm": "keel", "position": "rope", "dropout": 0.1, "moe_num_experts": 4,
            "moe": {
                "router": "sigmoid", "bias_update_rate": 0.001, "hidden": 16, "shared_experts": 1,
                "jitter_noise": 0.01,
            },
        },
        "optim": {"name": "muon", "lr": 2e-2, "muon_lr": 3e-2},
    },
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "post": {"norm": "post"},
    "sparse": {
        "norm": "deepnorm", "position": "rope", "n_kv_head": 1, "qk_norm": True, "bias": False,
        "norm_type": "rmsnorm", "activation": "swiglu", "tie_weights": False,
        "attention_pattern": ["local(6) | global(2)", "causal"],
    },
    "experts": {"norm": "pre", "moe_num_experts": 4, "moe": {"hidden": 16, "first_dense": 1}},
}  # fmt: skip
OWN_CODE = {"norm": "keel", "position": "rope", "n_kv_head": 1, "tie_weights": False}


class StopAt(io.StringIO):
    """训练写到某一行时按一次 Ctrl-C：真的停下，而不是事后删文件。"""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.line, self.done = line, False

    def write(self, text: str) -> int:
        if self.line in text and not self.done:
            self.done = True
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def say(*argv: str, out: io.StringIO | None = None) -> str:
    """运行一条 gpt2 命令；给出它的标准输出。"""
    out = io.StringIO() if out is None else out
    with contextlib.redirect_stdout(out):
        code = main(list(argv))
    if code:
        raise ValueError(f"gpt2 {' '.join(argv)} gave {code}")
    return out.getvalue()


def write_text(path: Path) -> None:
    lines = [
        f"{i}. The square of {i} is {i * i}; its cube is {i**3}, and {i} dozen make {12 * i}."
        for i in range(1, 61)
    ]
    lines[::9] = [
        "Now we jump back: quick, fuzzy, vexing words (with a pause) are good for you!"
    ] * 7
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def prompt_ids(folder: Path, text: str = PROMPT) -> list[int]:
    """字符分词器的 id 就是字符表里的次序。"""
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["characters"]
    return [table.index(char) for char in text]


def measured(folder: Path) -> dict[str, Any]:
    """模型本身的数，外加命令行贪心续写的文字。"""
    found = measure(GPT2Model.from_pretrained(folder), prompt_ids(folder))
    new = str(len(found["greedy_ids"]))
    argv = ("generate", str(folder), "--prompt", PROMPT, "--greedy", "--max-new-tokens", new)
    return {**found, "prompt": PROMPT, "text": say(*argv)}


def train_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keep = {"kind", "step", "loss", "grad_norm", "lr", "tokens", "aux_loss", "text"}
    kinds = {"train", "eval", "sample"}
    return [{k: v for k, v in row.items() if k in keep} for row in rows if row["kind"] in kinds]


def write_run(name: str) -> dict[str, Any]:
    """当前文件夹里：text.txt、data/、停在 STOP 的 run/，与不间断的那次最后的权重。"""
    write_text(Path("text.txt"))
    say("prepare", "text.txt", "--out", "data", "--tokenizer", "chars")
    Path("given.yaml").write_text(yaml.safe_dump({**TRAINING, **RUNS[name]}), encoding="utf-8")
    say("train", "--config", "given.yaml", "--out", "straight")
    stop = StopAt(f"step {STOP}/{STEPS}  val")
    ended = say("train", "--config", "given.yaml", "--out", "run", out=stop)
    if f"stopped by SIGINT at step {STOP}" not in ended:
        raise ValueError(f"the run did not stop at step {STOP}: {ended}")
    early, last = Path("run", f"step-{STOP:08d}"), Path("straight", f"step-{STEPS:08d}")
    found = {
        "stopped_at": STOP,
        "steps": STEPS,
        "rows": train_rows(Path("straight")),
        "checkpoint": measured(early),
        "end_text": measured(last)["text"],
    }
    shutil.copy(last / "model.safetensors", "end.safetensors")
    shutil.rmtree("straight")
    Path("given.yaml").unlink()
    return found


def scaled(fields: dict[str, Any], vocab: int) -> GPT2Model:
    """没有训练过；矩阵放大，文字才不单调，偏置与归一化也都不是初值。"""
    torch.manual_seed(1)
    model = GPT2Model(GPT2Config.from_dict({**SHAPE, "vocab_size": vocab, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_model(folder: Path, fields: dict[str, Any], data: Path) -> None:
    """一个 save_pretrained 的文件夹，加上数据集的分词器。"""
    meta = json.loads((data / "tokenizer_meta.json").read_text(encoding="utf-8"))
    scaled(fields, meta["vocab_size"]).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_meta.json"):
        shutil.copy(data / name, folder / name)


def measured_own_code(folder: Path, ids: list[int]) -> dict[str, Any]:
    """transformers 用文件夹里自带的代码算出的数。"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    if not type(model).__module__.startswith("transformers_modules."):
        raise ValueError(f"{type(model)} is not the code of {folder}")
    prompt = torch.tensor([ids])
    with torch.no_grad():
        logits = model(prompt).logits[0]
    core = GPT2Model.from_pretrained(folder)
    made = greedy(core, ids)
    theirs = model.generate(prompt, max_new_tokens=len(made), do_sample=False)[0, len(ids) :]
    if theirs.tolist() != made:
        raise ValueError(f"{folder}: generate gave {theirs.tolist()}, the backbone {made}")
    return {
        "prompt_ids": ids,
        "greedy_ids": made,
        "vocab": logits.shape[-1],
        "logits": logits_hex(logits),
    }


def pack(folder: Path, target: Path) -> None:
    """时间、主人与次序都写死：同样的内容给出同样的包。"""
    with tarfile.open(target, "w:xz", preset=9, format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in LEFT_OUT and path.suffix != ".lock":
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size = path.stat().st_size
                archive.addfile(entry, io.BytesIO(path.read_bytes()))


def check_commit() -> None:
    """
    Raises:
        ValueError: app 不在 COMMIT 的检出里，或那里有改动。
    """
    home = Path(app.__path__[0])
    for command, want in ((("rev-parse", "HEAD"), COMMIT), (("status", "--porcelain", "."), "")):
        done = subprocess.run(["git", *command], cwd=home, capture_output=True, text=True)
        said = done.stdout.strip()
        if done.returncode or not (said.startswith(want) if want else not said):
            raise ValueError(f"{home} is not a clean checkout of {COMMIT}: git says {said!r}")


def write() -> None:
    recorded: dict[str, Any] = {"commit": COMMIT, "arithmetic": arithmetic(), "runs": {}}
    with tempfile.TemporaryDirectory() as root:
        for name in RUNS:
            Path(root, name).mkdir()
            os.chdir(Path(root, name))
            recorded["runs"][name] = write_run(name)
            pack(Path.cwd(), FIXTURES / f"{name}.tar.xz")
        os.chdir(root)
        data, models = Path("dense/data/train"), Path("models")
        for name, fields in MODELS.items():
            write_model(models / name, fields, data)
        recorded["models"] = {name: measured(models / name) for name in MODELS}
        pack(models, FIXTURES / "models.tar.xz")
        write_model(Path("keel"), OWN_CODE, data)
        said = say("export", "keel", "--to", "hf", "--out", "own")
        if "(own code)" not in said:
            raise ValueError(f"some library knows {OWN_CODE}: {said}")
        recorded["own_code"] = measured_own_code(Path("own"), prompt_ids(data))
        pack(Path("own"), FIXTURES / "own_code.tar.xz")
        text = json.dumps(recorded, indent=1) + "\n"
        (FIXTURES / "recorded.json").write_text(text, encoding="utf-8", newline="\n")
        os.chdir(FIXTURES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_commit()
    write()
    print(f"{sum(p.stat().st_size for p in FIXTURES.iterdir()):,} bytes", file=sys.stderr)
