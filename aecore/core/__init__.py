"""What every other room may use: errors, identities of data, shared types, quick imports."""
