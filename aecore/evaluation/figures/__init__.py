"""Pictures of one model and pictures that set variants side by side, all in one look."""
