"""Every operation against what else one would use: verified against float64, then timed.

    python -m peft_kernels bench [OPERATION …] [--against peft,eager,compile] [--shapes blip,vilt | M,K,N[,R]]
        [--save NEW.json] [--compare OLD.json] [--plot FOLDER]
    python -m peft_kernels bench --host [layer qkv imitation blip vilt] [--save NEW.json]

Each case is a table: the median time and half the distance between its quartiles, the least time possible beside it,
and rates that count the compulsory work alone. Who does not run here is named with the reason, and so is who computes
something wrong, which is not timed. On a GPU times are eager, calls issued back to back, and in a CUDA graph, too.
Exit status: 1 if something was wrong, or faulted the GPU, which ends the run, or if --compare found one of ours slower
by more than both spreads; 2 for arguments that make no sense. docs/measured.md shows whole runs, a CPU's --threads 1.

--host asks instead what a call costs the host, GPU or none: process time, calls of functions and launches (host.py).
"""

import argparse
import difflib
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from . import __path__ as folder
from . import compare, host, results, runner, terminal
from .cases import Case

NAMES = sorted(module.name for module in pkgutil.iter_modules(folder) if module.name.startswith("bench_"))
BENCHES = [importlib.import_module(f".{name}", __package__).BENCH for name in NAMES]
DTYPES = ("float32", "bfloat16", "float16")
PRESETS = tuple(dict.fromkeys(name for bench in BENCHES for name in bench.presets))


# ---- arguments ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m peft_kernels bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("op", nargs="*", metavar="OPERATION", help=", ".join(bench.op for bench in BENCHES))
    add("--against", type=_words, metavar="NAME,…", help="peers, each by its name or how a word of it begins; or none")
    sizes = "; ".join(f"{bench.op}: {bench.shape}" for bench in BENCHES)
    add("--shapes", nargs="+", type=_shape, metavar="SHAPE", help=f"{', '.join(PRESETS)}, or one operation's: {sizes}")
    add("--dtype", nargs="+", metavar="NAME", help="bfloat16 on a GPU, float32 and bfloat16 on a CPU; or float16")
    add("--dropout", nargs="+", type=_probability, metavar="P", help="instead of 0 and 0.1, where there is dropout")
    add("--graph", action=argparse.BooleanOptionalAction, help="on a GPU: in a CUDA graph, too; it is, unless refused")
    add("--quick", action="store_true", help="two cases of each dtype, few rounds, compiled peers only by name")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    names = ", ".join((*host.QUESTIONS, *host.WHOLE))
    add("--host", nargs="*", metavar="NAME", help=f"{names}; without a name all but the last two")
    add("--rounds", type=_positive, help="on a CPU: turns of every provider; usually what fits into seconds")
    add("--threads", type=_positive, help="on a CPU")
    add("--save", type=Path, metavar="FILE.json", help="written anew after every case, on a GPU after every provider")
    add("--plot", type=Path, metavar="FOLDER", help="for bars of every operation and a roofline, as PNG files")
    add("--compare", type=Path, metavar="OLD.json", help="a file of --save: prints what changed")
    return made


def _words(text: str) -> list[str]:
    return [word.strip().lower() for word in text.split(",") if word.strip()]


def _shape(text: str) -> tuple[int, ...] | list[str]:
    """Sizes, or names of presets."""
    if re.fullmatch(r"[a-z_,]+", text):
        return text.split(",")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected {', '.join(PRESETS)}, or numbers like 24,16,40, got {text}")
    return tuple(map(int, text.split(",")))


def _probability(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 0 ≤ P < 1, got {text}")
    return value


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a number ≥ 1, got {text}")
    return value


def _check(what: str, names: Iterable[str], known: Sequence[str], words: Sequence[str] = ()) -> None:
    """Raises ValueError, telling what is known and, of that and of the words, what is nearest."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, list(dict.fromkeys([*known, *words])), cutoff=0.4)
            nearest = f" (nearest: {', '.join(near)})" if near else ""
            raise ValueError(f"{what}: got {name!r}{nearest}, expected some of: {'; '.join(known)}")


# ---- what to measure ------------------------------------------------------------------------------------------------


def planned(
    given: argparse.Namespace, device: torch.device, benches: Sequence[runner.Bench]
) -> list[tuple[runner.Bench, list[str], list[Case]]]:
    """(bench, providers, cases) of every operation. Raises ValueError for what makes no sense."""
    _check("operation", given.op, [bench.op for bench in benches])
    on_cpu = device.type == "cpu"
    dtypes = given.dtype or (["float32", "bfloat16"] if on_cpu else ["bfloat16"])
    _check("--dtype", dtypes, DTYPES)
    chosen = [bench for bench in benches if not given.op or bench.op in given.op]
    if given.against not in (None, ["none"]):
        names = list(dict.fromkeys(name for bench in chosen for name in bench.peers))
        unknown = [word for word in given.against if not _matches(word, names)]
        _check("--against", unknown, names, [word for name in names for word in _parts(name)])
    plan = []
    for bench in chosen:
        usual = runner.providers_on(bench, device.type, compiled=not given.quick)
        ours = [name for name in usual if bench.providers[name].backend]
        named = [name for word in given.against or () for name in _matches(word, bench.peers)]
        wanted = usual if given.against is None else ours + named
        found = _cases(bench, given, on_cpu, dtypes, len(chosen) == 1)
        plan.append((bench, [name for name in bench.providers if name in wanted], found))
    if not any(found for _, _, found in plan):
        has = "; ".join(f"{bench.op} has {', '.join(bench.presets) or 'none'}" for bench in chosen)
        raise ValueError(f"--shapes: none of these names means something here: {has}")
    if given.dropout and not any(hasattr(case, "dropout") for _, _, found in plan for case in found):
        raise ValueError(f"--dropout: {', '.join(given.op)}: there is none")
    return plan


def _parts(name: str) -> list[str]:
    return re.findall(r"\w+", name.lower())


def _matches(word: str, names: Sequence[str]) -> list[str]:
    """Those that a word names: one whole name, or all names that have a word which begins like that."""
    whole = [name for name in names if name.lower() == word]
    return whole or [name for name in names if any(part.startswith(word) for part in _parts(name))]


def _cases(
    bench: runner.Bench, given: argparse.Namespace, on_cpu: bool, dtypes: Sequence[str], alone: bool
) -> list[Case]:
    """In order, each once: some operations have one dtype, whatever is asked for."""
    found: dict[Case, None] = {}
    for dtype in dtypes:
        if given.shapes:
            shapes = [shape for each in given.shapes for shape in _shapes(bench, each, alone)]
            of_dtype = [case for shape in shapes for case in bench.shaped(shape, dtype)]
        else:
            of_dtype = bench.cases(on_cpu, [dtype])
        if given.dropout and of_dtype and hasattr(of_dtype[0], "dropout"):
            of_dtype = list(dict.fromkeys(replace(case, dropout=p) for case in of_dtype for p in given.dropout))
        found |= dict.fromkeys(of_dtype[: 2 if given.quick else None])
    return list(found)


def _shapes(bench: runner.Bench, each: tuple[int, ...] | list[str], alone: bool) -> list[Sequence[int]]:
    if isinstance(each, list):
        _check("--shapes", each, PRESETS)
        return [shape for name in each for shape in bench.presets.get(name, ())]
    told = ",".join(map(str, each))
    if not alone:
        raise ValueError(f"--shapes: {told} would be sizes of one operation: name it, too")
    least, most = len(_parts(bench.shape.partition("[")[0])), len(_parts(bench.shape))
    if not least <= len(each) <= most:
        raise ValueError(f"--shapes: {bench.op} takes {bench.shape}, got {told}")
    return [each]


def _check_host(given: argparse.Namespace) -> None:
    _check("--host", given.host, (*host.QUESTIONS, *host.WHOLE))
    taken = ("host", "quick", "device", "rounds", "threads", "save")
    others = [name for name, value in vars(given).items() if name not in taken and value not in (None, False, [])]
    if others:
        raise ValueError(f"--host: goes with {', '.join(taken[1:])}, not with {', '.join(others)}")


# ---- the command ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None, benches: Sequence[runner.Bench] = BENCHES) -> int:
    """Returns the exit status that this module's docstring tells."""
    reader = parser()
    given = reader.parse_args(argv)
    try:
        device = torch.device(given.device)
        torch.empty(1, device=device)
        if given.host is not None:
            _check_host(given)
        if given.graph and device.type == "cpu":
            raise ValueError("--graph: a CUDA graph needs a GPU")
        plan = planned(given, device, benches)
        old = compare.load(given.compare, [{"op": bench.op, **asdict(c)} for bench, _, found in plan for c in found])
        if given.plot:
            from . import plots
    except (ValueError, RuntimeError, AssertionError) as error:  # the last two: torch on a device that is not there
        reader.error(str(error))
    except ImportError as error:
        reader.error(f"--plot: {error}; pip install 'peft_kernels[bench]'")
    if given.threads or given.host is not None:
        torch.set_num_threads(given.threads or 1)
    rounds = given.rounds or (3 if given.quick else None)
    if given.host is not None:
        if host.interpreted():
            return host.elsewhere(sys.argv[1:] if argv is None else argv)
        return host.main(given.host, device, rounds, given.save)

    run = results.provenance(device)
    print(results.describe(run), end="\n\n")
    done: list[dict] = run["cases"]

    def save(record: dict) -> None:
        run["cases"] = [*done, record]
        if given.save:
            results.save(run, given.save)

    for bench, _, found in plan:
        if not found:
            print(f"{bench.op}: no sizes of that name", end="\n\n")
    for bench, providers, case in [(bench, names, case) for bench, names, found in plan for case in found]:
        done.append(runner.measure(bench, case, device, providers, rounds, given.graph is not False, save))
        terminal.show(terminal.case_table(done[-1]))
        if "fault" in done[-1]:
            print(f"nothing more runs: {done[-1]['fault']}", end="\n\n")
            break
    run["cases"] = done
    broken = any("fault" in case for case in done)
    status = int(broken or any(why.startswith("wrong:") for case in done for why in case["absent"].values()))
    if old:
        changes = compare.changes(old, run)
        terminal.show(compare.table(changes, old))
        status |= int(any(change.ours and change.told == compare.SLOWER for change in changes))
    if given.plot:
        print("\n".join(map(str, plots.plot(run, given.plot))))
    return status


if __name__ == "__main__":
    sys.exit(main())
