"""整个模型的几件事实，在切开之前记下：切开之后没有哪个 rank 看得见全部。"""

from __future__ import annotations

from dataclasses import dataclass

from app.models.transformer import GPT2Model

from .step import expected_initial_loss


@dataclass(frozen=True)
class WholeModel:
    """
    Attributes:
        parameters, active: 参数的个数，与一个词元用到的。
        expected_loss: 随机初始化时的损失。
        shapes: 参数与缓冲区的形状。
        names: 参数的名字，按模型里的次序。
    """

    parameters: int
    active: int
    expected_loss: float
    shapes: dict[str, tuple[int, ...]]
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: GPT2Model) -> WholeModel:
        """model 还没有切开，或只按行分片。"""
        return cls(
            model.num_parameters(),
            model.active_parameters(),
            expected_initial_loss(model),
            {name: tuple(x.shape) for name, x in model.state_dict().items()},
            tuple(name for name, _ in model.named_parameters()),
        )
