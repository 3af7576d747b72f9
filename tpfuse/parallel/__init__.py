"""Cut a model as its policy says: roles, plans, weights, boundaries in eager mode, rows, checkpoints."""
