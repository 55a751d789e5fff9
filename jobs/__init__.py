"""The commands: parse, connect, call one pipeline function, print."""
