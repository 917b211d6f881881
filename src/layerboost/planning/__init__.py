"""plan: one strategy for each layer, chosen from sensitivities under a budget."""
