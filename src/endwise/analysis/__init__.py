"""Questions about finished runs, alone and against each other."""
