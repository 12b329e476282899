"""How steps.py trains: full tuning, LoRA by peft and by us, Aurora, MoIL by us and by its authors' formula.

LoRA and MoIL adapt the queries, keys and values of all attention, Aurora what its release does, with gates on BLIP;
each model's heads train with every method. Three more show what adapters add: LoRA by peft and by us on all linears of
the towers, and a frozen model. In these gradients flow on to what the embeddings give, through every frozen linear. And
one compares Aurora with LoRA by peft on the same layers and of the same rank: its release adapts more than LoRA does.
"""

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import ImitationGroup, explain, resolve
from peft_kernels.adapters import Adapter, Aurora, AuroraConfig, FullTuning, LoRA, LoRAConfig, MoIL
from peft_kernels.adapters.targets import find_targets

from .cases import SCALE, WrongResult, errors
from .steps_models import SIZES, Batch, Model, Size, own_logits

if TYPE_CHECKING:
    import peft

FULL, PEFT, LORA, AURORA = "full tuning", "PEFT LoRA", "our LoRA", "Aurora"
MOIL, AUTHORS = "MoIL", "MoIL, authors' formula"
METHODS = (FULL, PEFT, LORA, MOIL, AUTHORS, AURORA)
FROZEN, PEFT_ALL, LORA_ALL = "frozen", "PEFT LoRA, all linears", "our LoRA, all linears"
ADDING, PEFT_AURORA = (FROZEN, PEFT_ALL, LORA_ALL), "PEFT LoRA, Aurora's targets"
BY_NAME = (*ADDING, PEFT_AURORA)  # measured only where they are asked for
RIVALS = {"PEFT LoRA": PEFT, "full tuning": FULL, "authors' formula": AUTHORS, "PEFT on all": PEFT_ALL}
RIVALS |= {"PEFT on Aurora's": PEFT_AURORA}
RIVALS_OF_FEW = {AUTHORS: (MOIL, AUTHORS), PEFT_ALL: ADDING, PEFT_AURORA: (AURORA, PEFT_AURORA)}  # of who trains alike
MODES = ("graph", "eager", "compiled")  # in which each is measured: what a graph shows is no host's doing
_KINDS = {FULL: FullTuning, LORA: LoRA, LORA_ALL: LoRA, AURORA: Aurora, MOIL: MoIL, AUTHORS: MoIL}
WEIGHT_DECAY = 0.05
DRIFT, VERIFIED_DECAY = 0.1, 0.9  # what is verified moves far enough to be seen; relative to the live weights' size
ALIKE = 2e-3  # of the largest value: two ways to compute one thing in float32; 1e-6 on a CPU, 3e-4 of tf32 products


def wrap(method: str, model: nn.Module, of: Model, size: Size, dropout: float) -> "Adapter | peft.PeftModel | None":
    """Adapt the model in place; what is to train requires grad."""
    lora, aurora, moil = size.ranks
    every = _linears(model, of) if method in ADDING else None
    if method in ADDING:
        for name in of.embeddings:
            model.get_submodule(name).register_forward_hook(_let_gradients_flow)
    if method == FROZEN:
        model.requires_grad_(False)
        return _let_heads_train(model, of)
    if method in (PEFT, PEFT_ALL):
        return _peft_lora(model, of, every, lora, dropout)
    if method == PEFT_AURORA:
        names = [match.name for match in find_targets(model, AuroraConfig(preset=of.aurora["preset"]))]
        return _peft_lora(model, of, names, aurora, dropout)
    scaled = {"rank": lora, "alpha": SCALE * lora, "dropout": dropout}
    options = {
        FULL: {},
        LORA: {"preset": of.preset, **scaled},
        LORA_ALL: {"targets": every, **scaled},
        AURORA: {**of.aurora, "rank": aurora, "dropout": dropout},
    }.get(method, {"preset": of.preset, "rank": moil, "transform_rank": moil})
    if method != FULL:
        options["modules_to_save"] = of.heads
    kind = _KINDS[method]
    return kind.wrap(model, kind.config_class(**options))


def _linears(model: nn.Module, of: Model) -> list[str]:
    """The names of all linears of the towers, those of attention and of the MLPs."""
    layers = [f"{name}." for name, module in model.named_modules() if type(module).__name__ in of.layers]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if name.startswith(tuple(layers))]


def _let_gradients_flow(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
    (output if isinstance(output, Tensor) else output[0]).requires_grad_()


def _let_heads_train(model: nn.Module, of: Model) -> None:
    for name, p in model.named_parameters():
        if any(f".{head}." in f".{name}" for head in of.heads):
            p.requires_grad_(True)


def _peft_lora(model: nn.Module, of: Model, names: list[str] | None, rank: int, dropout: float) -> "peft.PeftModel":
    """names: of linears, None for those of the preset"""
    import peft

    names = names or [match.name for match in find_targets(model, LoRAConfig(preset=of.preset))]
    targets = "|".join(map(re.escape, names))
    config = peft.LoraConfig(r=rank, lora_alpha=int(SCALE * rank), lora_dropout=dropout, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reads what transformers deprecates
        adapter = peft.get_peft_model(model, config)  # unlike inject_adapter_in_model it makes factors float32
    _let_heads_train(model, of)
    return adapter


class AuthorsImitation:
    """MoIL's step by the authors' formula, docs/method.md, section 3, as it stands: a loss that autograd goes through.

    Teachers move one after the other; W0 + B A is formed once in W̄ and once in b̄, as in their code.
    """

    def __init__(self, moil: MoIL):
        self.groups, self.decay, self.distance = moil.groups(), moil.config.decay, self.layer_distance
        like, widths = self.groups[0].weight0[0], {len(group.transform.up) for group in self.groups}
        self.identities = {width: torch.eye(width, dtype=like.dtype, device=like.device) for width in widths}

    def loss(self) -> Tensor:
        total = 0
        for group in self.groups:
            self._follow(group)
            total = total + self.distance(group, self.identities[len(group.transform.up)])
        return total

    @torch.no_grad()
    def _follow(self, group: ImitationGroup) -> None:
        for teachers, lives in ((group.teacher, group.live), (group.teacher_bias, group.live_bias)):
            for teacher, live in zip(teachers, lives):
                teacher.mul_(self.decay).add_(live, alpha=1 - self.decay)

    @staticmethod
    def layer_distance(group: ImitationGroup, identity: Tensor) -> Tensor:
        down, down_bias, up, up_bias = group.transform
        total = 0
        for m, (weight0, teacher) in enumerate(zip(group.weight0, group.teacher)):
            weight = (weight0 + group.up[m] @ group.down[m]) @ (identity + up @ down)
            bias = (weight0 + group.up[m] @ group.down[m]) @ (up @ down_bias + up_bias) + group.bias0[m]
            total = total + F.mse_loss(weight, teacher) + F.mse_loss(bias, group.teacher_bias[m])
        return total


class Training:
    """A method that trains its own copy of `base`. `run` does one step and returns its loss, not waited for."""

    def __init__(self, method: str, of: Model, size: Size, base: nn.Module, batch: Batch, dropout: float):
        self.of, self.size, self.batch = of, size, batch
        torch.manual_seed(0)  # the same factors in every mode
        self.model = copy.deepcopy(base)
        self.adapter = wrap(method, self.model, of, size, dropout)
        self.authors = AuthorsImitation(self.adapter) if method == AUTHORS else None
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        lr = of.lr[method in (FULL, MOIL, AUTHORS)] * 768 / size.width
        self.lr = torch.tensor(lr, device=batch.pixels.device)
        # Fused: the fewest launches, and in a graph no more of them
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.lr, fused=True, capturable=self.lr.is_cuda
        )
        self.begun = False
        self.run: Callable[[], Tensor] = self.step

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = total = self.of.loss(self.model, self.batch)
        if self.authors is not None and self.begun:
            total = loss + self.authors.loss()
        total.backward()
        if isinstance(self.adapter, MoIL) and self.authors is None:
            self.adapter.step()
        self.optimizer.step()
        self.begun = True
        return loss.detach()

    def compile(self) -> None:
        torch._dynamo.reset()
        options = {"fullgraph": True, "dynamic": False, "backend": self.size.compiler}
        for module in self.model.modules():
            if type(module).__name__ in self.of.layers:
                module.compile(**options)
        if self.authors is not None:
            self.authors.distance = torch.compile(self.authors.distance, **options)

    def capture(self) -> None:
        """Executes nothing; from now on `run` replays."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step()

        def replay() -> Tensor:
            graph.replay()
            return loss

        self.run = replay

    def stand(self) -> None:
        """From now on a step computes all and moves no weight: a loss that nears 0 would leave zeros to compute with,
        which draw less power and run faster. In a captured graph, too."""
        self.lr.zero_()

    def backend(self) -> str | None:
        """Of our operations in a step: the layers', or the imitation's."""
        if self.authors is not None:
            return None
        if isinstance(self.adapter, MoIL):
            return resolve("imitation_step", self.adapter.groups()[0].weight0[:1]).name
        return ", ".join(sorted({choice.name for choice in explain(self.model).values()})) or None


# ---- what is right --------------------------------------------------------------------------------------------------


def verify(of: Model, methods: Sequence[str], device: torch.device) -> dict[str, str]:
    """The methods that are wrong, with what is wrong: on a tiny model in float32, without dropout."""
    size = SIZES["tiny"]
    batch = of.batch(size, 3, device, torch.float32)
    checks = [
        (_check_forward, (*METHODS, *BY_NAME), (*METHODS, *BY_NAME)),
        *((partial(_check_peft, pair), pair[:1], pair) for pair in ((PEFT, LORA), (PEFT_ALL, LORA_ALL))),
        *((partial(_check_merged, method), (method,), (method,)) for method in (LORA, LORA_ALL, AURORA)),
        (_check_imitation, (MOIL, AUTHORS), (MOIL, AUTHORS)),
    ]
    wrong = {}
    for check, asked_by, concerned in checks:
        try:
            if set(asked_by) & set(methods):
                check(of, size, batch)
        except WrongResult as error:
            wrong |= {method: str(error) for method in concerned if method in methods}
    return wrong


def _check(got: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    if got.keys() != exact.keys():
        raise WrongResult(f"expected gradients of {sorted(exact)}, got {sorted(got)}")
    for name, error in errors(got, exact).items():
        if not error <= ALIKE:  # so that NaN is wrong, too
            raise WrongResult(f"{name} is off by {error:.1e} of its largest value, {ALIKE:.0e} is tolerated")


def wrapped(
    method: str, of: Model, size: Size, like: Tensor, update: float = 1.0
) -> "tuple[nn.Module, Adapter | peft.PeftModel]":
    """What trains besides live weights has values of some size, drawn in the order of names: updates start at zero.

    update: how large the second factors are beside the first
    """
    model = of.build(size, like.device, like.dtype)
    adapter = wrap(method, model, of, size, dropout=0.0)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad and "live_" not in name}
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in sorted((_our_name(name), p) for name, p in own.items()):
            p.normal_(std=p.shape[-1] ** -0.5 * (update if ".up" in name else 1.0))
    return model, adapter


def _our_name(name: str) -> str:
    for letter, factor in (("A", "down"), ("B", "up")):
        name = name.replace(f"lora_{letter}.default.weight", factor)
    return name


def _check_forward(of: Model, size: Size, batch: Batch) -> None:
    """What every method trains, against the model's own forward."""
    base = of.build(size, batch.pixels.device, batch.pixels.dtype)
    with torch.no_grad():
        _check({"y": of.logits(base, batch)}, {"y": own_logits(base, batch)})


def _check_peft(pair: tuple[str, str], of: Model, size: Size, batch: Batch) -> None:
    """PEFT's loss and gradients against ours, with equal factors."""
    found = []
    for method in pair[::-1]:
        model, _ = wrapped(method, of, size, batch.pixels)
        trained = {_our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        loss = of.loss(model, batch)
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
        found.append({"loss": loss.detach(), **dict(zip(trained, grads))})
    _check(found[1], found[0])


def _check_merged(method: str, of: Model, size: Size, batch: Batch) -> None:
    """Merged and unmerged layers are the same function."""
    model, adapter = wrapped(method, of, size, batch.pixels)
    with torch.no_grad():
        unmerged = of.logits(model, batch)
        adapter.merge()
        _check({"y": unmerged}, {"y": of.logits(model, batch)})


def _check_imitation(of: Model, size: Size, batch: Batch) -> None:
    """The authors' loss, gradients and moves of teachers against ours, live weights and adapters being anywhere."""
    model, moil = wrapped(MOIL, of, size, batch.pixels)
    moil.config = replace(moil.config, decay=VERIFIED_DECAY)
    with torch.no_grad():
        for p in moil.parameters("live"):
            p.add_(torch.randn_like(p), alpha=DRIFT * p.shape[-1] ** -0.5)
    of.loss(model, batch).backward()
    moil.step()  # the first one only counts
    teachers = [teacher for group in moil.groups() for teacher in (*group.teacher, *group.teacher_bias)]
    before = [teacher.clone() for teacher in teachers]

    def authors_step() -> Tensor:
        torch._foreach_copy_(teachers, before)
        loss = AuthorsImitation(moil).loss()
        loss.backward()
        return loss.detach()

    found = []
    for step in (moil.step, authors_step):
        for p in moil.parameters("adapter"):
            p.grad = torch.zeros_like(p)
        results = {"loss": step()} | {name: p.grad.clone() for name, p in moil.named_parameters("adapter")}
        moves = torch._foreach_sub(teachers, before)
        found.append(results | {f"the move of teacher {index}": move for index, move in enumerate(moves)})
    _check(found[1], found[0])
