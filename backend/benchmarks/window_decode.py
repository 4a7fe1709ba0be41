"""长上下文的逐词元解码：窗口 256 的环形缓存，与留着全部键的缓存比（Small 的形状，RoPE，float32）。

cd backend && python -m benchmarks.window_decode
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from app.models.transformer import GPT2Model, KVCache, create_gpt2_small

from .common import interleaved, read_bandwidth, table, write_result

PATTERNS = {"full cache": None, "local(256)": "local(256)", "sinks(4, 256)": "sinks(4, 256)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=16_384)
    parser.add_argument("--new", type=int, default=8, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {name: build(text, args.context + args.new) for name, text in PATTERNS.items()}
    bandwidth = read_bandwidth()
    rows: list[list[object]] = []
    for batch in args.batches:
        caches = {name: filled(m, batch, args.context, args.new) for name, m in models.items()}
        jobs = {n: decode(models[n], caches[n], args.context, args.new) for n in models}
        seconds = interleaved(jobs, args.rounds)
        weights = models["full cache"].num_parameters() * 4
        for name, value in seconds.items():
            floor = args.new * (weights + caches[name].nbytes) / bandwidth
            rows.append(
                [
                    batch,
                    name,
                    f"{batch * args.new / value:.1f}",
                    f"{seconds['full cache'] / value:.2f}x",
                    f"{caches[name].nbytes / 2**20:.0f}",
                    f"{batch * args.new / floor:.1f}",
                ]
            )
    head = ["batch", "cache", "tokens/s", "against full", "cache, MiB", "floor, tokens/s"]
    body = table(head, rows) + (
        f"\n\nSmall with RoPE, {args.context:,} tokens behind, {args.new} decoded a round, medians "
        f"of {args.rounds} interleaved rounds. The floor is reading weights and cache once a token "
        f"at the measured {bandwidth / 1e9:.0f} GB/s. The keys are random numbers: their values "
        "do not change the time."
    )
    write_result("window_decode", "cd backend && python -m benchmarks.window_decode", body)


def build(pattern: str | None, context: int) -> GPT2Model:
    return create_gpt2_small(
        norm="pre", position="rope", context_size=context, attention_pattern=pattern
    ).eval()


def filled(model: GPT2Model, batch: int, context: int, room: int) -> KVCache:
    """缓存里先有 context 个词元；直接写进随机的键值，省去一次整段前向。"""
    cache = model.new_cache(batch, context + room)
    config = model.config
    shape = (batch, config.kv_heads, 1024, config.head_dim)
    from app.models.transformer import Positions

    for start in range(0, context, shape[2]):
        where = Positions.plain(start, min(shape[2], context - start), model.device)
        step = cache.begin(where)
        for layer in range(config.n_layer):
            kv = torch.randn(*shape[:2], where.length, shape[3])
            step.write(layer, kv, kv)
        cache.commit(step)
    return cache


def decode(model: GPT2Model, cache: KVCache, context: int, new: int) -> Callable[[], None]:
    def go() -> None:
        ids = torch.zeros(cache.batch_size, 1, dtype=torch.long)
        with torch.inference_mode():
            for _ in range(new):
                out = model(ids, cache=cache, use_cache=True, logits_to_keep=1)
                ids = out["logits"][:, -1].argmax(-1, keepdim=True)
        cache.truncate(context)

    return go


if __name__ == "__main__":
    main()
