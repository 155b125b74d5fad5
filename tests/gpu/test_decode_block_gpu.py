"""The Triton blocks on a GPU: against the engine's own, recorded, and as the engine chooses."""

from __future__ import annotations

import pytest
import torch

from higgs_lab.engine import Engine
from higgs_lab.generate import Sampling, generate
from tests.test_decode_block import CASES, ROW_CASES, SIZES, both, product, relative, row_errors
from tests.test_decoding import assert_near, ragged
from tests.tiny import tiny_talker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]
SHAPES_4B = [(6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728), (8208, 2560)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, *((m, *s) for m in (1, 16, 64) for s in SHAPES_4B)])
def test_products_are_recorded_and_right(case, dtype):
    """Two in one recording, sums between them."""
    from higgs_lab.decode_block import linear

    x, weight = product(case, dtype, "cuda")
    second = (torch.randn(128, case[1] // 128 * 128, device="cuda") * 0.02).to(dtype)

    def twice():
        once = linear(x, weight)
        half = once.sum(0).to(dtype)[:, : second.shape[1]].contiguous()
        return once, linear(half, second) if second.shape[1] else once

    twice()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once, after = twice()
    for _ in range(3):
        graph.replay()
    wanted = x.float() @ weight.float().T
    assert relative(once.sum(0), wanted) < 1e-3
    if second.shape[1]:
        wanted = wanted[:, : second.shape[1]].to(dtype).float() @ second.float().T
        assert relative(after.sum(0), wanted) < 1e-2


def test_a_rows_sums_do_not_depend_on_its_mates():
    from higgs_lab.decode_block import linear

    for shape in SHAPES_4B:
        x, weight = product((64, *shape), torch.bfloat16, "cuda")
        together = linear(x, weight)
        for count in (1, 16, 17):
            assert torch.equal(together[:, :count], linear(x[:count], weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*ROW_CASES, *SHAPES_4B])
def test_products_of_one_row_are_right(case, dtype):
    assert max(row_errors(case, dtype, "cuda")) < 0.01


def test_beginning_early_changes_nothing(monkeypatch):
    """Who begins before others have ended may not see what those overwrite, nor look too soon."""
    from triton.runtime.jit import JITFunction

    from higgs_lab.decode_block import decode_blocks

    sizes = dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32, head_dim=128)
    layers = dict(num_hidden_layers=12, layer_types=["full_attention"] * 12)
    engine = Engine(tiny_talker(num_key_value_heads=8, **sizes, **layers).cuda().bfloat16())
    position, rope = torch.tensor([251], device="cuda"), engine.rope(512)
    start = torch.randn(1, 2560, device="cuda").bfloat16()
    cache = list(torch.randn(12, 2, 1, 8, 512, 128, device="cuda").bfloat16())

    def blocks():
        return decode_blocks(start, engine.layers, engine.norm, engine.eps, cache, rope, position)

    with torch.no_grad():
        blocks()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = blocks()
        early = []
        for _ in range(50):
            graph.replay()
            early.append(recorded.clone())
        run = JITFunction.run

        def patient(*args, **options):
            made = run(*args, **options)
            torch.cuda.synchronize()
            return made

        monkeypatch.setattr(JITFunction, "run", patient)
        wanted = blocks()
    assert wanted.isfinite().all() and all(torch.equal(one, wanted) for one in early)


@pytest.mark.parametrize("count", [1, 5, 16, 17, 64])
def test_blocks_are_the_engines(count):
    new, ours = both(torch.bfloat16, "cuda", count)
    assert max(relative(new[name], ours[name]) for name in ours) < 0.03


def test_the_engine_takes_them_where_sizes_divide(recwarn):
    half, exact = tiny_talker(**SIZES).cuda().bfloat16(), tiny_talker(**SIZES).cuda()
    for talker, right in ((half, True), (exact, False), (tiny_talker().cuda().bfloat16(), False)):
        engine = Engine(talker)
        found = [engine.by_blocks(rows) for rows in (1, 2, 64, 65)]
        assert found == [right, right, right, False]
    assert not [w for w in recwarn if "Triton" in str(w.message)]


@pytest.mark.parametrize("count", [1, 5])
def test_log_probs_are_those_of_the_engines_blocks(count, monkeypatch):
    """Greedy speech, up to where rounding first chooses another id."""
    talker = tiny_talker(scale=6, **SIZES).cuda().half()
    prompts, _ = ragged(count)
    setting = Sampling(temperature=0.0, max_frames=20)
    made = generate(talker, prompts, setting, log_probs=True)
    monkeypatch.setattr("higgs_lab.engine.blocks_run", lambda *_, **__: False)
    talker.load_state_dict({k: v.clone() for k, v in talker.state_dict().items()}, assign=True)
    plain = generate(talker, prompts, setting, log_probs=True)
    assert_near(made, plain, atol=0.03)


@pytest.mark.parametrize("compile", [False, True])
def test_more_rows_than_the_blocks_take_are_rotated_by_their_kernel(compile, monkeypatch):
    """As 65 rows and more are: here from two on."""
    from higgs_lab import decode_block

    rotate, rows = decode_block.rotate, []
    spied = lambda parts, *given: rows.append(parts.shape[1]) or rotate(parts, *given)  # noqa: E731
    monkeypatch.setattr(decode_block, "rotate", spied)
    prompts, _ = ragged(5)
    setting, made = Sampling(temperature=0.0, max_frames=20), []
    monkeypatch.setattr(decode_block, "MAX_ROWS", 1)
    for few_rows in (True, False):
        monkeypatch.setattr("higgs_lab.engine.blocks_run", lambda *_, **__: few_rows)  # noqa: B023
        talker = tiny_talker(scale=6, **SIZES).cuda().half()
        made.append(generate(talker, prompts, setting, log_probs=True, compile=compile))
        assert (max(rows) > 1) == few_rows
        rows[:] = [0]
    assert_near(*made, atol=0.03)
