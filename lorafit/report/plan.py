"""`lorafit plan` for people."""

from __future__ import annotations

from lorafit.planning.answer import PARTS, Plan, gib


def plan_text(plan: Plan) -> str:
    """The peak by part."""
    lines = [f"  {part:<22} {gib(plan.parts[part]):>12}" for part in PARTS if plan.parts.get(part)]
    return "\n".join([*lines, plan.line()])
