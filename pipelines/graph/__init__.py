"""Stages with their keys, and the recipe that makes a chain of stages of an experiment."""
