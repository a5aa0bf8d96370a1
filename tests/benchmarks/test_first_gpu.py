"""The first session on a GPU, without one: its parts at small sizes in the interpreter, and processes that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bncli.kernels.fused.tiling import Processors, plan
from tests.benchmarks import first_gpu

CPU = torch.device("cpu")
WRITES = "print('words'); print('{\"ms\": 1}')"


def test_a_part_that_hangs_or_fails_ends_alone(tmp_path: Path) -> None:
    scripts = {"hangs": "import time; time.sleep(60)", "fails": "raise SystemExit('no kernel')", "runs": WRITES}
    path = tmp_path / "found.json"
    limits = {"hangs": 0.5, "fails": 20.0, "runs": 20.0}
    assert not first_gpu.session(path, "a card", limits, lambda part: [sys.executable, "-c", scripts[part]])
    found = json.loads(path.read_text())
    assert found["card"] == "a card"
    assert {"torch", "python", "cuda"} <= found["versions"].keys()
    parts = found["parts"]
    assert [each["outcome"] for each in parts.values()] == ["ended after 0.5 s", "failed with status 1", "done"]
    assert parts["fails"]["result"] == ["no kernel"]
    assert parts["runs"]["result"] == {"ms": 1}


def test_the_parts_take_ten_minutes_at_most() -> None:
    assert sum(first_gpu.LIMITS_S.values()) <= 600
    assert first_gpu.LIMITS_S.keys() == {"teams", *first_gpu.PARTS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_gpu.main(["--json", str(tmp_path / "found.json")]) == 3
    assert "nothing was run" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("shape", [(256, 64, 3136), (256, 256, 3136)])
def test_resident_programs_fit_the_registers_of_a_multiprocessor(shape: tuple[int, int, int], programs: int) -> None:
    on = Processors(132, cooperative=True)
    chosen = plan(shape, contiguous=True, itemsize=2, backward=False, processors=on)
    cut = first_gpu.resident(chosen, programs, on.count)
    assert cut.team * cut.teams <= programs * on.count
    assert programs * cut.warps * 32 * cut.registers <= 65_536
    assert cut.rows * cut.unit * 2 == cut.warps * 32 * 16  # bytes of a tile


def test_the_parts_run_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU in this process")
    monkeypatch.setattr(first_gpu, "timed", lambda calls, device: dict.fromkeys([*calls], 1.0))
    shape = (2, 2, 2, 2)
    (found,) = first_gpu.plans(CPU, [shape]).values()
    assert found["share_of_copy"].keys() == {"as chosen", "two launches"}
    assert found["failed"] == {}
    assert found["fastest"] in found["ms"]
    (found,) = first_gpu.frozen(CPU, [shape], "fused-interpreted").values()
    assert found["ms"].keys() == {"fused-interpreted", "native", "copy"}
    found = first_gpu.host(CPU, shape, "fused-interpreted", calls=1, loops=1)["host_us"]
    assert min(found.values()) > 0
    assert len(found) == 4
    assert first_gpu.stages(CPU, shape).keys() & {"note", "ms"}


def test_a_plan_that_is_wrong_or_refused_is_not_timed() -> None:
    x = torch.zeros(4)

    def refused() -> torch.Tensor:
        raise RuntimeError("too many blocks")

    found = first_gpu.compared(x, {"right": lambda: x + 1, "wrong": lambda: x, "refused": refused}, x + 1)
    assert (found["fastest"], found["ms"].keys()) == ("right", {"right", "copy"})
    assert found["failed"].keys() == {"wrong", "refused"}
