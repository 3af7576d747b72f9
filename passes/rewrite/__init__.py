"""Edit a graph for a plan that was chosen: one file a rewrite."""
