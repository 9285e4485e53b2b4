"""The plain objective against loops in float64 (`draft_reference`), and what its caller may rely on."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config

from draft_reference import HIDDEN, VOCAB, Reference, make_document, pack, run_reference, tiny_config, tiny_model
from stages.train import DSparkTrainerModule, Qwen3DSparkModel
from stages.train.slots import expected_tokens, find_slots

ALPHAS = {"ce_loss_alpha": 0.3, "l1_loss_alpha": 0.8, "confidence_head_alpha": 1.3}

Documents = list[tuple[SimpleNamespace, list[int]]]


def number(value: torch.Tensor | int) -> float:
    return torch.as_tensor(value).item()


def example() -> tuple[dict[str, torch.Tensor], Documents]:
    """Two packed rows: document edges inside blocks, holes in masks, an anchor at token 0, one that is no candidate."""
    rows = [
        [make_document(9, seed=1, loss_mask=[1, 1, 1, 1, 1, 1, 0, 1, 1]), make_document(6, seed=2, loss_mask=[1] * 6)],
        [make_document(8, seed=3, loss_mask=[0, 0, 1, 1, 1, 1, 1, 1])],
    ]
    anchors = [[[0, 3, 7], [0, 4]], [[1, 3, 5]]]
    documents = [
        (document, chosen)
        for row, picks in zip(rows, anchors, strict=True)
        for document, chosen in zip(row, picks, strict=True)
    ]
    return pack(rows, anchors), documents


def reference_gradients(
    model: Qwen3DSparkModel, documents: Documents, *, gamma: float | None
) -> tuple[Reference, float, dict[str, torch.Tensor]]:
    """The reference's sums, its loss, and its gradient of every trained weight."""
    weights = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in trained:
        weights[name].requires_grad_()
    sums = run_reference(weights, model.config, documents, gamma=gamma)
    loss_num = ALPHAS["ce_loss_alpha"] * sums.ce + ALPHAS["l1_loss_alpha"] * sums.l1
    loss = (loss_num + ALPHAS["confidence_head_alpha"] * sums.confidence) / sums.weight
    gradients = torch.autograd.grad(loss, [weights[name] for name in trained])
    return sums, float(loss.detach()), dict(zip(trained, gradients, strict=True))


def config_variants() -> list[object]:
    heads = {
        "none": {"markov_rank": 0},
        "vanilla": {},
        "gated": {"markov_head_type": "gated"},
        "rnn": {"markov_head_type": "rnn"},
    }
    confidences = {
        "none": {"enable_confidence_head": False}, "hidden": {"confidence_head_with_markov": False}, "markov": {},
    }  # fmt: skip
    return [
        pytest.param({**head, **confidence}, gamma, id=f"{head_name}-{confidence_name}-{gamma}")
        for head_name, head in heads.items()
        for confidence_name, confidence in confidences.items()
        for gamma in (None, 1.7)
        if (head_name, confidence_name) != ("none", "markov")
    ]


@pytest.mark.parametrize(("changes", "gamma"), config_variants())
def test_losses_metrics_and_gradients_equal_the_reference(changes: dict[str, object], gamma: float | None) -> None:
    model = tiny_model(tiny_config(**changes))
    batch, documents = example()
    sums, loss, gradients = reference_gradients(model, documents, gamma=gamma)
    module = DSparkTrainerModule(model, loss_decay_gamma=gamma, **ALPHAS)

    metrics = module(**batch)
    metrics.loss.backward()

    expected = {
        "loss": loss, "loss_den": sums.weight, "ce_num": float(sums.ce.detach()), "l1_num": float(sums.l1.detach()),
        "confidence_num": float(sums.confidence.detach()), "loss_num": loss * sums.weight,
        "ce_loss": float(sums.ce.detach()) / sums.weight, "l1_loss": float(sums.l1.detach()) / sums.weight,
        "confidence_loss": float(sums.confidence.detach()) / sums.weight, "tau_num": sums.tau, "tau_den": sums.blocks,
        "confidence_abs_error_num": sums.abs_error, "confidence_bias_num": sums.bias,
        "confidence_cumprod_bias_num": sums.cumprod_bias,
        "confidence_diag_den": sums.weight if model.config.enable_confidence_head else 0.0,
        "num_supervised": len(sums.slots), "num_blocks": sums.blocks,
    }  # fmt: skip
    got = {name: number(getattr(metrics, name)) for name in expected}
    assert got == pytest.approx(expected, rel=2e-5, abs=2e-6)
    assert metrics.accept_rate_per_pos_num.tolist() == pytest.approx(sums.accept_num, rel=2e-5)
    assert metrics.accept_rate_per_pos_den.tolist() == sums.accept_den
    assert 0 < sums.accept_den[-1] < sums.accept_den[0]  # the example has blocks of different lengths
    for name, parameter in model.named_parameters():
        if name not in gradients:
            assert parameter.grad is None, name
            continue
        torch.testing.assert_close(
            parameter.grad.double(), gradients[name], rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert parameter.grad.abs().max() > 1e-4, f"{name}: the example does not reach it"


@pytest.mark.parametrize("changes", [{}, {"markov_rank": 0, "enable_confidence_head": False}])
def test_scores_equal_the_reference(changes: dict[str, object]) -> None:
    model = tiny_model(tiny_config(**changes))
    batch, documents = example()
    sums, _, _ = reference_gradients(model, documents, gamma=None) if not changes else (*_sums(model, documents), None)
    scores = DSparkTrainerModule(model).score(**batch)
    assert scores.slot.tolist() == [slot.slot for slot in sums.slots]
    assert scores.accept_rate.tolist() == pytest.approx([slot.accept for slot in sums.slots], rel=1e-4, abs=1e-6)
    assert scores.cross_entropy.tolist() == pytest.approx([slot.ce for slot in sums.slots], rel=1e-4)
    assert scores.top1_agree.tolist() == [slot.top1 for slot in sums.slots]
    assert scores.greedy_accept_rate.tolist() == pytest.approx([slot.greedy for slot in sums.slots], rel=1e-4)
    if changes:
        assert scores.confidence is None
    else:
        assert scores.confidence.tolist() == pytest.approx([slot.confidence for slot in sums.slots], rel=1e-4)
    assert not scores.cross_entropy.requires_grad
    # Row and anchor lead back to the block: the anchors of the example in order, without the one that is no candidate.
    positions = batch["anchor_positions"][scores.row, scores.anchor][scores.slot == 0]
    assert positions.tolist() == [0, 3, 7, 9, 13, 3, 5]


def _sums(model: Qwen3DSparkModel, documents: Documents) -> tuple[Reference, None]:
    weights = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    return run_reference(weights, model.config, documents, gamma=None), None


def test_logit_scale_and_softcap_are_applied_to_both() -> None:
    config = tiny_config()
    config.logit_scale, config.final_logit_softcapping = 0.7, 1.5
    model = tiny_model(config)
    batch, documents = example()
    sums, loss, gradients = reference_gradients(model, documents, gamma=None)
    metrics = DSparkTrainerModule(model, **ALPHAS)(**batch)
    metrics.loss.backward()
    assert metrics.loss.item() == pytest.approx(loss, rel=2e-5)
    torch.testing.assert_close(model.fc.weight.grad.double(), gradients["fc.weight"], rtol=2e-4, atol=2e-6)
    # The test can tell: without them the loss is another.
    config.logit_scale, config.final_logit_softcapping = 1.0, None
    assert abs(DSparkTrainerModule(model, **ALPHAS)(**batch).loss.item() - loss) > 1e-3
    assert len(sums.slots) == int(metrics.num_supervised)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_packing_changes_nothing(kind: str) -> None:
    module = DSparkTrainerModule(tiny_model(tiny_config(markov_head_type=kind)), loss_decay_gamma=2.0)
    documents = [make_document(length, seed=length) for length in (7, 10, 5)]
    anchors = [[0, 2], [1, 4, 8], [1]]
    packed = module(**pack([documents], [anchors], num_tokens=25))
    packed.loss_num.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    module.zero_grad()
    alone = [module(**pack([[doc]], [[picks]])) for doc, picks in zip(documents, anchors, strict=True)]
    sum(metrics.loss_num for metrics in alone).backward()
    for name in ("loss_num", "loss_den", "ce_num", "l1_num", "confidence_num", "tau_num", "tau_den", "num_supervised"):
        total = sum(number(getattr(metrics, name)) for metrics in alone)
        assert number(getattr(packed, name)) == pytest.approx(total, rel=1e-5), name
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_micro_batches_with_the_global_denominator_equal_one_batch() -> None:
    module = DSparkTrainerModule(tiny_model(), loss_decay_gamma=2.0)
    batch, _ = example()
    module(**batch).loss.backward()
    whole = module.draft_model.fc.weight.grad.clone()
    module.zero_grad()
    halves = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in (0, 1)]
    denominator = 0.0
    for half in halves:
        metrics = module(**half)
        metrics.loss_num.backward()
        denominator += float(metrics.loss_den)
    module.draft_model.fc.weight.grad /= denominator
    torch.testing.assert_close(module.draft_model.fc.weight.grad, whole, rtol=1e-4, atol=1e-6)


def test_fewer_candidates_than_anchors_takes_all() -> None:
    model = tiny_model(tiny_config(num_anchors=50))
    document = make_document(8, seed=4, loss_mask=[0, 1, 1, 1, 0, 0, 1, 1])
    batch = pack([[document]])
    sums, loss, _ = reference_gradients(model, [(document, [1, 2, 6])], gamma=None)
    metrics = DSparkTrainerModule(model, **ALPHAS)(**batch)
    assert metrics.num_blocks == 3
    assert metrics.loss.item() == pytest.approx(loss, rel=2e-5)
    assert float(metrics.tau_num) == pytest.approx(sums.tau, rel=2e-5)


@pytest.mark.parametrize("anchors", ["sampled", "none fixed", "no column"])
@pytest.mark.parametrize("changes", [{"markov_head_type": "rnn"}, {"markov_rank": 0}])
def test_no_candidate_gives_zero_loss_and_zero_gradients(
    anchors: str, changes: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    module = DSparkTrainerModule(tiny_model(tiny_config(**changes)))
    batch = pack([[make_document(6, seed=5, loss_mask=[0, 1, 0, 1, 0, 1])]])
    if anchors != "sampled":
        batch["anchor_positions"] = torch.full((1, 3 if anchors == "none fixed" else 0), -1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            metrics = module(**batch)
            metrics.loss.backward()
    assert metrics.loss.item() == float(metrics.loss_den) == float(metrics.tau_den) == metrics.num_supervised == 0
    assert module.num_empty_batches == 3
    assert [record.message.split(":")[0] for record in caplog.records] == ["a batch has no supervised slot"]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) == 0.0, name
    assert len(module.score(**batch).slot) == 0


def test_without_the_targets_last_states_only_cross_entropy_is_left() -> None:
    model = tiny_model(tiny_config(enable_confidence_head=False))
    batch, _ = example()
    full = DSparkTrainerModule(model, ce_loss_alpha=1.0, l1_loss_alpha=0.0)(**batch)
    batch["target_last_hidden_states"] = None
    bare = DSparkTrainerModule(model, ce_loss_alpha=1.0, l1_loss_alpha=0.0)(**batch)
    assert bare.loss.item() == pytest.approx(full.loss.item())
    assert float(bare.tau_den) == 0 == float(bare.accept_rate_per_pos_den.sum())
    with pytest.raises(ValueError, match="target_last_hidden_states: needed"):
        DSparkTrainerModule(model)(**batch)
    with_head = DSparkTrainerModule(tiny_model(), l1_loss_alpha=0.0)
    with pytest.raises(ValueError, match="target_last_hidden_states: needed"):
        with_head(**batch)
    with pytest.raises(ValueError, match="score: target_last_hidden_states"):
        DSparkTrainerModule(model, l1_loss_alpha=0.0).score(**batch)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_ids", torch.zeros(15, dtype=torch.long), "input_ids: expected"),
        ("loss_mask", torch.ones(2, 14), r"loss_mask: expected \[2, 15\]"),
        ("target_hidden_states", torch.zeros(2, 15, 3 * HIDDEN), "2 layers of 16 side by side"),
        ("target_last_hidden_states", torch.zeros(2, 15, 8), r"target_last_hidden_states: expected \[2, 15, 16\]"),
        ("anchor_positions", torch.zeros(3, 2, dtype=torch.long), r"anchor_positions: expected \[2, anchors\]"),
        ("anchor_positions", torch.tensor([[15], [0]]), "expected -1 .none. to 14, got 0 to 15"),
        ("seq_lens", torch.tensor([[9, 7], [8, 0]]), "sum to at most 15"),
        ("seq_lens", torch.tensor([[9, -1], [8, 0]]), "at least 0"),
        ("seq_lens", torch.tensor([9, 6]), r"seq_lens: expected \[2, documents\]"),
    ],
)
def test_wrong_shapes_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    batch, _ = example()
    with pytest.raises(ValueError, match=message):
        DSparkTrainerModule(tiny_model())(**{**batch, name: value})


@pytest.mark.parametrize(
    "arguments", [{"loss_decay_gamma": 0.0}, {"ce_loss_alpha": -0.1}, {"l1_loss_alpha": float("nan")}]
)
def test_wrong_weights_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DSparkTrainerModule(tiny_model(), **arguments)


@pytest.mark.parametrize("mode", ["module", "autocast"])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_bfloat16_is_close_and_losses_are_float32(mode: str, kind: str) -> None:
    model = tiny_model(tiny_config(markov_head_type=kind))
    batch, _ = example()
    exact = DSparkTrainerModule(model, loss_decay_gamma=4.0)(**batch)
    states = ("target_hidden_states", "target_last_hidden_states")
    batch |= {name: batch[name].bfloat16() for name in states}
    if mode == "module":
        model.to(torch.bfloat16)
    module = DSparkTrainerModule(model, loss_decay_gamma=4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        metrics = module(**batch)
    metrics.loss.backward()
    assert metrics.loss.dtype == metrics.tau_num.dtype == torch.float32
    assert metrics.loss.item() == pytest.approx(exact.loss.item(), rel=0.03)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name


def test_cached_bfloat16_states_train_a_float32_draft() -> None:
    module = DSparkTrainerModule(tiny_model())
    batch, _ = example()
    for name in ("target_hidden_states", "target_last_hidden_states"):
        batch[name] = batch[name].bfloat16()
    widened = {name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in batch.items()}
    assert module(**batch).loss.item() == module(**widened).loss.item()


def test_tau_by_hand() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 0, 0, 1, 1, 0]])
    slots = find_slots(mask, torch.tensor([[0, 2, 4], [3, -1, -1]]), None, block_size=2)
    assert slots.slot.tolist() == [0, 1, 0, 0]
    assert slots.flat_position.tolist() == [0, 1, 4, 9]
    tau = expected_tokens(torch.tensor([0.5, 0.5, 0.25, 1.0]), slots)
    assert tau.tolist() == [1.75, 1.25, 2.0]


def test_a_draft_that_equals_the_target_is_always_accepted() -> None:
    """The target's last states are set to the draft's own h, and no Markov bias: L1 is 0, accept 1, tau K + 1."""
    config: Qwen3Config = tiny_config(markov_rank=0, enable_confidence_head=False)
    model = tiny_model(config)
    document = make_document(8, seed=6, loss_mask=[1] * 8)
    batch = pack([[document]], [[[2]]])
    with torch.no_grad():
        h = model(batch["input_ids"], batch["target_hidden_states"], batch["anchor_positions"], batch["seq_lens"])
    batch["target_last_hidden_states"][0, 2:5] = h[0, 0]
    metrics = DSparkTrainerModule(model)(**batch)
    assert float(metrics.l1_num) == pytest.approx(0, abs=1e-5)
    assert float(metrics.tau_num) == pytest.approx(4, abs=1e-4)
    assert h.shape == (1, 2, 3, HIDDEN)
    assert batch["input_ids"].max() < VOCAB
