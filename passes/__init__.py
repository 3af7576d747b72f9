"""Graph to graph: what the backend changes in a graph, and what it says of it. `pipeline` is the way, as a list."""
