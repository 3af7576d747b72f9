"""tpfuse: fused all-reduce + residual + norm for tensor-parallel models under torch.compile."""
