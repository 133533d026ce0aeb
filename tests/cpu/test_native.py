"""Our own kernels, each against what torch makes of the same numbers in float64, and how they come to be."""

from __future__ import annotations

import ctypes
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anchortp.config import cache_folder, reads_panels, resolve_engine_config
from anchortp.errors import ConfigError
from anchortp.model import NativeKernels
from anchortp.model.native import FEW_ROWS
from anchortp.model.panels import panel_matrix
from anchortp.native import Library, build, build_kernels
from anchortp.transfer.checkpoint import _to_panels
from tests.tiny_model import write_model

DTYPES = ("float32", "bfloat16")
PLAIN = "-march=x86-64-v3"  # a CPU without instructions for bfloat16
few = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module", params=["this CPU", "a plain CPU"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "this CPU":
        return str(build_kernels(cache_folder() / "kernels"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", tuple(PLAIN if f == "-march=native" else f for f in build.FLAGS))
        return str(build_kernels(tmp_path_factory.mktemp("plain")))


def close(found: Tensor, expected: Tensor) -> None:
    """`expected`: float64. One rounding to `found`'s dtype apart, or a little more."""
    tolerance = 2e-5 if found.dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def random_rows(seed: int, *shape: int, dtype: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(getattr(torch, dtype))


def fenced(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy with NaN before and behind it, and all of that memory."""
    whole = torch.full((tensor.numel() + 64,), float("nan"), dtype=tensor.dtype)
    inner = whole[32 : 32 + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner, whole


def fence_stands(whole: Tensor) -> bool:
    return bool(whole[:32].isnan().all() and whole[-32:].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(1, 5), st.integers(1, 100), st.booleans(), st.integers(0, 99))
@few
def test_residual_and_norm(library: str, dtype: str, rows: int, hidden: int, has_more: bool, seed: int) -> None:
    x, whole = fenced(random_rows(seed, rows, hidden, dtype=dtype))
    more, weight = random_rows(seed + 1, rows, hidden, dtype=dtype), random_rows(seed + 2, hidden, dtype=dtype)
    sums = x + more if has_more else x.clone()
    out, out_whole = fenced(torch.zeros_like(x))
    more_at = more.data_ptr() if has_more else None
    Library(library, dtype).add_norm(x.data_ptr(), more_at, weight.data_ptr(), out.data_ptr(), rows, hidden, 1e-5)
    assert torch.equal(x, sums), "the residual stream is what torch's addition makes of it, bit for bit"
    close(out, F.rms_norm(sums.double(), (hidden,), None, 1e-5) * weight.double())
    assert fence_stands(whole) and fence_stands(out_whole)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(1, 7), st.integers(1, 80), st.integers(0, 99), st.sampled_from([1.0, 30.0]))
@few
def test_gate(library: str, dtype: str, blocks: int, block: int, seed: int, scale: float) -> None:
    both = random_rows(seed, blocks, 2, block, dtype=dtype, scale=scale)
    out, whole = fenced(torch.zeros(blocks, block, dtype=both.dtype))
    Library(library, dtype).silu_mul(both.data_ptr(), out.data_ptr(), blocks, block)
    close(out, F.silu(both[:, 0].double()) * both[:, 1].double())
    assert fence_stands(whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(1, 40), st.integers(0, 99))
@few
def test_rotation_and_new_rows_of_the_cache(
    library: str, has_norms: bool, dtype: str, rows: int, num_q: int, num_kv: int, half: int, seed: int
) -> None:
    hd, tokens = 2 * half, 20
    q, kv = random_rows(seed, rows, num_q, hd, dtype=dtype), random_rows(seed + 1, rows, num_kv, 2, hd, dtype=dtype)
    cos, sin = random_rows(seed + 2, 30, hd, dtype=dtype), random_rows(seed + 3, 30, hd, dtype=dtype)
    norms = random_rows(seed + 4, 2, hd, dtype=dtype) if has_norms else None
    rng = random.Random(seed)
    positions = torch.tensor([rng.randrange(30) for _ in range(rows)])
    slots = torch.tensor(rng.sample(range(tokens), rows))
    before = random_rows(seed + 5, 2 * num_kv, tokens, hd, dtype=dtype)
    cache, whole = fenced(before)
    out, out_whole = fenced(torch.zeros_like(q))
    given_norms = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    at = [t.data_ptr() for t in (positions, cos, sin, slots, cache, out)]
    kernel = Library(library, dtype).rotate_store
    kernel(q.data_ptr(), kv.data_ptr(), *given_norms, *at, rows, num_q, num_kv, hd, tokens, 1e-5)

    def turned(x: Tensor, which: int) -> Tensor:
        x = x.double()
        if norms is not None:
            x = F.rms_norm(x, (hd,), None, 1e-5) * norms[which].double()
        by = [table.double()[positions].unsqueeze(1) for table in (cos, sin)]
        return x * by[0] + x.roll(half, -1) * by[1]

    # q and k may be large: their norms divide by the root of a mean, and then two products are summed.
    scale = 4 if has_norms else 1
    close(out / scale, turned(q, 0) / scale)
    close(cache[0::2, slots] / scale, turned(kv[:, :, 0], 1).transpose(0, 1) / scale)
    assert torch.equal(cache[1::2, slots], kv[:, :, 1].transpose(0, 1)), "values are copied"
    others = [slot for slot in range(tokens) if slot not in slots.tolist()]
    assert torch.equal(cache[:, others], before[:, others])
    assert fence_stands(whole) and fence_stands(out_whole)


rows_of_all_kinds = st.one_of(st.integers(1, FEW_ROWS + 3), st.sampled_from([1, 6, 7, 12, 13, 16, 32, 33, FEW_ROWS]))


@pytest.mark.skipif(not reads_panels(), reason="no panels are known for this CPU")
@given(rows_of_all_kinds, st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
@few
def test_matrices_in_panels(library: str, rows: int, num_panels: int, columns: int, seed: int) -> None:
    """With few rows and with many."""
    plain = random_rows(seed, 64 * num_panels, 32 * columns, dtype="bfloat16", scale=0.2)
    x = random_rows(seed + 1, rows, 32 * columns, dtype="bfloat16")
    kernels, memory = NativeKernels(Library(library, "bfloat16")), torch.empty_like(plain)
    _to_panels(plain, memory)
    panels = panel_matrix(memory)
    assert (kernels.library.linear is None) == ("plain0" in library)
    expected = x.double() @ plain.double().T
    close(kernels.linear(x, panels), expected)
    out, whole = fenced(torch.zeros(rows, 64 * num_panels, dtype=torch.bfloat16))
    kernels.linear_into(out, x, panels)
    close(out, expected)
    assert fence_stands(whole)


@pytest.mark.parametrize("threads", [1, 2])
@given(rows_of_all_kinds, st.integers(1, 150), st.sampled_from([32, 64, 192, 576, 1024]), st.integers(0, 99))
@few
def test_plain_matrices(library: str, threads: int, rows: int, pairs: int, columns: int, seed: int) -> None:
    """Of any number of inputs; those that are none of whole panels are torch's."""
    plain = random_rows(seed, 2 * pairs, columns, dtype="bfloat16", scale=0.2)
    x = random_rows(seed + 1, rows, 2 * pairs, dtype="bfloat16")
    kernels = NativeKernels(Library(library, "bfloat16"))
    out, whole = fenced(torch.zeros(rows, columns, dtype=torch.bfloat16))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernels.times_into(out, x, plain)
        close(kernels.times(x, plain), x.double() @ plain.double())
    finally:
        torch.set_num_threads(before)
    close(out, x.double() @ plain.double())
    assert fence_stands(whole)


sequences = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 20)), min_size=1, max_size=4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    sequences,
    st.integers(1, 33),
    st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 128])),
    st.lists(st.one_of(st.integers(1, 4), st.integers(1, 18)), min_size=1, max_size=3),
)
@few
def test_attention(
    library: str, dtype: str, threads: int, drawn: list[tuple[int, int]], block_size: int, half: int, groups: list[int]
) -> None:
    """Any number of keys, queries, q heads to a KV head, and dimensions; blocks anywhere. What no sequence has
    written is NaN, beside its last token too."""
    rng, hd, num_kv, num_q = random.Random(half), 2 * half, len(groups), sum(groups)
    lengths = [(max(keys, queries), queries) for keys, queries in drawn]
    tables = [-(-keys // block_size) for keys, _ in lengths]
    order = rng.sample(range(sum(tables) + 2), sum(tables))
    cache = torch.full((2 * num_kv, (sum(tables) + 2) * block_size, hd), float("nan"), dtype=getattr(torch, dtype))
    contexts = []
    for i, (keys, _) in enumerate(lengths):
        blocks = order[sum(tables[:i]) : sum(tables[: i + 1])]
        rows = torch.tensor([blocks[t // block_size] * block_size + t % block_size for t in range(keys)])
        cache[:, rows] = random_rows(i, 2 * num_kv, keys, hd, dtype=dtype)
        contexts.append(cache[:, rows].double())
    num_rows = sum(queries for _, queries in lengths)
    q = random_rows(99, num_rows, num_q, hd, dtype=dtype)
    out, whole = fenced(torch.zeros_like(q))
    heads = rng.sample(range(num_q), num_q)  # which q heads read the first KV head, the second, ...

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    arrays = (
        int32([sum(queries for _, queries in lengths[:i]) for i in range(len(lengths) + 1)]),
        int32([sum(tables[:i]) for i in range(len(tables) + 1)]),
        int32(order),
        int32([(keys - 1) % block_size + 1 for keys, _ in lengths]),
        int32(heads),
        int32([sum(groups[:i]) for i in range(num_kv + 1)]),
    )
    sizes = (len(lengths), num_q, num_kv, hd, block_size, cache.shape[1])
    at = [array.data_ptr() for array in arrays]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        Library(library, dtype).attend(q.data_ptr(), cache.data_ptr(), *at, out.data_ptr(), *sizes)
    finally:
        torch.set_num_threads(before)
    first = 0
    for (keys, queries), context in zip(lengths, contexts, strict=True):
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        for kv in range(num_kv):
            for head in heads[sum(groups[:kv]) : sum(groups[: kv + 1])]:
                scores = q[first : first + queries, head].double() @ context[2 * kv].T / hd**0.5
                expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ context[2 * kv + 1]
                close(out[first : first + queries, head], expected)
        first += queries
    assert fence_stands(whole)


def test_a_number_that_is_none_is_not_hidden(library: str) -> None:
    """A kernel that made a number of NaN would hide weights or a cache that are not there."""
    for dtype in DTYPES:
        kernels, nan = Library(library, dtype), torch.full((1, 2, 16), float("nan"), dtype=getattr(torch, dtype))
        one, out = torch.ones_like(nan), torch.zeros_like(nan)
        kernels.silu_mul(nan.data_ptr(), out.data_ptr(), 1, 16)
        assert out.flatten()[:16].isnan().all()
        kernels.add_norm(nan.data_ptr(), None, one.data_ptr(), out.data_ptr(), 1, 32, 1e-5)
        assert out.isnan().all()
        ints = [torch.tensor(v, dtype=torch.int32) for v in ([0, 1], [0, 1], [0], [1], [0], [0, 1])]
        out.zero_()
        at = [i.data_ptr() for i in ints]
        kernels.attend(one.data_ptr(), nan.data_ptr(), *at, out.data_ptr(), 1, 1, 1, 16, 1, 1)
        assert out.flatten()[:16].isnan().all()


# ------------------------------------------------------------------------------------------------- how they come to be


def test_they_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    run = build._run
    monkeypatch.setattr(build, "_run", lambda command: (commands.append(command), run(command)))
    first = build_kernels(tmp_path)
    assert build_kernels(tmp_path) == first and len(commands) == 2, "compiled, then linked"
    assert [path.name for path in tmp_path.iterdir()] == [first.name], "nothing else is left"
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"another"}))
    assert build_kernels(tmp_path) != first and len(commands) == 4, "another CPU has its own"


def test_many_may_compile_them_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(build_kernels, [tmp_path] * 3))
    (path,) = paths
    Library(str(path), "float32")


def test_they_have_torchs_threads_and_no_others(library: str) -> None:
    """A second OpenMP would have threads of its own, which wait by spinning."""
    code = f"import torch, ctypes; ctypes.CDLL({library!r}); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(set(re.findall(r"\S*/lib(?:g|i)?omp\S*", maps))) == 1, maps


def test_where_they_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    folder = write_model(tmp_path / "model")
    options = {"runtime_dir": tmp_path, "device_memory_bytes": 1 << 28}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def kernels(device: str = "cpu:0", **more: str) -> str:
        return resolve_engine_config(folder, devices=(device,), **options, **more).kernels

    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        kernels(kernels="native")
    assert not caplog.records and kernels() == ""
    assert "no C++ compiler" in caplog.text and "slower" in caplog.text
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match="/no/such/compiler"):
        kernels(kernels="native")
    monkeypatch.setenv("CXX", "/bin/sh -c 'echo it is broken >&2; exit 1'")
    with pytest.raises(ConfigError, match="does not compile"):
        kernels(kernels="native")
    monkeypatch.undo()
    assert kernels(kernels="native") == kernels() != ""
    assert kernels(kernels="torch") == "" == kernels("sim:0")
    with pytest.raises(ConfigError, match="of kind sim"):
        kernels("sim:0", kernels="native")
    with pytest.raises(ConfigError, match="'auto', 'native', 'torch' or 'triton'"):
        kernels(kernels="numpy")


def test_a_library_of_something_else_is_refused(tmp_path: Path) -> None:
    for library in (tmp_path / "absent.so", Path(ctypes.util.find_library("m") or "libm.so.6")):
        with pytest.raises(ConfigError, match="--kernels torch"):
            Library(str(library), "float32")
