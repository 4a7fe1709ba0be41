"""零件的核对：每样都与 CPU 上的 float64 比；TF32 关着。"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.backends.attend import attend, attend_reference
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.config import Backend, RoPEConfig
from app.models.transformer.experts.moe import Experts
from app.models.transformer.layers import loss as loss_module
from app.models.transformer.layers.loss import cross_entropy_fused, head_cross_entropy
from app.models.transformer.layers.rope import Rotary
from app.models.transformer.visibility.pattern_text import parse
from app.models.transformer.visibility.positions import Positions
from app.training.config import OptimConfig
from app.training.optim.build import build_optimizer
from app.training.optim.muon import iterate, orthogonalize

from .log import Log, Skip
from .models import VARIANTS, gradients, ids, pair, tiny

PATTERNS = (
    "local(64)", "local(48) | global(4)", "strided(8)", "local(32) | strided(16)", "fixed(32, 4)",
    "sinks(4, 64)", "longformer(64, 4)",
)  # fmt: skip
HALF = 2e-2


def twins(log: Log) -> None:
    """每种部件：float32 的前向与反向。"""
    for name, changes in VARIANTS.items():
        model, exact = pair(tiny(**changes), log.device)
        rows = ids(2, 33, model.config.vocab_size)
        for one in (model, exact):
            x = rows.to(one.device)
            out = one(x[:, :-1], targets=x[:, 1:], logits_to_keep=32)
            (out["loss"] + out.get("aux_loss", 0.0)).backward()
            one.logits = out["logits"]
        log.agrees(f"{name}: logits", model.logits, exact.logits, 2e-5)
        log.agrees(f"{name}: gradients", gradients(model), gradients(exact), 2e-4)


def sdpa(log: Log) -> None:
    """三种核各点名一次，前向与反向；再说 torch 自己选了哪个。"""
    length = log.pick(512, 40)
    kernels = {
        "flash": (SDPBackend.FLASH_ATTENTION, log.pick(torch.bfloat16, torch.float32)),
        "efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
        "math": (SDPBackend.MATH, torch.float32),
    }
    for name, (kernel, dtype) in kernels.items():
        if name == "efficient" and log.device.type != "cuda":
            log.skip("efficient", "the kernel exists on CUDA only")
            continue
        for kind in ("causal",) if name == "flash" else ("causal", "padded"):
            with sdpa_kernel(kernel):
                _attention(log, f"{name}, {kind}, {dtype}", kind, length, dtype=dtype)
    q = torch.zeros(1, 4, length, 64, device=log.device, dtype=torch.bfloat16)
    if log.device.type == "cuda":
        asked = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, True, False)
        flash = torch.backends.cuda.can_use_flash_attention(asked)
        log.holds("flash is usable in bfloat16", flash, str(flash), "True")


def flex(log: Log) -> None:
    """FlexAttention 编译的核：每种图样。"""
    _flex(log, [(text, "plain") for text in PATTERNS])


def flex_rows(log: Log) -> None:
    """又是 FlexAttention：打包、填充、点名的全局词元，与半精度。"""
    _flex(log, [(PATTERNS[0], "packed"), (PATTERNS[1], "padded"), (PATTERNS[-1], "marked")])
    if not log.toy:
        torch._dynamo.reset()
        half = torch.bfloat16
        _attention(log, "bfloat16", "plain", 300, PATTERNS[1], dtype=half, backend="flex")


def _flex(log: Log, cases: Sequence[tuple[str, str]]) -> None:
    if log.toy:
        text, kind = cases[0]
        _attention(log, f"{text}, {kind}", kind, 96, text, backend="flex", grad=False)
        return
    for i, (text, kind) in enumerate(cases):
        if log.left < 15:
            log.skip(", ".join(f"{t} {k}" for t, k in cases[i:]), "the part's time is over")
            return
        torch._dynamo.reset()
        _attention(log, f"{text}, {kind}", kind, 300, text, backend="flex")


def _attention(
    log: Log,
    what: str,
    kind: str,
    length: int,
    text: str = "causal",
    *,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "sdpa",
    grad: bool = True,
) -> None:
    pattern, exact = parse(text), torch.float64
    given = [
        torch.randn(2, 4, length, 64, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i in range(3)
    ]
    truth = [x.to(exact).requires_grad_() for x in given]
    mine = [x.detach().clone().to(log.device).requires_grad_(grad) for x in given]
    slow, fast = (_where(kind, length, device) for device in (torch.device("cpu"), log.device))
    plan = MaskPlan.build(fast, fast, pattern, asked=backend, dtype=dtype, grad=grad)
    y = attend(*mine, plan, dropout=0.0)
    slowly = MaskPlan.build(slow, slow, pattern, asked="reference", dtype=exact)
    wanted = attend_reference(truth[0], truth[1], truth[2], slowly)
    half = dtype != torch.float32
    log.agrees(f"{what}: forward ({plan.backend})", y, wanted, HALF if half else 2e-5)
    if not grad:
        return
    seen = wanted.detach().abs().amax(-1, keepdim=True) > 0
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(9)).to(exact) * seen
    (y * weight.to(y)).sum().backward()
    (wanted * weight).sum().backward()
    found, right = (torch.cat([x.grad.flatten().cpu() for x in xs]) for xs in (mine, truth))  # type: ignore[union-attr]
    log.agrees(f"{what}: backward", found, right, 2 * HALF if half else 5e-5)


def _where(kind: str, length: int, device: torch.device) -> Positions:
    if kind in ("plain", "causal"):
        return Positions.plain(0, length, device)
    half = torch.zeros(2, length, dtype=torch.int64, device=device)
    half[:, length // 2 :] = 1
    if kind == "packed":
        return Positions.packed(half)
    mask = torch.ones(2, length, dtype=torch.int64, device=device)
    mask[0, : length // 3] = 0
    padded = Positions.padded(mask)
    if kind == "padded":
        return padded
    marked = torch.zeros(2, length, dtype=torch.bool, device=device)
    marked[:, length // 2 :: 37] = True
    return Positions(padded.pos, None, marked=marked, dense=True)


def experts(log: Log) -> None:
    """grouped_mm 与逐个专家的乘法，各与"每个专家算每个词元"比。"""
    config = GPT2Config(n_embed=64, n_head=4, moe_num_experts=5, dropout=0.0)
    torch.manual_seed(0)
    exact = Experts(config)
    for p in exact.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, n = torch.randn(48, 64), 48
    weight = torch.rand(n, 2)
    every = torch.stack([torch.randperm(5)[:2] for _ in range(n)])
    some = every.masked_fill(torch.rand(n, 2) < 0.3, 5)
    for way, dtype, limit in (
        ("sorted", torch.float32, 2e-5), ("grouped", torch.bfloat16, HALF),
    ):  # fmt: skip
        for kind, expert in (("complete", every), ("dropped", some)):
            mine = Experts(config).to(log.device)
            mine.load_state_dict(exact.state_dict())
            mine.dispatch = way  # type: ignore[assignment]
            cast = dtype != torch.float32
            with torch.autocast(log.device.type, dtype) if cast else nullcontext():
                y = mine(
                    x.to(log.device), expert.to(log.device), weight.to(log.device),
                    complete=kind == "complete",
                )  # fmt: skip
            twin = Experts(config).double()
            twin.load_state_dict(exact.state_dict())
            wanted = twin.reference(x.double(), expert, weight.double())
            y.float().square().sum().backward()
            wanted.square().sum().backward()
            log.agrees(f"{way}, {kind}: forward", y, wanted, limit)
            for name in ("weight", "bias"):
                found, right = (getattr(one.c_fc, name).grad for one in (mine, twin))
                log.agrees(f"{way}, {kind}: gradient of the {name}", found, right, 2 * limit)


def loss(log: Log) -> None:
    """分块的损失与它的梯度；忽略的目标；bfloat16；融合的一块；词表不是 8 的倍数。"""
    vocab = log.pick(50257, 501)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 200, 64), 0.1 * torch.randn(vocab, 64)
    labels = ids(2, 200, vocab)
    labels[:, ::7] = -100
    truth = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = truth[0].flatten(0, 1) @ truth[1].T
    wanted = F.cross_entropy(logits, labels.flatten(), ignore_index=-100)
    wanted.backward()
    for name, cast, limit in (("float32", False, 2e-5), ("bfloat16", True, HALF)):
        mine = [x.clone().to(log.device).requires_grad_() for x in (hidden, weight)]
        half = torch.autocast(log.device.type, torch.bfloat16) if cast else nullcontext()
        # 块小到要切几块。
        with half, mock.patch.object(loss_module, "GPU_CHUNK_BYTES", 2**24):
            found = head_cross_entropy(mine[0], mine[1], labels.to(log.device))
        found.backward()
        log.agrees(f"{name}: loss", found, wanted, limit)
        for what, a, b in zip(("hidden", "weight"), mine, truth, strict=True):
            assert a.grad is not None and b.grad is not None
            log.agrees(f"{name}: gradient of the {what}", a.grad, b.grad, limit)
    fused = cross_entropy_fused if log.toy else torch.compile(cross_entropy_fused)
    rows = logits.detach().to(log.device, torch.float32)
    target = labels.flatten().to(log.device)
    log.agrees("fused chunk", fused(rows, target)[1], _softmax_less_onehot(logits, labels), 2e-5)


def _softmax_less_onehot(logits: Tensor, labels: Tensor) -> Tensor:
    hit = F.one_hot(labels.flatten().clamp(min=0), logits.shape[1])
    return logits.detach().softmax(-1) - hit


def rope(log: Log) -> None:
    """两种布局，近处与位置十万处，前向与反向。"""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 50, 64, dtype=torch.float64)
    for layout in ("half", "interleaved"):
        for first in (0, 100_000):
            found = []
            for device, dtype in ((log.device, torch.float32), (torch.device("cpu"), x.dtype)):
                pos = torch.arange(first, first + 50, device=device)[None]
                one = x.detach().clone().to(device, dtype).requires_grad_()
                y = Rotary.at(pos, RoPEConfig(layout=layout), 64, 1024, dtype).apply(one)
                (y * y.detach().cos()).sum().backward()
                found.append((y, one.grad))
            (y, dx), (wanted, right) = found
            assert dx is not None and right is not None
            log.agrees(f"{layout} from {first}: forward", y, wanted, 1e-6)
            log.agrees(f"{layout} from {first}: backward", dx, right, 1e-5)


def optimizers(log: Log) -> None:
    """融合的 AdamW 与 Muon 的十步；Muon 在 GPU 上用 bfloat16 迭代。"""
    torch.manual_seed(0)
    for shape in ((3, 96, 96), (3, 64, 256), (2, 256, 64)):
        x = torch.randn(shape, dtype=torch.float64)
        found = orthogonalize(x.float().to(log.device)).double().cpu()
        flip = shape[1] > shape[2]
        unit = (x.mT if flip else x) / x.norm(dim=(-2, -1), keepdim=True)
        wanted = iterate(unit).mT if flip else iterate(unit)
        error = float((found - wanted).norm() / wanted.norm())
        log.holds(f"Muon's iteration {shape}", error <= 5e-2, f"{error:.1e}", "norm <= 5e-02")
    for name, limit in (("adamw", 1e-4), ("muon", 5e-2)):
        moved = []
        for one in pair(tiny(), log.device):
            optimizer, why = build_optimizer(
                one,
                OptimConfig(name=name, lr=1e-3, eps=1e-6),
            )
            start, source = _flat(one), torch.Generator().manual_seed(3)
            for _ in range(10):
                for p in one.parameters():
                    noise = torch.randn(p.shape, generator=source, dtype=torch.float64)
                    p.grad = noise.to(p)
                optimizer.step()
            moved.append(_flat(one) - start)
            if one.device == log.device:
                log.figure(f"{name} is", why)
        error = float((moved[0] - moved[1]).norm() / moved[1].norm())
        log.holds(f"{name}, 10 steps", error <= limit, f"{error:.1e}", f"norm <= {limit:.0e}")


def _flat(model: GPT2Model) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])


def autocast(log: Log) -> None:
    """bfloat16 的一步与同一设备上的 float32 比。"""
    if log.device.type == "cuda" and torch.cuda.get_device_capability()[0] < 8:
        raise Skip("this card has no bfloat16")
    for name, changes in (("dense", {}), ("rope, qk_norm", VARIANTS["rope, qk_norm, relu2"])):
        found = []
        for cast in (False, True):
            model, _ = pair(tiny(**changes), log.device)
            x = ids(4, 33, model.config.vocab_size).to(log.device)
            with torch.autocast(log.device.type, torch.bfloat16) if cast else nullcontext():
                value = model(x[:, :-1], targets=x[:, 1:])["loss"]
            value.backward()
            found.append((value.detach(), gradients(model)))
        (wanted, right), (value, got) = found
        log.agrees(f"{name}: loss", value, wanted, 1e-2)
        error = float((got - right).norm() / right.norm())
        log.holds(f"{name}: gradients", error <= 5e-2, f"{error:.1e}", "norm <= 5e-02")
        log.holds(f"{name}: finite", math.isfinite(error), f"{error:.1e}", "finite")
