"""`lorafit targets` for people: the table, and the lines to paste into a recipe."""

from __future__ import annotations

from lorafit.planning.targets import Choice, Target, TargetTable

COLUMNS = ("name", "kind", "out x in", "count", "part", "parameters", "of base", "LoRA", "all-linear")


def target_table_text(table: TargetTable) -> str:
    """The table with its arithmetic, one line a column of names; ends with `target_modules` lines to paste."""
    rows = [COLUMNS, *(_cells(target, table=table) for target in table.targets)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    is_number = [name in ("count", "parameters", "of base", "LoRA") for name in COLUMNS]
    lines = [
        f"{table.architecture}: {table.parameters:,} parameters. LoRA: {table.r} x (in + out) x count at r = {table.r}",
        "",
        *(
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, is_number, strict=True)
            ).rstrip()
            for row in rows
        ),
        "",
        *_all_linear(table),
        *_to_paste("attention only (LoRA, arXiv 2106.09685)", table.attention(), table=table),
    ]
    if table.experts().names and not table.takes_experts():
        lines += _to_paste(
            "experts besides, as parameters: all-linear leaves them out",
            table.experts(),
            table=table,
            key="target_parameters",
        )
    return "\n".join(lines)


def _all_linear(table: TargetTable) -> tuple[str, ...]:
    choice = table.all_linear()
    if not table.takes_experts():
        return _to_paste("all-linear, the default (QLoRA, arXiv 2305.14314)", choice, table=table)
    ranks = {target.all_linear_rank: target.name for target in table.targets if target.all_linear}
    doubled = f", {ranks[max(ranks)]} at r = {max(ranks)}" if len(ranks) > 1 else ""
    title = f"all-linear, the default: peft takes experts and router along{doubled}"
    return (_to_paste(title, choice, table=table)[0], "  target_modules: all-linear")


def _cells(target: Target, *, table: TargetTable) -> tuple[str, ...]:
    return (
        target.name,
        target.kind,
        " x ".join(f"{length}" for length in target.shape),
        f"{target.count}",
        target.part,
        f"{target.parameters:,}",
        f"{target.parameters / table.parameters:.1%}",
        f"{target.lora_parameters * (target.all_linear_rank or table.r) // table.r:,}",
        "yes" if target.all_linear else "-",
    )


def _to_paste(title: str, choice: Choice, *, table: TargetTable, key: str = "target_modules") -> tuple[str, ...]:
    share = choice.lora_parameters / table.parameters
    return (
        f"{title}: {choice.lora_parameters:,} LoRA parameters, {share:.2%} of the base",
        f"  {key}: [{', '.join(choice.names)}]",
    )
