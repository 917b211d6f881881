"""measure: the sensitivity of each layer to each replacement."""
