"""Momentum encoder, momentum queue, and gathering over ranks: against lists, hand formulas and one big process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from peft_kernels.layers import LowRankLinear
from peft_kernels.objectives import MomentumQueue, contrastive_loss, gather_features, momentum_copy, momentum_update


def contents(queue):
    """{id: (image, text)} of what is stored."""
    rows = zip(queue.ids.tolist(), queue.image.tolist(), queue.text.tolist())
    return {label: (image, text) for label, image, text in rows if label >= 0}


@pytest.mark.parametrize("batches", [[4, 4], [3, 3, 3], [5, 7, 1, 0, 5], [8], [20, 3], [16, 5], [2, 17]])
def test_queue_holds_the_last_pairs(batches):
    """Places 8: batches that divide it, that do not, that wrap around, that are larger."""
    queue, seen = MomentumQueue(8, 2), []
    for batch in batches:
        ids = torch.arange(len(seen), len(seen) + batch)
        image = torch.stack([ids, ids + 0.25], dim=1).float()
        queue.enqueue(image, -image, ids)
        seen += ids.tolist()
        assert contents(queue) == {i: ([i, i + 0.25], [-i, -i - 0.25]) for i in seen[-8:]}
        assert queue.position.item() == len(seen) % 8


def test_queue_without_ids_counts_but_is_nobodys_positive():
    queue, image, text = MomentumQueue(5, 3).double(), *(F.normalize(torch.randn(4, 3).double(), dim=1) for _ in "it")
    queue.enqueue(image[:2], text[:2])
    found = contrastive_loss(image[2:], text[2:], 0.1, image_ids=torch.tensor([0, 1]), **queue.bank())
    plain = contrastive_loss(image[2:], text[2:], 0.1, image_bank=image[:2], text_bank=text[:2])
    assert found.item() == pytest.approx(plain.item(), rel=1e-14)
    assert contrastive_loss(image[2:], text[2:], 0.1, **queue.bank()).item() == pytest.approx(plain.item(), rel=1e-14)


def test_empty_queue_changes_nothing():
    image, text = (F.normalize(torch.randn(4, 3), dim=1) for _ in "it")
    loss = contrastive_loss(image, text, 0.01, **MomentumQueue(7, 3).bank())
    torch.testing.assert_close(loss, contrastive_loss(image, text, 0.01), rtol=1e-6, atol=0)


def test_queue_state_dict_round_trip():
    queue, other = MomentumQueue(5, 3), MomentumQueue(5, 3)
    queue.enqueue(torch.randn(3, 3), torch.randn(3, 3), torch.arange(3))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.enqueue(torch.ones(4, 3), torch.ones(4, 3), torch.arange(3, 7))
    assert contents(queue) == contents(other) and len(contents(queue)) == 5


def test_queue_is_float32_whatever_it_is_given():
    queue, image = MomentumQueue(4, 3), torch.randn(2, 3, requires_grad=True)
    queue.enqueue(image.bfloat16(), image)
    assert queue.image.dtype == torch.float32 and not queue.text.requires_grad
    assert torch.equal(queue.image[:2], image.detach().bfloat16().float())
    whole = MomentumQueue(device="meta")
    assert whole.image.shape == (57_600, 256) and sum(b.nbytes for b in (whole.image, whole.text)) // 10**6 == 117


BAD = [
    (lambda: MomentumQueue(0), "size"),
    (lambda: MomentumQueue(8, True), "dim"),
    (lambda: MomentumQueue(8, 3).enqueue(torch.ones(2, 4), torch.ones(2, 4)), "image"),
    (lambda: MomentumQueue(8, 3).enqueue(torch.ones(2, 3), torch.ones(3, 3)), "text"),
    (lambda: MomentumQueue(8, 3).enqueue(torch.ones(2, 3), torch.ones(2, 3), torch.arange(3)), "ids"),
    (lambda: MomentumQueue(8, 3).enqueue(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)), "ids"),
    (lambda: gather_features(3), "features"),
    (lambda: gather_features(torch.tensor(3)), "features"),
    (lambda: momentum_update(nn.Linear(3, 4), nn.Linear(3, 4), 1.5), "decay"),
    (lambda: momentum_update(nn.Linear(3, 4), nn.Linear(3, 5)), "teacher.weight"),
    (lambda: momentum_update(nn.Linear(3, 4, bias=False), nn.Linear(3, 4)), "teacher"),
    (lambda: momentum_update(nn.Linear(3, 4), nn.BatchNorm1d(4)), "teacher"),
    (lambda: momentum_update(*(nn.Linear(3, 4, dtype=torch.bfloat16) for _ in "tm")), "teacher.weight"),
]


@pytest.mark.parametrize(("call", "name"), BAD, ids=[f"{i}-{row[1]}" for i, row in enumerate(BAD)])
def test_bad_input_names_the_argument(call, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        call()


# ---- momentum encoder ----------------------------------------------------------------------------------------------


def model():
    linear = LowRankLinear(nn.Linear(6, 4), 2)
    nn.init.normal_(linear.up)
    return nn.Sequential(linear, nn.BatchNorm1d(4), nn.Linear(4, 3))


def test_momentum_copy_shares_what_is_frozen():
    encoder = model().eval()
    teacher, x = momentum_copy(encoder), torch.randn(5, 6)
    assert torch.equal(teacher(x), encoder(x)) and not teacher(x).requires_grad
    assert teacher[0].weight is encoder[0].weight and teacher[0].up is not encoder[0].up
    assert encoder[0].up.requires_grad and encoder[2].weight.requires_grad and not teacher[2].weight.requires_grad


def test_momentum_encoder_reads_live_parameters_and_averages_the_others():
    encoder, x = model().eval(), torch.randn(5, 6)
    teacher = momentum_copy(encoder, live=[encoder[0].up])
    assert teacher[0].up is encoder[0].up and encoder[0].up.requires_grad
    assert teacher[0].down is not encoder[0].down and not teacher[0].down.requires_grad
    assert teacher[0].weight is encoder[0].weight
    before = teacher[0].down.clone()
    with torch.no_grad():
        for parameter in (encoder[0].up, encoder[0].down):
            parameter.add_(1.0)
    momentum_update(teacher, encoder, 0.75)
    torch.testing.assert_close(teacher[0].down, before + 0.25)
    assert torch.equal(teacher[0].up, encoder[0].up)
    with torch.no_grad():
        expected = encoder[0].bias + x @ encoder[0].weight.t() + x @ (before + 0.25).t() @ encoder[0].up.t()
        torch.testing.assert_close(teacher[0](x), expected)
    with pytest.raises(ValueError, match=r"^live: expected parameters of the module, got 1 others"):
        momentum_copy(encoder, live=[encoder[0].down, nn.Parameter(torch.ones(3))])


def test_momentum_update_is_the_formula():
    encoder = model().double()
    teacher = momentum_copy(encoder)
    before = copy.deepcopy(dict(teacher.named_parameters()))
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1.0)
    encoder(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()  # moves BatchNorm's buffers too
    optimizer.step()
    for _ in range(2):
        momentum_update(teacher, encoder, 0.75)
    for name, current in encoder.named_parameters():
        expected = 0.75**2 * before[name] + (1 - 0.75**2) * current
        torch.testing.assert_close(teacher.get_parameter(name), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(before["2.weight"], encoder[2].weight)
    for name, buffer in encoder.named_buffers():
        assert torch.equal(teacher.get_buffer(name), buffer), name


def test_momentum_update_defaults_to_the_published_decay_and_takes_bfloat16_models():
    encoder = nn.Linear(3, 4, dtype=torch.bfloat16)
    teacher = momentum_copy(encoder).float()
    before = teacher.weight.double().clone()
    with torch.no_grad():
        encoder.weight.add_(1)
    momentum_update(teacher, encoder)
    expected = before + 0.005 * (encoder.weight.double() - before)
    torch.testing.assert_close(teacher.weight.double(), expected, rtol=1e-6, atol=1e-7)
    momentum_update(nn.ReLU(), nn.ReLU())  # nothing to move


# ---- two ranks -----------------------------------------------------------------------------------------------------


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, 4, 6, dtype=torch.float64, generator=generator), torch.tensor([4, 9, 4, 1])


def embeddings(weight, images, texts):
    return F.normalize(images @ weight, dim=1), F.normalize(texts @ weight.flip(0), dim=1)


def train(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    (images, texts, weight), ids = batch()
    mine, weight = slice(2 * rank, 2 * rank + 2), weight.t().clone().requires_grad_()
    image, text = (gather_features(t) for t in embeddings(weight, images[mine], texts[mine]))
    contrastive_loss(image, text, 0.2, image_ids=gather_features(ids[mine])).backward()
    dist.all_reduce(weight.grad)
    queue = MomentumQueue(3, 6)
    queue.enqueue(images[mine], texts[mine], ids[mine] + 10 * torch.arange(4)[mine])
    torch.save((weight.grad / 2, queue.state_dict()), f"{folder}/{rank}.pt")  # divided as DDP does
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_train_as_one_process_and_fill_the_same_queue(tmp_path):
    (images, texts, weight), ids = batch()
    weight = weight.t().clone().requires_grad_()
    contrastive_loss(*embeddings(weight, images, texts), 0.2, image_ids=ids).backward()
    queue = MomentumQueue(3, 6)
    queue.enqueue(images, texts, ids + 10 * torch.arange(4))
    mp.spawn(train, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        grad, state = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(grad, weight.grad, rtol=1e-12, atol=1e-13)
        assert all(torch.equal(value, state[name]) for name, value in queue.state_dict().items())
