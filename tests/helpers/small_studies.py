"""A study of the paper's experiments in small."""

from endwise.paper.study_config import StudyConfig

SITE, OTHER = "blocks.3.hook_resid_pre", "blocks.4.hook_resid_pre"


def study(**changes):
    values = {
        "recipe": {
            "dictionary": {"ratio": 2},
            "training": {"tokens": 2048, "batch": 2, "alive_window": 2048, "checkpoint_every": 2},
            "evaluation": {"tokens": 2048, "during_training_tokens": 1024, "batch": 8},
        },
        "sites": {SITE: {}, OTHER: {"e2e_ds": {"downstream_mse": 0.5}}},
        "kinds": {
            "local": {"coefficients": [0.5, 1, 2], "learning_rates": [1e-2, 2e-2]},
            "e2e": {"coefficients": [0.25, 0.5, 1], "learning_rates": [1e-2, 2e-2]},
            "e2e_ds": {"coefficients": [1, 2, 4], "learning_rates": [1e-2, 2e-2], "downstream_mse": 1.0},
        },
        "seeds": 3,
        "lengths": [0.5, 2],
        "ratios": [4],
        "starts": [0.5],
        "least_tokens": 1024,
        "cost_tokens": 2048,
    }
    return StudyConfig.build(values | changes)
