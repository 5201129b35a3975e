"""Rows of Neuronpedia's tables: the columns that an import takes, by their names there.

From `apps/webapp/prisma/schema.prisma` of github.com/hijohnnylin/neuronpedia. Columns that have a default there and of
which a harvest says nothing (UMAP, alignment with neurons, correlations by Pearson) are left out; the times of creation
too, which default to that of the import. Neuronpedia refuses a column that it does not know, so there is none of our
own.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(min_length=1)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Visibility = Literal["PUBLIC", "UNLISTED", "PRIVATE"]


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Model(Row):
    id: Name
    displayNameShort: str
    displayName: str
    creatorId: Name
    instruct: bool = False
    layers: Annotated[int, Field(ge=0)] = 0
    neuronsPerLayer: Annotated[int, Field(ge=0)] = 0
    """Of the model's own neurons, of which nothing is exported."""
    owner: str = ""
    visibility: Visibility = "PUBLIC"


class SourceRelease(Row):
    name: Name
    description: str
    creatorName: str
    creatorId: Name
    urls: list[str] = []
    visibility: Visibility = "PUBLIC"


class SourceSet(Row):
    modelId: Name
    name: Name
    description: str
    creatorName: str
    creatorId: Name
    releaseName: Name
    urls: list[str] = []
    visibility: Visibility = "PUBLIC"


class Source(Row):
    id: Name
    modelId: Name
    setName: Name
    creatorId: Name
    num_prompts: Index
    num_tokens_in_prompt: Index
    dataset: str
    notes: str
    hasDashboards: bool = True
    visibility: Visibility = "PUBLIC"


class Neuron(Row):
    """A feature."""

    modelId: Name
    layer: Name
    """The source's id."""
    index: Annotated[str, Field(pattern=r"^\d+$")]
    creatorId: Name
    sourceSetName: Name
    maxActApprox: Annotated[float, Field(ge=0)]
    frac_nonzero: Annotated[float, Field(ge=0, le=1)]
    freq_hist_data_bar_values: list[float]
    """The middles of the bars."""
    freq_hist_data_bar_heights: list[float]
    pos_str: list[str]
    pos_values: list[float]
    neg_str: list[str]
    neg_values: list[float]

    @model_validator(mode="after")
    def _parallel(self) -> "Neuron":
        pairs = (
            (self.freq_hist_data_bar_values, self.freq_hist_data_bar_heights),
            (self.pos_str, self.pos_values),
            (self.neg_str, self.neg_values),
        )
        if any(len(a) != len(b) for a, b in pairs):
            raise ValueError("bars need a height each, and tokens a value each")
        return self


class Activation(Row):
    """A stretch of text with the feature's activation at each token."""

    id: Name
    modelId: Name
    layer: Name
    index: Annotated[str, Field(pattern=r"^\d+$")]
    creatorId: Name
    tokens: Annotated[list[str], Field(min_length=1)]
    values: list[float]
    maxValue: float
    maxValueTokenIndex: Index
    minValue: float
    dataIndex: str | None
    dataSource: str | None
    binMin: float | None
    """−1 for the greatest activations; else the least of the interval that the text was drawn from."""
    binMax: float | None
    binContains: float | None
    """−1 for the greatest activations; else the share of all activations that the interval holds."""
    qualifyingTokenIndex: Index | None
    """The token that was drawn, which may be another than that of the greatest value."""

    @model_validator(mode="after")
    def _whole(self) -> "Activation":
        if len(self.tokens) != len(self.values):
            raise ValueError("tokens and values must have one length")
        if self.values[self.maxValueTokenIndex] != self.maxValue or self.maxValue != max(self.values):
            raise ValueError("maxValueTokenIndex must name the greatest value, maxValue")
        if self.minValue != min(self.values):
            raise ValueError("minValue must be the least value")
        return self
