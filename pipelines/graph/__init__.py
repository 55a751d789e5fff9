"""Stages with their keys, and the recipe that builds a chain of stages from an experiment."""
