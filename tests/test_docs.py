"""The pages that explain lorafit: the reference is what the sections say."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import recipe_reference  # noqa: E402

from lorafit.recipe.fields import places  # noqa: E402
from lorafit.recipe.recipe import Recipe  # noqa: E402


def test_the_reference_is_made_from_the_sections() -> None:
    shown = recipe_reference.PAGE.read_text(encoding="utf-8")
    assert shown == recipe_reference.page(), "write it anew: python scripts/recipe_reference.py"


def test_the_reference_has_every_key() -> None:
    """Those of sections as headings of two marks, all others of three."""
    lines = recipe_reference.PAGE.read_text(encoding="utf-8").splitlines()
    headings = {line.lstrip("#").strip().replace("[]", "") for line in lines if line.startswith("##")}
    keys = {".".join(place) for place in places()}
    assert len(keys) > 120 and {*Recipe.model_fields} < keys
    assert keys - headings == set()
