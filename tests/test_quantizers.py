"""Quantizers learn as ml-4m's do (golden/quantizers.npz), alone and in several processes; FSQ and SimVQ by formula."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.tokenizers import _nearest, _quantize
from model.tokenizers._fsq import FSQ, levels_of
from model.tokenizers._nearest import largest_product, smallest_distance
from model.tokenizers._quantize import NAMES, Codebook, SimVQ, make
from tests.golden import make_quantizers as golden
from tests.golden.make_quantizers import CASES, Case

GOLDEN = Path(__file__).parent / "golden" / "quantizers.npz"
EVERY = [Case(quant_type=name) for name in NAMES]
EVERY += [Case(quant_type=name, num_codebooks=4) for name in ("lucid", "memcodes")]
EVERY += [Case(norm_codes=False, kmeans_init=True)]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


def generator_of(module: nn.Module) -> torch.Generator | None:
    book = getattr(module, "_codebook", None)
    return book.generator if isinstance(book, Codebook) else None


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Parity with ml-4m.


@pytest.mark.parametrize("name", CASES)
def test_twenty_training_steps_are_those_of_4m(name: str, answers: dict[str, np.ndarray]) -> None:
    module = make(CASES[name])
    found = golden.run(module, generator_of(module))
    wanted = {key.split("/", 1)[1]: value for key, value in answers.items() if key.startswith(name + "/")}
    assert set(found) == set(wanted)
    for what, value in wanted.items():
        if "ids" in what:
            assert np.array_equal(found[what], value), what
        else:
            np.testing.assert_allclose(found[what], value, rtol=1e-5, atol=1e-5, err_msg=what)


def test_the_golden_steps_replace_codes_and_leave_some_unused(answers: dict[str, np.ndarray]) -> None:
    # Else the parity above would say nothing about replacement.
    for name, case in CASES.items():
        if case.quant_type == "lucid":
            assert (answers[f"{name}/state__codebook.cluster_size"] < case.threshold_ema_dead_code).any(), name


def test_the_state_has_4ms_names_and_shapes() -> None:
    def shapes(**settings: object) -> dict[str, tuple[int, ...]]:
        return {name: tuple(v.shape) for name, v in make(Case(**settings)).state_dict().items()}  # type: ignore[arg-type]

    book = {"_codebook.initted": (1,), "_codebook.cluster_size": (48,), "_codebook.embed": (48, 8)}
    assert shapes() == book
    assert shapes(norm_codes=False) == book | {"_codebook.embed_avg": (48, 8)}
    heads = {"project_in.weight": (16, 8), "project_in.bias": (16,), "project_out.weight": (8, 16)}
    assert shapes(num_codebooks=2) == book | heads | {"project_out.bias": (8,)}
    memcodes = {"codes": (4, 48, 2), "to_k.weight": (4, 2, 2), "to_v.weight": (4, 2, 2)}
    assert shapes(quant_type="memcodes", num_codebooks=4) == memcodes


# What every quantizer promises.


@pytest.mark.parametrize("case", EVERY, ids=lambda c: f"{c.quant_type}_{c.num_codebooks}_{c.norm_codes}")
def test_what_every_quantizer_promises(case: Case) -> None:
    torch.manual_seed(0)
    module = make(case)
    twin = copy.deepcopy(module)
    steps = []
    for each in (module, twin):
        each.train()
        torch.manual_seed(0)
        x = random(2, 8, 3, 4).requires_grad_()
        codes, loss, ids = each(x)
        assert codes.shape == x.shape
        assert loss.shape == ()
        (codes.sum() + loss).backward()
        assert x.grad is not None
        assert float(x.grad.abs().sum()) > 0
        steps.append((codes.detach(), ids, [v.clone() for v in each.state_dict().values()]))
    assert all(torch.equal(a, b) for a, b in zip(steps[0][2], steps[1][2], strict=True))
    assert torch.equal(steps[0][1], steps[1][1])

    module.eval()
    assert all(buffer.is_floating_point() for buffer in module.buffers())  # whole numbers cannot be averaged
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        codes, loss, ids = module(x)
        assert float(loss) == 0
        assert ids.dtype == torch.int64
        assert ids.shape == ((2, 3, 4) if module.heads == 1 else (2, module.heads, 3, 4))
        assert int(ids.min()) >= 0
        assert int(ids.max()) < module.vocab_size <= case.codebook_size
        assert len(ids.unique()) > 1
        torch.testing.assert_close(module.lookup(ids), codes)
        other = module.lookup((ids + 1) % module.vocab_size)
        assert not torch.allclose(other, codes)
        with torch.autocast("cpu", torch.bfloat16):
            again, _, same = module(x)
            assert torch.equal(same, ids)
            assert torch.equal(again, codes)
            torch.testing.assert_close(module.lookup(ids), codes)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_type": "vq"}, "quant_type 'vq', expected one of lucid, memcodes, fsq, simvq"),
        ({"quant_type": "fsq", "num_codebooks": 2}, "num_codebooks 2 of quant_type 'fsq', expected 1"),
        ({"num_codebooks": 0}, "num_codebooks 0 of quant_type 'lucid'"),
        ({"quant_type": "memcodes", "num_codebooks": 3}, "latent_dim 8, expected a multiple of the 3 codebooks"),
        ({"code_replacement_policy": "none"}, "code_replacement_policy 'none', expected batch_random or linde"),
        ({"quant_type": "fsq", "codebook_size": 1}, "codebook_size 1, expected at least 2"),
    ],
)
def test_settings_that_no_quantizer_has_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(replace(Case(), **settings))


# The search.


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1000])
def test_the_best_code_is_found_in_parts(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, z = random(size, 6), random(333, 6, seed=1)
    exact = z.double() @ codes.double().T
    wanted = {largest_product: exact.argmax(1), smallest_distance: (exact - codes.square().sum(1) / 2).argmax(1)}
    largest: list[int] = []
    mm = torch.mm

    def watched(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        largest.append(len(a) * b.shape[1])
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    for products in (1, 5000, 2**21):
        monkeypatch.setitem(_nearest._PRODUCTS, "cpu", products)
        for search, ids in wanted.items():
            assert torch.equal(search(z, codes), ids)
        assert max(largest) <= max(products, size)
        largest.clear()


def test_of_equal_codes_the_first_is_chosen() -> None:
    z = F.normalize(random(50, 4), dim=1)
    codes = torch.cat([-z, z, z, z]).repeat(3, 1)
    assert torch.equal(largest_product(z, codes), 50 + torch.arange(50))
    assert torch.equal(smallest_distance(z, codes), 50 + torch.arange(50))


def test_products_stay_in_float32_whatever_the_program_chose() -> None:
    z, codes = F.normalize(random(200, 32), dim=1), F.normalize(random(4096, 32, seed=1), dim=1)
    exact = largest_product(z, codes)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(largest_product(z, codes), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# Several processes.

JOINED = {name: CASES[name] for name in ("cosine", "cosine_many_dead", "cosine_lbg", "cosine_kmeans", "euclid_kmeans")}
JOINED |= {"cosine_heads": replace(CASES["cosine_heads"], commitment_weight=0.0)}
# Splitting adds noise below float32's resolution, so the copies are equal but for the order of a sum: one step only.
STEPS = {"cosine_lbg": 1}


def joined(step: int) -> Tensor:
    """Three samples: the first process gets one of them, the second two."""
    return torch.cat([golden.latents(step), golden.latents(100 + step)])[:3]


def trained(name: str, part: slice) -> dict[str, Tensor]:
    module = make(JOINED[name])
    module.load_state_dict(golden.random_state(module))
    module.train()
    with torch.no_grad():
        for step in range(STEPS.get(name, 6)):
            module(joined(step)[part])
    return module.state_dict()


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: trained(name, slice(0, 1) if rank == 0 else slice(1, 3)) for name in JOINED}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_the_codebook_of_one_on_the_joined_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in JOINED:
        alone = trained(name, slice(0, 3))
        for what, value in alone.items():
            assert torch.equal(first[name][what], second[name][what]), f"{name} {what}"
            torch.testing.assert_close(first[name][what], value, rtol=1e-5, atol=1e-5, msg=f"{name} {what}")
        assert not torch.allclose(alone["_codebook.embed"], trained(name, slice(0, 1))["_codebook.embed"])


# k-means.


def test_kmeans_waits_for_the_first_training_batch_and_starts_once(tmp_path: Path) -> None:
    module = make(Case(kmeans_init=True, codebook_size=4, threshold_ema_dead_code=0.0, ema_decay=1.0))
    centres = 3 * torch.eye(8)[:4]
    x = (centres.repeat(30, 1) + 0.01 * random(120, 8)).view(2, 60, 8, 1).transpose(1, 2)
    with pytest.raises(ValueError, match="kmeans_init without a first batch"):
        module.eval()(x)
    # Drawn starts may share a cluster; this seed's do not.
    module._codebook.generator.manual_seed(16)
    module.train()(x)
    embed = module._codebook.embed.clone()
    assert torch.allclose((embed @ torch.eye(8)[:, :4]).max(dim=0).values, torch.ones(4), atol=1e-3)
    assert module._codebook.cluster_size.tolist() == [30.0] * 4
    module.train()(random(2, 8, 5, 5))
    assert torch.equal(module._codebook.embed.sign(), embed.sign())
    loaded = make(Case(kmeans_init=True, codebook_size=4))
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded.eval()(x)[2], module.eval()(x)[2])


# FSQ.


def test_levels_are_five_to_eight_with_the_largest_product_up_to_the_size() -> None:
    assert levels_of(1024) == (8, 5, 5, 5)
    assert levels_of(4096) == (8, 8, 8, 8)
    assert levels_of(64) == (8, 8)
    assert [levels_of(n) for n in (2, 7, 8)] == [(2,), (7,), (8,)]
    for size in (48, 256, 8192, 16384, 65536):
        levels = levels_of(size)
        assert set(levels) <= {5, 6, 7, 8}
        assert 0.8 * size < math.prod(levels) <= size


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (8, 8), (7,)])
def test_every_combination_of_levels_is_one_id_and_can_be_reached(levels: tuple[int, ...]) -> None:
    module = FSQ(math.prod(levels), len(levels)).eval()
    assert module.levels == levels
    digits = torch.tensor(list(itertools.product(*[range(n) for n in levels])))
    half = torch.tensor([n // 2 for n in levels])
    # The latents whose squashed values are whole steps: the inverse of the formula of Mentzer et al.
    counts = torch.tensor(levels, dtype=torch.float64)
    reach, offset = (counts - 1) * (1 - 1e-3) / 2, (counts % 2 == 0) * 0.5
    wanted = ((digits - half + offset) / reach).clamp(-1 + 1e-6, 1 - 1e-6)
    latents = (wanted.atanh() - (offset / reach).atanh()).float()
    codes, _, ids = module(latents.T[None, :, :, None])
    assert sorted(ids.flatten().tolist()) == list(range(math.prod(levels)))
    assert torch.equal(ids.flatten(), (digits * torch.tensor(module.radix)).sum(1))
    torch.testing.assert_close(codes[0, :, :, 0].T, (digits - half) / half)
    assert torch.equal(module.lookup(ids), codes)
    # Nothing is beyond the last level.
    assert int(module(torch.full((1, len(levels), 1, 1), 1e6))[2]) == math.prod(levels) - 1
    assert int(module(torch.full((1, len(levels), 1, 1), -1e6))[2]) == 0


def test_the_gradient_of_fsq_is_that_of_the_squashing() -> None:
    module = FSQ(1024, 4).train()
    x = (0.5 * random(1, 4, 2, 2)).requires_grad_()
    module(x)[0].sum().backward()
    counts = torch.tensor(module.levels).view(1, 4, 1, 1)
    smooth = x.detach().clone().requires_grad_()
    half = (counts - 1) * (1 - 1e-3) / 2
    offset = (counts % 2 == 0) * 0.5
    ((torch.tanh(smooth + torch.atanh(offset / half)) * half - offset) / (counts // 2)).sum().backward()
    torch.testing.assert_close(x.grad, smooth.grad)


# SimVQ.


def test_simvq_moves_its_unused_codes_with_the_used_ones() -> None:
    torch.manual_seed(0)
    module = SimVQ(32, 4, commitment_weight=0.5, seed=0).train()
    x = random(1, 4, 1, 3).requires_grad_()
    before = module.proj(module.codes).detach()
    codes, loss, ids = module(x)
    z = x.detach()[0, :, 0].T
    assert torch.equal(ids.flatten(), torch.cdist(z, before).argmin(dim=1))
    assert float(loss.detach()) == pytest.approx(1.5 * float((before[ids.flatten()] - z).square().mean()), rel=1e-5)
    torch.testing.assert_close(codes[0, :, 0].T, before[ids.flatten()])
    loss.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad
    moved = (module.proj(module.codes) - before).norm(dim=1)
    assert len(ids.unique()) <= 3
    assert bool((moved > 0).all())
    assert torch.equal(module.codes, SimVQ(32, 4, commitment_weight=0.5, seed=0).codes)


# Memcodes.


def test_memcodes_choose_by_chance_in_training_and_the_best_in_evaluation() -> None:
    torch.manual_seed(0)
    module = make(Case(quant_type="memcodes", num_codebooks=2))
    x = random(1, 8, 4, 4)
    with torch.no_grad():
        best = module.eval()(x)[2]
        assert torch.equal(module(x)[2], best)
        for head in range(2):
            q = x[0, 4 * head : 4 * head + 4].flatten(1).T / 2
            wanted = (q @ (module.codes[head] @ module.to_k.weight[head]).T).argmax(dim=1)
            assert torch.equal(best[0, head].flatten(), wanted)
        drawn = torch.stack([module.train()(x)[2] for _ in range(60)])
    assert len(drawn.unique(dim=0)) > 1
    # Gumbel noise draws from the softmax: the best code comes more often than one in 48.
    assert float((drawn == best).float().mean()) > 2 / 48


def test_usage_of_ids_of_several_heads() -> None:
    assert _quantize.usage([torch.tensor([[[0, 1]], [[2, 3]]])], 8) == (4, pytest.approx(4.0))


# The benchmark.


def test_the_benchmark_compares_all_quantizers_at_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import quantizers as benchmark  # not above, for the two processes would import it too

    shape = (64, 256, 8)
    amount = benchmark.Amount(2, 8, 4, (0, 1), (("rgb", 64),), 1, shape, shape)
    monkeypatch.setattr(benchmark, "QUICK", amount)
    found = benchmark.measure(True, None)
    assert found["search"]["evaluation"]["ours_ms"] > 0
    for task, codes in amount.tasks:
        figures = found["compared"][f"{task}_{codes}"]
        assert set(figures) == set(benchmark.VARIANTS)
        for name, run in figures.items():
            assert 0.97 * 64 * math.log2(codes) < run["bits"] <= 64 * math.log2(codes), name
            assert np.isfinite(run["by_seed"]).all()
            assert 1 / run["vocabulary"] <= run["used_share"] <= 1
            assert 1 <= run["perplexity"] <= run["vocabulary"]
        # The seeds are of the weights and of the batches.
        assert figures["lucid"]["by_seed"][0] != figures["lucid"]["by_seed"][1]
