"""Names that measures and geometries have elsewhere, and what they are called here."""

from __future__ import annotations

_MEASURES: dict[str, tuple[str, ...]] = {
    "hessian_spectral_norm": (
        "lambda_max",
        "lmax",
        "max_eigenvalue",
        "largest_eigenvalue",
        "top_eigenvalue",
        "top_hessian_eigenvalue",
        "hessian_top_eigenvalue",
        "hessian_max_eigenvalue",
        "max_eig",
        "top_eig",
        "spectral_norm",
        "spectral_radius",
        "hessian_norm",
        "hessian",
        "curvature",
        "power_iteration",
        "pyhessian",
        "lanczos",
    ),
    "hessian_trace": ("trace", "hutchinson", "hutchpp", "hutch++", "laplacian", "average_curvature", "trace_hessian"),
    "hessian_frobenius": ("frobenius", "frobenius_norm", "hessian_frobenius_norm"),
    "quotient_spectral_norm": ("headline", "flatness", "flat", "invariant_sharpness", "rangamani", "quotient_norm"),
    "quotient_sharpness": ("epsilon_sharpness", "keskar", "keskar_sharpness", "worst_case_sharpness", "sam", "asam"),
    "fisher_trace": ("fisher", "fim", "fim_trace", "fisher_information", "empirical_fisher", "jastrzebski"),
    "fisher_spectral_norm": ("fisher_norm", "fim_norm", "fisher_max_eigenvalue"),
    "gauss_newton_trace": ("gauss_newton", "ggn", "ggn_trace", "gnvp"),
    "gauss_newton_spectral_norm": ("ggn_norm", "ggn_spectral_norm"),
    "fisher_rao_norm": ("fisher_rao",),
    "gradient_norm": ("grad_norm", "gradnorm", "gradient"),
    "edge_of_stability": ("eos",),
    "local_learning_coefficient": ("llc", "rlct", "learning_coefficient", "lambda_hat"),
    "log_prior_volume": ("volume", "log_volume", "prior_volume"),
    "relative_flatness": ("petzka",),
    "quotient_effective_rank": ("effective_rank", "stable_rank"),
    "sa_cms": ("average_sharpness", "adaptive_sharpness"),
    "tic": ("takeuchi", "takeuchi_information_criterion"),
}

_GEOMETRIES: dict[str, tuple[str, ...]] = {
    "euclidean": ("plain", "standard", "identity", "none", "raw", "l2", "default"),
    "auto": ("canonical", "invariant", "quotient", "automatic"),
    "layerwise": ("layer", "layers", "paper", "per_layer", "blockwise", "filterwise", "filter", "filter_normalized"),
    "elementwise": ("adaptive", "asam", "diagonal", "entrywise", "relative", "elements"),
}


def meant(table: dict[str, tuple[str, ...]], name: str) -> tuple[str, ...]:
    """Names here of what is called so elsewhere; none where nothing is known.

    >>> meant(_MEASURES, "Lambda-Max")
    ('hessian_spectral_norm',)
    """
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    return tuple(own for own, others in table.items() if plain in others)


def measures_meant(name: str) -> tuple[str, ...]:
    """Measures that a name of elsewhere stands for; "sharpness" has several meanings."""
    if name.strip().lower() == "sharpness":
        return ("hessian_spectral_norm", "quotient_sharpness", "critical_sharpness", "minimum_sharpness")
    return meant(_MEASURES, name)


def geometries_meant(name: str) -> tuple[str, ...]:
    """Geometries that a name of elsewhere stands for."""
    return meant(_GEOMETRIES, name)
