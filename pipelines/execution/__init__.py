"""The one way in which a stage is computed: found or restored, else computed, logged and committed."""
