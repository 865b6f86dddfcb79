"""The engine: requests of token ids in, completions out. Knows no text, no row, no file."""
