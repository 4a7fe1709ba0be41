"""训练试验的数据与配置。"""

from ..training.conftest import dataset, make  # noqa: F401
