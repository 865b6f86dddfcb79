"""The decoder: packed tokens in, hidden states out. Knows no request."""
