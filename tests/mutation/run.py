"""Does a test fail where a line of ours is wrong? cosmic-ray changes one place at a time, and this runs the tests.

    make mutation MUTANTS=300 SEED=0         that many places, one mutant of each; MUTANTS=all: every place
    make mutation MUTANTS=20 ONLY=checks     places of the modules whose path contains it; no report is written
    cosmic-ray dump build/mutation/….sqlite  each mutant's difference, and what its tests printed

A session is kept for each state of the sources, and goes on where it stopped; survivors run again, since a test may
have come. A larger sample of the same seed contains the smaller one. What survives is a gap in the tests, or has its
reason in explained.jsonl.
"""

import argparse
import ast
import difflib
import hashlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import defaultdict
from pathlib import Path

import report
from choices import left_out, modules, tests_of
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutation"
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "dist", ".hypothesis", "*_out", "runs")
# What tests import besides the package: once, in the process that all others are forked from.
HEAVY = (
    *("torch._dynamo", "torch._inductor.compile_fx", "torch.utils.checkpoint", "triton.language", "hypothesis", "peft"),
    *("pytest", "transformers.models.blip.modeling_blip", "transformers.models.vilt.modeling_vilt"),
)
LIMIT = 240  # seconds of a processor for the tests of a module
TOO_LONG = 124
OUTCOMES = {
    0: TestOutcome.SURVIVED,
    1: TestOutcome.KILLED,
    TOO_LONG: TestOutcome.KILLED,
}  # pytest's codes; others: it got to no test


# ---- which mutants ---------------------------------------------------------------------------------------------------


def sample(items, seed):
    """One mutant of each place, in an order in which the first are spread evenly over the modules."""
    rng, places, order = random.Random(seed), defaultdict(lambda: defaultdict(list)), []
    for item in sorted(items, key=lambda item: (place(item), item.mutations[0].operator_name)):
        if not annotates(item):
            places[place(item)[0]][place(item)].append(item)
    for module in places.values():
        chosen = [rng.choice(here) for here in module.values()]
        rng.shuffle(chosen)
        order += [((rank + rng.random()) / len(chosen), place(item), item) for rank, item in enumerate(chosen)]
    return [item for *_, item in sorted(order, key=lambda entry: entry[:2])]


def place(item):
    mutation = item.mutations[0]
    return str(mutation.module_path), tuple(mutation.start_pos), tuple(mutation.end_pos)


def annotates(item, found={}):  # noqa: B006
    """A wrong annotation is no wrong result, and one that Python refuses would count as noticed."""
    module, start, _ = place(item)
    if module not in found:
        nodes = list(ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))))
        hints = [node.annotation for node in nodes if isinstance(node, ast.arg | ast.AnnAssign)]
        hints += [node.returns for node in nodes if isinstance(node, ast.FunctionDef)]
        spans = [(hint.lineno, hint.col_offset, hint.end_lineno, hint.end_col_offset) for hint in hints if hint]
        found[module] = [((a, b), (c, d)) for a, b, c, d in spans]
    return any(first <= start < last for first, last in found[module])


def changed(item):
    """The module's text, and the mutant's: None where that is no Python."""
    mutation = item.mutations[0]
    source = (ROOT / mutation.module_path).read_text(encoding="utf-8")
    mutant = mutate_code(source, get_operator(mutation.operator_name)(**mutation.operator_args), mutation.occurrence)
    try:
        return source, compile(mutant, "", "exec") and mutant
    except SyntaxError:
        return source, None


# ---- running their tests ---------------------------------------------------------------------------------------------


def fork(work, *args):
    """The process that calls work(*args) and ends with what it returns."""
    if pid := os.fork():
        return pid
    try:
        os._exit(work(*args))
    except BaseException:
        traceback.print_exc()
        os._exit(3)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_tests(folder, tests, keywords, log):
    """pytest's exit code, the first that is not 0. tests: files, or single tests, of tests/"""
    with open(log, "w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.path[:1] = [str(folder), str(folder / "tests")]
    os.environ["PYTHONPATH"] = str(folder)
    for static in (False, True):  # those compile kernels, without the interpreter
        chosen = [test for test in tests if test.startswith("tests/static/") == static]
        if chosen and (code := wait(fork(run_pytest, chosen, keywords, static))):
            return code if code > 0 else TOO_LONG if code == -signal.SIGXCPU else 1  # 1: a crash
    return 0


def run_pytest(tests, keywords, static):
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))  # other work on the machine does not count
    arguments = ["-xq", "--tb=short", "-p", "no:cacheprovider", "-k", keywords, *tests]
    if static:  # afresh: Triton's own functions, too, are of the interpreter where they were loaded for it
        del os.environ["TRITON_INTERPRET"]
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
    return pytest.main(arguments)


def tree(number):
    """A copy of the repository, in which mutants are written; each process at work has one of its own."""
    copy = BUILD / f"tree-{number}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    return copy


def attempt(folder, item, before):
    source, mutant = changed(item)
    if mutant is None:
        return WorkResult(WorkerOutcome.SKIPPED, "no Python")
    module, log = place(item)[0], folder.with_suffix(".log")
    (folder / module).write_text(mutant, encoding="utf-8")
    try:
        code = wait(fork(run_tests, folder, tests_of(module), left_out(module), log))
    finally:
        shutil.copy2(ROOT / module, folder / module)  # as old as its bytecode
    output = log.read_text(encoding="utf-8", errors="replace")[-4000:] if code != TOO_LONG else report.TIMED_OUT
    diff = "\n".join(difflib.unified_diff(source.splitlines(), mutant.splitlines(), module, module, lineterm="", n=1))
    return WorkResult(WorkerOutcome.NORMAL, before + output, OUTCOMES.get(code, TestOutcome.INCOMPETENT), diff)


def work(number, session, items, survivors):
    folder = tree(number)
    with use_db(str(session)) as db:
        for item in items:
            begin, result = time.monotonic(), attempt(folder, item, report.LATE if item.job_id in survivors else "")
            db.set_result(item.job_id, result)
            if result.diff:
                told = f"{time.monotonic() - begin:4.0f} s", report.verdict(result), *report.difference(result)
                print(*told, flush=True)
    return 0


def control(results):
    """The very tests that failed have to pass without a mutant."""
    folder, log = tree("unchanged"), BUILD / "unchanged.log"
    noticed = sorted({test for _, result in results for test in report.failed(result)})
    if code := wait(fork(run_tests, folder, noticed, "", log)):
        sys.exit(f"tests fail without a mutant, by {code}:\n{log.read_text(encoding='utf-8')[-4000:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", default="300", help="how many, or all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the modules' paths")
    parser.add_argument("--jobs", type=int, default=1)
    chosen = parser.parse_args()
    os.chdir(ROOT)
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = hashlib.sha256(b"".join(Path(module).read_bytes() for module in modules(ROOT))).hexdigest()[:12]
    with use_db(str(session := BUILD / f"{sources}.sqlite")) as db:
        if not db.num_work_items:
            init([Path(module) for module in modules(ROOT)], db, {})
        items = sample([item for item in db.work_items if chosen.only in place(item)[0]], chosen.seed)
        everything, items = len(items), items[: None if chosen.mutants == "all" else int(chosen.mutants)]
        known = dict(db.results)
    survivors = {item.job_id for item in items if report.verdict(known.get(item.job_id)) == "survived"}
    todo = [item for item in items if item.job_id not in known or item.job_id in survivors]
    for module in HEAVY:
        importlib.import_module(module)
    workers = [fork(work, number, session, todo[number :: chosen.jobs], survivors) for number in range(chosen.jobs)]
    codes = [wait(worker) for worker in workers]
    if any(codes):
        sys.exit("a worker ended early; what it found is kept, and the next run goes on from there")
    with use_db(str(session)) as db:
        known = dict(db.results)
    results = [(place(item)[0], known[item.job_id]) for item in items if item.job_id in known]
    report.show(results)
    control(results)
    if not chosen.only:
        report.write(ROOT / "docs" / "mutation.md", results, everything, chosen.seed)


if __name__ == "__main__":
    main()
