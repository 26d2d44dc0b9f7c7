"""Settings of every test: eight virtual CPU devices, strict ranks, no network, shared fixtures."""

import os

# Before JAX is imported: it reads these once. An outer setting wins, so that the suite can be
# pointed at another platform by hand.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Runs in processes of their own keep compiled programs here, never in the home of who tests.
_CACHE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".cache")
os.environ.setdefault("XDG_CACHE_HOME", os.path.join(_CACHE, "xdg"))
# LLVM's optimiser took more than half of the suite's time. It runs after XLA's own passes, so the
# HLO that tests read, its memory and its collectives are the same without it; benchmarks and the
# soak run with it. Level 1 is for the tests that ask for `contracted`, all others compile at 0.
# Processes that tests start inherit these settings.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_backend_optimization_level": 1,
    "--xla_cpu_parallel_codegen_split_count": 1,  # one core for each process of the suite
}
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()

import gc
import hashlib
import importlib.util
import pathlib
import platform
import signal
import warnings

import hypothesis
import jax
import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# A shell ignores SIGINT in all that it starts behind it, and so would tests of Ctrl-C: they hang.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _machine() -> str:
    """A short name of this processor: compiled code must not travel to another one."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = f"{platform.machine()} {platform.processor()} {features}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _compilation_cache() -> str:
    """A folder for compiled programs that only this user can write: it holds executable code."""
    folder = REPOSITORY / ".cache" / "jax" / f"{jax.__version__}-{_machine()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (REPOSITORY / ".cache").chmod(0o700)
    return str(folder)


jax.config.update("jax_compilation_cache_dir", _compilation_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every machine; a slow first compilation is no failure.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


# Folders whose tests compile the most, behind the one file that takes minutes alone. They come
# first, so that no process is left with a long file when the others have nothing more to do.
_LONGEST = "test_readme.py"
_FIRST = ("run", "train", "formats", "models", "compress", "kernels", "losses")
# Files of tests/run that train or plan whole runs of one feature each, a third of the suite's time:
# their tests are marked `long`. What a first distillation needs is tested without them.
_LONG = (
    "ahead",
    "bits",
    "comparison",
    "dpo",
    "faults",
    "guard",
    "lora",
    "memory",
    "mesh",
    "methods",
    "on_policy",
    "on_policy_served",
    "oneself",
    "pairing",
    "planning",
    "processes",
    "pruning",
    "qlora",
    "rewarded",
    "rewarded_served",
    "routing",
    "sparsity",
    "stages",
    "teacher_cache",
    "two_tokenizers",
    "workflow",
)


def pytest_itemcollected(item):
    """Marks the long ones, all variants among them."""
    if item.get_closest_marker("variant"):
        item.add_marker(pytest.mark.long)
    if item.path.parent.name == "run" and item.path.stem.removeprefix("test_") in _LONG:
        item.add_marker(pytest.mark.long)


def pytest_collection_modifyitems(items):
    """Orders the files by cost, and skips parity with transformers where torch is missing."""
    order = {name: number for number, name in enumerate(_FIRST)}
    cost = lambda item: order.get(item.path.parent.name, len(order))
    items.sort(key=lambda item: -1 if item.path.name == _LONGEST else cost(item))
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason="needs torch (make test TORCH=1)"))


def pytest_collection_finish():
    """Tracing makes many short-lived objects: those of the imports need not be looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def contracted():
    """Programs that contract products and sums, for tests that two of them round alike."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _few_mappings():
    """Forgets compiled programs, whose memory mappings Linux limits to 65,530 per process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def mesh8() -> jax.sharding.Mesh:
    """Eight devices as data 2, fsdp 2, tensor 2, context 1."""
    from jaxdistill import sharding

    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    return sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])


@pytest.fixture(scope="session")
def reference_data() -> pathlib.Path:
    """The folder of public data sets beside the checkout (or $JAXDISTILL_DATA), else a skip."""
    folder = pathlib.Path(os.environ.get("JAXDISTILL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set JAXDISTILL_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def transformers_model():
    """A function: folder -> transformers' model in float32, every tensor of the folder used."""

    def load(folder: pathlib.Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own
            from transformers import AutoModelForCausalLM

            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype="float32", output_loading_info=True, local_files_only=True
            )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        return model.eval()

    return load


@pytest.fixture(scope="session")
def transformers_logits(transformers_model):
    """A function: (folder, tokens [B, L]) -> transformers' logits [B, L, V]."""

    def logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transformers_model(folder)(torch.tensor(tokens)).logits.numpy()

    return logits
