"""The mathematics of stacked autoencoders: data, networks, variants, one training loop, measures, pictures.

Nothing here knows of Ray or MLflow; a stage is a plain function of (spec, inputs).
"""
