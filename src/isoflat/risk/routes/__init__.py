"""Product routes: how the Hessian of the empirical risk is multiplied with vectors, one file each."""
