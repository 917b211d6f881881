"""What runs inside vLLM: the plugin that loads boosted checkpoints. Imports layerboost.model and nothing above it."""
