"""The stages of a pipeline, each a pure function of its spec and the results of the stages before it."""
