"""The networks and their mathematics, from layers and likelihoods to weights on disk."""
