"""The Triton row pass compiled and tuned for a GPU that need not be there, and where it says that it cannot run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moalign.ops import triton_rows
from moalign.ops.triton_rows import launch

triton = pytest.importorskip("triton", reason="Triton has no package for this platform")


class Compiler:
    """A driver for Triton that has kernels compiled and notes what would be launched, but computes nothing."""

    def __init__(self) -> None:
        self.utils = self
        self.launches: list[SimpleNamespace] = []

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 77  # Triton remembers a device's properties: none that exists

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert kernel.startswith(b"\x7fELF")
        return name, name, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def record(*arguments: Any) -> None:
            named = dict(zip(source.fn.arg_names, arguments[9:], strict=True))
            self.launches.append(SimpleNamespace(metadata=metadata, grid=arguments[:3], **named))

        return record


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compiler]:
    if not isinstance(triton.language.sum, triton.JITFunction):
        pytest.skip("this process imported Triton as an interpreter (TRITON_INTERPRET is set)")
    driver = Compiler()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton_rows, "_tuned", {})
    triton_rows._kernel.cache_clear()
    yield driver
    triton_rows._kernel.cache_clear()


def test_compiles_for_a_gpu(compiler: Compiler) -> None:
    product, labels = torch.randn(2, 1000), torch.tensor([3, 4])
    launch(product, labels, None, temperature=1.0, softcap=None, entropy=False, gradient=product)
    rounded, spread, bias = (torch.empty(size, dtype=torch.bfloat16) for size in ((2, 1000), (2, 1000), (1000,)))
    ones = torch.ones(2)
    options = {"gradient": rounded, "entropy_gradient": spread, "d_logps": ones, "d_entropy": ones}
    launch(product, labels, bias, temperature=0.7, softcap=30.0, entropy=True, **options)
    kernel, _, _ = triton_rows._kernel(False)
    in_float32, in_bfloat16 = (compiled.asm["ptx"] for compiled in kernel.device_caches[77][0].values())
    for ptx in (in_float32, in_bfloat16):
        assert "ld.global.nc" not in ptx, "in place, what is read is also written: the read-only cache is forbidden"
        assert "st.local" not in ptx, "registers are spilled"
    assert "bf16" not in in_float32
    assert "cvt.rn.bf16" in in_bfloat16
    for seen in compiler.launches:
        assert seen.grid == (2, 1, 1)
        assert seen.metadata.num_warps == triton_rows.UNTUNED["num_warps"]
        assert not seen.metadata.enable_fp_fusion


def test_tuning_leaves_the_product_alone_and_is_remembered(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting is tried on a copy; the caller's rows see one launch, with the fastest. Later processes know it."""

    def time(call: Any, quantiles: tuple[float, ...]) -> list[float]:
        call()
        return [10.0 - len(compiler.launches)] * len(quantiles)

    settings = ((1024, 4, 1), (2048, 8, 2), (4096, 16, 1))
    monkeypatch.setattr(triton_rows, "_time", time)
    monkeypatch.setattr(triton_rows, "SETTINGS", settings)
    monkeypatch.setattr(triton_rows, "TUNING_BYTES", 4 * 130 * 1000)
    product, labels = torch.randn(triton_rows.ROWS_TO_TUNE + 9, 1000), torch.zeros(137, dtype=torch.long)

    def launches() -> list[SimpleNamespace]:
        compiler.launches.clear()
        launch(product, labels, None, temperature=1.0, softcap=None, entropy=True, gradient=product)
        return compiler.launches.copy()

    *tuning, final = launches()
    assert [seen.BLOCK_V for seen in tuning] == [1024, 2048, 4096, 4096]
    assert {seen.grid for seen in tuning} == {(130, 1, 1)}
    for seen in tuning:
        assert seen.product is seen.gradient
        assert seen.product.data_ptr() != product.data_ptr()
        assert torch.equal(seen.product, product[:130])
    assert (final.BLOCK_V, final.metadata.num_warps, final.STAGES) == settings[-1]
    assert final.product is final.gradient is product
    assert final.grid == (137, 1, 1)
    assert len(launches()) == 1

    triton_rows._kernel.cache_clear()
    triton_rows._tuned.clear()
    once, final = launches()
    assert once.product is not product
    assert final.product is product
    assert once.BLOCK_V == final.BLOCK_V == 4096


# --- where it runs ----------------------------------------------------------------------------------------------------


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, float32 = torch.device("cpu"), torch.device("cuda"), torch.float32
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "float64" in str(triton_rows.available(gpu, torch.float64))
    assert "mps" in str(triton_rows.available(torch.device("mps"), float32))
    assert "interpreter" in str(triton_rows.available(cpu, float32))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=0" in str(triton_rows.available(cpu, float32))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_rows.available(cpu, float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "Turing" in str(triton_rows.available(gpu, float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton_rows.available(gpu, float32) is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in str(triton_rows.available(gpu, float32))


def test_importing_it_does_not_import_triton() -> None:
    code = "import sys, moalign.ops.triton_rows; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
