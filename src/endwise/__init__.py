"""endwise: sparse autoencoders trained on what a language model does, not only on what one layer contains.

    import endwise

    run = endwise.train("embedded-layer3-e2e")                   # one SAE, end to end
    endwise.evaluate(run.folder)                                 # L0, alive features, CE increase, ...
    sae = endwise.SAE.load(run.folder)                           # SAELens's layout
    model = endwise.load_model("embedded")
    with endwise.spliced(model, {"blocks.3.hook_resid_pre": sae}):
        ...                                                      # the model runs on its reconstruction

Names are imported on first use (`__init__.pyi` lists them), so that `import endwise` costs nothing.
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
