"""分词元：没有行在写时几个提示平分一步，有行在写时短的先读，谁也不会饿死。"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.serving.schedule import Costs, Drift, Need, Pace, share

# 一个词元一毫秒。
COSTS = Costs(((1, 0.001), (128, 0.128)))


def reading(row: int, left: int, **more: float) -> Need:
    return Need(row, left, True, 256, **more)  # type: ignore[arg-type]


def test_prompts_that_come_together_are_read_together() -> None:
    needs = [reading(row, 128) for row in range(8)]
    assert share(needs, {}, COSTS, Pace()) == dict.fromkeys(range(8), 32)


def test_a_short_prompt_is_done_first_and_leaves_its_rest_to_the_others() -> None:
    given_out = share([reading(0, 900), reading(1, 20), reading(2, 900)], {}, COSTS, Pace())
    assert given_out == {1: 20, 0: 118, 2: 118}


def test_beside_a_text_being_written_the_shortest_prompt_has_the_room() -> None:
    needs = [Need(0, 1, False, 256), reading(1, 300), reading(2, 100)]
    given_out = share(needs, {}, COSTS, Pace(max_stall=0.07))
    assert given_out == {0: 1, 2: 64}


def test_the_room_is_what_the_stall_leaves_in_eights() -> None:
    for stall, room in ((0.0, 8), (0.0089, 8), (0.0575, 56), (9.0, 256)):
        given_out = share([Need(0, 1, False, 256), reading(1, 999)], {}, COSTS, Pace(stall))
        assert given_out == {0: 1, 1: room}


def test_a_machine_that_became_slower_reads_less_at_once() -> None:
    drift = Drift()
    for _ in range(8):
        drift.learn(0.1, 0.2)
    assert 1.98 < drift.ratio < 2
    needs = [Need(0, 1, False, 256), reading(1, 999)]
    assert share(needs, {}, COSTS.times(drift.ratio), Pace(0.1)) == {0: 1, 1: 48}
    drift.learn(0.1, 9.0)
    assert drift.ratio < 3.01
    for _ in range(200):
        drift.learn(0.1, 0.1)
    assert 1 < drift.ratio < 1.01


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(8, 512))
def test_nothing_is_given_beyond_the_chunk_or_the_need(lefts: list[int], chunk: int) -> None:
    needs = [reading(row, left) for row, left in enumerate(lefts)]
    given_out = share(needs, {}, COSTS, Pace(chunk=chunk))
    assert sum(given_out.values()) <= chunk
    assert all(1 <= count <= lefts[row] for row, count in given_out.items())
    # 一步读不完，就读满。
    assert sum(given_out.values()) == min(chunk, sum(min(left, 256) for left in lefts))
