"""Graph to graph: recognise, plan, rewrite."""
