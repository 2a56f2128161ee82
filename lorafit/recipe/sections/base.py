"""What every section shares: frozen, strict, no unknown key, no NaN."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Strict

Names = Annotated[tuple[str, ...], Strict(False)]
"""A YAML list of names, kept as a tuple so that a loaded recipe cannot be changed."""

Indices = Annotated[tuple[int, ...], Strict(False)]
"""A YAML list of whole numbers, kept as a tuple."""

Extra = dict[str, Any]
"""Further keys of the library object, passed through as they are."""


class Section(BaseModel):
    """One mapping of a recipe. Strict: `true` is not 1, `"3"` is not 3, NaN is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
