"""The fused objective and the attention by groups and tiles against their plain forms, forward and backward."""

import copy
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from draft_reference import VOCAB, make_document, pack, tiny_config, tiny_model
from stages.train import DSparkTrainerModule
from stages.train import distances as distances_module
from stages.train import fused as fused_module
from stages.train.anchors import choose_anchors
from stages.train.attention import BlockRanges, DenseAttention, FlexAttention, GroupedAttention, plan_tiles
from stages.train.compiled import compiled
from stages.train.distances import Asked, Blocks, measure_distances

HEADS: list[dict[str, Any]] = [
    {"markov_rank": 0},
    {"markov_rank": 5},
    {"markov_rank": 5, "markov_head_type": "gated"},
    {"markov_rank": 5, "markov_head_type": "rnn"},
]
CONFIDENCES: list[dict[str, Any]] = [
    {"enable_confidence_head": False},
    {"confidence_head_with_markov": True},
    {"confidence_head_with_markov": False},
]
ALPHAS = st.sampled_from([0.0, 0.1, 0.9])


@pytest.fixture(params=["one chunk", "many"])
def _sizes(request: pytest.FixtureRequest) -> Iterator[None]:
    """All slots at once, or chunks of two slots in tiles of one: real sizes would never be cut in so small a case."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many":
            patch.setitem(fused_module.CHUNK_BYTES, "cpu", 2 * 3 * 4 * VOCAB)
            patch.setattr(fused_module, "MIN_CHUNK", 1)
            patch.setattr(distances_module, "TILE_BYTES", 4 * VOCAB)
        yield


def random_batch(seed: int, *, num_rows: int, num_documents: int) -> dict[str, torch.Tensor]:
    """Rows of documents of random lengths and masks, anchors among the candidates, the rest padding."""
    generator = torch.Generator().manual_seed(seed)
    rows, anchors = [], []
    for row in range(num_rows):
        lengths = torch.randint(2, 14, (num_documents,), generator=generator).tolist()
        documents = [make_document(length, seed=seed + 17 * row + i) for i, length in enumerate(lengths)]
        rows.append(documents)
        anchors.append(
            [choose_anchors(document.mask, 5, seed=seed, epoch=0, sample_id=row).tolist() for document in documents]
        )
    return pack(rows, anchors)


def gradients_of(module: DSparkTrainerModule, batch: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    module.zero_grad()
    metrics = module(**batch)
    metrics.loss_num.backward()
    return metrics, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def pair_of(config: Qwen3Config, **alphas: Any) -> tuple[DSparkTrainerModule, DSparkTrainerModule]:
    model = tiny_model(config)
    return (
        DSparkTrainerModule(model, **alphas),
        DSparkTrainerModule(copy.deepcopy(model), is_plain=True, **alphas),
    )


def assert_near(actual: torch.Tensor, expected: torch.Tensor, *, relative: float, what: str) -> None:
    """By the norm of the whole tensor: single entries that cancel out have no relative error of their own."""
    difference = float((actual - expected).norm())
    assert difference <= relative * float(expected.norm()) + 1e-6, f"{what}: {difference} of {float(expected.norm())}"


@pytest.mark.usefixtures("_sizes")
@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    head=st.sampled_from(HEADS),
    confidence=st.sampled_from(CONFIDENCES),
    block_size=st.integers(1, 5),
    num_layers=st.integers(1, 3),
    num_rows=st.integers(1, 3),
    num_documents=st.integers(1, 3),
    ce_alpha=ALPHAS,
    l1_alpha=ALPHAS,
    gamma=st.sampled_from([None, 2.0]),
    has_target=st.booleans(),
    cap=st.sampled_from([{}, {"final_logit_softcapping": 3.0}, {"logit_scale": 0.4}]),
)
def test_fused_equals_plain_in_float32(
    *,
    seed: int,
    head: dict[str, Any],
    confidence: dict[str, Any],
    block_size: int,
    num_layers: int,
    num_rows: int,
    num_documents: int,
    ce_alpha: float,
    l1_alpha: float,
    gamma: float | None,
    has_target: bool,
    cap: dict[str, float],
) -> None:
    config = tiny_config(block_size=block_size, num_draft_layers=num_layers, **head, **confidence)
    for name, value in cap.items():
        setattr(config, name, value)
    alphas = {"ce_loss_alpha": ce_alpha, "l1_loss_alpha": l1_alpha, "loss_decay_gamma": gamma}
    batch = random_batch(seed, num_rows=num_rows, num_documents=num_documents)
    if not has_target:
        alphas |= {"l1_loss_alpha": 0.0, "confidence_head_alpha": 0.0}
        del batch["target_last_hidden_states"]
    fast, plain = pair_of(config, **alphas)
    metrics, gradients = gradients_of(fast, batch)
    expected, expected_gradients = gradients_of(plain, batch)
    for name in ("loss", "loss_num", "ce_num", "l1_num", "confidence_num", "tau_num", "accept_rate_per_pos_num"):
        torch.testing.assert_close(getattr(metrics, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert metrics.num_supervised == expected.num_supervised
    assert metrics.num_blocks == expected.num_blocks
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_near(gradient, expected_gradients[name], relative=1e-4, what=name)


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("head", HEADS)
def test_fused_in_bfloat16_is_as_exact_as_plain(head: dict[str, Any]) -> None:
    """Both against the plain form in float32: the fused one may be off by what the plain one is, and little more."""
    fast, plain = pair_of(tiny_config(**head))
    batch = random_batch(3, num_rows=4, num_documents=3)
    exact, exact_gradients = gradients_of(plain, batch)
    errors: dict[str, list[float]] = {"loss": [], "gradient": []}
    for module in (fast, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            metrics, gradients = gradients_of(module, batch)
        errors["loss"].append(abs(float(metrics.loss.detach() - exact.loss.detach())))
        squares = [float((gradients[name].float() - exact_gradients[name]).square().sum()) for name in exact_gradients]
        errors["gradient"].append(sum(squares) ** 0.5)
    for name, (fused_error, plain_error) in errors.items():
        assert fused_error <= 1.5 * plain_error + 1e-3, name


@pytest.mark.usefixtures("_sizes")
def test_a_float64_draft_is_measured_in_float64() -> None:
    fast, plain = (module.double() for module in pair_of(tiny_config(markov_head_type="gated")))
    batch = random_batch(5, num_rows=2, num_documents=2)
    metrics, gradients = gradients_of(fast, batch)
    expected, expected_gradients = gradients_of(plain, batch)
    torch.testing.assert_close(metrics.loss_num.double(), expected.loss_num.double(), rtol=1e-6, atol=1e-7)
    for name, gradient in gradients.items():
        assert_near(gradient, expected_gradients[name], relative=1e-6, what=name)


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("head", HEADS)
def test_scores_are_those_of_the_plain_form(head: dict[str, Any]) -> None:
    fast, plain = pair_of(tiny_config(**head))
    batch = random_batch(8, num_rows=2, num_documents=3)
    scores, expected = fast.score(**batch), plain.score(**batch)
    for name in ("row", "anchor", "slot", "top1_agree"):
        assert torch.equal(getattr(scores, name), getattr(expected, name)), name
    for name in ("accept_rate", "greedy_accept_rate", "cross_entropy", "confidence"):
        torch.testing.assert_close(getattr(scores, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_sizes")
def test_the_backward_pass_scales_and_may_be_repeated() -> None:
    fast, _ = pair_of(tiny_config())
    batch = random_batch(2, num_rows=1, num_documents=2)
    _, once = gradients_of(fast, batch)
    once = {name: gradient.clone() for name, gradient in once.items()}
    fast.zero_grad()
    loss = fast(**batch).loss_num
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    for name, parameter in fast.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 3 * once[name], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("is_traced", [False, True])
def test_tiles_measure_what_the_plain_form_measures(dtype: torch.dtype, softcap: float | None, is_traced: bool) -> None:
    """In place and by tiles, and as torch.compile sees it, in one graph; what its kernels compute needs a compiler."""
    generator = torch.Generator().manual_seed(0)
    base, bias, target = (3 * torch.randn(count, 40, generator=generator).to(dtype) for count in (9, 9, 4))
    asked = Asked(
        picked=torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3]), label=torch.arange(9), weight=torch.rand(9), ce_alpha=0.3,
        l1_alpha=0.7, logit_scale=1.5, softcap=softcap, with_top1=True,
    )  # fmt: skip
    plain = measure_distances
    if is_traced:
        torch.compiler.reset()
        plain = torch.compile(measure_distances, dynamic=True, fullgraph=True, backend="aot_eager")
    expected = plain(base, bias, target, asked, True)
    measured = Blocks().measure(base.clone(), bias, target, asked, True)
    torch.testing.assert_close(measured.cross_entropy, expected.cross_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(measured.l1, expected.l1, rtol=1e-5, atol=1e-5)
    assert torch.equal(measured.top1, expected.top1)
    torch.testing.assert_close(measured.greedy, expected.greedy, rtol=1e-5, atol=1e-6)
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(measured.grad, expected.grad, rtol=bound, atol=1e-6)
    torch.testing.assert_close(measured.grad_base, expected.grad_base, rtol=bound, atol=1e-6)


def test_a_label_that_the_draft_rules_out_has_a_finite_loss() -> None:
    """A probability that float32 cannot hold: the cross-entropy comes from the logits."""
    logits = torch.zeros(1, 40)
    logits[0, 0] = 300.0
    asked = Asked(
        picked=torch.zeros(1, dtype=torch.long), label=torch.tensor([1]), weight=torch.ones(1), ce_alpha=1.0,
        l1_alpha=0.0, logit_scale=None, softcap=None, with_top1=False,
    )  # fmt: skip
    measured = Blocks().measure(logits.clone(), None, None, asked, True)
    assert float(measured.cross_entropy) == 300.0
    assert torch.isfinite(measured.grad).all()


def ranges_of(anchors: list[list[int]], lengths: list[int], *, block_size: int) -> BlockRanges:
    """Documents end to end; anchors count from their document's start."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    pairs = [(start, start + anchor) for start, chosen in zip(starts, anchors, strict=True) for anchor in chosen]
    start, anchor = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return BlockRanges(start=start, anchor=anchor, block_size=block_size)


def dense_mask(ranges: BlockRanges, query_slots: torch.Tensor, *, num_context: int) -> torch.Tensor:
    """As it is written down: a query sees its document before its anchor, and its own block."""
    keys = num_context + len(ranges) * ranges.block_size
    mask = torch.zeros(len(query_slots), keys, dtype=torch.bool)
    for query, slot in enumerate(query_slots.tolist()):
        block = slot // ranges.block_size
        mask[query, int(ranges.start[block]) : int(ranges.anchor[block])] = True
        own = num_context + block * ranges.block_size
        mask[query, own : own + ranges.block_size] = True
    return mask


CASES = [
    ([[0, 3, 4, 9], [2], [0, 1]], [12, 5, 4], 3, None),
    ([list(range(0, 300, 2)), list(range(5, 60))], [330, 70], 7, None),
    ([list(range(0, 300, 2)), list(range(5, 60))], [330, 70], 7, 3),
    ([[0]], [1], 2, None),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("anchors", "lengths", "block_size", "only_first"), CASES)
@pytest.mark.parametrize("form", ["groups", "tiles"])
def test_attention_equals_the_dense_form(
    anchors: list[list[int]], lengths: list[int], block_size: int, only_first: int | None, form: str
) -> None:
    """`only_first`: the first slots of each block ask, as where answers end inside blocks."""
    ranges, num_context = ranges_of(anchors, lengths, block_size=block_size), sum(lengths)
    slots = torch.arange(len(ranges) * block_size)
    query_slots = slots if only_first is None else slots[slots % block_size < only_first]
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, count: int) -> torch.Tensor:
        return torch.randn(1, heads, count, 16, generator=generator).requires_grad_(form == "groups")

    query = random(4, len(query_slots))
    context, block = (random(2, num_context), random(2, num_context)), (random(2, len(slots)), random(2, len(slots)))
    mask = dense_mask(ranges, query_slots, num_context=num_context)
    expected = DenseAttention(mask=mask)(query, context, block)
    attention = {"groups": GroupedAttention, "tiles": FlexAttention}[form]
    output = attention(ranges, query_slots, num_context=num_context)(query, context, block)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    if form == "groups":
        inputs = [query, *context, *block]
        upstream = torch.randn(output.shape, generator=generator)
        for actual, wanted in zip(
            torch.autograd.grad(output, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("anchors", "lengths", "block_size", "only_first"), CASES)
def test_tiles_hold_every_pair_that_meets(
    anchors: list[list[int]], lengths: list[int], block_size: int, only_first: int | None
) -> None:
    """The eager operator reads the mask alone; the kernel skips tiles, and does not mask those that are full."""
    ranges, num_context = ranges_of(anchors, lengths, block_size=block_size), sum(lengths)
    slots = torch.arange(len(ranges) * block_size)
    query_slots = slots if only_first is None else slots[slots % block_size < only_first]
    mask = dense_mask(ranges, query_slots, num_context=num_context)
    tiles = plan_tiles(ranges, query_slots, num_context=num_context)
    size = 128
    listed = {"partial": set(), "full": set()}
    for kind, counts, indices in (
        ("partial", tiles.kv_num_blocks, tiles.kv_indices),
        ("full", tiles.full_kv_num_blocks, tiles.full_kv_indices),
    ):
        for row in range(counts.shape[-1]):
            listed[kind] |= {(row, int(column)) for column in indices[0, 0, row, : int(counts[0, 0, row])]}
    assert not listed["partial"] & listed["full"]
    for row in range(-(-mask.shape[0] // size)):
        for column in range(-(-mask.shape[1] // size)):
            tile = mask[row * size : (row + 1) * size, column * size : (column + 1) * size]
            place = (row, column)
            if place in listed["full"]:
                assert tile.all()
            assert not tile.any() or place in listed["partial"] | listed["full"]
    if len(mask) > size:
        assert listed["full"], "a long context has tiles that all see"
        assert len(listed["partial"]) + len(listed["full"]) < -(-mask.shape[0] // size) * -(-mask.shape[1] // size)


def test_what_the_compiler_cannot_do_runs_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fail(*_: object) -> NoReturn:
        calls.append(1)
        raise RuntimeError("no code for this machine")

    def double(values: torch.Tensor) -> torch.Tensor:
        return 2 * values

    fused = compiled(double, backend=fail)
    for _ in range(2):
        torch.testing.assert_close(fused(torch.ones(3)), torch.full((3,), 2.0))
    assert len(calls) == 1
    assert [record.levelname for record in caplog.records if record.name.startswith("stages")] == ["WARNING"]
    assert "double cannot be compiled here" in caplog.text
    assert "no code for this machine" in caplog.text


def test_what_a_compiled_function_raises_itself_comes_through() -> None:
    def fail(values: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"{len(values)} values are too many")

    with pytest.raises(ValueError, match="2 values are too many"):
        compiled(fail, backend="eager")(torch.ones(2))


@pytest.mark.parametrize("head", HEADS)
def test_anchors_may_come_in_any_order(head: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(**head)).double()
    rows = [[make_document(12, seed=1), make_document(9, seed=2)], [make_document(20, seed=3)]]
    batch = pack(rows, [[[0, 4, 9], [2, 5]], [[1, 7, 8, 15]]])
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    shuffled = batch["anchor_positions"][:, torch.randperm(batch["anchor_positions"].shape[1])]
    expected = DSparkTrainerModule(model, is_plain=True)(**batch)
    for is_plain in (False, True):
        module = DSparkTrainerModule(model, is_plain=is_plain)
        result = module(**{**batch, "anchor_positions": shuffled})
        torch.testing.assert_close(result.loss_num, expected.loss_num)
        torch.testing.assert_close(result.tau_num, expected.tau_num)


def test_scores_compute_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = fused_module._run_chunks

    def run_chunks(*args: Any, **kwargs: Any) -> None:
        asked.append(kwargs["gradients"])
        original(*args, **kwargs)

    monkeypatch.setattr(fused_module, "_run_chunks", run_chunks)
    batch = pack([[make_document(12, seed=1)]], [[[0, 4, 9]]])
    module = DSparkTrainerModule(tiny_model())
    module.score(**batch)
    assert asked == [None]
    module(**batch)
    assert asked[1] is not None


def test_a_tiny_gamma_trains_the_first_slot_alone() -> None:
    batch = pack([[make_document(12, seed=1, loss_mask=[1] * 12)]], [[[0, 4]]])
    metrics = DSparkTrainerModule(tiny_model(), loss_decay_gamma=1e-46)(**batch)
    assert metrics.loss_den == 2
    assert metrics.loss.isfinite()
