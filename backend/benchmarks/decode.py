"""带缓存的逐词元解码，与 transformers 的 generate 比（Small 的形状，float32，贪心）。

cd backend && python -m benchmarks.decode
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.models.transformer import GPT2Model, create_gpt2_small
from app.models.transformer.layers import cpu_products

from .common import interleaved, read_bandwidth, table, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours, theirs = build()
    floor = read_bandwidth() / (ours.num_parameters() * 4)
    rows = []
    for batch in (1, 8):
        ids = torch.randint(0, 50257, (batch, args.prompt))
        jobs = batch_jobs(ours, theirs, ids, args.new)
        seconds = interleaved(jobs, args.rounds)
        base = seconds["transformers generate"]
        for name, value in seconds.items():
            speed = batch * args.new / value
            rows.append([batch, name, f"{speed:.1f}", f"{base / value:.2f}x"])
    body = table(["batch", "what", "tokens/s", "against transformers"], rows)
    body += (
        f"\n\n{args.prompt} prompt tokens + {args.new} new ones a row, prefill included, medians "
        f"of {args.rounds} interleaved rounds. The floor at batch 1 is reading the weights once a "
        f"token: {floor:.0f} tokens/s at the measured read bandwidth."
    )
    write_result("decode", "cd backend && python -m benchmarks.decode", body)


def build() -> tuple[GPT2Model, torch.nn.Module]:
    """同一组权重装进两边，先确认贪心的结果逐个相等。"""
    import transformers

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    ours = create_gpt2_small(vocab_size=50257, norm="pre").eval()
    state = {"embed.wte.weight": theirs.transformer.wte.weight}
    state["embed.wpe.weight"] = theirs.transformer.wpe.weight
    for name, tensor in theirs.transformer.state_dict().items():
        if name.startswith(("h.", "ln_f")):
            state[name] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
    ours.load_state_dict(state)
    ids = torch.randint(0, 50257, (1, 16))
    with torch.no_grad():
        a, b = ours(ids)["logits"], theirs(ids).logits
    assert (a - b).abs().max() / b.abs().max() < 2e-5
    return ours, theirs


def batch_jobs(
    ours: GPT2Model, theirs: torch.nn.Module, ids: torch.Tensor, new: int
) -> dict[str, Callable[[], object]]:
    def transformers_generate(**kwargs: object) -> object:
        with torch.inference_mode():
            return theirs.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0, **kwargs,
            )  # fmt: skip

    def our_generate() -> object:
        options = Options(max_new_tokens=new, sampling=SamplingConfig(temperature=0.0))
        return complete(ours, ids.tolist(), options)

    def without_few_row_products() -> object:
        kept = cpu_products._few_rows
        cpu_products._few_rows = lambda x, weight: False
        try:
            return our_generate()
        finally:
            cpu_products._few_rows = kept

    return {
        "transformers generate": transformers_generate,
        "transformers generate, static cache": lambda: transformers_generate(
            cache_implementation="static", disable_compile=True
        ),
        "ours": our_generate,
        f"ours with {F.linear.__name__}": without_few_row_products,
    }


if __name__ == "__main__":
    main()
