"""The commands. Each one reads its arguments, calls the library and shows what came back."""

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from omniconv.cli.papers import app as papers_app
from omniconv.core.errors import OmniconvError, UsageError
from omniconv.core.units import parse_bytes, parse_seconds
from omniconv.core.version import __version__

__all__ = ["app", "run"]

# Newer typers carry their own click, older ones use the package: this is UsageError of whichever it is.
_CommandLineError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="omniconv",
    help="Train, explain, compress and deploy convolutional networks on your own data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(papers_app, name="papers")
weights_app = typer.Typer(help="Trained weights from elsewhere.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Data = Annotated[str, typer.Argument(help="Folder, table (CSV, Parquet), IDX or NPZ file, or: digits")]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, such as runs/001")]
Labels = Annotated[str | None, typer.Option(help="Table of labels for a folder of pictures.")]
Target = Annotated[list[str] | None, typer.Option(help="Label column; repeat it for several.")]
TaskOption = Annotated[
    str | None, typer.Option(help="classification, multilabel or regression; guessed by default.")
]
Group = Annotated[str | None, typer.Option(metavar="COLUMN", help="Keep equal values in one split.")]


def _show(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"omniconv {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, explain, compress and deploy convolutional networks on your own data."""


@app.command()
def check(
    data: Data,
    labels: Labels = None,
    task: TaskOption = None,
    target: Target = None,
    group: Group = None,
    as_json: Json = False,
) -> None:
    """Say what is in a data set and what is wrong with it; reads only."""
    from omniconv.cli.show import Bar, data_table
    from omniconv.pipeline.check import check_data

    with Bar("reading", quiet=as_json) as bar:
        found, problems = check_data(
            data, labels=labels, task=task, target=_columns(target), group=group, progress=bar.update
        )
    if as_json:
        _show(
            {
                "source": data,
                "samples": len(found),
                "task": found.schema.task,
                "classes": list(found.schema.classes),
                "channels": found.schema.channels,
                "height": found.schema.height,
                "width": found.schema.width,
                "problems": [
                    {"kind": p.kind, "severity": p.severity, "message": p.message, "ids": list(p.ids)}
                    for p in problems
                ],
            }
        )
    else:
        data_table(found, problems)
    if any(problem.severity == "error" for problem in problems):
        raise typer.Exit(3)


@app.command()
def fit(
    data: Annotated[str | None, typer.Argument(help="Folder, table, IDX or NPZ file, or: digits")] = None,
    task: TaskOption = None,
    model: Annotated[str | None, typer.Option(help="Network, as in: omniconv models")] = None,
    pretrained: Annotated[
        str | None, typer.Option(metavar="WEIGHTS", help="Start from a file of weights, or hub:OWNER/NAME.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Load WEIGHTS although they may run code.")] = False,
    labels: Labels = None,
    target: Target = None,
    group: Group = None,
    latency: Annotated[str | None, typer.Option(help="Longest time for one picture, such as 10ms.")] = None,
    size: Annotated[str | None, typer.Option(help="Largest exported file, such as 5MB.")] = None,
    time: Annotated[str | None, typer.Option(help="Training time, such as 10m or 2h.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training pictures.")] = None,
    plan: Annotated[str | None, typer.Option(help="An edited plan.yaml to follow.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[str | None, typer.Option(help="Run folder; by default the next below runs/.")] = None,
    export_to: Annotated[
        str, typer.Option("--export", help="Formats: torch, onnx, openvino, or none.")
    ] = "torch,onnx",
    workers: Annotated[int, typer.Option(min=0, help="Threads that decode pictures.")] = 2,
    skip_bad: Annotated[bool, typer.Option(help="Go on with more than 1% unreadable pictures.")] = False,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a stopped run.")] = None,
    as_json: Json = False,
) -> None:
    """Train a network on your pictures; evaluate, explain and export it."""
    if (data is None) == (resume is None):
        raise UsageError("name the data, or a run to continue with --resume RUN")
    from omniconv.cli.show import FitDisplay
    from omniconv.pipeline import api
    from omniconv.pipeline.config import FitConfig
    from omniconv.pipeline.train import Interrupted

    display = FitDisplay(quiet=as_json or int(os.environ.get("RANK", 0)) > 0)
    try:
        with display:
            if resume is not None:
                done = api.resume(resume, display.on_event)
            else:
                config = FitConfig.parse(
                    {
                        "data": data,
                        "labels": labels,
                        "task": task,
                        "target": _columns(target),
                        "group": group,
                        "model": model,
                        "pretrained": pretrained,
                        "trust": trust,
                        "plan": plan,
                        "epochs": epochs,
                        "seconds": parse_seconds(time) if time else None,
                        "latency": parse_seconds(latency) if latency else None,
                        "bytes": parse_bytes(size) if size else None,
                        "seed": seed,
                        "skip_bad": skip_bad,
                        "export": _formats(export_to) if export_to != "none" else [],
                        "workers": workers,
                    },
                    "fit",
                )
                done = api.start(config, out, display.on_event)
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(130) from None
    if int(os.environ.get("RANK", 0)) == 0:
        _show(done.summary) if as_json else display.finished(done)


@app.command()
def predict(
    run: RunArg,
    new: Annotated[str, typer.Argument(metavar="NEW", help="A picture, or a folder or table of them.")],
    out: Annotated[str | None, typer.Option(help="File to write: .csv or .json")] = None,
    as_json: Json = False,
) -> None:
    """Predict new pictures."""
    from omniconv.cli.show import prediction_table
    from omniconv.pipeline.use import predict as predict_with
    from omniconv.pipeline.use import write_predictions

    rows = predict_with(_run(run), new)
    if out is not None:
        write_predictions(rows, out)
    if as_json:
        _show(rows)
    else:
        prediction_table(rows, out)


@app.command("eval")
def evaluate(
    run: RunArg,
    test: Annotated[str, typer.Argument(metavar="TEST", help="Labelled pictures.")],
    labels: Labels = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Compare predictions with the labels of other pictures."""
    from omniconv.cli.show import metric_table

    result = _run(run).evaluate(test, labels=labels, target=_columns(target))
    if as_json:
        _show(result)
    else:
        metric_table(result)


@app.command()
def explain(
    run: RunArg,
    picture: Annotated[str, typer.Argument(help="A picture.")],
    out: Annotated[str | None, typer.Option(help="PNG to write; by default in the run folder.")] = None,
    as_json: Json = False,
) -> None:
    """Show where the network looks in a picture."""
    result = _run(run).explain(picture, out)
    if as_json:
        _show(result)
    else:
        sure = f" ({result['confidence']:.1%})" if "confidence" in result else ""
        typer.echo(f"{result['label']}{sure}; activation map: {result['map']}")


@app.command()
def export(
    run: RunArg,
    to: Annotated[str, typer.Option(help="Formats: torch, onnx, openvino, triton.")] = "torch,onnx",
    as_json: Json = False,
) -> None:
    """Write deployable forms with the preprocessing inside, verified on real pictures."""
    from omniconv.cli.show import export_table

    result = _run(run).export(*_formats(to))
    if as_json:
        _show(result)
    else:
        export_table(run, result)


@app.command()
def compress(
    run: RunArg,
    size: Annotated[str | None, typer.Option(help="Largest file, such as 2MB.")] = None,
    latency: Annotated[str | None, typer.Option(help="Longest time for one picture, such as 3ms.")] = None,
    max_drop: Annotated[str, typer.Option(help="Largest loss of the main metric, such as 1%.")] = "1%",
    out: Annotated[str | None, typer.Option(help="Folder to write; by default in the run folder.")] = None,
    as_json: Json = False,
) -> None:
    """Make a trained network smaller and faster: fewer channels, zeros, int8; what was tried is in compress.html."""
    from omniconv.cli.show import compress_table

    result = _run(run).compress(
        size=parse_bytes(size) if size else None,
        latency=parse_seconds(latency) if latency else None,
        max_drop=_share(max_drop),
        out=out,
    )
    if as_json:
        _show(result)
    else:
        compress_table(result)


@app.command()
def bench(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, such as runs/001, or: mixers")],
    as_json: Json = False,
) -> None:
    """Time a trained network in every form that it has, or compare token mixers in one small network."""
    if run == "mixers" and not Path(run).exists():
        from dataclasses import asdict

        from omniconv.cli.show import Bar, mixer_table
        from omniconv.papers.mixers import compare_mixers

        with Bar("training", quiet=as_json) as bar:
            rows = [asdict(scores) for scores in compare_mixers(progress=bar.update)]
        _show(rows) if as_json else mixer_table(rows)
        return
    from omniconv.cli.show import bench_table

    result = _run(run).bench()
    if as_json:
        _show(result)
    else:
        bench_table(result)


@app.command()
def serve(
    run: RunArg,
    host: Annotated[str, typer.Option(help="Address; other machines reach 0.0.0.0 only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Pictures computed together.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Pictures that may wait.")] = 64,
    timeout: Annotated[str, typer.Option(help="Longest time for a request.")] = "10s",
    max_size: Annotated[str, typer.Option(help="Largest picture file.")] = "20MB",
) -> None:
    """Serve a trained network over HTTP, with a page to try it."""
    from omniconv.deploy.serve import serve as serve_forever

    serve_forever(
        _run(run).predictor,
        host,
        port,
        on_start=lambda url: typer.echo(f"{run} at {url} (Ctrl-C ends it)"),
        max_batch=max_batch,
        queue=queue,
        timeout_s=parse_seconds(timeout),
        max_bytes=parse_bytes(max_size),
    )


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help='Shell pattern, such as "convnext*".')] = "*",
    as_json: Json = False,
) -> None:
    """List networks with their published parameters and multiply-adds."""
    from omniconv.cli.show import model_table
    from omniconv.models.factory import get_variant, list_models

    names = list_models(pattern)
    if not names:
        from omniconv.core.config import closest

        raise UsageError(f"no network matches {pattern!r}{closest(pattern, list_models())}")
    rows = []
    for name in names:
        variant = get_variant(name)
        rows.append(
            {"name": name, "parameters": variant.params, "multiply_adds": variant.macs, "size": variant.size}
        )
    if as_json:
        _show(rows)
    else:
        model_table(rows)


@app.command()
@weights_app.command()
def convert(
    file: Annotated[str, typer.Argument(help="PyTorch checkpoint (.pt, .pth, .bin, .ckpt) or safetensors.")],
    model: Annotated[
        str | None,
        typer.Option(help="Network that they are for: checks them, and renames an official repository's."),
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Load it although it may run code.")] = False,
    out: Annotated[str | None, typer.Option(help="safetensors file to write.")] = None,
) -> None:
    """Turn weights into safetensors, under the names of a network here."""
    from omniconv.pipeline.convert import convert_checkpoint

    typer.echo(f"wrote {convert_checkpoint(file, out, model=model, trust=trust)}")


@weights_app.command()
def fetch(
    source: Annotated[str, typer.Argument(metavar="hub:OWNER/NAME[@REVISION]")],
    as_json: Json = False,
) -> None:
    """Download weights from the Hugging Face Hub into its cache on this machine."""
    from omniconv.core.units import bytes_text
    from omniconv.models.hub import HubWeights

    found = HubWeights.parse(source).fetch()
    if as_json:
        _show(found)
    else:
        typer.echo(
            f"{found['path']}\n{bytes_text(found['bytes'])}, licence {found['licence']}, sha256 {found['sha256']}\n"
            f"from {found['from']}; the very same file again: {found['source']}"
        )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has: versions, processor, memory, accelerators, optional packages."""
    from omniconv.cli.show import doctor_table
    from omniconv.pipeline.doctor import examine

    found = examine()
    if as_json:
        _show(found)
    else:
        doctor_table(found)


def _run(path: str) -> Any:
    from omniconv.pipeline.run import Run

    return Run(path)


def _columns(target: list[str] | None) -> str | list[str] | None:
    return target[0] if target and len(target) == 1 else target


def _formats(text: str) -> list[str]:
    return [word for word in text.replace(" ", "").split(",") if word]


def _share(text: str) -> float:
    """Return the share that `1%` or `0.01` means."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"cannot read the share {text!r}; write 1% or 0.01")
    return value


def _usage_message(error: Any) -> str:
    """Return one sentence for a mistyped command line."""
    command = error.ctx.command if error.ctx else None
    if type(error).__name__ == "NoSuchOption":
        known = [option for parameter in command.params for option in parameter.opts] if command else []
        near = difflib.get_close_matches(error.option_name, known, n=1)
        return f"no option {error.option_name}" + (f"; did you mean {near[0]}?" if near else "")
    message = error.format_message().rstrip(".")
    if message.startswith("No such command") and command is not None:
        word = message.split("'")[1]
        near = difflib.get_close_matches(word, command.list_commands(error.ctx), n=1)
        return f"no command {word}" + (f"; did you mean {near[0]}?" if near else "; see omniconv --help")
    where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
    return message[:1].lower() + message[1:] + where


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; whatever goes wrong is said in one sentence on stderr."""
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="omniconv", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _CommandLineError as error:
        help_wanted = type(error).__name__ == "NoArgsIsHelpError"
        typer.echo(error.ctx.get_help() if help_wanted else _usage_message(error), err=not help_wanted)
        return 2
    except typer.Exit as error:
        return error.exit_code
    except OmniconvError as error:
        typer.echo(str(error), err=True)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return 130
    except MemoryError:
        typer.echo("out of memory; close other programs, or use fewer or smaller pictures", err=True)
        return 4
    except BrokenPipeError:
        # The reader (head, less) has gone; there is nobody left to tell.
        sys.stdout = open(os.devnull, "w")
        return 0
    except PermissionError as error:
        typer.echo(f"{Path(error.filename or '.')}: permission denied; check its owner and mode", err=True)
        return 4
    except OSError as error:
        typer.echo(f"{error.filename or 'file'}: {error.strerror or error}", err=True)
        return 4
