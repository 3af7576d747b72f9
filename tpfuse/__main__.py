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
        list[int] | None, typer.Option(help="Ranks, 2 to 8; may be repeated. 2, 4, 8 if not given; N under torchrun.")
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


@app.command()
def explain(
    config: Annotated[Path, typer.Argument(help="A Hugging Face configuration: a folder, or a JSON file.")],
    ranks: Annotated[int, typer.Option(help="Ranks of the whole TP group.")] = 8,
    policy: Annotated[Path | None, typer.Option(help="A sharing policy as JSON; if not given, dp_size 1.")] = None,
    mode: Annotated[str, typer.Option(help="decode, prefill or training.")] = "decode",
    memory: Annotated[float, typer.Option(help="GiB of a GPU that weights may take, for the recommendation.")] = 64.0,
    html: Annotated[Path | None, typer.Option(help="Write a page with the picture of the layers here.")] = None,
) -> None:
    """Say what would be fused in a model, from its configuration alone: no weights, no GPU."""
    from .cli import explain as explaining
    from .errors import TPFuseError
    from .page import page
    from .policy import SharingPolicy

    try:
        stated = SharingPolicy.from_json(policy.read_text(encoding="utf-8")) if policy is not None else None
        explained = explaining.run(config, ranks, stated, mode, memory)
    except (TPFuseError, OSError) as error:
        typer.echo(f"explain: {error}", err=True)
        raise typer.Exit(1) from error
    text = list(explaining.lines(explained))
    typer.echo(explained.report.table(explained.times, explained.names))
    typer.echo("\n".join(["", *text]))
    if html is not None:
        written = page(explained.report, explained.title, explained.times, explained.names, ["\n".join(text)])
        html.write_text(written, encoding="utf-8")
        typer.echo(f"the page is {html}")


@app.command()
def doctor() -> None:
    """Say what will run on this machine, what is missing, and how to get it; exit 1 if the kernels cannot run."""
    from .cli.doctor import examine, shown

    findings = examine()
    typer.echo(shown(findings))
    if any(finding.fatal for finding in findings):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
