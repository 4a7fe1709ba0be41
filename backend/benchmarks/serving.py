"""服务：一、八、三十二个客户端；长提示进来时别人停多久；借前缀；猜；HTTP 要多少。

cd backend && python -m benchmarks.serving --vocab-files FOLDER
各部分各写一张表，一做完就写，可以各自跑：--parts throughput stall prefix guessing arrivals memory。
同类，装着才有：transformers serve --continuous-batching，PATH 上的 llama-server（读我们的 GGUF）。
各服务轮流被问，不被问的停住（SIGSTOP）；贪心的文字先要相同，否则不印那一行。
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from app.data.tokenizers import Tokenizer, gpt2_tokenizer, load_tokenizer
from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.models.transformer import GPT2Model, create_gpt2_small
from app.serving.request import Ask, Order
from app.serving.served import Served, serve_model

from .common import table, write_result
from .serving_load import Answer, closed_loop, open_loop, quantile

GREEDY = SamplingConfig(temperature=0.0)
Bodies = list[dict[str, Any]]
PARTS = ("throughput", "stall", "prefix", "guessing", "arrivals", "memory")


@dataclass
class Server:
    """一个别的进程。name 是表里的；model 是它认的模型名。"""

    name: str
    model: str
    port: int
    process: subprocess.Popen[bytes]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def hold(self, still: bool) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP if still else signal.SIGCONT)

    def memory(self) -> float:
        """它用过的最多的内存，MB。"""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-files", type=Path, help="folder with the GPT-2 vocabulary")
    parser.add_argument("--model", type=Path, help="a model folder; default: Small, random weights")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder, model, tokenizer = prepare(args, Path(temporary))
        with contextlib.ExitStack() as stack:
            servers, missing = start_all(args, folder, Path(temporary), stack)
            bench = Bench(args, model, tokenizer, servers)
            for part in args.parts:
                body = f"{getattr(bench, part)()}\n\nNot installed: {', '.join(missing) or 'none'}."
                command = f"cd backend && python -m benchmarks.serving --parts {part} "
                write_result(f"serving_{part}", f"{command}--vocab-files FOLDER", body)


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, GPT2Model, Tokenizer]:
    if args.model is not None:
        return args.model, GPT2Model.from_pretrained(args.model), load_tokenizer(args.model)
    tokenizer = gpt2_tokenizer(args.vocab_files)
    model = create_gpt2_small(
        vocab_size=tokenizer.vocab_size, norm="pre", n_layer=args.layers
    ).eval()
    model.save_pretrained(folder / "small")
    tokenizer.save(folder / "small")
    return folder / "small", model, tokenizer


def start_all(
    args: argparse.Namespace, model: Path, folder: Path, stack: contextlib.ExitStack
) -> tuple[dict[str, Server], list[str]]:
    """ours、ours ngram，与装着的同类；起来就停住。"""
    gpt2 = [sys.executable, "-m", "app.cli"]
    serve = [*gpt2, "serve", str(model), "--rows", str(max(args.clients)), "--kv-memory", "8GiB"]
    wanted: dict[str, tuple[str, list[str], dict[str, Any]]] = {
        "ours": (model.name, serve, {"ignore_eos": True}),
        "ours, ngram": (model.name, [*serve, "--speculate", "ngram"], {"ignore_eos": True}),
    }
    missing = []
    hf, gguf = folder / "hf", folder / "gguf"
    if shutil.which("transformers"):
        subprocess.run([*gpt2, "export", str(model), "--to", "hf", "--out", str(hf)], check=True)
        command = ["transformers", "serve", str(hf), "--continuous-batching", "--dtype", "float32",
                   "--device", "cpu", "--host", "127.0.0.1"]  # fmt: skip
        wanted["transformers serve"] = (str(hf), command, {})
    else:
        missing.append("transformers")
    if shutil.which("llama-server"):
        subprocess.run(
            [*gpt2, "export", str(model), "--to", "gguf", "--out", str(gguf)], check=True
        )
        (file,), most = gguf.glob("*.gguf"), max(args.clients)
        command = ["llama-server", "-m", str(file), "-t", str(args.threads), "--poll", "0",
                   "-np", str(most), "-c", str(most * 1024)]  # fmt: skip
        wanted["llama-server F32"] = ("any", command, {"ignore_eos": True})
    else:
        missing.append("llama-server")
    servers = {}
    for name, (called, command, extra) in wanted.items():
        server = stack.enter_context(started(name, called, command, args.threads, extra))
        if server is None:
            missing.append(f"{name} (did not start)")
        else:
            servers[name] = server
    return servers, missing


@contextlib.contextmanager
def started(
    name: str, model: str, command: list[str], threads: int, extra: dict[str, Any]
) -> Iterator[Server | None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    try:
        if ready(process, port):
            server = Server(name, model, port, process, extra)
            server.hold(True)
            yield server
            server.hold(False)
        else:
            yield None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ready(process: subprocess.Popen[bytes], port: int, seconds: float = 180) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    return False


class Bench:
    def __init__(
        self,
        args: argparse.Namespace,
        model: GPT2Model,
        tokenizer: Tokenizer,
        servers: dict[str, Server],
    ) -> None:
        self.args, self.model, self.tokenizer, self.servers = args, model, tokenizer, servers
        self.engine: Served = serve_model("engine", model, tokenizer, rows=max(args.clients))
        self._rng = random.Random(0)
        self._answers: dict[tuple[str, int], list[Answer]] = {}
        self.equal = self._equal_work()

    def throughput(self) -> str:
        """各做法每秒多少个新词元；每轮换着来，都已在比文字时热过身。"""
        rows: list[list[object]] = []
        for clients in self.args.clients:
            jobs: dict[str, Callable[[], float]] = {
                "complete, in process": lambda n=clients: self._offline(n),
                "engine, in process": lambda n=clients: self._in_process(n),
            }
            for name in self.equal:
                jobs[name] = lambda s=self.servers[name], n=clients: self._through(s, n)
            speeds: dict[str, list[float]] = {name: [] for name in jobs}
            for _ in range(self.args.rounds):
                for name, job in jobs.items():
                    speeds[name].append(job())
                    said = f"{clients} clients, {name}: {speeds[name][-1]:.1f} tokens/s"
                    print(said, file=sys.stderr, flush=True)
            base = statistics.median(speeds["complete, in process"])
            for name, values in speeds.items():
                median = statistics.median(values)
                spread = f"{min(values):.1f}..{max(values):.1f}"
                rows.append([clients, name, f"{median:.1f}", spread, f"{median / base:.2f}x"])
        header = ["clients", "what", "tokens/s", "range", "against complete"]
        sizes = f"{self.args.prompt}+{self.args.new} tokens, {self.args.rounds} rounds:"
        return f"{sizes}\n\n{table(header, rows)}\n\n{self._latency()}"

    def _latency(self) -> str:
        rows: list[list[object]] = []
        for (name, clients), answers in self._answers.items():
            first = [a.first for a in answers]
            gaps = [gap for a in answers for gap in a.gaps]
            errors = sum(a.error is not None for a in answers)
            numbers = [quantile(x, q) * 1e3 for x in (first, gaps) for q in (0.5, 0.99)]
            rows.append([name, clients, *(f"{n:.0f}" for n in numbers), errors])
        header = ["server", "clients", "first p50 ms", "p99", "gap p50 ms", "p99", "errors"]
        return table(header, rows)

    def stall(self) -> str:
        """七段在写，一个长提示进来：词元之间隔多久。"""
        rows: list[list[object]] = []
        long = self.model.config.context_size - 24
        for name in self.equal:
            server = self.servers[name]
            bodies = [self._body(server, 16, self.args.new) for _ in range(7)]
            late = self._body(server, long, 8)

            async def both(s: Server = server, b: Bodies = bodies, x: dict[str, Any] = late) -> Any:
                wait = [0.0] * len(b) + [1.0]
                return await open_loop(s.address, [*b, x], wait)

            with self._awake(server):
                answers = asyncio.run(both())
            gaps = [gap for answer in answers[:7] for gap in answer.gaps]
            rows.append(
                [name, f"{quantile(gaps, 0.99) * 1e3:.0f}", f"{max(gaps, default=0) * 1e3:.0f}",
                 answers[7].error or f"{answers[7].first:.2f}"]
            )  # fmt: skip
            for answer in answers[:7]:
                assert answer.error is None, f"{name}: {answer.error}"
        header = ["server", "gap p99 ms", "longest", "first of the long one, s"]
        return f"Seven streams while a prompt of {long} tokens enters:\n\n" + table(header, rows)

    def prefix(self) -> str:
        server, size = self.servers["ours"], min(768, self.model.config.context_size - 64)
        cold: list[float] = []
        warm: list[float] = []
        for _ in range(self.args.rounds):
            shared = self._ids(size)
            for where in (cold, warm):
                body = {**self._body(server, 1, 8), "prompt": shared + self._ids(32)}
                where.append(self._ask(server, [body], 1)[0].first)
        ratio = statistics.median(cold) / statistics.median(warm)
        return (
            f"A shared prefix of {size} tokens and 32 new ones: the first token after "
            f"{statistics.median(cold) * 1e3:.0f} ms cold, {statistics.median(warm) * 1e3:.0f} ms "
            f"with the prefix copied: {ratio:.1f}x."
        )

    def guessing(self) -> str:
        """抄的多的与自由的文字，一个与八个客户端；有 n 元组与没有。"""
        rows: list[list[object]] = []
        text = Path(contextlib.__file__).read_text(encoding="utf-8")
        copied = self.tokenizer.encode(text)[: self.args.prompt]
        kinds = {"copies": copied * 2, "free": None}
        for kind, prompt in kinds.items():
            for clients in (1, 8):
                speeds: dict[str, list[float]] = {"ours": [], "ours, ngram": []}
                for _ in range(self.args.rounds):
                    for name, values in speeds.items():
                        server = self.servers[name]
                        bodies = [self._body(server, self.args.prompt, self.args.new)
                                  for _ in range(clients)]  # fmt: skip
                        for body in bodies:
                            body["prompt"] = prompt or body["prompt"]
                            body["temperature"] = 0 if prompt else 1
                        start = time.perf_counter()
                        answers = self._ask(server, bodies, clients)
                        spent = time.perf_counter() - start
                        values.append(sum(a.tokens for a in answers) / spent)
                plain, guessed = (statistics.median(values) for values in speeds.values())
                rows.append([kind, clients, f"{plain:.1f}", f"{guessed:.1f}",
                             f"{guessed / plain:.2f}x"])  # fmt: skip
        return "Guessing by n-grams, tokens/s:\n\n" + table(
            ["text", "clients", "off", "ngram", "ratio"], rows
        )

    def arrivals(self) -> str:
        """开环：按泊松的时刻来，五成与八成的负荷；等待从计划的时刻算。"""
        server, rows = self.servers["ours"], list[list[object]]()
        most = max(self.args.clients)
        capacity = self._through(server, most) / self.args.new
        for load in (0.5, 0.8):
            rng = random.Random(1)
            gaps = [rng.expovariate(capacity * load) for _ in range(2 * most)]
            bodies = [self._body(server, self.args.prompt, self.args.new) for _ in gaps]
            with self._awake(server):
                answers = asyncio.run(open_loop(server.address, bodies, gaps))
            first = [a.first for a in answers]
            whole = [a.end - a.planned for a in answers]
            numbers = [quantile(x, q) for x in (first, whole) for q in (0.5, 0.9, 0.99)]
            rows.append([f"{load:.0%}", *(f"{n:.2f}" for n in numbers)])
        header = ["load", "first p50 s", "p90", "p99", "whole p50 s", "p90", "p99"]
        return "Arrivals at random, ours:\n\n" + table(header, rows)

    def memory(self) -> str:
        weights = sum(t.nbytes for t in self.model.state_dict().values()) / 2**20
        keys = self.engine.engine.flat.cache.nbytes / 2**20
        used = {name: server.memory() for name, server in self.servers.items()}
        listed = ", ".join(f"{name} {mb:.0f}" for name, mb in used.items())
        mine = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        return (
            f"Peak memory, MiB: {listed}; weights {weights:.0f}, keys and values {keys:.0f}. "
            f"This process spent {mine:.0f} s of CPU, the in-process rows included."
        )

    def _ids(self, count: int) -> list[int]:
        top = min(self.tokenizer.vocab_size, self.model.config.vocab_size) - 1
        return [self._rng.randrange(top) for _ in range(count)]

    def _body(self, server: Server, prompt: int, new: int) -> dict[str, Any]:
        """别家只收文字；随意的号写成文字再编码会变多，切到同样多个。"""
        ids = self._ids(prompt)
        given: Any = ids
        if not server.name.startswith("ours"):
            given = self.tokenizer.decode(ids).replace("\ufffd", "?")
            while len(ids := self.tokenizer.encode(given)) > prompt:
                given = self.tokenizer.decode(ids[:prompt]).replace("\ufffd", "")
        return {"model": server.model, "prompt": given, "max_tokens": new, "temperature": 0,
                "stream_options": {"include_usage": True}, **server.extra}  # fmt: skip

    @contextlib.contextmanager
    def _awake(self, server: Server) -> Iterator[None]:
        server.hold(False)
        try:
            yield
        finally:
            server.hold(True)

    def _ask(self, server: Server, bodies: Bodies, clients: int) -> list[Answer]:
        with self._awake(server):
            return asyncio.run(closed_loop(server.address, bodies, clients))

    def _through(self, server: Server, clients: int) -> float:
        count = clients * max(1, 4 // clients)
        bodies = [self._body(server, self.args.prompt, self.args.new) for _ in range(count)]
        start = time.perf_counter()
        answers = self._ask(server, bodies, clients)
        spent = time.perf_counter() - start
        self._answers.setdefault((server.name, clients), []).extend(answers)
        made = [a.tokens or len(a.marks) for a in answers if a.error is None]
        return sum(made) / spent

    def _offline(self, clients: int) -> float:
        prompts = [self._ids(self.args.prompt) for _ in range(clients)]
        start = time.perf_counter()
        complete(self.model, prompts, Options(max_new_tokens=self.args.new, sampling=GREEDY))
        return clients * self.args.new / (time.perf_counter() - start)

    def _in_process(self, clients: int) -> float:
        engine = self.engine.engine
        start = time.perf_counter()
        for i in range(clients):
            ask = Ask(prompt=tuple(self._ids(self.args.prompt)), max_tokens=self.args.new,
                      sampling=GREEDY)  # fmt: skip
            engine.submit(Order(i, (ask,)))
        while engine.busy:
            engine.step()
        return clients * self.args.new / (time.perf_counter() - start)

    def _equal_work(self) -> list[str]:
        """贪心地续写几段文字，与 complete 相同的才上表。"""
        texts = ["The quick brown fox", "def main(", "In the beginning", "1 2 3 4"]
        options = Options(max_new_tokens=12, sampling=GREEDY)
        prompts = [self.tokenizer.encode_prompt(text) for text in texts]
        wanted = [d.text for d in complete(self.model, prompts, options, tokenizer=self.tokenizer)]
        good = []
        for name, server in self.servers.items():
            bodies: Sequence[dict[str, Any]] = [
                {**self._body(server, 1, 12), "prompt": text} for text in texts
            ]
            found = [self._ask(server, [body], 1)[0] for body in bodies]
            same = [a.text for a in found] == wanted
            print(f"{name}: {'equal work' if same else 'other texts or errors, left out'}",
                  [a.error for a in found if a.error], file=sys.stderr)  # fmt: skip
            if same:
                good.append(name)
        return [name for name in good if name != "ours, ngram"]


if __name__ == "__main__":
    main()
