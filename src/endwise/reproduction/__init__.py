"""The paper's quantitative experiments on any model, from one command: what is run, what it shows, one report."""
