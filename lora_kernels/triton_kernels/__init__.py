"""The three kernels in Triton; nothing here is imported before a call needs it."""
