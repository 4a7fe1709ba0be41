"""随机的图样，供 hypothesis。"""

from __future__ import annotations

from collections.abc import Callable
from operator import and_, or_

from hypothesis import strategies as st

from app.models.transformer.visibility.atoms import Fixed, Global, Local, Longformer, Sinks, Strided
from app.models.transformer.visibility.pattern import CAUSAL, Pattern

small = st.integers(1, 7)
atoms: st.SearchStrategy[Pattern] = st.one_of(
    st.just(CAUSAL),
    st.builds(Local, small, st.integers(1, 3)),
    st.builds(Strided, small),
    st.builds(lambda c, more: Fixed(c + more, c), small, st.integers(0, 4)),
    st.builds(Global, small),
    st.builds(Longformer, small, st.integers(0, 4), st.integers(1, 3)),
    st.builds(Sinks, small, small),
)


def _combined(join: Callable[[Pattern, Pattern], Pattern], a: Pattern, b: Pattern) -> Pattern:
    try:
        return join(a, b)
    except ValueError:
        # 展开的子句太多：那条界另有测试。
        return a


patterns = st.recursive(
    atoms,
    lambda inner: st.builds(_combined, st.sampled_from([and_, or_]), inner, inner),
    max_leaves=5,
)
