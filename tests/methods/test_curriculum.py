"""Which prompts a round draws for: exact probabilities, rates by hand, and a run that is resumed bit for bit."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config.schema import Curriculum, Screen
from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Spend
from burnish.data.sampler import Sampler
from burnish.methods.curriculum import Prompts, first_of_race, pass_rate
from burnish.methods.rounds import Round, Sample
from tests.engines.chi_square import chi_square
from tests.methods.test_policy_gradient import stage, train


def samples(*totals: float | None) -> list[Sample]:
    return [Sample((1,), (-1.0,), "stop", "a", {}, total) for total in totals]


def drawn(groups: dict[int, list[Sample]]) -> Round:
    return Round(0, "0", list(groups), list(groups.values()), [], Spend())


def test_a_pass_is_a_known_reward_above_the_mark() -> None:
    assert pass_rate(samples(1.0, 0.0, 0.5, None), 0.5) == pytest.approx(1 / 3)
    assert pass_rate(samples(None, None), 0.5) is None


def test_drawing_without_replacement_has_the_enumerated_probabilities() -> None:
    """Ordered pairs of four prompts: p(i, j) = w_i / W * w_j / (W - w_i)."""
    weights = [1.0, 4.0, 4.0, 1.0]
    number = 4000
    seen = Counter(tuple(first_of_race(weights, 2, seed)) for seed in range(number))
    expected = {(i, j): weights[i] / 10 * weights[j] / (10 - weights[i]) for i, j in permutations(range(4), 2)}
    assert sum(expected.values()) == pytest.approx(1) and set(seen) <= set(expected)
    counts = torch.tensor([seen[pair] for pair in expected])
    assert chi_square(counts, torch.tensor(list(expected.values()))) < 1
    assert chi_square(counts, torch.full((12,), 1 / 12)) > 1  # and the test would see that the weights were ignored


def test_rates_run_and_prompts_within_are_favoured() -> None:
    prompts = Prompts(Sampler(4, 2, seed=3), Curriculum(low=0.2, high=0.8, memory=0.75))
    assert prompts.saw(drawn({0: samples(1, 1, 1, 1), 1: samples(1, 0, 0, 0)})) == {"favoured_prompts": 1.0}  # not drawn yet: favoured
    assert prompts.rates == {0: 1.0, 1: 0.25}
    assert prompts.saw(drawn({0: samples(1, 0, 0, 0), 1: samples(0, 0, 0, 0), 2: samples(None)})) == {"favoured_prompts": 2 / 3}
    assert prompts.rates == {0: 0.75 * 1.0 + 0.25 * 0.25, 1: 0.75 * 0.25}
    prompts.rates[0] = 0.8  # the bounds themselves are not within
    assert [prompts._weight(i) for i in range(4)] == [1, 1, 4, 4]
    again = Prompts(prompts.sampler, prompts.curriculum)
    again.load(prompts.state())
    rounds = range(1500)
    assert [again.batch(n) for n in rounds] == [prompts.batch(n) for n in rounds]
    assert all(len(set(prompts.batch(n))) == 2 for n in rounds)
    firsts = Counter(prompts.batch(n)[0] for n in rounds)
    assert chi_square(torch.tensor([firsts[i] for i in range(4)]), torch.tensor([0.1, 0.1, 0.4, 0.4])) < 1


def test_prompts_that_others_took_the_place_of_were_drawn_too() -> None:
    """A refill must not hide what never passes: its prompts would stay as good as new, and be favoured for ever."""
    prompts = Prompts(Sampler(4, 1, seed=3), Curriculum())
    round_ = drawn({2: samples(1, 0)})
    round_.replaced = [(0, samples(0, 0)), (1, samples(1, 1))]
    assert prompts.saw(round_) == {"favoured_prompts": 1.0}
    assert prompts.rates == {0: 0.0, 1: 1.0, 2: 0.5} and [prompts._weight(i) for i in range(4)] == [1, 1, 4, 4]


def test_by_variance_prompts_come_in_proportion_to_it() -> None:
    prompts = Prompts(Sampler(6, 1, seed=2), Curriculum(priority="variance", favour=8))
    prompts.rates = {0: 0.0, 1: 0.5, 2: 0.25, 3: 1.0, 4: 0.9}
    weights = [1, 8, 8 * 0.75, 1, 8 * 0.36, 8]  # 4 p (1 - p) of 8, 1 at least, and 8 for what was not drawn yet
    assert [prompts._weight(i) for i in range(6)] == pytest.approx(weights)
    drawn_ = Counter(prompts.batch(n)[0] for n in range(3000))
    assert chi_square(torch.tensor([drawn_[i] for i in range(6)]), torch.tensor(weights) / sum(weights)) < 1


def test_without_either_prompts_come_in_the_samplers_epochs() -> None:
    sampler = Sampler(10, 4, seed=5)
    assert [Prompts(sampler).batch(n) for n in range(7)] == [sampler.batch(n) for n in range(7)]


def test_a_screen_leaves_the_prompts_within_in_epochs_of_their_own() -> None:
    prompts = Prompts(Sampler(5, 2, seed=1), screen=Screen(samples=2))
    assert prompts.unscreened
    share = prompts.screened(drawn({0: samples(1, 1), 1: samples(1, 0), 2: samples(0, 0), 3: samples(0, 1), 4: samples(0, 1)}))
    assert share == 0.6 and prompts.kept == [1, 3, 4] and not prompts.unscreened
    three = [i for n in range(3) for i in prompts.batch(n)]
    assert sorted(three[:3]) == sorted(three[3:]) == [1, 3, 4]
    with pytest.raises(DataError, match=r"1 of 2 prompts have a pass rate between 0 and 1 \(1 are easier\), and a round takes 2"):
        Prompts(Sampler(5, 2), screen=Screen()).screened(drawn({0: samples(1, 1), 1: samples(1, 0)}))


@pytest.mark.parametrize("stop_after", [2, 3])
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    given: dict[str, Any] = {
        "steps": 6, "rollouts": {"updates": 2, "curriculum": {"favour": 8, "memory": 0.0}, "screen": {"samples": 4, "high": 0.9}}, "method": "dapo",
    }  # fmt: skip
    whole, rows = train(tmp_path / "00-whole", **given)
    train(tmp_path / "01-parts", stop_after=stop_after, **given)
    parts, again = train(tmp_path / "01-parts", **given)
    assert rows == again and 0 < rows[0]["screened_prompts"] < 1 and "screened_prompts" not in rows[2]
    assert [("favoured_prompts" in row) for row in rows] == [True, False] * 3 and rows[0]["favoured_prompts"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))


def test_a_round_draws_for_the_prompts_it_was_given() -> None:
    policy, built, _ = stage(method="dapo", rollouts={"curriculum": {}, "screen": {"samples": 4}})
    method = built.method
    work = next(iter(method.batches(0)))
    method.prepare(policy, work)
    assert method._round.questions and set(method._round.questions) <= set(method.prompts.kept) and set(method.prompts.rates) == set(method._round.questions)
    assert work.spend.sampled_tokens > sum(len(s.tokens) for group in method._round.groups for s in group)  # measuring was paid for


def test_what_cannot_be_meant_is_refused() -> None:
    for rollouts, train_, said in (
        ({"curriculum": {"low": 0.5, "high": 0.5}}, {}, "no pass rate is above 0.5 and below 0.5"),
        ({"screen": {"low": 0.9, "high": 0.1}}, {}, "no pass rate is above 0.9"),
        ({"screen": {}}, {"steps": None, "epochs": 1}, "known only once their pass rates"),
        ({"curriculum": {"favour": 1}}, {}, "favour"),
        ({"curriculum": {"priority": "variance", "low": 0.1}}, {}, "are of priority: band"),
    ):
        with pytest.raises(ConfigError, match=said):
            stage(rollouts=rollouts, **train_)
    for name, given in (("curriculum", {}), ("refill", 2), ("overlong_cushion", 4), ("old_logprobs", "trainer"), ("stop_after_dead_rounds", 3)):
        with pytest.raises(ConfigError, match=f"{name} are of policy gradients"):
            stage(method="rft", rollouts={name: given})


def test_a_screen_measures_prompts_as_they_are_and_refills_are_seen() -> None:
    policy, built, _ = stage(method="dapo", rollouts={"curriculum": {}, "screen": {"samples": 4}, "refill": 6, "old_logprobs": "trainer"}, batch_rows=8)
    method = built.method
    method.rounds.rescored = True
    measured: list[Round] = []
    screened = method.prompts.screened
    method.prompts.screened = lambda found: measured.append(found) or screened(found)
    work = next(iter(method.batches(0)))
    method.prepare(policy, work)
    assert measured[0].questions == list(range(64)) and not measured[0].replaced and not measured[0].groups[0][0].old_logprobs
    drawn_ = method._round
    assert len(drawn_.replaced) == work.facts["refilled_groups"] > 0 and drawn_.groups[0][0].old_logprobs
    assert set(method.prompts.rates) == {*drawn_.questions, *(q for q, _ in drawn_.replaced)} <= set(method.prompts.kept)
