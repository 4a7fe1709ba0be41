"""集合通信：唯一点名 torch.distributed 的集合操作的地方。

每个网格轴一个 `Ranks`；只有一个 rank 时没有进程组，各操作都是恒等，单进程走的就是同一条路。
NCCL 与 gloo 的差别（AVG、PREMUL_SUM 在 gloo 上没有）都躲开：只用 SUM、MAX 与搬运。

W 一组里的 rank 数。
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
SAID = "said_by_another_rank"


@dataclass(frozen=True)
class Ranks:
    """一组 rank：我是第几个，一共几个。

    Attributes:
        group: None = 只有自己，不通信。
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Ranks:
        size = dist.get_world_size(group)
        return cls(dist.get_rank(group), size, group if size > 1 else None)

    @classmethod
    def world(cls) -> Ranks:
        """所有的 rank；没有进程组就是自己一个。"""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        group = dist.group.WORLD
        assert group is not None
        return cls.of(group)

    @property
    def alone(self) -> bool:
        return self.group is None

    def sum(self, x: Tensor) -> Tensor:
        """各 rank 的 x 之和，就地；次序由后端定，位不保证。"""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.SUM, self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """各 rank 的最大值，就地。"""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x

    def tree_sum(self, x: Tensor) -> Tensor:
        """固定的二叉树之和，就地：W=1、2、4 各取整棵树的一层，所以与 rank 数无关。

        蝶形：第 j 轮与 rank ^ 2^j 交换、低号在左相加；各 rank 得到逐位相同的值。

        Raises:
            ValueError: W 不是 2 的幂。
        """
        if self.group is None:
            return x
        if self.size & (self.size - 1):
            raise ValueError(
                f"a fixed tree needs a power of two of ranks, got {self.size}: use "
                f"{1 << (self.size.bit_length() - 1)} ranks or parallel.exact=false"
            )
        other = torch.empty_like(x)
        distance = 1
        while distance < self.size:
            peer = self.rank ^ distance
            self._swap(x, other, peer)
            # IEEE 加法可交换，左右次序只为读者写明。
            torch.add(x, other, out=x) if self.rank < peer else torch.add(other, x, out=x)
            distance *= 2
        return x

    def gather(self, x: Tensor) -> Tensor:
        """(...) -> (W, ...)，按 rank 排。"""
        if self.group is None:
            return x[None]
        out = x.new_empty((self.size, *x.shape))
        # 不用 all_gather_into_tensor：torch 2.13 起换了名字，旧名每个进程警告一次。
        dist.all_gather(list(out.unbind(0)), x.contiguous(), self.group)
        return out

    def sum_scatter(self, x: Tensor) -> Tensor:
        """(W, ...) -> (...)：各 rank 的 x 相加之后我的那一份。"""
        if self.group is None:
            return x[0]
        parts = self.exchange(x)
        return parts.sum(0)

    def exchange(self, x: Tensor) -> Tensor:
        """(W, ...) -> (W, ...)：第 j 份给 rank j，收来的第 i 份是 rank i 给的。"""
        if self.group is None:
            return x
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.group)
        return out

    def exchange_rows(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """(sum(send), ...) -> (sum(receive), ...)：各 rank 行数不等的 exchange。"""
        if self.group is None:
            return x
        out = x.new_empty((sum(receive), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self.group)
        return out

    def pass_on(self, x: Tensor, by: int = 1) -> Tensor:
        """给 rank + by，收 rank - by 的，绕圈；形状各 rank 相同。"""
        if self.group is None:
            return x
        out = torch.empty_like(x)
        to, come = (self.rank + by) % self.size, (self.rank - by) % self.size
        work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x.contiguous(), group=self.group, group_peer=to),
                dist.P2POp(dist.irecv, out, group=self.group, group_peer=come),
            ]
        )
        for each in work:
            each.wait()
        return out

    def shift(self, x: Tensor, by: int) -> Tensor:
        """给 rank + by，收 rank - by 的，不绕圈：两端没有来处的收到零。"""
        to, come = self.rank + by, self.rank - by
        out = torch.zeros_like(x)
        steps = []
        if 0 <= to < self.size:
            steps.append(dist.P2POp(dist.isend, x.contiguous(), None, self.group, group_peer=to))
        if 0 <= come < self.size:
            steps.append(dist.P2POp(dist.irecv, out, None, self.group, group_peer=come))
        for each in dist.batch_isend_irecv(steps) if steps else []:
            each.wait()
        return out

    def swap(self, x: Tensor, peer: int) -> Tensor:
        """把 x 给 peer，收它的；只有这两个 rank 参加。"""
        out = torch.empty_like(x)
        self._swap(x.contiguous(), out, peer)
        return out

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """rank source 的 x，就地。"""
        if self.group is not None:
            dist.broadcast(x, group=self.group, group_src=source)
        return x

    def agree(self, value: Any, source: int = 0) -> Any:
        """rank source 的 value（小的 Python 值：判决、路径、报错的文字），各 rank 都拿到。"""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=source)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """各 rank 的 value（小的 Python 值），按 rank 排，各 rank 都拿到。"""
        if self.group is None:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, self.group)
        return box

    def first(self, action: Callable[[], T], meanwhile: Callable[[], object] | None = None) -> T:
        """只由 rank 0 做；它的结果，或它的错误，各 rank 都得到：一个失败，别的就不空等。

        Args:
            meanwhile: 其余的 rank 同时做的（给 rank 0 送数据）。
        """
        if self.group is None:
            return action()
        if self.rank:
            if meanwhile is not None:
                meanwhile()
            return _verdict(self.agree(None), here=False)
        return _verdict(self.agree(_outcome(action)), here=True)

    def together(self, action: Callable[[], T]) -> T:
        """各 rank 都做；有一个失败，就都报号最小的那个的错误。"""
        if self.group is None:
            return action()
        good, value = _outcome(action)
        for rank, error in enumerate(self.collect(None if good else value)):
            if error is not None:
                _verdict((False, error), here=rank == self.rank)
        return value

    def send(self, x: Tensor, to: int) -> None:
        assert self.group is not None
        dist.send(x.contiguous(), group=self.group, group_dst=to)

    def receive(self, out: Tensor, source: int) -> Tensor:
        assert self.group is not None
        dist.recv(out, group=self.group, group_src=source)
        return out

    def _swap(self, x: Tensor, out: Tensor, peer: int) -> None:
        work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=self.group, group_peer=peer),
                dist.P2POp(dist.irecv, out, group=self.group, group_peer=peer),
            ]
        )
        for each in work:
            each.wait()


ALONE = Ranks()


def _outcome(action: Callable[[], Any]) -> tuple[bool, Any]:
    """(做成了, 结果或错误)；送不过去的错误换成说同样的话的 RuntimeError。"""
    try:
        return True, action()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  自己刚写的
        except Exception:
            return False, RuntimeError(f"{type(error).__name__}: {error}")
        return False, error


def _verdict(outcome: tuple[bool, Any], here: bool) -> Any:
    """结果；错误就抛出，别的 rank 上的注明已由出错的那个说过。"""
    good, value = outcome
    if good:
        return value
    if not here:
        setattr(value, SAID, True)
    raise value


def said_elsewhere(error: BaseException) -> bool:
    """这个错误是从别的 rank 得来的：由那里说一次就够了。"""
    return getattr(error, SAID, False)
