"""The hand: job specs, the command line and reports."""
