"""The search for a learning rate, on curves whose best is known."""

from math import isfinite, log10

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.search import Search, Trial, at_edge, winner

SHARED, LOW, HIGH = 2e-4, 1e-5, 1e-4
RATES = st.floats(-6.5, -0.5).map(lambda power: 10**power)


def searched(curve, trials: int, shared=SHARED, low=LOW, high=HIGH, values=(None,)) -> list[Trial]:
    """The trials of a search on `curve(rate, option)`, which is null where it breaks."""
    search, found = Search(shared, low, high, values), []
    for _ in range(trials):
        rate, option = search.next(found)
        found.append(Trial(rate, option, curve(rate, option)))
    return found


def valley(best: float):
    return lambda rate, _: 1 + log10(rate / best) ** 2


@settings(max_examples=300, deadline=None)
@given(best=RATES, shared=RATES, trials=st.integers(1, 40))
def test_the_bottom_of_a_valley_is_found_wherever_it_lies(best, shared, trials):
    found = searched(valley(best), trials, shared)
    chosen = winner(found)
    distance = abs(log10(chosen.rate / best))
    away = max(0, log10(best / HIGH), log10(LOW / best))  # decades from the declared range
    if trials >= 2 * away + 6:  # the shared rate, three of the range, two a decade, and one beyond the best
        assert distance < 0.255, "half a step of the grid, and the rounding of a rate"
        assert not at_edge(found, chosen)
    if trials >= 2 * away + 8:
        assert distance < 0.13, "then half of half a step"
    if at_edge(found, chosen) and trials > 2:
        assert trials < 2 * away + 6


@given(
    losses=st.lists(st.none() | st.floats(-5, 5) | st.integers(0, 2).map(float), min_size=60, max_size=60),
    shared=RATES,
    values=st.sampled_from([(None,), (8, 4, 16, 64), ("a", "b"), (0.5, 0.25)]),
    ends=st.tuples(RATES, RATES).map(sorted),
)
@settings(max_examples=300, deadline=None)
def test_no_trial_is_repeated_and_the_best_that_was_seen_wins_on_any_curve(losses, shared, values, ends):
    drawn = iter(losses)
    found = searched(lambda *_: next(drawn), len(losses), shared, *ends, values)
    tried = [(trial.rate, trial.option) for trial in found]
    assert len(set(tried)) == len(tried)
    assert all(rate > 0 and isfinite(rate) for rate, _ in tried)
    assert {option for _, option in tried} <= set(values)
    known = [trial.loss for trial in found if trial.loss is not None]
    if known:
        assert winner(found).loss == min(known)
        assert winner(found) == next(t for t in found if t.loss == min(known)), "the earlier of equal ones"


@pytest.mark.parametrize("best", [1e-6, 3e-5, 1e-2])
def test_a_search_goes_on_where_it_stood(best):
    whole = searched(valley(best), 12, values=(8, 4, 64))
    search = Search(SHARED, LOW, HIGH, (8, 4, 64))
    for number, trial in enumerate(whole):
        assert search.next(whole[:number]) == (trial.rate, trial.option)
    assert searched(valley(best), 5, values=(8, 4, 64)) == whole[:5], "a smaller budget begins alike"


def test_the_rates_are_a_grid_by_the_root_of_ten_from_the_shared_one():
    rates = [trial.rate for trial in searched(valley(3e-2), 6, shared=2e-3)]
    assert rates[0] == 2e-3 and set(rates[1:3]) == {2e-5, 6.32e-5}, "then what is declared"
    assert all(
        2 * log10(rate / 2e-3) == pytest.approx(round(2 * log10(rate / 2e-3)), abs=0.01) for rate in rates
    )


@given(best=RATES, shared=RATES, trials=st.integers(1, 12))
def test_the_best_is_never_behind_the_shared_rate_on_what_it_is_chosen_by(best, shared, trials):
    curve = valley(best)
    assert winner(searched(curve, trials, shared)).loss <= curve(shared, None)


def test_the_option_is_tried_at_the_best_rate_once_that_is_bracketed():
    def curve(rate, rank):
        return valley(1e-4)(rate, None) + abs(rank - 64) / 1000

    found = searched(curve, 8, shared=1e-4, low=1e-4, high=1e-3, values=(8, 4, 64))
    pairs = [(trial.rate, trial.option) for trial in found]
    assert set(pairs[:4]) == {(1e-4, 8), (3.16e-4, 8), (1e-3, 8), (3.16e-5, 8)}, "the range and its neighbour"
    assert pairs[4:6] == [(1e-4, 4), (1e-4, 64)]
    assert pairs[6:] == [(3.16e-4, 64), (3.16e-5, 64)], "beside the best, with the option that won"


def test_finer_steps_come_last():
    found = searched(valley(1.3e-4), 9, shared=1e-4, low=1e-4, high=1e-3)
    assert [trial.rate for trial in found[4:7]] == [1.78e-4, 5.62e-5, 1.33e-4], "once it is bracketed"
    assert winner(found).rate == 1.33e-4


@pytest.mark.parametrize("limit", [3e-6, 2e-5, 8e-5, 1e-3])
def test_a_divergence_above_a_rate_is_gone_away_from(limit):
    """The best stands just below what breaks, as it often does."""
    found = searched(lambda rate, _: None if rate > limit else -log10(rate), 12)
    assert limit / 10**0.5 < winner(found).rate <= limit
    assert not at_edge(found, winner(found))


def test_where_all_break_the_search_goes_down_and_has_no_winner():
    found = searched(lambda *_: None, 8)
    assert min(trial.rate for trial in found) <= LOW / 100
    assert winner(found).loss is None


def test_a_plateau_keeps_what_was_tried_first():
    found = searched(lambda *_: 1.0, 8)
    assert winner(found) == found[0]
    assert found[0].rate == SHARED


@pytest.mark.parametrize("seed", range(20))
def test_noise_costs_no_more_than_the_noise(seed):
    from random import Random

    luck = Random(seed)
    found = searched(lambda rate, _: valley(2e-3)(rate, None) + luck.uniform(0, 0.05), 10)
    assert valley(2e-3)(winner(found).rate, None) < 1.15


def test_a_best_at_the_edge_is_told():
    found = searched(valley(1.0), 4)
    assert at_edge(found, winner(found))
    assert at_edge(found[:1], found[0])
