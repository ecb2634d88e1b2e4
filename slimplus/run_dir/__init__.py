"""The folder that a run writes: its files, its lock, and what another start of the run may reuse."""
