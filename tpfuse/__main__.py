"""The command line: `tpfuse demo` and others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Fused all-reduce + residual + norm for tensor-parallel models under torch.compile.",
)


@app.callback()
def _main() -> None:
    """Keeps subcommands visible while there is only one."""


@app.command()
def demo(
    family: Annotated[
        list[str] | None, typer.Option(help="llama, qwen3 or deepseek_v3; may be repeated. All if not given.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo-output"),
) -> None:
    """Run real architectures on two processes, with and without tpfuse, and compare."""
    from .cli.demo import FAMILIES, DemoError, run

    unknown = [name for name in family or [] if name not in FAMILIES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; allowed: {', '.join(FAMILIES)}", param_hint="--family")
    try:
        print(run(family, output))
    except DemoError as error:
        typer.echo(f"demo: FAILED: {error}")
        raise typer.Exit(1) from error


@app.command()
def tune(
    output: Annotated[Path, typer.Option(help="Where the dispatch table goes.")] = Path("dispatch-table.json"),
    ranks: Annotated[
        list[int] | None, typer.Option(help="Ranks: 2, 4, 8; may be repeated. All if not given; N under torchrun.")
    ] = None,
    hidden: Annotated[list[int] | None, typer.Option(help="Hidden sizes; may be repeated.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows (tokens) of a call; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be measured; needs no GPU.")] = False,
) -> None:
    """Measure the kernels on this machine and write the dispatch table that follows.

    On one GPU with virtual ranks; `torchrun --nproc-per-node N -m tpfuse tune` measures over N linked GPUs.
    """
    from .cli import tune as tuning
    from .errors import TPFuseError

    here = tuning.ranks_here()
    linked = here > 1
    try:
        if linked and ranks not in (None, [here]):
            raise typer.BadParameter(f"{ranks}; torchrun started {here} processes", param_hint="--ranks")
        worlds = (here,) if linked else tuple(ranks or tuning.WORLDS)
        usual = tuning.ROWS + tuning.MORE_ROWS if linked else tuning.ROWS
        plan = tuning.Plan(worlds, tuple(hidden or tuning.HIDDEN), tuple(rows or usual), linked)
        if dry_run:
            typer.echo(tuning.explain(plan, output))
        else:
            tuning.tune(plan, output, typer.echo)
    except TPFuseError as error:
        typer.echo(f"tune: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
