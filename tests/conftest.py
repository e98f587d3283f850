"""Settings that must be in place before torch and transformers are imported; child processes inherit them."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator

import pytest
from hypothesis import settings

# One thread: sums come out in the same order on every machine, and tests that start two ranks fit on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
if not os.environ.get("MEGAKRAUSE_TEST_GPU"):
    # Losses and weights are compared with a CPU's, some bit for bit, and two ranks share what one machine has.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Triton's kernels run on CPU tensors, one program after the other.
    os.environ["TRITON_INTERPRET"] = "1"

# An export's modelling file is copied into the Hugging Face cache when it is loaded; a copy from an earlier run, or
# anything else in the user's cache, must not be what a test sees.
_hf_home = tempfile.TemporaryDirectory(prefix="megakrause-hf-")
os.environ["HF_HOME"] = _hf_home.name

# Examples are drawn the same way every time, and the first call of a function may compile it.
settings.register_profile("megakrause", deadline=None, derandomize=True)
settings.load_profile("megakrause")


@pytest.fixture(autouse=True)
def ranks_stay_out_of_the_environment() -> Iterator[None]:
    """A mesh of this process alone says so in the environment; processes that a later test starts must not see it."""
    names = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
    yield
    for name in names:
        os.environ.pop(name, None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How often something was broken on purpose: the sums of what tests record as "trials"."""
    trials: dict[str, int] = defaultdict(int)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "trials" and report.when == "call":
                trials[report.nodeid.partition("[")[0]] += int(str(value))
    if trials:
        terminalreporter.section("trials")
        for test, count in sorted(trials.items()):
            terminalreporter.write_line(f"{count:6}  {test}")
        terminalreporter.write_line(f"{sum(trials.values()):6}  in all")
