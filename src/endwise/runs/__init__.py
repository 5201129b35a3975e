"""Run folders: what is on the disk of a run, its checkpoints, its weights."""
