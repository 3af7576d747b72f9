"""What other packages need of this one. Each module imports its package, and is imported by the user alone."""
