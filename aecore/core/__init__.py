"""Errors, identities of configurations, shared types and faster imports, for all other rooms to use."""
