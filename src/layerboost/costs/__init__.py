"""What strategies cost: KV bytes, parameters, time; vLLM's memory arithmetic."""
