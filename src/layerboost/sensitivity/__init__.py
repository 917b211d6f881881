"""How much each layer's attention matters: metrics, sink calibration and the sweep over layers."""
