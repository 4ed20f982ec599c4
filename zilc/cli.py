"""The commands: each parses, calls one library function, and prints."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import click

from zilc import options as shared


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A sign of life on stderr while something takes its time; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


@contextlib.contextmanager
def progress(what: str) -> Iterator[Bar]:
    """A bar on stderr; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    # stdout belongs to results: it may be a file while stderr is a terminal.
    with Progress(
        *columns, console=Console(stderr=True, highlight=False), transient=True, redirect_stdout=False
    ) as bar:
        yield Bar(bar, what)


class Bar:
    """A progress bar, or nothing."""

    def __init__(self, bar: Any = None, what: str = "") -> None:
        self._bar = bar
        self._task = bar.add_task(what, total=None) if bar else None

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total``."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)

    def line(self, text: str) -> None:
        """A line of results, above the bar where both share a terminal."""
        if self._bar and sys.stdout.isatty():
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            click.echo(text)

    def log(self, text: str) -> None:
        """A line of the log."""
        if self._bar:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            click.echo(text, err=True)


class Commands(click.Group):
    """Commands in the order in which they are used, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"zilc {version('zilc')}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
              help="Print the version.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def zilc(debug: bool) -> None:
    """Compile an ONNX model into one exact predictive-coding (Z-IL) training step in standard ONNX operators.

    Results go to stdout, progress and errors to stderr.

    \b
    Example:
        zilc levelize model.onnx
        zilc emit-training model.onnx --loss cross-entropy --optimizer adam
    """  # fmt: skip


# --- levelize -------------------------------------------------------------------------------------------------


@zilc.command()
@shared.model
@click.option("-o", "--out", type=click.Path(), metavar="OUT.onnx", help="Write the levelled model here.")
@click.option("--identities", type=click.Choice([*shared.PLACEMENTS, "none"]), default="shared", show_default=True,
              help="A chain of identity vertices an edge or a tensor; the fewest vertices or bytes; or only report.")
@shared.pictures
@shared.selection
@shared.rules
@shared.as_json
def levelize(
    model: str, out: str | None, identities: str, html: str | None, svg: str | None, png: str | None, as_json: bool,
    **given: Any,
) -> None:
    """Show a model's level structure; write it levelled.

    With -o the model is written with identity vertices on every edge that skips levels; levelizing twice changes
    nothing.  Prints K, the vertices and identities on each level, what the identities cost by each placement, the
    longest skips, and each parameter's level and update step.  --html, --svg and --png draw the graph level by level.

    \b
    Example:
        zilc levelize model.onnx -o model.levelled.onnx
        zilc levelize model.onnx --html levels.html --svg levels.svg
        zilc levelize model.onnx --json | jq .levels
    """
    if out and identities == "none":
        raise click.UsageError("--identities none only reports; leave out -o, or choose edge, shared or min.")
    from zilc import figures, onnx_io, pipeline

    if svg or png:
        figures.require()
    with working("levels"):
        made = pipeline.levelize(model, identities=identities, **shared.selection_of(given))  # type: ignore[arg-type]
        _write(
            (out, lambda path: onnx_io.save(made.model, path, base_dir=str(Path(model).parent))),
            (html, lambda path: path.write_text(made.html(), "utf-8")),
            (svg, lambda path: path.write_bytes(made.figure("svg"))),
            (png, lambda path: path.write_bytes(made.figure("png"))),
        )
    from zilc import show

    written = [path for path in (out, html, svg, png) if path]
    if as_json:
        click.echo(show.document({**made.report, "written": out, "pictures": {"html": html, "svg": svg, "png": png}}))
    else:
        show.levels(show.Page(), made.report, written)


def _write(*files: tuple[str | None, Callable[[Path], object]]) -> None:
    """Write the files that are asked for, those with a path: all of them, or none."""
    from zilc.errors import FileError
    from zilc.files import HINT, together

    wanted = [(path, make) for path, make in files if path]
    with together(*(path for path, _ in wanted)) as stand_ins:
        for (path, make), target in zip(wanted, stand_ins, strict=True):
            try:
                make(target)
            except OSError as error:
                raise FileError(f"cannot be written ({error.strerror or error})", where=path, hint=HINT) from error


# --- emit-training --------------------------------------------------------------------------------------------


@zilc.command("emit-training")
@shared.model
@click.option("-o", "--out", type=click.Path(), metavar="STEP.onnx",
              help="The training graph. Default: MODEL.step.onnx beside the model.")
@click.option("--state", type=click.Path(), metavar="STATE.safetensors|none",
              help="Initial parameters and optimizer slots. Default: STEP.safetensors beside the graph; none: no file.")
@shared.selection
@shared.rules
@shared.training
@shared.costs
@click.option("--target", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Where it will run fastest: which forms of gradients are emitted. It runs elsewhere as well.")
@click.option("--trace", is_flag=True,
              help="Give errors, movements and energies of every step and vertex as outputs (literal schedule).")
@shared.full
@shared.as_json
def emit_training(
    model: str, out: str | None, state: str | None, target: Literal["cpu", "cuda"], trace: bool, full: tuple[str, ...],
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Emit a graph that computes one training update.

    It holds standard ONNX operators alone.  One run is one update: feed each PARAM.next back as PARAM.  The graph's
    interface is written in its metadata (zilc.signature).  Prints what is trained, what is left out and
    why, and the graph's inputs and outputs.

    \b
    Example:
        zilc emit-training model.onnx --loss cross-entropy --optimizer adam -o model.step.onnx
        zilc emit-training model.onnx --outputs grad --wrt 'head.*' --state none
        zilc emit-training model.onnx --dim N=32 --memory-budget 512MiB
        zilc emit-training model.onnx --target cuda --precision bfloat16
    """
    from zilc import pipeline
    from zilc.checkpoint import state_path
    from zilc.errors import FileError
    from zilc.files import save_step

    source = Path(model)
    graph_path = Path(out) if out else source.parent / f"{source.name.removesuffix('.onnx')}.step.onnx"
    if graph_path.is_dir():
        raise FileError("is a folder, expected a file name", where=str(graph_path))
    beside = None if state == "none" else Path(state) if state else state_path(graph_path)
    with working("training graph"):
        options = {**shared.selection_of(given), **shared.training_of(given), **shared.costs_of(given)}
        step = pipeline.emit_training(model, trace=list(full) or trace, target=target, **options)
        save_step(step, graph_path, beside)
    from zilc import show

    data = {
        "report": step.report,
        "signature": step.signature,
        "graph": show.graph_data(step.model),
        "written": {"graph": str(graph_path), "state": str(beside) if beside else None},
    }
    if as_json:
        click.echo(show.document(data))
    else:
        show.training(show.Page(), data)


# --- verify ---------------------------------------------------------------------------------------------------


@zilc.command()
@shared.model
@shared.selection
@shared.rules
@shared.training
@click.option("--precision", type=click.Choice(["float32", "float64"]), default="float32", show_default=True,
              help="Precision of the training graphs; differences are always taken in float64.")
@click.option("--inputs", type=click.Path(), metavar="FEEDS.npz",
              help="Arrays by input name, targets among them if you like. Default: random ones.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of feeds and directions.")
@click.option("--certificate", type=click.Path(), metavar="FILE",
              help="Write a page and a JSON document to cite, FILE.html and FILE.json: both precisions, an independent "
                   "reverse mode, every ablation.")
@click.option("--ablations/--no-ablations", default=True, show_default=True,
              help="Ablations in the certificate; each takes as many forward and backward passes as there are levels.")
@shared.as_json
@click.pass_context
def verify(
    ctx: click.Context, model: str, precision: str, inputs: str | None, seed: int, certificate: str | None,
    ablations: bool, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Compare Z-IL with reverse mode and with differences.

    Both training graphs are emitted and run on the same feeds and compared bit by bit; central differences are taken in
    float64 on the model itself (with --mode train, on the model in training form with its masks held), along several
    random directions a parameter.  Exit status 1 if any comparison fails:
    so does inference learning, and every option that breaks a condition of the theorem.

    With --certificate everything is measured in both precisions, against an independent reverse mode too, and so is
    every ablation; the status is 1 if one of its checks fails.

    \b
    Example:
        zilc verify model.onnx --loss cross-entropy --precision float64
        zilc verify model.onnx --inputs batch.npz --json
        zilc verify model.onnx --loss cross-entropy --certificate model.certificate
    """
    from zilc import optimizers, verification

    training = shared.training_of(given)
    optimizers.make(training["optimizer"], training["options"])  # plays no part in gradients, but must make sense
    if certificate:
        _certificate(ctx, model, certificate, ablations, inputs, seed, as_json, shared.selection_of(given), training)
        return
    wanted = {key: training[key] for key in ("loss", "class_axis", *shared.DYNAMICS)}
    with progress("differences") as bar:
        found = verification.verify(
            model, precision=precision, inputs=inputs, seed=seed, progress=bar,  # type: ignore[arg-type]
            **shared.selection_of(given), **wanted,
        )  # fmt: skip
    from zilc import show

    if as_json:
        click.echo(show.document(found.data))
    else:
        show.verification(show.Page(), found.data)
    if not found.passed:
        ctx.exit(1)


def _certificate(
    ctx: click.Context, model: str, place: str, ablations: bool, inputs: str | None, seed: int, as_json: bool,
    selection: dict[str, Any], training: dict[str, Any],
) -> None:  # fmt: skip
    """``zilc verify --certificate``: every variant and both precisions are measured, so none can be chosen."""
    if training["mode"] != "eval":
        raise click.UsageError("--certificate measures the model as the file has it; leave out --mode train.")
    for name in ("precision", *shared.DYNAMICS):
        given = ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        if given and name not in ("identities", "mode"):
            raise click.UsageError(f"--certificate measures every variant; leave out --{name.replace('_', '-')}.")
    placement = training["identities"] or "shared"
    if placement == "none":
        raise click.UsageError("--certificate measures Z-IL on a levelled graph; leave out --identities none.")
    import shlex

    from zilc import certificate, show

    with progress("certificate") as bar:
        made = certificate.certify(
            model, loss=training["loss"], class_axis=training["class_axis"],
            identities=placement,  # type: ignore[arg-type]
            inputs=inputs,
            seed=seed, ablations=ablations, progress=bar,
            command=shlex.join(["zilc", *(ctx.find_object(list) or sys.argv[1:])]), **selection,
        )  # fmt: skip
        written = [str(path) for path in made.save(place)]
    if as_json:
        click.echo(show.document(made.data))
    else:
        show.certificate(show.Page(), made.data, written)
    if not made.passed:
        ctx.exit(1)


# --- trace ----------------------------------------------------------------------------------------------------


@zilc.command()
@shared.model
@click.option("--data", type=click.Path(), metavar="FEEDS.npz",
              help="One batch: arrays by input name, targets among them if you like. Default: random ones.")
@click.option("-o", "--out", type=click.Path(), metavar="TRACE.npz",
              help="Write the arrays here; docs/TRACES.md says what they are.")
@shared.pictures
@click.option("--alone", is_flag=True, help="Draw this algorithm alone, without the other one beside it.")
@shared.selection
@shared.rules
@shared.tracing
@shared.full
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of random feeds.")
@shared.as_json
def trace(
    model: str, data: str | None, out: str | None, html: str | None, svg: str | None, png: str | None, alone: bool,
    full: tuple[str, ...], seed: int, as_json: bool, **given: Any,
) -> None:
    """Record every inference step of one batch.

    Runs the literal dynamics once and records, for each step and vertex, the prediction error, the movement of the
    value node and the energy.  Prints the energy step by step and which parameters learn when; -o writes the arrays.
    --html shows the graph and the energies of its levels, with inference learning (or Z-IL) on the same batch beside
    them; --svg and --png draw the energies.

    \b
    Example:
        zilc trace model.onnx --data feeds.npz -o trace.npz --html trace.html
        zilc trace model.onnx --algorithm il --steps 100 --gamma 0.1 --full block1/Add -o il.npz
        zilc trace model.onnx --loss cross-entropy --svg wave.svg
    """
    from zilc import figures, pipeline, tracing

    if svg or png:
        figures.require()
    selection = shared.selection_of(given)
    options = shared.tracing_of(given)
    shared_options = {key: options[key] for key in ("loss", "class_axis", "mode")}
    same = {**selection, **shared_options, "data": data, "seed": seed}
    found: list[tracing.Trace] = []
    with working("inference"):
        found.append(tracing.trace(model, full=full, **{**options, **same}))
        if not alone and (html or svg or png):
            other = "il" if options["algorithm"] == "zil" else "zil"
            found.append(tracing.trace(model, algorithm=other, **same))  # type: ignore[arg-type]
    placement = next((f.identities for f in found if f.identities != "none"), "none")

    def page(path: Path) -> None:
        levelled = pipeline.levelize(model, identities=placement, **selection)  # type: ignore[arg-type]
        path.write_text(levelled.html(traces=found), "utf-8")

    with working("pictures"):
        _write(
            (out, found[0].write),
            (html, page),
            (svg, lambda path: path.write_bytes(figures.waves(found, "svg"))),
            (png, lambda path: path.write_bytes(figures.waves(found, "png"))),
        )
    from zilc import show

    written = [path for path in (out, html, svg, png) if path]
    if as_json:
        click.echo(show.document({**found[0].data(), "written": written}))
    else:
        show.trace(show.Page(), found[0].data(), written)


# --- train ----------------------------------------------------------------------------------------------------


@zilc.command()
@shared.model
@click.option("--data", type=click.Path(), required=True, metavar="TRAIN.npz",
              help="Examples along axis 0: arrays named like the model's inputs, and 'target'.")
@click.option("--val", type=click.Path(), metavar="VAL.npz", help="Held-out examples, looked at after each epoch.")
@shared.selection
@shared.rules
@shared.training
@shared.costs
@click.option("--lr", type=float, required=True, metavar="X", help="Learning rate.")
@click.option("--epochs", type=int, required=True, metavar="N", help="Passes over the data.")
@click.option("--batch-size", type=int, required=True, metavar="N", help="Examples an update.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where onnxruntime runs; auto takes CUDA where it works.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N",
              help="Seed of the order of examples, and of Dropout's masks.")
@click.option("-o", "--out", type=click.Path(), required=True, metavar="TRAINED.onnx",
              help="The model with its trained weights.")
@shared.as_json
def train(model: str, data: str, val: str | None, out: str, as_json: bool, **given: Any) -> None:
    """Train a model on an .npz file of examples.

    Writes the model with its new weights; everything else in the model stays as it was.  Prints a line an epoch: the
    mean loss, the accuracy where the loss has one, and the same of held-out data.

    \b
    Example:
        zilc train model.onnx --data train.npz --val val.npz --loss cross-entropy \\
            --optimizer adam --lr 0.001 --epochs 10 --batch-size 32 -o trained.onnx
    """
    if given["outputs"] == "grad":
        raise click.UsageError("--outputs grad gives no updates to train with; leave it out.")
    from zilc import show
    from zilc import train as trainer

    options = {**shared.selection_of(given), **shared.training_of(given), **shared.costs_of(given)}
    epochs = given["epochs"]
    with progress("updates") as bar:

        def start(_trainer: Any, device: str, notes: list[str]) -> None:
            for note in [device, *notes]:
                bar.log(note)

        made = trainer.train(
            model, data, out=out, val=val, **given, **options, on_start=start,
            on_batch=lambda p: bar((p.epoch - 1) * p.batches + p.batch, p.epochs * p.batches),
            on_epoch=None if as_json else lambda entry: bar.line(show.epoch(entry, epochs)),
        )  # fmt: skip
    if as_json:
        facts = {"model": model, "written": str(made.path), "device": made.device, "providers": made.providers}
        click.echo(show.document({**facts, "history": made.history, "notes": made.notes}))
    else:
        show.trained(show.Page(), made.history, str(made.path))


# --- ops ------------------------------------------------------------------------------------------------------


@zilc.command()
@shared.as_json
def ops(as_json: bool) -> None:
    """List the operators and how a gradient passes each.

    \b
    Example:
        zilc ops
        zilc ops | grep missing
    """
    from zilc import coverage, show

    data = coverage.operators()
    if as_json:
        click.echo(show.document(data))
    else:
        show.operators(show.Page(), data)


# --- demo -----------------------------------------------------------------------------------------------------


@zilc.command()
@click.option("--seed", type=int, default=0, show_default=True, metavar="N",
              help="Seed of initial parameters, order and shifts.")
@click.option("-o", "--out", type=click.Path(), default="demo", show_default=True, metavar="FOLDER",
              help="Where the files go.")
@shared.as_json
def demo(seed: int, out: str, as_json: bool) -> None:
    """Train a small network on handwritten digits with Z-IL.

    Builds a convolutional network with skips, shows its levels, emits the training graph, compares its gradients
    with reverse mode, trains it in onnxruntime for some seconds, and writes every model on the way.

    \b
    Example:
        zilc demo
        zilc demo --seed 1 -o /tmp/digits
    """
    from zilc import demo as digits
    from zilc import show

    with progress("updates") as bar:
        found = digits.run(out, seed=seed, say=(lambda _: None) if as_json else bar.line, advance=bar)
    if as_json:
        click.echo(show.document(found))
