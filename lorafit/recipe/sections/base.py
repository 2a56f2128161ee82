"""What every section shares: frozen, strict, no unknown key, no NaN."""

from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

Value = TypeVar("Value")


class FrozenDict(dict[str, Value]):
    """A mapping of a loaded recipe: reads like a dict, refuses to be changed."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a recipe is frozen after loading")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, Value]]]:
        return FrozenDict, (dict(self),)


Frozen = AfterValidator(FrozenDict)
"""Makes a dict field read-only."""

Names = Annotated[tuple[str, ...], Strict(False)]
"""A YAML list of names, kept as a tuple so that a loaded recipe cannot be changed."""

Index = Annotated[int, Field(ge=0)]

Indices = Annotated[tuple[Index, ...], Strict(False)]
"""A YAML list of whole numbers from 0, kept as a tuple."""

Extra = Annotated[dict[str, Any], Frozen]
"""Further keys of the library object, passed through as they are."""


class Section(BaseModel):
    """One mapping of a recipe. Strict: `true` is not 1, `"3"` is not 3, NaN is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
