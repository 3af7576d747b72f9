"""What `python -m tpfuse` can do."""
