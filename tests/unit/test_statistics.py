"""Statistics of many networks: closed forms, independent oracles, planted relations and their absence."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from isoflat.core.errors import UsageError
from isoflat.experiments.statistics.conditional import conditional
from isoflat.experiments.statistics.granulated import granulated
from isoflat.experiments.statistics.kendall import kendall
from isoflat.experiments.statistics.multiplicity import benjamini_hochberg, holm
from isoflat.experiments.statistics.partial import partial
from isoflat.experiments.statistics.permutation import permutation
from isoflat.experiments.statistics.relation import relations
from isoflat.experiments.statistics.robust import replicate_noise, robust
from isoflat.experiments.statistics.sample import OutcomeSample, generator_of

GRID = list(itertools.product((8, 16, 32), (0.1, 0.01), ("sgd", "adam"), range(2)))
FACTORS = {
    "width": tuple(cell[0] for cell in GRID),
    "rate": tuple(cell[1] for cell in GRID),
    "optimizer": tuple(cell[2] for cell in GRID),
}
SMALL = st.integers(3, 6).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 3), min_size=n, max_size=n) for _ in range(4)))
)


def made(values, outcomes, factors=None, losses=None):
    return OutcomeSample(
        values=tuple(map(float, values)),
        outcomes=tuple(map(float, outcomes)),
        factors=factors or {},
        losses=None if losses is None else tuple(map(float, losses)),
    )


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape or len(GRID))


# --- Kendall ---------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_resampled_pairs():
    x, y = np.round(drawn(0, 12), 1), np.round(drawn(1, 12))
    sample = made(x, y).ordered
    found = kendall(sample, seed=5, draws=199, confidence=0.9)
    slow = stats.bootstrap(
        (sample.values, sample.outcomes),
        lambda a, b: stats.kendalltau(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=199,
        method="percentile",
        random_state=generator_of(5, "kendall"),
    ).bootstrap_distribution
    assert found.tau == pytest.approx(stats.kendalltau(x, y).statistic)
    assert (found.lower, found.upper) == pytest.approx(tuple(np.quantile(slow, [0.05, 0.95])))
    assert found.degenerate == 0


def test_resamples_of_ties_widen_the_interval_and_are_counted():
    found = kendall(made([0, 0, 0, 1], [1, 2, 3, 4]), draws=999)
    assert 250 < found.degenerate < 400  # (3/4)^4 = 0.32, and all of one network
    assert (found.lower, found.upper) == (-1, 1)
    mirrored = kendall(made([0, 0, 0, 1], [4, 3, 2, 1]), draws=999)
    assert (mirrored.lower, mirrored.upper) == (-1, 1)


def test_agreement_of_all_pairs_is_no_certainty():
    found = kendall(made(range(20), range(20)), draws=99)
    assert found.tau == pytest.approx(1)
    assert found.unanimous
    assert found.upper == 1
    assert found.lower == pytest.approx(2 * 0.025 ** (1 / 10) - 1)
    mirrored = kendall(made(range(20), range(0, -20, -1)), draws=99)
    assert (mirrored.lower, mirrored.upper) == pytest.approx((-1, -found.lower))


def test_a_constant_measure_has_no_correlation():
    found = kendall(made([1, 1, 1], [1, 2, 3]), draws=9)
    assert found.tau is None
    assert (found.lower, found.upper) == (-1, 1)
    assert permutation(made([1, 1, 1], [1, 2, 3])).p == 1


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_the_interval_covers_at_its_rate(correlation):
    truth, covered = 2 / math.pi * math.asin(correlation), 0
    for seed in range(200):
        x, noise = drawn([seed, 0], 15), drawn([seed, 1], 15)
        found = kendall(made(x, correlation * x + math.sqrt(1 - correlation**2) * noise), seed, 199, 0.9)
        covered += found.lower <= truth <= found.upper
    assert 0.85 * 200 < covered < 0.97 * 200


# --- Permutations ----------------------------------------------------------------------------------------------------


def slow_p(values, outcomes):
    """Both tails over all permutations, by the definition, and the smallest that any arrangement has."""
    pairs = list(itertools.combinations(range(len(values)), 2))
    scores = [
        sum(np.sign(x[i] - x[j]) * np.sign(outcomes[i] - outcomes[j]) for i, j in pairs)
        for x in itertools.permutations(values)
    ]
    p = [min(1.0, 2 * min(np.mean(np.array(scores) >= at), np.mean(np.array(scores) <= at))) for at in scores]
    return p[0], min(p)


@settings(max_examples=40, deadline=None)
@given(SMALL.filter(lambda columns: len(columns[0]) < 6))
def test_p_is_that_of_all_permutations_and_never_below_the_floor(columns):
    values, outcomes = columns[:2]
    found = permutation(made(values, outcomes))
    p, least = slow_p(values, outcomes)
    assert found.exact
    assert found.p == pytest.approx(p)
    assert found.floor <= least * (1 + 1e-9)


def test_without_ties_the_floor_is_reached():
    found = permutation(made(range(5), range(5)))
    assert found.p == pytest.approx(2 / 120)
    assert found.floor == pytest.approx(2 / 120)


def test_recursion_and_enumeration_agree():
    x, y = drawn(2, 6), drawn(3, 6)
    slow = stats.permutation_test((x,), lambda a: stats.kendalltau(a, y).statistic, permutation_type="pairings")
    assert permutation(made(x, y)).p == pytest.approx(slow.pvalue)


def test_random_draws_bound_p_from_below():
    values = [*range(19), 18]
    few, more = (permutation(made(values, range(20)), draws=draws) for draws in (99, 999))
    assert (few.p, few.floor, few.draws) == (0.02, 0.02, 99)
    assert few.bound_by_draws
    assert more.p == 0.002
    heavy = permutation(made([0] * 19 + [1], range(20)), draws=9999)
    assert heavy.floor == pytest.approx(2 / 20)
    assert not heavy.bound_by_draws
    assert heavy.p >= heavy.floor


def test_p_is_uniform_without_a_relation():
    # With 40 networks no value of p has more than 2 % of the probability; with 12, p = 1 alone has 11 %.
    ps = [permutation(made(drawn([seed, 0], 40), drawn([seed, 1], 40))).p for seed in range(200)]
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    tied = [permutation(made(np.round(drawn([s, 0], 12)), drawn([s, 1], 12)), s, 99).p for s in range(200)]
    assert np.mean(np.array(tied) <= 0.1) < 0.15


# --- Multiplicity ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_closed_testing_by_bonferroni(ps):
    for i, adjusted in enumerate(holm(ps)):
        others = [j for j in range(len(ps)) if j != i]
        families = [(i, *chosen) for size in range(len(ps)) for chosen in itertools.combinations(others, size)]
        assert adjusted == pytest.approx(min(1.0, max(len(f) * min(ps[j] for j in f) for f in families)))
    assert all(p <= q + 1e-12 <= h + 2e-12 for p, q, h in zip(ps, benjamini_hochberg(ps), holm(ps), strict=True))


# --- Granulated ------------------------------------------------------------------------------------------------------


def test_granulated_by_hand():
    factors = {"a": (0, 0, 1, 1), "b": ("x", "y", "x", "y"), "constant": (1, 1, 1, 1)}
    found = granulated(made([1, 2, 3, 4], [1, 3, 2, 2], factors))
    assert found.psi == {"a": 0.0, "b": 1.0, "constant": None}  # a: +1 at x and -1 at y; b: +1 at 0, all tied at 1
    assert found.mean == 0.5
    assert found.groups == {"a": 2, "b": 1, "constant": 0}
    assert found.silent == {"a": 0, "b": 1, "constant": 4}


def test_replicates_are_not_compared():
    # Each replicate at a = 0 against each at a = 1: three pairs agree and one does not.
    found = granulated(made([1, 2, 3, 4], [1, 4, 3, 5], {"a": (0, 0, 1, 1)}))
    assert found.psi == {"a": 0.5}
    assert granulated(made([1, 2, 3], [1, 2, 3])).mean is None


def test_simpsons_paradox_is_unmasked():
    grid = list(itertools.product(range(6), range(3)))
    factors = {"drives": tuple(a for a, _ in grid), "other": tuple(b for _, b in grid)}
    sample = made([10 * a + b for a, b in grid], [10 * a - b for a, b in grid], factors)
    assert kendall(sample, draws=9).tau == pytest.approx(1 - 2 * 18 / math.comb(18, 2))
    assert permutation(sample).p < 1e-6
    assert granulated(sample).psi == {"drives": 1.0, "other": -1.0}
    assert granulated(sample).mean == 0.0
    assert robust(sample).worst.factor == "other"
    assert robust(sample).worst.error == 1.0


def test_what_one_hyper_parameter_drives_is_blind_to_the_others():
    width = np.array(FACTORS["width"])
    psis = [granulated(made(width + drawn([s, 0]), width + drawn([s, 1]), FACTORS)).psi for s in range(40)]
    assert np.mean([psi["width"] for psi in psis]) > 0.9
    assert abs(np.mean([[psi["rate"], psi["optimizer"]] for psi in psis])) < 0.1


# --- Conditional -----------------------------------------------------------------------------------------------------


def slow_score(sample):
    """K by its definition, over dictionaries of probabilities."""
    pairs = [
        (i, j)
        for i, j in itertools.permutations(range(len(sample)), 2)
        if sample.values[i] != sample.values[j] and sample.outcomes[i] != sample.outcomes[j]
    ]
    best = None
    for size in range(3):
        for chosen in itertools.combinations(sample.factors.values(), size):
            cells = {}
            for i, j in pairs:
                cell = cells.setdefault(tuple((levels[i], levels[j]) for levels in chosen), {})
                seen = (sample.values[i] > sample.values[j], sample.outcomes[i] > sample.outcomes[j])
                cell[seen] = cell.get(seen, 0) + 1 / len(pairs)
            information = entropy = 0.0
            for cell in cells.values():
                total = sum(cell.values())
                of_value = {v: sum(p for (w, _), p in cell.items() if w == v) for v in (True, False)}
                of_gap = {g: sum(p for (_, h), p in cell.items() if h == g) for g in (True, False)}
                information += sum(p * math.log(p * total / of_value[v] / of_gap[g]) for (v, g), p in cell.items())
                entropy -= sum(p * math.log(p / total) for p in of_gap.values() if p > 0)
            if entropy > 1e-9:
                best = information / entropy if best is None else min(best, information / entropy)
    return best


@settings(max_examples=100, deadline=None)
@given(SMALL)
def test_conditional_information_is_as_defined(columns):
    values, outcomes, first, second = columns
    sample = made(values, outcomes, {"a": tuple(first), "b": tuple(map(str, second)), "c": (1,) * len(first)})
    found, slow = conditional(sample, deals=0), slow_score(sample)
    assert (found.score is None) == (slow is None)
    if slow is not None:
        assert found.score == pytest.approx(slow, abs=1e-9)


def test_a_function_of_one_hyper_parameter_says_nothing_more():
    gap = np.array(FACTORS["width"]) / 20 + drawn(0)
    found = conditional(made(FACTORS["width"], gap, FACTORS))
    assert found.score == 0.0
    assert "width" in found.given
    assert found.tied == 3 * math.comb(8, 2)


def test_a_function_of_two_hyper_parameters_says_nothing_more():
    both = np.array(FACTORS["width"]) / 20 + 3 * np.array(FACTORS["rate"])
    found = conditional(made(both, both + 0.3 * drawn(0), FACTORS))
    assert (found.score, found.given) == (0.0, ("rate", "width"))


def test_an_oracle_knows_everything():
    gap = drawn(1)
    assert conditional(made(gap, gap, FACTORS)).score == 1.0
    assert conditional(made(-gap, gap, FACTORS)).score == 1.0  # information has no direction
    found = conditional(made(drawn(2), gap, FACTORS))
    assert found.score < 0.1
    assert 0 < found.chance < 0.1


def test_what_hyper_parameters_settle_is_left_out():
    factors = {"a": (1, 2, 3)}
    found = conditional(made([1, 2, 3], [1, 2, 3], factors))
    assert (found.score, found.given, found.settled) == (1.0, (), 1)
    assert conditional(made([1, 1, 1], [1, 2, 3], factors)).score is None


# --- Robust ----------------------------------------------------------------------------------------------------------


def test_environments_by_hand():
    factors = {"a": (0, 0, 1, 1), "b": ("x", "y", "x", "y")}
    found = robust(made([1, 2, 3, 4], [1, 3, 2, 2], factors))
    assert [(e.name, e.pairs, e.error) for e in found.environments] == [
        ("a 0 against 1", 2, 0.5),
        ("b x against y", 2, 0.25),  # one right, and one tie
    ]
    assert found.mean == 0.375
    assert found.worst == found.environments[0]
    assert robust(made([1, 2, 3], [1, 2, 3])).mean is None


def test_pairs_weigh_as_their_sign_is_sure():
    sample = made([1, 2, 3], [0, -1, 5], {"width": (8, 16, 8)})
    found = robust(sample, noise=1.0).environments[0]
    wrong, right = (2 * stats.norm.cdf(difference / math.sqrt(2)) - 1 for difference in (1, 6))
    assert found.weight == pytest.approx(wrong + right)
    assert found.error == pytest.approx(wrong / (wrong + right))
    assert robust(sample, noise=0.0).environments[0].error == 0.5
    tied = robust(made([1, 2, 3], [1, 1, 1], {"width": (8, 16, 8)}), noise=0.0)
    assert (tied.mean, tied.silent) == (None, 1)
    # A difference within the noise hardly counts beside a clear one.
    mixed = made([1, 2, 3, 4], [0.001, 0.0, 0.0, 9.0], {"a": (0, 1, 0, 1), "b": (0, 0, 1, 1)})
    assert robust(mixed).environments[0].error == 0.5
    assert robust(mixed, noise=1.0).environments[0].error < 0.001


def test_noise_is_that_of_replicates():
    gap = drawn(4)
    pooled = math.sqrt(np.mean([np.var(pair, ddof=1) for pair in gap.reshape(-1, 2)]))
    assert replicate_noise(made(gap, gap, FACTORS)) == pytest.approx(pooled)
    assert replicate_noise(made([1, 2, 3], [1, 2, 3], {"a": (1, 2, 3)})) is None
    assert replicate_noise(made([1, 2, 3], [1, 2, 3])) is None


# --- Partial ---------------------------------------------------------------------------------------------------------


def test_the_partial_correlation_is_the_textbooks():
    x, y, z = np.round(drawn(0, 15), 1), drawn(1, 15), np.round(drawn(2, 15), 1)
    xy, xz, yz = (stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial(made(x, y, losses=z), draws=99).rho == pytest.approx(expected)
    constant = partial(made(x, y, losses=[0.01] * 15), draws=99)
    assert constant.rho == pytest.approx(xy)  # equal losses explain nothing


@pytest.mark.parametrize("seed", range(3))
def test_its_p_is_that_of_all_permutations_of_residuals(seed):
    x, y, z = (stats.rankdata(drawn([seed, column], 5)) for column in range(3))
    (slope, start), correlations = np.polyfit(z, y, 1), []
    for order in itertools.permutations(range(5)):
        again = slope * z + start + (y - slope * z - start)[list(order)]
        inverse = np.linalg.inv(np.corrcoef([x, again, z]))
        correlations.append(-inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1]))
    found, at = partial(made(x, y, losses=z)), correlations[0]
    tails = np.mean(np.array(correlations) >= at - 1e-9), np.mean(np.array(correlations) <= at + 1e-9)
    assert found.rho == pytest.approx(at)
    assert found.p == pytest.approx(min(1.0, 2 * min(tails)))
    assert (found.floor, found.draws) == (2 / 120, 120)


def test_what_the_loss_orders_leaves_nothing():
    found = partial(made([1, 2, 3, 4], [2, 1, 3, 4], losses=[0.1, 0.3, 0.7, 0.9]))
    assert (found.rho, found.p) == (None, 1.0)
    with pytest.raises(UsageError, match="training losses"):
        partial(made([1, 2, 3], [1, 2, 3]))


def test_a_confounder_is_unmasked():
    found = plain = 0
    for seed in range(100):
        loss = drawn([seed, 0], 30)
        sample = made(loss + 0.5 * drawn([seed, 1], 30), loss + 0.5 * drawn([seed, 2], 30), losses=loss)
        plain += permutation(sample).p < 0.05
        found += partial(sample, seed, 199).p < 0.05
    assert plain > 95
    assert found < 13


def test_a_relation_beside_the_loss_is_kept():
    loss, own = drawn(0, 30), drawn(1, 30)
    found = partial(made(loss + own, loss + own + 0.2 * drawn(2, 30), losses=loss), draws=999)
    assert found.rho > 0.7
    assert found.p == found.floor == 0.002


def test_kendall_would_find_what_is_not_there():
    tau, rho = (lambda r: 2 / math.pi * math.asin(r)), (lambda r: 6 / math.pi * math.asin(r / 2))
    of_kendall, of_spearman = ((of(0.64) - of(0.8) ** 2) / (1 - of(0.8) ** 2) for of in (tau, rho))
    assert of_kendall > 0.14
    assert of_spearman < 0.02


# --- Relations -------------------------------------------------------------------------------------------------------


def study():
    gap, loss = drawn(10), drawn(11)
    return {
        "sharpness": made(gap + 0.4 * drawn(12), gap, FACTORS, loss),
        "noise": made(drawn(13), gap, FACTORS, loss),
        "constant": made(0 * gap, gap, FACTORS, loss),
    }


def test_a_planted_relation_is_found_and_noise_is_not():
    sharpness, noise, constant = relations(study(), draws=999)
    assert sharpness.found
    assert sharpness.claim == "A higher sharpness goes with a larger generalisation gap: a strong relation"
    for part in (
        "95 % interval +0",
        "after Holm's correction for 3 measures",
        "in the worst (",
        "a relation remains (",
    ):
        assert part in sharpness.sentence
    assert "pairs weighted by the noise between replicates" in sharpness.sentence
    assert sharpness.p_holm == pytest.approx(3 * sharpness.permutation.p)
    assert not noise.found
    assert noise.sentence.startswith("There is no evidence that the noise is related to the generalisation gap (")
    assert constant.sentence.startswith("Nothing can be said of the constant")
    for relation in (sharpness, noise, constant):
        assert json.loads(json.dumps(relation.to_dict(), allow_nan=False))["sentence"] == relation.sentence


def test_the_direction_is_told():
    gap = drawn(10)
    (relation,) = relations({"flatness": made(-gap, gap)}, draws=99)
    assert relation.claim.startswith("A higher flatness goes with a smaller, not larger, generalisation gap")
    assert "no two networks differ in one hyper-parameter only" in relation.sentence
    assert "training losses are not known" in relation.sentence


def test_a_relation_that_is_the_losses_is_told():
    loss = drawn(3)
    sample = made(loss + 0.3 * drawn(4), loss + 0.3 * drawn(5), FACTORS, loss)
    (relation,) = relations({"sharpness": sample}, draws=999)
    assert relation.found
    assert "given the training loss there is no evidence left" in relation.sentence
    (copied,) = relations({"loss": made(loss, loss + 0.3 * drawn(5), FACTORS, loss)}, draws=99)
    assert "nothing is left when it is given" in copied.sentence


def test_too_few_networks_are_told():
    samples = {name: made([1, 2, 3, 4], [1, 2, 3, 4]) for name in ("one", "two", "three")}
    relation = relations(samples, draws=99)[0]
    assert not relation.found
    assert relation.floor_holm == pytest.approx(0.25)
    assert "the smallest p possible was 0.083, 0.25 when corrected" in relation.sentence
    assert relation.sentence.endswith("use more networks).")
    tied = {str(name): made([*range(19), 18], range(20)) for name in range(3)}
    assert relations(tied, draws=99)[0].sentence.endswith("use more draws).")


def test_few_draws_are_no_evidence_against_a_relation_beside_the_loss():
    gap = drawn(10)
    (relation,) = relations({"sharpness": made(gap, gap, FACTORS, drawn(11))}, draws=19)
    assert relation.found
    assert "given the training loss nothing could be shown" in relation.sentence


def test_the_order_of_networks_changes_nothing():
    shuffle = np.random.default_rng(0).permutation(len(GRID))

    def take(column):
        return tuple(column[i] for i in shuffle)

    shuffled = {
        name: OutcomeSample(
            take(each.values),
            take(each.outcomes),
            {factor: take(levels) for factor, levels in reversed(each.factors.items())},
            take(each.losses),
        )
        for name, each in study().items()
    }
    assert [r.to_dict() for r in relations(shuffled, draws=199)] == [r.to_dict() for r in relations(study(), draws=199)]


@pytest.mark.parametrize("transform", [math.exp, lambda value: value**3 - 7])
def test_monotone_transforms_change_nothing(transform):
    changed = {
        name: made(map(transform, each.values), each.outcomes, each.factors, each.losses)
        for name, each in study().items()
    }
    assert [r.to_dict() for r in relations(changed, draws=199)] == [r.to_dict() for r in relations(study(), draws=199)]


def test_the_seed_decides_the_draws():
    values, gap = np.round(drawn(0)), drawn(1)
    one, same, other = (relations({"m": made(values, gap, FACTORS)}, seed, 99)[0] for seed in (0, 0, 1))
    assert one == same
    assert one.kendall != other.kendall


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1.0, 2.0), (1.0, 2.0)), "at least 3 networks, got 2"),
        (((1.0, 2.0, 3.0), (1.0, 2.0)), "3 values but 2 of outcomes"),
        (((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), {"width": (1, 2)}), "factor 'width'"),
        (((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), {}, (0.1,)), "of losses"),
        (((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), {}, None, ("a",)), "of labels"),
        (((1.0, 2.0, math.nan), (1.0, 2.0, 3.0)), "finite Python numbers in values, got nan"),
        (((1.0, 2.0, 3.0), (1.0, math.inf, 3.0)), "in outcomes, got inf"),
        (((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), {"rate": (0.1, 0.1, math.nan)}), "factor 'rate'"),
        (((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), {}, (0.1, None, 0.1)), "in losses, got None"),
    ],
)
def test_bad_samples_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        OutcomeSample(*arguments)


def test_bad_settings_are_refused():
    sample = made([1, 2, 3], [1, 2, 3], {"a": (1, 2, 3)})
    for refused in (
        lambda: relations({}),
        lambda: relations({"m": sample}, draws=0),
        lambda: relations({"m": sample}, confidence=1.0),
        lambda: kendall(sample, draws=0),
        lambda: partial(made([1, 2, 3], [1, 3, 2], losses=[3, 1, 2]), draws=0),
        lambda: robust(sample, noise=-1.0),
        lambda: robust(sample, noise=math.nan),
    ):
        with pytest.raises(UsageError):
            refused()
