"""Continuous batching: whoever else is being answered, each gets what it would get alone."""

import pytest
import torch

from lfm.errors import NonFiniteError, UserError
from lfm.inference.batcher import Batcher, BatcherConfig, Request
from lfm.inference.prefixes import Prefixes
from lfm.inference.sampling import SamplingConfig, choose, choose_rows, generate, prefill, prefill_together, seen_of
from lfm.models.registry import FAMILIES
from tests.inference.small_models import SIZES, V, make


def batcher(model, **keys):
    return Batcher(model, BatcherConfig(**{"slots": 4, "prefill_tokens": 16, **keys}))


def prompts(count, longest=70):
    draw = torch.Generator().manual_seed(2)
    lengths = [1 + int(torch.randint(longest, (), generator=draw)) for _ in range(count)]
    return [torch.randint(V, (length,), generator=draw).tolist() for length in lengths]


def alone(model, prompt, sampling):
    return [token for (token,) in generate(model, [prompt], sampling, end_of_document=None)]


def run(found, requests):
    for request in requests:
        found.add(request)
    while not found.is_idle:
        found.step()
    return [request.made for request in requests]


def greedy(count):
    return SamplingConfig(greedy=True, max_new_tokens=count)


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_greedy_answers_of_unequal_prompts_are_those_given_alone(kind):
    assert SIZES.keys() == {config.model_fields["kind"].default for config in FAMILIES}
    model = make(kind)
    asked = [
        Request(prompt, greedy(3 + 3 * i)) for i, prompt in enumerate(prompts(6, 20 if kind == "liquidnn" else 70))
    ]
    made = run(batcher(model, slots=3), asked)
    want = [alone(model, request.prompt, request.sampling) for request in asked]
    assert made == want
    assert len({tuple(answer[:5]) for answer in made}) > 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["laerc", "lfm", "liquidnet", "transformer"])
def test_prompts_that_are_read_together_leave_what_they_leave_alone(kind, device):
    model = make(kind).to(device)
    asked = [*prompts(5, 120), [3] * 128, [4] * 17, [5] * 17]
    hidden, states = prefill_together(model, asked)
    for i, prompt in enumerate(asked):
        own, state = prefill(model, prompt)
        state.check_like(states[i])
        torch.testing.assert_close(hidden[i : i + 1], own, rtol=1e-4, atol=1e-4)
        for name, tensor in state.tensors().items():
            torch.testing.assert_close(states[i].tensors()[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_short_prompts_are_read_together_and_long_ones_in_pieces(monkeypatch):
    model, passes = make("transformer"), []
    advance = model.advance
    monkeypatch.setattr(
        model, "advance", lambda ids, *rest, **keys: passes.append(tuple(ids.shape)) or advance(ids, *rest, **keys)
    )
    found = batcher(model, slots=8, prefill_tokens=64)
    asked = [Request([1] * n, greedy(1)) for n in (20, 100, 18, 30, 17, 31)]
    made = run(found, asked)
    # Those of 20, 18 and 17 share a pass, and of the long one comes a piece; then those of 30 and 31, and its rest.
    assert passes == [(3, 20), (1, 64), (2, 31), (1, 36)]
    assert made == [alone(model, request.prompt, request.sampling) for request in asked]


@pytest.mark.parametrize("kind", ["transformer", "liquidnet", "lfm"])
def test_with_a_fixed_width_the_bits_are_those_given_alone(kind):
    """But for experts on a CPU: the product of each takes as many rows as chose it."""
    model = make(kind)

    def logprobs(others):
        found = batcher(model, fixed_width=True)
        asked = Request(prompts(1)[0], greedy(12), logprobs=2)
        for other in others:
            found.add(Request(other, greedy(30)))
        found.add(asked)
        given = []
        while not found.is_idle:
            given += [token for request, token in found.step() if request is asked]
        return [(token.id, token.logprob, token.likeliest) for token in given]

    one, crowd = logprobs([]), logprobs(prompts(9)[6:])
    assert [token for token, *_ in one] == [token for token, *_ in crowd] != []
    if kind == "lfm":
        assert [logprob for _, logprob, _ in one] == pytest.approx([logprob for _, logprob, _ in crowd], rel=1e-5)
    else:
        assert one == crowd


@pytest.mark.parametrize("kind", ["lfm", "transformer", "liquidnet"])
def test_a_prompt_that_begins_alike_is_not_read_again_and_has_the_same_bits(kind):
    model, (start,) = make(kind), prompts(1, longest=90)
    start = start * 90
    first, second, third = start[:50], start[:60], start[:48] + [7] * 20
    found = batcher(model)
    asked = [Request(prompt, greedy(8), logprobs=0) for prompt in (first, second, third)]

    def bits(batcher, request):
        batcher.add(request)
        given = []
        while not batcher.is_idle:
            given += [(token.id, token.logprob) for _, token in batcher.step()]
        return given

    with_others = [bits(found, request) for request in asked]
    assert [request.reused for request in asked] == [0, 48, 48]
    for request, own in zip(asked, with_others, strict=True):
        assert own == bits(batcher(model), again := Request(request.prompt, request.sampling, logprobs=0))
        assert again.reused == 0


def test_saved_states_stay_within_their_bytes_and_the_unused_go_first():
    model = make("liquidnet")
    _, state = prefill(model, [1])
    size = state.num_bytes + 8 * 4
    kept = Prefixes(4, 2 * size + 40)
    for first in (1, 2):
        kept.keep([first] * 4, state)
    assert kept.find([1] * 5)[0] == 4
    kept.keep([3] * 4, state)
    assert [kept.find([first] * 5)[0] for first in (1, 2, 3)] == [4, 0, 4]
    assert kept.find([1] * 4) == (0, None)  # one token must be left to read
    assert kept.num_bytes <= kept.max_bytes and len(kept) == 2


def test_a_short_prompt_does_not_wait_for_a_long_one():
    model = make("liquidnet")
    found = batcher(model)
    long, running, short = Request([1] * 160, greedy(3)), Request([2], greedy(30)), Request([3] * 5, greedy(3))
    found.add(running)
    found.step()
    found.add(long)
    found.add(short)
    steps = {request: 0 for request in (long, short)}
    while not (long.made and short.made):
        before = len(running.made)
        found.step()
        assert len(running.made) == before + 1  # goes on while prompts are read
        steps = {request: steps[request] + (not request.made) for request in steps}
    assert steps[short] <= 2 < 9 <= steps[long]


def test_a_cancelled_request_frees_its_slot_wherever_it_is():
    model = make("transformer")
    found = batcher(model, slots=2)
    asked = [Request(prompt, greedy(20)) for prompt in ([1] * 3, [2] * 40, [3] * 4, [4] * 2)]
    for request in asked:
        found.add(request)
    found.step()
    running, reading, waiting, other = asked
    assert running in found.running and reading in found.reading and waiting in found.waiting
    for request in (running, reading, waiting):
        found.cancel(request)
        found.cancel(request)
    while not found.is_idle:
        found.step()
    assert len(running.made) == 1 and reading.made == waiting.made == []
    assert other.made == alone(model, other.prompt, other.sampling)
    assert found.rows.count == 0


def test_a_full_context_and_a_bad_prompt():
    model = make("transformer")
    found = batcher(model)
    (made,) = run(found, [request := Request([1] * 120, greedy(50))])
    assert made == alone(model, [1] * 120, greedy(50)) and len(made) == 8 and request.ended
    for prompt in ([], [1] * 128):
        with pytest.raises(UserError):
            found.add(Request(prompt, greedy(1)))
    assert found.is_idle


def test_a_row_whose_numbers_break_ends_alone():
    model = make("lstm")
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan
        model.embedding.weight[7].mul_(torch.nan)
    broken = Request([7], greedy(3))
    found = batcher(model)
    found.add(broken)
    assert found.step() == [] and broken.ended and isinstance(broken.error, NonFiniteError) and found.is_idle


def test_draws_depend_on_prompt_and_sampling_alone():
    model = make("liquidnet")
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.9, top_k=0, top_p=1.0, repetition_penalty=1.3, seed=5)
    (want,) = run(batcher(model), [Request([1, 2, 3], sampling)])
    crowd = [Request(prompt, SamplingConfig(max_new_tokens=20, seed=i)) for i, prompt in enumerate(prompts(3))]
    assert run(batcher(model), [*crowd, again := Request([1, 2, 3], sampling)])[-1] == want == again.made
    (other,) = run(batcher(model), [Request([1, 2, 3], sampling.model_copy(update={"seed": 6}))])
    assert other != want


SAMPLINGS = [
    SamplingConfig(greedy=True),
    SamplingConfig(top_k=0, top_p=1.0),
    SamplingConfig(top_k=3, temperature=0.7),
    SamplingConfig(top_k=0, top_p=0.4),
    SamplingConfig(top_k=20, min_p=0.1, repetition_penalty=1.5),
]


def test_rows_are_chosen_with_the_shares_of_the_definition():
    draw = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(len(SAMPLINGS), 40, generator=draw)
    seen = torch.rand(len(SAMPLINGS), 40, generator=draw) < 0.3
    n = 2000
    draws = [(i + 0.5) / n for i in range(n)]
    for row, sampling in enumerate(SAMPLINGS):
        many = choose_rows(logits[row].expand(n, -1), [sampling] * n, draws, seen[row].expand(n, -1))
        shares = many.bincount(minlength=40) / n
        generator = torch.Generator().manual_seed(4)
        want = torch.tensor([choose(logits[row], sampling, generator, seen[row]) for _ in range(n)])
        want = want.bincount(minlength=40) / n
        # Of n draws a share p is off by sqrt(p (1 - p) / n), so five times that bounds 200 shares.
        bound = 5 * (shares * (1 - shares) / n).sqrt() + 2 / n
        assert ((shares - want).abs() <= bound).all(), (sampling, shares, want)
        mixed = choose_rows(logits, SAMPLINGS, [0.3] * len(SAMPLINGS), seen)
        one = choose_rows(logits[row : row + 1], [sampling], [0.3], seen[row : row + 1])
        assert mixed[row] == one[0]


def test_logprobs_are_those_of_the_model_before_sampling():
    model = make("laerc")
    request = Request([5, 6], SamplingConfig(max_new_tokens=1, temperature=0.5, top_k=4), logprobs=3)
    found = batcher(model)
    found.add(request)
    ((_, token),) = found.step()
    hidden, _ = prefill(model, [5, 6])
    with torch.no_grad():
        want = model.logits(hidden)[0].log_softmax(-1)
    assert token.logprob == pytest.approx(float(want[token.id]))
    assert [id for id, _ in token.likeliest] == want.topk(3).indices.tolist()
    assert seen_of(model, request.made).sum() == 1


def test_experts_and_state_of_a_request_can_be_seen():
    model = make("lfm")
    found = batcher(model)
    request = Request([1, 2, 3], greedy(6))
    found.add(Request([9], greedy(6)))
    found.add(request)
    for _ in range(4):
        found.step()
    load = found.load_of(request)
    assert load is not None and load.sum(1).tolist() == [2 * 3] * 2  # top-2 of three tokens read since it joined
    assert {name: tuple(t.shape) for name, t in found.state_of(request).items()} == {
        "position": (1,),
        "liquid.0": (1, 1, 16),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_recorded_steps_give_what_plain_ones_give(kind):
    """Sequences join and leave meanwhile, so that several widths are recorded, and caches grow."""
    # In fp32 the host reads how many rows each expert has.
    model = make(kind).to("cuda", torch.bfloat16 if kind == "lfm" else torch.float32)

    def answers(cuda_graph):
        found = batcher(model, cuda_graph=cuda_graph)
        asked = [Request(prompt, greedy(10 + 5 * i), logprobs=0) for i, prompt in enumerate(prompts(7, 60))]
        logprobs = {request: [] for request in asked}
        for request in asked:
            found.add(request)
        while not found.is_idle:
            for request, token in found.step():
                logprobs[request].append(token.logprob)
        if cuda_graph == "auto":
            assert found.rows.records and any(each.graph is not None for each in found.rows._recordings.values())
        return [request.made for request in asked], [logprobs[request] for request in asked]

    (made, logprobs), (plain, of_plain) = answers("auto"), answers("off")
    assert made == plain
    for own, other in zip(logprobs, of_plain, strict=True):
        assert own == pytest.approx(other, abs=1e-4)
