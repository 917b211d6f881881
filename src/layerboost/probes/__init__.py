"""What a changed model loses, as the stages share it: losses, probes, calibration."""
