"""Options of commands that say how a study searches. Imports nothing heavy."""

from typing import Annotated

import typer

Sampler = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="tpe, gp, random, grid or qmc.  [default: tpe]"),
]
Pruner = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="rungs, median, hyperband or none.  [default: rungs]"),
]
Tries = Annotated[
    list[str] | None,
    typer.Option(
        "--try",
        metavar="lr=1e-3,...",
        help="To be tried first: values of searched fields, or tutorial. May be repeated.",
    ),
]
Earlier = Annotated[
    str | None,
    typer.Option("--from", metavar="STUDY", help="Begin with the best trials of another study."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="A field that all trials share. May be repeated."
    ),
]
Modules = Annotated[
    str | None,
    typer.Option(
        "--module", metavar="PACKAGE:CLASS", help="LightningModule of your own, or several: A,B."
    ),
]
