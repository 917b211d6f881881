"""The costs of strategies: KV bytes, parameters, time; vLLM's memory arithmetic."""
