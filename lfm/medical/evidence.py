"""Which parts of a question moved an answer: gradient times drive through the recurrences, and how faithful that is.

What moved the model is no reason, and no source: a span may matter to it that should not, and the reverse.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.kernels.rotary import rotated_heads
from lfm.layers.attention import Attention
from lfm.layers.diagonal_liquid import DiagonalLiquid
from lfm.layers.liquid import Liquid
from lfm.medical.features import read_answers
from lfm.models.language_model import LanguageModel

Method = Literal["drive", "embedding", "attention", "random"]
METHODS: tuple[Method, ...] = ("drive", "embedding", "attention", "random")
"""Gradient times drive of the recurrences, which is the evidence; gradient times embedding; attention weights; none."""

FRACTIONS = (0.1, 0.2, 0.5)
"""Of the spans that are deleted or kept; at least one."""

_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+|\n|$)\s*")
_WORD = re.compile(r"\S+\s*")


@dataclass(frozen=True)
class Span:
    start: int
    end: int
    """Characters of the question."""
    text: str


@dataclass
class Evidence:
    """Of one question and the answer given to it."""

    text: str
    answer: str
    spans: list[Span]
    scores: dict[Method, np.ndarray]
    """Of each span, summed over its tokens; attention where the model attends."""
    faithfulness: dict[Method, tuple[float, float]]
    """Comprehensiveness and sufficiency; see `faithful`."""

    def ranked(self, by: Method = "drive") -> list[tuple[float, Span]]:
        """The most important first.  Raises UserError for attention weights of a model that does not attend."""
        scores = self.scores_by(by)
        return [(float(scores[i]), self.spans[i]) for i in np.argsort(-scores, kind="stable")]

    def scores_by(self, by: Method) -> np.ndarray:
        """Of each span.  Raises UserError as `ranked` does."""
        if by not in self.scores:
            raise UserError(f"--by {by}: this model has no attention; choose by drive or embedding")
        return self.scores[by]


def spans_of(text: str) -> list[Span]:
    """Sentences; of a text that is one sentence, words.  A last line that ends with a colon asks, and is left out."""
    body = text
    before, newline, last = text.rpartition("\n")
    if newline and last.rstrip().endswith(":"):
        body = before
    for pattern in (_SENTENCE, _WORD):
        found = [Span(m.start(), m.end(), m[0]) for m in pattern.finditer(body) if m[0].strip()]
        if len(found) > 1:
            return found
    return found


def evidence(
    model: LanguageModel,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[str, str]],
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Evidence]:
    """Of questions and the answers given to them, as they follow; those whose question is one span are left out.

    Raises UserError for a model without recurrences that are driven by an input.
    """
    draws = np.random.Generator(np.random.PCG64(seed))
    found: list[Evidence] = []
    for text, answer in asked:
        spans = spans_of(text)
        if len(spans) > 1:
            scores = span_scores(model, tokenizer, text, answer, spans)
            scores["random"] = draws.random(len(spans))
            found.append(Evidence(text, answer, spans, scores, {}))
        progress(1)
    faithful(model, tokenizer, found, batch_size=batch_size)
    return found


def span_scores(
    model: LanguageModel, tokenizer: Tokenizer, text: str, answer: str, spans: Sequence[Span]
) -> dict[Method, np.ndarray]:
    """By method, of each span: the sum over the tokens that begin in it."""
    ids, starts = tokenizer.encode_bytes(text.encode())
    first = 0 if tokenizer.bos_id is None else 1
    prompt = [*([tokenizer.bos_id] if tokenizer.bos_id is not None else []), *ids]
    by_token = token_scores(model, prompt, tokenizer.encode(answer))
    bounds = [len(text[: span.start].encode()) for span in spans] + [len(text[: spans[-1].end].encode())]
    places = np.searchsorted(bounds, np.array(starts), side="right") - 1
    found: dict[Method, np.ndarray] = {}
    for method, values in by_token.items():
        inside = (places >= 0) & (places < len(spans))
        found[method] = np.bincount(places[inside], values[first:][inside], minlength=len(spans))
    return found


def token_scores(model: LanguageModel, prompt: Sequence[int], answer: Sequence[int]) -> dict[Method, np.ndarray]:
    """Of each token of the prompt, from one forward and one backward pass: `sum over layers <dS/dp, p>`.

    S is the answer's log-probability.  p is the drive of a reservoir, or the value that a diagonal layer takes in; of
    the embedding it is the token's vector.  Attention is the weight that the tokens which predict the answer give,
    mean over them, heads and layers.
    """
    device = model.embedding.weight.device
    ids = torch.tensor([[*prompt, *answer]], device=device)
    n, last = len(prompt), ids.shape[1] - 1
    with torch.enable_grad(), _recorded(model, slice(n - 1, last)) as seen:
        hidden, _ = model.advance(ids)
        logs = model.logits(hidden[0, n - 1 : last]).float().log_softmax(-1)
        score = logs.gather(1, ids[0, n:, None]).sum()
        if not seen.drives:
            raise UserError(
                f"evidence is drawn from the drives of liquid layers, and this model of kind {model.config.kind} has "
                "none; use a model of kind lfm or liquidnet"
            )
        inputs = [seen.embedding, *(drive for drive, _ in seen.drives)]
        gradients = torch.autograd.grad(score, inputs)
    products = [(g.double() * x.detach().double())[0, :n] for g, x in zip(gradients, inputs, strict=True)]
    drive = sum(product[:, :width].sum(1) for product, (_, width) in zip(products[1:], seen.drives, strict=True))
    assert isinstance(drive, Tensor)
    found: dict[Method, np.ndarray] = {
        "drive": drive.cpu().numpy(),
        "embedding": products[0].sum(1).cpu().numpy(),
    }
    if seen.attention:
        found["attention"] = torch.stack(seen.attention).mean(0)[:n].double().cpu().numpy()
    return found


def faithful(model: LanguageModel, tokenizer: Tokenizer, found: Sequence[Evidence], *, batch_size: int) -> None:
    """Fill in comprehensiveness and sufficiency (DeYoung et al. 2020, arXiv 1911.03429), means over `FRACTIONS`.

    With p the answer's probability, as its geometric mean over tokens: comprehensiveness is what p loses when the top
    spans are deleted, so more is better; sufficiency what it loses when they alone are kept, so less is better.
    """
    if not found:
        return
    texts: list[str] = []
    answers: list[str] = []
    for each in found:
        texts.append(each.text)
        for method in each.scores:
            for fraction in FRACTIONS:
                top = _top(each.scores[method], fraction)
                texts += [_without(each, top), _without(each, set(range(len(each.spans))) - top)]
        answers += [each.answer] * (1 + 2 * len(FRACTIONS) * len(each.scores))
    p = iter(_probabilities(model, tokenizer, texts, answers, batch_size))
    for each in found:
        whole = next(p)
        for method in each.scores:
            pairs = [(whole - next(p), whole - next(p)) for _ in FRACTIONS]
            each.faithfulness[method] = tuple(float(x) for x in np.mean(pairs, axis=0))  # pyright: ignore


def _top(scores: np.ndarray, fraction: float) -> set[int]:
    count = max(1, round(fraction * len(scores)))
    return {int(i) for i in np.argsort(-scores, kind="stable")[:count]}


def _without(each: Evidence, deleted: set[int]) -> str:
    kept = "".join(span.text for i, span in enumerate(each.spans) if i not in deleted)
    return kept.rstrip() + each.text[each.spans[-1].end :] if each.text[each.spans[-1].end :] else kept


def _probabilities(
    model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], answers: Sequence[str], batch_size: int
) -> np.ndarray:
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    scores, _ = read_answers(model, prompts, [tokenizer.encode(text) for text in answers], batch_size=batch_size)
    return scores.mean.exp().numpy()


@dataclass
class _Seen:
    embedding: Any
    drives: list[tuple[Tensor, int]]
    """And how many of the last dimension are the drive."""
    attention: list[Tensor]


@contextmanager
def _recorded(model: LanguageModel, queries: slice) -> Iterator[_Seen]:
    """What passes through the model, of one row; `queries` are the positions whose attention is looked at."""
    seen, handles = _Seen(None, [], []), []

    def embedded(module: Any, args: Any, output: Tensor) -> Tensor:
        seen.embedding = output if output.requires_grad else output.detach().requires_grad_()
        return seen.embedding

    def driven(width: int) -> Callable[..., None]:
        return lambda module, args, output: seen.drives.append((output, width))

    def attended(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            groups = module.widths[1] // module.head_size
            qkv = module.qkv(args[0])
            q, k, _ = rotated_heads(qkv, *kwargs["rotary"], head_size=module.head_size, num_groups=groups)
            if module.qk_norm:
                q, k = (F.rms_norm(heads, heads.shape[-1:], eps=1e-6) for heads in (q, k))
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scores = (q[0].float() @ k[0].float().transpose(-1, -2)) / module.head_size**0.5
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)[:, queries]
            seen.attention.append(weights.mean((0, 1)))

    try:
        handles.append(model.embedding.register_forward_hook(embedded))
        for module in model.modules():
            if isinstance(module, Liquid):
                width = module.config.num_reservoirs * module.config.reservoir_size
                handles.append(module.input.register_forward_hook(driven(width)))
            elif isinstance(module, DiagonalLiquid):
                handles.append(module.projections.register_forward_hook(driven(module.width)))
            elif isinstance(module, Attention):
                handles.append(module.register_forward_pre_hook(attended, with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
