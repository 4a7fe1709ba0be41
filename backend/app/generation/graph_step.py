"""CUDA 图：解码的一步有几百个小核，一个个启动比算还久；录下来一次重放（docs/decisions/026）。

录的就是主干自己的各层（run_blocks），只是位置、词元与键数不再是 Python 的数：位置在一个设备上的
整数里，写缓存按它，键总看 width 个，看不见的由掩码遮住。width 每翻一倍另录一张图。
B 行、G 键值头数、D 头宽、V 词表。
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from app.generation.lean_step import own_forward
from app.models.transformer import GPT2Model, KVCache, Positions
from app.models.transformer.block import run_blocks
from app.models.transformer.cache.store import At, Store
from app.models.transformer.experts.dispatch import explain_dispatch
from app.models.transformer.layers.context import make_notes
from app.models.transformer.visibility.pattern import Pattern
from app.models.transformer.visibility.positions import PADDING

Replay = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]

# 录一张图约等于走几十步；再少就不划算。
LEAST_TOKENS = 32
# 最窄的一张图看这么多个键：再窄省不下什么，只是多录几张。
LEAST_KEYS = 128
# 与前向的 logits 至多差最大的 logit 的这么多倍：换了注意力的核，半精度每层都再舍入一次。
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2
# {模型: 录下来的与前向相符}；录不成的也记作不符，不再试。
_agrees: WeakKeyDictionary[GPT2Model, bool] = WeakKeyDictionary()


def choose_graph(model: GPT2Model, tokens: int) -> tuple[bool, str]:
    """(录不录, 英文的理由)；tokens：将要写的词元数。"""
    reason = _why_not(model, tokens)
    if reason is not None:
        return False, reason
    return True, "one replay instead of some hundred launches a token"


def _why_not(model: GPT2Model, tokens: int) -> str | None:
    device = model.device
    if device.type != "cuda":
        return f"there are none on {device.type}"
    if not _agrees.get(model, True):
        return "the recorded step failed or differed from the forward of this model"
    if tokens < LEAST_TOKENS:
        return f"{tokens} tokens are too few to record for (from {LEAST_TOKENS})"
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled("cuda"):
        return "autocast converts weights anew in each step"
    dispatch = explain_dispatch(model.config, device=device, dtype=model.embed.wte.weight.dtype)
    if dispatch is not None and dispatch[0] == "sorted":
        return f"experts wait for their counts ({dispatch[1]})"
    return own_forward(model)


def record_cuda(run: Callable[[], Tensor]) -> Replay:
    """先在旁边的流上走两遍：第一次调用要建句柄、选算法，那些录不下来。"""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@dataclass(frozen=True)
class _Keys:
    """缓存的一步，坐标都在设备上：at (1,) 是这个词元的位置，也是它的槽。"""

    stores: list[tuple[Store, Store]]
    at: Tensor
    width: int

    def keys(self, pattern: Pattern) -> Positions:
        slots = torch.arange(self.width, device=self.at.device)
        return Positions(slots.masked_fill(slots > self.at, PADDING)[None])

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.stores[layer]
        keys.write(At(self.at), k)
        values.write(At(self.at), v)
        return keys.read(slice(self.width)), values.read(slice(self.width))


class GraphStep:
    """model 的一步，录在一个缓存上；缓存换了内存（少了几行）就另录。"""

    def __init__(self, model: GPT2Model, record: Record = record_cuda) -> None:
        self._model, self._record = model, record
        self._notes = make_notes(model.config, loads=False)
        self._first: Store | None = None
        self._replays: dict[int, Replay] = {}

    def takes(self, cache: KVCache) -> bool:
        """步调一致，每个词元一槽（环的槽号会绕回），而且录得成。"""
        whole = all(keys.shape[2] - 1 == cache.max_len for keys in cache.keys)
        return cache.uniform is not None and whole and _agrees.get(self._model, True)

    @torch.inference_mode()
    def __call__(self, chosen: Tensor, cache: KVCache) -> Tensor:
        """chosen (B,) 各行的下一个词元 -> logits (B, V)。"""
        start = cache.uniform
        assert start is not None
        step = cache.begin(Positions.plain(start, 1, chosen.device))
        fast = self._attempt(chosen, cache, start)
        if fast is not None and self._model in _agrees:
            cache.commit(step)
            return fast
        # 头一步另走一遍前向，比过才用；录不成就一直走前向。
        out = self._model(chosen[:, None], cache=cache, use_cache=True, logits_to_keep=1)
        wanted = out["logits"][:, -1]
        _agrees[self._model] = fast is not None and self._close(fast, wanted)
        return wanted

    def _attempt(self, chosen: Tensor, cache: KVCache, start: int) -> Tensor | None:
        try:
            return self._replayed(chosen, cache, start)
        except RuntimeError as error:
            first = str(error).strip().split("\n")[0][:200]
            warnings.warn(
                f"the step cannot be recorded, decoding takes the forward: {first}", stacklevel=4
            )
            return None

    def _close(self, fast: Tensor, wanted: Tensor) -> bool:
        largest = float(wanted.abs().nan_to_num(nan=0.0, posinf=0.0).max())
        limit = _TOLERANCE.get(wanted.dtype, _HALF_TOLERANCE) * largest
        if torch.allclose(fast, wanted, rtol=0.0, atol=limit, equal_nan=True):
            return True
        warnings.warn(
            f"the recorded decoding step differs from the model's forward by "
            f"{float((fast - wanted).abs().max()):.1e}: decoding takes the forward",
            stacklevel=4,
        )
        return False

    def _replayed(self, chosen: Tensor, cache: KVCache, start: int) -> Tensor:
        if self._first is not cache.stores[0][0]:
            self._adopt(chosen, cache, start)
        assert cache.max_len is not None
        width = min(cache.max_len, max(LEAST_KEYS, 1 << start.bit_length()))
        self._chosen.copy_(chosen)
        self._at.fill_(start)
        if width not in self._replays:
            self._replays[width] = self._record(lambda: self._run(width))
        # 复制一份：下一步会写在同一处。
        return self._replays[width]().clone()

    def _adopt(self, chosen: Tensor, cache: KVCache, start: int) -> None:
        self._first, self._stores, self._replays = cache.stores[0][0], cache.stores, {}
        self._chosen = torch.empty_like(chosen)
        self._at = torch.zeros(1, dtype=torch.int64, device=chosen.device)
        # 没有写过的槽也要读，只是遮住：垃圾里的 NaN 乘以权重 0 仍是 NaN。
        for pair in cache.stores:
            for store in pair:
                store.clear(start, store.parts[0].shape[2])

    def _run(self, width: int) -> Tensor:
        model, where = self._model, Positions(self._at[None])
        x = model.embed(self._chosen[:, None], where)
        keys = _Keys(self._stores, self._at, width)
        contexts = model.contexts(where, keys, self._notes, x.dtype)
        return model.head(run_blocks(model.h, model.ln_f, x, contexts)[0])[:, -1]
