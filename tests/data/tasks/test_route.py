import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from burnish.data.tasks.route import ROUTE, make, open_ways, read


@given(st.sampled_from(ROUTE.levels), st.integers(0, 2**32))
def test_one_way_leads_to_the_goal_and_every_node_on_it_opens_into_a_dead_end(level: int, seed: int) -> None:
    item = make(level, random.Random(seed))
    start, goal, edges = read(item.question)
    assert edges == set(item.facts["edges"])
    assert (start, goal, len(item.gold)) == (item.gold[0], item.gold[-1], level + 1)
    assert all(a + b in edges for a, b in pairwise(item.gold))

    def ways(path: str) -> list[str]:
        if path[-1] == goal:
            return [path]
        return [way for a, b in edges if a == path[-1] and b not in path for way in ways(path + b)]

    assert ways(start) == [item.gold]
    for node in item.gold[:-1]:
        assert sum(a == node for a, _ in edges) == 2
    assert len(item.rationale) <= 48


@given(st.integers(0, 2**32))
def test_a_path_off_the_printed_edges_is_refused(seed: int) -> None:
    item = make(4, random.Random(seed))
    way = item.gold
    for wrong in (way[0] + way[2:], way[::-1], way[:-1], way[1:], way[0] * 2 + way[1:], way + way[-1]):
        assert not ROUTE.verify("####" + wrong, item)
    assert ROUTE.verify("#### " + " -> ".join(way), item)
    assert ROUTE.answer_key("####" + ",".join(way)) == way


@given(st.sampled_from(ROUTE.levels), st.integers(0, 2**32))
def test_a_step_is_open_exactly_while_the_goal_can_be_reached_by_printed_edges(level: int, seed: int) -> None:
    item = make(level, random.Random(seed))
    steps = item.rationale.split("\n")[:-1]
    for n in range(level + 1):
        assert open_ways(item, steps[:n])
    dead = next(e for e in item.facts["edges"] if e[0] == item.gold[0] and e[1] != item.gold[1])
    assert not open_ways(item, [dead])
    assert not open_ways(item, [item.gold[0] + item.gold[-1]] if level > 1 else ["??"])
    assert not open_ways(item, steps[1:])
    assert not open_ways(item, ["what"])
