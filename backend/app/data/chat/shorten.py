"""太长的对话：先去掉最早的几轮，再从最后一问的开头剪；最后的回答一个词元也不动。"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.data.chat.encode import Encoder, Piece, Turn, marked


def shortened(
    encoder: Encoder, sides: Sequence[Sequence[Turn]], limit: int
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """各边至多 limit 个词元的 (词元, 计不计分)；怎样也放不下就是 None。

    偏好的两边剪去同样的，提问因此仍旧相同；开头的 system 留着。
    """
    head = 1 if sides[0] and sides[0][0].role == "system" else 0
    first = head
    while True:
        pieces = [encoder.pieces([*side[:head], *side[first:]]) for side in sides]
        arrays = [encoder.arrays(side) for side in pieces]
        excess = max(sum(map(len, side)) for side in arrays) - limit
        if excess <= 0:
            break
        later = [i for i in range(first + 1, len(sides[0])) if _may_begin(encoder, sides, i)]
        if later:
            first = later[0]
            continue
        place = _place_to_cut(pieces, arrays, head, excess)
        if place is None:
            return None
        for side in arrays:
            side[place] = side[place][excess:]
        break
    return [marked(*side) for side in zip(arrays, pieces, strict=True)]


def _may_begin(encoder: Encoder, sides: Sequence[Sequence[Turn]], i: int) -> bool:
    """各边都可以从第 i 句说起：那是同一个问句，后面还有计分的回答。"""
    roles = encoder.template.roles
    return all(
        len(side) > i
        and side[i] == sides[0][i]
        and not roles[side[i].role].scored
        and any(turn.scored and roles[turn.role].scored for turn in side[i:])
        for side in sides
    )


def _place_to_cut(
    pieces: Sequence[Sequence[Piece]],
    arrays: Sequence[Sequence[np.ndarray]],
    head: int,
    excess: int,
) -> int | None:
    """第一段长得够剪、各边相同的问句。"""
    for place, piece in enumerate(pieces[0]):
        asked = piece.turn is not None and piece.turn >= head and not piece.scored
        same = all(len(side) > place and side[place] == piece for side in pieces)
        if asked and same and len(arrays[0][place]) > excess:
            return place
    return None
