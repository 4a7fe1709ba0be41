"""混合专家的设置；它与其余配置之间的约束以数字传进来。不需要 torch。

E 专家数、k 每个词元的专家数、N 层数。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from .fields import Mark, check_bounds, from_mapping, normalise_types

Router = Literal["softmax_topk", "softmax", "sigmoid", "switch"]
Dispatch = Literal["auto", "reference", "sorted", "grouped"]
# 除以 k 之后对齐到 8：半精度的矩阵乘内核要 16 字节对齐的行。
_ALIGN = 8
_MOST_EXPERTS = 65_536
_WIDEST = 1 << 24
_BOUNDS = {
    "aux_loss_coef": (0, 100),
    "z_loss_coef": (0, 100),
    "bias_update_rate": (0, 100),
    "hidden": (1, _WIDEST),
    "shared_experts": (0, _WIDEST),
    "shared_hidden": (1, _WIDEST),
    "every": (1, _WIDEST),
    "first_dense": (0, _WIDEST),
}


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """路由、均衡与各层的安排；专家数与 k 是 GPT2Config 的 moe_num_experts、moe_top_k。

    aux_loss_coef 与 z_loss_coef 乘的是各 MoE 层的平均，所以不随层数改变分量。

    Raises:
        ValueError: 值越界，或两个值互相矛盾。
    """

    router: Annotated[
        Router,
        Doc(
            "softmax_topk: top-k made to sum to 1 (Mixtral); softmax: not (OLMoE); sigmoid: with "
            "a selection bias (DeepSeek-V3); switch: top-1, scaled"
        ),
    ] = "softmax_topk"
    jitter_noise: Annotated[
        float,
        Doc("training: router inputs times a uniform factor within 1 +- this; 0 = off"),
        Mark.FREE,
    ] = 0.0
    aux_loss_coef: Annotated[
        float,
        Doc("weight of the balance loss E x sum(f x P), k when uniform; 0 = off"),
        Mark.FREE,
    ] = 0.01
    z_loss_coef: Annotated[
        float,
        Doc("weight of the mean squared logsumexp of the router; 0 = off"),
        Mark.FREE,
    ] = 0.001
    bias_update_rate: Annotated[
        float,
        Doc("loss-free balance of router 'sigmoid': step of its bias; 0 = off, 0.001 usual"),
        Mark.FREE,
    ] = 0.0
    capacity_factor: Annotated[
        float | None,
        Doc("training: an expert takes at most this x tokens x k / E, drops the rest; None = all"),
        Mark.FREE,
    ] = None
    hidden: Annotated[
        int | None,
        Doc("width of an expert; None = active products equal those of the dense MLP"),
    ] = None
    shared_experts: Annotated[int, Doc("experts that every token passes besides")] = 0
    shared_hidden: Annotated[int | None, Doc("width of a shared expert; None = hidden")] = None
    every: Annotated[int, Doc("every n-th layer is MoE (the last of each n), the rest dense")] = 1
    first_dense: Annotated[int, Doc("the first so many layers stay dense")] = 0
    layers: Annotated[
        tuple[int, ...] | None, Doc("exactly these layers are MoE, counted from 0; None = by every")
    ] = None
    dispatch: Annotated[
        Dispatch,
        Doc("how tokens reach experts; auto chooses by device, type and size"),
        Mark.FREE,
    ] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        normalise_types(self, "moe.")
        check_bounds(self, _BOUNDS, "moe.")
        if not 0.0 <= self.jitter_noise < 1.0:
            raise ValueError(f"moe.jitter_noise={self.jitter_noise} must be in [0, 1)")
        if self.capacity_factor is not None and not 0.0 < self.capacity_factor <= 1e6:
            raise ValueError(
                f"moe.capacity_factor={self.capacity_factor} must be above 0 (1.25 is usual), or "
                "None to drop nothing"
            )
        self._check_pairs()
        self._check_list()

    def _check_pairs(self) -> None:
        if self.bias_update_rate and self.router != "sigmoid":
            raise ValueError(
                f"moe.bias_update_rate={self.bias_update_rate} with moe.router={self.router!r}: "
                "only 'sigmoid' has a selection bias; use moe.router='sigmoid', or "
                "moe.bias_update_rate=0 and moe.aux_loss_coef"
            )
        if self.shared_hidden is not None and not self.shared_experts:
            raise ValueError(
                f"moe.shared_hidden={self.shared_hidden} has no effect with "
                "moe.shared_experts=0: use None, or shared_experts=1"
            )

    def _check_list(self) -> None:
        if self.layers is None:
            return
        if not self.layers or any(type(layer) is not int for layer in self.layers):
            raise ValueError(
                f"moe.layers={list(self.layers)} must be a list of layer numbers, or None for all"
            )
        if sorted(set(self.layers)) != list(self.layers):
            raise ValueError(
                f"moe.layers={list(self.layers)} must rise without repeats: "
                f"use {sorted(set(self.layers))}"
            )
        if self.every != 1 or self.first_dense:
            raise ValueError(
                f"moe.layers={list(self.layers)} with moe.every={self.every} and "
                f"moe.first_dense={self.first_dense} says it twice: use either the list or the rule"
            )

    def to_dict(self) -> dict[str, Any]:
        data = dict(vars(self))
        return data if self.layers is None else data | {"layers": list(self.layers)}

    @classmethod
    def from_dict(cls, data: Any) -> MoEConfig:
        """
        Raises:
            ValueError: 不是映射、未知的键（给出最近的名字），或坏值。
        """
        return from_mapping(cls, data, "moe")

    def layers_among(self, n_layer: int) -> tuple[int, ...]:
        """n_layer 层里哪些是 MoE。"""
        if self.layers is not None:
            return self.layers
        return tuple(
            i for i in range(n_layer) if i >= self.first_dense and (i + 1) % self.every == 0
        )

    def width(self, k: int, mlp_hidden: int) -> int:
        """一个专家的宽度。没有写明时，k 个专家加共享专家的乘法与一层稠密前馈相等，对齐到 8。"""
        if self.hidden is not None:
            return self.hidden
        parts, whole = k + self.shared_experts, mlp_hidden
        if self.shared_hidden is not None:
            parts, whole = k, whole - self.shared_experts * self.shared_hidden
        return max(1, round(whole / (parts * _ALIGN))) * _ALIGN

    def check_unused(self, k: int) -> None:
        """没有专家的模型：写了别的设置就是误会。

        Raises:
            ValueError: k（moe_top_k）或哪个设置不是默认值。
        """
        changed = {n: v for n, v in vars(self).items() if v != vars(MoEConfig())[n]}
        if k != 2:
            changed = {"moe_top_k": k, **changed}
        if changed:
            name, value = next(iter(changed.items()))
            name = name if name == "moe_top_k" else f"moe.{name}"
            raise ValueError(
                f"{name}={value!r} has no effect with moe_num_experts=0: use moe_num_experts=8 (or "
                "another number above 1), or leave the option out"
            )

    def check_fits(
        self, experts: int, k: int, *, n_layer: int, mlp_hidden: int, context_size: int
    ) -> None:
        """
        Raises:
            ValueError: 专家数、k、各层、宽度与容量互相矛盾；点名两个值与改法。
        """
        if not 2 <= experts <= _MOST_EXPERTS:
            raise ValueError(
                f"moe_num_experts={experts} must be between 2 and {_MOST_EXPERTS}, or 0 for the "
                "dense MLP (which is what one expert would be)"
            )
        if k > experts:
            raise ValueError(
                f"moe_top_k={k} is above moe_num_experts={experts}: use at most {experts}, or more "
                "experts"
            )
        self._check_router(k)
        self._check_capacity(experts, k, context_size)
        self._check_width(mlp_hidden)
        found = self.layers_among(n_layer)
        if not found or found[-1] >= n_layer or found[0] < 0:
            listed = None if self.layers is None else list(self.layers)
            raise ValueError(
                f"moe.layers={listed}, moe.every={self.every} "
                f"and moe.first_dense={self.first_dense} do not fit n_layer={n_layer}: layers go "
                f"from 0 to {n_layer - 1}, and at least one must be MoE (or moe_num_experts=0)"
            )

    def _check_router(self, k: int) -> None:
        if self.router == "switch" and k != 1:
            raise ValueError(
                f"moe.router='switch' with moe_top_k={k}: a switch picks one expert; use "
                "moe_top_k=1, or moe.router='softmax_topk'"
            )
        if k == 1 and self.router in ("softmax_topk", "sigmoid"):
            raise ValueError(
                f"moe.router={self.router!r} with moe_top_k=1: weights that are made to sum to 1 "
                "are always 1, so the loss would not train the router; use moe.router='switch', "
                "or a moe_top_k of 2 or more"
            )

    def _check_capacity(self, experts: int, k: int, context_size: int) -> None:
        if self.capacity_factor is None:
            return
        room = self.capacity_factor * context_size * k / experts
        if room < 1:
            raise ValueError(
                f"moe.capacity_factor={self.capacity_factor} leaves an expert {room:.3g} of the "
                f"context_size={context_size} x moe_top_k={k} / moe_num_experts={experts} "
                f"assignments, less than one token: use at least "
                f"{experts / (context_size * k):.3g}, or None"
            )

    def _check_width(self, mlp_hidden: int) -> None:
        if self.hidden is not None or self.shared_hidden is None:
            return
        if self.shared_experts * self.shared_hidden >= mlp_hidden:
            raise ValueError(
                f"moe.shared_experts={self.shared_experts} x moe.shared_hidden="
                f"{self.shared_hidden} is not below the dense width {mlp_hidden}, so no width is "
                "left for the routed experts: use a smaller shared_hidden, or give moe.hidden"
            )
