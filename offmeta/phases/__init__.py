"""The phases of a run, and what they need: from a configuration to files."""
