"""The axes of every tensor in endwise, as jaxtyping names them in signatures.

| name       | meaning                                                       |
|------------|---------------------------------------------------------------|
| `batch`    | sequences                                                     |
| `pos`      | token positions within a sequence                             |
| `d_model`  | width of the site (of the residual stream, unless said)       |
| `d_sae`    | dictionary size: number of features                           |
| `vocab`    | size of the model's vocabulary                                |
| `n`        | any number of rows, usually `batch * pos` flattened           |

The annotations are checked at run time under pytest only (`make test`, tests/shapes), so that they
cost nothing in use.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
"""Token ids."""

TokenMask = Bool[Tensor, "batch pos"]
"""True where a position counts in losses and metrics."""

Activation = Float[Tensor, "batch pos d_model"]
"""The value at a site, or a hidden state."""

AnyWidth = Float[Tensor, "batch pos _"]
"""The value at one of several sites, which need not be of one width."""
