"""解码：float32、fp16、int8、int4 的权重，原生内核与纯 torch，与装着的同类轮流计时。

cd backend && python -m benchmarks.quant_decode
同类：onnxruntime（我们自己导出的 float32 图）、CTranslate2 int8、llama.cpp（装了 llama-cpp-python
时：F32、Q8_0、Q4_0，读我们写的 GGUF）。要 AVX2 的表，就在外面设 GPT2_NATIVE=avx2
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2。
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from app.data.tokenizers import train_bpe
from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.interop.export import export
from app.models.transformer import GPT2Config, GPT2Model, create_gpt2_small
from app.native.build import SWITCH
from app.quantization.codes import Scheme
from app.quantization.model import VOCABULARY, QuantizedModel, matrices
from app.quantization.rtn import round_to_nearest

from .common import interleaved, read_bandwidth, table, write_result

Job = Callable[[], object]
INT8, INT4 = Scheme(8), Scheme(4, 32)
SCHEMES = {"fp16": (Scheme(16), Scheme(16)), "int8": (INT8, INT8), "int4, 8-bit head": (INT4, INT8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = create_gpt2_small(vocab_size=50257, norm="pre", n_layer=args.layers).eval()
    variants = ours(model)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        peers = Peers(model, variants, Path(folder), args.threads)
        for batch in (1, 8):
            ids = torch.randint(0, 50257, (batch, args.prompt)).tolist()
            jobs: dict[str, Job] = {
                f"ours {name}": lambda m=m, ids=ids: ours_decode(m, ids, args.new)
                for name, m in variants.items()
            }
            jobs |= peers.jobs(ids, args.new)
            seconds = interleaved(jobs, args.rounds)
            base = seconds["ours float32"]
            for name, value in seconds.items():
                rate = f"{batch * args.new / value:.1f}"
                rows.append([batch, name, rate, f"{base / value:.2f}x"])
        prefill = interleaved(
            {f"ours {n}": lambda m=m: prompt_only(m) for n, m in variants.items()}, args.rounds
        )
    base = prefill["ours float32"]
    body = table(["batch", "what", "tokens/s", "against ours float32"], rows)
    body += "\n\nA prompt of 512 tokens:\n\n" + table(
        ["what", "ms", "against ours float32"],
        [[n, f"{s * 1e3:.0f}", f"{base / s:.2f}x"] for n, s in prefill.items()],
    )
    size = sum(p.numel() for p in model.parameters()) * 4
    grown = {n: process_bytes(m) for n, m in variants.items() if "torch" not in n}
    body += "\n\n" + table(
        ["weights", "MB", "of float32", "process, MB", "of float32"],
        [[n, f"{weight_bytes(variants[n]) / 1e6:.0f}", f"{weight_bytes(variants[n]) / size:.3f}x",
          f"{more / 1e6:.0f}", f"{more / grown['float32']:.3f}x"]
         for n, more in grown.items()],
    )  # fmt: skip
    body += "\n\nProcess: peak memory after 16 + 16 tokens, less the peak before loading."
    body += "\n\nExperts, equal active weights, float32, batch 1:\n\n" + experts(args.rounds)
    body += (
        f"\n\nGPT-2 Small, {args.layers} layers, random weights; {args.prompt} prompt tokens + "
        f"{args.new} new ones a row, greedy, prefill included, medians of {args.rounds} "
        f"interleaved rounds. Memory reads {read_bandwidth() / 1e9:.1f} GB/s here: the floor of "
        f"float32 at batch 1 is {read_bandwidth() / size:.0f} tokens/s. "
        f"Not installed: {', '.join(peers.missing) or 'nothing'}."
    )
    write_result("quant_decode", "cd backend && python -m benchmarks.quant_decode", body)


def ours(model: GPT2Model) -> dict[str, GPT2Model]:
    """每种权重两份：原生的内核，与纯 torch；乘法第一次用时备好，所以当场各喂一个词元。"""
    state, found = model.state_dict(), {"float32": model}
    for name, (body, head) in SCHEMES.items():
        codes = {
            n: round_to_nearest(state[n], head if n in VOCABULARY else body, n)
            for n in matrices(model.config)
        }
        for label, switch in (("", None), (" torch", "off")):
            if switch is None:
                os.environ.pop(SWITCH, None)
            else:
                os.environ[SWITCH] = switch
            made = QuantizedModel.of(model, codes, "rtn")
            with torch.inference_mode():
                made(torch.tensor([[0, 1]]))
            found[name + label] = made
    os.environ.pop(SWITCH, None)
    return found


def weight_bytes(model: GPT2Model) -> int:
    return sum(t.nbytes for t in model.state_dict().values())


def process_bytes(model: GPT2Model) -> int:
    """另一个进程里装载、续写，峰值内存多了多少；内存只增不减，所以每种权重一个进程。"""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, folder], capture_output=True, text=True, check=True
        )
    return int(done.stdout.split()[-1])


def experts(rounds: int) -> str:
    """稠密的与 8 个专家选 2 的，一个词元用到的权重一样多。"""
    config = GPT2Config(n_layer=6, dropout=0.0, vocab_size=8192)
    models = {
        "dense": GPT2Model(config).eval(),
        "8 experts, top-2": GPT2Model(config.replace(moe_num_experts=8, moe_top_k=2)).eval(),
    }
    ids = torch.randint(0, 8192, (1, 16)).tolist()
    seconds = interleaved(
        {n: lambda m=m: ours_decode(m, ids, 64) for n, m in models.items()}, rounds
    )
    return table(
        ["model", "active, M", "tokens/s", "of dense"],
        [[n, f"{models[n].active_parameters() / 1e6:.1f}", f"{64 / s:.1f}",
          f"{seconds['dense'] / s:.2f}x"] for n, s in seconds.items()],
    )  # fmt: skip


_MEMORY = """
import sys
from app.common.memory import resident_peak
from app.generation.config import Options
from app.generation.generate import complete
from app.models.transformer import GPT2Config, GPT2Model
tiny = GPT2Config(vocab_size=64, context_size=64, n_layer=1, n_head=2, n_embed=64)
complete(GPT2Model(tiny).eval(), [[1] * 16], Options(max_new_tokens=4))
before = resident_peak()
complete(GPT2Model.from_pretrained(sys.argv[1]), [[1] * 16], Options(max_new_tokens=16))
print(resident_peak() - before)
"""


def ours_decode(model: GPT2Model, ids: list[list[int]], new: int) -> object:
    options = Options(max_new_tokens=new, sampling=SamplingConfig(temperature=0.0))
    return complete(model, ids, options)


@torch.inference_mode()
def prompt_only(model: GPT2Model) -> object:
    return model(torch.arange(512)[None], use_cache=True, logits_to_keep=1)


class Peers:
    """别家的，读我们导出的文件。"""

    def __init__(
        self, model: GPT2Model, variants: dict[str, GPT2Model], folder: Path, threads: int
    ) -> None:
        self.model, self.variants, self.folder, self.threads = model, variants, folder, threads
        self.missing: list[str] = []
        self.onnx = self._try("onnxruntime", self._onnx)
        self.ct2 = self._try("ctranslate2", self._ct2)
        self.llama = self._try("llama_cpp", self._llama)

    def _try(self, name: str, open_it: Callable[[], object]) -> object | None:
        try:
            return open_it()
        except ImportError:
            self.missing.append(name)
            return None

    def jobs(self, ids: list[list[int]], new: int) -> dict[str, Job]:
        found: dict[str, Job] = {}
        if self.onnx is not None:
            found["onnxruntime float32"] = lambda: self._run_onnx(ids, new)
        if self.ct2 is not None:
            tokens = [[self.names[i] for i in row] for row in ids]
            found["CTranslate2 int8"] = lambda: self.ct2.generate_batch(  # type: ignore[attr-defined]
                tokens, max_length=new, min_length=new, beam_size=1, sampling_topk=1,
                include_prompt_in_result=False,
            )  # fmt: skip
        if self.llama is not None and len(ids) == 1:
            for name, one in self.llama.items():  # type: ignore[attr-defined]
                found[f"llama.cpp {name}"] = lambda one=one: self._run_llama(one, ids[0], new)
        return found

    def _onnx(self) -> object:
        import onnxruntime

        export(self.model, None, "onnx", self.folder / "onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return onnxruntime.InferenceSession(
            str(self.folder / "onnx" / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def _run_onnx(self, ids: list[list[int]], new: int) -> None:
        config, session = self.model.config, self.onnx
        x = np.array(ids, dtype=np.int64)
        shape = (len(ids), config.kv_heads, 0, config.head_dim)
        past = [np.zeros(shape, np.float32)] * (2 * config.n_layer)
        names = [i.name for i in session.get_inputs()]  # type: ignore[attr-defined]
        done = 0
        for _ in range(new):
            length = done + x.shape[1]
            feed = {
                "input_ids": x,
                "attention_mask": np.ones((len(ids), length), np.int64),
                "position_ids": np.arange(done, length, dtype=np.int64)[None].repeat(len(ids), 0),
            }
            feed |= dict(zip([n for n in names if n.startswith("past")], past, strict=True))
            logits, *past = session.run(None, feed)  # type: ignore[attr-defined]
            x, done = logits[:, -1].argmax(-1)[:, None], length

    def _ct2(self) -> object:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        # 转换器要每个 id 的文字：小小的 BPE，其余的行由导出补上占位的词元。
        words = train_bpe(["the cat sat on the mat"] * 50, 300)
        export(self.model, words, "hf", self.folder / "hf")
        target = str(self.folder / "ct2")
        TransformersConverter(str(self.folder / "hf")).convert(target, quantization="int8")
        names = json.loads((Path(target) / "vocabulary.json").read_text(encoding="utf-8"))
        self.names: list[str] = names
        return ctranslate2.Generator(target, intra_threads=self.threads, inter_threads=1)

    def _llama(self) -> object:
        import llama_cpp

        found = {}
        for name, source in (("F32", "float32"), ("Q8_0", "int8"), ("Q4_0", "int4, 8-bit head")):
            out = self.folder / f"gguf-{name}"
            export(self.variants[source], None, "gguf", out)
            found[name] = llama_cpp.Llama(
                str(next(out.glob("*.gguf"))), n_ctx=1024, n_threads=self.threads,
                n_threads_batch=self.threads, verbose=False,
            )  # fmt: skip
        return found

    def _run_llama(self, llama: object, ids: list[int], new: int) -> None:
        llama.reset()  # type: ignore[attr-defined]
        stream = llama.generate(ids, temp=0.0, top_k=1)  # type: ignore[attr-defined]
        for _ in range(new):
            next(stream)


if __name__ == "__main__":
    main()
