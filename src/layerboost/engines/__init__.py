"""What serves a model: vLLM, and Transformers where there is no vLLM."""
