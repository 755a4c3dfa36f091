"""The commands, one in a file: their options and what they print."""
