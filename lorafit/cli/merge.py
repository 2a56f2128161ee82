"""`lorafit merge` and `lorafit combine`."""

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from lorafit.cli.app import AsJson, Debug, Quiet, app, counting, print_result, quiet_libraries
from lorafit.imports import quick_imports
from lorafit.merging.processes import processes


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a plain PEFT adapter directory.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: RUN/merged.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option("--dtype", help="Type of the weights; by default each keeps the base's."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="As in 5GB; by default the base's files.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Hub id or directory, instead of the recorded base.")
    ] = None,
    onto: Annotated[
        Literal["original", "dequantized", "auto"] | None,
        typer.Option("--onto", help="After training in 4 or 8 bits: which weights to merge into (merge.base)."),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Read it back and compare it with base + adapter (merge.verify)."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base: a standalone model that plain transformers loads."""
    with quick_imports():
        quiet_libraries(debug=debug, reads_rows=False)
    with processes() if verify is not False else nullcontext() as those_that_verify:  # import while this one does
        with quick_imports():
            from lorafit.data.cache import cache_directory
            from lorafit.merging.merge import merge as merge_adapter
            from lorafit.report.merge import merge_table

        result = merge_adapter(
            run,
            out=out,
            dtype=dtype,
            max_shard_size=max_shard_size,
            base=base,
            onto=onto,
            verify=verify,
            progress=partial(counting(quiet=quiet), "merge: bytes written"),
            cache_dir=cache_directory(),
            processes=those_that_verify,
        )
    print_result(asdict(result), as_json=as_json, text=merge_table(result))


@app.command()
def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="RUN:WEIGHT...", help="Run or adapter directories, each with its weight.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the new adapter goes; never overwritten.")],
    method: Annotated[
        Literal[
            "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "magnitude_prune"
        ],
        typer.Option("--method", help="cat is the exact sum; svd the nearest to it of one rank."),
    ] = "cat",
    density: Annotated[
        float | None, typer.Option("--density", help="Share of entries that ties, dare and magnitude_prune keep.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the new adapter, for the svd methods.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="For dare, which drops entries at random.")] = 0,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Hub id or directory, instead of the recorded base.")
    ] = None,
    loss: Annotated[bool, typer.Option(help="Compare the held-out losses of the runs; loads the base.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make one adapter of several of the same base."""
    with quick_imports():
        quiet_libraries(debug=debug)
        from lorafit.data.cache import cache_directory
        from lorafit.merging.combine import combine as combine_adapters
        from lorafit.merging.combine import weighted
        from lorafit.report.merge import combine_table

    result = combine_adapters(
        [weighted(text) for text in adapters],
        out=out,
        method=method,
        density=density,
        rank=rank,
        seed=seed,
        base=base,
        with_losses=loss,
        cache_dir=cache_directory(),
    )
    print_result(asdict(result), as_json=as_json, text=combine_table(result))
