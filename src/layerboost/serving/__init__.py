"""Serving with vLLM: the plugin that loads boosted checkpoints, starting and stopping servers, benchmarking them."""
