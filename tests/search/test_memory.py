"""The model of vLLM's KV cache against what vLLM 0.32 itself said; benchmarks/kv_memory.py asks it again."""
