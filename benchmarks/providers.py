"""What is measured: an operation's cases and providers in one `Bench`, and how a provider is built and verified."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels import BackendUnavailableError

from . import cases, floor
from .cases import Case, converted

Results = Tensor | tuple[Tensor, ...]  # y, or several of them
Input = tuple[Tensor | None, Results]  # what the forward takes, and the gradients of its results


class Absent(Exception):
    """A provider does not run a case; the message says why."""


def absence(error: Exception) -> str | None:
    """Why a provider does not run a case, or None for an error that says nothing of the kind."""
    uncompiled = torch._dynamo.exc.BackendCompilerFailed
    kinds = Absent, ImportError, BackendUnavailableError, torch.OutOfMemoryError, uncompiled
    refused = isinstance(error, ValueError) and str(error).startswith("design:")  # does not take this shape
    return first_line(error) if refused or isinstance(error, kinds) else None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


class Built(NamedTuple):
    """A provider ready to run: its forward, and by name of their gradients the factors that it takes some for."""

    forward: Callable[[Tensor | None], Results]
    factors: dict[str, Tensor]
    found: Callable[[], dict[str, Tensor]] | None = None  # of a whole step, gradients included: what else it wrote
    loss: Callable[[], Tensor] | None = None  # of a whole step: its forward without the backward, where they are apart


@dataclass(frozen=True)
class Provider:
    build: Callable[[Any, Any], Built]  # of the case and its tensors; may raise Absent, ImportError
    design: str | None  # as in the DESIGNS of floor/<op>.py; None where nobody models what is launched
    backend: str | None = None  # of ours
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it is measured without being named
    foreign: bool = False  # never run by those who wrote its call: whatever it raises is told, and leaves it out
    compiled: bool = False  # by torch.compile, which takes seconds: last, and in a quick run only by name


@dataclass
class Problem:
    """A case on a device. tensors: a NamedTuple with the property `input`."""

    case: Case
    tensors: Any
    references: dict = field(default_factory=dict)  # exact results and usual errors, kept for all providers
    proof: "Problem | None" = None  # a smaller one to verify in its stead


@dataclass(frozen=True)
class Bench:
    op: str
    providers: dict[str, Provider]
    cases: Callable[[bool, Sequence[str]], list]  # (on a CPU?, dtypes), those of --quick first, width 4096 last
    shape: str  # the numbers of --shapes
    shaped: Callable[[Sequence[int], str], list]  # the cases of one such shape in one dtype
    tensors: Callable[[Any, torch.device], Any]
    reference: Callable[..., tuple]  # (provider, problem, built, seed) -> key of `references`, builder of exact results
    least: Callable[[Any, str | None], tuple[floor.Work, ...]]  # forward, backward
    passes: Callable[[Any, str, str], tuple]  # (case, design, device) -> forward, backward; None where not modelled
    proof: Callable[[Any], Any] = lambda case: case  # the case to verify in its stead, where all of it takes too long
    accuracy: dict[str, float] = field(default_factory=dict)  # by name of a result, instead of plain torch's
    presets: dict[str, Sequence[Sequence[int]]] = field(default_factory=dict)  # shapes that go by a model's name
    unsummed: str = "-"  # how the names of results begin that are no sums

    @property
    def peers(self) -> list[str]:
        """The providers that are not ours."""
        return [name for name, each in self.providers.items() if not each.backend]


def providers_on(bench: Bench, device_type: str, compiled: bool = True) -> list[str]:
    """Who is measured there without being named; compiled: those of torch.compile, too"""
    here = {name: each for name, each in bench.providers.items() if device_type in each.devices}
    return [name for name, each in here.items() if compiled or not each.compiled]


# ---- one provider ---------------------------------------------------------------------------------------------------


def results(built: Built, given: Input, backward: bool = True) -> dict[str, Tensor]:
    """y, or y, y1, y2, …; with backward also the gradient of the input, if it takes one, and of every factor.

    Of a whole step y.
    """
    x, dy = given
    if built.found:
        return {"y": built.forward(x)}
    if not backward:
        with torch.no_grad():
            return _named(built.forward(x))
    wanted = {"dx": x, **built.factors} if x is not None and x.requires_grad else built.factors
    y = built.forward(x)
    grads = torch.autograd.grad(y, tuple(wanted.values()), dy)
    return {**{name: each.detach() for name, each in _named(y).items()}, **dict(zip(wanted, grads))}


def _named(y: Results) -> dict[str, Tensor]:
    return {"y": y} if isinstance(y, Tensor) else {f"y{place or ''}": each for place, each in enumerate(y)}


def verify(bench: Bench, name: str, problem: Problem, built: Built, seed: int = 1) -> dict[str, tuple[float, float]]:
    """{result: (its error, plain torch's)}. Raises WrongResult unless y and every gradient are as good as that.

    But for the order of sums, which is the machine's own. Roundings of float32 at random in every term of a sum of n
    change it as much as roundings of the inputs do, `moved`; those of its n partial sums, each as large as the terms
    before it leave it, up to sqrt(n) times as much.
    """
    case = problem.case
    key, reference = bench.reference(bench.providers[name], problem, built, seed)
    if key not in problem.references:
        wide, own = (converted(problem.tensors, dtype) for dtype in (torch.float64, case.torch_dtype))
        exact, usual, moved = (
            _all_results(reference(case, tensors), tensors.input, case.backward)
            for tensors in (wide, own, cases.rounded(wide))
        )
        usual, moved = cases.errors(usual, exact), cases.errors(moved, exact)
        deeper = cases.longest_sum(wide) ** 0.5
        order = {result: deeper * error for result, error in moved.items() if not result.startswith(bench.unsummed)}
        problem.references[key] = exact, usual, order
    torch.manual_seed(seed)
    got = _all_results(built, problem.tensors.input, case.backward)
    exact, usual, order = problem.references[key]
    found = cases.check(name, got, exact, usual, bench.accuracy, order)
    return {result: (error, usual[result]) for result, error in found.items()}


def _all_results(built: Built, given: Input, backward: bool) -> dict[str, Tensor]:
    return results(built, given, backward) | (built.found() if built.found else {})


def pose(bench: Bench, case: Case, device: torch.device) -> Problem:
    small = bench.proof(case)
    proof = None if small == case else Problem(small, bench.tensors(small, device))
    return Problem(case, bench.tensors(case, device), proof=proof)


def build(bench: Bench, name: str, problem: Problem) -> Built | str:
    """A verified provider, or why this case has none on this machine: "absent: …", or "wrong: …" and what is."""
    provider, proof = bench.providers[name], problem.proof or problem
    try:
        built = provider.build(proof.case, proof.tensors)
        verify(bench, name, proof, built)
        if built.found or problem.proof:  # its first step is still to come: what it then takes is measured
            built = provider.build(problem.case, problem.tensors)
    except cases.WrongResult as error:
        return f"wrong: {str(error).removeprefix(f'{name}: ')}"
    except Exception as error:
        why = absence(error)
        if why is None and not provider.foreign:
            raise
        return f"absent: {why or f'{type(error).__name__}: {first_line(error)}'}"
    return built
