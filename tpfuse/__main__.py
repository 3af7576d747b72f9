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
    from .demo import FAMILIES, DemoError, run

    unknown = [name for name in family or [] if name not in FAMILIES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; allowed: {', '.join(FAMILIES)}", param_hint="--family")
    try:
        print(run(family, output))
    except DemoError as error:
        typer.echo(f"demo: FAILED: {error}")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
