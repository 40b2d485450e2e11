"""The command line: ``nasgraph search | resume | report | export | score | rank | spaces | doctor``.

What the user can mend costs one line and exit code 2. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from nasgraph import __version__
from nasgraph.errors import NasgraphError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 something the user can mend, 130 interrupted."""
    options = _parser().parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to end, it ends as by Ctrl-C
    try:
        return int(options.run(options) or 0)
    except NasgraphError as error:
        print(f"nasgraph: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nasgraph: interrupted; what was finished is kept (nasgraph resume FOLDER)", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, e.g. `nasgraph spaces | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(f"nasgraph: {error.strerror or error}{where}: free the disk or choose another folder", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nasgraph",
        description="Neural architecture search over graphs: declare a space, search it, export the best models.",
        epilog="Start with:  nasgraph search configs/quickstart.yaml",
    )
    parser.add_argument("--version", action="version", version=f"nasgraph {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: object, text: str, examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog="examples:\n" + "\n".join("  " + line for line in examples.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    def budget(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--trials", type=_positive, help="candidates to train in the study")
        sub.add_argument("--workers", type=_count, help="child processes; 0: none, all in this process")
        sub.add_argument(
            "--ray", action="store_true", default=None, help="place the workers with Ray (see RAY_ADDRESS)"
        )
        sub.add_argument("--data-root", type=Path, metavar="DIR", help="folder of datasets (default: $NASGRAPH_DATA)")
        sub.add_argument("--quiet", action="store_true", help="no progress display")

    sub = command(
        "search",
        _search,
        "run the search that a config describes",
        "nasgraph search configs/quickstart.yaml\n"
        "nasgraph search configs/quickstart.yaml --out results/quick --trials 60 --workers 2 --seed 0\n"
        "nasgraph search configs/cora.yaml --data-root ~/data --set train.epochs=100 --set search.sampler=tpe",
    )
    sub.add_argument("config", type=Path, help="YAML file")
    sub.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: results/<name of the config>)")
    sub.add_argument("--seed", type=_count, help="seed of the search")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override any key of the config")
    budget(sub)

    sub = command(
        "resume",
        _resume,
        "continue a run that was interrupted, or give a finished one more trials",
        "nasgraph resume results/cora\nnasgraph resume results/cora --trials 200",
    )
    sub.add_argument("folder", type=Path, help="run folder")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="search.timeout_s=900, final.top=8"
    )
    budget(sub)

    sub = command("report", _report, "write the HTML report of a run anew", "nasgraph report results/cora")
    sub.add_argument("folder", type=Path, help="run folder")

    sub = command(
        "export",
        _export,
        "export one architecture of a run",
        "nasgraph export results/cora --key k1-3fa9\n"
        "nasgraph export results/cora --key k1-3fa9 --format code safetensors torch-export onnx --out best/",
    )
    sub.add_argument("folder", type=Path, help="run folder")
    sub.add_argument("--key", required=True, help="canonical key of the architecture, or the beginning of it")
    sub.add_argument("--format", nargs="+", metavar="FORMAT", help="default: the formats of the run's config")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: <run folder>/models/<key>")

    sub = command(
        "score",
        _score,
        "score random architectures with training-free proxies",
        "nasgraph score gnn_node --task digits_knn --proxy gradsign ntk_cond params -n 200 --out scores.csv",
    )
    sub.add_argument("space", help="name of a space, or module:function")
    sub.add_argument("--task", required=True, help="name of a task, or module:function")
    sub.add_argument("--proxy", nargs="+", required=True, metavar="PROXY", help="one or more proxies")
    sub.add_argument("-n", type=_positive, default=100, help="how many architectures (default: 100)")
    sub.add_argument("--samples", type=_positive, default=32, help="training samples a proxy sees (default: 32)")
    sub.add_argument("--seed", type=_count, default=0, help="default: 0")
    sub.add_argument("--workers", type=_count, default=0, help="child processes (default: 0)")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="space.layers=4, task.k=5, ...")
    sub.add_argument("--data-root", type=Path, metavar="DIR", help="folder of datasets (default: $NASGRAPH_DATA)")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="CSV file to write")
    sub.add_argument("--quiet", action="store_true", help="no progress display")

    sub = command(
        "rank",
        _rank,
        "hold the ranking of a run's supernet against training alone, sizes and proxies",
        "nasgraph rank results/cora_supernet -n 20\n"
        "nasgraph rank results/cora_supernet -n 50 --score accuracy loss flatness --set train.epochs=100",
    )
    sub.add_argument("folder", type=Path, help="run folder")
    sub.add_argument("-n", type=_positive, default=20, help="how many random architectures (default: 20)")
    sub.add_argument("--seed", type=_count, default=0, help="of the architectures (default: 0)")
    sub.add_argument("--truth", default="train", help="train: as the run's config trains (default); or module:function")
    sub.add_argument("--score", nargs="+", default=["accuracy"], metavar="SCORE", help="accuracy, loss, flatness")
    sub.add_argument("--proxy", nargs="+", default=["ntk_cond"], metavar="PROXY", help="proxies to stand beside")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="train.epochs=100, seeds=[0,1]")
    sub.add_argument("--data-root", type=Path, metavar="DIR", help="folder of datasets (default: $NASGRAPH_DATA)")
    sub.add_argument("--quiet", action="store_true", help="no progress display")

    sub = command(
        "spaces",
        _spaces,
        "list the search spaces, or describe one",
        "nasgraph spaces\nnasgraph spaces gnn_node --draw gnn_node.svg\n"
        "nasgraph spaces my_package.my_spaces:my_space --set features=16 --set classes=3",
    )
    sub.add_argument("space", nargs="?", help="name of a space, or module:function")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="argument of the space")
    sub.add_argument("--draw", type=Path, metavar="FILE", help="write the picture there (default: <space>.svg)")

    sub = command("doctor", _doctor, "check that this machine can run searches", "nasgraph doctor")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"a whole number of at least 0 is needed, not {text!r}")
    return int(text)


def _overrides(options: argparse.Namespace) -> list[str]:
    """Command-line options as config overrides."""
    keys = {"trials": "search.trials", "workers": "search.workers", "ray": "search.ray", "seed": "seed"}
    found = [
        f"{key}={getattr(options, name)}" for name, key in keys.items() if getattr(options, name, None) is not None
    ]
    if options.data_root is not None:
        found.append(f"data_root={json.dumps(str(options.data_root.resolve()))}")  # a JSON string is YAML
    return found


def _search(options: argparse.Namespace) -> int:
    from nasgraph import config

    settings = config.load(options.config, [*options.set, *_overrides(options)])
    from nasgraph import search

    folder = options.out or Path("results") / options.config.stem
    return search.start(settings, folder, quiet=options.quiet)


def _resume(options: argparse.Namespace) -> int:
    from nasgraph import search

    return search.resume(options.folder, [*options.set, *_overrides(options)], quiet=options.quiet)


def _report(options: argparse.Namespace) -> int:
    from nasgraph.run import Run

    print(Run.open(options.folder).write_report())
    return 0


def _export(options: argparse.Namespace) -> int:
    from nasgraph import registry, search

    for name in options.format or ():
        registry.check("exporters", name)
    return search.export(options.folder, options.key, options.format, options.out)


def _score(options: argparse.Namespace) -> int:
    from nasgraph import config

    values = {"space": options.space, "task": options.task, "seed": options.seed}
    values["screen"] = {"candidates": options.n, "proxies": options.proxy, "samples": options.samples, "keep": 0}
    values["search"] = {"workers": options.workers}
    if options.data_root is not None:
        values["data_root"] = str(options.data_root.resolve())
    settings = config.parse(config.override(values, options.set), "nasgraph score")
    from nasgraph import search

    return search.score(settings, options.out, quiet=options.quiet)


def _rank(options: argparse.Namespace) -> int:
    from nasgraph import config, registry

    for name in options.proxy:
        registry.check("proxies", name)
    from nasgraph.rank import rank_run
    from nasgraph.run import Run

    run = Run.open(options.folder)
    overrides = [*options.set, *_overrides(argparse.Namespace(data_root=options.data_root))]
    settings = config.parse(config.override(run.facts["config"], overrides), str(options.folder))
    wanted = (options.n, options.seed, options.truth, options.proxy, options.score, options.quiet)
    print(rank_run(run, settings, *wanted))
    print(f"written: {options.folder / 'rank.csv'}, rank.json")
    return 0


def _spaces(options: argparse.Namespace) -> int:
    from nasgraph import catalogue

    return catalogue.show(options.space, options.set, options.draw) if options.space else catalogue.listing()


def _doctor(options: argparse.Namespace) -> int:
    from nasgraph import doctor

    return doctor.check()


if __name__ == "__main__":
    sys.exit(main())
