"""PEFT's own tests, of the installed version, with its LoRA linears fused: `make peft-suite`, or python run.py [-h].

The tests come from PEFT's source distribution, unpacked in build/peft_suite. They run three times: as they are (stock),
and by the two routes of routes.py. Those of other methods, and those that need downloads besides, are left out.
Prints what passed, failed and was skipped, and why. Exits with 1 if a route has a failure that stock PEFT does not
have, or fused nothing. A fourth run, "aurora", has the tests of methods on PEFT's custom models, with Aurora as the
method (aurora_cases.py): there any failure counts. Needs the packages datasets, diffusers, parameterized and scipy;
takes about 12 minutes on two cores.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "peft_suite"
ROUTES = ("stock", "accelerate", "fast")
NEEDED = ("datasets", "diffusers", "parameterized", "scipy", "xdist")
# The files with tests of LoRA on linear layers, of saving, loading, merging and mixing, that run on a CPU
FILES = (
    *("custom_models", "mixed", "low_level_api", "tuners_utils", "initialization", "lora_variants", "helpers", "other"),
    *("torch_compile", "lora_conversion", "target_parameters", "trainable_tokens", "loraplus", "lorafa", "arrow"),
    *("bdlora", "lora_ga", "lora_intruders", "velora", "integrations"),
)
# What may fail by a route alone, and why
EXPECTED = {
    ("fast", "test_modules_to_save_targets_lora_layer_raises"): "PEFT's message names the layer's class, FusedLinear"
}


class Result(NamedTuple):
    outcome: str  # "passed", "failed" or "skipped"
    reason: str


def unpacked_tests() -> Path:
    """The folder above PEFT's tests, downloaded once."""
    version = importlib.metadata.version("peft")
    folder = CACHE / f"peft-{version}"
    if not (folder / "tests" / "__init__.py").is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, "-d", str(CACHE), f"peft=={version}"], check=True)
        with tarfile.open(CACHE / f"peft-{version}.tar.gz") as archive:
            members = [each for each in archive.getmembers() if each.name.startswith(f"peft-{version}/tests/")]
            archive.extractall(CACHE, members, filter="data")
        (folder / "tests" / "__init__.py").touch()  # they import each other, relatively
    return folder


def run(route: str, folder: Path, files: list[str], workers: int, more: list[str]) -> tuple[dict[str, Result], Counter]:
    """Results by test, and the sums of what the processes counted."""
    with tempfile.TemporaryDirectory() as out:
        (Path(out) / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
        environment = {**os.environ, "PEFT_SUITE_ROUTE": route, "PEFT_SUITE_COUNTS": out, "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *_python_path()])}
        command = [sys.executable, "-m", "pytest", "-c", f"{out}/pytest.ini", "--rootdir", ".", "-q"]
        command += ["-p", "aurora_cases" if route == "aurora" else "routes"]
        command += ["-W", "ignore", "--tb=short", "--timeout=600", f"--junitxml={out}/results.xml", *more]
        command += ["-n", str(workers)] if workers > 1 else []
        done = subprocess.run([*command, *files], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 1) and not (route == "aurora" and done.returncode == 5):  # 5: no test at all
            raise SystemExit(f"{route}: pytest ended with {done.returncode}\n{done.stdout[-4000:]}")
        counts = Counter()
        for path in Path(out).glob("*.json"):
            counts.update(json.loads(path.read_text())["calls"])
            counts |= Counter(json.loads(path.read_text())["tests"])  # every worker collects everything
        return dict(_results(Path(out) / "results.xml")), counts


def _python_path() -> list[str]:
    return [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]


def _results(path: Path):
    for case in ElementTree.parse(path).iter("testcase"):
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reason = (child.get("message") or "").strip().splitlines()[:1]
                reason = reason[0][:110] if reason else ""
        yield f"{case.get('classname')}::{case.get('name')}", Result(outcome, reason)


def report(route: str, results: dict[str, Result], counts: Counter, stock: dict[str, Result]) -> list[str]:
    """Print a route's summary; the tests that fail only here, or have disappeared."""
    outcomes = Counter(result.outcome for result in results.values())
    head = ", ".join(f"{outcomes[each]} {each}" for each in ("passed", "failed", "skipped"))
    print(f"== {route}: {head}, of {counts['kept']} tests kept and {counts['collected']} collected")
    if route != "stock":
        single, mixed = counts["lowrank_linear"], counts["batched_lowrank_linear"]
        print(f"   {single:5d} forwards of LoRA linears fused, {mixed} of mixed batches; PEFT's own, uncompiled:")
        for name, count in counts.most_common():
            if name.startswith("own: "):
                print(f"   {count:5d} {name}")
    reasons = Counter(result.reason for result in results.values() if result.outcome == "skipped")
    for reason, count in reasons.most_common():
        print(f"   {count:5d} skipped: {reason}")
    for test, result in results.items():
        if result.outcome == "failed":
            print(f"   failed{' as in stock' * (test in stock and stock[test] == result)}: {test}: {result.reason}")
    new = [test for test in stock if outcome(stock, test) == "passed" != outcome(results, test)]
    if stock:  # stock's own run is compared with nothing
        new += [t for t in results if outcome(results, t) == "failed" and outcome(stock, t) in ("skipped", "missing")]
    for test in [each for each in new if (route, each.rpartition("::")[2]) in EXPECTED]:
        print(f"   expected: {test}: {EXPECTED[route, test.rpartition('::')[2]]}")
        new.remove(test)
    for test in new:
        print(f"   NOT IN STOCK: {test}: {results[test].reason if test in results else 'did not run'}")
    return new


def outcome(results: dict[str, Result], test: str) -> str:
    return results[test].outcome if test in results else "missing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--files", nargs="+", default=FILES, choices=FILES, metavar="NAME", help=" ".join(FILES))
    parser.add_argument("-k", default="", help="as pytest's, on every route")
    options = parser.parse_args()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"PEFT's tests need {', '.join(missing)}")
    folder = unpacked_tests()
    files = [f"tests/test_{name}.py" for name in options.files]
    if absent := [name for name in files if not (folder / name).is_file()]:
        raise SystemExit(f"{folder.name} has no {', '.join(absent)}")
    stock: dict[str, Result] = {}
    problems = []
    for route in ROUTES:
        results, counts = run(route, folder, files, options.workers, ["-k", options.k] if options.k else [])
        problems += report(route, results, counts, stock)
        stock = stock or results
        if route != "stock" and not counts["lowrank_linear"]:
            problems.append(route)
            print("   NOTHING WAS FUSED")
    if "custom_models" in options.files:
        more = ["-k", options.k] if options.k else []
        results, counts = run("aurora", folder, ["tests/test_custom_models.py"], options.workers, more)
        report("aurora", results, counts, {})
        problems += [test for test in results if outcome(results, test) == "failed"]
        if results and not counts["lowrank_linear"]:
            problems.append("aurora")
            print("   NOTHING WAS FUSED")
    print("every test passes by each route that passes in stock PEFT" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
