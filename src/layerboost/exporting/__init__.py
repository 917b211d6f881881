"""export: a boosted checkpoint in a stock format, for engines without layerboost."""
