"""The stages of a run, a module each; a stage skips what an earlier start of the run finished."""
