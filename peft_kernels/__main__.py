"""`python -m peft_kernels env [--json]`: the machine and the installation in one report, for bug reports.
`python -m peft_kernels bench …`: every operation measured, beside what else one would use; `bench --help` has more.
"""

import argparse
import json
import sys

from peft_kernels import environment


def _env(arguments: argparse.Namespace) -> int:
    found = environment.report()
    print(json.dumps(found, indent=2, default=str) if arguments.json else environment.as_text(found))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` defaults to the process's own arguments."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        from peft_kernels.benchmarks.__main__ import main as bench  # its many imports are not for a report of bugs

        return bench(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    env = commands.add_parser("env", help="versions, GPU, and which backends work here and why not")
    env.add_argument("--json", action="store_true", help="the same as JSON")
    env.set_defaults(run=_env)
    commands.add_parser("bench", help="how fast every operation is here, and what else one would use")
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
