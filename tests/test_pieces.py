"""Batches cut into pieces that fit: what a sample takes, by hand and by counting live tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from live_memory import LiveMemory
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget import ForgetOptions, Split, estimate_curvature, forget, resolve_split
from fisher_forget import params as P
from fisher_forget.curvature.cost import CostEstimate
from fisher_forget.data.batches import Batch, make_batch
from fisher_forget.data.pieces import OUTPUTS, Pieces
from fisher_forget.errors import ConfigError
from fisher_forget.experiments.dry_run import COPIES, forget_bytes
from fisher_forget.likelihood import Categorical, Gaussian, Likelihood
from fisher_forget.unlearn.objective import Objective

MIB = 2**20
WORDS, LENGTH, SAMPLES = 500, 16, 160


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))).to(dtype)


class Words(nn.Module):
    """34 kB of weights, 32 kB of outputs a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 8)
        self.head = nn.Linear(8, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(ids))
        return out


def words() -> tuple[nn.Module, Split]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (SAMPLES, LENGTH), generator=g)
    data = TensorDataset(ids, ids.roll(-1, 1))
    return seeded(Words), resolve_split(DataLoader(data, batch_size=SAMPLES), [0, 1, 2])


def numbers(likelihood: Likelihood) -> tuple[nn.Module, Split]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20, 4, generator=g, dtype=torch.float64)
    y = torch.randint(3, (20,), generator=g)
    if isinstance(likelihood, Gaussian):
        y = torch.randn(20, 3, generator=g, dtype=torch.float64)
    return mlp(torch.float64), resolve_split(DataLoader(TensorDataset(x, y), batch_size=7), [0, 1])


def pieces_of(model: nn.Module, at: P.Params | None = None) -> Pieces:
    @torch.enable_grad()
    def build(batch: Batch) -> Tensor:
        return P.call(model, {}, batch.args, batch.kwargs)

    return Pieces(model, build, at)


class TestPieces:
    def test_the_size_of_a_sample_is_that_of_its_graph_and_outputs(self) -> None:
        # saved: the input of 4 numbers, and tanh's 8, which the next layer has, too
        batch = make_batch((torch.zeros(10, 4), torch.zeros(10)))
        assert pieces_of(mlp()).sample_bytes(batch) == 4 * (4 + 8 + OUTPUTS * 3)

    def test_weights_do_not_count_wherever_they_lie(self) -> None:
        model = nn.Linear(1000, 10)
        batch, at = (
            make_batch((torch.zeros(3, 1000), torch.zeros(3))),
            P.detached(dict(model.named_parameters())),
        )
        for pieces in (pieces_of(model), pieces_of(model, at)):
            assert pieces.sample_bytes(batch) == 4 * (1000 + OUTPUTS * 10)

    def test_a_batch_is_cut_into_what_fits_and_never_less_than_a_sample(self) -> None:
        pieces, x = pieces_of(mlp()), torch.arange(40.0).view(10, 4)
        batch = make_batch((x, torch.zeros(10)))
        size = pieces.sample_bytes(batch)
        for memory, sizes in (
            (3 * size, [3, 3, 3, 1]),
            (4 * size - 1, [3, 3, 3, 1]),
            (1, [1] * 10),
        ):
            cut = list(pieces(batch, memory))
            assert [len(piece) for piece in cut] == sizes
            assert torch.equal(torch.cat([piece.args[0] for piece in cut]), x)

    def test_each_shape_is_measured(self) -> None:
        pieces = pieces_of(seeded(Words))
        short, long = (
            pieces.sample_bytes(make_batch((torch.zeros(2, n).long(), torch.zeros(2, n))))
            for n in (5, 50)
        )
        assert 9 < long / short < 11


class TestResults:
    @pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.5)], ids=repr)
    def test_they_do_not_depend_on_the_bound(self, likelihood: Likelihood) -> None:
        model, split = numbers(likelihood)
        samples = split.indices("all")
        v = P.randn_like(dict(model.named_parameters()), torch.Generator().manual_seed(2))
        found = []
        for memory in (1, 5_000, 2**30):
            objective = Objective(model, likelihood, memory=memory)
            to = P.add(objective.start, v, 0.1)
            gradient = objective.gradient(split.batches(samples), to)
            product = objective.ggn(split, samples, to)
            found.append(
                [
                    P.flatten(gradient.sums),
                    torch.tensor([gradient.loss, gradient.count]).double(),
                    objective.losses_and_counts(split.batches(samples), to)[0],
                    objective.divergence(split.batches(samples), objective.start, to),
                    P.flatten(product(v)),
                ]
            )
            assert product.kept == (memory == 2**30)
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

    def test_losses_and_divergences_are_those_of_torch(self) -> None:
        model, split = numbers(Categorical())
        objective = Objective(model, Categorical(), memory=1000)
        to = P.map_params(lambda x: 1.5 * x, objective.start)
        x, y = split.base.tensors
        with torch.no_grad():
            before, after = model(x), P.load(model, to)(x)
        categorical = torch.distributions.Categorical
        kl = torch.distributions.kl_divergence(
            categorical(logits=before), categorical(logits=after)
        )
        batches = list(split.batches("all"))
        torch.testing.assert_close(objective.divergence(batches, objective.start, to), kl)
        loss = nn.CrossEntropyLoss(reduction="none")(after, y)
        torch.testing.assert_close(objective.losses_and_counts(batches, to)[0], loss)

    def test_nobody_has_no_losses(self) -> None:
        model, split = numbers(Categorical())
        objective = Objective(model, Categorical())
        nobody = split.batches(split.forget[:0])
        assert objective.losses_and_counts(nobody, objective.start)[0].shape == (0,)
        assert objective.divergence([], objective.start, objective.start).shape == (0,)

    def test_one_product_keeps_its_graphs_and_earlier_ones_stay_right(self) -> None:
        model, split = numbers(Categorical())
        objective = Objective(model, Categorical())
        first = objective.ggn(split, split.retain, objective.start)
        before = P.flatten(first(objective.start))
        assert first.kept
        second = objective.ggn(split, split.retain, P.scale(objective.start, 2.0))
        assert second.kept
        assert not first.kept
        torch.testing.assert_close(P.flatten(first(objective.start)), before, rtol=1e-12, atol=0)

    def test_few_batches_are_held_and_many_are_read_again(self) -> None:
        model, split = numbers(Categorical())
        held = Objective(model, Categorical()).reader(split, split.retain)
        assert held() is held()
        again = Objective(model, Categorical(), memory=2**10).reader(split, split.retain)
        for read in (held, again):
            seen = torch.cat([batch.samples for batch in read() if batch.samples is not None])
            assert seen.tolist() == split.retain.tolist()


OPERATIONS: dict[str, Callable[[Objective, Split], object]] = {
    "gradient": lambda o, s: o.gradient(s.batches("all"), o.start),
    "losses": lambda o, s: o.losses_and_counts(s.batches("all"), o.start)[0],
    "divergence": lambda o, s: o.divergence(s.batches("all"), o.start, o.start),
    "product": lambda o, s: o.ggn(s, s.indices("all"), o.start)(o.start),
}


class TestPeak:
    def peak(self, run: Callable[[Objective, Split], object], memory: int) -> int:
        model, split = words()
        objective = Objective(model, Categorical(), memory=memory)
        with LiveMemory() as live:
            run(objective, split)
        return live.peak

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_every_operation_stays_within_the_bound(self, name: str) -> None:
        run, bound = OPERATIONS[name], 4 * MIB
        assert self.peak(run, bound) <= bound
        assert self.peak(run, 2**30) > 2 * bound  # what it takes otherwise


class TestWholeCall:
    BOUND = 4 * MIB

    def problem(self) -> tuple[nn.Module, Split]:
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(WORDS, (64, LENGTH), generator=g)
        ids[:3] = ids[3:6]  # whose words others have, too
        data = TensorDataset(ids, ids.roll(-1, 1))
        return seeded(Words), resolve_split(DataLoader(data, batch_size=64), [0, 1, 2])

    @pytest.mark.filterwarnings("ignore::fisher_forget.FisherForgetWarning")  # never trained
    def test_it_stays_within_the_bound_and_foresees_what_it_takes(self) -> None:
        model, split = self.problem()
        results, peaks = [], []
        for memory in (self.BOUND, 2**30):
            options = ForgetOptions(structure="diagonal", memory=memory, weight_decay=0.1)
            with LiveMemory() as live:
                results.append(forget(model, split, split.forget, options, progress=False))
            peaks.append(live.peak)
            objective = Objective(model, Categorical(), memory=memory)
            cost = estimate_curvature(
                objective.tape,
                split,
                objective.likelihood,
                dry_run=True,
                **options.curvature_keywords(*options.curvature_plan(split)),
            )
            assert isinstance(cost, CostEstimate)
            predicted = forget_bytes(objective, split, cost, direct=False)
            assert live.peak / 1.5 < predicted < 4 * live.peak
        weights = 4 * P.size(P.trainable(model))
        assert peaks[0] <= self.BOUND + COPIES * weights
        assert peaks[1] > 2 * peaks[0]
        few, many = (result.newton.params for result in results)
        torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-5)


class TestOption:
    @pytest.mark.parametrize("memory", [0, 8, 1000.5, "1 GiB", True, None])
    def test_it_is_a_number_of_bytes(self, memory: object) -> None:
        with pytest.raises(ConfigError, match="bytes"):
            ForgetOptions(memory=memory)  # type: ignore[arg-type]
