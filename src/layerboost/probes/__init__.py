"""The quality loss of a changed model: losses, probes, calibration."""
