"""What a contrastive loss compares with besides its batch: a momentum encoder, its queue, and other ranks' features.

    momentum encoder    teacher ← decay · teacher + (1 − decay) · model, after every optimizer step
    queue               the last `size` pairs that the momentum encoder has seen, on all ranks

Sources: docs/method.md, section 4; MoCo (arXiv 1911.05722), ALBEF (arXiv 2107.07651) and BLIP (arXiv 2201.12086), which
keep 57,600 pairs and a decay of 0.995. They start the queue with random vectors; here what is not filled does not
count.
"""

import copy
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_kernels.checks import check_shape, check_tensor
from peft_kernels.ops.weight_distance import check_decay

EMPTY = -1  # the id of a place in the queue that holds no pair
UNKNOWN = torch.iinfo(torch.int64).max  # the id of a pair that came without one: equal to no image's


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_features(features: Tensor) -> Tensor:
    """All ranks' rows in the order of ranks, differentiable; `features` itself without torch.distributed.

    features: (B, ...), of one shape on every rank (drop_last=True in the loader): a rank with fewer rows hangs them all
    returns gathered: (ranks · B, ...)

    The gradient is the sum of what all ranks' losses send to this rank's rows. DDP then averages over ranks, so that a
    loss over the gathered batch trains as one process with the whole batch would.
    """
    if not isinstance(features, Tensor) or features.dim() == 0:
        raise TypeError(f"features: expected a Tensor with rows, got {features!r}")
    return features if ranks() == 1 else _Gather.apply(features)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features):
        ctx.rows = features.shape[0]
        features = features.contiguous()
        gathered = [torch.empty_like(features) for _ in range(ranks())]
        dist.all_gather(gathered, features)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # the sum comes in place
        dist.all_reduce(grad)
        return grad.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


class MomentumQueue(nn.Module):
    """The last `size` pairs of normalised embeddings, as further candidates of `contrastive_loss`.

        loss = contrastive_loss(image, text, temperature, ..., image_ids=ids, **queue.bank())
        queue.enqueue(momentum_image, momentum_text, ids)

    size: places; BLIP's 57,600 take 118 MB in float32 at 256 dimensions. Any batch size goes with any size
    dim: of the embeddings
    Buffers, all in the state dict: image, text (size, dim), float32 if the module is not cast; ids (size,) int64, -1
    where nothing is stored yet; position () int64, the place that is overwritten next.

    Keep it outside of what DDP wraps, or give DDP broadcast_buffers=False: it would send the whole queue in every
    forward. Ranks hold the same queue without that, because each stores all ranks' pairs.
    Raises ValueError or TypeError, naming the argument.
    """

    def __init__(self, size: int = 57_600, dim: int = 256, device: torch.device | str | None = None):
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer ≥ 1, got {value!r}")
        self.register_buffer("image", torch.zeros(size, dim, dtype=torch.float32, device=device))
        self.register_buffer("text", torch.zeros(size, dim, dtype=torch.float32, device=device))
        self.register_buffer("ids", torch.full((size,), EMPTY, dtype=torch.int64, device=device))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device))

    def bank(self) -> dict[str, Tensor]:
        """`contrastive_loss`'s arguments image_bank, text_bank and bank_ids. Not copies: it copies them."""
        return {"image_bank": self.image, "text_bank": self.text, "bank_ids": self.ids}

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor | None = None) -> None:
        """Store a batch in place of the oldest pairs, that of every rank under torch.distributed.

        image, text: (B, dim), as the momentum encoder gives them, B the same on every rank
        ids: (B,) int64, which image it is, ≥ 0; None if no image comes twice
        """
        size, dim = self.image.shape
        for name, features in (("image", image), ("text", text)):
            check_tensor(name, features, self.image)
            if features.dim() != 2 or features.shape[1] != dim:
                raise ValueError(f"{name}: expected shape (B, {dim}), got {tuple(features.shape)}")
        check_shape("text", text, tuple(image.shape), "that of image")
        if ids is None:
            ids = self.ids.new_full(image.shape[:1], UNKNOWN)
        check_tensor("ids", ids, self.image, dtypes=(torch.int64,))
        check_shape("ids", ids, tuple(image.shape[:1]), "(B,)")
        image, text, ids = (gather_features(t) for t in (image, text, ids))
        total = image.shape[0]
        kept = min(total, size)  # of a batch larger than the queue, the last pairs: no place is written twice
        places = torch.arange(total - kept, total, device=self.ids.device).add_(self.position).remainder_(size)
        for buffer, new in ((self.image, image), (self.text, text), (self.ids, ids)):
            buffer.index_copy_(0, places, new[total - kept :].to(buffer.dtype))
        self.position.add_(total).remainder_(size)  # on the device: nothing waits for it

    def extra_repr(self) -> str:
        return f"size={self.image.shape[0]}, dim={self.image.shape[1]}"


def momentum_copy(module: nn.Module, live: Iterable[nn.Parameter] = ()) -> nn.Module:
    """A momentum encoder of `module`: a copy that takes no gradients and follows by `momentum_update`.

    live: parameters of the module that train, and that the momentum encoder reads as they are at every moment instead
        of averaging them. Aurora's release does so with U, V and C. They go on requiring gradients: run it in no_grad

    Frozen parameters are not copied but shared, so that with adapters the copy costs what the adapters do: call this
    after choosing what trains. What is done to the frozen ones (a cast, a merge of adapters) reaches both.
    Raises ValueError where one of the live parameters is not the module's.
    """
    own, live = {id(p) for p in module.parameters()}, list(live)
    if strange := sum(id(p) not in own for p in live):
        raise ValueError(f"live: expected parameters of the module, got {strange} others")
    shared = {id(p): p for p in (*live, *(p for p in module.parameters() if not p.requires_grad))}
    teacher = copy.deepcopy(module, dict(shared))  # what deepcopy takes as copied already
    for parameter in teacher.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return teacher


@torch.no_grad()
def momentum_update(teacher: nn.Module, module: nn.Module, decay: float = 0.995) -> None:
    """teacher ← decay · teacher + (1 − decay) · module, in place: after every optimizer step.

    teacher: `momentum_copy(module)`. What trains in `module` must be float32 or float64 here: in bfloat16 an average
        with 0.995 hardly ever moves (half of its unit in the last place is 0.2 to 0.4 % of a value)
    decay: in [0, 1]; BLIP's 0.995

    Frozen and live parameters stay; buffers are copied. Raises ValueError or TypeError, naming what does not fit.
    """
    check_decay(decay)
    pairs = {}
    for kind in ("parameters", "buffers"):
        own, following = (dict(getattr(m, f"named_{kind}")()) for m in (module, teacher))
        if own.keys() != following.keys():
            differing = sorted(own.keys() ^ following.keys())
            raise ValueError(f"teacher: expected the module's {kind}, the two differ in {differing[:4]}")
        pairs[kind] = {name: (following[name], own[name]) for name in own}
        for name, (average, current) in pairs[kind].items():
            check_shape(f"teacher.{name}", average, tuple(current.shape), "that of the module")
    moving = {n: pair for n, pair in pairs["parameters"].items() if pair[1].requires_grad and pair[0] is not pair[1]}
    for name, (average, current) in moving.items():
        check_tensor(f"teacher.{name}", average, current, dtypes=(torch.float32, torch.float64))
    if moving:
        averages = [average for average, _ in moving.values()]
        torch._foreach_lerp_(averages, [current.to(average.dtype) for average, current in moving.values()], 1 - decay)
    for average, current in pairs["buffers"].values():
        average.copy_(current)
