"""For tests of the server: an engine without a model, tokenizers without a download, a server in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anchortp.engine.api import EngineRequest, SampledToken, Sink, TokenOutput
from anchortp.errors import EngineFull, EngineStopped
from anchortp.server.run import serve_http

DEADLINE_S = 20.0

TEXT = (
    "the quick brown fox jumps over the lazy dog and says hello world to everyone who is near enough. "
    "User and assistant speak in turn: what is the capital of France? It is Paris, café, naïve, Zoë! "
    "0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ {} [] () <> + - * / = ; . , ' \" 你好 世界 🙂 "
)
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if not loop.first and m.role == 'system' %}{{ raise_exception('system must come first') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS = "<|im_end|>"
SPECIALS = ["<unk>", "<|im_start|>", EOS]


class FakeEngine:
    """Plays scripts. A script is an iterable of outputs, made by `reply` for each request, one per step.

    Its thread steps all requests in turn, as often as `allow` permits (without end by default). Outputs that
    a script leaves without a finish reason at its end get one ("length").
    """

    def __init__(
        self,
        reply: Callable[[EngineRequest], Iterable[TokenOutput]],
        *,
        vocab_size: int = 1000,
        max_model_len: int = 256,
        num_steps: float = float("inf"),
    ):
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.refuse_with: Exception | None = None
        self.max_running = 1000
        self.state = "serving"
        self.extra_status: dict[str, Any] = {}
        self.submitted: list[EngineRequest] = []
        self.aborted: list[str] = []
        self._reply = reply
        self._num_steps = num_steps
        self._scripts: dict[str, tuple[Iterator[TokenOutput], Sink]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fake-engine")
        self._thread.start()

    # The contract.

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        with self._changed:
            if self.refuse_with:
                raise self.refuse_with
            if len(self._scripts) >= self.max_running:
                raise EngineFull(f"{len(self._scripts)} requests are waiting; try again later.")
            assert request.request_id not in {known.request_id for known in self.submitted}
            self.submitted.append(request)
            self._scripts[request.request_id] = (iter(self._reply(request)), sink)
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self.aborted.append(request_id)
            self._scripts.pop(request_id, None)
            self._changed.notify_all()

    def status(self) -> dict[str, Any]:
        with self._changed:
            return {"state": self.state, "epoch": 7, "num_running": len(self._scripts), **self.extra_status}

    # For tests.

    def allow(self, num_steps: float) -> None:
        with self._changed:
            self._num_steps += num_steps
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition`, which is asked at every change of the engine, or fails."""
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S), "the fake engine never came there"

    @property
    def num_running(self) -> int:
        with self._changed:
            return len(self._scripts)

    def close(self) -> None:
        """Ends the thread. Nothing may be left running: every test leaves the engine as it found it."""
        with self._changed:
            left = list(self._scripts)
            self._closing = True
            self._changed.notify_all()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        assert not left, f"requests that nobody took back: {left}"

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (self._scripts and self._num_steps > 0))
                if self._closing:
                    return
                self._num_steps -= 1
                due = [(name, next(script), sink) for name, (script, sink) in self._scripts.items()]
                for name, output, _ in due:
                    if output.finish_reason:
                        del self._scripts[name]
                self._changed.notify_all()
            for _, output, sink in due:
                sink(output)


def outputs(
    request: EngineRequest,
    token_ids: Iterable[int],
    *,
    finish_reason: str = "length",
    num_cached_tokens: int = 0,
    per_step: int = 1,
) -> list[TokenOutput]:
    """One token per step, at most `max_tokens`; log-probabilities are made up but repeatable."""
    token_ids = list(token_ids)[: request.params.max_tokens]
    tokens = [_sampled(token_id, request.params.logprobs) for token_id in token_ids]
    groups = [tokens[i : i + per_step] for i in range(0, len(tokens), per_step)]
    return [
        TokenOutput(
            request_id=request.request_id,
            tokens=tuple(group),
            finish_reason=finish_reason if i == len(groups) - 1 else None,
            num_cached_tokens=num_cached_tokens,
        )
        for i, group in enumerate(groups)
    ]


def _sampled(token_id: int, num_logprobs: int | None) -> SampledToken:
    if num_logprobs is None:
        return SampledToken(token_id=token_id)
    top = tuple((token_id + i, -0.5 - i) for i in range(num_logprobs))
    return SampledToken(token_id=token_id, logprob=-0.5, top_logprobs=top)


def failing(request: EngineRequest, token_ids: Iterable[int], message: str) -> list[TokenOutput]:
    """Some tokens, then an error."""
    good = [TokenOutput(request_id=o.request_id, tokens=o.tokens) for o in outputs(request, token_ids)]
    return [
        *good,
        TokenOutput(request_id=request.request_id, tokens=(), finish_reason="error", error=message),
    ]


# ---------------------------------------------------------------- a server in a thread


class RunningServer:
    def __init__(self, app: Any, *, grace_s: float = DEADLINE_S):
        self.port = 0
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, args=(app, grace_s), name="http-server")
        self._thread.start()
        assert self._ready.wait(DEADLINE_S)
        if self._failure:
            raise self._failure

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """As a SIGTERM would; returns at once."""
        self._stop.set()

    def join(self) -> None:
        self._thread.join(2 * DEADLINE_S)
        assert not self._thread.is_alive(), "the server did not stop"
        if self._failure:
            raise self._failure

    def _serve(self, app: Any, grace_s: float) -> None:
        try:
            serve_http(app, "127.0.0.1", 0, on_ready=self._on_ready, should_stop=self._stop.is_set, grace_s=grace_s)
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    def _on_ready(self, port: int) -> None:
        self.port = port
        self._ready.set()


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[RunningServer]:
    server = RunningServer(app, **options)
    try:
        yield server
    finally:
        server.stop()
        server.join()


# ---------------------------------------------------------------- tokenizers


def save_tokenizer(tokenizer: Any, folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> str:
    """Writes a `tokenizers.Tokenizer` as a Hugging Face folder; returns its path."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)
    return str(folder)


def byte_level_bpe() -> Any:
    """As Qwen3, Llama 3 and SmolLM2 have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<think é>", special=False)])
    return tokenizer


def byte_fallback_bpe() -> Any:
    """As Llama 2 and Mixtral have it: SentencePiece spaces, <0xNN> for what the vocabulary lacks."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    text = TEXT.encode("ascii", "ignore").decode()
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = _sentencepiece_spaces(normalizers)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=[*SPECIALS, *byte_tokens], show_progress=False)
    trained.train_from_iterator(text.split(), trainer)
    # The trainer marks byte tokens as special; in real models they are ordinary, so the model is built anew.
    vocab = trained.get_vocab()
    merges = _merges(trained)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = _sentencepiece_spaces(normalizers)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def metaspace_unigram() -> Any:
    """As T5 has it: a Metaspace decoder, no bytes; what the vocabulary lacks is <unk>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _sentencepiece_spaces(normalizers: Any) -> Any:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    import json

    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def stopped() -> EngineStopped:
    return EngineStopped("The engine is stopping. Start it again.")
