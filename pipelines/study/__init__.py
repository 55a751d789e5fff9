"""Studies: many trials on Ray Tune, compared alike; no other room imports ray.tune."""
