"""A short run on the embedded model."""


def recipe(out, **sparsity):
    return {
        "site": "blocks.4.hook_resid_pre",
        "dictionary": {"size": 200, "decoder_norm": "free", "initialisation": "transposed", "decoder_init_norm": 0.1},
        "objective": {"kind": "e2e", "sparsity": {"coefficient": 0.3, **sparsity}},
        "data": {"context": 32},
        "training": {
            "tokens": 2048,
            "batch": 4,
            "learning_rate": 1e-2,
            "log_every": 1,
            "checkpoint_every": 5,
            "keep_checkpoints": 9,
        },
        "evaluation": {"tokens": 512, "during_training_tokens": 128, "bootstrap": 20},
        "out": str(out),
    }
