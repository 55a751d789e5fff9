"""What a user chooses, how each `auto` is resolved against the data, and the hashed specs of the stages."""
