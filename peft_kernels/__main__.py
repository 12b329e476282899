"""`python -m peft_kernels env [--json]`: the machine and the installation in one report, for bug reports.
`python -m peft_kernels verify`: does every operation compute here what it should, on every backend that runs here?
`python -m peft_kernels explain FOLDER`: which layers of a model an adapter would take, and on which backend.
`python -m peft_kernels bench …`: every operation measured, beside what else one would use; `bench --help` has more.
`python -m peft_kernels plots FOLDER …`: pictures of runs: factors, cases, scores, losses.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable

import peft_kernels
from peft_kernels import environment

# Commands with arguments of their own: module, words, and the extra that brings what it imports. A report of bugs needs
# none of that.
COMMANDS = {
    "verify": ("benchmarks.verify", "every operation on every backend that runs here, against float64", "bench"),
    "explain": ("integrations.model_report", "which layers an adapter would take, and on which backend", "trainer"),
    "bench": ("benchmarks.__main__", "how fast every operation is here, and what else one would use", "bench"),
    "plots": ("plots.__main__", "pictures of runs: what adapters hold, cases that were found, scores, losses", "plots"),
}


def _env(arguments: argparse.Namespace) -> int:
    found = environment.report()
    print(json.dumps(found, indent=2, default=str) if arguments.json else environment.as_text(found))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` defaults to the process's own arguments."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in COMMANDS:
        return _command(argv[0])(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"peft_kernels {peft_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    env = commands.add_parser("env", help="versions, GPU, and which backends work here and why not")
    env.add_argument("--json", action="store_true", help="the same as JSON")
    env.set_defaults(run=_env)
    for name, (_, words, _) in COMMANDS.items():
        commands.add_parser(name, help=words)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _command(name: str) -> Callable[[list[str]], int]:
    module, _, extra = COMMANDS[name]
    try:
        return importlib.import_module(f"peft_kernels.{module}").main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", "peft_kernels"):
            raise
        sys.exit(f"python -m peft_kernels {name}: {error}; pip install 'peft_kernels[{extra}]' brings it")


if __name__ == "__main__":
    sys.exit(main())
