"""Find norms, sums, boundaries and residual streams, and what may not be moved. Changes nothing."""
