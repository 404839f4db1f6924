"""One-line faults that somebody could have written, and the tests that must notice them.

`run.py` applies each to a copy of the source. To add one, give the line as it stands, the line as it would be wrong, and
the fastest tests that know the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Fault:
    """A wrong line, and what should notice it.

    Attributes:
        subject: what the line is about.
        file: where it stands, below `src/isoflat`.
        old: text that occurs in the file exactly once.
        new: what stands in its place.
        tests: pytest ids below `tests`; at least one of them must fail.
    """

    subject: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(subject: str, file: str, *faults: tuple[str, str, str]) -> tuple[Fault, ...]:
    """Faults of one file; the tests of each are separated by blanks."""
    return tuple(Fault(subject, file, old, new, tuple(tests.split())) for old, new, tests in faults)


_PRIOR = "unit/test_certificate.py::test_the_prior_bound_solves_its_equation"
_ONE_STEP = "unit/test_certificate.py::test_each_end_has_half_of_the_failure_probability"
_MIRROR = "unit/test_certificate.py::test_bounds_mirror_with_the_spectrum"
_PARTS_BUDGET = "unit/test_failure_budget.py::test_parts_and_the_fallback_share_one_budget"
_ATTEMPTS_BUDGET = "unit/test_failure_budget.py::test_attempts_share_one_budget"

CERTIFICATE = (
    *_of(
        "certificate", "linalg/certificate.py",
        ("(2 * k - 1)) ** 2", "(2 * k + 1)) ** 2", _PRIOR),
        ("(2 * k - 1)) ** 2", "(2 * k - 1))", _PRIOR),
        ("/ (1 - 2 * epsilon)", "/ (1 - epsilon)", _PRIOR),
        ("log_overlap(n, failure / 2)) / (2", "log_overlap(n, failure)) / (2", _PRIOR),
        ("math.log(math.pi / (2 * n))", "math.log(2 * math.pi / n)",
         "unit/test_certificate.py::test_overlap_threshold_against_the_exact_distribution"),
        ("upper = min(posterior_bound(ritz, log_couplings, n, failure / 2)",
         "upper = min(posterior_bound(ritz, log_couplings, n, failure)", _ONE_STEP),
        ("lower = -min(posterior_bound(mirrored, log_couplings, n, failure / 2)",
         "lower = -min(posterior_bound(mirrored, log_couplings, n, failure)", _MIRROR),
        ("mirrored = -ritz[::-1]", "mirrored = -ritz", _MIRROR),
        ("target = log_couplings - log_overlap", "target = log_couplings + log_overlap",
         "unit/test_certificate.py::test_posterior_bound_solves_its_equation"),
    ),
    *_of(
        "certificate", "linalg/eigen/hard_first.py",
        ("(1 - self.whole.confidence) / 2", "1 - self.whole.confidence", _PARTS_BUDGET),
        ("confidence=1 - self.failure, max_products", "confidence=self.whole.confidence, max_products", _PARTS_BUDGET),
    ),
    *_of("certificate", "linalg/eigen/complement.py", ("rule.failure / len(levels)", "rule.failure", _PARTS_BUDGET)),
    *_of(
        "certificate", "linalg/eigen/attempt.py",
        ("(1 - self.task.confidence) / (self.attempts * (self.attempts + 1))", "1 - self.task.confidence",
         _ATTEMPTS_BUDGET),
        ("self.attempts * (self.attempts + 1)", "self.attempts + 1", _ATTEMPTS_BUDGET),
    ),
)  # fmt: skip

_EIGENPAIRS = "unit/test_eigenpairs.py::test_known_spectra"
_COMPARISON = "unit/test_hard_first.py::test_comparison_matrix_is_that_of_all_dimensions"

EIGEN = (
    *_of(
        "eigen", "linalg/eigen/lanczos.py",
        ("recurrence.n, 1 - self.confidence)", "recurrence.n, self.confidence)",
         "unit/test_lanczos.py::test_more_confidence_costs_products"),
        ("noise = discrepancy + recurrence.rounding", "noise = recurrence.rounding",
         "unit/test_lanczos.py::test_what_products_are_off_by_is_noise_and_widens_the_interval"),
        ("chosen = -1 if view.wanted is view.top else 0", "chosen = 0 if view.wanted is view.top else -1",
         "unit/test_lanczos.py::test_known_spectra"),
        ("residual = space.norm(torch.sub(fresh, vector, alpha=value))", "residual = discrepancy",
         "unit/test_lanczos.py::test_known_spectra"),
    ),
    *_of(
        "eigen", "linalg/eigen/extremes.py",
        ("max(self.top.bound, -self.bottom.bound, abs(end.value))", "max(self.top.bound, abs(end.value))",
         "unit/test_lanczos.py::test_enclosures_hold_for_any_spectrum_and_budget "
         "unit/test_lanczos.py::test_known_spectra"),
        ("else (end.bound, inner)", "else (inner, end.bound)", "unit/test_lanczos.py::test_known_spectra"),
    ),
    *_of(
        "eigen", "linalg/eigen/complement.py",
        ("self._compared(lower)[:d]", "self._compared(upper)[:d]", _COMPARISON),
        ("self.coupling.T], [self.coupling,", "self.coupling], [self.coupling.T,", _COMPARISON),
        ("root * sizes)", "root)", _COMPARISON),
        ("math.fsum(getattr(level, name) for level in levels)", "max(getattr(level, name) for level in levels)",
         "unit/test_hard_first.py::test_bounds_on_the_complement_add_up_over_parts"),
        ("Recurrence(start, domain.dtype, trial.vectors)", "Recurrence(start, domain.dtype)", _EIGENPAIRS),
    ),
    *_of(
        "eigen", "linalg/eigen/attempt.py",
        ("inner[self.top :] *= -1", "inner[: self.top] *= -1", _EIGENPAIRS),
        ("left.lower - noise, left.upper + noise", "left.lower, left.upper",
         "unit/test_eigenpairs.py::test_noise_of_products_widens_the_bound_on_the_complement"),
        ("np.append(high[::-1] + slack, upper)", "np.append(high + slack, upper)", _EIGENPAIRS),
    ),
    *_of(
        "eigen", "linalg/eigen/attempt.py",
        ('fresh_stream(draw, "certificate", fingerprint(warm))', 'fresh_stream(draw, "certificate")',
         "unit/test_eigenpairs.py::test_certificate_does_not_know_what_an_earlier_run_drew"),
        ("np.minimum(self.highs, highs)", "np.maximum(self.highs, highs)", _EIGENPAIRS),
    ),
    *_of(
        "eigen", "linalg/eigen/hard_first.py",
        ("image = near + (yield from", "image = 0 * near + (yield from",
         "unit/test_hard_first.py::test_cheaper_than_lanczos_on_the_whole"),
        ("max(upper, -lower)", "upper", "unit/test_hard_first.py::test_encloses"),
    ),
)  # fmt: skip

_BESIDE = "unit/test_block.py::test_plain_recurrence_beside_known_vectors"
_STABLE = "unit/test_lanczos.py::test_recurrence_is_backward_stable"
_BLOCK = "unit/test_block.py::test_backward_stable"

KRYLOV = (
    *_of(
        "krylov", "linalg/krylov/recurrence.py",
        ("[*self._beside, *self._basis]", "[*self._basis]", _BESIDE),
        ("math.log(max(beta, self.rounding))", "math.log(max(beta, 1e-300))",
         "unit/test_lanczos.py::test_a_coupling_counts_as_no_smaller_than_rounding"),
        ("alpha = float(removed[-1])", "alpha = float(removed[0])", _STABLE),
        ("np.array(self.betas[:-1])", "np.array(self.betas[1:])", "unit/test_lanczos.py::test_known_spectra"),
        ("self.betas[-1] * float(coefficients[-1])", "self.betas[-1]", "unit/test_lanczos.py::test_known_spectra"),
    ),
    *_of(
        "krylov", "linalg/krylov/block.py",
        ("self._couplings = turn.T @ self._couplings", "self._couplings = turn @ self._couplings",
         "unit/test_block.py::test_steering_keeps_the_span_of_what_waits " + _BLOCK),
        ("(inside + inside.T) / 2", "inside + inside.T", _BLOCK),
        ("images[len(rows), j] = left", "images[len(rows), j] = 1.0", _BLOCK),
    ),
    *_of(
        "krylov", "linalg/vectors.py",
        ("removed += left", "removed = left",
         "unit/test_block.py::test_orthogonalise_gives_up_on_what_lies_in_the_span"),
        ("space.add(images[j], -removed, images[:j])", "space.add(images[j], removed, images[:j])",
         "unit/test_block.py::test_images_go_along_when_vectors_are_made_orthonormal"),
        ("images[j].div_(size)", "images[j].mul_(size)",
         "unit/test_block.py::test_images_go_along_when_vectors_are_made_orthonormal"),
    ),
    *_of(
        "krylov", "linalg/vectors.py",
        ("draw = torch.randn(n,", "draw = torch.rand(n,", "unit/test_lanczos.py::test_start_is_uniform_on_the_sphere"),
    ),
)  # fmt: skip

_ADJOINT = "unit/test_maps.py::test_pull_is_the_transpose_of_push"
_FRAME = "laws/test_canonical.py::test_frame_and_moved_model_agree"
_QUOTIENT = "laws/test_quotient.py::test_projections_split_the_tangent_space"
_PRECONDITIONER = "oracles/test_edge_of_stability.py::test_the_preconditioner_is_what_the_step_divides_by"

FRAMES = (
    *_of(
        "frames", "linalg/maps.py",
        ("for part in self.maps:", "for part in reversed(self.maps):", _ADJOINT),
        ("_mix(result, matrix.mT, parts)", "_mix(result, matrix, parts)", _ADJOINT),
        ("for matrix, parts in reversed(self.terms):", "for matrix, parts in self.terms:", _ADJOINT),
        ("result[term.target] += taken", "result[term.target] -= taken", _ADJOINT),
        ("(vectors - basis @", "(vectors - 2 * basis @", _QUOTIENT),
        ("(g, j, i, k) if term.turned else term.view", "term.view if term.turned else term.view",
         "unit/test_maps.py::test_a_turned_shear_contracts_the_transposed_factor"),
    ),
    *_of(
        "frames", "linalg/operator.py",
        ("self.plus if 0 in parts else None", "self.plus",
         "unit/test_hard_first.py::test_parts_of_a_pullback_add_up_to_it"),
        ("else result + self.plus.matmat(vectors)", "else result - self.plus.matmat(vectors)",
         "laws/test_quotient.py::test_gauge_directions_lie_in_the_kernel_of_the_covariant_hessian"),
    ),
    *_of(
        "frames", "geometry/layerwise.py",
        ("- (w @ g) * v for", "+ (w @ g) * v for",
         "laws/test_quotient.py::test_gauge_directions_lie_in_the_kernel_of_the_covariant_hessian"),
        ("return max(flat.norm(w)", "return sum(flat.norm(w)",
         "oracles/test_micro_network.py::test_connection_norm_is_the_stationarity_bound"),
        ("Diagonal(state.space.spread(norms.to(state.device)))",
         "Diagonal(state.space.spread(norms.square().to(state.device)))",
         "laws/test_invariance.py::test_the_papers_notebook"),
    ),
    *_of(
        "frames", "geometry/quotient.py",
        ("vectors.double() / norms[:, None]", "vectors.double() * norms[:, None]", _QUOTIENT),
        ("self.frame.push(self.frame.pull(euclidean[:, None]))", "self.frame.push(euclidean[:, None])",
         "laws/test_quotient.py::test_metric_and_gradient_are_invariant"),
    ),
    *_of(
        "frames", "geometry/preconditioned.py",
        ("scale.rsqrt()", "scale.reciprocal()",
         "oracles/test_edge_of_stability.py::test_the_value_is_the_largest_eigenvalue_of_the_preconditioned_hessian_over_the_limit"),
        ("return first * ((square", "return ((square", _PRECONDITIONER),
        ("(square / second).sqrt() + group", "square.sqrt() + group", _PRECONDITIONER),
        ("(2 + 2 * beta) / ((1 - beta) * rate)", "(2 + 2 * beta) / rate",
         "oracles/test_edge_of_stability.py::test_one_is_where_training_diverges"),
    ),
    *_of(
        "frames", "geometry/traced.py",
        ("(-within).exp() * diagonal", "within.exp() * diagonal", f"{_FRAME}[mlp-bias]"),
        ("back.mT if side.dual else forward", "back if side.dual else forward", f"{_FRAME}[linear-chain-two]"),
        ("(change.inverse, change.matrix) if inverse else (change.matrix, change.inverse)",
         "(change.matrix, change.inverse) if inverse else (change.inverse, change.matrix)",
         f"{_FRAME}[linear-chain-two]"),
    ),
    *_of(
        "frames", "geometry/canonical.py",
        ("squares[number] ** 0.5", "squares[number]", "laws/test_attention.py::test_packed_counts_as_unpacked[glu-packed]"),
    ),
    *_of(
        "frames", "geometry/elementwise.py",
        ("point.state.tensors[n].abs()", "state.tensors[n].abs()",
         "laws/test_attention.py::test_elementwise_is_proof_against_all_but_rotations[attention-separate]"),
    ),
)  # fmt: skip

_IGNORED = "laws/test_risk.py::test_ignored_targets_are_dropped_targets"
_MEANS = "laws/test_risk.py::test_value_and_gradient_are_means_over_counted_targets"
_RAGGED = "laws/test_risk.py::test_elementwise_losses_over_ragged_batches"
_TWO_BATCHES = "laws/test_risk.py::test_batches_of_64_and_36_equal_one_of_100"
_UNBIASED = "unit/test_sampling.py::test_an_operator_is_unbiased"
_WEIGHT_OF_TWO = "unit/test_sampling.py::test_a_weight_of_two_is_the_row_twice"
_ROW_COUNTS = "laws/test_risk.py::test_counts_of_rows_are_those_of_each_by_itself"
_OWN_LOSS = "laws/test_risk.py::test_batch_losses_on_dictionaries_and_models_with_a_loss"

WEIGHTING = (
    *_of(
        "weighting", "risk/empirical.py",
        ("count = found.count if self.of is None else self.of", "count = found.count", _UNBIASED),
        ("*tally.gradient(index, gradients)]), term.count)", "*tally.gradient(index, gradients)]), term.rows)", _MEANS),
        ("return BatchSum(term.total.detach().reshape(1).double(), term.count)",
         "return BatchSum(term.total.detach().reshape(1).double(), 1.0)",
         _MEANS),
        ("self.correct += int(", "self.correct = int(", _IGNORED),
    ),
    *_of(
        "weighting", "risk/batches.py",
        ("places[taken : taken + more] - (first - count)", "places[taken : taken + more]",
         "laws/test_parts.py::test_only_some_rows"),
        ("torch.arange(first, first + rows)", "torch.arange(rows)",
         "oracles/test_curvatures.py::test_labels_depend_on_the_seed_and_not_on_the_batches"),
    ),
    *_of(
        "weighting", "risk/losses.py",
        ("float(criterion.weight.to(counted.device)[counted].double().sum())", "float(counted.numel())",
         "laws/test_risk.py::test_integer_class_weights_are_replicated_samples"),
        ("counted = target[target != criterion.ignore_index]", "counted = target[target == target]", _IGNORED),
        ('scalar(result, "mean") * rows', 'scalar(result, "mean")',
         "laws/test_loss_forms.py::test_means_of_batches_are_weighed_by_rows_where_they_are_means_over_them"),
        ("Term(mean * count if count", "Term(mean if count", _OWN_LOSS),
        ('scalar(function(output, target), "loss") * int(rows(output, target))', 'scalar(function(output, target), "loss")',
         _RAGGED),
        (".reshape(len(output), -1).sum(1)", ".reshape(len(output), -1).mean(1)", _ROW_COUNTS),
        ("(self.by_row(output, target) * weights.to(output)).sum()", "self.by_row(output, target).sum()",
         _WEIGHT_OF_TWO),
        ("[target * counted] * counted", "[target * counted]", _ROW_COUNTS),
        ("(len(directions) if signs else 1)", "1",
         "unit/test_sampling.py::test_importance_is_slope_and_curvature_of_the_loss"),
        ("centred = scores - scores.mean(axis, keepdim=True)", "centred = scores",
         "laws/test_equal_loss.py::test_normalised_numbers_are_those_of_a_network_that_normalises"),
        ("torch.broadcast_shapes(output.shape, target.shape).numel()", "len(target)", _RAGGED),
    ),
)  # fmt: skip

_DERIVATIVES = "unit/test_potential.py::test_derivatives_agree_with_differences"
_POINT = "laws/test_canonical.py::test_representative_is_one_point_of_the_orbit"
_LEAST = "unit/test_slices.py::test_weighted_squares_are_least_where_their_derivative_vanishes"
_NULL_SPACE = "unit/test_relations.py::test_solutions_are_the_null_space"

CANONICAL = (
    *_of(
        "canonical", "symmetry/canonical/representative.py",
        ("logs=_add(logs, group.tensors, z)", "logs=_add({}, group.tensors, z)",
         f"{_FRAME}[vgg-batch]"),
        ("a, b = a + first, b + second", "a, b = a + first, b", f"{_FRAME}[linear-chain-two]"),
        ("(tensor - old) * (", "(old - tensor) * (", "laws/test_attention.py::test_a_pair_short_of_rank_is_cut_to_it"),
    ),
    *_of(
        "canonical", "symmetry/canonical/potential.py",
        ("self.linear = -2.0 *", "self.linear = -1.0 *", _DERIVATIVES),
        ("gradient = self.linear + 2 * (", "gradient = self.linear + (", _DERIVATIVES),
        ("c * db + eb * _times(s.squares.mT, ea * da)", "c * db", _DERIVATIVES),
        (" * mass.sign for mass in group]", " for mass in group]", _DERIVATIVES),
        ("one_way = (up ^ down) & ~held", "one_way = up ^ down", "unit/test_potential.py::test_a_last_writer_is_never_zeroed"),
        ("return ~up", "return up", "unit/test_potential.py::test_closure_zeroes_chains_and_keeps_what_is_fed"),
    ),
    *_of(
        "canonical", "symmetry/canonical/balance.py",
        ("matrices.append(v.mT @ u.mT @ forward)", "matrices.append(v @ u.mT @ forward)",
         f"{_POINT}[linear-chain-two]"),
        ("product.values[block, :rank].rsqrt()", "product.values[block, :rank].reciprocal()",
         f"{_POINT}[linear-chain-two]"),
        ("first.inverse @ self.inverse", "self.inverse @ first.inverse",
         "laws/test_attention.py::test_elementwise_is_proof_against_all_but_rotations[attention-separate]"),
        ("torch.where(largest < 0, -1.0, 1.0)", "torch.where(largest < 0, 1.0, 1.0)", f"{_POINT}[linear-chain-two]"),
    ),
    *_of(
        "canonical", "symmetry/canonical/shift_gauge.py",
        ("= -values[single] / rows.data", "= values[single] / rows.data", _LEAST),
        ("root * (values[part] / scale), rcond", "(values[part] / scale), rcond",
         _LEAST),
        ("ratio = amount / deviation(running, state).cpu()", "ratio = amount * deviation(running, state).cpu()",
         f"{_FRAME}[vgg-batch]"),
    ),
    *_of(
        "canonical", "symmetry/canonical/gain_folding.py",
        ("(-gain[mask].abs().log())", "(gain[mask].abs().log())", f"{_POINT}[pre-norm-layer]"),
        ("(-logs[torch.from_numpy(moves)])", "(logs[torch.from_numpy(moves)])", f"{_POINT}[vgg-batch]"),
    ),
    *_of(
        "canonical", "symmetry/relations.py",
        ("over = Fraction(-1) / form[pivot]", "over = Fraction(1) / form[pivot]", _NULL_SPACE),
        ("total[root] = total.get(root, 0) + c", "total[root] = c", _NULL_SPACE),
        ("parent[max(a, b)] = min(a, b)", "parent[min(a, b)] = max(a, b)", "unit/test_relations.py"),
        ("[(c, root[x]) for x, c in equation.items()]", "[(1, root[x]) for x, c in equation.items()]",
         "unit/test_relations.py::test_further_forms_cut_the_solutions"),
    ),
)  # fmt: skip

_FORMS = "unit/test_trace.py::test_solver_averages_these_quadratic_forms"
_SIMPLE = "unit/test_sampling.py::test_equal_chances_scatter_as_a_simple_random_sample"
_TOTALS = "unit/test_sampling.py::test_totals_are_unbiased_and_their_intervals_cover"

SAMPLING = (
    *_of(
        "sampling", "risk/sampling.py",
        ("(1 / self.chances).split(rows)", "self.chances.split(rows)", _UNBIASED),
        ("left, y = 1 - chances, values", "left, y = torch.ones_like(chances), values", _SIMPLE),
        ("total * count / (count - 1)", "total", _SIMPLE),
        ("squares = left * (y - (left * y).sum() / left.sum()) ** 2", "squares = left * y**2", _SIMPLE),
        ("left = size - int(certain.sum())", "left = size",
         "unit/test_sampling.py::test_chances_add_up_and_grow_with_the_score"),
        ("left = (1 - others) / self.chances", "left = 1 - others", "unit/test_sampling.py::test_forecasts_come_true"),
        ("self.chances[others]])", "chances[self.places][others]])",
         "unit/test_sampling.py::test_what_is_taken_beyond_a_sample_keeps_totals_unbiased"),
        ("chances = self.drawn.chances", "chances = self.chances", f"{_TOTALS} {_SIMPLE}"),
    ),
    *_of(
        "sampling", "linalg/vectors.py",
        ("torch.randint(0, 2, (n,)", "torch.randint(0, 3, (n,)", "unit/test_trace.py::test_exact_for_diagonal_matrices"),
        ("dim=1) * math.sqrt(n)", "dim=1) * n", "unit/test_trace.py::test_variance_and_bias_against_closed_form"),
    ),
    *_of(
        "sampling", "linalg/trace/hutchinson.py",
        ("error = pilot.deviation / math.sqrt(taken)", "error = pilot.deviation / taken",
         "unit/test_trace.py::test_the_half_width_after_a_tolerance_is_the_pilots"),
        ("half = (self.settings.rtol or 0.0) / 2", "half = self.settings.rtol or 0.0",
         "unit/test_trace.py::test_a_tolerance_is_reached_or_not_and_says_why"),
        ("quantile(settings.confidence, size - 1)", "quantile(settings.confidence, size)", _FORMS),
    ),
    *_of(
        "sampling", "linalg/trace/base.py",
        ("math.sqrt(len(apart) - 1)", "math.sqrt(len(apart))", _FORMS),
        ("student.isf((1 - confidence) / 2, degrees)", "student.isf(1 - confidence, degrees)", _FORMS),
    ),
)  # fmt: skip

_S = "unit/test_statistics.py::test_"

STATISTICS = (
    *_of(
        "statistics", "experiments/statistics/kendall.py",
        ("2 * tail ** (1 / (distinct // 2)) - 1", "2 * tail ** (1 / distinct) - 1",
         _S + "agreement_of_all_pairs_is_no_certainty"),
        ("taus == _UNDEFINED, (1 - confidence) / 2", "taus == _UNDEFINED, 1 - confidence",
         _S + "the_interval_is_that_of_resampled_pairs"),
        ("np.where(degenerate, 1.0, taus), 1 - tail", "np.where(degenerate, -1.0, taus), 1 - tail",
         _S + "resamples_of_ties_widen_the_interval_and_are_counted"),
    ),
    *_of(
        "statistics", "experiments/statistics/partial.py",
        ("ranks * square - loss * int(ranks @ loss)", "ranks * square + loss * int(ranks @ loss)",
         _S + "the_partial_correlation_is_the_textbooks"),
        ("rest = permuted - (permuted @ away)[..., None] * away", "rest = permuted",
         _S + "its_p_is_that_of_all_permutations_of_residuals"),
        ("2 / (visited if visited", "1 / (visited if visited",
         _S + "its_p_is_that_of_all_permutations_of_residuals"),
    ),
    *_of(
        "statistics", "experiments/statistics/permutation.py",
        ("min(1.0, 2 * math.exp(least))", "min(1.0, math.exp(least))",
         _S + "p_is_that_of_all_permutations_and_never_below_the_floor " + _S + "without_ties_the_floor_is_reached"),
        ("floor = max(floor, min(1.0, 2 / (draws + 1)))", "floor = max(floor, min(1.0, 1 / (draws + 1)))",
         _S + "random_draws_bound_p_from_below"),
        ("_chance(rising[::-1], both)", "_chance(rising, both)", _S + "p_is_that_of_all_permutations_and_never_below_the_floor"),
    ),
    *_of(
        "statistics", "experiments/statistics/robust.py",
        ("errors = (1 - signs", "errors = (1 + signs", _S + "environments_by_hand"),
        ("erf(abs(difference) / (2 * noise))", "erf(abs(difference) / noise)", _S + "pairs_weigh_as_their_sign_is_sure"),
        ("sum(len(group) - 1 for group in groups)", "sum(len(group) for group in groups)",
         _S + "noise_is_that_of_replicates"),
    ),
    *_of(
        "statistics", "experiments/statistics/multiplicity.py",
        ("np.arange(len(ps), 0, -1)", "len(ps)", _S + "holm_is_closed_testing_by_bonferroni"),
        ("np.maximum.accumulate(scaled)", "scaled", _S + "holm_is_closed_testing_by_bonferroni"),
    ),
    *_of(
        "statistics", "experiments/statistics/granulated.py",
        ("groups = [], sample.groups(leaving=name)", "groups = [], sample.groups()", _S + "granulated_by_hand"),
    ),
    *_of(
        "statistics", "experiments/statistics/conditional.py",
        ("range(MOST + 1)", "range(MOST)", _S + "a_function_of_two_hyper_parameters_says_nothing_more"),
    ),
    *_of(
        "statistics", "experiments/statistics/sample.py",
        ("if levels[i] != levels[j])", "if i != j)", _S + "replicates_are_not_compared"),
    ),
)  # fmt: skip

_DENSE = "oracles/test_dense.py::test_products_are_those_of_the_dense_hessian"
_LINEAR = "unit/test_second_order.py::test_linear"
_CONVOLUTION = "unit/test_second_order.py::test_convolution"
_GAUSS_NEWTON = "oracles/test_curvatures.py::test_gauss_newton_is_the_dense_product"
_SAMPLED = "oracles/test_curvatures.py::test_a_sampled_fisher_is_the_sum_over_targets"
_REFUSED = "laws/test_models.py::test_products_of_another_function_are_refused"

PRODUCTS = (
    *_of("products", "risk/routes/differences.py", ("/ (2 * reach)", "/ reach", _DENSE)),
    *_of(
        "products", "risk/routes/forward.py",
        ("dim=1), parts[0].count)", "dim=1), 1.0)", _DENSE),
        ("forward_ad.unpack_dual(gradient).tangent", "forward_ad.unpack_dual(gradient).primal", _DENSE),
    ),
    *_of(
        "products", "risk/routes/reverse.py",
        ("BatchSum(graph.products(wide, last=True), graph.count)", "BatchSum(graph.products(wide, last=True), len(wide))", _DENSE),
        ("BatchSum(graph.products(wide, last=False), graph.count)", "BatchSum(graph.products(wide, last=False), 1.0)", _DENSE),
        ("retain_graph=not last or k + 1 < len(vectors)", "retain_graph=not last and k + 1 < len(vectors)", _DENSE),
    ),
    *_of(
        "products", "risk/routes/output.py",
        ("torch.autograd.grad(self.residual, self.z, tangent,", "torch.autograd.grad(self.residual, self.z, self.z,",
         _GAUSS_NEWTON),
    ),
    *_of("products", "curvature/gauss_newton.py", ("return output.curve", "return lambda tangent: tangent", _GAUSS_NEWTON)),
    *_of(
        "products", "curvature/fisher.py",
        ("return total / len(residuals)", "return total", _SAMPLED),
        ("torch.where(counts > 0, 1 / counts, 0)", "torch.where(counts > 0, 1, 0)",
         "oracles/test_curvatures.py::test_the_empirical_fisher_is_the_sum_over_rows"),
        ('stream(seed, "labels", draw, place)', 'stream(seed, "labels", place)',
         "oracles/test_curvatures.py::test_the_mean_of_sampled_fishers_approaches_gauss_newton"),
    ),
    *_of(
        "products", "risk/second_order/linear.py",
        ("total = F.linear(old_inputs, weight, total)", "total = F.linear(old_inputs, weight)",
         "unit/test_second_order.py::test_products_agree_with_torch[None]"),
        ("outputs.T @ inputs if to_weight and", "outputs.T @ old_inputs if to_weight and", _LINEAR),
    ),
    *_of(
        "products", "risk/second_order/convolution.py",
        ("None if inputs is not None else bias)", "bias)",
         "unit/test_second_order.py::test_products_agree_with_torch[None]"),
        ("window.transpose(places, outputs, inputs, old_weight, [False, True, False])[1]",
         "window.transpose(places, outputs, old_inputs, old_weight, [False, True, False])[1]", _CONVOLUTION),
    ),
    *_of(
        "products", "risk/second_order/pooling.py",
        ("(planes.scatter_ if disjoint else planes.scatter_add_)", "planes.scatter_",
         "unit/test_second_order.py::test_pooling"),
    ),
    *_of(
        "products", "risk/second_order/relu.py",
        ("threshold_backward(values, output, 0)", "threshold_backward(values, output, -1)",
         "unit/test_second_order.py::test_products_agree_with_the_dense_hessian"),
    ),
    *_of(
        "products", "risk/check.py",
        ("return Compared(sample.distance(u, hu, sample.gradient)", "return Compared(0.0", _REFUSED),
        (".div_(2 * reach)", ".div_(reach)", "laws/test_models.py::test_forward_over_reverse_where_the_backward_has_no_backward"),
        ("float(inner([u], hv)[0]) - float(inner([v], hu)[0])", "float(inner([u], hv)[0]) + float(inner([v], hu)[0])",
         "unit/test_cli.py::test_measures_and_doctor"),
    ),
)  # fmt: skip

FAULTS = (*CERTIFICATE, *EIGEN, *KRYLOV, *FRAMES, *WEIGHTING, *CANONICAL, *SAMPLING, *STATISTICS, *PRODUCTS)
